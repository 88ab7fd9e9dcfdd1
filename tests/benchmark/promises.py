"""Tries what every script promises about its run folder, many times, and prints the table for README.

    python tests/benchmark/promises.py                       all of it, an hour on one core
    python tests/benchmark/promises.py --only kills --count 20
    python tests/benchmark/promises.py --only flags damage --scripts ppo dqn

kills      kill -9 at a random moment; then --resume, or the same command again if nothing was saved yet. The
           scripts of LEARNS train to the end and must reach their score, the others have small budgets
sigterm    the same with SIGTERM, as clusters send it: it must save like Ctrl-C and end with code 143
flags      each flag of each script with nonsense: a line and exit code 2, or a setting that can be trained
damage     each checkpoint cut at 20 places, and 200 times with one byte changed; args.json 20 and 20 times
folders    two runs that begin in one folder at the same moment; a folder without the right to write; no room

Each run is a process of its own, forked from one that has imported the script: that spares the time of the
import. Every failure is printed with its command; the exit code is their number.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # with its imports, for the forks of this process
import tyro

TESTS = Path(__file__).parents[1]
ALGOS = TESTS.parent / "algos"
sys.path[:0] = [str(ALGOS), str(TESTS)]

# ruff: noqa: E402
import test_run_folder as promised
from test_run_folder import CASES

NONSENSE = ["nan", "-inf", "-1", "0", "0.5", "1e30", str(10**23), "text", "", "a/../../b", "🎲", "--"]
# Scripts whose default run takes seconds, and the mean reward that every seed reaches.
LEARNS = {"q_learning": 1.0, "reinforce": 475.0, "ppo": 475.0}
NOBODY = 65534  # the user that owns nothing


@dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = ("kills", "sigterm", "flags", "damage", "folders")
    scripts: tuple[str, ...] = tuple(CASES)
    count: int = 100  # kills, and as many SIGTERM, over all scripts
    seed: int = 1  # of the random moments and places


class Table:
    """How often each promise was tried, and what failed."""

    def __init__(self) -> None:
        self.tried = {}
        self.failures = []

    def note(self, promise: str, problem: str, what: str) -> None:
        """problem: "" if the promise was held. what: script and command."""
        self.tried.setdefault(promise, [0, 0])
        self.tried[promise][0] += 1
        self.tried[promise][1] += bool(problem)
        if problem:
            self.failures.append(problem)
            print(f"FAILED  {promise}: {what}\n        {problem}", flush=True)


class Forked:
    """A script's main block in a forked process, with its own working folder and output files."""

    def __init__(self, name: str, argv: list, folder: Path, prepare=lambda: None) -> None:
        self.folder = folder
        self.process = multiprocessing.get_context("fork").Process(
            target=self.work, args=(name, list(map(str, argv)), prepare)
        )
        self.process.start()

    def work(self, name: str, argv: list[str], prepare) -> None:
        os.setpgid(0, 0)
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.folder / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w")
        os.chdir(self.folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        module = importlib.import_module(name)
        sys.argv = [f"{name}.py", *argv]
        source = (ALGOS / f"{name}.py").read_text()
        main = source[source.index('if __name__ == "__main__":') :]
        exec(compile(main, f"{name}.py", "exec"), {**vars(module), "__name__": "__main__"})

    def end(self, seconds: float = 300) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self.process.join(seconds)
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            return -1, "", f"still running after {seconds} s"
        out, err = ((self.folder / stream).read_text(errors="replace") for stream in ("out", "err"))
        return self.process.exitcode, out, err


def one_line(code: int, err: str, wanted: int = 2) -> str:
    """What is wrong with this ending, if it should have been one line and that exit code."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    if "Traceback" in err:
        return "a traceback: " + err.strip().splitlines()[-1]
    return "" if code == wanted and len(lines) == 1 else f"exit code {code}: {err.strip()[-200:]}"


def kills(table: Table, options: Options, stop: int) -> None:
    """Interrupt a run at a random moment of its life, go on, and look at what is there in the end."""
    draw = random.Random(options.seed)
    promise = "kill -9, then --resume" if stop == signal.SIGKILL else "SIGTERM, then --resume"
    lengths = {}
    for number in range(options.count):
        name = options.scripts[number % len(options.scripts)]
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            command = ["--seed", number, "--run-dir", folder / "run"]
            if name in LEARNS:
                command += ["--checkpoint-every", 2000]
            else:
                command += [*case.flags, case.budget, 3 * case.small]
            if name not in lengths:
                began = time.perf_counter()
                code, _, err = Forked(name, command, folder).end()
                assert code == 0, err
                lengths[name] = time.perf_counter() - began
                shutil.rmtree(folder / "run")
            run, moment = stopped(name, command, folder, partial(draw.uniform, 0, lengths[name]), stop)
            code, _, err = run.end()
            what = f"{name} {' '.join(map(str, command))}, stopped after {moment:.2f} s"
            saved = promised.global_step(folder / "run", case)
            if problem := ending(stop, code, err, saved, (folder / "run" / "results.json").exists()):
                table.note(promise, problem, what)
                continue
            if saved >= 0:
                code, out, err = Forked(name, ["--resume", folder / "run"], folder).end()
            else:
                code, out, err = Forked(name, command, folder).end()
            problem = f"exit code {code}: {err[-300:]}" if code else after(name, folder, out, saved)
            table.note(promise, problem, what)


def stopped(name: str, command: list, folder: Path, moment, stop: int) -> tuple[Forked, float]:
    """A run that was stopped while it was alive, and after how many seconds. moment() draws when."""
    while True:
        run, after = Forked(name, command, folder), moment()
        run.process.join(after)
        if run.process.is_alive():
            os.kill(run.process.pid, stop)
            return run, after
        shutil.rmtree(folder / "run")  # it ended before: that was no try


def ending(stop: int, code: int, err: str, saved: int, finished: bool) -> str:
    """What is wrong with how a run ended after the signal. saved: step of its checkpoint, -1: none."""
    if "Traceback" in err:
        return f"exit code {code}: {err[-300:]}"
    if code == 0:  # the signal came while the process was leaving
        return "" if finished else "exit code 0 without results.json"
    if code == 128 + stop:
        return "" if saved >= 0 else "nothing was saved"
    # Without its answer SIGTERM may end a run only before there is something to save.
    good = code == -stop and (stop == signal.SIGKILL or saved < 0)
    return "" if good else f"exit code {code}, {saved} steps in the checkpoint: {err[-300:]}"


def after(name: str, folder: Path, out: str, saved: int) -> str:
    """What is wrong with a run that was interrupted and has ended."""
    case, run_dir = CASES[name], folder / "run"
    results = json.loads((run_dir / "results.json").read_text())
    if left := [path.name for path in run_dir.glob("tmp-*")]:
        return f"half-written: {left}"
    if results["global_step"] < saved or results["global_step"] != promised.global_step(run_dir, case):
        return f"{results['global_step']} steps in the end, {saved} in the checkpoint before"
    steps = [step for step, _ in promised.scalars(run_dir).get("charts/episodic_return", [])]
    if steps != sorted(set(steps)):
        return "points of the charts twice, or not in order"
    if results["mean_reward"] < LEARNS.get(name, -float("inf")):
        return f"a mean reward of {results['mean_reward']}"
    code, again, err = Forked(name, ["--evaluate", run_dir], folder).end()
    return "" if code == 0 and again == out else f"--evaluate says {again!r} and not {out!r}: {err[-300:]}"


class Begins(Exception):
    """The settings were accepted, the memory is there, the first rollout would be next."""


def flags(table: Table, options: Options) -> None:
    """Parse, check and prepare, up to the first look whether the budget allows a rollout."""

    def begin(self, size: int) -> bool:
        raise Begins

    here = Path.cwd()
    for name in options.scripts:
        module = importlib.import_module(name)
        make = "make_env" if hasattr(module, "make_env") else "make_envs"
        make_envs, goes_on = getattr(module, make), module.Run.goes_on
        setattr(module, make, once_each(make_envs))
        module.Run.goes_on = begin
        for field in dataclasses.fields(module.Args):
            for value in NONSENSE:
                argv = ["--" + field.name.replace("_", "-"), value]
                with tempfile.TemporaryDirectory() as folder:
                    os.chdir(folder)
                    problem = begun(name, argv, Path(folder) / "err")
                    os.chdir(here)
                table.note("a flag with nonsense", problem, f"{name} {argv}")
        setattr(module, make, make_envs)
        module.Run.goes_on = goes_on


def once_each(make_envs):
    """make_envs, but environments of each kind are made once and stay open: that spares most of the time."""
    made = {}

    def make(args, *rest, **more):
        key = repr((args.env_id, getattr(args, "env_kwargs", None), rest, more))
        if key not in made:
            made[key] = make_envs(args, *rest, **more)
            made[key].close = lambda: None
        return made[key]

    return make


def begun(name: str, argv: list[str], err_path: Path) -> str:
    """What is wrong with how the script begins in this process with these arguments."""
    source = (ALGOS / f"{name}.py").read_text()
    main = source[source.index('if __name__ == "__main__":') :]
    sys.argv = [f"{name}.py", *argv]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stderr = sys.stderr
    code = None
    with open(err_path, "w") as sys.stderr:
        try:
            exec(compile(main, f"{name}.py", "exec"), {**vars(sys.modules[name]), "__name__": "__main__"})
        except Begins:
            pass
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            return f"a traceback: {type(error).__name__} {error}"
        finally:
            sys.stderr.flush()
            sys.stderr = stderr
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return "" if code is None else one_line(code, err_path.read_text())


def damage(table: Table, options: Options) -> None:
    """--evaluate with damaged files: a line, or the same score."""
    draw = random.Random(options.seed)
    for name in options.scripts:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            code, _, err = Forked(name, [*case.command, "--run-dir", folder / "run"], folder).end()
            assert code == 0, err
            look = ["--evaluate", folder / "run", "--eval-episodes", 1]
            code, out, err = Forked(name, look, folder).end()
            assert code == 0, err
            for file, changes in ((case.checkpoint, 200), ("args.json", 20)):
                path = folder / "run" / file
                whole = path.read_bytes()
                for number in range(20 + changes):
                    place = draw.randrange(len(whole))
                    other = (whole[place] + draw.randrange(1, 256)) % 256
                    rest = bytes([other]) + whole[place + 1 :]
                    path.write_bytes(whole[:place] + (rest if number >= 20 else b""))
                    code, again, err = Forked(name, look, folder).end()
                    problem = "" if code == 0 and again == out else one_line(code, err)
                    if problem and code == 0 and file == "args.json" and still_says(path, again):
                        problem = ""
                    table.note(f"a damaged {file}", problem, f"{name} {number}")
                path.write_bytes(whole)


def still_says(path: Path, out: str) -> bool:
    """A changed digit in args.json is another setting: the summary must name the one that is in the file."""
    args = json.loads(path.read_text())
    return f"{args['env_id']}, seed {args['seed']}:" in out


def folders(table: Table, options: Options) -> None:
    for name in options.scripts:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            for child in ("a", "b"):
                (folder / child).mkdir()
            command = [*case.command, "--run-dir", folder / "run"]
            both = [Forked(name, command, folder / child) for child in ("a", "b")]
            codes, _, errs = zip(*(run.end() for run in both), strict=True)
            problem = (
                "" if sorted(codes) == [0, 2] else f"exit codes {codes}: {errs[0][-200:]} {errs[1][-200:]}"
            )
            problem = problem or one_line(2, errs[codes.index(2)])
            table.note("two runs into one folder", problem, name)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "locked").mkdir(mode=0o555)
            (folder / "out").touch(mode=0o666)
            command = [*case.command, "--run-dir", folder / "locked" / "run"]
            if os.getuid() == 0:  # whom no folder refuses
                folder.chmod(0o777)
                code, _, err = Forked(name, command, folder, lambda: os.setuid(NOBODY)).end()
            else:
                code, _, err = Forked(name, command, folder).end()
            table.note("a folder that cannot be written", one_line(code, err), name)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            code, _, err = Forked(name, [*case.command, "--run-dir", folder / "run"], folder).end()
            assert code == 0, err
            before = (folder / "run" / case.checkpoint).read_bytes()
            command = ["--resume", folder / "run", case.budget, 2 * case.small]
            code, _, err = Forked(name, command, folder, partial(limit_files, len(before) // 2)).end()
            problem = one_line(code, err, wanted=1)
            if (folder / "run" / case.checkpoint).read_bytes() != before:
                problem = "the last good checkpoint is gone"
            table.note("no room left for a checkpoint", problem, name)


def limit_files(size: int) -> None:
    """No file of this process may grow beyond so many bytes: what a full disk does, without filling one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in options.scripts:
        importlib.import_module(name)
    torch.set_num_threads(1)
    table = Table()
    began = time.perf_counter()
    if "kills" in options.only:
        kills(table, options, signal.SIGKILL)
    if "sigterm" in options.only:
        kills(table, options, signal.SIGTERM)
    if "flags" in options.only:
        flags(table, options)
    if "damage" in options.only:
        damage(table, options)
    if "folders" in options.only:
        folders(table, options)
    print(f"\n| promise | tried | failed |\n|---|---|---|   ({time.perf_counter() - began:.0f} s)")
    for promise, (tried, failed) in table.tried.items():
        print(f"| {promise} | {tried:,} | {failed} |")
    return min(len(table.failures), 255)


if __name__ == "__main__":
    sys.exit(main())
