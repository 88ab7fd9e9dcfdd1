"""A2C: whole iterations against slow ones, the evaluation, the noise, the optimizer, and learning."""

import copy
import math
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import a2c_continuous as a2c
import gymnasium as gym
import numpy as np
import pytest
import torch
from a2c_continuous import Agent, Args, Noise, RMSprop, RunningNorm
from counter_env import CounterEnv

LOW, HIGH = np.array([-2, 0], np.float32), np.array([2, 40], np.float32)


class Endings(gym.Env):
    """Episodes of 1 to 5 steps with every ending, and some of 30; the rewards follow from the actions."""

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(LOW, HIGH, (2,), np.float32)

    def observe(self) -> np.ndarray:
        noise = self.np_random.normal(size=3)
        return np.array([100 + 20 * noise[0], noise[1] + self.steps, noise[2]], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = int(self.np_random.choice([1, 2, 3, 4, 5, 30]))
        self.terminated, self.truncated = self.np_random.choice([[1, 0], [0, 1], [1, 1]])
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        end = self.steps == self.length
        reward = 30 * float(action[0]) - float(action[1]) + self.steps
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
    """The Counter with two continuous actions of unequal bounds; keeps those it is given."""

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


class Aim(gym.Env):
    """Shows a target, far from 0 and from scale 1, and pays minus the distance of the action from it.

    Episodes are cut after 8 steps. Blind to the target, the best choice is the middle: −10 an episode.
    """

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gym.spaces.Box(0, 5, (1,), np.float32)

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

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Plane(Aim):
    """An action with two axes."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-1, 1, (2, 2), np.float32)


for env in (Endings, Tally, Jackpot, Aim, Boundless, Plane):
    gym.register(f"{env.__name__}-v0", entry_point=env)
for ending in ("terminated", "truncated", "both", "neither"):
    gym.register(f"CounterBox-{ending}-v0", entry_point=CounterBox, kwargs={"ending": ending})


class Spy:
    """Calls the original and keeps a copy of what it was called with."""

    def __init__(self, original) -> None:
        self.original, self.calls = original, []

    def __call__(self, *args):
        copies = {np.ndarray: np.copy, torch.Tensor: lambda x: x.detach().clone()}
        self.calls.append([copies.get(type(x), lambda x: x)(x) for x in args])
        return self.original(*args)


def make_args(folder: Path, **changes) -> Args:
    small = {"env_id": "Aim-v0", "num_envs": 3, "num_steps": 5, "total_timesteps": 300, "eval_episodes": 2}
    return Args(**{**small, **changes}, run_dir=str(folder))


def weights_after(folder: Path, **changes) -> dict:
    a2c.train(make_args(folder, **changes))
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


@pytest.fixture
def points(monkeypatch):
    """The charts: (tag, step) -> value."""
    written = {}
    add = lambda self, tag, value, step: written.__setitem__((tag, step), value)  # noqa: E731
    monkeypatch.setattr(a2c.SummaryWriter, "add_scalar", add)
    return written


# ---- One training against an independent, slow one ----


class Slow:
    """A2C in plain loops and float64, written from the equations of the docstring alone.

    weights: the first ones, by name. normals: for each rollout the standard normal numbers behind its noise.
    """

    def __init__(self, args: Args, weights: dict, normals: list) -> None:
        self.args, self.normals = args, normals
        self.theta = {}
        for name, weight in weights.items():
            self.theta[name] = weight.detach().double().requires_grad_()
        self.second = {name: torch.zeros_like(w) for name, w in self.theta.items()}  # of Adam
        self.first = {name: torch.zeros_like(w) for name, w in self.theta.items()}
        if args.use_rms_prop:
            self.second = {name: torch.ones_like(w) for name, w in self.theta.items()}
        self.envs = [gym.make(args.env_id) for _ in range(args.num_envs)]
        seeds = a2c.env_seeds(args.num_envs, args.seed, 0, 0)
        self.obs = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=True)]
        self.seen, self.sums, self.logged = [], [], {}
        self.earned, self.totals, self.lengths = [[0.0] * args.num_envs for _ in range(3)]
        self.episodes = []

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

    def phi(self, x):
        return self.layers(x, "features.0", "features.2")

    def value(self, obs):
        return self.layers(self.normed(obs), "critic.0", "critic.2", "critic.4")[0]

    def std(self, phi):
        log_std = self.theta["noise.log_std"]  # (|φ|, |A|) or (1, |A|)
        if not self.args.use_sde:
            return torch.exp(log_std[0])
        variances = torch.stack([torch.dot(phi.detach() ** 2, torch.exp(log_std[:, j]) ** 2) for j in (0, 1)])
        return torch.sqrt(variances + 1e-6)

    def collect(self, rollout: int) -> list[list[dict]]:
        """Steps by time and environment."""
        log_std = self.theta["noise.log_std"].detach()
        steps = []
        for t in range(self.args.num_steps):
            row = []
            for n, env in enumerate(self.envs):
                phi = self.phi(self.normed(self.obs[n])).detach()
                normal = self.normals[rollout][0 if self.args.use_sde else t, n].double()
                weighed = normal * torch.exp(log_std)  # W, as in (10)
                noise = phi @ weighed if self.args.use_sde else weighed[0]
                action = (self.layers(phi, "mean").detach() + noise).numpy()  # (1)
                given = LOW + (np.clip(action, -1, 1) + 1) / 2 * (HIGH - LOW)
                next_obs, reward, terminated, truncated, _ = env.step(given)
                row.append({"obs": self.obs[n], "action": action, "reward": reward, "next_obs": next_obs})
                row[-1] |= {"terminated": terminated, "ended": terminated or truncated}
                row[-1]["kind"] = (terminated, truncated)
                self.totals[n] += reward
                self.lengths[n] += 1
                if terminated or truncated:
                    next_obs, _ = env.reset()
                    self.episodes.append((self.totals[n], self.lengths[n]))
                    self.totals[n] = self.lengths[n] = 0.0
                self.obs[n] = next_obs
            steps.append(row)
        return steps

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

    def advantage(self, steps, t: int, n: int) -> float:
        """The mean of the looks k = 1, 2, … ahead: weights (1−λ) λ^(k−1), then all that is left."""
        gamma, lam = self.args.gamma, self.args.gae_lambda
        total, rewards = 0.0, 0.0
        for k in range(1, len(steps) - t + 1):
            step = steps[t + k - 1][n]
            rewards += gamma ** (k - 1) * step["learned"]
            beyond = 0.0 if step["terminated"] else gamma**k * step["next_value"]
            look = rewards + beyond - steps[t][n]["value"].item()
            if step["ended"] or t + k == len(steps):
                return total + lam ** (k - 1) * look
            total += (1 - lam) * lam ** (k - 1) * look

    def iterate(self, rollout: int) -> list[list[dict]]:
        args = self.args
        steps = self.collect(rollout)
        everything = [step for row in steps for step in row]
        for step in everything:
            step["value"] = self.value(step["obs"])
            step["next_value"] = self.value(step["next_obs"]).item()
        self.rewards(steps)
        policy_terms, value_terms, entropies, stds, advantages, targets = [], [], [], [], [], []
        for t, row in enumerate(steps):
            for n, step in enumerate(row):
                advantage = self.advantage(steps, t, n)
                target = advantage + step["value"].item()  # (4)
                phi = self.phi(self.normed(step["obs"]))
                mean, std = self.layers(phi, "mean"), self.std(phi)
                log_prob = entropy = 0.0
                for j in range(2):
                    z = (float(step["action"][j]) - mean[j]) / std[j]
                    log_prob = log_prob - (z**2 / 2 + torch.log(std[j]) + math.log(2 * math.pi) / 2)  # (5)
                    entropy = entropy + torch.log(std[j]) + math.log(2 * math.pi * math.e) / 2  # (8)
                policy_terms.append(-advantage * log_prob)  # (6)
                value_terms.append((step["value"] - target) ** 2)  # (7)
                entropies.append(entropy)
                stds += std.tolist()
                advantages.append(advantage)
                targets.append(target)
        mean = lambda terms: sum(terms) / len(terms)  # noqa: E731
        loss = mean(policy_terms) + args.vf_coef * mean(value_terms) - args.ent_coef * mean(entropies)  # (9)
        grads = dict(zip(self.theta, torch.autograd.grad(loss, list(self.theta.values())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        rate = args.learning_rate
        if args.anneal_lr:
            rate *= 1 - rollout * args.batch_size / args.total_timesteps
        for name, g in grads.items():
            if args.max_grad_norm and norm > args.max_grad_norm:
                g = g * args.max_grad_norm / norm
            self.theta[name] = self.step(name, g, rate, rollout + 1).requires_grad_()
        if args.norm_obs:
            self.seen += [step["obs"].astype(float) for step in everything]
        totals, lengths = zip(*self.episodes, strict=True) if self.episodes else ([0], [0])
        self.logged = {
            "charts/learning_rate": rate,
            "charts/episodic_return": np.mean(totals),
            "charts/episodic_length": np.mean(lengths),
            "losses/policy_loss": mean(policy_terms).item(),
            "losses/value_loss": mean(value_terms).item(),
            "losses/entropy": mean(entropies).item(),
            "losses/std": np.mean(stds),
            "losses/grad_norm": norm,
            "losses/explained_variance": 1 - np.var(advantages) / np.var(targets),
        }
        return steps

    def step(self, name: str, g, rate: float, count: int):
        theta, v = self.theta[name].detach(), self.second[name]
        if self.args.use_rms_prop:
            self.second[name] = 0.99 * v + 0.01 * g**2  # (12)
            return theta - rate * g / torch.sqrt(self.second[name] + 1e-5)
        self.first[name] = 0.9 * self.first[name] + 0.1 * g
        self.second[name] = 0.999 * v + 0.001 * g**2
        m, v = self.first[name] / (1 - 0.9**count), self.second[name] / (1 - 0.999**count)
        return theta - rate * m / (torch.sqrt(v) + 1e-8)


VARIANTS = {
    "as the ant": {"learning_rate": 0.05, "log_std_init": -1.0},
    "as the cheetah": {"use_sde": False, "use_rms_prop": False, "log_std_init": 0.5, "learning_rate": 3e-3},
    "no trick": {
        **{
            "use_sde": False,
            "norm_obs": False,
            "norm_reward": False,
            "anneal_lr": False,
            "max_grad_norm": 0.0,
        },
        **{"learning_rate": 1e-3, "ent_coef": 3.0, "vf_coef": 1e-3, "gae_lambda": 0.6, "gamma": 0.8},
    },
    "one environment": {
        "num_envs": 1,
        "num_steps": 20,
        "ortho_init": True,
        "learning_rate": 0.05,
        "ent_coef": 0.3,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_iterations_are_those_of_the_equations(variant, tmp_path, monkeypatch, points):
    """Three rollouts with all endings; weights, statistics, counters and charts afterwards."""
    size = {"env_id": "Endings-v0", "num_envs": 4, "num_steps": 7, "eval_episodes": 1}
    size |= {"gamma": 0.9, "gae_lambda": 0.7, "seed": 5} | VARIANTS[variant]
    args = make_args(tmp_path / "run", **size, total_timesteps=3 * size["num_envs"] * size["num_steps"] + 5)
    made, normals, make_agent, randn = [], [], a2c.make_agent, torch.randn

    def remember(*arguments):
        agent = make_agent(*arguments)
        made.append({name: weight.detach().clone() for name, weight in agent.named_parameters()})
        return agent

    monkeypatch.setattr(a2c, "make_agent", remember)
    monkeypatch.setattr(torch, "randn", lambda *shape: normals.append(randn(*shape)) or normals[-1].clone())
    a2c.train(args)
    assert len(normals) == 3
    first = made[0]
    slow = Slow(args, first, normals)
    kinds = set()
    for rollout in range(3):
        kinds |= {step["kind"] for row in slow.iterate(rollout) for step in row}
    assert len(kinds) == 4 or args.num_envs == 1, "the rollouts have all endings"
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for name, want in slow.theta.items():
        want = (want - first[name]).detach()
        moved = saved["agent"][name].double() - first[name]
        assert want.abs().max() > 0, name
        torch.testing.assert_close(moved, want, rtol=0, atol=3e-3 * want.abs().max().item() + 1e-7)
    assert saved["global_step"] == 3 * args.batch_size and saved["episodes"] == len(slow.episodes)
    if args.norm_obs:
        np.testing.assert_allclose(saved["agent"]["norm_obs.mean"], np.mean(slow.seen, axis=0), rtol=1e-6)
        np.testing.assert_allclose(saved["agent"]["norm_obs.var"], np.var(slow.seen, axis=0), rtol=1e-6)
    if args.norm_reward:
        np.testing.assert_allclose(saved["agent"]["norm_return.var"], np.var(slow.sums), rtol=1e-4)
    assert set(points) == {(tag, saved["global_step"]) for tag in (*slow.logged, "charts/SPS")}
    for tag, want in slow.logged.items():
        assert float(points[tag, saved["global_step"]]) == pytest.approx(want, rel=1e-4, abs=1e-6), tag


# ---- The evaluation ----


def test_an_evaluation_counts_each_episode_once_and_takes_the_likeliest_action(tmp_path, monkeypatch):
    """Against episodes played one by one, in environments of unequal length; its seeds are not training's."""
    Tally.seeds = []
    args = make_args(
        tmp_path / "run", env_id="Tally-v0", eval_episodes=23, total_timesteps=45, log_std_init=1.0
    )
    results = a2c.train(args)
    training, evaluation = a2c.env_seeds(3, 1, 0, 0), a2c.env_seeds(20, 1, 1, 0) + a2c.env_seeds(20, 1, 1, 20)
    assert Tally.seeds == training + evaluation and len(set(Tally.seeds)) == 43
    agent = a2c.make_agent(args, a2c.make_envs(args, 1), torch.device("cpu"))
    agent.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"])
    returns = []
    for seed in evaluation[:23]:
        env = Tally()
        obs, _ = env.reset(seed=seed)
        total, ended = 0.0, False
        while not ended:
            with torch.no_grad():
                mean = agent.mean(agent.features(agent.norm_obs(torch.from_numpy(obs)[None])))[0].numpy()
            obs, reward, *endings, _ = env.step(LOW + (np.clip(mean, -1, 1) + 1) / 2 * (HIGH - LOW))
            total, ended = total + reward, any(endings)
        returns.append(total)
    assert results["mean_reward"] == pytest.approx(np.mean(returns), rel=1e-6)
    assert results["std_reward"] == pytest.approx(np.std(returns), rel=1e-6)
    assert results["score"] == results["mean_reward"] - results["std_reward"]
    assert (results["eval_episodes"], results["global_step"]) == (23, 45)
    assert a2c.evaluate(args, tmp_path / "run", torch.device("cpu")) == results


def test_an_evaluation_ends_where_episodes_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(a2c, "MAX_EVAL_STEPS", 4)
    results = a2c.train(make_args(tmp_path / "run", env_id="CounterBox-neither-v0", total_timesteps=15))
    assert (results["mean_reward"], results["std_reward"]) == (1 + 2 + 3 + 4, 0)


def test_an_evaluation_needs_the_statistics(tmp_path):
    args = make_args(tmp_path / "run", total_timesteps=150)
    score = a2c.train(args)["mean_reward"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["agent"]["norm_obs.count"] == 150
    checkpoint["agent"]["norm_obs.shift"].zero_()
    checkpoint["agent"]["norm_obs.scale"].fill_(1)
    a2c.save_checkpoint(tmp_path / "run", checkpoint)
    assert a2c.evaluate(args, tmp_path / "run", torch.device("cpu"))["mean_reward"] != score


def test_a_film_ends_with_the_last_step(tmp_path):
    """The counter is 10 brighter after each of its three steps; the next episode would begin in black."""
    import imageio.v3 as iio

    args = make_args(tmp_path / "run", env_id="CounterBox-truncated-v0")
    a2c.record_video(args, lambda obs: np.zeros((1, 2)), tmp_path / "replay.mp4")
    frames = iio.imread(tmp_path / "replay.mp4")
    assert len(frames) == 4 and abs(frames[-1].astype(int).mean() - 30) < 4


# ---- The parts ----


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


def test_gaussian_log_prob_and_entropy_are_those_of_torch():
    means, actions, stds = torch.randn(6, 3), torch.randn(6, 3) * 4, torch.rand(6, 3) + 0.1
    normal = torch.distributions.MultivariateNormal(means, scale_tril=torch.diag_embed(stds))
    torch.testing.assert_close(a2c.gaussian_log_prob(actions, means, stds), normal.log_prob(actions))
    torch.testing.assert_close(a2c.gaussian_entropy(stds), normal.entropy().mean())


def test_losses_by_hand():
    log_probs, advantages = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([2.0, -1.0, 0.5])
    assert a2c.policy_loss(log_probs, advantages).item() == pytest.approx((2 - 2 + 1.5) / 3)
    assert a2c.value_loss(log_probs, advantages).item() == pytest.approx((9 + 1 + 3.5**2) / 3)


def test_to_env_reaches_the_bounds_and_no_further():
    space = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 400], np.float32))
    actions = np.array([[-1, -1], [0, 0.5], [1, 1], [-7, 7]], np.float32)
    np.testing.assert_array_equal(a2c.to_env(actions, space), [[-2, 0], [0, 300], [2, 400], [-2, 400]])


def test_discounted_sums_by_hand():
    rewards = np.array([[1.0, 2], [10, 20], [100, 200]])
    ended = np.array([[False, True], [False, False], [True, False]])
    sums, after = a2c.discounted_sums(rewards, ended, np.array([4.0, 6.0]), 0.5)
    np.testing.assert_array_equal(sums, [[3, 5], [11.5, 20], [105.75, 210]])
    np.testing.assert_array_equal(after, [0, 210])


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


def test_state_dependent_noise_has_the_distribution_that_is_claimed():
    """Against the covariance of W, flattened to one vector of independent numbers, under ξ = M(φ) W."""
    torch.manual_seed(0)
    noise = Noise(4, 3, -0.5, use_sde=True)
    assert noise.log_std.shape == (4, 3) and (noise.log_std == -0.5).all()
    noise.log_std.data = torch.randn(4, 3) * 0.5
    features, means, actions = torch.randn(6, 4), torch.randn(6, 3), torch.randn(6, 3)
    maps = torch.stack([torch.kron(row[None], torch.eye(3)) for row in features])  # (B, |A|, |φ|·|A|)
    variances = torch.diag((2 * noise.log_std.detach()).exp().flatten())
    covariance = maps @ variances @ maps.mT + 1e-6 * torch.eye(3)
    want = torch.distributions.MultivariateNormal(means, covariance).log_prob(actions)
    got = a2c.gaussian_log_prob(actions, means, noise.std(features))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # And the noise that is really drawn has that covariance.
    phi = features[:1].expand(40_000, 4).numpy()
    drawn = np.cov(noise.sample(phi, noise.draw(2, 40_000)[1]).T)
    np.testing.assert_allclose(drawn, covariance[0], atol=0.04 * covariance[0].max().item())


def test_state_dependent_noise_is_held_for_a_rollout():
    noise = Noise(4, 2, 0.0, use_sde=True)
    phi, psi = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    W = noise.draw(5, 3)
    assert W.shape == (5, 3, 4, 2) and all(np.array_equal(W[0], w) for w in W)
    first = noise.sample(phi, W[0])
    np.testing.assert_allclose(noise.sample(phi + psi, W[0]), first + noise.sample(psi, W[0]), rtol=1e-5)
    same = noise.sample(np.stack([phi[0]] * 3), W[0])
    assert not np.allclose(same[0], same[1])  # each environment has its own
    assert not np.allclose(noise.sample(phi, noise.draw(5, 3)[0]), first)


def test_noise_does_not_train_the_features():
    noise = Noise(4, 2, 0.0, use_sde=True)
    features = torch.randn(3, 4, requires_grad=True)
    noise.std(features).sum().backward()
    assert features.grad is None and noise.log_std.grad.abs().min() > 0


def test_rmsprop_by_the_written_out_formula():
    vector = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = RMSprop(vector, lr=0.5)
    theta, v = [1.0, -2.0, 3.0], [1.0, 1.0, 1.0]
    for step, lr in enumerate((0.5, 0.1, 0.1)):
        grads = [0.3 * (step + 1), 1e-6, -20.0]
        vector.grad = torch.tensor(grads)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for i, g in enumerate(grads):
            v[i] = 0.99 * v[i] + 0.01 * g * g
            theta[i] -= lr * g / math.sqrt(v[i] + 1e-5)
    torch.testing.assert_close(vector.detach(), torch.tensor(theta))


@pytest.mark.parametrize("use_rms_prop", [True, False])
def test_one_vector_holds_all_weights_and_gradients(use_rms_prop):
    """The agent computes as before; a step along the vector's gradient moves each weight along its own."""
    agent = Agent(3, 2, Args(use_sde=True))
    twin = copy.deepcopy(agent)
    weights = a2c.one_vector(agent)
    assert weights.numel() == sum(parameter.numel() for parameter in twin.parameters())
    torch.testing.assert_close(agent.state_dict(), twin.state_dict(), rtol=0, atol=0)
    obs = torch.randn(5, 3)

    def loss(model):
        features = model.features(obs)
        return (model.mean(features) ** 2).mean() + model.noise.std(features).mean() + model.critic(obs).sum()

    loss(agent).backward()
    loss(twin).backward()
    grads = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()])
    torch.testing.assert_close(weights.grad, grads, rtol=0, atol=0)
    if use_rms_prop:
        optimizer = RMSprop(weights, lr=0.1)
        optimizer.step()
        with torch.no_grad():
            for parameter in twin.parameters():
                v = 0.99 + 0.01 * parameter.grad**2
                parameter -= 0.1 * parameter.grad / (v + 1e-5).sqrt()
    else:
        torch.optim.Adam([weights], lr=0.1, fused=True).step()
        torch.optim.Adam(twin.parameters(), lr=0.1).step()
    torch.testing.assert_close(agent.state_dict(), twin.state_dict())
    # What was saved reaches the vector, and what the vector learns reaches the policy in NumPy.
    agent.load_state_dict(twin.state_dict())
    torch.testing.assert_close(weights.data, torch.nn.utils.parameters_to_vector(twin.parameters()).detach())
    policy = a2c.numpy_policy(agent)
    weights.data.zero_()
    assert not policy(obs.numpy())[1].any()


def test_rmsprop_goes_on_with_what_it_saved():
    vectors = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    first, second = (RMSprop(vector, lr=0.1) for vector in vectors)
    for optimizer, vector in ((first, vectors[0]), (second, vectors[1])):
        if optimizer is second:
            second.load_state_dict(first.state_dict())
            vector.data.copy_(vectors[0])
        vector.grad = torch.tensor([3.0, -40.0])
        optimizer.step()
    want = [0.99 * (0.99 + 0.01 * g * g) + 0.01 * g * g for g in (3.0, 40.0)]
    torch.testing.assert_close(second.v, torch.tensor(want))


def test_where_epsilon_stands_decides_what_a_tiny_gradient_does():
    """What the docstring claims: inside the root far less than α, outside nearly α."""
    moved = []
    for optimizer_of in (RMSprop, lambda weights, lr: torch.optim.RMSprop([weights], lr=lr, eps=1e-5)):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = optimizer_of(parameter, lr=1.0)
        if optimizer_of is RMSprop:
            optimizer.v.zero_()
        for _ in range(2000):
            before = parameter.item()
            parameter.grad = torch.full((1,), 1e-4)
            optimizer.step()
        moved.append(before - parameter.item())
    assert moved == [pytest.approx(0.0316, rel=0.01), pytest.approx(0.909, rel=0.01)]


@pytest.mark.parametrize("norm_obs", [True, False])
def test_the_numpy_policy_is_the_networks(norm_obs):
    agent = Agent(3, 2, Args(norm_obs=norm_obs))
    obs = torch.randn(4, 3) * 20
    if norm_obs:
        agent.norm_obs.update(torch.randn(50, 3) * 7 + 5)
        obs[0, 0] = 1e4  # beyond the limit
    features, means = a2c.numpy_policy(agent)(obs.numpy())
    want = agent.features(agent.norm_obs(obs))
    np.testing.assert_allclose(features, want.detach(), atol=1e-6)
    np.testing.assert_allclose(means, agent.mean(want).detach(), atol=1e-6)


def test_a_gpu_is_asked_for_what_is_used_only(tmp_path, monkeypatch):
    """Per rollout: 8 arrays of the policy, the deviations of the noise, the values twice."""
    copies, cpu, numpy = [], torch.Tensor.cpu, torch.Tensor.numpy

    def forced(self, *, force=False):  # force: from wherever the tensor is
        if force:
            copies.append(self.shape)
        return numpy(self, force=force)

    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    monkeypatch.setattr(torch.Tensor, "numpy", forced)
    monkeypatch.setattr(a2c.Run, "finish", lambda self, device: self.lock.close())
    a2c.train(make_args(tmp_path / "run", total_timesteps=150))
    assert len(copies) == 10 * 11


def test_orthogonal_weights_have_their_gains():
    plain, agent = Agent(3, 2, Args()), Agent(3, 2, Args(ortho_init=True))
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
    spy, make_agent = Spy(a2c.gae), a2c.make_agent
    monkeypatch.setattr(a2c, "gae", spy)
    monkeypatch.setattr(a2c, "MAX_EVAL_STEPS", 9)

    class Critic(torch.nn.Linear):
        def forward(self, obs):
            return 10 * obs[..., :1] + obs[..., 1:] + 0 * super().forward(obs)

    def agent_with_known_values(*arguments):
        agent = make_agent(*arguments)
        agent.critic = Critic(2, 1)
        return agent

    monkeypatch.setattr(a2c, "make_agent", agent_with_known_values)
    size = {"num_envs": 2, "num_steps": 4, "total_timesteps": 16, "norm_obs": False}
    args = make_args(tmp_path / "run", env_id=f"CounterBox-{ending}-v0", **size, norm_reward=False)
    a2c.train(args)
    rewards, values, next_values, terminated, truncated, gamma, gae_lambda = spy.calls[0]
    both = lambda column: np.repeat(np.array(column)[:, None], 2, axis=1)  # noqa: E731
    assert (gamma, gae_lambda) == (args.gamma, args.gae_lambda)
    if ending == "neither":
        np.testing.assert_array_equal(rewards, both([1, 2, 3, 4]))
        np.testing.assert_array_equal(next_values, both([1, 2, 3, 4]))
        assert not terminated.any() and not truncated.any()
        assert ("charts/episodic_return", 16) not in points
        return
    np.testing.assert_array_equal(rewards, both([1, 2, 3, 1]))
    np.testing.assert_array_equal(values, both([0, 1, 2, 10]))  # step 3 starts the next episode
    np.testing.assert_array_equal(next_values, both([1, 2, 3, 11]))  # step 2 led to [0, 3], not to the reset
    np.testing.assert_array_equal(terminated, both([False, False, ending in ("terminated", "both"), False]))
    np.testing.assert_array_equal(truncated, both([False, False, ending in ("truncated", "both"), False]))
    assert points["charts/episodic_return", 16] == 6 and points["charts/episodic_length", 16] == 3


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_rewards_are_scaled_for_the_learner_and_returns_are_true(ending, tmp_path, monkeypatch, points):
    """Any ending resets the sum of an environment's discounted rewards."""
    spy = Spy(a2c.gae)
    monkeypatch.setattr(a2c, "gae", spy)
    size = {"num_envs": 2, "num_steps": 4, "total_timesteps": 16, "gamma": 0.5}
    results = a2c.train(make_args(tmp_path / "run", env_id=f"CounterBox-{ending}-v0", **size))
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
    spy = Spy(a2c.gae)
    monkeypatch.setattr(a2c, "gae", spy)
    monkeypatch.setattr(a2c.Run, "finish", lambda self, device: self.lock.close())
    size = {"num_envs": 2, "num_steps": 32, "total_timesteps": 832, "gamma": 0.0}
    a2c.train(make_args(tmp_path / "run", env_id="Jackpot-v0", **size))
    learned = np.concatenate([call[0] for call in spy.calls])[:, 0]  # (416,)
    assert learned[399] == 10 and learned[400] == -10 and np.count_nonzero(learned) == 2


def test_the_sampled_action_is_learned_from_and_the_clipped_one_is_played(tmp_path, monkeypatch):
    spy = Spy(a2c.gaussian_log_prob)
    monkeypatch.setattr(a2c, "gaussian_log_prob", spy)
    made, make_envs = [], a2c.make_envs
    monkeypatch.setattr(a2c, "make_envs", lambda *arguments: made.append(make_envs(*arguments)) or made[-1])
    size = {"num_envs": 2, "num_steps": 4, "total_timesteps": 8, "log_std_init": 2.0, "use_sde": False}
    a2c.train(make_args(tmp_path / "run", env_id="CounterBox-terminated-v0", **size))
    learned = spy.calls[0][0].reshape(4, 2, 2)  # (T, N, |A|)
    given = np.stack([env.unwrapped.given for env in made[1].unwrapped.envs], axis=1)  # made[0] was checked
    assert (learned.abs() > 1).float().mean() > 0.5
    np.testing.assert_array_equal(given, a2c.to_env(learned.numpy(), made[1].single_action_space))
    assert given[..., 0].min() == -2 and given[..., 1].max() == 40


def test_the_probability_is_that_of_the_policy_that_acted(tmp_path, monkeypatch):
    """(a − μ) / σ is standard normal only if actions, means and deviations belong together."""
    spy = Spy(a2c.gaussian_log_prob)
    monkeypatch.setattr(a2c, "gaussian_log_prob", spy)
    a2c.train(make_args(tmp_path / "run", num_envs=16, total_timesteps=8000))
    z = torch.cat([(actions - means) / stds for actions, means, stds in spy.calls])
    assert z.mean().abs() < 0.06 and abs(z.std() - 1) < 0.05


def test_the_learning_rate_falls_to_the_last_step_and_no_further(tmp_path, monkeypatch, points):
    rates, step = [], RMSprop.step
    monkeypatch.setattr(RMSprop, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    args = make_args(tmp_path / "run", total_timesteps=100, learning_rate=0.5)
    a2c.train(args)  # 6 rollouts of 15 steps
    assert rates == pytest.approx([0.5 * (1 - i * 15 / 100) for i in range(6)]) and rates[-1] > 0
    assert points["charts/learning_rate", 90] == rates[-1]
    rates.clear()
    a2c.train(replace(args, resume=args.run_dir, total_timesteps=120))
    assert rates == pytest.approx([0.5 * (1 - i * 15 / 120) for i in (6, 7)])


def test_a_point_in_the_charts_every_100_rollouts_and_at_the_end(tmp_path, points):
    a2c.train(make_args(tmp_path / "run", num_envs=1, num_steps=2, total_timesteps=452))
    assert sorted(step for tag, step in points if tag == "losses/grad_norm") == [200, 400, 452]
    assert sorted(step for tag, step in points if tag == "charts/SPS") == [200, 400, 452]


def test_the_gradient_is_cut_to_its_longest(tmp_path, monkeypatch):
    norms, step = [], RMSprop.step

    def spy(self):
        norms.append(self.weights.grad.norm().item())
        step(self)

    monkeypatch.setattr(RMSprop, "step", spy)
    a2c.train(make_args(tmp_path / "run", max_grad_norm=0.01))
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path, monkeypatch, capfd):
    steps, step = [], RMSprop.step
    monkeypatch.setattr(RMSprop, "step", lambda self: steps.append(1) or step(self))
    monkeypatch.setattr(a2c, "gae", lambda rewards, *_: 0 * rewards + (math.nan if len(steps) == 2 else 0))
    with pytest.raises(SystemExit) as stopped:
        a2c.train(make_args(tmp_path / "run"))
    assert stopped.value.code == 1 and "nan at step 45" in capfd.readouterr().err
    assert len(steps) == 2


SWITCHES = {
    "ortho_init": True,
    "anneal_lr": False,
    "norm_obs": False,
    "norm_reward": False,
    "max_grad_norm": 0.0,
    "use_sde": False,
    "use_rms_prop": False,
    "ent_coef": 0.1,
    "vf_coef": 2.0,
    "gamma": 0.9,
    "gae_lambda": 0.5,
    "learning_rate": 1e-4,
    "log_std_init": -1.0,
}


def test_every_switch_changes_the_learning(tmp_path):
    """A flag that is read but has no effect would leave the weights as they are without it."""
    usual = weights_after(tmp_path / "usual", total_timesteps=60)
    for name, value in SWITCHES.items():
        other = weights_after(tmp_path / name, total_timesteps=60, **{name: value})
        assert any(
            not torch.equal(usual[key], other.get(key, usual[key])) for key in usual if "norm" not in key
        ), name


def test_without_normalisation_the_network_sees_the_observations(tmp_path):
    weights = weights_after(tmp_path / "run", norm_obs=False, total_timesteps=60)
    assert weights["norm_obs.shift"].tolist() == [0] and weights["norm_obs.scale"].tolist() == [1]
    agent = Agent(1, 1, Args(norm_obs=False))
    assert agent.norm_obs(torch.tensor([[1234.5]])).item() == 1234.5


# ---- Environments ----


def test_processes_give_the_same_numbers(tmp_path):
    size = {"env_id": "Pendulum-v1", "num_envs": 2, "total_timesteps": 500, "eval_episodes": 1}
    sync, processes = (weights_after(tmp_path / m, vectorization=m, **size) for m in ("sync", "async"))
    assert all(torch.equal(sync[name], processes[name]) for name in sync)


def test_one_environment_alone_needs_no_process(tmp_path, monkeypatch):
    """As in the check before training, and in a film."""
    made, make_vec = [], gym.make_vec
    watched = lambda *arguments, **options: made.append(arguments) or make_vec(*arguments, **options)  # noqa: E731
    monkeypatch.setattr(gym, "make_vec", watched)
    for how in ("sync", "async"):
        args = make_args(tmp_path / "run", env_id="CounterBox-both-v0", vectorization=how)
        for num_envs in (1, 2):
            a2c.make_envs(args, num_envs).close()
    assert [how for *_, how in made] == ["sync", "sync", "sync", "async"]


def test_processes_of_environments_do_not_hear_signals(tmp_path):
    args = make_args(tmp_path / "run", env_id="CounterBox-both-v0", vectorization="async")
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    envs = a2c.make_envs(args, 2)
    assert [signal.getsignal(number) for number in numbers] == before
    if sys.platform == "linux":
        for process in envs.unwrapped.processes:
            status = Path(f"/proc/{process.pid}/status").read_text()
            ignored = int(status.split("SigIgn:")[1].split()[0], 16)
            assert all(ignored >> (number - 1) & 1 for number in numbers)
    envs.close()
    with pytest.raises(Exception, match="nothing"):
        a2c.make_envs(make_args(tmp_path / "run", env_id="nothing-v0"), 2)
    assert [signal.getsignal(number) for number in numbers] == before


def test_observations_that_are_kept_are_copies(tmp_path):
    """The vector environment overwrites what it returned; rows of a rollout must not change with it."""
    envs = a2c.make_envs(make_args(tmp_path / "run", env_id="CounterBox-neither-v0"), 2)
    first, _ = envs.reset(seed=[1, 2])
    second, *_ = envs.step(np.zeros((2, 2), np.float32))
    assert second is first and not envs.unwrapped.copy


def test_spaces_that_do_not_serve(tmp_path, capfd):
    for env_id, words in {
        "CartPole-v1": "ppo.py",
        "Boundless-v0": "finite bounds",
        "Plane-v0": "one axis",
        "FrozenLake-v1": "q_learning.py",
        "no_such_module:Thing-v0": "no_such_module",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            a2c.train(make_args(tmp_path / "run", env_id=env_id))
        err = capfd.readouterr().err
        assert words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["pybullet", "pybullet_envs_gymnasium"])
def test_a_missing_package_of_robots_is_named(missing, tmp_path, capfd, monkeypatch):
    """In one line, with the way that works where PyPI has no wheel of pybullet."""
    monkeypatch.setattr(a2c, "find_spec", lambda name: None if name == missing else "found")
    with pytest.raises(SystemExit, match="2"):
        a2c.train(make_args(tmp_path / "run", env_id="AntBulletEnv-v0"))
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    for command in (
        "pybullet_envs_gymnasium==0.6.0;",
        "pybullet_arm64==3.2.8",
        "--no-deps pybullet_envs_gymnasium",
    ):
        assert f"pip install {command}" in err
    assert not (tmp_path / "run").exists()


def test_the_default_robot_can_be_made():
    if not (find_spec("pybullet") and find_spec("pybullet_envs_gymnasium")):
        pytest.skip("without PyBullet")
    a2c.check_args(Args())


@pytest.mark.parametrize("use_sde", [True, False])
def test_learns_to_aim(use_sde, tmp_path):
    """Only an eye for the target gets above −10."""
    size = {"num_envs": 4, "num_steps": 8, "total_timesteps": 24_000, "eval_episodes": 20}
    results = a2c.train(make_args(tmp_path / "run", **size, use_sde=use_sde, gamma=0.5))
    assert results["mean_reward"] > -4
