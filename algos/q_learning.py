"""Q-learning: a table of what every action is worth in every state, learned by trying them.

Each step compares what the table promised with the reward that came and what the table promises from there,
and moves the entry a little: the agent learns before the episode is over. NumPy is all it needs.

An agent is in a state (where it stands on a frozen lake), chooses an action (a direction) and gets a reward
(1 at the goal) and the next state: one step. Steps follow each other until the episode ends: it terminates
(a hole or the goal, nothing follows) or a time limit cuts it off. A policy is the rule by which actions are
chosen.

Pseudo-code
    for every episode:
        [A] explore   a little less than before: ε falls
        until the episode ends:
            [B] act       with probability ε any action, else the best known one
            [C] learn     move one entry of the table towards its target
        [D] log       charts, progress bar

Equations
    (1)  G_t = r_t + γ r_{t+1} + γ² r_{t+2} + …         return: all rewards that follow, discounted
             = r_t + γ G_{t+1}
    (2)  V(s) = mean of G_t after s_t = s               value of a state: the return to expect from it
    (3)  Q(s,a) = mean of G_t after s_t = s, a_t = a    value of an action
    (4)  Q*(s,a) = mean of r + γ max_a' Q*(s',a')       Bellman equation: the values under the best policy
    (5)  π(s) = argmax_a Q(s,a) with probability 1−ε,   ε-greedy policy
                else any action
    (6)  ε_k = ε_min + (ε_max − ε_min) exp(−κ k)
    (7)  y = r + γ max_a' Q(s',a')                      target; Q(s',a') counts as 0 after a termination
    (8)  δ = y − Q(s,a)                                 temporal-difference (TD) error
    (9)  Q(s,a) ← Q(s,a) + α δ
    (10) α_n = α / (1 + n/c)                            or simply α

Two ways to learn a value; both move it a little from what was believed towards what was seen:
    Monte Carlo           V(s_t) ← V(s_t) + α [G_t − V(s_t)]                  waits for the end
    temporal difference   V(s_t) ← V(s_t) + α [r_t + γ V(s_{t+1}) − V(s_t)]   waits for the next state
Monte Carlo is right on average, but G_t carries the luck of a whole episode. TD carries the luck of one step,
but builds on a guess (it bootstraps): the news of a reward spreads backwards, one state at a time.

Whose values? The target (7) takes the best next action, whatever (5) will do: Q-learning tries things out
and yet learns what the greedy policy (always the best known action) is worth. To learn about one policy while
another acts is off-policy.
On-policy is SARSA: y = r + γ Q(s',a') with the action a' that really comes next. It learns what its own
policy is worth, blunders included: along a cliff SARSA keeps its distance, Q-learning walks on the edge.

Symbols: s state, a action, r reward, s' next state, γ gamma, α learning_rate, c lr_visits, κ decay_rate,
k episodes so far, n visits of (s,a) so far, S states, A actions.
Departures from the paper: a constant α by default (the proof wants a falling one, [Trick 1]), [Trick 2], and
after a time limit, which is no failure, (7) looks at the next state as usual.
References: Q-learning https://doi.org/10.1007/BF00992698, Sutton and Barto's book, chapters 3 to 6,
http://incompleteideas.net/book/the-book-2nd.html, learning rates https://jmlr.org/papers/v5/evendar03a.html

Read first: nothing, the path begins here.
New here: return, value, exploration, temporal difference, off-policy.
Run: python algos/q_learning.py
Expect: a return of 1.00, the maximum, after 10,000 episodes and about 2 seconds; policy.png shows the way.
"""

import difflib
import io
import json
import math
import os
import random
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.vector import AutoresetMode
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

MAX_EVAL_STEPS = 30_000  # longest evaluation episode
MAX_TABLE = 10_000_000  # most entries of the table
# The Hugging Face Deep RL course judges Taxi by these start seeds.
TAXI_SEEDS = (
    "16,54,165,177,191,191,120,80,149,178,48,38,6,125,174,73,50,172,100,148,146,6,25,40,68,148,49,167,9,97,"
    "164,176,61,7,54,55,161,131,184,51,170,12,120,113,95,126,51,98,36,135,54,82,45,95,89,59,95,124,9,113,"
    "58,85,51,134,121,169,105,21,30,11,50,65,12,43,82,145,152,97,106,55,31,85,38,112,102,168,123,97,21,83,"
    "158,26,80,63,5,81,32,11,28,148"
)


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "FrozenLake-v1"  # integer states and actions; module:id imports the module first
    env_kwargs: str | None = None  # its options as JSON; by default {"is_slippery": false} for FrozenLake-v1
    # algorithm
    total_episodes: int = 10_000  # budget
    learning_rate: float = 0.7  # α, how far an entry moves towards its target
    lr_visits: float = 0.0  # [Trick 1] c, visits that halve α; 0 keeps it constant
    gamma: float = 0.95  # γ in (1), what a reward one step later is worth
    max_epsilon: float = 1.0  # ε at first: the share of random actions
    min_epsilon: float = 0.05  # ε in the end
    decay_rate: float = 0.0005  # κ, how fast ε falls, per episode
    max_steps: int = 99  # longest training episode
    random_ties: bool = True  # [Trick 2] equally good actions are drawn at random
    # run
    seed: int = 1  # the same seed gives the same numbers
    eval_episodes: int = 100  # greedy episodes played after training
    eval_seeds: str | None = None  # their start seeds: 16,54,165; by default drawn, for Taxi the course's
    checkpoint_every: int = 100_000  # steps that a killed run loses at most, or one episode
    run_dir: str | None = None  # folder of the run; by default runs/ENV__q_learning__seedS__TIME
    resume: str | None = None  # go on with the run in this folder
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there


def flatten(env: gym.Env) -> gym.Env:
    """Number the observations that are tuples of integers, as in Blackjack; others stay as they are."""
    space = env.observation_space
    if not isinstance(space, gym.spaces.Tuple) or not all(isinstance(s, gym.spaces.Discrete) for s in space):
        return env
    sizes = [int(s.n) for s in space]
    states = gym.spaces.Discrete(math.prod(sizes))
    return gym.wrappers.TransformObservation(env, lambda obs: int(np.ravel_multi_index(obs, sizes)), states)


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """N environments, stepped in turn in this process.

    SAME_STEP: what ends is reset at once, so that a step is always a step of an episode.
    Exit code 2 for an unknown environment and for spaces that this script cannot handle.
    """
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    options = '{"is_slippery": false}' if args.env_id == "FrozenLake-v1" else "{}"
    try:
        kwargs = json.loads(options if args.env_kwargs is None else args.env_kwargs)
        kwargs |= {"render_mode": render_mode, "wrappers": [flatten]}
        envs = gym.make_vec(args.env_id, num_envs, "sync", vector_kwargs=mode, **kwargs)
    except Exception as error:  # environments refuse options in many ways
        near = ", ".join(difflib.get_close_matches(args.env_id, gym.registry, cutoff=0.5)) or "none"
        reason = f"{type(error).__name__} {error}"
        fail(f"cannot make the environment {args.env_id} (nearest known names: {near}): {reason}")
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 1:
        fail(f"{args.env_id} has images, this script reads integers: dqn_atari.py plays Atari games")
    if isinstance(action_space, gym.spaces.Box):
        fail(f"{args.env_id} has continuous actions, this script has integers: use a2c_continuous.py")
    if isinstance(obs_space, gym.spaces.Box):
        fail(f"{args.env_id} has vectors, this script reads integers: use ppo.py")
    spaces = (obs_space, action_space)
    if not all(isinstance(space, gym.spaces.Discrete) and space.start == 0 for space in spaces):
        fail(f"no script handles {args.env_id} with observations {obs_space} and actions {action_space}")
    if obs_space.n * action_space.n > MAX_TABLE:
        fail(f"{obs_space.n} states with {action_space.n} actions each are too many for a table")
    return envs


def greedy_action(row, rng=None):
    """The best action. row: A values. Equally good ones are drawn with rng, without it the first one wins."""
    best = max(row)
    # [Trick 2] Before anything is learned all values of a state are 0. The first action each time would walk
    # into the same wall again and again in training, in evaluation for ever (Sutton and Barto, section 2.4).
    # Ablate: --no-random-ties
    if rng is None or row.count(best) == 1:
        return row.index(best)
    return rng.choice([action for action, value in enumerate(row) if value == best])


def epsilon_at(episode, max_epsilon, min_epsilon, decay_rate):
    """The share of random actions in an episode, counted from 0: equation (6)."""
    return min_epsilon + (max_epsilon - min_epsilon) * math.exp(-decay_rate * episode)  # (6)


def td_target(reward, next_row, terminated, gamma):
    """What Q(s,a) should have said, equation (7): (4) for one try. next_row: A values of the next state."""
    # A time limit is no failure: only `terminated` means "worth nothing from here".
    return reward if terminated else reward + gamma * max(next_row)  # (7)


def step_size(learning_rate, visits, lr_visits):
    """The learning rate of a pair (s,a) seen `visits` times before, equation (10)."""
    # [Trick 1] Where chance decides, the same action brings now this, now that, and a constant rate runs
    # after the last few throws for ever. Values settle at the mean if the rates of a pair add up to infinity
    # (any start is forgotten) and their squares do not (the noise dies away): the conditions of Robbins and
    # Monro, https://doi.org/10.1214/aoms/1177729586. Rates like 1/n meet both. Off by default, for without
    # chance there is nothing to average; try: --lr-visits 100
    return learning_rate / (1 + visits / lr_visits) if lr_visits else learning_rate  # (10)


# What follows down to `train` keeps the promises about run folders and is nearly the same in every script: a
# first reading may skip it.


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on stderr; exit code 2 means bad input."""
    print("error: " + " ".join(message.split())[:400], file=sys.stderr)
    raise SystemExit(code)


def parse_args() -> Args:
    """Read the command line. With --resume or --evaluate, the defaults are the arguments of that run."""
    args = tyro.cli(Args)
    if folder := args.resume or args.evaluate:
        try:
            saved = json.loads((Path(folder) / "args.json").read_text())
            del saved["versions"]
            saved |= {} if args.resume else {"capture_video": False, "track": False}
            args = tyro.cli(Args, default=Args(**saved))
        except (OSError, ValueError, TypeError, KeyError) as error:
            fail(f"{folder} is no run folder of {Path(__file__).name}: {type(error).__name__} {error}")
        if args.eval_episodes < 1:
            fail("--eval-episodes must be at least 1")
    return args


def env_seeds(num_envs: int, *key: int) -> list[int]:
    """One seed per environment from any integers. With seed + i, neighbouring runs would share most seeds."""
    return np.random.SeedSequence(key).generate_state(num_envs).tolist()


def start_seeds(args: Args, num_envs: int, first: int) -> list[int]:
    """Start seeds of the evaluation episodes from number `first` on; a list too short begins again."""
    text = args.eval_seeds or (TAXI_SEEDS if args.env_id.startswith("Taxi-v") else None)
    if text is None:
        return env_seeds(num_envs, args.seed, 1, first)
    if not text.replace(",", "").isdecimal():
        fail(f"--eval-seeds {text} is no list like 16,54,165")
    seeds = [int(seed) for seed in text.split(",") if seed]
    return [seeds[i % len(seeds)] for i in range(first, first + num_envs)]


def start_run(args: Args, global_step: int) -> tuple[Path, event_file_writer.EventFileWriter]:
    """Make the run folder with args.json; open TensorBoard and, with --track, Weights & Biases."""
    name = f"{args.env_id}__{Path(__file__).stem}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
    if not args.resume and any((run_dir / name).exists() for name in ("checkpoint.pt", "q_table.npz")):
        fail(f"{run_dir} holds a run already: --resume {run_dir} goes on with it")
    versions = {package: version(package) for package in ("gymnasium", "numpy")}
    saved = asdict(args) | {"resume": None, "evaluate": None, "versions": versions}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_file(run_dir / "args.json", json.dumps(saved, indent=2).encode())
    except OSError as error:
        fail(f"cannot write the run folder: {error}")
    if args.track:
        import wandb  # here, because it is slow to import

        names = {"name": run_dir.name, "id": run_dir.name, "resume": "allow", "dir": run_dir}
        project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "config": asdict(args)}
        wandb.init(**names, **project, sync_tensorboard=True)
    # TensorBoard drops what a killed run logged beyond its last checkpoint, before those steps come again.
    # Called through its module, because Weights & Biases replaces the class there.
    writer = event_file_writer.EventFileWriter(str(run_dir))
    if args.resume:
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(wall_time=time.time(), step=global_step + 1, session_log=start))
    return run_dir, writer


def add_scalars(writer, step: int, scalars: dict[str, float]) -> None:
    """Write one point of each chart, without PyTorch, whose import takes longer than the whole training."""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name and move into place, so that no crash leaves half a file."""
    temporary = path.with_name("tmp-" + path.name)
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_checkpoint(run_dir: Path, checkpoint: dict) -> None:
    """Write q_table.npz. checkpoint: numbers and lists of numbers."""
    buffer = io.BytesIO()
    np.savez(buffer, **checkpoint)
    write_file(run_dir / "q_table.npz", buffer.getvalue())


def load_checkpoint(run_dir: str | Path, envs: gym.vector.VectorEnv) -> dict:
    """Read q_table.npz as plain numbers and lists. Runs no code from it."""
    path = Path(run_dir) / "q_table.npz"
    names = "q_table visits curve recent_returns rng_state global_step episodes wall_time_s"
    shape = (envs.single_observation_space.n, envs.single_action_space.n)
    try:
        with np.load(path, allow_pickle=False) as file:
            checkpoint = {name: file[name].tolist() for name in names.split()}
        for name in ("q_table", "visits"):
            if np.shape(checkpoint[name]) != shape:
                raise ValueError(f"{name} is {np.shape(checkpoint[name])}, the environment needs {shape}")
        random.Random().setstate((3, tuple(checkpoint["rng_state"]), None))
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"cannot use {path}: {type(error).__name__} {error}")
    return checkpoint


def load_policy(args: Args, envs: gym.vector.VectorEnv, run_dir: Path):
    """The greedy policy of a run, a function of observations (N,) to actions (N,), and its checkpoint."""
    checkpoint = load_checkpoint(run_dir, envs)
    rng = random.Random(args.seed) if args.random_ties else None

    def policy(obs: np.ndarray) -> np.ndarray:
        return np.array([greedy_action(checkpoint["q_table"][state], rng) for state in obs])

    return policy, checkpoint


def evaluate(args: Args, run_dir: Path) -> dict:
    """Play episodes with the policy in the run folder, print the summary, return what results.json holds.

    Each environment plays one episode a round and waits for the others: to take the first episodes that end
    would favour short ones. A greedy policy may walk in circles for ever; MAX_EVAL_STEPS ends its episode.
    """
    envs = make_envs(args, min(args.eval_episodes, 20))
    policy, checkpoint = load_policy(args, envs, run_dir)
    returns = np.zeros(0)
    while len(returns) < args.eval_episodes:
        obs, _ = envs.reset(seed=start_seeds(args, envs.num_envs, len(returns)))
        totals, playing, steps = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool), 0
        while playing.any() and steps < MAX_EVAL_STEPS:
            obs, rewards, terminated, truncated, _ = envs.step(policy(obs))
            totals += rewards * playing
            playing &= ~(terminated | truncated)
            steps += 1
        returns = np.append(returns, totals)
    envs.close()
    if args.capture_video:
        record_video(args, policy, run_dir / "replay.mp4")
    returns = returns[: args.eval_episodes]
    mean, std = float(returns.mean()), float(returns.std())
    steps, seconds = checkpoint["global_step"], checkpoint["wall_time_s"]
    speed = steps / max(seconds, 1e-9)
    print(
        f"{args.env_id}, seed {args.seed}: {mean:.2f} ± {std:.2f} over {len(returns)} episodes "
        f"after {steps:,} steps, {seconds:.1f} s, {speed:,.0f} steps/s: {run_dir}"
    )
    results = {"algo": Path(__file__).stem, "env_id": args.env_id, "seed": args.seed, "global_step": steps}
    results |= {"episodes": checkpoint["episodes"], "mean_reward": mean, "std_reward": std}
    results |= {"score": mean - std, "eval_episodes": len(returns)}
    return results | {"wall_time_s": seconds, "steps_per_second": speed}


def record_video(args: Args, policy, path: Path) -> None:
    """Film one episode from the first evaluation seed. All its frames at once would fill the memory."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter  # here, because it is slow to import

    envs = make_envs(args, 1, render_mode="rgb_array")
    obs, _ = envs.reset(seed=start_seeds(args, 1, 0))
    frame, temporary = envs.render()[0], path.with_name("tmp-" + path.name)
    size, fps = (frame.shape[1], frame.shape[0]), envs.metadata.get("render_fps", 30)
    with FFMPEG_VideoWriter(str(temporary), size, fps) as film:
        film.write_frame(frame)
        ended, steps = False, 0
        while not ended and steps < MAX_EVAL_STEPS:
            obs, _, terminated, truncated, _ = envs.step(policy(obs))
            film.write_frame(envs.render()[0])
            ended, steps = terminated[0] or truncated[0], steps + 1
    envs.close()
    os.replace(temporary, path)


def draw_policy(args: Args, run_dir: Path) -> None:
    """Draw what was learned as policy.png: the map with its arrows, or the table; and the learning curve."""
    from matplotlib.figure import Figure  # here, because it is slow to import

    envs = make_envs(args, 1)
    checkpoint, env = load_checkpoint(run_dir, envs), envs.unwrapped.envs[0].unwrapped
    q_table = np.array(checkpoint["q_table"])  # (S, A)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if type(env).__name__ == "FrozenLakeEnv":
        values = q_table.max(1).reshape(env.desc.shape)  # (2), of the greedy policy
        image = left.imshow(values)
        for (row, column), tile in np.ndenumerate(env.desc.astype(str)):
            best = q_table[row * env.ncol + column]
            arrow = "·" if best.max() == best.min() else "←↓→↑"[best.argmax()]
            dark = values[row, column] < (values.min() + values.max()) / 2
            text = {"F": arrow, "S": "start\n" + arrow, "H": "hole", "G": "goal"}[tile]
            left.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
        left.set(title="greedy actions and values of the states", xticks=[], yticks=[])
    else:
        image = left.imshow(q_table, aspect="auto", interpolation="nearest")
        left.set(title="the table", xlabel="action", ylabel="state", xticks=range(q_table.shape[1]))
    figure.colorbar(image, ax=left)
    if checkpoint["curve"]:
        right.plot(*zip(*checkpoint["curve"], strict=True))
    right.set(title="learning curve", xlabel="episode", ylabel="mean return")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_file(run_dir / "policy.png", buffer.getvalue())
    envs.close()


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    sizes = (args.total_episodes, args.max_steps, args.checkpoint_every, args.eval_episodes)
    if min(sizes) < 1 or args.seed < 0:
        fail("every number and interval must be at least 1, the seed at least 0")
    if not 0 < args.learning_rate <= 1 or not 0 <= args.gamma <= 1:
        fail("--learning-rate must be above 0 and at most 1, --gamma between 0 and 1")
    if not 0 <= args.min_epsilon <= args.max_epsilon <= 1 or args.decay_rate < 0 or args.lr_visits < 0:
        fail("0 ≤ --min-epsilon ≤ --max-epsilon ≤ 1 and neither --decay-rate nor --lr-visits below 0")
    start_seeds(args, 1, 0)  # ends here if --eval-seeds is no list
    envs = make_envs(args, 1)
    env = envs.unwrapped.envs[0]  # one integer at a time is done faster without a vector around it
    S, A = int(envs.single_observation_space.n), int(envs.single_action_space.n)
    # Lists instead of arrays: for one number at a time, Python is faster than NumPy.
    q_table, visits = [[0.0] * A for _ in range(S)], [[0] * A for _ in range(S)]  # (3), (S, A)
    rng = random.Random(args.seed)
    global_step, episodes, wall_time_s, recent_returns, curve = 0, 0, 0.0, deque(maxlen=100), []
    if args.resume:
        saved = load_checkpoint(Path(args.resume), envs)
        global_step, episodes, wall_time_s = saved["global_step"], saved["episodes"], saved["wall_time_s"]
        recent_returns.extend(saved["recent_returns"])
        q_table, visits, curve = saved["q_table"], saved["visits"], saved["curve"]
        rng.setstate((3, tuple(saved["rng_state"]), None))
    interrupted = []  # filled by Ctrl-C, so that the loop ends where everything can be saved
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    run_dir, writer = start_run(args, global_step)

    ties_rng = rng if args.random_ties else None
    log_every = min(max(1, args.total_episodes // 100), 1000)
    returns, lengths, errors = [], [], 0.0  # since the last point of the charts
    # Environments cannot be saved: a resumed run goes on from new seeds.
    env.reset(seed=env_seeds(1, args.seed, 0, global_step)[0])
    bar = tqdm(total=args.total_episodes, initial=episodes, unit=" episodes", unit_scale=True)
    saved_step, started = -args.checkpoint_every, time.perf_counter() - wall_time_s
    while True:
        finished = episodes >= args.total_episodes
        # One more episode without saving, and a kill would cost more than checkpoint_every steps.
        if finished or interrupted or global_step + args.max_steps > saved_step + args.checkpoint_every:
            wall_time_s = time.perf_counter() - started
            state = {"global_step": global_step, "episodes": episodes, "wall_time_s": wall_time_s}
            state |= {"recent_returns": list(recent_returns), "rng_state": rng.getstate()[1]}
            state |= {"q_table": q_table, "visits": visits, "curve": curve}
            save_checkpoint(run_dir, state)
            writer.flush()
            saved_step = global_step
        if finished or interrupted:
            break

        # [A] explore
        epsilon = epsilon_at(episodes, args.max_epsilon, args.min_epsilon, args.decay_rate)
        observation, _ = env.reset()
        episodic_return, length, terminated, truncated = 0.0, 0, False, False
        while not (terminated or truncated or length == args.max_steps):
            # [B] act
            row = q_table[observation]  # (A,)
            action = rng.randrange(A) if rng.random() < epsilon else greedy_action(row, ties_rng)  # (5)
            seen = visits[observation]  # (A,)
            observation, reward, terminated, truncated, _ = env.step(action)

            # [C] learn
            error = td_target(reward, q_table[observation], terminated, args.gamma) - row[action]  # (8)
            row[action] += step_size(args.learning_rate, seen[action], args.lr_visits) * error  # (9)
            seen[action] += 1
            errors += abs(error)
            episodic_return += reward
            length += 1
        global_step += length
        episodes += 1
        returns.append(float(episodic_return))
        lengths.append(length)
        recent_returns.append(returns[-1])
        if not math.isfinite(errors):
            bar.close()
            fail(f"the error is {error} at step {global_step}; the last checkpoint is good", code=1)

        # [D] log: one point for many episodes, each the mean since the last
        if episodes % log_every == 0 or episodes == args.total_episodes or interrupted:
            speed = global_step / (time.perf_counter() - started)
            curve.append((episodes, sum(returns) / len(returns)))
            scalars = {"charts/episodic_return": curve[-1][1], "charts/SPS": speed, "charts/epsilon": epsilon}
            scalars["charts/episodic_length"] = sum(lengths) / len(lengths)
            scalars["losses/td_error"] = errors / sum(lengths)
            add_scalars(writer, global_step, scalars)
            bar.set_postfix_str(f"return {np.mean(recent_returns):.2f}, {speed:,.0f} steps/s", refresh=False)
            bar.update(episodes - bar.n)
            returns, lengths, errors = [], [], 0.0

    bar.close()
    writer.close()
    envs.close()
    if interrupted:
        print(f"interrupted and saved, go on with --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # all is saved, Ctrl-C may stop at once
    draw_policy(args, run_dir)
    results = evaluate(args, run_dir)
    write_file(run_dir / "results.json", json.dumps(results, indent=2).encode())
    if args.track:
        import wandb

        wandb.log({"policy": wandb.Image(str(run_dir / "policy.png"))})
        if args.capture_video:
            wandb.log({"replay": wandb.Video(str(run_dir / "replay.mp4"))})
        wandb.finish()
    return results


if __name__ == "__main__":
    args = parse_args()
    evaluate(args, Path(args.evaluate)) if args.evaluate else train(args)
