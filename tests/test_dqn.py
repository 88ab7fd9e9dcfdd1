"""DQN: whole rounds against slow, independent ones; formulas, memory, endings, resuming, learning."""

import copy
import json
import os
import signal
from dataclasses import replace

import counter_env  # noqa: F401 (registers the Counter environments)
import dqn
import gymnasium as gym
import numpy as np
import pytest
import torch
from dqn import Agent, Args, ReplayMemory, epsilon, td_loss, td_target
from gymnasium.vector import AutoresetMode


class Endings(gym.Env):
    """Episodes of 2, 3 or 4 steps that end in turn by termination, by truncation and by both.

    What is observed and paid depends on the seed and on every action. `seeds` keeps the seeds of all resets.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    seeds: list[int] = []

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = gym.spaces.Discrete(3)
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        if seed is not None:
            self.seeds.append(seed)
            self.offset = int(self.np_random.integers(3))
            self.episode = 0
        self.left = 2 + (self.offset + self.episode) % 3
        self.x = self.np_random.normal(size=4)
        return self.x.astype(np.float32), {}

    def step(self, action):
        reward = 3 * self.x[action] - 0.3 * action
        self.x = np.cos(self.x[::-1] + action)
        self.left -= 1
        ending = (self.offset + 2 * self.episode) % 3 if self.left == 0 else None
        return self.x.astype(np.float32), reward, ending in (0, 2), ending in (1, 2), {}

    def render(self):
        return np.zeros((64, 64, 3), dtype=np.uint8)


class Lengths(Endings):
    """Pays 1, 2 or 3 for action 0, 1 or 2. The n-th environment that is made ends after n steps, n ≤ 20."""

    made = 0

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        Lengths.made += 1
        self.length = 1 + (Lengths.made - 1) % 20

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.left = self.length
        return obs, info

    def step(self, action):
        obs, _, _, _, info = super().step(action)
        return obs, float(action + 1), self.left == 0, False, info


class Known(gym.Env):
    """The same episode of 4 steps whatever the seed: nothing of it is lost when a run is resumed after it.

    `stop_at`: Ctrl-C comes in the step of this number, counted over all environments.
    """

    steps = 0
    stop_at = 0

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.x = np.array([0.3, -0.2, 0.1])
        self.t = 0
        return self.x, {}

    def step(self, action):
        self.t += 1
        self.x = np.sin(2 * self.x + self.t + action)
        Known.steps += 1
        if Known.steps == Known.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.x, float(self.x[0]), self.t == 4, False, {}


class Ladder(gym.Env):
    """Climb 5 steps; to let go (action 0) pays 0.6 and ends it, to climb (1) pays nothing before the top.

    At the top, holding on (1) pays 0.25 a step, until a time limit of 4 steps cuts the episode; γ = 0.9 makes
    that worth 2.5, at the foot of the ladder still 1.48. To count the time limit as an end makes it 0.77 and
    0.45, less than letting go.
    """

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(0, 1, (6,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def observe(self):
        return np.eye(6, dtype=np.float32)[min(self.t, 5)]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        if action == 0:
            return self.observe(), 0.6, True, False, {}
        reward = 0.25 if self.t >= 5 else 0.0
        self.t += 1
        return self.observe(), reward, False, self.t == 9, {}


gym.register("EndingsDQN-v0", entry_point=Endings)
gym.register("LengthsDQN-v0", entry_point=Lengths)
gym.register("KnownDQN-v0", entry_point=Known)
gym.register("LadderDQN-v0", entry_point=Ladder)


@pytest.fixture(autouse=True)
def keep_ctrl_c():
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def small(folder, **settings) -> Args:
    """Settings of a short run in this folder."""
    usual = {
        "env_id": "EndingsDQN-v0",
        "num_envs": 3,
        "total_timesteps": 60,
        "buffer_size": 25,
        "learning_starts": 10,
        "batch_size": 5,
        "train_frequency": 2,
        "gradient_steps": 1,
        "hidden_sizes": [16, 12],
        "initial_value": 0.0,
        "norm_obs": True,
        "target_network_frequency": 8,
        "tau": 1.0,
        "exploration_fraction": 0.5,
        "gamma": 0.9,
        "eval_episodes": 1,
        "run_dir": str(folder / "run"),
    }
    return Args(**{**usual, **settings})


@pytest.fixture
def charts(monkeypatch) -> dict:
    """What is logged: {(tag, step): value}."""
    points = {}

    def add_scalar(self, tag, value, step):
        points[tag, step] = value

    monkeypatch.setattr(dqn.SummaryWriter, "add_scalar", add_scalar)
    return points


def spy(monkeypatch, owner, name) -> list:
    """Collects the arguments of all calls, and lets them pass."""
    calls = []
    real = getattr(owner, name)

    def wrapper(*args, **kwargs):
        kept = args[1:] if owner is ReplayMemory else args
        calls.append([x.detach().clone() if isinstance(x, torch.Tensor) else copy.copy(x) for x in kept])
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def untrained(args: Args) -> Agent:
    return Agent(4, 3, args)


def saved(args: Args) -> dict:
    return torch.load(f"{args.run_dir}/checkpoint.pt", weights_only=True)


# ---- whole rounds ----


def network(weights, obs):
    """The values of all actions for one observation."""
    x = torch.as_tensor(np.asarray(obs), dtype=torch.float64)
    x = torch.clamp((x - weights["norm_obs.mean"]) / (weights["norm_obs.var"] + 1e-8) ** 0.5, -10, 10)
    *hidden, last = sorted({int(name.split(".")[1]) for name in weights if weights[name].dim() == 2})
    for layer in hidden:
        x = torch.clamp(weights[f"network.{layer}.weight"] @ x + weights[f"network.{layer}.bias"], min=0)
    return weights[f"network.{last}.weight"] @ x + weights[f"network.{last}.bias"]


def best(values):
    return max(range(len(values)), key=lambda i: values[i].item())


def slow_target(args, weights, copied, row):
    """y of one transition."""
    if row["terminated"]:
        return row["r"]
    values = network(copied, row["next_obs"])
    chosen = best(network(weights, row["next_obs"])) if args.double_q else best(values)
    return row["r"] + args.gamma * values[chosen].item()


def slow_epsilon(args, step):
    """Two points of a straight line, and what lies before and after them."""
    first = args.learning_starts
    last = first + args.exploration_fraction * args.total_timesteps
    if step <= first:
        return 1.0
    if step >= last:
        return args.end_e
    return (1.0 * (last - step) + args.end_e * (step - first)) / (last - first)


def slow_dqn(args: Args, log_every: int):
    """DQN in float64, row by row, with an Adam of its own: weights, copy, what is logged at which step."""
    N = args.num_envs
    torch.manual_seed(args.seed)
    first = dict(untrained(args).named_parameters())
    untrained(args)  # the copy draws weights, too, before it gets those of the first
    learned = list(first)
    weights = {name: x.detach().double().requires_grad_() for name, x in first.items()}
    weights |= {"norm_obs.mean": torch.zeros(4).double(), "norm_obs.var": torch.ones(4).double() - 1e-8}
    copied = {name: x.detach() for name, x in weights.items()}
    momentum = {name: torch.zeros_like(weights[name]) for name in learned}
    square = {name: torch.zeros_like(weights[name]) for name in learned}
    seen = []  # observations in which an action was chosen
    envs = [Endings() for _ in range(N)]
    seeds = dqn.env_seeds(N, args.seed, 0, 0)
    observed = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    scores = [0.0] * N
    lengths = [0] * N
    ended = []  # (episodic return, length) since the last point
    memory = {}
    number = 0  # of the next transition
    updates = 0
    losses = {}
    logs = {}
    logged = 0
    greedy_actions = 0
    for step in range(0, args.total_timesteps - N + 1, N):
        share = slow_epsilon(args, step)
        explore = torch.rand(N).tolist()
        random = torch.randint(3, (N,)).tolist()
        for n, env in enumerate(envs):
            a = random[n]
            if explore[n] >= share:
                a = best(network(weights, observed[n]))
                greedy_actions += 1
            next_obs, reward, terminated, truncated, _ = env.step(a)
            row = {"obs": observed[n], "a": a, "r": float(reward), "next_obs": next_obs}
            memory[number % args.buffer_size] = row | {"terminated": terminated}
            number += 1
            seen.append(observed[n])
            observed[n] = next_obs
            scores[n] += reward
            lengths[n] += 1
            if terminated or truncated:
                ended.append((scores[n], lengths[n]))
                scores[n] = 0.0
                lengths[n] = 0
                observed[n] = env.reset()[0]
        if args.norm_obs:
            weights["norm_obs.mean"] = torch.tensor(np.mean(seen, axis=0)).double()
            weights["norm_obs.var"] = torch.tensor(np.var(np.float64(seen), axis=0))
            copied |= {name: weights[name] for name in ("norm_obs.mean", "norm_obs.var")}
        done = range(step + 1, step + N + 1)  # the steps of this round
        rate = args.learning_rate
        if args.anneal_lr:
            rate *= (args.total_timesteps - step) / args.total_timesteps
        phases = [k for k in done if k % args.train_frequency == 0 and k > args.learning_starts]
        minibatches = len(phases) * args.gradient_steps
        if minibatches:
            drawn = [memory[i] for i in torch.randint(len(memory), (minibatches * args.batch_size,)).tolist()]
            for _ in range(minibatches):
                targets = [slow_target(args, weights, copied, row) for row in drawn[: args.batch_size]]
                loss = 0.0
                mean_q = 0.0
                for _ in range(args.batch_size):
                    row = drawn.pop(0)
                    q = network(weights, row["obs"])
                    error = abs(q[row["a"]] - targets.pop(0))
                    if args.huber_loss:
                        loss = loss + (error**2 / 2 if error < 1 else error - 0.5) / args.batch_size
                    else:
                        loss = loss + error**2 / args.batch_size
                    mean_q += q.mean().item() / args.batch_size
                losses = {"losses/td_loss": loss.item(), "losses/q_values": mean_q}
                parameters = [weights[name] for name in learned]
                gradients = dict(zip(learned, torch.autograd.grad(loss, parameters), strict=True))
                updates += 1
                for name in learned:
                    x = weights[name]
                    momentum[name] = 0.9 * momentum[name] + 0.1 * gradients[name]
                    square[name] = 0.999 * square[name] + 0.001 * gradients[name] ** 2
                    m = momentum[name] / (1 - 0.9**updates)
                    v = square[name] / (1 - 0.999**updates)
                    weights[name] = (x - rate * m / (v.sqrt() + 1e-8)).detach().requires_grad_()
                # Steps in minibatches: the random steps count as if something had been learned in them.
                all_updates = args.learning_starts // args.train_frequency * args.gradient_steps + updates
                steps_of_one = args.train_frequency / args.gradient_steps
                if all_updates % max(1, int(args.target_network_frequency / steps_of_one)) == 0:
                    old = copied
                    copied = {name: x.detach() for name, x in weights.items()}
                    for name in learned:
                        copied[name] = (1 - args.tau) * old[name] + args.tau * copied[name]
        if step + N >= logged + log_every or step + 2 * N > args.total_timesteps:
            logged = step + N
            log = {"charts/epsilon": share, "charts/learning_rate": rate, **losses}
            if ended:
                log["charts/episodic_return"] = np.mean([score for score, _ in ended])
                log["charts/episodic_length"] = np.mean([length for _, length in ended])
                ended = []
            logs[logged] = log
    assert 5 < greedy_actions < number
    return weights, copied, logs


WHOLE = {
    "defaults": {},
    "a copy that differs": {"learning_rate": 5e-3, "target_network_frequency": 25, "seed": 2},
    "plain": {"double_q": False, "norm_obs": False, "anneal_lr": False, "learning_rate": 3e-3, "seed": 3},
    "an odd size": {"num_envs": 4, "train_frequency": 3, "buffer_size": 22, "total_timesteps": 65, "seed": 4},
    "several minibatches": {"num_envs": 5, "train_frequency": 1, "target_network_frequency": 11, "seed": 5},
    "phases": {"train_frequency": 15, "gradient_steps": 6, "target_network_frequency": 10, "seed": 6},
    "rare minibatches": {"num_envs": 2, "train_frequency": 5, "target_network_frequency": 14},
    "no fixed target": {"target_network_frequency": 1, "end_e": 0.3, "gamma": 0.5, "seed": 7},
    "optimism": {"initial_value": 3.0, "seed": 8},
    "a copy that follows": {"tau": 0.3, "target_network_frequency": 1, "learning_rate": 5e-3, "seed": 10},
    "huber": {"huber_loss": True, "initial_value": 2.0, "seed": 9},
    "no replay": {"buffer_size": 5, "learning_starts": 0, "exploration_fraction": 0.0},
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_rounds_equal_slow_ones(name, tmp_path, charts, monkeypatch):
    """All endings, a memory that is written over: every weight, the copy, and every logged number."""
    monkeypatch.setattr(dqn, "LOG_EVERY", 14)
    args = small(tmp_path, **WHOLE[name])
    dqn.train(args)
    got = saved(args)
    weights, copied, logs = slow_dqn(args, 14)
    assert {step for _, step in charts} == set(logs)
    for step, log in logs.items():
        assert set(log) == {tag for tag, at in charts if at == step} - {"charts/SPS"}
        for tag, value in log.items():
            assert charts[tag, step] == pytest.approx(value, rel=2e-4, abs=2e-6), (tag, step)
    for key, x in weights.items():
        torch.testing.assert_close(got["agent"][key].double(), x.detach(), rtol=0, atol=2e-5)
        torch.testing.assert_close(got["target"][key].double(), copied[key], rtol=0, atol=2e-5)
    torch.manual_seed(args.seed)
    start = dict(untrained(args).named_parameters())
    assert all((got["agent"][key] - start[key]).abs().max() > 1e-3 for key in start)


@pytest.mark.parametrize(
    ("num_envs", "train_frequency", "gradient_steps"),
    [(1, 4, 1), (3, 4, 1), (8, 4, 2), (4, 1, 1), (3, 7, 5), (16, 56, 28)],
)
def test_minibatches_and_copies_do_not_depend_on_the_number_of_environments(
    num_envs, train_frequency, gradient_steps, tmp_path, monkeypatch
):
    minibatches = spy(monkeypatch, dqn, "td_loss")
    copied_at = []
    lerp = torch.nn.Parameter.lerp_

    def copying(self, learned, tau):
        copied_at.append(len(minibatches))
        return lerp(self, learned, tau)

    monkeypatch.setattr(torch.nn.Parameter, "lerp_", copying)
    monkeypatch.setattr(dqn, "evaluate", lambda *_: {})
    sizes = {"total_timesteps": 336, "learning_starts": 168, "target_network_frequency": 56}
    sizes |= {"train_frequency": train_frequency, "gradient_steps": gradient_steps}
    dqn.train(small(tmp_path, num_envs=num_envs, **sizes))
    phases = [step for step in range(1, 337) if step % train_frequency == 0 and step > 168]
    assert len(minibatches) == gradient_steps * len(phases)
    assert [len(targets) for _, _, targets, _ in minibatches] == [5] * len(minibatches)
    # At the start, then whenever 56 steps are over; until 168 nothing was learned.
    before = [gradient_steps * len([step for step in phases if step <= end]) for end in (224, 280, 336)]
    assert copied_at == sorted(before * 6)  # weights and biases of three layers


@pytest.mark.parametrize(("steps", "train_frequency", "gradient_steps"), [(1, 4, 1), (10, 256, 128)])
def test_the_copy_is_renewed_within_a_phase(steps, train_frequency, gradient_steps, tmp_path, monkeypatch):
    """--target-network-frequency 1 leaves no fixed target: the network that learns values as well."""
    compared = []
    target_of = dqn.td_target

    def watched(rewards, terminated, target_q, choosing_q, gamma):
        compared.append(torch.equal(target_q, choosing_q))
        return target_of(rewards, terminated, target_q, choosing_q, gamma)

    monkeypatch.setattr(dqn, "td_target", watched)
    monkeypatch.setattr(dqn, "evaluate", lambda *_: {})
    sizes = {"target_network_frequency": steps, "train_frequency": train_frequency, "learning_rate": 0.01}
    dqn.train(small(tmp_path, gradient_steps=gradient_steps, total_timesteps=600, **sizes))
    per_copy = max(1, steps * gradient_steps // train_frequency)
    first = 10 // train_frequency * gradient_steps
    assert compared == [(first + i) % per_copy == 0 or i == 0 for i in range(len(compared))]
    assert len(compared) > 100


def test_the_learning_rate_falls_from_the_full_one_and_is_never_0(tmp_path, monkeypatch):
    used = []

    class Adam(torch.optim.Adam):
        def step(self):
            used.append(self.param_groups[0]["lr"])
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    dqn.train(small(tmp_path, total_timesteps=20, num_envs=4, learning_starts=0, learning_rate=0.1))
    assert used == pytest.approx([0.1] * 2 + [0.08] * 2 + [0.06] * 2 + [0.04] * 2 + [0.02] * 2)


# ---- formulas ----


def test_td_target_by_hand():
    target_q = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 0.0], [7.0, 8.0, 9.0], [-1.0, -2.0, -3.0]])
    own_q = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-5.0, -4.0, -6.0]])
    rewards = torch.tensor([0.5, -1.0, 2.0, 0.0])
    terminated = torch.tensor([False, False, True, False])
    plain = td_target(rewards, terminated, target_q, target_q, 0.5)
    assert plain.tolist() == [0.5 + 2.5, -1.0 + 2.0, 2.0, -0.5]
    double = td_target(rewards, terminated, target_q, own_q, 0.5)
    assert double.tolist() == [0.5 + 0.5, -1.0 + 0.0, 2.0, -1.0]
    assert td_target(rewards, terminated, target_q, own_q, 0.0).tolist() == rewards.tolist()


def test_an_infinite_value_behind_a_termination_does_no_harm():
    infinite = torch.full((1, 2), torch.inf)
    assert td_target(torch.ones(1), torch.tensor([True]), infinite, infinite, 0.9).tolist() == [1.0]


@pytest.mark.parametrize("huber", [False, True])
def test_td_loss_is_that_of_the_actions_taken(huber):
    q = torch.tensor([[1.0, 50.0, 60.0], [70.0, 80.0, 2.0], [90.0, -3.0, 99.0]], requires_grad=True)
    loss = td_loss(q, torch.tensor([0, 2, 1]), torch.tensor([1.5, 5.0, -3.0]), huber)
    squares = (0.5**2 + 3.0**2 + 0.0) / 3
    assert loss.item() == pytest.approx((0.5 * 0.5**2 + (3.0 - 0.5) + 0.0) / 3 if huber else squares)
    loss.backward()
    want = torch.zeros(3, 3)
    want[0, 0] = -0.5 / 3 if huber else -2 * 0.5 / 3
    want[1, 2] = -1.0 / 3 if huber else -2 * 3.0 / 3  # Huber: an error of 3, the gradient of 1
    torch.testing.assert_close(q.grad, want)


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 1.0), (100, 1.0), (101, 0.991), (150, 0.55), (199, 0.109), (200, 0.1), (201, 0.1), (10**9, 0.1)],
)
def test_epsilon(step, share):
    assert epsilon(step, 100, 100, 0.1) == pytest.approx(share)


def test_epsilon_that_falls_at_once():
    assert [epsilon(step, 5, 0, 0.2) for step in (4, 5, 6)] == [1.0, 1.0, pytest.approx(0.2)]


def test_the_shape_of_the_network():
    torch.manual_seed(0)
    agent = Agent(7, 3, Args(hidden_sizes=[6, 9], initial_value=0))
    shapes = [(6, 7), (6,), (9, 6), (9,), (3, 9), (3,)]
    assert [tuple(x.shape) for x in agent.parameters()] == shapes
    W1, b1, W2, b2, W3, b3 = agent.parameters()
    obs = torch.randn(5, 7)
    want = torch.relu(torch.relu(obs @ W1.T + b1) @ W2.T + b2) @ W3.T + b3
    torch.testing.assert_close(agent(obs), want)
    assert agent(obs).shape == (5, 3)
    torch.manual_seed(0)
    torch.testing.assert_close(Agent(7, 3, Args(hidden_sizes=[6, 9], initial_value=8.0))(obs), want + 8)
    assert [tuple(x.shape) for x in Agent(7, 3, Args(hidden_sizes=[])).parameters()] == [(3, 7), (3,)]


def test_networks_read_normalised_observations():
    torch.manual_seed(0)
    agent = Agent(2, 3, Args(hidden_sizes=[6], initial_value=0))
    plain = agent(torch.tensor([[-1.0, 1.0], [0.5, 12.0]]))
    agent.norm_obs.update(
        torch.tensor([[90.0, 0.1], [110.0, 0.3]])
    )  # means 100 and 0.2, deviations 10 and 0.1
    torch.testing.assert_close(agent(torch.tensor([[90.0, 0.3], [105.0, 1.2]])[:1]), plain[:1])
    limited = agent(torch.tensor([[105.0, 1.4]]))  # 12 deviations: cut to 10
    torch.testing.assert_close(limited, agent(torch.tensor([[105.0, 1.2]])))


# ---- the replay memory ----


@pytest.mark.parametrize(("capacity", "num_envs"), [(10, 3), (12, 4), (3, 3), (50, 1)])
def test_the_memory_holds_the_last_transitions_together(capacity, num_envs):
    """Against a list. Each number says which transition it belongs to."""
    torch.manual_seed(0)
    memory = ReplayMemory(capacity, 2)
    rng = np.random.default_rng(0)
    truth = []
    for t in range(15):
        numbers = t * num_envs + np.arange(num_envs)
        ends = rng.random(num_envs) < 0.3
        obs = np.stack([numbers, -numbers], axis=1).astype(np.float64)
        memory.add(obs, numbers % 7, numbers / 8, obs + 0.5, ends)
        truth += [
            (k, -k, k % 7, k / 8, k + 0.5, 0.5 - k, bool(end))
            for k, end in zip(numbers.tolist(), ends, strict=True)
        ]
        batches = list(memory.sample(4, 50))
        assert len(batches) == 4
        drawn = set()
        for obs, actions, rewards, next_obs, terminated in batches:
            assert obs.shape == next_obs.shape == (50, 2) and actions.shape == rewards.shape == (50,)
            assert (obs.dtype, actions.dtype, rewards.dtype) == (torch.float32, torch.int64, torch.float32)
            assert terminated.dtype == torch.bool and terminated.shape == (50,)
            columns = (*obs.T, actions, rewards, *next_obs.T, terminated)
            drawn |= set(zip(*(column.tolist() for column in columns), strict=True))
        assert drawn <= set(truth[-capacity:])
        if len(truth) <= 12:
            assert drawn == set(truth[-capacity:])


def test_the_memory_draws_uniformly_and_from_the_seed():
    memory = ReplayMemory(30, 1)
    for k in range(11):  # not full: what was never written is not drawn
        memory.add(np.zeros((2, 1)), np.array([k, 100 + k]), np.zeros(2), np.zeros((2, 1)), np.zeros(2, bool))
    torch.manual_seed(5)
    drawn = torch.stack([batch[1] for batch in memory.sample(11, 1000)])  # (11, 1000)
    assert not torch.equal(drawn[0], drawn[1])
    values, counts = np.unique(drawn, return_counts=True)
    assert list(values) == [*range(11), *range(100, 111)]
    assert 400 < counts.min() and counts.max() < 600  # 500 each, deviation 22
    torch.manual_seed(5)
    assert torch.equal(torch.stack([batch[1] for batch in memory.sample(11, 1000)]), drawn)


def test_a_memory_that_does_not_fit_is_refused(monkeypatch, tmp_path, capsys):
    class Machine:
        total = 4 * 45 * 1000 + 10  # CartPole: 45 bytes a transition, four times while saving

    monkeypatch.setattr(dqn.psutil, "virtual_memory", Machine)
    dqn.check_args(small(tmp_path, env_id="CartPole-v1", buffer_size=1000))
    with pytest.raises(SystemExit) as stop:
        dqn.check_args(small(tmp_path, env_id="CartPole-v1", buffer_size=1001))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--buffer-size is 1000" in message and message.count("\n") == 1
    # To evaluate takes no memory.
    dqn.check_args(small(tmp_path, env_id="CartPole-v1", buffer_size=1001, evaluate="somewhere"))


# ---- environments, acting, endings ----


def test_a_film_keeps_the_last_picture_and_training_resets_at_once():
    args = Args(env_id="Counter-terminated-v0")
    envs = dqn.make_envs(args, 2)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and envs.num_envs == 2
    assert not hasattr(envs.unwrapped, "processes")  # all in this process
    film = dqn.make_envs(args, 1, render_mode="rgb_array")
    for each in (envs, film):
        each.reset(seed=1)
        for _ in range(3):
            obs, _, _, _, info = each.step(np.zeros(each.num_envs, dtype=int))
    assert film.render()[0][0, 0, 0] == 30  # the third step
    assert obs.tolist() == [[0, 3]]
    assert info["episode"]["r"].tolist() == [6]


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "neither"])
def test_what_is_remembered_when_episodes_end(ending, tmp_path, monkeypatch, charts):
    """Two environments, episodes of 3 steps that are observed as [episode, step] and pay 1, 2, 3."""
    added = spy(monkeypatch, ReplayMemory, "add")
    monkeypatch.setattr(dqn, "MAX_EVAL_STEPS", 9)
    settings = {"num_envs": 2, "total_timesteps": 8, "learning_starts": 6}
    results = dqn.train(small(tmp_path, env_id=f"Counter-{ending}-v0", **settings))
    want = [([0, 0], 1, [0, 1]), ([0, 1], 2, [0, 2]), ([0, 2], 3, [0, 3]), ([1, 0], 1, [1, 1])]
    if ending == "neither":
        want[3] = ([0, 3], 4, [0, 4])
    assert len(added) == 4
    for t, (obs, actions, rewards, next_obs, terminated) in enumerate(added):
        assert obs.tolist() == [want[t][0]] * 2
        assert rewards.tolist() == [want[t][1]] * 2
        assert next_obs.tolist() == [want[t][2]] * 2  # never the first of the next episode
        assert terminated.tolist() == [t == 2 and ending in ("terminated", "both")] * 2
        assert actions.shape == (2,)
    if ending == "neither":
        assert not [tag for tag, _ in charts if tag == "charts/episodic_return"]
        assert results["mean_reward"] == 45  # an evaluation without an end is cut after MAX_EVAL_STEPS
    else:
        assert charts["charts/episodic_return", 8] == 6 and charts["charts/episodic_length", 8] == 3
        assert results["mean_reward"] == 6 and results["episodes"] == 2


def test_the_network_that_learns_acts_and_the_copy_only_values(tmp_path, monkeypatch):
    """Who is asked about what: to act, and with double Q to choose, the agent; the copy for s' alone."""
    asked = {}
    forward = Agent.forward

    def watched(self, obs):
        name = "agent" if self.network[0].weight.requires_grad else "copy"
        asked.setdefault(name, []).append((obs.clone(), torch.is_grad_enabled()))
        return forward(self, obs)

    for double_q in (True, False):
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Agent, "forward", watched)
            patch.setattr(dqn, "evaluate", lambda *_: {})
            rows = spy(patch, dqn, "td_target")
            added = spy(patch, ReplayMemory, "add")
            args = small(tmp_path / str(double_q), double_q=double_q, end_e=0.0, learning_starts=0)
            dqn.train(replace(args, exploration_fraction=0.0, train_frequency=3))  # greedy after one round
        agent = asked["agent"]
        target = asked["copy"]
        acted = [obs for obs, _ in agent if len(obs) == 3]
        assert len(acted) == 19
        for obs, (seen, *_) in zip(acted, added[1:], strict=True):
            assert obs.tolist() == seen.tolist()
        assert len(target) == len(rows) == 20 and all(len(obs) == 5 for obs, _ in target)
        assert not any(grad for _, grad in target)
        learned = [obs for obs, grad in agent if grad]
        chose = [obs for obs, grad in agent if not grad and len(obs) == 5]
        assert len(learned) == 20 and len(chose) == (20 if double_q else 0)
        for looked, (valued, _) in zip(chose, target, strict=False):
            assert torch.equal(looked, valued)
        for (_, _, target_q, choosing_q, _), (obs, _) in zip(rows, target, strict=True):
            assert target_q.shape == choosing_q.shape == (len(obs), 3)
            assert double_q or torch.equal(target_q, choosing_q)


def test_bad_settings_and_a_nan_end_the_training(tmp_path, capsys):
    for bad in (
        {"buffer_size": 4},
        {"buffer_size": 5, "num_envs": 6},
        {"num_envs": 61},
        {"learning_starts": 60},
        {"train_frequency": 0},
        {"gradient_steps": 0},
        {"target_network_frequency": 0},
        {"end_e": 1.5},
        {"batch_size": 0},
    ):
        with pytest.raises(SystemExit) as stop:
            dqn.train(small(tmp_path, **bad))
        assert stop.value.code == 2 and not (tmp_path / "run").exists()
        assert capsys.readouterr().err.startswith("error: ")
    dqn.check_args(small(tmp_path, buffer_size=5, num_envs=5, learning_starts=59))
    dqn.check_args(small(tmp_path, num_envs=25, total_timesteps=25))


@pytest.mark.parametrize(("checkpoint_every", "saved_step", "end_step"), [(30, 30, 60), (5000, 0, 100)])
def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(
    checkpoint_every, saved_step, end_step, tmp_path, monkeypatch, capsys
):
    """Found before the next checkpoint or at the next point of the charts, whichever comes first."""
    monkeypatch.setattr(dqn, "LOG_EVERY", 100)
    sizes = {"num_envs": 1, "total_timesteps": 500, "batch_size": 25, "checkpoint_every": checkpoint_every}
    args = small(tmp_path, env_id="Broken-v0", **sizes)
    with pytest.raises(SystemExit) as stop:
        dqn.train(args)
    assert stop.value.code == 1
    assert f"nan at step {end_step}" in capsys.readouterr().err
    checkpoint = saved(args)
    assert checkpoint["global_step"] == saved_step
    assert all(weight.isfinite().all() for weight in checkpoint["agent"].values())


# ---- saving, resuming ----


def exit_code(args) -> int:
    """In a function of its own: an exception that is kept would keep the run folder locked."""
    try:
        dqn.train(args)
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_run_in_two_parts_equals_one_in_one(tmp_path, monkeypatch):
    """Where environments lose nothing at a new start, nothing is lost: memory, copy, optimizer, draws."""
    settings = {"env_id": "KnownDQN-v0", "num_envs": 2, "total_timesteps": 160, "buffer_size": 30}
    settings |= {"target_network_frequency": 48, "exploration_fraction": 1.0, "learning_rate": 3e-3}
    whole = small(tmp_path / "whole", **settings)
    dqn.train(whole)
    parts = small(tmp_path / "parts", **settings)
    monkeypatch.setattr(Known, "steps", 0)
    monkeypatch.setattr(Known, "stop_at", 80)  # the end of an episode of every environment
    assert exit_code(parts) == 130 and saved(parts)["global_step"] == 80
    middle = saved(parts)
    weights = [name for name in middle["agent"] if name.startswith("network")]
    differ = [not torch.equal(middle["agent"][name], middle["target"][name]) for name in weights]
    assert all(differ), "or a resume that copies one into the other would not show"
    assert middle["memory"]["written"] == 80
    dqn.train(replace(parts, run_dir=None, resume=parts.run_dir))
    one = saved(whole)
    two = saved(parts)
    assert two["global_step"] == one["global_step"] == 160
    for part in ("agent", "target", "memory"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, two[part][name]), (part, name)
    assert torch.equal(one["rng_state"], two["rng_state"]) and one["episodes"] == two["episodes"]


def test_a_memory_of_another_size_is_refused(tmp_path, capsys):
    args = small(tmp_path)
    dqn.train(args)
    with pytest.raises(SystemExit) as stop:
        dqn.train(replace(args, run_dir=None, resume=args.run_dir, total_timesteps=90, buffer_size=26))
    assert stop.value.code == 2
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "size mismatch" in message[0]


# ---- the end of training, evaluation ----


def test_training_and_evaluation_share_no_seed(tmp_path):
    Endings.seeds.clear()
    args = small(tmp_path, eval_episodes=43)
    dqn.train(args)
    # Three environments to train; three rounds of twenty to evaluate, the last one for three episodes.
    assert len(Endings.seeds) == 3 + 60
    assert len(set(Endings.seeds)) == 63
    # Another run, and the rest of this one after a kill, have others.
    assert not set(Endings.seeds) & set(dqn.env_seeds(50, args.seed + 1, 0, 0))
    Endings.seeds.clear()
    dqn.train(replace(args, run_dir=None, resume=args.run_dir, total_timesteps=90, eval_episodes=1))
    resumed = Endings.seeds[:3]
    assert not set(resumed) & set(dqn.env_seeds(3, args.seed, 0, 0)) and len(set(resumed)) == 3


def test_evaluation_is_greedy_and_counts_one_episode_each(tmp_path, monkeypatch, capsys):
    """23 episodes of 1, 2, …, 20, 1, 2, 3 steps; action 2, a little more worth, pays 3 points a step."""
    make_agent = dqn.make_agent

    def agent_with_known_values(*arguments):
        agent = make_agent(*arguments)
        agent.network[-1].weight.data.zero_()
        agent.network[-1].bias.data.copy_(torch.tensor([0.0, 0.0, 0.01]))
        return agent

    monkeypatch.setattr(dqn, "make_agent", agent_with_known_values)
    args = small(tmp_path, env_id="LengthsDQN-v0", learning_rate=0.0, eval_episodes=23)
    make_envs = dqn.make_envs

    def count_from_1(*arguments):
        Lengths.made = 0
        return make_envs(*arguments)

    monkeypatch.setattr(dqn, "make_envs", count_from_1)
    results = dqn.train(args)
    scores = [3 * length for length in [*range(1, 21), 1, 2, 3]]
    assert results["mean_reward"] == pytest.approx(np.mean(scores))
    assert results["std_reward"] == pytest.approx(np.std(scores))
    assert results["score"] == pytest.approx(np.mean(scores) - np.std(scores))
    assert results["eval_episodes"] == 23 and results["global_step"] == 60 and results["seed"] == args.seed
    assert results["algo"] == "dqn" and results["env_id"] == "LengthsDQN-v0" and results["episodes"] > 3
    assert results["steps_per_second"] == pytest.approx(60 / results["wall_time_s"])
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"{np.mean(scores):.2f} ± {np.std(scores):.2f} over 23 episodes" in capsys.readouterr().out
    assert not (tmp_path / "run" / "replay.mp4").exists()


def test_evaluation_plays_as_plain_environments_do(tmp_path):
    """Greedy episodes of single environments, one after the other, have the same sums of rewards."""
    args = small(tmp_path, eval_episodes=22, total_timesteps=210, learning_rate=0.01)
    results = dqn.train(args)
    weights = {name: x.double() for name, x in saved(args)["agent"].items()}
    scores = []
    for first in (0, 20):
        for seed in dqn.env_seeds(20, args.seed, 1, first):
            env = Endings()
            obs, _ = env.reset(seed=seed)
            score = 0.0
            over = False
            while not over:
                obs, reward, terminated, truncated, _ = env.step(best(network(weights, obs)))
                score += reward
                over = terminated or truncated
            scores.append(score)
    assert results["mean_reward"] == pytest.approx(np.mean(scores[:22]), rel=1e-6)
    assert results["std_reward"] == pytest.approx(np.std(scores[:22]), rel=1e-6)


# ---- learning ----

SWITCHES = {
    "double_q": False,
    "norm_obs": False,
    "huber_loss": True,
    "initial_value": 1.0,
    "anneal_lr": False,
    "target_network_frequency": 1,
    "tau": 0.5,
    "buffer_size": 5,
    "hidden_sizes": [64],
    "learning_rate": 1e-4,
    "gamma": 0.5,
    "batch_size": 6,
    "train_frequency": 1,
    "gradient_steps": 2,
    "learning_starts": 20,
    "exploration_fraction": 0.1,
    "end_e": 0.5,
    "num_envs": 4,
    "seed": 2,
}


def weights_after(folder, **switch) -> dict:
    args = small(folder, **{"learning_rate": 0.01, "target_network_frequency": 20, **switch})
    dqn.train(args)
    return saved(args)["agent"]


def test_every_switch_changes_the_learning(tmp_path):
    """A flag that is read but has no effect would leave the weights as they are without it."""
    usual = weights_after(tmp_path / "usual")
    for name, value in SWITCHES.items():
        other = weights_after(tmp_path / name, **{name: value})
        assert any(key not in other or not torch.equal(usual[key], other[key]) for key in usual), name


def test_learns_to_climb(tmp_path):
    """1.0 is the best. Whoever counts a time limit as an end, or mixes up s and s', lets go: 0.6."""
    sizes = {"total_timesteps": 6000, "learning_starts": 500, "buffer_size": 5000, "eval_episodes": 20}
    rates = {"learning_rate": 1e-3, "batch_size": 64, "train_frequency": 4, "target_network_frequency": 100}
    rates |= {"gradient_steps": 1, "initial_value": 0.0, "tau": 1.0}
    args = Args(env_id="LadderDQN-v0", gamma=0.9, **sizes, **rates, run_dir=str(tmp_path / "run"))
    result = dqn.train(args)
    assert result["mean_reward"] == pytest.approx(1.0)
    # The values are those of γ: with the time limit looked through, to hold on at the top is worth 2.5.
    agent = Agent(6, 2, args)
    agent.load_state_dict(saved(args)["agent"])
    q = agent(torch.eye(6)).detach()
    torch.testing.assert_close(q[:, 1], 2.5 * 0.9 ** torch.arange(5.0, -1, -1), rtol=0.1, atol=0)
    torch.testing.assert_close(q[:, 0], torch.full((6,), 0.6), rtol=0, atol=0.15)
