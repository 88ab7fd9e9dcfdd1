r"""Random Network Distillation (RND) on top of PPO: curiosity finds the reward that chance does not.

Two problems come with rewards. They are sparse: where ten right decisions in a row earn the first one, an
agent that learns from rewards alone learns nothing. And they are made by hand: hints along the way are work,
and agents exploit them. A boat in a race, paid for the targets it hits on its way, circled for ever where
three targets come back, and never arrived (https://openai.com/index/faulty-reward-functions). The default
task, Pyramids, is of the sparse kind: in a maze, find a switch, then the pyramid that it calls up, and topple
it for the gold on top. A policy that acts at random never gets there.

Curiosity is a reward from within: what cannot be predicted yet is worth a visit. Its plain form, next-state
prediction, pays for the error of a model that learns which observation follows from observation and action:
    i_t = ‖ŝ_{t+1} − s_{t+1}‖²,  ŝ_{t+1} = model(s_t, a_t)
But a noisy television, pictures of pure chance, is never predicted: the agent stays there for ever. In RND
one network, the predictor, learns to give the same output as a fixed random network, the target. Both see
the same observation, (11), so chance has no part in it: the error is large only where observations are unlike
those seen before, and fades as they become familiar. (But pictures that never repeat stay new to RND, too.)

Pseudo-code
    watch a random policy, to know the scale of the observations
    repeat until the budget is spent:
        [A] collect   a rollout: T steps in each of N environments with the current policy
        [B] estimate  how new the observation after each step is; advantages, for the task and for novelty
        [C] improve   policy, values and predictor, K epochs of minibatches; then the statistics of (10)
        [D] log       charts, progress bar

Equations; (1) to (9) are those of ppo.py, with (2), (3), (4) and (7) once for the task and once for novelty
    (1)  a   ~ π(·|s) = softmax(z)
    (2)  δ_t = r_t + γ V(s_{t+1}) − V(s_t)                   V(s_{t+1}) counts as 0 after a termination
    (3)  A_t = δ_t + γλ A_{t+1}                              A_{t+1} is 0 beyond episode and rollout
    (4)  R_t = A_t + V(s_t)
    (5)  ρ   = π(a|s) / π_old(a|s)                           π_old, the old policy, collected the rollout
    (6)  L_π = −mean min(ρ A, clip(ρ, 1−ε, 1+ε) A)
    (7)  L_V = ½ mean (V(s) − R)²
    (8)  H   = −Σ_a π(a|s) ln π(a|s)
    (9)  L   = L_π + c_V (L_V^E + L_V^I) − c_H mean H + mean e
    (10) x   = clip((s − mean) / deviation, −5, 5)           running statistics of each element of s
    (11) e_t = mean_j (f̂_j(x_{t+1}) − f_j(x_{t+1}))²         novelty: f is fixed, f̂ imitates it
    (12) u_t = γ_I u_{t−1} + e_t                             sum of past e, discounted: as large as a return
    (13) i_t = e_t / deviation(u)                            intrinsic reward; its returns get deviation ≈ 1
    (14) A   = c_E A^E + c_I A^I
    (15) m_t = β m_{t−1} + (1−β) s_t                         memory, a fading average; m_0 = s_0

Each reward, the task's and the intrinsic one, has its own value and its own discounted return (the sum of all
that is to come, each step later worth γ times as much), and the two end differently. The task's rewards come
in episodes. Novelty does not end: its (2) and (3) know no endings, and where an episode ends, their s_{t+1}
is the first observation of the next one. Otherwise an agent would dread endings, which cut its curiosity off.

Symbols
    s, a, r   observation, action, reward          T, N      num_steps, num_envs
    π, z      policy, its logits                   K, B      update_epochs, size of a minibatch
    V         value: discounted reward to come     D, |A|    size of an observation, number of actions
    δ, A, R   TD error, advantage, target of V     γ, γ_I    gamma, int_gamma
    E, I      extrinsic (the task's), intrinsic    λ, ε      gae_lambda, clip_coef
    x         normalised observation               c_V, c_H  vf_coef, ent_coef
    f, f̂, j   target, predictor, their outputs     c_E, c_I  ext_coef, int_coef
    e, i, u   novelty, intrinsic reward, (12)      m, β      memory, --memory: how slowly it fades
Departures from the paper: observations that are vectors pass through small layers instead of convolutions;
policy and values, too, see them as in (10), and with the memory (15), where the paper tries a recurrent
network; separate networks for policy and values; after a time limit (2) looks at the last observation before
the reset. For Pyramids γ is 0.99 and c_I 0.3; with 0.999 and 1, runs found the gold and lost it again.
The authors' code (https://github.com/openai/random-network-distillation) differs in more: a constant learning
rate, advantages that are not normalised, a gradient that is not clipped, c_V = 1, minibatches of whole
environments, a predictor with one more layer. It updates the statistics (10) before the epochs, with what the
policy saw; here that is done after the epochs, with what novelty saw: where each step led, before a reset.
Evaluation samples its actions: the likeliest ones alone may turn to and fro in a corner for ever (on
Pyramids, with seed 1, in 4 of 100 episodes, and in none when sampling).
References: RND https://arxiv.org/abs/1810.12894, curiosity at large https://arxiv.org/abs/1808.04355

Read first: ppo.py (it has the reasons for all that is only named here).
New here: target and predictor, two values, a memory. The functions of earlier scripts stand below `train`.
Run: python algos/rnd_ppo.py
     python algos/rnd_ppo.py --int-coef 0  # without curiosity: stays at −1
     python algos/rnd_ppo.py --env-id MiniGrid-DoorKey-8x8-v0 --total-timesteps 1000000
The paper's own game, with the settings of the authors' code, is days of work for a GPU:
     python algos/rnd_ppo.py --env-id ALE/MontezumaRevenge-v5 --clip-rewards --num-envs 128 --num-steps 128 \
         --num-minibatches 4 --learning-rate 1e-4 --no-anneal-lr --no-norm-adv --max-grad-norm 0 \
         --clip-coef 0.1 --gamma 0.999 --int-coef 1 --ent-coef 0.001 --vf-coef 1 --predictor-share 0.25 \
         --init-steps 6400 --total-timesteps 500000000 --cuda
Expect: on Pyramids a mean episodic return (the sum of an episode's rewards) of 1.79, 1.82 or 1.81 (seeds 1, 2
and 3) after 3 million steps and about 6 minutes. An episode without gold has −1; Unity's benchmark is 1.75.
DoorKey-8x8 ends at 0.97, 0.97, 0.96 after a million steps, MultiRoom-N4-S5 after two at 0.73, 0.70, 0.60.
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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, NoReturn

import ale_py
import gymnasium as gym
import minigrid
import numpy as np
import psutil
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from minigrid.wrappers import ImgObsWrapper
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs((ale_py, minigrid))


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "envs.pyramids:Pyramids-v0"  # vectors, MiniGrid or Atari; module:id imports the module
    num_envs: int = 64  # N, environments stepped together
    # algorithm
    total_timesteps: int = 3_000_000  # budget: steps of all environments together
    init_steps: int = 128  # steps of each environment with random actions beforehand, not part of the budget
    learning_rate: float = 4e-4  # Adam's step size
    num_steps: int = 64  # T, steps of each environment per rollout
    gamma: float = 0.99  # γ, what a reward of the task one step later is worth
    int_gamma: float = 0.99  # γ_I, the same for intrinsic rewards
    gae_lambda: float = 0.95  # λ, 0 trusts the value network, 1 trusts the sampled rewards
    ext_coef: float = 2.0  # c_E, weight of the task's advantages
    int_coef: float = 0.3  # c_I, weight of the intrinsic advantages; 0 makes this plain PPO
    num_minibatches: int = 16  # minibatches per epoch
    update_epochs: int = 4  # K, epochs per rollout
    clip_coef: float = 0.2  # ε, moving the ratio beyond 1 ± ε gains nothing
    ent_coef: float = 0.01  # c_H, bonus for a policy that keeps its choices open
    vf_coef: float = 0.5  # c_V, weight of the value losses
    ortho_init: bool = True  # [Trick 1] orthogonal initial weights
    anneal_lr: bool = True  # [Trick 2] learning rate falls linearly to 0
    norm_adv: bool = True  # [Trick 3] advantages normalised within the minibatch
    norm_obs: bool = True  # [Trick 4] policy and values too see vectors normalised
    max_grad_norm: float = 0.5  # [Trick 5] longer gradients are shortened to this (clipping); 0: no limit
    predictor_share: float = 0.5  # [Trick 6] share of each minibatch that trains the predictor
    clip_rewards: bool = False  # [Trick 7] learn from the sign of the task's rewards
    memory: float = 0.97  # [Trick 8] β, how slowly the memory fades (vectors only); 0 for no memory
    gumbel: bool = True  # [Trick 9] actions drawn with Gumbel noise, made once a rollout
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = False  # use the GPU; off, because the CPU is faster for a network this small
    eval_episodes: int = 100  # episodes with sampled actions played after training
    checkpoint_every: int = 100_000  # save at least every this many steps, or every rollout
    run_dir: str | None = None  # folder of the run; by default runs/ENV__rnd_ppo__seedS__TIME
    resume: str | None = None  # go on with the run in this folder; schedules follow the budget given now
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """N environments: Atari and the project's own compute all N at once, others step in turn in this process.

    SAME_STEP: the step that ends an episode also resets; info["final_obs"] is the observation before that.
    """
    # For a video NEXT_STEP: the picture drawn after an episode's last step must not show the next episode.
    mode = AutoresetMode.SAME_STEP if render_mode is None else AutoresetMode.NEXT_STEP
    options = {"autoreset_mode": mode}
    if args.env_id.startswith("ALE/"):
        # Sticky actions (the default of v5), true rewards and at most 18,000 frames, as in RND's paper.
        options |= {"reward_clipping": False, "max_num_frames_per_episode": 18_000}
        envs = gym.make_vec(args.env_id, num_envs, "vector_entry_point", **options)
        if render_mode is None:
            return AtariEnvs(envs, None)
        options |= {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
        return AtariEnvs(envs, gym.make_vec(args.env_id, num_envs, "vector_entry_point", **options))
    if args.env_id.startswith("envs."):
        envs = gym.make_vec(args.env_id, num_envs, "vector_entry_point", render_mode=render_mode, **options)
    else:
        flat = [ImgObsWrapper, gym.wrappers.FlattenObservation]  # (7, 7, 3) -> (147,)
        wrappers = flat if args.env_id.startswith("MiniGrid-") else []
        more = {"vector_kwargs": options, "wrappers": wrappers, "render_mode": render_mode}
        envs = gym.make_vec(args.env_id, num_envs, "sync", **more)
    # [Trick 8] One observation does not show which way the agent was turning, or that a pyramid is falling; a
    # memory does (memory traces, https://proceedings.mlr.press/v267/eberhard25a.html). Ablate: --memory 0
    return MemoryTrace(RecordEpisodeStatistics(envs), args.memory)


class MemoryTrace(gym.vector.VectorWrapper):
    """Gives a fading average of what was seen, (15), with each observation: (N, D) -> (N, 2, D)."""

    def __init__(self, envs: gym.vector.VectorEnv, decay: float) -> None:
        super().__init__(envs)
        self.decay = decay
        self.same_step = envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        size = gym.spaces.flatdim(envs.single_observation_space)  # D
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2, size))
        self.observation_space = batch_space(self.single_observation_space, envs.num_envs)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.trace = obs.astype(np.float32)  # m_0 = s_0: as if nothing else had been seen before
        self.ended = np.zeros(len(obs), dtype=bool)
        return np.stack([self.trace, obs], axis=1), info

    def step(self, actions: np.ndarray):
        obs, rewards, terminated, truncated, info = super().step(actions)
        ended = terminated | truncated
        replaced = np.flatnonzero(ended & self.same_step)  # there obs is of the next episode already
        seen = obs.copy()
        for n in replaced:
            seen[n] = info["final_obs"][n]
        self.trace += (1 - self.decay) * (seen - self.trace)  # (15)
        for n in replaced:
            info["final_obs"][n] = np.stack([self.trace[n], seen[n]])
        begins = ended if self.same_step else self.ended
        self.trace[begins] = obs[begins]  # nothing of the last episode is remembered
        self.ended = ended
        return np.stack([self.trace, obs], axis=1), rewards, terminated, truncated, info


class Agent(nn.Module):
    """Policy, two values, a random target, and the predictor that learns to imitate it."""

    def __init__(self, shape: tuple[int, ...], num_actions: int, ortho_init: bool, norm_obs: bool) -> None:
        super().__init__()
        self.frames = len(shape) == 3  # 4 frames (4, 84, 84), or a memory and an observation (2, D)
        self.policy_norm = norm_obs
        width = 512 if self.frames else 256  # units of a hidden layer
        out = 512 if self.frames else 128  # outputs of the target

        def layers(depth: int, width: int, act: type[nn.Module]) -> list[nn.Module]:
            if self.frames:
                convolutions = [nn.Conv2d(depth, 32, 8, 4), act(), nn.Conv2d(32, 64, 4, 2), act()]
                convolutions += [nn.Conv2d(64, 64, 3), act(), nn.Flatten()]  # (B, depth, 84, 84) -> (B, 3136)
                return [*convolutions, nn.Linear(3136, width)]
            first = nn.Linear(depth * shape[1], width)
            return [nn.Flatten(), first, act(), nn.Linear(width, width)]  # (B, depth, D) -> (B, width)

        def head(outputs: int) -> nn.Sequential:
            return nn.Sequential(*layers(shape[0], width, nn.ReLU), nn.ReLU(), nn.Linear(width, outputs))

        self.actor = head(num_actions)  # (B, 2, D) or (B, 4, 84, 84) -> (B, |A|) logits
        self.critic = head(2)  # the same -> (B, 2) values, of the task and intrinsic
        self.target = nn.Sequential(*layers(1, out, nn.LeakyReLU))
        # A layer more than the target has: the predictor shall err on what is new, not for being too small.
        self.predictor = nn.Sequential(*layers(1, out, nn.LeakyReLU), nn.ReLU(), nn.Linear(out, out))
        if ortho_init:
            # [Trick 1] One scale from layer to layer, as in ppo.py; the target too. Ablate: --no-ortho-init
            gains = {self.actor[-1]: 0.01, self.critic[-1]: 1.0}  # all others: √2
            for layer in self.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    nn.init.orthogonal_(layer.weight, gains.get(layer, 2**0.5))
                    nn.init.zeros_(layer.bias)
        self.target.requires_grad_(False)
        self.norm_obs = RunningNorm(1, *shape[1:], limit=5.0)  # (10), defined below
        self.norm_past = RunningNorm(limit=torch.inf)  # deviation(u) of (13)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs: (B, 2, D) or bytes (B, 4, 84, 84). Returns logits (B, |A|) and values (B, 2)."""
        if self.frames:
            obs = obs / 255
        elif self.policy_norm:
            # [Trick 4] Speeds of up to 40 would drown the other inputs, zeros and ones (normalised
            # observations, https://arxiv.org/abs/2006.05990). Ablate: --no-norm-obs
            obs = self.norm_obs(obs)
        return self.actor(obs), self.critic(obs)

    def novelty(self, newest: torch.Tensor) -> torch.Tensor:
        """Novelty (11), (B,). newest: (B, 1, D) or (B, 1, 84, 84), without memory and older frames."""
        x = self.norm_obs(newest)  # (10)
        return ((self.predictor(x) - self.target(x)) ** 2).mean(-1)  # (11)


def discounted_past(novelty, carry, gamma):
    """Equation (12) along time, each environment for itself. novelty: (T, N); carry: (N,), the row before.
    Returns (T, N); its last row is the next carry."""
    past = np.zeros_like(novelty)
    for t in range(len(novelty)):
        carry = gamma * carry + novelty[t]  # (12)
        past[t] = carry
    return past


def value_loss(new_values, returns):
    """Half the mean squared errors, (7). new_values, returns: (B, 2), task and novelty. Returns (2,)."""
    return 0.5 * ((new_values - returns) ** 2).mean(0)  # (7)


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    check_args(args)  # if a setting or the environment cannot work, the script ends here and says why
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    agent = make_agent(args, envs, device)
    parameters = [p for p in agent.parameters() if p.requires_grad]  # all but the target's
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)  # fused: faster
    run = Run(args, budget=args.total_timesteps, agent=agent, optimizer=optimizer)  # --resume fills these in

    T = args.num_steps
    N = args.num_envs
    num_actions = agent.actor[-1].out_features
    shape = envs.single_observation_space.shape
    minibatch_size = args.batch_size // args.num_minibatches
    # T + 1 rows: the last one holds the observations to which the last step leads, and their values.
    obs = torch.zeros((T + 1, N, *shape), dtype=torch.uint8 if agent.frames else torch.float32, device=device)
    values = torch.zeros((T + 1, N, 2), device=device)
    logits = torch.zeros((T, N, num_actions), device=device)
    # Where each step led before any reset: for novelty and, after time limits, (2).
    next_obs = np.zeros((T, N, *shape), dtype=np.uint8 if agent.frames else np.float32)
    actions = np.zeros((T, N), dtype=np.int64)
    rewards = np.zeros((T, N), dtype=np.float32)
    terminated = np.zeros((T, N), dtype=bool)
    truncated = np.zeros((T, N), dtype=bool)
    never = np.zeros((T, N), dtype=bool)  # novelty does not end
    carry = np.resize(np.float32(run.extra.get("carry", 0.0)), N)  # u_{t−1} of (12), (N,): saved, or zeros
    visited = np.zeros((N, getattr(envs.unwrapped, "NUM_CELLS", 0)), dtype=bool)  # cells of a maze, or none
    if not args.resume:  # watch a random policy; 2 marks seeds of its own
        envs.reset(seed=env_seeds(N, args.seed, 2))
        for _ in range(args.init_steps):
            current_obs, *_ = envs.step(torch.randint(num_actions, (N,)).numpy())
            agent.norm_obs.update(torch.from_numpy(current_obs[:, -1:]).to(device))
    # Environments cannot be saved: a resumed run starts new episodes. 0 marks the seeds of training.
    current_obs, _ = envs.reset(seed=env_seeds(N, args.seed, 0, run.step))
    while run.goes_on(args.batch_size):  # until the budget is spent; saves when that is due
        # [A] collect; what the networks compute stays on a GPU: only the actions are fetched, step by step
        shares = []  # for each episode that ends in this rollout, the share of all cells that it visited
        if args.gumbel:
            # [Trick 9] With Gumbel noise g, argmax_i (z_i + g_i) is a sample of softmax(z), and several times
            # cheaper than sampling a Categorical: https://arxiv.org/abs/1611.01144. Ablate: --no-gumbel
            noise = gumbel_noise(T, N, num_actions).to(device)
        with torch.inference_mode():
            for t in range(T):
                obs[t] = torch.from_numpy(current_obs)
                logits[t], values[t] = agent(obs[t])  # (N, |A|), (N, 2)
                if args.gumbel:
                    action = (logits[t] + noise[t]).argmax(-1)  # (1)
                else:
                    action = torch.distributions.Categorical(logits=logits[t]).sample()  # (1)
                actions[t] = action.cpu().numpy()
                current_obs, rewards[t], terminated[t], truncated[t], info = envs.step(actions[t])
                next_obs[t] = current_obs
                ended = terminated[t] | truncated[t]
                if ended.any():  # there current_obs is the first of the next episode already
                    next_obs[t, ended] = np.stack(info["final_obs"][ended])
                    run.episodes_ended(info["episode"]["r"][ended], info["episode"]["l"][ended])
                if visited.size:  # the environment says in which of its cells the agent is
                    shares.extend(visited[ended].mean(-1))
                    visited[ended] = False
                    visited[np.arange(N), info["cell"]] = True
        run.step += args.batch_size

        # [B] estimate
        obs[T] = torch.from_numpy(current_obs)
        # Curiosity looks at the newest entry only, not at memory or older frames.
        b_next_obs = torch.from_numpy(next_obs[:, :, -1:]).to(device).flatten(0, 1)  # (T*N, 1, D)
        b_actions = torch.from_numpy(actions).to(device).flatten()  # (T, N) -> (T*N,)
        b_old_log_probs = log_prob(logits.flatten(0, 1), b_actions)  # (T*N,)
        intrinsic = np.zeros_like(rewards)
        with torch.no_grad():
            values[T] = agent(obs[T])[1]
            old_values = values.cpu().numpy()  # (T+1, N, 2)
            next_values = old_values[1:, :, 0].copy()  # of the task; after a time limit (2) needs another:
            cut = truncated & ~terminated
            if cut.any():
                final_values = agent(torch.from_numpy(next_obs[cut]).to(device))[1]
                next_values[cut] = final_values[:, 0].cpu().numpy()
            if args.int_coef:
                novelty = torch.cat([agent.novelty(part) for part in b_next_obs.split(minibatch_size)])
                novelty = novelty.cpu().numpy().reshape(T, N)  # (T*N,) -> (T, N)
                past = discounted_past(novelty, carry, args.int_gamma)
                carry = past[-1]
                run.extra["carry"] = carry.tolist()  # a checkpoint takes no arrays
                agent.norm_past.update(torch.from_numpy(past).to(device).flatten())
                intrinsic = novelty * agent.norm_past.scale.item()  # (13)
        # [Trick 7] Atari's points differ in size from game to game: clipped as in DQN. Try: --clip-rewards
        clipped_rewards = np.sign(rewards) if args.clip_rewards else rewards
        v = old_values[:, :, 0]  # of the task
        int_v = old_values[:, :, 1]  # of novelty
        adv = gae(clipped_rewards, v[:-1], next_values, terminated, truncated, args.gamma, args.gae_lambda)
        int_adv = gae(intrinsic, int_v[:-1], int_v[1:], never, never, args.int_gamma, args.gae_lambda)
        returns = np.stack([adv, int_adv], axis=-1) + old_values[:-1]  # (4) (T, N, 2)
        advantages = args.ext_coef * adv + args.int_coef * int_adv  # (14) (T, N)
        b_returns = torch.from_numpy(returns).to(device).flatten(0, 1)
        b_advantages = torch.from_numpy(advantages).to(device).flatten()
        b_obs = obs[:-1].flatten(0, 1)  # (T, N, 2, D) -> (T*N, 2, D)

        # [C] improve
        learning_rate = args.learning_rate
        if args.anneal_lr:
            # [Trick 2] Ever smaller steps let the policy settle (OpenAI's code). Ablate: --no-anneal-lr
            learning_rate *= 1 - (run.step - args.batch_size) / args.total_timesteps
        optimizer.param_groups[0]["lr"] = learning_rate  # set each time: an lr_scheduler would be overruled
        for _ in range(args.update_epochs):
            order = torch.randperm(args.batch_size).to(device)
            for rows in order.split(minibatch_size):  # (B,)
                mb_advantages = b_advantages[rows]
                if args.norm_adv:
                    # [Trick 3] The policy's gradient has one size, whatever that of rewards (OpenAI's code).
                    # Ablate: --no-norm-adv
                    mb_advantages = normalize(mb_advantages)
                old_log_probs = b_old_log_probs[rows]
                new_logits, new_values = agent(b_obs[rows])  # (B, |A|), (B, 2)
                new_log_probs = log_prob(new_logits, b_actions[rows])  # (B,)
                pg_loss = policy_loss(new_log_probs, old_log_probs, mb_advantages, args.clip_coef)
                v_loss, int_v_loss = value_loss(new_values, b_returns[rows])
                loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy(new_logits)  # (9)
                if args.int_coef:
                    # [Trick 6] The more rows train the predictor, the sooner a place is dull. An epoch takes
                    # a random share, like the paper with many environments. Ablate: --predictor-share 1
                    distilled = rows[: int(args.predictor_share * minibatch_size)]
                    distill_loss = agent.novelty(b_next_obs[distilled]).mean()
                    loss = loss + args.vf_coef * int_v_loss + distill_loss  # (9), the rest: L_V^I, mean e
                optimizer.zero_grad()
                loss.backward()
                # [Trick 5] One odd minibatch must not throw the policy off (OpenAI's code); the predictor's
                # error must not shorten the policy's steps, so it is not counted. Ablate: --max-grad-norm 0
                clipped = [*agent.actor.parameters(), *agent.critic.parameters()]
                grad_norm = nn.utils.clip_grad_norm_(clipped, args.max_grad_norm or torch.inf)
                optimizer.step()
        # Only after the epochs: they must see observations scaled as in [A], or (5) would not begin at 1.
        for part in b_next_obs.split(minibatch_size):
            agent.norm_obs.update(part)
        run.stop_if_not_finite(loss + grad_norm)

        # [D] log: one point per rollout; losses are those of its last minibatch
        charts = {"learning_rate": learning_rate, "value": v.mean(), "intrinsic_value": int_v.mean()}
        if args.int_coef:
            charts |= {"novelty": novelty.mean(), "intrinsic_reward": intrinsic.mean()}
        if shares:
            charts["share_of_cells"] = np.mean(shares)
        run.log("charts", **charts)
        log_ratio = (new_log_probs - old_log_probs).detach()
        run.log(
            "losses",
            policy_loss=pg_loss,
            value_loss=v_loss,
            intrinsic_value_loss=int_v_loss,
            entropy=entropy(new_logits),
            grad_norm=grad_norm,
            approx_kl=(log_ratio.exp() - 1 - log_ratio).mean(),
            clip_fraction=((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(),  # ρ not in 1±ε
            explained_variance=1 - adv.var() / (adv + v[:-1]).var(),  # of the task; 1: V foretells all
        )
    envs.close()
    return run.finish(device)


# ---- From here on: the run folder (save, resume, evaluate, film). The same text in every script. ----
# Only what stands before `fail` is this script's own: what it refuses, and how it acts in an evaluation.


MAX_EVAL_STEPS = 30_000  # longest evaluation episode
RANGES = {  # smallest and largest value of every number in Args
    "num_envs": (1, 10_000),
    "total_timesteps": (1, 10**12),
    "init_steps": (1, 1_000_000),
    "learning_rate": (0, 10),
    "num_steps": (1, 1_000_000),
    "gamma": (0, 1),
    "int_gamma": (0, 1),
    "gae_lambda": (0, 1),
    "ext_coef": (-1000, 1000),
    "int_coef": (-1000, 1000),
    "num_minibatches": (1, 1_000_000),
    "update_epochs": (1, 1000),
    "clip_coef": (0, 1),
    "ent_coef": (-100, 100),
    "vf_coef": (0, 1000),
    "max_grad_norm": (0, 1e9),
    "predictor_share": (0, 1),
    "memory": (0, 1),
    "seed": (0, 2**32 - 1),
    "eval_episodes": (1, 1_000_000),
    "checkpoint_every": (1, 10**12),
}


# The formulas of ppo.py, word for word, and RunningNorm of a2c_continuous.py.


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
    shape = envs.single_observation_space.shape
    num_actions = int(envs.single_action_space.n)
    return Agent(shape, num_actions, args.ortho_init, args.norm_obs).to(device)


def check_settings(args: Args) -> None:
    """Refuse settings that cannot work together."""
    if args.batch_size > 10_000_000:
        fail(f"a rollout of {args.batch_size:,} steps is too large: fewer --num-envs or --num-steps")
    if args.batch_size % args.num_minibatches:
        fail(f"{args.batch_size} steps per rollout do not divide into {args.num_minibatches} minibatches")
    if args.norm_adv and args.batch_size == args.num_minibatches:
        fail("a minibatch of one step cannot be normalised: fewer --num-minibatches, or --no-norm-adv")
    if int(args.predictor_share * (args.batch_size // args.num_minibatches)) < 1:
        fail(f"--predictor-share {args.predictor_share} leaves the predictor no step of a minibatch")
    if args.memory == 1:
        fail("--memory 1 would never take in anything: it must be less than 1")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {args.batch_size} steps")


def check_spaces(args: Args, envs: gym.vector.VectorEnv) -> None:
    """Refuse environments that this script cannot handle, and name the script that can."""
    obs_space = envs.unwrapped.single_observation_space
    action_space = envs.single_action_space
    parts = obs_space if isinstance(obs_space, gym.spaces.Tuple) else [obs_space]
    if all(isinstance(part, gym.spaces.Discrete) for part in parts):
        fail(f"{args.env_id} has integer states, this script reads vectors: use q_learning.py")
    images = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 1
    if images and not args.env_id.startswith("ALE/"):
        fail(f"{args.env_id} has images; of those this script, like dqn_atari.py, plays games named ALE/…")
    if isinstance(action_space, gym.spaces.Box):
        fail(f"{args.env_id} has continuous actions: use a2c_continuous.py or ppo_continuous.py")
    discrete = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
    if not isinstance(obs_space, gym.spaces.Box) or not obs_space.shape or not discrete:
        fail(f"no script handles {args.env_id} with observations {obs_space} and actions {action_space}")
    element_bytes = 1 if images else 4
    rollout_bytes = 2 * args.batch_size * element_bytes * math.prod(envs.single_observation_space.shape)
    if rollout_bytes > 0.9 * psutil.virtual_memory().total and not args.evaluate:
        fail(f"a rollout of {rollout_bytes / 1e9:,.1f} GB does not fit: fewer --num-envs or --num-steps")


def load_policy(args: Args, envs: gym.vector.VectorEnv, run_dir: Path, device: torch.device):
    """The sampling policy: observations (N, 2, D) or (N, 4, 84, 84) -> actions (N,), and its checkpoint."""
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)
    agent.eval()  # dropout and batch normalisation, where you add them, must not act here
    torch.manual_seed(args.seed)  # each evaluation draws the same actions

    @torch.inference_mode()
    def policy(obs: np.ndarray) -> np.ndarray:
        logits, _ = agent(torch.as_tensor(obs, dtype=torch.float32, device=device))
        return (logits.cpu() + gumbel_noise(*logits.shape)).argmax(-1).numpy()  # (1)

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
#     "minigrid==3.2.0",
# ]
# ///
