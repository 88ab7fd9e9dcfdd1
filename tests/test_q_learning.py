"""Q-learning: the update, the two kinds of ending, the values it must find, what its table file promises."""

import json
import math
import random
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import q_learning as script
from q_learning import Args, epsilon_at, greedy_action, start_seeds, step_size, td_target
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Ring(gym.Env):
    """States 0, 1, 2, 0, … with rewards 1, 2, 3; one action. The end, if any, is in state 0 after 3 steps."""

    observation_space, action_space = gym.spaces.Discrete(3), gym.spaces.Discrete(1)

    def __init__(self, terminated=False, truncated=False, nan_after=math.inf, render_mode=None):
        self.ending, self.nan_after, self.total = (terminated, truncated), nan_after, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return 0, {}

    def step(self, action):
        self.steps += 1
        self.total += 1
        reward = float((1, 2, 3)[(self.steps - 1) % 3]) if self.total <= self.nan_after else math.nan
        ended = self.steps == 3
        return self.steps % 3, reward, ended and self.ending[0], ended and self.ending[1], {}


class Odd(gym.Env):
    """Any spaces at all."""

    def __init__(self, observation_space, action_space, render_mode=None):
        self.observation_space, self.action_space = observation_space, action_space


gym.register("Ring-v0", Ring)
gym.register("Odd-v0", Odd)
SLIPPERY = '{"is_slippery": true}'


def run(folder, **kwargs):
    """Train; return the results, the table (S, A) and the visits (S, A)."""
    kwargs = {"eval_episodes": 1} | kwargs
    results = script.train(Args(run_dir=str(folder), **kwargs))
    with np.load(folder / "q_table.npz", allow_pickle=False) as file:
        return results, file["q_table"], file["visits"]


def ring(folder, max_steps=3, episodes=2, **ending):
    options = json.dumps(ending)
    args = {"env_id": "Ring-v0", "env_kwargs": options, "learning_rate": 0.5, "gamma": 0.8}
    # A ring without an end would be walked until the longest evaluation is over.
    return run(folder, **args, total_episodes=episodes, max_steps=max_steps)[1][:, 0]


def value_iteration(env, gamma):
    """Q* (S, A) from the environment's own table of transitions."""
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


def refuses(capsys, code, function, *args):
    """The call ends with this exit code and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == code and len(lines) == 1
    return lines[0]


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
BOOTSTRAPPED, ENDED = [1.15, 2.18, 2.81], [1.15, 2.1, 2.25]


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
    monkeypatch.setattr(script, "MAX_EVAL_STEPS", 10)
    assert ring(tmp_path, **ending) == pytest.approx(values, abs=1e-12)


def test_an_episode_ends_where_the_environment_says(tmp_path, monkeypatch):
    # The limit of 50 steps is never reached: three steps an episode, and the sum of rewards is the return.
    monkeypatch.setattr(script, "MAX_EVAL_STEPS", 10)
    assert ring(tmp_path, max_steps=50, terminated=True) == pytest.approx(ENDED, abs=1e-12)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["global_step"] == 6 and results["episodes"] == 2 and results["mean_reward"] == 6.0


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
    lake |= {"total_episodes": 15_000, "learning_rate": 0.5}
    oracle = value_iteration(gym.make("FrozenLake-v1"), 0.9)
    errors = []
    for lr_visits in (0, 100):
        _, q_table, visits = run(tmp_path / str(lr_visits), lr_visits=lr_visits, **lake)
        known = visits > 100
        assert known.sum() >= 40
        errors.append(np.abs(q_table - oracle)[known])
    # The best value is 0.64. The constant rate ends 0.18 from the truth on average, the falling one 0.03.
    assert errors[1].mean() < 0.06 and errors[1].max() < 0.2
    assert errors[0].mean() > 2 * errors[1].mean()


def test_taxi_learns_on_the_seeds_of_the_course(tmp_path):
    taxi = {"env_id": "Taxi-v4", "decay_rate": 0.005, "eval_episodes": 100, "random_ties": False}
    results, q_table, _ = run(tmp_path, total_episodes=5000, **taxi)
    # Driving at random earns about −770, an agent that never gets there −200.
    assert results["mean_reward"] > 5
    env, returns = gym.make("Taxi-v4"), []
    for seed in script.TAXI_SEEDS.split(","):
        state, _ = env.reset(seed=int(seed))
        total, ended = 0, False
        while not ended:
            state, reward, terminated, truncated, _ = env.step(int(q_table[state].argmax()))
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    assert results["mean_reward"] == pytest.approx(np.mean(returns))
    assert results["score"] == pytest.approx(np.mean(returns) - np.std(returns))
    # A point of the curve is the mean of its own fifty episodes, not of all so far.
    with np.load(tmp_path / "q_table.npz") as file:
        assert file["curve"][-1] == pytest.approx([5000, file["recent_returns"][-50:].mean()])


def test_blackjack_is_numbered(tmp_path):
    args = {"env_id": "Blackjack-v1", "learning_rate": 0.05, "gamma": 1.0, "decay_rate": 0.001}
    results, q_table, visits = run(tmp_path, total_episodes=8000, eval_episodes=400, **args)
    assert q_table.shape == (32 * 11 * 2, 2)
    # Sums of 20 and 21 without an ace, whatever the dealer shows: state = (sum · 11 + card) · 2 + ace.
    high = [(total * 11 + card) * 2 for total in (20, 21) for card in range(1, 11)]
    assert visits[high].sum(1).min() > 0 and (q_table[high, 0] > q_table[high, 1]).mean() > 0.9
    assert results["mean_reward"] > -0.25  # at random: −0.39
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")


def test_start_seeds():
    assert start_seeds(Args(env_id="Taxi-v4"), 3, 98) == [28, 148, 16]
    assert len(script.TAXI_SEEDS.split(",")) == 100
    assert start_seeds(Args(eval_seeds="7,8,9"), 4, 2) == [9, 7, 8, 9]
    drawn = [start_seeds(Args(seed=seed), 20, first) for seed in (1, 2) for first in (0, 20)]
    assert len({seed for seeds in drawn for seed in seeds}) == 80


def test_resume_is_as_if_never_stopped(tmp_path):
    # The lake without slipping needs no chance of its own, so that the runs must agree to the last bit.
    whole = run(tmp_path / "whole", total_episodes=500, lr_visits=30)
    run(tmp_path / "parts", total_episodes=200, lr_visits=30)
    parts = run(tmp_path / "parts", total_episodes=500, lr_visits=30, resume=str(tmp_path / "parts"))
    np.testing.assert_array_equal(whole[1], parts[1])
    np.testing.assert_array_equal(whole[2], parts[2])
    assert whole[0]["global_step"] == parts[0]["global_step"] and whole[1].any()
    with np.load(tmp_path / "whole/q_table.npz") as a, np.load(tmp_path / "parts/q_table.npz") as b:
        for name in ("rng_state", "recent_returns", "episodes"):
            np.testing.assert_array_equal(a[name], b[name])
        assert a["curve"].shape == (100, 2) and b["curve"][-1, 0] == 500 and len(b["curve"]) > 150


def test_charts(tmp_path):
    args = {"total_episodes": 200, "max_steps": 5, "eval_episodes": 1, "run_dir": str(tmp_path)}
    args |= {"max_epsilon": 0.0, "min_epsilon": 0.0, "random_ties": False}  # always left, into the wall
    script.train(Args(**args))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS"} <= set(events.Tags()["scalars"])
    lengths = events.Scalars("charts/episodic_length")
    assert [point.step for point in lengths] == list(range(10, 1001, 10))
    assert {point.value for point in lengths} == {5.0}
    # What a killed run drew beyond its last checkpoint is dropped when it is drawn again.
    with np.load(tmp_path / "q_table.npz") as file:
        early = dict(file) | {"global_step": 500, "episodes": 100}
    np.savez(tmp_path / "q_table.npz", **early)
    script.train(Args(resume=str(tmp_path), **args))
    events = EventAccumulator(str(tmp_path)).Reload()
    steps = [point.step for point in events.Scalars("charts/episodic_length")]
    assert steps == list(range(10, 1001, 10))


class Boom:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_a_table_of_a_stranger_runs_no_code(tmp_path, capsys):
    args = Args(total_episodes=5, eval_episodes=1, run_dir=str(tmp_path))
    script.train(args)
    path = tmp_path / "q_table.npz"
    with np.load(path) as file:
        good = dict(file)
    object_array = np.array([Boom()], dtype=object)
    damages = {
        "pickle": lambda: np.savez(path, **(good | {"q_table": object_array})),
        "q_table": lambda: np.savez(path, **(good | {"q_table": good["q_table"].T})),
        "visits": lambda: np.savez(path, **(good | {"visits": good["visits"][1:]})),
        "rng_state": lambda: np.savez(path, **{k: v for k, v in good.items() if k != "rng_state"}),
        "state": lambda: np.savez(path, **(good | {"rng_state": good["rng_state"][:9]})),
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


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"env_id": "FrozenLake-v9"}, "FrozenLake-v1"),
        ({"env_kwargs": "{not json"}, "JSON"),
        ({"env_kwargs": "[1]"}, "TypeError"),
        ({"env_kwargs": '{"map_name": "9x9"}'}, "9x9"),
        ({"env_kwargs": '{"wings": 2}'}, "wings"),
        ({"env_id": "CartPole-v1"}, "ppo.py"),
        ({"env_id": "Pendulum-v1"}, "a2c_continuous.py"),
        ({"eval_seeds": "1,x"}, "16,54,165"),
        ({"eval_seeds": ","}, "16,54,165"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": 1.5}, "--learning-rate"),
        ({"gamma": 1.01}, "--gamma"),
        ({"min_epsilon": 0.6, "max_epsilon": 0.5}, "--min-epsilon"),
        ({"max_epsilon": 1.1}, "--max-epsilon"),
        ({"decay_rate": -0.1}, "--decay-rate"),
        ({"lr_visits": -1.0}, "--lr-visits"),
        ({"max_steps": 0}, "at least 1"),
        ({"total_episodes": 0}, "at least 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, kwargs, word):
    folder = tmp_path / "run"
    assert word in refuses(capsys, 2, script.train, Args(run_dir=str(folder), **kwargs))
    assert not folder.exists()


def test_spaces_are_sent_to_their_script(capsys, monkeypatch):
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
        assert word in refuses(capsys, 2, script.make_envs, Args(env_id="Odd-v1"), 1)
        del gym.registry["Odd-v1"]


def test_options_of_the_lake():
    def slips(**kwargs):
        table = script.make_envs(Args(**kwargs), 1).unwrapped.envs[0].unwrapped.P
        return len(table[0][0]) == 3, len(table)

    assert slips() == (False, 16)
    assert slips(env_kwargs="{}") == slips(env_kwargs=SLIPPERY) == (True, 16)
    assert slips(env_kwargs='{"map_name": "8x8", "is_slippery": false}') == (False, 64)
    assert slips(env_id="FrozenLake8x8-v1") == (True, 64)


def test_an_error_that_is_no_number_stops_the_run(tmp_path, capsys):
    args = Args(
        env_id="Ring-v0",
        env_kwargs='{"terminated": true, "nan_after": 100}',
        checkpoint_every=6,
        max_steps=3,
        run_dir=str(tmp_path),
    )
    assert "step 102;" in refuses(capsys, 1, script.train, args)
    with np.load(tmp_path / "q_table.npz") as file:
        assert np.isfinite(file["q_table"]).all() and 93 <= file["global_step"] <= 99


def test_starts_without_torch():
    code = "import sys, q_learning; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    folder = script.__file__.rsplit("/", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0
