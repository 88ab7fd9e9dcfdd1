"""Decision transformer: learn from recorded episodes to act so that a wished-for return comes true.

Nothing is tried out: the data are given, good and bad episodes alike (offline reinforcement learning). A
transformer, as language models are, reads an episode as a row of tokens (vectors), three for each step: the
return-to-go (all reward from here to the end), the state, the action. It learns to say the next action. Asked
for a high return, it continues the row as good episodes went on; asked for a low one, as bad ones did.

Pseudo-code
    [A] data      episodes from --dataset, or from random play; the return-to-go of every step
    repeat until the budget is spent:
        [B] learn     draw windows of K steps, predict each action from all that came before it
        [C] ask       now and then: play, and ask at the start for each of the target returns
        [D] log       charts, progress bar: their "steps" are updates, an episodic return is a sum of rewards

Equations
    (1)  R_t = r_t + R_{t+1}                                 return-to-go, not discounted; 0 after the end
    (2)  …  R_{t−1} s_{t−1} a_{t−1}  R_t s_t a_t  …          the row of tokens
    (3)  x   = LayerNorm(W u + b + e_t)                      u: s_t, a_t or R_t / deviation of R
    (4)  y_i = Σ_j≤i softmax_j(q_i·k_j / √d) v_j             attention; q, k, v: linear in LayerNorm(x)
    (5)  x   ← x + W y + b;  x ← x + MLP(LayerNorm(x))       a layer: both steps add to x (residual)
    (6)  z_t = W LayerNorm(x) + b at the token of s_t        it has seen R_t and s_t, and not a_t
    (7)  L   = −mean ln softmax(z_t)[a_t]                    discrete actions: cross-entropy
         L   = mean (tanh z_t − a_t)²                        continuous ones, bounds scaled to ±1
    (8)  R_{t+1} = R_t − r_t                                 in play: what is left of the wish

Attention, (4), is how a token looks back. Its query q_i is compared with the key k_j of each earlier token
and of itself; the closer the match, the more it takes over of v_j, its value (not a V(s)). Later tokens are
out of sight (causal): one pass trains K predictions, none of which has seen its answer. If an episode ends
inside the window, useless steps fill the rest: they come last, so no real token looks at them (padding).
e_t, learned for each time step t, tells the three tokens of a step which step of the episode it is. A head is
one set of q, k, v. LayerNorm gives a token's numbers mean 0, deviation 1; the MLP has one hidden layer.

Why should that find anything better than the data? Because it learns step by step. In envs/graph.py, the
default task, one follows arrows to a goal: −1 a step, −10 more if not there after 10. One walk may show the
best way from A to B, another that from B to the goal, each with detours elsewhere. Asked at A for more than
any walk from A got, the transformer can join the two, along a path that no walk went (stitching). Nothing
ensures that it does: no value is passed back from B to A, as in Q-learning. It is supervised learning. The
price: where chance decides, asking brings no luck; and a way is not found if the data lack a piece of it.

Behaviour cloning copies what the data do, good and bad: the same network without return tokens,
--no-condition. The difference of the two results shows what asking for a return gains.

Symbols
    s, a, r   state (observation), action, reward    K, B      context_length, batch_size
    R         return-to-go                           D, |A|    size of an observation, of an action
    u, x      what a token stands for; its numbers   E, d      width; numbers per head: E / num_heads
    y         what it takes over, of all heads       M, N, L   data steps, environments, loss (Layer: tokens)
    z         logits; or the action before tanh      W, b      weights and bias, in each place their own
    e_t       learned for time step t                q, k, v   query, key, value of a token
Departures from the paper: windows are padded at the end, not in front; the learning rate falls to 0; integer
states and discrete actions are one-hot vectors; returns are divided by their deviation.
References: decision transformer https://arxiv.org/abs/2106.01345, the transformer
https://arxiv.org/abs/1706.03762, the order of its parts https://arxiv.org/abs/2002.04745, offline learning
https://arxiv.org/abs/2005.01643, the data sets https://minari.farama.org

Read first: reinforce.py (returns), dqn.py (learning from old experience).
New here: no environment while learning, a transformer, a policy that is told what return to get.
Run: python algos/decision_transformer.py
Expect: after 600 updates and 20 seconds of one core −7.04, −5.38 and −5.31 (seeds 1, 2, 3), asked for what
the shortest way returns; the graph tells it at each start, −5.2 on average. Random walks have −18 to −19.
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
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # environment
    env_id: str = "envs.graph:Graph-v0"  # vectors or integers observed; --dataset brings its own
    env_kwargs: str | None = None  # its options as JSON, for instance {"graph_seed": 2}
    num_envs: int = 20  # N, episodes played for each of the target returns, together
    # data
    dataset: str | None = None  # a Minari dataset, from this machine or else from the Farama server
    random_episodes: int = 1000  # without a dataset: this many episodes of random play are the data
    # algorithm
    total_updates: int = 600  # budget: gradient steps
    target_returns: list[float] = field(default_factory=list)  # to ask for; first: scored; empty: best known
    condition: bool = True  # off: no return tokens, which is behaviour cloning
    context_length: int = 4  # K, steps that the transformer sees
    batch_size: int = 64  # B, windows per gradient step
    learning_rate: float = 3e-3  # AdamW's step size
    weight_decay: float = 1e-4  # AdamW's pull of all weights towards 0
    num_layers: int = 3  # of the transformer
    num_heads: int = 1  # per layer, each with its own queries, keys and values
    width: int = 64  # E, numbers per token
    max_episode_steps: int = 1000  # how many e_t there are; random play is cut off there
    warmup_updates: int = 60  # [Trick 1] gradient steps in which the learning rate rises from 0
    max_grad_norm: float = 0.25  # [Trick 2] longer gradients are shortened to this (clipping); 0: no limit
    norm_obs: bool = True  # [Trick 3] observations shifted and scaled to mean 0, deviation 1
    dropout: float = 0.0  # [Trick 4] share of numbers that is set to 0 in training
    anneal_lr: bool = True  # [Trick 5] after its rise the learning rate falls linearly to 0
    bf16: bool = False  # [Trick 6] the layers in bfloat16, where the processor or the GPU has it
    # run
    seed: int = 1  # the same seed gives the same numbers on the CPU, with the same threads and bf16
    cuda: bool = False  # use the GPU; off, because the CPU is fast enough for a network this small
    num_threads: int = 1  # cores for the network; more are faster on an idle machine only
    eval_every: int = 200  # gradient steps from one evaluation of all target returns to the next
    eval_episodes: int = 100  # greedy episodes played after training, asked for the first target return
    checkpoint_every: int = 200  # save at least every this many gradient steps
    run_dir: str | None = None  # folder of the run; by default runs/ENV__decision_transformer__seedS__TIME
    resume: str | None = None  # go on with the run in this folder; schedules follow the budget given now
    evaluate: str | None = None  # evaluate the run in this folder, without training
    capture_video: bool = False  # record one evaluation episode as replay.mp4
    track: bool = False  # mirror the charts to Weights & Biases
    wandb_project_name: str = "single-file-rl"  # project there
    wandb_entity: str | None = None  # team there


def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """N environments, stepped in turn in this process. Tell puts before each observation what (8) needs.

    SAME_STEP: the step that ends an episode also resets; info["final_obs"] is the observation before that.
    """
    # For a video NEXT_STEP: the picture drawn after an episode's last step must not show the next episode.
    mode = AutoresetMode.SAME_STEP if render_mode is None else AutoresetMode.NEXT_STEP
    more = {"vector_kwargs": {"autoreset_mode": mode}, "render_mode": render_mode}
    return Tell(gym.make_vec(args.env_id, num_envs, "sync", **more, **json.loads(args.env_kwargs or "{}")))


class Tell(gym.vector.VectorWrapper):
    """Puts three numbers before each observation: time step, return so far, best return (NaN if not known).

    A policy is handed observations only, and (8) needs the rewards. The best return that an episode can
    have is known where the environment tells it at the reset, as info["best_return"].
    """

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        super().__init__(envs)
        size = 3 + gym.spaces.flatdim(envs.single_observation_space)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        self.told = np.zeros((self.num_envs, 3), dtype=np.float32)
        self.told[:, 2] = info.get("best_return", np.nan)
        return self.tell(obs), info

    def step(self, actions):
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        self.told[:, 0] += 1
        self.told[:, 1] += rewards
        if "final_obs" in info:  # then obs is the first of the next episode already
            ended = info["_final_obs"]  # (N,) bool
            self.told[ended, :2] = 0
            self.told[ended, 2] = info["best_return"][ended] if "best_return" in info else np.nan
        return self.tell(obs), rewards, terminated, truncated, info

    def tell(self, obs) -> np.ndarray:
        """(N, …) -> (N, 3 + D)."""
        return np.hstack((self.told, encode(self.env.single_observation_space, obs)))


class Layer(nn.Module):
    """A layer of the transformer: every token looks back at earlier ones, then digests what it saw."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, E) -> (B, L, E), for L tokens in a row."""
        B, L, E = x.shape
        qkv = self.query_key_value(self.attention_norm(x)).view(B, L, 3, self.num_heads, E // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        # Its argument dropout_p would act in evaluations, too: agent.eval() switches layers only.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (4)
        y = y.transpose(1, 2).reshape(B, L, E)  # (B, heads, L, d) -> (B, L, E)
        # [Trick 4] Zeros at random places keep a network from learning its data by heart, which long training
        # on little data leads to (https://jmlr.org/papers/v15/srivastava14a.html). Off by default, for
        # what is rare in the graph's walks must be remembered. Try: --dropout 0.1
        x = x + self.dropout(self.attention_out(y))  # (5)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # (5)


class Agent(nn.Module):
    """The transformer, and what it knows of its data: buffers, which are saved with the weights."""

    def __init__(self, obs_dim: int, action_dim: int, discrete: bool, args: Args) -> None:
        super().__init__()
        self.discrete = discrete
        self.condition = args.condition
        self.bf16 = args.bf16
        self.context_length = args.context_length
        self.embed_return = nn.Linear(1, args.width)
        self.embed_obs = nn.Linear(obs_dim, args.width)
        self.embed_action = nn.Linear(action_dim, args.width)
        self.embed_step = nn.Embedding(args.max_episode_steps, args.width)  # e_t
        nn.init.normal_(self.embed_step.weight, std=0.02)  # small, or it drowns what the tokens say
        self.norm_in = nn.LayerNorm(args.width)
        self.layers = nn.Sequential(
            *(Layer(args.width, args.num_heads, args.dropout) for _ in range(args.num_layers))
        )
        self.norm_out = nn.LayerNorm(args.width)
        self.head = nn.Linear(args.width, action_dim)
        self.dropout = nn.Dropout(args.dropout)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_scale", torch.ones(obs_dim))  # 1 / deviation
        self.register_buffer("return_scale", torch.ones(()))  # deviation of R: a divisor, obs_scale is not
        self.register_buffer("best_return", torch.zeros(()))  # of all episodes
        self.register_buffer("last_step", torch.zeros((), dtype=torch.int64))  # of the longest one

    def forward(self, to_go, obs, actions, steps):
        """What to do at each step of the windows, in view of all before it.

        to_go: (B, K), obs: (B, K, D), actions: (B, K, |A|), steps: (B, K) integers. Returns (B, K, |A|):
        logits, or continuous actions within ±1.
        """
        B, K = steps.shape
        time_step = self.embed_step(steps.clamp(max=self.last_step))  # (B, K, E); later e_t are untrained
        tokens = [
            self.embed_obs((obs - self.obs_mean) * self.obs_scale) + time_step,
            self.embed_action(actions) + time_step,
        ]
        if self.condition:
            tokens.insert(0, self.embed_return((to_go / self.return_scale)[..., None]) + time_step)
        x = torch.stack(tokens, 2).flatten(1, 2)  # (B, K, 3, E) -> (B, 3K, E), the row (2)
        x = self.dropout(self.norm_in(x))  # (3)
        # [Trick 6] bfloat16, 16 bits a number, has 2 to 3 decimal digits: enough for q, k, v and the MLP; the
        # sums x keep their 7 (https://arxiv.org/abs/1905.12322). Small layers gain nothing. Try: --bf16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.layers(x)
        x = self.norm_out(x).view(B, K, len(tokens), -1)
        z = self.head(x[:, :, -2])  # the last but one of a step is its state  (6)
        return z if self.discrete else z.tanh()


class Player:
    """Acts in N environments so as to get the returns that it is asked for; remembers the last K steps.

    wishes: (N,) float, NaN for the best that is known.
    """

    def __init__(self, agent: Agent, wishes: torch.Tensor) -> None:
        N = len(wishes)
        K = agent.context_length
        self.agent = agent
        self.wishes = wishes
        # Windows as in training, filled up behind; `filled` says how many steps each holds.
        self.to_go = wishes.new_zeros(N, K)
        self.obs = wishes.new_zeros(N, K, agent.embed_obs.in_features)
        self.actions = wishes.new_zeros(N, K, agent.head.out_features)
        self.steps = torch.zeros(N, K, dtype=torch.int64, device=wishes.device)
        self.filled = torch.zeros(N, dtype=torch.int64, device=wishes.device)

    @torch.inference_mode()
    def act(self, told: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The likeliest actions, (n,) integers or (n, |A|) within ±1, for observations (n, 3 + D).

        rows: (n,) integers, which of the environments these are.
        """
        told = torch.from_numpy(told).to(self.wishes)
        rows = torch.from_numpy(rows).to(self.wishes.device)
        step, so_far, best = told[:, :3].T  # each (n,)
        self.filled[rows[step == 0]] = 0
        full = rows[self.filled[rows] == self.agent.context_length]
        for memory in (self.to_go, self.obs, self.actions, self.steps):
            memory[full, :-1] = memory[full, 1:]  # the oldest step is forgotten
        self.filled[full] -= 1
        now = self.filled[rows]  # (n,), where the present step stands
        best = best.where(best.isfinite(), self.agent.best_return)
        wish = self.wishes[rows]
        wish = wish.where(wish.isfinite(), best)
        self.to_go[rows, now] = wish - so_far  # (8), for all steps so far
        self.obs[rows, now] = told[:, 3:]
        self.steps[rows, now] = step.long()
        seen = int(now.max()) + 1
        windows = (self.to_go, self.obs, self.actions, self.steps)
        outputs = self.agent(*(memory[rows, :seen] for memory in windows))  # (n, seen, |A|)
        action = outputs[torch.arange(len(rows), device=rows.device), now]  # (n, |A|)
        if self.agent.discrete:
            action = F.one_hot(action.argmax(-1), action.shape[-1]).to(action)
        self.actions[rows, now] = action
        self.filled[rows] += 1
        return (action.argmax(-1) if self.agent.discrete else action).cpu().numpy()


class Data:
    """All episodes, one behind the other, a row a step; hands out windows.

    episodes: list of (obs (T, D), actions (T, |A|), rewards (T,)), each with its own T. Attributes:
    to_go (M,), obs (M, D), actions (M, |A|), steps (M,), and ends (M,), the first row of the next episode.
    """

    def __init__(self, episodes: list, device: torch.device) -> None:
        obs, actions, rewards = zip(*episodes, strict=True)
        lengths = np.array([len(part) for part in rewards])
        self.obs = torch.from_numpy(np.concatenate(obs)).to(device)
        self.actions = torch.from_numpy(np.concatenate(actions)).to(device)
        self.to_go = torch.from_numpy(np.concatenate([to_go(part) for part in rewards])).float().to(device)
        self.steps = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
        self.ends = torch.from_numpy(np.repeat(lengths.cumsum(), lengths)).to(device)

    def windows(self, batch_size: int, context_length: int):
        """B windows of K steps: (to_go, obs, actions, steps), each (B, K, …), and which are real, (B, K)."""
        # Step 0 of an episode is in one possible window only, step K − 1 and all later ones in K of them.
        first = torch.randint(len(self.to_go), (batch_size, 1)).to(self.ends.device)  # (B, 1)
        rows = first + torch.arange(context_length, device=first.device)  # (B, K)
        real = rows < self.ends[first]
        rows = rows.where(real, first)  # behind the end any row will do: no real step sees it
        return (self.to_go[rows], self.obs[rows], self.actions[rows], self.steps[rows]), real


def to_go(rewards):
    """Returns-to-go of an episode, equation (1). rewards: (T,). Returns (T,) float64."""
    return np.cumsum(rewards[::-1], dtype=np.float64)[::-1].copy()  # (1)


def action_loss(outputs, actions, real, discrete):
    """Equation (7), mean over real steps. outputs, actions: (B, K, |A|), real: (B, K). Returns a scalar."""
    if discrete:
        errors = -(actions * outputs.log_softmax(-1)).sum(-1)  # (7)
    else:
        errors = ((outputs - actions) ** 2).mean(-1)  # (7), outputs = tanh z
    return errors[real].mean()


def action_error(outputs, actions, real, discrete):
    """Share of actions other than in the data, or the mean distance. Arguments: those of action_loss."""
    if discrete:
        return (outputs.argmax(-1) != actions.argmax(-1))[real].float().mean()
    return (outputs - actions).abs().mean(-1)[real].mean()


def play(agent, envs, wishes, seeds, run):
    """One episode in each environment, asked for the returns `wishes` (N,). Gives returns, lengths: (N,)."""
    player = Player(agent.eval(), wishes)
    obs, _ = envs.reset(seed=seeds)
    returns = np.zeros(envs.num_envs)
    lengths = np.zeros(envs.num_envs)
    actions = np.zeros(envs.action_space.shape, envs.action_space.dtype)
    playing = np.arange(envs.num_envs)
    while len(playing) and lengths.max() < MAX_EVAL_STEPS and not run.stopped:
        actions[playing] = decode_actions(envs.single_action_space, player.act(obs[playing], playing))
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        returns[playing] += rewards[playing]
        lengths[playing] += 1
        playing = playing[~(terminated | truncated)[playing]]
    agent.train()
    return returns, lengths


def train(args: Args) -> dict:
    """Train, evaluate, leave the run folder behind; returns what results.json holds."""
    args, dataset = open_dataset(args)  # the environment is that of the data
    check_args(args)  # if a setting or the environment cannot work, the script ends here and says why
    device = setup_torch(args)
    wishes = args.target_returns or [float("nan")]
    envs = make_envs(args, len(wishes) * args.num_envs)
    agent = make_agent(args, envs, device)
    args = replace(args, bf16=agent.bf16)  # args.json shall say whether this device has bfloat16
    # [A] data
    episodes = random_episodes(args) if dataset is None else read_episodes(dataset, envs)  # defined below
    data = checked(Data(episodes, device))
    agent.last_step.copy_(data.steps.max().clamp(max=args.max_episode_steps - 1))
    spread = data.to_go.std(correction=0)
    agent.return_scale.fill_(spread.item() or 1.0)
    agent.best_return.copy_(data.to_go[data.steps == 0].max())
    if args.norm_obs and isinstance(envs.env.single_observation_space, gym.spaces.Box):  # integers need none
        # [Trick 3] Positions, speeds and angles on one scale, or the largest drowns the others (the authors'
        # code). Ablate: --no-norm-obs
        deviation, mean = torch.std_mean(data.obs, 0, correction=0)  # (D,)
        agent.obs_mean.copy_(mean)
        # What is always the same in the data teaches nothing, and any change would look huge: it is hidden.
        agent.obs_scale.copy_(torch.where(deviation > 1e-6, 1 / deviation, 0.0))
    optimizer = torch.optim.AdamW(
        agent.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    run = Run(args, budget=args.total_updates, unit="updates", agent=agent, optimizer=optimizer)

    agent.train()
    while run.goes_on(1):
        # [B] learn
        windows, real = data.windows(args.batch_size, args.context_length)
        returns_to_go, obs, actions, steps = windows  # (B, K), (B, K, D), (B, K, |A|), (B, K)
        outputs = agent(returns_to_go, obs, actions, steps)  # (B, K, |A|)
        loss = action_loss(outputs, actions, real, agent.discrete)
        learning_rate = args.learning_rate
        if run.step < args.warmup_updates:
            # [Trick 1] Adam's first steps go by the sign of a few gradients, and a transformer forgets a bad
            # start slowly: small steps first (https://arxiv.org/abs/1706.03762). Ablate: --warmup-updates 0
            learning_rate *= (run.step + 1) / args.warmup_updates
        elif args.anneal_lr:
            # [Trick 5] Ever smaller steps average the noise of the batches away (common practice).
            # Ablate: --no-anneal-lr
            learning_rate *= (args.total_updates - run.step) / (args.total_updates - args.warmup_updates)
        optimizer.param_groups[0]["lr"] = learning_rate  # set each time: an lr_scheduler would be overruled
        optimizer.zero_grad()
        loss.backward()
        # [Trick 2] One odd batch must not throw the agent off (the authors' code). Ablate: --max-grad-norm 0
        grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm or torch.inf)
        run.stop_if_not_finite(loss + grad_norm)
        optimizer.step()
        run.step += 1

        # [C] ask
        charts = {}
        if run.step % args.eval_every == 0 or run.step == args.total_updates:
            asked = torch.tensor(wishes, device=device).repeat_interleave(args.num_envs)
            seeds = env_seeds(envs.num_envs, args.seed, 2, run.step)
            returns, lengths = play(agent, envs, asked, seeds, run)
            if run.stopped:
                continue  # half an episode has no return
            run.episodes_ended(returns[: args.num_envs], lengths[: args.num_envs])  # of the first wish
            for wish, got in zip(wishes, returns.reshape(len(wishes), -1), strict=True):
                name = "best" if np.isnan(wish) else f"{wish:g}"
                charts[f"return_asked_{name}" if args.condition else "return_cloned"] = got.mean()

        # [D] log
        if charts or run.step % 50 == 0:
            run.log("charts", learning_rate=learning_rate, **charts)
            error = action_error(outputs, actions, real, agent.discrete)
            run.log("losses", action_loss=loss, action_error=error, grad_norm=grad_norm)
    envs.close()
    return run.finish(device)


# ---- From here on: the run folder (save, resume, evaluate, film). The same text in every script. ----
# Only what stands before `fail` is this script's own: what it refuses, and how it acts in an evaluation.


MAX_EVAL_STEPS = 30_000  # longest evaluation episode
RANGES = {  # smallest and largest value of every number in Args
    "num_envs": (1, 10_000),
    "random_episodes": (1, 10**7),
    "total_updates": (1, 10**12),
    "target_returns": (-1e9, 1e9),
    "context_length": (1, 10_000),
    "batch_size": (1, 100_000),
    "learning_rate": (0, 10),
    "weight_decay": (0, 10),
    "num_layers": (1, 100),
    "num_heads": (1, 1000),
    "width": (1, 10_000),
    "max_episode_steps": (1, 10**6),
    "warmup_updates": (0, 10**9),
    "max_grad_norm": (0, 1e9),
    "dropout": (0, 0.99),
    "seed": (0, 2**32 - 1),
    "num_threads": (1, 1000),
    "eval_every": (1, 10**12),
    "eval_episodes": (1, 1_000_000),
    "checkpoint_every": (1, 10**12),
}


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An untrained agent for these environments."""
    args = replace(args, bf16=args.bf16 and has_bf16(device))
    obs_dim = envs.single_observation_space.shape[0] - 3  # without what Tell puts before it
    space = envs.single_action_space
    return Agent(obs_dim, gym.spaces.flatdim(space), isinstance(space, gym.spaces.Discrete), args).to(device)


def has_bf16(device: torch.device) -> bool:
    """Whether this device computes in bfloat16 natively; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def open_dataset(args: Args):
    """The settings, with the environment of --dataset unless another is named, and the Minari dataset."""
    if args.dataset is None:
        return args, None
    try:
        import minari  # here, because only datasets need it

        path = minari.storage.get_dataset_path(args.dataset) / "data"
        if not path.exists():
            minari.download_dataset(args.dataset)
        # Without its spaces Minari would make the environment: code that runs, and a stranger may name it.
        metadata = json.loads((path / "metadata.json").read_text())
        if not {"observation_space", "action_space"} <= set(metadata):
            raise ValueError("it does not say what an observation and an action is")
        dataset = minari.load_dataset(args.dataset)
        spec = dataset.spec.env_spec
    except Exception as error:  # damaged and foreign datasets, and servers, fail in many ways
        fail(f"cannot read the dataset {args.dataset}: {type(error).__name__} {error}")
    env_id = args.env_id
    if env_id == Args.env_id and (spec is None or not env_id.endswith(":" + spec.id)):
        if spec is None:
            fail(f"{args.dataset} names no environment: name one with --env-id")
        env_id = spec.id
        # To make module:id imports the module, and imports run code: a stranger's file must not choose it.
        if ":" in env_id:
            fail(f"{args.dataset} names the environment {env_id}: to run its code, give --env-id {env_id}")
    if spec is not None and args.env_kwargs is None and env_id.rpartition(":")[2] == spec.id:
        kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
        args = replace(args, env_kwargs=json.dumps(kwargs))
    return replace(args, env_id=env_id), dataset


def random_episodes(args: Args) -> list:
    """Episodes of random play, as `Data` takes them; possible actions only, where the info names them."""
    env = gym.make(args.env_id, **json.loads(args.env_kwargs or "{}"))
    env_seed, action_seed = env_seeds(2, args.seed, 0, 0)  # one seed for both would tie actions to noise
    env.action_space.seed(action_seed)
    obs, info = env.reset(seed=env_seed)
    episodes = []
    for _ in tqdm(range(args.random_episodes), desc="random play", unit=" episodes", leave=False, delay=2):
        steps = []
        ended = False
        while not ended and len(steps) < args.max_episode_steps:
            mask = {"mask": info["action_mask"]} if "action_mask" in info else {}
            action = env.action_space.sample(**mask)
            next_obs, reward, terminated, truncated, info = env.step(action)
            steps.append((obs, action, float(reward)))
            obs = next_obs
            ended = terminated or truncated
        obs, actions, rewards = map(np.array, zip(*steps, strict=True))
        actions = encode_actions(env.action_space, actions)
        episodes.append((encode(env.observation_space, obs), actions, rewards))
        obs, info = env.reset()
    env.close()
    return episodes


def read_episodes(dataset, envs: gym.vector.VectorEnv) -> list:
    """The episodes of a Minari dataset, as `Data` takes them, if they are those of such environments."""
    obs_space = envs.env.single_observation_space
    action_space = envs.single_action_space
    for ours, theirs in ((obs_space, dataset.observation_space), (action_space, dataset.action_space)):
        same = type(ours) is type(theirs) and ours.shape == theirs.shape
        if not same or getattr(ours, "n", 0) != getattr(theirs, "n", 0):
            fail(f"{dataset.spec.dataset_id} has {theirs} where the environment has {ours}")
    episodes = []
    try:
        for episode in dataset.iterate_episodes():
            T = len(episode.rewards)
            if not T == len(episode.actions) == len(episode.observations) - 1:
                raise ValueError(f"episode {episode.id} misses steps")
            # The observation after the last step is not needed: nothing is done there.
            actions = encode_actions(action_space, episode.actions)
            episodes.append((encode(obs_space, episode.observations[:-1]), actions, episode.rewards))
    except Exception as error:  # damaged files fail in many ways
        fail(f"cannot read the dataset {dataset.spec.dataset_id}: {type(error).__name__} {error}")
    return episodes


def checked(data: Data) -> Data:
    """The data, if all their numbers are finite."""
    for name in ("to_go", "obs", "actions"):
        if not getattr(data, name).isfinite().all():
            fail("the data hold numbers that are infinite or NaN")
    return data


def encode(space: gym.Space, values) -> np.ndarray:
    """Observations or actions as vectors, (M, …) -> (M, size): integers become one-hot vectors."""
    if isinstance(space, gym.spaces.Discrete):
        return np.eye(space.n, dtype=np.float32)[values]
    return np.asarray(values, dtype=np.float32)


def encode_actions(space: gym.Space, actions) -> np.ndarray:
    """Actions as the transformer reads them, (M, …) -> (M, |A|): continuous ones scaled to ±1."""
    if isinstance(space, gym.spaces.Discrete):
        return encode(space, actions)
    return (2 * (actions - space.low) / (space.high - space.low) - 1).astype(np.float32)


def decode_actions(space: gym.Space, actions: np.ndarray) -> np.ndarray:
    """Actions for the environment: integers as they are, (n, |A|) within ±1 scaled back to the bounds."""
    if isinstance(space, gym.spaces.Discrete):
        return actions
    return (space.low + (actions + 1) / 2 * (space.high - space.low)).astype(space.dtype)


def check_settings(args: Args) -> None:
    """Refuse settings that cannot work together."""
    if args.width % args.num_heads:
        fail(f"a --width of {args.width} does not divide into {args.num_heads} heads")
    if args.anneal_lr and args.warmup_updates >= args.total_updates:
        fail(f"--warmup-updates {args.warmup_updates} must be less than --total-updates {args.total_updates}")
    if args.target_returns and not args.condition:
        fail("--no-condition asks for no return: leave out --target-returns")
    if len(args.target_returns) * args.num_envs > 10_000:
        fail("more than 10,000 environments: fewer --target-returns or --num-envs")
    if args.batch_size * args.context_length * args.width > 10**9:
        fail("such a batch is too large: a smaller --batch-size, --context-length or --width")
    try:
        kwargs = json.loads(args.env_kwargs or "{}")
    except ValueError as error:
        fail(f"--env-kwargs is no JSON: {error}")
    if not isinstance(kwargs, dict):
        fail('--env-kwargs must be a JSON object like {"graph_seed": 2}')


def check_spaces(args: Args, envs: gym.vector.VectorEnv) -> None:
    """Refuse environments that this script cannot handle, and name the script that can."""
    obs_space = envs.env.single_observation_space
    action_space = envs.single_action_space
    if isinstance(obs_space, gym.spaces.Tuple) and all(isinstance(s, gym.spaces.Discrete) for s in obs_space):
        fail(f"{args.env_id} has tuples of integers, this script reads vectors: use q_learning.py")
    if isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) > 1:
        fail(f"{args.env_id} has images, this script reads vectors: dqn_atari.py plays Atari games")
    discrete = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
    bounded = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    if bounded:
        with np.errstate(over="ignore"):
            bounded = np.isfinite(action_space.high - action_space.low).all()
    vectors = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1
    integers = isinstance(obs_space, gym.spaces.Discrete) and obs_space.start == 0
    if not (vectors or integers) or not (discrete or bounded and len(action_space.shape) == 1):
        fail(f"no script handles {args.env_id} with observations {obs_space} and actions {action_space}")


def load_policy(args: Args, envs: gym.vector.VectorEnv, run_dir: Path, device: torch.device):
    """The greedy policy of a run, observations (N, 3 + D) -> actions (N, …), and its checkpoint.

    It asks for the first target return, and remembers the episodes that it plays.
    """
    agent = make_agent(args, envs, device)
    checkpoint = load_checkpoint(run_dir, agent=agent)
    agent.eval()
    wish = args.target_returns[0] if args.target_returns else float("nan")
    players = {}  # by the number of environments: a film has one

    def policy(obs: np.ndarray) -> np.ndarray:
        N = len(obs)
        if N not in players:
            players[N] = Player(agent, torch.full((N,), wish, device=device))
        return decode_actions(envs.single_action_space, players[N].act(obs, np.arange(N)))

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
#     "huggingface_hub==2.4.0",
#     "moviepy==2.2.1",
#     "minari==0.5.4",
#     "h5py==3.16.0",
# ]
# ///
