"""Random Network Distillation (RND) on top of PPO: curiosity finds the reward that chance does not.

Two problems come with rewards. They are sparse: where ten right decisions in a row earn the first one, who
learns from reward alone learns nothing. And somebody has to invent them: hints along the way are work, and
agents exploit them. Curiosity is a reward from within: what cannot be predicted yet is worth a visit. But an
agent that predicts its next observation stops in front of a noisy television, which surprises for ever. RND
predicts the output of a fixed random network for the observation at hand. That function has no noise, so the
error is large only where the observation is unlike those seen before, and fades as they become familiar. (It
avoids a part of the problem only: a television with new pictures for ever stays new.)

Pseudo-code
    watch a random policy, to know the scale of the observations
    repeat until the budget is spent:
        [A] collect   T steps in each of N environments with the current policy
        [B] estimate  how new the observation after each step is; advantages, for the task and for novelty
        [C] improve   policy, values and predictor, K epochs of minibatches; then the running statistics
        [D] log       charts, progress bar

Equations; up to (9) those of ppo.py, with (2), (3), (4) and (7) once for the task and once for novelty
    (1)  a   = argmax_i (z_i + g_i),  g_i ~ Gumbel(0, 1)     is a sample of π = softmax(z)
    (2)  δ_t = r_t + γ V(s_{t+1}) − V(s_t)                   V(s_{t+1}) counts as 0 after a termination
    (3)  A_t = δ_t + γλ A_{t+1}                              A_{t+1} is 0 beyond episode and rollout
    (4)  R_t = A_t + V(s_t)
    (5)  ρ   = π(a|s) / π_old(a|s)
    (6)  L_π = −mean min(ρ A, clip(ρ, 1−ε, 1+ε) A)
    (7)  L_V = ½ mean (V(s) − R)²
    (8)  H   = −Σ_a π(a|s) ln π(a|s)
    (9)  L   = L_π + c_V (L_V^E + L_V^I) − c_H mean H + mean e
    (10) x   = clip((s − μ) / σ, −5, 5)                      running mean μ, deviation σ, by element
    (11) e_t = mean_k (f̂_k(x_{t+1}) − f_k(x_{t+1}))²         novelty: f is fixed, f̂ imitates it
    (12) u_t = γ_I u_{t−1} + e_t                             what each environment gathered, discounted
    (13) i_t = e_t / deviation(u)                            intrinsic reward: returns of one scale everywhere
    (14) A   = c_E A^E + c_I A^I
    (15) m_t = β m_{t−1} + (1−β) s_t                         memory, a fading average; m_0 = s_0

The two returns end differently. The task's rewards come in episodes. Novelty does not end: its (2) and (3)
know no endings, and its s_{t+1} is then the first observation of the next episode. Otherwise the end of an
episode would cut curiosity off, and an agent would dread it more than the task gives reason to.

Symbols: T num_steps, N num_envs, K update_epochs, B minibatch, D observation size, A actions (in formulas:
advantage), C = 2 memory and observation, or 4 frames; s observation, a action, r reward, z logits, π policy,
V value, γ gamma, γ_I int_gamma, λ gae_lambda, ε clip_coef, c_V vf_coef, c_H ent_coef, c_E ext_coef,
c_I int_coef, β memory; x normalised observation, e novelty, u its discounted sum, i intrinsic reward,
m memory; f target, f̂ predictor, k one of their outputs; E of the task, I intrinsic.
Departures from the paper: vectors pass through small layers instead of convolutions, and policy and values
too see them as in (10), with the memory (15) where the paper tries a recurrent network; separate networks for
policy and values; after a time limit (2) looks at the last observation before the reset.
For Pyramids γ is 0.99 and c_I 0.3, not 0.999 and 1, with which runs found the gold and lost it again.
Evaluation samples its actions: the most likely ones alone may turn to and fro in a corner for ever (on
Pyramids, with seed 1, in 4 of 100 episodes, and in none when sampling).
References: RND https://arxiv.org/abs/1810.12894, curiosity at large https://arxiv.org/abs/1808.04355,
PPO https://arxiv.org/abs/1707.06347, advantages (GAE) https://arxiv.org/abs/1506.02438

Read first: ppo.py (it has the reasons for all that is only named here).
New here: target and predictor, two values, a memory.
Run: python algos/rnd_ppo.py
     python algos/rnd_ppo.py --int-coef 0  # the same without curiosity
     python algos/rnd_ppo.py --env-id MiniGrid-DoorKey-8x8-v0 --total-timesteps 1000000
The paper's own game is days of work for a GPU:
     python algos/rnd_ppo.py --env-id ALE/MontezumaRevenge-v5 --clip-rewards --num-envs 128 --num-steps 128 \\
         --num-minibatches 4 --learning-rate 1e-4 --clip-coef 0.1 --gamma 0.999 --int-coef 1 \\
         --ent-coef 0.001 --predictor-share 0.25 --total-timesteps 500000000 --cuda
Expect: on Pyramids a return of 1.79, 1.82 or 1.81 (seeds 1, 2, 3) after 3 million steps and about 6 minutes.
Never to find gold gives −1, Unity's benchmark is 1.75. DoorKey-8x8 ends at 0.97 after a million steps,
MultiRoom-N4-S5 after two million at 0.73, 0.70 and 0.60.
"""

import difflib
import io
import json
import os
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
import minigrid
import numpy as np
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

MAX_EVAL_STEPS = 30_000  # longest evaluation episode


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
    clip_coef: float = 0.2  # ε, how far the ratio may move
    ent_coef: float = 0.01  # c_H, bonus for a policy that keeps its choices open
    vf_coef: float = 0.5  # c_V, weight of the value losses
    ortho_init: bool = True  # [Trick 1] orthogonal initial weights
    anneal_lr: bool = True  # [Trick 2] learning rate falls linearly to 0
    norm_adv: bool = True  # [Trick 3] advantages normalised within the minibatch
    norm_obs: bool = True  # [Trick 4] policy and values too see vectors normalised
    max_grad_norm: float = 0.5  # [Trick 5] longest gradient that is followed; 0 for no limit
    predictor_share: float = 0.5  # [Trick 6] share of each minibatch that trains the predictor
    clip_rewards: bool = False  # [Trick 7] learn from the sign of the task's rewards
    memory: float = 0.97  # [Trick 8] β, how slowly the memory of vectors fades; 0 for no memory
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = False  # off: a network this small is done on the CPU before a GPU has been asked
    eval_episodes: int = 100  # episodes played after training
    checkpoint_every: int = 100_000  # steps that a killed run loses at most, or one rollout
    run_dir: str | None = None  # folder of the run; by default runs/ENV__rnd_ppo__seedS__TIME
    resume: str | None = None  # go on with the run in this folder
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps


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
    """N environments: Atari and the project's own are native batches, others step in turn in this process.

    SAME_STEP: what ends is reset at once, and info["final_obs"] keeps the observation before the reset.
    Exit code 2 for an unknown environment and for spaces that this script cannot handle.
    """
    mode, wrappers = {"autoreset_mode": AutoresetMode.SAME_STEP}, []
    try:
        if args.env_id.startswith("ALE/"):
            # Sticky actions, true rewards and at most 18,000 frames, as in the paper.
            mode |= {"reward_clipping": False, "max_num_frames_per_episode": 18_000}
            colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
            make = partial(gym.make_vec, args.env_id, num_envs, "vector_entry_point", **mode)
            return AtariEnvs(make(), make(**colour) if render_mode else None)
        if args.env_id.startswith("envs."):
            envs = gym.make_vec(args.env_id, num_envs, "vector_entry_point", render_mode=render_mode, **mode)
        else:
            if args.env_id.startswith("MiniGrid-"):
                wrappers = [ImgObsWrapper, gym.wrappers.FlattenObservation]  # (7, 7, 3) -> (147,)
            more = {"vector_kwargs": mode, "wrappers": wrappers, "render_mode": render_mode}
            envs = gym.make_vec(args.env_id, num_envs, "sync", **more)
    except (gym.error.Error, ImportError) as error:
        names = [*gym.registry, "envs.pyramids:Pyramids-v0"]
        near = ", ".join(difflib.get_close_matches(args.env_id, names, cutoff=0.5)) or "none"
        fail(f"cannot make the environment {args.env_id} (nearest known names: {near}): {error}")
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    parts = obs_space if isinstance(obs_space, gym.spaces.Tuple) else [obs_space]
    if all(isinstance(part, gym.spaces.Discrete) for part in parts):
        fail(f"{args.env_id} has integer states, this script reads vectors: use q_learning.py")
    if isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 1:
        fail(f"{args.env_id} has images, this script reads vectors: dqn_atari.py plays Atari games")
    if isinstance(action_space, gym.spaces.Box):
        fail(f"{args.env_id} has continuous actions, this script has discrete ones: use a2c_continuous.py")
    discrete = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
    if not isinstance(obs_space, gym.spaces.Box) or not discrete:
        fail(f"no script handles {args.env_id} with observations {obs_space} and actions {action_space}")
    # [Trick 8] One look does not tell which way the agent was turning, or that a pyramid is falling; what
    # was seen before does (memory traces, https://proceedings.mlr.press/v267/eberhard25a.html).
    # Ablate: --memory 0
    return MemoryTrace(RecordEpisodeStatistics(envs), args.memory)


class MemoryTrace(gym.vector.VectorWrapper):
    """Puts a fading average of what was seen, (15), below each observation: (N, D) -> (N, 2, D)."""

    def __init__(self, envs: gym.vector.VectorEnv, decay: float) -> None:
        super().__init__(envs)
        space, self.decay = envs.single_observation_space, decay
        low, high = np.stack([space.low] * 2), np.stack([space.high] * 2)
        self.single_observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, envs.num_envs)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.trace = obs.astype(np.float32)  # as if it had always been so
        return np.stack([self.trace, obs], axis=1), info

    def step(self, actions: np.ndarray):
        obs, rewards, terminated, truncated, info = super().step(actions)
        seen, ended = obs.copy(), np.flatnonzero(terminated | truncated)
        for n in ended:
            seen[n] = info["final_obs"][n]
        self.trace += (1 - self.decay) * (seen - self.trace)  # (15)
        for n in ended:
            info["final_obs"][n] = np.stack([self.trace[n], seen[n]])
            self.trace[n] = obs[n]  # nothing of the last episode is remembered
        return np.stack([self.trace, obs], axis=1), rewards, terminated, truncated, info


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
        weight, delta = len(batch) / self.count, batch_mean - self.mean
        self.mean += weight * delta
        self.var += weight * (batch_var - self.var + (1 - weight) * delta**2)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *shape) -> (B, *shape) of mean 0, deviation 1; a constant that changes lands at ±limit."""
        return ((x - self.shift) * self.scale).clamp(-self.limit, self.limit)


class Agent(nn.Module):
    """Policy, two values, a random target, and the predictor that learns to imitate it."""

    def __init__(self, shape: tuple[int, ...], num_actions: int, ortho_init: bool, norm_obs: bool) -> None:
        super().__init__()
        self.frames, self.policy_norm = len(shape) == 3, norm_obs
        width, out = (512, 512) if self.frames else (256, 128)

        def layers(depth: int, width: int, act: type[nn.Module]) -> list[nn.Module]:
            if not self.frames:
                inputs = [nn.Flatten(), nn.Linear(depth * shape[1], width)]  # (B, depth, D) -> (B, width)
                return [*inputs, act(), nn.Linear(width, width)]
            conv = [nn.Conv2d(depth, 32, 8, 4), act(), nn.Conv2d(32, 64, 4, 2), act()]
            conv += [nn.Conv2d(64, 64, 3), act(), nn.Flatten()]  # (B, depth, 84, 84) -> (B, 3136)
            return [*conv, nn.Linear(3136, width)]

        def head(outputs: int) -> nn.Sequential:
            return nn.Sequential(*layers(shape[0], width, nn.ReLU), nn.ReLU(), nn.Linear(width, outputs))

        self.actor = head(num_actions)  # (B, C, D) or (B, C, 84, 84) -> (B, A) logits
        self.critic = head(2)  # the same -> (B, 2) values, of the task and intrinsic
        self.target = nn.Sequential(*layers(1, out, nn.LeakyReLU))
        # One layer more than the target: it must fail for lack of examples, never for lack of capacity.
        self.predictor = nn.Sequential(*layers(1, out, nn.LeakyReLU), nn.ReLU(), nn.Linear(out, out))
        if ortho_init:
            # [Trick 1] One scale from layer to layer, as in ppo.py, also for the target's random features.
            # Ablate: --no-ortho-init
            for layer in self.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    gain = {self.actor[-1]: 0.01, self.critic[-1]: 1.0}.get(layer, 2**0.5)
                    nn.init.orthogonal_(layer.weight, gain)
                    nn.init.zeros_(layer.bias)
        self.target.requires_grad_(False)
        self.norm_obs = RunningNorm(1, *shape[1:], limit=5.0)  # (10)
        self.norm_past = RunningNorm(limit=torch.inf)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs: (B, C, D) or bytes (B, C, 84, 84). Returns logits (B, A) and values (B, 2)."""
        if self.frames:
            obs = obs / 255
        elif self.policy_norm:
            # [Trick 4] Beside metres a second, zeros and ones would go unnoticed (normalised observations,
            # https://arxiv.org/abs/2006.05990). Ablate: --no-norm-obs
            obs = self.norm_obs(obs)
        return self.actor(obs), self.critic(obs)

    def newest(self, obs: torch.Tensor) -> torch.Tensor:
        """The last entry: the observation itself, without memory or older frames. Curiosity looks at no more.

        (B, C, D) -> (B, 1, D) or (B, C, 84, 84) -> (B, 1, 84, 84)."""
        return obs[:, -1:]

    def novelty(self, obs: torch.Tensor) -> torch.Tensor:
        """Prediction error, equation (11). obs: (B, 1, D) or (B, 1, 84, 84), the newest. Returns (B,)."""
        x = self.norm_obs(obs)  # (10)
        return ((self.predictor(x) - self.target(x)) ** 2).mean(-1)  # (11)


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    shape, num_actions = envs.single_observation_space.shape, int(envs.single_action_space.n)
    return Agent(shape, num_actions, args.ortho_init, args.norm_obs).to(device)


def discounted_past(novelty, carry, gamma):
    """Equation (12): along time, environments apart. novelty: (T, N); carry: (N,), the last row before it.

    Returns (T, N). The last row is the next carry.
    """
    past = np.zeros_like(novelty)
    for t in range(len(novelty)):
        past[t] = carry = gamma * carry + novelty[t]  # (12)
    return past


def gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation, equations (2) and (3); https://arxiv.org/abs/1506.02438, equation 16.

    rewards, values: (T, N) float. next_values: (T, N), the value of the observation each step led to, before
    any reset. terminated, truncated: (T, N) bool. Returns the advantages (T, N), in units of reward.
    """
    # A time limit is no failure: only `terminated` means "worth nothing from here".
    deltas = rewards + gamma * np.where(terminated, 0.0, next_values) - values  # (2)
    # Either ending cuts the sum: the row below belongs to another episode.
    decay = np.where(terminated | truncated, 0.0, gamma * gae_lambda)
    advantages = np.zeros_like(rewards)
    following = np.zeros_like(rewards[0])  # A_{t+1}, (N,)
    for t in reversed(range(len(rewards))):
        advantages[t] = following = deltas[t] + decay[t] * following  # (3)
    return advantages


def gumbel_noise(*shape):
    """Standard Gumbel noise, minus the logarithm of an exponential variable: a tensor of this shape."""
    return -torch.empty(shape).exponential_().log()


def sample(logits, gumbel):
    """Draw from softmax(logits), equation (1). logits, gumbel: (N, A). Returns actions (N,)."""
    return (logits + gumbel).argmax(-1)  # (1)


def log_prob(logits, actions):
    """ln π(a|s) of the actions taken. logits: (B, A), actions: (B,) integers. Returns (B,)."""
    return logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)


def entropy(logits):
    """Mean entropy of softmax policies in nats, equation (8). logits: (B, A). Returns a scalar."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()  # (8)


def normalize(advantages):
    """Advantages (B,) shifted to mean 0 and scaled to standard deviation 1."""
    # correction=0: the deviation of a single number is 0, not undefined.
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)


def policy_loss(log_probs, old_log_probs, advantages, clip_coef):
    """The clipped surrogate, equation (6), to be minimised; https://arxiv.org/abs/1707.06347, equation 7.

    log_probs, old_log_probs, advantages: (B,). Returns a scalar. The table in ppo.py has its six cases.
    """
    ratio = (log_probs - old_log_probs).exp()  # (5)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped * advantages).mean()  # (6)


def value_loss(values, returns):
    """Half the mean squared errors, equation (7). values, returns: (B, 2), task and novelty. Returns (2,)."""
    return 0.5 * ((values - returns) ** 2).mean(0)  # (7)


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
    """The sampling policy of a run, from observations (N, …) to actions (N,), and its checkpoint."""
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)
    torch.manual_seed(args.seed)  # each evaluation draws the same actions

    @torch.inference_mode()
    def policy(obs: np.ndarray) -> np.ndarray:
        logits, _ = agent(torch.as_tensor(obs, dtype=torch.float32, device=device))
        return sample(logits.cpu(), gumbel_noise(*logits.shape)).numpy()

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
    sizes = (args.num_envs, args.num_steps, args.num_minibatches, args.update_epochs, args.checkpoint_every)
    if min(sizes) < 1 or args.eval_episodes < 1 or args.init_steps < 1 or args.seed < 0:
        fail("every size, number and interval must be at least 1, the seed at least 0")
    if not 0 <= args.memory < 1:
        fail(f"--memory {args.memory} must be at least 0 and less than 1")
    if args.batch_size % args.num_minibatches:
        fail(f"{args.batch_size} steps per rollout do not divide into {args.num_minibatches} minibatches")
    if args.norm_adv and args.batch_size == args.num_minibatches:
        fail("a minibatch of one step cannot be normalised: fewer --num-minibatches, or --no-norm-adv")
    minibatch_size = args.batch_size // args.num_minibatches
    distilled = int(args.predictor_share * minibatch_size)  # rows of each that train the predictor
    if not 1 <= distilled <= minibatch_size:
        fail(f"--predictor-share {args.predictor_share} must leave 1 to all of {minibatch_size} steps")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {args.batch_size} steps")
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    agent = make_agent(args, envs, device)
    parameters = [p for p in agent.parameters() if p.requires_grad]  # all but the target's
    # Not the predictor: its error must not shorten the steps of policy and values.
    clipped = [p for part in (agent.actor, agent.critic) for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
    global_step, episodes, wall_time_s, recent_returns = 0, 0, 0.0, deque(maxlen=100)
    T, N, A = args.num_steps, args.num_envs, agent.actor[-1].out_features
    carry = np.zeros(N, dtype=np.float32)  # of equation (12)
    if args.resume:
        saved = load_checkpoint(Path(args.resume), agent=agent, optimizer=optimizer)
        global_step, episodes, wall_time_s = saved["global_step"], saved["episodes"], saved["wall_time_s"]
        recent_returns.extend(saved["recent_returns"])
        carry = np.resize(np.float32(saved["carry"]), N)
        torch.set_rng_state(saved["rng_state"])
    interrupted = []  # filled by Ctrl-C, so that the loop ends where everything can be saved
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    run_dir, writer = start_run(args, global_step)

    # One row more than steps: where the last step leads to.
    dtype = np.uint8 if agent.frames else np.float32
    obs = np.zeros((T + 1, N, *envs.single_observation_space.shape), dtype=dtype)
    values = np.zeros((T + 1, N, 2), dtype=np.float32)
    # And what each step led to before any reset, which is all that novelty looks at.
    next_obs, actions = np.zeros_like(obs[1:]), np.zeros((T, N), dtype=np.int64)
    rewards, log_probs = np.zeros((2, T, N), dtype=np.float32)
    terminated, truncated, never = np.zeros((3, T, N), dtype=bool)
    visited = np.zeros((N, getattr(envs.unwrapped, "NUM_CELLS", 0)), dtype=bool)  # by the current episodes
    if not args.resume:
        envs.reset(seed=env_seeds(N, args.seed, 2))
        for _ in range(args.init_steps):
            current_obs, *_ = envs.step(torch.randint(A, (N,)).numpy())
            agent.norm_obs.update(agent.newest(torch.from_numpy(current_obs).to(device)))
    # Environments cannot be saved: a resumed run starts new episodes from new seeds.
    current_obs, _ = envs.reset(seed=env_seeds(N, args.seed, 0, global_step))
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True)
    saved_step, started = -args.checkpoint_every, time.perf_counter() - wall_time_s
    while True:
        finished = global_step + args.batch_size > args.total_timesteps
        # One more rollout without saving, and a kill would cost more than checkpoint_every steps.
        if finished or interrupted or global_step + args.batch_size > saved_step + args.checkpoint_every:
            wall_time_s = time.perf_counter() - started
            state = {"global_step": global_step, "episodes": episodes, "wall_time_s": wall_time_s}
            state |= {"recent_returns": list(recent_returns), "rng_state": torch.get_rng_state()}
            state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            state["carry"] = carry.tolist()
            save_checkpoint(run_dir, state)
            writer.flush()
            saved_step = global_step
        if finished or interrupted:
            break

        # [A] collect
        returns, lengths, shares = [], [], []  # of the episodes that end in this rollout
        gumbel = gumbel_noise(T, N, A).to(device)  # once a rollout: each call costs more than its numbers
        with torch.inference_mode():
            for t in range(T):
                obs[t] = current_obs
                logits, step_values = agent(torch.from_numpy(obs[t]).to(device))  # (N, A), (N, 2)
                step_actions = sample(logits, gumbel[t])  # (N,)
                log_probs[t], values[t] = log_prob(logits, step_actions).cpu(), step_values.cpu()
                actions[t] = step_actions.cpu()
                current_obs, rewards[t], terminated[t], truncated[t], info = envs.step(actions[t])
                next_obs[t] = current_obs
                if (ended := terminated[t] | truncated[t]).any():  # there, current_obs is of the next episode
                    next_obs[t, ended] = np.stack(info["final_obs"][ended])
                    returns.extend(info["episode"]["r"][ended].tolist())
                    lengths.extend(info["episode"]["l"][ended].tolist())
                    shares.extend(visited[ended].sum(-1) / max(visited.shape[1], 1))
                    visited[ended] = False
                if visited.size:
                    visited[np.arange(N), info["cell"]] = True
        global_step += args.batch_size
        episodes += len(returns)
        recent_returns.extend(returns)

        # [B] estimate
        obs[T] = current_obs
        b_next_obs = agent.newest(torch.from_numpy(next_obs).to(device).flatten(0, 1))  # (T*N, 1, D)
        novelty = intrinsic = np.zeros_like(rewards)
        with torch.inference_mode():
            values[T] = agent(torch.from_numpy(obs[T]).to(device))[1].cpu()
            next_values = values[1:, :, 0].copy()  # of the task: before a reset, not after it
            if (cut := truncated & ~terminated).any():
                next_values[cut] = agent(torch.from_numpy(next_obs[cut]).to(device))[1][:, 0].cpu()
            if args.int_coef:
                novelty = torch.cat([agent.novelty(part) for part in b_next_obs.split(minibatch_size)])
                novelty = novelty.cpu().numpy().reshape(T, N)  # (T*N,) -> (T, N)
                past = discounted_past(novelty, carry, args.int_gamma)
                carry = past[-1]
                agent.norm_past.update(torch.from_numpy(past).to(device).flatten())
                intrinsic = novelty * agent.norm_past.scale.item()  # (13)
        # [Trick 7] Atari's points are of any size, and one step size must do (DQN). Try: --clip-rewards
        learned_rewards = np.sign(rewards) if args.clip_rewards else rewards
        v, int_v = values[..., 0], values[..., 1]
        task = gae(learned_rewards, v[:-1], next_values, terminated, truncated, args.gamma, args.gae_lambda)
        curious = gae(intrinsic, int_v[:-1], int_v[1:], never, never, args.int_gamma, args.gae_lambda)
        b_returns = torch.from_numpy(np.stack([task, curious], axis=-1) + values[:-1])  # (4) (T, N, 2)
        b_advantages = torch.from_numpy(args.ext_coef * task + args.int_coef * curious)  # (14) (T, N)

        # [C] improve
        # [Trick 2] Ever smaller steps let the policy settle (OpenAI's code). Ablate: --no-anneal-lr
        remaining = 1 - (global_step - args.batch_size) / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        batch = (torch.from_numpy(obs[:-1]), torch.from_numpy(actions), torch.from_numpy(log_probs))
        batch = [x.to(device).flatten(0, 1) for x in (*batch, b_advantages, b_returns)] + [b_next_obs]
        for _ in range(args.update_epochs):
            order = torch.randperm(args.batch_size).to(device)
            for rows in order.split(minibatch_size):
                minibatch = (x[rows] for x in batch)
                mb_obs, mb_actions, mb_log_probs, mb_advantages, mb_returns, mb_next_obs = minibatch
                # [Trick 3] The policy's gradient keeps one scale, whatever the rewards' (OpenAI's code).
                # Ablate: --no-norm-adv
                if args.norm_adv:
                    mb_advantages = normalize(mb_advantages)
                logits, new_values = agent(mb_obs)  # (B, A), (B, 2)
                new_log_probs = log_prob(logits, mb_actions)  # (B,)
                pg_loss = policy_loss(new_log_probs, mb_log_probs, mb_advantages, args.clip_coef)
                v_loss, int_v_loss = value_loss(new_values, mb_returns)
                loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy(logits)  # (9)
                if args.int_coef:
                    # [Trick 6] What the predictor learns at once is not new any more when the policy comes
                    # for it (the paper). Rows are shuffled, so the first are a random share.
                    # Ablate: --predictor-share 1. The rest of (9):
                    loss = loss + args.vf_coef * int_v_loss + agent.novelty(mb_next_obs[:distilled]).mean()
                optimizer.zero_grad()
                loss.backward()
                # [Trick 5] One odd minibatch must not throw the policy off (OpenAI's code).
                # Ablate: --max-grad-norm 0
                grad_norm = nn.utils.clip_grad_norm_(clipped, args.max_grad_norm or torch.inf)
                optimizer.step()
        # Not before: the policy that learns must see what the one that collected saw, or (5) would not be 1.
        for part in b_next_obs.split(minibatch_size):
            agent.norm_obs.update(part)
        if not torch.isfinite(loss + grad_norm):
            bar.close()
            fail(f"the loss is {loss.item()} at step {global_step}; the last checkpoint is good", code=1)

        # [D] log: one point per rollout; losses are those of its last minibatch
        charts = {"SPS": global_step / (time.perf_counter() - started), "learning_rate": learning_rate}
        if returns:
            charts |= {"episodic_return": np.mean(returns), "episodic_length": np.mean(lengths)}
            charts |= {"share_of_cells": np.mean(shares)} if visited.size else {}
            bar.set_postfix_str(f"return {np.mean(recent_returns):.2f}", refresh=False)
        if args.int_coef:
            charts |= {"novelty": novelty.mean(), "intrinsic_reward": intrinsic.mean()}
        charts |= {"value": v.mean(), "intrinsic_value": int_v.mean()}
        log_ratio = (new_log_probs - mb_log_probs).detach()
        losses = {"policy_loss": pg_loss.item(), "value_loss": v_loss.item(), "grad_norm": grad_norm}
        losses |= {"entropy": entropy(logits).item(), "intrinsic_value_loss": int_v_loss.item()}
        losses |= {"approx_kl": (log_ratio.exp() - 1 - log_ratio).mean()}
        losses["clip_fraction"] = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
        losses["explained_variance"] = 1 - task.var() / (task + v[:-1]).var()
        for group, points in {"charts": charts, "losses": losses}.items():
            for name, value in points.items():
                writer.add_scalar(f"{group}/{name}", float(value), global_step)
        bar.update(args.batch_size)

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
