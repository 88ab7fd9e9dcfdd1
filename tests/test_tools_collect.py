"""Datasets from run folders: complete episodes, honest scores, nothing half-written, refusals in one line."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import counter_env  # noqa: F401 (registers small environments)
import gymnasium as gym
import numpy as np
import pytest

minari = pytest.importorskip("minari")
ALGOS = Path(__file__).parents[1] / "algos"
sys.path.insert(0, str(ALGOS / "tools"))
import collect  # noqa: E402 (found through the line above)


def trained(script: str, run_dir: Path, *flags) -> Path:
    """A run of a few steps, in this process."""
    module = importlib.import_module(script)
    original = sys.argv
    sys.argv = [f"{script}.py", *map(str, flags), "--run-dir", str(run_dir), "--eval-episodes", "2"]
    try:
        module.train(module.parse_args())
    finally:
        sys.argv = original
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    few = ("--total-timesteps", "512", "--num-envs", "4", "--num-steps", "64")
    return {
        "ppo": trained("ppo", folder / "ppo", *few),
        "q_learning": trained("q_learning", folder / "q_learning", "--total-episodes", "2000"),
    }


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def call(*argv, monkeypatch, capfd) -> tuple[int, str, str]:
    """Run the program in this process; returns exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["collect.py", *map(str, argv)])
    before = os.environ.get("MINARI_DATASETS_PATH")
    capfd.readouterr()
    code = 0
    try:
        collect.collect(collect.read_command_line())
    except SystemExit as end:
        code = end.code
    finally:
        os.environ["MINARI_DATASETS_PATH"] = before
    return code, *capfd.readouterr()


FEW = ("--episodes", 5, "--random-share", 0, 1, "--reference-episodes", 3, "--seed", 7)


def test_what_is_recorded_is_what_happened(runs, root, monkeypatch, capfd):
    """Every episode again from its seed and its actions, in an environment of our own."""
    code, out, err = call(
        runs["ppo"], "--dataset-id", "cart/mixed-v0", *FEW, monkeypatch=monkeypatch, capfd=capfd
    )
    assert code == 0, err
    dataset = minari.load_dataset("cart/mixed-v0")
    assert dataset.total_episodes == 5 and list(minari.list_local_datasets()) == ["cart/mixed-v0"]
    metadata = list(dataset.storage.get_episode_metadata(range(5)))
    env = gym.make("CartPole-v1")
    for episode, told in zip(dataset.iterate_episodes(), metadata, strict=True):
        obs, _ = env.reset(seed=told["seed"])
        T = len(episode.rewards)
        assert episode.observations.shape == (T + 1, 4) and len(episode.actions) == T
        np.testing.assert_array_equal(episode.observations[0], obs)
        for t in range(T):
            obs, reward, terminated, truncated, _ = env.step(int(episode.actions[t]))
            np.testing.assert_array_equal(episode.observations[t + 1], obs)
            assert episode.rewards[t] == reward
            assert (episode.terminations[t], episode.truncations[t]) == (terminated, truncated)
            assert (terminated or truncated) == (t == T - 1)
    assert [told["random_share"] for told in metadata] == [0, 1, 0, 1, 0]
    assert [told["run"] for told in metadata] == [0] * 5
    assert len({told["seed"] for told in metadata}) == 5
    assert out.strip().splitlines()[-1].startswith("cart/mixed-v0: 5 episodes, ")
    assert not [path for path in root.rglob("*") if path.name.startswith((".collect", "tmp"))]


def test_the_agent_plays_and_chance_plays(runs, root, monkeypatch, capfd):
    """Share 0: the actions of the run's own greedy policy. Share 1: others. Share 0.5: about half."""
    import ppo

    shares = ("--random-share", 0, 0.5, 1)
    arguments = (runs["ppo"], "--dataset-id", "cart-v0", "--episodes", 60, *shares, "--reference-episodes", 1)
    assert call(*arguments, monkeypatch=monkeypatch, capfd=capfd)[0] == 0
    args = ppo.Args()
    policy, _ = ppo.load_policy(args, ppo.make_envs(args, 1), runs["ppo"], "cpu")
    agreed = {0: [], 1: [], 2: []}
    for episode in minari.load_dataset("cart-v0").iterate_episodes():
        agreed[episode.id % 3].extend(policy(episode.observations[:-1]) == episode.actions)
    assert np.mean(agreed[0]) == 1
    # A random action of two is the agent's in half of the cases.
    for place, want in ((1, 0.75), (2, 0.5)):
        deviation = np.sqrt(want * (1 - want) / len(agreed[place]))
        assert abs(np.mean(agreed[place]) - want) < 4 * deviation, place


def test_where_the_data_come_from_is_told(runs, root, monkeypatch, capfd):
    arguments = (runs["ppo"], "--dataset-id", "cart/mixed-v0", *FEW)
    assert call(*arguments, monkeypatch=monkeypatch, capfd=capfd)[0] == 0
    dataset = minari.load_dataset("cart/mixed-v0")
    metadata = dataset.storage.metadata
    (made,) = metadata["runs"]
    assert made["script"] == metadata["algorithm_name"] == "ppo"
    assert made["args"]["total_timesteps"] == 512 and metadata["random_share"] == [0, 1]
    assert made["score"] == metadata["ref_max_score"]
    assert not {"run_dir", "resume", "evaluate", "wandb_entity"} & set(made["args"])
    assert str(runs["ppo"].parent) not in json.dumps(made)
    # Random play balances the pole for some twenty steps; an untrained agent, greedy, for about ten or more.
    assert 10 < metadata["ref_min_score"] < 60 and metadata["ref_max_score"] > 8
    assert dataset.recover_environment().spec.id == "CartPole-v1"


def test_the_scores_are_means_of_episodes_of_their_own(runs, root, monkeypatch, capfd):
    played = []
    play = collect.play

    def noted(env, turns, rng, what):
        played.append(([share for _, share in turns], play(env, turns, rng, what)))
        return played[-1][1]

    monkeypatch.setattr(collect, "play", noted)
    arguments = (runs["ppo"], "--dataset-id", "cart-v0", *FEW)
    assert call(*arguments, monkeypatch=monkeypatch, capfd=capfd)[0] == 0
    (agents, first), (chance, second), (_, data) = played
    assert agents == [0, 0, 0] and chance == [1, 1, 1]
    metadata = minari.load_dataset("cart-v0").storage.metadata
    assert metadata["ref_max_score"] == np.mean([sum(episode.rewards) for episode in first])
    assert metadata["ref_min_score"] == np.mean([sum(episode.rewards) for episode in second])
    assert not {e.seed for e in first + second} & {e.seed for e in data}


def test_the_same_seed_gives_the_same_data(runs, root, monkeypatch, capfd):
    contents = []
    for name, seed in (("a-v0", 3), ("b-v0", 3), ("c-v0", 4)):
        arguments = (runs["q_learning"], "--dataset-id", name, *FEW[:-1], seed)
        code, _, err = call(*arguments, monkeypatch=monkeypatch, capfd=capfd)
        assert code == 0, err
        contents.append([e.actions.tolist() for e in minari.load_dataset(name).iterate_episodes()])
    assert contents[0] == contents[1] != contents[2]


ONE_ACTION = SimpleNamespace(policy=lambda obs: 0)


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "neither"])
def test_both_endings_are_kept_apart(ending, monkeypatch):
    monkeypatch.setattr(collect, "MAX_STEPS", 9)
    env = gym.make(f"Counter-{ending}-v0")
    (episode,) = collect.play(env, [(ONE_ACTION, 0.0)], np.random.default_rng(0), "")
    T = 9 if ending == "neither" else 3
    assert episode.rewards == list(range(1, T + 1)) and len(episode.observations) == T + 1
    assert episode.terminations == [False] * (T - 1) + [ending in ("terminated", "both")]
    assert episode.truncations == [False] * (T - 1) + [ending != "terminated"]
    assert episode.observations[-1][1] == T, "the observation after the last step, not that of a reset"


def test_only_possible_actions_are_random():
    env = gym.make("envs.graph:Graph-v0")
    arrows = env.unwrapped.arrows
    for episode in collect.play(env, [(None, 1.0)] * 20, np.random.default_rng(0), ""):
        nodes = episode.observations
        assert all(arrows[a, b] for a, b in zip(nodes, nodes[1:], strict=False))


def test_several_runs_take_turns(runs, root, tmp_path, monkeypatch, capfd):
    """Two agents, two shares: each pair in turn. The better agent's score counts."""
    few = ("--total-timesteps", "1024", "--num-envs", "4", "--num-steps", "64", "--seed", "5")
    other = trained("ppo", tmp_path / "other", *few)
    arguments = (runs["ppo"], other, "--dataset-id", "cart/two-v0", *FEW)
    assert call(*arguments, monkeypatch=monkeypatch, capfd=capfd)[0] == 0
    storage = minari.load_dataset("cart/two-v0").storage
    told = [(e["random_share"], e["run"]) for e in storage.get_episode_metadata(range(5))]
    assert told == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]
    scores = [run["score"] for run in storage.metadata["runs"]]
    assert [run["args"]["seed"] for run in storage.metadata["runs"]] == [1, 5]
    assert storage.metadata["ref_max_score"] == max(scores) and scores[0] != scores[1]
    arguments = (runs["ppo"], runs["q_learning"], "--dataset-id", "cart/three-v0", *FEW)
    code, _, err = call(*arguments, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and "different environments" in err and len(err.splitlines()) == 1


def test_what_exists_stays_unless_it_shall_go(runs, root, monkeypatch, capfd):
    def call_with(*more):
        return call(runs["q_learning"], *FEW, *more, monkeypatch=monkeypatch, capfd=capfd)

    assert call_with("--dataset-id", "lake/a-v0")[0] == 0
    before = (root / "lake/a-v0/data/main_data.hdf5").read_bytes()
    code, _, err = call_with("--dataset-id", "lake/a-v0")
    assert code == 2 and "--overwrite" in err and len(err.splitlines()) == 1
    assert call_with("--dataset-id", "lake/b-v0")[0] == 0
    assert (root / "lake/a-v0/data/main_data.hdf5").read_bytes() == before
    code, _, err = call_with("--dataset-id", "lake/a-v0", "--overwrite", "--episodes", "4")
    assert code == 0, err
    assert minari.load_dataset("lake/a-v0").total_episodes == 4
    assert sorted(minari.list_local_datasets()) == ["lake/a-v0", "lake/b-v0"]
    for name in ("lake-v0", "lake"):
        (root / name).mkdir(exist_ok=True)
    assert call_with("--dataset-id", "lake-v0")[0] == 2, "a folder of others is not replaced"
    assert call_with("--dataset-id", "lake/a-v0/c-v0")[0] == 2, "no dataset within a dataset"


@pytest.mark.parametrize("when", ["play", "create", "move", "between"])
def test_a_crash_leaves_no_half_dataset(when, runs, root, monkeypatch, capfd):
    arguments = (runs["q_learning"], "--dataset-id", "lake/a-v0", *FEW)
    assert call(*arguments, monkeypatch=monkeypatch, capfd=capfd)[0] == 0
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def crash(*_, **__):
        raise KeyboardInterrupt

    if when == "play":
        monkeypatch.setattr(collect, "play", crash)
    elif when == "create":
        from minari.dataset.minari_storage import MinariStorage

        monkeypatch.setattr(MinariStorage, "update_metadata", crash)
    else:
        rename = Path.rename

        def renamed(path, target):
            if when == "move" and "replaced" not in str(target) and "replaced" not in str(path):
                raise OSError("disk gone")
            result = rename(path, target)
            if when == "between" and "replaced" in str(target):
                raise KeyboardInterrupt  # the old one is out of the way, the new one is not there yet
            return result

        monkeypatch.setattr(Path, "rename", renamed)
    if when == "move":
        code, _, err = call(*arguments, "--overwrite", monkeypatch=monkeypatch, capfd=capfd)
        assert code == 1 and "disk gone" in err and len(err.splitlines()) == 1
    else:
        with pytest.raises(KeyboardInterrupt):
            call(*arguments, "--overwrite", monkeypatch=monkeypatch, capfd=capfd)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("what", ["root is a file", "file in the way", "read only"])
def test_what_cannot_be_written_is_said_before_anybody_plays(what, runs, root, monkeypatch, capfd):
    monkeypatch.setattr(collect, "play", lambda *_: pytest.fail("played in vain"))
    if what == "root is a file":
        root.write_text("")
    else:
        root.mkdir()
        (root / "afile").write_text("")
    if what == "read only":  # chmod would not stop the superuser
        monkeypatch.setattr(collect.tempfile, "mkdtemp", refuse)
    name = "afile/b-v0" if what == "file in the way" else "b-v0"
    code, out, err = call(runs["ppo"], "--dataset-id", name, monkeypatch=monkeypatch, capfd=capfd)
    lines = err.splitlines()
    assert code == 1 and not out and len(lines) == 1 and lines[0].startswith("error: cannot "), err
    assert list(root.parent.rglob("*")) == [root] + [root / "afile"] * (what != "root is a file")


def refuse(*_, **__):
    raise OSError(30, "Read-only file system")


def test_bad_input_is_one_line(runs, root, tmp_path, monkeypatch, capfd):
    def refused(*argv) -> str:
        code, out, err = call(*argv, monkeypatch=monkeypatch, capfd=capfd)
        lines = err.strip().splitlines()
        assert code == 2 and not out and len(lines) == 1 and lines[0].startswith("error: "), (argv, err)
        assert not list(root.rglob("*.hdf5"))
        return lines[0]

    ppo = runs["ppo"]
    name = ("--dataset-id", "cart/a-v0")
    for flags in (
        *(["--episodes", "0"], ["--episodes", "some"], ["--random-share", "2"], ["--random-share", "nan"]),
        *(["--random-share"], ["--seed", "-1"], ["--reference-episodes", "0"], ["--no-such-flag"]),
    ):
        refused(ppo, *name, *flags)
    for bad in ("a", "../a-v0", "/tmp/a-v0", "a/../b-v0", "a b-v0", "a/b-v0", ""):
        refused(ppo, "--dataset-id", bad)
    assert "run folder" in refused(*name)
    assert "no folder" in refused(tmp_path / "nothing", *name)
    (tmp_path / "empty").mkdir()
    assert "names one" in refused(tmp_path / "empty", *name)
    (tmp_path / "X__../ppo__seed1").mkdir(parents=True)
    (tmp_path / "X__../ppo__seed1" / "results.json").write_text('{"algo": "../tests/conftest"}')
    assert "names one" in refused(tmp_path / "X__../ppo__seed1", *name)
    assert "CartPole-v1, not Acrobot-v1" in refused(ppo, *name, "--env-id", "Acrobot-v1")
    # A run without a checkpoint, and one whose environment a stranger named.
    stranger = tmp_path / "X__ppo__seed1"
    stranger.mkdir()
    settings = json.loads((ppo / "args.json").read_text())
    (stranger / "args.json").write_text(json.dumps(settings))
    assert "checkpoint.pt" in refused(stranger, *name)
    (tmp_path / "his_task.py").write_text("raise SystemExit('his code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    (stranger / "args.json").write_text(json.dumps(settings | {"env_id": "his_task:Task-v0"}))
    assert "--env-id his_task:Task-v0" in refused(stranger, *name)


def test_agents_that_see_something_else_are_refused(root, tmp_path, monkeypatch, capfd):
    """A decision transformer is told its time and return so far, a table numbers its tuples itself."""
    few = ("--total-updates", 1, "--warmup-updates", 0, "--random-episodes", 9, "--width", 8)
    run_dir = trained("decision_transformer", tmp_path / "dt", *few)
    code, _, err = call(run_dir, "--dataset-id", "a-v0", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and len(err.splitlines()) == 1 and "something else" in err
    few = ("--env-id", "Blackjack-v1", "--env-kwargs", '{"sab": true}', "--total-episodes", 200)
    run_dir = trained("sarsa", tmp_path / "bj", *few)
    for run_dirs in ([run_dir], [run_dir, run_dir]):
        code, _, err = call(*run_dirs, "--dataset-id", "a-v0", *FEW, monkeypatch=monkeypatch, capfd=capfd)
        assert code == 2 and len(err.splitlines()) == 1, err
        assert "sarsa.py shows its agent something else than Blackjack-v1 does" in err
    assert not list(root.rglob("*.hdf5"))


def test_a_decision_transformer_learns_from_what_was_collected(runs, root, tmp_path, monkeypatch, capfd):
    """--dataset, the environment from the data, --evaluate from the folder alone."""
    arguments = (runs["q_learning"], "--dataset-id", "lake/a-v0", *FEW)
    assert call(*arguments, monkeypatch=monkeypatch, capfd=capfd)[0] == 0
    few = ("--total-updates", 2, "--warmup-updates", 1, "--width", 8, "--num-envs", 2)
    run_dir = trained("decision_transformer", tmp_path / "run", "--dataset", "lake/a-v0", *few)
    results = json.loads((run_dir / "results.json").read_text())
    settings = json.loads((run_dir / "args.json").read_text())
    assert results["env_id"] == settings["env_id"] == "FrozenLake-v1"
    assert json.loads(settings["env_kwargs"])["is_slippery"] is False
    (root / "lake/a-v0").rename(root / "gone")
    monkeypatch.setattr(sys, "argv", ["decision_transformer.py", "--evaluate", str(run_dir)])
    import decision_transformer

    args = decision_transformer.parse_args()
    again = decision_transformer.evaluate(args, run_dir, decision_transformer.setup_torch(args))
    assert again == results
