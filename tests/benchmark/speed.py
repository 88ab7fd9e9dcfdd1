"""Measure the scripts' steps per second, beside the environment alone and, if installed, Stable-Baselines3.

    python tests/benchmark/speed.py                    all, three rounds in turn; nothing else should run
    python tests/benchmark/speed.py --only "PPO CartPole" --rounds 5

What is measured is the training loop alone, from its first round to its last, on one core. Where the time
goes is sampled: every 2 ms a timer looks where the loop is, and the time since its last look counts for that
place (a long call into PyTorch is seen when it returns). Inside of an environment's `step` counts as
environment, the rest of section [A] as acting, all other sections as learning.
Rounds alternate between this script and the peer, so that both see the same machine, and each round gives one
ratio of the two. All numbers are medians over the rounds, ranges go from the lowest to the highest. The
decision transformer's are updates per second; it has no environment while it learns.
Writes results/speed.csv and the table in RESULTS.md, if the peer is installed.
"""

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

HERE = Path(__file__).parent
ALGOS = HERE.parents[1] / "algos"


@dataclass(frozen=True)
class Case:
    script: str
    flags: dict
    peer: str = ""  # Python that makes `model`, a Stable-Baselines3 model of the same settings; "" for none


VEC = "from stable_baselines3.common.env_util import make_vec_env\n"
NORM = "from stable_baselines3.common.vec_env import VecNormalize\n"
A2C = (
    "A2C('MlpPolicy', VecNormalize(make_vec_env('{}', 4)), n_steps=8, gae_lambda=0.9, vf_coef=0.4, "
    "use_sde=True, device='cpu', policy_kwargs=dict(log_std_init=-2, ortho_init=False))"
)
ANT, CHEETAH = "pybullet_envs_gymnasium:AntBulletEnv-v0", "HalfCheetah-v5"
CASES = {
    "Q-learning FrozenLake": Case("q_learning", {"total_episodes": 10_000}),
    "Sarsa CliffWalking": Case("sarsa", {"total_episodes": 3000, "lr_visits": 0.0}),
    "REINFORCE CartPole": Case("reinforce", {"total_episodes": 500}),
    # The settings of the RL Zoo: a minibatch for every step, hidden layers of 256.
    "DQN LunarLander": Case(
        "dqn",
        {
            "env_id": "LunarLander-v3",
            "num_envs": 1,
            "hidden_sizes": [256, 256],
            "learning_rate": 6.3e-4,
            "buffer_size": 50_000,
            "learning_starts": 100,
            "batch_size": 128,
            "train_frequency": 4,
            "gradient_steps": 4,
            "gamma": 0.99,
            "tau": 1.0,
            "target_network_frequency": 250,
            "initial_value": 0.0,
            "total_timesteps": 3000,
        },
        VEC + "model = DQN('MlpPolicy', make_vec_env('LunarLander-v3', 1), learning_rate=6.3e-4, "
        "buffer_size=50_000, learning_starts=100, batch_size=128, train_freq=4, gradient_steps=-1, "
        "target_update_interval=250, policy_kwargs=dict(net_arch=[256, 256]), device='cpu')",
    ),
    "DQN Space Invaders": Case(
        "dqn_atari",
        {"total_timesteps": 2000, "learning_starts": 100, "buffer_size": 10_000, "double_q": False},
        "from stable_baselines3.common.env_util import make_atari_env\n"
        "from stable_baselines3.common.vec_env import VecFrameStack\n"
        "import ale_py\n"
        "envs = VecFrameStack(make_atari_env('ALE/SpaceInvaders-v5', 8, env_kwargs=dict(frameskip=1)), 4)\n"
        "model = DQN('CnnPolicy', envs, buffer_size=10_000, learning_starts=100, batch_size=32, "
        "train_freq=1, gradient_steps=2, target_update_interval=1000, device='cpu')",
    ),
    "A2C Ant": Case("a2c_continuous", {"total_timesteps": 6000}, VEC + NORM + "model = " + A2C.format(ANT)),
    "A2C HalfCheetah": Case(
        "a2c_continuous",
        {"env_id": CHEETAH, "total_timesteps": 20_000},
        VEC + NORM + "model = " + A2C.format(CHEETAH),
    ),
    "PPO CartPole": Case(
        "ppo",
        {
            "num_envs": 4,
            "num_steps": 128,
            "num_minibatches": 4,
            "update_epochs": 4,
            "total_timesteps": 40_960,
        },
        VEC
        + "model = PPO('MlpPolicy', make_vec_env('CartPole-v1', 4), n_steps=128, batch_size=128, n_epochs=4, "
        "device='cpu')",
    ),
    "PPO HalfCheetah": Case(
        "ppo_continuous",
        {
            "num_envs": 1,
            "num_steps": 2048,
            "num_minibatches": 32,
            "learning_rate": 3e-4,
            "recompute_advantages": False,
            "total_timesteps": 8192,
        },
        VEC + NORM + f"model = PPO('MlpPolicy', VecNormalize(make_vec_env('{CHEETAH}', 1)), n_steps=2048, "
        "batch_size=64, n_epochs=10, device='cpu')",
    ),
    "PPO HalfCheetah, defaults": Case("ppo_continuous", {"total_timesteps": 20_480}),
    # The settings of the RL Zoo, which are the defaults of ppo_atari.py; the peer's rewards are clipped, too.
    "PPO Atari Pong": Case(
        "ppo_atari",
        {"total_timesteps": 3072},
        "from stable_baselines3.common.env_util import make_atari_env\n"
        "from stable_baselines3.common.vec_env import VecFrameStack\n"
        "import ale_py\n"
        "envs = VecFrameStack(make_atari_env('ALE/Pong-v5', 8, env_kwargs=dict(frameskip=1)), 4)\n"
        "model = PPO('CnnPolicy', envs, n_steps=128, batch_size=256, n_epochs=4, learning_rate=2.5e-4, "
        "clip_range=0.1, ent_coef=0.01, device='cpu')",
    ),
    "RND Pyramids": Case("rnd_ppo", {"total_timesteps": 40_960}),
    "ICM Pyramids": Case("icm_ppo", {"total_timesteps": 20_480}),
    "Decision transformer, graph": Case("decision_transformer", {"total_updates": 200}),
}


def measure(name: str) -> None:
    """Train once in this process and print what was measured as JSON."""
    stay_on_one_core()
    sys.path.insert(0, str(ALGOS))
    case = CASES[name]
    module = importlib.import_module(case.script)
    lines = (ALGOS / f"{case.script}.py").read_text().splitlines()
    section, sections = "", {}  # of each line: the letter of the last banner
    for number, line in enumerate(lines, 1):
        if banner := re.match(r" +# \[([A-D])\]", line):
            section = banner[1]
        sections[number] = section
    acting = "B" if case.script in ("q_learning", "sarsa") else "A"
    counts = seen = Counter()  # seconds, by place
    last = time.perf_counter()

    def look(_, frame) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds, last = now - last, now
        inside = False
        while frame and frame.f_code is not module.train.__code__:
            inside |= frame.f_code.co_name == "step" and "optim" not in frame.f_code.co_filename
            frame = frame.f_back
        if frame and frame.f_lineno:  # a few instructions have no line
            here = sections[frame.f_lineno]
            counts["environment" if inside else "acting" if here == acting else "learning"] += seconds

    moments = []  # (seconds, steps so far) whenever the loop asks whether it goes on
    goes_on = module.Run.goes_on

    def watched(run, size: int) -> bool:
        nonlocal last, seen
        moments.append((time.perf_counter(), run.step))
        seen = counts.copy()  # what ends a training is no part of the loop
        if len(moments) == 1:
            last = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        goes = goes_on(run, size)
        if not goes:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return goes

    module.Run.goes_on = watched
    module.evaluate = lambda *_: {}
    with tempfile.TemporaryDirectory() as folder:
        args = module.Args(**case.flags, run_dir=folder, eval_episodes=1)
        signal.signal(signal.SIGALRM, look)
        module.train(args)
    (begun, before), (ended, after) = moments[0], moments[-1]
    speed = (after - before) / (ended - begun)
    ceiling = None if case.script == "decision_transformer" else environment_alone(module, args)
    share = {part: seen[part] / sum(seen.values()) for part in ("environment", "acting", "learning")}
    print(json.dumps({"speed": speed, "ceiling": ceiling} | share))


def stay_on_one_core() -> None:
    """This process and the threads it will start, as those of the Atari emulator."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def environment_alone(module, args) -> float:
    """Steps per second with actions drawn beforehand."""
    table = hasattr(module, "make_env")  # a script with a table steps one environment, without a vector
    envs = module.make_env(args) if table else module.make_envs(args, getattr(args, "num_envs", 1))
    envs.reset(seed=1 if table else module.env_seeds(envs.num_envs, 1))
    actions = [envs.action_space.sample() for _ in range(1000)]
    steps, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < 2:
        _, _, terminated, truncated, _ = envs.step(actions[steps % 1000])
        if table and (terminated or truncated):
            envs.reset()
        steps += 1
    return steps * (1 if table else envs.num_envs) / seconds


def measure_peer(name: str) -> None:
    """Train Stable-Baselines3 once in this process and print its speed as JSON."""
    stay_on_one_core()
    import stable_baselines3
    import torch

    torch.set_num_threads(1)  # as many as ours
    scope = {key: getattr(stable_baselines3, key) for key in ("A2C", "DQN", "PPO")}
    exec(CASES[name].peer, scope)
    started = time.perf_counter()
    scope["model"].learn(CASES[name].flags["total_timesteps"])  # rounded up to whole rollouts
    print(json.dumps({"speed": scope["model"].num_timesteps / (time.perf_counter() - started)}))


def table(rows: list[dict]) -> str:
    """Of RESULTS.md."""
    lines = ["| task | this script | range | environment alone | learning | SB3 | range | ratio | range |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        learning = f"{float(row['learning']):.0%}"
        cells = [row["case"], row["steps_per_second"], row["range"], row["environment_alone"], learning]
        cells += [row["sb3"], row["sb3_range"], row["ratio"], row["ratio_range"]]
        lines.append(f"| {' | '.join(cells)} |")
    return re.sub(r"(?<=\d)(?=(\d{3})+\b(?!\.))(?<!\.\d)", ",", "\n".join(lines))


def put(text: str) -> None:
    """Replace what stands between the two marks of RESULTS.md."""
    path = HERE / "RESULTS.md"
    begin, end = "<!-- speed: written by tests/benchmark/speed.py -->", "<!-- end of speed -->"
    head, rest = path.read_text().split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main(only: str | None = None, rounds: int = 3, one: str | None = None, peer: bool = False) -> None:
    """only: the case to measure. rounds: repetitions. one, peer: what a process of its own does."""
    if one:
        (measure_peer if peer else measure)(one)
        return
    with_peer = importlib.util.find_spec("stable_baselines3") is not None
    rows = []
    for name in [only] if only else CASES:
        ours, theirs = [], []
        for _ in range(rounds):
            for flags, results in (([], ours), (["--peer"], theirs)):
                if flags and not (with_peer and CASES[name].peer):
                    continue
                command = [sys.executable, __file__, "--one", name, *flags]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                results.append(json.loads(done.stdout.splitlines()[-1]))
        speeds, peers = ([result["speed"] for result in results] for results in (ours, theirs))
        row = {"case": name, "steps_per_second": f"{np.median(speeds):.0f}"}
        row |= {"range": f"{min(speeds):.0f} to {max(speeds):.0f}"}
        ceilings = [result["ceiling"] for result in ours if result["ceiling"]]
        row["environment_alone"] = f"{np.median(ceilings):.0f}" if ceilings else ""
        for part in ("environment", "acting", "learning"):
            row[part] = f"{np.median([result[part] for result in ours]):.2f}"
        row["sb3"] = f"{np.median(peers):.0f}" if peers else ""
        row["sb3_range"] = f"{min(peers):.0f} to {max(peers):.0f}" if peers else ""
        ratios = [speed / peer for speed, peer in zip(speeds, peers, strict=False)]
        row["ratio"] = f"{np.median(ratios):.2f}" if peers else ""
        row["ratio_range"] = f"{min(ratios):.2f} to {max(ratios):.2f}" if peers else ""
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if not only and with_peer:  # what was measured beside a peer must not be lost
        with open(HERE / "results" / "speed.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        put(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
