"""Hyper-parameter search with Optuna: try many settings of a script, keep those that learn best.

    python algos/tools/tune.py ppo --env-id CartPole-v1 --total-timesteps 20000 --trials 60 --jobs 2

A hyper-parameter is a setting that training does not learn by itself, like the learning rate. A trial is one
run of the script with settings drawn from a search space, the table SPACES below; its value is the mean
reward of the evaluation at its end. All trials together are a study, with a folder of its own. Every flag
that is not one of the tuner's goes to the script, and a flag that is given there is not searched.

Steps
    [A] search   until --trials or --timeout: draw settings, train with them, evaluate; give up what lags
    [B] rank     the best settings again, each on fresh seeds that no trial has seen
    [C] report   a table, the winner's command line, study.csv and pictures, in the folder of the study

[A] How settings are drawn. The first ten are random. Then TPE, a tree-structured Parzen estimator, splits
the trials so far into a few good ones and the rest, estimates the density of the settings in both, l and g,
and proposes settings where l/g is large: much seen among the good, rarely among the rest
(https://arxiv.org/abs/2304.11127). Trials that still run count as bad ones, so that workers who draw at the
same time do not all try the same corner.

[A] What is given up. Once a third of its budget is used, a trial whose training returns have all been below
the median of the finished trials at the same point gets Ctrl-C: it saves, and its folder stays. The training
return decides on this, and on ties in [B]. It is measured with exploration, and while the weights still
change: it is never a value.

[B] Why to rank. The best of sixty trials is good or lucky: on another seed the same settings may fail. So
the best trials (up to --finalists; ties go to the higher training return) train again on the fresh seeds
101, 102, …, and that mean decides. The seeds 1, 2, 3, … remain unseen: what they give is the honest figure
to report.

Ctrl-C ends with the report on what is there, and the same command goes on. A run that crashes or learns NaN
is a failed trial, the study goes on. With --storage and the address of a PostgreSQL database, the same
command on other machines joins the study; a worker that is killed falls silent, and another one repeats its
trial. Without it a journal file in the study's folder does the same for one machine. What a killed tuner had
started trains on to its end, and nobody waits for it.

Expect: with --num-minibatches 1 --update-epochs 1, which makes ppo.py A2C, on CartPole, 45 random trials of
20,000 steps in 7 minutes on one busy core. Eight had 497 to 500 on their own seed, 66 to 411 on fresh ones.
"""

import csv
import fcntl
import hashlib
import io
import json
import math
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal, NoReturn

import numpy as np
import optuna
import tyro
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

ALGOS = Path(__file__).resolve().parents[1]
POINTS = 20  # of a training curve: trials are compared after each twentieth of the budget
POLL = 0.2  # seconds between two looks at a run
PATIENCE = 60  # seconds that a run may take to save after Ctrl-C
FIRST_SEARCH_SEED = 1000  # the first trial of --seed s trains on seed 1000 s, the next one on 1000 s + 1, …
FIRST_FRESH_SEED = 101  # of the ranking

# The search space of each script: flag -> range. A range is one of
#     log:LOW:HIGH      every factor of ten is equally likely, for rates
#     uniform:LOW:HIGH  every number is equally likely
#     int:LOW:HIGH      whole numbers
#     pow2:LOW:HIGH     powers of two, each equally likely
#     near1:LOW:HIGH    1 − x with x log-uniform, for γ and λ: near1:1e-3:1e-1 reaches from 0.9 to 0.999
#     choice:A:B:…      one of these; choice:True:False for a switch
SPACES = {
    "q_learning": {
        "learning-rate": "log:1e-2:1",
        "lr-visits": "choice:0:10:100",
        "gamma": "near1:1e-3:1e-1",
        "min-epsilon": "log:1e-3:2e-1",
        "decay-rate": "log:1e-4:1e-2",
    },
    "sarsa": {
        "n-step": "pow2:1:64",
        "learning-rate": "log:1e-2:1",
        "gamma": "near1:1e-3:1e-1",
        "min-epsilon": "log:1e-3:1e-1",
        "decay-rate": "log:1e-4:1e-2",
    },
    "dqn": {
        "learning-rate": "log:1e-4:1e-2",
        "batch-size": "pow2:32:256",
        "buffer-size": "pow2:4096:65536",
        "gradient-steps": "pow2:1:8",
        "tau": "log:1e-3:1",
        "gamma": "near1:1e-3:1e-1",
        "exploration-fraction": "uniform:0.05:0.5",
        "end-e": "log:1e-2:3e-1",
    },
    "dqn_atari": {
        "learning-rate": "log:1e-5:1e-3",
        "batch-size": "pow2:16:128",
        "train-frequency": "pow2:1:16",
        "target-network-frequency": "pow2:256:16384",
        "exploration-fraction": "uniform:0.05:0.5",
        "end-e": "log:5e-3:1e-1",
        "ortho-init": "choice:True:False",
    },
    "reinforce": {
        "num-envs": "pow2:4:32",
        "learning-rate": "log:1e-4:1e-1",
        "gamma": "near1:1e-3:1e-1",
        "entropy-coef": "log:1e-5:1e-1",
        "hidden-sizes": "choice:32:64:128",
        "baseline": "choice:batch:value",
        "anneal-lr": "choice:True:False",
    },
    "a2c_continuous": {
        "num-envs": "pow2:1:16",
        "learning-rate": "log:1e-5:1e-2",
        "num-steps": "pow2:4:256",
        "gamma": "near1:1e-3:1e-1",
        "gae-lambda": "near1:1e-2:3e-1",
        "ent-coef": "log:1e-6:1e-2",
        "vf-coef": "uniform:0.2:1",
        "log-std-init": "uniform:-3:0",
        "max-grad-norm": "log:0.3:5",
        "ortho-init": "choice:True:False",
        "use-sde": "choice:True:False",
        "use-rms-prop": "choice:True:False",
    },
    "ppo": {
        "num-envs": "pow2:4:32",
        "learning-rate": "log:1e-5:1e-1",
        "num-steps": "pow2:16:512",
        "gamma": "near1:1e-4:1e-1",
        "gae-lambda": "near1:1e-2:3e-1",
        "num-minibatches": "pow2:1:8",
        "update-epochs": "int:1:16",
        "clip-coef": "uniform:0.1:0.4",
        "ent-coef": "log:1e-6:1e-1",
        "vf-coef": "uniform:0.2:1",
        "max-grad-norm": "log:0.3:5",
    },
    "ppo_continuous": {
        "num-envs": "pow2:1:32",
        "learning-rate": "log:1e-5:1e-2",
        "num-steps": "pow2:32:1024",
        "gamma": "near1:1e-3:1e-1",
        "gae-lambda": "near1:1e-2:3e-1",
        "num-minibatches": "pow2:2:32",
        "update-epochs": "int:1:16",
        "clip-coef": "uniform:0.1:0.4",
        "ent-coef": "log:1e-6:1e-2",
        "vf-coef": "uniform:0.2:1",
        "log-std-init": "uniform:-3:0",
        "max-grad-norm": "log:0.3:5",
        "use-sde": "choice:True:False",
    },
    "rnd_ppo": {
        "learning-rate": "log:1e-5:1e-2",
        "num-steps": "pow2:16:256",
        "gamma": "near1:1e-3:1e-1",
        "int-gamma": "near1:1e-3:1e-1",
        "gae-lambda": "near1:1e-2:3e-1",
        "int-coef": "log:1e-2:3",
        "num-minibatches": "pow2:2:16",
        "update-epochs": "int:1:8",
        "ent-coef": "log:1e-4:1e-1",
    },
    "ppo_atari": {
        "learning-rate": "log:1e-5:1e-2",
        "num-steps": "pow2:32:256",
        "gamma": "near1:1e-3:1e-1",
        "gae-lambda": "near1:1e-2:3e-1",
        "num-minibatches": "pow2:1:16",
        "update-epochs": "int:1:8",
        "clip-coef": "uniform:0.05:0.4",
        "ent-coef": "log:1e-4:1e-1",
    },
    "icm_ppo": {
        "learning-rate": "log:1e-5:1e-2",
        "num-steps": "pow2:16:256",
        "gamma": "near1:1e-3:1e-1",
        "int-gamma": "near1:1e-3:1e-1",
        "gae-lambda": "near1:1e-2:3e-1",
        "int-coef": "log:1e-2:3",
        "features": "choice:raw:random:inverse",
        "num-minibatches": "pow2:2:16",
        "update-epochs": "int:1:8",
        "ent-coef": "log:1e-4:1e-1",
    },
}


@dataclass(frozen=True)
class Args:
    script: tyro.conf.Positional[str]  # what to tune: ppo, …, or the path of a copy; it gets all other flags
    # search
    trials: int = 60  # budget: trials of all workers together, pruned and failed ones included
    timeout: float = 1e9  # seconds after which no trial is begun
    jobs: int = 1  # trials at a time on this machine
    space: tuple[str, ...] = ()  # more or other ranges than in SPACES: learning-rate=log:1e-4:1e-2
    sampler: Literal["tpe", "random"] = "tpe"  # how settings are drawn
    prune: bool = True  # give up trials that lag behind
    seeds_per_trial: int = 1  # runs of a trial; its value is their mean
    # ranking
    finalists: int = 8  # best trials to train again; 0 for no ranking
    fresh_seeds: int = 5  # seeds for each of them
    # study
    study: str | None = None  # folder of the study; by default runs/tune__ENV__SCRIPT
    storage: str | None = None  # postgresql://USER@HOST/DATABASE, to share the study with other machines
    heartbeat: int = 20  # with --storage: seconds between signs of life; after three a worker counts as dead
    seed: int = 1  # of the sampler, and of the trials' runs


RANGES = {  # smallest and largest value of every number in Args
    "trials": (1, 1_000_000),
    "timeout": (0, 1e9),
    "jobs": (1, 1000),
    "seeds_per_trial": (1, 1000),
    "finalists": (0, 50),
    "fresh_seeds": (1, 899),  # 101, 102, …: those of the search begin at 1000
    "heartbeat": (1, 100_000),
    "seed": (1, 1_000_000),
}


class Failed(Exception):
    """A run ended without a result."""


class Interrupted(Exception):
    """Ctrl-C came while a trial was running."""


def parse_range(text: str) -> tuple[str, list]:
    """Read a range as in SPACES: its kind, and its two ends or its choices. Raises ValueError."""
    kind, *parts = text.split(":")
    if kind == "choice" and parts and all(parts):
        return kind, parts
    if kind not in ("log", "uniform", "int", "pow2", "near1") or len(parts) != 2:
        raise ValueError("it is none of log, uniform, int, pow2, near1 with :LOW:HIGH, or choice:A:B")
    low, high = (int(part) if kind in ("int", "pow2") else float(part) for part in parts)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{low} is not below {high}")
    if kind in ("log", "near1", "pow2") and low <= 0:
        raise ValueError(f"{kind} needs numbers above 0")
    if kind == "near1" and high > 1:
        raise ValueError("1 − x would be below 0")
    if kind == "pow2" and (low & (low - 1) or high & (high - 1)):
        raise ValueError(f"{low} or {high} is no power of two")
    return kind, [low, high]


def draw(trial: optuna.Trial, flag: str, text: str) -> str:
    """A value for this flag from its range, as it stands on a command line.

    Four digits are enough, and what the report prints is then exactly what was trained.
    """
    kind, parts = parse_range(text)
    if kind == "choice":
        return trial.suggest_categorical(flag, parts)
    low, high = parts
    if kind == "pow2":
        return str(2 ** trial.suggest_int(f"log2 {flag}", low.bit_length() - 1, high.bit_length() - 1))
    if kind == "int":
        return str(trial.suggest_int(flag, low, high))
    if kind == "near1":
        # log(1 − γ) is the scale that matters: from 0.9 to 0.99 the horizon 1 / (1 − γ) grows tenfold.
        gap = float(f"{trial.suggest_float(f'1 - {flag}', low, high, log=True):.4g}")
        return f"{1 - gap:.8g}"
    return f"{trial.suggest_float(flag, low, high, log=kind == 'log'):.4g}"


def command_line(settings: dict[str, str]) -> list[str]:
    """Settings, flag -> value, as arguments of a script; True and False are those of a switch."""
    words = []
    for flag, value in settings.items():
        if value in ("True", "False"):
            words.append(f"--{flag}" if value == "True" else f"--no-{flag}")
        else:
            words += [f"--{flag}", value]
    return words


class Curve:
    """The training returns of a run at POINTS points of its budget, read from its charts while they grow.

    The points are the same for all trials, whatever the size of their rollouts: only so can they be compared.
    step: how many steps the charts have reached.
    """

    def __init__(self, run_dir: Path, budget: int, unit: str) -> None:
        """budget: in `unit`, steps or episodes."""
        self.run_dir = run_dir
        self.budget = budget
        self.unit = unit
        self.offset = 0  # bytes of the file that have been read
        self.episodic_return = math.nan  # that of the last point of the charts
        self.step = 0
        self.done = 0.0  # how much of the budget
        self.point = 1  # to come next
        self.returns = []  # since the last point
        self.mean = math.nan  # of the last point

    def read(self, ended: bool = False) -> list[tuple[int, float]]:
        """New points: their numbers, 1 … POINTS, and the mean return since the point before. `ended`: all."""
        points = []
        for step, episodic_return, length in self.read_charts():
            # A budget in episodes is charted over steps as well: so many episodes were these steps.
            episodes = self.done + (step - self.step) / max(length, 1.0)
            done = step if self.unit == "steps" else episodes
            while self.point <= POINTS and done > self.budget * self.point / POINTS:
                points.append(self.close_point())
            self.step = step
            self.done = done
            self.returns.append(episodic_return)
        while ended and self.point <= POINTS:
            points.append(self.close_point())
        # Before the first episode has ended there is nothing to compare.
        return [(point, mean) for point, mean in points if not math.isnan(mean)]

    def close_point(self) -> tuple[int, float]:
        """The next point; where no episode has ended since the last one, that one's value stands."""
        if self.returns:
            self.mean = float(np.mean(self.returns))
            self.returns = []
        self.point += 1
        return self.point - 1, self.mean

    def read_charts(self) -> list[tuple[int, float, float]]:
        """Step, mean episodic return and mean episodic length of each new point of the charts.

        TensorBoard's own readers compute every record's checksum in Python: 1.6 s or more for a run of 4,000
        updates, here 0.1 s. A record is: its length in 8 bytes, a checksum in 4, an Event, a checksum in 4.
        """
        from tensorboard.compat.proto.event_pb2 import Event  # here, because --help needs none of it

        data = b""
        for path in self.run_dir.glob("events.out.*"):
            with open(path, "rb") as file:
                file.seek(self.offset)
                data = file.read()
        found = []
        start = 0
        while start + 12 <= len(data):
            end = start + 12 + struct.unpack_from("<Q", data, start)[0] + 4
            if end > len(data):  # the rest is still being written
                break
            record = data[start + 12 : end - 4]
            if b"charts/episodic_" in record:
                event = Event.FromString(record)
                for value in event.summary.value:  # the length follows the return, here or in the next record
                    if value.tag == "charts/episodic_return":
                        self.episodic_return = value.simple_value
                    elif value.tag == "charts/episodic_length":
                        found.append((event.step, self.episodic_return, value.simple_value))
            start = end
        self.offset += start
        return found


class Tuner:
    """One worker: what it tunes, where it writes, and whether Ctrl-C came.

    budget, unit: of a run, as in the script's --total-timesteps or --total-episodes. stop: set by Ctrl-C and
    when a thread fails. interrupted: study and number of the trials that this worker cut short.
    """

    def __init__(
        self, args: Args, script: Path, flags: list[str], space: dict[str, str], stop: threading.Event
    ) -> None:
        """flags: those of the script, the same in all runs. space: flag -> range, as in SPACES."""
        self.args = args
        self.script = script
        self.flags = flags
        self.space = space
        self.stop = stop
        settings = ask_script(script, flags, space)  # ends here if the script refuses
        if not {"total_episodes", "total_timesteps"} & settings.keys():
            fail(f"{script.name} has no budget in steps or episodes: it cannot be tuned")
        self.unit = "episodes" if "total_episodes" in settings else "steps"
        self.budget = settings.get("total_episodes") or settings["total_timesteps"]
        name = f"tune__{settings['env_id']}__{script.stem}".replace("/", "-").replace(":", "-")
        self.dir = Path(args.study or f"runs/{name}").resolve()
        self.interrupted: set[tuple[str, int]] = set()

    def work(self, study: optuna.Study, budget: int, objective, bar: tqdm) -> None:
        """Run trials until `budget` of them are counted, together with all other workers."""

        def after(study: optuna.Study, trial: FrozenTrial) -> None:
            if (study.study_name, trial.number) in self.interrupted:
                Retry()(study, trial)  # the same settings again when the same command is
            show(study, bar)

        def one_by_one() -> None:
            try:
                while not self.stop.is_set():
                    optuna.storages.fail_stale_trials(study)  # those whose worker has fallen silent
                    trials = study.get_trials(deepcopy=False)
                    states = {trial.state for trial in trials}
                    left = TrialState.WAITING in states or sum(map(is_fresh, trials)) < budget
                    if left and time.time() < study.user_attrs["deadline"]:
                        try:
                            study.optimize(objective, 1, catch=(Failed, Interrupted), callbacks=[after])
                        except ValueError as error:
                            # This worker was silent for too long, and its trial was given to another one.
                            if "Cannot tell" not in str(error):
                                raise
                    elif TrialState.RUNNING in states:  # it may be lost with its worker, and come back
                        self.stop.wait(1)
                    else:
                        break
            except (optuna.exceptions.StorageInternalError, UnboundLocalError):
                # Optuna 5.0 has the second one when a trial ends and its end cannot be stored.
                self.stop.set()
                fail("the database of the study cannot be reached any more", code=1)
            except BaseException:
                self.stop.set()
                raise

        show(study, bar)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for future in [pool.submit(one_by_one) for _ in range(self.args.jobs)]:
                future.result()
        bar.close()

    def search_trial(self, trial: optuna.Trial) -> float:
        """[A] One trial. Returns its value; raises TrialPruned, Failed or Interrupted."""
        _, place = self.place(trial, self.args.trials)
        settings = {flag: draw(trial, flag, text) for flag, text in self.space.items()}
        for name, value in {"settings": settings, "steps": 0, "seconds": 0.0, "error": ""}.items():
            trial.set_user_attr(name, value)
        values = []
        for i in range(self.args.seeds_per_trial):
            # Each trial has seeds of its own. One for all would search for settings that suit this one seed.
            seed = FIRST_SEARCH_SEED * self.args.seed + place * self.args.seeds_per_trial + i
            name = f"trial-{trial.number}" + (f"-seed-{seed}" if self.args.seeds_per_trial > 1 else "")
            values.append(self.run(trial, name, settings, seed, first_point=i * POINTS))
        return float(np.mean(values))

    def rank_trial(self, trial: optuna.Trial, finalists: list[FrozenTrial], known: dict) -> float:
        """[B] One run of a finalist with a fresh seed. Returns its value; raises Failed or Interrupted.

        known: (trial number, seed) -> value, of earlier rankings.
        """
        number, place = self.place(trial, len(finalists) * self.args.fresh_seeds)
        finalist = finalists[place % len(finalists)]
        seed = FIRST_FRESH_SEED + place // len(finalists)
        for name, value in {"finalist": finalist.number, "seed": seed, "steps": 0, "seconds": 0.0}.items():
            trial.set_user_attr(name, value)
        if (finalist.number, seed) in known:
            return known[finalist.number, seed]
        again = f"-again-{trial.number}" if number != trial.number else ""
        name = f"trial-{finalist.number}-seed-{seed}{again}"
        return self.run(trial, name, finalist.user_attrs["settings"], seed)

    def place(self, trial: optuna.Trial, budget: int) -> tuple[int, int]:
        """The number of a trial, or of the one that it repeats, and how many are before that; raises Failed.

        Two workers may both see that one trial is left and both begin it. Numbers are unique, so exactly one
        of them finds its own number within the budget.
        """
        trials = trial.study.get_trials(deepcopy=False)
        own = next(each for each in trials if each.number == trial.number)
        number = trial.number if is_fresh(own) else Retry.retried_trial_number(own)
        place = sum(is_fresh(each) and each.number < number for each in trials)
        if place >= budget:
            trial.set_user_attr("surplus", True)
            raise Failed("another worker was faster")
        return number, place

    def run(self, trial: optuna.Trial, name: str, settings: dict, seed: int, first_point: int = 0) -> float:
        """Train with these settings and evaluate: the mean reward. Raises TrialPruned, Failed, Interrupted.

        name: of the run folder. first_point: of how many points the trial's earlier runs have reported.
        """
        run_dir = unused(self.dir / name)
        flags = [*self.flags, *command_line(settings), "--seed", str(seed), "--run-dir", str(run_dir)]
        trial.set_user_attr("run_dir", f"{socket.gethostname()}:{run_dir}")
        log = run_dir.with_name(run_dir.name + ".log")
        curve = Curve(run_dir, self.budget, self.unit)
        before = trial.user_attrs.get("steps", 0), trial.user_attrs.get("seconds", 0.0)
        began = time.perf_counter()
        environment = os.environ | {"TQDM_DISABLE": "1"}  # a bar in a file is noise
        with open(log, "w") as file:
            output = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL}
            process = subprocess.Popen([sys.executable, self.script, *flags], **output, env=environment)
        alive = True
        pruned = False
        try:
            while alive and not pruned and not self.stop.is_set():
                try:
                    process.wait(POLL)
                except subprocess.TimeoutExpired:
                    pass
                alive = process.poll() is None
                for point, value in curve.read(ended=process.returncode == 0):
                    trial.report(value, first_point + point)
                pruned = alive and trial.should_prune()
        finally:
            interrupt(process)
            curve.read()
            trial.set_user_attr("seconds", before[1] + time.perf_counter() - began)
            trial.set_user_attr("steps", before[0] + curve.step)
        if pruned:
            raise optuna.TrialPruned
        if process.returncode:
            if self.stop.is_set():
                self.interrupted.add((trial.study.study_name, trial.number))
                raise Interrupted
            lines = log.read_text(errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line.strip()), "no output")
            reason = f"exit code {process.returncode}, {reason}"
        else:
            results = json.loads((run_dir / "results.json").read_text())
            trial.set_user_attr("steps", before[0] + results["global_step"])  # the charts may end before
            if math.isfinite(results["mean_reward"]):
                return results["mean_reward"]
            reason = f"a mean reward of {results['mean_reward']}"
        trial.set_user_attr("error", reason)
        tqdm.write(f"{run_dir.name} failed: {reason}")
        raise Failed(reason)


def interrupt(process: subprocess.Popen) -> None:
    """Ctrl-C for a script, if it runs: it saves first. One that does not end is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def unused(path: Path) -> Path:
    """This path, or with -2, -3, … behind it: what a killed worker left there is not touched."""
    copy = 1
    free = path
    while free.exists() or free.with_name(free.name + ".log").exists():
        copy += 1
        free = path.with_name(f"{path.name}-{copy}")
    return free


def is_fresh(trial: FrozenTrial) -> bool:
    """Whether this trial repeats no other one."""
    return Retry.retried_trial_number(trial) is None


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """All trials of a study, each once: of one that was repeated, the last attempt."""
    trials = study.get_trials(deepcopy=False)
    repeated = {number for trial in trials for number in Retry.retry_history(trial)}
    return [t for t in trials if t.number not in repeated and not t.user_attrs.get("surplus")]


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have a value of their own, the best first; of equal ones the better training return."""

    def key(trial: FrozenTrial) -> tuple[float, float, int]:
        points = trial.intermediate_values
        return -trial.value, -points[max(points)] if points else math.inf, trial.number

    return sorted((t for t in counted(study) if t.state == TrialState.COMPLETE), key=key)


def show(study: optuna.Study, bar: tqdm) -> None:
    """The state of a study on its progress bar."""
    states = [trial.state for trial in counted(study)]
    done = {state: states.count(state) for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)}
    best = finished(study)[:1]
    words = [f"best {trial.value:.2f}" for trial in best]
    words += [f"{done[TrialState.PRUNED]} pruned", f"{done[TrialState.FAIL]} failed"]
    bar.set_postfix_str(", ".join(words), refresh=False)
    bar.n = sum(done.values())
    bar.refresh()


def open_folder(tuner: Tuner) -> IO | None:
    """Make the folder of the study. Without --storage lock it: one process writes the journal."""
    try:
        tuner.dir.mkdir(parents=True, exist_ok=True)
        if tuner.args.storage:
            return None
        lock = open(tuner.dir / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        more = "--jobs begins more trials at a time, --storage lets other machines join in"
        fail(f"another process is tuning in {tuner.dir}: {more}")
    except OSError as error:
        fail(f"cannot write the folder of the study: {error}")


def open_storage(tuner: Tuner) -> optuna.storages.BaseStorage:
    """Where the trials are kept: a PostgreSQL database, or a journal in the folder."""
    args = tuner.args
    if not args.storage:
        journal = tuner.dir / "journal.log"
        # Half a line at its end is left from a process that was killed: the folder is ours.
        if journal.exists():
            lines = journal.read_bytes()
            os.truncate(journal, lines.rfind(b"\n") + 1)
        backend = optuna.storages.journal.JournalFileBackend(str(journal))
        try:
            return optuna.storages.JournalStorage(backend)
        except Exception as error:  # a damaged file fails in many ways
            fail(f"cannot use {journal}: {type(error).__name__} {error}")
    attempt = 1
    while True:
        try:
            return optuna.storages.RDBStorage(
                # SQLAlchemy's own choice of a driver changed with 2.1: name the one that is installed.
                args.storage.replace("postgresql:", "postgresql+psycopg2:", 1),
                engine_kwargs={"pool_pre_ping": True},  # a connection may die while a trial trains
                heartbeat_interval=args.heartbeat,
                grace_period=3 * args.heartbeat,
                # A trial that kills its machine must not kill all machines.
                heartbeat_stale_trial_callback=Retry(max_retry=2),
            )
        except Exception as error:  # the database, its driver and the network fail in many ways
            # Of two workers that come at the same time, both create the tables, and one fails.
            first = any(words in str(error) for words in ("already exists", "duplicate key"))
            if not first or attempt == 10:
                fail(f"cannot use --storage: {type(error).__name__} {getattr(error, 'orig', None) or error}")
            attempt += 1
            time.sleep(0.5)


def open_study(tuner: Tuner, storage: optuna.storages.BaseStorage, name: str, timeout: float) -> optuna.Study:
    """Create a study in the storage, or join it. Trials that a killed process left behind are repeated.

    timeout: seconds from now after which no worker begins a trial.
    """
    args = tuner.args
    name = f"{tuner.dir.name} {name}"
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    asked = {"script": tuner.script.name, "flags": tuner.flags, "space": tuner.space, "seed": args.seed}
    asked |= {"seeds_per_trial": args.seeds_per_trial, "fresh_seeds": args.fresh_seeds}
    known = study.user_attrs.get("asked", asked)
    if known != asked:
        differs = ", ".join(part for part in asked if known[part] != asked[part])
        fail(f"{tuner.dir} holds a study of another command ({differs}): choose another --study")
    study.set_user_attr("asked", asked)
    text = hashlib.sha256(tuner.script.read_bytes()).hexdigest()
    if study.user_attrs.get("text", text) != text:
        print(
            f"note: {tuner.script.name} is another text now than when the study {name!r} began: "
            f"its trials do not compare. A new one: --study NAME",
            file=sys.stderr,
        )
    else:
        study.set_user_attr("text", text)
    trials = study.get_trials(deepcopy=False)
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    if not args.storage:  # the folder is ours, so nobody is at work on these
        for trial in running:
            study.tell(trial.number, state=TrialState.FAIL)
            Retry(max_retry=2)(study, trial)
        running = []
    # All workers go by one clock, so that all end the search together. It starts when the first one comes.
    if not running or study.user_attrs.get("deadline", 0) < time.time():
        study.set_user_attr("deadline", time.time() + timeout)
    # A worker that joins or comes back must not draw the same random numbers again.
    seed = None
    if not args.storage:
        seed = int(np.random.SeedSequence([args.seed, len(trials)]).generate_state(1)[0])
    if args.sampler == "random":
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study.pruner = optuna.pruners.NopPruner()
    if args.prune:
        warmup = math.ceil(POINTS * args.seeds_per_trial / 3)
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=warmup)
    return study


def report(
    tuner: Tuner, search: optuna.Study, ranking: optuna.Study | None, finalists: list[FrozenTrial]
) -> None:
    """[C] Print the table and the winner's command line; write study.csv and the pictures."""
    fresh = on_fresh_seeds(ranking, finalists)
    order = sorted(finalists, key=lambda trial: -mean(fresh[trial.number]))
    states = [trial.state for trial in counted(search)]
    print(
        f"{len(states)} trials: {states.count(TrialState.COMPLETE)} finished, "
        f"{states.count(TrialState.PRUNED)} pruned, {states.count(TrialState.FAIL)} failed; "
        f"{sum(trial.user_attrs.get('steps', 0) for trial in counted(search)):,} steps"
    )
    print("place  trial  own seeds  fresh seeds, mean (each)")
    for place, trial in enumerate(order, 1):
        values = fresh[trial.number]
        each = "none yet"
        if values:
            each = f"{mean(values):8.2f}  ({', '.join(f'{value:.2f}' for value in values)})"
        print(f"{place:5}  {trial.number:5}  {trial.value:9.2f}  {each}")
    if order:
        script = os.path.relpath(tuner.script)
        words = [*tuner.flags, *command_line(order[0].user_attrs["settings"])]
        print(f"python {script} {shlex.join(words)}")
    write_csv(tuner, search, fresh)
    draw_pictures(tuner, search, order, fresh)
    print(f"study.csv and pictures: {tuner.dir}")


def on_fresh_seeds(ranking: optuna.Study | None, finalists: list[FrozenTrial]) -> dict[int, list[float]]:
    """Values of the finalists on the fresh seeds, by their trial numbers; −∞ for a run that failed."""
    fresh = {trial.number: [] for trial in finalists}
    runs = counted(ranking) if ranking else []
    for run in sorted(runs, key=lambda run: run.user_attrs.get("seed", 0)):
        if run.state == TrialState.COMPLETE:
            fresh[run.user_attrs["finalist"]].append(run.value)
        elif "finalist" in run.user_attrs and "error" in run.user_attrs:  # without: it was killed too often
            fresh[run.user_attrs["finalist"]].append(-math.inf)  # what fails on any seed comes last
    return fresh


def mean(values: list[float]) -> float:
    """Minus infinity for none."""
    return float(np.mean(values)) if values else -math.inf


def write_csv(tuner: Tuner, search: optuna.Study, fresh: dict[int, list[float]]) -> None:
    """study.csv: a row per trial. fresh: trial number -> values of the finalists on the fresh seeds."""
    text = io.StringIO()
    columns = ["trial", "state", "value", "training_return", "steps", "seconds", *tuner.space]
    columns += ["fresh_mean", "fresh_values", "run_dir", "error"]
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for trial in counted(search):
        points = trial.intermediate_values
        values = fresh.get(trial.number, [])
        row = {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value if trial.state == TrialState.COMPLETE else "",
            "training_return": points[max(points)] if points else "",
            "fresh_mean": mean(values) if values else "",
            "fresh_values": " ".join(map(str, values)),
        }
        row |= {name: trial.user_attrs.get(name, "") for name in ("steps", "seconds", "run_dir", "error")}
        writer.writerow(row | trial.user_attrs.get("settings", {}))
    write_file(tuner.dir / "study.csv", text.getvalue().encode())


def draw_pictures(tuner: Tuner, search: optuna.Study, order: list[FrozenTrial], fresh: dict) -> None:
    """Optuna's own plots of the search, and ranking.png: what is left of the best values on fresh seeds."""
    if not order:
        return
    # Of few trials or equal values the plots complain.
    warnings.filterwarnings("ignore", category=UserWarning)
    import matplotlib  # here, because it is slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    def history():
        return plots.plot_optimization_history(search, target_name="mean reward")

    def importances():
        return plots.plot_param_importances(search, target_name="mean reward")

    def slices():
        return np.atleast_1d(plots.plot_slice(search, target_name="mean reward"))[0]

    def intermediate_values():
        axes = plots.plot_intermediate_values(search)
        axes.set(xlabel=f"of {POINTS} parts of the budget", ylabel="episodic return while training")
        if axes.get_legend():
            axes.get_legend().remove()  # dozens of numbers
        return axes

    def ranking():
        plt.style.use("default")
        _, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        for place, trial in enumerate(order):
            values = [value for value in fresh[trial.number] if math.isfinite(value)]
            axes.plot(place, trial.value, "x", color="tab:red", markersize=9)
            axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.5)
            axes.plot([place - 0.3, place + 0.3], [mean(values) if values else np.nan] * 2, color="tab:blue")
        axes.set_xticks(range(len(order)), [f"trial {trial.number}" for trial in order], rotation=30)
        axes.set(ylabel="mean reward", title="The best trials, and the same settings on fresh seeds")
        words = ["in the search", "each fresh seed", "their mean"]
        axes.legend(words, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        return axes

    pictures = [history, importances, slices, intermediate_values]
    for picture in [*pictures, ranking] if any(fresh.values()) else pictures:
        path = tuner.dir / f"{picture.__name__}.png"
        try:
            figure = picture().figure
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=90, bbox_inches="tight")
            write_file(path, data.getvalue())
        except Exception as error:  # what few trials are too few for, each plot says in its own way
            print(f"no {path.name}: {type(error).__name__} {error}")
        plt.close("all")


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name and move into place, so that no crash leaves half a file."""
    # Workers that share the folder report at the same moment: each has a temporary name of its own.
    temporary = path.with_name(f"tmp-{socket.gethostname()}-{os.getpid()}-{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on stderr; exit code 2 means bad input."""
    print("error: " + " ".join(message.split())[:400], file=sys.stderr)
    raise SystemExit(code)


def read_command_line() -> tuple[Args, list[str]]:
    """The tuner's arguments, and those that are the script's."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return tyro.cli(Args, return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        message = "".join(letter for letter in errors.getvalue() if not "─" <= letter <= "╿")
        # The parser takes the script's name for the value of a flag before it that it does not know.
        if "Missing" in message and (not sys.argv[1:] or sys.argv[1].startswith("-")):
            fail("name the script first: tune.py ppo --env-id …")
        fail(message)


def check_args(args: Args) -> None:
    """End with one line and exit code 2 if a setting is out of range."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if not low <= value <= high:  # written so that NaN is out of range too
            fail(f"--{name.replace('_', '-')} {value} is not between {low:,} and {high:,}")
    if args.storage and not args.storage.startswith("postgresql"):
        # SQLite among others: with several processes at work it ends in "database is locked".
        fail("--storage takes the address of a PostgreSQL database: postgresql://USER@HOST/DATABASE")


def find_script(name: str) -> Path:
    """The file of a script: its name without .py, or a path."""
    path = Path(name).resolve() if name.endswith(".py") else ALGOS / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in ALGOS.glob("*.py")))
        fail(f"there is no script {name}: {known}, or the path of another one")
    return path


def name_of(word: str) -> str:
    """The flag in a word: learning-rate in --learning_rate=0.1, anneal-lr in --no-anneal-lr."""
    return word.split("=")[0].removeprefix("--").replace("_", "-").removeprefix("no-")


def make_space(args: Args, script: Path, flags: list[str]) -> dict[str, str]:
    """The search space: the table's, with --space, without what the command line fixes."""
    given = {name_of(word) for word in flags if word.startswith("--")}
    named = {name_of(entry): entry.partition("=")[2] for entry in args.space}
    for flag in sorted(given | named.keys()):
        if flag in ("run-dir", "resume", "evaluate", "capture-video", "seed"):
            fail(f"--{flag} is for single runs, the tuner gives each its own")
        if flag in ("track", "wandb-project-name", "wandb-entity"):
            # There a run goes by the name of its folder.
            fail(f"--{flag} is for single runs: trial-0 of every study would be one and the same run on W&B")
        if flag in given and flag in named:
            fail(f"--{flag} is fixed and in --space: choose one")
    space = {flag: text for flag, text in SPACES.get(script.stem, {}).items() if flag not in given} | named
    for flag, text in space.items():
        try:
            parse_range(text)
        except ValueError as error:
            fail(f"--space {flag}={text}: {error}")
    if not space:
        fail(
            f"nothing to search: name flags of {script.name} with --space, as in learning-rate=log:1e-4:1e-2"
        )
    return space


def ask_script(script: Path, flags: list[str], space: dict[str, str]) -> dict:
    """All settings of the script with these flags. What it refuses ends here, with the script's line.

    What is searched has its smallest value: a rollout of default size may be more than a small budget. But
    the smallest one may be too small for a flag that is given: then the largest values may do as well.
    """
    program = (
        "import dataclasses, importlib, json, sys\n"
        "script = importlib.import_module(sys.argv.pop(1))\n"
        "args = script.parse_args()\n"
        "script.check_args(args)\n"
        "print(json.dumps(dataclasses.asdict(args)))"
    )
    paths = os.pathsep.join([str(script.parent), str(ALGOS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    reasons = []
    for end in (0, -1):
        settings = {}
        for flag, text in space.items():
            kind, parts = parse_range(text)
            settings[flag] = str(1 - parts[-1 - end] if kind == "near1" else parts[end])
        command = [sys.executable, "-c", program, script.stem, *flags, *command_line(settings)]
        answer = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not answer.returncode:
            return json.loads(answer.stdout.splitlines()[-1])
        lines = [line for line in answer.stderr.splitlines() if line.strip()]
        reasons.append(lines[-1].removeprefix("error: ") if lines else "it does not start")
    fail(f"{script.name}: {'. With the largest values: '.join(dict.fromkeys(reasons))}")


def main() -> None:
    args, flags = read_command_line()
    check_args(args)
    script = find_script(args.script)
    space = make_space(args, script, flags)
    signals = []
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (signals.append(number), stop.set()))
    tuner = Tuner(args, script, flags, space, stop)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    lock = open_folder(tuner)
    storage = open_storage(tuner)
    search = open_study(tuner, storage, "search", args.timeout)

    # [A] search
    tuner.work(
        search, args.trials, tuner.search_trial, tqdm(total=args.trials, desc="search", unit=" trials")
    )

    # [B] rank
    finalists = finished(search)[: max(args.finalists, 1)]
    ranking = None
    if finalists and args.finalists and not tuner.stop.is_set():
        runs = len(finalists) * args.fresh_seeds
        # Workers that agree on the finalists share the study of their ranking.
        name = f"ranking of {' '.join(str(trial.number) for trial in finalists)}"
        ranking = open_study(tuner, storage, name, timeout=1e9)
        ranking.pruner = optuna.pruners.NopPruner()
        known = {}  # after more trials there are other finalists, and often some of the old ones
        for other in optuna.get_all_study_names(storage):
            if other.startswith(f"{tuner.dir.name} ranking"):
                for trial in finished(optuna.load_study(study_name=other, storage=storage)):
                    known[trial.user_attrs["finalist"], trial.user_attrs["seed"]] = trial.value
        objective = partial(tuner.rank_trial, finalists=finalists, known=known)
        tuner.work(ranking, runs, objective, tqdm(total=runs, desc="ranking", unit=" runs"))

    # [C] report
    report(tuner, search, ranking, finalists)
    if lock:
        lock.close()
    if signals:
        print("interrupted: the same command goes on", file=sys.stderr)
        raise SystemExit(128 + signals[0])
    if not finalists:
        fail(f"no trial has finished; what they printed is in {tuner.dir}", code=1)


if __name__ == "__main__":
    main()
