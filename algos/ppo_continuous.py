r"""PPO with continuous actions: forces and angles instead of buttons, robots instead of poles.

Each action is drawn from a normal distribution, as in a2c_continuous.py. The policy is improved as in ppo.py:
several epochs on each batch. Nothing is gained by making an action much likelier or rarer than it was.

Pseudo-code
    repeat until the budget is spent:
        [A] collect   a rollout: T steps in each of N environments with the current policy
        repeat for K epochs:
            [B] estimate  how much better than expected each action was: its advantage
            [C] improve   policy and value network: one pass over the rollout in shuffled minibatches
        [D] log       charts, progress bar; the episodic return is the plain sum of an episode's rewards

Equations
    (1)  a   = μ(s) + ξ,  ξ_j ~ Normal(0, σ_j(s)²)           the sampled action; the robot gets it clipped
    (2)  δ_t = r_t + γ V(s_{t+1}) − V(s_t)                   V(s_{t+1}) counts as 0 after a termination
    (3)  A_t = δ_t + γλ A_{t+1}                              A_{t+1} is 0 beyond episode and rollout
    (4)  R_t = A_t + V(s_t)                                  estimate of the discounted return Σ_k γ^k r_{t+k}
    (5)  ln π(a|s) = −Σ_j [(a_j − μ_j)² / 2σ_j² + ln σ_j + ½ ln 2π]
    (6)  L_π = −mean min(ρ A, clip(ρ, 1−ε, 1+ε) A)           clip: the nearest number from 1−ε to 1+ε
    (7)  L_V = ½ mean (V(s) − R)²
    (8)  H   = Σ_j [ln σ_j + ½ ln 2πe]                       entropy of a density, in nats: may be below 0
    (9)  L   = L_π + c_V L_V − c_H mean H
    (10) ξ_j = Σ_i φ_i(s) W_ij,  W_ij ~ Normal(0, σ_ij²)     --use-sde (gSDE): noise made of features φ_i(s),
         so σ_j(s)² = Σ_i φ_i(s)² σ_ij²                      for part j of a; W is drawn, σ_ij is learned
    (11) mean ← mean + w Δ,   var ← (1−w) var + w var_new + w (1−w) Δ²,   Δ = mean_new − mean
         running statistics of all s so far, for (s − mean) / √var within ±10. new: of a batch; w: its share
    (12) ρ   = π(a|s) / π_old(a|s)                           π_old, the old policy, collected the rollout

Densities. A single real number has probability 0: π(a|s) in (5) is a density, and may exceed 1. The ratio
(12) works as before, since a change of units multiplies both densities by the same factor.

Which action goes into (5)? Motors have bounds: the environment gets the action clipped to them, (5) gets it
as it was sampled. So clipping belongs to the environment, and the policy gradient holds in every environment.
With the clipped action it would be wrong: all samples beyond a bound would count with the density at the
bound, which is not the probability of sampling a number beyond it.

The deviation. What is learned is ln σ: it may be any number, e^(ln σ) is positive, and equal steps change σ
by equal factors. By default σ is one number for each part of the action, in all states. With --use-sde (10)
makes σ depend on the state, and W is held for some steps: noise that is new in each step averages out before
a heavy body has moved, held noise moves it (more in class Noise).

Running statistics, (11), are a part of the policy: its weights have learned what (s − mean) / deviation is
good for, with this mean and deviation. They are saved with the weights, and an evaluation does not change
them. A checkpoint from a stranger brings the stranger's statistics along. If your robot's sensors have other
units, or another order, there is no error message: the robot just moves as if it had learned little.

Symbols
    s, a, r   observation, action, reward            T, N      num_steps, num_envs
    π         policy: Normal(μ(s), σ(s)²)            K, ε, B   update_epochs, clip_coef, size of a minibatch
    μ, σ, ξ   its mean, deviation and noise          D, |A|    size of an observation, of an action
    φ, |φ|    last hidden layer below μ, its size    γ, λ      gamma, gae_lambda
    V         value: expected discounted return      c_V, c_H  vf_coef, ent_coef
    δ, A, R   TD error, advantage, target of V
Departures from the paper: the numbered tricks (each can be switched off), and after a time limit, where more
could follow, (2) looks at the last observation before the reset.
References: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438, gSDE
https://arxiv.org/abs/2005.05719, which details matter https://arxiv.org/abs/2006.05990, time limits
https://arxiv.org/abs/1712.00378, (11), by Chan et al.
http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf

Read first: a2c_continuous.py (normal policies, running statistics), ppo.py (the clipped objective).
New here: a ratio of densities, noise held for some steps, advantages estimated anew in each epoch.
Run: python algos/ppo_continuous.py
     python algos/ppo_continuous.py --env-id Hopper-v5
     python algos/ppo_continuous.py --env-id Walker2d-v5 --learning-rate 3e-4 --num-minibatches 32
     python algos/ppo_continuous.py --env-id Ant-v5 --learning-rate 3e-4
     python algos/ppo_continuous.py --env-id AntBulletEnv-v0 --total-timesteps 2000000 --learning-rate 3e-4 \
         --gae-lambda 0.9
     python algos/ppo_continuous.py --env-id BipedalWalker-v3 --total-timesteps 2000000 --num-envs 32 \
         --num-steps 256 --num-minibatches 32 --gamma 0.999 --learning-rate 3e-4
     python algos/ppo_continuous.py --env-id Pendulum-v1 --total-timesteps 50000 --num-envs 4 \
         --num-steps 512 --num-minibatches 16 --learning-rate 2e-3 --gamma 0.95 --gae-lambda 0.85 \
         --clip-coef 0.3 --log-std-init 0 --no-norm-obs
Expect: episodic returns after 1M steps (seeds 1 / 2 / 3; --eval-episodes 20): MuJoCo's cheetah 5620 / 7114 /
4427, the one-legged hopper 3336 / 3426 / 3227 (seeds 11 / 12 / 13: 3315 / 2542 / 2627), the walker 2333 /
2904 / 4493, the ant 2227 / 1781 / 2110, each in 5 to 44 minutes with other runs on the machine. After 2M
steps BipedalWalker has 287 / 305 / 287 in 16 to 21 minutes, PyBullet's ant 3155 / 3051 / 2999 in 24 to 32.
The pendulum: −148 / −156 / −163 after 50,000 steps, in 15 seconds.
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
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "HalfCheetah-v5"  # vector observations, bounded continuous actions; or module:id
    num_envs: int = 16  # N, environments stepped together
    # Processes pay where steps are slow (Bullet, not MuJoCo) and there are cores to spare: measure both.
    vectorization: Literal["sync", "async"] = "sync"  # environments in this process, or each in its own
    # algorithm
    total_timesteps: int = 1_000_000  # budget: steps of all environments together
    target_return: float | None = None  # stop once 100 training episodes in a row have this mean
    learning_rate: float = 7e-4  # Adam's step size
    num_steps: int = 128  # T, steps of each environment per rollout
    gamma: float = 0.99  # γ, what a reward one step later is worth
    gae_lambda: float = 0.95  # λ, 0 trusts the value network, 1 trusts the sampled rewards
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 10  # K, epochs per rollout
    clip_coef: float = 0.2  # ε, moving the ratio beyond 1 ± ε gains nothing
    ent_coef: float = 0.0  # c_H, bonus for a policy that keeps its choices open
    vf_coef: float = 0.5  # c_V, weight of the value loss
    log_std_init: float = -0.5  # logarithm of the first σ; with --use-sde of σ_ij: then try -2
    ortho_init: bool = True  # [Trick 1] orthogonal initial weights
    anneal_lr: bool = True  # [Trick 2] learning rate falls linearly to 0
    norm_obs: bool = True  # [Trick 3] observations shifted and scaled to mean 0, deviation 1
    norm_reward: bool = True  # [Trick 4] rewards divided by the deviation of their discounted sums
    max_grad_norm: float = 0.5  # [Trick 5] longer gradients are shortened to this (clipping); 0: no limit
    use_sde: bool = False  # [Trick 6] noise that is a function of the state, held for some steps
    sde_sample_freq: int = 4  # steps for which it is held; -1 or 0: a whole rollout
    norm_adv: bool = True  # [Trick 7] advantages normalised within the minibatch
    clip_vloss: bool = False  # [Trick 8] value clipped like the ratio
    target_kl: float | None = None  # [Trick 9] end the epochs once the KL estimate exceeds this, in nats
    recompute_advantages: bool = True  # [Trick 10] advantages estimated anew in each epoch
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = False  # use the GPU; off, because the CPU is faster for a network this small
    eval_episodes: int = 100  # greedy episodes played after training
    checkpoint_every: int = 20_000  # save at least every this many steps, or every rollout
    run_dir: str | None = None  # folder of the run; by default runs/ENV__ppo_continuous__seedS__TIME
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
    """N environments, stepped in turn in this process or, with --vectorization async, each in its own.

    SAME_STEP: the step that ends an episode also resets; info["final_obs"] is the observation before that.
    """
    # For a video NEXT_STEP: the picture drawn after an episode's last step must not show the next episode.
    mode = AutoresetMode.SAME_STEP if render_mode is None else AutoresetMode.NEXT_STEP
    options = {"autoreset_mode": mode, "copy": False}  # the next step overwrites what a step returned
    # The robots of PyBullet are known to Gymnasium once their package is imported.
    bullet = "BulletEnv-" in args.env_id and ":" not in args.env_id
    env_id = f"pybullet_envs_gymnasium:{args.env_id}" if bullet else args.env_id
    how = args.vectorization if num_envs > 1 else "sync"  # one alone gains nothing from its own process
    with signals_ignored():  # by the processes of the environments: this process saves before it ends
        envs = gym.make_vec(env_id, num_envs, how, vector_kwargs=options, render_mode=render_mode)
    return RecordEpisodeStatistics(envs)


class Noise(nn.Module):
    """[Trick 6] Generalised state-dependent exploration, equation (10); https://arxiv.org/abs/2005.05719.

    Independent noise makes a robot tremble, and most of it averages out. Here the noise is a linear function
    of the features φ(s), and its random matrix W is held for some steps: similar states get similar noise, so
    the robot tries out whole movements. On in a2c_continuous.py (ablate: --no-use-sde), else try: --use-sde

    With gSDE, σ depends on the state: the policy can be sure of itself in one state and explore in another.
    Without, σ is one number for each part of an action: less to learn, and as much exploration everywhere.
    Both learn ln σ: it may be any number, exp(ln σ) is positive, and equal steps change σ by equal factors.
    Equation (5) ignores that the steps between two draws share their W.
    """

    def __init__(self, num_features: int, action_dim: int, log_std_init: float, use_sde: bool) -> None:
        super().__init__()
        self.use_sde = use_sde
        rows = num_features if use_sde else 1  # without gSDE: a single feature, always 1
        self.log_std = nn.Parameter(torch.full((rows, action_dim), log_std_init))  # ln σ_ij

    def draw(self, num_steps: int, num_envs: int) -> np.ndarray:
        """Random W, (num_steps, N, |φ|, |A|): one for all steps with gSDE; without, one each, |φ| = 1."""
        different = 1 if self.use_sde else num_steps
        std = self.log_std.detach().exp().cpu()
        W = torch.randn(different, num_envs, *self.log_std.shape) * std
        return W.expand(num_steps, -1, -1, -1).numpy()

    def sample(self, features: np.ndarray, W: np.ndarray) -> np.ndarray:
        """Noise for the actions. (N, |φ|), (N, |φ|, |A|) -> (N, |A|)"""
        if not self.use_sde:
            return W[:, 0]
        return (features[:, None] @ W)[:, 0]  # (10)

    def std(self, features: torch.Tensor) -> torch.Tensor:
        """Deviation σ of the noise. (B, |φ|) -> (B, |A|)"""
        if not self.use_sde:
            return self.log_std.exp().expand(len(features), -1)
        # Detached (no gradient): features learn to steer the robot, and the noise must not change them.
        return (features.detach() ** 2 @ (2 * self.log_std).exp() + 1e-6).sqrt()  # (10); 1e-6: never 0


class Agent(nn.Module):
    """Policy and value network: two hidden layers of 64 tanh units each; they share the normaliser only."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args) -> None:
        super().__init__()

        def mlp(outputs: int, last_gain: float) -> nn.Sequential:
            layers = [nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
            if args.ortho_init:
                # [Trick 1] Orthogonal weights keep signals and gradients at one scale from layer to layer
                # (https://arxiv.org/abs/1312.6120; the gain √2 is OpenAI's). Ablate: --no-ortho-init
                for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, last_gain), strict=True):  # Linear
                    nn.init.orthogonal_(layer.weight, gain)
                    nn.init.zeros_(layer.bias)
            return nn.Sequential(*layers)

        # A tiny last layer: the first actions are noise around 0, the middle of the bounds, in every state.
        actor = mlp(action_dim, last_gain=0.01)
        self.features = actor[:-1]  # (B, D) -> (B, |φ|)
        self.mean = actor[-1]  # (B, |φ|) -> (B, |A|); numpy_policy does the same and must change along
        self.critic = mlp(1, last_gain=1.0)  # (B, D) -> (B, 1) values
        self.noise = Noise(64, action_dim, args.log_std_init, args.use_sde)
        # [Trick 3] Angles, speeds and contacts come in different units; a network learns soonest from inputs
        # of one scale (https://arxiv.org/abs/2006.05990). Ablate: --no-norm-obs
        limit = 10.0 if args.norm_obs else math.inf  # without norm_obs never updated: mean 0, scale 1
        self.norm_obs = RunningNorm(obs_dim, limit=limit)  # (11), defined below
        self.norm_return = RunningNorm(1, limit=math.inf)  # for [Trick 4]


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


def to_env(actions, space):
    """From the policy's units, where ±1 are the bounds, to the environment's. (N, |A|) -> (N, |A|)

    Only the environment gets the clipped action: the density (5) is that of the action sampled.
    """
    return space.low + (actions.clip(-1, 1) + 1) / 2 * (space.high - space.low)


def gaussian_log_prob(actions, means, stds):
    """ln π(a|s), equation (5), of actions before they are clipped. All three: (B, |A|). Returns (B,)."""
    return (-0.5 * ((actions - means) / stds) ** 2 - stds.log() - 0.5 * math.log(2 * math.pi)).sum(-1)  # (5)


def gaussian_entropy(stds):
    """Mean entropy in nats, equation (8). stds: (B, |A|). Returns a scalar."""
    return (stds.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()  # (8)


def normalize(advantages):
    """Advantages (B,) shifted to mean 0 and scaled to standard deviation 1."""
    # correction=0: the deviation of a single number is 0, not undefined.
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)


def policy_loss(new_log_probs, old_log_probs, advantages, clip_coef):
    """The clipped objective, equation (6), to be minimised; https://arxiv.org/abs/1707.06347, equation 7.

    new_log_probs, old_log_probs, advantages: (B,). Returns a scalar. The table in ppo.py has its six cases.
    """
    ratio = (new_log_probs - old_log_probs).exp()  # (12)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped * advantages).mean()  # (6)


def value_loss(new_values, old_values, returns, clip_coef=None):
    """Half the mean squared error, equation (7). new_values, old_values, returns: (B,). Returns a scalar."""
    errors = (new_values - returns) ** 2
    if clip_coef is not None:
        # [Trick 8] V gains nothing by moving more than ε from the old V, like the ratio (OpenAI's code).
        # This presumes returns of scale 1 and often hurts, so it is off. Try: --clip-vloss
        clipped = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped - returns) ** 2)
    return 0.5 * errors.mean()  # (7)


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    check_args(args)  # if a setting or the environment cannot work, the script ends here and says why
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    agent = make_agent(args, envs, device)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)  # fused: faster
    run = Run(args, budget=args.total_timesteps, agent=agent, optimizer=optimizer)  # --resume fills these in

    T = args.num_steps
    N = args.num_envs
    D = agent.features[0].in_features
    action_dim = agent.mean.out_features
    # next_obs[t]: where step t led, before any reset. So ends of episodes and rollouts are no special case.
    obs = np.zeros((T, N, D), dtype=np.float32)
    next_obs = np.zeros((T, N, D), dtype=np.float32)
    actions = np.zeros((T, N, action_dim), dtype=np.float32)
    rewards = np.zeros((T, N), dtype=np.float32)
    terminated = np.zeros((T, N), dtype=bool)
    truncated = np.zeros((T, N), dtype=bool)
    earned = np.zeros(N)  # by each environment in its episode so far, older rewards discounted
    hold = args.sde_sample_freq if args.use_sde and args.sde_sample_freq > 0 else T
    # Environments cannot be saved: a resumed run starts new episodes. 0 marks the seeds of training.
    current_obs, _ = envs.reset(seed=env_seeds(N, args.seed, 0, run.step))
    while run.goes_on(args.batch_size):  # until the budget is spent; saves when that is due
        # [A] collect
        policy = numpy_policy(agent)  # obs -> agent.features, agent.mean: in NumPy, for speed
        for t in range(T):
            if t % hold == 0:
                W = agent.noise.draw(min(hold, T - t), N)  # for each step until the next draw
            obs[t] = current_obs
            features, means = policy(obs[t])  # (N, |φ|), (N, |A|)
            actions[t] = means + agent.noise.sample(features, W[t % hold])  # (1)
            env_actions = to_env(actions[t], envs.single_action_space)  # clipped; `actions` are not
            current_obs, rewards[t], terminated[t], truncated[t], info = envs.step(env_actions)
            next_obs[t] = current_obs
            if "final_obs" in info:  # then current_obs is the first of the next episode already
                ended = info["_final_obs"]  # (N,) bool
                next_obs[t, ended] = np.stack(info["final_obs"][ended])
                run.episodes_ended(info["episode"]["r"][ended], info["episode"]["l"][ended])
        run.step += args.batch_size

        # [B] estimate: first what stays the same in all epochs; b_: of the whole batch
        raw_obs = torch.from_numpy(obs).to(device).flatten(0, 1)  # (T, N, D) -> (T*N, D)
        b_obs = agent.norm_obs(raw_obs)
        b_next_obs = agent.norm_obs(torch.from_numpy(next_obs).to(device).flatten(0, 1))
        b_actions = torch.from_numpy(actions).to(device).flatten(0, 1)  # (T, N, |A|) -> (T*N, |A|)
        with torch.no_grad():
            features = agent.features(b_obs)  # (T*N, |φ|)
            stds = agent.noise.std(features)  # (T*N, |A|)
            b_old_log_probs = gaussian_log_prob(b_actions, agent.mean(features), stds)  # (T*N,)
        if args.norm_obs:
            # Only after b_obs is made, so that the policy learns from the numbers with which it acted.
            agent.norm_obs.update(raw_obs)
        scaled_rewards = rewards
        if args.norm_reward:
            # [Trick 4] Returns of scale 1, whatever the rewards' unit. Else the large errors of V make a
            # large gradient; trick 5 shortens all of it, and little is left of the policy's share. Way and
            # limit of 10 are those of OpenAI's VecNormalize. Ablate: --no-norm-reward
            sums, earned = discounted_sums(rewards, terminated | truncated, earned, args.gamma)
            agent.norm_return.update(torch.from_numpy(sums).to(device).reshape(-1, 1))  # (T*N, 1)
            scaled_rewards = (rewards * agent.norm_return.scale.item()).clip(-10, 10)
        learning_rate = args.learning_rate
        if args.anneal_lr:
            # [Trick 2] Ever smaller steps let the policy settle (OpenAI's code). Ablate: --no-anneal-lr
            learning_rate *= 1 - (run.step - args.batch_size) / args.total_timesteps
        optimizer.param_groups[0]["lr"] = learning_rate  # set each time: an lr_scheduler would be overruled
        for epoch in range(args.update_epochs):
            if epoch == 0 or args.recompute_advantages:
                # [Trick 10] In the epoch before, the value network learned; now it judges the same actions
                # better (https://arxiv.org/abs/2006.05990). Ablate: --no-recompute-advantages
                with torch.no_grad():
                    b_values = agent.critic(b_obs).squeeze(-1)  # (T*N, 1) -> (T*N,)
                    b_next_values = agent.critic(b_next_obs).squeeze(-1)
                values = b_values.cpu().numpy().reshape(T, N)
                next_values = b_next_values.cpu().numpy().reshape(T, N)
                advantages = gae(
                    scaled_rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda
                )
                b_advantages = torch.from_numpy(advantages).to(device).flatten()  # (T, N) -> (T*N,)
                b_returns = b_advantages + b_values  # (4)
            if epoch == 0:
                b_old_values = b_values
                explained_variance = 1 - b_advantages.var() / b_returns.var()  # 1: V foretells all of R

            # [C] improve
            order = torch.randperm(args.batch_size).to(device)
            for rows in order.split(args.batch_size // args.num_minibatches):  # (B,)
                mb_advantages = b_advantages[rows]  # mb_: of the minibatch
                if args.norm_adv:
                    # [Trick 7] The policy's gradient has one size, whatever that of rewards (OpenAI's code).
                    # Ablate: --no-norm-adv
                    mb_advantages = normalize(mb_advantages)
                mb_obs = b_obs[rows]
                old_log_probs = b_old_log_probs[rows]
                features = agent.features(mb_obs)  # (B, |φ|)
                stds = agent.noise.std(features)  # (B, |A|)
                new_log_probs = gaussian_log_prob(b_actions[rows], agent.mean(features), stds)  # (B,)
                new_values = agent.critic(mb_obs).squeeze(-1)  # (B,), as (B, 1) − (B,) would be (B, B)
                pg_loss = policy_loss(new_log_probs, old_log_probs, mb_advantages, args.clip_coef)
                value_clip = args.clip_coef if args.clip_vloss else None
                v_loss = value_loss(new_values, b_old_values[rows], b_returns[rows], value_clip)
                loss = pg_loss + args.vf_coef * v_loss  # (9)
                if args.ent_coef:
                    loss = loss - args.ent_coef * gaussian_entropy(stds)  # (9)
                optimizer.zero_grad()
                loss.backward()
                # [Trick 5] One odd minibatch must not throw the policy off (OpenAI's code).
                # Ablate: --max-grad-norm 0
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or torch.inf)
                optimizer.step()
            # [Trick 9] Once the policy is far from the one that collected the data, more epochs mislead it.
            # The last minibatch estimates KL(π_old ‖ π): mean(ρ−1−ln ρ); ρ−1 has mean 0, no term is below 0,
            # http://joschu.net/blog/kl-approx.html. Off by default; try: --target-kl 0.02
            log_ratio = (new_log_probs - old_log_probs).detach()
            approx_kl = (log_ratio.exp() - 1 - log_ratio).mean().item()
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        run.stop_if_not_finite(loss + grad_norm)

        # [D] log: one point per rollout; losses are those of its last minibatch
        run.log("charts", learning_rate=learning_rate)
        run.log(
            "losses",
            policy_loss=pg_loss,
            value_loss=v_loss,
            entropy=gaussian_entropy(stds),
            std=stds.mean(),
            grad_norm=grad_norm,
            approx_kl=approx_kl,
            clip_fraction=((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(),  # ρ not in 1±ε
            explained_variance=explained_variance,
        )
        if args.target_return is not None and run.mean_return() >= args.target_return:
            run.stop()
    envs.close()
    return run.finish(device)


# ---- From here on: the run folder (save, resume, evaluate, film). The same text in every script. ----
# Only what stands before `fail` is this script's own: what it refuses, and how it acts in an evaluation.


MAX_EVAL_STEPS = 30_000  # longest evaluation episode
RANGES = {  # smallest and largest value of every number in Args
    "num_envs": (1, 10_000),
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
    "log_std_init": (-20, 20),
    "max_grad_norm": (0, 1e9),
    "sde_sample_freq": (-1, 1_000_000),
    "target_kl": (0, 1000),
    "seed": (0, 2**32 - 1),
    "eval_episodes": (1, 1_000_000),
    "checkpoint_every": (1, 10**12),
}


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    obs_dim = envs.single_observation_space.shape[0]
    action_dim = envs.single_action_space.shape[0]
    return Agent(obs_dim, action_dim, args).to(device)


def numpy_policy(agent: Agent):
    """The policy as a NumPy function: observations (N, D) -> features (N, |φ|), mean actions (N, |A|).

    For speed only: for a few rows, nearly all of PyTorch's time is overhead. Make it anew for each rollout:
    on the CPU its arrays are the weights themselves and follow the learning, from a GPU they are copies.
    """
    tensors = [agent.norm_obs.shift, agent.norm_obs.scale]
    for layer in (agent.features[0], agent.features[2], agent.mean):
        tensors += [layer.weight.T, layer.bias]
    shift, scale, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3 = (
        tensor.numpy(force=True) for tensor in tensors
    )
    limit = agent.norm_obs.limit

    def policy(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = ((obs - shift) * scale).clip(-limit, limit)
        x = np.tanh(x @ weight_1 + bias_1)
        x = np.tanh(x @ weight_2 + bias_2)
        return x, x @ weight_3 + bias_3

    return policy


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


def discounted_sums(rewards, ended, before, gamma):
    """What each environment has earned in its episode so far, older rewards discounted.

    rewards: (T, N) float. ended: (T, N) bool. before: (N,), the sums at the start. Returns the sums (T, N)
    and those to go on from, (N,): 0 where an episode has just ended.
    """
    sums = np.zeros_like(rewards)
    for t in range(len(rewards)):
        sums[t] = gamma * before + rewards[t]
        before = np.where(ended[t], 0.0, sums[t])
    return sums, before


@contextmanager
def signals_ignored():
    """Processes that are started meanwhile hear neither Ctrl-C nor SIGTERM, which reach whole groups."""
    import atexit
    import multiprocessing

    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        # SIGTERM is also how Gymnasium and Python end processes that are left: kill these.
        for process in multiprocessing.active_children():
            process.terminate = process.kill
            atexit.register(process.kill)


def check_settings(args: Args) -> None:
    """Refuse settings that cannot work together, and robots whose package is missing."""
    if args.batch_size > 10_000_000:
        fail(f"a rollout of {args.batch_size:,} steps is too large: fewer --num-envs or --num-steps")
    if args.batch_size % args.num_minibatches:
        fail(f"{args.batch_size} steps per rollout do not divide into {args.num_minibatches} minibatches")
    if args.norm_adv and args.batch_size == args.num_minibatches:
        fail("a minibatch of one step cannot be normalised: fewer --num-minibatches, or --no-norm-adv")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {args.batch_size} steps")
    bullet = "BulletEnv-" in args.env_id and ":" not in args.env_id
    if bullet and not (find_spec("pybullet") and find_spec("pybullet_envs_gymnasium")):
        fail(
            f"{args.env_id} needs PyBullet: pip install pybullet_envs_gymnasium==0.6.0; from Python 3.12 on "
            "pip install pybullet_arm64==3.2.8 (in spite of its name for Linux on x86, too), then "
            "pip install --no-deps pybullet_envs_gymnasium==0.6.0"
        )


def check_spaces(args: Args, envs: gym.vector.VectorEnv) -> None:
    """Refuse environments that this script cannot handle, and name the script that can."""
    obs_space = envs.single_observation_space
    action_space = envs.single_action_space
    parts = obs_space if isinstance(obs_space, gym.spaces.Tuple) else [obs_space]
    if all(isinstance(part, gym.spaces.Discrete) for part in parts):
        fail(f"{args.env_id} has integer states, this script reads vectors: use q_learning.py")
    if isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 1:
        fail(f"{args.env_id} has images, this script reads vectors: dqn_atari.py plays Atari games")
    if isinstance(obs_space, gym.spaces.Box) and isinstance(action_space, gym.spaces.Discrete):
        fail(f"{args.env_id} has discrete actions, this script has continuous ones: use ppo.py")
    boxes = isinstance(obs_space, gym.spaces.Box) and isinstance(action_space, gym.spaces.Box)
    if not boxes or not obs_space.shape or not np.issubdtype(action_space.dtype, np.floating):
        fail(f"no script handles {args.env_id} with observations {obs_space} and actions {action_space}")
    with np.errstate(over="ignore"):
        finite = np.isfinite(action_space.high - action_space.low).all()
    if len(action_space.shape) != 1 or not finite:
        fail(f"{args.env_id} has actions {action_space}, this script needs one axis with finite bounds")


def load_policy(args: Args, envs: gym.vector.VectorEnv, run_dir: Path, device: torch.device):
    """The greedy policy of a run, observations (N, D) -> mean actions (N, |A|), and its checkpoint."""
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)
    agent.eval()  # dropout and batch normalisation, where you add them, must not act here
    network = numpy_policy(agent)
    space = envs.single_action_space

    def policy(obs: np.ndarray) -> np.ndarray:
        _, means = network(obs.astype(np.float32))
        return to_env(means, space)  # the mean of a normal distribution is its likeliest number

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
#     "moviepy==2.2.1",
#     'pybullet==3.2.7; python_version < "3.12"',
#     'pybullet_envs_gymnasium==0.6.0; python_version < "3.12"',
# ]
# ///
