"""PPO from pixels: whole runs against slow ones, alone and in two ranks; endings, restarts, and learning."""

import copy
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import ppo_atari
import pytest
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode
from ppo_atari import Agent, Args, Ranks
from test_dqn_atari import Endings, Trial, Unequal  # small pixel games with known rules

HERE = Path(__file__).parent


class Mixed(Trial):
    """Trial, but what ends a game hangs on the environment's seed, not on its place: ranks can share it out.

    Seed mod 4 is 0: terminated after 5 steps; 1: truncated after 7; 2: both after 9; 3: never.
    """

    started = []  # the seeds of all resets in this process
    interrupt_at = np.inf  # steps until this process gets Ctrl-C
    die_at = np.inf  # steps until kill -9

    def reset(self, *, seed=None, options=None):
        Mixed.started.append([int(one) for one in seed])
        self.kinds = [int(one) % 4 for one in seed]
        return super().reset(seed=seed, options=options)

    def rules(self, n):
        kind = self.kinds[n]
        end = kind < 3 and self.time[n] == 5 + 2 * kind
        return self.reward(n), end and kind in (0, 2), end and kind in (1, 2)

    def step(self, actions):
        Mixed.interrupt_at -= 1
        if Mixed.interrupt_at == 0:
            signal.raise_signal(signal.SIGINT)
        Mixed.die_at -= 1
        if Mixed.die_at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(actions)


class Flash(Endings):
    """Games of one step: the side that lights up pays 1, the other one −1."""

    def frame(self, n):
        picture = np.zeros(self.shape[1:], dtype=np.uint8)
        if self.time[n] == 0:
            picture[20:64, 10 + 40 * self.side[n] : 34 + 40 * self.side[n]] = 255
        return picture

    def rules(self, n):
        return (1.0 if self.action[n] == self.side[n] else -1.0), True, False


gym.register("ALE/Mixed-v5", vector_entry_point=Mixed)
gym.register("ALE/Flash-v5", vector_entry_point=Flash)


class TinyAgent(torch.nn.Module):
    """Stands in for the network where only the wiring is tested: linear in one pixel of each frame."""

    bf16 = False

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, frames):
        assert frames.dtype == torch.uint8 and frames.shape[1:] == (4, 84, 84)
        outputs = self.head(frames[:, :, 0, 0].float() / 100)
        return outputs[:, :-1], outputs[:, -1]


@pytest.fixture(autouse=True)
def keep_ctrl_c():
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def tiny(monkeypatch):
    """Replaces the network; the list collects the agents in the order in which they are made."""
    made = []

    def make_agent(args, envs, device):
        made.append(TinyAgent())
        return made[-1]

    monkeypatch.setattr(ppo_atari, "make_agent", make_agent)
    return made


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(ppo_atari, "evaluate", lambda *_: {})


@pytest.fixture
def charts(monkeypatch) -> dict:
    """What is logged: {(tag, step): value}."""
    points = {}

    def add_scalar(self, tag, value, step):
        points[tag, step] = value

    monkeypatch.setattr(ppo_atari.SummaryWriter, "add_scalar", add_scalar)
    return points


def small(folder, **changes) -> Args:
    sizes = {
        "env_id": "ALE/Mixed-v5",
        "num_envs": 6,
        "num_steps": 8,
        "total_timesteps": 160,
        "num_minibatches": 3,
        "update_epochs": 3,
        "learning_rate": 0.01,
        "eval_episodes": 2,
        "run_dir": str(folder),
        "cuda": False,
        "bf16": False,
    }
    return Args(**{**sizes, **changes})


def checkpoint(run_dir) -> dict:
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def spy(monkeypatch, owner, name) -> list:
    """Collects copies of the arguments of all calls, and lets them pass."""
    calls = []
    real = getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls.append(copy.deepcopy(args))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


# ---- ranks in processes of their own ----


def rank_environment(rank: int, count: int, port: int, restarts: int = 0) -> dict:
    """What torchrun puts into the environment of a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    numbers |= {"MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": restarts}
    names = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    return names | {name: str(number) for name, number in numbers.items()}


def one_rank(rank, count, port, restarts, work, folder):
    os.environ.update(rank_environment(rank, count, port, restarts))
    torch.save(work(rank), folder / f"rank{rank}.pt")


def in_ranks(work, count, folder, restarts=0, codes=None) -> list:
    """Call work(rank) in as many processes as torchrun would; what each returns. codes: wanted exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # a fork has PyTorch loaded already
    arguments = [(rank, count, port, restarts, work, folder) for rank in range(count)]
    processes = [context.Process(target=one_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == (codes or [0] * count)
    saved = [folder / f"rank{rank}.pt" for rank in range(count)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in saved]


def trained(args, agents, points=None):
    """Work for a rank: train; weights, charts and the seeds of its environments."""

    def work(rank):
        Mixed.started.clear()
        ppo_atari.train(args)
        return agents[-1].state_dict(), dict(points or {}), Mixed.started[-1]

    return work


# ---- whole runs ----


def mean(numbers):
    return sum(numbers) / len(numbers)


def outputs(weights, pixels):
    """Logits and value of one stack. pixels: (4,), float64."""
    numbers = weights["head.weight"] @ pixels + weights["head.bias"]
    return numbers[:2], numbers[2]


def slow_rollout(args, weights, envs, obs, lives, scores, lengths):
    """The rows of one rollout by environment and step, the next obs and lives, the episodes that ended."""
    noise = -torch.empty(args.num_steps, args.num_envs, 2).exponential_().log()
    rows = [[] for _ in range(args.num_envs)]
    ended = []
    pixels = lambda stack: torch.tensor(stack[:, 0, 0] / 100)  # noqa: E731
    for t in range(args.num_steps):
        actions = []
        for n in range(args.num_envs):
            logits, value = outputs(weights, pixels(obs[n]))
            powers = logits.exp()
            chances = powers / powers.sum()
            scores_now = [logits[i].item() + noise[t, n, i].item() for i in range(2)]
            action = 0 if scores_now[0] > scores_now[1] else 1
            row = {"x": pixels(obs[n]), "a": action, "v": value.item(), "old_p": chances[action].item()}
            rows[n].append(row)
            actions.append(action)
        new_obs, rewards, terminated, truncated, info = envs.step(np.array(actions))
        for n in range(args.num_envs):
            row = rows[n][-1]
            ends = bool(terminated[n] or truncated[n])
            row["r"] = float(rewards[n])
            if args.clip_rewards:
                row["r"] = float((row["r"] > 0) - (row["r"] < 0))
            successor = info["final_obs"][n] if ends else new_obs[n]
            row["next_v"] = outputs(weights, pixels(successor))[1].item()
            lost_life = args.episodic_life and not ends and info["lives"][n] < lives[n]
            row["worthless"] = bool(terminated[n]) or lost_life
            row["cut"] = ends or lost_life
            scores[n] += rewards[n]
            lengths[n] += 1
            if ends:
                ended.append((scores[n], lengths[n]))
                scores[n] = lengths[n] = 0
        obs = new_obs
        lives = info["lives"]
    for line in rows:
        for i, row in enumerate(line):
            row["A"] = 0.0
            for k, later in enumerate(line[i:]):
                delta = later["r"] - later["v"]
                if not later["worthless"]:
                    delta += args.gamma * later["next_v"]
                row["A"] += (args.gamma * args.gae_lambda) ** k * delta
                if later["cut"]:
                    break
            row["R"] = row["A"] + row["v"]
    return rows, obs, lives, ended


def slow_loss(args, weights, rows):
    """Equations (5) to (9) row by row, for advantages that are normalised already: the loss, and its log."""
    low, high = 1 - args.clip_coef, 1 + args.clip_coef
    objectives, errors, entropies, ratios = [], [], [], []
    for row in rows:
        logits, value = outputs(weights, row["x"])
        powers = logits.exp()
        chances = powers / powers.sum()
        ratio = chances[row["a"]] / row["old_p"]
        clipped = ratio if low <= ratio <= high else torch.tensor(low if ratio < low else high)
        objectives.append(min(ratio * row["used_A"], clipped * row["used_A"]))
        error = (value - row["R"]) ** 2
        if args.clip_vloss:
            near = min(max(value, row["v"] - args.clip_coef), row["v"] + args.clip_coef)
            error = max(error, (near - row["R"]) ** 2)
        errors.append(error)
        entropies.append(-sum(p * p.log() for p in chances))
        ratios.append(ratio.item())
    logged = {
        "policy_loss": -torch.as_tensor(mean(objectives)).item(),
        "value_loss": torch.as_tensor(mean(errors)).item() / 2,
        "entropy": mean(entropies).item(),
        "approx_kl": mean([r - 1 - math.log(r) for r in ratios]),
        "clip_fraction": mean([float(not low <= r <= high) for r in ratios]),
    }
    loss = -mean(objectives) + args.vf_coef * mean(errors) / 2 - args.ent_coef * mean(entropies)
    return loss, logged


def slow_run(args, count=1):
    """PPO in loops and float64 with an Adam of its own, for TinyAgent: its weights, and what is logged.

    count: of ranks. Each has its own environments and takes, by the same order, rows of its own; a minibatch
    is that of all of them.
    """
    torch.manual_seed(args.seed)
    first = TinyAgent().state_dict()
    weights = {name: x.double().requires_grad_() for name, x in first.items()}
    momentum = {name: torch.zeros_like(x) for name, x in weights.items()}
    square = {name: torch.zeros_like(x) for name, x in weights.items()}
    envs = Mixed(args.num_envs, AutoresetMode.SAME_STEP, reward_clipping=False)
    seeds = np.random.SeedSequence((args.seed, 0, 0)).generate_state(args.num_envs) >> 1
    obs, info = envs.reset(seed=seeds.tolist())
    lives = info["lives"]
    scores, lengths = [0.0] * args.num_envs, [0] * args.num_envs
    share = args.num_envs // count
    size = args.num_steps * share // args.num_minibatches
    updates = step = 0
    logs = {}
    while step + args.batch_size <= args.total_timesteps:
        rate = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
        rows, obs, lives, ended = slow_rollout(args, weights, envs, obs, lives, scores, lengths)
        step += args.batch_size
        orders = [torch.randperm(args.num_steps * share).tolist() for _ in range(args.update_epochs)]
        for order in orders:
            for start in range(0, len(order), size):
                parts = [
                    [rows[rank * share + i % share][i // share] for i in order[start : start + size]]
                    for rank in range(count)
                ]
                minibatch = sum(parts, [])
                advantages = [row["A"] for row in minibatch]
                for row, advantage in zip(minibatch, advantages, strict=True):
                    row["used_A"] = advantage
                    if args.norm_adv:
                        spread = math.sqrt(mean([(a - mean(advantages)) ** 2 for a in advantages]))
                        row["used_A"] = (advantage - mean(advantages)) / (spread + 1e-8)
                loss, _ = slow_loss(args, weights, minibatch)
                _, log = slow_loss(args, weights, parts[0])  # rank 0 logs its own part
                gradients = dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))
                norm = math.sqrt(sum((g**2).sum().item() for g in gradients.values()))
                shrink = min(1, args.max_grad_norm / norm) if args.max_grad_norm else 1
                updates += 1
                for name, x in weights.items():
                    g = shrink * gradients[name]
                    momentum[name] = 0.9 * momentum[name] + 0.1 * g
                    square[name] = 0.999 * square[name] + 0.001 * g**2
                    m = momentum[name] / (1 - 0.9**updates)
                    v = square[name] / (1 - 0.999**updates)
                    weights[name] = (x - rate * m / (v.sqrt() + args.adam_eps)).detach().requires_grad_()
        own = sum(rows[:share], [])
        residuals = np.var([row["A"] for row in own])
        log |= {"grad_norm": norm, "explained_variance": 1 - residuals / np.var([row["R"] for row in own])}
        logs |= {(f"losses/{name}", step): value for name, value in log.items()}
        logs["charts/learning_rate", step] = rate
        if ended:
            logs["charts/episodic_return", step] = mean([score for score, _ in ended])
            logs["charts/episodic_length", step] = mean([length for _, length in ended])
    return weights, logs


WHOLE = {
    "defaults": {},
    "all on": {
        "ent_coef": 0.03,
        "clip_vloss": True,
        "clip_coef": 0.05,
        "max_grad_norm": 0.1,
        "learning_rate": 0.02,
        "gamma": 0.9,
        "gae_lambda": 0.7,
        "vf_coef": 1.3,
        "adam_eps": 0.01,
        "seed": 5,
    },
    "all off": {
        "anneal_lr": False,
        "norm_adv": False,
        "clip_rewards": False,
        "episodic_life": False,
        "max_grad_norm": 0.0,
        "gae_lambda": 1.0,
        "num_minibatches": 1,
        "ent_coef": -0.1,
    },
}


def assert_same_run(got_weights, got_points, want):
    weights, logs = want
    got = {key: value for key, value in got_points.items() if key[0] != "charts/SPS"}
    assert set(got) == set(logs)
    for key, value in logs.items():
        assert got[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    for name, x in weights.items():
        torch.testing.assert_close(got_weights[name].double(), x.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_run_is_that_of_a_slow_one(name, tiny, no_evaluation, charts, tmp_path):
    """Three rollouts with all endings and lost lives: every weight and every logged number."""
    args = small(tmp_path / "run", **WHOLE[name])
    ppo_atari.train(args)
    want = slow_run(args)
    assert {step for _, step in want[1]} == {48, 96, 144}
    assert_same_run(checkpoint(tmp_path / "run")["agent"], charts, want)
    if name == "all on":
        assert 0 < charts["losses/clip_fraction", 144] and charts["losses/grad_norm", 144] > 0.1


@pytest.mark.parametrize("name", WHOLE)
def test_two_ranks_are_a_slow_run_with_larger_minibatches(name, tiny, no_evaluation, charts, tmp_path):
    """Each rank with half of the environments. Rank 1 begins with other weights, as another CPU may round."""
    flags = {"num_envs": 4, "num_minibatches": 4, "total_timesteps": 100, **WHOLE[name]}
    args = small(tmp_path / "run", **flags)

    def work(rank):
        make_agent = ppo_atari.make_agent

        def other_weights(*arguments):
            agent = make_agent(*arguments)
            agent.head.weight.data += 0.1 * rank
            return agent

        ppo_atari.make_agent = other_weights
        return trained(args, tiny, charts)(rank)

    (weights, points, seeds), (others, other_points, other_seeds) = in_ranks(work, 2, tmp_path)
    assert len(set(seeds + other_seeds)) == 4, "no two environments of a run are alike"
    assert not other_points, "rank 0 alone logs"
    for key, x in weights.items():
        assert torch.equal(others[key], x), "all ranks have the same weights, bit for bit"
    assert_same_run(weights, points, slow_run(args, count=2))
    assert checkpoint(tmp_path / "run")["global_step"] == 96
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def test_two_ranks_follow_one(tiny, no_evaluation, charts, tmp_path):
    """Given the same data, 2 × 4 environments make the five steps of 1 × 8, up to rounding."""
    flags = {"num_envs": 8, "num_steps": 32, "num_minibatches": 1, "total_timesteps": 256, "update_epochs": 5}
    alone = small(tmp_path / "alone", **flags)
    ppo_atari.train(alone)
    together = in_ranks(trained(small(tmp_path / "both", **flags), tiny, charts), 2, tmp_path)
    saved = checkpoint(tmp_path / "alone")
    for key, x in saved["agent"].items():
        torch.testing.assert_close(together[0][0][key], x, rtol=0, atol=1e-5)
    both = checkpoint(tmp_path / "both")
    assert both["global_step"] == saved["global_step"] == 256
    assert both["episodes"] == saved["episodes"] > 20
    assert sorted(both["recent_returns"]) == sorted(saved["recent_returns"])


def test_the_gradient_of_two_ranks_is_that_of_all_rows(tmp_path):
    """The real network, unequal gradients, weights in another order of memory: one mean over 2 × 5 rows."""
    torch.manual_seed(0)
    agent = Agent(3, bf16=False, ortho_init=True).to(memory_format=torch.channels_last)
    frames = torch.randint(0, 256, (10, 4, 84, 84), dtype=torch.uint8)
    wanted = torch.linspace(-1, 1, 10)

    def gradients(rows) -> list:
        agent.zero_grad()
        logits, values = agent(frames[rows])
        ((values - wanted[rows]) ** 2 + logits.sum(-1)).mean().backward()
        return [parameter.grad for parameter in agent.parameters()]

    def work(rank):
        ranks = Ranks(torch.device("cpu"))
        gathered = ranks.gather(wanted[5 * rank : 5 * rank + 5])
        gradients(slice(5 * rank, 5 * rank + 5))
        ranks.average_gradients(list(agent.parameters()))
        return [parameter.grad for parameter in agent.parameters()], gathered

    for got, gathered in in_ranks(work, 2, tmp_path):
        assert torch.equal(gathered, wanted)
        for mine, whole in zip(got, gradients(slice(None)), strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-6)


# ---- dead workers, Ctrl-C, resuming ----


LAUNCHER = """
import os, pathlib, sys
sys.path[:0] = {paths!r}
import ppo_atari, test_ppo_atari as test
ppo_atari.make_agent = lambda *_: test.TinyAgent()
start = (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"])
if start == ("0", "1"):
    test.Mixed.die_at = 70
ppo_atari.train(ppo_atari.parse_args())
tasks = pathlib.Path("/proc/self/task")  # threads of this process, with their names; Linux only
left = [file.read_text() for file in tasks.glob("*/comm")]
if any("gloo" in name for name in left):
    sys.exit(f"threads of the connection outlive it: {{left}}")
"""


def test_torchrun_restarts_a_run_whose_worker_died(tmp_path):
    """Two ranks, kill -9 of rank 1 in its 70th step. In the end no thread of the connection is left."""
    launcher = tmp_path / "launcher.py"
    paths = [str(HERE.parent / "algos"), str(HERE)]
    launcher.write_text(LAUNCHER.format(paths=paths))
    flags = {"env-id": "ALE/Mixed-v5", "num-envs": 4, "num-steps": 8, "total-timesteps": 640}
    flags |= {"checkpoint-every": 64, "eval-episodes": 2, "num-minibatches": 2}
    flags = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(launcher), *flags, "--no-cuda"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()  # one folder, by its default name, for both starts
    results = json.loads((folder / "results.json").read_text())
    assert results["global_step"] == 640 and np.isfinite(results["score"])
    assert len(done.stdout.strip().splitlines()) == 1, "one summary line"


def test_a_run_survives_two_dead_workers(tiny, charts, tmp_path):
    """As torchrun does it: kill -9 of rank 1 in its 70th step, then of rank 0 in the 100th thereafter."""
    args = small(tmp_path / "run", num_envs=4, num_minibatches=2, total_timesteps=1600, checkpoint_every=64)

    def work_and_die(victim, at):
        def work(rank):
            Mixed.die_at = at if rank == victim else np.inf
            trained(args, tiny, charts)(rank)
            return charts

        return work

    in_ranks(work_and_die(1, 70), 2, tmp_path, codes=[1, -signal.SIGKILL])
    steps = [checkpoint(tmp_path / "run")["global_step"]]
    in_ranks(work_and_die(0, 100), 2, tmp_path, restarts=1, codes=[-signal.SIGKILL, 1])
    steps.append(checkpoint(tmp_path / "run")["global_step"])
    points, _ = in_ranks(work_and_die(0, np.inf), 2, tmp_path, restarts=2)
    # The 70th step is in the ninth rollout of 32 steps, the 100th in the 13th.
    assert 256 - 64 <= steps[0] <= 256 and steps[0] + 384 - 64 <= steps[1] <= steps[0] + 384
    assert min(step for _, step in points) == steps[1] + 32
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["global_step"] == 1600 and np.isfinite(results["score"])


def test_a_restart_goes_on_in_its_own_folder_only(tiny, no_evaluation, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = {"num_envs": 4, "num_minibatches": 2}
    args = small("", run_dir=None, total_timesteps=96, **flags)
    in_ranks(trained(args, tiny), 2, tmp_path)
    (first,) = (tmp_path / "runs").iterdir()
    begun, process = first.name.rsplit("__", 1)[1].rsplit("-", 1)
    assert int(process) == os.getpid(), "this process is what torchrun would be"
    assert time.strptime(begun, "%Y%m%d-%H%M%S")
    args = small("", run_dir=None, total_timesteps=160, **flags)
    in_ranks(trained(args, tiny), 2, tmp_path, codes=[2, 1])  # no restart: a run is never overwritten
    assert checkpoint(first)["global_step"] == 96
    # torchrun starts again what was refused: a run that is older than torchrun is still somebody else's.
    now = (first / "args.json").stat().st_mtime
    os.utime(first / "args.json", (1e9, 1e9))
    in_ranks(trained(args, tiny), 2, tmp_path, restarts=1, codes=[2, 1])
    assert checkpoint(first)["global_step"] == 96
    os.utime(first / "args.json", (now, now))
    in_ranks(trained(args, tiny), 2, tmp_path, restarts=1)
    assert checkpoint(first)["global_step"] == 160 and len(list((tmp_path / "runs").iterdir())) == 1
    # Killed before the first checkpoint: it begins anew; --run-dir is kept.
    named = small(tmp_path / "named", total_timesteps=96, **flags)
    in_ranks(trained(named, tiny), 2, tmp_path, restarts=1)
    assert checkpoint(tmp_path / "named")["global_step"] == 96


def test_a_run_resumes_with_another_number_of_ranks(tiny, no_evaluation, charts, tmp_path):
    """2 ranks, then 1, then 4: steps and episodes go on, the weights begin where they ended."""
    flags = {"num_envs": 4, "num_minibatches": 1, "learning_rate": 0.0}  # so that weights can be compared
    run_dir = tmp_path / "run"
    in_ranks(trained(small(run_dir, total_timesteps=64, **flags), tiny), 2, tmp_path)
    first = checkpoint(run_dir)
    first["agent"]["head.weight"] += 1
    torch.save(first, run_dir / "checkpoint.pt")
    ppo_atari.train(small(run_dir, total_timesteps=128, resume=str(run_dir), **flags))
    second = checkpoint(run_dir)
    charts.clear()
    args = small(run_dir, total_timesteps=192, resume=str(run_dir), **flags)
    results = in_ranks(trained(args, tiny, charts), 4, tmp_path)
    third = checkpoint(run_dir)
    assert [saved["global_step"] for saved in (first, second, third)] == [64, 128, 192]
    assert first["episodes"] < second["episodes"] < third["episodes"]
    for weights, _, _ in results:
        assert torch.equal(weights["head.weight"], first["agent"]["head.weight"])
    assert len({seed for _, _, seeds in results for seed in seeds}) == 4
    assert {step for _, step in results[0][1]} == {160, 192}


def test_resumed_ranks_draw_the_same_numbers(tiny, no_evaluation, charts, tmp_path):
    """From one checkpoint, 2 ranks go on with the random state that was saved, as 1 does."""
    flags = {"num_envs": 4, "num_minibatches": 1, "total_timesteps": 64, "anneal_lr": False}
    ppo_atari.train(small(tmp_path / "alone", **flags))
    shutil.copytree(tmp_path / "alone", tmp_path / "both")
    flags["total_timesteps"] = 96  # one rollout more
    ppo_atari.train(small(tmp_path, resume=str(tmp_path / "alone"), **flags))
    results = in_ranks(trained(small(tmp_path, resume=str(tmp_path / "both"), **flags), tiny), 2, tmp_path)
    for weights, _, _ in results:
        for key, x in checkpoint(tmp_path / "alone")["agent"].items():
            torch.testing.assert_close(weights[key], x, rtol=0, atol=1e-5)


def test_a_rank_on_gpus_takes_its_own_and_sends_by_nccl(monkeypatch):
    for name, value in rank_environment(3, 4, 1, restarts=2).items():
        monkeypatch.setenv(name, value)
    taken, joined = [], []
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(ppo_atari.dist, "rendezvous", lambda url: iter([(store, 3, 4)]))
    monkeypatch.setattr(
        ppo_atari.dist, "init_process_group", lambda *args, **kwargs: joined.append((args, kwargs))
    )
    ranks = Ranks(torch.device("cuda"))
    assert (ranks.rank, ranks.count, taken) == (3, 4, [3])
    (((backend,), parts),) = joined
    assert backend == "cpu:gloo,cuda:nccl" and (parts["rank"], parts["world_size"]) == (3, 4)
    parts["store"].set("address", "new")
    assert not store.check(["address"]), "each start has a part of the store to itself"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two machines: their counts of restarts may differ
    Ranks(torch.device("cpu"))
    assert joined[1][0] == ("gloo",) and joined[1][1]["store"] is store and taken == [3]


def test_ctrl_c_saves_once_and_ends_all_ranks(tiny, no_evaluation, charts, tmp_path):
    """The signal reaches rank 1 first; rank 0 in the third rollout."""
    args = small(tmp_path / "run", num_envs=4, num_minibatches=2, total_timesteps=1600)

    def work(rank):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Mixed.interrupt_at = 20 if rank == 0 else 3
        return trained(args, tiny, charts)(rank)

    in_ranks(work, 2, tmp_path, codes=[130, 0])
    assert checkpoint(tmp_path / "run")["global_step"] == 96


def test_target_return_of_all_ranks_stops_all(tiny, no_evaluation, charts, tmp_path):
    """100 episodes have ended after fewer steps of two ranks together than one alone would need."""
    flags = {"num_envs": 4, "num_minibatches": 1, "total_timesteps": 4000, "target_return": -1e9}
    args = small(tmp_path / "run", **flags)
    in_ranks(trained(args, tiny, charts), 2, tmp_path)
    saved = checkpoint(tmp_path / "run")
    assert 100 <= saved["episodes"] < 110 and 100 < saved["global_step"] < 4000


@pytest.mark.parametrize(
    ("flags", "count", "words"),
    [
        ({"num_envs": 4}, 3, "do not divide among"),
        ({"num_envs": 4, "num_steps": 3}, 2, "6 steps per rollout of each of 2 processes"),
        ({"num_envs": 4, "num_minibatches": 32}, 2, "32 minibatches"),
        ({"num_envs": 4, "num_steps": 300}, 2, "550 fit"),  # both share the memory of one machine
    ],
)
def test_what_ranks_cannot_share_is_one_line(flags, count, words, monkeypatch, tmp_path, capsys):
    class Machine:
        total = 2**30 + 1100 * 28_224  # the first for all else

    monkeypatch.setattr(ppo_atari.psutil, "virtual_memory", Machine)
    for name, value in rank_environment(0, count, 1).items():
        monkeypatch.setenv(name, value)
    sizes = {"num_minibatches": 4, **flags}
    with pytest.raises(SystemExit) as end:
        ppo_atari.train(small(tmp_path / "run", **sizes))
    message = capsys.readouterr().err
    assert end.value.code == 2 and words in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("missing", "words"), [("gloo", "gloo"), ("nccl", "--no-cuda"), ("gpus", "2 GPUs")])
def test_a_backend_or_gpu_that_is_not_there_is_one_line(missing, words, monkeypatch, tmp_path, capsys):
    for name, value in rank_environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if missing == "gpus" else 2)
    monkeypatch.setattr(ppo_atari.dist, "is_gloo_available", lambda: missing != "gloo")
    monkeypatch.setattr(ppo_atari.dist, "is_nccl_available", lambda: missing != "nccl")
    with pytest.raises(SystemExit) as end:
        ppo_atari.check_settings(small(tmp_path, num_envs=4, num_minibatches=1, cuda=True))
    message = capsys.readouterr().err
    assert end.value.code == 2 and words in message and message.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "1")  # one process needs none of it
    ppo_atari.check_settings(small(tmp_path, num_envs=4, num_minibatches=1, cuda=True))


def test_one_process_evaluates(monkeypatch, tmp_path, capsys):
    """Under torchrun all ranks would play, and write one film."""
    for count in (2, 1):
        for name, value in rank_environment(0, count, 1).items():
            monkeypatch.setenv(name, value)
        settings = small(tmp_path, num_envs=4, num_minibatches=1, evaluate=str(tmp_path))
        if count == 1:
            ppo_atari.check_settings(settings)
            continue
        with pytest.raises(SystemExit) as end:
            ppo_atari.check_settings(settings)
        assert end.value.code == 2 and "--evaluate is for one process" in capsys.readouterr().err


# ---- what the learner is told ----


@pytest.mark.parametrize("episodic_life", [True, False])
def test_what_is_learned_from_when_games_end(episodic_life, tiny, monkeypatch, charts, tmp_path):
    """Environment 0 terminates after 7 steps, 1 is truncated, 2 both; a life is lost in step 3. V: the newest
    frame, which counts the steps of its game from 10; rewards: 3, 1, −1, … Rollouts of 8 steps."""
    told = spy(monkeypatch, ppo_atari, "gae")
    forward = lambda self, x: (torch.zeros(len(x), 2), x[:, 3, 0, 0] + 0 * self.head.weight.sum())  # noqa: E731
    monkeypatch.setattr(TinyAgent, "forward", forward)
    sizes = {"env_id": "ALE/Endings-v5", "num_envs": 3, "num_minibatches": 2, "total_timesteps": 8 * 3 * 7}
    result = ppo_atari.train(small(tmp_path / "run", episodic_life=episodic_life, **sizes))
    assert len(told) == 7
    for i, (rewards, values, next_values, terminated, truncated, gamma, gae_lambda) in enumerate(told):
        assert (gamma, gae_lambda) == (0.99, 0.95)
        for t in range(8):
            before = (8 * i + t) % 7  # steps that its game had made
            step = before + 1
            assert list(rewards[t]) == [(step < 3) - (step > 2)] * 3
            assert list(values[t]) == [10 + before] * 3
            life_lost = episodic_life and step == 3
            assert list(terminated[t]) == [life_lost or step == 7, life_lost, life_lost or step == 7]
            assert list(truncated[t]) == [False, step == 7, step == 7]
            assert next_values[t, 1] == 10 + step, "never the value of the next game's first frame"
            if step < 7:
                assert list(next_values[t]) == [10 + step] * 3
    true_return = sum(5 - 2 * step for step in range(1, 8))  # of whole games, not clipped
    assert result["episodes"] == 8 * 3 and result["mean_reward"] == true_return
    assert checkpoint(tmp_path / "run")["recent_returns"] == [true_return] * (8 * 3)
    assert charts["charts/episodic_return", 24] == true_return and charts["charts/episodic_length", 24] == 7


def test_frames_move_once_and_nothing_waits_in_the_update(tiny, no_evaluation, monkeypatch, charts, tmp_path):
    """What a GPU would have to do: frames go there once, as bytes; in [C] nothing is read from it."""
    moved = spy(monkeypatch, ppo_atari, "to_tensors")
    steps = []  # of the optimizer
    read = []  # (optimizer steps so far, what was called) of all that makes Python wait for a GPU
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: steps.append(1) or step(self))
    for name in ("cpu", "item", "tolist", "numpy", "__float__", "__bool__", "__int__"):
        real = getattr(torch.Tensor, name)

        def reading(self, *arguments, real=real, name=name):
            if self.requires_grad or self.grad_fn is not None or self.numel():
                read.append((len(steps), name, tuple(self.shape)))
            return real(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, reading)
    args = small(tmp_path / "run", env_id="ALE/Flash-v5", num_envs=3, total_timesteps=24)
    ppo_atari.train(args)
    assert len(steps) == 9
    frames = [array for (arrays, _) in moved for array in arrays]
    assert len(frames) == 8 + 1, "one observation for each step, and one for the last value"
    assert {(array.dtype, array.shape) for array in frames} == {(np.dtype(np.uint8), (3, 4, 84, 84))}
    in_the_rollout = [(name, shape) for at, name, shape in read if at == 0]
    actions = [call for call in in_the_rollout if call == ("cpu", (3,))]
    assert len(actions) == 8 and in_the_rollout.count(("cpu", (9, 3))) == 1
    assert not [call for call in read if 0 < call[0] < 9], "between the first and the last step of the update"
    after = [call for call in read if call[0] == 9 and call[1] == "tolist"]
    assert after == [(9, "tolist", (7,))], "the losses are read once"


@pytest.mark.parametrize(("checkpoint_every", "saved_step"), [(24, 96), (5000, 0)])
def test_a_nan_stops_the_run_and_leaves_the_last_good_checkpoint(
    checkpoint_every, saved_step, tiny, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(Endings, "broken_from", 100)
    sizes = {"env_id": "ALE/Endings-v5", "num_envs": 3, "num_minibatches": 2, "total_timesteps": 600}
    with pytest.raises(SystemExit) as end:
        ppo_atari.train(small(tmp_path / "run", checkpoint_every=checkpoint_every, **sizes))
    assert end.value.code == 1 and "is nan at step 120" in capsys.readouterr().err
    saved = checkpoint(tmp_path / "run")
    assert saved["global_step"] == saved_step and all(x.isfinite().all() for x in saved["agent"].values())


SWITCHES = {
    "ortho_init": True,
    "anneal_lr": False,
    "norm_adv": False,
    "clip_vloss": True,
    "max_grad_norm": 0.0,
    "clip_rewards": False,
    "episodic_life": False,
    "adam_eps": 1e-2,
    "ent_coef": 0.5,
    "vf_coef": 2.0,
    "clip_coef": 0.01,
    "gamma": 0.9,
    "gae_lambda": 0.5,
    "update_epochs": 1,
}


def test_every_switch_changes_the_learning(no_evaluation, tmp_path):
    """A flag that is read but has no effect would leave the weights as they are without it."""

    def weights_after(name, **switch) -> dict:
        sizes = {"num_envs": 2, "num_minibatches": 1, "update_epochs": 2, "total_timesteps": 32, "seed": 3}
        sizes |= {"learning_rate": 1e-3, "ortho_init": False}  # orthogonal weights take long to make
        ppo_atari.train(small(tmp_path / name, **{**sizes, **switch}))
        return checkpoint(tmp_path / name)["agent"]

    usual = weights_after("usual")
    assert all(torch.equal(x, usual[key]) for key, x in weights_after("again").items())
    for name, value in SWITCHES.items():
        other = weights_after(name, **{name: value})
        assert any(not torch.equal(usual[key], other[key]) for key in usual), name


# ---- network ----


def outputs_by_formulas(agent: Agent, frames: torch.Tensor) -> torch.Tensor:
    """The paper's network, written out, in float64."""
    weights = [weight.double() for weight in agent.state_dict().values()]
    x = frames.double() / 255
    for layer, stride in enumerate((4, 2, 1)):
        x = F.conv2d(x, weights[2 * layer], weights[2 * layer + 1], stride=stride).clamp(min=0)
    x = (x.flatten(1) @ weights[6].T + weights[7]).clamp(min=0)
    return x @ weights[8].T + weights[9]


def test_the_network_says_logits_and_value_in_both_precisions():
    torch.manual_seed(0)
    agent = Agent(6, bf16=False, ortho_init=True).to(memory_format=torch.channels_last)
    shapes = [tuple(weight.shape) for weight in agent.parameters()]
    assert shapes[::2] == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (7, 512)]
    frames = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    logits, values = agent(frames)
    want = outputs_by_formulas(agent, frames)
    assert logits.shape == (5, 6) and values.shape == (5,)
    np.testing.assert_allclose(logits.detach(), want[:, :6], atol=1e-5)
    np.testing.assert_allclose(values.detach(), want[:, 6], atol=1e-5)
    assert 0 < logits.abs().max() < 0.05 < values.abs().max(), "the first policy is nearly uniform"
    half = Agent(6, bf16=True, ortho_init=True)
    half.load_state_dict(agent.state_dict())
    difference = (half(frames)[1] - values).abs().max().item()
    assert 1e-6 < difference < 0.03 and half(frames)[0].dtype == torch.float32


def test_orthogonal_weights_and_their_scales():
    network = Agent(6, bf16=False, ortho_init=True).network
    layers = [layer for layer in network if hasattr(layer, "weight")]
    assert not any(layer.bias.any() for layer in layers)
    blocks = [(layer.weight, 2**0.5) for layer in layers[:-1]]
    blocks += [(layers[-1].weight[:-1], 0.01), (layers[-1].weight[-1:], 1.0)]
    for weight, gain in blocks:
        rows = weight.detach().flatten(1).double()
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
        np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-5)  # processors differ
    assert Agent(6, bf16=False, ortho_init=False).network[0].bias.any()


# ---- evaluation, bad input ----


def test_evaluation_is_nearly_greedy_and_repeats_itself(tiny, no_evaluation, monkeypatch, tmp_path):
    ppo_atari.train(small(tmp_path / "run"))
    forward = lambda self, x: (torch.tensor([[0.0, 0.1]]).repeat(len(x), 1), torch.zeros(len(x)))  # noqa: E731
    monkeypatch.setattr(TinyAgent, "forward", forward)
    envs = ppo_atari.make_envs(small(tmp_path), 3)
    plays = []
    for seed in (1, 1, 2):
        args = small(tmp_path, seed=seed)
        policy, _ = ppo_atari.load_policy(args, envs, tmp_path / "run", torch.device("cpu"))
        plays.append(np.concatenate([policy(np.zeros((50, 4, 84, 84), dtype=np.uint8)) for _ in range(100)]))
    np.testing.assert_array_equal(plays[0], plays[1])
    assert (plays[0] != plays[2]).any()
    # 5000 actions, half of the 50 random ones are greedy ones: 25, deviation 5.
    assert 10 <= (plays[0] == 0).sum() <= 40


def test_training_and_evaluation_share_no_seed(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(ppo_atari, "MAX_EVAL_STEPS", 30)
    Unequal.seeds.clear()
    flags = {"env_id": "ALE/Unequal-v5", "eval_episodes": 23}
    ppo_atari.train(small(tmp_path / "run", **flags))
    ppo_atari.train(small(tmp_path, resume=str(tmp_path / "run"), total_timesteps=240, **flags))
    assert [len(seeds) for seeds in Unequal.seeds] == [6, 20, 20, 6, 20, 20]
    training = Unequal.seeds[0] + Unequal.seeds[3]
    evaluation = Unequal.seeds[1] + Unequal.seeds[2]
    assert len(set(training + evaluation)) == 12 + 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_minibatches": 5}, "48 steps per rollout do not divide"),
        ({"num_minibatches": 48}, "a minibatch of one step"),
        ({"total_timesteps": 40}, "less than one rollout"),
        ({"num_steps": 200, "total_timesteps": 1200}, "0.0 GB for a rollout of 1,200 steps"),
        ({"sticky_actions": -0.1}, "sticky-actions"),
        ({"adam_eps": -1.0}, "adam-eps"),
        ({"learning_rate": float("nan")}, "learning-rate"),
    ],
)
def test_bad_sizes_are_refused(tmp_path, changes, words, monkeypatch, capsys):
    class Machine:
        total = 2**30 + 1100 * 28_224  # the first for all else

    monkeypatch.setattr(ppo_atari.psutil, "virtual_memory", Machine)
    with pytest.raises(SystemExit) as end:
        ppo_atari.train(small(tmp_path / "run", **changes))
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert words in message and not (tmp_path / "run").exists()


# ---- the emulator, learning ----


def test_a_short_run_on_a_real_game(tmp_path):
    """A game that is short whatever one does: weights move, and --evaluate has the same score."""
    flags = {"env_id": "ALE/RoadRunner-v5", "num_envs": 2, "num_steps": 20, "num_minibatches": 2}
    args = small(tmp_path / "run", **flags, total_timesteps=80, learning_rate=2.5e-4, update_epochs=1)
    results = ppo_atari.train(args)
    assert results["global_step"] == 80 and results["eval_episodes"] == 2
    torch.manual_seed(args.seed)
    first = Agent(18, bf16=False, ortho_init=True).state_dict()
    assert all(not torch.equal(x, first[key]) for key, x in checkpoint(tmp_path / "run")["agent"].items())
    again = ppo_atari.evaluate(args, tmp_path / "run", torch.device("cpu"))
    assert again["mean_reward"] == results["mean_reward"]


def test_learns_to_see(tmp_path):
    """1 is the best, −1 the worst; who does not look gets 0."""
    sizes = {"num_envs": 8, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 1024}
    args = small(tmp_path / "run", env_id="ALE/Flash-v5", learning_rate=1e-3, eval_episodes=40, **sizes)
    assert ppo_atari.train(args)["mean_reward"] > 0.8


# ---- tests/benchmark/scale.py ----


def test_every_point_of_the_scaling_benchmark_can_be_measured(monkeypatch, tmp_path):
    """Sizes divide and last two rollouts; a point is measured; the figure is drawn from such points."""
    monkeypatch.syspath_prepend(HERE / "benchmark")
    scale = importlib.import_module("scale")
    rows = []
    for curve in scale.CURVES:
        script = importlib.import_module(curve.script)
        monkeypatch.setattr(script, "evaluate", script.evaluate)  # `measure` replaces it: put it back later
        for size in curve.sizes:
            row = {"curve": curve.name, "script": curve.script, "x": size}
            rows.append(row | {"steps_per_second": 10 * size, "memory_mb": 100 + size})
            if curve.name == "replay":  # it trains nothing
                continue
            args = script.Args(**scale.flags_of(curve, size))
            script.check_settings(args)
            assert args.total_timesteps >= 2 * getattr(args, "batch_size", 1)
    assert scale.measure(scale.CURVES[-1], 1000, 1)["memory_mb"] >= 0
    curve = scale.Curve("environments", "ppo", {"num_steps": 8, "num_minibatches": 1}, (2,))
    measured = scale.measure(curve, 2, 1)
    assert measured["steps_per_second"] > 0 and measured["memory_mb"] > 50
    scale.draw(rows, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000
