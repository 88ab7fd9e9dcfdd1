"""Q-learning: a table of what every action is worth in every state, learned by trying the actions.

After each step the agent takes the reward, adds the table's value of the next state (discounted), and moves
the entry of its action part of the way to this sum: it learns before the episode (one attempt) is over.

On a frozen lake of 4 × 4 tiles, some of them holes, an agent in a state s (a tile) takes an action a (a
direction). The environment answers with a reward r (1 at the goal, else 0) and the next state s'. Then the
agent acts again, and so on: the loop of agent and environment. A task is episodic if it ends: the episode is
terminated (in a hole or at the goal, nothing follows) or truncated (a time limit). Else it is continuing.

The lake is a Markov decision process (MDP): the chances of r and s' depend on s and a, and on nothing that
came before. So the state says all that matters for the future (the Markov property). An observation is what
the agent sees. It may say less: one picture of a ball does not show which way the ball flies. On the lake the
observation is the state.

A policy π is a rule that chooses actions. The goal is the policy with the largest expected return: the sum of
the rewards that follow, on average. The reward hypothesis: every goal can be stated so. There are two sums:
    discounted return G_t    later rewards count less, see (1)    in formulas, table and policy.png
    episodic return          the rewards of an episode, added     in charts, progress bar and results.json
With γ = 0.9 and the rewards 0, 0, 1 the discounted return is 0.81 and the episodic return 1.

Why discount? Without an end the plain sum may be infinite, a reward far away is less sure to come, and a
short way should be worth more than a long one. With γ = 0 the agent looks at the next reward only. With γ
near 1 it looks about 1/(1−γ) steps ahead, but learns more slowly: more happens by chance in between.

Pseudo-code
    for every episode:
        [A] explore   a little less than before: ε, the share of random actions, falls
        until the episode ends:
            [B] act       with probability ε a random action, else the best known one
            [C] learn     move one entry of the table towards its target
        [D] log       charts, progress bar

Equations
    (1)  G_t = r_t + γ r_{t+1} + γ² r_{t+2} + … = r_t + γ G_{t+1}
    (2)  ε_k = ε_min + (ε_max − ε_min) exp(−κ k)
    (3)  π(s) = argmax_a Q(s,a), the greedy action, with probability 1−ε, else a random one: ε-greedy
    (4)  y = r + γ max_a' Q(s',a')                                       target; y = r after a termination
    (5)  δ = y − Q(s,a)                                                  temporal-difference (TD) error
    (6)  α_m = α / (1 + m/c)                                             or simply α, for every m
    (7)  Q(s,a) ← Q(s,a) + α_m δ

A value is the mean (written E) of the discounted return: V(s) that of a state, Q(s,a) that of an action in a
state. By (1), a value is the next reward plus the discounted value of what follows: the Bellman equations.
    of a policy   V^π(s)   = E[G_t | s_t = s]           = E[r + γ V^π(s')]           π chooses a
                  Q^π(s,a) = E[G_t | s_t = s, a_t = a]  = E[r + γ Q^π(s',a')]        a is given, π chooses a'
    of the best   V*(s)    = max_π V^π(s)               = max_a E[r + γ V*(s')]
                  Q*(s,a)  = max_π Q^π(s,a)             = E[r + γ max_a' Q*(s',a')]
V^π(s) is the mean of Q^π(s,a) over the actions of π, and V*(s) = max_a Q*(s,a). The best policy takes
argmax_a Q*(s,a): an agent that has learned Q* can act without knowing how the environment works.

By hand: tiles 1, 2, 3 in a row, the goal right of 3, a wall left of 1 (a step against it stays in 1), reward
1 for reaching the goal, γ = 0.9. From the goal backwards,
    V*(3) = 1,    V*(2) = 0 + 0.9 V*(3) = 0.9,    V*(1) = 0 + 0.9 V*(2) = 0.81,
    Q*(2,right) = 0 + 0.9 V*(3) = 0.9  and  Q*(2,left) = 0 + 0.9 V*(1) = 0.729: right is best.
If π tosses a coin, left or right, V^π = 0.429, 0.524, 0.736. In tile 2 this is the mean of both actions:
    V^π(2) = ½ Q^π(2,left) + ½ Q^π(2,right) = ½ · 0.9 V^π(1) + ½ · 0.9 V^π(3) = 0.193 + 0.331 = 0.524.

Symbols
    s, a, r, s'   state, action, reward, next state      γ, α, c    gamma, learning_rate, lr_visits
    π, V, Q       policy, values; Q is the table, too    ε, κ       share of random actions, decay_rate
    G, y, δ       discounted return, target, TD error    k, m       episodes, visits of (s,a) so far
    E             mean over all that chance decides      |S|, |A|   number of states, of actions
Departures from the paper: by default α is constant, where the proof wants it to fall ([Trick 1]); of equally
good actions a random one is taken ([Trick 2]); after a time limit, where more could follow, (4) is unchanged.
References: Q-learning https://doi.org/10.1007/BF00992698, Sutton and Barto's book, chapters 3 to 6,
http://incompleteideas.net/book/the-book-2nd.html, learning rates https://jmlr.org/papers/v5/evendar03a.html

Read first: nothing, the path begins here.
New here: reward, return, value, exploration, temporal difference, off-policy.
Run: python algos/q_learning.py
Expect: an episodic return of 1.00, the maximum, after 10,000 episodes and about 2 seconds. policy.png shows
the way; its 0.77 = γ⁵ at the start is a discounted return: the sixth step brings the reward.
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
import zipfile
from collections import deque
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, NoReturn

import gymnasium as gym
import numpy as np
import tyro
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "FrozenLake-v1"  # integer states and actions; module:id imports the module first
    env_kwargs: str | None = None  # options as JSON; default for FrozenLake-v1: {"is_slippery": false}
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
    eval_seeds: str | None = None  # start seeds of evaluation, as 16,54,165; default: drawn; Taxi: TAXI_SEEDS
    checkpoint_every: int = 100_000  # save at least every this many steps, or every episode
    run_dir: str | None = None  # folder of the run; by default runs/ENV__q_learning__seedS__TIME
    resume: str | None = None  # go on with the run in this folder
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The environment with its options, its states numbered 0, 1, 2, …"""
    options = args.env_kwargs
    if options is None:
        options = '{"is_slippery": false}' if args.env_id == "FrozenLake-v1" else "{}"
    return number_states(gym.make(args.env_id, render_mode=render_mode, **json.loads(options)))


def epsilon_at(episode, max_epsilon, min_epsilon, decay_rate):
    """The share of random actions in an episode, counted from 0: equation (2)."""
    return min_epsilon + (max_epsilon - min_epsilon) * math.exp(-decay_rate * episode)  # (2)


def greedy_action(row, rng=None):
    """The best action. row: |A| values. rng draws among equal ones; without rng the first one wins."""
    best = max(row)
    # [Trick 2] Before anything is learned all values of a state are 0. An agent that always takes the first
    # of equal actions walks into the same wall again and again in training, and for ever in an evaluation.
    # Drawing one is from Sutton and Barto, section 2.4. Ablate: --no-random-ties (switch it off, to compare)
    if rng is None or row.count(best) == 1:
        return row.index(best)
    return rng.choice([action for action, value in enumerate(row) if value == best])


def td_target(reward, next_row, terminated, gamma):
    """What Q(s,a) should have said, equation (4). next_row: |A| values of the next state."""
    # After a time limit more could follow: the next value counts. After `terminated` nothing follows.
    if terminated:
        return reward
    return reward + gamma * max(next_row)  # (4)


def step_size(learning_rate, visits, lr_visits):
    """The learning rate of a pair (s,a) seen `visits` times before, equation (6)."""
    if not lr_visits:
        return learning_rate
    # [Trick 1] Where chance decides, a constant rate follows the last few tries for ever. Values settle at
    # the mean if the rates of a pair add up to infinity (any start is forgotten) and their squares do not
    # (the noise dies away): Robbins and Monro, https://doi.org/10.1214/aoms/1177729586. (6), which falls like
    # 1/m, meets both. It pays where chance decides a lot. Try: --lr-visits 100, and 0 for a constant rate
    return learning_rate / (1 + visits / lr_visits)  # (6)


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    check_args(args)  # if a setting or the environment cannot work, the script ends here and says why
    env = make_env(args)
    num_states = int(env.observation_space.n)
    num_actions = int(env.action_space.n)
    # Lists instead of arrays: for one number at a time, Python is faster than NumPy.
    q_table = [[0.0] * num_actions for _ in range(num_states)]  # Q(s,a), (|S|, |A|)
    visits = [[0] * num_actions for _ in range(num_states)]  # how often a was taken in s, (|S|, |A|)
    rng = random.Random(args.seed)
    ties_rng = rng if args.random_ties else None
    # Run (below the line) counts, draws the charts and saves; with --resume it fills in what was saved.
    run = Run(args, budget=args.total_episodes, q_table=q_table, visits=visits, rng=rng)  # saves these

    errors = 0.0  # sum of |δ| since the last point of the charts
    logged_step = run.step
    # Environments cannot be saved: a resumed run goes on from a new seed. 0 marks the seeds of training.
    env.reset(seed=env_seeds(1, args.seed, 0, run.step)[0])
    while run.goes_on(1):  # one more episode, until the budget is spent; saves when that is due
        # [A] explore
        # A dilemma: to take the best action known (exploit) earns most now; to try another one (explore) may
        # cost reward now and show a better way for all later episodes. An agent that only exploits keeps to
        # the first way it finds; one that only explores never uses what it knows. So ε starts high and falls.
        epsilon = epsilon_at(run.episodes, args.max_epsilon, args.min_epsilon, args.decay_rate)
        state, _ = env.reset()
        episodic_return = 0.0
        length = 0
        for _ in range(args.max_steps):
            # [B] act
            row = q_table[state]  # (|A|,), a part of the table and not a copy: [C] writes into it
            if rng.random() < epsilon:  # (3)
                action = rng.randrange(num_actions)
            else:
                action = greedy_action(row, ties_rng)
            next_state, reward, terminated, truncated, _ = env.step(action)

            # [C] learn
            # The target is the Bellman equation of Q* for one try, with the table in place of Q*. To build a
            # target on such a guess is to bootstrap: the news of a reward spreads backwards, one state at a
            # time. The error is a temporal difference: between two guesses of one return, the second made a
            # step later. (Monte Carlo methods wait for the end of the episode and aim at G_t: see sarsa.py.)
            # The target takes the best next action, whatever (3) will take. So Q-learning is off-policy: it
            # learns what the greedy policy (always the best known action) is worth, while another one acts.
            # An on-policy method learns about the policy that acts: see sarsa.py.
            target = td_target(reward, q_table[next_state], terminated, args.gamma)
            error = target - row[action]  # (5)
            seen = visits[state]  # (|A|,)
            row[action] += step_size(args.learning_rate, seen[action], args.lr_visits) * error  # (7)
            seen[action] += 1
            state = next_state
            errors += abs(error)
            episodic_return += reward
            length += 1
            if terminated or truncated:
                break
        run.step += length
        run.episodes_ended([episodic_return], [length])
        run.stop_if_not_finite(errors)

        # [D] log: one point of the charts for many episodes, the mean over all since the last point
        if run.log_is_due():
            run.log("charts", epsilon=epsilon)
            run.log("losses", td_error=errors / (run.step - logged_step))
            errors = 0.0
            logged_step = run.step
    env.close()
    return run.finish()


# ---- From here on: the run folder (save, resume, evaluate, film). The same text in every script. ----
# Here without PyTorch, whose import takes longer than the whole training: the calls and the promises are the
# same, and so is the text of every function that knows neither tensors nor vectors of environments.


MAX_EVAL_STEPS = 30_000  # longest evaluation episode
MAX_TABLE = 10_000_000  # most entries of the table
# The Hugging Face Deep RL course judges Taxi by these start seeds.
TAXI_SEEDS = (
    "16,54,165,177,191,191,120,80,149,178,48,38,6,125,174,73,50,172,100,148,146,6,25,40,68,148,49,167,9,97,"
    "164,176,61,7,54,55,161,131,184,51,170,12,120,113,95,126,51,98,36,135,54,82,45,95,89,59,95,124,9,113,"
    "58,85,51,134,121,169,105,21,30,11,50,65,12,43,82,145,152,97,106,55,31,85,38,112,102,168,123,97,21,83,"
    "158,26,80,63,5,81,32,11,28,148"
)
RANGES = {  # smallest and largest value of every number in Args
    "total_episodes": (1, 10**12),
    "learning_rate": (1e-9, 1),
    "lr_visits": (0, 1e9),
    "gamma": (0, 1),
    "max_epsilon": (0, 1),
    "min_epsilon": (0, 1),
    "decay_rate": (0, 1000),
    "max_steps": (1, 10**9),
    "seed": (0, 2**32 - 1),
    "eval_episodes": (1, 1_000_000),
    "checkpoint_every": (1, 10**12),
}


def number_states(env: gym.Env) -> gym.Env:
    """Number the observations that are tuples of integers, as in Blackjack; others stay as they are."""
    space = env.observation_space
    if not isinstance(space, gym.spaces.Tuple) or not all(isinstance(s, gym.spaces.Discrete) for s in space):
        return env
    sizes = [int(s.n) for s in space]
    states = gym.spaces.Discrete(math.prod(sizes))
    return gym.wrappers.TransformObservation(env, lambda obs: int(np.ravel_multi_index(obs, sizes)), states)


def check_settings(args: Args) -> None:
    """Refuse settings that cannot work together."""
    if args.min_epsilon > args.max_epsilon:
        fail(f"--min-epsilon {args.min_epsilon} is above --max-epsilon {args.max_epsilon}")
    start_seeds(args, 1)  # ends here if --eval-seeds is no list


def check_spaces(args: Args, env: gym.Env) -> None:
    """Refuse environments that this script cannot handle, and name the script that can."""
    obs_space = env.observation_space
    action_space = env.action_space
    if isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 1:
        fail(f"{args.env_id} has images, this script reads integers: dqn_atari.py plays Atari games")
    if isinstance(action_space, gym.spaces.Box):
        fail(f"{args.env_id} has continuous actions: use a2c_continuous.py or ppo_continuous.py")
    if isinstance(obs_space, gym.spaces.Box):
        fail(f"{args.env_id} has vectors, this script reads integers: use ppo.py")
    spaces = (obs_space, action_space)
    if not all(isinstance(space, gym.spaces.Discrete) and space.start == 0 for space in spaces):
        fail(f"no script handles {args.env_id} with observations {obs_space} and actions {action_space}")
    if obs_space.n * action_space.n > MAX_TABLE:
        fail(f"{obs_space.n} states with {action_space.n} actions each are too many for a table")
    if args.capture_video and "rgb_array" not in (env.metadata.get("render_modes") or []):
        fail(f"{args.env_id} draws no pictures: leave out --capture-video")


def load_policy(args: Args, env: gym.Env, run_dir: Path):
    """The greedy policy of a run, a function of a state to an action, and its checkpoint."""
    checkpoint = load_checkpoint(run_dir, int(env.observation_space.n), int(env.action_space.n))
    rng = random.Random(args.seed) if args.random_ties else None

    def policy(state: int) -> int:
        return greedy_action(checkpoint["q_table"][state], rng)

    return policy, checkpoint


def start_seeds(args: Args, episodes: int) -> list[int]:
    """Start seeds of the evaluation episodes; a list that is too short begins again."""
    text = args.eval_seeds or (TAXI_SEEDS if args.env_id.startswith("Taxi-v") else None)
    if text is None:
        seeds = []
        for first in range(0, episodes, 20):  # as the other scripts, which play 20 episodes at a time
            seeds += env_seeds(20, args.seed, 1, first)
        return seeds[:episodes]
    seeds = [seed for seed in text.split(",") if seed]
    if not seeds or not all(seed.isdecimal() and len(seed) < 11 and int(seed) < 2**32 for seed in seeds):
        fail(f"--eval-seeds must be a list like 16,54,165 of numbers below 2**32, not {text}")
    return [int(seeds[i % len(seeds)]) for i in range(episodes)]


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on stderr; exit code 2 means bad input."""
    # On a line of its own, above the progress bar if there is one.
    tqdm.write("error: " + " ".join(message.split())[:400], file=sys.stderr)
    raise SystemExit(code)


def parse_args() -> Args:
    """Read the command line. With --resume or --evaluate, the defaults are the arguments of that run."""
    args = read_command_line(Args())
    folder = args.resume or args.evaluate
    if not folder:
        return args
    try:
        saved = json.loads((Path(folder) / "args.json").read_text())
        made_by = saved.pop("versions").get(Path(__file__).name)
        saved |= {"resume": None, "evaluate": None}
        if args.evaluate:
            saved |= {"capture_video": False, "track": False}
        defaults = Args(**saved)
        module = defaults.env_id.rpartition(":")[0]
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"{folder} is no run folder of {Path(__file__).name}: {type(error).__name__} {error}")
    named = args.env_id
    args = read_command_line(defaults)
    # To make module:id imports the module, and imports run code: a file from a stranger must not choose it.
    if module and not module.startswith("envs.") and args.env_id == defaults.env_id != named:
        fail(f"the run's environment runs code of the module {module}: allow it with --env-id {args.env_id}")
    if made_by != script_version():
        print(f"note: this {Path(__file__).name} is not the text that made {folder}", file=sys.stderr)
    return args


def script_version() -> str:
    """Another one for every change of this file: a copy that acts otherwise must not do so unnoticed."""
    import hashlib

    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def read_command_line(defaults: Args) -> Args:
    """tyro's reading of the command line; what it cannot read ends with one line and exit code 2."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return tyro.cli(Args, default=defaults)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        fail("".join(letter for letter in errors.getvalue() if not "─" <= letter <= "╿"))


def check_args(args: Args) -> None:
    """End with one line and exit code 2 if a setting is out of range or the environment does not serve."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        about = Args.__dataclass_fields__[name].type  # tyro checks flags by it, but not args.json
        kinds = getattr(about, "__args__", (about,))  # of int | None: int and None's; of list[int]: int
        listed = getattr(about, "__origin__", None) is list
        for number in value if isinstance(value, list) else [value]:
            fits = isinstance(value, list) == listed and isinstance(number, (*kinds, int))
            # Written so that NaN, which compares with nothing, is out of range too.
            if not fits or number is not None and not low <= number <= high:
                kind = "a whole number " if int in kinds else ""
                fail(f"--{name.replace('_', '-')} {number} is not {kind}between {low:,} and {high:,}")
    for name, about in Args.__dataclass_fields__.items():  # words, and what is on or off
        value = getattr(args, name)
        kinds = getattr(about.type, "__args__", (about.type,))
        if {int, float} & {*kinds} and name not in RANGES:
            fail(f"RANGES does not say what --{name.replace('_', '-')} may be: smallest and largest value")
        listed = [kind for kind in kinds if isinstance(kind, str)]
        fits = value in listed if listed else name in RANGES or isinstance(value, kinds)
        if not fits:
            wanted = ", ".join(listed) or " or ".join(kind.__name__ for kind in kinds)
            fail(f"--{name.replace('_', '-')} {value} is none of {wanted}")
    check_settings(args)
    if args.capture_video and sys.platform == "linux" and "DISPLAY" not in os.environ:
        # pygame, which draws Gymnasium's games, films without a screen.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        env = make_env(args)
    except Exception as error:  # environments refuse their options in many ways
        near = ", ".join(difflib.get_close_matches(str(args.env_id), gym.registry, cutoff=0.5)) or "none"
        reason = f"(nearest known names: {near}): {type(error).__name__} {error}"
        fail(f"cannot make the environment {args.env_id} {reason}")
    check_spaces(args, env)
    env.close()


def env_seeds(num_envs: int, *key: int) -> list[int]:
    """One seed per environment from any integers. With seed + i, neighbouring runs would share most seeds."""
    return np.random.SeedSequence(key).generate_state(num_envs).tolist()


class Run:
    """A training run and its folder: counters, clock, charts, progress bar, Ctrl-C and checkpoints.

    step, episodes: how many have been played. stopped: the signals that came, filled by Ctrl-C.
    """

    def __init__(self, args: Args, budget: int, q_table: list, visits: list, rng: random.Random) -> None:
        """budget: in episodes. q_table, visits: (|S|, |A|). --resume fills them, and rng, from the folder."""
        self.args = args
        self.budget = budget
        self.q_table = q_table
        self.visits = visits
        self.rng = rng
        self.step = 0
        self.episodes = 0
        self.recent_returns = deque(maxlen=100)
        self.curve = []  # the points of the learning curve: episodes, mean episodic return
        self.returns = []  # of the episodes that ended since the last point of the charts
        self.lengths = []
        self.stopped = []
        seconds = 0.0
        if args.resume:
            saved = load_checkpoint(Path(args.resume), len(q_table), len(q_table[0]))
            self.step = saved["global_step"]
            self.episodes = saved["episodes"]
            self.recent_returns.extend(saved["recent_returns"])
            self.curve = saved["curve"]
            seconds = saved["wall_time_s"]
            q_table[:] = saved["q_table"]
            visits[:] = saved["visits"]
            rng.setstate((3, tuple(saved["rng_state"]), None))
        # So that the loop ends where everything can be saved; clusters send SIGTERM.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.stopped.append(number))
        self.dir, self.lock = open_folder(args)
        # Called through its module, because Weights & Biases replaces the class there.
        self.writer = event_file_writer.EventFileWriter(str(self.dir))
        if args.resume:
            # TensorBoard drops what a killed run logged beyond its last checkpoint: those steps come again.
            start = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(wall_time=time.time(), step=self.step + 1, session_log=start))
        self.log_every = min(max(1, budget // 100), 1000)
        bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
        done = self.episodes
        self.bar = tqdm(total=budget, initial=done, unit="episodes", unit_scale=True, bar_format=bar_format)
        self.save_beyond = -1  # the step after which the next checkpoint is due
        self.started = time.perf_counter() - seconds

    def goes_on(self, size: int) -> bool:
        """Whether the budget allows `size` more. Saves when that is due, and always before the end."""
        ends = bool(self.stopped) or self.episodes + size > self.budget
        if ends or self.step > self.save_beyond:
            self.save()
        return not ends

    def save(self) -> None:
        """Write q_table.npz: numbers and lists of numbers only."""
        checkpoint = {
            "global_step": self.step,
            "episodes": self.episodes,
            "wall_time_s": time.perf_counter() - self.started,
            "recent_returns": list(self.recent_returns),
            "curve": np.reshape(self.curve, (-1, 2)),
            "rng_state": self.rng.getstate()[1],
            "q_table": self.q_table,
            "visits": self.visits,
        }
        save_checkpoint(self.dir, checkpoint)
        self.writer.flush()
        # Save again before an episode that could end more than checkpoint_every steps after this checkpoint.
        self.save_beyond = self.step + self.args.checkpoint_every - self.args.max_steps

    def episodes_ended(self, returns, lengths) -> None:
        """Count episodes that ended. returns: sums of their rewards, lengths: in steps; both (n,)."""
        self.returns += returns
        self.lengths += lengths
        self.recent_returns += returns
        self.episodes += len(returns)

    def stop_if_not_finite(self, value) -> None:
        """End with exit code 1 if the sum of the errors is NaN or infinite."""
        if not math.isfinite(value):
            self.bar.close()
            fail(f"the error is {value} at step {self.step}; what was saved before is good", code=1)

    def log_is_due(self) -> bool:
        """Whether a point of charts is due: after 1% of the run, 1,000 episodes at most, and at the end."""
        return self.episodes % self.log_every == 0 or self.episodes == self.budget or bool(self.stopped)

    def log(self, group: str, **values) -> None:
        """One point of each chart. With "charts" go the episodes since the last point, the speed, the bar."""
        if group == "charts":
            speed = self.step / (time.perf_counter() - self.started)
            values["episodic_return"] = sum(self.returns) / len(self.returns)
            values["episodic_length"] = sum(self.lengths) / len(self.lengths)
            values["SPS"] = speed
            self.curve.append((self.episodes, values["episodic_return"]))
            self.returns.clear()
            self.lengths.clear()
            recent = np.mean(self.recent_returns)
            self.bar.set_postfix_str(f"return {recent:.2f}, {speed:,.0f} steps/s", refresh=False)
            self.bar.update(self.episodes - self.bar.n)
        # Written by hand, because PyTorch's SummaryWriter would import PyTorch.
        points = [Summary.Value(tag=f"{group}/{name}", simple_value=value) for name, value in values.items()]
        self.writer.add_event(Event(wall_time=time.time(), step=self.step, summary=Summary(value=points)))

    def finish(self) -> dict:
        """Close everything; then evaluate and write results.json, or end here after Ctrl-C."""
        self.bar.close()
        self.writer.close()
        if self.stopped:
            print(f"interrupted and saved, go on with --resume {self.dir}", file=sys.stderr)
            raise SystemExit(128 + self.stopped[0])
        leave_at_once()
        draw_policy(self.args, self.dir)
        results = evaluate(self.args, self.dir)
        write_file(self.dir / "results.json", json.dumps(results, indent=2).encode())
        self.lock.close()
        if self.args.track:
            import wandb

            wandb.log({"policy": wandb.Image(str(self.dir / "policy.png"))})
            if self.args.capture_video:
                wandb.log({"replay": wandb.Video(str(self.dir / "replay.mp4"))})
            wandb.finish()
        return results


def open_folder(args: Args) -> tuple[Path, IO]:
    """Make the run folder with args.json and lock it; with --track, join Weights & Biases.

    Returns the folder and its open lock file: the lock holds until that file is closed or the process ends.
    """
    name = f"{args.env_id}__{Path(__file__).stem}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    default = "runs/" + name.replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume or args.run_dir or default)
    versions = {name: version(name) for name in ("torch", "gymnasium", "numpy") if name in sys.modules}
    versions[Path(__file__).name] = script_version()
    saved = asdict(args) | {"resume": None, "evaluate": None, "versions": versions}
    try:
        copy = 1
        while not (args.resume or args.run_dir) and not is_new(run_dir):  # another run began in this second
            copy += 1
            run_dir = Path(f"{default}-{copy}")
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a")
        if os.name == "posix":
            import fcntl  # here, because Windows has none

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not args.resume and any((run_dir / name).exists() for name in ("checkpoint.pt", "q_table.npz")):
            fail(f"{run_dir} holds a run already: --resume {run_dir} goes on with it")
        write_file(run_dir / "args.json", json.dumps(saved, indent=2).encode())
    except BlockingIOError:
        fail(f"another process is training in {run_dir}")
    except OSError as error:
        fail(f"cannot write the run folder: {error}")
    if args.track:
        import wandb  # here, because it is slow to import

        # A run keeps its id there, which is part of the names of the files that wandb leaves in the folder.
        ids = [file.stem.removeprefix("run-") for file in run_dir.glob("wandb/*/run-*.wandb")]
        names = {"name": run_dir.name, "id": ids[0] if ids else None, "resume": "allow", "dir": run_dir}
        project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "config": asdict(args)}
        try:
            wandb.init(**names, **project, sync_tensorboard=True)
        except wandb.Error as error:  # not logged in, no network
            fail(f"--track does not work here, WANDB_MODE=offline does: {error}")
    return run_dir, lock


def is_new(path: Path) -> bool:
    """Make a folder; whether it did not exist before."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name and move into place, so that no crash leaves half a file."""
    temporary = path.with_name("tmp-" + path.name)
    try:
        temporary.unlink(missing_ok=True)  # a stranger's folder may hold a link of that name
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:  # no room left, or no right to write any more
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}; what was saved before is unchanged", code=1)


def save_checkpoint(run_dir: Path, checkpoint: dict) -> None:
    """Write q_table.npz. checkpoint: numbers and lists of numbers."""
    buffer = io.BytesIO()
    np.savez(buffer, **checkpoint)
    write_file(run_dir / "q_table.npz", buffer.getvalue())


def load_checkpoint(run_dir: str | Path, num_states: int, num_actions: int) -> dict:
    """Read q_table.npz as plain numbers and lists. Runs no code from it."""
    path = Path(run_dir) / "q_table.npz"
    dimensions = {"global_step": 0, "episodes": 0, "wall_time_s": 0, "recent_returns": 1, "rng_state": 1}
    dimensions |= {"curve": 2, "q_table": 2, "visits": 2}
    checkpoint = {}
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("the file is damaged: its checksum is wrong")
        with np.load(path, allow_pickle=False) as file:
            for name, ndim in dimensions.items():
                values = file[name]
                if values.ndim != ndim or values.dtype.kind not in "if" or not np.isfinite(values).all():
                    raise ValueError(f"{name} does not hold the numbers it should")
                checkpoint[name] = values.tolist()
        for name in ("q_table", "visits"):
            if np.shape(checkpoint[name]) != (num_states, num_actions):
                needed = f"the environment needs {(num_states, num_actions)}"
                raise ValueError(f"{name} is {np.shape(checkpoint[name])}, {needed}")
        random.Random().setstate((3, tuple(checkpoint["rng_state"]), None))
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"cannot use {path}: {type(error).__name__} {error}")
    return checkpoint


def leave_at_once() -> None:
    """From now on Ctrl-C and SIGTERM end the process without a traceback: nothing is left to be saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def evaluate(args: Args, run_dir: Path) -> dict:
    """Play episodes with the policy in the run folder, print the summary, return what results.json holds.

    A greedy policy may walk in circles for ever; MAX_EVAL_STEPS ends its episode.
    """
    check_args(args)
    leave_at_once()
    env = make_env(args)
    policy, checkpoint = load_policy(args, env, run_dir)
    returns = []
    bar = tqdm(total=args.eval_episodes, desc="evaluation", unit=" episodes", leave=False, delay=2)
    for seed in start_seeds(args, args.eval_episodes):
        state, _ = env.reset(seed=seed)
        total = 0.0
        steps = 0
        ended = False
        while not ended and steps < MAX_EVAL_STEPS:
            state, reward, terminated, truncated, _ = env.step(policy(state))
            total += float(reward)
            ended = terminated or truncated
            steps += 1
        returns.append(total)
        bar.update()
    bar.close()
    env.close()
    if args.capture_video:
        record_video(args, policy, run_dir / "replay.mp4")
    mean = float(np.mean(returns))
    std = float(np.std(returns))
    steps = checkpoint["global_step"]
    seconds = checkpoint["wall_time_s"]
    speed = steps / max(seconds, 1e-9)
    print(
        f"{args.env_id}, seed {args.seed}: {mean:.2f} ± {std:.2f} over {len(returns)} episodes "
        f"after {steps:,} steps, {seconds:.1f} s, {speed:,.0f} steps/s: {run_dir}"
    )
    return {
        "algo": Path(__file__).stem,
        "env_id": args.env_id,
        "seed": args.seed,
        "global_step": steps,
        "episodes": checkpoint["episodes"],
        "mean_reward": mean,
        "std_reward": std,
        "score": mean - std,
        "eval_episodes": len(returns),
        "wall_time_s": seconds,
        "steps_per_second": speed,
    }


def record_video(args: Args, policy, path: Path) -> None:
    """Film one episode from the first evaluation seed, frame by frame: all at once would fill the memory."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter  # here, because it is slow to import

    env = make_env(args, render_mode="rgb_array")
    state, _ = env.reset(seed=start_seeds(args, 1)[0])
    frame = env.render()
    temporary = path.with_name("tmp-" + path.name)
    temporary.unlink(missing_ok=True)
    fps = env.metadata.get("render_fps", 30)
    with FFMPEG_VideoWriter(str(temporary), (frame.shape[1], frame.shape[0]), fps) as film:
        film.write_frame(frame)
        ended = False
        steps = 0
        while not ended and steps < MAX_EVAL_STEPS:
            state, _, terminated, truncated, _ = env.step(policy(state))
            film.write_frame(env.render())
            ended = terminated or truncated
            steps += 1
    env.close()
    os.replace(temporary, path)


def tiles_of(env: gym.Env) -> tuple[np.ndarray, str]:
    """The names of a map's tiles, (rows, columns), and the arrows of its actions; (0,) if there is no map."""
    game = env.unwrapped
    if type(game).__name__ == "FrozenLakeEnv":
        names = {"F": "", "S": "start", "H": "hole", "G": "goal"}
        return np.vectorize(names.get)(game.desc.astype(str)), "←↓→↑"
    if type(game).__name__ == "CliffWalkingEnv":
        tiles = np.where(game._cliff, "cliff", "")
        tiles[-1, 0] = "start"
        tiles[-1, -1] = "goal"
        return tiles, "↑→↓←"
    return np.empty(0), ""


def draw_policy(args: Args, run_dir: Path) -> None:
    """Draw what was learned as policy.png: the map with its arrows, or the table; and the learning curve."""
    from matplotlib.figure import Figure  # here, because it is slow to import

    env = make_env(args)
    checkpoint = load_checkpoint(run_dir, int(env.observation_space.n), int(env.action_space.n))
    q_table = np.array(checkpoint["q_table"])  # (|S|, |A|)
    tiles, arrows = tiles_of(env)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if tiles.size:
        values = q_table.max(1).reshape(tiles.shape)  # V(s) = max_a Q(s,a)
        image = left.imshow(values)
        for (row, column), tile in np.ndenumerate(tiles):
            best = q_table[row * tiles.shape[1] + column]
            arrow = "·" if best.max() == best.min() else arrows[best.argmax()]
            dark = values[row, column] < (values.min() + values.max()) / 2
            text = tile if tile in ("hole", "cliff", "goal") else f"{tile} {arrow}\n{best.max():.2f}".strip()
            style = {"color": "white" if dark else "black", "fontsize": 10 if tiles.shape[1] < 9 else 6}
            left.text(column, row, text, ha="center", va="center", **style)
        left.set(title="greedy actions and the largest value of each state", xticks=[], yticks=[])
    else:
        image = left.imshow(q_table, aspect="auto", interpolation="nearest")
        left.set(title="the table", xlabel="action", ylabel="state", xticks=range(q_table.shape[1]))
    figure.colorbar(image, ax=left)
    if checkpoint["curve"]:
        right.plot(*zip(*checkpoint["curve"], strict=True))
    right.set(title="learning curve", xlabel="episode", ylabel="mean episodic return")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_file(run_dir / "policy.png", buffer.getvalue())
    env.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C while there is nothing to save yet
    args = parse_args()
    if args.evaluate:
        evaluate(args, Path(args.evaluate))
    else:
        train(args)

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy==2.4.6",
#     "gymnasium[box2d,classic-control,mujoco,other,toy-text]==1.4.0",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "tqdm==4.70.1",
#     "moviepy==2.2.1",
#     "matplotlib==3.11.2",
# ]
# ///
