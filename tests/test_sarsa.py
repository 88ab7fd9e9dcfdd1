"""Sarsa: n-step returns and endings, a slow Sarsa beside the fast one, prediction, the cliff, Blackjack."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import sarsa as script
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env
from sarsa import (
    Args,
    env_seeds,
    epsilon_at,
    epsilon_greedy,
    expected_value,
    greedy_action,
    n_step_returns,
    start_seeds,
    step_size,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent / "benchmark"))
import book_figures

WALK = "envs.random_walk:RandomWalk-v0"


class Line(gym.Env):
    """States 0, 1, 2, …, one each step; rewards 1, 2, 4, 8, …; it ends in state `length` as it is told.

    Actions change nothing. Even episodes end after `length` steps, odd ones after `second` if that is given.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self, length=4, second=None, ending="terminated", actions=1, nan_after=math.inf, render_mode=None
    ):
        self.observation_space = gym.spaces.Discrete(9)
        self.action_space = gym.spaces.Discrete(actions)
        self.lengths = (length, second or length)
        self.ending, self.nan_after, self.total, self.episode = ending, nan_after, 0, -1

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.episode += 1
        return 0, {}

    def step(self, action):
        self.steps += 1
        self.total += 1
        reward = 2.0 ** (self.steps - 1) if self.total <= self.nan_after else math.nan
        ended = self.steps == self.lengths[self.episode % 2]
        terminated = ended and self.ending in ("terminated", "both")
        return self.steps % 9, reward, terminated, ended and self.ending in ("truncated", "both"), {}

    def render(self):
        return np.full((32, 32, 3), 20 * self.steps, np.uint8)


class Noisy(gym.Env):
    """Chance decides next state, reward and ending; all four endings come up within a few episodes."""

    observation_space = gym.spaces.Discrete(5)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return int(self.np_random.integers(5)), {}

    def step(self, action):
        state = int(self.np_random.integers(5))
        reward = float(action) + self.np_random.normal()
        terminated, truncated = self.np_random.random(2) < (0.15, 0.1)
        return state, reward, bool(terminated), bool(truncated), {}


class Dice(gym.Env):
    """Episodes of 1 to 6 steps, by the dice. Action 1 pays 1, 2, 3, …, the others nothing."""

    observation_space = gym.spaces.Discrete(7)
    action_space = gym.spaces.Discrete(3)
    seeds = []

    def __init__(self, render_mode=None):
        self.over = True

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.steps, self.length, self.over = 0, int(self.np_random.integers(1, 7)), False
        return 0, {}

    def step(self, action):
        assert not self.over, "a step after the end"
        self.steps += 1
        self.over = self.steps == self.length
        reward = float(self.steps * (action == 1))
        odd = self.length % 2 == 1
        return self.steps, reward, self.over and odd, self.over and not odd, {}


gym.register("Line-v0", Line)
gym.register("Noisy-v0", Noisy)
gym.register("Dice-v0", Dice)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """A picture takes longer than most of these runs."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(script, "draw_policy", lambda args, run_dir: None)


def run(folder, **kwargs):
    """Train; return the results, the table (S, A) and the visits (S, A)."""
    kwargs = {"eval_episodes": 1} | kwargs
    results = script.train(Args(run_dir=str(folder), **kwargs))
    with np.load(folder / "q_table.npz", allow_pickle=False) as file:
        return results, file["q_table"], file["visits"]


def quick(**kwargs):
    """Train without a run folder; return the table (S, A)."""
    return book_figures.learn(script, **kwargs)


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def refuses(capsys, code, function, *args):
    """The call ends with this exit code and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == code and len(lines) == 1
    return lines[0]


# --- formulas ---


def test_returns_of_a_window():
    # G of the third of three steps is 4 + 0.5 · 10, of the second 2 + 0.5 · 4 + 0.25 · 10, …
    assert list(n_step_returns([1.0, 2.0, 4.0], 10.0, 0.5)) == [1 + 1 + 1 + 1.25, 2 + 2 + 2.5, 4 + 5]
    assert list(n_step_returns([3.0], 0.0, 0.9)) == [3.0]
    rewards = np.random.default_rng(0).normal(size=7)
    direct = [sum(0.8**i * r for i, r in enumerate(rewards[t:])) + 0.8 ** (7 - t) * 5.0 for t in range(7)]
    assert list(n_step_returns(list(rewards), 5.0, 0.8)) == pytest.approx(direct)


def test_expected_value_is_the_mean_over_the_policy():
    for row in ([1.0, 5.0, -2.0], [4.0, 4.0, 1.0, 0.0], [7.0], [2.0, 2.0]):
        for epsilon in (0.0, 0.1, 0.7, 1.0):
            best = [value == max(row) for value in row]
            chances = [epsilon / len(row) + (1 - epsilon) * b / sum(best) for b in best]
            mean = sum(p * value for p, value in zip(chances, row, strict=True))
            assert sum(chances) == pytest.approx(1) and expected_value(row, epsilon) == pytest.approx(mean)
    # The same by drawing.
    rng = random.Random(1)
    row = [1.0, 5.0, -2.0, 5.0]
    drawn = [row[epsilon_greedy(row, 0.4, rng, rng)] for _ in range(20_000)]
    assert np.mean(drawn) == pytest.approx(expected_value(row, 0.4), abs=0.06)


def test_shares_of_the_actions():
    rng = random.Random(2)
    counts = np.bincount([epsilon_greedy([0.0, 3.0, 1.0, 3.0], 0.4, rng, rng) for _ in range(20_000)])
    assert counts / 20_000 == pytest.approx([0.1, 0.4, 0.1, 0.4], abs=0.015)
    counts = np.bincount([epsilon_greedy([0.0, 3.0, 1.0, 3.0], 0.4, rng, None) for _ in range(20_000)])
    assert counts / 20_000 == pytest.approx([0.1, 0.7, 0.1, 0.1], abs=0.015)
    assert {epsilon_greedy([0.0, 3.0], 0.0, rng, rng) for _ in range(100)} == {1}


def test_epsilon_falls_from_end_to_end():
    assert epsilon_at(0, 0.9, 0.1, 0.01) == pytest.approx(0.9)
    assert epsilon_at(100, 0.9, 0.1, 0.01) == pytest.approx(0.1 + 0.8 / math.e)
    assert epsilon_at(10**6, 0.9, 0.1, 0.01) == pytest.approx(0.1)


def test_step_size():
    assert step_size(0.6, 0, 50) == 0.6
    assert step_size(0.6, 50, 50) == pytest.approx(0.3)
    assert step_size(0.6, 150, 50) == pytest.approx(0.15)
    assert step_size(0.6, 10**6, 0) == 0.6


def test_ties_are_drawn_among_the_best_only():
    rng = random.Random(0)
    counts = np.bincount([greedy_action([1.0, 5.0, 5.0, 0.0, 5.0], rng) for _ in range(3000)], minlength=5)
    assert counts[0] == counts[3] == 0 and counts[[1, 2, 4]].min() > 900
    assert greedy_action([1.0, 5.0, 5.0]) == 1
    state = rng.getstate()
    assert greedy_action([1.0, 9.0, 5.0], rng) == 1 and rng.getstate() == state


# --- n steps and the ends of episodes ---


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "max_steps"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 0])
def test_returns_at_every_ending(n, ending):
    """α = 1 and every state seen once: an entry is its return. 10 is what the table says before."""
    length, gamma = 4, 0.5
    line = {"length": length if ending != "max_steps" else 8, "ending": ending}
    settings = {"env_kwargs": json.dumps(line), "learning_rate": 1.0, "gamma": gamma, "initial_value": 10.0}
    settings["max_steps"] = length if ending == "max_steps" else 100
    table = quick(env_id="Line-v0", total_episodes=1, n_step=n, **settings)[:, 0]
    for t in range(length):
        last = min(t + n, length) if n else length  # the step after the last reward that counts
        target = sum(gamma ** (i - t) * 2.0**i for i in range(t, last))
        if last < length or ending in ("truncated", "max_steps"):
            target += gamma ** (last - t) * 10.0
        assert table[t] == pytest.approx(target, abs=1e-12)
    assert (table[length:] == 10.0).all()


def slow_sarsa(args):
    """The book's n-step Sarsa (section 7.2) as it stands there, with all times and all draws spelt out.

    Returns the table, the visits and, for every episode, ε, the sum of |G − Q|, the rewards' sum, the length.
    """
    env = gym.make(args.env_id).unwrapped
    S, A = int(env.observation_space.n), int(env.action_space.n)
    Q, count = np.full((S, A), args.initial_value), np.zeros((S, A), int)
    rng = random.Random(args.seed)
    env.reset(seed=env_seeds(1, args.seed, 0, 0)[0])

    def policy(s, epsilon):
        """Chances of the actions."""
        best = Q[s] == Q[s].max()
        return epsilon / A + (1 - epsilon) * best / best.sum()

    def draw(s, epsilon):
        if rng.random() < epsilon:
            return rng.randrange(A)
        best = [a for a in range(A) if Q[s, a] == Q[s].max()]
        return best[0] if len(best) == 1 else rng.choice(best)

    log = []
    for episode in range(args.total_episodes):
        epsilon = args.min_epsilon + (args.max_epsilon - args.min_epsilon) / math.exp(
            args.decay_rate * episode
        )
        states, rewards, end, error = [env.reset()[0]], [None], math.inf, 0.0
        actions = [draw(states[0], epsilon)]
        t = 0
        while True:
            if t < end:
                s, r, terminated, truncated, _ = env.step(actions[t])
                states.append(s)
                rewards.append(r)
                actions.append(draw(s, epsilon))
                if terminated or truncated or t + 1 == args.max_steps:
                    end = t + 1
                    # What follows the end is guessed once, before the steps that are left learn.
                    follows = 0.0 if terminated else Q[s, actions[-1]]
                    if args.expected and not terminated:
                        follows = policy(s, 0 if args.greedy_target else epsilon) @ Q[s]
            first = t + 1 - args.n_step if args.n_step else (0 if t + 1 == end else -1)
            due = [first] if t + 1 < end else range(max(first, 0), end)
            for tau in due:
                if tau < 0:
                    continue
                last = min(tau + args.n_step, end) if args.n_step else end
                G = sum(args.gamma ** (i - tau - 1) * rewards[i] for i in range(tau + 1, last + 1))
                if last == end:
                    G += args.gamma ** (last - tau) * follows
                elif args.expected:
                    chances = policy(states[last], 0 if args.greedy_target else epsilon)
                    G += args.gamma ** (last - tau) * chances @ Q[states[last]]
                else:
                    G += args.gamma ** (last - tau) * Q[states[last], actions[last]]
                pair = states[tau], actions[tau]
                alpha = args.learning_rate / (1 + count[pair] / args.lr_visits if args.lr_visits else 1)
                error += abs(G - Q[pair])
                Q[pair] += alpha * (G - Q[pair])
                count[pair] += 1
            t += 1
            if t >= end:
                break
        log.append((epsilon, error, sum(rewards[1:]), end))
    return Q, count, np.array(log)


VARIANTS = {
    "one step": {"n_step": 1},
    "two steps": {"n_step": 2, "lr_visits": 3.0},
    "three steps, expected": {"n_step": 3, "expected": True},
    "longer than episodes": {"n_step": 50},
    "Monte Carlo": {"n_step": 0, "initial_value": -2.0},
    "expected": {"expected": True, "initial_value": 1.5},
    "Q-learning": {"expected": True, "greedy_target": True},
    "falling": {"n_step": 2, "max_epsilon": 0.9, "min_epsilon": 0.2, "decay_rate": 0.05},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_slow_sarsa_finds_the_same(tmp_path, name):
    flags = {"env_id": "Noisy-v0", "total_episodes": 60, "learning_rate": 0.3, "gamma": 0.8, "max_steps": 6}
    flags |= {"max_epsilon": 0.4, "min_epsilon": 0.4} | VARIANTS[name]
    results, table, visits = run(tmp_path, seed=3, **flags)
    slow_table, slow_visits, log = slow_sarsa(Args(seed=3, **flags))
    np.testing.assert_allclose(table, slow_table, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(visits, slow_visits)
    steps = np.cumsum(log[:, 3])
    assert results["global_step"] == steps[-1] == visits.sum()
    # 60 episodes: a point of the charts for each.
    charts = scalars(tmp_path)
    for tag, values in {
        "charts/epsilon": log[:, 0],
        "losses/td_error": log[:, 1] / log[:, 3],
        "charts/episodic_return": log[:, 2],
        "charts/episodic_length": log[:, 3],
    }.items():
        assert [step for step, _ in charts[tag]] == steps.tolist()
        np.testing.assert_allclose([value for _, value in charts[tag]], values, rtol=1e-5, atol=1e-6)


def test_all_endings_came_up():
    env = gym.make("Noisy-v0").unwrapped
    env.reset(seed=env_seeds(1, 3, 0, 0)[0])
    endings = {tuple(env.step(0)[2:4]) for _ in range(300)}
    assert len(endings) == 4


# --- prediction ---


def test_monte_carlo_is_the_mean_of_returns(monkeypatch):
    """α_m = 1/(1 + m): the average of all returns that followed a state, every visit counted."""
    episodes = []

    class Recorder(gym.Wrapper):
        def reset(self, **kwargs):
            state, info = self.env.reset(**kwargs)
            episodes.append([[state], []])
            return state, info

        def step(self, action):
            result = self.env.step(action)
            episodes[-1][0].append(result[0])
            episodes[-1][1].append(result[1])
            return result

    make = script.make_env
    monkeypatch.setattr(script, "make_env", lambda args: Recorder(make(args)))
    walk = {"env_id": WALK, "env_kwargs": '{"num_states": 5, "left_reward": -3}', "gamma": 0.9}
    table = quick(total_episodes=40, n_step=0, learning_rate=1.0, lr_visits=1.0, **walk)
    returns = {}
    for states, rewards in episodes:
        for t, state in enumerate(states[:-1]):
            returns.setdefault(state, []).append(sum(0.9**i * r for i, r in enumerate(rewards[t:])))
    assert sorted(returns) == [1, 2, 3, 4, 5]
    for state, found in returns.items():
        assert table[state, 0] == pytest.approx(np.mean(found), abs=1e-12)


@pytest.mark.parametrize("n", [1, 3, 0])
def test_values_of_the_walk(n):
    """V of the coin's policy, against the linear system V = r + γ P V."""
    n_states, gamma = 5, 0.9
    matrix, rewards = np.eye(n_states), np.zeros(n_states)
    for i in range(n_states):
        for j in (i - 1, i + 1):
            if 0 <= j < n_states:
                matrix[i, j] -= 0.5 * gamma
            else:
                rewards[i] += 0.5 * (-1 if j < 0 else 2)
    truth = np.linalg.solve(matrix, rewards)
    options = '{"num_states": 5, "right_reward": 2}'
    settings = {"learning_rate": 0.3, "lr_visits": 30.0, "gamma": gamma, "total_episodes": 3000}
    table = quick(env_id=WALK, env_kwargs=options, n_step=n, **settings)
    assert table[1:-1, 0] == pytest.approx(truth, abs=0.08)
    assert (table[[0, -1]] == 0).all()  # the ends are no states in which anything is learned


def test_n_between_is_best():
    """Figure 7.2 in small: 19 states, 10 episodes."""
    task = {"options": {}, "total_episodes": 10}
    few = {
        n: book_figures.errors_of_a_walk(12, n_step=n, learning_rate=a, **task)
        for n, a in [(1, 0.8), (4, 0.4), (512, 0.02)]
    }
    errors = {n: curve.mean() for n, curve in few.items()}
    assert errors[4] < errors[1] - 0.03 < errors[512] - 0.1
    for n, error in errors.items():
        assert error == pytest.approx(book_figures.N_STEP[n][1], abs=0.05)


# --- control ---


def test_initial_values(tmp_path):
    _, table, visits = run(tmp_path, total_episodes=3, initial_value=7.5)
    assert (table[visits == 0] == 7.5).all() and (table[visits > 0] != 7.5).any()
    # A table that hopes for more than there is tries everything once, without exploring on purpose.
    flags = {"max_epsilon": 0.0, "min_epsilon": 0.0, "max_steps": 2000, "total_episodes": 1}
    hopeful = run(tmp_path / "hopeful", initial_value=5.0, **flags)[2]
    assert (hopeful[36] > 0).all()


@pytest.fixture(scope="module")
def cliff():
    """Episodic returns while learning, and the table, of the three algorithms on the cliff."""
    found = {}
    book = {"total_episodes": 500, "lr_visits": 0.0}
    flags = {
        "Sarsa": {},
        "Expected": {"expected": True},
        "Q-learning": {"expected": True, "greedy_target": True},
    }
    for name, flag in flags.items():
        returns = []
        for seed in (1, 2, 3):
            table = quick(after_episode=lambda q, r, out=returns: out.append(r), seed=seed, **book, **flag)
        found[name] = np.reshape(returns, (3, 500)), table
    return found


def test_the_cliff(cliff):
    late = {name: returns[:, 100:].mean() for name, (returns, _) in cliff.items()}
    assert late["Sarsa"] == pytest.approx(-25, abs=6) and late["Q-learning"] == pytest.approx(-50, abs=8)
    assert late["Expected"] == pytest.approx(-24, abs=6)
    assert book_figures.greedy_way(cliff["Q-learning"][1]) == "at the edge"
    assert book_figures.greedy_way(cliff["Expected"][1]) != "at the edge"


@pytest.mark.parametrize("seed", [2, 8, 15, 16])
def test_a_rate_that_falls_leads_to_the_goal(seed):
    """With the defaults; with a constant rate the greedy policy of these seeds walks in a circle."""
    assert book_figures.greedy_way(quick(seed=seed)) in ("at the edge", "one row up", "two rows up")
    assert book_figures.greedy_way(quick(seed=seed, lr_visits=0.0)) == "never arrives"


def test_q_learning_by_another_name(cliff):
    """The values of the greedy policy: along the edge, 13 steps from the goal, 12, 11, …"""
    table = cliff["Q-learning"][1]
    assert table[36].max() == pytest.approx(-13, abs=1e-3)
    assert [table[24 + column].max() for column in range(12)] == pytest.approx(list(range(-12, 0)), abs=1e-3)


def test_on_policy_values_with_their_blunders():
    """Expected Sarsa with a falling rate finds Q of the ε-greedy policy that acts, exactly evaluated."""
    task = {"total_episodes": 4000, "expected": True, "lr_visits": 50.0, "learning_rate": 1.0, "seed": 5}
    table = quick(max_epsilon=0.3, min_epsilon=0.3, gamma=0.9, env_id="FrozenLake-v1", max_steps=100, **task)
    env = gym.make("FrozenLake-v1", is_slippery=False).unwrapped
    values = np.zeros(16)
    for _ in range(500):
        q = np.zeros((16, 4))
        for s in range(16):
            for a in range(4):
                ((_, s2, r, end),) = env.P[s][a]
                q[s, a] = r + 0.9 * values[s2] * (not end)
        greedy = table.argmax(1)
        values = 0.7 * q[np.arange(16), greedy] + 0.3 * q.mean(1)
    # The start: 0.59 = 0.9^5 without blunders, 0.34 with them.
    assert table[0].max() == pytest.approx(q[0].max(), abs=0.02) and q[0].max() < 0.35
    assert table[14].max() == pytest.approx(q[14].max(), abs=0.05)


def test_blackjack_by_monte_carlo():
    flags = {"n_step": 0, "learning_rate": 1.0, "lr_visits": 1.0, "total_episodes": 15_000}
    table = quick(env_id="Blackjack-v1", env_kwargs='{"sab": true}', **flags)
    assert table.shape == (32 * 11 * 2, 2)
    # Drawing on 20 or 21 without an ace, whatever the dealer shows: state = (sum · 11 + card) · 2 + ace.
    high = [(total * 11 + card) * 2 for total in (20, 21) for card in range(1, 11)]
    assert (table[high, 0] > table[high, 1]).mean() > 0.9
    policy = table.argmax(1).reshape(32, 11, 2)
    assert book_figures.worth_in_blackjack(policy) > -0.1  # at random −0.39, stick on 20 and above −0.35


# --- the run folder ---


def test_evaluation_is_greedy_exact_and_on_seeds_of_its_own(tmp_path, capsys):
    Dice.seeds = []
    args = Args(env_id="Dice-v0", total_episodes=200, eval_episodes=23, seed=5, run_dir=str(tmp_path))
    script.train(args)
    training = [seed for seed in Dice.seeds[:201] if seed is not None]
    evaluation = Dice.seeds[201:]
    sequence = np.random.SeedSequence
    expected = [int(seed) for first in (0, 20) for seed in sequence((5, 1, first)).generate_state(20)][:23]
    assert training == [int(sequence((5, 0, 0)).generate_state(1)[0])]
    assert evaluation == expected and not set(training) & set(evaluation)
    # A table with which action 1 is best after an even number of steps; it is often visited elsewhere.
    path = tmp_path / "q_table.npz"
    with np.load(path) as file:
        table = dict(file)
    table["q_table"] = np.array(
        [[0.0, 1.0, 0.5] if state % 2 == 0 else [0.0, -1.0, -2.0] for state in range(7)]
    )
    table |= {"global_step": 3000, "episodes": 30, "wall_time_s": 0.5}
    np.savez(path, **table)
    results = script.evaluate(args, tmp_path)
    lengths = [int(seeding.np_random(seed)[0].integers(1, 7)) for seed in expected]
    returns = [sum(step for step in range(1, length + 1, 2)) for length in lengths]
    assert len(set(returns)) == 3
    assert results["mean_reward"] == pytest.approx(np.mean(returns), abs=1e-12)
    assert results["std_reward"] == pytest.approx(np.std(returns), abs=1e-12)
    assert results["score"] == pytest.approx(np.mean(returns) - np.std(returns), abs=1e-12)
    assert results["eval_episodes"] == 23 and results["global_step"] == 3000 and results["episodes"] == 30
    assert results["steps_per_second"] == 6000 and results["wall_time_s"] == 0.5
    assert results["algo"] == "sarsa" and results["env_id"] == "Dice-v0" and results["seed"] == 5
    summary = capsys.readouterr().out.splitlines()[-1]
    assert f"{np.mean(returns):.2f} ± {np.std(returns):.2f} over 23 episodes after 3,000 steps" in summary


def test_an_evaluation_draws_among_equal_actions(tmp_path):
    run(tmp_path, total_episodes=1, initial_value=3.0, max_steps=1)
    env = script.make_env(Args())
    drawn = []
    for seed in (1, 1, 2):
        policy, checkpoint = script.load_policy(Args(seed=seed), env, tmp_path)
        drawn.append([policy(0) for _ in range(40)])
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0]) == {0, 1, 2, 3}
    policy, _ = script.load_policy(Args(random_ties=False), env, tmp_path)
    assert {policy(0) for _ in range(40)} == {0} and checkpoint["episodes"] == 1


def test_an_evaluation_without_an_end_is_cut(tmp_path):
    line = {"env_id": "Line-v0", "env_kwargs": '{"ending": "neither"}', "max_steps": 5}
    results = run(tmp_path, total_episodes=2, **line)[0]
    assert results["mean_reward"] == 2.0**script.MAX_EVAL_STEPS - 1 and results["global_step"] == 10


def test_a_film_shows_the_end(tmp_path):
    import imageio_ffmpeg

    args = Args(
        env_id="Line-v0", total_episodes=2, eval_episodes=1, capture_video=True, run_dir=str(tmp_path)
    )
    script.train(args)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "replay.mp4"))
    next(reader)
    assert [round(np.frombuffer(frame, np.uint8).mean() / 20) for frame in reader] == [0, 1, 2, 3, 4]


def test_seeds_of_evaluation_are_not_those_of_training():
    assert start_seeds(Args(env_id="Taxi-v4"), 101)[98:] == [28, 148, 16]
    assert start_seeds(Args(eval_seeds="7,8,9"), 5)[2:] == [9, 7, 8]
    drawn = [seed for run_seed in (1, 2) for seed in start_seeds(Args(seed=run_seed), 40)]
    trained = [env_seeds(1, run_seed, 0, step)[0] for run_seed in (1, 2) for step in range(1000)]
    assert len(set(drawn)) == 80 and not set(drawn) & set(trained)


@pytest.mark.parametrize("n", [1, 3, 0])
def test_resume_is_as_if_never_stopped(tmp_path, n):
    # The cliff needs no chance of its own, so that the runs must agree to the last bit.
    flags = {"n_step": n, "lr_visits": 30.0, "max_steps": 300}
    whole = run(tmp_path / "whole", total_episodes=60, **flags)
    run(tmp_path / "parts", total_episodes=25, **flags)
    parts = run(tmp_path / "parts", total_episodes=60, resume=str(tmp_path / "parts"), **flags)
    np.testing.assert_array_equal(whole[1], parts[1])
    np.testing.assert_array_equal(whole[2], parts[2])
    assert whole[0]["global_step"] == parts[0]["global_step"] and whole[1].any()
    with np.load(tmp_path / "whole/q_table.npz") as a, np.load(tmp_path / "parts/q_table.npz") as b:
        for name in ("rng_state", "recent_returns", "episodes"):
            np.testing.assert_array_equal(a[name], b[name])


def test_another_seed_is_another_run():
    tables = [quick(total_episodes=20, seed=seed) for seed in (1, 1, 2)]
    assert (tables[0] == tables[1]).all() and (tables[0] != tables[2]).any()


def test_charts_are_means_since_the_last_point(tmp_path):
    line = {
        "env_id": "Line-v0",
        "env_kwargs": '{"length": 2, "second": 3}',
        "learning_rate": 1.0,
        "lr_visits": 0.0,
    }
    run(tmp_path, total_episodes=400, **line)
    charts = scalars(tmp_path)
    assert [step for step, _ in charts["charts/episodic_length"]] == list(range(10, 1001, 10))
    assert {value for _, value in charts["charts/episodic_length"]} == {2.5}
    assert {value for _, value in charts["charts/episodic_return"]} == {5.0}
    assert {value for _, value in charts["charts/epsilon"]} == {np.float32(0.1)}
    # After two rounds Q(0) is 3 or 7 in turn, …: the table follows the last episode, and |G − Q| with it.
    assert charts["losses/td_error"][50][1] == charts["losses/td_error"][99][1] > 0


def test_an_error_that_is_no_number_stops_the_run(tmp_path, capsys):
    options = '{"length": 3, "nan_after": 100}'
    args = Args(
        "Line-v0", options, total_episodes=1000, checkpoint_every=6, max_steps=3, run_dir=str(tmp_path)
    )
    assert "step 102;" in refuses(capsys, 1, script.train, args)
    with np.load(tmp_path / "q_table.npz") as file:
        assert np.isfinite(file["q_table"]).all() and 93 <= file["global_step"] <= 99


@pytest.mark.parametrize("env_id", ["CliffWalking-v1", "FrozenLake-v1", WALK])
def test_a_picture_of_the_policy(tmp_path, env_id):
    run(tmp_path, env_id=env_id, total_episodes=20)
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")


def test_names_of_the_tiles():
    tiles, arrows = script.tiles_of(gym.make("CliffWalking-v1"))
    assert tiles.shape == (4, 12) and (tiles[:3] == "").all() and arrows == "↑→↓←"
    assert tiles[3].tolist() == ["start", *["cliff"] * 10, "goal"]
    tiles, arrows = script.tiles_of(gym.make("FrozenLake-v1"))
    assert tiles[0, 0] == "start" and tiles[1, 1] == "hole" and tiles[3, 3] == "goal" and tiles[0, 1] == ""
    assert arrows == "←↓→↑" and not script.tiles_of(gym.make("Taxi-v4"))[0].size


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"env_id": "CliffWalking-v9"}, "CliffWalking-v1"),
        ({"env_kwargs": "{not json"}, "JSON"),
        ({"env_kwargs": '{"wings": 2}'}, "wings"),
        ({"env_id": WALK, "env_kwargs": '{"num_states": 4}'}, "odd"),
        ({"env_id": WALK, "env_kwargs": '{"num_states": 99999999}'}, "too many"),
        ({"env_id": "CartPole-v1"}, "dqn.py|ppo.py"),
        ({"env_id": "Pendulum-v1"}, "a2c_continuous.py"),
        ({"greedy_target": True}, "--greedy-target needs --expected"),
        ({"greedy_target": True, "expected": True, "n_step": 2}, "--n-step 1"),
        ({"greedy_target": True, "expected": True, "n_step": 0}, "--n-step 1"),
        ({"n_step": -1}, "--n-step"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"gamma": 1.01}, "--gamma"),
        ({"initial_value": math.nan}, "--initial-value"),
        ({"initial_value": math.inf}, "--initial-value"),
        ({"min_epsilon": 0.6}, "--min-epsilon"),
        ({"max_epsilon": 1.1}, "--max-epsilon"),
        ({"decay_rate": -0.1}, "--decay-rate"),
        ({"lr_visits": -1.0}, "--lr-visits"),
        ({"max_steps": 0}, "--max-steps"),
        ({"total_episodes": 0}, "--total-episodes"),
        ({"eval_seeds": "1,x"}, "16,54,165"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, kwargs, word):
    folder = tmp_path / "run"
    message = refuses(capsys, 2, script.train, Args(run_dir=str(folder), **kwargs))
    assert any(part in message for part in word.split("|"))
    assert not folder.exists()


def test_starts_without_torch():
    code = "import sys, sarsa; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    folder = script.__file__.rsplit("/", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


# --- the random walk ---


@pytest.mark.filterwarnings("ignore:.*spec")
def test_the_walk_keeps_gymnasiums_rules():
    check_env(gym.make(WALK, render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("n", [1, 5, 19])
def test_the_walk(n):
    env = gym.make(WALK, num_states=n, left_reward=-2, right_reward=3)
    assert env.observation_space.n == n + 2 and env.action_space.n == 1
    ends, rights, steps = [], 0, 0
    for episode in range(400):
        state, _ = env.reset(seed=episode)
        assert state == (n + 1) // 2
        terminated = False
        while not terminated:
            last = state
            state, reward, terminated, truncated, _ = env.step(0)
            assert abs(state - last) == 1 and not truncated
            assert terminated == (state in (0, n + 1))
            assert reward == (-2 if state == 0 else 3 if state == n + 1 else 0)
            rights += state > last
            steps += 1
        ends.append(state)
    assert rights / steps == pytest.approx(0.5, abs=2.5 / math.sqrt(steps))
    assert 0.42 < np.mean(np.array(ends) > 0) < 0.58
    # From the middle it takes (n + 1)² / 4 steps on average.
    assert steps / 400 == pytest.approx((n + 1) ** 2 / 4, rel=0.2)


def test_the_same_seed_is_the_same_walk():
    def walk(seed):
        env = gym.make(WALK)
        env.reset(seed=seed)
        return [env.unwrapped.step(0)[0] for _ in range(9)]

    assert walk(1) == walk(1) and len({tuple(walk(seed)) for seed in range(9)}) > 5


def test_values_that_the_walk_knows():
    walk = gym.make(WALK, num_states=5, left_reward=0).unwrapped
    assert walk.values() == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert gym.make(WALK).unwrapped.values() == pytest.approx(np.linspace(-0.9, 0.9, 19))
    v = gym.make(WALK, num_states=3, left_reward=-4).unwrapped.values(gamma=0.5)
    assert v == pytest.approx([-2 + v[1] / 4, v[0] / 4 + v[2] / 4, v[1] / 4 + 0.5])
    assert gym.make(WALK, num_states=1, right_reward=5).unwrapped.values() == pytest.approx([2.0])


def test_the_walk_is_drawn():
    env = gym.make(WALK, num_states=3, render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (20, 100, 3) and frame.dtype == np.uint8
    assert [frame[10, 20 * i + 10].tolist() == [255] * 3 for i in range(5)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert gym.make(WALK).unwrapped.render() is None


@pytest.mark.parametrize(
    "options",
    [
        {"num_states": 4},
        {"num_states": 0},
        {"num_states": -1},
        {"num_states": 5.0},
        {"left_reward": math.inf},
        {"right_reward": "1"},
        {"render_mode": "human"},
    ],
)
def test_the_walk_refuses(options):
    with pytest.raises(ValueError):
        type(gym.make(WALK).unwrapped)(**options)


@pytest.mark.parametrize("n", [1, 5])
def test_a_walk_that_is_over_needs_a_reset(n):
    env = gym.make(WALK, num_states=n).unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    for seed in range(9):  # both ends
        env.reset(seed=seed)
        while not env.step(0)[2]:
            pass
        with pytest.raises(gym.error.ResetNeeded):
            env.step(0)
        assert env.state in (0, n + 1)


def test_the_walk_has_one_action():
    env = gym.make(WALK).unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        env.step(1)


# --- the numbers of the book that are exact ---


def test_exact_numbers_of_the_book():
    for row, exploring, greedy in book_figures.WAYS.values():
        assert book_figures.worth(book_figures.way(row), 0.1) == pytest.approx(exploring, abs=0.05)
        assert book_figures.worth(book_figures.way(row), 0.0) == pytest.approx(greedy)
    assert book_figures.worth_in_blackjack(book_figures.best_in_blackjack()) == pytest.approx(
        -0.0431, abs=5e-5
    )
    for limit, mark in ((20, -0.350), (17, -0.076)):
        policy = np.zeros((32, 11, 2), dtype=int)
        policy[:limit] = 1
        assert book_figures.worth_in_blackjack(policy) == pytest.approx(mark, abs=5e-4)
