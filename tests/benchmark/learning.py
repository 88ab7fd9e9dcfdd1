"""Train every script with several seeds; write results/*.csv, figures/*.png, RESULTS.md and README's table
(in English and in Chinese).

    python tests/benchmark/learning.py                       all tasks that are not done yet: many hours
    python tests/benchmark/learning.py --tasks CartPole Taxi those whose name begins so
    python tests/benchmark/learning.py --tasks --jobs 1      no training: collect, draw and write again
    python tests/benchmark/learning.py --fresh               a second set of seeds: 11, 12, …

Every run is a process of its own with its own run folder, RUNS_DIR/TASK/seedS. A run that is finished is not
repeated, one that was killed is resumed, one that crashes leaves its error in RUNS_DIR/TASK/seedS.log and
stops no other. A run folder of another command line is refused.

A CSV has one row per point of a training curve (phase "training": the mean return of the episodes that ended
in a rollout, averaged over the rollouts since the last row) and one per finished run (phase "evaluation":
what results.json holds).
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
POINTS = 100  # of a training curve in a CSV
FRESH = 10  # seeds above this are the second set; it has a CSV of its own and no curve
COLUMNS = ["seed", "phase", "step", "mean_return", "std_return", "episodes", "minutes", "steps_per_second"]
# A small game for DQN's ablation: importing rally.py registers it, then the script runs as always.
RALLY = (
    "import sys; sys.path[:0] = ['algos', 'tests/benchmark']; import rally, dqn_atari; "
    "dqn_atari.train(dqn_atari.parse_args())"
)


@dataclass(frozen=True)
class Task:
    name: str  # of the CSV
    script: str
    flags: str
    seeds: int  # 1, 2, … this many
    mark: float | None = None  # published or optimal
    source: str = ""  # of the mark
    figure: str = ""  # tasks of one figure are drawn into one picture; "" is the name
    label: str = ""  # in that picture
    in_table: bool = True
    prelude: str = ""  # Python to run instead of the script's file
    note: str = ""  # for the table
    headline: str = ""  # what README's short table calls it; "" keeps it out of there
    in_figure: bool = True  # False: a row of the table only
    fresh_seeds: int = 0  # of the second set; 0: as many as in the first one

    def number(self, fresh: bool) -> int:
        """Of seeds in the first or the second set."""
        return (fresh and self.fresh_seeds) or self.seeds

    @property
    def command(self) -> str:
        start = f'python -c "{self.prelude}"' if self.prelude else f"python algos/{self.script}.py"
        return " ".join(f"{start} {self.flags}".split())


SLIPPERY = (
    "--env-kwargs '{\"is_slippery\": true}' --total-episodes 20000 --gamma 0.99 --lr-visits 20 "
    "--max-steps 100 --eval-episodes 1000"
)
SLIPPERY_8X8 = (
    "--env-id FrozenLake8x8-v1 --total-episodes 20000 --gamma 0.995 --lr-visits 100 --max-steps 200 "
    "--eval-episodes 1000"
)
TAXI = "--env-id Taxi-v4 --total-episodes 25000 --decay-rate 0.0005 --learning-rate 1"
ATARI_PONG = (
    "--env-id ALE/Pong-v5 --ortho-init --total-timesteps 800000 --learning-starts 10000 --learning-rate 2e-4"
)
PENDULUM = "--env-id Pendulum-v1 --total-timesteps 1000000 --num-envs 8 --gamma 0.9 --learning-rate 7e-4"
MULTIROOM = "--env-id MiniGrid-MultiRoom-N4-S5-v0 --total-timesteps 2000000"
DOORKEY_5X5 = "--env-id MiniGrid-DoorKey-5x5-v0 --total-timesteps 100000"
KEY_CORRIDOR = "--env-id MiniGrid-KeyCorridorS3R1-v0 --total-timesteps 500000"
DOORKEY = "--env-id MiniGrid-DoorKey-8x8-v0 --total-timesteps 1000000"
ACROBOT = "--env-id Acrobot-v1 --total-timesteps 500000 --num-envs 8 --num-minibatches 4"
LANDER = (
    "--env-id LunarLander-v3 --total-timesteps 1000000 --num-envs 16 --num-steps 1024 --num-minibatches 256 "
    "--update-epochs 4 --learning-rate 1e-3 --gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01"
)
COPTER = (
    "--env-id envs.pixelcopter:Pixelcopter-v0 --num-envs 64 --total-episodes 20000 --learning-rate 1e-2 "
    "--gamma 0.97 --hidden-sizes 64 128 --entropy-coef 0.01 --baseline value --normalize-obs --no-anneal-lr"
)
PONG = (
    "--env-id envs.pong:PongPLE-v0 --num-envs 16 --total-episodes 3200 --learning-rate 1e-2 "
    "--hidden-sizes 64 128 --entropy-coef 0.01 --baseline value --normalize-obs --restart-credit "
    "--clip-rewards"
)
BULLET_CHEETAH = (
    "--env-id HalfCheetahBulletEnv-v0 --no-use-sde --log-std-init -1 --gae-lambda 0.95 --no-use-rms-prop "
    "--learning-rate 3e-4"
)
CHEETAH = (
    "--env-id HalfCheetah-v5 --total-timesteps 1000000 --no-use-sde --log-std-init -1 --gae-lambda 0.95 "
    "--no-use-rms-prop --learning-rate 3e-4"
)
ROBOT = "--learning-rate 3e-4 --num-minibatches 32 --eval-episodes 20"
ANT_BULLET = (
    "--env-id AntBulletEnv-v0 --total-timesteps 2000000 --learning-rate 3e-4 --gae-lambda 0.9 "
    "--eval-episodes 20"
)
ANT = "--env-id Ant-v5 --learning-rate 3e-4 --eval-episodes 20"
BIPEDAL = (
    "--env-id BipedalWalker-v3 --total-timesteps 2000000 --num-envs 32 --num-steps 256 --num-minibatches 32 "
    "--gamma 0.999 --learning-rate 3e-4"
)
# What an hour of tools/tune.py found (seeds 1000 to 1126 and 101 to 105), in round numbers.
PPO_PENDULUM = (
    "--env-id Pendulum-v1 --total-timesteps 50000 --num-envs 4 --num-steps 512 --num-minibatches 16 "
    "--learning-rate 2e-3 --gamma 0.95 --gae-lambda 0.85 --clip-coef 0.3 --log-std-init 0 --no-norm-obs"
)
# The course's first try: the default settings of Stable-Baselines3.
PPO_PENDULUM_UNTUNED = (
    "--env-id Pendulum-v1 --num-envs 1 --num-steps 2048 --num-minibatches 32 --learning-rate 3e-4 "
    "--log-std-init 0 --no-anneal-lr --no-norm-obs --no-norm-reward --no-recompute-advantages "
    "--total-timesteps"
)
DQN_ACROBOT = (
    "--env-id Acrobot-v1 --total-timesteps 200000 --gamma 0.99 --initial-value 0 --learning-rate 1e-3 "
    "--end-e 0.05 --exploration-fraction 0.2 --buffer-size 50000"
)
# The step size of the RL Zoo, one minibatch for every step.
DQN_LANDER_100K = (
    "--env-id LunarLander-v3 --total-timesteps 100000 --gamma 0.99 --initial-value 0 --buffer-size 50000 "
    "--batch-size 128 --no-norm-obs --learning-rate 6.3e-4 --tau 1 --target-network-frequency 256 "
    "--gradient-steps 8 --exploration-fraction 0.12 --end-e 0.1 --hidden-sizes 256 256"
)
# Those of the RL Zoo, but with a smaller and falling learning rate, a γ nearer to 1, double Q and normalised
# observations.
DQN_MOUNTAIN = (
    "--env-id MountainCar-v0 --total-timesteps 200000 --learning-rate 1e-3 --batch-size 128 "
    "--buffer-size 10000 --gamma 0.99 --target-network-frequency 600 --tau 1 --train-frequency 16 "
    "--gradient-steps 8 --exploration-fraction 0.2 --end-e 0.07 --hidden-sizes 256 256 --initial-value 0 "
    "--num-envs 1"
)
DQN_LANDER = (
    "--env-id LunarLander-v3 --total-timesteps 400000 --gamma 0.99 --initial-value 0 --learning-rate 1e-3 "
    "--end-e 0.05 --buffer-size 100000 --batch-size 128 --gradient-steps 2"
)
PPO_TRICKS = (
    "--no-ortho-init",
    "--no-anneal-lr",
    "--no-norm-adv",
    "--clip-vloss",
    "--max-grad-norm 0",
    "--target-kl 0.005",
)
RALLY_FLAGS = (
    "--env-id ALE/Rally-v5 --ortho-init --total-timesteps 20000 --learning-starts 1000 --buffer-size 10000 "
    "--learning-rate 2.5e-4 --target-network-frequency 500 --exploration-fraction 0.3 --eval-episodes 40"
)
RALLY_PPO = (
    "--env-id ALE/Rally-v5 --num-steps 32 --learning-rate 5e-4 --total-timesteps 100000 --eval-episodes 400"
)
BREAKOUT = "--env-id ALE/Breakout-v5 --total-timesteps 1600000"
DQN_PARTS = {
    "all three": "",
    "no replay": " --buffer-size 32",
    "no fixed target": " --target-network-frequency 1",
    "no double Q": " --no-double-q",
}
# The same three on CartPole, the tricks, and the paper's loss.
DQN_CARTPOLE_PARTS = {
    "all parts": "",
    "no replay": "--buffer-size 64",
    "no fixed target": "--tau 1",
    "no double Q": "--no-double-q",
    "values from 0": "--initial-value 0",
    "raw observations": "--no-norm-obs",
    "constant learning rate": "--no-anneal-lr",
    "Huber loss": "--huber-loss",
}
# Figures are titled in words; a task without a title here is titled by its name.
TITLES = {
    "FrozenLake 4x4": "Q-learning crosses the frozen lake",
    "FrozenLake 4x4 slippery": "Q-learning on slippery ice, 4x4",
    "FrozenLake 8x8 slippery": "Q-learning on slippery ice, 8x8",
    "Taxi": "Q-learning drives a taxi",
    "CartPole REINFORCE": "REINFORCE balances a pole",
    "Pixelcopter": "REINFORCE flies Pixelcopter",
    "Pong PLE": "REINFORCE plays Pong from numbers (PLE)",
    "Space Invaders": "DQN plays Space Invaders from pixels",
    "Atari Pong": "Pong from pixels",
    "Atari Breakout PPO": "PPO plays Breakout from pixels",
    "Rally PPO": "PPO on a small pixel game",
    "AntBullet": "PyBullet's ant learns to walk",
    "HalfCheetahBullet": "A2C teaches PyBullet's cheetah to run",
    "HalfCheetah": "A2C teaches MuJoCo's cheetah to run",
    "Pendulum": "A2C swings up a pendulum",
    "CartPole PPO": "PPO balances a pole",
    "Acrobot": "PPO swings up an acrobot",
    "LunarLander": "PPO lands on the moon",
    "Pyramids": "PPO in Pyramids with and without curiosity",
    "Pyramids 1M": "Curiosity in Pyramids, one million decisions",
    "DoorKey": "Curiosity finds key and door, 8x8",
    "DoorKey 5x5": "Curiosity finds key and door, 5x5",
    "KeyCorridor": "Curiosity in a corridor with a locked room",
    "MultiRoom": "Curiosity through four rooms",
    "ppo_ablation": "PPO on CartPole without one trick at a time",
    "CartPole DQN": "DQN balances a pole",
    "Acrobot DQN": "DQN swings up an acrobot",
    "LunarLander DQN": "DQN lands on the moon",
    "LunarLander DQN 100k": "DQN lands on the moon after 100,000 steps",
    "MountainCar DQN": "DQN drives a car out of a valley",
    "HalfCheetah PPO": "PPO teaches MuJoCo's cheetah to run",
    "Hopper": "PPO teaches a leg to hop",
    "Walker2d": "PPO teaches two legs to walk",
    "Ant": "PPO teaches MuJoCo's ant to walk",
    "BipedalWalker": "PPO walks on two legs over rough ground",
    "Pendulum PPO": "PPO swings up a pendulum",
    "dqn_cartpole_ablation": "DQN on CartPole without one part at a time",
    "dqn_ablation": "DQN on a small pixel game without one part at a time",
}
ON_SEEDS = "flags chosen on seeds 1 to 3"
BULLET_NOTE = "flags of HalfCheetah, tried after those of the ant had ended at 567 with seed 1"
TASKS = [
    Task("FrozenLake 4x4", "q_learning", "", 5, 1.0, "the optimum", headline="FrozenLake"),
    Task("FrozenLake 4x4 slippery", "q_learning", SLIPPERY, 5, 0.744, "the optimum"),
    Task("FrozenLake 8x8 slippery", "q_learning", SLIPPERY_8X8, 5, 0.913, "the optimum"),
    Task("Taxi", "q_learning", TAXI, 5, 7.56, "the optimum on these 100 seeds"),
    Task(
        "CartPole REINFORCE",
        "reinforce",
        "",
        5,
        350,
        "pass mark of the course, 1k episodes",
        headline="CartPole",
    ),
    Task(
        "Pixelcopter",
        "reinforce",
        COPTER,
        5,
        40,
        "models of the course: 20 to 40, 50k episodes",
        note=ON_SEEDS,
        fresh_seeds=3,
    ),
    Task(
        "Pong PLE",
        "reinforce",
        PONG,
        5,
        -16,
        "the models of the course lose 0 : 11, 20k episodes",
        note=ON_SEEDS,
        fresh_seeds=3,
    ),
    Task(
        "CartPole DQN",
        "dqn",
        "",
        5,
        500,
        "the maximum; RL Zoo, 50k steps",
        headline="CartPole",
        fresh_seeds=3,
    ),
    Task("Acrobot DQN", "dqn", DQN_ACROBOT, 3, -91.5, "CleanRL, 500k steps"),
    Task("LunarLander DQN", "dqn", DQN_LANDER, 3, 154, "RL Zoo, 100k steps"),
    Task("LunarLander DQN 100k", "dqn", DQN_LANDER_100K, 3, 154, "RL Zoo, 100k steps"),
    Task("MountainCar DQN", "dqn", DQN_MOUNTAIN, 3, -195, "CleanRL, 500k steps"),
    Task(
        "Space Invaders",
        "dqn_atari",
        "",
        3,
        200,
        "pass mark of the course, mean − std, 1M steps",
        label="defaults",
        headline="Space Invaders",
    ),
    Task(
        "Space Invaders orthogonal", "dqn_atari", "--ortho-init", 1, 200, "", "Space Invaders", "--ortho-init"
    ),
    Task("Atari Pong", "dqn_atari", ATARI_PONG, 3, 20.6, "RL Zoo, 10M steps", label="DQN (dqn_atari)"),
    Task(
        "Atari Pong PPO",
        "ppo_atari",
        "--env-id ALE/Pong-v5",
        3,
        20.4,
        "CleanRL, 10M steps",
        "Atari Pong",
        "PPO (ppo_atari)",
        headline="Pong from pixels",
    ),
    Task("Atari Breakout PPO", "ppo_atari", BREAKOUT, 3, 398, "RL Zoo, 10M steps"),
    Task(
        "Rally PPO",
        "ppo_atari",
        RALLY_PPO,
        5,
        19.28,
        "the best moves, 1% of them replaced",
        prelude=RALLY.replace("dqn_atari", "ppo_atari"),
        note="a small game, tests/benchmark/rally.py",
        fresh_seeds=3,
    ),
    Task(
        "AntBullet",
        "a2c_continuous",
        "",
        3,
        2443,
        "SB3, gSDE, 6 seeds, 2M steps",
        "AntBullet",
        "A2C (a2c_continuous)",
        headline="a walking ant",
    ),
    Task(
        "AntBullet PPO",
        "ppo_continuous",
        ANT_BULLET,
        3,
        2866,
        "RL Zoo, 2M steps",
        "AntBullet",
        "PPO (ppo_continuous)",
    ),
    Task(
        "HalfCheetahBullet", "a2c_continuous", BULLET_CHEETAH, 3, 2107, "RL Zoo, 2M steps", note=BULLET_NOTE
    ),
    Task(
        "HalfCheetah",
        "a2c_continuous",
        CHEETAH,
        3,
        3041,
        "RL Zoo, v3, 1M steps",
        note="flags chosen on seeds 1, 2",
        fresh_seeds=10,
    ),
    Task("Pendulum", "a2c_continuous", PENDULUM, 5, -163, "RL Zoo, 1M steps", fresh_seeds=3),
    Task("CartPole PPO", "ppo", "", 5, 500, "the maximum; RL Zoo, 100k steps", headline="CartPole"),
    Task("Acrobot", "ppo", ACROBOT, 5, -86.4, "CleanRL, 500k steps", fresh_seeds=3),
    Task(
        "LunarLander",
        "ppo",
        LANDER,
        5,
        242.1,
        "RL Zoo, 1M steps",
        note="learning rate chosen on seed 1",
        headline="LunarLander",
        fresh_seeds=3,
    ),
    Task(
        "Pyramids",
        "rnd_ppo",
        "",
        3,
        1.75,
        "Unity's benchmark, 3M decisions",
        "Pyramids",
        "with curiosity (rnd_ppo)",
        note="chosen on seed 1",
        headline="Pyramids",
    ),
    Task(
        "HalfCheetah PPO",
        "ppo_continuous",
        "--eval-episodes 20",
        3,
        5784,
        "Tianshou, 1M steps",
        headline="a cheetah",
    ),
    Task("Hopper", "ppo_continuous", "--env-id Hopper-v5 --eval-episodes 20", 3, 2383, "CleanRL, 1M steps"),
    Task("Walker2d", "ppo_continuous", f"--env-id Walker2d-v5 {ROBOT}", 3, 2288, "CleanRL, 1M steps"),
    Task("Ant", "ppo_continuous", ANT, 3, 1327, "RL Zoo, one run, 1M steps; Tianshou 3258, 1M steps"),
    Task("BipedalWalker", "ppo_continuous", BIPEDAL, 3, 288, "RL Zoo, 5M steps"),
    Task(
        "Pendulum PPO",
        "ppo_continuous",
        PPO_PENDULUM,
        5,
        -173.78,
        "the course, 50k steps",
        label="tuned",
        fresh_seeds=3,
    ),
    *(
        Task(
            f"Pendulum PPO untuned, {steps // 1000}k",
            "ppo_continuous",
            f"{PPO_PENDULUM_UNTUNED} {steps}",
            5,
            mark,
            f"the course, {steps // 1000}k steps" if mark else "",
            "Pendulum PPO",
            "untuned",
            in_figure=steps == 50_000,
            fresh_seeds=3,
        )
        for steps, mark in ((4096, -1146), (40_960, -1164), (50_000, None))
    ),
    Task(
        "Pyramids 1M",
        "rnd_ppo",
        "--total-timesteps 1000000",
        5,
        1.75,
        "Unity's benchmark, 3M decisions",
        fresh_seeds=3,
    ),
    Task("Pyramids memoryless", "rnd_ppo", "--memory 0", 3, 1.75, "", "Pyramids", "--memory 0"),
    Task("Pyramids without", "rnd_ppo", "--int-coef 0", 3, 1.75, "", "Pyramids", "--int-coef 0"),
    Task("Pyramids ICM", "icm_ppo", "", 3, 1.75, "", "Pyramids", "predicting the next state (icm_ppo)"),
    Task("Pyramids ICM constant", "icm_ppo", "--int-fraction 0", 1, 1.75, "", "Pyramids", in_figure=False),
    Task(
        "DoorKey", "rnd_ppo", DOORKEY, 5, 0.9, "a solved task", "DoorKey", "novelty (rnd_ppo)", fresh_seeds=3
    ),
    Task("DoorKey ICM", "icm_ppo", DOORKEY, 3, 0.9, "", "DoorKey", "predicting the next state (icm_ppo)"),
    Task("DoorKey 5x5", "rnd_ppo", DOORKEY_5X5, 5, 0.964, "RL Zoo: PPO, 100k steps", fresh_seeds=3),
    Task("KeyCorridor", "rnd_ppo", KEY_CORRIDOR, 5, 0.949, "RL Zoo: PPO, 500k steps", fresh_seeds=3),
    Task("MultiRoom", "rnd_ppo", MULTIROOM, 3, 0, "RL Zoo: PPO, 10M steps", "MultiRoom", "novelty (rnd_ppo)"),
    Task("MultiRoom ICM", "icm_ppo", MULTIROOM, 3, 0, "", "MultiRoom", "predicting the next state (icm_ppo)"),
    *(
        Task(f"ablation PPO {flag}", "ppo", flag, 3, None, "", "ppo_ablation", flag or "all tricks", False)
        for flag in ("", *PPO_TRICKS)
    ),
    *(
        Task(f"ablation DQN CartPole {name}", "dqn", flag, 3, None, "", "dqn_cartpole_ablation", name, False)
        for name, flag in DQN_CARTPOLE_PARTS.items()
    ),
    *(
        Task(
            f"ablation DQN {name}",
            "dqn_atari",
            RALLY_FLAGS + flag,
            3,
            None,
            "",
            "dqn_ablation",
            name,
            False,
            RALLY,
        )
        for name, flag in DQN_PARTS.items()
    ),
]


def run(task: Task, seed: int, runs_dir: Path) -> str:
    """Train one seed, unless that is done; returns "" or what went wrong, in a line."""
    run_dir = runs_dir / task.name.replace(" ", "_") / f"seed{seed}"
    run_dir.mkdir(parents=True, exist_ok=True)
    command_file = run_dir / "command.txt"
    if command_file.exists() and command_file.read_text() != task.command:
        return f"{run_dir} was begun with other flags: delete it to run it again"
    if (run_dir / "results.json").exists():
        return ""
    command_file.write_text(task.command)
    saved = (run_dir / "checkpoint.pt").exists() or (run_dir / "q_table.npz").exists()
    start = ["-c", task.prelude] if task.prelude else [f"algos/{task.script}.py"]
    goal = (
        ["--resume", run_dir] if saved else ["--run-dir", run_dir, "--seed", seed, *shlex.split(task.flags)]
    )
    with open(run_dir.with_suffix(".log"), "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *start, *map(str, goal)]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment).returncode
    return f"{task.name}, seed {seed}: exit code {code}, see {log.name}" if code else ""


def collect(task: Task, runs_dir: Path) -> None:
    """Write results/TASK.csv from the finished runs, if there are any; TASK_fresh.csv has the second set.

    Seeds whose run folders are not here keep the rows that they have: delete the CSV if they are not to.
    """
    rows = {False: [], True: []}  # is it of the second set?
    for run_dir in sorted(
        (runs_dir / task.name.replace(" ", "_")).glob("seed*/"), key=lambda x: int(x.name[4:])
    ):
        if not (run_dir / "results.json").exists():
            continue
        if (run_dir / "command.txt").read_text() != task.command:
            sys.exit(f"{run_dir} was run with other flags: delete it to run it again")
        results = json.loads((run_dir / "results.json").read_text())
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
        events.Reload()
        points = np.array([(event.step, event.value) for event in events.Scalars("charts/episodic_return")])
        edges = np.linspace(0, results["global_step"], POINTS + 1)
        bins = np.digitize(points[:, 0], edges[1:-1], right=True)
        own = rows[results["seed"] > FRESH]
        for b in np.unique(bins):
            step, mean = int(edges[b + 1]), points[bins == b, 1].mean()
            own.append([results["seed"], "training", step, f"{mean:.4g}", "", "", "", ""])
        row = [results["seed"], "evaluation", results["global_step"]]
        # With digits enough that a mean which is never rounded up later was not rounded up here.
        row += [f"{results['mean_reward']:.8f}", f"{results['std_reward']:.4f}", results["eval_episodes"]]
        own.append([*row, f"{results['wall_time_s'] / 60:.2f}", f"{results['steps_per_second']:.0f}"])
    (HERE / "results").mkdir(exist_ok=True)
    for fresh, own in rows.items():
        if own:
            path = csv_path(task, fresh)
            stored = list(csv.reader(path.open()))[1:] if path.exists() else []
            seeds = {row[0] for row in own}
            own += [row for row in stored if int(row[0]) not in seeds]
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *sorted(own, key=lambda row: int(row[0]))])


def csv_path(task: Task, fresh: bool = False) -> Path:
    return HERE / "results" / f"{slug(task.name)}{'_fresh' * fresh}.csv"


def slug(name: str) -> str:
    """A file name without blanks."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def read(task: Task, phase: str, fresh: bool = False) -> np.ndarray:
    """Rows (seed, step, mean, std, minutes, steps/s) of a phase in the CSV; none if it is not there."""
    path = csv_path(task, fresh)
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    keys = ("seed", "step", "mean_return", "std_return", "minutes", "steps_per_second")
    return np.array([[float(row[key] or 0) for key in keys] for row in rows if row["phase"] == phase])


def interval(values: np.ndarray) -> np.ndarray:
    """Bootstrap 95% interval of the mean over seeds. values: (seeds, points). Returns (2, points)."""
    drawn = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    return np.percentile(values[drawn].mean(1), (2.5, 97.5), axis=0)


def draw(name: str, tasks: list[Task]) -> None:
    """Learning curves of these tasks in one picture: mean and interval across seeds, the mark as a line."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for task in tasks:
        points = read(task, "training")
        if not len(points) or not task.in_figure:
            continue
        seeds = np.unique(points[:, 0])
        steps = np.unique(points[:, 1])
        curves = [points[points[:, 0] == seed] for seed in seeds]
        steps = steps[steps <= min(curve[-1, 1] for curve in curves)]  # budgets in episodes differ in steps
        values = np.stack([np.interp(steps, curve[:, 1], curve[:, 2]) for curve in curves])
        label = f"{task.label or task.name}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        (line,) = axes.plot(steps, values.mean(0), label=label)
        if len(seeds) > 1:
            axes.fill_between(steps, *interval(values), color=line.get_color(), alpha=0.2, linewidth=0)
        if task.source:
            axes.axhline(
                task.mark, color="grey", linestyle="--", linewidth=1, label=f"{task.mark:g}: {task.source}"
            )
    axes.set(
        xlabel="environment steps",
        ylabel="episodic return while training",
        title=TITLES.get(tasks[0].figure or tasks[0].name, tasks[0].figure or tasks[0].name),
    )
    axes.legend(fontsize=7)
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures" / f"{slug(name)}.png", dpi=110)
    plt.close(figure)


def down(number: float, digits: int) -> str:
    """With so many digits, never rounded up; CSVs hold four, and 1e-6 keeps 0.7 from becoming 0.69."""
    return f"{np.floor(number * 10**digits + 1e-6) / 10**digits:.{digits}f}"


def duration(rows: np.ndarray) -> str:
    """Of the median run: seconds up to two minutes, minutes up to two hours, then hours."""
    seconds = float(np.median(rows[:, 1] / rows[:, 5]))
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def digits_of(task: Task) -> int:
    return 3 if 0 < (task.mark or 0) < 1 else 2


def short_table() -> str:
    """README's table: a row per script, means over seeds."""
    lines = ["| task | script | mean over seeds | reference | time |", "|---|---|---|---|---|"]
    for task in TASKS:
        rows = read(task, "evaluation")
        if task.headline and len(rows):
            mean = down(rows[:, 2].mean(), digits_of(task))
            seeds = f"{mean} ({len(rows)} seed{'s' * (len(rows) > 1)})"
            name = f"[{task.headline}](tests/benchmark/figures/{slug(task.figure or task.name)}.png)"
            script = f"[{task.script}](algos/{task.script}.py)"
            lines.append(f"| {name} | {script} | {seeds} | {task.mark:g}: {task.source} | {duration(rows)} |")
    return "\n".join(lines)


# README's table in its Chinese translation: patterns and what stands for them.
CHINESE = {
    r"task \| script \| mean over seeds \| reference \| time": "任务 | 脚本 | 各个种子的均值 | 参考值 | 用时",
    r"\[a walking ant\]": "[行走的蚂蚁]",
    r"\[a cheetah\]": "[奔跑的猎豹]",
    r"\[Pong from pixels\]": "[看画面玩 Pong]",
    r", (\d+\w) steps": r"，\1 步",
    r", (\d+\w) decisions": r"，\1 次决策",
    r", (\d+\w) episodes": r"，\1 个回合",
    r" \((\d+) seeds?\)": r"（\1 个种子）",
    r", (\d+) seeds": r"，\1 个种子",
    r"(?<=\d): ": "：",
    "the optimum": "最优值",
    "the maximum; ": "最大值；",
    "pass mark of the course": "课程的及格线",
    ", mean − std": "，均值 − 标准差",
    "SB3, gSDE": "SB3，gSDE",
    "Unity's benchmark": "Unity 的基准",
    r"(?<=\d) s \|": " 秒 |",
    r"(?<=\d) min \|": " 分钟 |",
    r"(?<=\d) h \|": " 小时 |",
    r"\(tests/": "(../tests/",
    r"\(algos/": "(",
}


def in_chinese(text: str) -> str:
    """README's table for algos/README.zh.md: its words in Chinese, its links as they are from that folder."""
    for english, chinese in CHINESE.items():
        text = re.sub(english, chinese, text)
    return text


def table() -> str:
    """The long table of RESULTS.md, one row per task that has a CSV, and the commands."""
    lines = ["| task | script | result, seed by seed | mark | steps | time |", "|---|---|---|---|---|---|"]
    commands = []
    for task in TASKS:
        rows = read(task, "evaluation")
        if not len(rows) or not task.in_table:
            continue
        digits = digits_of(task)
        first, second = (
            ", ".join(f"{down(row[2], digits)} ± {row[3]:.{digits}f}" for row in some)
            for some in (rows, read(task, "evaluation", fresh=True))
        )
        both = f"{first}; seeds 11, 12, …: {second}" if second else first
        steps = max(rows[:, 1])
        mark = f"{task.mark:g} ({task.source})" if task.source else "—"
        name = f"[{task.name}](figures/{slug(task.figure or task.name)}.png)"
        name += f" ({task.note})" if task.note else ""
        lines.append(f"| {name} | {task.script} | {both} | {mark} | {steps:,.0f} | {duration(rows)} |")
        commands += [f"# {task.name}", task.command]
    return "\n".join([*lines, "", "```bash", *commands, "```"])


def put(path: Path, text: str) -> None:
    """Replace what stands between the two marks of a Markdown file."""
    begin, end = "<!-- results: written by tests/benchmark/learning.py -->", "<!-- end of results -->"
    head, rest = path.read_text().split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main(
    tasks: list[str] | None = None,
    jobs: int = os.cpu_count() or 1,
    runs_dir: Path = ROOT / "runs/benchmark",
    report: bool = True,
    fresh: bool = False,
) -> None:
    """tasks: beginnings of names, default all. jobs: runs at a time. runs_dir: where the run folders are.

    report: collect, draw and write once all is trained. fresh: train the second set of seeds.
    """
    chosen = [task for task in TASKS if tasks is None or task.name.startswith(tuple(tasks))]
    first = FRESH + 1 if fresh else 1
    work = [(task, seed) for task in chosen for seed in range(first, first + task.number(fresh))]
    runs_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda pair: run(*pair, runs_dir.resolve()), work)
        for error in tqdm(done, total=len(work), unit=" runs"):
            if error:
                tqdm.write(error)
    if not report:
        return
    for task in TASKS:
        collect(task, runs_dir)
    for name in dict.fromkeys(task.figure or task.name for task in TASKS):
        group = [task for task in TASKS if name == (task.figure or task.name)]
        if any(len(read(task, "training")) for task in group):
            draw(name, group)
    put(HERE / "RESULTS.md", table())
    put(ROOT / "README.md", short_table())
    put(ROOT / "algos/README.zh.md", in_chinese(short_table()))


if __name__ == "__main__":
    tyro.cli(main)
