"""ICM-PPO: whole iterations against slow ones; features, both models, endings, learning; the television.

What rnd_ppo.py has too, word for word, is tested in test_rnd_ppo.py.
"""

import csv
import importlib
import json
import math
import sys
import warnings
from pathlib import Path

import ale_py
import counter_env  # noqa: F401 (registers the Counter environments)
import gymnasium as gym
import icm_ppo
import numpy as np
import pytest
import torch
from envs import noisy_tv as tv
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from icm_ppo import Agent, Args

sys.path.insert(0, str(Path(__file__).parent / "benchmark"))
experiment = importlib.import_module("noisy_tv")
gym.register_envs(ale_py)
KINDS = ["raw", "random", "inverse"]


class Endings(gym.Env):
    """Episodes of 2, 3 or 4 steps that end in turn by termination, by truncation and by both.

    What is observed and paid depends on the seed and on every action. `seeds` keeps the seeds of all resets.
    """

    seeds: list[int] = []

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(3)
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        if seed is not None:
            self.seeds.append(seed)
            self.offset = int(self.np_random.integers(3))
            self.episode = 0
        self.left = 2 + (self.offset + self.episode) % 3
        self.x = self.np_random.normal([0, 3, -1], [1, 2, 0.5])
        return self.x.astype(np.float32), {}

    def step(self, action):
        reward = self.x[action] - 0.3 * action
        self.x = 2 * np.cos(self.x[::-1] + action)
        self.left -= 1
        ending = (self.offset + 2 * self.episode) % 3 if self.left == 0 else None
        return self.x.astype(np.float32), reward, ending in (0, 2), ending in (1, 2), {}


class Corridor(gym.Env):
    """Ten doors in a row, four switches each: the right one opens, the wrong ones throw back to the start.

    Observes which door is next, one-hot. Pays 1 behind the last door, which one in 4¹⁰ random tries finds.
    """

    SWITCHES = (2, 0, 3, 1, 1, 2, 0, 3, 2, 1)

    def __init__(self, render_mode=None):
        self.observation_space = gym.spaces.Box(0, 1, (len(self.SWITCHES) + 1,), np.float32)
        self.action_space = gym.spaces.Discrete(4)
        self.picture = np.eye(len(self.SWITCHES) + 1, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.door = 0
        return self.picture[0].copy(), {}

    def step(self, action):
        self.door = self.door + 1 if action == self.SWITCHES[self.door] else 0
        out = self.door == len(self.SWITCHES)
        return self.picture[self.door].copy(), float(out), out, False, {}


gym.register("EndingsICM-v0", entry_point=Endings)
gym.register("CorridorICM-v0", entry_point=Corridor, max_episode_steps=40)


def small(folder, **settings) -> Args:
    """Settings of a short run in this folder."""
    usual = {
        "env_id": "EndingsICM-v0",
        "num_envs": 3,
        "num_steps": 8,
        "num_minibatches": 2,
        "update_epochs": 2,
        "init_steps": 5,
        "total_timesteps": 60,
        "eval_episodes": 1,
        "run_dir": str(folder / "run"),
    }
    return Args(**{**usual, **settings})


@pytest.fixture
def charts(monkeypatch) -> dict:
    """What is logged: {(tag, step): value}."""
    points = {}

    def add_scalar(self, tag, value, step):
        points[tag, step] = value

    monkeypatch.setattr(icm_ppo.SummaryWriter, "add_scalar", add_scalar)
    return points


class Spy:
    """Calls the original and keeps copies of what it was called with."""

    def __init__(self, original):
        self.original, self.calls = original, []

    def __call__(self, *args):
        self.calls.append([x.copy() if isinstance(x, np.ndarray) else x for x in args])
        return self.original(*args)


def checkpoint(args: Args) -> dict:
    return torch.load(f"{args.resume or args.run_dir}/checkpoint.pt", weights_only=True)


def fresh(
    kind="inverse", shape=(2, 3), num_actions=3, seed=1, phi_scale=0.01, ortho_init=True, norm_obs=True
) -> Agent:
    """An agent before its first step, as a run with this seed makes it."""
    torch.manual_seed(seed)
    return Agent(shape, num_actions, kind, phi_scale, ortho_init, norm_obs)


# ---- whole iterations ----


def mean(numbers):
    return sum(numbers) / len(numbers)


class Slow:
    """PPO with curiosity in plain loops, one row at a time, float64 and an Adam of its own."""

    def __init__(self, args: Args) -> None:
        switches = {"ortho_init": args.ortho_init, "norm_obs": args.norm_obs, "phi_scale": args.phi_scale}
        first = fresh(args.features, seed=args.seed, **switches).state_dict()
        self.args = args
        self.weights = {name: x.double() for name, x in first.items() if not name.startswith("norm_")}
        fixed = () if args.features == "inverse" else ("phi",)
        self.learning = [name for name in self.weights if not name.startswith(fixed)]
        for name in self.learning:
            self.weights[name].requires_grad_()
        self.momentum = {name: torch.zeros_like(self.weights[name]) for name in self.learning}
        self.square = {name: torch.zeros_like(self.weights[name]) for name in self.learning}
        self.updates = 0
        self.seen = []  # all that the statistics of the observations know
        self.gathered = []  # all u of equation (12)
        self.u = [0.0] * args.num_envs
        self.envs = [Endings() for _ in range(args.num_envs)]
        self.scores = [0.0] * args.num_envs
        self.lengths = [0] * args.num_envs
        self.observed = [None] * args.num_envs
        self.memory = [None] * args.num_envs
        for n, seed in enumerate(icm_ppo.env_seeds(args.num_envs, args.seed, 2)):
            self.envs[n].reset(seed=seed)
        for _ in range(args.init_steps):
            for env, action in zip(self.envs, torch.randint(3, (args.num_envs,)).tolist(), strict=True):
                obs, _, terminated, truncated, _ = env.step(action)
                self.seen.append(env.reset()[0] if terminated or truncated else obs)
        for n, seed in enumerate(icm_ppo.env_seeds(args.num_envs, args.seed, 0, 0)):
            self.start(n, self.envs[n].reset(seed=seed)[0])

    def start(self, n, obs):
        self.observed[n] = obs
        self.memory[n] = obs

    def layer(self, name, x):
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def three_layers(self, name, x):
        x = torch.as_tensor(np.ravel(x), dtype=torch.float64)
        x = self.layer(f"{name}.1", x).clamp(min=0)
        return self.layer(f"{name}.5", self.layer(f"{name}.3", x).clamp(min=0))

    def two_layers(self, name, *parts):
        return self.layer(f"{name}.2", self.layer(f"{name}.0", torch.cat(parts)).clamp(min=0))

    def normalised(self, obs):
        seen = np.array(self.seen, dtype=float)
        return np.clip((obs - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8), -5, 5)

    def inputs(self, memory, obs):
        """What policy and values see."""
        both = np.array([memory, obs], dtype=float)
        return self.normalised(both) if self.args.norm_obs else both

    def probabilities(self, inputs):
        powers = self.three_layers("actor", inputs).exp()
        return powers / powers.sum()

    def values(self, inputs):
        return self.three_layers("critic", inputs)

    def phi(self, obs):
        x = torch.as_tensor(self.normalised(obs))
        if self.args.features == "raw":
            return x
        x = self.layer("phi.1", x)
        return self.layer("phi.3", torch.where(x > 0, x, 0.01 * x))

    def prediction_error(self, row):
        with torch.no_grad():
            phi, next_phi = self.phi(row["before"]), self.phi(row["obs"])
        action = torch.tensor([float(row["a"] == i) for i in range(3)], dtype=torch.float64)
        return ((self.two_layers("forward_model", phi, action) - next_phi) ** 2).mean()

    def wrong_guess(self, row):
        powers = self.two_layers("inverse_model", self.phi(row["before"]), self.phi(row["obs"])).exp()
        return -(powers[row["a"]] / powers.sum()).log()

    def rollout(self):
        """The rows of one rollout, and (episodic return, length) of the episodes that ended in it."""
        args = self.args
        beta = args.memory
        noise = -torch.empty(args.num_steps, args.num_envs, 3).exponential_().log()
        rows, ended = [], []
        for t in range(args.num_steps):
            for n, env in enumerate(self.envs):
                row = {"t": t, "n": n, "inputs": self.inputs(self.memory[n], self.observed[n])}
                row["before"] = self.observed[n]
                p = self.probabilities(row["inputs"])
                a = max(range(3), key=lambda i: p[i].log().item() + noise[t, n, i].item())
                obs, reward, terminated, truncated, _ = env.step(a)
                row |= {"a": a, "old_p": p[a].item(), "terminated": terminated}
                row |= {"r": float(np.sign(reward)) if args.clip_rewards else float(reward)}
                row |= {"ended": terminated or truncated, "obs": obs}
                row["v"], row["int_v"] = self.values(row["inputs"]).tolist()
                self.memory[n] = beta * self.memory[n] + (1 - beta) * obs
                self.observed[n] = obs
                row["next_v"] = self.values(self.inputs(self.memory[n], obs))[0].item()
                self.scores[n] += reward
                self.lengths[n] += 1
                if row["ended"]:
                    ended.append((self.scores[n], self.lengths[n]))
                    self.scores[n] = 0.0
                    self.lengths[n] = 0
                    self.start(n, env.reset()[0])
                after = self.values(self.inputs(self.memory[n], self.observed[n]))
                row["v_after"], row["int_next_v"] = after.tolist()
                row["e"] = self.prediction_error(row).item()
                rows.append(row)
        return rows, ended

    def estimate(self, rows, left):
        """Intrinsic rewards, advantages and targets, added to the rows. left: share of the budget."""
        args = self.args
        int_coef = args.int_coef
        if args.int_fraction:  # a straight line from int_coef at the start to 0 at this share of the budget
            int_coef = max(0, int_coef * (args.int_fraction - 1 + left) / args.int_fraction)
        for row in rows:
            row["i"] = 0.0
            if args.int_coef:
                self.u[row["n"]] = args.int_gamma * self.u[row["n"]] + row["e"]
                self.gathered.append(self.u[row["n"]])
        if args.int_coef:
            for row in rows:
                row["i"] = row["e"] / math.sqrt(np.var(self.gathered) + 1e-8)
        for index, row in enumerate(rows):
            row["task"] = row["curious"] = 0.0
            decay, int_decay, playing = 1.0, 1.0, True
            for later in rows[index :: args.num_envs]:
                if playing:
                    next_v = 0.0 if later["terminated"] else later["next_v"]
                    row["task"] += decay * (later["r"] + args.gamma * next_v - later["v"])
                int_delta = later["i"] + args.int_gamma * later["int_next_v"] - later["int_v"]
                row["curious"] += int_decay * int_delta
                playing = playing and not later["ended"]
                decay *= args.gamma * args.gae_lambda
                int_decay *= args.int_gamma * args.gae_lambda
            row["A"] = args.ext_coef * row["task"] + int_coef * row["curious"]

    def loss(self, rows):
        """Equations (5) to (9), (11) and (16), row by row: the loss, and what is logged of it."""
        args = self.args
        advantages = [row["A"] for row in rows]
        if args.norm_adv:
            centre = mean(advantages)
            spread = math.sqrt(mean([(a - centre) ** 2 for a in advantages])) + 1e-8
            advantages = [(a - centre) / spread for a in advantages]
        low, high = 1 - args.clip_coef, 1 + args.clip_coef
        objectives, errors, int_errors, entropies, ratios = [], [], [], [], []
        for row, advantage in zip(rows, advantages, strict=True):
            p = self.probabilities(row["inputs"])
            ratio = p[row["a"]] / row["old_p"]
            clipped = ratio if low <= ratio <= high else torch.tensor(low if ratio < low else high)
            objectives.append(min(ratio * advantage, clipped * advantage))
            value, int_value = self.values(row["inputs"])
            errors.append((value - row["task"] - row["v"]) ** 2 / 2)
            int_errors.append((int_value - row["curious"] - row["int_v"]) ** 2 / 2)
            entropies.append(-sum(p[i] * p[i].log() for i in range(3)))
            ratios.append(ratio.item())
        loss = -mean(objectives) + args.vf_coef * mean(errors) - args.ent_coef * mean(entropies)
        logged = {
            "policy_loss": -mean(objectives).item(),
            "value_loss": mean(errors).item(),
            "intrinsic_value_loss": mean(int_errors).item(),
            "entropy": mean(entropies).item(),
            "approx_kl": mean([r - 1 - math.log(r) for r in ratios]),
            "clip_fraction": mean([float(not low <= r <= high) for r in ratios]),
        }
        if args.int_coef:
            share = rows[: int(args.predictor_share * len(rows))]
            error = mean([self.prediction_error(row) for row in share])
            loss = loss + args.vf_coef * mean(int_errors) + error
            logged["forward_loss"] = error.item()
            if args.features == "inverse":
                wrong = mean([self.wrong_guess(row) for row in share])
                loss = loss + wrong
                logged["inverse_loss"] = wrong.item()
        return loss, logged

    def step(self, loss, rate):
        """One step of Adam; returns the length of the gradient of policy and values."""
        leaves = [self.weights[name] for name in self.learning]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients = {name: g for name, g in zip(self.learning, found, strict=True) if g is not None}
        clipped = [name for name in gradients if name.startswith(("actor", "critic"))]
        norm = math.sqrt(sum((gradients[name] ** 2).sum().item() for name in clipped))
        limit = self.args.max_grad_norm
        self.updates += 1
        for name, g in gradients.items():
            if name in clipped and limit:
                g = g * min(1, limit / norm)
            self.momentum[name] = 0.9 * self.momentum[name] + 0.1 * g
            self.square[name] = 0.999 * self.square[name] + 0.001 * g**2
            m = self.momentum[name] / (1 - 0.9**self.updates)
            v = self.square[name] / (1 - 0.999**self.updates)
            new = self.weights[name] - rate * m / (v.sqrt() + 1e-8)
            self.weights[name] = new.detach().requires_grad_()
        return norm

    def iteration(self, number):
        """One iteration; returns what is logged."""
        args = self.args
        rows, ended = self.rollout()
        self.estimate(rows, 1 - number * len(rows) / args.total_timesteps)
        rate = args.learning_rate
        if args.anneal_lr:
            rate *= 1 - number * len(rows) / args.total_timesteps
        for _ in range(args.update_epochs):
            order = torch.randperm(len(rows)).tolist()
            size = len(rows) // args.num_minibatches
            for begin in range(0, len(rows), size):
                loss, log = self.loss([rows[i] for i in order[begin : begin + size]])
                log["grad_norm"] = self.step(loss, rate)
        self.seen += [row["obs"] for row in rows]
        residuals = np.var([row["task"] for row in rows])
        log["explained_variance"] = 1 - residuals / np.var([row["task"] + row["v"] for row in rows])
        log = {f"losses/{name}": value for name, value in log.items()}
        last = rows[-args.num_envs :]  # the values of what the last steps led to are in the chart, too
        log["charts/value"] = mean([row["v"] for row in rows] + [row["v_after"] for row in last])
        int_values = [row["int_v"] for row in rows] + [row["int_next_v"] for row in last]
        log["charts/intrinsic_value"] = mean(int_values)
        if args.int_coef:
            log["charts/prediction_error"] = mean([row["e"] for row in rows])
            log["charts/intrinsic_reward"] = mean([row["i"] for row in rows])
        log["charts/learning_rate"] = rate
        log["charts/episodic_return"] = mean([score for score, _ in ended])
        log["charts/episodic_length"] = mean([length for _, length in ended])
        return log


ALL_ON = {
    "clip_rewards": True,
    "int_coef": 1.5,
    "ext_coef": 0.7,
    "ent_coef": 0.1,
    "vf_coef": 1.3,
    "clip_coef": 0.05,
    "max_grad_norm": 0.1,
    "learning_rate": 2e-3,
    "gamma": 0.8,
    "int_gamma": 0.9,
    "gae_lambda": 0.7,
    "predictor_share": 0.25,
    "int_fraction": 0.8,
    "memory": 0.6,
    "seed": 5,
}
ALL_OFF = {
    "ortho_init": False,
    "anneal_lr": False,
    "norm_adv": False,
    "norm_obs": False,
    "phi_scale": 1.0,
    "int_fraction": 0.0,
    "max_grad_norm": 0.0,
    "predictor_share": 1.0,
    "memory": 0.0,
    "gae_lambda": 1.0,
    "num_minibatches": 1,
    "learning_rate": 2e-3,
}
WHOLE = {
    "inverse": {},
    "random": {"features": "random"},
    "raw": {"features": "raw", "int_fraction": 0.3},
    "inverse, all on": ALL_ON,
    "random, all on": ALL_ON | {"features": "random"},
    "inverse, all off": ALL_OFF,
    "random, all off": ALL_OFF | {"features": "random"},
    "no curiosity": {"int_coef": 0.0, "seed": 3},
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_iterations_equal_slow_ones(name, tmp_path, charts):
    """Two rollouts with all endings: every weight, every statistic and every logged number."""
    args = small(tmp_path, **WHOLE[name])
    icm_ppo.train(args)
    saved = checkpoint(args)
    slow = Slow(args)
    for number in range(2):
        log = slow.iteration(number)
        step = (number + 1) * args.batch_size
        assert set(log) == {tag for tag, at in charts if at == step} - {"charts/SPS"}
        for tag, value in log.items():
            assert charts[tag, step] == pytest.approx(value, rel=2e-4, abs=2e-6), (tag, step)
    assert saved["global_step"] == step
    got = saved["agent"]
    assert set(slow.weights) == {name for name in got if not name.startswith("norm_")}
    for key, x in slow.weights.items():
        torch.testing.assert_close(got[key].double(), x.detach(), rtol=0, atol=4e-5)
    seen = np.array(slow.seen, dtype=float)
    assert got["norm_obs.count"] == len(seen) == 3 * (5 + 16)
    np.testing.assert_allclose(got["norm_obs.mean"], seen.mean(0, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(got["norm_obs.var"], seen.var(0, keepdims=True), rtol=1e-6)
    if args.int_coef:
        np.testing.assert_allclose(got["norm_past.var"], np.var(slow.gathered), rtol=1e-3)
        np.testing.assert_allclose(saved["extra"]["carry"], slow.u, rtol=1e-4)


# ---- features and models ----


def gradients(agent: Agent, loss: torch.Tensor) -> set[str]:
    """Which networks a loss would train: those with a gradient other than zero."""
    agent.zero_grad()
    loss.backward()
    return {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("kind", KINDS)
def test_which_loss_trains_which_network(kind):
    """Prediction errors must train the forward model alone, and only the inverse loss trains features."""
    agent = fresh(kind)
    x, next_x = torch.randn(2, 16, 1, 3)
    actions = torch.randint(3, (16,))
    phi, next_phi = agent.features(x), agent.features(next_x)
    assert gradients(agent, agent.prediction_error(phi, actions, next_phi).mean()) == {"forward_model"}
    if kind == "inverse":
        # Through either side: that before the action and that after it.
        for pair in ((phi, next_phi.detach()), (phi.detach(), next_phi)):
            loss = -icm_ppo.log_prob(agent.guess(*pair), actions).mean()
            assert gradients(agent, loss) == {"phi", "inverse_model"}
    else:
        assert agent.inverse_model is None
        assert not phi.requires_grad and not next_phi.requires_grad


def test_the_prediction_error_by_hand():
    """Two features, three actions: the forward model adds the action's number to both features."""
    agent = fresh("raw", shape=(2, 2))
    first, last = agent.forward_model[0], agent.forward_model[2]
    with torch.no_grad():
        for p in agent.forward_model.parameters():
            p.zero_()
        first.weight[0, :] = torch.tensor([1.0, 0, 0, 1, 2])  # hidden 0: feature 0 plus the action's number
        first.weight[1, :] = torch.tensor([0, 1.0, 0, 1, 2])
        last.weight[0, 0] = last.weight[1, 1] = 1.0
    phi = torch.tensor([[1.0, 2.0], [0.0, 3.0], [5.0, 1.0]])
    next_phi = torch.tensor([[1.0, 2.0], [1.0, 7.0], [5.0, 0.0]])
    errors = agent.prediction_error(phi, torch.tensor([0, 1, 2]), next_phi)
    assert errors.tolist() == [0, (0 + 9) / 2, (4 + 9) / 2]


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_an_observation(kind):
    agent = fresh(kind, shape=(2, 7))
    data = torch.randn(50, 1, 7) * 3 + 2
    agent.norm_obs.update(data)
    x = torch.randn(9, 1, 7) * 3 + 2
    want = ((x - data.mean(0)) / data.std(0, correction=0)).clamp(-5, 5)[:, 0]
    got = agent.features(x)
    if kind == "raw":
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        return
    assert got.shape == (9, 128)
    hidden = agent.phi[1](want)
    torch.testing.assert_close(got, agent.phi[3](torch.where(hidden > 0, hidden, 0.01 * hidden)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 7), (4, 84, 84)])
def test_the_networks_and_their_first_weights(shape, kind):
    agent = fresh(kind, shape=shape, num_actions=5, ortho_init=len(shape) == 2)
    frames = len(shape) == 3
    size = {"raw": math.prod(shape[1:])}.get(kind, 512 if frames else 128)
    width = 512 if frames else 256
    sizes = {name: tuple(p.shape) for name, p in agent.named_parameters() if p.ndim > 1}
    want = {"forward_model.0.weight": (width, size + 5), "forward_model.2.weight": (size, width)}
    if kind == "inverse":
        want |= {"inverse_model.0.weight": (width, 2 * size), "inverse_model.2.weight": (5, width)}
    if kind != "raw" and frames:
        kernels = {"0": (32, 1, 8, 8), "2": (64, 32, 4, 4), "4": (64, 64, 3, 3), "7": (512, 3136)}
        want |= {f"phi.{i}.weight": kernel for i, kernel in kernels.items()}
    elif kind != "raw":
        want |= {"phi.1.weight": (128, 7), "phi.3.weight": (128, 128)}
    assert {name: s for name, s in sizes.items() if not name.startswith(("actor", "critic"))} == want
    for name, p in agent.named_parameters():
        assert p.requires_grad == (kind == "inverse" or not name.startswith("phi")), name
    if frames:
        newest = torch.randint(0, 256, (3, 1, 84, 84), dtype=torch.uint8)
        assert agent.features(newest).shape == (3, size)
        return
    gains = {"actor.5.weight": 0.01, "critic.5.weight": 1.0}
    gains |= {"phi.3.weight": 0.01 * 2**0.5} if kind == "inverse" else {}
    for name, p in agent.named_parameters():
        if p.ndim == 1:
            assert (p == 0).all(), name
            continue
        rows = p.detach() if len(p) <= p.shape[1] else p.detach().T
        want = gains.get(name, 2**0.5) ** 2 * torch.eye(len(rows))
        torch.testing.assert_close(rows @ rows.T, want, rtol=0, atol=1e-5)
    assert all((p != 0).any() for p in fresh(kind, shape=shape, ortho_init=False).parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_prediction_error_falls_where_the_model_was_and_stays_elsewhere(kind):
    agent = fresh(kind, shape=(2, 6), phi_scale=1.0)
    torch.manual_seed(0)
    seen = torch.randn(2, 64, 1, 6) + 2
    unseen = torch.randn(2, 64, 1, 6) - 2
    agent.norm_obs.update(torch.cat([*seen, *unseen]))
    actions = torch.randint(3, (64,))

    def error(pair):
        return agent.prediction_error(agent.features(pair[0]), actions, agent.features(pair[1])).mean()

    before = error(seen).item(), error(unseen).item()
    optimizer = torch.optim.Adam(agent.forward_model.parameters(), 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        error(seen).backward()
        optimizer.step()
    assert error(seen).item() < 0.15 * before[0]
    assert error(unseen).item() > 0.3 * before[1]


# ---- what training does and keeps ----


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "neither"])
def test_what_is_predicted_where_episodes_end(ending, tmp_path, monkeypatch):
    """Two environments, episodes of 3 steps, rollouts of 4, observations [episode, step]: the next state of
    an action is that before the reset, and no pair is of two episodes, in the reward and in both losses."""
    pairs = []

    def features(self, newest):
        return newest[:, 0] + 0 * self.forward_model[0].weight[:2, 0]  # [episode, step], not normalised

    def prediction_error(self, phi, actions, next_phi):
        pairs.append(torch.cat([phi, next_phi], dim=-1).detach().numpy())
        return next_phi[:, 1] + 1000 + 0 * self.forward_model[0].weight.sum()

    def guess(self, phi, next_phi):
        guessed.append(torch.cat([phi, next_phi], dim=-1).detach().numpy())
        return 0 * self.inverse_model[2].weight[:2, :1].sum() + torch.zeros(len(phi), 2)

    guessed = []
    for function in (features, prediction_error, guess):
        monkeypatch.setattr(Agent, function.__name__, function)
    past = Spy(icm_ppo.discounted_past)
    spied_gae = Spy(icm_ppo.gae)
    monkeypatch.setattr(icm_ppo, "discounted_past", past)
    monkeypatch.setattr(icm_ppo, "gae", spied_gae)
    monkeypatch.setattr(icm_ppo, "MAX_EVAL_STEPS", 9)
    own = {"env_id": f"Counter-{ending}-v0", "num_envs": 2, "num_steps": 4, "total_timesteps": 8}
    icm_ppo.train(small(tmp_path, predictor_share=1.0, **own))
    ends = ending != "neither"
    e = pairs[0][0, 0]  # random steps came before: the first rollout starts with a later episode
    steps = [(0, 1), (1, 2), (2, 3), (0, 1) if ends else (3, 4)]
    episodes = [e, e, e, e + 1 if ends else e]
    want = np.repeat([[n, a, n, b] for n, (a, b) in zip(episodes, steps, strict=True)], 2, axis=0)
    np.testing.assert_array_equal(np.concatenate(pairs[:2]), want)  # two minibatches without shuffling
    for kept in (pairs[2:], guessed):  # two epochs
        both = np.concatenate(kept)
        order = np.lexsort(both.T[::-1])
        np.testing.assert_array_equal(
            both[order], np.repeat(want, 2, axis=0)[np.lexsort(np.repeat(want, 2, axis=0).T[::-1])]
        )
    # The reward goes over time, each environment for itself; its returns know no endings.
    novel = np.repeat([[b + 1000] for _, b in steps], 2, axis=1)
    np.testing.assert_array_equal(past.calls[0][0], novel)
    extrinsic, intrinsic = spied_gae.calls
    np.testing.assert_array_equal(extrinsic[3][:, 0], [False, False, ending in ("terminated", "both"), False])
    np.testing.assert_array_equal(extrinsic[4][:, 0], [False, False, ending in ("truncated", "both"), False])
    sums = icm_ppo.discounted_past(novel, np.zeros(2), 0.99)
    np.testing.assert_allclose(intrinsic[0], novel / sums.std(), rtol=1e-5)
    assert not intrinsic[3].any() and not intrinsic[4].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_moves_and_what_it_leaves(kind, tmp_path):
    args = small(tmp_path, features=kind)
    icm_ppo.train(args)
    trained = checkpoint(args)["agent"]
    first = fresh(kind).state_dict()
    assert set(trained) == set(first)
    for name in first:
        fixed = name.startswith("phi.") and kind == "random"
        assert torch.equal(trained[name], first[name]) == fixed, name
    assert any(name.startswith("phi.") for name in first) == (kind != "raw")


def test_no_curiosity_is_plain_ppo(tmp_path):
    args = small(tmp_path, int_coef=0.0)
    icm_ppo.train(args)
    trained = checkpoint(args)["agent"]
    first = fresh().state_dict()
    for name in first:
        untouched = name.startswith(("phi.", "forward_model.", "inverse_model.", "norm_past."))
        assert torch.equal(trained[name], first[name]) == untouched or name == "critic.5.weight", name
    assert torch.equal(trained["critic.5.weight"][1], first["critic.5.weight"][1])  # the intrinsic value
    assert not torch.equal(trained["critic.5.weight"][0], first["critic.5.weight"][0])


@pytest.mark.parametrize("num_envs", [3, 5])
def test_resume_goes_on_with_statistics_filter_and_schedule(num_envs, tmp_path, monkeypatch, charts):
    args = small(tmp_path)
    icm_ppo.train(args)
    before = checkpoint(args)
    carry = before["extra"]["carry"]
    assert len(set(carry)) == 3 and min(carry) > 0
    spied = Spy(icm_ppo.discounted_past)
    monkeypatch.setattr(icm_ppo, "discounted_past", spied)
    Endings.seeds.clear()
    steps = 8 * num_envs
    more = {"num_envs": num_envs, "total_timesteps": 48 + steps, "resume": args.run_dir, "run_dir": None}
    resumed = small(tmp_path, **more)
    icm_ppo.train(resumed)
    after = checkpoint(resumed)
    np.testing.assert_allclose(spied.calls[0][1], (carry + carry)[:num_envs], rtol=1e-6)
    # The random steps beforehand are not taken again, and the episodes are new.
    assert after["agent"]["norm_obs.count"] == before["agent"]["norm_obs.count"] + steps
    assert after["agent"]["norm_past.count"] == before["agent"]["norm_past.count"] + steps
    assert Endings.seeds[:num_envs] == icm_ppo.env_seeds(num_envs, 1, 0, 48)
    assert charts["charts/learning_rate", 48 + steps] == pytest.approx(4e-4 * steps / (48 + steps))


@pytest.mark.parametrize(
    "switch",
    [
        {"features": "random"},
        {"features": "raw"},
        {"predictor_share": 1.0},
        {"memory": 0.5},
        {"phi_scale": 1.0},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_switches_that_are_read(switch, tmp_path, usual_weights):
    """The others are in the whole iterations above."""
    args = small(tmp_path, **switch)
    icm_ppo.train(args)
    assert not torch.equal(checkpoint(args)["agent"]["actor.1.weight"], usual_weights)


@pytest.fixture(scope="module")
def usual_weights(tmp_path_factory) -> torch.Tensor:
    args = small(tmp_path_factory.mktemp("usual"))
    icm_ppo.train(args)
    return checkpoint(args)["agent"]["actor.1.weight"]


@pytest.mark.parametrize("gumbel", [True, False])
def test_noise_is_made_once_a_rollout_or_drawn_at_every_step(gumbel, tmp_path, monkeypatch):
    noise, drawn = Spy(icm_ppo.gumbel_noise), Spy(torch.multinomial)
    monkeypatch.setattr(icm_ppo, "gumbel_noise", noise)
    monkeypatch.setattr(torch, "multinomial", drawn)
    icm_ppo.train(small(tmp_path, gumbel=gumbel))  # two rollouts of eight steps
    assert noise.calls[: 2 * gumbel] == [[8, 3, 3]] * (2 * gumbel)
    assert ([8, 3, 3] in noise.calls) == gumbel and len(drawn.calls) == (0 if gumbel else 16)


@pytest.mark.parametrize("env_id", ["MiniGrid-DoorKey-5x5-v0", "ALE/MontezumaRevenge-v5", "EndingsICM-v0"])
def test_curiosity_looks_at_the_newest_entry_only(env_id, tmp_path, monkeypatch):
    """Of Atari's four frames the last one; of memory and observation the observation."""
    atari = env_id.startswith("ALE/")
    before, after, looked = [], [], []
    reset, step, features = (
        icm_ppo.RecordEpisodeStatistics.reset,
        icm_ppo.RecordEpisodeStatistics.step,
        Agent.features,
    )

    def newest(obs):
        return (obs[:, -1:] if atari else obs[:, None]).copy()

    def spying_reset(self, **options):
        result = reset(self, **options)
        before[:], after[:] = [newest(result[0])], []
        return result

    def spying_step(self, actions):
        result = step(self, actions)
        obs = result[0].copy()
        for n in np.flatnonzero(result[2] | result[3]):
            obs[n] = result[4]["final_obs"][n]
        after.append(newest(obs))
        before.append(newest(result[0]))
        return result

    def spying_features(self, x):
        looked.append(x.numpy().copy())
        if len(looked) == 5:  # two minibatches, both sides, and then the losses
            shown.extend([np.concatenate(before[:4]), np.concatenate(after[:4])])
        return features(self, x)

    shown = []
    monkeypatch.setattr(icm_ppo.RecordEpisodeStatistics, "reset", spying_reset)
    monkeypatch.setattr(icm_ppo.RecordEpisodeStatistics, "step", spying_step)
    monkeypatch.setattr(Agent, "features", spying_features)
    monkeypatch.setattr(icm_ppo, "MAX_EVAL_STEPS", 2)
    own = {"num_envs": 2, "num_steps": 4, "num_minibatches": 2, "update_epochs": 1, "init_steps": 2}
    own |= {"ortho_init": False, "total_timesteps": 8, "env_id": env_id, "features": "random"}
    icm_ppo.train(small(tmp_path, **own))
    states, next_states = shown
    np.testing.assert_array_equal(np.concatenate(looked[:4:2]), states.astype(looked[0].dtype))
    np.testing.assert_array_equal(np.concatenate(looked[1:4:2]), next_states.astype(looked[0].dtype))
    assert {len(part) for part in looked[4:]} == {2}  # half of each minibatch
    if env_id == "EndingsICM-v0":
        assert not np.array_equal(states[2:], next_states[:-2]), "an episode ended in between"


def test_the_evaluated_policy_samples_and_repeats(tmp_path):
    args = small(tmp_path)
    icm_ppo.train(args)
    envs, device = icm_ppo.make_envs(args, 3), torch.device("cpu")
    obs = np.random.default_rng(0).normal(size=(300, 2, 3))
    policy, saved = icm_ppo.load_policy(args, envs, tmp_path / "run", device)
    assert saved["global_step"] == 48
    actions = policy(obs)
    policy, _ = icm_ppo.load_policy(args, envs, tmp_path / "run", device)
    np.testing.assert_array_equal(actions, policy(obs))
    # They follow the trained networks with their statistics.
    agent = fresh()
    agent.load_state_dict(saved["agent"])
    torch.manual_seed(args.seed)
    with torch.no_grad():
        logits = agent(torch.from_numpy(obs).float())[0]
    noise = -torch.empty(300, 3).exponential_().log()
    np.testing.assert_array_equal(actions, (logits + noise).argmax(-1).numpy())


@pytest.mark.parametrize(
    "bad",
    [
        {"features": "vae"},
        {"predictor_share": 0.08},  # of 12 steps: less than one
        {"memory": 1.0},
        {"num_minibatches": 5},
        {"num_minibatches": 24},
        {"total_timesteps": 23},
        {"num_envs": 10_000, "num_steps": 1001, "num_minibatches": 1, "total_timesteps": 10**9},
    ],
    ids=lambda bad: "{}={}".format(*next(iter(bad.items()))),
)
def test_bad_settings(bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        icm_ppo.train(small(tmp_path, **bad))
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["raw", "random"])
def test_curiosity_finds_what_chance_does_not(kind, tmp_path):
    """test_rnd_ppo.py shows that without curiosity nothing is found here. (To inverse features the three
    wrong switches of a door are one, for they lead to the same place; they learn too little here.)"""
    own = {"num_envs": 16, "num_steps": 64, "num_minibatches": 1, "total_timesteps": 32_768}
    own |= {"update_epochs": 4, "learning_rate": 3e-3, "eval_episodes": 20, "init_steps": 50}
    args = small(tmp_path, env_id="CorridorICM-v0", int_coef=1.0, features=kind, **own)
    assert icm_ppo.train(args)["mean_reward"] >= 0.9


# ---- the television and the features ----


def transitions(rng, size):
    """Random actions from random tiles of room 0, under random pictures: s_t, a_t, s_{t+1}."""
    tiles = rng.choice(np.flatnonzero(tv.ROOM == 0), size)
    actions = rng.integers(5, size=size)
    next_tiles = tv.LEADS_TO[tiles, actions]
    screens = rng.integers(2, size=(2, size, 16)).astype(np.float32)
    screens[1, tv.ROOM[next_tiles] != 0] = 0
    before = np.concatenate([tv.ONE_HOT[tiles], screens[0]], axis=1)[:, None]
    after = np.concatenate([tv.ONE_HOT[next_tiles], screens[1]], axis=1)[:, None]
    return torch.from_numpy(before), torch.from_numpy(actions), torch.from_numpy(after)


def share_of_the_screen(agent: Agent) -> float:
    """How much of the variance of φ in room 0 comes from the picture, not from the tile."""
    tiles = np.flatnonzero(tv.ROOM == 0)
    shown = np.zeros((len(tiles), 50, 105), dtype=np.float32)
    shown[:, :, :89] = tv.ONE_HOT[tiles][:, None]
    shown[:, :, 89:] = np.random.default_rng(5).integers(2, size=(50, 16))
    with torch.no_grad():
        phi = agent.features(torch.from_numpy(shown).flatten(0, 1)[:, None]).reshape(len(tiles), 50, -1)
    by_screen = phi.var(1, correction=0).mean()
    by_tile = phi.mean(1).var(0, correction=0).mean()
    return (by_screen / (by_screen + by_tile)).item()


@pytest.mark.parametrize(("phi_scale", "low", "high"), [(0.01, 0, 0.05), (1.0, 0.3, 1)])
def test_the_noise_of_the_television_does_not_enter_inverse_features(phi_scale, low, high):
    """Random weights make most of the variance of φ noise. Features that grow from next to nothing have
    hardly any once they are learned; those that began at full size still hold a good deal of it."""
    rng = np.random.default_rng(4)
    agent = fresh("inverse", shape=(2, 105), num_actions=5, seed=7, phi_scale=phi_scale)
    agent.norm_obs.update(transitions(rng, 6400)[0])
    optimizer = torch.optim.Adam([*agent.phi.parameters(), *agent.inverse_model.parameters()], 4e-4)
    assert share_of_the_screen(agent) > 0.6
    for _ in range(300):
        before, actions, after = transitions(rng, 256)
        logits = agent.guess(agent.features(before), agent.features(after))
        optimizer.zero_grad()
        (-icm_ppo.log_prob(logits, actions).mean()).backward()
        optimizer.step()
    assert low <= share_of_the_screen(agent) <= high


# ---- the television ----

STAY, UP, RIGHT, DOWN, LEFT, PRESS = range(6)
WAY = [RIGHT] * 4 + [DOWN] * 4 + [LEFT] * 8 + [DOWN] * 4 + [RIGHT] * 8 + [DOWN] + [RIGHT]


def maze(num_envs=1, remote=False, mode=AutoresetMode.DISABLED, limit=None, seed=0):
    envs = tv.NoisyTVVectorEnv(num_envs, remote, autoreset_mode=mode, max_episode_steps=limit)
    envs.reset(seed=seed)
    return envs


def walk(envs, *actions):
    """The same actions in every environment; the last step's result."""
    for action in actions:
        result = envs.step(np.full(envs.num_envs, action))
    return result


def tile_of(obs):
    return tv.TILES[int(obs[:89].argmax())]


def test_the_maze():
    assert [len(line) for line in tv.MAP] == [13] * 13 and len(tv.TILES) == 89
    assert np.bincount(tv.ROOM).tolist() == [10] * 8 + [9]
    # Every step by hand, and no shorter way: breadth first, by the map and not by the table.
    distance = {tv.START: 0}
    edge = [tv.START]
    for here in edge:
        for r, c in ((-1, 0), (0, 1), (1, 0), (0, -1)):
            there = (here[0] + r, here[1] + c)
            if tv.MAP[there[0]][there[1]] != "#" and there not in distance:
                distance[there] = distance[here] + 1
                edge.append(there)
    assert set(distance) == set(tv.TILES) and distance[tv.GOAL] == 30 == len(WAY)
    for number, (row, column) in enumerate(tv.TILES):
        for action, (r, c) in enumerate(((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))):
            wall = tv.MAP[row + r][column + c] == "#"
            assert tv.TILES[tv.LEADS_TO[number, action]] == ((row, column) if wall else (row + r, column + c))


def test_the_way_to_the_reward():
    envs = maze(2)
    obs, info = envs.reset(seed=1)
    assert tile_of(obs[0]) == tv.START and info["cell"].tolist() == [1, 1] and (obs[:, :89].sum(1) == 1).all()
    rooms = []
    for i, action in enumerate(WAY):
        obs, rewards, terminated, truncated, info = walk(envs, action)
        rooms.append(int(info["cell"][0]))
        assert rewards.tolist() == [float(i == 29)] * 2 and terminated.tolist() == [i == 29] * 2
        assert not truncated.any() and not obs[:, 89:].any() and not info["watching"].any()
    assert sorted(rooms) == rooms and set(rooms) == {1, 2, 3, 4, 5, 6, 7, 8} and tile_of(obs[0]) == tv.GOAL
    with pytest.raises(ResetNeeded):
        walk(envs, STAY)


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_on(remote):
    """Noise in room 0 and nowhere else: at every step, or on coming in and at every press of the button."""
    envs = maze(400, remote)
    obs, *_ = walk(envs, LEFT)
    assert not obs[:, 89:].any()
    obs, *_, info = walk(envs, LEFT)  # the door
    assert info["watching"].all() and (info["cell"] == 0).all()
    pictures = [obs[:, 89:]]
    for action in (LEFT, STAY, UP, DOWN, LEFT, RIGHT):
        pictures.append(walk(envs, action)[0][:, 89:])
    if remote:
        assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
        for _ in range(6):
            pictures.append(walk(envs, PRESS)[0][:, 89:])
        pictures = pictures[6:]
    pictures = np.stack(pictures)  # (7, 400, 16)
    assert set(np.unique(pictures)) == {0, 1}
    np.testing.assert_allclose(pictures.mean((0, 1)), 0.5, atol=0.04)  # a fair coin for each pixel
    flat = pictures.reshape(7, -1)
    for other in (
        flat[1:] == flat[:-1],
        pictures[:, 1:] == pictures[:, :-1],
        pictures[..., 1:] == pictures[..., :-1],
    ):
        assert other.mean() == pytest.approx(0.5, abs=0.02)  # of each step, environment and pixel
    obs, *_ = walk(envs, RIGHT, RIGHT, RIGHT)
    assert not obs[:, 89:].any()
    if remote:
        obs, *_ = walk(envs, PRESS)
        assert not obs[:, 89:].any()


def test_noise_does_not_depend_on_the_action():
    """The same seed, other moves in room 0: the same pictures."""
    first, second = maze(3, seed=9), maze(3, seed=9)
    for envs in (first, second):
        walk(envs, LEFT, LEFT, LEFT)
    for a, b in ((UP, DOWN), (LEFT, STAY), (STAY, LEFT)):
        np.testing.assert_array_equal(walk(first, a)[0][:, 89:], walk(second, b)[0][:, 89:])


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("name", ["NoisyTV-v0", "NoisyTVRemote-v0"])
def test_batch_equals_single_environments(name, mode):
    n, limit = 4, 45
    theirs = SyncVectorEnv([lambda: gym.make(name, max_episode_steps=limit)] * n, autoreset_mode=mode)
    remote = "Remote" in name
    ours = tv.NoisyTVVectorEnv(n, remote, autoreset_mode=mode, max_episode_steps=limit)
    np.testing.assert_array_equal(ours.reset(seed=40)[0], theirs.reset(seed=40)[0])
    rng, endings = np.random.default_rng(2), np.zeros(3, dtype=int)
    position = np.zeros(n, dtype=int)
    for _ in range(400):
        actions = rng.integers(6 if remote else 5, size=n)
        for i in (0, 1):  # two go straight to the reward, one of them after idling to the last moment
            step = position[i] - (limit - 30) * i
            actions[i] = WAY[step] if 0 <= step < 30 else STAY
        if mode == AutoresetMode.NEXT_STEP:
            position[position < 0] = -1
        a, b = ours.step(actions), theirs.step(actions)
        for x, y in zip(a[:4], b[:4], strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        assert set(a[4]) == set(b[4])
        for key in b[4]:
            if key == "final_info":
                for inner in b[4][key]:
                    np.testing.assert_array_equal(a[4][key][inner], b[4][key][inner])
            else:
                for x, y in zip(a[4][key], b[4][key], strict=True):
                    np.testing.assert_array_equal(x, y)
        endings += (a[2] & ~a[3]).sum(), (a[3] & ~a[2]).sum(), (a[2] & a[3]).sum()
        ended = a[2] | a[3]
        position = np.where(ended, -(mode == AutoresetMode.NEXT_STEP), position + 1)
        position = position.astype(int)
    assert (endings > 3).all(), endings


def test_the_batch_keeps_what_it_has_handed_out():
    envs = maze(3, mode=AutoresetMode.SAME_STEP, limit=5)
    handed = [walk(envs, LEFT) for _ in range(5)]
    kept = [[np.copy(x) for x in result[:4]] for result in handed]
    final = np.stack(handed[4][4]["final_obs"])
    assert tile_of(final[0]) == (2, 1) and final[:, 89:].any(1).all() and tile_of(handed[4][0][0]) == tv.START
    walk(envs, LEFT, LEFT, LEFT)
    for result, copies in zip(handed, kept, strict=True):
        for x, y in zip(result[:4], copies, strict=True):
            np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(np.stack(handed[4][4]["final_obs"]), final)


def test_seeds_and_masks():
    pictures = [walk(maze(3, seed=seed), LEFT, LEFT)[0][:, 89:] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0][1:], pictures[2][:2])  # seeds 2 and 3
    assert len(np.unique(pictures[0], axis=0)) == 3
    envs = maze(3)
    walk(envs, LEFT, LEFT)
    obs, info = envs.reset(options={"reset_mask": np.array([True, False, False])})
    assert [tile_of(x)[1] for x in obs] == [6, 4, 4] and info["_cell"].tolist() == [True, False, False]
    assert envs.steps.tolist() == [0, 2, 2]
    for bad in ({"seed": [1, 2]}, {"options": {"reset_mask": np.ones(2, dtype=bool)}}):
        with pytest.raises(ValueError, match="for each of 3"):
            envs.reset(**bad)


def test_what_the_television_refuses():
    with pytest.raises(ResetNeeded):
        walk(tv.NoisyTVVectorEnv(2), STAY)
    for actions in ([0, 5], [-1, 0], [0]):
        with pytest.raises(ValueError, match="actions from 0 to 4"):
            maze(2).step(np.array(actions))
    with pytest.raises(ValueError, match="render_mode"):
        tv.NoisyTVEnv(render_mode="human")
    with pytest.raises(ValueError):
        tv.NoisyTVVectorEnv(2, autoreset_mode="never")


@pytest.mark.parametrize("name", ["NoisyTV-v0", "NoisyTVRemote-v0"])
def test_the_television_keeps_gymnasiums_rules(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(f"envs.noisy_tv:{name}", render_mode="rgb_array").unwrapped)
    env = gym.make(name)
    env.reset(seed=0)
    assert env.action_space.n == (6 if "Remote" in name else 5) and env.unwrapped.NUM_CELLS == 9
    endings = [env.step(STAY)[2:4] for _ in range(200)]
    assert endings[-1] == (False, True) and not any(map(any, endings[:-1]))


def test_the_television_is_drawn():
    envs = tv.NoisyTVVectorEnv(2, render_mode="rgb_array", autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    assert maze().render() is None
    picture = envs.render()[0]
    assert picture.shape == (208, 208, 3)
    shown = lambda tile: tuple(envs.render()[0][tile[0] * 16 + 8, tile[1] * 16 + 8])  # noqa: E731
    assert shown(tv.START) == tv.BLUE and shown(tv.GOAL) == tv.GOLD and shown((4, 4)) == tv.WALL_COLOUR
    assert shown((2, 2)) == tv.ROOM_0 and shown((2, 7)) == tv.FLOOR
    assert not picture[2:14, 16:64].any()  # the screen, dark
    obs, *_ = walk(envs, LEFT, LEFT)
    assert shown((2, 4)) == tv.BLUE and shown(tv.START) == tv.FLOOR
    pixels = envs.render()[0][2:14, 16:64].reshape(4, 3, 4, 12, 3)
    np.testing.assert_array_equal(
        pixels, np.broadcast_to(255 * obs[0, 89:].reshape(4, 1, 4, 1, 1), pixels.shape)
    )


def test_a_random_walk_does_not_arrive():
    envs = maze(64, mode=AutoresetMode.SAME_STEP, limit=200)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(1000):
        _, rewards, _, _, info = envs.step(rng.integers(5, size=64))
        assert not rewards.any()
        seen |= set(info["cell"].tolist())
    assert seen <= set(range(7))


# ---- the experiment ----


def test_the_experiment_measures_what_it_says(tmp_path, monkeypatch):
    """An agent that walks into room 0 and stays there; then the table is written, read and drawn."""
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results" / "noisy_tv.csv")
    monkeypatch.setattr(experiment, "HERE", tmp_path)
    for folder in ("results", "figures"):
        (tmp_path / folder).mkdir()
    assert experiment.read() == []
    forward = Agent.forward

    def left(self, obs):
        logits, values = forward(self, obs)
        return logits + 100 * torch.nn.functional.one_hot(torch.tensor(LEFT), 5), values

    monkeypatch.setattr(Agent, "forward", left)
    own = {
        "total_timesteps": 4 * 400,
        "num_envs": 4,
        "num_steps": 40,
        "num_minibatches": 1,
        "update_epochs": 1,
    }
    rows = experiment.measure("NoisyTV-v0", "no curiosity", 1, init_steps=3, **own)
    assert len(rows) == 20 and [row["step"] for row in rows] == [80 * i for i in range(1, 21)]
    # Of the 400 steps 2 to 200 of an episode are in room 0; the 200th shows the start of the next one.
    assert np.mean([row["watching"] for row in rows]) == pytest.approx(198 / 200)
    assert {round(row["rooms"], 5) for row in rows if not math.isnan(row["rooms"])} == {2.0}
    assert {row["task"] for row in rows if not math.isnan(row["task"])} == {0.0}
    experiment.write(rows)
    experiment.write([row | {"seed": 2, "variant": "RND"} for row in rows])
    read = experiment.read()
    assert len(read) == 40 and list(read[0]) == list(experiment.COLUMNS)
    for row, again in zip(rows, read, strict=False):
        for name, value in row.items():
            assert again[name] == pytest.approx(value, abs=1e-4, nan_ok=True) if name != "env" else True
    experiment.draw(read)
    assert (tmp_path / "figures" / "noisy_tv.png").stat().st_size > 5000
    with open(experiment.RESULTS, newline="") as file:
        assert len(list(csv.DictReader(file))) == 40


def test_a_dark_screen_is_the_same_maze_without_noise(monkeypatch):
    envs = tv.NoisyTVVectorEnv(3)
    envs.reset(seed=1)
    seen = [envs.step(np.full(3, LEFT))[0] for _ in range(8)][-1]
    assert seen[:, 89:].any(), "the television is on in room 0"
    dark = experiment.observe_dark(envs)
    assert dark.dtype == seen.dtype and (dark[:, :89] == seen[:, :89]).all() and not dark[:, 89:].any()

    asked = []
    monkeypatch.setattr(experiment, "observe_dark", lambda envs: asked.append(envs) or observe(envs))
    observe = tv.NoisyTVVectorEnv._observe
    own = {"total_timesteps": 400, "num_envs": 2, "num_steps": 20, "num_minibatches": 1, "update_epochs": 1}
    for world, is_dark in ((experiment.DARK, True), ("NoisyTV-v0", False)):
        rows = experiment.measure(world, "no curiosity", 1, init_steps=3, **own)
        assert bool(asked) == is_dark and {row["env"] for row in rows} == {world}
        asked.clear()


def test_the_experiment_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "noisy_tv.csv")
    monkeypatch.setattr(experiment, "SEEDS", (1, 2))
    monkeypatch.setattr(experiment, "draw", lambda rows: drawn.append(len(rows)))
    drawn, asked = [], []

    def measure(env, variant, seed):
        asked.append((env, variant, seed))
        row = {"env": env, "variant": variant, "seed": seed, "watching": seed / 10, "rooms": 3, "task": 1}
        return [row | {"step": step} for step in (50, 100)]

    monkeypatch.setattr(experiment, "measure", measure)
    experiment.write(measure("NoisyTV-v0", "raw", 2))
    asked.clear()
    experiment.main()
    everything = {(e, v, s) for e in experiment.ENVS for v in experiment.VARIANTS for s in (1, 2)}
    assert set(asked) == everything - {("NoisyTV-v0", "raw", 2)} and len(asked) == len(everything) - 1
    assert drawn == [2 * len(everything)]
    assert "watching 0.15 (0.10 to 0.20)" in capsys.readouterr().out


def test_the_summary_is_that_of_a_run_folder(tmp_path):
    args = small(tmp_path)
    results = icm_ppo.train(args)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    again = icm_ppo.evaluate(args, tmp_path / "run", torch.device("cpu"))
    assert again["mean_reward"] == results["mean_reward"] and results["algo"] == "icm_ppo"
