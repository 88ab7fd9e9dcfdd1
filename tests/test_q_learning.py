"""Q-learning: a run against a slow one, the two kinds of ending, the values it must find, its table file."""

import gc
import json
import math
import os
import random
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import q_learning as script
from gymnasium.utils import seeding
from q_learning import Args, epsilon_at, greedy_action, start_seeds, step_size, td_target
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SLIPPERY = '{"is_slippery": true}'
draw_policy = script.draw_policy


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch):
    """No picture, which takes longer than a short run; and Ctrl-C as before."""
    monkeypatch.setattr(script, "draw_policy", lambda args, run_dir: None)
    yield
    free_the_folder()


def free_the_folder():
    """Signal handlers keep a run alive that ended early, and with it the lock of its folder."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()


class Ring(gym.Env):
    """States 0, 1, 2, 0, … with rewards 1, 2, 3; one action. The end, if any, is in state 0 after 3 steps."""

    observation_space = gym.spaces.Discrete(3)
    action_space = gym.spaces.Discrete(1)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, terminated=False, truncated=False, nan_after=math.inf, signal_at=0, render_mode=None):
        self.ending = (terminated, truncated)
        self.nan_after = nan_after
        self.signal_at = signal_at
        self.render_mode = render_mode
        self.total = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return 0, {}

    def step(self, action):
        self.steps += 1
        self.total += 1
        if self.total == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        reward = float((1, 2, 3)[(self.steps - 1) % 3]) if self.total <= self.nan_after else math.nan
        ended = self.steps == 3
        return self.steps % 3, reward, ended and self.ending[0], ended and self.ending[1], {}

    def render(self):
        return np.full((32, 32, 3), self.steps, dtype=np.uint8)


class Maze(gym.Env):
    """Five states, three actions, chance in everything, and episodes that end in every way."""

    observation_space = gym.spaces.Discrete(5)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(4))
        return self.state, {}

    def step(self, action):
        self.state = int((self.state + self.np_random.integers(1, 3) * action + 1) % 5)
        terminated = bool(self.np_random.random() < 0.1)
        truncated = bool(self.np_random.random() < 0.1)
        reward = float(self.state - 2 * action + self.np_random.integers(2))
        return self.state, reward, terminated, truncated, {}


class Lottery(gym.Env):
    """An episode of 1 to 8 steps, drawn at its start. Action 1 pays 1, 2, 3, …, action 0 nothing."""

    observation_space = gym.spaces.Discrete(9)
    action_space = gym.spaces.Discrete(2)
    seeds = []

    def __init__(self, render_mode=None):
        self.over = True

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.left = self.length = int(self.np_random.integers(1, 9))
        self.over = False
        return self.left, {}

    def step(self, action):
        assert not self.over, "a step after the end"
        self.left -= 1
        self.over = self.left == 0
        reward = float(action * (self.length - self.left))
        odd = self.length % 2 == 1
        return self.left, reward, self.over and odd, self.over and not odd, {}


class Odd(gym.Env):
    """Any spaces at all."""

    def __init__(self, observation_space, action_space, render_mode=None):
        self.observation_space = observation_space
        self.action_space = action_space


gym.register("Ring-v0", Ring)
gym.register("Maze-v0", Maze)
gym.register("Lottery-v0", Lottery)
gym.register("Odd-v0", Odd)


def run(folder, **kwargs):
    """Train; return the results, the table (|S|, |A|) and the visits (|S|, |A|)."""
    kwargs = {"eval_episodes": 1} | kwargs
    results = script.train(Args(run_dir=str(folder), **kwargs))
    file = saved(folder)
    return results, file["q_table"], file["visits"]


def saved(folder):
    """What the table file holds."""
    with np.load(folder / "q_table.npz", allow_pickle=False) as file:
        return dict(file)


def charts(folder):
    """All points of all charts."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def ring(folder, max_steps=3, episodes=2, **ending):
    args = {"env_id": "Ring-v0", "env_kwargs": json.dumps(ending), "learning_rate": 0.5, "gamma": 0.8}
    return run(folder, **args, total_episodes=episodes, max_steps=max_steps)[1][:, 0]


def value_iteration(env, gamma):
    """Q* (|S|, |A|) from the environment's own table of transitions."""
    table = env.unwrapped.P
    q = np.zeros((len(table), len(table[0])))
    for _ in range(3000):
        v = q.max(1)
        q = np.array(
            [
                [sum(p * (r + gamma * v[s2] * (not end)) for p, s2, r, end in table[s][a]) for a in table[s]]
                for s in table
            ]
        )
    return q


def solved_lake(folder):
    """A run folder whose table is Q* of the default lake."""
    q_table = value_iteration(gym.make("FrozenLake-v1", is_slippery=False), 0.95).tolist()
    write_table(folder, q_table)


def write_table(folder, q_table, **values):
    state = {
        "global_step": 3000,
        "episodes": 30,
        "wall_time_s": 0.5,
        "recent_returns": [1.0],
        "curve": [(1, 0.0)],
    }
    state |= {"rng_state": random.Random(1).getstate()[1], "q_table": q_table, "visits": q_table}
    script.save_checkpoint(folder, state | values)


def refuses(capsys, code, function, *args):
    """The call ends with this exit code and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == code and len(lines) == 1
    return lines[0]


# ---- The whole of it, against a slow one ----


def slow_q_learning(args):
    """The pseudo-code and the equations of the docstring, slow and with none of the script's functions.

    Returns the table, the visits and, for each episode, ε, the sum of its rewards, its length and Σ|δ|.
    """
    env = gym.make(args.env_id)
    env.reset(seed=int(np.random.SeedSequence((args.seed, 0, 0)).generate_state(1)[0]))
    rng = random.Random(args.seed)
    shape = (int(env.observation_space.n), int(env.action_space.n))
    Q = np.zeros(shape)
    n = np.zeros(shape, dtype=int)
    endings = set()
    episodes = []
    for k in range(args.total_episodes):
        epsilon = args.min_epsilon + (args.max_epsilon - args.min_epsilon) * np.exp(-args.decay_rate * k)
        s, _ = env.reset()
        rewards, errors = [], []
        while True:
            if rng.random() < epsilon:
                a = rng.randrange(shape[1])
            else:
                best = [a for a in range(shape[1]) if Q[s, a] == max(Q[s])]
                a = rng.choice(best) if len(best) > 1 and args.random_ties else best[0]
            next_s, r, terminated, truncated, _ = env.step(a)
            y = r
            for next_a in range(shape[1]):
                y = max(y, r + args.gamma * Q[next_s, next_a]) if next_a else r + args.gamma * Q[next_s, 0]
            if terminated:
                y = r
            delta = y - Q[s, a]
            alpha = args.learning_rate
            if args.lr_visits:
                alpha = args.learning_rate * args.lr_visits / (args.lr_visits + n[s, a])
            Q[s, a] = Q[s, a] + alpha * delta
            n[s, a] = n[s, a] + 1
            s = next_s
            rewards.append(r)
            errors.append(abs(delta))
            if terminated or truncated or len(rewards) == args.max_steps:
                break
        endings.add((terminated, truncated))
        episodes.append((epsilon, sum(rewards), len(rewards), sum(errors)))
    assert len(endings) == 4  # each in the test
    return Q, n, np.array(episodes)


@pytest.mark.parametrize("kwargs", [{"lr_visits": 30.0}, {"random_ties": False, "seed": 7}])
def test_a_run_equals_a_slow_one_by_the_equations(tmp_path, kwargs):
    # Three episodes a point of the charts, and two for the last one.
    args = {"env_id": "Maze-v0", "total_episodes": 305, "max_steps": 9, "decay_rate": 0.01, "gamma": 0.9}
    args |= {"max_epsilon": 0.9, "min_epsilon": 0.1, "learning_rate": 0.3} | kwargs
    results, q_table, visits = run(tmp_path, **args)
    Q, n, episodes = slow_q_learning(Args(**args))
    np.testing.assert_allclose(q_table, Q, rtol=1e-10)
    np.testing.assert_array_equal(visits, n)
    steps = episodes[:, 2].cumsum()
    assert results["global_step"] == steps[-1] and results["episodes"] == 305
    file = saved(tmp_path)
    np.testing.assert_allclose(file["recent_returns"], episodes[-100:, 1])
    ends = [*range(3, 305, 3), 305]
    groups = np.split(episodes, ends[:-1])
    expected = {
        "charts/epsilon": [group[-1, 0] for group in groups],
        "charts/episodic_return": [group[:, 1].mean() for group in groups],
        "charts/episodic_length": [group[:, 2].mean() for group in groups],
        "losses/td_error": [group[:, 3].sum() / group[:, 2].sum() for group in groups],
    }
    logged = charts(tmp_path)
    speeds = logged.pop("charts/SPS")
    assert len(speeds) == len(ends) and all(0 < speed < 1e7 for _, speed in speeds)
    assert set(logged) == set(expected)
    for tag, points in logged.items():
        assert [step for step, _ in points] == [steps[end - 1] for end in ends], tag
        np.testing.assert_allclose([value for _, value in points], expected[tag], rtol=1e-5, err_msg=tag)
    np.testing.assert_allclose(
        file["curve"], np.column_stack([ends, expected["charts/episodic_return"]]), rtol=1e-12
    )


def test_the_maze_of_the_docstring():
    """The corridor that is worked by hand: the four Bellman equations give its numbers."""
    text = " ".join(script.__doc__.split())
    V = np.zeros(5)  # tile 0 is the wall, 4 the goal
    V_pi = np.zeros(5)
    for _ in range(500):
        V[0], V_pi[0] = V[1], V_pi[1]
        right = [0.9 * V[2], 0.9 * V[3], 1]
        right_pi = [0.9 * V_pi[2], 0.9 * V_pi[3], 1]
        left = [0.9 * V[tile - 1] for tile in (1, 2, 3)]
        left_pi = [0.9 * V_pi[tile - 1] for tile in (1, 2, 3)]
        V[1:4] = np.maximum(left, right)
        V_pi[1:4] = (np.array(left_pi) + right_pi) / 2
    assert "V*(3) = 1, V*(2) = 0 + 0.9 V*(3) = 0.9, V*(1) = 0 + 0.9 V*(2) = 0.81" in text
    assert V[1:4] == pytest.approx([0.81, 0.9, 1])
    assert f"Q*(2,left) = 0 + 0.9 V*(1) = {0.9 * V[1]:.3f}" in text
    assert "V^π = " + ", ".join(f"{value:.3f}" for value in V_pi[1:4]) in text
    parts = (V_pi[1] * 0.45, V_pi[3] * 0.45)
    assert f"= {parts[0]:.3f} + {parts[1]:.3f} = {V_pi[2]:.3f}" in text
    assert "0.77 = γ⁵" in text and round(0.95**5, 2) == 0.77


# ---- The formulas ----


def test_target():
    assert td_target(3.0, [1.0, 7.0, 2.0], False, 0.9) == pytest.approx(9.3)
    assert td_target(3.0, [1.0, 7.0, 2.0], True, 0.9) == 3.0


def test_epsilon_falls_from_end_to_end():
    assert epsilon_at(0, 0.9, 0.1, 0.01) == pytest.approx(0.9)
    assert epsilon_at(100, 0.9, 0.1, 0.01) == pytest.approx(0.1 + 0.8 / math.e)
    assert epsilon_at(10**6, 0.9, 0.1, 0.01) == pytest.approx(0.1)


def test_step_size():
    assert step_size(0.6, 0, 50) == 0.6
    assert step_size(0.6, 50, 50) == pytest.approx(0.3)
    assert step_size(0.6, 150, 50) == pytest.approx(0.15)
    assert step_size(0.6, 10**6, 0) == 0.6
    # Robbins and Monro: the sum passes every bound (each decade adds c·α·ln 10), that of squares does not.
    rates = [step_size(0.6, n, 50) for n in range(10**5)]
    assert sum(rates[10**4 :]) == pytest.approx(50 * 0.6 * math.log(10), rel=0.01)
    assert sum(rate**2 for rate in rates[10**4 :]) == pytest.approx(30**2 / 10**4, rel=0.15)


def test_ties_are_drawn_among_the_best_only():
    rng = random.Random(0)
    drawn = [greedy_action([1.0, 5.0, 5.0, 0.0, 5.0], rng) for _ in range(3000)]
    counts = np.bincount(drawn, minlength=5)
    assert counts[0] == counts[3] == 0 and counts[[1, 2, 4]].min() > 900
    assert greedy_action([1.0, 5.0, 5.0]) == 1
    state = rng.getstate()
    assert greedy_action([1.0, 9.0, 5.0], rng) == 1 and rng.getstate() == state


def test_exploring_share(tmp_path):
    # The lake's first tile, one step an episode: of four actions the best one keeps 1 − 0.4 · 3/4.
    lake = {"max_epsilon": 0.4, "min_epsilon": 0.4, "max_steps": 1, "random_ties": False}
    _, _, visits = run(tmp_path / "a", total_episodes=4000, **lake)
    assert visits[0].sum() == 4000 and visits[1:].sum() == 0
    assert visits[0, 0] / 4000 == pytest.approx(0.7, abs=0.03)
    assert visits[0, 1:] / 4000 == pytest.approx(0.1, abs=0.02)


# α = ½, γ = 0.8, two rounds through the ring; the last step ends in state 0, whose value is not 0 then:
#   first   Q(0) = ½ · 1 = 0.5   Q(1) = ½ · 2 = 1   Q(2) = ½ (3 + 0.8 · 0.5) = 1.7, or ½ · 3 = 1.5 at an end
#   second  Q(0) = ½ (0.5 + 1 + 0.8 · 1) = 1.15   Q(1) = ½ (1 + 2 + 0.8 Q(2)) = 2.18, or 2.1
#           Q(2) = ½ (1.7 + 3 + 0.8 · 1.15) = 2.81, or ½ (1.5 + 3) = 2.25
BOOTSTRAPPED = [1.15, 2.18, 2.81]
ENDED = [1.15, 2.1, 2.25]


@pytest.mark.parametrize(
    ("ending", "values"),
    [
        ({"terminated": True}, ENDED),
        ({"truncated": True}, BOOTSTRAPPED),
        ({"terminated": True, "truncated": True}, ENDED),
        ({}, BOOTSTRAPPED),
    ],
)
def test_endings(tmp_path, monkeypatch, ending, values):
    # A ring without an end would be walked until the longest evaluation is over.
    monkeypatch.setattr(script, "MAX_EVAL_STEPS", 10)
    assert ring(tmp_path, **ending) == pytest.approx(values, abs=1e-12)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["mean_reward"] == (6 if ending else 19)  # 6 a round: 10 steps are 6 + 6 + 6 + 1


def test_an_episode_ends_where_the_environment_says(tmp_path, monkeypatch):
    # The limit of 50 steps is never reached: three steps an episode.
    monkeypatch.setattr(script, "MAX_EVAL_STEPS", 10)
    assert ring(tmp_path, max_steps=50, terminated=True) == pytest.approx(ENDED, abs=1e-12)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["global_step"] == 6 and results["episodes"] == 2 and results["mean_reward"] == 6.0


# ---- Evaluation and film ----


def test_evaluation_is_greedy_exact_and_on_seeds_of_its_own(tmp_path, capsys, monkeypatch):
    Lottery.seeds = []
    args = Args(env_id="Lottery-v0", total_episodes=50, eval_episodes=23, seed=5, run_dir=str(tmp_path))
    results = script.train(args)
    training = [seed for seed in Lottery.seeds[:51] if seed is not None]
    evaluation = Lottery.seeds[51:]
    words = np.random.SeedSequence
    expected = [int(seed) for seed in words((5, 1, 0)).generate_state(20)]
    expected += [int(seed) for seed in words((5, 1, 20)).generate_state(3)]
    assert training == [int(words((5, 0, 0)).generate_state(1)[0])]
    assert evaluation == expected and not set(training) & set(evaluation)
    # A table that takes action 1 with an even number of steps to go: by its values, not by its visits.
    table = [[0.0, 1.0] if left % 2 == 0 else [1.0, 0.0] for left in range(9)]
    write_table(tmp_path, table)
    results = script.evaluate(args, tmp_path)
    returns = []
    for seed in expected:
        length = int(seeding.np_random(seed)[0].integers(1, 9))
        returns.append(sum(done + 1 for done in range(length) if (length - done) % 2 == 0))
    assert len(set(returns)) > 4
    assert results["mean_reward"] == pytest.approx(np.mean(returns), abs=1e-12)
    assert results["std_reward"] == pytest.approx(np.std(returns), abs=1e-12)
    assert results["score"] == pytest.approx(np.mean(returns) - np.std(returns), abs=1e-12)
    assert results["eval_episodes"] == 23 and results["global_step"] == 3000 and results["episodes"] == 30
    assert results["steps_per_second"] == 6000 and results["wall_time_s"] == 0.5
    assert results["algo"] == "q_learning" and results["env_id"] == "Lottery-v0" and results["seed"] == 5
    summary = capsys.readouterr().out.splitlines()[-1]
    assert f"{np.mean(returns):.2f} ± {np.std(returns):.2f} over 23 episodes after 3,000 steps" in summary


def test_an_evaluation_draws_among_equal_actions(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MAX_EVAL_STEPS", 10)
    env = script.make_env(Args())
    write_table(tmp_path, [[0.0] * 4] * 16)
    drawn = []
    for seed in (1, 1, 2):
        policy, _ = script.load_policy(Args(seed=seed), env, tmp_path)
        drawn.append([policy(0) for _ in range(40)])
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0]) == {0, 1, 2, 3}
    policy, _ = script.load_policy(Args(random_ties=False), env, tmp_path)
    assert {policy(0) for _ in range(40)} == {0}


def test_start_seeds():
    assert start_seeds(Args(env_id="Taxi-v4"), 101)[-3:] == [28, 148, 16]
    assert len(script.TAXI_SEEDS.split(",")) == 100
    assert start_seeds(Args(eval_seeds="7,8,9"), 4) == [7, 8, 9, 7]
    drawn = start_seeds(Args(seed=1), 40) + start_seeds(Args(seed=2), 40)
    assert len(set(drawn)) == 80 and start_seeds(Args(seed=1), 25) == drawn[:25]


def test_the_last_picture_of_a_film_shows_the_goal(tmp_path):
    import imageio_ffmpeg

    solved_lake(tmp_path)
    script.evaluate(Args(capture_video=True, eval_episodes=1), tmp_path)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "replay.mp4"))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3).astype(float) for frame in reader]
    assert len(frames) == 7  # the start and six steps
    env = gym.make("FrozenLake-v1", is_slippery=False, render_mode="rgb_array")
    env.reset()
    pictures = [env.render()]
    for action in (1, 1, 2, 1, 2, 2):
        env.step(action)
        pictures.append(env.render())
    # The tile of the goal, 64 x 64 pixels: with the elf in the last picture and in no other.
    goals = [
        np.asarray(picture, dtype=float)[192:, 192:] for picture in (frames[-1], pictures[-1], pictures[-2])
    ]
    assert np.abs(goals[0] - goals[1]).mean() < 0.2 * np.abs(goals[0] - goals[2]).mean()
    start = [np.asarray(picture, dtype=float)[:64, :64] for picture in (frames[0], pictures[0], pictures[1])]
    assert np.abs(start[0] - start[1]).mean() < 0.2 * np.abs(start[0] - start[2]).mean()
    assert not list(tmp_path.glob("tmp-*"))


def test_a_film_without_an_end_is_cut(tmp_path, monkeypatch):
    import imageio_ffmpeg

    monkeypatch.setattr(script, "MAX_EVAL_STEPS", 20)
    for ending, frames in (({}, 21), ({"truncated": True}, 4)):
        args = Args(env_id="Ring-v0", env_kwargs=json.dumps(ending))
        script.record_video(args, lambda state: 0, tmp_path / "replay.mp4")
        assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "replay.mp4"))[0] == frames


# ---- The run folder ----


def test_resume_is_as_if_never_stopped(tmp_path):
    # The lake without slipping needs no chance of its own, so that the runs must agree to the last bit.
    whole = run(tmp_path / "whole", total_episodes=500, lr_visits=30)
    run(tmp_path / "parts", total_episodes=200, lr_visits=30)
    parts = run(tmp_path / "parts", total_episodes=500, lr_visits=30, resume=str(tmp_path / "parts"))
    np.testing.assert_array_equal(whole[1], parts[1])
    np.testing.assert_array_equal(whole[2], parts[2])
    assert whole[0]["global_step"] == parts[0]["global_step"] and whole[1].any()
    a, b = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    for name in ("rng_state", "recent_returns", "episodes"):
        np.testing.assert_array_equal(a[name], b[name])
    assert a["curve"].shape == (100, 2) and b["curve"][-1, 0] == 500 and len(b["curve"]) > 150
    assert (
        charts(tmp_path / "whole")["charts/epsilon"][-1] == charts(tmp_path / "parts")["charts/epsilon"][-1]
    )
    # The second half starts its environment from a seed of its own: the steps played are a part of it.
    Lottery.seeds = []
    lottery = {"env_id": "Lottery-v0", "eval_episodes": 1, "run_dir": str(tmp_path / "lottery")}
    steps = script.train(Args(total_episodes=10, **lottery))["global_step"]
    script.train(Args(total_episodes=20, resume=str(tmp_path / "lottery"), **lottery))
    seeds = [seed for seed in Lottery.seeds if seed is not None]
    assert seeds[2] == int(np.random.SeedSequence((1, 0, steps)).generate_state(1)[0]) != seeds[0]
    # Speed counts the time of both halves.
    assert saved(tmp_path / "parts")["wall_time_s"] > 0


def test_charts(tmp_path):
    args = {"total_episodes": 200, "max_steps": 5, "eval_episodes": 1, "run_dir": str(tmp_path)}
    args |= {"max_epsilon": 0.0, "min_epsilon": 0.0, "random_ties": False}  # always left, into the wall
    script.train(Args(**args))
    lengths = charts(tmp_path)["charts/episodic_length"]
    assert lengths == [(step, 5.0) for step in range(10, 1001, 10)]
    # What a killed run drew beyond its last checkpoint is dropped when it is drawn again.
    np.savez(tmp_path / "q_table.npz", **(saved(tmp_path) | {"global_step": 500, "episodes": 100}))
    script.train(Args(resume=str(tmp_path), **args))
    assert [step for step, _ in charts(tmp_path)["charts/episodic_length"]] == list(range(10, 1001, 10))


def test_a_point_of_the_charts_is_due(tmp_path):
    due = {}
    for budget in (50, 250, 10**6):
        progress = script.Run(
            Args(run_dir=str(tmp_path / str(budget))), budget, [[0.0]], [[0]], random.Random()
        )
        due[budget] = []
        for progress.episodes in range(1, 3001):
            if progress.log_is_due() and progress.episodes <= budget:
                due[budget].append(progress.episodes)
        progress.bar.close()
        progress.writer.close()
        progress.lock.close()
    assert due == {50: [*range(1, 51)], 250: [*range(2, 251, 2)], 10**6: [1000, 2000, 3000]}


@pytest.mark.parametrize(("every", "most"), [(100, 100), (7, 7), (2, 5)])
def test_a_kill_loses_little(tmp_path, monkeypatch, every, most):
    steps = []
    save = script.save_checkpoint
    monkeypatch.setattr(
        script,
        "save_checkpoint",
        lambda folder, state: (steps.append(state["global_step"]), save(folder, state)),
    )
    args = {"max_epsilon": 0.0, "min_epsilon": 0.0, "random_ties": False}  # five steps each episode
    run(tmp_path, total_episodes=60, max_steps=5, checkpoint_every=every, **args)
    assert steps[0] == 0 and steps[-1] == 300
    # No more than asked for, and not far less: an episode may always become its longest.
    assert set(np.diff(steps)) == {most // 5 * 5}


def test_a_signal_saves_and_the_run_can_go_on(tmp_path, capsys):
    args = {"env_id": "Ring-v0", "max_steps": 3, "eval_episodes": 1, "run_dir": str(tmp_path)}
    args |= {"checkpoint_every": 10**9, "learning_rate": 0.1}

    def stopped(**kwargs):
        with pytest.raises(SystemExit) as stop:
            script.train(Args(**args, **kwargs))
        return stop.value.code

    ends = '{"terminated": true, "signal_at": 8}'
    assert stopped(env_kwargs=ends, total_episodes=10) == 128 + signal.SIGTERM
    free_the_folder()
    assert f"--resume {tmp_path}" in capsys.readouterr().err and not (tmp_path / "results.json").exists()
    file = saved(tmp_path)
    assert file["global_step"] == 9 and file["episodes"] == 3 and file["curve"][-1, 0] == 3
    ends = '{"terminated": true}'
    results = script.train(Args(**args, env_kwargs=ends, total_episodes=10, resume=str(tmp_path)))
    assert results["episodes"] == 10 and results["global_step"] == 30
    whole = script.train(
        Args(**args | {"run_dir": str(tmp_path / "whole")}, env_kwargs=ends, total_episodes=10)
    )
    assert whole["global_step"] == 30
    np.testing.assert_array_equal(saved(tmp_path)["q_table"], saved(tmp_path / "whole")["q_table"])


def test_an_evaluation_can_be_interrupted(tmp_path):
    write_table(tmp_path, [[0.0]] * 3)
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the evaluation left the handler as it was"))
    args = Args(env_id="Ring-v0", env_kwargs='{"signal_at": 5}')
    with pytest.raises(SystemExit) as stop:
        script.evaluate(args, tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM


def test_two_processes_cannot_share_a_folder(tmp_path, capsys):
    args = Args(run_dir=str(tmp_path))
    first = script.Run(args, 10, [[0.0]], [[0]], random.Random())
    assert "another process" in refuses(capsys, 2, script.Run, args, 10, [[0.0]], [[0]], random.Random())
    first.bar.close()
    first.lock.close()


def test_an_error_that_is_no_number_stops_the_run(tmp_path, capsys):
    args = Args(
        env_id="Ring-v0",
        env_kwargs='{"terminated": true, "nan_after": 100}',
        checkpoint_every=6,
        max_steps=3,
        run_dir=str(tmp_path),
    )
    assert "step 102;" in refuses(capsys, 1, script.train, args)
    file = saved(tmp_path)
    assert np.isfinite(file["q_table"]).all() and 93 <= file["global_step"] <= 99


class Boom:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_a_table_of_a_stranger_runs_no_code(tmp_path, capsys):
    args = Args(total_episodes=5, eval_episodes=1, run_dir=str(tmp_path))
    script.train(args)
    path = tmp_path / "q_table.npz"
    good = saved(tmp_path)
    object_array = np.array([Boom()], dtype=object)
    damages = {
        "pickle": lambda: np.savez(path, **(good | {"q_table": object_array})),
        "q_table": lambda: np.savez(path, **(good | {"q_table": good["q_table"].T})),
        "visits": lambda: np.savez(path, **(good | {"visits": good["visits"][1:]})),
        "rng_state": lambda: np.savez(path, **{k: v for k, v in good.items() if k != "rng_state"}),
        "state": lambda: np.savez(path, **(good | {"rng_state": good["rng_state"][:9]})),
        "global_step": lambda: np.savez(path, **(good | {"global_step": np.array("many")})),
        "wall_time_s": lambda: np.savez(path, **(good | {"wall_time_s": np.nan})),
        "curve": lambda: np.savez(path, **(good | {"curve": good["curve"].ravel()})),
        "zip": lambda: path.write_bytes(path.read_bytes()[:200]),
        "No such file": path.unlink,
    }
    for word, damage in damages.items():
        damage()
        with open(tmp_path / "pickled.npy", "wb") as file:
            np.save(file, object_array, allow_pickle=True)
        message = refuses(capsys, 2, script.evaluate, args, tmp_path)
        assert str(path) in message and word in message, message
        assert "never" not in message
        assert str(path) in refuses(capsys, 2, script.train, Args(total_episodes=9, resume=str(tmp_path)))


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path, capsys):
    solved_lake(tmp_path)
    path = tmp_path / "q_table.npz"
    whole = path.read_bytes()
    good = script.load_checkpoint(tmp_path, 16, 4)
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        capsys.readouterr()
        try:
            assert script.load_checkpoint(tmp_path, 16, 4) == good
        except SystemExit as stop:
            refused += 1
            assert stop.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert refused > 200


# ---- Bad input ----


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"env_id": "FrozenLake-v9"}, "FrozenLake-v1"),
        ({"env_id": "a:b:c"}, "a:b:c"),
        ({"env_id": ":"}, "module"),
        ({"env_id": ""}, "cannot make"),
        ({"env_kwargs": "{not json"}, "JSON"),
        ({"env_kwargs": "[1]"}, "TypeError"),
        ({"env_kwargs": ""}, "JSON"),
        ({"env_kwargs": '{"map_name": "9x9"}'}, "9x9"),
        ({"env_kwargs": '{"wings": 2}'}, "wings"),
        ({"env_id": "CartPole-v1"}, "ppo.py"),
        ({"env_id": "Pendulum-v1"}, "a2c_continuous.py"),
        ({"env_id": "Maze-v0", "capture_video": True}, "--capture-video"),
        ({"eval_seeds": "1,x"}, "16,54,165"),
        ({"eval_seeds": ","}, "16,54,165"),
        ({"eval_seeds": "1" * 5000}, "16,54,165"),
        ({"eval_seeds": str(2**32)}, "16,54,165"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": 1.5}, "--learning-rate"),
        ({"gamma": 1.01}, "--gamma"),
        ({"min_epsilon": 0.6, "max_epsilon": 0.5}, "--min-epsilon"),
        ({"max_epsilon": 1.1}, "--max-epsilon"),
        ({"decay_rate": -0.1}, "--decay-rate"),
        ({"lr_visits": -1.0}, "--lr-visits"),
        ({"max_steps": 0}, "--max-steps"),
        ({"total_episodes": 0}, "--total-episodes"),
        ({"seed": 2**32}, "--seed"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, kwargs, word):
    folder = tmp_path / "run"
    assert word in refuses(capsys, 2, script.train, Args(run_dir=str(folder), **kwargs))
    assert not folder.exists()
    assert word in refuses(capsys, 2, script.evaluate, Args(**kwargs), folder)


def test_every_number_has_a_range_and_its_ends_are_allowed():
    fields = Args.__dataclass_fields__.values()
    assert set(script.RANGES) == {field.name for field in fields if field.type in (int, float)}
    for name, (low, high) in script.RANGES.items():
        for value in (low, high):
            if name != "max_epsilon" or value:  # ε would rise
                script.check_args(Args(**{"min_epsilon": 0.0, name: value}))


STRANGE = ["nan", "inf", "-inf", "-1", "0", "1e30", str(10**23), "text"]
SWITCHES = ["random_ties", "capture_video", "track"]


@pytest.mark.parametrize("field", [name for name in Args.__dataclass_fields__ if name not in SWITCHES])
def test_strange_input_is_refused_or_makes_sense(field, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script.train(Args(total_episodes=5, eval_episodes=1, run_dir="trained"))
    base = ["q_learning.py", "--total-episodes", "20", "--eval-episodes", "2", "--max-steps", "20"]
    outcomes = []
    for number, value in enumerate(STRANGE):
        flag = "--" + field.replace("_", "-")
        folder = [] if field in ("run_dir", "resume") else ["--run-dir", f"run{number}"]
        monkeypatch.setattr(sys, "argv", [*base, *folder, flag, value])
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()
        try:
            args = script.parse_args()
            results = script.train(args)
            assert not args.evaluate and math.isfinite(results["score"]) and 0 < results["episodes"] <= 20
            outcomes.append("ran")
        except SystemExit as stop:
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert stop.code == 2 and len(lines) == 1, (value, lines)
            assert set(tmp_path.rglob("*")) == before
            outcomes.append("refused")
    if field in script.RANGES:
        assert outcomes[:4] == ["refused"] * 4 and outcomes[5:] == ["refused"] * 3


def test_spaces_are_sent_to_their_script(capsys):
    discrete, box = gym.spaces.Discrete, gym.spaces.Box
    cases = [
        (box(0, 255, (84, 84, 3), np.uint8), discrete(4), "dqn_atari.py"),
        (discrete(5), box(-1, 1, (2,)), "a2c_continuous.py"),
        (gym.spaces.MultiBinary(5), discrete(2), "no script"),
        (discrete(5, start=1), discrete(2), "no script"),
        (gym.spaces.Tuple([discrete(5), box(0, 1)]), discrete(2), "no script"),
        (discrete(10_000_000), discrete(2), "too many"),
    ]
    for observations, actions, word in cases:
        gym.register("Odd-v1", Odd, kwargs={"observation_space": observations, "action_space": actions})
        assert word in refuses(capsys, 2, script.check_args, Args(env_id="Odd-v1"))
        del gym.registry["Odd-v1"]


def test_options_of_the_lake():
    def slips(**kwargs):
        table = script.make_env(Args(**kwargs)).unwrapped.P
        return len(table[0][0]) == 3, len(table)

    assert slips() == (False, 16)
    assert slips(env_kwargs="{}") == slips(env_kwargs=SLIPPERY) == (True, 16)
    assert slips(env_kwargs='{"map_name": "8x8", "is_slippery": false}') == (False, 64)
    assert slips(env_id="FrozenLake8x8-v1") == (True, 64)


# ---- What it must find ----


@pytest.mark.parametrize("size", ["4x4", "8x8"])
def test_values_of_the_lake(tmp_path, size):
    # All actions at random, and still the values of the greedy policy: this is what off-policy means.
    # Without slipping nothing is averaged, so that α = 1 is exact.
    options = f'{{"map_name": "{size}", "is_slippery": false}}'
    # On the large lake chance does not reach the goal: half of the actions are the best known ones.
    epsilon, episodes = (1.0, 3000) if size == "4x4" else (0.5, 8000)
    lake = {"env_kwargs": options, "max_epsilon": epsilon, "min_epsilon": epsilon, "learning_rate": 1.0}
    results, q_table, visits = run(tmp_path, total_episodes=episodes, gamma=0.9, max_steps=200, **lake)
    env = gym.make("FrozenLake-v1", **json.loads(options))
    oracle = value_iteration(env, 0.9)
    known = visits > 30
    assert known.sum() > (40 if size == "4x4" else 100)
    if size == "4x4":
        np.testing.assert_allclose(q_table[known], oracle[known], atol=1e-6)
    # Along the best path the goal is 6 or 14 steps away, then one less, …: γ^(distance − 1).
    state, distance = 0, 6 if size == "4x4" else 14
    while distance:
        assert q_table[state].max() == pytest.approx(0.9 ** (distance - 1), abs=1e-6)
        ((_, state, _, ended),) = env.unwrapped.P[state][int(q_table[state].argmax())]
        distance -= 1
    assert ended and results["mean_reward"] == 1.0


def test_falling_rates_find_the_mean(tmp_path):
    lake = {"env_kwargs": SLIPPERY, "max_epsilon": 1.0, "min_epsilon": 1.0, "gamma": 0.9}
    lake |= {"total_episodes": 6_000, "learning_rate": 0.5}
    oracle = value_iteration(gym.make("FrozenLake-v1"), 0.9)
    errors = []
    for lr_visits in (0, 100):
        _, q_table, visits = run(tmp_path / str(lr_visits), lr_visits=lr_visits, **lake)
        known = visits > 100
        assert known.sum() >= 36
        errors.append(np.abs(q_table - oracle)[known])
    # The best value is 0.64. The constant rate ends 0.16 from the truth on average, the falling one 0.056.
    assert errors[1].mean() < 0.07 and errors[1].max() < 0.25
    assert errors[0].mean() > 2 * errors[1].mean()


def test_taxi_learns_on_the_seeds_of_the_course(tmp_path):
    taxi = {"env_id": "Taxi-v4", "decay_rate": 0.005, "eval_episodes": 100, "random_ties": False}
    results, q_table, _ = run(tmp_path, total_episodes=2500, **taxi)
    # Driving at random earns about −770, an agent that never gets there −200.
    assert results["mean_reward"] > 5
    env = gym.make("Taxi-v4")
    returns = []
    for seed in script.TAXI_SEEDS.split(","):
        state, _ = env.reset(seed=int(seed))
        total, ended = 0, False
        while not ended:
            state, reward, terminated, truncated, _ = env.step(int(q_table[state].argmax()))
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    assert results["mean_reward"] == pytest.approx(np.mean(returns))
    assert results["score"] == pytest.approx(np.mean(returns) - np.std(returns))


def test_blackjack_is_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "draw_policy", draw_policy)
    args = {"env_id": "Blackjack-v1", "learning_rate": 0.05, "gamma": 1.0, "decay_rate": 0.001}
    results, q_table, visits = run(tmp_path, total_episodes=8000, eval_episodes=400, **args)
    assert q_table.shape == (32 * 11 * 2, 2)
    # Sums of 20 and 21 without an ace, whatever the dealer shows: state = (sum · 11 + card) · 2 + ace.
    high = [(total * 11 + card) * 2 for total in (20, 21) for card in range(1, 11)]
    assert visits[high].sum(1).min() > 0 and (q_table[high, 0] > q_table[high, 1]).mean() > 0.9
    assert results["mean_reward"] > -0.25  # at random: −0.39
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_run_solves_the_lake(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "draw_policy", draw_policy)
    from matplotlib.figure import Figure

    shown = []

    def save(figure, *args, **kwargs):
        shown.extend(text.get_text() for text in figure.axes[0].texts)

    monkeypatch.setattr(Figure, "savefig", save)
    results = script.train(Args(seed=123, run_dir=str(tmp_path)))
    assert results["score"] == results["mean_reward"] == 1.0 and results["eval_episodes"] == 100
    # The docstring's .77 at the start; next to the goal 1; the shortest way is shown.
    assert shown[0] in ("start ↓\n0.77", "start →\n0.77") and shown[14] == "→\n1.00"
    assert shown[5] == "hole" and shown[15] == "goal"


# ---- The page ----


def test_starts_without_torch():
    code = "import sys, q_learning; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    folder = script.__file__.rsplit("/", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0
