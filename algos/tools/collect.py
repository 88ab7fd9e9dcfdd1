r"""Record trained agents: plays episodes of run folders and writes them as a Minari dataset.

    python algos/tools/collect.py RUN_DIR --dataset-id lunarlander/ppo-mixed-v0 \
        --episodes 500 --random-share 0 0.25 0.5 1
    python algos/decision_transformer.py --dataset lunarlander/ppo-mixed-v0

Minari (https://minari.farama.org) keeps recorded episodes for learning without an environment. Its datasets
lie in ~/.minari/datasets, or where MINARI_DATASETS_PATH says; their names end in -v and a number.

How good the data are is up to --random-share: that share of an episode's actions is drawn at random, and the
shares take turns, so 0 0.25 0.5 1 gives a quarter of the episodes to each. With 0 alone the data are as good
as the agent; with several they hold good and bad episodes, as the mixed sets of offline benchmarks do, and
there is something to learn about what makes a return. Several run folders of one environment take turns, too:
agents stopped early and late give data like those that one agent makes while it learns.

What is recorded
    each episode, complete: the observation after its last step too, terminated and truncated apart, its seed,
        its random share and which run played it (in Minari's metadata of the episode: random_share, run)
    the environment with its options, so that the dataset can be loaded without naming one
    how it was made: scripts, their arguments, the shares (in the metadata of the dataset: runs, random_share)
    two reference scores for Minari's normalised scores: the mean episodic return of the (best) agent and of
        random play, over --reference-episodes episodes of their own that are not in the data

What can be recorded: runs whose agent sees what the environment shows. Some scripts make their agent's
observations themselves (stacked frames, a memory, a return to ask for, numbers for tuples): such a run is
refused.

A dataset that exists stays, unless --overwrite. The new one is written into a hidden folder, .collect-…, and
moved when it is complete: Ctrl-C and crashes leave no half dataset, and the old one where it was.

Expect: 120 episodes of LunarLander-v3 by two agents with the shares above have 50,000 steps.
"""

import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import gymnasium as gym
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer
from tqdm import tqdm

ALGOS = Path(__file__).resolve().parents[1]
MAX_STEPS = 30_000  # an agent may walk in circles for ever: then its episode is cut, as truncated


@dataclass(frozen=True)
class Args:
    run_dirs: tyro.conf.Positional[tuple[str, ...]]  # the runs whose agents play, taking turns
    dataset_id: str  # the name of the new dataset, like lunarlander/ppo-mixed-v0
    episodes: int = 500  # how many to record
    random_share: tuple[float, ...] = (0.0,)  # shares of random actions; the episodes take turns
    seed: int = 1  # of the episodes and of the random actions
    reference_episodes: int = 50  # episodes behind each reference score
    overwrite: bool = False  # replace a dataset of this name
    env_id: str | None = None  # allows a run whose environment is this module:id to import the module


def collect(args: Args) -> Path:
    """Play, record, print what was recorded. Returns the folder of the dataset."""
    check_args(args)
    root, target = place_of(args)
    runs = [open_run(Path(run_dir), args.env_id) for run_dir in args.run_dirs]
    env = runs[0].env
    for run in runs[1:]:
        if run.env.spec != env.spec:
            fail(f"{args.run_dirs[0]} and {run.folder} have different environments")
    rng = np.random.default_rng(args.seed)
    env.action_space.seed(int(rng.integers(2**31)))
    turns = [(run, share) for share in args.random_share for run in runs]
    turns = [turns[i % len(turns)] for i in range(args.episodes)]
    try:
        # Minari writes in place, and in several steps. So it works in a hidden folder on the same disk. It
        # is made before anybody plays: where nothing can be written, this is said at once.
        there = next(folder for folder in target.parents if folder.exists())
        with tempfile.TemporaryDirectory(dir=there, prefix=".collect-") as stage:
            R = args.reference_episodes
            scores = [mean_return(play(env, [(run, 0.0)] * R, rng, "scores of the agents")) for run in runs]
            random_score = mean_return(play(env, [(runs[0], 1.0)] * R, rng, "score of random play"))
            episodes = play(env, turns, rng, "recording")
            write(args, stage, runs, turns, episodes, scores, random_score)
            move_into_place(Path(stage), root, target, args)
    except OSError as error:
        fail(f"cannot record {args.dataset_id}: {error}", code=1)
    env.close()
    returns = np.array([sum(episode.rewards) for episode in episodes])
    for turn in dict.fromkeys(turns):
        of_turn = returns[[other == turn for other in turns]]
        mean = f"{of_turn.mean():.2f} ± {of_turn.std():.2f}"
        print(f"{turn[0].folder}, {turn[1]:.0%} random actions: {mean} over {len(of_turn)} episodes")
    reference = f"agent {max(scores):.2f}, random play {random_score:.2f}"
    steps = sum(len(episode) for episode in episodes)
    print(f"{args.dataset_id}: {args.episodes} episodes, {steps:,} steps, scores: {reference}: {target}")
    return target


def play(env: gym.Env, turns: list[tuple], rng: np.random.Generator, what: str) -> list[EpisodeBuffer]:
    """An episode for each turn, a run and its share of random actions; with the last observation."""
    episodes = []
    for run, share in tqdm(turns, desc=what, unit=" episodes", leave=False, delay=2):
        episode = EpisodeBuffer(seed=int(rng.integers(2**31)), observations=[], actions=[])
        obs, info = env.reset(seed=episode.seed)
        episode.observations.append(obs)
        ended = False
        while not ended:
            if rng.random() < share:
                # Only possible actions, where the environment names them.
                mask = {"mask": info["action_mask"]} if "action_mask" in info else {}
                action = env.action_space.sample(**mask)
            else:
                action = run.policy(obs)
            obs, reward, terminated, truncated, info = env.step(action)
            truncated = truncated or not terminated and len(episode) + 1 == MAX_STEPS
            ended = terminated or truncated
            episode.observations.append(obs)
            episode.actions.append(action)
            episode.rewards.append(float(reward))
            episode.terminations.append(bool(terminated))
            episode.truncations.append(bool(truncated))
        episodes.append(episode)
    return episodes


def write(args: Args, stage: str, runs: list, turns: list, episodes: list, scores: list, random_score: float):
    """Write the dataset into the folder `stage`. scores: mean returns of the runs' agents."""
    os.environ["MINARI_DATASETS_PATH"] = stage  # of this process only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on metadata that this program does not know
        # Not with Minari's DataCollector, which writes the same: that one needs the package jax.
        dataset = minari.create_dataset_from_buffers(
            dataset_id=args.dataset_id,
            buffer=episodes,
            env=runs[0].env,
            algorithm_name=", ".join(dict.fromkeys(run.script for run in runs)),
            ref_max_score=max(scores),
            ref_min_score=random_score,
            description=f"{runs[0].args['env_id']}, played by trained agents and by chance",
        )
    of_episode = [{"random_share": share, "run": runs.index(run)} for run, share in turns]
    dataset.storage.update_episode_metadata(of_episode)
    scored = zip(runs, scores, strict=True)
    made = [{"script": run.script, "args": run.args, "score": score} for run, score in scored]
    how = {"runs": made, "random_share": list(args.random_share), "collect_seed": args.seed}
    dataset.storage.update_metadata(how)


def mean_return(episodes: list[EpisodeBuffer]) -> float:
    """The mean episodic return."""
    return float(np.mean([sum(episode.rewards) for episode in episodes]))


def check_args(args: Args) -> None:
    """End with one line and exit code 2 if a setting is out of range."""
    if not args.run_dirs:
        fail("name a run folder, the agent of which shall play")
    if not 1 <= args.episodes <= 10**7:
        fail(f"--episodes {args.episodes} is not between 1 and 10,000,000")
    if not 1 <= args.reference_episodes <= 10**6:
        fail(f"--reference-episodes {args.reference_episodes} is not between 1 and 1,000,000")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed {args.seed} is not between 0 and 4,294,967,295")
    if not args.random_share or not all(0 <= share <= 1 for share in args.random_share):
        fail(f"--random-share needs numbers between 0 and 1, not {args.random_share}")
    # Minari's own rule, which wants two letters before a slash, and no way out of its folder.
    if not re.fullmatch(r"([\w-]{2,}/)*[\w-]+-v\d+", args.dataset_id):
        fail(f"--dataset-id must be like lunarlander/ppo-mixed-v0, not {args.dataset_id!r}")


def place_of(args: Args) -> tuple[Path, Path]:
    """The folder of all datasets and that of this one; ends here if the latter exists and shall stay."""
    try:
        root = minari.storage.get_dataset_path()
        target = root / args.dataset_id
        if target.exists() and not (target / "data").is_dir():
            fail(f"{target} is a folder of other datasets: choose another --dataset-id")
        if target.exists() and not args.overwrite:
            fail(f"the dataset {args.dataset_id} exists: choose another --dataset-id, or --overwrite")
        if any((above / "data").is_dir() for above in target.parents if root in above.parents):
            fail(f"no dataset can lie within another one: choose another --dataset-id than {args.dataset_id}")
    except OSError as error:
        fail(f"cannot write datasets: {error}", code=1)
    return root, target


def move_into_place(stage: Path, root: Path, target: Path, args: Args) -> None:
    """Move the complete dataset from the hidden folder to its name, in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Minari wants a file in each folder that groups datasets.
    for file in stage.rglob("namespace_metadata.json"):
        if not (root / file.relative_to(stage)).exists():
            shutil.move(file, root / file.relative_to(stage))
    replaced = stage / "replaced"  # goes with the hidden folder
    try:
        if target.exists() and args.overwrite:
            target.rename(replaced)
        (stage / args.dataset_id).rename(target)
    except BaseException:  # Ctrl-C, too
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder, ready to play: a single environment, the policy from its observations to its actions."""

    folder: Path
    script: str  # its name
    args: dict  # without those that concern one machine or one person only
    env: gym.Env
    policy: Callable


def script_of(folder: Path) -> ModuleType:
    """The script of a run, from the file in algos/ that has the name in results.json or the folder's name."""
    if not folder.is_dir():
        fail(f"there is no folder {folder}")
    named = re.search(r"__(\w+?)__seed", folder.resolve().name)
    name = named[1] if named else None
    try:
        if (folder / "results.json").exists():
            name = json.loads((folder / "results.json").read_text())["algo"]
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"cannot use {folder / 'results.json'}: {type(error).__name__} {error}")
    # Only the name comes from the folder, never a path.
    if not isinstance(name, str) or name not in {path.stem for path in ALGOS.glob("*.py")}:
        fail(f"{folder} is of no script in {ALGOS}: neither results.json nor ENV__SCRIPT__seed… names one")
    if name not in sys.modules:
        sys.path.insert(0, str(ALGOS))  # for environments like envs.graph
        spec = importlib.util.spec_from_file_location(name, ALGOS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def read_args(script: ModuleType, folder: Path, env_id: str | None):
    """The arguments of a run, read and checked by its own script; if they are bad, it ends with one line."""
    try:
        named = json.loads((folder / "args.json").read_text())["env_id"]
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"{folder} is no run folder: {type(error).__name__} {error}")
    if env_id not in (None, named):
        fail(f"the run's environment is {named}, not {env_id}")
    original = sys.argv
    sys.argv = [script.__file__, "--evaluate", str(folder)]
    if env_id is not None:
        sys.argv += ["--env-id", env_id]
    run_args = script.parse_args()
    sys.argv = original
    script.check_args(run_args)
    return run_args


def open_run(folder: Path, env_id: str | None) -> Run:
    """A run with its environment and its policy, loaded by its own script."""
    script = script_of(folder)
    run_args = read_args(script, folder, env_id)
    hidden = ("run_dir", "resume", "evaluate", "wandb_entity")
    public = {name: value for name, value in asdict(run_args).items() if name not in hidden}
    table = hasattr(script, "make_env")  # then the script plays a single environment, else a vector of one
    if table:
        seen = script.make_env(run_args)
        spaces = seen.observation_space, seen.action_space
        options = seen.unwrapped.spec.kwargs
    else:
        seen = script.make_envs(run_args, 1)
        spaces = seen.single_observation_space, seen.single_action_space
        options = json.loads(getattr(run_args, "env_kwargs", None) or "{}")
    env = gym.make(run_args.env_id, **options)
    if spaces != (env.observation_space, env.action_space):
        fail(f"{script.__name__}.py shows its agent something else than {run_args.env_id} does")
    check_spaces(run_args.env_id, env)
    if table:
        policy, _ = script.load_policy(run_args, seen, folder)
        return Run(folder, script.__name__, public, env, policy)
    policy, _ = script.load_policy(run_args, seen, folder, script.setup_torch(run_args))
    return Run(folder, script.__name__, public, env, lambda obs: policy(obs[None])[0])


def check_spaces(env_id: str, env: gym.Env) -> None:
    """Refuse what Minari cannot store, or not without loss."""
    for space in (env.observation_space, env.action_space):
        plain = isinstance(space, gym.spaces.Box | gym.spaces.Discrete)
        if not plain or len(space.shape) > 1:
            fail(f"{env_id} has {space}: only integers and vectors are recorded")


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on stderr; exit code 2 means bad input."""
    print("error: " + " ".join(message.split())[:400], file=sys.stderr)
    raise SystemExit(code)


def read_command_line() -> Args:
    """tyro's reading of the command line; what it cannot read ends with one line and exit code 2."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return tyro.cli(Args, description=__doc__)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        fail("".join(letter for letter in errors.getvalue() if not "─" <= letter <= "╿"))


if __name__ == "__main__":
    try:
        collect(read_command_line())
    except KeyboardInterrupt:
        print("interrupted: no dataset was written", file=sys.stderr)
        raise SystemExit(130) from None
