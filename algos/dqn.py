r"""Deep Q-learning (DQN): a network in place of the table learns what every action is worth.

Q-learning with a network in place of a table chases its own tail: steps in a row are nearly the same, and
each correction moves the very values that it is computed from. Three stabilisers hold it: a replay memory
mixes old and new experience; a fixed Q-target, a copy of the network that stands still or nearly so; and in
double DQN one of the two networks chooses the next action while the other says what it is worth.

Why a network? A table has a number for every state and says nothing about states that it has not met. A state
of CartPole is four real numbers: hardly any is met twice. Cut into 50 intervals each, they would make a table
of 2 × 6.25 million entries; neighbours would learn nothing from each other. A network computes Q(s, a) from
17,410 weights θ instead, and moves them along a gradient: θ ← θ + α (y − Q(s, a)) ∇Q(s, a). That moves the
values of all states that look alike. So a network generalises, and for the same reason a correction in one
place spoils values elsewhere that were right: hence the stabilisers, which no table needs.

Pseudo-code
    repeat until the budget is spent:
        [A] act       one step in each of N environments, ε-greedily
        [B] remember  transitions: (s, a, r, s', terminated)
        [C] learn     after every F steps M minibatches from the memory; the copy follows slowly
        [D] log       charts, progress bar

Equations
    (1)  ε(t) = 1 + (ε_end − 1) min(1, max(0, t − t_0) / d)   1 until t_0, then falling for d steps
    (2)  a    = a random action with probability ε, else argmax_a Q(s, a), the greedy one
    (3)  a*   = argmax_a Q(s', a)                             chosen by the network that learns, but
    (4)  y    = r + γ Q⁻(s', a*)                              valued by its copy; r after a termination
    (5)  L    = mean (Q(s, a) − y)²                           over B transitions drawn; y has no gradient
    (6)  θ⁻   ← θ⁻ + τ (θ − θ⁻)                               the weights of the copy follow
    (7)  mean ← mean + w Δ,   var ← (1−w) var + w var_new + w (1−w) Δ²,   Δ = mean_new − mean
         running statistics of all s so far, for (s − mean) / √var within ±10. new: of a batch; w: its share

Why not simply y = r + γ max_a Q⁻(s', a)? The largest of noisy estimates is mostly one that is too high, and
the next target is built on it. With (3), y is too high only if the copy overrates the action that Q chose.

Why not the paper's Huber loss? For errors |x| > 1 it is |x| − ½, and its gradient has one size for all of
them. The values of CartPole are around 100. A fall is then an error of 100, and the many steps that went well
have errors of 2 or 3: with Huber each of them counts as much as a fall. The falls are outvoted, and the
values climb past all bounds. The square lets a fall weigh what it costs. In dqn_atari.py rewards are clipped,
values and errors are small, and both losses do nearly the same. Try it here: --huber-loss

Symbols
    s, a, r  observation, action, reward           N, B      num_envs, batch_size
    s'       the observation the step led to       F, M      train_frequency, gradient_steps
    Q        network: the expected return,         C, D      buffer_size, size of an observation
             r + γ r' + γ² r'' + …, of a in s      |A|       number of actions
    θ, Q⁻    weights of Q, copy of the network     d         exploration_fraction × total_timesteps
    θ⁻, τ    weights of Q⁻, tau                    t, t_0    step, learning_starts
    y, L     target of Q, loss                     ε, ε_end  exploration, end_e
    γ, α     gamma, learning_rate
Departures from the paper: vectors for images, Adam for RMSprop, the square (5) for Huber's loss, a copy that
follows slowly, tricks 3 to 6, N environments at once (F counts the steps of all), learning in phases, smaller
networks and budgets, more exploration at the end, and after a time limit (4) goes on: more could follow.
References: DQN https://www.nature.com/articles/nature14236, double DQN https://arxiv.org/abs/1509.06461,
replay memory https://doi.org/10.1007/BF00992699; for (7) see RunningNorm, below `train`.

Read first: q_learning.py (the same equations with a table).
New here: a network in place of the table, the replay memory, the fixed target.
Run: python algos/dqn.py
     python algos/dqn.py --env-id LunarLander-v3 --total-timesteps 400000 --gamma 0.99 --initial-value 0 \
         --learning-rate 1e-3 --end-e 0.05 --buffer-size 100000 --batch-size 128 --gradient-steps 2
     python algos/dqn.py --env-id Acrobot-v1 --total-timesteps 200000 --gamma 0.99 --initial-value 0 \
         --learning-rate 1e-3 --end-e 0.05 --exploration-fraction 0.2 --buffer-size 50000
Expect: CartPole 500, the most, in two minutes; 3 of 84 other seeds leave the track at 403, 316 and 131.
LunarLander 271.32, 244.54, 261.70 (seeds 1, 2, 3), 11 to 15 minutes. Acrobot −77.24, −79.71, −77.45.
MountainCar with the flags in tests/benchmark/RESULTS.md −200.00 (goal found too late), −100.48, −99.34.
"""

import difflib
import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from collections import deque
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, NoReturn

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_EVERY = 1000  # steps between two points of the charts


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "CartPole-v1"  # vector observations, discrete actions; module:id imports the module first
    num_envs: int = 8  # N, environments stepped together
    # algorithm
    total_timesteps: int = 50_000  # budget: steps of all environments together
    hidden_sizes: list[int] = field(default_factory=lambda: [128, 128])  # units of each hidden layer
    learning_rate: float = 2e-3  # Adam's step size
    buffer_size: int = 10_000  # [Trick 1] transitions in the replay memory
    learning_starts: int = 1000  # t_0, random steps before learning
    batch_size: int = 64  # B, transitions per minibatch
    train_frequency: int = 8  # F, steps between two phases of learning
    gradient_steps: int = 3  # M, minibatches in such a phase
    gamma: float = 0.995  # γ, what a reward one step later is worth
    target_network_frequency: int = 1  # [Trick 2] steps between renewals of the copy; at most one a minibatch
    tau: float = 0.02  # τ, share of the network that enters the copy then; 1: all of it
    double_q: bool = True  # [Trick 3] the network that learns chooses what its copy values
    initial_value: float = 100.0  # [Trick 4] Q before anything is learned
    norm_obs: bool = True  # [Trick 5] observations shifted and scaled to mean 0, deviation 1
    anneal_lr: bool = True  # [Trick 6] learning rate falls linearly to 0
    huber_loss: bool = False  # Huber's loss in place of (5), as in the paper
    exploration_fraction: float = 0.1  # part of the budget over which ε falls
    end_e: float = 0.2  # ε_end, exploration that stays
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = False  # use the GPU; off, because the CPU is faster for a network this small
    eval_episodes: int = 100  # greedy episodes played after training
    checkpoint_every: int = 20_000  # save at least every this many steps
    run_dir: str | None = None  # folder of the run; by default runs/ENV__dqn__seedS__TIME
    resume: str | None = None  # go on with the run in this folder; schedules follow the budget given now
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """N environments, stepped in turn in this process: for cheap physics faster than processes.

    SAME_STEP: what ends is reset at once, and info["final_obs"] keeps the observation before the reset.
    """
    # For a video NEXT_STEP: the picture drawn after an episode's last step must not show the next episode.
    mode = AutoresetMode.SAME_STEP if render_mode is None else AutoresetMode.NEXT_STEP
    options = {"autoreset_mode": mode}
    envs = gym.make_vec(args.env_id, num_envs, "sync", vector_kwargs=options, render_mode=render_mode)
    return RecordEpisodeStatistics(envs)


class Agent(nn.Module):
    """The Q-network: hidden layers of ReLU units, then one value for each action."""

    def __init__(self, obs_dim: int, num_actions: int, args: Args) -> None:
        super().__init__()
        # [Trick 5] CartPole's angle stays within 0.2 while its speeds reach 3: from raw numbers a network
        # hardly sees the angle at first, though it reaches 500 in the end. Ablate: --no-norm-obs
        limit = 10.0 if args.norm_obs else math.inf  # without updates norm_obs leaves x as it is
        self.norm_obs = RunningNorm(obs_dim, limit=limit)  # (7), defined below
        layers = []
        inputs = obs_dim
        for units in args.hidden_sizes:
            layers += [nn.Linear(inputs, units), nn.ReLU()]
            inputs = units
        self.network = nn.Sequential(*layers, nn.Linear(inputs, num_actions))
        # [Trick 4] Start near the values to come. From 0 they climb for long, and each step of the climb
        # pushes all units up. Units that are on for every observation make the network nearly linear, and a
        # linear function can hardly tell a safe state from a falling one. Ablate: --initial-value 0
        self.network[-1].bias.data += args.initial_value

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Observations (B, D) -> values of all actions (B, |A|)."""
        return self.network(self.norm_obs(obs))


class ReplayMemory(nn.Module):
    """[Trick 1] The last C transitions, to be learned in any order and many times over (the paper).

    Neighbours in time are nearly alike; minibatches drawn from long ago and just now hold more. Experience is
    used again: each transition about M B / F = 24 times. And what the policy no longer meets stays in the
    mix: a network that sees only what is new forgets the rest. Ablate: --buffer-size 64, which leaves the
    last 8 of each of 8 environments.

    A row is a transition, (s, a, r, s', terminated). A full memory writes over its oldest rows.
    """

    def __init__(self, buffer_size: int, obs_dim: int) -> None:
        super().__init__()
        # Buffers of a module are in its state_dict, so in checkpoints; --resume would lose mere attributes.
        self.register_buffer("obs", torch.zeros(buffer_size, obs_dim))
        self.register_buffer("actions", torch.zeros(buffer_size, dtype=torch.int64))
        self.register_buffer("rewards", torch.zeros(buffer_size))
        self.register_buffer("next_obs", torch.zeros(buffer_size, obs_dim))
        self.register_buffer("terminated", torch.zeros(buffer_size, dtype=torch.bool))
        self.register_buffer("written", torch.tensor(0))  # transitions so far

    def add(self, obs, actions, rewards, next_obs, terminated) -> None:
        """A step of every environment: arrays (N,), observations (N, D), next_obs from before any reset."""
        device = self.written.device
        rows = (self.written + torch.arange(len(obs), device=device)) % len(self.obs)
        self.obs[rows] = torch.as_tensor(obs, dtype=torch.float32, device=device)
        self.actions[rows] = torch.as_tensor(actions, device=device)
        self.rewards[rows] = torch.as_tensor(rewards, dtype=torch.float32, device=device)
        self.next_obs[rows] = torch.as_tensor(next_obs, dtype=torch.float32, device=device)
        self.terminated[rows] = torch.as_tensor(terminated, device=device)
        self.written += len(obs)

    def sample(self, number: int, batch_size: int):
        """`number` minibatches of B rows, all rows equally likely, to loop over.

        Each is a tuple: obs (B, D), actions (B,), rewards (B,), next_obs (B, D), terminated (B,).
        """
        filled = min(int(self.written), len(self.obs))
        rows = torch.randint(filled, (number, batch_size)).to(self.written.device)
        arrays = (self.obs, self.actions, self.rewards, self.next_obs, self.terminated)
        return zip(*(array[rows] for array in arrays), strict=True)


def epsilon(step, start, duration, end):
    """Probability of a random action, equation (1). `end` is a probability, all else are steps."""
    return 1 + (end - 1) * min(1.0, max(0, step - start) / max(duration, 1))  # (1)


def td_target(rewards, terminated, target_q, choosing_q, gamma):
    """What Q(s, a) should be, equations (3) and (4); https://arxiv.org/abs/1509.06461, equation 4.

    rewards: (B,) float, terminated: (B,) bool. target_q: (B, |A|), values of s' by the copy. choosing_q:
    (B, |A|), values of s' by the network that chooses a*. Returns (B,), in units of reward.
    """
    best = choosing_q.argmax(1, keepdim=True)  # (B, 1), (3)
    next_value = target_q.gather(1, best).squeeze(1)  # (B, 1) -> (B,)
    # After a time limit more could follow: the next value counts. After `terminated` nothing follows.
    return rewards + gamma * next_value.masked_fill(terminated, 0.0)  # (4)


def td_loss(q, actions, targets, huber):
    """Mean squared error of the actions taken, equation (5), or Huber's loss.

    q: (B, |A|), actions: (B,) integers, targets: (B,). Returns a scalar.
    """
    error_of = nn.functional.smooth_l1_loss if huber else nn.functional.mse_loss
    return error_of(q.gather(1, actions[:, None]).squeeze(1), targets)  # (5)


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    check_args(args)  # if a setting or the environment cannot work, the script ends here and says why
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    agent = make_agent(args, envs, device)
    # [Trick 2] Fixed Q-target: each correction also moves the values of similar states. If y came from the
    # same network, it would move, too, and might stay out of reach. The paper's copy is renewed after many
    # steps (--target-network-frequency 1000 --tau 1). This one follows slowly: every y moves a little at a
    # time (https://arxiv.org/abs/1509.02971). Ablate: --tau 1 (copy = network)
    target = make_agent(args, envs, device).requires_grad_(False)
    target.load_state_dict(agent.state_dict())
    target.norm_obs = agent.norm_obs  # both see the same numbers
    weights = list(zip(target.parameters(), agent.parameters(), strict=True))  # of the copy and the network
    memory = ReplayMemory(args.buffer_size, agent.network[0].in_features).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    parts = {"agent": agent, "target": target, "memory": memory, "optimizer": optimizer}
    run = Run(args, budget=args.total_timesteps, **parts)  # --resume fills these in

    N = args.num_envs
    num_actions = agent.network[-1].out_features
    exploration_steps = args.exploration_fraction * args.total_timesteps  # d
    phases = max(run.step, args.learning_starts) // args.train_frequency  # those skipped up to t_0 count, too
    updates = phases * args.gradient_steps  # minibatches, counted likewise; so copy_every counts them, too
    copy_every = max(1, args.target_network_frequency * args.gradient_steps // args.train_frequency)
    logged_step = run.step
    loss = None
    # Environments cannot be saved: a resumed run starts new episodes. 0 marks the seeds of training.
    obs, _ = envs.reset(seed=env_seeds(N, args.seed, 0, run.step))
    while run.goes_on(N):
        # [A] act
        exploration = epsilon(run.step, args.learning_starts, exploration_steps, args.end_e)  # (1)
        explore = (torch.rand(N) < exploration).numpy()
        actions = torch.randint(num_actions, (N,)).numpy()
        if not explore.all():
            with torch.inference_mode():
                obs_tensor = torch.as_tensor(obs, dtype=torch.float32, device=device)
                greedy = agent(obs_tensor).argmax(-1).cpu().numpy()  # (N, |A|) -> (N,)
            actions = np.where(explore, actions, greedy)  # (2)
        current_obs, rewards, terminated, truncated, info = envs.step(actions)
        run.step += N

        # [B] remember
        next_obs = current_obs
        if "final_obs" in info:  # then current_obs is the first of the next episode already
            ended = info["_final_obs"]
            next_obs = current_obs.copy()
            next_obs[ended] = np.stack(info["final_obs"][ended])
            run.episodes_ended(info["episode"]["r"][ended], info["episode"]["l"][ended])
        memory.add(obs, actions, rewards, next_obs, terminated)
        if args.norm_obs:
            agent.norm_obs.update(torch.as_tensor(obs, dtype=torch.float32, device=device))  # (7)
        obs = current_obs

        # [C] learn: M minibatches for every F steps, however many steps one round of the environments makes
        learning_rate = args.learning_rate
        if args.anneal_lr:
            # [Trick 6] Ever smaller steps let the values settle. Ablate: --no-anneal-lr
            learning_rate *= 1 - (run.step - N) / args.total_timesteps
        optimizer.param_groups[0]["lr"] = learning_rate  # set each time: an lr_scheduler would be overruled
        due = run.step // args.train_frequency * args.gradient_steps  # minibatches by now
        batches = memory.sample(due - updates, args.batch_size) if due > updates else []
        for b_obs, b_actions, b_rewards, b_next_obs, b_terminated in batches:
            with torch.no_grad():  # y is a fixed number in (5): only Q(s, a) has a gradient
                target_q = target(b_next_obs)  # (B, |A|)
                # [Trick 3] The network that values should not also choose
                # (https://arxiv.org/abs/1509.06461). Ablate: --no-double-q
                choosing_q = agent(b_next_obs) if args.double_q else target_q
                y = td_target(b_rewards, b_terminated, target_q, choosing_q, args.gamma)
            q = agent(b_obs)  # (B, |A|)
            loss = td_loss(q, b_actions, y, args.huber_loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            if updates % copy_every == 0:
                with torch.no_grad():
                    for copied, learned in weights:
                        copied.lerp_(learned, args.tau)  # (6)

        # [D] log: losses are those of the last minibatch
        if run.step >= logged_step + LOG_EVERY or run.step + N > run.budget:
            run.log("charts", epsilon=exploration, learning_rate=learning_rate)
            if loss is not None:
                run.stop_if_not_finite(loss)
                run.log("losses", td_loss=loss, q_values=q.mean())
            logged_step = run.step
    envs.close()
    return run.finish(device)


# ---- From here on: the run folder (save, resume, evaluate, film). The same text in every script. ----
# Only what stands before `fail` is this script's own: what it refuses, and how it acts in an evaluation.


MAX_EVAL_STEPS = 30_000  # longest evaluation episode
RANGES = {  # smallest and largest value of every number in Args
    "num_envs": (1, 10_000),
    "total_timesteps": (1, 10**12),
    "hidden_sizes": (1, 100_000),
    "learning_rate": (0, 10),
    "buffer_size": (1, 10**12),
    "learning_starts": (0, 10**12),
    "batch_size": (1, 1_000_000),
    "train_frequency": (1, 10**12),
    "gradient_steps": (1, 1_000_000),
    "gamma": (0, 1),
    "initial_value": (-1e9, 1e9),
    "target_network_frequency": (1, 10**12),
    "tau": (0, 1),
    "exploration_fraction": (0, 1),
    "end_e": (0, 1),
    "seed": (0, 2**32 - 1),
    "eval_episodes": (1, 1_000_000),
    "checkpoint_every": (1, 10**12),
}


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    obs_dim = envs.single_observation_space.shape[0]
    num_actions = int(envs.single_action_space.n)
    return Agent(obs_dim, num_actions, args).to(device)


class RunningNorm(nn.Module):
    """Running mean and variance of all that `update` has seen, and the scaling by them.

    They are buffers, so they are in the checkpoint with the weights, and only training calls `update`: an
    evaluation sees the world as the end of training did. Without them, a trained policy is worth nothing.
    """

    def __init__(self, *shape: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        # float64: after millions of numbers, the next one must not vanish in rounding.
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape))  # the mean in float32
        self.register_buffer("scale", torch.ones(shape))  # 1 / √var

    @torch.no_grad()
    def update(self, batch: torch.Tensor) -> None:
        """Merge in a batch (B, *shape), each element with the weight of each before: Chan's formula,
        http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf, equation 2.1."""
        batch_var, batch_mean = torch.var_mean(batch.double(), 0, correction=0)  # (*shape)
        self.count += len(batch)
        weight = len(batch) / self.count
        delta = batch_mean - self.mean
        self.mean += weight * delta
        self.var += weight * (batch_var - self.var + (1 - weight) * delta**2)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *shape) -> (B, *shape) of mean 0, deviation 1; a constant that changes lands at ±limit."""
        return ((x - self.shift) * self.scale).clamp(-self.limit, self.limit)


def check_settings(args: Args) -> None:
    """Refuse settings that cannot work together."""
    if args.buffer_size < args.batch_size:
        fail(f"--buffer-size {args.buffer_size} is less than one batch of {args.batch_size}")
    if args.buffer_size < args.num_envs:
        fail(f"--buffer-size {args.buffer_size} is less than one step of {args.num_envs} environments")
    if args.num_envs > args.total_timesteps:
        fail(
            f"--total-timesteps {args.total_timesteps} is less than one step of {args.num_envs} environments"
        )
    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} is not before the end, {args.total_timesteps}")


def check_spaces(args: Args, envs: gym.vector.VectorEnv) -> None:
    """Refuse environments that this script cannot handle, and name the script that can."""
    obs_space = envs.single_observation_space
    action_space = envs.single_action_space
    parts = obs_space if isinstance(obs_space, gym.spaces.Tuple) else [obs_space]
    if all(isinstance(part, gym.spaces.Discrete) for part in parts):
        fail(f"{args.env_id} has integer states, this script reads vectors: use q_learning.py")
    if isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 1:
        fail(f"{args.env_id} has images, this script reads vectors: dqn_atari.py plays Atari games")
    if isinstance(action_space, gym.spaces.Box):
        fail(f"{args.env_id} has continuous actions: use a2c_continuous.py or ppo_continuous.py")
    discrete = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
    if not isinstance(obs_space, gym.spaces.Box) or not obs_space.shape or not discrete:
        fail(f"no script handles {args.env_id} with observations {obs_space} and actions {action_space}")
    row_bytes = 8 * obs_space.shape[0] + 8 + 4 + 1  # two observations, action, reward, terminated
    # A checkpoint is made in memory: the rows, the file's bytes, and these bytes joined.
    largest = psutil.virtual_memory().total // (4 * row_bytes)
    if args.buffer_size > largest and not args.evaluate:
        fail(f"the replay memory does not fit in this machine's: the largest --buffer-size is {largest}")


def load_policy(args: Args, envs: gym.vector.VectorEnv, run_dir: Path, device: torch.device):
    """The greedy policy of a run, observations (N, D) -> best actions (N,), and its checkpoint."""
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)
    agent.eval()  # dropout and batch normalisation, where you add them, must not act here

    @torch.inference_mode()
    def policy(obs: np.ndarray) -> np.ndarray:
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        return agent(obs).argmax(-1).cpu().numpy()

    return policy, checkpoint


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
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo films without a screen; read when imported
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # so does pygame, which draws Gymnasium's games
    try:
        envs = make_envs(args, 1)
    except Exception as error:  # environments and the packages behind them fail in many ways
        own = ["envs.pixelcopter:Pixelcopter-v0", "envs.pong:PongPLE-v0", "envs.pyramids:Pyramids-v0"]
        near = difflib.get_close_matches(str(args.env_id), [*gym.registry, *own], cutoff=0.5)
        reason = f"(nearest known names: {', '.join(near) or 'none'}): {type(error).__name__} {error}"
        fail(f"cannot make the environment {args.env_id} {reason}")
    check_spaces(args, envs)
    envs.close()
    if args.capture_video:  # it must not fail after hours of training
        try:
            envs = make_envs(args, 1, render_mode="rgb_array")
            envs.reset(seed=env_seeds(1, args.seed, 1, 0))
            if np.ndim(envs.render()[0]) != 3:
                raise ValueError("what it draws is no picture")
            envs.close()
        except Exception as error:  # no pictures, no graphics library: many ways again
            fail(f"--capture-video: cannot draw {args.env_id}: {type(error).__name__} {error}")


def setup_torch(args: Args) -> torch.device:
    """Seed PyTorch and choose the device. Draw random numbers from PyTorch only: just its state is saved."""
    torch.manual_seed(args.seed)
    # One thread unless the script has a flag: sharing out work this small takes longer than doing it.
    torch.set_num_threads(getattr(args, "num_threads", 1))
    # The momentum of units that are not used fades to numbers so small that processors slow down over them.
    torch.set_flush_denormal(True)
    if args.cuda and not torch.cuda.is_available():
        print("no CUDA device found: the CPU is used")
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def env_seeds(num_envs: int, *key: int) -> list[int]:
    """One seed per environment from any integers. With seed + i, neighbouring runs would share most seeds."""
    return np.random.SeedSequence(key).generate_state(num_envs).tolist()


class Run:
    """A training run and its folder: counters, clock, charts, progress bar, Ctrl-C and checkpoints.

    step, episodes: how many have been played. extra: what else the checkpoint shall hold, plain types and
    tensors by name. stopped: the signals that came, filled by Ctrl-C.
    """

    def __init__(self, args: Args, budget: int, unit: str = "steps", **parts) -> None:
        """budget: in `unit`, steps or episodes. parts: what has a state to save: agent, optimizer, …"""
        self.args = args
        self.budget = budget
        self.unit = unit
        self.parts = parts
        self.step = 0
        self.episodes = 0
        self.extra = {}
        self.recent_returns = deque(maxlen=100)
        self.returns = []  # of the episodes that ended since the last point of the charts
        self.lengths = []
        self.stopped = []
        seconds = 0.0
        if args.resume:
            flags = [dict(group) for group in parts["optimizer"].param_groups]
            saved = load_checkpoint(Path(args.resume), **parts)
            self.step = saved["global_step"]
            self.episodes = saved["episodes"]
            self.extra = saved["extra"]
            self.recent_returns.extend(saved["recent_returns"])
            seconds = saved["wall_time_s"]
            torch.set_rng_state(saved["rng_state"])
            for group, given in zip(parts["optimizer"].param_groups, flags, strict=True):
                group.update(given)  # the flags given now, like --learning-rate, count, not the saved ones
        # So that the loop ends where everything can be saved; clusters send SIGTERM.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.stopped.append(number))
        self.dir, self.lock = open_folder(args)
        # TensorBoard drops what a killed run logged beyond its last checkpoint: those steps come again.
        self.writer = SummaryWriter(self.dir, purge_step=self.step + 1 if args.resume else None)
        bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
        done = self.done()
        self.bar = tqdm(total=budget, initial=done, unit=unit, unit_scale=True, bar_format=bar_format)
        self.saved_at = -args.checkpoint_every
        self.started = time.perf_counter() - seconds

    def done(self) -> int:
        """How much of the budget is used."""
        return self.episodes if self.unit == "episodes" else self.step

    def goes_on(self, size: int) -> bool:
        """Whether the budget allows `size` more. Saves when that is due, and always before the end."""
        ends = bool(self.stopped) or self.done() + size > self.budget
        # Save if the next rollout would end more than checkpoint_every steps after the last checkpoint.
        if ends or self.done() + size > self.saved_at + self.args.checkpoint_every:
            self.save()
        return not ends

    def save(self) -> None:
        """Write checkpoint.pt: tensors and plain types only."""
        checkpoint = {
            "global_step": self.step,
            "episodes": self.episodes,
            "wall_time_s": time.perf_counter() - self.started,
            "recent_returns": list(self.recent_returns),
            "rng_state": torch.get_rng_state(),
            "extra": self.extra,
        }
        for name, part in self.parts.items():
            checkpoint[name] = part.state_dict()
        for weights in checkpoint["agent"].values():  # a NaN must not replace the last good checkpoint
            self.stop_if_not_finite(weights.sum())
        save_checkpoint(self.dir, checkpoint)
        self.writer.flush()
        self.saved_at = self.done()

    def episodes_ended(self, returns, lengths) -> None:
        """Count episodes that ended. returns: sums of their true rewards, lengths: in steps; both (n,)."""
        self.returns.extend(map(float, returns))
        self.lengths.extend(map(float, lengths))
        self.recent_returns.extend(map(float, returns))
        self.episodes += len(returns)

    def mean_return(self) -> float:
        """Of the last 100 episodes; below every number before so many have ended."""
        return float(np.mean(self.recent_returns)) if len(self.recent_returns) == 100 else -np.inf

    def stop(self) -> None:
        """End the loop as if the budget were spent."""
        self.budget = self.done()

    def stop_if_not_finite(self, value) -> None:
        """End with exit code 1 if a loss or a sum of weights is NaN or infinite."""
        value = torch.as_tensor(value).item()
        if not np.isfinite(value):
            self.bar.close()
            reason = f"the loss or a weight is {value} at step {self.step}"
            fail(f"{reason}; what was saved before is good", code=1)

    def log(self, group: str, **values) -> None:
        """One point of each chart. With "charts" go the episodes since the last point, the speed, the bar."""
        if group == "charts":
            speed = self.step / (time.perf_counter() - self.started)
            if self.returns:
                values["episodic_return"] = np.mean(self.returns)
                values["episodic_length"] = np.mean(self.lengths)
                self.returns.clear()
                self.lengths.clear()
            values["SPS"] = speed
            recent = f"return {np.mean(self.recent_returns):.2f}, " if self.recent_returns else ""
            self.bar.set_postfix_str(f"{recent}{speed:,.0f} steps/s", refresh=False)
            self.bar.update(self.done() - self.bar.n)
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", torch.as_tensor(value).item(), self.step)

    def finish(self, device: torch.device) -> dict:
        """Close everything; then evaluate and write results.json, or end here after Ctrl-C."""
        self.bar.close()
        self.writer.close()
        if self.stopped:
            print(f"interrupted and saved, go on with --resume {self.dir}", file=sys.stderr)
            raise SystemExit(128 + self.stopped[0])
        results = evaluate(self.args, self.dir, device)
        write_file(self.dir / "results.json", json.dumps(results, indent=2).encode())
        self.lock.close()
        if self.args.track:
            import wandb

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
    """Write checkpoint.pt. checkpoint: tensors and plain types only, no arrays."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    torch.load(buffer, map_location="cpu", weights_only=True)  # fails if unreadable: the last one stays
    write_file(run_dir / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(run_dir: str | Path, **parts) -> dict:
    """Read checkpoint.pt, put saved states into the parts (agent, …), return all. Runs no code from it."""
    path = Path(run_dir) / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as file:
            # torch.load looks at no checksum, and reads nonsense where one of these bits says "a folder".
            if file.testzip() or any(record.external_attr for record in file.infolist()):
                raise ValueError("the file is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            if name not in checkpoint:  # a shared run, without the state of its training
                raise ValueError(f"it has no {name}: it was saved for --evaluate, not for --resume")
            part.load_state_dict(checkpoint[name])
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"cannot use {path}: {type(error).__name__} {error}")
    return checkpoint


def evaluate(args: Args, run_dir: Path, device: torch.device) -> dict:
    """Play episodes with the policy in the run folder, print the summary, return what results.json holds.

    Each environment plays one episode a round and waits for the others: to take the first episodes that end
    would favour short ones. A greedy policy may walk in circles for ever; MAX_EVAL_STEPS ends its episode.
    A policy with a memory of its own would have to forget at each reset, here and in record_video, where N
    is 1: decision_transformer.py has one.
    """
    check_args(args)
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left to be saved
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    envs = make_envs(args, min(args.eval_episodes, 20))
    policy, checkpoint = load_policy(args, envs, run_dir, device)
    returns = np.zeros(0)
    bar = tqdm(total=args.eval_episodes, desc="evaluation", unit=" episodes", leave=False, delay=2)
    while len(returns) < args.eval_episodes:
        obs, _ = envs.reset(seed=env_seeds(envs.num_envs, args.seed, 1, len(returns)))
        totals = np.zeros(envs.num_envs)
        playing = np.ones(envs.num_envs, dtype=bool)
        steps = 0
        while playing.any() and steps < MAX_EVAL_STEPS:
            obs, rewards, terminated, truncated, _ = envs.step(policy(obs))
            totals += rewards * playing
            playing &= ~(terminated | truncated)
            steps += 1
            bar.set_postfix_str(f"step {steps:,}", refresh=False)
            bar.update(len(returns) + int((~playing).sum()) - bar.n)
        returns = np.append(returns, totals)
    bar.close()
    envs.close()
    if args.capture_video:
        record_video(args, policy, run_dir / "replay.mp4")
    returns = returns[: args.eval_episodes]
    mean = float(returns.mean())
    std = float(returns.std())
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

    envs = make_envs(args, 1, render_mode="rgb_array")
    for env in getattr(envs.unwrapped, "envs", []):
        # MuJoCo's free camera loses a fast robot; a camera of the robot's model follows it.
        if hasattr(env.unwrapped, "mujoco_renderer") and env.unwrapped.model.ncam:
            env.unwrapped.mujoco_renderer.camera_id = 0
    obs, _ = envs.reset(seed=env_seeds(1, args.seed, 1, 0))
    frame = envs.render()[0]
    temporary = path.with_name("tmp-" + path.name)
    temporary.unlink(missing_ok=True)
    fps = envs.metadata.get("render_fps", 30)
    with FFMPEG_VideoWriter(str(temporary), (frame.shape[1], frame.shape[0]), fps) as film:
        film.write_frame(frame)
        ended = False
        steps = 0
        while not ended and steps < MAX_EVAL_STEPS:
            obs, _, terminated, truncated, _ = envs.step(policy(obs))
            film.write_frame(envs.render()[0])
            ended = terminated[0] or truncated[0]
            steps += 1
    envs.close()
    os.replace(temporary, path)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C while there is nothing to save yet
    args = parse_args()
    if args.evaluate:
        evaluate(args, Path(args.evaluate), setup_torch(args))
    else:
        train(args)

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "gymnasium[box2d,classic-control,mujoco,other,toy-text]==1.4.0",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "tqdm==4.70.1",
#     "psutil==7.2.2",
#     "moviepy==2.2.1",
# ]
# ///
