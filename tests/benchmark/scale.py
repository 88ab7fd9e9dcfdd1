"""How speed and memory grow with environments, threads, replay memory, and runs side by side.

    python tests/benchmark/scale.py                      all; nothing else should run
    python tests/benchmark/scale.py --only environments  one of environments, threads, replay, "side by side"

Every point is a process of its own (or several at once, for runs side by side) that trains with the
defaults of its script, one thread, and the sizes in the table below; there is no evaluation. A rollout of
ppo_atari.py has 1,024 steps, however many environments share it; the other scripts keep their --num-steps,
so their rollouts grow. Steps per second are those of the second half of the training: the first has the
start of the environments in it, which is long for 256 games. Memory is the most that the process had at any
time. For the replay memory it is what a full one adds to a process without.
Writes results/scale.csv and figures/scale.png.
"""

import csv
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent
ALGOS = HERE.parents[1] / "algos"
COLUMNS = ("curve", "script", "x", "steps_per_second", "memory_mb")
ENVIRONMENTS = (1, 4, 16, 64, 256)
ATARI_ROLLOUT = 1024  # steps


@dataclass(frozen=True)
class Curve:
    name: str
    script: str
    flags: dict
    sizes: tuple[int, ...]
    steps: int = 1  # at least so many, and at least four rollouts


CURVES = [
    Curve("environments", "ppo", {}, ENVIRONMENTS, 6000),
    Curve("environments", "ppo_continuous", {}, ENVIRONMENTS, 4000),
    Curve("environments", "rnd_ppo", {"init_steps": 1}, ENVIRONMENTS, 4000),
    Curve("environments", "ppo_atari", {}, ENVIRONMENTS),
    Curve("threads", "dqn_atari", {"learning_starts": 100, "buffer_size": 10_000}, (1, 2), 2000),
    Curve("threads", "ppo_atari", {}, (1, 2)),
    Curve("side by side", "ppo", {}, (1, 2, 4), 60_000),
    Curve("side by side", "ppo_atari", {}, (1, 2, 4)),
    Curve("replay", "dqn_atari", {}, (1000, 10_000, 100_000, 300_000)),
]


def flags_of(curve: Curve, size: int) -> dict:
    """The arguments of one training."""
    flags = {"cuda": False} | curve.flags
    if curve.name == "environments":
        flags["num_envs"] = size
        if curve.script == "ppo_atari":
            flags["num_steps"] = ATARI_ROLLOUT // size
    if curve.name == "threads":
        flags["num_threads"] = size
    args = importlib.import_module(curve.script).Args(**flags)
    rollout = getattr(args, "num_steps", 1) * args.num_envs
    return flags | {"total_timesteps": max(4 * rollout, curve.steps)}


def peak() -> float:
    """The most memory that this process had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(curve: Curve, size: int, seed: int) -> dict:
    """One point, in this process."""
    sys.path.insert(0, str(ALGOS))
    module = importlib.import_module(curve.script)
    if curve.name == "replay":
        before = peak()
        memory = module.ReplayMemory(size, 8)
        memory.frames.fill(1)  # untouched memory is not given yet
        return {"memory_mb": peak() - before}
    moments = []  # (seconds, steps so far) at the start of each round of the training loop, and at its end
    goes_on = module.Run.goes_on

    def watched(run, steps: int) -> bool:
        moments.append((time.perf_counter(), run.step))
        return goes_on(run, steps)

    module.Run.goes_on = watched
    module.evaluate = lambda *_: {}
    with tempfile.TemporaryDirectory() as folder:
        module.train(module.Args(**flags_of(curve, size), seed=seed, run_dir=folder))
    return {"steps_per_second": speed(moments), "memory_mb": peak()}


def speed(moments: list[tuple[float, int]]) -> float:
    """Steps per second from the middle one of these (seconds, steps) to the last one."""
    (begin, before), (end, after) = moments[len(moments) // 2], moments[-1]
    return (after - before) / (end - begin)


def point(index: int, size: int) -> dict:
    """One point, in processes of its own: several only for runs side by side."""
    copies = size if CURVES[index].name == "side by side" else 1
    command = [sys.executable, __file__, "--index", str(index), "--size", str(size), "--seed"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(seed)], **pipes) for seed in range(1, copies + 1)]
    ended = [process.communicate() for process in started]
    for process, (_, error) in zip(started, ended, strict=True):
        if process.returncode:
            sys.exit(error)
    results = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    row = {"curve": CURVES[index].name, "script": CURVES[index].script, "x": size}
    for name in results[0]:
        row[name] = f"{sum(result[name] for result in results):.0f}"
    return row


def draw(rows: list[dict], path: Path) -> None:
    """Four pictures: speed and memory by environments, speed by threads and runs, replay memory."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    wanted = [
        ("environments", "steps_per_second", "environments", "steps per second"),
        ("environments", "memory_mb", "environments", "memory of the process (MB)"),
        (
            "side by side",
            "steps_per_second",
            "runs side by side, or threads of one run",
            "steps per second, sum",
        ),
        ("replay", "memory_mb", "transitions in the replay memory", "memory (MB)"),
    ]
    for panel, (name, column, x_label, y_label) in zip(panels, wanted, strict=True):
        for curve in CURVES:
            if curve.name not in (name, "threads" if name == "side by side" else name):
                continue
            mine = [row for row in rows if (row["curve"], row["script"]) == (curve.name, curve.script)]
            x = [int(row["x"]) for row in mine]
            y = [float(row[column]) for row in mine]
            if not mine:
                continue
            label = curve.script + (", threads" if curve.name == "threads" else "")
            panel.plot(x, y, "o--" if curve.name == "threads" else "o-", label=label)
        panel.set(xlabel=x_label, ylabel=y_label)
        if not panel.lines:  # not measured yet
            continue
        panel.set(xscale="log", yscale="linear" if column == "memory_mb" and name != "replay" else "log")
        ticks = sorted({int(row["x"]) for row in rows if row["curve"] == name})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main(
    only: str | None = None, index: int | None = None, size: int = 1, seed: int = 1, draw_only: bool = False
) -> None:
    """only: the curves to measure. index, size, seed: the point that a process of its own measures."""
    if index is not None:
        print(json.dumps(measure(CURVES[index], size, seed)))
        return
    path = HERE / "results" / "scale.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    for i, curve in enumerate(CURVES):
        if draw_only or only not in (None, curve.name):
            continue
        rows = [row for row in rows if (row["curve"], row["script"]) != (curve.name, curve.script)]
        for x in curve.sizes:
            rows.append(point(i, x))
            print(rows[-1], flush=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
    draw(rows, HERE / "figures" / "scale.png")


if __name__ == "__main__":
    tyro.cli(main)
