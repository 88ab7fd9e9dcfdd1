"""Deep Q-learning (DQN) on Atari: a network reads the screen and learns what every action is worth.

Q-learning with a network in place of a table chases its own tail: frames in a row are nearly the same, and
each correction moves the very values that it is computed from. Three stabilisers hold it: a replay memory
mixes old and new experience, a fixed Q-target (a copy of the network) stands still for a while, and in double
DQN one of the two chooses the next action while the other says what it is worth.

Pseudo-code
    repeat until the budget is spent:
        [A] act       one step in each of N environments, ε-greedily
        [B] remember  frames, actions, clipped rewards, endings
        [C] learn     one minibatch from the memory for every F steps; now and then renew the copy
        [D] log       charts, progress bar

Equations
    (1)  ε(t) = 1 + (ε_end − 1) min(1, max(0, t − t_0) / d)   1 until t_0, then falling for d steps
    (2)  a    = a random action with probability ε, else argmax_a Q(s, a)
    (3)  a*   = argmax_a Q(s', a)                             chosen by the network that learns, but
    (4)  y    = r + γ Q⁻(s', a*)                              valued by its copy; r after a termination
    (5)  L    = mean h(Q(s, a) − y)                           Huber: h(x) = ½ x² if |x| < 1, else |x|−½

Why not simply y = r + γ max_a Q⁻(s', a)? The maximum over noisy estimates picks what errs upwards, and the
next target is built on it. With (3) both networks must err alike on one action before y does.

Symbols: N num_envs, F train_frequency, B batch_size, A actions, C slots of the memory per environment;
s stack of 4 frames, a action, r reward, s' next stack, Q network, Q⁻ its copy, y target, γ gamma,
ε exploration, t step, t_0 learning_starts, d exploration_fraction × total_timesteps.
Departures from the paper: Adam for RMSprop, tricks 3, 6 and 7, N environments at once (F counts the steps of
all), a smaller memory and budget, a copy renewed every 250 minibatches instead of 10,000, ε_end 0.01 instead
of 0.1, and after a time limit, which is no failure, (4) goes on.
References: DQN https://www.nature.com/articles/nature14236, double DQN https://arxiv.org/abs/1509.06461,
how to play and report Atari games https://arxiv.org/abs/1709.06009

Read first: q_learning.py (the same equations with a table).
New here: a network in place of the table, the replay memory, the fixed target.
Run: python algos/dqn_atari.py --env-id ALE/SpaceInvaders-v5
     python algos/dqn_atari.py --env-id ALE/Pong-v5 --ortho-init --total-timesteps 800000 \\
         --learning-starts 10000 --learning-rate 2e-4
Expect: in Space Invaders a score of 707.5, 608.0 or 697.5 (seeds 1, 2, 3) after a million steps, 65 minutes
on one core of a CPU; random play has 150. In Pong 19.9 (seed 1) of at most 21 after 53 minutes.
"""

import difflib
import io
import json
import os
import re
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)

MAX_EVAL_STEPS = 27_000  # longest evaluation episode: half an hour of play, where the emulator stops too
EVAL_EPSILON = 0.01  # random moves in evaluation: a greedy policy may wait for ever, in Breakout to serve
STACK = 4  # frames in an observation: a single one shows no velocities
LOG_EVERY = 1000  # steps between two points of the charts
SPARE_MEMORY = 2**30  # bytes that the replay memory leaves to all else
NUM_THREADS = torch.get_num_threads()  # as many as PyTorch would take


def has_bf16() -> bool:
    """Whether this machine computes in bfloat16 natively; emulated, it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "ALE/SpaceInvaders-v5"  # Atari game; SpaceInvadersNoFrameskip-v4 is the same
    num_envs: int = 8  # N, environments stepped together
    sticky_actions: float = 0.0  # how often the game repeats the last action instead; 0.25 is usual
    # algorithm
    total_timesteps: int = 1_000_000  # budget: steps of all environments together, 4 frames each
    learning_rate: float = 1e-4  # Adam's step size
    buffer_size: int = 100_000  # [Trick 1] transitions in the replay memory
    learning_starts: int = 100_000  # t_0, random steps before learning; --resume refills with as many
    batch_size: int = 32  # B, transitions per gradient step
    train_frequency: int = 4  # F, environment steps per gradient step
    gamma: float = 0.99  # γ, what a reward one step later is worth
    target_network_frequency: int = 1000  # [Trick 2] steps between two copies of the network
    double_q: bool = True  # [Trick 3] the network that learns chooses what its copy values
    clip_rewards: bool = True  # [Trick 4] learn from the sign of the reward
    episodic_life: bool = True  # [Trick 5] learn that nothing follows a lost life
    exploration_fraction: float = 0.1  # part of the budget over which ε falls
    end_e: float = 0.01  # ε_end, exploration that stays
    bf16: bool = has_bf16()  # [Trick 6] compute in bfloat16; on where the machine can
    ortho_init: bool = False  # [Trick 7] orthogonal initial weights; Pong needs them
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = torch.cuda.is_available()  # on where there is one
    eval_episodes: int = 10  # episodes played after training, greedy but for one move in a hundred
    checkpoint_every: int = 20_000  # steps that a killed run loses at most
    run_dir: str | None = None  # folder of the run; by default runs/ENV__dqn_atari__seedS__TIME
    resume: str | None = None  # go on with the run in this folder
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there


class AtariEnvs(RecordEpisodeStatistics):
    """Gives the emulators what Gymnasium's other vector environments have: a list of seeds, and pictures."""

    def __init__(self, envs: gym.vector.VectorEnv, twins: gym.vector.VectorEnv | None) -> None:
        super().__init__(envs)
        self.twins = twins  # they play the same games in colour and full size, to be filmed
        self.metadata = envs.metadata | {"render_fps": 15}  # 60 frames per second, 4 per step

    def reset(self, *, seed=None, options=None):
        seed = None if seed is None else np.array(seed) >> 1  # the emulator's seeds have 31 bits
        self.pictures = self.twins.reset(seed=seed)[0] if self.twins else None
        return super().reset(seed=seed, options=options)

    def step(self, actions: np.ndarray):
        self.pictures = self.twins.step(actions)[0] if self.twins else None
        return super().step(actions)

    def render(self) -> np.ndarray:
        return self.pictures[:, 0]  # (N, 1, 210, 160, 3) -> (N, 210, 160, 3)


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """N Atari games: 4 frames a step, of which one sees the brighter of the last two, grey, 84 × 84.

    An episode is a whole game with its true rewards; up to 30 idle frames at its start make each another.
    SAME_STEP: what ends is reset at once, and info["final_obs"] keeps the observation before the reset.
    Exit code 2 for an unknown environment and for one that is no Atari game.
    """
    env_id = re.sub(r"^(ALE/)?(\w+?)(NoFrameskip|Deterministic)?-v[045]$", r"ALE/\2-v5", args.env_id)
    if not env_id.startswith("ALE/") or env_id not in gym.registry:
        try:
            env = gym.make(args.env_id)
        except (gym.error.Error, ImportError) as error:
            near = ", ".join(difflib.get_close_matches(args.env_id, gym.registry, cutoff=0.5)) or "none"
            fail(f"cannot make the environment {args.env_id} (nearest known names: {near}): {error}")
        obs_space, other = env.observation_space, "no script handles it"
        parts = obs_space if isinstance(obs_space, gym.spaces.Tuple) else [obs_space]
        if all(isinstance(part, gym.spaces.Discrete) for part in parts):
            other = "its integer states are for q_learning.py"
        elif isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1:
            continuous = isinstance(env.action_space, gym.spaces.Box)
            other = f"its vectors are for {'a2c_continuous.py' if continuous else 'ppo.py'}"
        fail(f"{args.env_id} is no Atari game, and this script plays nothing else: {other}")
    # Lives are watched in info["lives"]: the emulator's own signal would look like the end of the game.
    options = {"reward_clipping": False, "repeat_action_probability": args.sticky_actions}
    options |= {"autoreset_mode": AutoresetMode.SAME_STEP, "num_envs": num_envs}
    colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    make = partial(gym.make_vec, env_id, vectorization_mode="vector_entry_point", **options)
    return AtariEnvs(make(stack_num=STACK), make(**colour) if render_mode else None)


class Agent(nn.Module):
    """The network of the paper: three convolutions and a layer of 512. Bytes (B, 4, 84, 84) -> (B, A)."""

    def __init__(self, num_actions: int, bf16: bool, ortho_init: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.first = nn.Conv2d(STACK, 32, 8, stride=4)  # (B, 4, 84, 84) -> (B, 32, 20, 20)
        self.rest = nn.Sequential(
            *(nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2)),  # -> (B, 64, 9, 9)
            *(nn.ReLU(), nn.Conv2d(64, 64, 3)),  # -> (B, 64, 7, 7)
            *(nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU()),
        )
        self.head = nn.Linear(512, num_actions)  # (B, 512) -> (B, A)
        if ortho_init:
            # [Trick 7] One scale from layer to layer, as in ppo.py, and values that start at 0. With smaller
            # weights, PyTorch's own, the ball on Pong's bright ground fades from layer to layer; before it is
            # seen, learning from lost points kills the units. Off: Space Invaders, on dark ground, ended at
            # 274.5 with it (seed 1 only), at 608.0 to 707.5 without. Try: --ortho-init
            for layer in (self.first, *self.rest, self.head):
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    nn.init.orthogonal_(layer.weight, 0.01 if layer is self.head else 2**0.5)
                    nn.init.zeros_(layer.bias)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        # Convolutions are fastest with channels last, and bytes are the cheapest to rearrange.
        x = frames.contiguous(memory_format=torch.channels_last)
        # [Trick 6] Features need two or three digits only; sums and weights keep theirs
        # (https://arxiv.org/abs/1905.12322). Ablate: --no-bf16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = x.to(torch.bfloat16 if self.bf16 else torch.float32)
            # Bytes to 0 … 1: dividing 8,192 weights is cheaper than 28,224 bytes of every stack.
            x = F.conv2d(x, self.first.weight / 255, self.first.bias, stride=4)
            x = self.rest(x)
        # Not so the values: a bfloat16 near 2 is followed by 2.016, and actions in Pong differ by 0.001.
        return self.head(x.float())


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    torch.set_num_threads(NUM_THREADS)  # setup_torch chose one; convolutions gain from every core
    agent = Agent(int(envs.single_action_space.n), args.bf16, args.ortho_init)
    return agent.to(device, memory_format=torch.channels_last)


class ReplayMemory:
    """[Trick 1] Minibatches drawn from long ago and just now hold more than neighbours in time (the paper).

    Ablate: --buffer-size 32, which leaves the last 8 of each of 8 environments. Each has a ring of C slots,
    one frame in each; stacks are rebuilt at sampling: an eighth of the memory that two stacks of 4 would
    take. A game begins with the 4 frames of its first stack and closes with the one before the reset: no
    stack needs those of another game.

        slot         0   1   2   3   4   5   6   7   8   9  10  11
        frame        ·   ·   ·  s0  s1  s2  s3   ·   ·   ·  s0  s1     s3 ended the first game
        can be drawn             x   x   x                   x         its step is done, its stacks are whole

    A transition in slot i goes from the stack i−3 … i to the stack i−2 … i+1.
    """

    def __init__(self, buffer_size: int, num_envs: int) -> None:
        # 8 more: the past of the oldest stack, the newest successor, the first frames of the next game.
        self.num_envs, self.num_slots = num_envs, -(-buffer_size // num_envs) + 2 * STACK
        size, slot_bytes = num_envs * self.num_slots, 84 * 84 + 1 + 4 + 1 + 1
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - SPARE_MEMORY
        if size * slot_bytes > available:
            largest = available // slot_bytes - (2 * STACK + 1) * num_envs
            needed = f"{size * slot_bytes / 1e9:,.1f} GB of replay memory are more than there is"
            fail(f"{needed}: the largest --buffer-size that fits is {max(largest, 0)}")
        print(f"replay memory: {size * slot_bytes / 1e9:.2f} GB", file=sys.stderr)
        # Slot c of environment n is row c N + n: what came before a row stands N rows above it.
        self.frames = np.empty((size, 84, 84), dtype=np.uint8)
        self.actions, self.rewards = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.float32)
        self.terminated, self.valid = np.zeros((2, size), dtype=bool)  # valid: can be drawn
        self.written = np.zeros(num_envs, dtype=np.int64)  # frames that each ring has been given

    def _row(self, envs: np.ndarray, ahead: int) -> np.ndarray:
        return (self.written[envs] + ahead) % self.num_slots * self.num_envs + envs

    def _push(self, envs: np.ndarray, frames: np.ndarray) -> None:
        self.frames[self._row(envs, 0)] = frames
        self.valid[self._row(envs, STACK - 1)] = False  # the oldest stack loses its first frame
        self.written[envs] += 1

    def start(self, envs: np.ndarray, obs: np.ndarray) -> None:
        """New games. envs: (n,) indices, obs: (n, 4, 84, 84), their first observations."""
        for k in range(STACK):
            self._push(envs, obs[:, k])

    def add(self, actions, rewards, terminated, next_obs) -> None:
        """A step of every environment. All (N,), next_obs (N, 4, 84, 84) from before any reset."""
        envs = np.arange(self.num_envs)
        row = self._row(envs, -1)
        self.actions[row], self.rewards[row], self.terminated[row] = actions, rewards, terminated
        self.valid[row] = True
        self._push(envs, next_obs[:, -1])

    def sample(self, batch_size: int):
        """B transitions, all equally likely: frames (B, 5, 84, 84) bytes, stack and successor overlapping,
        actions (B,) int64, rewards (B,) float32, terminated (B,) bool."""
        rows = np.empty(0, dtype=np.int64)
        begun = min(self.written.max(), self.num_slots) * self.num_envs  # rows
        while len(rows) < batch_size:
            drawn = torch.randint(begun, (2 * batch_size,)).numpy()
            rows = np.append(rows, drawn[self.valid[drawn]])
        rows = rows[:batch_size]
        around = rows[:, None] + self.num_envs * np.arange(1 - STACK, 2)  # (B, 5)
        frames = self.frames[around % len(self.frames)]
        return frames, self.actions[rows].astype(np.int64), self.rewards[rows], self.terminated[rows]


def epsilon(step, start, duration, end):
    """Probability of a random action, equation (1). `end` is a probability, all else are steps."""
    return 1 + (end - 1) * min(1.0, max(0, step - start) / max(duration, 1))  # (1)


def td_target(rewards, terminated, target_q, q, gamma):
    """What Q(s, a) should be, equations (3) and (4); https://arxiv.org/abs/1509.06461, equation 4.

    rewards: (B,) float, terminated: (B,) bool, target_q, q: (B, A), the values of s' by the copy and by the
    network that learns, or None for plain DQN, where the copy chooses too. Returns (B,), in units of reward.
    """
    # [Trick 3] Who chooses does not also value (https://arxiv.org/abs/1509.06461). Ablate: --no-double-q
    best = (target_q if q is None else q).argmax(1, keepdim=True)  # (B, 1), (3)
    next_value = target_q.gather(1, best).squeeze(1)  # (B, 1) -> (B,)
    # A time limit is no failure: only `terminated` means "worth nothing from here".
    return rewards + gamma * next_value.masked_fill(terminated, 0.0)  # (4)


def q_loss(q, actions, targets):
    """Huber loss of the actions taken, equation (5). q: (B, A), actions: (B,) integers, targets: (B,)."""
    # Beyond an error of 1 the gradient stays the same: one surprise must not throw the network off.
    return F.smooth_l1_loss(q.gather(1, actions[:, None]).squeeze(1), targets)  # (5)


# What follows down to `train` keeps the promises about run folders. All but `load_policy` has one text in all
# scripts that use PyTorch: a first reading may skip it.


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


def setup_torch(args: Args) -> torch.device:
    """Seed PyTorch and choose the device."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sharing out work this small takes longer than doing it
    # The momentum of units that are not used fades to numbers so small that processors slow down over them.
    torch.set_flush_denormal(True)
    if args.cuda and not torch.cuda.is_available():
        print("no CUDA device found: the CPU is used")
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def start_run(args: Args, global_step: int) -> tuple[Path, SummaryWriter]:
    """Make the run folder with args.json; open TensorBoard and, with --track, Weights & Biases."""
    name = f"{args.env_id}__{Path(__file__).stem}__seed{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
    if not args.resume and any((run_dir / name).exists() for name in ("checkpoint.pt", "q_table.npz")):
        fail(f"{run_dir} holds a run already: --resume {run_dir} goes on with it")
    versions = {package: version(package) for package in ("torch", "gymnasium", "numpy")}
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
    return run_dir, SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name and move into place, so that no crash leaves half a file."""
    temporary = path.with_name("tmp-" + path.name)
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_checkpoint(run_dir: Path, checkpoint: dict) -> None:
    """Write checkpoint.pt. checkpoint: tensors and plain types only."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(run_dir / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(run_dir: str | Path, **parts) -> dict:
    """Read checkpoint.pt, put saved states into the parts (agent, …), return all. Runs no code from it."""
    path = Path(run_dir) / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"cannot use {path}: {type(error).__name__} {error}")
    return checkpoint


def load_policy(args: Args, envs: gym.vector.VectorEnv, run_dir: Path, device: torch.device):
    """The policy of a run, a function of observations (N, 4, 84, 84) to actions (N,), and its checkpoint.

    Greedy but for EVAL_EPSILON, whose seed is fixed: the same folder gives the same score again.
    """
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)
    rng, num_actions = np.random.default_rng(args.seed), int(envs.single_action_space.n)

    @torch.inference_mode()
    def policy(obs: np.ndarray) -> np.ndarray:
        greedy = agent(torch.from_numpy(obs).to(device)).argmax(-1).cpu().numpy()
        explore, random = rng.random(len(obs)) < EVAL_EPSILON, rng.integers(num_actions, size=len(obs))
        return np.where(explore, random, greedy)

    return policy, checkpoint


def evaluate(args: Args, run_dir: Path, device: torch.device) -> dict:
    """Play episodes with the policy in the run folder, print the summary, return what results.json holds.

    Each environment plays one episode a round and waits for the others: to take the first episodes that end
    would favour short ones. A greedy policy may walk in circles for ever; MAX_EVAL_STEPS ends its episode.
    """
    envs = make_envs(args, min(args.eval_episodes, 20))
    policy, checkpoint = load_policy(args, envs, run_dir, device)
    returns = np.zeros(0)
    while len(returns) < args.eval_episodes:
        obs, _ = envs.reset(seed=env_seeds(envs.num_envs, args.seed, 1, len(returns)))
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
    obs, _ = envs.reset(seed=env_seeds(1, args.seed, 1, 0))
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


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    sizes = (args.num_envs, args.batch_size, args.train_frequency, args.target_network_frequency)
    if min(*sizes, args.checkpoint_every, args.eval_episodes) < 1 or args.seed < 0:
        fail("every size, number and interval must be at least 1, the seed at least 0")
    if not all(0 <= x <= 1 for x in (args.exploration_fraction, args.end_e, args.sticky_actions)):
        fail("--exploration-fraction, --end-e and --sticky-actions lie between 0 and 1")
    if args.buffer_size < args.batch_size:
        fail(f"--buffer-size {args.buffer_size} is less than one batch of {args.batch_size}")
    if not args.num_envs <= args.learning_starts < args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} is no step between {args.num_envs} and the end")
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    memory = ReplayMemory(args.buffer_size, args.num_envs)
    agent = make_agent(args, envs, device)
    # [Trick 2] Fixed Q-target: each correction moves the values of neighbouring states too; if those were its
    # own goal, it would run after itself (the paper). Ablate: --target-network-frequency 1
    target = make_agent(args, envs, device).requires_grad_(False)
    # No small steps add up in a copy: half the digits will do.
    target.rest.to(torch.bfloat16 if args.bf16 else torch.float32)
    target.load_state_dict(agent.state_dict())
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    global_step, episodes, wall_time_s, recent_returns = 0, 0, 0.0, deque(maxlen=100)
    refill = 0  # steps that a resumed run still needs before its memory is as it was
    if args.resume:
        saved = load_checkpoint(Path(args.resume), agent=agent, target=target, optimizer=optimizer)
        global_step, episodes, wall_time_s = saved["global_step"], saved["episodes"], saved["wall_time_s"]
        recent_returns.extend(saved["recent_returns"])
        torch.set_rng_state(saved["rng_state"])
        # The memory is too large for a checkpoint: the policy as it is fills it again before the run goes on.
        refill = min(global_step, args.learning_starts)
        print(f"the replay memory is filled again: {refill:,} steps, not part of the budget", file=sys.stderr)
    interrupted = []  # filled by Ctrl-C, so that the loop ends where everything can be saved
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    run_dir, writer = start_run(args, global_step)

    N, num_actions, everyone = args.num_envs, int(envs.single_action_space.n), np.arange(args.num_envs)
    # Environments cannot be saved: a resumed run starts new episodes from new seeds.
    obs, info = envs.reset(seed=env_seeds(N, args.seed, 0, global_step))
    memory.start(everyone, obs)
    lives, returns, lengths = info["lives"], [], []  # the last two of the episodes since the last log
    # Sums of loss, Q and 1 over all minibatches, and their last logged state; on the device, for reading a
    # number from there would make Python wait.
    sums, logged_sums = torch.zeros(2, 3, dtype=torch.float64, device=device)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True)
    saved_step, logged_step = -args.checkpoint_every, global_step
    started = time.perf_counter() - wall_time_s
    while True:
        finished = global_step + N > args.total_timesteps
        # One more step without saving, and a kill would cost more than checkpoint_every steps.
        saving = finished or interrupted or global_step + N > saved_step + args.checkpoint_every
        if (saving or global_step == logged_step) and not torch.isfinite(sums).all():
            bar.close()
            fail(f"the loss is {sums[0].item()} at step {global_step}; the last checkpoint is good", code=1)
        if saving:
            wall_time_s = time.perf_counter() - started
            state = {"global_step": global_step, "episodes": episodes, "wall_time_s": wall_time_s}
            state |= {"recent_returns": list(recent_returns), "rng_state": torch.get_rng_state()}
            state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            # In float32 the copy loses nothing, and a run can go on with or without bfloat16.
            state["target"] = {name: weight.float() for name, weight in target.state_dict().items()}
            save_checkpoint(run_dir, state)
            writer.flush()
            saved_step = global_step
        if finished or interrupted:
            break

        # [A] act
        duration = args.exploration_fraction * args.total_timesteps
        exploration = epsilon(global_step, args.learning_starts, duration, args.end_e)  # (1)
        explore, actions = (torch.rand(N) < exploration).numpy(), torch.randint(num_actions, (N,)).numpy()
        if not explore.all():
            with torch.inference_mode():
                greedy = agent(torch.from_numpy(obs).to(device)).argmax(-1).cpu().numpy()  # (N, A) -> (N,)
            actions = np.where(explore, actions, greedy)  # (2)
        obs, rewards, terminated, truncated, info = envs.step(actions)
        last_step = global_step
        if refill > 0:
            refill -= N
        else:
            global_step += N

        # [B] remember
        # [Trick 4] One step size fits games of all scores (the paper). Ablate: --no-clip-rewards
        learned_rewards = np.sign(rewards) if args.clip_rewards else rewards
        # [Trick 5] For the learner a lost life is the end, though not for the game: what comes after cannot
        # make up for it (the paper's code). Ablate: --no-episodic-life
        ended, next_obs = terminated | truncated, obs
        life_lost = (info["lives"] < lives) & ~ended & args.episodic_life
        lives = info["lives"]
        if ended.any():  # then obs is the first of the next episode already
            next_obs = np.where(ended[:, None, None, None], info["final_obs"], obs)
            returns.extend(info["episode"]["r"][ended].tolist())
            lengths.extend(info["episode"]["l"][ended].tolist())
            recent_returns.extend(info["episode"]["r"][ended].tolist())
            episodes += int(ended.sum())
        memory.add(actions, learned_rewards, terminated | life_lost, next_obs)
        memory.start(everyone[ended], obs[ended])

        # [C] learn
        updates = range(last_step // args.train_frequency, global_step // args.train_frequency)
        for update in updates if global_step > args.learning_starts else ():
            batch = [torch.from_numpy(x) for x in memory.sample(args.batch_size)]
            if device.type == "cuda":  # from pinned memory the copy runs while Python goes on
                batch = [x.pin_memory().to(device, non_blocking=True) for x in batch]
            frames, b_actions, b_rewards, b_terminated = batch
            with torch.no_grad():
                next_q = agent(frames[:, 1:]) if args.double_q else None  # (B, 4, 84, 84) -> (B, A)
                y = td_target(b_rewards, b_terminated, target(frames[:, 1:]), next_q, args.gamma)
            q = agent(frames[:, :-1])
            loss = q_loss(q, b_actions, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.stack((loss.detach(), q.detach().mean(), torch.ones_like(loss)))
            if (update + 1) * args.train_frequency % args.target_network_frequency < args.train_frequency:
                target.load_state_dict(agent.state_dict())

        # [D] log: means since the last point
        if global_step >= logged_step + LOG_EVERY or global_step + N > args.total_timesteps:
            if returns:
                writer.add_scalar("charts/episodic_return", np.mean(returns), global_step)
                writer.add_scalar("charts/episodic_length", np.mean(lengths), global_step)
                bar.set_postfix_str(f"return {np.mean(recent_returns):.1f}", refresh=False)
                returns, lengths = [], []
            writer.add_scalar("charts/SPS", global_step / (time.perf_counter() - started), global_step)
            writer.add_scalar("charts/epsilon", exploration, global_step)
            loss_sum, q_sum, count = (sums - logged_sums).tolist()
            if count:
                writer.add_scalar("losses/td_loss", loss_sum / count, global_step)
                writer.add_scalar("losses/q_values", q_sum / count, global_step)
            logged_sums.copy_(sums)
            bar.update(global_step - logged_step)
            logged_step = global_step

    bar.close()
    writer.close()
    envs.close()
    if interrupted:
        print(f"interrupted and saved, go on with --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # all is saved, Ctrl-C may stop at once
    results = evaluate(args, run_dir, device)
    write_file(run_dir / "results.json", json.dumps(results, indent=2).encode())
    if args.track:
        import wandb

        if args.capture_video:
            wandb.log({"replay": wandb.Video(str(run_dir / "replay.mp4"))})
        wandb.finish()
    return results


if __name__ == "__main__":
    args = parse_args()
    evaluate(args, Path(args.evaluate), setup_torch(args)) if args.evaluate else train(args)
