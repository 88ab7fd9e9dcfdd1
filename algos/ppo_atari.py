"""PPO from pixels: Atari games, on one core of a CPU, on a GPU, or in many processes at once.

The clipped objective is that of ppo.py, the games and the convolutions are those of dqn_atari.py. Policy and
value share the network: what the screen shows matters to both. PyTorch's launcher, torchrun, can start this
script several times. Each process, a rank, plays some games; before each update they average gradients.

Pseudo-code
    repeat until the budget is spent:
        [A] collect   a rollout: T steps in each of N games with the current policy
        [B] estimate  how much better than expected each action was: its advantage
        [C] improve   the network, K epochs: passes over the rollout in shuffled minibatches
        [D] log       charts, progress bar; the episodic return is the plain sum of a game's rewards

Equations: (1) to (9) are those of ppo.py
    (1)  a   ~ π(·|s) = softmax(z)                           z: the network's outputs for actions, the logits
    (2)  δ_t = r_t + γ V(s_{t+1}) − V(s_t)                   V(s_{t+1}) counts as 0 after a termination
    (3)  A_t = δ_t + γλ A_{t+1}                              A_{t+1} is 0 beyond episode and rollout
    (4)  R_t = A_t + V(s_t)                                  estimate of the discounted return Σ_k γ^k r_{t+k}
    (5)  ρ   = π(a|s) / π_old(a|s)                           π_old, the old policy, collected the rollout
    (6)  L_π = −mean min(ρ A, clip(ρ, 1−ε, 1+ε) A)           clip: the nearest number from 1−ε to 1+ε
    (7)  L_V = ½ mean (V(s) − R)²
    (8)  H   = −Σ_a π(a|s) ln π(a|s)                         entropy: how open the choice is; ln: in nats
    (9)  L   = L_π + c_V L_V − c_H mean H
    (10) ∇L  = 1/P Σ_p ∇L_p                                  L_p: the loss of rank p on its own minibatch

Why do averaged gradients, (10), suffice? L is a mean over rows, the steps of a minibatch. Over P minibatches
of equal size it is the mean of their means, and the gradient of a mean is the mean of the gradients: P ranks
take the step that one process would take with all their rows. Weights that were equal stay equal, since all
take the same step. It holds only if no row's loss depends on other rows. Normalised advantages (trick 3) do,
so their mean and deviation are those of all ranks' rows.

Why share the network? Seeing takes most of the work, and it is the same work for both. The price: policy and
value pull at the same weights, and c_V says how hard the value may pull.

Symbols
    s, a, r   4 frames, action, reward's sign      T, N      num_steps, environments of this rank
    π, z      policy, its logits                   K, ε, B   update_epochs, clip_coef, this rank's minibatch
    V         value: expected discounted return    P, |A|    ranks, number of actions
    δ, A, R   TD error, advantage, target of V     γ, λ      gamma, gae_lambda; c_V, c_H: vf_coef, ent_coef
Departures from the paper: the numbered tricks except 2 (each can be switched off), and after a time limit,
where more could follow, (2) looks at the last frames before the reset. For Atari the paper has K = 3, c_V = 2
as (7) and (9) count it, an ε that falls to 0 along with the learning rate, and A3C's small network; here
K = 4, c_V = ½, ε stays, the network is DQN's. Evaluation is greedy but for one random move in a hundred.
References: PPO https://arxiv.org/abs/1707.06347, how to play and report Atari games
https://arxiv.org/abs/1709.06009, averaging gradients over processes https://arxiv.org/abs/1706.02677

Read first: ppo.py (the algorithm), dqn_atari.py (the games).
New here: one network for policy and value, training in several processes.
Run: python algos/ppo_atari.py --env-id ALE/Pong-v5
     torchrun --standalone --nproc-per-node 2 algos/ppo_atari.py --env-id ALE/Pong-v5
Expect: 170 steps per second on one CPU core without bfloat16, 380 on one with it: 2 to 5 hours for Pong's 3M,
with an episodic return of 19.5, 17.9 and 14.9 of at most 21 (seeds 1, 2, 3). Breakout is at 34.7, 23.6 and
29.3 after 1.6M; RL Zoo has 398 after 10M. Rally, a small game made for tests, is at 17.99, 18.48 and 18.92
after 100,000 steps, 4 minutes; the best moves, 1% of them replaced, get 19.28 (tests/benchmark/RESULTS.md).
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
import torch.distributed as dist
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)

STACK = 4  # frames in an observation


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "ALE/Pong-v5"  # Atari game; PongNoFrameskip-v4 is the same
    num_envs: int = 8  # environments stepped together, those of all ranks
    sticky_actions: float = 0.0  # share of frames that repeat the last action; v5 by itself has 0.25
    # algorithm
    total_timesteps: int = 3_000_000  # budget: steps of all environments together, 4 frames each
    target_return: float | None = None  # stop once 100 training episodes in a row have this mean
    learning_rate: float = 2.5e-4  # Adam's step size
    num_steps: int = 128  # T, steps of each environment per rollout
    gamma: float = 0.99  # γ, what a reward one step later is worth
    gae_lambda: float = 0.95  # λ, 0 trusts the value network, 1 trusts the sampled rewards
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # K, epochs per rollout
    clip_coef: float = 0.1  # ε, moving the ratio beyond 1 ± ε gains nothing
    ent_coef: float = 0.01  # c_H, bonus for a policy that keeps its choices open
    vf_coef: float = 0.5  # c_V, weight of the value loss
    ortho_init: bool = True  # [Trick 1] orthogonal initial weights
    anneal_lr: bool = True  # [Trick 2] learning rate falls linearly to 0
    norm_adv: bool = True  # [Trick 3] advantages normalised within the minibatch
    clip_vloss: bool = False  # [Trick 4] value clipped like the ratio
    max_grad_norm: float = 0.5  # [Trick 5] longer gradients are shortened to this (clipping); 0: no limit
    bf16: bool = True  # [Trick 6] compute in bfloat16, where the processor or the GPU has it
    clip_rewards: bool = True  # [Trick 7] learn from the sign of the reward
    episodic_life: bool = True  # [Trick 8] learn that nothing follows a lost life
    adam_eps: float = 1e-5  # [Trick 9] added to what Adam divides by: tiny gradients make tiny steps
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU, with the same threads, bf16 and ranks
    cuda: bool = torch.cuda.is_available()  # use the GPU; on where there is one
    num_threads: int = 1  # cores for the network; more are faster on an idle machine only
    eval_episodes: int = 10  # episodes played after training, greedy but for one move in a hundred
    checkpoint_every: int = 20_000  # save at least every this many steps, or every rollout
    run_dir: str | None = None  # folder of the run; by default runs/ENV__ppo_atari__seedS__TIME
    resume: str | None = None  # go on with the run in this folder; schedules follow the budget given now
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def game(self) -> str:
        """The game's current id: an old one, like PongNoFrameskip-v4, names the same game."""
        return re.sub(r"^(ALE/)?(\w+?)(NoFrameskip|Deterministic)?-v[045]$", r"ALE/\2-v5", self.env_id)


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """N Atari games, stepped by the emulator's own threads. A step repeats its action for 4 frames.

    An observation is the last four pictures, grey, of 84 × 84 pixels, and an episode is a whole game, as in
    dqn_atari.py, which says why.
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
    """The network of dqn_atari.py; its last layer gives one logit for each action, and then the value."""

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
            nn.Linear(512, num_actions + 1),  # -> (B, |A| + 1)
        )
        if ortho_init:
            # [Trick 1] Orthogonal weights keep signals and gradients at one scale from layer to layer
            # (https://arxiv.org/abs/1312.6120; the gain √2 is OpenAI's). Ablate: --no-ortho-init
            for layer in self.network:  # layers inside a block that you add keep PyTorch's weights
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    nn.init.orthogonal_(layer.weight, 2**0.5)
                    nn.init.zeros_(layer.bias)
            # Tiny weights make the first policy nearly uniform: random logits must not steer exploration.
            nn.init.orthogonal_(self.network[-1].weight.data[:-1], 0.01)
            nn.init.orthogonal_(self.network[-1].weight.data[-1:], 1.0)

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes (B, 4, 84, 84) -> logits (B, |A|) and values (B,)."""
        outputs = fast_forward(self.network, frames, self.bf16)  # the same as self.network(frames / 255)
        return outputs[:, :-1], outputs[:, -1]


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


class Ranks:
    """[torchrun] The processes that train together; without torchrun, just one. You may skip this class.

    torchrun starts the script `count` times and gives each process a number, its rank: 0, 1, 2, … In
    `gather` and `average_gradients` they wait for each other: all ranks must call them equally often.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = 0
        self.count = 1  # P
        self.launched = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
        if self.launched:
            self.rank, self.count = connect(device)

    def gather(self, numbers: torch.Tensor) -> torch.Tensor:
        """The tensors (n,) of all ranks, one behind the other: (P*n,)."""
        if self.count == 1:
            return numbers
        gathered = [torch.empty_like(numbers) for _ in range(self.count)]
        dist.all_gather(gathered, numbers)
        return torch.cat(gathered)

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Put the mean over the ranks in the place of every gradient, equation (10)."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters]
        # One long message instead of ten short ones: each has to wait for the slowest rank.
        message = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(message)  # now the sum over the ranks
        message /= self.count  # (10)
        parts = message.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def leave(self) -> None:
        """Nothing is exchanged any more: rank 0 evaluates alone."""
        if self.launched:
            dist.destroy_process_group()


def gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation, equations (2) and (3); https://arxiv.org/abs/1506.02438, equation 16.

    rewards, values: (T, N) float. next_values: (T, N), the value of the observation each step led to, before
    any reset. terminated, truncated: (T, N) bool. Returns the advantages (T, N), in units of reward.
    """
    # After a time limit more could follow: the next value counts. After `terminated` nothing follows.
    deltas = rewards + gamma * np.where(terminated, 0.0, next_values) - values  # (2)
    # Either ending cuts the sum: the row below belongs to another episode.
    decay = np.where(terminated | truncated, 0.0, gamma * gae_lambda)
    advantages = np.zeros_like(rewards)
    following = np.zeros_like(rewards[0])  # A_{t+1}, (N,)
    for t in reversed(range(len(rewards))):
        following = deltas[t] + decay[t] * following  # (3)
        advantages[t] = following
    return advantages


def gumbel_noise(*shape):
    """Standard Gumbel noise, minus the logarithm of an exponential variable: a tensor of this shape."""
    return -torch.empty(shape).exponential_().log()


def log_prob(logits, actions):
    """ln π(a|s) of the actions taken. logits: (B, |A|), actions: (B,) integers. Returns (B,)."""
    return logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)


def entropy(logits):
    """Mean entropy of softmax policies in nats, equation (8). logits: (B, |A|). Returns a scalar."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()  # (8)


def normalize(advantages):
    """Advantages (B,) shifted to mean 0 and scaled to standard deviation 1."""
    # correction=0: the deviation of a single number is 0, not undefined.
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)


def policy_loss(new_log_probs, old_log_probs, advantages, clip_coef):
    """The clipped objective, equation (6), to be minimised; https://arxiv.org/abs/1707.06347, equation 7.

    new_log_probs, old_log_probs, advantages: (B,). Returns a scalar. The table in ppo.py has its six cases.
    """
    ratio = (new_log_probs - old_log_probs).exp()  # (5)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped * advantages).mean()  # (6)


def value_loss(new_values, old_values, returns, clip_coef=None):
    """Half the mean squared error, equation (7). new_values, old_values, returns: (B,). Returns a scalar."""
    errors = (new_values - returns) ** 2
    if clip_coef is not None:
        # [Trick 4] V gains nothing by moving more than ε from the old V, like the ratio (OpenAI's code).
        # This presumes returns of scale 1 and often hurts, so it is off. Try: --clip-vloss
        clipped = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped - returns) ** 2)
    return 0.5 * errors.mean()  # (7)


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    check_args(args)  # if a setting or the environment cannot work, the script ends here and says why
    device = setup_torch(args)
    # [torchrun 1] The environments are shared out among the ranks, and rank 0 keeps the run folder.
    # Without torchrun there is one rank: it has number 0, all environments, and nobody to wait for.
    ranks = Ranks(device)
    T = args.num_steps
    N = args.num_envs // ranks.count
    B = T * N // args.num_minibatches
    mine = slice(ranks.rank * N, (ranks.rank + 1) * N)  # this rank's part of all environments
    envs = make_envs(args, N)
    agent = make_agent(args, envs, device)
    parameters = list(agent.parameters())
    # [Trick 9] Adam divides a gradient by its usual size plus this. With PyTorch's 1e-8, weights whose
    # gradients are nearly 0 would move as fast as all others (OpenAI's code). Ablate: --adam-eps 1e-8
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=args.adam_eps, fused=True)
    args = replace(args, bf16=agent.bf16)  # args.json shall say whether this device has bfloat16
    run = start_run(args, ranks, agent=agent, optimizer=optimizer)  # --resume fills these in

    num_actions = int(envs.single_action_space.n)
    # What the network reads and says stays on its device: a stack goes there once, and as bytes.
    obs = torch.zeros((T, N, 84, 84, STACK), dtype=torch.uint8, device=device)
    obs = obs.permute(0, 1, 4, 2, 3)  # (T, N, 4, 84, 84); in memory as convolutions like it, frames last
    logits = torch.zeros((T, N, num_actions), device=device)
    values = torch.zeros((T + 1, N), device=device)  # the last row: of the frames to which the rollout led
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    rewards = np.zeros((T, N), dtype=np.float32)
    terminated = np.zeros((T, N), dtype=bool)
    truncated = np.zeros((T, N), dtype=bool)
    final_values = np.zeros((T, N), dtype=np.float32)  # of the frames before a reset, where truncated
    # Environments cannot be saved: a resumed run starts new episodes. 0 marks the seeds of training.
    current_obs, info = envs.reset(seed=env_seeds(args.num_envs, args.seed, 0, run.step)[mine])
    lives = info["lives"]
    while run.goes_on(args.batch_size):  # until the budget is spent; saves when that is due
        # [A] collect
        # [torchrun 2] All ranks draw the same random numbers, and each takes those of its environments.
        noise = gumbel_noise(T, args.num_envs, num_actions)[:, mine].to(device)
        ended_returns = []
        ended_lengths = []
        with torch.inference_mode():
            for t in range(T):
                obs[t] = to_tensors([current_obs], device)[0]
                logits[t], values[t] = agent(obs[t])
                actions[t] = (logits[t] + noise[t]).argmax(-1)  # (1), with Gumbel noise as in ppo.py
                env_actions = actions[t].cpu().numpy()
                current_obs, true_rewards, terminated[t], truncated[t], info = envs.step(env_actions)
                # [Trick 7] So one step size fits games with points of any size (DQN's paper).
                # Ablate: --no-clip-rewards
                rewards[t] = np.sign(true_rewards) if args.clip_rewards else true_rewards
                ended = terminated[t] | truncated[t]
                if truncated[t].any():  # more could follow: (2) needs V before the reset
                    final_values[t] = agent(to_tensors([info["final_obs"]], device)[0])[1].cpu().numpy()
                if ended.any():  # then current_obs is the first of the next episode already
                    ended_returns.extend(info["episode"]["r"][ended])  # of whole games, not clipped
                    ended_lengths.extend(info["episode"]["l"][ended])
                # [Trick 8] A lost life is a termination for (2) and (3), though the game goes on: so no later
                # reward makes up for the loss of a life (code of DQN's paper). Ablate: --no-episodic-life
                terminated[t] |= (info["lives"] < lives) & ~ended & args.episodic_life
                lives = info["lives"]
            values[T] = agent(to_tensors([current_obs], device)[0])[1]
        run.step += args.batch_size
        run.episodes_ended(ended_returns, ended_lengths)

        # [B] estimate; b_: of the whole batch
        old_values = values.cpu().numpy()  # (T+1, N)
        # Row t+1 may be of the next game: after a termination (2) counts that value as 0 anyway.
        next_values = np.where(truncated, final_values, old_values[1:])
        advantages = gae(
            rewards, old_values[:-1], next_values, terminated, truncated, args.gamma, args.gae_lambda
        )
        b_obs = obs.flatten(0, 1)  # (T, N, 4, 84, 84) -> (T*N, 4, 84, 84)
        b_actions = actions.flatten()  # (T, N) -> (T*N,)
        b_old_log_probs = log_prob(logits.flatten(0, 1), b_actions)
        b_old_values = values[:-1].flatten()
        b_advantages = torch.from_numpy(advantages).to(device).flatten()
        b_returns = b_advantages + b_old_values  # (4)

        # [C] improve
        learning_rate = args.learning_rate
        if args.anneal_lr:
            # [Trick 2] Ever smaller steps let the policy settle (the paper, table 5). Ablate: --no-anneal-lr
            learning_rate *= 1 - (run.step - args.batch_size) / args.total_timesteps
        optimizer.param_groups[0]["lr"] = learning_rate  # set each time: an lr_scheduler would be overruled
        # The row numbers of all epochs go to the device at once: then Python waits for no GPU until [D].
        order = torch.cat([torch.randperm(T * N) for _ in range(args.update_epochs)]).to(device)  # (K*T*N,)
        for rows in order.split(B):  # (B,), shuffled: a recurrent network would need steps in order
            mb_advantages = b_advantages[rows]  # mb_: of the minibatch
            if args.norm_adv:
                # [Trick 3] The policy's gradient has one size, whatever that of rewards (OpenAI's code).
                # [torchrun 3] Mean and deviation are those of all ranks. Ablate: --no-norm-adv
                normalized = normalize(ranks.gather(mb_advantages))  # (P*B,)
                mb_advantages = normalized.view(ranks.count, B)[ranks.rank]
            old_log_probs = b_old_log_probs[rows]
            new_logits, new_values = agent(b_obs[rows])  # (B, |A|), (B,)
            new_log_probs = log_prob(new_logits, b_actions[rows])  # (B,)
            pg_loss = policy_loss(new_log_probs, old_log_probs, mb_advantages, args.clip_coef)
            value_clip = args.clip_coef if args.clip_vloss else None
            v_loss = value_loss(new_values, b_old_values[rows], b_returns[rows], value_clip)
            mean_entropy = entropy(new_logits)
            loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * mean_entropy  # (9)
            optimizer.zero_grad()
            loss.backward()
            ranks.average_gradients(parameters)  # [torchrun 4] equation (10)
            # [Trick 5] One odd minibatch must not throw the policy off (OpenAI's code).
            # Ablate: --max-grad-norm 0
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or torch.inf)
            optimizer.step()

        # [D] log: one point per rollout; losses are those of its last minibatch, of rank 0
        log_ratio = (new_log_probs - old_log_probs).detach()
        losses = {
            "policy_loss": pg_loss.detach(),
            "value_loss": v_loss.detach(),
            "entropy": mean_entropy.detach(),
            "grad_norm": grad_norm,
            "approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),  # estimates KL(π_old ‖ π)
            "clip_fraction": ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(),  # ρ not in 1±ε
            "explained_variance": 1 - b_advantages.var() / b_returns.var(),  # 1: V foretells all of R
        }
        losses = dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True))  # waits only once
        run.stop_if_not_finite(losses["value_loss"] + losses["grad_norm"])
        run.log("charts", learning_rate=learning_rate)
        run.log("losses", **losses)
        if args.target_return is not None and run.mean_return() >= args.target_return:
            run.stop()
    envs.close()
    ranks.leave()
    return run.finish(device)


# ---- From here on: the run folder (save, resume, evaluate, film). The same text in every script. ----
# Only what stands before `fail` is this script's own: what it refuses, and how it acts in an evaluation.


MAX_EVAL_STEPS = 27_000  # longest evaluation episode: half an hour of play, where the emulator stops too
EVAL_EPSILON = 0.01  # random moves in evaluation: a greedy policy may wait for ever, in Breakout to serve
SPARE_MEMORY = 2**30  # bytes that the rollout leaves to all else
RANGES = {  # smallest and largest value of every number in Args
    "num_envs": (1, 10_000),
    "sticky_actions": (0, 1),
    "total_timesteps": (1, 10**12),
    "target_return": (-1e9, 1e9),
    "learning_rate": (0, 10),
    "num_steps": (1, 1_000_000),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    "num_minibatches": (1, 1_000_000),
    "update_epochs": (1, 1000),
    "clip_coef": (0, 1),
    "ent_coef": (-100, 100),
    "vf_coef": (0, 1000),
    "max_grad_norm": (0, 1e9),
    "adam_eps": (0, 1),
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


class Follower:
    """What Run is on rank 0, on all other ranks: rank 0 alone logs, saves and evaluates."""

    def __init__(self, args: Args, **parts) -> None:
        """parts: as those of Run; --resume fills them in."""
        self.step = 0
        if args.resume:
            saved = load_checkpoint(Path(args.resume), **parts)
            self.step = saved["global_step"]
            torch.set_rng_state(saved["rng_state"])
        # Ctrl-C and SIGTERM reach every process: rank 0 saves, and says when all end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def goes_on(self, size: int) -> None:
        """Rank 0 answers."""

    def episodes_ended(self, returns, lengths) -> None:
        """Rank 0 counts."""

    def mean_return(self) -> float:
        return -np.inf

    def log(self, group: str, **values) -> None:
        """Rank 0 logs."""

    def stop_if_not_finite(self, value) -> None:
        """Gradients are averaged: what is no number here is none on rank 0 either, which ends all."""

    def finish(self, device: torch.device) -> dict:
        return {}


def start_run(args: Args, ranks: Ranks, agent: Agent, **parts) -> "Run | Follower":
    """The training run, with one run folder for all ranks, and with rank 0's weights on all of them.

    If a process dies, `torchrun --max-restarts` starts all of them again, with the same command line. Then
    the run goes on from the checkpoint in its own folder, if there is one. torchrun also restarts what was
    refused because the folder holds another run: that one is older than this torchrun, and stays.
    """
    if not ranks.launched:
        return Run(args, budget=args.total_timesteps, agent=agent, **parts)
    run_dir = args.run_dir
    resume = args.resume
    if not (run_dir or resume):
        # The time in the folder's name is that when torchrun was started: a restart finds the folder again.
        # Its process number tells two runs apart that were started in the same second.
        torchrun = psutil.Process(os.getppid())
        begun = time.strftime("%Y%m%d-%H%M%S", time.localtime(torchrun.create_time()))
        name = f"{args.env_id}__{Path(__file__).stem}__seed{args.seed}__{begun}-{torchrun.pid}"
        run_dir = "runs/" + name.replace("/", "-").replace(":", "-")
    restarts = [None] * ranks.count  # as each machine counts them: those that its own processes caused
    dist.all_gather_object(restarts, os.environ["TORCHELASTIC_RESTART_COUNT"])
    if (
        set(restarts) != {"0"}
        and not resume
        and all((Path(run_dir) / name).exists() for name in ("args.json", "checkpoint.pt"))
    ):
        begun_at = (Path(run_dir) / "args.json").stat().st_mtime
        resume = run_dir if begun_at > psutil.Process(os.getppid()).create_time() else None
    run_dir, resume = agree([run_dir, resume])
    args = replace(args, run_dir=run_dir, resume=resume)
    if ranks.rank == 0:
        run = Run(args, budget=args.total_timesteps, agent=agent, **parts)
    else:
        run = Follower(args, agent=agent, **parts)
    for weights in agent.parameters():  # other processors may have rounded the same first weights differently
        copy = weights.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(copy, src=0)
        weights.data.copy_(copy)
    goes_on = run.goes_on
    episodes_ended = run.episodes_ended

    def all_go_on(size: int) -> bool:
        """Rank 0 knows the mean return, and whether Ctrl-C came."""
        return agree([goes_on(size)])[0]

    def all_episodes_ended(returns: list, lengths: list) -> None:
        """Rank 0 counts the episodes of all ranks."""
        everyones = [None] * ranks.count
        dist.all_gather_object(everyones, (returns, lengths))
        for returns, lengths in everyones:
            episodes_ended(returns, lengths)

    run.goes_on = all_go_on
    run.episodes_ended = all_episodes_ended
    return run


def connect(device: torch.device) -> tuple[int, int]:
    """Connect the processes that torchrun started. Returns the rank of this one, and how many there are."""
    # The optimizer imports this at its first use. Imported while ranks are connected, it keeps the connection
    # beyond Ranks.leave, and with it threads that can crash the process when Python ends.
    import torch._dynamo

    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # a GPU for each rank
    store, rank, count = next(dist.rendezvous("env://"))  # where the ranks leave each other their addresses
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun keeps this store when it restarts the ranks, and with it the addresses of processes that
        # are gone: so every start gets a part of its own. Several machines do not count restarts alike; there
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun begin each time with a new store.
        store = dist.PrefixStore("start " + os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # Both come with PyTorch: gloo sends what lies in the CPUs' memory, NCCL what lies in the GPUs'.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    return rank, count


def agree(plans: list) -> list:
    """What rank 0 has in this list, on all ranks."""
    dist.broadcast_object_list(plans, src=0)
    return plans


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
    count = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if count > 1:
        check_ranks(args, count)
    rows = args.batch_size // count
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if count > 1 else 1  # processes that share this memory
    largest = (psutil.virtual_memory().total - SPARE_MEMORY) // (here * STACK * 84 * 84)
    if rows > largest and not args.evaluate:
        gigabytes = rows * STACK * 84 * 84 / 1e9
        needed = f"{gigabytes:,.1f} GB for a rollout of {rows:,} steps are more than there is"
        fail(f"{needed}: with fewer --num-envs or --num-steps, {max(largest, 0):,} fit")
    if rows % args.num_minibatches:
        each = "" if count == 1 else f" of each of {count} processes"
        fail(f"{rows} steps per rollout{each} do not divide into {args.num_minibatches} minibatches")
    if args.norm_adv and args.batch_size == args.num_minibatches:
        fail("a minibatch of one step cannot be normalised: fewer --num-minibatches, or --no-norm-adv")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {args.batch_size} steps")


def check_ranks(args: Args, count: int) -> None:
    """Refuse what so many processes cannot do."""
    if args.evaluate:
        fail("--evaluate is for one process: start the script without torchrun")
    if args.num_envs % count:
        fail(f"--num-envs {args.num_envs}, those of all {count} processes together, do not divide among them")
    if not (dist.is_available() and dist.is_gloo_available()):
        fail("this PyTorch cannot connect processes (it has no gloo): start the script without torchrun")
    if args.cuda and torch.cuda.is_available():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        if not dist.is_nccl_available():
            fail("this PyTorch cannot connect GPUs (it has no NCCL): --no-cuda trains on the CPU")
        if here > torch.cuda.device_count():
            fail(f"{here} processes need {here} GPUs, here are {torch.cuda.device_count()}: --nproc-per-node")


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
        greedy = agent(torch.from_numpy(obs).to(device))[0].argmax(-1).cpu().numpy()
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
