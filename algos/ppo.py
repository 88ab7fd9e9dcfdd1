"""Proximal Policy Optimisation (PPO): several safe steps of the policy from one batch of fresh experience.

A policy gradient can be trusted only near the policy that collected the data. PPO goes over each batch many
times, and it clips the objective: a policy that has moved far gains nothing by moving further.

Pseudo-code
    repeat until the budget is spent:
        [A] collect   a rollout: T steps in each of N environments with the current policy
        [B] estimate  how much better than expected each action was: its advantage
        [C] improve   policy and value network, K epochs: passes over the rollout in shuffled minibatches
        [D] log       charts, progress bar; the episodic return is the plain sum of an episode's rewards

Equations
    (1)  a   ~ π(·|s) = softmax(z)                           z: the outputs of the policy network, the logits
    (2)  δ_t = r_t + γ V(s_{t+1}) − V(s_t)                   V(s_{t+1}) counts as 0 after a termination
    (3)  A_t = δ_t + γλ A_{t+1}                              A_{t+1} is 0 beyond episode and rollout
    (4)  R_t = A_t + V(s_t)                                  estimate of the discounted return Σ_k γ^k r_{t+k}
    (5)  ρ   = π(a|s) / π_old(a|s)                           π_old, the old policy, collected the rollout
    (6)  L_π = −mean min(ρ A, clip(ρ, 1−ε, 1+ε) A)           clip: the nearest number from 1−ε to 1+ε
    (7)  L_V = ½ mean (V(s) − R)²
    (8)  H   = −Σ_a π(a|s) ln π(a|s)                         entropy: how open the choice is; ln: in nats
    (9)  L   = L_π + c_V L_V − c_H mean H

Where (6) comes from. A policy gradient climbs mean A ln π(a|s). The ratio ρ has ∇ρ = ρ ∇ln π and is 1
before the first step: there mean ρ A has the same gradient. After more steps it still estimates, from data of
π_old, how good π is, but less and less well. TRPO, PPO's parent, maximises mean ρ A under a constraint: a
distance of the policies, the Kullback-Leibler divergence KL(π_old ‖ π) = mean −ln ρ, is below a limit. That
takes second derivatives; PPO clips ρ instead. (With one epoch and one minibatch ρ is 1: that is A2C.)

When does (6) have a gradient? Outside 1−ε … 1+ε the clipped term is constant. Where `min` takes it, the
gradient is 0: moving ρ further gains nothing. The six cases (drawn in tests/benchmark/figures/ppo_clip.png):
             ρ < 1−ε                            inside    ρ > 1+ε
    A > 0    yes: a good action became rarer    yes       no: it is likelier already, that is enough
    A < 0    no: it is rarer already, enough    yes       yes: a bad action became likelier

Symbols
    s, a, r   observation, action, reward          T, N      num_steps, num_envs
    π, z      policy, its logits                   K, ε, B   update_epochs, clip_coef, size of a minibatch
    V         value: expected discounted return    D, |A|    size of an observation, number of actions
    δ, A, R   TD error, advantage, target of V     γ, λ      gamma, gae_lambda; c_V, c_H: vf_coef, ent_coef
Departures from the paper: the numbered tricks (each can be switched off), and after a time limit, where more
could follow, (2) looks at the last observation before the reset.
References: PPO https://arxiv.org/abs/1707.06347, TRPO https://arxiv.org/abs/1502.05477, time limits
https://arxiv.org/abs/1712.00378, A2C https://arxiv.org/abs/2205.09123, study https://arxiv.org/abs/2006.05990

Read first: reinforce.py (the policy gradient), a2c_continuous.py (the critic and the advantage).
New here: several epochs on the same batch, made safe by the clipped ratio.
Run: python algos/ppo.py --env-id CartPole-v1
Expect: 500, the largest episodic return, when greedy (always the likeliest action), after 73,728 steps and
about 10 seconds. Why 16 environments? Once all episodes reach 500, no action is better than another, but
[Trick 3] scales the noise left in A up to full size: one reason why with 8 one run in 11 fell back from 500.
"""

import difflib
import io
import json
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
    env_id: str = "CartPole-v1"  # vector observations, discrete actions; module:id imports the module first
    num_envs: int = 16  # N, environments stepped together
    # algorithm
    total_timesteps: int = 75_000  # budget: steps of all environments together
    target_return: float | None = None  # stop once 100 training episodes in a row have this mean
    learning_rate: float = 1e-3  # Adam's step size
    num_steps: int = 128  # T, steps of each environment per rollout
    gamma: float = 0.98  # γ, what a reward one step later is worth
    gae_lambda: float = 0.9  # λ, 0 trusts the value network, 1 trusts the sampled rewards
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 8  # K, epochs per rollout
    clip_coef: float = 0.2  # ε, moving the ratio beyond 1 ± ε gains nothing
    ent_coef: float = 0.0  # c_H, bonus for a policy that keeps its choices open
    vf_coef: float = 0.5  # c_V, weight of the value loss
    ortho_init: bool = True  # [Trick 1] orthogonal initial weights
    anneal_lr: bool = True  # [Trick 2] learning rate falls linearly to 0
    norm_adv: bool = True  # [Trick 3] advantages normalised within the minibatch
    clip_vloss: bool = False  # [Trick 4] value clipped like the ratio
    max_grad_norm: float = 0.5  # [Trick 5] longer gradients are shortened to this (clipping); 0: no limit
    target_kl: float | None = None  # [Trick 6] end the epochs once the KL estimate exceeds this, in nats
    gumbel: bool = True  # [Trick 7] actions drawn with Gumbel noise, made once a rollout
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = False  # use the GPU; off, because the CPU is faster for a network this small
    eval_episodes: int = 100  # greedy episodes played after training
    checkpoint_every: int = 20_000  # save at least every this many steps, or every rollout
    run_dir: str | None = None  # folder of the run; by default runs/ENV__ppo__seedS__TIME
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
    """N environments, stepped in turn in this process: for cheap physics faster than processes.

    SAME_STEP: the step that ends an episode also resets; info["final_obs"] is the observation before that.
    """
    # For a video NEXT_STEP: the picture drawn after an episode's last step must not show the next episode.
    mode = AutoresetMode.SAME_STEP if render_mode is None else AutoresetMode.NEXT_STEP
    options = {"autoreset_mode": mode}
    envs = gym.make_vec(args.env_id, num_envs, "sync", vector_kwargs=options, render_mode=render_mode)
    return RecordEpisodeStatistics(envs)


class Agent(nn.Module):
    """Policy and value network: two hidden layers of 64 tanh units each, nothing shared."""

    def __init__(self, obs_dim: int, num_actions: int, ortho_init: bool) -> None:
        super().__init__()

        def mlp(outputs: int, last_gain: float) -> nn.Sequential:
            layers = [nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
            if ortho_init:
                # [Trick 1] Orthogonal weights keep signals and gradients at one scale from layer to layer
                # (https://arxiv.org/abs/1312.6120; the gain √2 is OpenAI's). Ablate: --no-ortho-init
                for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, last_gain), strict=True):  # Linear
                    nn.init.orthogonal_(layer.weight, gain)
                    nn.init.zeros_(layer.bias)
            return nn.Sequential(*layers)

        # A tiny last layer makes the first policy nearly uniform: random logits must not steer exploration.
        self.actor = mlp(num_actions, last_gain=0.01)  # (B, D) -> (B, |A|) logits
        self.critic = mlp(1, last_gain=1.0)  # (B, D) -> (B, 1) values


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
    envs = make_envs(args, args.num_envs)
    agent = make_agent(args, envs, device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)  # fused: faster
    run = Run(args, budget=args.total_timesteps, agent=agent, optimizer=optimizer)  # --resume fills these in

    T = args.num_steps
    N = args.num_envs
    D = agent.actor[0].in_features
    num_actions = agent.actor[-1].out_features
    # next_obs[t]: where step t led, before any reset. So ends of episodes and rollouts are no special case.
    obs = np.zeros((T, N, D), dtype=np.float32)
    next_obs = np.zeros((T, N, D), dtype=np.float32)
    actions = np.zeros((T, N), dtype=np.int64)
    rewards = np.zeros((T, N), dtype=np.float32)
    terminated = np.zeros((T, N), dtype=bool)
    truncated = np.zeros((T, N), dtype=bool)
    # Environments cannot be saved: a resumed run starts new episodes. 0 marks the seeds of training.
    current_obs, _ = envs.reset(seed=env_seeds(N, args.seed, 0, run.step))
    while run.goes_on(args.batch_size):  # until the budget is spent; saves when that is due
        # [A] collect
        if args.gumbel:
            # [Trick 7] With Gumbel noise g, argmax_i (z_i + g_i) is a sample of softmax(z), and several times
            # cheaper than sampling a Categorical: https://arxiv.org/abs/1611.01144. Ablate: --no-gumbel
            noise = gumbel_noise(T, N, num_actions).to(device)
        with torch.inference_mode():
            for t in range(T):
                obs[t] = current_obs
                logits = agent.actor(torch.from_numpy(obs[t]).to(device))  # (N, |A|)
                if args.gumbel:
                    action = (logits + noise[t]).argmax(-1)  # (1)
                else:
                    action = torch.distributions.Categorical(logits=logits).sample()  # (1)
                actions[t] = action.cpu().numpy()
                current_obs, rewards[t], terminated[t], truncated[t], info = envs.step(actions[t])
                next_obs[t] = current_obs
                if "final_obs" in info:  # then current_obs is the first of the next episode already
                    ended = info["_final_obs"]  # (N,) bool
                    next_obs[t, ended] = np.stack(info["final_obs"][ended])
                    run.episodes_ended(info["episode"]["r"][ended], info["episode"]["l"][ended])
        run.step += args.batch_size

        # [B] estimate: the networks see the whole batch (b_) at once, which is cheaper than step by step
        b_obs = torch.from_numpy(obs).to(device).flatten(0, 1)  # (T, N, D) -> (T*N, D)
        b_next_obs = torch.from_numpy(next_obs).to(device).flatten(0, 1)
        b_actions = torch.from_numpy(actions).to(device).flatten()  # (T, N) -> (T*N,)
        with torch.no_grad():
            b_old_log_probs = log_prob(agent.actor(b_obs), b_actions)  # (T*N,)
            b_old_values = agent.critic(b_obs).squeeze(-1)  # (T*N, 1) -> (T*N,)
            b_next_values = agent.critic(b_next_obs).squeeze(-1)
        values = b_old_values.cpu().numpy().reshape(T, N)
        next_values = b_next_values.cpu().numpy().reshape(T, N)
        advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        b_advantages = torch.from_numpy(advantages).to(device).flatten()
        b_returns = b_advantages + b_old_values  # (4)

        # [C] improve
        learning_rate = args.learning_rate
        if args.anneal_lr:
            # [Trick 2] Ever smaller steps let the policy settle (OpenAI's code). Ablate: --no-anneal-lr
            learning_rate *= 1 - (run.step - args.batch_size) / args.total_timesteps
        optimizer.param_groups[0]["lr"] = learning_rate  # set each time: an lr_scheduler would be overruled
        for _ in range(args.update_epochs):
            order = torch.randperm(args.batch_size).to(device)
            for rows in order.split(args.batch_size // args.num_minibatches):  # (B,)
                mb_advantages = b_advantages[rows]  # mb_: of the minibatch
                if args.norm_adv:
                    # [Trick 3] The policy's gradient has one size, whatever that of rewards (OpenAI's code).
                    # Ablate: --no-norm-adv
                    mb_advantages = normalize(mb_advantages)
                mb_obs = b_obs[rows]
                old_log_probs = b_old_log_probs[rows]
                logits = agent.actor(mb_obs)  # (B, |A|)
                new_log_probs = log_prob(logits, b_actions[rows])  # (B,)
                new_values = agent.critic(mb_obs).squeeze(-1)  # (B,), as (B, 1) − (B,) would be (B, B)
                pg_loss = policy_loss(new_log_probs, old_log_probs, mb_advantages, args.clip_coef)
                value_clip = args.clip_coef if args.clip_vloss else None
                v_loss = value_loss(new_values, b_old_values[rows], b_returns[rows], value_clip)
                loss = pg_loss + args.vf_coef * v_loss  # (9)
                if args.ent_coef:
                    loss = loss - args.ent_coef * entropy(logits)  # (9)
                optimizer.zero_grad()
                loss.backward()
                # [Trick 5] One odd minibatch must not throw the policy off (OpenAI's code).
                # Ablate: --max-grad-norm 0
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm or torch.inf)
                optimizer.step()
            # [Trick 6] Once the policy is far from the one that collected the data, more epochs mislead it.
            # The last minibatch estimates KL(π_old ‖ π): mean(ρ−1−ln ρ); ρ−1 has mean 0, no term is below 0,
            # http://joschu.net/blog/kl-approx.html. Off by default; try: --target-kl 0.005
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
            entropy=entropy(logits),
            grad_norm=grad_norm,
            approx_kl=approx_kl,
            clip_fraction=((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(),  # ρ not in 1±ε
            explained_variance=1 - (b_returns - b_old_values).var() / b_returns.var(),  # 1: V foretells all
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
    "max_grad_norm": (0, 1e9),
    "target_kl": (0, 1000),
    "seed": (0, 2**32 - 1),
    "eval_episodes": (1, 1_000_000),
    "checkpoint_every": (1, 10**12),
}


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    obs_dim = envs.single_observation_space.shape[0]
    num_actions = int(envs.single_action_space.n)
    return Agent(obs_dim, num_actions, args.ortho_init).to(device)


def check_settings(args: Args) -> None:
    """Refuse settings that cannot work together."""
    if args.batch_size > 10_000_000:
        fail(f"a rollout of {args.batch_size:,} steps is too large: fewer --num-envs or --num-steps")
    if args.batch_size % args.num_minibatches:
        fail(f"{args.batch_size} steps per rollout do not divide into {args.num_minibatches} minibatches")
    if args.norm_adv and args.batch_size == args.num_minibatches:
        fail("a minibatch of one step cannot be normalised: fewer --num-minibatches, or --no-norm-adv")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {args.batch_size} steps")


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


def load_policy(args: Args, envs: gym.vector.VectorEnv, run_dir: Path, device: torch.device):
    """The greedy policy of a run, observations (N, D) -> likeliest actions (N,), and its checkpoint."""
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)
    agent.eval()  # dropout and batch normalisation, where you add them, must not act here

    @torch.inference_mode()
    def policy(obs: np.ndarray) -> np.ndarray:
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        return agent.actor(obs).argmax(-1).cpu().numpy()

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
# ]
# ///
