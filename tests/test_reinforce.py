"""REINFORCE: formulas by hand, whole iterations against a slow reference, evaluation, and learning."""

import dataclasses
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import counter_env  # noqa: F401 (registers the Counter environments)
import gymnasium as gym
import numpy as np
import pytest
import reinforce
import torch
from gymnasium.vector import AutoresetMode
from reinforce import Args, RunningNorm, env_seeds, mean_of_others, returns_to_go


def test_returns_by_hand_with_unequal_lengths():
    # Three episodes of 3, 1 and 2 steps. γ = 0.5.
    rewards = np.array([[1.0, 5.0, 0.0], [2.0, 0.0, 4.0], [4.0, 0.0, 0.0]])
    playing = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 0]], dtype=bool)
    want = np.array([[3.0, 5.0, 2.0], [4.0, 0.0, 4.0], [4.0, 0.0, 0.0]])
    np.testing.assert_array_equal(returns_to_go(rewards, playing, np.zeros(3), 0.5) * playing, want)
    # Worth 8 after the last step of the second and third episode: 5 + 4 and 4 + 4, then 0 + 0.5 * 8.
    want[:, 1:] = [[9.0, 4.0], [0.0, 8.0], [0.0, 0.0]]
    np.testing.assert_array_equal(returns_to_go(rewards, playing, np.array([0, 8, 8]), 0.5) * playing, want)


def test_restarted_credit_by_hand():
    # A lost and a won point, then play without a result. γ = 0.5.
    rewards = np.array([[0.0], [-1.0], [0.0], [0.0], [1.0], [0.0]])
    playing = np.ones((6, 1), dtype=bool)
    got = returns_to_go(rewards, playing, np.array([4.0]), 0.5, restart=True)
    np.testing.assert_array_equal(got[:, 0], [-0.5, -1.0, 0.25, 0.5, 1.0, 2.0])
    got = returns_to_go(rewards, playing, np.array([4.0]), 0.5)
    np.testing.assert_array_equal(got[4:, 0], [2.0, 2.0])


def test_returns_do_not_change_what_they_are_given():
    rewards = np.ones((3, 2))
    last_values = np.ones(2)
    playing = np.array([[1, 1], [1, 0], [1, 0]], dtype=bool)
    returns_to_go(rewards, playing, last_values, 0.9, restart=True)
    assert (rewards == 1).all() and (last_values == 1).all() and playing.sum() == 4


def test_mean_of_others_by_hand():
    returns = np.array([[1.0, 2.0, 6.0], [3.0, 100.0, 5.0], [7.0, 100.0, 100.0]])
    playing = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 0]], dtype=bool)
    want = np.array([[4.0, 3.5, 1.5], [5.0, np.nan, 3.0], [0.0, np.nan, np.nan]])
    np.testing.assert_array_equal(mean_of_others(returns, playing)[playing], want[playing])


def test_actions_are_drawn_as_multinomial_draws_them():
    """The same noise makes the same choice, action by action, and unlikely actions are drawn, too."""
    logits = torch.tensor([1.0, 0.0, -3.0, 2.0, -1.0]).repeat(3000, 1)
    torch.manual_seed(1)
    got = reinforce.sample(logits)
    torch.manual_seed(1)
    assert torch.equal(got, torch.multinomial(logits.softmax(-1), 1).squeeze(-1))
    shares = torch.bincount(got, minlength=5) / 3000
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.03)


def test_log_prob_and_entropy_are_those_of_torch():
    logits = torch.randn(6, 4)
    actions = torch.tensor([0, 3, 2, 2, 1, 0])
    categorical = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(reinforce.log_prob(logits, actions), categorical.log_prob(actions))
    torch.testing.assert_close(reinforce.entropy(logits), categorical.entropy().mean())


def test_normalize_and_a_single_advantage():
    got = reinforce.normalize(torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([-3.0, -1.0, 4.0], dtype=torch.float64) / (26 / 3) ** 0.5)
    assert reinforce.normalize(torch.tensor([3.0])).tolist() == [0.0]  # not NaN


def test_merged_statistics_are_those_of_all_rows():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal([1.0, -50.0, 3.0], [0.1, 20.0, 4.0], (101, 3)))
    stats = RunningNorm(3, limit=5.0)
    for batch in rows.split([1, 70, 30]):
        stats.update(batch)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.var, rows.var(0, correction=0), rtol=1e-5)
    assert stats.count == 101


def test_scaled_observations():
    envs = reinforce.make_envs(Args(), 2)
    agent = reinforce.make_agent(Args(normalize_obs=True), envs, torch.device("cpu"))
    agent.norm_obs.shift.copy_(torch.tensor([1.0, 2, 3, 4]))
    agent.norm_obs.scale.copy_((torch.tensor([4.0, 1, 0.25, 0]) + 1e-8).rsqrt())
    got = agent.scale(np.array([[3.0, 2, 2, 4], [1, 99, 3, 5]]))
    np.testing.assert_allclose(got, [[1, 0, -2, 0], [0, 5, 0, 5]], atol=1e-5)
    plain = reinforce.make_agent(Args(), envs, torch.device("cpu"))
    np.testing.assert_array_equal(plain.scale(np.array([[3.0, 2, 2, 4]])), [[3, 2, 2, 4]])


# A tiny world whose every episode can be listed: at first, action 1 ends it with 3, action 0 pays 1 and leads
# on; then action 1 pays 2, action 0 costs 1. So an episode is (1,), (0, 0) or (0, 1).
EPISODES = {(1,): [3.0], (0, 0): [1.0, -1.0], (0, 1): [1.0, 2.0]}


def episode_terms(logits, actions):
    """The gradients of ln π(a_t|s_t) for each step of an episode, (T, 2, 2), by the formula 1[a] − π."""
    terms = np.zeros((2, 2, 2))
    for t, action in enumerate(actions):
        terms[t, t] = np.eye(2)[action] - np.exp(logits[t]) / np.exp(logits[t]).sum()
    return terms


@pytest.mark.parametrize("to_go", [True, False])
def test_no_baseline_changes_the_expected_gradient_exactly(to_go):
    """All triples of episodes, weighted by their probability, against the gradient of J itself."""
    logits = np.array([[0.3, -0.2], [-0.5, 0.4]])
    weights = torch.tensor(logits, requires_grad=True)
    log_pi = weights.log_softmax(-1)
    log_p = {e: sum(log_pi[t, a] for t, a in enumerate(e)) for e in EPISODES}
    sum(log_p[e].exp() * sum(EPISODES[e]) for e in EPISODES).backward()
    exact = weights.grad.numpy()

    N, means, variances = 3, {}, {}
    for baseline in ("none", "batch", "value"):
        mean, square = 0.0, 0.0
        for batch in itertools.product(EPISODES, repeat=N):
            playing = np.array([[t < len(e) for e in batch] for t in range(2)])
            rewards = np.array([[EPISODES[e][t] if t < len(e) else 0.0 for e in batch] for t in range(2)])
            credit = returns_to_go(rewards, playing, np.zeros(N), 1.0)
            if not to_go:
                credit[:] = credit[0]
            if baseline == "batch":
                credit = credit - mean_of_others(credit, playing)
            elif baseline == "value":
                credit = credit - np.array([[2.2], [0.8]])  # any function of the state
            terms = np.stack([episode_terms(logits, e) for e in batch], axis=1)  # (T, N, 2, 2)
            gradient = (credit[:, :, None, None] * terms)[playing].sum(0) / N
            probability = np.exp(sum(log_p[e].item() for e in batch))
            mean = mean + probability * gradient
            square = square + probability * gradient**2
        means[baseline], variances[baseline] = mean, (square - mean**2).sum()
    for mean in means.values():
        np.testing.assert_allclose(mean, exact, rtol=0, atol=1e-12)
    assert variances["value"] < variances["none"] and variances["batch"] < variances["none"]


class Draws(gym.Env):
    """Episodes of 1 to 6 steps with any ending but "neither", drawn from the seed of the reset.

    Observes [1, step, draw, draw]; pays −2, 0 or 3, and half a point more for each number of the action.
    Only resets by hand bring a seed. What follows the automatic ones must never be seen: each step ends an
    episode, pays 1000 and leads to nines.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = gym.spaces.Discrete(3)

    def observe(self):
        draws = self.np_random.normal([5.0, -1.0], [20.0, 0.1])
        return np.array([1.0, self.step_count, *draws] if self.seen else [99.0] * 4, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = seed is not None
        self.step_count = 0
        self.length = self.np_random.integers(1, 7)
        self.ending = self.np_random.choice(["terminated", "truncated", "both"])
        return self.observe(), {}

    def step(self, action):
        self.step_count += 1
        if not self.seen:
            return self.observe(), 1000.0, True, False, {}
        end = self.step_count == self.length
        reward = self.np_random.choice([-2.0, 0.0, 3.0]) * (1 + 0.5 * action)
        terminated = bool(end and self.ending in ("terminated", "both"))
        truncated = bool(end and self.ending in ("truncated", "both"))
        return self.observe(), float(reward), terminated, truncated, {}


gym.register("Draws-v0", entry_point=Draws)


class Slow:
    """The docstring's equations in plain loops and float64. It replays the actions that the script took."""

    def __init__(self, args: Args, weights: dict[str, torch.Tensor]) -> None:
        self.args = args
        self.weights = {
            name: value.double().clone().requires_grad_()
            for name, value in weights.items()
            if not name.startswith("norm_obs")
        }
        self.moments = {name: [0.0, 0.0, 0] for name in self.weights}  # Adam's two means and its step
        self.seen_rows = []
        self.points = {}  # (chart, update) -> value
        self.steps = 0
        self.endings = set()

    def network(self, name, x):
        """Hidden layers of ReLU units; x: (n, D) -> (n, outputs)."""
        layers = sorted({key.split(".")[1] for key in self.weights if key.startswith(name)}, key=int)
        for layer in layers:
            x = x @ self.weights[f"{name}.{layer}.weight"].T + self.weights[f"{name}.{layer}.bias"]
            x = x.relu() if layer != layers[-1] else x
        return x

    def scaled(self, obs):
        """Equation (10), by statistics of all that was seen in earlier updates."""
        obs = np.asarray(obs, dtype=np.float64)
        if self.args.normalize_obs:
            if self.seen_rows:
                rows = np.array(self.seen_rows, dtype=np.float64)
                obs = (obs - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-8)
            obs = np.clip(obs, -5.0, 5.0)
        return torch.from_numpy(obs)

    def value(self, obs):
        return self.network("critic", self.scaled([obs]))[0, 0]

    def log_policy(self, obs):
        return self.network("actor", self.scaled([obs]))[0].log_softmax(-1)

    def adam(self, gradients, learning_rate):
        """https://arxiv.org/abs/1412.6980, algorithm 1."""
        for name, gradient in gradients.items():
            m, v, t = self.moments[name]
            t += 1
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient**2
            self.moments[name] = [m, v, t]
            step = learning_rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
            self.weights[name] = (self.weights[name].detach() - step).requires_grad_()

    def gradients(self, loss, part):
        names = [name for name in self.weights if name.startswith(part)]
        found = torch.autograd.grad(loss, [self.weights[name] for name in names], retain_graph=True)
        return dict(zip(names, found, strict=True))

    def play(self, update, drawn):
        """Replay one update's episodes. drawn: logits and actions of each step. Returns what happened."""
        args = self.args
        seeds = env_seeds(args.num_envs, args.seed, 0, update * args.num_envs)
        episodes = []
        for n, seed in enumerate(seeds):
            env = Draws()
            obs, _ = env.reset(seed=seed)
            episode = {"obs": [], "actions": [], "rewards": []}
            over = False
            while not over:
                logits, actions = drawn[len(episode["obs"])]
                log_policy = self.log_policy(obs).detach().numpy()
                np.testing.assert_allclose(logits[n].log_softmax(-1), log_policy, rtol=1e-4, atol=1e-4)
                episode["obs"].append(obs)
                episode["actions"].append(int(actions[n]))
                obs, reward, terminated, truncated, _ = env.step(int(actions[n]))
                episode["rewards"].append(reward)
                over = terminated or truncated
            self.endings.add((terminated, truncated))
            episode["last_obs"] = obs
            episode["worth_more"] = truncated and not terminated
            episodes.append(episode)
        return episodes

    def update(self, number, drawn, order):
        """One update. order: the permutation by which the value network went through the steps."""
        args = self.args
        N = args.num_envs
        episodes = self.play(number, drawn)
        returns = []  # of each episode and step, equation (2)
        for episode in episodes:
            G = self.value(episode["last_obs"]).item() if args.baseline == "value" else 0.0
            G = G if episode["worth_more"] else 0.0
            column = []
            for reward in reversed(episode["rewards"]):
                reward = np.sign(reward) if args.clip_rewards else reward
                G = reward if args.restart_credit and reward != 0 else reward + args.gamma * G
                column.insert(0, G)
            returns.append(column)
        advantages = []
        for i in range(N):
            for t in range(len(returns[i])):
                use = [column if args.reward_to_go else [column[0]] * len(column) for column in returns]
                others = [use[j][t] for j in range(N) if j != i and len(use[j]) > t]
                b = 0.0
                if args.baseline == "batch" and others:
                    b = sum(others) / len(others)  # (3)
                elif args.baseline == "value":
                    b = self.value(episodes[i]["obs"][t]).item()
                advantages.append(use[i][t] - b)  # (4)
        M = len(advantages)
        if args.normalize_returns:
            advantages = (np.array(advantages) - np.mean(advantages)) / (np.std(advantages) + 1e-8)
        left = list(advantages)
        parts = []  # of the loss, by episode
        mean_entropy = 0.0
        pg_loss = 0.0
        for episode in episodes:
            part = 0.0
            for obs, action in zip(episode["obs"], episode["actions"], strict=True):
                log_policy = self.log_policy(obs)
                H = -sum(log_policy[a].exp() * log_policy[a] for a in range(3))  # (8)
                term = left.pop(0) * log_policy[action]
                part = part - (term + args.entropy_coef * H) / M  # (5)
                pg_loss -= term.item() / M
                mean_entropy += H.item() / M
            parts.append(part)
        flat = lambda gradient: torch.cat([x.flatten() for x in gradient.values()])  # noqa: E731
        whole = self.gradients(sum(parts), "actor")
        each = [N * flat(self.gradients(part, "actor")) for part in parts]  # (6)
        learning_rate = args.learning_rate
        if args.anneal_lr:
            learning_rate *= 1 - number * N / args.total_episodes
        self.log("charts/episodic_return", number, np.mean([sum(e["rewards"]) for e in episodes]))
        self.log("charts/episodic_length", number, M / N)
        self.log("charts/learning_rate", number, learning_rate)
        self.log("losses/policy_loss", number, pg_loss)
        self.log("losses/entropy", number, mean_entropy)
        self.log("losses/grad_norm", number, flat(whole).norm().item())
        if N > 1 and (number + 1) % args.variance_every == 0:
            variance = sum(((d - flat(whole)) ** 2).sum() for d in each) / (N * (N - 1))  # (7)
            self.log("charts/grad_variance", number, variance.item())
        if args.baseline == "value":
            # The script's rows: first all first steps, then all second ones.
            where = sorted((t, i) for i in range(N) for t in range(len(returns[i])))
            values = [self.value(episodes[i]["obs"][t]).item() for t, i in where]
            targets = [returns[i][t] for t, i in where]
            explained = 1 - np.var(np.array(targets) - values) / np.var(targets)
            self.log("losses/explained_variance", number, explained)
        self.adam(whole, learning_rate)
        if args.baseline == "value":
            assert sorted(order.tolist()) == list(range(M))
            for rows in order.chunk(N):
                errors = [
                    self.value(episodes[where[row][1]]["obs"][where[row][0]]) - targets[row] for row in rows
                ]
                v_loss = sum(0.5 * error**2 for error in errors) / len(errors)  # (9)
                self.adam(self.gradients(v_loss, "critic"), learning_rate)
            self.log("losses/value_loss", number, v_loss.item())
        self.steps += M
        for episode in episodes:
            self.seen_rows.extend(episode["obs"])

    def log(self, tag, number, value):
        self.points[tag, number] = value


def watched(args: Args, monkeypatch) -> tuple[dict, dict, list, list, list]:
    """Train; returns results, the first weights, the draws, the permutations and the points of the charts."""
    first, drawn, orders, points = {}, [], [], []
    make_agent = reinforce.make_agent
    sample = reinforce.sample
    randperm = torch.randperm

    def known_agent(*parts):
        agent = make_agent(*parts)
        first.update({name: value.clone() for name, value in agent.state_dict().items()} if not first else {})
        return agent

    def spy_sample(logits):
        actions = sample(logits)
        drawn.append((logits.clone(), actions.clone()))
        return actions

    def spy_randperm(n):
        orders.append(randperm(n))
        return orders[-1]

    monkeypatch.setattr(reinforce, "make_agent", known_agent)
    monkeypatch.setattr(reinforce, "sample", spy_sample)
    monkeypatch.setattr(torch, "randperm", spy_randperm)
    monkeypatch.setattr(reinforce.SummaryWriter, "add_scalar", lambda self, *point: points.append(point))
    return reinforce.train(args), first, drawn, orders, points


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"baseline": "value", "normalize_obs": True, "entropy_coef": 0.1},
        {"baseline": "value", "reward_to_go": False, "normalize_returns": False, "variance_every": 1},
        {"baseline": "batch", "reward_to_go": False, "hidden_sizes": [], "variance_every": 1},
        {"baseline": "none", "restart_credit": True, "clip_rewards": True, "anneal_lr": False},
        {"baseline": "none", "num_envs": 1, "hidden_sizes": [6, 5], "entropy_coef": -0.2},
    ],
    ids=lambda flags: " ".join(map(str, flags.items())),
)
def test_whole_updates_against_a_slow_reference(flags, tmp_path, monkeypatch):
    """Four updates: actions' probabilities, all weights, statistics, charts and counters."""
    shape = {"num_envs": 5, "hidden_sizes": [7], "variance_every": 2, "eval_episodes": 1} | flags
    N = shape["num_envs"]
    run = {"env_id": "Draws-v0", "total_episodes": 4 * N, "gamma": 0.8, "learning_rate": 0.02, "seed": 3}
    args = Args(run_dir=str(tmp_path), **run, **shape)
    results, first, drawn, orders, points = watched(args, monkeypatch)

    slow = Slow(args, first)
    for number in range(4):
        lengths = []
        for seed in env_seeds(N, args.seed, 0, number * N):
            env = Draws()
            env.reset(seed=seed)
            lengths.append(env.length)
        T = max(lengths)  # the script stops collecting when the longest episode is over
        slow.update(number, drawn[:T], orders[number] if orders else None)
        del drawn[:T]
    assert not drawn and len(orders) == (4 if args.baseline == "value" else 0)
    if N > 1:
        assert slow.endings == {(True, False), (False, True), (True, True)}, "every ending has occurred"

    agent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]
    for name, value in slow.weights.items():
        np.testing.assert_allclose(agent[name], value.detach(), rtol=1e-4, atol=1e-4 * 0.02, err_msg=name)
        assert (agent[name] != first[name]).any(), f"{name} has learned something"
    if args.normalize_obs:
        rows = np.array(slow.seen_rows)
        assert agent["norm_obs.count"] == len(rows)
        np.testing.assert_allclose(agent["norm_obs.mean"], rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(agent["norm_obs.var"], rows.var(0), rtol=1e-5, atol=1e-8)
    assert results["global_step"] == slow.steps and results["episodes"] == 4 * N
    steps = sorted({step for _, _, step in points})
    assert len(steps) == 4 and steps[-1] == slow.steps
    got = {(tag, steps.index(step)): value for tag, value, step in points if tag != "charts/SPS"}
    assert len(got) == len([point for point in points if point[0] != "charts/SPS"]), "each point only once"
    assert got == pytest.approx(slow.points, rel=1e-4, abs=1e-5)


def test_evaluation_is_greedy_counts_no_reward_twice_and_uses_seeds_of_its_own(tmp_path, monkeypatch):
    """Episodes of unequal length against a loop over single environments; 23 episodes need two rounds."""
    used = []
    monkeypatch.setattr(reinforce, "env_seeds", lambda *key: used.append(env_seeds(*key)) or used[-1])
    run = {"env_id": "Draws-v0", "num_envs": 5, "total_episodes": 20, "hidden_sizes": [7], "seed": 7}
    args = Args(run_dir=str(tmp_path), eval_episodes=23, normalize_obs=True, **run)
    results = reinforce.train(args)
    seeds = list(itertools.chain(*used))
    assert len(seeds) == len(set(seeds)) == 4 * 5 + 2 * 20, "no episode is played twice"
    assert used[4:] == [env_seeds(20, 7, 1, 0), env_seeds(20, 7, 1, 20)]

    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    slow = Slow(dataclasses.replace(args, normalize_obs=False), checkpoint["agent"])
    mean = checkpoint["agent"]["norm_obs.mean"].numpy()
    std = np.sqrt(checkpoint["agent"]["norm_obs.var"].numpy() + 1e-8)
    returns = []
    lengths = []
    for seed in itertools.chain(*used[4:]):
        env = Draws()
        obs, _ = env.reset(seed=seed)
        returns.append(0.0)
        over = False
        while not over:
            action = int(slow.log_policy(np.clip((obs - mean) / std, -5, 5)).argmax())
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[-1] += reward
            over = terminated or truncated
        lengths.append(env.length)
    returns = returns[:23]
    assert len(set(lengths)) == 6
    assert results["mean_reward"] == pytest.approx(np.mean(returns), abs=1e-12)
    assert results["std_reward"] == pytest.approx(np.std(returns), abs=1e-12)
    assert results["score"] == pytest.approx(np.mean(returns) - np.std(returns), abs=1e-12)
    assert results["eval_episodes"] == 23 and results["episodes"] == 20 and results["seed"] == 7
    assert results["algo"] == "reinforce" and results["env_id"] == "Draws-v0"
    assert results["global_step"] == checkpoint["global_step"] and results["wall_time_s"] > 0
    assert results["steps_per_second"] == pytest.approx(results["global_step"] / results["wall_time_s"])


def test_an_evaluation_of_an_episode_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(reinforce, "MAX_EVAL_STEPS", 9)
    args = Args(env_id="Counter-truncated-v0", num_envs=2, total_episodes=2, eval_episodes=3)
    reinforce.train(dataclasses.replace(args, run_dir=str(tmp_path)))
    endless = dataclasses.replace(args, env_id="Counter-neither-v0")
    results = reinforce.evaluate(endless, tmp_path, torch.device("cpu"))
    assert results["mean_reward"] == sum(range(1, 10)) and results["std_reward"] == 0


def test_what_a_run_writes_down_can_be_read_again(tmp_path):
    """The event file has each chart, with one point an update but for the variance."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = {"env_id": "Draws-v0", "num_envs": 3, "total_episodes": 12, "eval_episodes": 1, "variance_every": 3}
    reinforce.train(Args(baseline="value", run_dir=str(tmp_path), **run))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    charts = {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    charts_of_each = ["episodic_return", "episodic_length", "learning_rate", "SPS"]
    losses = ["policy_loss", "entropy", "grad_norm", "value_loss", "explained_variance"]
    want = {f"charts/{name}": 4 for name in charts_of_each} | {f"losses/{name}": 4 for name in losses}
    assert charts == want | {"charts/grad_variance": 1}


def test_the_learning_rate_falls_but_never_to_zero(tmp_path, monkeypatch):
    points = []
    monkeypatch.setattr(reinforce.SummaryWriter, "add_scalar", lambda self, *point: points.append(point))
    run = {"env_id": "Draws-v0", "num_envs": 2, "total_episodes": 8, "eval_episodes": 1, "learning_rate": 0.4}
    for name, anneal in (("falls", True), ("stays", False)):
        reinforce.train(Args(anneal_lr=anneal, run_dir=str(tmp_path / name), **run))
    rates = [value for tag, value, _ in points if tag == "charts/learning_rate"]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1] + [0.4] * 4)


@pytest.mark.parametrize(
    ("env_id", "native"),
    [("envs.pixelcopter:Pixelcopter-v0", True), ("envs.pong:PongPLE-v0", True), ("CartPole-v1", False)],
)
def test_batched_environments_are_used_and_reset_in_the_same_step_but_not_for_a_film(env_id, native):
    for render_mode, mode in ((None, AutoresetMode.SAME_STEP), ("rgb_array", AutoresetMode.NEXT_STEP)):
        envs = reinforce.make_envs(Args(env_id=env_id), 3, render_mode)
        assert isinstance(envs.unwrapped, gym.vector.SyncVectorEnv) != native
        assert envs.metadata["autoreset_mode"] == mode and envs.num_envs == 3
        assert envs.render_mode == render_mode
        envs.close()
    envs = reinforce.make_envs(Args(env_id=env_id), 3)
    envs.reset(seed=[1, 2, 3])
    for _ in range(600):
        _, _, terminated, truncated, info = envs.step(np.zeros(3, dtype=np.int64))
        if (terminated | truncated).any():
            assert "final_obs" in info
            return
    pytest.fail("no episode ended")


def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path):
    flags = {
        "anneal_lr": False,
        "normalize_obs": True,
        "baseline": "value",
        "eval_episodes": 2,
        "num_envs": 4,
    }
    whole = reinforce.train(Args(total_episodes=48, run_dir=str(tmp_path / "whole"), **flags))
    reinforce.train(Args(total_episodes=24, run_dir=str(tmp_path / "parts"), **flags))
    parts = reinforce.train(Args(total_episodes=48, resume=str(tmp_path / "parts"), **flags))
    assert parts["global_step"] == whole["global_step"] and parts["mean_reward"] == whole["mean_reward"]
    files = [tmp_path / name / "checkpoint.pt" for name in ("whole", "parts")]
    one, other = (torch.load(file, weights_only=True)["agent"] for file in files)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_run_that_was_stopped_amid_its_episodes_plays_them_again(tmp_path, monkeypatch):
    flags = {"total_episodes": 24, "num_envs": 4, "eval_episodes": 2}
    whole = reinforce.train(Args(run_dir=str(tmp_path / "whole"), **flags))
    goes_on, sample, runs, calls = reinforce.Run.goes_on, reinforce.sample, [], []

    def watched(run, size):
        runs.append(run)
        return goes_on(run, size)

    def stopping(logits):
        calls.append(runs[-1].episodes)
        if calls.count(12) == 5 and not runs[-1].args.resume:  # the fifth step of the fourth rollout
            runs[-1].stopped.append(signal.SIGINT)
        return sample(logits)

    monkeypatch.setattr(reinforce.Run, "goes_on", watched)
    monkeypatch.setattr(reinforce, "sample", stopping)
    with pytest.raises(SystemExit):
        reinforce.train(Args(run_dir=str(tmp_path / "parts"), **flags))
    runs[-1].lock.close()
    parts = reinforce.train(Args(resume=str(tmp_path / "parts"), **flags))
    assert parts["global_step"] == whole["global_step"] and parts["mean_reward"] == whole["mean_reward"]
    files = [tmp_path / name / "checkpoint.pt" for name in ("whole", "parts")]
    one, other = (torch.load(file, weights_only=True) for file in files)
    assert torch.equal(one["rng_state"], other["rng_state"])
    assert all(torch.equal(one["agent"][name], other["agent"][name]) for name in one["agent"])


@pytest.mark.parametrize(
    "flags",
    [
        {"num_envs": 1},  # the default baseline compares episodes
        {"restart_credit": True, "reward_to_go": False},
        {"total_episodes": 7},
        {"hidden_sizes": [64, 0]},
        {"gamma": float("nan")},
        {"entropy_coef": float("inf")},
        {"variance_every": 0},
    ],
)
def test_flags_that_cannot_work(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        reinforce.train(Args(run_dir=str(tmp_path / "run"), **flags))
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_episode_that_never_ends_can_be_interrupted(tmp_path):
    script = Path(reinforce.__file__)
    command = [sys.executable, script, "--env-id", "counter_env:Counter-neither-v0", "--run-dir", tmp_path]
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=script.parent)
    deadline = time.time() + 60
    while not (tmp_path / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err


def test_cartpole_is_solved_by_the_defaults(tmp_path):
    """A broken return, baseline or mask does not get there in 640 episodes; random play scores 22."""
    results = reinforce.train(Args(run_dir=str(tmp_path)))
    assert results["episodes"] <= 640 and results["score"] >= 475
