"""RND-PPO: whole iterations against slow ones; novelty, memory, endings, evaluation, learning."""

import json
import math
import signal

import ale_py
import counter_env  # also registers the Counter environments
import gymnasium as gym
import numpy as np
import pytest
import rnd_ppo
import torch
from gymnasium.vector import AutoresetMode
from rnd_ppo import Agent, Args, RunningNorm, discounted_past, gae

gym.register_envs(ale_py)


class Endings(gym.Env):
    """Episodes of 2, 3 or 4 steps that end in turn by termination, by truncation and by both.

    What is observed and paid depends on the seed and on every action. `seeds` keeps the seeds of all resets.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    seeds: list[int] = []

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
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

    def render(self):
        return np.zeros((64, 64, 3), dtype=np.uint8)


class Lengths(Endings):
    """Pays 1, 2 or 3 for action 0, 1 or 2. The n-th environment that is made ends after n steps, n ≤ 20."""

    made = 0

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        Lengths.made += 1
        self.length = 1 + (Lengths.made - 1) % 20

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.left = self.length
        return obs, info

    def step(self, action):
        obs, _, _, _, info = super().step(action)
        return obs, float(action + 1), self.left == 0, False, info


class Cells(counter_env.CounterEnv):
    """Walks on by one of five cells a step; the next episode starts where the last one ended."""

    def reset(self, **kwargs):
        obs, _ = super().reset(**kwargs)
        return obs, {"cell": 2 * self.episode % 5}

    def step(self, action):
        *others, _ = super().step(action)
        return *others, {"cell": (2 * self.episode + self.step_count) % 5}


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


gym.register("EndingsRND-v0", entry_point=Endings)
gym.register("LengthsRND-v0", entry_point=Lengths)
gym.register("Cells-v0", entry_point=Cells)
gym.register("Corridor-v0", entry_point=Corridor, max_episode_steps=40)


def small(folder, **settings) -> Args:
    """Settings of a short run in this folder."""
    usual = {
        "env_id": "EndingsRND-v0",
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

    monkeypatch.setattr(rnd_ppo.SummaryWriter, "add_scalar", add_scalar)
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


# ---- whole iterations ----


def network(weights, name, x):
    """One network for one input, a list of numbers."""
    leaky = name in ("target", "predictor")
    x = torch.as_tensor(np.ravel(x), dtype=torch.float64)
    x = weights[f"{name}.1.weight"] @ x + weights[f"{name}.1.bias"]
    x = torch.where(x > 0, x, 0.01 * x if leaky else 0 * x)
    x = weights[f"{name}.3.weight"] @ x + weights[f"{name}.3.bias"]
    if name == "target":
        return x
    x = torch.where(x > 0, x, 0 * x)
    return weights[f"{name}.5.weight"] @ x + weights[f"{name}.5.bias"]


def mean(numbers):
    return sum(numbers) / len(numbers)


class Slow:
    """PPO with RND in plain loops, float64 and an Adam of its own."""

    def __init__(self, args: Args) -> None:
        torch.manual_seed(args.seed)
        first = Agent((2, 3), 3, args.ortho_init, args.norm_obs).state_dict()
        self.args = args
        self.weights = {name: x.double() for name, x in first.items() if not name.startswith("norm_")}
        self.learning = [name for name in self.weights if not name.startswith("target")]
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
        for n, seed in enumerate(rnd_ppo.env_seeds(args.num_envs, args.seed, 2)):
            self.envs[n].reset(seed=seed)
        for _ in range(args.init_steps):
            for env, action in zip(self.envs, torch.randint(3, (args.num_envs,)).tolist(), strict=True):
                obs, _, terminated, truncated, _ = env.step(action)
                self.seen.append(env.reset()[0] if terminated or truncated else obs)
        for n, seed in enumerate(rnd_ppo.env_seeds(args.num_envs, args.seed, 0, 0)):
            self.start(n, self.envs[n].reset(seed=seed)[0])

    def start(self, n, obs):
        self.observed[n] = obs
        self.memory[n] = obs

    def normalised(self, obs):
        seen = np.array(self.seen, dtype=float)
        return np.clip((obs - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8), -5, 5)

    def inputs(self, memory, obs):
        """What policy and values see."""
        both = np.array([memory, obs], dtype=float)
        return self.normalised(both) if self.args.norm_obs else both

    def probabilities(self, inputs):
        powers = network(self.weights, "actor", inputs).exp()
        return powers / powers.sum()

    def values(self, inputs):
        return network(self.weights, "critic", inputs)

    def novelty(self, obs):
        x = self.normalised(obs)
        difference = network(self.weights, "predictor", x) - network(self.weights, "target", x)
        return (difference**2).mean()

    def rollout(self):
        """The rows of one rollout, and (episodic return, length) of the episodes that ended in it."""
        args = self.args
        beta = args.memory
        noise = -torch.empty(args.num_steps, args.num_envs, 3).exponential_().log()
        rows, ended = [], []
        for t in range(args.num_steps):
            for n, env in enumerate(self.envs):
                row = {"t": t, "n": n, "inputs": self.inputs(self.memory[n], self.observed[n])}
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
                row["e"] = self.novelty(obs).item()
                rows.append(row)
        return rows, ended

    def estimate(self, rows):
        """Intrinsic rewards, advantages and targets, added to the rows."""
        args = self.args
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
            row["A"] = args.ext_coef * row["task"] + args.int_coef * row["curious"]

    def loss(self, rows):
        """Equations (5) to (11), row by row: the loss, and what is logged of it."""
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
        if args.int_coef:
            share = rows[: int(args.predictor_share * len(rows))]
            loss = loss + args.vf_coef * mean(int_errors) + mean([self.novelty(row["obs"]) for row in share])
        logged = {
            "policy_loss": -mean(objectives).item(),
            "value_loss": mean(errors).item(),
            "intrinsic_value_loss": mean(int_errors).item(),
            "entropy": mean(entropies).item(),
            "approx_kl": mean([r - 1 - math.log(r) for r in ratios]),
            "clip_fraction": mean([float(not low <= r <= high) for r in ratios]),
        }
        return loss, logged

    def step(self, loss, rate):
        """One step of Adam; returns the length of the gradient of policy and values."""
        leaves = [self.weights[name] for name in self.learning]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients = {name: g for name, g in zip(self.learning, found, strict=True) if g is not None}
        clipped = [name for name in gradients if not name.startswith("predictor")]
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
        self.estimate(rows)
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
            log["charts/novelty"] = mean([row["e"] for row in rows])
            log["charts/intrinsic_reward"] = mean([row["i"] for row in rows])
        log["charts/learning_rate"] = rate
        log["charts/episodic_return"] = mean([score for score, _ in ended])
        log["charts/episodic_length"] = mean([length for _, length in ended])
        return log


WHOLE = {
    "defaults": {},
    "all on": {
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
        "memory": 0.6,
        "seed": 5,
    },
    "all off": {
        "ortho_init": False,
        "anneal_lr": False,
        "norm_adv": False,
        "norm_obs": False,
        "max_grad_norm": 0.0,
        "predictor_share": 1.0,
        "memory": 0.0,
        "gae_lambda": 1.0,
        "num_minibatches": 1,
        "learning_rate": 2e-3,
    },
    "no curiosity": {"int_coef": 0.0, "seed": 3},
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_iterations_equal_slow_ones(name, tmp_path, charts):
    """Two rollouts with all endings: every weight, every statistic and every logged number."""
    args = small(tmp_path, **WHOLE[name])
    rnd_ppo.train(args)
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
    for key, x in slow.weights.items():
        torch.testing.assert_close(got[key].double(), x.detach(), rtol=0, atol=2e-5)
    seen = np.array(slow.seen, dtype=float)
    assert got["norm_obs.count"] == len(seen) == 3 * (5 + 16)
    np.testing.assert_allclose(got["norm_obs.mean"], seen.mean(0, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(got["norm_obs.var"], seen.var(0, keepdims=True), rtol=1e-6)
    if args.int_coef:
        np.testing.assert_allclose(got["norm_past.var"], np.var(slow.gathered), rtol=1e-3)
        np.testing.assert_allclose(saved["extra"]["carry"], slow.u, rtol=1e-4)
    # What the settings are there for did happen.
    if name == "all on":
        assert 0 < log["losses/clip_fraction"] < 1 and log["losses/grad_norm"] > args.max_grad_norm


def test_the_learning_rate_falls_from_the_full_one_and_is_never_0(tmp_path, charts, monkeypatch):
    used = []

    class Adam(torch.optim.Adam):
        def step(self):
            assert self.defaults["fused"]  # one kernel for all parameters is faster
            used.append(self.param_groups[0]["lr"])
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    rnd_ppo.train(small(tmp_path, total_timesteps=24 * 4, learning_rate=0.1, update_epochs=1))
    assert used == pytest.approx([0.1] * 2 + [0.075] * 2 + [0.05] * 2 + [0.025] * 2)
    logged = [value for (tag, _), value in charts.items() if tag == "charts/learning_rate"]
    assert logged == pytest.approx([0.1, 0.075, 0.05, 0.025])


# ---- formulas ----


def test_the_filter_runs_over_time():
    novelty = np.array([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])  # T = 2, N = 3
    want = [[1 + 4, 10 + 2, 100], [2 + 0.5 * 5, 20 + 0.5 * 12, 200 + 0.5 * 100]]
    np.testing.assert_allclose(discounted_past(novelty, np.array([8.0, 4.0, 0.0]), 0.5), want)


def test_the_filter_goes_on_with_the_next_rollout():
    novelty = np.random.default_rng(0).random((12, 5))
    first = discounted_past(novelty[:7], np.zeros(5), 0.9)
    both = np.concatenate([first, discounted_past(novelty[7:], first[-1], 0.9)])
    np.testing.assert_allclose(both, discounted_past(novelty, np.zeros(5), 0.9))
    by_definition = sum(0.9 ** (11 - k) * novelty[k] for k in range(12))
    np.testing.assert_allclose(both[-1], by_definition)


def test_two_streams_by_hand():
    """γ = λ = .5, V = 0, rewards 1, 2, 4 and an ending in the middle, unseen by curiosity."""
    rewards, zeros = np.array([[1.0], [2.0], [4.0]]), np.zeros((3, 1))
    end, never = np.array([[False], [True], [False]]), np.zeros((3, 1), dtype=bool)
    np.testing.assert_allclose(gae(rewards, zeros, zeros, end, never, 0.5, 0.5)[:, 0], [1.5, 2, 4])
    np.testing.assert_allclose(gae(rewards, zeros, zeros, never, never, 0.5, 0.5)[:, 0], [1.75, 3, 4])


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    returns = torch.tensor([[0.0, 2.0], [3.0, 1.0], [2.0, 3.0]])
    torch.testing.assert_close(rnd_ppo.value_loss(values, returns), torch.tensor([5 / 6, 3.0]))


def test_statistics_are_those_of_all_elements():
    """Batches of unequal sizes, far from 0: every element counts once, not every batch."""
    data = torch.from_numpy(np.random.default_rng(1).normal([100, -3, 0.5], [2, 5, 0.1], (1009, 3))).float()
    stats = RunningNorm(3, limit=5.0)
    for batch in data.split([1, 500, 7, 200, 301]):
        stats.update(batch)
    assert stats.count == 1009
    torch.testing.assert_close(stats.mean.float(), data.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.var.float(), data.var(0, correction=0), rtol=1e-4, atol=1e-5)
    x = torch.tensor([[104.0, 1000.0, 0.5]])
    want = ((x - data.mean(0)) / data.std(0, correction=0)).clamp(-5, 5)
    torch.testing.assert_close(stats(x), want, rtol=1e-3, atol=1e-3)
    assert stats(x)[0, 1] == 5


def test_statistics_of_scalars_and_of_constants():
    stats = RunningNorm(limit=5.0)
    stats.update(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert (stats.mean.item(), stats.var.item()) == (3.0, 3.5)
    constant = RunningNorm(2, limit=5.0)
    constant.update(torch.ones(10, 2))
    assert constant(torch.tensor([[1.0, 0.9]])).tolist() == [[0.0, -5.0]]


# ---- networks ----


@pytest.mark.parametrize("shape", [(2, 7), (4, 84, 84)])
def test_the_networks_and_their_first_weights(shape):
    torch.manual_seed(0)
    agent = Agent(shape, 5, True, True)
    frames = len(shape) == 3
    sizes = {name: tuple(p.shape) for name, p in agent.named_parameters() if p.ndim > 1}
    gains = {name: 2**0.5 for name in sizes}
    if frames:
        convolutions = {"0": (32, 4, 8, 8), "2": (64, 32, 4, 4), "4": (64, 64, 3, 3), "7": (512, 3136)}
        single = convolutions | {"0": (32, 1, 8, 8)}
        want = {f"{net}.{i}.weight": size for net in ("actor", "critic") for i, size in convolutions.items()}
        want |= {f"{net}.{i}.weight": size for net in ("target", "predictor") for i, size in single.items()}
        want |= {"actor.9.weight": (5, 512), "critic.9.weight": (2, 512), "predictor.9.weight": (512, 512)}
        gains |= {"actor.9.weight": 0.01, "critic.9.weight": 1.0}
    else:
        want = {f"{net}.1.weight": (256, 14) for net in ("actor", "critic")}
        want |= {f"{net}.3.weight": (256, 256) for net in ("actor", "critic")}
        want |= {f"{net}.1.weight": (128, 7) for net in ("target", "predictor")}
        want |= {f"{net}.3.weight": (128, 128) for net in ("target", "predictor")}
        want |= {"actor.5.weight": (5, 256), "critic.5.weight": (2, 256), "predictor.5.weight": (128, 128)}
        gains |= {"actor.5.weight": 0.01, "critic.5.weight": 1.0}
    assert sizes == want
    for name, p in agent.named_parameters():
        if p.ndim == 1:
            assert (p == 0).all(), name
            continue
        rows = p.detach().flatten(1)
        rows = rows if len(rows) <= rows.shape[1] else rows.T
        torch.testing.assert_close(rows @ rows.T, gains[name] ** 2 * torch.eye(len(rows)), rtol=0, atol=1e-5)
    for name, p in agent.named_parameters():
        assert p.requires_grad != name.startswith("target")
    plain = Agent(shape, 5, False, True)
    assert all((p != 0).any() for p in plain.parameters())
    kinds = [type(layer).__name__ for layer in agent.target if "Linear" not in type(layer).__name__]
    assert kinds == (["Conv2d", "LeakyReLU"] * 3 + ["Flatten"] if frames else ["Flatten", "LeakyReLU"])
    kinds = [type(layer).__name__ for layer in agent.predictor][-2:]
    assert kinds == ["ReLU", "Linear"]


def test_the_policy_sees_vectors_normalised_or_raw_and_frames_from_0_to_1():
    torch.manual_seed(0)
    data = torch.randn(50, 1, 6) * 3 + 2
    x = torch.randn(7, 2, 6)
    for norm_obs in (True, False):
        agent = Agent((2, 6), 3, True, norm_obs)
        agent.norm_obs.update(data)
        seen = ((x - data.mean(0)) / data.std(0, correction=0)).clamp(-5, 5) if norm_obs else x
        logits, values = agent(x)
        torch.testing.assert_close(logits, agent.actor(seen), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(values, agent.critic(seen), rtol=1e-4, atol=1e-6)
    agent = Agent((4, 84, 84), 3, True, True)
    frames = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    agent.norm_obs.update(frames[:, :1])
    torch.testing.assert_close(agent(frames)[0], agent.actor(frames.float() / 255))


def test_novelty_falls_where_the_predictor_was_and_stays_elsewhere():
    torch.manual_seed(0)
    agent = Agent((2, 6), 3, True, True)
    seen, unseen = torch.randn(64, 1, 6) + 2, torch.randn(64, 1, 6) - 2
    agent.norm_obs.update(torch.cat([seen, unseen]))
    before = agent.novelty(seen).mean().item(), agent.novelty(unseen).mean().item()
    target = [p.clone() for p in agent.target.parameters()]
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        agent.novelty(seen).mean().backward()
        optimizer.step()
    assert agent.novelty(seen).mean().item() < 0.02 * before[0]
    assert agent.novelty(unseen).mean().item() > 0.3 * before[1]
    assert all(torch.equal(*pair) for pair in zip(target, agent.target.parameters(), strict=True))
    with torch.no_grad():  # (11) spelled out
        x = agent.norm_obs(unseen)
        want = [(agent.predictor(x)[i] - agent.target(x)[i]).square().mean() for i in range(64)]
    torch.testing.assert_close(agent.novelty(unseen).detach(), torch.stack(want))


# ---- memory ----


class Walk(gym.vector.VectorEnv):
    """Two environments that observe 1, 2, 3, … and 10, 20, 30, …; episodes of 2 and of 3 steps."""

    num_envs, single_action_space = 2, gym.spaces.Discrete(2)
    single_observation_space = gym.spaces.Box(np.float32([0, -1]), np.float32([99, 1]))

    def __init__(self, mode):
        self.mode = mode
        self.metadata = {"autoreset_mode": mode}

    def observe(self):
        return np.stack([self.time * [1, 10], np.ones(2)], axis=1).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.time = np.ones(2)
        self.ended = np.zeros(2, dtype=bool)
        return self.observe(), {}

    def step(self, actions):
        self.time += 1
        if self.mode == AutoresetMode.NEXT_STEP:
            self.time[self.ended] = 1
        self.ended = self.time == [3, 4]
        info = {}
        if self.ended.any() and self.mode == AutoresetMode.SAME_STEP:
            info["final_obs"] = np.array([*self.observe(), None], dtype=object)[:2]
            self.time[self.ended] = 1
        return self.observe(), np.zeros(2), self.ended & [True, False], self.ended & [False, True], info


def test_memory_by_hand():
    """(15) with β = .75, to the end of an episode and not beyond."""
    envs = rnd_ppo.MemoryTrace(Walk(AutoresetMode.SAME_STEP), 0.75)
    assert envs.single_observation_space.shape == (2, 2) and envs.observation_space.shape == (2, 2, 2)
    assert envs.observation_space.dtype == np.float32
    assert (envs.observation_space.low == -np.inf).all() and (envs.observation_space.high == np.inf).all()
    obs, _ = envs.reset()
    assert obs[..., 0].tolist() == [[1, 1], [10, 10]] and (obs[..., 1] == 1).all()
    first, *_ = envs.step(None)
    assert first[..., 0].tolist() == [[1.25, 2], [12.5, 20]]
    second, _, terminated, _, info = envs.step(None)
    assert terminated.tolist() == [True, False]
    assert info["final_obs"][0][:, 0].tolist() == [1.6875, 3]
    assert second[..., 0].tolist() == [[1, 1], [16.875, 30]]  # the first environment forgot
    third, _, _, truncated, info = envs.step(None)
    assert truncated.tolist() == [False, True]
    assert info["final_obs"][1][:, 0].tolist() == [22.65625, 40]
    assert third[..., 0].tolist() == [[1.25, 2], [10, 10]]
    assert first[..., 0].tolist() == [[1.25, 2], [12.5, 20]]  # what was given out does not change
    again, _ = envs.reset()
    assert again[..., 0].tolist() == [[1, 1], [10, 10]]


def test_memory_by_hand_where_the_next_step_resets():
    """As in a film: what ends is shown as it is, and the next step begins the next episode."""
    envs = rnd_ppo.MemoryTrace(Walk(AutoresetMode.NEXT_STEP), 0.75)
    envs.reset()
    seen = [envs.step(None)[0][..., 0].tolist() for _ in range(4)]
    assert [first for first, _ in seen] == [[1.25, 2], [1.6875, 3], [1, 1], [1.25, 2]]
    assert [second for _, second in seen] == [[12.5, 20], [16.875, 30], [22.65625, 40], [10, 10]]


# ---- what training does and keeps ----


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "neither"])
def test_what_is_stored_when_episodes_end(ending, tmp_path, monkeypatch):
    """Two environments, episodes of 3 steps, rollouts of 4. Networks with known answers, from observations
    [episode, step]: value E 10·episode + step, value I 100 more, novelty 10·episode + step + 1000."""
    spies = {name: Spy(getattr(rnd_ppo, name)) for name in ("gae", "discounted_past")}
    for name, spy in spies.items():
        monkeypatch.setattr(rnd_ppo, name, spy)

    def known(obs):
        return 10 * obs[:, -1, 0] + obs[:, -1, 1]

    def forward(self, obs):
        values = torch.stack([known(obs), known(obs) + 100], dim=-1)
        return self.actor(obs), values + 0 * self.critic(obs)

    def novelty(self, obs):
        return known(obs) + 1000 + 0 * self.predictor[1].weight.sum()

    monkeypatch.setattr(Agent, "forward", forward)
    monkeypatch.setattr(Agent, "novelty", novelty)
    monkeypatch.setattr(rnd_ppo, "MAX_EVAL_STEPS", 9)
    own = {"env_id": f"Counter-{ending}-v0", "num_envs": 2, "num_steps": 4, "total_timesteps": 16}
    args = small(tmp_path, **own)
    rnd_ppo.train(args)

    (extrinsic, intrinsic, *_), (past, later) = spies["gae"].calls, spies["discounted_past"].calls
    rewards, values, next_values, terminated, truncated, gamma, gae_lambda = extrinsic
    int_rewards, int_values, int_next_values, int_terminated, int_truncated, int_gamma, _ = intrinsic
    assert (gamma, int_gamma, gae_lambda) == (args.gamma, args.int_gamma, args.gae_lambda)
    # Random steps came before: the first rollout starts with a later episode, at its beginning.
    e = values[0, 0]
    both = lambda column: np.repeat(np.array(column)[:, None], 2, axis=1)  # noqa: E731
    ends = ending != "neither"
    np.testing.assert_array_equal(rewards, both([1, 2, 3, 1 if ends else 4]))
    np.testing.assert_array_equal(values, both([e, e + 1, e + 2, e + 10 if ends else e + 3]))
    np.testing.assert_array_equal(int_values, values + 100)
    # Novelty is that of the observation before the reset …
    seen = both([1, 2, 3, 11 if ends else 4]) + e + 1000
    np.testing.assert_array_equal(past[0], seen)
    # … but its return goes on with the first observation after the reset, as if nothing had ended.
    np.testing.assert_array_equal(
        int_next_values, both([1, 2, 10 if ends else 3, 11 if ends else 4]) + e + 100
    )
    assert not int_terminated.any() and not int_truncated.any()
    np.testing.assert_array_equal(terminated, both([False, False, ending in ("terminated", "both"), False]))
    np.testing.assert_array_equal(truncated, both([False, False, ending in ("truncated", "both"), False]))
    # After a time limit, the extrinsic return looks at the observation before the reset.
    rows = [0, 1, 3] if ending in ("terminated", "both") else [0, 1, 2, 3]
    np.testing.assert_array_equal(next_values[rows], (seen - 1000)[rows])
    # Intrinsic rewards: novelty over the deviation of the discounted past, which goes on.
    sums = discounted_past(seen, np.zeros(2), args.int_gamma)
    np.testing.assert_allclose(int_rewards, seen / sums.std(), rtol=1e-5)
    np.testing.assert_array_equal(past[1], [0, 0])
    np.testing.assert_allclose(later[1], sums[-1], rtol=1e-6)


def test_ctrl_c_before_the_first_step_saves(tmp_path, monkeypatch):
    update = rnd_ppo.RunningNorm.update
    monkeypatch.setattr(
        rnd_ppo.RunningNorm, "update", lambda *batch: signal.raise_signal(signal.SIGINT) or update(*batch)
    )
    args = small(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        rnd_ppo.train(args)
    assert stopped.value.code == 130 and checkpoint(args)["global_step"] == 0


def test_a_nan_stops_the_run_before_it_is_logged(tmp_path, charts, capsys):
    args = small(tmp_path, env_id="Broken-v0", total_timesteps=480)
    with pytest.raises(SystemExit) as stopped:
        rnd_ppo.train(args)
    assert stopped.value.code == 1 and "nan at step" in capsys.readouterr().err
    assert charts and np.isfinite(list(charts.values())).all()
    assert all(torch.isfinite(x).all() for x in checkpoint(args)["agent"].values())


def test_what_training_moves_and_what_it_leaves(tmp_path):
    args = small(tmp_path)
    rnd_ppo.train(args)
    trained = checkpoint(args)["agent"]
    torch.manual_seed(args.seed)
    fresh = Agent((2, 3), 3, True, True).state_dict()
    for name in fresh:
        assert torch.equal(trained[name], fresh[name]) == name.startswith("target."), name
    # Elements, not batches: 5 random steps and 16 of training in 3 environments.
    assert trained["norm_obs.count"] == 3 * 5 + 48 and trained["norm_past.count"] == 48


def test_no_curiosity_is_plain_ppo(tmp_path):
    args = small(tmp_path, int_coef=0.0)
    rnd_ppo.train(args)
    trained = checkpoint(args)["agent"]
    torch.manual_seed(1)
    fresh = Agent((2, 3), 3, True, True).state_dict()
    for name in fresh:
        untouched = name.startswith(("target.", "predictor.", "norm_past."))
        assert torch.equal(trained[name], fresh[name]) == untouched or name == "critic.5.weight", name
    assert torch.equal(trained["critic.5.weight"][1], fresh["critic.5.weight"][1])  # the intrinsic value
    assert not torch.equal(trained["critic.5.weight"][0], fresh["critic.5.weight"][0])


@pytest.mark.parametrize("num_envs", [3, 2, 5])
def test_resume_goes_on_with_statistics_filter_and_schedule(num_envs, tmp_path, monkeypatch, charts):
    args = small(tmp_path)
    rnd_ppo.train(args)
    before = checkpoint(args)
    carry = before["extra"]["carry"]
    assert len(set(carry)) == 3 and min(carry) > 0
    spied = Spy(discounted_past)
    monkeypatch.setattr(rnd_ppo, "discounted_past", spied)
    Endings.seeds.clear()
    steps = 8 * num_envs
    more = {"num_envs": num_envs, "total_timesteps": 48 + steps, "resume": args.run_dir, "run_dir": None}
    resumed = small(tmp_path, **more)
    rnd_ppo.train(resumed)
    after = checkpoint(resumed)
    # Another number of environments: the carry is cut off, or begins anew.
    np.testing.assert_allclose(spied.calls[0][1], (carry + carry)[:num_envs], rtol=1e-6)
    assert after["extra"]["carry"][:2] != carry[:2] and len(after["extra"]["carry"]) == num_envs
    # The random steps beforehand are not taken again, and the episodes are new.
    assert after["agent"]["norm_obs.count"] == before["agent"]["norm_obs.count"] + steps
    assert after["agent"]["norm_past.count"] == before["agent"]["norm_past.count"] + steps
    assert Endings.seeds[:num_envs] == rnd_ppo.env_seeds(num_envs, 1, 0, 48)
    assert charts["charts/learning_rate", 48 + steps] == pytest.approx(4e-4 * steps / (48 + steps))


@pytest.mark.parametrize(
    "switch",
    [
        {"ortho_init": False},
        {"anneal_lr": False},
        {"norm_adv": False},
        {"norm_obs": False},
        {"max_grad_norm": 0.0},
        {"predictor_share": 1.0},
        {"clip_rewards": True},
        {"ext_coef": 1.0},
        {"int_coef": 0.5},
        {"int_gamma": 0.5},
        {"ent_coef": 0.0},
        {"init_steps": 9},
        {"memory": 0.5},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_every_switch_is_read(switch, tmp_path, usual_weights):
    args = small(tmp_path, **switch)
    rnd_ppo.train(args)
    assert not torch.equal(checkpoint(args)["agent"]["actor.1.weight"], usual_weights)


@pytest.fixture(scope="module")
def usual_weights(tmp_path_factory) -> torch.Tensor:
    args = small(tmp_path_factory.mktemp("usual"))
    rnd_ppo.train(args)
    return checkpoint(args)["agent"]["actor.1.weight"]


@pytest.mark.parametrize("gumbel", [True, False])
def test_actions_follow_the_policy(gumbel, tmp_path, monkeypatch):
    """With Gumbel noise, made once a rollout, and without, actions are drawn from softmax(logits)."""
    wanted = torch.tensor([0.7, 0.2, 0.1])

    def forward(self, obs):
        logits = wanted.log().expand(len(obs), 3)
        return logits + 0 * self.actor(obs), self.critic(obs)

    monkeypatch.setattr(Agent, "forward", forward)
    noise = Spy(rnd_ppo.gumbel_noise)
    monkeypatch.setattr(rnd_ppo, "gumbel_noise", noise)
    drawn = Spy(torch.multinomial)
    monkeypatch.setattr(torch, "multinomial", drawn)
    taken = []
    step = Endings.step
    monkeypatch.setattr(Endings, "step", lambda self, action: taken.append(int(action)) or step(self, action))
    own = {"num_envs": 20, "num_steps": 200, "num_minibatches": 1, "update_epochs": 1}
    rnd_ppo.train(small(tmp_path, gumbel=gumbel, total_timesteps=4000, init_steps=1, **own))
    counts = np.bincount(taken[20:4020], minlength=3)
    np.testing.assert_allclose(counts / 4000, wanted, atol=0.03)
    assert [200, 20, 3] in noise.calls if gumbel else [200, 20, 3] not in noise.calls
    assert len(drawn.calls) == (0 if gumbel else 200)


def test_a_gpu_would_be_waited_for_once_a_step_and_get_one_frame_of_four(tmp_path, monkeypatch):
    """By the calls that copy: to the CPU T for actions, then values, novelty and those before time limits."""
    monkeypatch.setattr(rnd_ppo, "MAX_EVAL_STEPS", 1)
    copied, moved, waits = [], [], []
    cpu, to, item = torch.Tensor.cpu, torch.Tensor.to, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copied.append(tuple(x.shape)) or cpu(x))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *to_: moved.append(tuple(x.shape)) or to(x, *to_))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: waits.append(tuple(x.shape)) or item(x))
    counted = []
    goes_on = rnd_ppo.Run.goes_on

    def count(self, size):
        counted.append((copied[:], moved[:], len(waits)))
        return goes_on(self, size)

    save = rnd_ppo.Run.save

    def save_uncounted(self):
        so_far = len(waits)
        save(self)
        del waits[so_far:]

    monkeypatch.setattr(rnd_ppo.Run, "goes_on", count)
    monkeypatch.setattr(rnd_ppo.Run, "save", save_uncounted)
    own = {"num_envs": 2, "num_steps": 5, "num_minibatches": 5, "update_epochs": 4, "ortho_init": False}
    rnd_ppo.train(small(tmp_path, env_id="ALE/MontezumaRevenge-v5", total_timesteps=10, **own))
    (_, to_before, waits_before), (to_cpu, to_device, waits_after) = counted
    assert to_cpu == [(2,)] * 5 + [(6, 2, 2), (10,)]
    frames = [shape for shape in to_device[len(to_before) :] if shape[-2:] == (84, 84)]
    assert frames == [(5, 2, 1, 84, 84)]
    assert waits_after - waits_before < 4 * 5, "no waiting in each minibatch"


def test_each_episode_counts_its_own_cells(tmp_path, monkeypatch, charts):
    monkeypatch.setattr(gym.vector.SyncVectorEnv, "NUM_CELLS", 5, raising=False)
    own = {"env_id": "Cells-v0", "num_envs": 4, "num_steps": 3, "total_timesteps": 36}
    rnd_ppo.train(small(tmp_path, **own))
    # Steps 1 and 2 of three; from then on also the first cell after the reset.
    shares = [value for (tag, _), value in charts.items() if tag == "charts/share_of_cells"]
    assert shares == pytest.approx([0.4, 0.6, 0.6])


def test_cells_are_counted_only_where_episodes_end(tmp_path, monkeypatch, charts):
    monkeypatch.setattr(gym.vector.SyncVectorEnv, "NUM_CELLS", 5, raising=False)
    own = {"env_id": "Cells-v0", "num_envs": 4, "num_steps": 2, "total_timesteps": 24}
    rnd_ppo.train(small(tmp_path, **own))
    shares = {step: value for (tag, step), value in charts.items() if tag == "charts/share_of_cells"}
    assert shares == pytest.approx({16: 0.4, 24: 0.6})


# ---- evaluation and films ----


def test_evaluation_counts_every_episode_to_its_end_and_no_further(tmp_path, monkeypatch):
    """Lengths 1 to 20, seven of them once more: the mean and deviation of 27 sums, by sampled actions."""
    args = small(tmp_path, env_id="LengthsRND-v0", eval_episodes=27, total_timesteps=24)
    Endings.seeds.clear()
    monkeypatch.setattr(Lengths, "made", 0)
    played = []
    original = rnd_ppo.load_policy

    def load_policy(*arguments):
        policy, saved = original(*arguments)

        def spied(obs):
            actions = policy(obs)
            played.append(actions)
            return actions

        return spied, saved

    monkeypatch.setattr(rnd_ppo, "load_policy", load_policy)
    results = rnd_ppo.train(args)
    lengths = [1 + (n % 20) for n in range(Lengths.made)][-20:]
    sums = []
    rounds = [played[:20], played[20:]]
    assert [len(part) for part in rounds] == [max(lengths)] * 2 == [20, 20]
    for part in rounds:
        sums += [sum(part[t][n] + 1 for t in range(length)) for n, length in enumerate(lengths)]
    assert results["mean_reward"] == pytest.approx(np.mean(sums[:27]))
    assert results["std_reward"] == pytest.approx(np.std(sums[:27]))
    assert results["eval_episodes"] == 27
    assert set(np.concatenate(played)) == {0, 1, 2}  # no greedy policy
    # The seeds: random steps, training, two rounds of evaluation.
    seeds = rnd_ppo.env_seeds
    want = [*seeds(3, 1, 2), *seeds(3, 1, 0, 0), *seeds(20, 1, 1, 0), *seeds(20, 1, 1, 20)]
    assert Endings.seeds == want and len(set(want)) == len(want)
    monkeypatch.setattr(Lengths, "made", 4)  # as before the first evaluation
    again = rnd_ppo.evaluate(args, tmp_path / "run", torch.device("cpu"))
    assert again["mean_reward"] == results["mean_reward"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results


def test_evaluation_ends_what_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(rnd_ppo, "MAX_EVAL_STEPS", 9)
    results = rnd_ppo.train(small(tmp_path, env_id="Counter-neither-v0", eval_episodes=2))
    assert results["mean_reward"] == sum(range(1, 10)) and results["std_reward"] == 0


def test_the_evaluated_policy_samples_and_repeats(tmp_path):
    args = small(tmp_path)
    rnd_ppo.train(args)
    envs, device = rnd_ppo.make_envs(args, 3), torch.device("cpu")
    obs = np.random.default_rng(0).normal(size=(3000, 2, 3))
    policy, saved = rnd_ppo.load_policy(args, envs, tmp_path / "run", device)
    assert saved["global_step"] == 48
    actions = policy(obs)
    assert not np.array_equal(actions, policy(obs))
    policy, _ = rnd_ppo.load_policy(args, envs, tmp_path / "run", device)
    np.testing.assert_array_equal(actions, policy(obs))
    # They follow the trained networks with their statistics.
    agent = rnd_ppo.make_agent(args, envs, device)
    agent.load_state_dict(saved["agent"])
    torch.manual_seed(args.seed)
    with torch.no_grad():
        logits = agent(torch.from_numpy(obs).float())[0]
    noise = -torch.empty(3000, 3).exponential_().log()
    np.testing.assert_array_equal(actions, (logits + noise).argmax(-1).numpy())


def test_a_film_shows_every_step_to_the_last(tmp_path, monkeypatch):
    import imageio_ffmpeg

    monkeypatch.setattr(Endings, "offset", 0, raising=False)
    given = []
    args = small(tmp_path, env_id="Counter-terminated-v0", memory=0.5)
    policy = lambda obs: given.append(obs.copy()) or np.zeros(1, dtype=int)  # noqa: E731
    rnd_ppo.record_video(args, policy, tmp_path / "replay.mp4")
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "replay.mp4"))
    assert frames == 4 and [obs[0, 1, 1] for obs in given] == [0, 1, 2]
    assert [obs[0, 0, 1] for obs in given] == [0, 0.5, 1.25]  # their memory


# ---- environments ----


@pytest.mark.parametrize("env_id", ["MiniGrid-DoorKey-5x5-v0", "ALE/MontezumaRevenge-v5", "EndingsRND-v0"])
def test_curiosity_looks_at_the_newest_entry_only(env_id, tmp_path, monkeypatch):
    """Of Atari's four frames the last one; of memory and observation the observation."""
    atari = env_id.startswith("ALE/")
    shown, updates, looked = [], [], []
    step = rnd_ppo.RecordEpisodeStatistics.step
    novelty = Agent.novelty

    def spying_step(self, actions):
        result = step(self, actions)
        obs = result[0].copy()
        for n in np.flatnonzero(result[2] | result[3]):
            if "final_obs" in result[4] and len(shown) >= 2:  # not while random actions are watched
                obs[n] = result[4]["final_obs"][n]
        shown.append(obs[:, -1:] if atari else obs[:, None])
        return result

    class Norm(RunningNorm):
        def update(self, batch):
            updates.append(batch.numpy().copy())
            super().update(batch)

    monkeypatch.setattr(rnd_ppo.RecordEpisodeStatistics, "step", spying_step)
    monkeypatch.setattr(rnd_ppo, "RunningNorm", Norm)
    monkeypatch.setattr(Agent, "novelty", lambda self, x: looked.append(x.numpy().copy()) or novelty(self, x))
    monkeypatch.setattr(rnd_ppo, "MAX_EVAL_STEPS", 2)
    own = {"num_envs": 2, "num_steps": 4, "num_minibatches": 2, "update_epochs": 1, "init_steps": 2}
    own |= {"capture_video": atari, "ortho_init": False, "total_timesteps": 8, "env_id": env_id}
    rnd_ppo.train(small(tmp_path, **own))
    rollout = np.concatenate(shown[2:6])
    _, _, gathered, *parts = updates
    assert gathered.shape == (8,)
    for got, want in ((updates[0], shown[0]), (updates[1], shown[1]), (np.concatenate(parts), rollout)):
        np.testing.assert_array_equal(got, want.astype(got.dtype))
    np.testing.assert_array_equal(np.concatenate(looked[:2]), rollout.astype(looked[0].dtype))
    assert {len(part) for part in looked[2:]} == {2}  # half of each minibatch
    assert (tmp_path / "run" / "replay.mp4").exists() == atari


def test_atari_is_played_as_in_the_paper():
    args = Args(env_id="ALE/MontezumaRevenge-v5")
    for render_mode, mode in ((None, AutoresetMode.SAME_STEP), ("rgb_array", AutoresetMode.NEXT_STEP)):
        envs = rnd_ppo.make_envs(args, 2, render_mode)
        obs, _ = envs.reset(seed=[2**32 - 1, 5])
        assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
        games = [envs.unwrapped] if render_mode is None else [envs.unwrapped, envs.twins.unwrapped]
        for game in games:
            kwargs = game.spec.kwargs
            assert kwargs["max_num_frames_per_episode"] == 18_000 and not kwargs["reward_clipping"]
            assert kwargs["repeat_action_probability"] == 0.25 and game.autoreset_mode == mode
        if render_mode:
            assert envs.render()[0].shape == (210, 160, 3)
        envs.close()


def test_each_kind_of_environment_is_made_its_own_way():
    for env_id, size, kind in (
        ("envs.pyramids:Pyramids-v0", 172, "PyramidsVectorEnv"),
        ("MiniGrid-DoorKey-5x5-v0", 147, "SyncVectorEnv"),
        ("CartPole-v1", 4, "SyncVectorEnv"),
    ):
        for render_mode, mode in ((None, AutoresetMode.SAME_STEP), ("rgb_array", AutoresetMode.NEXT_STEP)):
            envs = rnd_ppo.make_envs(Args(env_id=env_id, memory=0.25), 3, render_mode)
            assert type(envs.unwrapped).__name__ == kind and envs.num_envs == 3
            assert envs.metadata["autoreset_mode"] == mode and envs.decay == 0.25
            obs, _ = envs.reset(seed=1)
            assert obs.shape == (3, 2, size) == envs.observation_space.shape and obs.dtype == np.float32
            if render_mode:
                assert envs.render()[0].ndim == 3
            envs.close()


def test_pyramids_counts_cells(tmp_path, monkeypatch, charts):
    """The share of squares an episode has seen: 6 decisions of a fresh policy see one or two of the 81."""
    monkeypatch.setattr(rnd_ppo, "MAX_EVAL_STEPS", 2)
    args = small(tmp_path, env_id="envs.pyramids:Pyramids-v0", num_steps=12, total_timesteps=36)
    rnd_ppo.make_envs(args, 1).close()  # registers the environment
    monkeypatch.setattr(gym.spec("Pyramids-v0"), "max_episode_steps", 6)
    rnd_ppo.train(args)
    (share,) = [value for (tag, _), value in charts.items() if tag == "charts/share_of_cells"]
    assert charts["charts/episodic_length", 36] == 6
    assert 1 / 81 <= share <= 3 / 81 and share * 81 * 6 == pytest.approx(round(share * 81 * 6))


@pytest.mark.parametrize(
    ("env_id", "answer"),
    [
        ("Pyramid-v0", "nearest known names"),
        ("FrozenLake-v1", "q_learning.py"),
        ("Pendulum-v1", "a2c_continuous.py"),
        ("Tuple-v0", "q_learning.py"),
        ("Dict-v0", "no script"),
        ("From1Box-v0", "no script"),
        ("Image-v0", "dqn_atari.py"),
        ("MiniGrid-DoorKey-9x9-v0", "MiniGrid-DoorKey-8x8-v0"),
    ],
)
def test_environments_of_other_kinds(env_id, answer, capsys):
    with pytest.raises(SystemExit) as stopped:
        rnd_ppo.check_args(Args(env_id=env_id))
    assert stopped.value.code == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    [
        {"predictor_share": 0.0},
        {"predictor_share": 1.5},
        {"predictor_share": 0.08},  # of 12 steps: less than one
        {"init_steps": 0},
        {"memory": 1.0},
        {"memory": float("nan")},
        {"num_minibatches": 5},
        {"num_minibatches": 24},
        {"total_timesteps": 23},
        {"num_envs": 10_000, "num_steps": 1001, "num_minibatches": 1, "total_timesteps": 10**9},
    ],
    ids=lambda bad: "{}={}".format(*next(iter(bad.items()))),
)
def test_bad_numbers(bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        rnd_ppo.train(small(tmp_path, **bad))
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_rollout_larger_than_the_memory_is_refused(monkeypatch, capsys):
    """128 games and 128 steps of four frames, kept twice, are 0.9 GB."""
    args = Args(env_id="ALE/MontezumaRevenge-v5", num_envs=128, num_steps=128)
    memory = type("Memory", (), {"total": 0.92e9 / 0.9})
    monkeypatch.setattr(rnd_ppo.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(SystemExit):
        rnd_ppo.check_args(args)
    assert "0.9 GB" in capsys.readouterr().err
    memory.total = 0.93e9 / 0.9
    rnd_ppo.check_args(args)


# ---- learning ----


def test_curiosity_finds_what_chance_does_not(tmp_path):
    rewards = []
    for int_coef in (1.0, 0.0):
        own = {"num_envs": 16, "num_steps": 64, "num_minibatches": 1, "total_timesteps": 32_768}
        own |= {"update_epochs": 4, "learning_rate": 3e-3, "eval_episodes": 20, "init_steps": 50}
        folder = tmp_path / str(int_coef)
        args = small(folder, env_id="Corridor-v0", int_coef=int_coef, **own)
        rewards.append(rnd_ppo.train(args)["mean_reward"])
    assert rewards[0] >= 0.9 and rewards[1] == 0
