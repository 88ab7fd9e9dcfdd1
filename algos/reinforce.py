"""REINFORCE: play whole episodes, then make likelier whatever was followed by more reward than usual.

The oldest policy gradient: it needs neither a model of the world nor a value function, only complete episodes
and the derivative of ln π.

Pseudo-code
    repeat until the budget is spent:
        [A] collect   one complete episode from each of N environments with the current policy
        [B] credit    every action with the rewards that followed it, compared with a baseline
        [C] improve   the policy by one step along its gradient; the value network learns the returns
        [D] log       charts, progress bar

Equations
    (1)  a   = argmax_i (z_i + g_i),  g_i ~ Gumbel(0, 1)     is a sample of π = softmax(z), which means
         π(i|s) = e^{z_i} / Σ_j e^{z_j}                      of the network's outputs z, the logits
    (2)  G_t = r_t + γ G_{t+1}                               the return; 0 after the end of an episode
    (3)  b_t = mean of G_t over the other episodes           --baseline batch: those that last beyond t
         b_t = V(s_t)                                        --baseline value; none: b_t = 0
    (4)  A_t = G_t − b_t
    (5)  L_i = −(N/M) Σ_t [A_t ln π(a_t|s_t) + c_H H(s_t)]   the loss of episode i
    (6)  d_i = ∇L_i,   d = (1/N) Σ_i d_i                     the step goes along −d
    (7)  Var = Σ_i ‖d_i − d‖² / (N (N−1))                    chance in d: charts/grad_variance
    (8)  H   = −Σ_a π(a|s) ln π(a|s)                         entropy: large while the choice is open
    (9)  L_V = ½ mean (V(s) − G)²
    (10) s   ← (s − mean s) / √var s, within ±5              --normalize-obs

Why does −d point along the gradient of the expected return J = E[G_0]? An episode's probability is the
product of what the world does, which does not depend on the policy's weights, and of all π(a_t|s_t). With
∇p = p ∇ln p,
    ∇J = E[ G_0 Σ_t ∇ln π(a_t|s_t) ].
Any number c that is settled before a_t is drawn can be added to G_0 in term t without changing the mean, for
    E[ c ∇ln π(a|s) ] = c Σ_a π(a|s) ∇π(a|s) / π(a|s) = c ∇ Σ_a π(a|s) = c ∇1 = 0.
The rewards before t are such a number, so the return from t on will do; a baseline made of s_t or of other
episodes is one, too. Both take nothing but chance out of d. On CartPole, 3 seeds, the median of (7) is
                                       while the return is 40–80   80–160   160–320    at last it is
    --no-reward-to-go --baseline none                     11         17         14               64
    --baseline none                                        3.6        4.9       10              384
    --baseline batch                                       1.1        1.5        1.5            500
    --baseline value                                       1.4        1.9        1.2            500
(all with --no-normalize-returns; the curves: tests/benchmark/figures/reinforce_baselines.png).

Why one episode from each environment, and not the first N that end? Those would be the short ones: the
policy would be judged by its failures, and the better it got, the less of its best would be seen.

Symbols: N num_envs, T steps of the longest episode, M steps of all N episodes together, D observation size,
A actions (in formulas: advantage), P weights of the policy; s observation, a action, r reward, z logits,
π policy, V value, γ gamma, c_H entropy_coef; B minibatch of (9), L steps of one episode.
Departures from the paper: several episodes a step, divided by all their steps; discounting without the factor
γ^t in (5), so that late steps count like early ones; Adam; after a time limit, which is no failure, (2)
goes on with V of the last observation if there is a V; the numbered tricks but 2, which is the paper's.
References: REINFORCE and baselines https://doi.org/10.1007/BF00992696, why they lower the variance
https://jmlr.org/papers/v5/greensmith04a.html, the other episodes as a baseline
https://openreview.net/forum?id=r1lgTGL5DE, time limits https://arxiv.org/abs/1712.00378

Read first: q_learning.py (states, actions, returns).
New here: a network is the policy, and its gradient is estimated from samples.
Run: python algos/reinforce.py
Expect: CartPole 500, the maximum, in 7 seconds (265,000 steps). With the flags that README shows, Pixelcopter
473, 311 and 498 (seeds 1, 2, 3) in 4 to 5 minutes, and PLE's Pong 1.12, 1.29 and 1.37 in 2 to 3 minutes:
points ahead when the time limit ends the match.
"""

import difflib
import io
import json
import os
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MAX_EVAL_STEPS = 30_000  # longest evaluation episode


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
    reward_to_go: bool = True  # [Trick 1] an action answers for the rewards after it only
    baseline: Literal["none", "batch", "value"] = "batch"  # [Trick 2] what a return is compared with
    normalize_returns: bool = True  # [Trick 3] compared returns scaled to mean 0 and deviation 1
    anneal_lr: bool = True  # [Trick 4] learning rate falls linearly to 0
    normalize_obs: bool = False  # [Trick 5] observations scaled to mean 0 and deviation 1
    restart_credit: bool = False  # [Trick 6] no credit beyond the next reward that is not 0
    clip_rewards: bool = False  # [Trick 7] only the sign of a reward counts
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = False  # off: a network this small is done on the CPU before a GPU has been asked
    eval_episodes: int = 100  # greedy episodes played after training
    checkpoint_every: int = 100  # episodes that a killed run loses at most, or N if that is more
    run_dir: str | None = None  # folder of the run; by default runs/ENV__reinforce__seedS__TIME
    resume: str | None = None  # go on with the run in this folder
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """N environments: the project's own are native batches, others step in turn in this process.

    SAME_STEP: what ends is reset at once, and info["final_obs"] keeps the observation before the reset.
    Exit code 2 for an unknown environment and for spaces that this script cannot handle.
    """
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    try:
        if args.env_id.startswith("envs."):
            envs = gym.make_vec(args.env_id, num_envs, "vector_entry_point", render_mode=render_mode, **mode)
        else:
            envs = gym.make_vec(args.env_id, num_envs, "sync", vector_kwargs=mode, render_mode=render_mode)
    except (gym.error.Error, ImportError) as error:
        names = [*gym.registry, "envs.pixelcopter:Pixelcopter-v0", "envs.pong:PongPLE-v0"]
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
    return envs


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
    """Policy and, for --baseline value, value network: hidden layers of ReLU units, nothing shared."""

    def __init__(self, obs_dim: int, num_actions: int, args: Args) -> None:
        super().__init__()

        def mlp(outputs: int) -> nn.Sequential:
            layers, sizes = [], [obs_dim, *args.hidden_sizes]
            for inputs, units in zip(sizes[:-1], sizes[1:], strict=True):
                layers += [nn.Linear(inputs, units), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))

        self.actor = mlp(num_actions)  # (B, D) -> (B, A) logits
        self.critic = mlp(1) if args.baseline == "value" else None  # (B, D) -> (B, 1) values
        self.norm_obs = RunningNorm(obs_dim, limit=5.0) if args.normalize_obs else None  # (10)

    def scale(self, obs: np.ndarray) -> torch.Tensor:
        """Observations (B, D) as the networks read them: float32 tensors, with [Trick 5] normalised."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.actor[-1].weight.device)
        # [Trick 5] Positions, speeds and angles on one scale, or the largest drowns the others (common
        # practice). Off by default, CartPole's are alike; try: --normalize-obs
        return self.norm_obs(obs) if self.norm_obs else obs


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    obs_dim, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    return Agent(obs_dim, num_actions, args).to(device)


def returns_to_go(rewards, playing, last_values, gamma, restart=False):
    """Discounted sums of the rewards from each step on, equation (2).

    rewards: (T, N) float. playing: (T, N) bool, true up to the episode's last step; what lies beyond it
    belongs to another episode. last_values: (N,), the worth of the observation after the last step: 0 if it
    terminated. restart: whether every reward other than 0 ends the sums before it. Returns (T, N).
    """
    rewards = np.where(playing, rewards, 0.0)
    # Beyond the end nothing decays, which carries the last value back to the last step.
    decay = np.where(playing, gamma, 1.0)
    if restart:
        # [Trick 6] After a point play starts afresh: what came before it did not bring about what follows
        # (http://karpathy.github.io/2016/05/31/rl/). For games of points; try: --restart-credit
        decay[rewards != 0] = 0.0
    returns, following = np.zeros_like(rewards), last_values  # following: G_{t+1}, (N,)
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + decay[t] * following  # (2)
    return returns


def mean_of_others(returns, playing):
    """The batch baseline, equation (3): each episode is compared with the others at the same time step.

    returns, playing: (T, N). Returns (T, N); 0 where no other episode lasts beyond this step. Leaving out the
    episode itself matters: its own return depends on its own action.
    """
    total = np.where(playing, returns, 0.0).sum(1, keepdims=True)  # (T, 1)
    others = playing.sum(1, keepdims=True) - playing
    return np.where(others > 0, (total - returns) / np.maximum(others, 1), 0.0)  # (3)


def in_a_row(x, playing):
    """(T, N, …) -> (M, …), a tensor: one episode after the other, nothing from beyond their ends."""
    return torch.from_numpy(x.swapaxes(0, 1)[playing.T])


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
        return agent.actor(agent.scale(obs)).argmax(-1).cpu().numpy()

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
    sizes = (args.num_envs, args.checkpoint_every, args.eval_episodes, *args.hidden_sizes)
    if min(sizes) < 1 or args.seed < 0:
        fail("every size, number and interval must be at least 1, the seed at least 0")
    if args.total_episodes < args.num_envs:
        fail(f"--total-episodes {args.total_episodes} is less than one for each of {args.num_envs} envs")
    if args.baseline == "batch" and args.num_envs == 1:
        fail("--baseline batch compares episodes with each other: it needs --num-envs 2 or more")
    if args.restart_credit and not args.reward_to_go:
        fail("--restart-credit cuts what --no-reward-to-go wants whole: choose one")
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    agent = make_agent(args, envs, device)
    weights = list(agent.actor.parameters())
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    global_step, episodes, wall_time_s, recent_returns = 0, 0, 0.0, deque(maxlen=100)
    if args.resume:
        saved = load_checkpoint(Path(args.resume), agent=agent, optimizer=optimizer)
        global_step, episodes, wall_time_s = saved["global_step"], saved["episodes"], saved["wall_time_s"]
        recent_returns.extend(saved["recent_returns"])
        torch.set_rng_state(saved["rng_state"])
    interrupted = []  # filled by Ctrl-C, so that the loop ends where everything can be saved
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    run_dir, writer = start_run(args, global_step)

    N, A, zero = args.num_envs, agent.actor[-1].out_features, torch.zeros((), device=device)
    bar = tqdm(total=args.total_episodes, initial=episodes, unit=" episodes")
    saved_episodes, started = -args.checkpoint_every, time.perf_counter() - wall_time_s
    while True:
        finished = episodes + N > args.total_episodes
        # One more update without saving, and a kill would cost more than checkpoint_every episodes.
        if finished or interrupted or episodes + N > saved_episodes + args.checkpoint_every:
            wall_time_s = time.perf_counter() - started
            state = {"global_step": global_step, "episodes": episodes, "wall_time_s": wall_time_s}
            state |= {"recent_returns": list(recent_returns), "rng_state": torch.get_rng_state()}
            state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(run_dir, state)
            writer.flush()
            saved_episodes = episodes
        if finished or interrupted:
            break

        # [A] collect: who has finished plays on unseen until the last one is through
        obs, _ = envs.reset(seed=env_seeds(N, args.seed, 0, episodes))
        rows, playing, out_of_time = [], np.ones(N, dtype=bool), np.zeros(N, dtype=bool)
        last_obs = np.zeros_like(obs)  # the observation after the last step
        with torch.inference_mode():
            while playing.any() and not interrupted:
                logits = agent.actor(agent.scale(obs))  # (N, A)
                actions = sample(logits, gumbel_noise(N, A).to(device)).cpu().numpy()
                next_obs, rewards, terminated, truncated, info = envs.step(actions)
                rows.append((obs, actions, rewards, playing))
                obs = next_obs
                ended = playing & (terminated | truncated)
                if ended.any():  # then obs is the first of the next episode already
                    last_obs[ended] = np.stack(info["final_obs"][ended])
                    out_of_time |= ended & ~terminated
                    playing = playing & ~ended
        if interrupted:
            continue  # half an episode has no return
        obs, actions, rewards, playing = (np.stack(column) for column in zip(*rows, strict=True))  # (T, N, *)
        lengths = playing.sum(0)  # (N,)
        returns = np.where(playing, rewards, 0.0).sum(0)
        global_step += int(lengths.sum())
        episodes += N
        recent_returns.extend(returns.tolist())

        # [B] credit
        b_obs = agent.scale(in_a_row(obs, playing))  # (T, N, D) -> (M, D)
        b_actions = in_a_row(actions, playing).to(device)  # (T, N) -> (M,)
        values, last_values = zero, np.zeros(N)
        if agent.critic is not None:
            with torch.no_grad():
                values = agent.critic(b_obs).squeeze(-1)  # (M, 1) -> (M,)
                last_values = agent.critic(agent.scale(last_obs)).squeeze(-1).cpu().numpy()  # (N,)
            # A time limit is no failure: only who terminated gets nothing from here on.
            last_values = np.where(out_of_time, last_values, 0.0)
        # [Trick 7] Prizes for a whole match must not drown what a single point teaches (as in DQN,
        # https://doi.org/10.1038/nature14236). Off by default; try: --clip-rewards
        credit = np.sign(rewards) if args.clip_rewards else rewards
        credit = returns_to_go(credit, playing, last_values, args.gamma, args.restart_credit)  # (T, N)
        b_returns = in_a_row(credit, playing).float().to(device)  # (M,)
        # [Trick 1] Rewards of the past only add chance (Williams 1992 has the whole return).
        # Ablate: --no-reward-to-go
        if not args.reward_to_go:
            credit[:] = credit[0]
        # [Trick 2] The same goes for what comes whatever one does (Williams 1992). Ablate: --baseline none
        if args.baseline == "batch":
            credit = credit - mean_of_others(credit, playing)
        b_advantages = in_a_row(credit, playing).float().to(device) - values  # (4)
        # [Trick 3] The gradient keeps one scale while returns grow (common practice).
        # Ablate: --no-normalize-returns
        if args.normalize_returns:
            b_advantages = normalize(b_advantages)

        # [C] improve: one step of the policy, for it has left its data behind after that
        # [Trick 4] Ever smaller steps let the policy settle (common practice). Ablate: --no-anneal-lr
        remaining = 1 - (episodes - N) / args.total_episodes
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        # Episode by episode: so their gradients can be compared, and memory holds the layers of one only.
        gradients, pg_loss, mean_entropy = [], 0.0, 0.0
        pieces = (x.split(lengths.tolist()) for x in (b_obs, b_actions, b_advantages))
        for e_obs, e_actions, e_advantages in zip(*pieces, strict=True):
            # Every step weighs the same: a mean of episode means would make more of the short ones' steps.
            weight = len(e_obs) / len(b_obs)
            logits = agent.actor(e_obs)  # (L, A)
            e_loss = -weight * (e_advantages * log_prob(logits, e_actions)).mean()
            e_entropy = weight * entropy(logits)
            gradient = torch.autograd.grad(N * (e_loss - args.entropy_coef * e_entropy), weights)  # (5)
            gradients.append(torch.cat([part.flatten() for part in gradient]))
            pg_loss += e_loss.item()
            mean_entropy += e_entropy.item()
        gradients = torch.stack(gradients)  # (N, P)
        mean_gradient = gradients.mean(0)  # (6)
        grad_variance = ((gradients - mean_gradient) ** 2).sum() / (N * max(N - 1, 1))  # (7)
        optimizer.zero_grad()
        for w, part in zip(weights, mean_gradient.split([w.numel() for w in weights]), strict=True):
            w.grad = part.view_as(w)
        optimizer.step()
        v_loss = zero
        if agent.critic is not None:
            # One pass in N minibatches: a regression may use its data more than once, the policy may not.
            for index in torch.randperm(len(b_obs)).to(device).chunk(N):
                new_values = agent.critic(b_obs[index]).squeeze(-1)  # (B,); (B, 1) would compare all pairs
                v_loss = 0.5 * ((new_values - b_returns[index]) ** 2).mean()  # (9)
                optimizer.zero_grad()  # the policy has no gradient now, so Adam leaves it alone
                v_loss.backward()
                optimizer.step()
        if agent.norm_obs:  # not before: the policy that learns must be the one that played
            agent.norm_obs.update(in_a_row(obs, playing).to(device))
        if not torch.isfinite(mean_gradient.sum() + v_loss):
            bar.close()
            loss = pg_loss + v_loss.item()
            fail(f"the loss is {loss} at step {global_step}; the last checkpoint is good", code=1)

        # [D] log: one point per update
        writer.add_scalar("charts/episodic_return", np.mean(returns), global_step)
        writer.add_scalar("charts/episodic_length", np.mean(lengths), global_step)
        speed = global_step / (time.perf_counter() - started)
        writer.add_scalar("charts/SPS", speed, global_step)
        writer.add_scalar("charts/learning_rate", learning_rate, global_step)
        losses = {"policy_loss": pg_loss, "entropy": mean_entropy, "grad_norm": mean_gradient.norm()}
        if N > 1:
            writer.add_scalar("charts/grad_variance", float(grad_variance), global_step)
        if agent.critic is not None:
            losses["value_loss"] = v_loss.item()
            losses["explained_variance"] = 1 - (b_returns - values).var() / b_returns.var()
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        bar.set_postfix_str(f"return {np.mean(recent_returns):.1f}, {speed:,.0f} steps/s", refresh=False)
        bar.update(N)

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
