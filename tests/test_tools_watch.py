"""The page that algos/tools/watch.py writes: its numbers against oracles, and in a real browser."""

import base64
import fcntl
import functools
import importlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import pickle
import re
import select
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import counter_env
import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

TOOLS = Path(__file__).parents[1] / "algos" / "tools"
sys.path.insert(0, str(TOOLS))
import watch  # noqa: E402 (from the folder above)


class Clock(counter_env.CounterEnv):
    """Its picture tells the step: red is the step's lower byte, green the upper one."""

    def observe(self):
        return np.array([1, self.step_count], dtype=np.float32)

    def render(self):
        picture = np.zeros((40, 60, 3), dtype=np.uint8)
        picture[..., 0] = self.step_count % 256
        picture[..., 1] = self.step_count // 256
        return picture


class Blind(Clock):
    """Draws nothing."""

    def render(self):
        return None


gym.register("Clock-v0", entry_point=Clock, kwargs={"length": 20})
gym.register("ClockCut-v0", entry_point=Clock, kwargs={"length": 20, "ending": "truncated"})
gym.register("LongClock-v0", entry_point=Clock, kwargs={"length": 2750})
gym.register("ShortClock-v0", entry_point=Clock, kwargs={"length": 7})
gym.register("Blind-v0", entry_point=Blind)

watch.MAX_SIDE = 160  # small pictures are quickly made
# A run of a second or two with each script.
RUNS = {
    "q_learning": {"total_episodes": 2000, "eval_episodes": 5},
    "sarsa": {"env_id": "CliffWalking-v1", "total_episodes": 200, "eval_episodes": 5},
    "dqn": {"total_timesteps": 2000, "learning_starts": 500, "eval_episodes": 5},
    "dqn_atari": {
        **{"env_id": "ALE/SpaceInvaders-v5", "num_envs": 4, "total_timesteps": 600, "learning_starts": 500},
        **{"buffer_size": 1000, "batch_size": 8, "train_frequency": 50, "end_e": 1.0, "eval_episodes": 1},
    },
    "reinforce": {
        **{"total_episodes": 40, "num_envs": 4, "baseline": "value", "normalize_obs": True},
        **{"eval_episodes": 5},
    },
    "ppo": {"total_timesteps": 2048, "eval_episodes": 5},
    "ppo_atari": {
        **{"env_id": "ALE/SpaceInvaders-v5", "num_envs": 4, "num_steps": 32, "total_timesteps": 256},
        **{"num_minibatches": 2, "update_epochs": 1, "eval_episodes": 1},
    },
    "rnd_ppo": {
        **{"env_id": "CartPole-v1", "total_timesteps": 512, "num_envs": 8, "num_steps": 32},
        **{"init_steps": 8, "eval_episodes": 2},
    },
    "icm_ppo": {
        **{"env_id": "CartPole-v1", "total_timesteps": 512, "num_envs": 8, "num_steps": 32},
        **{"init_steps": 8, "eval_episodes": 2},
    },
    "a2c_continuous": {"env_id": "Pendulum-v1", "total_timesteps": 640, "eval_episodes": 5},
    "ppo_continuous": {"env_id": "Pendulum-v1", "total_timesteps": 2048, "eval_episodes": 5},
    "decision_transformer": {"total_updates": 20, "warmup_updates": 5, "eval_every": 20, "eval_episodes": 5},
}
SCRIPTS = [name for name in RUNS if (TOOLS.parent / f"{name}.py").exists()]


def train(name: str, folder: Path, **changes) -> Path:
    """A short run of a script."""
    script = importlib.import_module(name)
    settings = RUNS[name] | {"run_dir": str(folder)} | changes
    with pytest.MonkeyPatch.context() as patch:
        if name in ("dqn_atari", "ppo_atari"):  # a whole game takes its time
            patch.setattr(script, "MAX_EVAL_STEPS", 100)
            watch.load_script(name).MAX_EVAL_STEPS = 100  # a module of the tool's own
        script.train(script.Args(**settings))
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder of a short run by the name of its script, trained when it is first asked for."""
    home = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name: str, **changes) -> Path:
        return train(name, home / "-".join([name, *map(str, changes.values())]).replace("/", ""), **changes)

    return run


def call(*arguments, monkeypatch, capfd) -> tuple[int, str, str]:
    """Run the tool in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["watch.py", *map(str, arguments)])
    capfd.readouterr()
    try:
        watch.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    return code, out, err


def make_page(*arguments, out: Path) -> list[dict]:
    """Write a page and return the data in it, one dictionary for each run."""
    args = watch.Args(run_dirs=tuple(map(str, arguments)), out=str(out))
    watch.watch(args)
    return data_of(out)


def data_of(page: Path) -> list[dict]:
    blocks = re.findall(r'<script type="application/json" class="run">(.*?)</script>', page.read_text(), re.S)
    return [json.loads(block) for block in blocks]


def three(episode: dict) -> list[int]:
    """The first moment, one in between and the last one."""
    last = len(episode["moments"]) - 1
    return [0, last // 2, last]


def chart(episode: dict, kind: str) -> dict:
    (found,) = [one for one in episode["charts"] if one["kind"] == kind]
    return found


def close(page, truth) -> bool:
    """Whether the page's numbers, which have five digits, are these."""
    return np.allclose(page, truth, rtol=1e-4, atol=2e-5)


# The formulas


@pytest.mark.parametrize("ending", ["terminated", "cut off", "in between"])
def test_the_return_that_followed_is_the_direct_sum(ending):
    rewards = [1.0, -2.0, 0.5, 4.0, 3.0, -1.0]
    gamma = 0.9
    ends = [False] * 6
    last_value = 7.0
    if ending == "terminated":
        ends[5] = True
        last_value = 0.0
    if ending == "in between":
        ends[2] = True
    expected = []
    for t in range(6):
        total = 0.0
        for k in range(t, 6):
            total += gamma ** (k - t) * rewards[k]
            if ends[k]:
                break
        else:  # never broken off: what the last observation is worth comes on top
            total += gamma ** (6 - t) * last_value
        expected.append(total)
    found = watch.following_returns(rewards, ends, last_value, gamma)
    assert found == pytest.approx([*expected, last_value], rel=1e-12)


def test_entropy_of_probabilities_and_of_deviations():
    assert watch.entropy({"probabilities": [0.25] * 4}) == pytest.approx(math.log(4))
    assert watch.entropy({"probabilities": [1.0, 0.0]}) == 0
    normal = torch.distributions.Normal(torch.zeros(2), torch.tensor([0.5, 3.0]))
    assert watch.entropy({"sigma": [0.5, 3.0]}) == pytest.approx(normal.entropy().sum().item(), rel=1e-6)
    assert watch.entropy({"q": [1.0, 2.0]}) is None


def test_rewards_between_moments_are_added_and_surprises_kept():
    values = [None, 1.0, 2.0, -5.0, 4.0, 5.0]
    assert watch.at_moments(values, [0, 2, 4, 5], "sum") == [None, 3.0, -1.0, 5.0]
    assert watch.at_moments(values, [0, 2, 4, 5], "largest") == [None, 2.0, -5.0, 5.0]
    assert watch.at_moments([0.0, 1, 2, 3, 4, 5], [0, 2, 4, 5], "at") == [0, 2, 4, 5]
    assert watch.rounded([1.23456789, math.nan, math.inf, None]) == [1.2346, None, None, None]


class Fixed:
    """An environment with known rewards and lives, in the place of a run's."""

    MAX_EVAL_STEPS = 100

    def __init__(self, rewards, lives, terminated=True, **args):
        self.rewards = rewards
        self.lives = lives
        self.terminated = terminated
        self.args = type("Args", (), {"gamma": 0.5} | args)()
        self.script = self
        self.vector = True
        self.about = {"map": None}
        self.frames = itertools.count()

    def reset(self, seed):
        self.t = 0
        return np.zeros((1, 1)), {"lives": np.array([self.lives[0]])}

    def step(self, action):
        self.t += 1
        last = self.t == len(self.rewards)
        info = {"lives": np.array([self.lives[self.t]])}
        endings = (last and self.terminated, last and not self.terminated)
        return np.full((1, 1), self.t), self.rewards[self.t - 1], *endings, info

    def render(self):
        return np.full((8, 8, 3), self.t, dtype=np.uint8)

    def look(self, obs):
        return {"q": [float(obs[0, 0]), -1.0], "value": float(obs[0, 0])}


def play_fixed(run: Fixed) -> dict:
    with watch.ThreadPoolExecutor(1) as pool:
        return watch.play(run, lambda obs: np.zeros(1, dtype=int), 0, pool)


def curve(run: Fixed, kind: str, line: str) -> list:
    (found,) = [one for one in watch.curves(run, play_fixed(run)) if one["kind"] == kind]
    return found["lines"][line]


def test_returns_count_as_the_script_learned_them():
    plain = Fixed([8.0, 0.0, -4.0], [3, 3, 2, 2])
    assert curve(plain, "return", "really followed") == [8 - 1, -2, -4, 0]
    clipped = Fixed([8.0, 0.0, -4.0], [3, 3, 2, 2], clip_rewards=True)
    assert curve(clipped, "return", "really followed") == [1 - 0.25, -0.5, -1, 0]
    assert curve(clipped, "reward", "reward") == [None, 8, 0, -4], "the true ones are shown"
    lives = Fixed([8.0, 0.0, -4.0], [3, 3, 2, 2], episodic_life=True)
    assert curve(lives, "return", "really followed") == [8, 0, -4, 0]
    restart = Fixed([8.0, 0.0, -4.0], [3, 3, 2, 2], restart_credit=True)
    assert curve(restart, "return", "really followed") == [8, -2, -4, 0]
    cut = Fixed([8.0, 0.0, -4.0], [3, 3, 2, 2], terminated=False)  # V of the last observation is 3
    assert curve(cut, "return", "really followed") == [8 - 1 + 0.125 * 3, -2 + 0.25 * 3, -4 + 1.5, 3]


def test_surprise_is_the_td_error_with_both_endings():
    # V(s_t) = t, γ = 0.5
    terminated = Fixed([8.0, 0.0, -4.0], [3] * 4)
    assert curve(terminated, "surprise", "TD error") == [None, 8 + 0.5 - 0, 0 + 1 - 1, -4 + 0 - 2]
    cut = Fixed([8.0, 0.0, -4.0], [3] * 4, terminated=False)
    assert curve(cut, "surprise", "TD error") == [None, 8.5, 0, -4 + 1.5 - 2]


def test_an_episode_that_never_ends_is_cut_where_evaluations_end():
    endless = Fixed([1.0] * 200, [1] * 201)
    episode = play_fixed(endless)
    assert episode["ended"] == "stopped" and len(episode["rewards"]) == 100
    assert max(episode["film"].frames) == 100 and len(episode["said"]) == 101


# The numbers of each script, recomputed from its checkpoint with NumPy


def weights_of(folder: Path) -> dict:
    agent = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    return {name: tensor.double().numpy() for name, tensor in agent.items()}


def dense(x, weights, prefix, activation):
    """The layers `prefix`.0, .2, … in float64."""
    numbers = sorted(int(k.split(".")[1]) for k in weights if re.fullmatch(rf"{prefix}\.\d+\.weight", k))
    for number in numbers:
        x = x @ weights[f"{prefix}.{number}.weight"].T + weights[f"{prefix}.{number}.bias"]
        x = activation(x) if number != numbers[-1] else x
    return x


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def relu(x):
    return np.maximum(x, 0)


def observations(env_id: str, seed: int, actions: list) -> tuple[np.ndarray, list[float]]:
    """Play these actions in a plain environment: all T + 1 observations in float64, and the rewards."""
    start = np.random.SeedSequence((seed, 1, 0)).generate_state(1).tolist()[0]
    env = gym.make(env_id)
    seen = [env.reset(seed=start)[0]]
    rewards = []
    for action in actions:
        obs, reward, *_ = env.step(action)
        seen.append(obs)
        rewards.append(reward)
    return np.array(seen, dtype=np.float64), rewards


@pytest.fixture(scope="session")
def page_file(runs, tmp_path_factory):
    """The page of a short run, by the name of its script."""
    home = tmp_path_factory.mktemp("pages")

    @functools.cache
    def file(name: str) -> Path:
        make_page(runs(name), out=home / f"{name}.html")
        return home / f"{name}.html"

    return file


@pytest.fixture(scope="session")
def page_of(page_file):
    """The data of that page."""
    return functools.cache(lambda name: data_of(page_file(name))[0])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_a_page_to_the_last_moment(name, page_of, runs):
    data = page_of(name)
    (episode,) = data["episodes"]
    moments = episode["moments"]
    assert data["algo"] == name and data["env_id"] == RUNS[name].get("env_id", data["env_id"])
    assert moments == list(range(episode["steps"] + 1)) and episode["stride"] == 1
    assert episode["taken"][-1] is None and len(episode["taken"]) == len(moments)
    for bars in episode["bars"].values():
        assert len(bars) == len(moments) and all(len(bar) == len(data["actions"]) for bar in bars)
    for probabilities in episode["bars"].get("probabilities", []):
        assert sum(probabilities) == pytest.approx(1, abs=1e-4) and min(probabilities) >= 0
    for one in episode["charts"]:
        for line in one["lines"].values():
            assert len(line) == len(moments) and all(value is not None for value in line[1:])
    rewards = chart(episode, "reward")["lines"]["reward"]
    assert episode["so_far"] == pytest.approx([0, *np.cumsum(rewards[1:])], rel=1e-3, abs=1e-3)
    kinds = {"probabilities": "probabilities", "q": "q", "mean": "mean"}
    assert len([kind for kind in kinds if kind in episode["bars"]]) == 1
    for picture in episode["pictures"]:
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_film_is_that_of_the_scripts_own_evaluation(name, page_of, runs):
    """Same starts, same actions: the return is that of the first evaluation episode."""
    if name in ("dqn_atari", "ppo_atari", "rnd_ppo", "icm_ppo"):
        pytest.skip("its evaluation draws chance for all its environments together")
    script = importlib.import_module(name)
    args = script.Args(**RUNS[name] | {"evaluate": str(runs(name)), "eval_episodes": 1})
    device = [torch.device("cpu")] if name not in ("q_learning", "sarsa") else []
    results = script.evaluate(args, runs(name), *device)
    (episode,) = page_of(name)["episodes"]
    assert episode["so_far"][-1] == pytest.approx(results["mean_reward"], rel=1e-4)


@pytest.mark.parametrize("name", ["q_learning", "sarsa"])
def test_the_page_of_a_table_shows_its_numbers(name, page_of, runs):
    data = page_of(name)
    (episode,) = data["episodes"]
    with np.load(runs(name) / "q_table.npz") as file:
        table = file["q_table"]
    for m in three(episode):
        assert close(episode["bars"]["q"][m], table[episode["state"][m]])
        label = "expected, max Q"
        assert close(chart(episode, "return")["lines"][label][m], table[episode["state"][m]].max())
    arrows = {"q_learning": "←↓→↑", "sarsa": "↑→↓←"}[name]
    for state, row in enumerate(table):
        expected = "·" if row.max() == row.min() else arrows[row.argmax()]
        assert data["map"]["arrows"][state] == expected
        assert close(data["map"]["values"][state], row.max())
    for m, action in enumerate(episode["taken"][:-1]):
        assert table[episode["state"][m]][action] == table[episode["state"][m]].max(), "the greedy one"


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_probabilities_and_values_are_the_networks(name, page_of, runs):
    (episode,) = page_of(name)["episodes"]
    weights = weights_of(runs(name))
    activation = np.tanh if name == "ppo" else relu
    obs, rewards = observations("CartPole-v1", 1, episode["taken"][:-1])
    assert len(obs) == len(episode["moments"])
    if name == "reinforce":  # --normalize-obs
        scale = 1 / np.sqrt(weights["norm_obs.var"] + 1e-8)
        obs = ((obs - weights["norm_obs.mean"]) * scale).clip(-5, 5)
    for m in three(episode):
        logits = dense(obs[m], weights, "actor", activation)
        assert close(episode["bars"]["probabilities"][m], softmax(logits))
        value = dense(obs[m], weights, "critic", activation).item()
        assert close(chart(episode, "return")["lines"]["expected, V(s)"][m], value)
        p = softmax(logits)
        assert close(chart(episode, "entropy")["lines"]["entropy"][m], -(p * np.log(p)).sum())
    gamma = importlib.import_module(name).Args().gamma
    followed = chart(episode, "return")["lines"]["really followed"]
    assert episode["ended"] == "terminated" and followed[-1] == 0
    direct = [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
    assert close(followed[:-1], direct)


def test_values_of_dqn_atari_are_the_networks(page_of, runs):
    """The frames as ale_py gives them, the network layer by layer in float64."""
    data = page_of("dqn_atari")
    (episode,) = data["episodes"]
    w = {name: torch.from_numpy(tensor) for name, tensor in weights_of(runs("dqn_atari")).items()}
    script = importlib.import_module("dqn_atari")
    envs = script.make_envs(script.Args(**RUNS["dqn_atari"]), 1, render_mode="rgb_array")
    obs, _ = envs.reset(seed=np.random.SeedSequence((1, 1, 0)).generate_state(1).tolist())
    seen = [obs.copy()]
    for action in episode["taken"][:-1]:
        seen.append(envs.step(np.array([action]))[0].copy())
    assert data["actions"] == ["noop", "fire", "right", "left", "rightfire", "leftfire"]
    for m in three(episode):
        x = torch.from_numpy(seen[m]).double() / 255
        for layer, stride in ((0, 4), (2, 2), (4, 1)):
            weight, bias = w[f"network.{layer}.weight"], w[f"network.{layer}.bias"]
            x = torch.nn.functional.conv2d(x, weight, bias, stride).relu()
        x = (x.flatten(1) @ w["network.7.weight"].T + w["network.7.bias"]).relu()
        q = (x @ w["network.9.weight"].T + w["network.9.bias"])[0]
        # The script itself may compute in bfloat16.
        assert np.allclose(episode["bars"]["q"][m], q.numpy(), atol=0.02 * max(1, q.abs().max()))


@pytest.mark.parametrize("name", [name for name in ("a2c_continuous", "ppo_continuous") if name in SCRIPTS])
def test_mean_and_deviation_are_the_networks(name, page_of, runs):
    data = page_of(name)
    (episode,) = data["episodes"]
    w = weights_of(runs(name))
    means = np.array(episode["bars"]["mean"])
    # The mean is what acts: Pendulum's bounds are ±2. Five digits of it would lead to another episode.
    script = importlib.import_module(name)
    args = script.Args(**RUNS[name])
    envs = script.make_envs(args, 1, render_mode="rgb_array")
    policy, _ = script.load_policy(args, envs, runs(name), torch.device("cpu"))
    obs, _ = envs.reset(seed=np.random.SeedSequence((1, 1, 0)).generate_state(1).tolist())
    seen = [obs[0].copy()]
    for _ in range(episode["steps"]):
        obs, *_ = envs.step(policy(obs))
        seen.append(obs[0].copy())
    assert data["actions"] == ["torque"] and len(seen) == len(means) == 201
    for m in three(episode):
        scale = 1 / np.sqrt(w["norm_obs.var"] + 1e-8)
        x = ((np.float64(seen[m]) - w["norm_obs.mean"]) * scale).clip(-10, 10)
        features = x
        for layer in (0, 2):
            features = np.tanh(features @ w[f"features.{layer}.weight"].T + w[f"features.{layer}.bias"])
        assert close(means[m], features @ w["mean.weight"].T + w["mean.bias"])
        std = np.exp(w["noise.log_std"])
        sigma = np.sqrt(features**2 @ std**2 + 1e-6) if args.use_sde else std[0]
        assert close(episode["bars"]["sigma"][m], sigma)
        unit = np.sqrt(w["norm_return.var"][0] + 1e-8)  # the critic learned rewards divided by it
        value = dense(x, w, "critic", np.tanh).item() * unit
        shown = chart(episode, "return")["lines"]["expected, V(s)"][m]
        assert shown == pytest.approx(value, rel=1e-3)
    # A time limit: V of the last observation stands for the rest.
    assert episode["ended"] == "time limit"
    followed = chart(episode, "return")["lines"]["really followed"]
    assert followed[-1] == chart(episode, "return")["lines"]["expected, V(s)"][-1] != 0


def test_novelty_is_the_prediction_error(page_of, runs):
    (episode,) = page_of("rnd_ppo")["episodes"]
    w = weights_of(runs("rnd_ppo"))
    obs, _ = observations("CartPole-v1", 1, episode["taken"][:-1])
    memory = obs[0]
    beta = importlib.import_module("rnd_ppo").Args().memory
    wanted = three(episode)
    for m in range(len(obs)):
        memory = obs[0] if m == 0 else beta * memory + (1 - beta) * obs[m]
        if m not in wanted:
            continue
        scale = 1 / np.sqrt(w["norm_obs.var"] + 1e-8)
        x = ((np.stack([memory, obs[m]]) - w["norm_obs.mean"]) * scale).clip(-5, 5)
        says = {}
        for net in ("actor", "critic"):
            h = x.ravel()
            for layer in (1, 3):
                h = relu(h @ w[f"{net}.{layer}.weight"].T + w[f"{net}.{layer}.bias"])
            says[net] = h @ w[f"{net}.5.weight"].T + w[f"{net}.5.bias"]
        assert close(episode["bars"]["probabilities"][m], softmax(says["actor"]))
        task, _ = says["critic"]
        assert close(chart(episode, "return")["lines"]["expected, V(s)"][m], task)

        def leaky(h):
            return np.where(h > 0, h, 0.01 * h)

        outputs = {}
        for net in ("target", "predictor"):
            h = leaky(x[1] @ w[f"{net}.1.weight"].T + w[f"{net}.1.bias"])
            outputs[net] = h @ w[f"{net}.3.weight"].T + w[f"{net}.3.bias"]
        h = relu(outputs["predictor"])
        outputs["predictor"] = h @ w["predictor.5.weight"].T + w["predictor.5.bias"]
        error = ((outputs["predictor"] - outputs["target"]) ** 2).mean()
        novelty = error / np.sqrt(w["norm_past.var"] + 1e-8)
        assert chart(episode, "novelty")["lines"]["novelty"][m] == pytest.approx(novelty, rel=1e-3)


@pytest.mark.skipif("decision_transformer" not in SCRIPTS, reason="there is no such script")
def test_what_is_asked_for_falls_by_what_was_got(page_of):
    (episode,) = page_of("decision_transformer")["episodes"]
    asked = chart(episode, "return")["lines"]["asked for"]
    for m in range(1, len(asked)):
        assert asked[m] == pytest.approx(asked[0] - episode["so_far"][m])
    rewards = chart(episode, "reward")["lines"]["reward"][1:]
    followed = chart(episode, "return")["lines"]["really followed"]
    assert followed == pytest.approx([sum(rewards[t:]) for t in range(len(rewards) + 1)])
    for m, action in enumerate(episode["taken"][:-1]):  # the one that acts has seen the same
        probabilities = episode["bars"]["probabilities"][m]
        assert probabilities[action] == max(probabilities)


# The page as a file


def test_a_long_episode_is_thinned_and_says_so(runs, tmp_path):
    run = runs("ppo", env_id="LongClock-v0", eval_episodes=1, total_timesteps=2048)
    (data,) = make_page(run, out=tmp_path / "long.html")
    (episode,) = data["episodes"]
    assert episode["steps"] == 2750 and episode["stride"] == 4
    assert episode["moments"] == [*range(0, 2750, 4), 2750], "and the last one"
    rewards = chart(episode, "reward")["lines"]["reward"]
    assert rewards[1] == 1 + 2 + 3 + 4 and rewards[-1] == 2749 + 2750
    assert episode["so_far"][-1] == pytest.approx(2750 * 2751 / 2, rel=1e-4)
    for m in three(episode):
        picture = Image.open(io.BytesIO(base64.b64decode(episode["pictures"][episode["picture"][m]])))
        red, green, _ = picture.convert("RGB").getpixel((30, 20))
        assert red + 256 * green == episode["moments"][m]


def test_pages_stay_within_their_size(runs, tmp_path, monkeypatch):
    """All that is written counts: a clock's pictures are small, its numbers are most of the page."""
    run = runs("ppo", env_id="LongClock-v0", eval_episodes=1, total_timesteps=2048)
    page = tmp_path / "small.html"
    strides = []
    make_page(run, out=page)
    whole = page.stat().st_size
    empty = len((watch.PAGE + watch.STYLE + watch.SCRIPT).encode())
    for limit in (whole, whole - 1, empty + 5000):
        monkeypatch.setattr(watch, "MAX_BYTES", limit)
        (data,) = make_page(run, out=page)
        assert page.stat().st_size <= limit
        (episode,) = data["episodes"]
        assert episode["moments"][-1] == episode["steps"]
        strides.append(episode["stride"])
    assert strides[:2] == [4, 8] and strides[2] > 16


def test_an_equal_picture_is_encoded_once(monkeypatch):
    """Also where the film is thinned; and a picture of another shape is another picture."""
    pictures = [np.full((8, 16, 3), colour, dtype=np.uint8) for colour in (0, 100, 200)]
    pictures.append(np.zeros((16, 8, 3), dtype=np.uint8))
    texts = [watch.encode(picture, True) for picture in pictures]
    calls = []
    encode = watch.encode
    with watch.ThreadPoolExecutor(2) as pool:
        film = watch.Film(pool, pictures[0])
        film.lossless = True
        monkeypatch.setattr(watch, "encode", lambda *what: calls.append(what) or encode(*what))
        for step in range(3 * watch.MAX_MOMENTS):
            if step % film.stride == 0:
                film.add(step, pictures[step % 3])
        film.add(step + 1, pictures[3])
        for step, frame in film.frames.items():
            assert frame.result() == texts[3 if step == max(film.frames) else step % 3]
        assert len(calls) == 4 and film.stride == 4
        film.thin(6)
        assert {frame.result() for frame in film.known.values()} == {texts[0], texts[3]}, "no more is kept"


def test_a_picture_that_comes_again_is_written_once(page_of):
    (episode,) = page_of("sarsa")["episodes"]
    assert len(set(episode["pictures"])) == len(episode["pictures"]) == max(episode["picture"]) + 1


def test_more_than_twenty_episodes_are_those_of_an_evaluation():
    """Which plays 20 at a time and seeds each round by the number of episodes before it."""
    import ppo

    run = SimpleNamespace(script=ppo, args=ppo.Args(seed=7))
    rounds = [*ppo.env_seeds(20, 7, 1, 0), *ppo.env_seeds(20, 7, 1, 20), *ppo.env_seeds(20, 7, 1, 40)]
    for episodes in (1, 20, 21, 45):
        assert watch.start_seeds(run, episodes, None) == rounds[:episodes]


def test_episodes_and_seeds(runs, tmp_path):
    watch.watch(watch.Args((str(runs("ppo")),), episodes=2, seed=7, out=str(tmp_path / "a.html")))
    (data,) = data_of(tmp_path / "a.html")
    seeds = np.random.SeedSequence((7, 1, 0)).generate_state(2).tolist()
    assert [e["seed"] for e in data["episodes"]] == seeds
    watch.watch(watch.Args((str(runs("ppo")),), episodes=2, seed=7, out=str(tmp_path / "b.html")))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_two_runs_play_the_same_start_and_the_same_chance(runs, tmp_path):
    """The same run twice, beside a run with another seed of its own: the first one's seed counts."""
    other = runs("rnd_ppo", seed=5)
    first, second = make_page(other, runs("rnd_ppo"), out=tmp_path / "two.html")
    assert first["seed"] == 5 and second["seed"] == 1
    assert first["episodes"][0]["seed"] == second["episodes"][0]["seed"]
    alone = tmp_path / "alone.html"
    watch.watch(watch.Args((str(runs("rnd_ppo")),), seed=5, out=str(alone)))
    assert data_of(alone)[0]["episodes"] == second["episodes"]
    again, twin = make_page(other, other, out=tmp_path / "twins.html")
    assert again["episodes"] == twin["episodes"] == first["episodes"], "chance begins anew for each"


def test_the_page_needs_nobody(runs, tmp_path):
    """No address in it, and a policy by which the browser would refuse a request."""
    make_page(runs("ppo"), out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in text
    assert not re.search(r"<(link|img|iframe|object|embed)\b|@import|url\(|\bon\w+=", text.split("<main>")[0])


def test_the_command_is_that_of_the_run(page_of, runs):
    command = page_of("reinforce")["command"]
    assert command == (
        "python algos/reinforce.py --num-envs 4 --total-episodes 40 --baseline value --normalize-obs "
        "--eval-episodes 5"
    )
    assert page_of("reinforce")["versions"]["torch"] == importlib.metadata.version("torch")


def test_names_of_actions():
    gym.register_envs(importlib.import_module("minigrid"))
    assert watch.action_names("CartPole-v1", gym.make("CartPole-v1")) == ["push left", "push right"]
    for start, names in watch.ACTIONS.items():
        ids = [env_id for env_id in gym.registry if env_id.startswith(start) and "/" not in env_id]
        if start in ("Pixelcopter", "Pyramids"):
            ids = [f"envs.{start.lower()}:{start}-v0"]
        elif start in ("BipedalWalker", "LunarLander-", "LunarLanderContinuous"):
            ids = ids[-1:]
        assert ids
        for env_id in ids:
            env = gym.make(env_id)
            assert watch.action_names(env_id, env) == names
            env.close()
    grid = gym.make("MiniGrid-Empty-5x5-v0")
    names = ["left", "right", "forward", "pickup", "drop", "toggle", "done"]
    assert watch.action_names("MiniGrid-Empty-5x5-v0", grid) == names
    odd = gym.make("FrozenLake-v1")
    odd.action_space = gym.spaces.Discrete(3)
    assert watch.action_names("FrozenLake-v1", odd) == ["action 0", "action 1", "action 2"]


def test_every_script_of_the_table_is_tried_here():
    assert set(watch.READERS) == set(RUNS)


def test_a_copy_is_read_like_its_original(runs, tmp_path, monkeypatch, capfd):
    algos = tmp_path / "algos"
    shutil.copytree(TOOLS.parent, algos, ignore=shutil.ignore_patterns("tools", "__pycache__"))
    original = (algos / "ppo.py").read_text()
    (algos / "my_ppo.py").write_text(original.replace("gamma: float = 0.98", "gamma: float = 0.97"))
    folder = tmp_path / "run"
    shutil.copytree(runs("ppo"), folder)
    results = json.loads((folder / "results.json").read_text()) | {"algo": "my_ppo"}
    (folder / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(watch, "ALGOS", algos)
    watch.load_script.cache_clear()
    (data,) = make_page(folder, out=tmp_path / "page.html")
    assert data["algo"] == "my_ppo" and "--gamma 0.98" in data["command"]
    # With networks that are asked in another way, the numbers would be wrong.
    (algos / "my_ppo.py").write_text(
        original.replace("agent.actor(obs).argmax", "agent.actor(obs / 2).argmax")
    )
    watch.load_script.cache_clear()
    code, _, err = call(folder, monkeypatch=monkeypatch, capfd=capfd)
    watch.load_script.cache_clear()
    *notes, last = err.splitlines()  # the script itself notes that it is not the text that made the run
    assert code == 2 and "READERS" in last and all(line.startswith("note: ") for line in notes)


# Bad input


def damaged(folder: Path, what: str) -> None:
    """Spoil a copy of a run folder in one way."""
    path = folder / "args.json"
    saved = json.loads(path.read_text())
    results = folder / "results.json"
    if what == "no args":
        path.unlink()
    elif what == "args are no JSON":
        path.write_text("{")
    elif what == "args are a list":
        path.write_text("[1]")
    elif what == "a field of another version":
        path.write_text(json.dumps(saved | {"no_such_field": 1}))
    elif what == "no versions":
        path.write_text(json.dumps({k: v for k, v in saved.items() if k != "versions"}))
    elif what == "gamma is a word":
        path.write_text(json.dumps(saved | {"gamma": "high"}))
    elif what == "seed is a list":
        path.write_text(json.dumps(saved | {"seed": [1]}))
    elif what == "another environment":
        path.write_text(json.dumps(saved | {"env_id": "LunarLander-v3"}))
    elif what == "unknown environment":
        path.write_text(json.dumps(saved | {"env_id": "<script>alert(1)</script>-v1"}))
    elif what == "an environment without pictures":
        path.write_text(json.dumps(saved | {"env_id": "Blind-v0"}))
        (folder / "checkpoint.pt").unlink()
    elif what == "no checkpoint":
        (folder / "checkpoint.pt").unlink()
    elif what == "half a checkpoint":
        (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:2000])
    elif what == "results are no JSON":
        results.write_text("nan?")
    elif what == "results without a score":
        results.write_text(json.dumps({"algo": "ppo"}))
    elif what == "an unknown script":
        results.write_text(json.dumps({"algo": "../tools/watch"}))
    elif what == "a script that is no word":
        results.write_text(json.dumps({"algo": ["ppo"]}))
    elif what == "a module of Python":
        results.write_text(json.dumps({"algo": "os"}))
    elif what == "no script at all":
        results.unlink()


DAMAGES = re.findall(r'what == "(.*)":$', Path(__file__).read_text().split("def damaged")[1], flags=re.M)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_bad_folder_is_one_line(what, runs, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    shutil.copytree(runs("ppo"), folder)
    damaged(folder, what)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(folder, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and not out and err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--episodes", "0"], ["--seed", "-1"], ["--seed", "1.5"], ["--no-such-flag"], ["{run}"] * 3, []),
        *(
            ["nowhere"],
            ["{run}", "nowhere"],
            ["{run}", "--out", "nowhere/page.html"],
            ["{run}", "--out", "."],
        ),
    ],
)
def test_a_bad_command_is_one_line(arguments, runs, tmp_path, monkeypatch, capfd):
    arguments = [word.format(run=runs("ppo")) for word in arguments]
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and not out and err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_strangers_pickle_is_not_unpacked(runs, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    shutil.copytree(runs("ppo"), folder)
    torch.save({"agent": Bomb(tmp_path / "ran")}, folder / "checkpoint.pt")
    assert call(folder, monkeypatch=monkeypatch, capfd=capfd)[0] == 2
    shutil.rmtree(folder)
    shutil.copytree(runs("q_learning"), folder)
    with zipfile.ZipFile(folder / "q_table.npz", "w") as file:
        file.writestr("q_table.npy", pickle.dumps(Bomb(tmp_path / "ran")))
    assert call(folder, monkeypatch=monkeypatch, capfd=capfd)[0] == 2
    assert not (tmp_path / "ran").exists()


def test_a_strangers_script_is_not_imported(runs, tmp_path, monkeypatch, capfd):
    """The name of the script is looked for among those in algos/, it is no path."""
    folder = tmp_path / "run"
    shutil.copytree(runs("ppo"), folder)
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in (os.path.relpath(tmp_path / "theirs", watch.ALGOS), str(tmp_path / "theirs")):
        results = json.loads((folder / "results.json").read_text()) | {"algo": name}
        (folder / "results.json").write_text(json.dumps(results))
        assert call(folder, monkeypatch=monkeypatch, capfd=capfd)[0] == 2
        assert not (tmp_path / "ran").exists()


def test_a_strangers_module_is_not_imported(runs, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    shutil.copytree(runs("ppo"), folder)
    code = "import gymnasium as gym, pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    code += "from gymnasium.envs.classic_control import CartPoleEnv\ngym.register('Theirs-v0', CartPoleEnv)\n"
    (tmp_path / "theirs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    saved = json.loads((folder / "args.json").read_text()) | {"env_id": "theirs:Theirs-v0"}
    (folder / "args.json").write_text(json.dumps(saved))
    code, _, err = call(folder, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and "--env-id theirs:Theirs-v0" in err and not (tmp_path / "ran").exists()
    code, _, err = call(folder, "--env-id", "theirs:Other-v0", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and not (tmp_path / "ran").exists()
    code, _, err = call(folder, "--env-id", "theirs:Theirs-v0", monkeypatch=monkeypatch, capfd=capfd)
    assert (tmp_path / "ran").exists(), "the user has allowed it"
    saved = json.loads((folder / "args.json").read_text()) | {"env_id": "CartPole-v1"}
    (folder / "args.json").write_text(json.dumps(saved))
    code, _, err = call(folder, "--env-id", "Acrobot-v1", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0 and data_of(folder / "replay.html")[0]["env_id"] == "CartPole-v1", (
        "it allows, not replaces"
    )


def test_a_crash_leaves_what_was_there(runs, tmp_path, monkeypatch, capfd):
    run_dir = runs("q_learning")  # trained before anything is broken
    page = tmp_path / "page.html"
    page.write_text("the old page")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = call(run_dir, "--out", page, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and "no space left" in err and len(err.splitlines()) == 1
    assert page.read_text() == "the old page" and list(tmp_path.iterdir()) == [page]


def test_ctrl_c_leaves_nothing(runs, tmp_path, monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "page", interrupted)
    out = tmp_path / "page.html"
    code, _, err = call(runs("q_learning"), "--out", out, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 130 and len(err.splitlines()) == 1 and not out.exists()


def test_help_is_quick_and_says_how(capfd):
    command = [sys.executable, TOOLS / "watch.py", "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "RUN_DIR" in run.stdout and "--episodes" in run.stdout
    heavy = "import sys, watch; print([m for m in ('torch', 'gymnasium', 'PIL') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", heavy], cwd=TOOLS, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", "what takes seconds to import"


# In a browser


class Browser:
    """Chromium without a window, driven through a pair of pipes by its DevTools protocol."""

    def __init__(self, home: Path) -> None:
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        # It reads from 3 and writes to 4; copies far away, lest one of these be 3 or 4 already.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_browser, from_browser)]
        command = [find_chromium(), "--headless=new", "--no-sandbox", "--remote-debugging-pipe"]
        command += ["--disable-gpu", "--hide-scrollbars", f"--user-data-dir={home}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            command, pass_fds=(3, 4), preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[1], 4)), **quiet
        )
        for end in (*ends, to_browser, from_browser):
            os.close(end)
        self.buffer = b""
        self.events = []
        self.number = 0
        self.session = {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            if not select.select([self.read_end], [], [], 60)[0]:
                raise TimeoutError("the browser says nothing")
            self.buffer += os.read(self.read_end, 1 << 20)
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **params) -> dict:
        """Call a method of the protocol; its result. Events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, code: str):
        """The value of an expression in the page; a promise is waited for."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.send("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, code: str) -> None:
        """Until an expression is true."""
        until = time.time() + 30
        while not self.run(code):
            assert time.time() < until, (code, self.complaints())
            time.sleep(0.02)

    def open(self, path: Path, width: int = 1200, height: int = 800) -> None:
        """Load a page and wait for its first picture."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        self.wait("document.body?.dataset.shown !== undefined")

    def press(self, key: str, shift: bool = False) -> None:
        """A key, down and up; then the page has the time to draw."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift)
        self.run("new Promise(done => setTimeout(done, 50))")

    def click(self, selector: str, across: float = 0.5) -> None:
        """A click into an element, so far across it."""
        code = f"""(() => {{ const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: "center"}}); const box = node.getBoundingClientRect();
            return [box.left + {across} * box.width, box.top + box.height / 2]; }})()"""
        x, y = self.run(code)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, buttons=1)
        self.run("new Promise(done => setTimeout(done, 50))")

    def complaints(self) -> list[dict]:
        """Errors and whatever else stands in the console."""
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in names]

    def requests(self) -> list[str]:
        """Addresses that were asked for; pictures that are in the page itself count for nothing."""
        asked = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        addresses = [event["params"]["request"]["url"] for event in asked]
        return [address for address in addresses if not address.startswith("data:")]

    def bars(self, run: int = 0) -> list[dict]:
        """The bars of a run as they are drawn: value in the data, text, whether taken."""
        return self.run(
            f"""[...document.querySelectorAll("section")[{run}].querySelectorAll(".bar")].map(bar => ({{
            value: Number(bar.dataset.value), text: bar.querySelector(".value").textContent,
            name: bar.firstChild.textContent, taken: bar.classList.contains("taken"),
            width: parseFloat(bar.querySelector("i").style.width) }}))"""
        )

    def step_in_film(self, run: int = 0) -> int:
        """What the picture of a Clock tells."""
        red, green = self.run(
            f"""(() => {{ const film = document.querySelectorAll("canvas")[{run}];
            const copy = document.createElement("canvas").getContext("2d", {{willReadFrequently: true}});
            copy.drawImage(film, 0, 0);
            return [...copy.getImageData(30, 20, 1, 1).data].slice(0, 2); }})()"""
        )
        return red + 256 * green

    def readings(self, run: int = 0) -> dict[str, float]:
        """The numbers at the cursors of the curves, by their names."""
        return self.run(
            f"""Object.fromEntries([...document.querySelectorAll("section")[{run}]
            .querySelectorAll("figcaption span")].map(span =>
            [span.textContent.replace(/ [^ ]*$/, ""), Number(span.dataset.value)]))"""
        )

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.write_end)
        os.close(self.read_end)


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    one = Browser(tmp_path_factory.mktemp("browser"))
    yield one
    one.close()


@pytest.fixture(scope="session")
def clock(runs, tmp_path_factory):
    """A page whose pictures tell their step, and its data."""
    run = runs("ppo", env_id="Clock-v0", total_timesteps=2048, eval_episodes=1)
    page = tmp_path_factory.mktemp("clock") / "page.html"
    return page, make_page(run, out=page)[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_opens_without_errors_and_requests(name, page_file, browser):
    page = page_file(name)
    (data,) = data_of(page)
    browser.open(page)
    (episode,) = data["episodes"]
    assert browser.run("document.body.dataset.shown") and browser.requests() == [page.as_uri()]
    assert browser.run("document.body.dataset.step") == "0"
    kind = next(kind for kind in ("probabilities", "q", "mean") if kind in episode["bars"])
    for m in three(episode):
        browser.run(f"show({m})")
        bars = browser.bars()
        assert [bar["value"] for bar in bars] == episode["bars"][kind][m]
        assert [bar["name"] for bar in bars] == data["actions"]
        taken = [i for i, bar in enumerate(bars) if bar["taken"]]
        assert taken == ([] if episode["taken"][m] is None else [episode["taken"][m]])
        for line, value in browser.readings().items():
            (numbers,) = [one["lines"][line] for one in episode["charts"] if line in one["lines"]]
            assert value == numbers[m]
        if data["map"]:
            here = """[...document.querySelectorAll(".map div")].findIndex(c => c.className === "here")"""
            assert browser.run(here) == episode["state"][m]
    assert not browser.complaints()


def test_the_first_picture_comes_within_a_second(browser, clock):
    browser.open(clock[0])
    assert int(browser.run("document.body.dataset.shown")) < 3000  # 1 s on a machine that does nothing else


def test_slider_keys_and_buttons_show_exactly_their_step(browser, clock):
    page, data = clock
    (episode,) = data["episodes"]
    browser.open(page)

    def at(step: int) -> None:
        browser.wait(f"document.body.dataset.step === '{step}'")
        assert browser.step_in_film() == step
        assert browser.run("document.getElementById('slider').value") == str(step)
        assert [bar["value"] for bar in browser.bars()] == episode["bars"]["probabilities"][step]
        followed = chart(episode, "return")["lines"]["really followed"][step]
        assert browser.readings()["really followed"] == followed
        cursor = browser.run("Number(document.querySelector('.cursor').getAttribute('x1'))")
        assert cursor == pytest.approx(1000 * step / 20)

    at(0)
    for step in (1, 2, 3):
        browser.press("ArrowRight")
        at(step)
    browser.press("ArrowLeft")
    at(2)
    browser.press("ArrowRight", shift=True)
    at(12)
    browser.press("End")
    at(20)
    browser.press("ArrowRight")
    at(20)
    browser.press("Home")
    at(0)
    browser.press("ArrowLeft")
    at(0)
    browser.click("#on")
    at(1)
    browser.click("#last")
    at(20)
    browser.click("#back")
    at(19)
    browser.click("#first")
    at(0)
    browser.click("#slider", across=0.5)
    at(10)
    browser.press("ArrowRight")  # the slider has the focus: one step, not two
    at(11)
    browser.click(".plot", across=0.25)
    at(5)
    assert not browser.complaints()


def test_it_plays_to_the_end_and_stops(browser, clock):
    page, _ = clock
    browser.open(page)
    browser.press("+")
    browser.press("+")
    browser.press("+")
    assert browser.run("document.getElementById('speed').value") == "8"
    browser.press(" ")
    browser.wait("document.body.dataset.step === '20'")
    assert browser.step_in_film() == 20
    browser.wait("document.getElementById('play').getAttribute('aria-label') === 'play'")
    for _ in range(7):  # as slow as it can, or a busy machine would see the end again only
        browser.press("-")
    assert browser.run("document.getElementById('speed').value") == "0.1"
    browser.click("#play")  # from the start again
    browser.wait("Number(document.body.dataset.step) < 20")
    browser.press("Home")  # which stops it
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert browser.run("document.body.dataset.step") == "0" and browser.step_in_film() == 0
    assert browser.run("document.getElementById('play').getAttribute('aria-label')") == "play"


def test_a_thinned_film_plays_its_moments(browser, runs, tmp_path):
    run = runs("ppo", env_id="LongClock-v0", eval_episodes=1, total_timesteps=2048)
    make_page(run, out=tmp_path / "long.html")
    browser.open(tmp_path / "long.html")
    browser.press("ArrowRight")
    assert browser.step_in_film() == 4 and browser.run("document.body.dataset.step") == "4"
    browser.press("End")
    assert browser.step_in_film() == 2750
    assert "One step in 4 is shown" in browser.run("document.querySelector('section').textContent")


def test_two_runs_stay_in_step(browser, runs, tmp_path):
    long = runs("ppo", env_id="Clock-v0", total_timesteps=2048, eval_episodes=1)
    short = runs("ppo", env_id="ShortClock-v0", total_timesteps=2048, eval_episodes=1)
    page = tmp_path / "two.html"
    _, second = make_page(long, short, out=page)
    browser.open(page)
    for step, held in ((0, 0), (6, 6), (7, 7), (8, 7), (20, 7)):
        browser.run(f"show({step})")
        assert (browser.step_in_film(0), browser.step_in_film(1)) == (step, held)
        values = [bar["value"] for bar in browser.bars(1)]
        assert values == second["episodes"][0]["bars"]["probabilities"][held]
    other = tmp_path / "other.html"
    make_page(short, long, out=other)  # the longer one may be the second
    browser.open(other)
    browser.press("End")
    assert (browser.step_in_film(0), browser.step_in_film(1)) == (7, 20)
    assert not browser.complaints()


def test_two_films_of_different_length_have_one_stride(browser, runs, tmp_path):
    long = runs("ppo", env_id="LongClock-v0", eval_episodes=1, total_timesteps=2048)
    short = runs("ppo", env_id="Clock-v0", total_timesteps=2048, eval_episodes=1)
    both = make_page(long, short, out=tmp_path / "two.html")
    assert [data["episodes"][0]["stride"] for data in both] == [4, 4], "rewards are those of the same steps"
    browser.open(tmp_path / "two.html")
    for place, steps in ((0, (0, 0)), (3, (12, 12)), (5, (20, 20)), (6, (24, 20))):
        browser.run(f"show({place})")
        assert (browser.step_in_film(0), browser.step_in_film(1)) == steps


def test_several_episodes_can_be_chosen(browser, runs, tmp_path):
    page = tmp_path / "page.html"
    watch.watch(watch.Args((str(runs("ppo")),), episodes=2, out=str(page)))
    (data,) = data_of(page)
    browser.open(page)
    assert browser.run("document.getElementById('episode').hidden") is False
    select_second = "const e = document.getElementById('episode'); e.value = '1'; e.onchange({target: e});"
    browser.run("(() => {" + select_second + "})()")
    browser.press("End")
    assert browser.run("document.body.dataset.step") == str(data["episodes"][1]["steps"])
    assert [bar["value"] for bar in browser.bars()] == data["episodes"][1]["bars"]["probabilities"][-1]


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", ["rnd_ppo", "sarsa"])
def test_nothing_hangs_over_the_edge(width, name, browser, runs, tmp_path):
    make_page(runs(name), runs(name), out=tmp_path / "two.html")
    make_page(runs(name), out=tmp_path / "one.html")
    for page in ("one", "two"):
        browser.open(tmp_path / f"{page}.html", width=width)
        assert browser.run("document.documentElement.scrollWidth") <= width


def test_light_and_dark(browser, clock):
    browser.open(clock[0])
    colours = {}
    for scheme in ("light", "dark"):
        browser.send(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        colours[scheme] = browser.run("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] != colours["dark"]
    browser.click("#theme")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == colours["light"]
    browser.send("Emulation.setEmulatedMedia", features=[])


EVIL = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked=2">\u2028"\'&lt;<!--'


def test_markup_in_a_strangers_words_stays_text(browser, runs, tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>&amp;"
    shutil.copytree(runs("ppo"), folder)
    saved = json.loads((folder / "args.json").read_text())
    saved |= {"versions": {EVIL: EVIL}, "wandb_project_name": EVIL}
    (folder / "args.json").write_text(json.dumps(saved))
    page = tmp_path / "page.html"
    (data,) = make_page(folder, out=page)
    assert data["versions"] == {EVIL[:50]: EVIL[:50]} and data["name"] == folder.name
    text = page.read_text()
    assert text.lower().count("</script") == text.lower().count("<script") == 2
    browser.open(page)
    assert browser.run("window.hacked === undefined && document.images.length === 0")
    assert browser.run("document.scripts.length") == 2
    shown = browser.run("document.querySelector('section').textContent")
    assert EVIL[:50] in shown and folder.name in shown
    assert browser.requests() == [page.as_uri()] and not browser.complaints()


def test_markup_in_ids_and_options_stays_text(browser, runs, tmp_path):
    """A q_learning run has options of its environment, and an environment may have names of any kind."""
    folder = tmp_path / "run"
    shutil.copytree(runs("q_learning"), folder)
    saved = json.loads((folder / "args.json").read_text())
    options = {"is_slippery": False, "map_name": "4x4</script><script>window.hacked=1</script>"}
    saved["env_kwargs"] = json.dumps(options | {"desc": ["SFFF", "FHFH", "FFFH", "HFFG"]})
    (folder / "args.json").write_text(json.dumps(saved))
    page = tmp_path / "page.html"
    (data,) = make_page(folder, out=page)
    assert "window.hacked" in data["command"]
    # An id with markup is no id of Gymnasium's; one that got in would be text all the same.
    data = data | {"env_id": EVIL, "algo": EVIL, "actions": [EVIL] * 4, "score": EVIL}
    run = type("Run", (), {"about": data})()
    text = watch.page([run], [[]])
    assert "<script>window" not in text and "<img" not in text
    text = text.replace('"episodes":[]', json.dumps(data["episodes"])[1:-1].join(['"episodes":[', "]"]))
    page.write_text(text)
    browser.open(page)
    assert browser.run("window.hacked === undefined && document.images.length === 0")
    assert browser.run("document.querySelector('.bar').firstChild.textContent") == EVIL
    assert EVIL[:20] in browser.run("document.title")


def test_the_browser_would_refuse_other_code_and_requests(browser, clock, tmp_path):
    """Even if markup got into the page: its own policy lets nothing but its own script run."""
    text = clock[0].read_text()
    evil = '<script>window.hacked = 1</script><img src="https://example.org/x.png" onerror="window.hacked=2">'
    (tmp_path / "page.html").write_text(text.replace("<noscript>", evil + "<noscript>"))
    browser.open(tmp_path / "page.html")
    assert browser.run("window.hacked === undefined")
    assert any("Content Security Policy" in json.dumps(event) for event in browser.complaints())
