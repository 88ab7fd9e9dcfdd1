"""Advantage actor-critic (A2C): learn at once from what just happened, judged by a critic; for robots.

REINFORCE waits for the end of an episode and credits each action with all the reward that followed. A2C stops
after T steps: a second network, the critic, estimates the return still to come and stands in for the rest of
the episode. It also says what to expect at the start, so that an action is credited only with the surprise.

Pseudo-code
    repeat until the budget is spent:
        [A] collect   T steps in each of N environments with the current policy
        [B] estimate  how much better than expected each action was: the advantages
        [C] improve   one gradient step for the policy and the value network, then forget the batch
        [D] log       charts, progress bar

Equations
    (1)  a   = μ(s) + n,  n_j ~ N(0, σ_j(s)²)                the action that the policy learns from
    (2)  δ_t = r_t + γ V(s_{t+1}) − V(s_t)                   V(s_{t+1}) counts as 0 after a termination
    (3)  A_t = δ_t + γλ A_{t+1}                              A_{t+1} is 0 beyond episode and rollout
    (4)  R_t = A_t + V(s_t)                                  what the value network should have said
    (5)  ln π(a|s) = −Σ_j [(a_j − μ_j)² / 2σ_j² + ln σ_j + ½ ln 2π]
    (6)  L_π = −mean A ln π(a|s)
    (7)  L_V = mean (V(s) − R)²                              without the ½ of other scripts, as in SB3
    (8)  H   = Σ_j [ln σ_j + ½ ln 2πe]
    (9)  L   = L_π + c_V L_V − c_H mean H
    (10) n_j = Σ_i φ_i(s) W_ij,  W_ij ~ N(0, σ_ij²)          noise as a function of the state (gSDE),
         so that σ_j(s)² = Σ_i φ_i(s)² σ_ij²
    (11) running mean and variance when k numbers join m, with w = k / (m+k) and d = mean_k − mean:
         mean ← mean + w d,   var ← (1−w) var + w var_k + w (1−w) d²
    (12) v ← α v + (1−α) g²,  θ ← θ − η g / √(v + ε)         RMSprop, ε inside the root

Symbols: T num_steps, N num_envs, B = T·N batch, D observation size, A actions (in formulas: advantage),
F = 64 features; s observation, a action, r reward, μ mean and σ deviation of the policy π, φ last
hidden layer below μ, V value, γ gamma, λ gae_lambda, c_V vf_coef, c_H ent_coef, g gradient, θ parameters,
η learning rate; in (12) v running mean of g², α = 0.99, ε = 1e-5. With λ = 1, and V in place of all that
follows the last step, (3) is the G_t − V(s_t) of reinforce.py.
Departures from the paper (A3C): environments step together, not in threads that overwrite each other's work
(the missing A, asynchronous); GAE; the numbered tricks (each can be switched off); and after a time limit,
which is no failure, (2) looks at the last observation before the reset.
References: A3C https://arxiv.org/abs/1602.01783, advantages (GAE) https://arxiv.org/abs/1506.02438,
gSDE https://arxiv.org/abs/2005.05719, time limits https://arxiv.org/abs/1712.00378, running variance
(Chan et al.) http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf

Read first: reinforce.py (the policy gradient).
New here: the critic, the advantage, continuous actions, observations normalised by running statistics.
Lacking beside ppo.py: nothing keeps a step from going too far, so each batch serves once and steps are small.
Run: python algos/a2c_continuous.py
Expect: a return of 2,279, 2,398 or 2,499 (seeds 1, 2, 3) after 2M steps, 2,000 a second if nothing else runs.
MuJoCo's cheetah, at 10,000 a second, wants other settings; it came to 4,418, 5,192 and 1,662 after 1M steps:
    python algos/a2c_continuous.py --env-id HalfCheetah-v5 --total-timesteps 1000000 --no-use-sde \\
        --log-std-init -1 --gae-lambda 0.95 --no-use-rms-prop --learning-rate 3e-4
The same flags serve HalfCheetahBulletEnv-v0; with the ant's, seed 1 ended at 567 there.
"""

import difflib
import io
import json
import math
import os
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

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
LOG_EVERY = 100  # rollouts per point in the charts: writing one takes about as long as learning from one


@dataclass(frozen=True)
class Args:
    # environment
    # Four legs hardly fall: this robot walks sooner than those on two.
    env_id: str = "AntBulletEnv-v0"  # vector observations, bounded continuous actions; or module:id
    num_envs: int = 4  # N, environments stepped together
    # Processes pay where steps are slow (Bullet, not MuJoCo) and there are cores to spare: measure both.
    vectorization: Literal["sync", "async"] = "sync"  # environments in this process, or each in its own
    # algorithm
    total_timesteps: int = 2_000_000  # budget: steps of all environments together
    learning_rate: float = 9.6e-4  # η, step size
    num_steps: int = 8  # T, steps of each environment per rollout
    gamma: float = 0.99  # γ, what a reward one step later is worth
    gae_lambda: float = 0.9  # λ, 0 trusts the value network, 1 trusts the sampled rewards
    ent_coef: float = 0.0  # c_H, bonus for a policy that keeps its choices open
    vf_coef: float = 0.4  # c_V, weight of the value loss
    log_std_init: float = -2.0  # logarithm of the first σ; with gSDE of σ_ij
    ortho_init: bool = False  # [Trick 1] orthogonal initial weights
    anneal_lr: bool = True  # [Trick 2] learning rate falls linearly to 0
    norm_obs: bool = True  # [Trick 3] observations shifted and scaled to mean 0, deviation 1
    norm_reward: bool = True  # [Trick 4] rewards divided by the deviation of discounted returns
    max_grad_norm: float = 0.5  # [Trick 5] longest gradient that is followed; 0 for no limit
    use_sde: bool = True  # [Trick 6] noise that is a function of the state, held for a rollout
    use_rms_prop: bool = True  # [Trick 7] RMSprop, (12); off: Adam
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU
    cuda: bool = False  # off: a network this small is done on the CPU before a GPU has been asked
    eval_episodes: int = 100  # greedy episodes played after training
    checkpoint_every: int = 20_000  # steps that a killed run loses at most, or one rollout
    run_dir: str | None = None  # folder of the run; by default runs/ENV__a2c_continuous__seedS__TIME
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
    """N environments, stepped in turn in this process or, with --vectorization async, each in its own.

    SAME_STEP: what ends is reset at once, and info["final_obs"] keeps the observation before the reset.
    Exit code 2 for an unknown environment and for spaces that this script cannot handle.
    """
    # copy=False: whoever keeps an observation beyond the next step copies it, as `train` does.
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP, "copy": False}
    # The robots of PyBullet are known to Gymnasium once their package is imported.
    bullet = "BulletEnv-" in args.env_id and ":" not in args.env_id
    env_id = f"pybullet_envs_gymnasium:{args.env_id}" if bullet else args.env_id
    # Ctrl-C reaches every process but is this one's to handle: those of the environments are born deaf to it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        envs = gym.make_vec(env_id, num_envs, args.vectorization, vector_kwargs=mode, render_mode=render_mode)
    except (gym.error.Error, ImportError) as error:
        near = ", ".join(difflib.get_close_matches(args.env_id, gym.registry, cutoff=0.5)) or "none"
        hint = "; pip install pybullet_envs_gymnasium, on Python 3.11 or older" if bullet else ""
        fail(f"cannot make the environment {args.env_id} (nearest known names: {near}): {error}{hint}")
    finally:
        signal.signal(signal.SIGINT, handler)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    parts = obs_space if isinstance(obs_space, gym.spaces.Tuple) else [obs_space]
    if all(isinstance(part, gym.spaces.Discrete) for part in parts):
        fail(f"{args.env_id} has integer states, this script reads vectors: use q_learning.py")
    if isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 1:
        fail(f"{args.env_id} has images, this script reads vectors: dqn_atari.py plays Atari games")
    if isinstance(obs_space, gym.spaces.Box) and isinstance(action_space, gym.spaces.Discrete):
        fail(f"{args.env_id} has discrete actions, this script has continuous ones: use ppo.py")
    if not isinstance(obs_space, gym.spaces.Box) or not isinstance(action_space, gym.spaces.Box):
        fail(f"no script handles {args.env_id} with observations {obs_space} and actions {action_space}")
    if len(action_space.shape) != 1 or not action_space.is_bounded():
        fail(f"{args.env_id} has actions {action_space}, this script needs one axis with finite bounds")
    return RecordEpisodeStatistics(envs)


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


class Noise(nn.Module):
    """[Trick 6] Generalised state-dependent exploration, equation (10); https://arxiv.org/abs/2005.05719.

    Independent noise makes a robot tremble, and most of it averages out. Here the noise is a linear function
    of the features φ(s), and its random matrix W is held for a rollout: similar states get similar noise, so
    the robot tries out whole movements. Ablate: --no-use-sde (one feature, always 1, and a new W each step)

    How likely is an action? In state s, n_j = Σ_i φ_i W_ij is a sum of independent normal numbers, each of
    variance φ_i² σ_ij²: it is normal, with mean 0 and variance Σ_i φ_i² σ_ij². Each n_j has its own
    column of W, so they are independent, and (5) holds. That the steps of a rollout share their W is ignored.
    """

    def __init__(self, num_features: int, num_actions: int, log_std_init: float, use_sde: bool) -> None:
        super().__init__()
        self.use_sde = use_sde
        shape = (num_features if use_sde else 1, num_actions)  # (F, A) or (1, A)
        self.log_std = nn.Parameter(torch.full(shape, log_std_init))  # ln σ_ij

    def draw(self, num_envs: int) -> None:
        """A new W for each environment, (N, F, A) or (N, 1, A)."""
        self.W = (torch.randn(num_envs, *self.log_std.shape) * self.log_std.detach().exp().cpu()).numpy()

    def sample(self, features: np.ndarray) -> np.ndarray:
        """Noise for the actions. (N, F) -> (N, A)"""
        if not self.use_sde:
            self.draw(len(features))
            return self.W[:, 0]
        return (features[:, None] @ self.W)[:, 0]  # (10)

    def std(self, features: torch.Tensor) -> torch.Tensor:
        """Deviation σ of the noise. (B, F) -> (B, A)"""
        if not self.use_sde:
            return self.log_std.exp().expand(len(features), -1)
        # Detached: features are there to steer the robot. The noise adapts to them, not they to the noise.
        return (features.detach() ** 2 @ (2 * self.log_std).exp() + 1e-6).sqrt()


class Agent(nn.Module):
    """Policy and value network: two hidden layers of 64 tanh units each; they share the normaliser only."""

    def __init__(self, obs_dim: int, num_actions: int, args: Args) -> None:
        super().__init__()

        def mlp(outputs: int, last_gain: float) -> nn.Sequential:
            layers = [nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
            if args.ortho_init:
                # [Trick 1] Orthogonal weights keep signals and gradients at one scale from layer to layer
                # (https://arxiv.org/abs/1312.6120; the gain √2 is OpenAI's). Off; try: --ortho-init
                for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, last_gain), strict=True):
                    nn.init.orthogonal_(layer.weight, gain)
                    nn.init.zeros_(layer.bias)
            return nn.Sequential(*layers)

        actor = mlp(num_actions, last_gain=0.01)
        self.features, self.mean = actor[:-1], actor[-1]  # (B, D) -> (B, F), (B, F) -> (B, A)
        self.critic = mlp(1, last_gain=1.0)  # (B, D) -> (B, 1) values
        self.noise = Noise(64, num_actions, args.log_std_init, args.use_sde)
        # [Trick 3] Angles, speeds and contacts come in different units; a network learns soonest from inputs
        # of one scale (https://arxiv.org/abs/2006.05990). Ablate: --no-norm-obs
        limit = 10.0 if args.norm_obs else math.inf  # never updated, it leaves x as it is
        self.norm_obs = RunningNorm(obs_dim, limit=limit)  # (11)
        self.norm_return = RunningNorm(1, limit=math.inf)

    def in_numpy(self):
        """The policy as a NumPy function: observations (N, D) -> features (N, F), mean actions (N, A).

        Speed only, a first reading may skip it: for a few rows, NumPy takes a sixth of PyTorch's time, which
        is nearly all overhead. On the CPU its arrays are views of the weights and follow the learning; from a
        GPU they are copies of the moment.
        """
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.state_dict().items()}
        names = ("features.0", "features.2", "mean")
        *hidden, (last, bias) = [(arrays[f"{name}.weight"].T, arrays[f"{name}.bias"]) for name in names]
        shift, scale, limit = arrays["norm_obs.shift"], arrays["norm_obs.scale"], self.norm_obs.limit

        def policy(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            x = ((obs - shift) * scale).clip(-limit, limit)
            for layer_weight, layer_bias in hidden:
                x = np.tanh(x @ layer_weight + layer_bias)
            return x, x @ last + bias

        return policy


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    obs_dim, num_actions = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    return Agent(obs_dim, num_actions, args).to(device)


def one_vector(agent: nn.Module) -> nn.Parameter:
    """One vector of all parameters, which become views of it, with one of all gradients as its `grad`.

    Speed only, a first reading may skip it: on one tensor instead of a dozen small ones an optimizer works
    several times faster.
    """
    parameters = list(agent.parameters())
    vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    vector.grad = torch.zeros_like(vector)
    sizes = [parameter.numel() for parameter in parameters]
    views = zip(parameters, vector.detach().split(sizes), vector.grad.split(sizes), strict=True)
    for parameter, data, grad in views:
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    return vector


class RMSprop:
    """[Trick 7] RMSprop as in TensorFlow, with which A2C's results were published; equation (12).

    torch.optim.RMSprop divides by √v + ε. Inside the root, ε = 1e-5 counts as √ε = 3e-3: a far smaller
    gradient moves its parameter far less than η; outside it would be blown up to η, noise or not. And v
    starts at 1, not at 0: the first steps are small, not the largest. Ablate: --no-use-rms-prop (Adam)
    """

    def __init__(self, parameters: list[torch.Tensor], lr: float, alpha=0.99, eps=1e-5) -> None:
        (self.vector,), self.alpha, self.eps = parameters, alpha, eps
        self.param_groups = [{"lr": lr}]  # where PyTorch's optimizers keep it
        self.v = torch.ones_like(self.vector)

    @torch.no_grad()
    def step(self) -> None:
        grad, lr = self.vector.grad, self.param_groups[0]["lr"]
        self.v.mul_(self.alpha).addcmul_(grad, grad, value=1 - self.alpha)  # (12)
        self.vector.addcdiv_(grad, (self.v + self.eps).sqrt_(), value=-lr)  # (12)

    def state_dict(self) -> dict:
        return {"v": self.v}

    def load_state_dict(self, state: dict) -> None:
        self.v.copy_(state["v"])


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


def to_env(actions, space):
    """From the policy's units, where ±1 are the bounds, to the environment's. (N, A) -> (N, A)

    Only the environment gets the clipped action: the probability (5) is that of the action sampled.
    """
    return space.low + (actions.clip(-1, 1) + 1) / 2 * (space.high - space.low)


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


def gaussian_log_prob(actions, means, stds):
    """ln π(a|s), equation (5), of actions before they are clipped. All three: (B, A). Returns (B,)."""
    return (-0.5 * ((actions - means) / stds) ** 2 - stds.log() - 0.5 * math.log(2 * math.pi)).sum(-1)  # (5)


def gaussian_entropy(stds):
    """Mean entropy in nats, equation (8). stds: (B, A). Returns a scalar."""
    return (stds.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()  # (8)


def policy_loss(log_probs, advantages):
    """What makes good actions likelier, equation (6). log_probs, advantages: (B,). Returns a scalar."""
    return -(advantages * log_probs).mean()  # (6)


def value_loss(values, returns):
    """Mean squared error, equation (7). values, returns: (B,). Returns a scalar."""
    return ((values - returns) ** 2).mean()  # (7)


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
    """The greedy policy of a run, a function of observations (N, D) to actions (N, A), and its checkpoint."""
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)

    policy, space = agent.in_numpy(), envs.single_action_space
    return lambda obs: to_env(policy(obs.astype(np.float32))[1], space), checkpoint


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
    if min(args.num_envs, args.num_steps, args.checkpoint_every, args.eval_episodes) < 1 or args.seed < 0:
        fail("every size, number and interval must be at least 1, the seed at least 0")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {args.batch_size} steps")
    device = setup_torch(args)
    envs = make_envs(args, args.num_envs)
    agent = make_agent(args, envs, device)
    parameters = one_vector(agent)
    optimizer = (RMSprop if args.use_rms_prop else torch.optim.Adam)([parameters], lr=args.learning_rate)
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
    T, N, D, A = args.num_steps, args.num_envs, agent.features[0].in_features, agent.mean.out_features
    both_obs = np.zeros((2, T, N, D), dtype=np.float32)
    obs, next_obs = both_obs  # views
    actions, rewards = np.zeros((T, N, A), dtype=np.float32), np.zeros((T, N), dtype=np.float32)
    terminated, truncated = np.zeros((2, T, N), dtype=bool)
    policy = agent.in_numpy()
    earned = np.zeros(N)  # by each environment in its episode so far, discounted
    returns, lengths = [], []  # of the episodes that end between two points in the charts
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
            save_checkpoint(run_dir, state)
            writer.flush()
            saved_step = global_step
        if finished or interrupted:
            break

        # [A] collect
        agent.noise.draw(N)
        policy = agent.in_numpy() if device.type == "cuda" else policy
        for t in range(T):
            obs[t] = current_obs
            features, means = policy(obs[t])  # (N, F), (N, A)
            actions[t] = means + agent.noise.sample(features)  # (1)
            env_actions = to_env(actions[t], envs.single_action_space)  # clipped; `actions` are not
            current_obs, rewards[t], terminated[t], truncated[t], info = envs.step(env_actions)
            next_obs[t] = current_obs
            if "final_obs" in info:  # then current_obs is the first of the next episode already
                ended = info["_final_obs"]
                next_obs[t, ended] = np.stack(info["final_obs"][ended])
                returns.extend(info["episode"]["r"][ended].tolist())
                lengths.extend(info["episode"]["l"][ended].tolist())
                recent_returns.extend(info["episode"]["r"][ended].tolist())
                episodes += int(ended.sum())
        global_step += args.batch_size

        # [B] estimate
        raw_obs = torch.from_numpy(both_obs).to(device).flatten(1, 2)  # (2, T, N, D) -> (2, T*N, D)
        b_actions = torch.from_numpy(actions).to(device).flatten(0, 1)  # (T, N, A) -> (T*N, A)
        normed_obs = agent.norm_obs(raw_obs)
        if args.norm_obs:
            # Only now: within a rollout, whoever acts and whoever learns must see the same numbers.
            agent.norm_obs.update(raw_obs[0])
        # The gradient of the values serves (7); equations (2) to (4) take them as given numbers.
        b_values, b_next_values = agent.critic(normed_obs).squeeze(-1)  # (2, T*N, 1) -> two of (T*N,)
        values, next_values = (v.detach().cpu().numpy().reshape(T, N) for v in (b_values, b_next_values))
        learned_rewards = rewards
        if args.norm_reward:
            # [Trick 4] Returns of scale 1, whatever the rewards' unit: else errors of the values fill the
            # gradient, and trick 5 leaves the policy's share too small for (12). The way and the limit of 10
            # are those of OpenAI's VecNormalize. Ablate: --no-norm-reward
            sums, earned = discounted_sums(rewards, terminated | truncated, earned, args.gamma)
            agent.norm_return.update(torch.from_numpy(sums).to(device).reshape(-1, 1))  # (T*N, 1)
            learned_rewards = (rewards * agent.norm_return.scale.item()).clip(-10, 10)
        endings = (terminated, truncated)
        advantages = gae(learned_rewards, values, next_values, *endings, args.gamma, args.gae_lambda)
        b_advantages = torch.from_numpy(advantages).to(device).flatten()  # (T, N) -> (T*N,)
        b_returns = b_advantages + b_values.detach()  # (4)

        # [C] improve
        # [Trick 2] Ever smaller steps let the policy settle (OpenAI's code). Ablate: --no-anneal-lr
        remaining = 1 - (global_step - args.batch_size) / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        features = agent.features(normed_obs[0])  # (T*N, F)
        stds = agent.noise.std(features)  # (T*N, A)
        log_probs = gaussian_log_prob(b_actions, agent.mean(features), stds)  # (T*N,)
        pg_loss, v_loss = policy_loss(log_probs, b_advantages), value_loss(b_values, b_returns)
        loss = pg_loss + args.vf_coef * v_loss  # (9)
        if args.ent_coef:
            loss = loss - args.ent_coef * gaussian_entropy(stds)  # (9)
        parameters.grad.zero_()
        loss.backward()
        # [Trick 5] One odd batch must not throw the policy off (OpenAI's code). Ablate: --max-grad-norm 0
        grad_norm = parameters.grad.norm().item()
        if not math.isfinite(loss.item() + grad_norm):
            bar.close()
            fail(f"the loss is {loss.item()} at step {global_step}; the last checkpoint is good", code=1)
        if args.max_grad_norm and grad_norm > args.max_grad_norm:
            parameters.grad.mul_(args.max_grad_norm / grad_norm)
        optimizer.step()

        # [D] log: losses are those of the last batch
        bar.update(args.batch_size)
        last = global_step + args.batch_size > args.total_timesteps
        if global_step // args.batch_size % LOG_EVERY and not last:
            continue
        if returns:
            writer.add_scalar("charts/episodic_return", np.mean(returns), global_step)
            writer.add_scalar("charts/episodic_length", np.mean(lengths), global_step)
            bar.set_postfix_str(f"return {np.mean(recent_returns):.1f}", refresh=False)
            returns, lengths = [], []
        writer.add_scalar("charts/SPS", global_step / (time.perf_counter() - started), global_step)
        writer.add_scalar("charts/learning_rate", learning_rate, global_step)
        losses = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": gaussian_entropy(stds)}
        losses |= {"std": stds.mean(), "explained_variance": 1 - b_advantages.var() / b_returns.var()}
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value.detach(), global_step)
        writer.add_scalar("losses/grad_norm", grad_norm, global_step)

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
