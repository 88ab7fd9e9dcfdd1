"""The runner of the benchmarks: what it runs, resumes and collects."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmark"))
learning, medium, rally, promises, scale, speed = (
    importlib.import_module(name) for name in ("learning", "medium", "rally", "promises", "scale", "speed")
)
Task = learning.Task


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Results and figures go to a folder of the test."""
    monkeypatch.setattr(learning, "HERE", tmp_path)
    return tmp_path


def test_runs_are_kept_resumed_and_collected(here, monkeypatch):
    task = Task("Lake now", "q_learning", "--total-episodes 60 --eval-episodes 3", 2, 1.0, "the optimum")
    runs = here / "runs"
    for seed in (1, 2):
        assert learning.run(task, seed, runs) == ""
    learning.collect(task, runs)
    evaluations, training = learning.read(task, "evaluation"), learning.read(task, "training")
    for seed, row in zip((1, 2), evaluations, strict=True):
        results = json.loads((runs / f"Lake_now/seed{seed}/results.json").read_text())
        assert row[:2].tolist() == [seed, results["global_step"]] and results["seed"] == seed
        np.testing.assert_allclose(row[2:4], [results["mean_reward"], results["std_reward"]], atol=1e-4)
    assert set(training[:, 0]) == {1, 2} and training[:, 1].max() <= evaluations[:, 1].max()
    monkeypatch.setattr(learning, "TASKS", [task])
    learning.draw(task.name, [task])
    assert (here / "figures" / "lake_now.png").stat().st_size > 5000
    assert "| 1 (the optimum) |" in learning.table() and task.command in learning.table()

    # A finished run is not repeated; one that was killed goes on from its checkpoint.
    (runs / "Lake_now/seed1/results.json").write_text('{"mine": 1}')
    assert learning.run(task, 1, runs) == "" and "mine" in (runs / "Lake_now/seed1/results.json").read_text()
    (runs / "Lake_now/seed2/results.json").unlink()
    before = (runs / "Lake_now/seed2/q_table.npz").read_bytes()
    assert learning.run(task, 2, runs) == ""
    assert (runs / "Lake_now/seed2/q_table.npz").read_bytes()[:10] == before[:10]
    assert json.loads((runs / "Lake_now/seed2/results.json").read_text())["global_step"] == evaluations[1, 1]


def test_a_second_set_of_seeds_stays_beside_the_first(here, monkeypatch):
    task = Task("Fresh lake", "q_learning", "--total-episodes 60 --eval-episodes 3", 1, 1.0, "the optimum")
    for seed in (1, 11):
        assert learning.run(task, seed, here / "runs") == ""
    learning.collect(task, here / "runs")
    for fresh, seed in ((False, 1), (True, 11)):
        for phase in ("evaluation", "training"):
            assert set(learning.read(task, phase, fresh)[:, 0]) == {seed}
    monkeypatch.setattr(learning, "TASKS", [task])
    folder = here / "runs/Fresh_lake"
    results = [json.loads((folder / f"seed{seed}/results.json").read_text()) for seed in (1, 11)]
    first, second = (f"{learning.down(x['mean_reward'], 2)} ± {x['std_reward']:.2f}" for x in results)
    assert f"| q_learning | {first}; seeds 11, 12, …: {second} | 1 (the optimum) |" in learning.table()


def test_a_seed_without_its_folder_keeps_its_rows(here):
    task = Task("Lake", "q_learning", "--total-episodes 60 --eval-episodes 3", 3)
    for seed in (1, 3):
        assert learning.run(task, seed, here / "runs") == ""
    learning.collect(task, here / "runs")
    before = learning.read(task, "training")
    (here / "runs/Lake").rename(here / "elsewhere")
    assert learning.run(task, 2, here / "runs") == ""
    learning.collect(task, here / "runs")
    learning.collect(task, here / "runs")  # once more changes nothing
    assert learning.read(task, "evaluation")[:, 0].tolist() == [1, 2, 3]
    after = learning.read(task, "training")
    assert (np.diff(after[:, 0]) >= 0).all()
    np.testing.assert_array_equal(after[after[:, 0] != 2], before)


def test_a_crash_is_reported_and_nothing_of_it_collected(here):
    task = Task("Broken", "q_learning", "--env-id NoSuchLake-v1", 1)
    assert "exit code 2" in learning.run(task, 1, here / "runs")
    learning.collect(task, here / "runs")
    assert not len(learning.read(task, "evaluation"))


def test_runs_with_other_flags_are_refused(here):
    task = Task("Lake", "q_learning", "--total-episodes 60 --eval-episodes 3", 1)
    other = Task("Lake", "q_learning", "--total-episodes 61", 1)
    assert learning.run(task, 1, here / "runs") == ""
    with pytest.raises(SystemExit, match="other flags"):
        learning.collect(other, here / "runs")
    assert "other flags" in learning.run(other, 1, here / "runs"), "finished"
    (here / "runs/Lake/seed1/results.json").unlink()
    assert "other flags" in learning.run(other, 1, here / "runs"), "begun"


def test_the_interval_holds_the_mean_and_shrinks_with_agreement():
    values = np.random.default_rng(0).normal(size=(400, 3)) * [1.0, 0.1, 0.0] + 7
    low, high = learning.interval(values)
    want = 2 * 1.96 * values.std(0) / np.sqrt(400)  # of a normal mean
    np.testing.assert_allclose(high - low, want, rtol=0.15)
    assert (low <= values.mean(0) + 1e-12).all() and (high >= values.mean(0) - 1e-12).all()


@pytest.mark.parametrize("looking_ahead", [True, False])
def test_rally_is_won_by_who_goes_where_the_ball_will_be(looking_ahead):
    options = {"reward_clipping": False, "autoreset_mode": rally.AutoresetMode.SAME_STEP}
    game = rally.gym.make_vec("ALE/Rally-v5", 3, "vector_entry_point", **options)
    stacks, _ = game.reset(seed=[1, 2, 3])
    returns, wins, losses = np.zeros(3), [], []
    for step in range(1, 441):
        cells = stacks[:, -1, ::7, ::7] > 0
        assert (cells[:, -1].sum(-1) >= 2).all() and (cells[:, :-1].sum((1, 2)) <= 1).all()
        np.testing.assert_array_equal(stacks[:, -1], cells.repeat(7, 1).repeat(7, 2) * 255)
        column = game.ball + game.drift
        column = np.where((column < 0) | (column >= rally.CELLS), game.ball - game.drift, column)
        wanted = np.where(column < game.paddle, 1, np.where(column > game.paddle + 1, 2, 0))
        stacks, rewards, terminated, truncated, info = game.step(wanted if looking_ahead else wanted * 0)
        returns += rewards
        for n in np.flatnonzero(terminated | truncated):
            assert (
                stacks[n, :-1].max() == 0 and info["final_obs"][n, :-1].max() == 255
            )  # a fresh stack, a full one
            (wins if truncated[n] else losses).append((returns[n], step))
            returns[n] = 0
    assert wins == ([(20, 220)] * 3 + [(20, 440)] * 3 if looking_ahead else [])
    assert not losses if looking_ahead else -1 <= np.mean(losses, axis=0)[0] < -0.6


def test_random_moves_cost_even_the_best_player_of_rally_something():
    assert (rally.best_play(0.0, games=5) == 20).all()
    assert 15 < rally.best_play(0.01, games=40).mean() < 20
    assert rally.best_play(1.0, games=40).mean() < 1


def test_the_table_of_the_chinese_readme_is_the_translated_one():
    between = re.compile(r"<!-- results: .*? -->\n(.*)\n<!-- end of results -->", flags=re.S)
    english, chinese = (
        between.search((learning.ROOT / page).read_text())[1] for page in ("README.md", "algos/README.zh.md")
    )
    assert chinese == learning.in_chinese(english), "python tests/benchmark/learning.py --tasks writes both"
    for row in chinese.splitlines():
        cells = re.sub(r"\]\([^)]*\)", "", row).split(" | ")
        words = re.findall(r"\b[a-z]{2,}", " ".join(cells[:1] + cells[2:]))  # the script keeps its name
        assert not words, f"learning.CHINESE lacks {' '.join(words)}: {row}"


def test_broken_promises_are_counted(monkeypatch, capsys):
    assert promises.one_line(2, "error: no\n") == ""
    assert "exit code 1" in promises.one_line(1, "error: no\n")
    assert "exit code 2" in promises.one_line(2, "no\n")
    assert promises.one_line(2, "Traceback …\nKeyError: 3\n") == "a traceback: KeyError: 3"
    ppo = importlib.import_module("ppo")
    monkeypatch.setitem(ppo.RANGES, "num_steps", (-1, 1_000_000))
    monkeypatch.setattr(promises, "NONSENSE", ["-1"])
    table = promises.Table()
    promises.flags(table, promises.Options(scripts=("ppo",)))
    assert table.tried["a flag with nonsense"] == [len(ppo.Args.__dataclass_fields__), 1]
    assert "ppo ['--num-steps', '-1']" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stop", "code", "err", "saved", "finished", "held"),
    [
        ("SIGKILL", -9, "", 4, False, True),
        ("SIGKILL", 0, "", 4, True, True),
        ("SIGKILL", 0, "", 4, False, False),
        ("SIGKILL", 1, "", 4, False, False),
        ("SIGTERM", 143, "", 4, False, True),
        ("SIGTERM", 143, "Traceback", 4, False, False),
        ("SIGTERM", 143, "", -1, False, False),  # it had the time to answer and saved nothing
        ("SIGTERM", -15, "", -1, False, True),
        ("SIGTERM", -15, "", 4, False, False),  # it did not listen
        ("SIGTERM", -9, "", -1, False, False),
    ],
)
def test_how_a_stopped_run_may_end(stop, code, err, saved, finished, held):
    number = getattr(promises.signal, stop)
    assert (promises.ending(number, code, err, saved, finished) == "") == held


def test_speeds_are_ratios_of_pairs(monkeypatch, capsys):
    """Three rounds with 300, 200, 100 against 100, 100, 25: ratios 3, 2, 4, whatever the medians are."""
    speeds = {"ours": [300, 200, 100], "peer": [100, 100, 25]}

    def run(command, **_):
        own = {"speed": speeds["peer" if "--peer" in command else "ours"].pop(0), "ceiling": 12_345}
        line = json.dumps(own | {"environment": 0.2, "acting": 0.1, "learning": 0.7})
        return subprocess.CompletedProcess(command, 0, f"a score\n{line}\n", "")

    monkeypatch.setattr(speed.subprocess, "run", run)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: name)
    rows = []
    monkeypatch.setattr(speed, "print", lambda *words, **_: rows.append(" ".join(words)), raising=False)
    speed.main(only="PPO CartPole")
    assert "steps_per_second=200 range=100 to 300 environment_alone=12345" in rows[0]
    assert "ratio=3.00 ratio_range=2.00 to 4.00" in rows[0]
    cells = {name: name for name in ("case", "range", "sb3_range", "ratio_range")}
    cells |= {"steps_per_second": "1234567", "environment_alone": "999", "learning": "0.70"}
    cells |= {"sb3": "1000", "ratio": "1.53"}
    last = speed.table([cells]).splitlines()[-1]
    assert last == "| case | 1,234,567 | range | 999 | 70% | 1,000 | sb3_range | 1.53 | ratio_range |"


@pytest.mark.parametrize("name", ["Q-learning FrozenLake", "PPO CartPole"])
def test_speed_is_that_of_the_loop_and_its_parts_are_shares(name, monkeypatch):
    """In a process of its own, as the benchmark does it: a table's script, and one with a network."""
    flags = {"total_episodes": 10_000} if name.startswith("Q") else {"total_timesteps": 4096}
    code = f"""
import importlib, sys, time
sys.path[:0] = [{str(speed.HERE)!r}]
import speed
speed.CASES[{name!r}].flags.update({flags})
sys.path[:0] = [str(speed.ALGOS)]
module = importlib.import_module(speed.CASES[{name!r}].script)
save = module.Run.save
clock = time.perf_counter
late = 0
time.perf_counter = lambda: clock() + late
def slow_to_save(run):
    global late
    late += 1000 if run.step > 4000 or run.episodes == 10_000 else 0
    save(run)
module.Run.save = slow_to_save
speed.measure({name!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    shares = [result[part] for part in ("environment", "acting", "learning")]
    assert sum(shares) == pytest.approx(1) and result["environment"] > 0.1 and result["learning"] < 0.9
    assert 0 < result["speed"] < 2 * result["ceiling"]  # twice: another process may have the core meanwhile
    # The save that ends a training is no part of the loop: with its 1,000 seconds these would be 4 or 5.
    assert result["speed"] > 100


@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's; not what another test left to the collector
def test_scale_is_drawn_as_far_as_it_is_measured(tmp_path):
    row = {"curve": "environments", "script": "ppo", "steps_per_second": "900", "memory_mb": "360"}
    scale.draw([row | {"x": "1"}, row | {"x": "4"}], tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 5000


def test_scale_counts_the_second_half_of_a_training():
    # a slow start, then 30 steps in 2 seconds, then 10 steps in 2
    assert scale.speed([(0.0, 0), (100.0, 10), (102.0, 40), (104.0, 50)]) == 5
    assert scale.speed([(0.0, 0), (100.0, 10), (102.0, 40)]) == 15


def test_the_path_is_drawn_as_the_scripts_say_it():
    """An arrow leads from a script that is to be read first; what is to be read first lies upstream."""
    import pictures

    def upstream(name: str) -> set[str]:
        before = {first for first, second in pictures.STEPS if second == name}
        return before.union(*map(upstream, before))

    for name in pictures.SCRIPTS:
        text = (pictures.HERE.parents[1] / "algos" / f"{name}.py").read_text()
        named = set(re.findall(r"(\w+)\.py", text.split("Read first:")[1].split("New here:")[0]))
        assert {first for first, second in pictures.STEPS if second == name} <= named <= upstream(name), name


def test_recordings_of_half_way_agents_are_judged_by_their_best_tenth():
    returns = np.random.default_rng(1).permutation(np.arange(37.0))
    assert medium.best_tenth(returns).tolist() == [34, 35, 36]
    # decision transformer's paper: 67.6 on D4RL's hopper is a return of 2,180
    assert medium.normalised("hopper/medium-v0", 2179.85) == pytest.approx(67.6, abs=0.01)
    assert medium.row("hopper/medium-v0", "asked", 1, -20.27, 3.0)["normalised"] == 0
