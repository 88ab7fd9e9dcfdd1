"""REINFORCE: play whole episodes, then make those actions likelier after which more reward came than usual.

The policy is a neural network that gives each action a probability. Its weights climb along the gradient of
the expected return. This oldest of the policy-gradient methods needs complete episodes and ∇ln π, no more.

Pseudo-code
    repeat until the budget is spent:
        [A] collect   a rollout: fresh experience, here one complete episode from each of N environments
        [B] credit    every action with the rewards that followed it, less a baseline: what is usual
        [C] improve   the policy by one step along its gradient; with --baseline value V learns the returns
        [D] log       charts, progress bar; the episodic return is the plain sum of an episode's rewards

Equations
    (1)  a   ~ π(·|s) = softmax(z)                           drawn; π(a|s) = e^{z_a} / Σ_j e^{z_j}
    (2)  G_t = r_t + γ G_{t+1}                               discounted return; 0 beyond the last step
    (3)  b_t = mean of G_t over the other episodes           --baseline batch: those still running at t
         b_t = V(s_t)                                        --baseline value; none: b_t = 0
    (4)  A_t = G_t − b_t                                     advantage: more than usual, or less
    (5)  L   = −mean [A ln π(a|s) + c_H H(s)]                over all M steps of the N episodes
    (6)  g_i = N ∇L_i                                        L_i: episode i's part of L, so ∇L = mean g_i
    (7)  Var = Σ_i ‖g_i − ∇L‖² / (N (N−1))                   how far chance moves ∇L: charts/grad_variance
    (8)  H   = −Σ_a π(a|s) ln π(a|s)                         entropy: how open the choice is; ln: in nats
    (9)  L_V = ½ mean (V(s) − G)²
    (10) s   ← (s − mean s) / √var s, within ±5              --normalize-obs

A policy is deterministic if it is a function, a = μ(s), and stochastic if it gives each action a probability
π(a|s), which a small step can raise a little. Training draws from (1); evaluation is greedy: the likeliest a.

Value-based methods (q_learning.py) learn what actions are worth and take the best. Policy-based methods learn
the policy itself. Gained: the policy has chance in it, so no exploration is made by hand; where two states
look the same (aliased states) the policy can toss a coin, while a deterministic one errs in one of them for
ever; continuous actions need no search for the best one. Lost: a gradient climbs the nearest hill, which may
be a local optimum, and its estimate has a large variance, (7).

Why −∇L points uphill: an episode is a trajectory τ = (s_0, a_0, r_0, s_1, a_1, …) with the probability
    p(τ) = p(s_0) Π_t π(a_t|s_t) p(r_t, s_{t+1}|s_t, a_t).
The goal is the largest J = E[G_0] = Σ_τ p(τ) G_0(τ). In p(τ) only π has weights, and ∇p = p ∇ln p, so
    ∇J = Σ_τ p(τ) G_0 ∇ln p(τ) = E[ G_0 Σ_t ∇ln π(a_t|s_t) ]:
a mean, which the episodes that are played estimate. With A = G_0, c_H = 0, ∇L is their estimate times −N/M.
Any number c that is known before a_t is drawn can be added to G_0 in term t: the mean stays, since
    E[ c ∇ln π(a|s) ] = c Σ_a π(a|s) ∇π(a|s) / π(a|s) = c ∇ Σ_a π(a|s) = c ∇1 = 0.
With c = −(discounted rewards before t), G_0 becomes γ^t G_t. c = −γ^t b_t is allowed, too, if b_t is made of
s_t or of other episodes; (5) leaves γ^t out of both. They only take chance out of ∇L. On CartPole, at an
episodic return of 80–160, (7) is 17 with --no-reward-to-go --baseline none, 4.9 with --baseline none, 1.9
with value, 1.5 with batch (medians; --no-normalize-returns; tests/benchmark/reinforce_baselines.py).

Symbols
    s, a, r   observation, action, reward             N, M      num_envs, steps of all N episodes together
    π, z, V   policy, its outputs (logits), values    T, T_i    steps of the longest episode, of episode i
    G, b, A   discounted return, baseline, advantage  D, |A|    size of an observation, number of actions
    L, ∇, P   loss, gradient, number of weights       γ, c_H    gamma, entropy_coef; B: any number of rows
Departures from the paper: a mean over the steps of several episodes; no factor γ^t in (5), so late steps
count like early ones; Adam; after a time limit, where more could follow, (2) goes on with V of the last
observation if there is a V; every numbered trick except 2.
References: REINFORCE and baselines https://doi.org/10.1007/BF00992696, why they lower the variance
https://jmlr.org/papers/v5/greensmith04a.html, the other episodes as a baseline
https://openreview.net/forum?id=r1lgTGL5DE, time limits https://arxiv.org/abs/1712.00378

Read first: q_learning.py (states, actions, returns).
New here: a network is the policy, and its gradient is estimated from samples.
Run: python algos/reinforce.py
Expect: an episodic return of 500, the maximum, after 224,000 to 265,000 steps, 15 to 30 seconds.
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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "CartPole-v1"  # vector observations, discrete actions; module:id imports the module first
    num_envs: int = 8  # N, environments stepped together, one episode from each per update
    # algorithm
    total_episodes: int = 640  # budget: episodes of all environments together
    learning_rate: float = 3e-2  # Adam's step size
    gamma: float = 0.99  # γ, what a reward one step later is worth
    hidden_sizes: list[int] = field(default_factory=lambda: [64])  # units of each hidden layer
    entropy_coef: float = 0.0  # c_H, bonus for a policy that keeps its choices open
    reward_to_go: bool = True  # [Trick 1] an action is credited with the rewards after it only
    baseline: Literal["none", "batch", "value"] = "batch"  # [Trick 2] what a return is compared with
    normalize_returns: bool = True  # [Trick 3] advantages, made of returns, with mean 0 and deviation 1
    anneal_lr: bool = True  # [Trick 4] learning rate falls linearly to 0
    normalize_obs: bool = False  # [Trick 5] observations scaled to mean 0 and deviation 1
    restart_credit: bool = False  # [Trick 6] no credit beyond the next reward that is not 0
    clip_rewards: bool = False  # [Trick 7] only the sign of a reward counts
    variance_every: int = 10  # updates from one point of charts/grad_variance to the next
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = False  # use the GPU; off, because the CPU is faster for a network this small
    eval_episodes: int = 100  # greedy episodes played after training
    checkpoint_every: int = 100  # save at least every this many episodes, or every rollout
    run_dir: str | None = None  # folder of the run; by default runs/ENV__reinforce__seedS__TIME
    resume: str | None = None  # go on with the run in this folder; schedules follow the budget given now
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """N environments: the project's own compute all N at once, others step in turn in this process.

    SAME_STEP: the step that ends an episode also resets; info["final_obs"] is the observation before that.
    """
    # For a video NEXT_STEP: the picture drawn after an episode's last step must not show the next episode.
    mode = AutoresetMode.SAME_STEP if render_mode is None else AutoresetMode.NEXT_STEP
    options = {"autoreset_mode": mode}
    if args.env_id.startswith("envs."):
        return gym.make_vec(args.env_id, num_envs, "vector_entry_point", render_mode=render_mode, **options)
    return gym.make_vec(args.env_id, num_envs, "sync", vector_kwargs=options, render_mode=render_mode)


class Agent(nn.Module):
    """Policy and, for --baseline value, value network: hidden layers of ReLU units, nothing shared."""

    def __init__(self, obs_dim: int, num_actions: int, args: Args) -> None:
        super().__init__()

        def mlp(outputs: int) -> nn.Sequential:
            layers = []
            inputs = obs_dim
            for units in args.hidden_sizes:
                layers += [nn.Linear(inputs, units), nn.ReLU()]
                inputs = units
            return nn.Sequential(*layers, nn.Linear(inputs, outputs))

        self.actor = mlp(num_actions)  # (B, D) -> (B, |A|) logits
        self.critic = mlp(1) if args.baseline == "value" else None  # (B, D) -> (B, 1) values
        self.norm_obs = RunningNorm(obs_dim, limit=5.0) if args.normalize_obs else None  # (10), defined below

    def scale(self, obs: np.ndarray) -> torch.Tensor:
        """Observations (B, D) as the networks read them: float32 tensors, with [Trick 5] normalised."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.actor[-1].weight.device)
        # [Trick 5] Positions, speeds and angles on one scale, or large inputs drown small ones (common
        # practice). Off by default, as CartPole is learned without it, too; try: --normalize-obs
        return self.norm_obs(obs) if self.norm_obs else obs


def sample(logits):
    """Draw from softmax(logits), equation (1). logits: (N, |A|). Returns actions (N,)."""
    # The same as Categorical(logits=logits).sample(), several times cheaper: with Gumbel noise g = −ln x,
    # x exponential, argmax_i (z_i + g_i) is a draw from softmax(z), https://arxiv.org/abs/1611.01144.
    gumbel = -torch.empty(logits.shape).exponential_().log()
    return (logits + gumbel.to(logits.device)).argmax(-1)  # (1)


def returns_to_go(rewards, playing, last_values, gamma, restart=False):
    """Discounted returns from each step on, equation (2).

    rewards: (T, N) float, 0 beyond an episode's end. playing: (T, N) bool, true up to its last step.
    last_values: (N,), value of the observation after the last step, 0 without V or if it terminated. restart:
    whether each sum ends with the first reward other than 0. Returns (T, N).
    """
    # In the rows beyond an episode's end, a decay of 1 carries its last value back to its last step.
    decay = np.where(playing, gamma, 1.0)
    if restart:
        # [Trick 6] In a game like Pong each point is a new start: no action before it brought about what
        # follows (http://karpathy.github.io/2016/05/31/rl/). For games of points; try: --restart-credit
        decay[rewards != 0] = 0.0
    returns = np.zeros_like(rewards)
    following = last_values  # G_{t+1}, (N,)
    for t in reversed(range(len(rewards))):
        following = rewards[t] + decay[t] * following  # (2)
        returns[t] = following
    return returns


def mean_of_others(returns, playing):
    """The batch baseline, equation (3). returns, playing: (T, N). Returns (T, N): 0 if no other is left."""
    # The episode itself is left out: its return depends on its action, and a baseline must not.
    total = np.where(playing, returns, 0.0).sum(1, keepdims=True)  # (T, 1)
    others = playing.sum(1, keepdims=True) - playing
    return np.where(others > 0, (total - returns) / np.maximum(others, 1), 0.0)  # (3)


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


def grad_variance(actor, obs, actions, advantages, playing, entropy_coef):
    """Chance in the gradient, equation (7). obs: (M, D), actions, advantages: (M,), playing: (T, N)."""
    N = playing.shape[1]
    episode = torch.from_numpy(playing.nonzero()[1]).to(obs.device)  # (M,), which one a step belongs to
    gradients = []
    for i in range(N):
        rows = episode == i  # true in T_i places
        logits = actor(obs[rows])  # (T_i, |A|)
        loss = -(advantages[rows] * log_prob(logits, actions[rows])).mean() - entropy_coef * entropy(logits)
        gradient = torch.autograd.grad(N * rows.sum() / len(obs) * loss, list(actor.parameters()))  # (6)
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(gradients).var(0).sum() / N  # (N, P) -> (P,) -> ()  (7)


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    check_args(args)  # if a setting or the environment cannot work, the script ends here and says why
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    agent = make_agent(args, envs, device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)  # fused: faster
    run = Run(args, budget=args.total_episodes, unit="episodes", agent=agent, optimizer=optimizer)

    N = args.num_envs
    while run.goes_on(N):  # until the budget is spent; saves when that is due
        # [A] collect: finished environments keep stepping, but their steps are ignored. To take the first N
        # episodes that end, in any environment, would be wrong: short ones end first, often by a failure.
        current_obs, _ = envs.reset(seed=env_seeds(N, args.seed, 0, run.episodes))  # 0: seeds of training
        obs = []
        actions = []
        rewards = []
        playing = []
        unfinished = np.ones(N, dtype=bool)
        out_of_time = np.zeros(N, dtype=bool)
        last_obs = np.zeros_like(current_obs)  # (N, D), the observation after an episode's last step
        rng_state = torch.get_rng_state()
        with torch.inference_mode():
            while unfinished.any() and not run.stopped:
                action = sample(agent.actor(agent.scale(current_obs))).cpu().numpy()  # (N, D) -> (N,)
                obs.append(current_obs)
                current_obs, reward, terminated, truncated, info = envs.step(action)
                actions.append(action)
                rewards.append(reward)
                playing.append(unfinished)
                ended = unfinished & (terminated | truncated)
                if ended.any():  # then current_obs is the first of the next episode already
                    last_obs[ended] = np.stack(info["final_obs"][ended])
                    out_of_time[ended] = ~terminated[ended]
                    unfinished = unfinished & ~ended
        if run.stopped:  # Ctrl-C: half an episode has no return; --resume plays these episodes again
            torch.set_rng_state(rng_state)
            continue
        playing = np.stack(playing)  # (T, N)
        rewards = np.where(playing, np.stack(rewards), 0.0)  # (T, N)
        lengths = playing.sum(0)  # (N,)
        run.step += int(lengths.sum())
        run.episodes_ended(rewards.sum(0), lengths)

        # [B] credit
        played_obs = np.stack(obs)[playing]  # (T, N, D) -> (M, D); b_…: tensors of the whole batch
        b_obs = agent.scale(played_obs)
        b_actions = torch.from_numpy(np.stack(actions)[playing]).to(device)  # (T, N) -> (M,)
        last_values = np.zeros(N)
        if args.baseline == "value":
            with torch.no_grad():
                b_old_values = agent.critic(b_obs).squeeze(-1)  # (M, 1) -> (M,)
                last_values = agent.critic(agent.scale(last_obs)).squeeze(-1).cpu().numpy()  # (N,)
            # After a time limit more could follow: the next value counts. After `terminated` nothing follows.
            last_values = np.where(out_of_time, last_values, 0.0)
        if args.clip_rewards:
            # [Trick 7] A large reward, as for winning a match, must not drown the small ones (as in DQN,
            # https://doi.org/10.1038/nature14236). Off by default; try: --clip-rewards
            rewards = np.sign(rewards)
        returns = returns_to_go(rewards, playing, last_values, args.gamma, args.restart_credit)  # (T, N)
        advantages = returns
        # [Trick 1] Past rewards only add chance (the paper has the whole return). Ablate: --no-reward-to-go
        if not args.reward_to_go:
            advantages = np.broadcast_to(returns[0], returns.shape)
        # [Trick 2] Rewards that come anyway only add chance, too (Williams 1992). Ablate: --baseline none
        if args.baseline == "batch":
            advantages = advantages - mean_of_others(advantages, playing)  # (4)
        b_advantages = torch.from_numpy(advantages[playing]).float().to(device)  # (M,)
        if args.baseline == "value":
            b_advantages = b_advantages - b_old_values  # (4)
        if args.normalize_returns:
            # [Trick 3] A has one scale while returns grow (common practice). Ablate: --no-normalize-returns
            b_advantages = normalize(b_advantages)

        # [C] improve: one step only, because ∇J is a mean over episodes of the policy as it is
        learning_rate = args.learning_rate
        if args.anneal_lr:
            # [Trick 4] Ever smaller steps let the policy settle (common practice). Ablate: --no-anneal-lr
            learning_rate *= 1 - (run.episodes - N) / args.total_episodes
        optimizer.param_groups[0]["lr"] = learning_rate  # set each time: an lr_scheduler would be overruled
        charts = {"learning_rate": learning_rate}
        logits = agent.actor(b_obs)  # (M, |A|)
        pg_loss = -(b_advantages * log_prob(logits, b_actions)).mean()
        mean_entropy = entropy(logits)
        loss = pg_loss - args.entropy_coef * mean_entropy  # (5)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(agent.actor.parameters(), torch.inf)  # clips nothing, measures
        if N > 1 and run.episodes // N % args.variance_every == 0:
            variance = grad_variance(agent.actor, b_obs, b_actions, b_advantages, playing, args.entropy_coef)
            charts["grad_variance"] = variance
        optimizer.step()
        if args.baseline == "value":
            b_returns = torch.from_numpy(returns[playing]).float().to(device)  # (M,)
            # N steps, each on a part of the batch: the returns that V learns do not change while it learns.
            for rows in torch.randperm(len(b_obs)).to(device).chunk(N):
                new_values = agent.critic(b_obs[rows]).squeeze(-1)  # (B,), as (B, 1) − (B,) would be (B, B)
                v_loss = 0.5 * ((new_values - b_returns[rows]) ** 2).mean()  # (9)
                optimizer.zero_grad()  # the policy has no gradient now, so Adam leaves it alone
                v_loss.backward()
                optimizer.step()
        if args.normalize_obs:  # after [C]: the policy that learns must see what the one that played saw
            agent.norm_obs.update(torch.from_numpy(played_obs).to(device))
        run.stop_if_not_finite(loss + grad_norm)

        # [D] log: one point per update
        run.log("charts", **charts)
        run.log("losses", policy_loss=pg_loss, entropy=mean_entropy, grad_norm=grad_norm)
        if args.baseline == "value":
            explained_variance = 1 - (b_returns - b_old_values).var() / b_returns.var()  # 1: V foretells all
            run.log("losses", value_loss=v_loss, explained_variance=explained_variance)
    envs.close()
    return run.finish(device)


# ---- From here on: the run folder (save, resume, evaluate, film). The same text in every script. ----
# Only what stands before `fail` is this script's own: what it refuses, and how it acts in an evaluation.


MAX_EVAL_STEPS = 30_000  # longest evaluation episode
RANGES = {  # smallest and largest value of every number in Args
    "num_envs": (1, 10_000),
    "total_episodes": (1, 10**12),
    "learning_rate": (0, 10),
    "gamma": (0, 1),
    "hidden_sizes": (1, 100_000),
    "entropy_coef": (-100, 100),
    "variance_every": (1, 1_000_000),
    "seed": (0, 2**32 - 1),
    "eval_episodes": (1, 1_000_000),
    "checkpoint_every": (1, 10**12),
}


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    obs_dim = envs.single_observation_space.shape[0]
    num_actions = int(envs.single_action_space.n)
    return Agent(obs_dim, num_actions, args).to(device)


def check_settings(args: Args) -> None:
    """Refuse settings that cannot work together."""
    if args.total_episodes < args.num_envs:
        fail(f"--total-episodes {args.total_episodes} is less than one for each of {args.num_envs} envs")
    if args.baseline == "batch" and args.num_envs == 1:
        fail("--baseline batch compares episodes with each other: it needs --num-envs 2 or more")
    if args.restart_credit and not args.reward_to_go:
        fail("--restart-credit cuts what --no-reward-to-go wants whole: choose one")


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
        return agent.actor(agent.scale(obs)).argmax(-1).cpu().numpy()

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
