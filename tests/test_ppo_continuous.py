"""PPO with continuous actions: whole iterations against slow ones, formulas, noise, bounds, and learning."""

import math
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import ppo_continuous as ppoc
import pytest
import torch
from counter_env import CounterEnv
from gymnasium.envs.classic_control import PendulumEnv
from ppo_continuous import Agent, Args, Noise, RunningNorm, gae, policy_loss, value_loss

# Unequal, not symmetric, wide.
LOW, HIGH = np.array([-2, 100], np.float32), np.array([2, 4000], np.float32)


class Endings(gym.Env):
    """Episodes of 1 to 5 steps with every ending, and some of 30; the rewards follow from the actions."""

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(LOW, HIGH, (2,), np.float32)

    def observe(self) -> np.ndarray:
        noise = self.np_random.normal(size=3)
        return np.array([3 + 2 * noise[0], noise[1] + self.steps, noise[2]], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = int(self.np_random.choice([1, 2, 3, 4, 5, 30]))
        self.terminated, self.truncated = self.np_random.choice([[1, 0], [0, 1], [1, 1]])
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        end = self.steps == self.length
        reward = 3 * float(action[0]) - float(action[1]) / 1000 + self.steps
        return self.observe(), reward, bool(end and self.terminated), bool(end and self.truncated), {}


class Tally(Endings):
    """For the evaluation: lengths of 1 to 6 steps, and what follows an episode pays a fortune."""

    seeds = []  # of all resets that had one

    def reset(self, *, seed=None, options=None):
        self.fortune = 0 if seed is not None else 1e6
        obs, info = super().reset(seed=seed)
        Tally.seeds += [] if seed is None else [seed]
        self.length = int(self.np_random.integers(1, 7))
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward + self.fortune, terminated, truncated, info


class CounterBox(CounterEnv):
    """The Counter with two continuous actions; keeps those it is given."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(LOW, HIGH, (2,), np.float32)
        self.given = []

    def step(self, action):
        self.given.append(np.array(action))
        return super().step(action)


class Jackpot(CounterBox):
    """Pays nothing but 1 in step 400 and −1 in step 401, and ends as the Counter does."""

    def step(self, action):
        obs, _, *endings = super().step(action)
        return obs, {400: 1.0, 401: -1.0}.get(len(self.given), 0.0), *endings


class Broken(CounterBox):
    """Pays NaN from its 40th step on."""

    def step(self, action):
        obs, reward, *endings = super().step(action)
        return obs, reward if len(self.given) < 40 else math.nan, *endings


class Aim(gym.Env):
    """Shows a target, far from 0 and from scale 1, and pays minus the distance of the action from it.

    Episodes are cut after 8 steps. Blind to the target, the best choice is the middle: −10 an episode.
    """

    bounds = (0, 5)

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gym.spaces.Box(*self.bounds, (1,), np.float32)

    def show(self):
        self.target = self.np_random.uniform(0, 5)
        return np.array([1000 + 100 * self.target], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.show(), {}

    def step(self, action):
        reward = -abs(float(action[0]) - self.target)
        self.steps += 1
        return self.show(), reward, False, self.steps == 8, {}


class Boundless(Aim):
    """An action without bounds."""

    bounds = (-np.inf, np.inf)


class HalfBounded(Aim):
    """An action with a lower bound only."""

    bounds = (0, np.inf)


class Plane(Aim):
    """An action with two axes."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-1, 1, (2, 2), np.float32)


class Whole(Aim):
    """An action that is a whole number."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-3, 3, (1,), np.int64)


class Huge(Aim):
    """Bounds whose distance is no float."""

    bounds = (-3e38, 3e38)


class Point(Aim):
    """An observation without an axis."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Box(-1, 1, (), np.float32)


for env in (Endings, Tally, Jackpot, Broken, Aim, Boundless, HalfBounded, Plane, Whole, Huge, Point):
    gym.register(f"{env.__name__}PPOC-v0", entry_point=env)
for ending in ("terminated", "truncated", "both", "neither"):
    gym.register(f"CounterPPOC-{ending}-v0", entry_point=CounterBox, kwargs={"ending": ending})
gym.register("ShortPendulumPPOC-v0", entry_point=PendulumEnv, max_episode_steps=40)


class Spy:
    """Calls the original and keeps a copy of what it was called with."""

    def __init__(self, original) -> None:
        self.original, self.calls = original, []

    def __call__(self, *args):
        copies = {np.ndarray: np.copy, torch.Tensor: lambda x: x.detach().clone()}
        self.calls.append([copies.get(type(x), lambda x: x)(x) for x in args])
        return self.original(*args)


def make_args(folder: Path, **changes) -> Args:
    small = {"env_id": "AimPPOC-v0", "num_envs": 3, "num_steps": 6, "num_minibatches": 3, "update_epochs": 2}
    small |= {"total_timesteps": 180, "eval_episodes": 2}
    return Args(**{**small, **changes}, run_dir=str(folder))


def saved(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def weights_after(folder: Path, **changes) -> dict:
    ppoc.train(make_args(folder, **changes))
    return saved(folder)["agent"]


@pytest.fixture
def points(monkeypatch):
    """The charts: (tag, step) -> value."""
    written = {}
    add = lambda self, tag, value, step: written.__setitem__((tag, step), value)  # noqa: E731
    monkeypatch.setattr(ppoc.SummaryWriter, "add_scalar", add)
    return written


# ---- One training against an independent, slow one ----


def mean(numbers):
    return sum(numbers) / len(numbers)


class Slow:
    """PPO in plain loops and float64, written from the equations of the docstring alone.

    weights: the first ones, by name. normals: the standard normal numbers behind each draw of noise.
    orders: the permutation of each epoch.
    """

    def __init__(self, args: Args, weights: dict, normals: list, orders: list) -> None:
        self.args, self.normals, self.orders = args, list(normals), list(orders)
        self.theta = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
        self.first = {name: torch.zeros_like(weight) for name, weight in self.theta.items()}  # of Adam
        self.second = {name: torch.zeros_like(weight) for name, weight in self.theta.items()}
        self.updates = 0
        self.envs = [gym.make(args.env_id) for _ in range(args.num_envs)]
        seeds = ppoc.env_seeds(args.num_envs, args.seed, 0, 0)
        self.obs = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=True)]
        self.seen, self.sums = [], []
        self.earned, self.totals, self.lengths = [[0.0] * args.num_envs for _ in range(3)]
        self.kinds = set()

    def normed(self, obs):
        """Equation (11), from all observations of the rollouts before."""
        x = obs.astype(float)
        if not self.args.norm_obs:
            return torch.tensor(x)
        if self.seen:  # before the first update the mean counts as 0, the deviation as 1
            x = (x - np.mean(self.seen, axis=0)) / np.sqrt(np.var(self.seen, axis=0) + 1e-8)
        return torch.tensor(np.clip(x, -10, 10))

    def layers(self, x, *names):
        for name in names:
            x = self.theta[f"{name}.weight"] @ x + self.theta[f"{name}.bias"]
            x = x if name in ("mean", "critic.4") else torch.tanh(x)
        return x

    def value(self, obs):
        return self.layers(self.normed(obs), "critic.0", "critic.2", "critic.4")[0]

    def policy(self, obs):
        """Features, means and deviations for one observation."""
        phi = self.layers(self.normed(obs), "features.0", "features.2")
        log_std = self.theta["noise.log_std"]  # (|φ|, |A|) or (1, |A|)
        if not self.args.use_sde:
            return phi, self.layers(phi, "mean"), torch.exp(log_std[0])
        variances = [torch.dot(phi.detach() ** 2, torch.exp(log_std[:, j]) ** 2) + 1e-6 for j in (0, 1)]
        return phi, self.layers(phi, "mean"), torch.sqrt(torch.stack(variances))

    def density(self, step):
        """Of the action that was sampled: a product of normal densities, no logarithms."""
        _, means, stds = self.policy(step["obs"])
        factors = 1.0
        for j in range(2):
            z = (float(step["action"][j]) - means[j]) / stds[j]
            factors = factors * torch.exp(-(z**2) / 2) / (stds[j] * math.sqrt(2 * math.pi))
        return factors, stds

    def collect(self) -> tuple[list[list[dict]], list]:
        """Steps by time and environment, and the episodes that ended."""
        args = self.args
        hold = args.num_steps
        if args.use_sde and args.sde_sample_freq > 0:
            hold = args.sde_sample_freq
        log_std = self.theta["noise.log_std"].detach()
        steps, episodes = [], []
        for t in range(args.num_steps):
            if t % hold == 0:
                normals = self.normals.pop(0)
            row = []
            for n, env in enumerate(self.envs):
                phi, means, _ = self.policy(self.obs[n])
                weighed = normals[0 if args.use_sde else t, n].double() * torch.exp(log_std)  # W, as in (10)
                noise = phi.detach() @ weighed if args.use_sde else weighed[0]
                action = (means.detach() + noise).numpy()  # (1)
                given = LOW + (np.clip(action, -1, 1) + 1) / 2 * (HIGH - LOW)
                next_obs, reward, terminated, truncated, _ = env.step(given)
                row.append({"obs": self.obs[n], "action": action, "reward": reward, "next_obs": next_obs})
                row[-1] |= {"terminated": terminated, "ended": terminated or truncated}
                self.kinds.add((terminated, truncated))
                self.totals[n] += reward
                self.lengths[n] += 1
                if terminated or truncated:
                    next_obs, _ = env.reset()
                    episodes.append((self.totals[n], self.lengths[n]))
                    self.totals[n] = self.lengths[n] = 0.0
                self.obs[n] = next_obs
            steps.append(row)
        return steps, episodes

    def rewards(self, steps) -> None:
        """[Trick 4]: divided by the deviation of the discounted sums of all rollouts, this one included."""
        for row in steps:
            for n, step in enumerate(row):
                self.earned[n] = self.args.gamma * self.earned[n] + step["reward"]
                self.sums.append(self.earned[n])
                if step["ended"]:
                    self.earned[n] = 0.0
        for row in steps:
            for step in row:
                step["learned"] = step["reward"]
                if self.args.norm_reward:
                    scaled = step["reward"] / math.sqrt(np.var(self.sums) + 1e-8)
                    step["learned"] = min(max(scaled, -10), 10)

    def estimate(self, steps) -> None:
        """Advantages as the sums Σ_k (γλ)^k δ_{t+k} up to the end of episode and rollout."""
        gamma, lam = self.args.gamma, self.args.gae_lambda
        for row in steps:
            for step in row:
                step["v"] = self.value(step["obs"]).item()
                step["delta"] = step["learned"] - step["v"]
                if not step["terminated"]:
                    step["delta"] += gamma * self.value(step["next_obs"]).item()
        for t, row in enumerate(steps):
            for n, step in enumerate(row):
                step["A"] = 0.0
                for k in range(len(steps) - t):
                    step["A"] += (gamma * lam) ** k * steps[t + k][n]["delta"]
                    if steps[t + k][n]["ended"]:
                        break
                step["R"] = step["A"] + step["v"]  # (4)

    def loss(self, rows):
        """Equations (5) to (9) and (12), row by row: the loss, and what is logged of it."""
        args = self.args
        advantages = [row["A"] for row in rows]
        if args.norm_adv:
            centre = mean(advantages)
            spread = math.sqrt(mean([(a - centre) ** 2 for a in advantages])) + 1e-8
            advantages = [(a - centre) / spread for a in advantages]
        low, high = 1 - args.clip_coef, 1 + args.clip_coef
        objectives, errors, entropies, ratios, deviations = [], [], [], [], []
        for row, advantage in zip(rows, advantages, strict=True):
            density, stds = self.density(row)
            ratio = density / row["old density"]  # (12)
            clipped = ratio if low <= ratio <= high else torch.tensor(low if ratio < low else high)
            objectives.append(min(ratio * advantage, clipped * advantage))  # (6)
            value = self.value(row["obs"])
            error = (value - row["R"]) ** 2
            if args.clip_vloss:
                near = min(max(value, row["old v"] - args.clip_coef), row["old v"] + args.clip_coef)
                error = max(error, (near - row["R"]) ** 2)
            errors.append(torch.as_tensor(error))
            entropies.append(sum(torch.log(std) + math.log(2 * math.pi * math.e) / 2 for std in stds))  # (8)
            ratios.append(ratio.item())
            deviations += stds.tolist()
        policy_part, value_part = -mean(objectives), mean(errors) / 2
        logged = {
            "policy_loss": policy_part.item(),
            "value_loss": value_part.item(),
            "entropy": mean(entropies).item(),
            "std": mean(deviations),
            "approx_kl": mean([r - 1 - math.log(r) for r in ratios]),
            "clip_fraction": mean([float(not low <= r <= high) for r in ratios]),
        }
        return policy_part + args.vf_coef * value_part - args.ent_coef * mean(entropies), logged

    def iterate(self, rollout: int) -> dict:
        """One rollout and all that is learned from it; what is to be logged."""
        args = self.args
        steps, episodes = self.collect()
        everything = [step for row in steps for step in row]
        for step in everything:
            step["old density"] = self.density(step)[0].item()
        self.rewards(steps)
        rate = args.learning_rate
        if args.anneal_lr:
            rate *= 1 - rollout * args.batch_size / args.total_timesteps
        epochs = 0
        while epochs < args.update_epochs:
            if epochs == 0 or args.recompute_advantages:
                self.estimate(steps)
            if epochs == 0:  # V before it learns from these rows
                spread = [np.var([step[name] for step in everything]) for name in ("A", "R")]
                explained = 1 - spread[0] / spread[1]
                for step in everything:
                    step["old v"] = step["v"]
            epochs += 1
            order = self.orders.pop(0).tolist()
            size = args.batch_size // args.num_minibatches
            for start in range(0, args.batch_size, size):
                loss, log = self.loss([everything[i] for i in order[start : start + size]])
                norm = self.descend(loss, rate)
            if args.target_kl is not None and log["approx_kl"] > args.target_kl:
                break
        if args.norm_obs:
            self.seen += [step["obs"].astype(float) for step in everything]
        log |= {"grad_norm": norm, "explained_variance": explained}
        log = {f"losses/{name}": value for name, value in log.items()}
        log |= {"charts/learning_rate": rate}
        if episodes:
            log["charts/episodic_return"] = mean([total for total, _ in episodes])
            log["charts/episodic_length"] = mean([length for _, length in episodes])
        return log | {"epochs": epochs, "episodes": len(episodes)}

    def descend(self, loss, rate: float) -> float:
        """A step of Adam; returns the length of the gradient."""
        # Where all values of a minibatch are clipped, the critic is not in the graph at all.
        derivatives = torch.autograd.grad(loss, list(self.theta.values()), materialize_grads=True)
        grads = dict(zip(self.theta, derivatives, strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        shrink = min(1, self.args.max_grad_norm / norm) if self.args.max_grad_norm else 1
        self.updates += 1
        for name, weight in self.theta.items():
            g = shrink * grads[name]
            self.first[name] = 0.9 * self.first[name] + 0.1 * g
            self.second[name] = 0.999 * self.second[name] + 0.001 * g**2
            m = self.first[name] / (1 - 0.9**self.updates)
            v = self.second[name] / (1 - 0.999**self.updates)
            step = rate * m / (torch.sqrt(v) + 1e-8)
            self.theta[name] = (weight - step).detach().requires_grad_()
        return norm


VARIANTS = {
    "defaults": {},
    "held noise": {"use_sde": True, "sde_sample_freq": 3, "log_std_init": -1.0, "ent_coef": 0.03},
    "noise of a rollout": {
        "use_sde": True,
        "sde_sample_freq": -1,
        "learning_rate": 2e-3,
        "ortho_init": False,
    },
    "all on": {
        "ent_coef": 0.03,
        "clip_vloss": True,
        "clip_coef": 0.05,
        "max_grad_norm": 0.1,
        "learning_rate": 2e-3,
        "vf_coef": 1.3,
        "recompute_advantages": False,
    },
    "values near the old ones": {
        "clip_vloss": True,
        "clip_coef": 0.05,
        "learning_rate": 2e-3,
        "vf_coef": 1.3,
    },
    "all off": {
        **{"ortho_init": False, "anneal_lr": False, "norm_obs": False, "norm_reward": False},
        **{"norm_adv": False, "max_grad_norm": 0.0, "recompute_advantages": False, "num_minibatches": 1},
        **{"ent_coef": -0.1, "vf_coef": 0.01, "learning_rate": 3e-4},
    },
    "target kl": {"target_kl": 0.01, "learning_rate": 5e-3, "update_epochs": 6, "clip_coef": 0.1},
    "one environment": {"num_envs": 1, "num_steps": 24, "num_minibatches": 2, "gae_lambda": 1.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_iterations_are_those_of_the_equations(variant, tmp_path, monkeypatch, points):
    """Three rollouts with all endings: every weight, statistic, counter and point of the charts."""
    size = {"env_id": "EndingsPPOC-v0", "num_envs": 4, "num_steps": 7, "num_minibatches": 4}
    size |= {"update_epochs": 3, "eval_episodes": 1, "gamma": 0.9, "gae_lambda": 0.7, "seed": 5}
    size |= {"learning_rate": 1e-3} | VARIANTS[variant]
    args = make_args(tmp_path, **size, total_timesteps=3 * size["num_envs"] * size["num_steps"] + 5)
    made, normals, orders = [], [], []
    make_agent, randn, randperm = ppoc.make_agent, torch.randn, torch.randperm

    def remember(*arguments):
        agent = make_agent(*arguments)
        made.append({name: weight.detach().clone() for name, weight in agent.named_parameters()})
        return agent

    monkeypatch.setattr(ppoc, "make_agent", remember)
    monkeypatch.setattr(torch, "randn", lambda *shape: normals.append(randn(*shape)) or normals[-1].clone())
    monkeypatch.setattr(torch, "randperm", lambda n: orders.append(randperm(n)) or orders[-1].clone())
    ppoc.train(args)
    first = made[0]
    slow = Slow(args, first, normals, orders)
    episodes = 0
    for rollout in range(3):
        log = slow.iterate(rollout)
        epochs = log.pop("epochs")
        episodes += log.pop("episodes")
        step = (rollout + 1) * args.batch_size
        assert set(log) == {tag for tag, at in points if at == step} - {"charts/SPS"}
        for tag, want in log.items():
            assert float(points[tag, step]) == pytest.approx(want, rel=1e-3, abs=1e-5), (tag, step)
    assert not slow.normals and not slow.orders, "as many draws and epochs"
    assert len(slow.kinds) == 4 or args.num_envs == 1, "the rollouts have all endings"
    # What the settings are there for did happen.
    if variant == "all on":
        assert log["losses/clip_fraction"] > 0 and log["losses/grad_norm"] > args.max_grad_norm
    if variant == "target kl":
        assert 1 <= epochs < args.update_epochs
    checkpoint = saved(tmp_path)
    for name, want in slow.theta.items():
        want = (want - first[name]).detach()
        moved = checkpoint["agent"][name].double() - first[name]
        assert want.abs().max() > 0, name
        torch.testing.assert_close(moved, want, rtol=0, atol=5e-3 * want.abs().max().item() + 1e-7)
    assert checkpoint["global_step"] == 3 * args.batch_size and checkpoint["episodes"] == episodes
    if args.norm_obs:
        np.testing.assert_allclose(
            checkpoint["agent"]["norm_obs.mean"], np.mean(slow.seen, axis=0), rtol=1e-6
        )
        np.testing.assert_allclose(checkpoint["agent"]["norm_obs.var"], np.var(slow.seen, axis=0), rtol=1e-6)
    if args.norm_reward:
        np.testing.assert_allclose(checkpoint["agent"]["norm_return.var"], np.var(slow.sums), rtol=1e-4)


@pytest.mark.parametrize("use_sde", [True, False])
def test_the_first_minibatch_has_ratio_1_and_the_last_has_not(use_sde, tmp_path, monkeypatch):
    spy = Spy(policy_loss)
    monkeypatch.setattr(ppoc, "policy_loss", spy)
    size = {"env_id": "EndingsPPOC-v0", "num_envs": 4, "num_steps": 16, "num_minibatches": 4}
    ppoc.train(make_args(tmp_path, **size, total_timesteps=192, use_sde=use_sde, sde_sample_freq=5))
    ratios = [(new - old).exp() for new, old, *_ in spy.calls]
    for rollout in range(3):
        torch.testing.assert_close(ratios[8 * rollout], torch.ones(16), rtol=0, atol=2e-5)
        assert (ratios[8 * rollout + 7] - 1).abs().max() > 1e-3


# ---- The evaluation ----


def test_an_evaluation_counts_each_episode_once_and_takes_the_likeliest_action(tmp_path):
    """Against episodes played one by one, in environments of unequal length; its seeds are not training's."""
    Tally.seeds = []
    args = make_args(tmp_path, env_id="TallyPPOC-v0", eval_episodes=23, total_timesteps=54, log_std_init=1.0)
    results = ppoc.train(args)
    training = ppoc.env_seeds(3, 1, 0, 0)
    evaluation = ppoc.env_seeds(20, 1, 1, 0) + ppoc.env_seeds(20, 1, 1, 20)
    assert Tally.seeds == training + evaluation and len(set(Tally.seeds)) == 43
    agent = ppoc.make_agent(args, ppoc.make_envs(args, 1), torch.device("cpu"))
    agent.load_state_dict(saved(tmp_path)["agent"])
    returns = []
    for seed in evaluation[:23]:
        env = Tally()
        obs, _ = env.reset(seed=seed)
        total, ended = 0.0, False
        while not ended:
            with torch.no_grad():
                action = agent.mean(agent.features(agent.norm_obs(torch.from_numpy(obs)[None])))[0].numpy()
            obs, reward, *endings, _ = env.step(LOW + (np.clip(action, -1, 1) + 1) / 2 * (HIGH - LOW))
            total, ended = total + reward, any(endings)
        returns.append(total)
    assert results["mean_reward"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert results["std_reward"] == pytest.approx(np.std(returns), rel=1e-5)
    assert results["score"] == results["mean_reward"] - results["std_reward"]
    assert (results["eval_episodes"], results["global_step"]) == (23, 54)
    assert ppoc.evaluate(args, tmp_path, torch.device("cpu")) == results


def test_an_evaluation_ends_where_episodes_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(ppoc, "MAX_EVAL_STEPS", 4)
    results = ppoc.train(make_args(tmp_path, env_id="CounterPPOC-neither-v0", total_timesteps=18))
    assert (results["mean_reward"], results["std_reward"]) == (1 + 2 + 3 + 4, 0)


def test_an_evaluation_needs_the_statistics_and_leaves_them_alone(tmp_path, monkeypatch):
    args = make_args(tmp_path)
    updates, update = [], RunningNorm.update
    counted = lambda self, batch: updates.append(len(batch)) or update(self, batch)  # noqa: E731
    monkeypatch.setattr(RunningNorm, "update", counted)
    score = ppoc.train(args)["mean_reward"]
    assert updates == [18] * 20  # ten rollouts: observations and returns; the evaluation added none
    checkpoint = saved(tmp_path)
    assert checkpoint["agent"]["norm_obs.count"] == 180
    assert ppoc.evaluate(args, tmp_path, torch.device("cpu"))["mean_reward"] == score
    assert len(updates) == 20
    checkpoint["agent"]["norm_obs.shift"].zero_()
    checkpoint["agent"]["norm_obs.scale"].fill_(1)
    ppoc.save_checkpoint(tmp_path, checkpoint)
    assert ppoc.evaluate(args, tmp_path, torch.device("cpu"))["mean_reward"] != score


def test_statistics_go_on_when_a_run_is_resumed(tmp_path):
    args = make_args(tmp_path, total_timesteps=90)
    ppoc.train(args)
    before = saved(tmp_path)["agent"]
    ppoc.train(replace(args, run_dir=None, resume=args.run_dir, total_timesteps=180))
    after = saved(tmp_path)["agent"]
    assert (before["norm_obs.count"], after["norm_obs.count"]) == (90, 180)
    assert (before["norm_return.count"], after["norm_return.count"]) == (90, 180)


def test_a_film_ends_with_the_last_step(tmp_path):
    """The counter is 10 brighter after each of its three steps; the next episode would begin in black."""
    import imageio.v3 as iio

    args = make_args(tmp_path, env_id="CounterPPOC-truncated-v0")
    ppoc.record_video(args, lambda obs: np.zeros((1, 2)), tmp_path / "replay.mp4")
    frames = iio.imread(tmp_path / "replay.mp4")
    assert len(frames) == 4 and abs(frames[-1].astype(int).mean() - 30) < 4


# ---- The formulas ----


def test_gae_is_the_sum_of_its_definition_across_all_endings():
    T, N = 7, 5
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminated, truncated = np.zeros((2, T, N), dtype=bool)
    terminated[2, 0] = truncated[2, 1] = terminated[4, 2] = truncated[4, 2] = True  # env 3 and 4: neither
    terminated[6, 3] = truncated[0, 4] = truncated[6, 1] = True  # endings at the edges of the rollout
    got = gae(rewards, values, next_values, terminated, truncated, 0.9, 0.7)
    for n in range(N):
        for t in range(T):
            want = 0.0
            for k in range(T - t):
                u = t + k
                bootstrap = 0.0 if terminated[u, n] else 0.9 * next_values[u, n]
                want += 0.63**k * (rewards[u, n] + bootstrap - values[u, n])
                if terminated[u, n] or truncated[u, n]:
                    break
            assert got[t, n] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (0.5, 2.0, 1.0, 2.0),  # a good action became rare: the whole gradient
        (1.1, 2.0, 2.2, 2.0),
        (1.5, 2.0, 2.4, 0.0),  # already likelier: enough
        (0.5, -2.0, -1.6, 0.0),  # already rarer: enough
        (0.9, -2.0, -1.8, -2.0),
        (1.5, -2.0, -3.0, -2.0),  # a bad action became likely: the whole gradient
    ],
)
def test_the_six_cases_of_the_clipped_objective(ratio, advantage, objective, slope):
    # The old log-density is positive: a density may exceed 1. The slope is with respect to the ratio.
    log_probs = torch.full((3,), math.log(ratio) + 2.5, dtype=torch.float64, requires_grad=True)
    old = torch.full((3,), 2.5, dtype=torch.float64)
    loss = policy_loss(log_probs, old, torch.full((3,), advantage, dtype=torch.float64), 0.2)
    assert loss.item() == pytest.approx(-objective)
    loss.backward()
    assert log_probs.grad.sum().item() == pytest.approx(-slope * ratio)  # d ratio / d log_prob = ratio


@pytest.mark.parametrize(
    ("new", "returns", "error"),
    [
        (1.0, 2.0, 1.8),  # above the range 0 ± 0.2: 0.2 counts, for it is further from the return
        (1.0, -2.0, 3.0),  # the value itself is further
        (-1.0, -2.0, 1.8),  # below the range: −0.2 counts
        (-1.0, 2.0, 3.0),
        (0.1, 2.0, 1.9),  # within the range
        (-0.1, 2.0, 2.1),
    ],
)
def test_the_value_clip_has_two_bounds(new, returns, error):
    # The old value is 3: a clip around 0 instead of around it would show.
    new, old, returns = (torch.tensor([x + 3.0, 3.0]) for x in (new, 0.0, returns))
    returns[1] = 3.0  # the second row has no error: the loss is half the mean
    assert value_loss(new, old, returns, 0.2).item() == pytest.approx(0.5 * error**2 / 2, rel=1e-5)
    plain = 0.5 * float((new[0] - returns[0]) ** 2) / 2
    assert value_loss(new, old, returns).item() == pytest.approx(plain)


def test_gaussian_log_prob_and_entropy_are_those_of_torch():
    means, actions, stds = torch.randn(6, 3), torch.randn(6, 3) * 4, torch.rand(6, 3) + 0.1
    normal = torch.distributions.MultivariateNormal(means, scale_tril=torch.diag_embed(stds))
    torch.testing.assert_close(ppoc.gaussian_log_prob(actions, means, stds), normal.log_prob(actions))
    torch.testing.assert_close(ppoc.gaussian_entropy(stds), normal.entropy().mean())


def test_normalize_and_a_single_advantage():
    x = ppoc.normalize(torch.tensor([1.0, 2.0, 6.0]))
    torch.testing.assert_close(x, torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(14 / 3))
    assert ppoc.normalize(torch.tensor([3.0])).tolist() == [0.0]  # not NaN


def test_discounted_sums_by_hand():
    rewards = np.array([[1.0, 2], [10, 20], [100, 200]])
    ended = np.array([[False, True], [False, False], [True, False]])
    sums, after = ppoc.discounted_sums(rewards, ended, np.array([4.0, 6.0]), 0.5)
    np.testing.assert_array_equal(sums, [[3, 5], [11.5, 20], [105.75, 210]])
    np.testing.assert_array_equal(after, [0, 210])


def test_to_env_reaches_the_bounds_and_no_further():
    """Unequal bounds, bounds that are not symmetric, wide ones and tiny ones."""
    low = np.array([-2, 0, -0.4, -1e30, 100], np.float32)
    high = np.array([2, 400, 0.4, 1e30, 100.5], np.float32)
    space = gym.spaces.Box(low, high, dtype=np.float32)
    got = ppoc.to_env(np.array([[-1] * 5, [0] * 5, [1] * 5, [-7] * 5, [7] * 5, [0.5] * 5], np.float32), space)
    middle = [0, 200, 0, 0, 100.25]
    for row, want in zip(got, [low, middle, high, low, high], strict=False):
        np.testing.assert_allclose(row, want, rtol=1e-6)
    np.testing.assert_allclose(got[5], [1, 300, 0.2, 5e29, 100.375], rtol=1e-6)
    assert all(space.contains(row.astype(np.float32)) for row in got)


def test_running_statistics_are_those_of_all_numbers_at_once():
    rng = np.random.default_rng(0)
    batches = [rng.normal(1e4, 3, size=(size, 3)) * [1, 0.01, 0] for size in (1, 7, 2, 50, 1)]
    norm = RunningNorm(3, limit=10.0)
    for batch in batches:
        norm.update(torch.from_numpy(batch))
    everything = np.concatenate(batches)
    np.testing.assert_allclose(norm.mean.numpy(), everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(norm.var.numpy(), everything.var(0), rtol=1e-9, atol=1e-12)
    assert norm.count == 61
    x = everything[:4].astype(np.float32)
    want = (x - everything.mean(0)) / np.sqrt(everything.var(0) + 1e-8)
    np.testing.assert_allclose(norm(torch.from_numpy(x))[:, :2].numpy(), want[:, :2], atol=2e-3)
    assert norm(torch.tensor([[2e4, -2e4, 0.0]])).tolist() == [[10, -10, 0]]  # outliers; a constant is 0


# ---- The noise ----


def test_plain_noise_has_one_deviation_everywhere():
    noise = Noise(5, 2, -1.0, use_sde=False)
    assert noise.log_std.tolist() == [[-1.0, -1.0]]
    noise.log_std.data = torch.tensor([[-1.0, 0.5]])
    torch.testing.assert_close(noise.std(torch.randn(7, 5)), noise.log_std.exp().expand(7, 2))
    torch.manual_seed(0)
    W = noise.draw(10, 2000)
    assert W.shape == (10, 2000, 1, 2)
    samples = np.stack([noise.sample(np.full((2000, 5), t), W[t]) for t in range(10)])  # (T, N, |A|)
    np.testing.assert_allclose(samples.std((0, 1)), np.exp([-1.0, 0.5]), rtol=0.03)
    assert abs(np.corrcoef(samples.reshape(-1, 2).T)[0, 1]) < 0.03
    assert abs(np.corrcoef(samples[0, :, 0], samples[1, :, 0])[0, 1]) < 0.1  # a new one each step


def test_state_dependent_noise_has_the_variance_that_is_claimed():
    """Against sampling: for each of three states the deviation of 40,000 draws is that of `std`."""
    torch.manual_seed(0)
    noise = Noise(4, 3, -0.5, use_sde=True)
    assert noise.log_std.shape == (4, 3) and (noise.log_std == -0.5).all()
    noise.log_std.data = torch.randn(4, 3) * 0.5
    for features in torch.randn(3, 4):
        phi = features.expand(40_000, 4)
        drawn = noise.sample(phi.numpy(), noise.draw(2, 40_000)[1])
        claimed = noise.std(phi[:1]).detach().numpy()[0]
        np.testing.assert_allclose(np.cov(drawn.T), np.diag(claimed**2), atol=0.03 * claimed.max() ** 2)
    # Features are there to steer the robot: the noise does not train them.
    features = torch.randn(3, 4, requires_grad=True)
    noise.std(features).sum().backward()
    assert features.grad is None and noise.log_std.grad.abs().min() > 0


@pytest.mark.parametrize(("freq", "draws"), [(4, [4, 4, 2]), (5, [5, 5]), (-1, [10]), (0, [10]), (99, [10])])
def test_a_matrix_is_held_for_as_long_as_it_is_said(freq, draws, tmp_path, monkeypatch):
    """`draw` is asked for the steps until the next draw, and the same matrix serves in all of them."""
    asked, used = [], []
    draw, sample = Noise.draw, Noise.sample
    monkeypatch.setattr(Noise, "draw", lambda self, T, N: asked.append((T, N)) or draw(self, T, N))
    monkeypatch.setattr(Noise, "sample", lambda self, phi, W: used.append(W.copy()) or sample(self, phi, W))
    size = {"num_steps": 10, "num_minibatches": 1, "total_timesteps": 60}
    ppoc.train(make_args(tmp_path, **size, use_sde=True, sde_sample_freq=freq))
    assert asked == 2 * [(steps, 3) for steps in draws]
    assert len(used) == 20
    held = np.repeat(np.arange(2 * len(draws)), 2 * draws)
    for t in range(1, 20):
        assert np.array_equal(used[t], used[t - 1]) == (held[t] == held[t - 1]), t
    assert not np.array_equal(used[0][0], used[0][1]), "each environment has its own"


def test_plain_noise_is_new_in_each_step_whatever_the_other_flag_says(tmp_path):
    usual = weights_after(tmp_path / "usual", sde_sample_freq=4)
    other = weights_after(tmp_path / "other", sde_sample_freq=-1)
    assert all(torch.equal(usual[name], other[name]) for name in usual)


# ---- The networks ----


@pytest.mark.parametrize("norm_obs", [True, False])
def test_the_numpy_policy_is_the_networks(norm_obs):
    agent = Agent(3, 2, Args(norm_obs=norm_obs))
    agent.mean.weight.data.mul_(100)  # else the means are nearly 0
    obs = torch.randn(4, 3) * 20
    if norm_obs:
        agent.norm_obs.update(torch.randn(50, 3) * 7 + 5)
        obs[0, 0] = 1e4  # beyond the limit
    features, means = ppoc.numpy_policy(agent)(obs.numpy())
    want = agent.features(agent.norm_obs(obs))
    np.testing.assert_allclose(features, want.detach(), atol=1e-6)
    np.testing.assert_allclose(means, agent.mean(want).detach(), atol=1e-5)


def test_orthogonal_weights_have_their_gains():
    plain, agent = Agent(3, 2, Args(ortho_init=False)), Agent(3, 2, Args())
    gains = {"features.0": 2**0.5, "features.2": 2**0.5, "mean": 0.01}
    gains |= {"critic.0": 2**0.5, "critic.2": 2**0.5, "critic.4": 1.0}
    for name, gain in gains.items():
        layer = agent.get_submodule(name)
        np.testing.assert_allclose(torch.linalg.svdvals(layer.weight.detach()), gain, rtol=1e-4)
        assert (layer.bias == 0).all() and plain.get_submodule(name).bias.abs().min() > 0
    assert [tuple(w.shape) for w in plain.features.parameters()] == [(64, 3), (64,), (64, 64), (64,)]


# ---- What training does with them ----


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "neither"])
def test_what_is_stored_when_episodes_end(ending, tmp_path, monkeypatch, points):
    """Two environments, episodes of 3 steps, rollouts of 4; the critic is made to say 10·episode + step."""
    spy, make_agent = Spy(ppoc.gae), ppoc.make_agent
    monkeypatch.setattr(ppoc, "gae", spy)
    monkeypatch.setattr(ppoc, "MAX_EVAL_STEPS", 9)

    class Critic(torch.nn.Linear):
        def forward(self, obs):
            return 10 * obs[..., :1] + obs[..., 1:] + 0 * super().forward(obs)

    def agent_with_known_values(*arguments):
        agent = make_agent(*arguments)
        agent.critic = Critic(2, 1)
        return agent

    monkeypatch.setattr(ppoc, "make_agent", agent_with_known_values)
    size = {"num_envs": 2, "num_steps": 4, "total_timesteps": 16, "num_minibatches": 2, "update_epochs": 1}
    args = make_args(tmp_path, env_id=f"CounterPPOC-{ending}-v0", **size, norm_obs=False, norm_reward=False)
    ppoc.train(args)
    rewards, values, next_values, terminated, truncated, gamma, gae_lambda = spy.calls[0]
    both = lambda column: np.repeat(np.array(column)[:, None], 2, axis=1)  # noqa: E731
    assert (gamma, gae_lambda) == (args.gamma, args.gae_lambda)
    if ending == "neither":
        np.testing.assert_array_equal(rewards, both([1, 2, 3, 4]))
        np.testing.assert_array_equal(next_values, both([1, 2, 3, 4]))
        assert not terminated.any() and not truncated.any()
        assert not [tag for tag, _ in points if tag == "charts/episodic_return"]
        return
    np.testing.assert_array_equal(rewards, both([1, 2, 3, 1]))
    np.testing.assert_array_equal(values, both([0, 1, 2, 10]))  # step 3 starts the next episode
    np.testing.assert_array_equal(next_values, both([1, 2, 3, 11]))  # step 2 led to [0, 3], not to the reset
    np.testing.assert_array_equal(terminated, both([False, False, ending in ("terminated", "both"), False]))
    np.testing.assert_array_equal(truncated, both([False, False, ending in ("truncated", "both"), False]))
    assert points["charts/episodic_return", 8] == 6 and points["charts/episodic_length", 8] == 3


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_rewards_are_scaled_for_the_learner_and_returns_are_true(ending, tmp_path, monkeypatch, points):
    """Any ending resets the sum of an environment's discounted rewards."""
    spy = Spy(ppoc.gae)
    monkeypatch.setattr(ppoc, "gae", spy)
    size = {"num_envs": 2, "num_steps": 4, "total_timesteps": 16, "num_minibatches": 2, "gamma": 0.5}
    args = make_args(tmp_path, env_id=f"CounterPPOC-{ending}-v0", **size, update_epochs=1)
    results = ppoc.train(args)
    # The sums of an episode are 1, 2.5 and 4.25; the first two rollouts are 1 2 3 1 and 2 3 1 2.
    sums = [[1, 2.5, 4.25, 1], [2.5, 4.25, 1, 2.5]]
    for call, seen, rewards in zip(
        spy.calls, (sums[0], sums[0] + sums[1]), ([1, 2, 3, 1], [2, 3, 1, 2]), strict=True
    ):
        np.testing.assert_allclose(call[0][:, 0], np.array(rewards) / np.std(seen), rtol=1e-5)
    assert points["charts/episodic_return", 16] == 6
    assert results["mean_reward"] == 6


def test_scaled_rewards_stay_within_ten(tmp_path, monkeypatch):
    """400 steps without any reward, then 1: it is some 20 deviations, and counts as 10."""
    spy = Spy(ppoc.gae)
    monkeypatch.setattr(ppoc, "gae", spy)
    monkeypatch.setattr(ppoc.Run, "finish", lambda self, device: self.lock.close())
    size = {"num_envs": 2, "num_steps": 32, "num_minibatches": 1, "total_timesteps": 832, "gamma": 0.0}
    ppoc.train(make_args(tmp_path, env_id="JackpotPPOC-v0", **size, update_epochs=1))
    learned = np.concatenate([call[0] for call in spy.calls])[:, 0]  # (416,)
    assert learned[399] == 10 and learned[400] == -10 and np.count_nonzero(learned) == 2


def test_advantages_are_estimated_anew_in_each_epoch_or_once(tmp_path, monkeypatch):
    for anew, calls in ((True, 4), (False, 1)):
        spy = Spy(ppoc.gae)
        monkeypatch.setattr(ppoc, "gae", spy)
        size = {"total_timesteps": 18, "update_epochs": 4, "learning_rate": 0.01}
        ppoc.train(make_args(tmp_path / str(anew), **size, recompute_advantages=anew))
        values = [call[1] for call in spy.calls]
        assert len(values) == calls
        assert all(np.abs(before - after).max() > 1e-4 for before, after in zip(values, values[1:]))  # noqa: B905
        monkeypatch.undo()


def test_the_sampled_action_is_learned_from_and_the_clipped_one_is_played(tmp_path, monkeypatch):
    spy = Spy(ppoc.gaussian_log_prob)
    monkeypatch.setattr(ppoc, "gaussian_log_prob", spy)
    made, make_envs = [], ppoc.make_envs
    monkeypatch.setattr(ppoc, "make_envs", lambda *arguments: made.append(make_envs(*arguments)) or made[-1])
    size = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "total_timesteps": 8, "log_std_init": 2.0}
    ppoc.train(make_args(tmp_path, env_id="CounterPPOC-terminated-v0", **size))
    learned = spy.calls[0][0].reshape(4, 2, 2)  # (T, N, |A|)
    given = np.stack([env.unwrapped.given for env in made[1].unwrapped.envs], axis=1)  # made[0] was checked
    assert (learned.abs() > 1).float().mean() > 0.5
    np.testing.assert_array_equal(given, ppoc.to_env(learned.numpy(), made[1].single_action_space))
    assert given[..., 0].min() == -2 and given[..., 1].max() == 4000
    for call in spy.calls[1:]:  # the epochs learn from the same numbers, shuffled
        torch.testing.assert_close(call[0].flatten().sort()[0], learned.flatten().sort()[0])


def test_the_density_is_that_of_the_policy_that_acted(tmp_path, monkeypatch):
    """(a − μ) / σ is standard normal only if actions, means and deviations belong together."""
    spy = Spy(ppoc.gaussian_log_prob)
    monkeypatch.setattr(ppoc, "gaussian_log_prob", spy)
    size = {"num_envs": 16, "num_steps": 8, "num_minibatches": 1, "update_epochs": 1}
    ppoc.train(make_args(tmp_path, **size, total_timesteps=8000, use_sde=True, sde_sample_freq=2))
    z = torch.cat([(actions - means) / stds for actions, means, stds in spy.calls[::2]])
    assert z.mean().abs() < 0.06 and abs(z.std() - 1) < 0.05


def test_the_learning_rate_falls_to_the_last_step_and_no_further(tmp_path, monkeypatch, points):
    rates = []

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    size = {"num_minibatches": 1, "update_epochs": 1, "learning_rate": 0.5}
    args = make_args(tmp_path, total_timesteps=100, **size)
    ppoc.train(args)  # 5 rollouts of 18 steps
    assert rates == pytest.approx([0.5 * (1 - i * 18 / 100) for i in range(5)]) and rates[-1] > 0
    assert points["charts/learning_rate", 90] == pytest.approx(rates[-1])
    rates.clear()
    ppoc.train(replace(args, run_dir=None, resume=args.run_dir, total_timesteps=126))
    assert rates == pytest.approx([0.5 * (1 - i * 18 / 126) for i in (5, 6)])


@pytest.mark.parametrize(("target", "steps"), [(6, 300), (6.01, 600), (None, 600)])
def test_target_return_stops_after_100_episodes_that_reach_it(target, steps, tmp_path):
    """Episodes of 3 steps and 6 points: 300 steps are the first with 100 of them."""
    size = {"num_envs": 2, "num_steps": 30, "total_timesteps": 600, "num_minibatches": 2, "update_epochs": 1}
    args = make_args(tmp_path, env_id="CounterPPOC-terminated-v0", target_return=target, **size)
    assert ppoc.train(args)["global_step"] == steps


def test_bad_settings_and_a_nan_end_the_training(tmp_path, capfd):
    for settings, words in {
        "total_timesteps=17": "less than one rollout",
        "num_minibatches=4": "do not divide",
        "num_minibatches=18": "minibatch of one",
        "sde_sample_freq=-2": "--sde-sample-freq -2",
        "log_std_init=nan": "--log-std-init nan",
        "num_envs=10_000, num_steps=10_000": "too large",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            ppoc.train(make_args(tmp_path / "run", **eval(f"dict({settings})", {"nan": math.nan})))
        err = capfd.readouterr().err
        assert words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="1"):
        ppoc.train(make_args(tmp_path / "run", env_id="BrokenPPOC-v0", num_envs=1, num_minibatches=1))
    assert "at step 42" in capfd.readouterr().err  # NaN from step 40 on, rollouts of 6 steps
    assert saved(tmp_path / "run")["global_step"] < 42


SWITCHES = {
    "ortho_init": False,
    "anneal_lr": False,
    "norm_obs": False,
    "norm_reward": False,
    "max_grad_norm": 0.0,
    "use_sde": True,
    "norm_adv": False,
    "clip_vloss": True,
    "target_kl": 1e-7,
    "recompute_advantages": False,
    "ent_coef": 0.1,
    "vf_coef": 2.0,
    "clip_coef": 0.001,
    "gamma": 0.9,
    "gae_lambda": 0.5,
    "learning_rate": 1e-4,
    "log_std_init": -1.0,
    "update_epochs": 1,
    "num_minibatches": 1,
}


def test_every_switch_changes_the_learning(tmp_path):
    """A flag that is read but has no effect would leave the weights as they are without it."""
    size = {"total_timesteps": 36, "learning_rate": 0.01}
    usual = weights_after(tmp_path / "usual", **size)
    for name, value in SWITCHES.items():
        other = weights_after(tmp_path / name, **{**size, name: value})
        differs = [key for key in usual if "norm" not in key and not torch.equal(usual[key], other[key])]
        assert differs, name
    usual = weights_after(tmp_path / "sde", **size, use_sde=True, sde_sample_freq=2)
    other = weights_after(tmp_path / "freq", **size, use_sde=True, sde_sample_freq=3)
    assert not torch.equal(usual["mean.weight"], other["mean.weight"])


def test_without_normalisation_the_network_sees_the_observations(tmp_path):
    weights = weights_after(tmp_path, norm_obs=False)
    assert weights["norm_obs.shift"].tolist() == [0] and weights["norm_obs.scale"].tolist() == [1]
    agent = Agent(1, 1, Args(norm_obs=False))
    assert agent.norm_obs(torch.tensor([[1234.5]])).item() == 1234.5


# ---- Environments ----


def test_processes_give_the_same_numbers(tmp_path):
    size = {"env_id": "Pendulum-v1", "num_envs": 2, "num_steps": 50, "num_minibatches": 2}
    size |= {"total_timesteps": 500, "eval_episodes": 1}
    sync, processes = (weights_after(tmp_path / m, vectorization=m, **size) for m in ("sync", "async"))
    assert all(torch.equal(sync[name], processes[name]) for name in sync)


def test_processes_of_environments_do_not_hear_signals(tmp_path):
    args = make_args(tmp_path, env_id="CounterPPOC-both-v0", vectorization="async")
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    envs = ppoc.make_envs(args, 2)
    assert [signal.getsignal(number) for number in numbers] == before
    if sys.platform == "linux":
        for process in envs.unwrapped.processes:
            status = Path(f"/proc/{process.pid}/status").read_text()
            ignored = int(status.split("SigIgn:")[1].split()[0], 16)
            assert all(ignored >> (number - 1) & 1 for number in numbers)
    envs.close()
    assert not hasattr(ppoc.make_envs(args, 1).unwrapped, "processes")  # one alone needs none


def test_spaces_that_do_not_serve(tmp_path, capfd):
    for env_id, words in {
        "CartPole-v1": "ppo.py",
        "WholePPOC-v0": "no script handles",
        "HugePPOC-v0": "finite bounds",
        "PointPPOC-v0": "no script handles",
        "BoundlessPPOC-v0": "finite bounds",
        "HalfBoundedPPOC-v0": "finite bounds",
        "PlanePPOC-v0": "one axis",
        "FrozenLake-v1": "q_learning.py",
        "no_such_module:Thing-v0": "no_such_module",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            ppoc.train(make_args(tmp_path / "run", env_id=env_id))
        err = capfd.readouterr().err
        assert words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["pybullet", "pybullet_envs_gymnasium"])
def test_a_missing_package_of_robots_is_named(missing, tmp_path, capfd, monkeypatch):
    """In one line, with the way that works where PyPI has no wheel of pybullet."""
    monkeypatch.setattr(ppoc, "find_spec", lambda name: None if name == missing else "found")
    with pytest.raises(SystemExit, match="2"):
        ppoc.train(make_args(tmp_path / "run", env_id="AntBulletEnv-v0"))
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "pip install pybullet_envs_gymnasium==0.6.0;" in err
    assert not (tmp_path / "run").exists()


def test_robots_of_three_families_can_be_made(tmp_path):
    robots = ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "BipedalWalker-v3", "Pendulum-v1"]
    if find_spec("pybullet") and find_spec("pybullet_envs_gymnasium"):
        robots.append("AntBulletEnv-v0")
    for env_id in robots:
        ppoc.check_args(Args(env_id=env_id))


# ---- Learning ----


def test_learns_to_aim(tmp_path):
    """Without gSDE. Only an eye for the target gets above −10, the best of those who are blind to it."""
    size = {"num_envs": 8, "num_steps": 32, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 5e-3}
    size |= {"total_timesteps": 8192, "eval_episodes": 20, "gamma": 0.5, "log_std_init": -1.0}
    results = ppoc.train(make_args(tmp_path, **size))
    assert results["mean_reward"] > -2.5


def test_learns_the_pendulum_from_short_episodes(tmp_path):
    """Trained in episodes that are cut after 40 steps, then played for 200: with gSDE and both normalisers.

    A swing-up takes longer than what is left of most short episodes: who counts nothing beyond a time limit
    does not learn it. −1200 is what chance gets, about −150 the best.
    """
    size = {"num_envs": 8, "num_steps": 128, "num_minibatches": 4, "update_epochs": 10, "anneal_lr": False}
    size |= {"learning_rate": 2e-3, "gamma": 0.9, "use_sde": True, "log_std_init": -1.5}
    args = make_args(tmp_path, env_id="ShortPendulumPPOC-v0", total_timesteps=20_480, **size)
    ppoc.train(args)
    whole = replace(args, env_id="Pendulum-v1", eval_episodes=20)
    assert ppoc.evaluate(whole, tmp_path, torch.device("cpu"))["mean_reward"] > -300
