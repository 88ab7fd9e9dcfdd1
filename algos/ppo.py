"""Proximal Policy Optimisation (PPO): many small, safe policy steps from one batch of fresh experience.

The policy gradient knows in which direction good actions become likelier, but only near the policy that
gathered the data. PPO goes over each batch several times and clips the objective, so that nothing is gained
by going far.

Pseudo-code
    repeat until the budget is spent:
        [A] collect   T steps in each of N environments with the current policy
        [B] estimate  how much better than expected each action was: the advantages
        [C] improve   policy and value network, K epochs of minibatches
        [D] log       charts, progress bar

Equations
    (1)  a   = argmax_i (z_i + g_i),  g_i ~ Gumbel(0, 1)     is a sample of π = softmax(z)
    (2)  δ_t = r_t + γ V(s_{t+1}) − V(s_t)                   V(s_{t+1}) counts as 0 after a termination
    (3)  A_t = δ_t + γλ A_{t+1}                              A_{t+1} is 0 beyond episode and rollout
    (4)  R_t = A_t + V(s_t)                                  what the value network should have said
    (5)  ρ   = π(a|s) / π_old(a|s)                           how much likelier the action is; 1 at first
    (6)  L_π = −mean min(ρ A, clip(ρ, 1−ε, 1+ε) A)
    (7)  L_V = ½ mean (V(s) − R)²
    (8)  H   = −Σ_a π(a|s) ln π(a|s)
    (9)  L   = L_π + c_V L_V − c_H mean H

When has the clipped objective (6) a gradient? `min` takes the worse of two terms, and only the first has one.
             ρ < 1−ε                            inside    ρ > 1+ε
    A > 0    yes: a good action became rare     yes       no: already likelier, enough is enough
    A < 0    no: already rarer, enough          yes       yes: a bad action became likely
It vanishes just where a step would lead on in a direction followed far enough; the way back stays open.

Symbols: T num_steps, N num_envs, K update_epochs, B minibatch, D observation size, A actions (in formulas:
advantage); s observation, a action, r reward, z logits, π policy, V value, γ gamma, λ gae_lambda,
ε clip_coef, c_V vf_coef, c_H ent_coef.
Departures from the paper: the numbered tricks (each can be switched off), and after a time limit, which is no
failure, (2) looks at the last observation before the reset.
References: PPO https://arxiv.org/abs/1707.06347, advantages (GAE) https://arxiv.org/abs/1506.02438,
which details matter https://arxiv.org/abs/2006.05990, time limits https://arxiv.org/abs/1712.00378

Read first: reinforce.py (the policy gradient), a2c_continuous.py (the critic and the advantage).
New here: several epochs on the same batch, made safe by the clipped ratio.
Run: python algos/ppo.py --env-id CartPole-v1
Expect: a return of 500, the maximum, after 75,000 steps and about 6 seconds.
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
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MAX_EVAL_STEPS = 30_000  # longest evaluation episode


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "CartPole-v1"  # vector observations, discrete actions; module:id imports the module first
    num_envs: int = 8  # N, environments stepped together
    # algorithm
    total_timesteps: int = 75_000  # budget: steps of all environments together
    target_return: float | None = None  # stop once the mean of the last 100 training episodes reaches this
    learning_rate: float = 1e-3  # Adam's step size
    num_steps: int = 128  # T, steps of each environment per rollout
    gamma: float = 0.98  # γ, what a reward one step later is worth
    gae_lambda: float = 0.9  # λ, 0 trusts the value network, 1 trusts the sampled rewards
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 8  # K, epochs per rollout
    clip_coef: float = 0.2  # ε, how far the ratio may move
    ent_coef: float = 0.0  # c_H, bonus for a policy that keeps its choices open
    vf_coef: float = 0.5  # c_V, weight of the value loss
    ortho_init: bool = True  # [Trick 1] orthogonal initial weights
    anneal_lr: bool = True  # [Trick 2] learning rate falls linearly to 0
    norm_adv: bool = True  # [Trick 3] advantages normalised within the minibatch
    clip_vloss: bool = False  # [Trick 4] value clipped like the ratio
    max_grad_norm: float = 0.5  # [Trick 5] longest gradient that is followed; 0 for no limit
    target_kl: float | None = None  # [Trick 6] end the epochs once the policy has moved this far, in nats
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = False  # off: a network this small is done on the CPU before a GPU has been asked
    eval_episodes: int = 100  # greedy episodes played after training
    checkpoint_every: int = 20_000  # steps that a killed run loses at most, or one rollout
    run_dir: str | None = None  # folder of the run; by default runs/ENV__ppo__seedS__TIME
    resume: str | None = None  # go on with the run in this folder
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

    SAME_STEP: what ends is reset at once, and info["final_obs"] keeps the observation before the reset.
    Exit code 2 for an unknown environment and for spaces that this script cannot handle.
    """
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    try:
        envs = gym.make_vec(args.env_id, num_envs, "sync", vector_kwargs=mode, render_mode=render_mode)
    except (gym.error.Error, ImportError) as error:
        near = ", ".join(difflib.get_close_matches(args.env_id, gym.registry, cutoff=0.5)) or "none"
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
                for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, last_gain), strict=True):
                    nn.init.orthogonal_(layer.weight, gain)
                    nn.init.zeros_(layer.bias)
            return nn.Sequential(*layers)

        # A tiny last layer makes the first policy nearly uniform: random logits must not steer exploration.
        self.actor = mlp(num_actions, last_gain=0.01)  # (B, D) -> (B, A) logits
        self.critic = mlp(1, last_gain=1.0)  # (B, D) -> (B, 1) values


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    obs_dim, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    return Agent(obs_dim, num_actions, args.ortho_init).to(device)


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


def value_loss(values, old_values, returns, clip_coef=None):
    """Half the mean squared error, equation (7). values, old_values, returns: (B,). Returns a scalar."""
    errors = (values - returns) ** 2
    if clip_coef is not None:
        # [Trick 4] The value may leave its old self by ε only, like the ratio (OpenAI's code).
        # It presumes returns of scale 1 and often hurts, so it is off. Try: --clip-vloss
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped - returns) ** 2)
    return 0.5 * errors.mean()  # (7)


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
    """The greedy policy of a run, a function of observations (N, D) to actions (N,), and its checkpoint."""
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)

    @torch.inference_mode()
    def policy(obs: np.ndarray) -> np.ndarray:
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        return agent.actor(obs).argmax(-1).cpu().numpy()

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
    if min(sizes) < 1 or args.eval_episodes < 1 or args.seed < 0:
        fail("every size, number and interval must be at least 1, the seed at least 0")
    if args.batch_size % args.num_minibatches:
        fail(f"{args.batch_size} steps per rollout do not divide into {args.num_minibatches} minibatches")
    if args.norm_adv and args.batch_size == args.num_minibatches:
        fail("a minibatch of one step cannot be normalised: fewer --num-minibatches, or --no-norm-adv")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {args.batch_size} steps")
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    agent = make_agent(args, envs, device)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
    global_step, episodes, wall_time_s, recent_returns = 0, 0, 0.0, deque(maxlen=100)
    if args.resume:
        saved = load_checkpoint(Path(args.resume), agent=agent, optimizer=optimizer)
        global_step, episodes, wall_time_s = saved["global_step"], saved["episodes"], saved["wall_time_s"]
        recent_returns.extend(saved["recent_returns"])
        torch.set_rng_state(saved["rng_state"])
    interrupted = []  # filled by Ctrl-C, so that the loop ends where everything can be saved
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    run_dir, writer = start_run(args, global_step)

    # Each row keeps the observation its step led to: the edges of episodes and rollouts are no special case.
    T, N, D, A = args.num_steps, args.num_envs, agent.actor[0].in_features, agent.actor[-1].out_features
    obs, next_obs = np.zeros((2, T, N, D), dtype=np.float32)
    actions, rewards = np.zeros((T, N), dtype=np.int64), np.zeros((T, N), dtype=np.float32)
    terminated, truncated = np.zeros((2, T, N), dtype=bool)
    # Environments cannot be saved: a resumed run starts new episodes from new seeds.
    current_obs, _ = envs.reset(seed=env_seeds(N, args.seed, 0, global_step))
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True)
    saved_step, started = -args.checkpoint_every, time.perf_counter() - wall_time_s
    while True:
        finished = global_step + args.batch_size > args.total_timesteps
        if args.target_return is not None and len(recent_returns) == 100:
            finished |= bool(np.mean(recent_returns) >= args.target_return)
        # One more rollout without saving, and a kill would cost more than checkpoint_every steps.
        if finished or interrupted or global_step + args.batch_size > saved_step + args.checkpoint_every:
            wall_time_s = time.perf_counter() - started
            state = {"global_step": global_step, "episodes": episodes, "wall_time_s": wall_time_s}
            state |= {"recent_returns": list(recent_returns), "rng_state": torch.get_rng_state()}
            state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(run_dir, state)
            writer.flush()
            saved_step = global_step
        if finished or interrupted:
            break

        # [A] collect
        returns, lengths = [], []  # of the episodes that end in this rollout
        gumbel = gumbel_noise(T, N, A).to(device)  # once a rollout: each call costs more than its numbers
        with torch.inference_mode():
            for t in range(T):
                obs[t] = current_obs
                logits = agent.actor(torch.from_numpy(obs[t]).to(device))  # (N, A)
                actions[t] = sample(logits, gumbel[t]).cpu().numpy()
                current_obs, rewards[t], terminated[t], truncated[t], info = envs.step(actions[t])
                next_obs[t] = current_obs
                if "final_obs" in info:  # then current_obs is the first of the next episode already
                    ended = info["_final_obs"]
                    next_obs[t, ended] = np.stack(info["final_obs"][ended])
                    returns.extend(info["episode"]["r"][ended].tolist())
                    lengths.extend(info["episode"]["l"][ended].tolist())
        global_step += args.batch_size
        episodes += len(returns)
        recent_returns.extend(returns)

        # [B] estimate: the networks see the whole batch at once, which is cheaper than step by step
        b_obs = torch.from_numpy(obs).to(device).flatten(0, 1)  # (T, N, D) -> (T*N, D)
        b_next_obs = torch.from_numpy(next_obs).to(device).flatten(0, 1)
        b_actions = torch.from_numpy(actions).to(device).flatten()  # (T, N) -> (T*N,)
        with torch.no_grad():
            b_log_probs = log_prob(agent.actor(b_obs), b_actions)  # (T*N,)
            b_values = agent.critic(b_obs).squeeze(-1)  # (T*N, 1) -> (T*N,)
            b_next_values = agent.critic(b_next_obs).squeeze(-1)
        values, next_values = (v.cpu().numpy().reshape(T, N) for v in (b_values, b_next_values))
        advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        b_advantages = torch.from_numpy(advantages).to(device).flatten()
        b_returns = b_advantages + b_values  # (4)

        # [C] improve
        # [Trick 2] Ever smaller steps let the policy settle (OpenAI's code). Ablate: --no-anneal-lr
        remaining = 1 - (global_step - args.batch_size) / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        value_clip = args.clip_coef if args.clip_vloss else None
        for _ in range(args.update_epochs):
            order = torch.randperm(args.batch_size).to(device)
            batch = (b_obs, b_actions, b_log_probs, b_advantages, b_values, b_returns)
            minibatches = (x[order].split(args.batch_size // args.num_minibatches) for x in batch)
            for minibatch in zip(*minibatches, strict=True):
                mb_obs, mb_actions, mb_log_probs, mb_advantages, mb_values, mb_returns = minibatch
                # [Trick 3] The policy's gradient keeps one scale, whatever the rewards' (OpenAI's code).
                # Ablate: --no-norm-adv
                if args.norm_adv:
                    mb_advantages = normalize(mb_advantages)
                logits = agent.actor(mb_obs)  # (B, A)
                log_probs = log_prob(logits, mb_actions)  # (B,)
                new_values = agent.critic(mb_obs).squeeze(-1)  # (B,); (B, 1) would make (7) compare all pairs
                pg_loss = policy_loss(log_probs, mb_log_probs, mb_advantages, args.clip_coef)
                v_loss = value_loss(new_values, mb_values, mb_returns, value_clip)
                loss = pg_loss + args.vf_coef * v_loss  # (9)
                if args.ent_coef:
                    loss = loss - args.ent_coef * entropy(logits)  # (9)
                optimizer.zero_grad()
                loss.backward()
                # [Trick 5] One odd minibatch must not throw the policy off (OpenAI's code).
                # Ablate: --max-grad-norm 0
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or torch.inf)
                optimizer.step()
            # [Trick 6] A policy that has left its data learns no more from them. mean(ρ − 1 − ln ρ)
            # estimates KL(π_old ‖ π) and is never negative (http://joschu.net/blog/kl-approx.html).
            # Off by default; try: --target-kl 0.02
            log_ratio = (log_probs - mb_log_probs).detach()
            approx_kl = (log_ratio.exp() - 1 - log_ratio).mean().item()
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        if not torch.isfinite(loss + grad_norm):
            bar.close()
            fail(f"the loss is {loss.item()} at step {global_step}; the last checkpoint is good", code=1)

        # [D] log: one point per rollout; losses are those of its last minibatch
        if returns:
            writer.add_scalar("charts/episodic_return", np.mean(returns), global_step)
            writer.add_scalar("charts/episodic_length", np.mean(lengths), global_step)
            bar.set_postfix_str(f"return {np.mean(recent_returns):.1f}", refresh=False)
        writer.add_scalar("charts/SPS", global_step / (time.perf_counter() - started), global_step)
        writer.add_scalar("charts/learning_rate", learning_rate, global_step)
        losses = {"policy_loss": pg_loss.item(), "value_loss": v_loss.item(), "grad_norm": grad_norm}
        losses |= {"entropy": entropy(logits).item(), "approx_kl": approx_kl}
        losses["clip_fraction"] = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
        losses["explained_variance"] = 1 - (b_returns - b_values).var() / b_returns.var()
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", float(value), global_step)
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
