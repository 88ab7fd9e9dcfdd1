r"""Deep Q-learning (DQN) on Atari: a network reads the screen and learns what every action is worth.

The algorithm is that of dqn.py: Q-learning with a replay memory, a fixed Q-target and double Q. New is what
images ask for. A screen becomes an observation: small, grey, four frames together. The network finds things
wherever they are. The memory keeps each frame once. Clipped rewards let one step size fit all games.

Why a network of convolutions? A plain layer, which joins each of 28,224 pixels to each unit, would have to
learn in every place anew what a ball looks like. A convolution moves one small window of weights over the
picture: what it learns in one place it sees in all others. Three of them take 78,000 weights. The layer
behind them, which knows where things are, takes 1.6 million.

Pseudo-code
    repeat until the budget is spent:
        [A] act       one step in each of N environments, ε-greedily
        [B] remember  frames, actions, clipped rewards, endings
        [C] learn     one minibatch from the memory for every F steps; now and then renew the copy
        [D] log       charts, progress bar

Equations
    (1)  ε(t) = 1 + (ε_end − 1) min(1, max(0, t − t_0) / d)   1 until t_0, then falling for d steps
    (2)  a    = a random action with probability ε, else argmax_a Q(s, a), the greedy one
    (3)  a*   = argmax_a Q(s', a)                             chosen by the network that learns, but
    (4)  y    = r + γ Q⁻(s', a*)                              valued by its copy; r after a termination
    (5)  L    = mean h(Q(s, a) − y)                           Huber: h(x) = ½ x² if |x| < 1, else |x|−½

Symbols
    s, a, r  4 frames, action, reward's sign       N         num_envs
    s'       the stack that the step led to        F         train_frequency
    Q        network: the expected return,         B, |A|    batch_size, number of actions
             r + γ r' + γ² r'' + …, of a in s      C         slots of the memory per environment
    Q⁻, y    copy of the network, target of Q      d         exploration_fraction × total_timesteps
    γ        gamma                                 t, t_0    step, learning_starts
    L, h     loss, Huber's function                ε, ε_end  exploration, end_e
Departures from the paper: Adam for RMSprop, tricks 3, 6 and 7, N environments at once (F counts the steps of
all), a smaller memory and budget, a copy renewed every 250 minibatches instead of 10,000, ε_end 0.01 instead
of 0.1 (in evaluation 0.01 instead of 0.05), and (4) unchanged after a time limit, where more could follow.
At the start of a game ale-py presses FIRE if there is such a button; the paper's agent must learn to serve.
References: DQN https://www.nature.com/articles/nature14236, double DQN https://arxiv.org/abs/1509.06461,
how to play and report Atari games https://arxiv.org/abs/1709.06009

Read first: dqn.py (why these equations, what each of its three stabilisers is for).
New here: frames as observations, convolutions, a memory of frames, clipped rewards, lost lives.
Run: python algos/dqn_atari.py --env-id ALE/SpaceInvaders-v5
     python algos/dqn_atari.py --env-id ALE/Pong-v5 --ortho-init --total-timesteps 800000 \
         --learning-starts 10000 --learning-rate 2e-4
Expect: in Space Invaders an episodic return (sum of a game's rewards, undiscounted) of 707.5, 608.0 or 697.5
(seeds 1, 2, 3) after a million steps, 65 minutes on one core of a CPU; random play has 150. In Pong 19.9,
18.5 and 8.0 of at most 21 (seeds 1, 2, 3); 53 minutes with a core for itself. Seed 3 begins to win late.
"""

import difflib
import io
import json
import os
import re
import signal
import sys
import time
import zipfile
from collections import deque
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, NoReturn

import ale_py
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

gym.register_envs(ale_py)

STACK = 4  # frames in an observation
LOG_EVERY = 1000  # steps between two points of the charts


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "ALE/SpaceInvaders-v5"  # Atari game; SpaceInvadersNoFrameskip-v4 is the same
    num_envs: int = 8  # N, environments stepped together
    sticky_actions: float = 0.0  # share of frames that repeat the last action; v5 by itself has 0.25
    # algorithm
    total_timesteps: int = 1_000_000  # budget: steps of all environments together, 4 frames each
    learning_rate: float = 1e-4  # Adam's step size
    buffer_size: int = 100_000  # [Trick 1] transitions in the replay memory
    learning_starts: int = 100_000  # t_0, random steps before learning; --resume fills memory with as many
    batch_size: int = 32  # B, transitions per minibatch
    train_frequency: int = 4  # F, environment steps per minibatch
    gamma: float = 0.99  # γ, what a reward one step later is worth
    target_network_frequency: int = 1000  # [Trick 2] steps between two copies of the network
    double_q: bool = True  # [Trick 3] the network that learns chooses what its copy values
    clip_rewards: bool = True  # [Trick 4] learn from the sign of the reward
    episodic_life: bool = True  # [Trick 5] learn that nothing follows a lost life
    exploration_fraction: float = 0.1  # part of the budget over which ε falls
    end_e: float = 0.01  # ε_end, exploration that stays
    bf16: bool = True  # [Trick 6] compute in bfloat16, where the processor or the GPU has it
    ortho_init: bool = False  # [Trick 7] orthogonal initial weights; Pong needs them
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU, with the same threads and bf16
    cuda: bool = torch.cuda.is_available()  # use the GPU; on where there is one
    num_threads: int = 1  # cores for the network; more are faster on an idle machine only
    eval_episodes: int = 10  # episodes played after training, greedy but for one move in a hundred
    checkpoint_every: int = 20_000  # save at least every this many steps
    run_dir: str | None = None  # folder of the run; by default runs/ENV__dqn_atari__seedS__TIME
    resume: str | None = None  # go on with the run in this folder; schedules follow the budget given now
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there

    @property
    def game(self) -> str:
        """The game's current id: an old one, like SpaceInvadersNoFrameskip-v4, names the same game."""
        return re.sub(r"^(ALE/)?(\w+?)(NoFrameskip|Deterministic)?-v[045]$", r"ALE/\2-v5", self.env_id)


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """N Atari games. A step repeats its action for 4 frames of the game; an episode is a whole game.

    What a step shows, as in the paper. Grey: colour tells little more, and takes three times the bytes. Each
    pixel is the brighter one of two frames, for some games draw some things in every other frame only.
    84 × 84 instead of 210 × 160 pixels: a fifth of the work, and balls and shots can still be seen. The last
    four such pictures: a single one shows no velocities, so it is no Markov state. Up to 30 idle frames vary
    the start of a game.
    SAME_STEP: the step that ends an episode also resets; info["final_obs"] is the observation before that.
    """
    # For a video NEXT_STEP: the picture drawn after an episode's last step must not show the next episode.
    mode = AutoresetMode.SAME_STEP if render_mode is None else AutoresetMode.NEXT_STEP
    # True scores and whole games: `train` takes the signs of rewards and watches info["lives"] itself.
    options = {"autoreset_mode": mode, "reward_clipping": False, "num_envs": num_envs}
    options["repeat_action_probability"] = args.sticky_actions
    make = partial(gym.make_vec, args.game, vectorization_mode="vector_entry_point", **options)
    colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    return AtariEnvs(make(stack_num=STACK), make(**colour) if render_mode else None)  # in colour: for films


class Agent(nn.Module):
    """The network of the paper: three convolutions and a layer of 512 units."""

    def __init__(self, num_actions: int, bf16: bool, ortho_init: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.network = nn.Sequential(
            nn.Conv2d(STACK, 32, 8, stride=4),  # (B, 4, 84, 84) -> (B, 32, 20, 20)
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),  # -> (B, 64, 9, 9)
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),  # -> (B, 64, 7, 7)
            nn.ReLU(),
            nn.Flatten(),  # -> (B, 3136)
            nn.Linear(3136, 512),
            nn.ReLU(),
            nn.Linear(512, num_actions),  # -> (B, |A|)
        )
        if ortho_init:
            # [Trick 7] Orthogonal weights keep one scale from layer to layer; values start near 0. PyTorch's
            # own are smaller: Pong's ball on its bright ground fades from layer to layer, and before it is
            # seen, the lost points have pushed ReLUs to 0 for every input. Off by default: Space Invaders, on
            # dark ground, ended at 274.5 with it (seed 1 only), at 608.0 to 707.5 without. Try: --ortho-init
            for layer in self.network:  # layers inside a block that you add keep PyTorch's weights
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    nn.init.orthogonal_(layer.weight, 0.01 if layer is self.network[-1] else 2**0.5)
                    nn.init.zeros_(layer.bias)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Bytes (B, 4, 84, 84) -> values of all actions (B, |A|)."""
        return fast_forward(self.network, frames, self.bf16)  # the same as self.network(frames / 255)


def fast_forward(network: nn.Sequential, frames: torch.Tensor, bf16: bool) -> torch.Tensor:
    """network(frames / 255) up to rounding, and faster. You may skip it. Its first layer must not pad."""
    # Convolutions are fastest with channels last, and bytes are the cheapest to rearrange.
    x = frames.contiguous(memory_format=torch.channels_last)
    # [Trick 6] bfloat16, 16 bits a number, has 2 to 3 decimal digits. Features need no more; sums and weights
    # keep their 7 (https://arxiv.org/abs/1905.12322). Ablate: --no-bf16
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        x = x.to(torch.bfloat16 if bf16 else torch.float32)
        # Bytes to 0 … 1: dividing 8,192 weights is cheaper than 28,224 bytes of every stack.
        x = nn.functional.conv2d(x, network[0].weight / 255, network[0].bias, network[0].stride)
        x = network[1:-1](x)
    # The last layer needs more digits: after 2 the next bfloat16 is 2.016; values in Pong differ by 0.001.
    return network[-1](x.float())


class ReplayMemory:
    """[Trick 1] The last transitions, to be learned in any order and many times over (the paper).

    Neighbours in time are nearly alike; a minibatch of moments long ago and just now teaches more. Experience
    is used again: each transition about B / F = 8 times. And what the policy no longer meets stays in the
    mix: a network that sees only what is new forgets the rest. Ablate: --buffer-size 32, which leaves the
    last 8 transitions of each of 8 environments.

    Each environment has a ring of C slots, one frame in each; stacks are rebuilt at sampling: an eighth of
    the memory that two stacks of 4 would take. A game begins with the 4 frames of its first stack and closes
    with the one before the reset: no stack needs those of another game.

        slot         0   1   2   3   4   5   6   7   8   9  10  11
        frame        ·   ·   ·  f0  f1  f2  f3   ·   ·   ·  f0  f1     ·: stacked with f0; f3 ended the game
        can be drawn             x   x   x                   x         its step is done, its stacks are whole

    A transition in slot i goes from the stack i−3 … i to the stack i−2 … i+1.
    """

    def __init__(self, buffer_size: int, num_envs: int) -> None:
        self.num_envs = num_envs
        # C: 8 more, 3 for the past of the oldest stack, 1 for the newest successor, 4 to start the next game.
        self.num_slots = -(-buffer_size // num_envs) + 2 * STACK  # -(-a // b): a / b rounded up
        size = num_envs * self.num_slots
        # Slot k of environment i is row k N + i: the frame before that of a row stands N rows above it.
        self.frames = np.empty((size, 84, 84), dtype=np.uint8)
        self.actions = np.zeros(size, dtype=np.uint8)
        self.rewards = np.zeros(size, dtype=np.float32)
        self.terminated = np.zeros(size, dtype=bool)
        self.valid = np.zeros(size, dtype=bool)  # can be drawn
        self.written = np.zeros(num_envs, dtype=np.int64)  # frames that each ring has been given
        print(f"replay memory: {self.frames.nbytes / 1e9:.2f} GB", file=sys.stderr)

    def row(self, envs: np.ndarray, ahead: int) -> np.ndarray:
        """Rows of these environments, `ahead` slots after the slot of the next frame. envs: (n,) indices."""
        return (self.written[envs] + ahead) % self.num_slots * self.num_envs + envs

    def push(self, envs: np.ndarray, frames: np.ndarray) -> None:
        """The next frame of each of these environments. envs: (n,), frames: (n, 84, 84)."""
        self.frames[self.row(envs, 0)] = frames
        self.valid[self.row(envs, STACK - 1)] = False  # the oldest stack loses its first frame
        self.written[envs] += 1

    def start(self, envs: np.ndarray, obs: np.ndarray) -> None:
        """New games. envs: (n,) indices, obs: (n, 4, 84, 84), their first observations."""
        for k in range(STACK):
            self.push(envs, obs[:, k])

    def add(self, actions, rewards, terminated, next_obs) -> None:
        """A step of every environment. All (N,), next_obs (N, 4, 84, 84) from before any reset."""
        envs = np.arange(self.num_envs)
        row = self.row(envs, -1)
        self.actions[row] = actions
        self.rewards[row] = rewards
        self.terminated[row] = terminated
        self.valid[row] = True
        self.push(envs, next_obs[:, -1])

    def sample(self, batch_size: int):
        """B transitions, all equally likely: frames (B, 5, 84, 84) bytes, stack and successor overlapping,
        actions (B,) int64, rewards (B,) float32, terminated (B,) bool."""
        rows = np.empty(0, dtype=np.int64)
        begun = min(self.written.max(), self.num_slots) * self.num_envs  # rows that hold a frame
        while len(rows) < batch_size:
            drawn = torch.randint(begun, (2 * batch_size,)).numpy()  # too many, for some are not valid
            rows = np.append(rows, drawn[self.valid[drawn]])
        rows = rows[:batch_size]
        around = rows[:, None] + self.num_envs * np.arange(1 - STACK, 2)  # (B, 5)
        frames = self.frames[around % len(self.frames)]
        # To learn from n steps at once, check that all n rows are valid, up to a termination: else a
        # transition would go on in another game.
        return frames, self.actions[rows].astype(np.int64), self.rewards[rows], self.terminated[rows]


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


def q_loss(q, actions, targets):
    """Huber loss of the actions taken, equation (5). q: (B, |A|), actions: (B,) integers, targets: (B,)."""
    # Beyond an error of 1 the gradient stays the same: one surprise must not throw the network off.
    return nn.functional.smooth_l1_loss(q.gather(1, actions[:, None]).squeeze(1), targets)  # (5)


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    check_args(args)  # if a setting or the environment cannot work, the script ends here and says why
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    memory = ReplayMemory(args.buffer_size, args.num_envs)
    agent = make_agent(args, envs, device)
    # [Trick 2] Fixed Q-target: a correction moves the values of similar states too, s' among them. Without a
    # copy, the targets would move with them (the paper). Ablate: --target-network-frequency 1
    target = make_agent(args, envs, device)
    if target.bf16:
        target.network[1:-1].bfloat16()  # converted once, not at each use; a copy takes no small steps
    target.load_state_dict(agent.state_dict())
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)  # fused: faster
    args = replace(args, bf16=agent.bf16)  # args.json shall say whether this device has bfloat16
    run = Run(args, budget=args.total_timesteps, agent=agent, target=target, optimizer=optimizer)

    N = args.num_envs
    num_actions = int(envs.single_action_space.n)
    all_envs = np.arange(N)
    exploration_steps = args.exploration_fraction * args.total_timesteps  # d
    copy_every = max(1, args.target_network_frequency // args.train_frequency)  # minibatches
    updates = max(run.step, args.learning_starts) // args.train_frequency  # counted as if made from step 0 on
    logged_updates = updates
    logged_step = run.step
    # Sums of loss and Q since the charts' last point, on the device: Python waits when it reads from there.
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    # The memory is too large for a checkpoint: a resumed run first fills it again, with the policy it has.
    refill = min(run.step, args.learning_starts)  # steps
    seconds_before = time.perf_counter() - run.started
    if refill:
        run.bar.set_postfix_str(f"the replay memory is filled again: {refill:,} steps")
    # Environments cannot be saved: a resumed run starts new episodes. 0 marks the seeds of training.
    obs, info = envs.reset(seed=env_seeds(N, args.seed, 0, run.step))
    memory.start(all_envs, obs)
    lives = info["lives"]
    while run.goes_on(N):  # until the budget is spent; saves when that is due
        # [A] act
        exploration = epsilon(run.step, args.learning_starts, exploration_steps, args.end_e)  # (1)
        explore = (torch.rand(N) < exploration).numpy()
        actions = torch.randint(num_actions, (N,)).numpy()
        if not explore.all():
            with torch.inference_mode():
                greedy = agent(torch.from_numpy(obs).to(device)).argmax(-1).cpu().numpy()  # (N, |A|) -> (N,)
            actions = np.where(explore, actions, greedy)  # (2)
        obs, rewards, terminated, truncated, info = envs.step(actions)

        # [B] remember
        # [Trick 4] Signs let one step size fit games of all scores (the paper). Ablate: --no-clip-rewards
        clipped_rewards = np.sign(rewards) if args.clip_rewards else rewards
        # [Trick 5] A lost life is a termination for (4), though the game goes on: so no later reward makes up
        # for the loss of a life (the paper's code). Ablate: --no-episodic-life
        ended = terminated | truncated
        life_lost = (info["lives"] < lives) & ~ended & args.episodic_life
        lives = info["lives"]
        next_obs = obs
        if ended.any():  # then obs is the first of the next episode already
            next_obs = np.where(ended[:, None, None, None], info["final_obs"], obs)
        memory.add(actions, clipped_rewards, terminated | life_lost, next_obs)
        memory.start(all_envs[ended], obs[ended])
        if refill > 0:  # --resume: these steps, their episodes and their seconds are not counted
            refill -= N
            if refill <= 0:
                obs, info = envs.reset(seed=env_seeds(N, args.seed, 0, run.step, 1))
                memory.start(all_envs, obs)
                lives = info["lives"]
            run.started = time.perf_counter() - seconds_before
            continue
        run.step += N
        if ended.any():
            run.episodes_ended(info["episode"]["r"][ended], info["episode"]["l"][ended])

        # [C] learn: a minibatch for every F steps, however many steps one round of the environments makes
        while updates < run.step // args.train_frequency:
            frames, b_actions, b_rewards, b_terminated = to_tensors(memory.sample(args.batch_size), device)
            b_obs = frames[:, :-1]  # (B, 5, 84, 84) -> (B, 4, 84, 84)
            b_next_obs = frames[:, 1:]
            with torch.no_grad():  # y is a fixed number in (5): only Q(s, a) has a gradient
                target_q = target(b_next_obs)  # (B, |A|)
                # [Trick 3] The network that values a* should not have chosen it too
                # (https://arxiv.org/abs/1509.06461). Ablate: --no-double-q
                choosing_q = agent(b_next_obs) if args.double_q else target_q
                y = td_target(b_rewards, b_terminated, target_q, choosing_q, args.gamma)
            q = agent(b_obs)
            loss = q_loss(q, b_actions, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.stack((loss.detach(), q.detach().mean()))
            updates += 1
            if updates % copy_every == 0:
                target.load_state_dict(agent.state_dict())

        # [D] log: means of loss and Q since the charts' last point
        if run.step >= logged_step + LOG_EVERY or run.step + N > run.budget:
            run.log("charts", epsilon=exploration)
            if updates > logged_updates:
                td_loss, q_values = (sums / (updates - logged_updates)).tolist()
                run.stop_if_not_finite(td_loss)
                run.log("losses", td_loss=td_loss, q_values=q_values)
            sums.zero_()
            logged_updates = updates
            logged_step = run.step
    envs.close()
    return run.finish(device)


# ---- From here on: the run folder (save, resume, evaluate, film). The same text in every script. ----
# Only what stands before `fail` is this script's own: what it refuses, and how it acts in an evaluation.


MAX_EVAL_STEPS = 27_000  # longest evaluation episode: half an hour of play, where the emulator stops too
EVAL_EPSILON = 0.01  # random moves in evaluation: a greedy policy may wait for ever, in Breakout to serve
SPARE_MEMORY = 2**30  # bytes that the replay memory leaves to all else
RANGES = {  # smallest and largest value of every number in Args
    "num_envs": (1, 1000),
    "sticky_actions": (0, 1),
    "total_timesteps": (1, 10**12),
    "learning_rate": (0, 10),
    "buffer_size": (1, 10**12),
    "learning_starts": (1, 10**12),
    "batch_size": (1, 10_000),
    "train_frequency": (1, 10**12),
    "gamma": (0, 1),
    "target_network_frequency": (1, 10**12),
    "exploration_fraction": (0, 1),
    "end_e": (0, 1),
    "seed": (0, 2**32 - 1),
    "num_threads": (1, 1000),
    "eval_episodes": (1, 1_000_000),
    "checkpoint_every": (1, 10**12),
}


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


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    bf16 = args.bf16 and has_bf16(device)
    agent = Agent(int(envs.single_action_space.n), bf16, args.ortho_init)
    return agent.to(device, memory_format=torch.channels_last)


def has_bf16(device: torch.device) -> bool:
    """Whether this device computes in bfloat16 natively; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def to_tensors(arrays, device: torch.device) -> list[torch.Tensor]:
    """NumPy arrays as tensors on the device."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type != "cpu":  # from pinned memory the copy runs while Python goes on
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return tensors


def check_settings(args: Args) -> None:
    """Refuse what is no Atari game, and settings that cannot work together."""
    if not args.game.startswith("ALE/") or args.game not in gym.registry:
        refuse_other_environments(args.env_id)
    if args.buffer_size < args.batch_size:
        fail(f"--buffer-size {args.buffer_size} is less than one batch of {args.batch_size}")
    if not args.num_envs <= args.learning_starts < args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} is no step between {args.num_envs} and the end")
    slot_bytes = 84 * 84 + 1 + 4 + 1 + 1  # frame, action, reward, terminated, valid
    largest = (psutil.virtual_memory().total - SPARE_MEMORY) // slot_bytes - (2 * STACK + 1) * args.num_envs
    if args.buffer_size > largest and not args.evaluate:
        needed = f"{args.buffer_size * slot_bytes / 1e9:,.1f} GB of replay memory are more than there is"
        fail(f"{needed}: the largest --buffer-size that fits is {max(largest, 0)}")


def refuse_other_environments(env_id: str) -> None:
    """Name the script for an environment that is no Atari game; return if there is no such environment."""
    try:
        env = gym.make(env_id)
    except Exception:  # environments and the packages behind them fail in many ways
        return  # to make it as an Atari game will fail, too, and with the right words
    obs_space = env.observation_space
    other = "no script handles it"
    parts = obs_space if isinstance(obs_space, gym.spaces.Tuple) else [obs_space]
    if all(isinstance(part, gym.spaces.Discrete) for part in parts):
        other = "its integer states are for q_learning.py"
    elif isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1:
        continuous = isinstance(env.action_space, gym.spaces.Box)
        other = f"its vectors are for {'a2c_continuous.py' if continuous else 'ppo.py'}"
    fail(f"{env_id} is no Atari game, and this script plays nothing else: {other}")


def check_spaces(args: Args, envs: gym.vector.VectorEnv) -> None:
    """Refuse what passes for an Atari game and looks different."""
    shape = envs.single_observation_space.shape
    if shape != (STACK, 84, 84):
        fail(f"{args.env_id} has observations of shape {shape}, this script reads {(STACK, 84, 84)}")


def load_policy(args: Args, envs: gym.vector.VectorEnv, run_dir: Path, device: torch.device):
    """The policy of a run, a function of observations (N, 4, 84, 84) to actions (N,), and its checkpoint.

    Greedy but for EVAL_EPSILON, whose seed is fixed: the same folder gives the same score again.
    """
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)
    agent.eval()  # dropout and batch normalisation, where you add them, must not act here
    rng = np.random.default_rng(args.seed)
    num_actions = int(envs.single_action_space.n)

    @torch.inference_mode()
    def policy(obs: np.ndarray) -> np.ndarray:
        greedy = agent(torch.from_numpy(obs).to(device)).argmax(-1).cpu().numpy()
        explore = rng.random(len(obs)) < EVAL_EPSILON
        random = rng.integers(num_actions, size=len(obs))
        return np.where(explore, random, greedy)

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
#     "ale-py==0.12.1",
# ]
# ///
