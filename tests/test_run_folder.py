"""What every script promises about its run folder, its endings and bad input, checked on the real thing."""

import dataclasses
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from ctypes.util import find_library
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import copy_block
import counter_env  # noqa: F401 (registers small environments)
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

ALGOS = Path(__file__).parents[1] / "algos"


@dataclass
class Case:
    """How a script is run in seconds, and what it must refuse."""

    budget: str  # the flag of the budget
    small: int  # a budget of about a second
    flags: list[str]  # flags for small runs
    refused: dict[str, str]  # environments that the script must refuse -> the script that it must name
    bad_flags: list[list[str]] = field(default_factory=list)  # combinations that cannot work
    broken_env: str | None = "Broken-v0"  # an environment that pays NaN
    checkpoint: str = "checkpoint.pt"

    @property
    def command(self) -> list[str]:
        return [self.budget, str(self.small), *self.flags]


OTHERS = {"FrozenLake-v1": "q_learning.py", "Image-v0": "dqn_atari.py", "Tuple-v0": "q_learning.py"}
OTHERS |= {"CarRacing-v3": "dqn_atari.py", "Dict-v0": "no script"}
CASES = {
    "q_learning": Case(
        budget="--total-episodes",
        small=1000,
        flags=["--eval-episodes", "5", "--checkpoint-every", "1000"],
        refused={
            "Pendulum-v1": "a2c_continuous.py",
            "CartPole-v1": "ppo.py",
            "Image-v0": "dqn_atari.py",
            "CarRacing-v3": "dqn_atari.py",
            "Dict-v0": "no script",
            "From1-v0": "no script",
        },
        bad_flags=[
            ["--total-episodes", "0"],
            ["--learning-rate", "2"],
            ["--gamma", "-1"],
            ["--min-epsilon", "2"],
            ["--eval-seeds", "some"],
            ["--env-kwargs", "{"],
            ["--env-kwargs", '{"no_such_option": 1}'],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
        broken_env=None,
        checkpoint="q_table.npz",
    ),
    "sarsa": Case(
        budget="--total-episodes",
        small=200,
        flags=["--eval-episodes", "5", "--checkpoint-every", "1000"],
        refused={
            "Pendulum-v1": "a2c_continuous.py",
            "CartPole-v1": "ppo.py",
            "Image-v0": "dqn_atari.py",
            "Dict-v0": "no script",
            "From1-v0": "no script",
        },
        bad_flags=[
            ["--total-episodes", "0"],
            ["--learning-rate", "2"],
            ["--n-step", "-1"],
            ["--min-epsilon", "2"],
            ["--greedy-target", "--n-step", "2"],
            ["--eval-seeds", "some"],
            ["--env-kwargs", "{"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
        broken_env=None,
        checkpoint="q_table.npz",
    ),
    "reinforce": Case(
        budget="--total-episodes",
        small=80,
        flags=["--num-envs", "4", "--eval-episodes", "5", "--checkpoint-every", "8"],
        refused={
            "Pendulum-v1": "a2c_continuous.py",
            "From1Box-v0": "no script",
            "pixelcopter:Pixelcopter-v0": "envs.pixelcopter:Pixelcopter-v0",
            **OTHERS,
        },
        bad_flags=[
            ["--total-episodes", "3"],
            ["--num-envs", "1"],
            ["--hidden-sizes", "0"],
            ["--restart-credit", "--no-reward-to-go"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
    ),
    "dqn_atari": Case(
        budget="--total-timesteps",
        small=1500,
        # A game of RoadRunner is short, whatever the player does.
        flags=[
            *("--env-id", "ALE/RoadRunner-v5", "--num-envs", "4", "--learning-starts", "300"),
            *("--buffer-size", "400", "--train-frequency", "40", "--batch-size", "8", "--end-e", "1"),
            *("--eval-episodes", "2", "--checkpoint-every", "300"),
        ],
        refused={
            "CartPole-v1": "ppo.py",
            "Pendulum-v1": "a2c_continuous.py",
            "FrozenLake-v1": "q_learning.py",
            "Tuple-v0": "q_learning.py",
            "Blackjack-v1": "q_learning.py",
            "tabular/Blackjack-v0": "tabular/Blackjack-v0",
            "phys2d/CartPole-v1": "phys2d/CartPole-v1",
            "ALE/Pongg-v5": "ALE/Pong-v5",
            "Pong-v7": "Pong-v",
            "Dict-v0": "no script",
        },
        bad_flags=[
            ["--num-envs", "0"],
            ["--learning-starts", "1500"],
            ["--buffer-size", "7"],
            ["--buffer-size", "1000000000"],
            ["--end-e", "2"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
        broken_env=None,
    ),
    "a2c_continuous": Case(
        budget="--total-timesteps",
        small=6000,
        flags=["--env-id", "Pendulum-v1", "--eval-episodes", "5", "--checkpoint-every", "500"],
        refused={"CartPole-v1": "ppo.py", **OTHERS},
        bad_flags=[
            ["--num-envs", "0"],
            ["--total-timesteps", "10"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
        broken_env="BrokenBox-v0",
    ),
    "ppo": Case(
        budget="--total-timesteps",
        small=4096,
        flags=["--num-envs", "4", "--num-steps", "64", "--eval-episodes", "5", "--checkpoint-every", "512"],
        refused={"Pendulum-v1": "a2c_continuous.py", "From1Box-v0": "no script", **OTHERS},
        bad_flags=[
            ["--num-minibatches", "3"],
            ["--num-minibatches", "256"],
            ["--num-envs", "0"],
            ["--total-timesteps", "100"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
    ),
    "rnd_ppo": Case(
        budget="--total-timesteps",
        small=2048,
        flags=[
            *("--env-id", "CartPole-v1", "--num-envs", "4", "--num-steps", "64", "--init-steps", "8"),
            *("--eval-episodes", "5", "--checkpoint-every", "512"),
        ],
        refused={
            "Pendulum-v1": "a2c_continuous.py",
            "PongNoFrameskip-v4": "dqn_atari.py",
            "pyramids:Pyramids-v0": "envs.pyramids:Pyramids-v0",
            "From1Box-v0": "no script",
            **OTHERS,
        },
        bad_flags=[
            ["--num-minibatches", "3"],
            ["--num-minibatches", "256"],
            ["--predictor-share", "0"],
            ["--num-envs", "0"],
            ["--total-timesteps", "100"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
    ),
    "dqn": Case(
        budget="--total-timesteps",
        small=3000,
        flags=["--learning-starts", "500", "--eval-episodes", "5", "--checkpoint-every", "500"],
        refused={"Pendulum-v1": "a2c_continuous.py", **OTHERS},
        bad_flags=[
            ["--num-envs", "0"],
            ["--learning-starts", "3000"],
            ["--buffer-size", "7"],
            ["--buffer-size", "100000000000"],
            ["--end-e", "2"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
    ),
    "icm_ppo": Case(
        budget="--total-timesteps",
        small=2048,
        flags=[
            *("--env-id", "CartPole-v1", "--num-envs", "4", "--num-steps", "64", "--init-steps", "8"),
            *("--eval-episodes", "5", "--checkpoint-every", "512"),
        ],
        refused={
            "Pendulum-v1": "a2c_continuous.py",
            "PongNoFrameskip-v4": "dqn_atari.py",
            "From1Box-v0": "no script",
            **OTHERS,
        },
        bad_flags=[
            ["--num-minibatches", "3"],
            ["--features", "pixels"],
            ["--predictor-share", "0"],
            ["--total-timesteps", "100"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
    ),
    "ppo_atari": Case(
        budget="--total-timesteps",
        small=512,
        # A game of RoadRunner is short, whatever the player does.
        flags=[
            *("--env-id", "ALE/RoadRunner-v5", "--num-envs", "4", "--num-steps", "16"),
            *("--num-minibatches", "2", "--update-epochs", "1", "--eval-episodes", "2"),
            *("--checkpoint-every", "64"),
        ],
        refused={
            "CartPole-v1": "ppo.py",
            "Pendulum-v1": "a2c_continuous.py",
            "FrozenLake-v1": "q_learning.py",
            "Tuple-v0": "q_learning.py",
            "Blackjack-v1": "q_learning.py",
            "tabular/Blackjack-v0": "tabular/Blackjack-v0",
            "phys2d/CartPole-v1": "phys2d/CartPole-v1",
            "ALE/Pongg-v5": "ALE/Pong-v5",
            "Pong-v7": "Pong-v",
            "Dict-v0": "no script",
        },
        bad_flags=[
            ["--num-envs", "0"],
            ["--num-minibatches", "3"],
            ["--num-steps", "1000000"],
            ["--total-timesteps", "10"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
        broken_env=None,
    ),
    "ppo_continuous": Case(
        budget="--total-timesteps",
        small=4096,
        flags=[
            *("--env-id", "Pendulum-v1", "--num-envs", "4", "--num-steps", "64", "--num-minibatches", "4"),
            *("--update-epochs", "2", "--eval-episodes", "5", "--checkpoint-every", "512"),
        ],
        refused={"CartPole-v1": "ppo.py", **OTHERS},
        bad_flags=[
            ["--num-minibatches", "3"],
            ["--num-minibatches", "256"],
            ["--sde-sample-freq", "-2"],
            ["--num-envs", "0"],
            ["--total-timesteps", "100"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
        broken_env="BrokenBox-v0",
    ),
    "decision_transformer": Case(
        budget="--total-updates",
        small=30,
        flags=[
            *("--env-id", "CartPole-v1", "--random-episodes", "40", "--width", "16", "--num-envs", "4"),
            *("--warmup-updates", "5", "--eval-every", "10", "--eval-episodes", "5"),
            *("--checkpoint-every", "5"),
        ],
        refused={
            "Image-v0": "dqn_atari.py",
            "CarRacing-v3": "dqn_atari.py",
            "Tuple-v0": "q_learning.py",
            "Dict-v0": "no script",
            "From1-v0": "no script",
        },
        bad_flags=[
            ["--num-heads", "3"],
            ["--warmup-updates", "30"],
            ["--target-returns", "nan"],
            ["--no-condition", "--target-returns", "1"],
            ["--env-kwargs", "{"],
            ["--num-envs", "0"],
            ["--eval-episodes", "0"],
            ["--seed", "-1"],
        ],
        broken_env=None,  # data with NaN are refused before the run begins
    ),
}
SCRIPTS = list(CASES)


def test_every_script_is_held_to_its_promises():
    assert sorted(CASES) == sorted(copy_block.SCRIPTS)


def call(name: str, *argv, monkeypatch, capfd) -> tuple[int, str, str]:
    """Run a script's main block in this process; returns exit code, stdout and stderr."""
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    capfd.readouterr()
    code = 0
    try:
        source = (ALGOS / f"{name}.py").read_text()
        main = source[source.index('if __name__ == "__main__":') :]
        exec(compile(main, f"{name}.py", "exec"), {**vars(module), "__name__": "__main__"})
    except SystemExit as end:
        code = end.code
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code, *capfd.readouterr()


def start(name: str, *argv, new_group: bool = False, **environment) -> subprocess.Popen:
    """Run a script as users do, in a process of its own, or as the first of a new group of processes."""
    command = [sys.executable, str(ALGOS / f"{name}.py"), *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ALGOS,
        start_new_session=new_group,
    )


def test_ctrl_c_before_the_run_begins_ends_without_a_traceback():
    """While the data of a training are read or played there is nothing to save, and nothing to explain."""
    process = start("decision_transformer", "--env-id", "CartPole-v1", "--random-episodes", "1000000")
    seen = ""
    while "random play" not in seen:  # its bar appears after two seconds
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in rest


def scalars(run_dir: Path) -> dict[str, list]:
    """All points of all charts but those that measure time."""
    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if tag != "charts/SPS"]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


def global_step(run_dir: Path, case: Case) -> int:
    """The step count in a checkpoint."""
    path = run_dir / case.checkpoint
    if not path.exists():
        return -1
    if path.suffix == ".npz":
        return int(np.load(path, allow_pickle=False)["global_step"])
    import torch

    return torch.load(path, weights_only=True)["global_step"]


@pytest.fixture(scope="module", params=SCRIPTS)
def finished_run(request, tmp_path_factory):
    """One complete run of each script, from the shell, with a film."""
    name = request.param
    run_dir = tmp_path_factory.mktemp(name) / "run"
    process = start(name, *CASES[name].command, "--capture-video", "--run-dir", run_dir)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return name, run_dir, out, err


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of the finished run, to damage: the script's name and the folder."""
    return finished_run[0], Path(shutil.copytree(finished_run[1], tmp_path / "run"))


def test_a_run_leaves_its_folder(finished_run):
    name, run_dir, out, err = finished_run
    case = CASES[name]
    arguments = json.loads((run_dir / "args.json").read_text())
    module = importlib.import_module(name)
    assert set(arguments) == set(module.Args.__dataclass_fields__) | {"versions"}
    assert arguments["versions"]["gymnasium"]
    results = json.loads((run_dir / "results.json").read_text())
    assert set(results) == {
        *("algo", "env_id", "seed", "global_step", "episodes", "mean_reward", "std_reward", "score"),
        *("eval_episodes", "wall_time_s", "steps_per_second"),
    }
    assert results["algo"] == name and results["env_id"] == arguments["env_id"]
    assert results["score"] == pytest.approx(results["mean_reward"] - results["std_reward"])
    assert results["eval_episodes"] == arguments["eval_episodes"]
    assert results["steps_per_second"] == pytest.approx(results["global_step"] / results["wall_time_s"])
    assert results["episodes"] > 0
    charts = scalars(run_dir)
    assert {"charts/episodic_return", "charts/episodic_length"} <= set(charts)
    assert any(tag.startswith("losses/") for tag in charts)
    assert global_step(run_dir, case) == results["global_step"]
    assert not list(run_dir.glob("tmp-*"))
    import imageio_ffmpeg

    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(run_dir / "replay.mp4"))
    assert frames > 1 and seconds > 0
    assert len(out.strip().splitlines()) == 1, "one summary line on the console"
    assert "return" in err, "the progress bar shows the mean return"
    assert "error" not in err, "what other libraries say about a film without a screen"


def test_a_film_shows_every_step_of_an_episode(tmp_path):
    import imageio_ffmpeg
    import ppo

    calls = []
    ppo.record_video(ppo.Args(), lambda obs: calls.append(obs) or [0], tmp_path / "replay.mp4")
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "replay.mp4"))
    assert frames == len(calls) + 1 > 8
    assert [path.name for path in tmp_path.iterdir()] == ["replay.mp4"]


@pytest.mark.parametrize("name", ["ppo", "dqn", "reinforce", "decision_transformer"])
def test_what_cannot_be_filmed_is_refused_before_training(name, tmp_path, monkeypatch, capfd):
    film = ["--env-id", "counter_env:Blind-v0", "--capture-video", "--run-dir", tmp_path / "run"]
    code, _, err = call(name, *film, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and len(err.splitlines()) == 1 and "--capture-video" in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ppo", "q_learning", "sarsa"])
def test_a_film_replaces_a_link_and_not_what_it_leads_to(name, tmp_path):
    module = importlib.import_module(name)
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / "tmp-replay.mp4").symlink_to(tmp_path / "precious")
    policy = (lambda obs: [0]) if name == "ppo" else (lambda state: 0)
    module.record_video(module.Args(), policy, tmp_path / "replay.mp4")
    assert (tmp_path / "precious").read_bytes() == b"mine" and not (tmp_path / "replay.mp4").is_symlink()


def last_frame(path: Path) -> np.ndarray:
    import imageio.v3 as iio

    return iio.imread(path)[-1].astype(int)


@pytest.mark.parametrize("name", ["ppo", "reinforce", "rnd_ppo"])
@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_the_last_frame_is_that_of_the_last_step(name, ending, tmp_path):
    """The counter is 10 brighter after each of its three steps; the next episode would begin in black."""
    module = importlib.import_module(name)
    args = module.Args(env_id=f"Counter-{ending}-v0")
    module.record_video(args, lambda obs: np.zeros(1, dtype=int), tmp_path / "replay.mp4")
    assert abs(last_frame(tmp_path / "replay.mp4").mean() - 30) < 4


@pytest.mark.parametrize("env_id", ["envs.pixelcopter:Pixelcopter-v0", "MiniGrid-Empty-5x5-v0"])
def test_a_film_shows_the_end_of_its_game(env_id, tmp_path):
    """The same game played apart, without any reset: its last picture is that of the film."""
    import gymnasium as gym

    module = importlib.import_module("rnd_ppo" if "MiniGrid" in env_id else "reinforce")
    actions = iter(np.random.default_rng(0).integers(2 if "copter" in env_id else 3, size=2000))
    played = []
    policy = lambda obs: played.append(next(actions)) or np.array(played[-1:])  # noqa: E731
    args = module.Args(env_id=env_id)
    module.record_video(args, policy, tmp_path / "replay.mp4")
    (seed,) = module.env_seeds(1, args.seed, 1, 0)
    env = gym.make(env_id, render_mode="rgb_array")
    env.reset(seed=seed)
    first = env.render().astype(int)
    endings = [env.step(action)[2:4] for action in played]
    assert not any(map(any, endings[:-1])) and any(endings[-1])
    shown, last = last_frame(tmp_path / "replay.mp4"), env.render().astype(int)
    rows, columns = shown.shape[:2]
    difference = np.abs(shown - last[:rows, :columns]).mean()
    assert difference < 6, "but for the film's compression"
    assert difference < 0.5 * np.abs(shown - first[:rows, :columns]).mean() or "MiniGrid" in env_id


@pytest.mark.skipif(not find_library("EGL"), reason="without EGL MuJoCo needs a screen")
def test_a_film_of_mujoco_needs_no_screen(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}
    command = ["--env-id", "InvertedPendulum-v5", "--total-timesteps", "64", "--eval-episodes", "1"]
    command = [sys.executable, str(ALGOS / "a2c_continuous.py"), *command, "--capture-video"]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "run" / "replay.mp4").stat().st_size > 1000, done.stderr


@pytest.mark.skipif(not find_library("EGL"), reason="without EGL MuJoCo needs a screen")
def test_the_camera_follows_a_robot(monkeypatch, tmp_path):
    """The free camera would lose a cheetah that is 20 metres further on."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    run = textwrap.dedent("""
        import numpy as np, sys
        import moviepy.video.io.ffmpeg_writer as writer
        import a2c_continuous as script
        film = []
        class Film:
            def __init__(self, path, *_): open(path, "w").close()
            def __enter__(self): return self
            def __exit__(self, *_): pass
            def write_frame(self, frame): film.append(frame.astype(int))
        writer.FFMPEG_VideoWriter = Film
        script.MAX_EVAL_STEPS = 2
        def policy(obs):
            for env in envs[-1].unwrapped.envs:
                env.unwrapped.data.qpos[0] += 20  # metres
            return np.zeros((1, 6), dtype=np.float32)
        envs, make_envs = [], script.make_envs
        script.make_envs = lambda *a, **k: envs.append(make_envs(*a, **k)) or envs[-1]
        script.record_video(script.Args(env_id="HalfCheetah-v5"), policy, script.Path(sys.argv[1]))
        for frame in (film[0], film[-1]):  # the robot is orange and red, all else is grey or green
            robot = (frame[:, :, 0] - frame[:, :, 1] > 30)
            assert robot.sum() > 500, robot.sum()
        """)
    command = [sys.executable, "-c", run, str(tmp_path / "replay.mp4")]
    environment = os.environ | {"PYTHONPATH": str(ALGOS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_evaluate_reproduces_the_score_and_changes_nothing(finished_run):
    name, run_dir, out, _ = finished_run
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in run_dir.iterdir()}
    process = start(name, "--evaluate", run_dir)
    again, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert again == out  # the same line: the same mean, deviation and number of episodes
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in run_dir.iterdir()} == before


def contents(path: Path) -> dict:
    """Everything in a checkpoint but the time it took, tensors as arrays, nested names joined."""
    if path.suffix == ".npz":
        return {key: value for key, value in np.load(path, allow_pickle=False).items() if "time" not in key}
    import torch

    flat, todo = {}, [("", torch.load(path, weights_only=True))]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{name}/{key}", inner) for key, inner in value.items() if key != "wall_time_s"]
        elif isinstance(value, list | tuple):
            todo += [(f"{name}/{key}", inner) for key, inner in enumerate(value)]
        else:
            if isinstance(value, torch.Tensor):  # NumPy has no bfloat16
                value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
            flat[name] = value
    return flat


def test_resume_restores_everything(copied_run, monkeypatch, capfd):
    """A run whose budget is used up saves again what it has loaded: what was not restored would differ.

    A network that learned is evaluated by a network of its own, without what only acts in training (dropout).
    """
    name, run_dir = copied_run
    module = importlib.import_module(name)
    agents = []
    if hasattr(module, "make_agent"):
        make_agent = module.make_agent
        monkeypatch.setattr(module, "make_agent", lambda *a: agents.append(make_agent(*a)) or agents[-1])
    before = contents(run_dir / CASES[name].checkpoint)
    code, _, err = call(name, "--resume", run_dir, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0, err
    after = contents(run_dir / CASES[name].checkpoint)
    for rates in (before, after):  # set anew from the flag and the schedule
        rates.pop("/optimizer/param_groups/0/lr", None)
    np.testing.assert_equal(after, before)
    assert not agents or (agents[0].training or name == "decision_transformer") and not agents[-1].training


def test_the_seed_decides_every_number(finished_run, tmp_path, monkeypatch, capfd):
    """In this process as in the one of the finished run, which has seed 1, and without its film."""
    name, finished, _, _ = finished_run
    charts, results = [], []
    for folder, seed in ((finished, 1), (tmp_path / "same", 1), (tmp_path / "other", 4)):
        if folder != finished:
            arguments = [*CASES[name].command, "--seed", seed, "--run-dir", folder]
            code, _, err = call(name, *arguments, monkeypatch=monkeypatch, capfd=capfd)
            assert code == 0, err
        charts.append(scalars(folder))
        result = json.loads((folder / "results.json").read_text())
        results.append([result[key] for key in ("global_step", "episodes", "mean_reward", "std_reward")])
    np.testing.assert_equal(charts[0], charts[1])
    assert results[0] == results[1]
    of_episodes = ("charts/episodic_return", "charts/episodic_length")
    assert any(charts[0][tag] != charts[2][tag] for tag in of_episodes)


@pytest.mark.parametrize("name", SCRIPTS)
def test_sub_environments_differ(name):
    seeds = importlib.import_module(name).env_seeds
    assert len(set(seeds(8, 1, 0, 0))) == 8
    assert not set(seeds(8, 1, 0, 0)) & set(seeds(8, 2, 0, 0)), "neighbouring seeds share environments"
    assert not set(seeds(8, 1, 0, 0)) & set(seeds(8, 1, 1, 0)), "evaluation repeats the training"


@pytest.mark.parametrize("name", SCRIPTS)
def test_interrupted_killed_and_resumed(name, tmp_path, monkeypatch, capfd):
    """Ctrl-C saves and exits with 130; kill -9 leaves a whole checkpoint; --resume goes on from there."""
    case, run_dir = CASES[name], tmp_path / "run"
    process = start(name, *case.flags, case.budget, 10**8, "--run-dir", run_dir)
    steps = []
    for stop in (signal.SIGINT, signal.SIGKILL):
        seen = max(steps, default=0)
        deadline = time.time() + 120
        while global_step(run_dir, case) <= seen and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
        assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL), err
        assert "Traceback" not in err
        steps.append(global_step(run_dir, case))
        assert steps[-1] > seen
        if stop == signal.SIGINT:
            process = start(name, "--resume", run_dir)
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved["resume"] is None and saved[case.budget[2:].replace("-", "_")] == 10**8
    # Then to the end: a budget that is used up already only evaluates, a larger one trains on.
    arguments = ["--resume", run_dir, case.budget, case.small]
    code, out, err = call(name, *arguments, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0, err
    results = json.loads((run_dir / "results.json").read_text())
    assert results["global_step"] >= steps[-1]
    charts = scalars(run_dir).get("charts/episodic_return", [])  # a short run may have none yet
    assert [step for step, _ in charts] == sorted({step for step, _ in charts}), "no point twice"


def test_bad_input_is_one_line_and_exit_code_2(copied_run, tmp_path, monkeypatch, capfd):
    name, run_dir = copied_run
    case = CASES[name]

    def refused(*argv) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = call(name, *argv, monkeypatch=monkeypatch, capfd=capfd)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2, (argv, out, err)
        assert len(lines) == 1 and "Traceback" not in err, err
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return lines[0]

    new = ["--run-dir", tmp_path / "new"]
    assert "CartPole-v1" in refused("--env-id", "CartPol-v1", *new)
    assert "no_such_module" in refused("--env-id", "no_such_module:Thing-v0", *new)
    for env_id, serves in case.refused.items():
        # With a small budget: if it were not refused, it would be trained.
        assert serves in refused(*case.command, "--env-id", env_id, *new)
    for flags in case.bad_flags:
        refused(*case.command, *flags, *new)
    refused("--evaluate", tmp_path / "nothing")
    refused("--resume", tmp_path / "nothing")
    assert "--resume" in refused(*case.command, "--run-dir", run_dir), "a run is not overwritten"
    checkpoint = run_dir / case.checkpoint
    whole = checkpoint.read_bytes()

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    for damaged in (whole[: len(whole) // 2], b"", pickle.dumps({"agent": Bomb()}), bomb_file(case, Bomb())):
        checkpoint.write_bytes(damaged)
        refused("--evaluate", run_dir)
        refused("--resume", run_dir)
    checkpoint.unlink()
    refused("--evaluate", run_dir)
    (run_dir / "args.json").write_text("{")
    refused("--evaluate", run_dir)


@pytest.mark.parametrize("name", SCRIPTS)
def test_args_json_may_say_anything(name, capsys):
    """tyro checks flags; a number of the wrong kind in args.json is one line all the same."""
    module = importlib.import_module(name)

    def refused(**changes) -> str:
        with pytest.raises(SystemExit) as end:
            module.check_args(dataclasses.replace(module.Args(), **changes))
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
        return message

    for name_of_field, (low, high) in module.RANGES.items():
        about = module.Args.__dataclass_fields__[name_of_field].type
        wrong = ["1", {}, float("nan"), high + 1]
        if getattr(about, "__origin__", None) is list:
            wrong = [low, ["1"], [None], *([number] for number in wrong[2:])]
        else:
            wrong += [[low], *([low + 0.5] if float not in (about, *getattr(about, "__args__", ())) else [])]
            wrong += [None] if about in (int, float) else []
        for value in wrong:
            assert f"--{name_of_field.replace('_', '-')} " in refused(**{name_of_field: value})
    for name_of_field in module.Args.__dataclass_fields__.keys() - module.RANGES:
        about = module.Args.__dataclass_fields__[name_of_field].type
        for value in ("no", 1, None) if about is bool else (5, ["a"], {}):
            assert f"--{name_of_field.replace('_', '-')} " in refused(**{name_of_field: value})


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_observation_without_an_axis_is_refused(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        module.check_args(dataclasses.replace(module.Args(), env_id="Point-v0"))
    message = capsys.readouterr().err
    assert end.value.code == 2 and "Point-v0" in message and message.count("\n") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_begun_anew(name, tmp_path):
    module = importlib.import_module(name)
    args = module.Args(run_dir=str(tmp_path / "run"))
    module.open_folder(args)[1].close()
    module.open_folder(args)[1].close()
    assert json.loads((tmp_path / "run" / "args.json").read_text())["seed"] == args.seed
    for checkpoint in ("checkpoint.pt", "q_table.npz"):  # also that of another script
        (tmp_path / "run" / checkpoint).touch()
        with pytest.raises(SystemExit):
            module.open_folder(args)
        (tmp_path / "run" / checkpoint).unlink()


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_two_runs_share_a_folder(name, tmp_path, monkeypatch, capfd):
    """Neither by default, where a name has whole seconds only, nor by --run-dir, nor by --resume."""
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.time, "strftime", lambda _: "20260131-120000")
    opened = [module.open_folder(module.Args(seed=7)) for _ in range(3)]
    names = [folder.name for folder, _ in opened]
    assert len(set(names)) == 3 and [name.removeprefix(names[0]) for name in names] == ["", "-2", "-3"]
    for flags in ({"run_dir": str(opened[0][0])}, {"resume": str(opened[0][0])}):
        capfd.readouterr()
        with pytest.raises(SystemExit) as refused:
            module.open_folder(module.Args(**flags))
        assert refused.value.code == 2 and "another process" in capfd.readouterr().err
    for _, lock in opened:
        lock.close()
    module.open_folder(module.Args(resume=str(opened[0][0])))[1].close()


def fresh_run(module, eps=1e-8, **flags):
    """A Run whose parts have states, but learn nothing. eps: of Adam."""
    if not hasattr(module, "torch"):
        return module.Run(module.Args(**flags), budget=100)
    agent = module.nn.Linear(2, 2)
    optimizer = module.torch.optim.Adam(agent.parameters(), lr=flags.get("learning_rate", 1e-3), eps=eps)
    return module.Run(module.Args(**flags), budget=100, agent=agent, optimizer=optimizer)


@pytest.mark.parametrize("name", copy_block.WITH_TORCH)
@pytest.mark.parametrize("saved_step", [0, 7])
def test_a_resumed_run_takes_back_the_points_beyond_its_checkpoint(name, saved_step, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    # Names of event files end in a number that counts those of this process. The number is sorted as text:
    # 10 would come before 9, where both files were begun in the same second.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

    def log(run, steps) -> None:
        for run.step in steps:
            run.log("losses", x=run.step)
        run.bar.close()
        run.writer.close()
        run.lock.close()

    run = fresh_run(module, run_dir=str(tmp_path / "run"))
    run.step = saved_step
    run.save()
    log(run, (5, 10, 15))
    run = fresh_run(module, resume=str(tmp_path / "run"))
    assert run.step == saved_step
    log(run, (10, 20))
    steps = [step for step, _ in scalars(tmp_path / "run")["losses/x"]]
    assert steps == ([5] if saved_step else []) + [10, 20]


@pytest.mark.parametrize("name", copy_block.WITH_TORCH)
def test_a_run_counts_saves_and_ends_as_it_should(name, tmp_path, monkeypatch):
    """By hand: rollouts of 10 steps, a budget of 100, a checkpoint every 25 steps."""
    module = importlib.import_module(name)
    run = fresh_run(module, run_dir=str(tmp_path / "run"), checkpoint_every=25)
    saved, save = [], run.save
    monkeypatch.setattr(run, "save", lambda: saved.append(run.step) or save())
    while run.goes_on(10):
        run.step += 10
        run.episodes_ended([float(run.step)], [3])
    assert run.step == 100 and saved == [0, 20, 40, 60, 80, 100]
    assert run.episodes == 10 and run.mean_return() == -np.inf
    run.episodes_ended(np.arange(95.0), np.ones(95))
    assert run.mean_return() == pytest.approx((np.arange(95).sum() + 60 + 70 + 80 + 90 + 100) / 100)
    run.stop()
    assert not run.goes_on(1)
    run.budget = 1000
    run.stopped.append(signal.SIGTERM)
    assert not run.goes_on(1) and saved[-1] == 100
    with pytest.raises(SystemExit) as stopped:
        run.finish("cpu")
    assert stopped.value.code == 143
    unit = fresh_run(module, run_dir=str(tmp_path / "other"), checkpoint_every=25)
    unit.unit = "episodes"
    while unit.goes_on(4):
        unit.step += 1000
        unit.episodes_ended([0.0] * 4, [250] * 4)
    assert unit.episodes == 100
    unit.lock.close()


@pytest.mark.parametrize("name", copy_block.WITH_TORCH)
def test_weights_that_are_not_finite_replace_no_checkpoint(name, tmp_path, capfd):
    module = importlib.import_module(name)
    run = fresh_run(module, run_dir=str(tmp_path / "run"))
    run.save()
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    run.parts["agent"].weight.data[0, 1] = float("nan")
    with pytest.raises(SystemExit) as stopped:
        run.save()
    assert stopped.value.code == 1 and "nan at step 0" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good


@pytest.mark.parametrize("name", copy_block.WITH_TORCH)
def test_resume_takes_the_settings_of_the_optimizer_that_are_given_now(name, tmp_path):
    module = importlib.import_module(name)
    run = fresh_run(module, run_dir=str(tmp_path / "run"))
    run.save()
    run.lock.close()
    again = fresh_run(module, eps=0.5, resume=str(tmp_path / "run"), learning_rate=0.0123)
    (group,) = again.parts["optimizer"].param_groups
    assert (group["lr"], group["eps"]) == (0.0123, 0.5)
    assert group["params"] == list(again.parts["agent"].parameters())
    again.lock.close()


def test_a_flipped_bit_is_a_line_or_changes_nothing(copied_run):
    """Of a checkpoint's bits some are padding; no other may go unnoticed."""
    name, run_dir = copied_run
    module, path = importlib.import_module(name), run_dir / CASES[name].checkpoint
    whole, before = path.read_bytes(), contents(path)
    rng, noticed = np.random.default_rng(0), 0
    for position in rng.integers(len(whole), size=40):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            if name in copy_block.WITH_TORCH:
                module.load_checkpoint(run_dir)
            else:
                env = module.make_env(module.Args(**saved_args(run_dir)))
                sizes = (int(env.observation_space.n), int(env.action_space.n))
                module.load_checkpoint(run_dir, *sizes)
        except SystemExit as stop:
            assert stop.code == 2
            noticed += 1
        else:
            np.testing.assert_equal(contents(path), before)
    assert noticed > 20


@pytest.mark.parametrize("name", copy_block.WITH_TORCH)
def test_records_that_call_themselves_folders_are_damage(name, tmp_path):
    """A bit of the zip file's index that no checksum covers, and that fills a tensor with nonsense."""
    module = importlib.import_module(name)
    run = fresh_run(module, run_dir=str(tmp_path))
    run.save()
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    module.load_checkpoint(tmp_path, agent=run.parts["agent"])
    starts = [match.start() for match in re.finditer(b"PK\x01\x02", whole)]
    assert len(starts) > 5
    for start in starts:
        damaged = bytearray(whole)
        damaged[start + 38] ^= 0x10  # the external attributes; "directory" in those of MS-DOS
        path.write_bytes(damaged)
        with pytest.raises(SystemExit) as stopped:
            module.load_checkpoint(tmp_path)
        assert stopped.value.code == 2
    run.lock.close()


def saved_args(run_dir: Path) -> dict:
    saved = json.loads((run_dir / "args.json").read_text())
    del saved["versions"]
    return saved


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_strangers_folder_imports_no_module_of_his(name, tmp_path, monkeypatch, capfd):
    """args.json may say module:id; only a user who repeats it lets the module run."""
    (tmp_path / "his_task.py").write_text("raise SystemExit('his code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    lock = module.open_folder(module.Args(env_id="his_task:Task-v0", run_dir=str(tmp_path / "run")))[1]
    lock.close()
    for flag in ("--evaluate", "--resume"):
        code, _, err = call(name, flag, tmp_path / "run", monkeypatch=monkeypatch, capfd=capfd)
        assert code == 2 and "--env-id his_task:Task-v0" in err
        arguments = [flag, tmp_path / "run", "--env-id", "his_task:Task-v0"]
        code, _, _ = call(name, *arguments, monkeypatch=monkeypatch, capfd=capfd)
        assert code == "his code ran"


@pytest.mark.parametrize("name", SCRIPTS)
def test_links_in_a_strangers_folder_lead_nowhere(name, tmp_path):
    """Whoever goes on with it must not overwrite files of his own."""
    module = importlib.import_module(name)
    precious, run_dir = tmp_path / "precious", tmp_path / "run"
    precious.write_bytes(b"mine")
    run_dir.mkdir()
    for link in (".lock", "tmp-args.json"):
        (run_dir / link).symlink_to(precious)
    module.open_folder(module.Args(resume=str(run_dir)))[1].close()
    assert precious.read_bytes() == b"mine"
    assert (run_dir / "args.json").is_file() and not (run_dir / "args.json").is_symlink()


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_strangers_folder_wants_resumed_or_evaluated_is_not(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    saved = dataclasses.asdict(module.Args()) | {"versions": {}, "evaluate": "/other", "resume": "/third"}
    (tmp_path / "args.json").write_text(json.dumps(saved))
    for flag in ("resume", "evaluate"):
        monkeypatch.setattr(sys, "argv", [name, f"--{flag}", str(tmp_path)])
        args = module.parse_args()
        assert {"resume": args.resume, "evaluate": args.evaluate} == {
            "resume": None,
            "evaluate": None,
            flag: str(tmp_path),
        }


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_text_than_the_one_that_made_a_run_says_so(name, tmp_path, monkeypatch, capfd):
    """Who copies a script and changes its network gets other scores with the original, without an error."""
    module = importlib.import_module(name)
    module.open_folder(module.Args(run_dir=str(tmp_path / "run")))[1].close()
    for flag in ("--evaluate", "--resume"):
        monkeypatch.setattr(sys, "argv", [name, flag, str(tmp_path / "run")])
        module.parse_args()
        assert capfd.readouterr() == ("", "")
        copy = tmp_path / f"{name}.py"
        copy.write_text((ALGOS / f"{name}.py").read_text() + "# changed\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(copy))
            module.parse_args()
        out, err = capfd.readouterr()
        assert out == "" and err == f"note: this {name}.py is not the text that made {tmp_path / 'run'}\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_new_number_without_a_range_is_refused(name, tmp_path, monkeypatch, capfd):
    """A new flag takes no nonsense either: who adds a number to Args is told where its limits belong."""
    module = importlib.import_module(name)
    for kind in (float, int, int | None):
        new = dataclasses.make_dataclass("Args", [("warmup", kind, 1)], bases=(module.Args,), frozen=True)
        with monkeypatch.context() as patch:
            patch.setattr(module, "Args", new)
            with pytest.raises(SystemExit) as stopped:
                module.check_args(new())
        assert stopped.value.code == 2
        assert "error: RANGES does not say what --warmup may be" in capfd.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_room_left_is_a_line_and_the_old_file_stays(name, tmp_path, monkeypatch, capfd):
    module = importlib.import_module(name)
    path = tmp_path / "checkpoint.pt"
    module.write_file(path, b"old")

    def full(self, data) -> None:
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        module.write_file(path, b"new")
    err = capfd.readouterr().err
    assert stopped.value.code == 1 and len(err.splitlines()) == 1 and "No space left" in err
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_track_without_a_login_is_one_line(name, tmp_path, monkeypatch, capfd):
    import wandb

    module = importlib.import_module(name)

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(SystemExit) as stopped:
        module.open_folder(module.Args(track=True, run_dir=str(tmp_path / "run")))
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and "No API key" in err


def test_an_error_stands_on_a_line_of_its_own_below_no_bar():
    """In a process of its own: a bar that another test left open would move this one to the next line."""
    code = "import ppo; bar = ppo.tqdm(total=10); bar.update(3); ppo.fail('broken')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ALGOS, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: broken" in done.stderr.splitlines()


@pytest.mark.parametrize("name", ["a2c_continuous", "icm_ppo", "ppo_continuous", "reinforce"])
def test_words_of_args_json_are_checked(name, capfd):
    """One flipped bit makes "sync" "qync"; tyro sees the command line only."""
    module = importlib.import_module(name)
    (choice,) = {"vectorization", "features", "baseline"} & set(module.Args.__dataclass_fields__)
    for word in ("qync", None):
        with pytest.raises(SystemExit) as stopped:
            module.check_args(module.Args(**{choice: word}))
        err = capfd.readouterr().err
        assert stopped.value.code == 2 and len(err.splitlines()) == 1 and f"--{choice} {word}" in err


NONSENSE = ["nan", "inf", "-inf", "-1", "0", "1e30", str(10**23), "text", ""]


@pytest.mark.parametrize("name", SCRIPTS)
def test_nonsense_in_any_field_is_one_line_or_a_setting_that_makes_sense(name, monkeypatch, capfd):
    """Every number of every script; what is let through lies in the documented range."""
    module = importlib.import_module(name)
    make = "make_env" if hasattr(module, "make_env") else "make_envs"
    here = find_spec("pybullet") or name != "a2c_continuous"  # is the default environment?
    other = [] if here else ["--env-id", "Pendulum-v1"]
    settings = module.Args(**({} if here else {"env_id": "Pendulum-v1"}))
    envs = getattr(module, make)(settings, *([] if make == "make_env" else [1]))
    envs.close = lambda: None
    monkeypatch.setattr(module, make, lambda *_: envs)  # made once, for speed
    for field_name, (low, high) in module.RANGES.items():
        for value in NONSENSE:
            flag = "--" + field_name.replace("_", "-")
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *other, flag, value])
            capfd.readouterr()
            try:
                args = module.parse_args()
                module.check_args(args)
            except SystemExit as stop:
                out, err = capfd.readouterr()
                assert stop.code == 2 and not out and len(err.splitlines()) == 1, (flag, value, err)
                assert err.startswith("error: "), (flag, value, err)
            else:
                got = getattr(args, field_name)
                for number in got if isinstance(got, list) else [got]:
                    assert low <= number <= high, (flag, value)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("env_id", ["a:b:c", ":", "", "a:", ":b", "../x", "CartPole-v1 ", "no.such:Thing-v0"])
def test_strange_names_of_environments_are_one_line(name, env_id, monkeypatch, capfd):
    code, out, err = call(name, f"--env-id={env_id}", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and not out and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_flag_that_does_not_exist_is_one_line(name, monkeypatch, capfd):
    code, out, err = call(name, "--no-such-flag", "3", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and not out and len(err.splitlines()) == 1 and "no-such-flag" in err


@pytest.mark.parametrize("finished_run", ["ppo"], indirect=True)
def test_ctrl_c_while_evaluating_ends_quietly(finished_run):
    run_dir = finished_run[1]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start("ppo", "--evaluate", run_dir, "--eval-episodes", "1000000")
        seen = ""
        while "evaluation" not in seen:  # its bar appears after two seconds
            seen += process.stderr.read(1)
            assert process.poll() is None, seen
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "Traceback" not in seen + err


@pytest.mark.skipif(sys.platform == "win32", reason="has no groups of processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["a2c_continuous", "ppo_continuous"])
def test_a_signal_to_the_processes_of_the_environments_too(name, number, tmp_path):
    """A terminal sends Ctrl-C, `timeout` and clusters SIGTERM to whole groups: nothing is lost or hangs."""
    flags = ["--env-id", "Pendulum-v1", "--vectorization", "async", "--num-envs", "2"]
    training = ["--run-dir", tmp_path / "run", "--total-timesteps", "500000", "--checkpoint-every", "500000"]
    evaluating = ["--evaluate", tmp_path / "run", "--eval-episodes", "1000000"]
    for argv, sign in ([*flags, *training], "return"), (evaluating, "evaluation"):
        process = start(name, *argv, new_group=True)
        seen = ""
        while sign not in seen:
            seen += process.stderr.read(1)
            assert process.poll() is None, seen
        os.killpg(process.pid, number)
        try:
            _, err = process.communicate(timeout=60)
            with pytest.raises(ProcessLookupError):  # none of the group is left
                os.killpg(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert "Traceback" not in seen + err and process.returncode == 128 + number
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert saved["vectorization"] == "async"
    assert importlib.import_module("torch").load(tmp_path / "run" / "checkpoint.pt")["global_step"] > 0


@pytest.mark.parametrize("name", ["a2c_continuous", "ppo_continuous"])
def test_a_script_that_fails_does_not_wait_for_its_environments(name):
    """Python ends processes that are left by SIGTERM, which these do not hear, and waits for them."""
    make = f"{name}.make_envs({name}.Args(env_id='Pendulum-v1', vectorization='async'), 2)"
    code = f"import {name}; envs = {make}; raise ValueError('mine')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ALGOS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1 and "mine" in done.stderr


def bomb_file(case: Case, bomb) -> bytes:
    """A file of the checkpoint's own format that carries a pickled object."""
    import io

    buffer = io.BytesIO()
    if case.checkpoint.endswith(".npz"):
        np.savez(buffer, q_table=np.array([bomb], dtype=object))
    else:
        import torch

        torch.save({"agent": bomb}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", [name for name in SCRIPTS if CASES[name].broken_env])
def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(name, tmp_path, monkeypatch, capfd):
    case = CASES[name]
    arguments = [*case.command, "--env-id", case.broken_env, "--run-dir", tmp_path / "run"]
    code, _, err = call(name, *arguments, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 1 and "nan at step" in err
    import torch

    agent = torch.load(tmp_path / "run" / case.checkpoint, weights_only=True)["agent"]
    assert all(torch.isfinite(parameter).all() for parameter in agent.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_cuda_without_a_device_goes_on(name, tmp_path, monkeypatch, capfd):
    module = importlib.import_module(name)
    if "cuda" not in module.Args.__dataclass_fields__:
        pytest.skip("this script has no use for a GPU")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    args = module.Args(cuda=True)
    device = module.setup_torch(args)
    assert str(device) == "cpu" and "CPU" in capfd.readouterr().out


@pytest.mark.parametrize("name", [name for name in ("ppo", "q_learning") if name in SCRIPTS])
def test_track_works_offline_and_a_resumed_run_keeps_its_id(name, tmp_path):
    for where in (["--run-dir", tmp_path / "run"], ["--resume", tmp_path / "run"]):
        process = start(name, *CASES[name].command, "--track", *where, WANDB_MODE="offline")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    logs = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2 and b"charts/episodic_return" in logs[0].read_bytes()
    assert logs[0].name == logs[1].name
    assert logs[0].name != "run-run.wandb"  # another folder of this name is another run
