"""DQN: targets by hand, the memory against lists of stacks, a whole run against a slow one, and learning."""

import json
import signal
import time
from itertools import count

import ale_py  # noqa: F401 (registers the Atari games)
import dqn_atari
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dqn_atari import Agent, Args, ReplayMemory, epsilon, make_envs, q_loss, td_target
from gymnasium.vector import AutoresetMode


class Catch(gym.vector.VectorEnv):
    """Games of 4 steps that need all of DQN at once.

    The ball is seen left or right in the first frame only. In steps 1 to 3, action 0 takes half a point and
    ends the game, action 1 waits; in step 4 the side where the ball was pays 1, the other −1. Waiting pays
    only in the long run, and the last step pays only if the oldest frame of the stack is remembered.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs, autoreset_mode=None, stack_num=4, img_height=84, img_width=84, **options):
        assert autoreset_mode is AutoresetMode.SAME_STEP and options["reward_clipping"] is False
        self.num_envs = num_envs
        self.shape = (stack_num, img_height, img_width)
        self.single_observation_space = gym.spaces.Box(0, 255, self.shape, np.uint8)
        self.single_action_space = gym.spaces.Discrete(2)
        self.action_space = gym.spaces.MultiDiscrete([2] * num_envs)
        self.stacks = np.zeros((num_envs, *self.shape), dtype=np.uint8)
        self.time = np.zeros(num_envs, dtype=int)
        self.side = np.zeros(num_envs, dtype=int)
        self.action = np.zeros(num_envs, dtype=int)

    def reset(self, *, seed=None, options=None):
        assert len(seed) == self.num_envs
        self.rngs = [np.random.default_rng(one) for one in seed]
        for n in range(self.num_envs):
            self.begin(n)
        return self.stacks.copy(), {"lives": self.lives()}

    def begin(self, n):
        self.side[n] = self.rngs[n].integers(2)
        self.time[n] = self.action[n] = 0
        self.stacks[n] = 0
        self.draw(n)

    def draw(self, n):
        self.stacks[n] = np.roll(self.stacks[n], -1, axis=0)
        self.stacks[n, -1] = self.frame(n)

    def frame(self, n):
        picture = np.zeros(self.shape[1:], dtype=np.uint8)
        if self.time[n] == 0:
            picture[30:54, 10 + 40 * self.side[n] : 34 + 40 * self.side[n]] = 255
        return picture

    def lives(self):
        return np.zeros(self.num_envs, dtype=np.int32)

    def rules(self, n):
        """Reward, terminated, truncated of the step just made."""
        if self.time[n] < 4:
            return (0.5, True, False) if self.action[n] == 0 else (0.0, False, False)
        return (1.0 if self.action[n] == self.side[n] else -1.0), True, False

    def step(self, actions):
        self.time += 1
        self.action[:] = actions
        for n in range(self.num_envs):
            self.draw(n)
        outcomes = [self.rules(n) for n in range(self.num_envs)]
        rewards, terminated, truncated = (np.array(x) for x in zip(*outcomes, strict=True))
        info = {}
        if (terminated | truncated).any():
            info["final_obs"] = self.stacks.copy()
            for n in np.flatnonzero(terminated | truncated):
                self.begin(n)
        return self.stacks.copy(), rewards, terminated, truncated, info | {"lives": self.lives()}


class Endings(Catch):
    """Frames that count the steps of games of 7, whose environments end in different ways.

    A life of 3 is lost in step 3; two are won in step 6, and the next game begins with fewer again.
    """

    broken_from = np.inf  # steps of all environments until rewards are NaN
    total = 0

    def frame(self, n):
        return 10 + self.time[n]

    def lives(self):
        return np.array([3, 3, 3, 2, 2, 2, 4])[self.time % 7]

    def reward(self, n):
        return float(5 - 2 * self.time[n])

    def rules(self, n):
        end = self.time[n] == 7
        self.total += 1
        reward = np.nan if self.total > self.broken_from else self.reward(n)
        return reward, end and n % 3 in (0, 2), end and n % 3 in (1, 2)


class Trial(Endings):
    """All four endings, games of unequal lengths, frames and rewards that hang on actions and seeds.

    Environment 0 terminates, 1 is truncated, 2 both, 3 neither: its game never ends. Lives: as above.
    """

    def frame(self, n):
        return 40 + 10 * self.side[n] + 5 * (self.time[n] % 8) + 3 * self.action[n]

    def reward(self, n):
        return [2.0, -3.0][self.action[n]] + 0.5 * self.time[n]

    def rules(self, n):
        end = self.time[n] == 5 + 2 * n and n < 3
        return self.reward(n), end and n in (0, 2), end and n in (1, 2)


class Unequal(Trial):
    """Environment n pays n + 1 in each of the n + 2 steps of its games; that of the last one never ends.

    After the k-th reset, all pay k times as much.
    """

    seeds = []
    resets = 0

    def reset(self, *, seed=None, options=None):
        Unequal.seeds.append(list(seed))
        self.resets += 1
        return super().reset(seed=seed, options=options)

    def rules(self, n):
        return (1.0 + n) * self.resets, self.time[n] == 2 + n and n < self.num_envs - 1, False


class TinyAgent(torch.nn.Module):
    """Stands in for the network where only the wiring is tested: linear in one pixel of each frame."""

    bf16 = False

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 2)

    def forward(self, frames):
        return self.head(frames[:, :, 0, 0].float() / 100)


for name, game in {"Catch": Catch, "Endings": Endings, "Trial": Trial, "Unequal": Unequal}.items():
    gym.register(f"ALE/{name}-v5", vector_entry_point=game)


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

    monkeypatch.setattr(dqn_atari, "make_agent", make_agent)
    return made


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(dqn_atari, "evaluate", lambda *_: {})


@pytest.fixture
def points(monkeypatch):
    """Collects the points of all charts: (tag, value, step)."""
    collected = []
    monkeypatch.setattr(dqn_atari.SummaryWriter, "add_scalar", lambda _, *point: collected.append(point))
    return collected


def small(run_dir, **changes) -> Args:
    sizes = {
        "env_id": "ALE/Endings-v5",
        "num_envs": 3,
        "total_timesteps": 600,
        "learning_starts": 90,
        "buffer_size": 200,
        "batch_size": 7,
        "eval_episodes": 3,
        "checkpoint_every": 300,
        "run_dir": str(run_dir),
        "cuda": False,
        "bf16": False,
    }
    return Args(**{**sizes, **changes})


def checkpoint(run_dir) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def spy(monkeypatch, owner, name) -> list:
    """Collects the arguments of all calls, and lets them pass."""
    calls, real = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


# The maths


def test_td_target_by_hand():
    rewards, terminated = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([False, False, True])
    copy = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 0.0, 2.0, 1.0], [9.0, 9.0, 9.0, 9.0]])
    online = torch.tensor([[5.0, 6.0, 0.0, 1.0], [0.0, 1.0, 7.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    # The network that learns chooses actions 1 and 2, worth 2 and 2 to the copy, whose own best are 4 and 8.
    double = td_target(rewards, terminated, copy, online, 0.5)
    plain = td_target(rewards, terminated, copy, copy, 0.5)
    assert double.tolist() == [1 + 0.5 * 2, -1 + 0.5 * 2, 0.0]
    assert plain.tolist() == [1 + 0.5 * 4, -1 + 0.5 * 8, 0.0]


def test_q_loss_is_huber_of_the_actions_taken():
    q = torch.tensor([[0.0, 3.0], [5.0, 1.0], [0.5, 0.0]], requires_grad=True)
    loss = q_loss(q, torch.tensor([1, 0, 0]), torch.tensor([0.0, 5.5, 0.5]))
    assert loss.item() == pytest.approx((2.5 + 0.125 + 0.0) / 3)  # errors 3, −½, 0
    loss.backward()
    np.testing.assert_allclose(q.grad, np.array([[0, 1], [-0.5, 0], [0, 0]]) / 3, rtol=1e-6)


def test_epsilon_falls_in_a_line_once_learning_starts():
    steps = (0, 1000, 1500, 2000, 5000)
    np.testing.assert_allclose([epsilon(t, 1000, 1000, 0.1) for t in steps], [1, 1, 0.55, 0.1, 0.1])
    assert epsilon(1001, 1000, 0, 0.1) == pytest.approx(0.1)
    assert epsilon(1001, 1000, 2, 0.1) == pytest.approx(0.55)


# The network


def values_by_formulas(agent: Agent, frames: torch.Tensor) -> torch.Tensor:
    """The paper's network, written out, in float64."""
    weights = [weight.double() for weight in agent.state_dict().values()]
    x = frames.double() / 255
    for layer, stride in enumerate((4, 2, 1)):
        x = F.conv2d(x, weights[2 * layer], weights[2 * layer + 1], stride=stride).clamp(min=0)
    x = (x.flatten(1) @ weights[6].T + weights[7]).clamp(min=0)
    return x @ weights[8].T + weights[9]


def test_network_is_the_papers_and_fast_in_both_precisions():
    torch.manual_seed(0)
    agent = Agent(6, bf16=False, ortho_init=True).to(memory_format=torch.channels_last)
    shapes = [tuple(weight.shape) for weight in agent.parameters()]
    assert shapes[::2] == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (6, 512)]
    with torch.no_grad():
        for bias in agent.parameters():  # so that units are cut off at 0 and biases count
            bias += 0.02 * torch.randn_like(bias)
    frames = torch.randint(0, 256, (5, 5, 84, 84), dtype=torch.uint8)[:, 1:]  # a view, as it is in training
    q = agent(frames)
    want = values_by_formulas(agent, frames)
    assert q.shape == (5, 6) and want.std() > 0.01
    np.testing.assert_allclose(q.detach(), want, atol=1e-5)
    np.testing.assert_allclose(agent.network(frames / 255).detach(), want, atol=1e-5)
    half = Agent(6, bf16=True, ortho_init=True)
    half.load_state_dict(agent.state_dict())
    targets = torch.linspace(-1, 1, 5)
    gradients = []
    for network in (agent, half):
        q_loss(network(frames), torch.arange(5), targets).backward()
        assert network.network[0].weight.dtype == network(frames).dtype == torch.float32
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    difference = (half(frames).detach() - q.detach()).abs().max()
    assert 1e-6 < difference < 0.03, "another precision, and the same values"
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_half_precision_keeps_small_differences_between_actions():
    agent = Agent(6, bf16=True, ortho_init=True)
    with torch.no_grad():
        agent.network[-1].weight.zero_()
        # As in Pong; bfloat16 would make them two values.
        agent.network[-1].bias.copy_(-1.8 + 0.001 * torch.arange(6))
        q = agent(torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8))
    np.testing.assert_allclose(q[0].diff(), 0.001, atol=1e-6)


def test_orthogonal_weights_and_their_scale():
    for layer in Agent(6, bf16=False, ortho_init=True).network[::2]:
        if not hasattr(layer, "weight"):
            continue
        assert not layer.bias.any()
        rows = layer.weight.detach().flatten(1).double()
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
        gain = 0.01 if len(layer.bias) == 6 else 2**0.5
        np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-6)
    plain = Agent(6, bf16=False, ortho_init=False).network
    assert plain[0].bias.any() and plain[-1].weight.abs().max() <= 512**-0.5


def test_initial_weights_keep_small_differences_between_frames():
    """Pong's bright ground with the ball in two places: the last hidden layer must tell them apart."""
    differences = []
    for ortho_init in (True, False):
        torch.manual_seed(0)
        agent = Agent(6, bf16=False, ortho_init=ortho_init)
        frames = torch.full((2, 4, 84, 84), 107, dtype=torch.uint8)
        frames[0, :, 40:42, 30] = frames[1, :, 50:52, 60] = 236
        with torch.no_grad():
            features = agent.network[:-1](frames / 255)
            differences.append((features[0] - features[1]).norm().item())
            assert (agent(frames).abs().max() < 0.05) or not ortho_init
    assert differences[0] > 30 * differences[1]


@pytest.mark.parametrize("gpu_has_it", [True, False])
def test_bf16_is_asked_of_the_device_that_is_used(monkeypatch, gpu_has_it):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_it)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not gpu_has_it})
    assert dqn_atari.has_bf16(torch.device("cuda")) is gpu_has_it
    assert dqn_atari.has_bf16(torch.device("cpu")) is not gpu_has_it
    envs = make_envs(small("."), 1)
    agent = dqn_atari.make_agent(small(".", bf16=True), envs, torch.device("cpu"))
    assert agent.bf16 is not gpu_has_it
    assert not dqn_atari.make_agent(small("."), envs, torch.device("cpu")).bf16


def test_one_thread_unless_more_are_asked_for():
    try:
        for count in (3, 1):
            dqn_atari.setup_torch(Args(num_threads=count, cuda=False))
            assert torch.get_num_threads() == count
        assert Args().num_threads == 1
    finally:
        torch.set_num_threads(1)


# The memory


def stamped(*numbers) -> np.ndarray:
    """Frames that carry a number: (len(numbers), 84, 84)."""
    frames = np.zeros((len(numbers), 84, 84), dtype=np.uint8)
    frames.reshape(len(numbers), -1)[:, -8:] = np.array(numbers, dtype="<i8")[:, None].view(np.uint8)
    return frames


def numbers(frames) -> np.ndarray:
    """The numbers that frames (B, K, 84, 84) carry: (B, K)."""
    return np.ascontiguousarray(frames.reshape(*frames.shape[:2], -1)[..., -8:]).view("<i8")[..., 0]


@pytest.mark.parametrize("num_envs", [1, 3])
def test_memory_against_lists_of_stacks(num_envs):
    """Thousands of games of 1 to 12 steps; what can be drawn is right, recent, and not less than promised."""
    rng, count, buffer_size = np.random.default_rng(num_envs), 0, 40
    memory = ReplayMemory(buffer_size, num_envs)
    truth, order = {}, [[] for _ in range(num_envs)]  # by newest frame of the stack; by environment

    def first_stack():
        nonlocal count
        count += 4
        return stamped(*range(count - 4, count))

    obs = np.stack([first_stack() for _ in range(num_envs)])
    memory.start(np.arange(num_envs), obs)
    for step in range(3000):
        next_obs = np.roll(obs, -1, axis=1)
        next_obs[:, -1] = stamped(*range(count, count + num_envs))
        count += num_envs
        actions, rewards = rng.integers(18, size=num_envs), rng.integers(-1, 2, size=num_envs)
        terminated = rng.random(num_envs) < 0.05  # lost lives too: the game may go on
        for n in range(num_envs):
            now, then = numbers(obs[n : n + 1])[0], numbers(next_obs[n : n + 1])[0]
            truth[now[-1]] = ([*now, then[-1]], actions[n], rewards[n], terminated[n])
            assert list(now[1:]) == list(then[:-1])
            order[n].append(now[-1])
        memory.add(actions, rewards, terminated, next_obs)
        ended = np.flatnonzero(rng.random(num_envs) < (0.2 if step % 500 < 400 else 0))
        obs = next_obs.copy()
        for n in ended:
            obs[n] = first_stack()
        memory.start(ended, obs[ended])
        next_obs[:] = 255  # what the environment does with its buffer afterwards is its own affair
        if step % 10 and step > 30:
            continue
        frames, *others = memory.sample(64)
        assert frames.shape == (64, 5, 84, 84) and [len(other) for other in others] == [64] * 3
        for seen, *rest in zip(numbers(frames), *others, strict=True):
            stack, *want = truth[seen[-2]]
            assert list(seen) == stack and rest == want
        # All that can be drawn: the newest transitions of each environment without a gap.
        rows = np.flatnonzero(memory.valid)
        held = numbers(memory.frames[rows][:, None])[:, 0]
        for n in range(num_envs):
            mine = sorted(held[rows % num_envs == n])
            assert mine == order[n][len(order[n]) - len(mine) :]
            if step % 500 > 400 + buffer_size:  # a long time without an ending
                assert len(mine) >= min(buffer_size // num_envs, len(order[n]))


def test_memory_draws_uniformly_and_from_the_seed():
    memory = ReplayMemory(30, 2)
    memory.start(np.arange(2), np.zeros((2, 4, 84, 84), dtype=np.uint8))
    for k in range(11):  # not full: what was never written is not drawn
        memory.add(np.array([k, 100 + k]), np.zeros(2), np.zeros(2, dtype=bool), np.zeros((2, 4, 84, 84)))
    memory.frames = memory.frames[:, :1, :1]  # so many stacks would fill a gigabyte
    torch.manual_seed(5)
    drawn = memory.sample(11_000)[1]
    values, counts = np.unique(drawn, return_counts=True)
    assert list(values) == [*range(11), *range(100, 111)]
    assert 400 < counts.min() and counts.max() < 600  # 500 each, deviation 22
    torch.manual_seed(5)
    np.testing.assert_array_equal(memory.sample(11_000)[1], drawn)


def test_memory_is_as_small_as_promised_and_asks_before_it_takes(monkeypatch, capsys):
    memory = ReplayMemory(5000, 8)
    arrays = (memory.frames, memory.actions, memory.rewards, memory.terminated, memory.valid)
    assert sum(array.nbytes for array in arrays) / (5000 + 8 * 8) <= 7.3e9 / 1e6
    assert "0.04 GB" in capsys.readouterr().err

    class Machine:
        total = 2**30 + 50_000_000  # the first for all else

    monkeypatch.setattr(dqn_atari.psutil, "virtual_memory", Machine)
    with pytest.raises(SystemExit) as end:
        dqn_atari.check_settings(Args(buffer_size=10_000_000))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "70.6 GB" in message and message.count("\n") == 1
    largest = int(message.split()[-1])
    assert 6950 < largest < 7080
    dqn_atari.check_settings(Args(buffer_size=largest))
    memory = ReplayMemory(largest, 8)
    arrays = (memory.frames, memory.actions, memory.rewards, memory.terminated, memory.valid)
    assert sum(array.nbytes for array in arrays) <= 50_000_000
    with pytest.raises(SystemExit):
        dqn_atari.check_settings(Args(buffer_size=largest + 1))
    dqn_atari.check_settings(Args(buffer_size=largest + 1, evaluate="runs/x"))  # it needs no memory


# A whole run against a slow one


def slow_run(args: Args, log_every: int):
    """The docstring's algorithm for TinyAgent and the game Trial, in loops and float64; memory: lists.

    Draws the same random numbers in the same order. Returns weights (2, 4), bias (2,), those of the copy, and
    the points of the charts.
    """
    torch.manual_seed(args.seed)
    agent = TinyAgent()
    TinyAgent()  # the copy, which draws its weights in vain
    w = agent.head.weight.detach().double().numpy().copy()
    b = agent.head.bias.detach().double().numpy().copy()
    w_copy, b_copy = w.copy(), b.copy()
    moments = [[np.zeros_like(x), np.zeros_like(x)] for x in (w, b)]
    N, C = args.num_envs, -(-args.buffer_size // args.num_envs) + 8
    envs = Trial(N, AutoresetMode.SAME_STEP, reward_clipping=False)
    seeds = np.random.SeedSequence((args.seed, 0, 0)).generate_state(N) >> 1
    obs, info = envs.reset(seed=seeds.tolist())
    pushed = [[None] * 4 for _ in range(N)]  # per environment: a frame each; transitions in their last frame
    lives = info["lives"]
    returns, lengths = [0.0] * N, [0] * N
    step, logged, points = 0, 0, []
    learned = args.learning_starts // args.train_frequency
    ended_returns, ended_lengths, losses, q_means = [], [], [], []
    pixels = lambda stack: stack[:, 0, 0] / 100  # noqa: E731

    while step + N <= args.total_timesteps:
        # Act.
        progress = (step - args.learning_starts) / (args.exploration_fraction * args.total_timesteps)
        eps = 1 - (1 - args.end_e) * min(max(progress, 0), 1)
        explore = torch.rand(N).tolist()
        actions = torch.randint(2, (N,)).tolist()
        for n in range(N):
            if explore[n] >= np.float32(eps):
                q = w @ pixels(obs[n]) + b
                actions[n] = 0 if q[0] >= q[1] else 1
        new_obs, rewards, terminated, truncated, info = envs.step(np.array(actions))
        step += N
        # Remember.
        for n in range(N):
            ends = bool(terminated[n] or truncated[n])
            successor = info["final_obs"][n] if ends else new_obs[n]
            reward = rewards[n]
            if args.clip_rewards:
                reward = 1.0 if reward > 0 else -1.0 if reward < 0 else 0.0
            over = bool(terminated[n])
            if args.episodic_life and not ends and info["lives"][n] < lives[n]:
                over = True
            pushed[n][-1] = (pixels(obs[n]), actions[n], reward, over, pixels(successor))
            pushed[n].append(None)
            returns[n] += rewards[n]
            lengths[n] += 1
            if ends:
                pushed[n] += [None] * 4
                ended_returns.append(returns[n])
                ended_lengths.append(lengths[n])
                returns[n], lengths[n] = 0.0, 0
        lives = info["lives"]
        obs = new_obs

        # Learn.
        while step > args.learning_starts and learned < step // args.train_frequency:
            learned += 1
            batch = []
            while len(batch) < args.batch_size:
                begun = min(max(map(len, pushed)), C)
                for row in torch.randint(N * begun, (2 * args.batch_size,)).tolist():
                    ring = pushed[row % N]
                    newest = [i for i in range(len(ring)) if i % C == row // N]  # last written to this slot
                    kept = newest and newest[-1] >= len(ring) - C + 3  # the stack's oldest frame, too
                    if kept and ring[newest[-1]] is not None:
                        batch.append(ring[newest[-1]])
            batch = batch[: args.batch_size]
            gradient_w, gradient_b, loss, q_mean = np.zeros_like(w), np.zeros_like(b), 0.0, 0.0
            for x, action, reward, over, successor in batch:
                copy_values = w_copy @ successor + b_copy
                best = int(np.argmax(w @ successor + b if args.double_q else copy_values))
                y = reward + (0.0 if over else args.gamma * copy_values[best])
                q = w @ x + b
                error = q[action] - y
                loss += (0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5) / args.batch_size
                q_mean += q.mean() / args.batch_size
                slope = min(max(error, -1.0), 1.0) / args.batch_size
                gradient_w[action] += slope * x
                gradient_b[action] += slope
            k = learned - args.learning_starts // args.train_frequency
            for x, gradient, (m, v) in zip((w, b), (gradient_w, gradient_b), moments, strict=True):
                m += 0.1 * (gradient - m)  # Adam
                v += 0.001 * (gradient**2 - v)
                x -= args.learning_rate * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
            losses.append(loss)
            q_means.append(q_mean)
            if learned * args.train_frequency % args.target_network_frequency == 0:
                w_copy, b_copy = w.copy(), b.copy()

        # Log.
        if step - logged >= log_every or step + N > args.total_timesteps:
            points.append(("charts/epsilon", eps, step))
            if ended_returns:
                points.append(("charts/episodic_return", np.mean(ended_returns), step))
                points.append(("charts/episodic_length", np.mean(ended_lengths), step))
            if losses:
                points.append(("losses/td_loss", np.mean(losses), step))
                points.append(("losses/q_values", np.mean(q_means), step))
            ended_returns, ended_lengths, losses, q_means = [], [], [], []
            logged = step
    return (w, b, w_copy, b_copy), points


RUNS = [
    {},
    {"double_q": False, "seed": 2, "buffer_size": 1000, "total_timesteps": 400},
    {"clip_rewards": False, "seed": 3, "gamma": 0.5, "train_frequency": 8, "target_network_frequency": 8},
    {"episodic_life": False, "seed": 4, "train_frequency": 2, "target_network_frequency": 22, "end_e": 0.0},
]


@pytest.mark.parametrize("changes", RUNS)
def test_a_whole_run_is_that_of_a_slow_one(tiny, no_evaluation, points, monkeypatch, tmp_path, changes):
    monkeypatch.setattr(dqn_atari, "LOG_EVERY", 50)
    settings = {"env_id": "ALE/Trial-v5", "num_envs": 4, "total_timesteps": 402, "learning_starts": 60}
    settings |= {"buffer_size": 67, "batch_size": 5, "train_frequency": 3, "target_network_frequency": 24}
    settings |= {"learning_rate": 0.02, "gamma": 0.9, "exploration_fraction": 0.4, "end_e": 0.1}
    args = small(tmp_path / "run", **{**settings, **changes})
    dqn_atari.train(args)
    want, want_points = slow_run(args, log_every=50)
    saved = checkpoint(tmp_path / "run")
    got = [saved[part][f"head.{name}"] for part in ("agent", "target") for name in ("weight", "bias")]
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(got[0], got[2]) or args.target_network_frequency == 8
    kept = {(tag, step): value for tag, value, step in points if tag != "charts/SPS"}
    wanted = {(tag, step): value for tag, value, step in want_points}
    assert kept == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert {step for _, step in kept} == {52, 104, 156, 208, 260, 312, 364, 400}
    assert saved["global_step"] == 400


# Evaluation


def test_evaluation_is_nearly_greedy_and_repeats_itself(tiny, no_evaluation, monkeypatch, tmp_path):
    dqn_atari.train(small(tmp_path / "run"))
    forward = lambda self, x: torch.tensor([[0.0, 1.0]]).repeat(len(x), 1)  # noqa: E731
    monkeypatch.setattr(TinyAgent, "forward", forward)
    envs = make_envs(small(tmp_path), 3)
    plays = []
    for seed in (1, 1, 2):
        args = small(tmp_path, seed=seed)
        policy, _ = dqn_atari.load_policy(args, envs, tmp_path / "run", torch.device("cpu"))
        plays.append(np.concatenate([policy(np.zeros((50, 4, 84, 84), dtype=np.uint8)) for _ in range(100)]))
    np.testing.assert_array_equal(plays[0], plays[1])
    assert (plays[0] != plays[2]).any()
    # 5000 actions, half of the 50 random ones are greedy ones: 25, deviation 5.
    assert 10 <= (plays[0] == 0).sum() <= 40


def test_evaluation_acts_on_the_agents_values(tiny, no_evaluation, monkeypatch, tmp_path):
    monkeypatch.setattr(dqn_atari, "EVAL_EPSILON", 0.0)
    dqn_atari.train(small(tmp_path / "run"))
    saved = checkpoint(tmp_path / "run")
    weight = torch.tensor([[1.0, 0, 0, -1], [-1, 0, 0, 1]])  # action 1 if the ball grew brighter
    saved["agent"] = {"head.weight": weight, "head.bias": torch.zeros(2)}
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    envs = make_envs(small(tmp_path), 3)
    policy, _ = dqn_atari.load_policy(small(tmp_path), envs, tmp_path / "run", torch.device("cpu"))
    obs = np.random.default_rng(0).integers(0, 256, size=(50, 4, 84, 84), dtype=np.uint8)
    np.testing.assert_array_equal(policy(obs), obs[:, 3, 0, 0] > obs[:, 0, 0, 0])


def test_evaluation_counts_each_episode_once_and_to_its_end(tiny, monkeypatch, tmp_path, capsys):
    """23 episodes in rounds of 20, whose last environment goes on until it is stopped after 30 steps."""
    monkeypatch.setattr(dqn_atari, "MAX_EVAL_STEPS", 30)
    monkeypatch.setattr(dqn_atari.time, "perf_counter", count(step=1e-15).__next__)  # a very fast machine
    Unequal.seeds.clear()
    args = small(tmp_path / "run", env_id="ALE/Unequal-v5", eval_episodes=23, total_timesteps=120)
    result = dqn_atari.train(args)
    first_round = [(n + 1) * (n + 2) for n in range(19)] + [20 * 30]
    returns = first_round + [2 * (n + 1) * (n + 2) for n in range(3)]
    assert result["mean_reward"] == pytest.approx(np.mean(returns), rel=1e-12)
    assert result["std_reward"] == pytest.approx(np.std(returns), rel=1e-12)
    assert result["score"] == pytest.approx(np.mean(returns) - np.std(returns), rel=1e-12)
    assert result["eval_episodes"] == 23 and result["global_step"] == 120
    assert 0 < result["wall_time_s"] < 1e-9 and result["steps_per_second"] == 120 / 1e-9
    training, *evaluation = Unequal.seeds
    assert len(training) == 3 and [len(seeds) for seeds in evaluation] == [20, 20]
    every_seed = sum(Unequal.seeds, [])
    assert len(set(every_seed)) == 43, "none twice, and none of those that were trained with"
    assert "23 episodes" in capsys.readouterr().out


# Resuming


@pytest.mark.parametrize(("learning_starts", "refill"), [(90, 30), (91, 31), (5000, 200)])
def test_a_resumed_run_fills_its_memory_before_it_learns_on(
    tiny, monkeypatch, tmp_path, learning_starts, refill
):
    added, real, updates = spy(monkeypatch, ReplayMemory, "add"), dqn_atari.td_target, []
    monkeypatch.setattr(dqn_atari, "td_target", lambda *args: updates.append(len(added)) or real(*args))
    dqn_atari.train(small(tmp_path / "run"))
    assert len(updates) == 600 // 4 - 90 // 4
    updates.clear()
    added.clear()
    batches = spy(monkeypatch, dqn_atari, "to_tensors")
    flags = {"resume": str(tmp_path / "run"), "total_timesteps": 5900, "learning_starts": learning_starts}
    monkeypatch.setattr(dqn_atari.Run, "goes_on", lambda run, size: run.step < 900)
    monkeypatch.setattr(dqn_atari.Run, "finish", lambda run, device: {"global_step": run.step})
    assert dqn_atari.train(small(tmp_path / "run", **flags)) == {"global_step": 900}
    # So many steps of 3 environments fill the memory, none of them counts, and the ratio of updates stays.
    assert len(added) == refill + 300 // 3
    if learning_starts < 900:
        assert len(updates) == 900 // 4 - 600 // 4 and updates[0] == refill + 2
    # No stack reaches from the last game of the refill into the first one after it.
    for (frames, *_), _ in batches:
        counts = frames[:, :, 0, 0].astype(int)
        assert set(np.unique(np.diff(counts))) <= {0, 1, 10}, "nothing, the first frame, and one more each"


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows how many steps the environments have made; what is called at a given time."""

    class Clock:
        now = 0.0
        alarms = {}
        strftime = time.strftime

        def perf_counter(self):
            return self.now

    clock = Clock()
    real = Endings.step

    def step(self, actions):
        clock.now += 1
        clock.alarms.pop(clock.now, int)()
        return real(self, actions)

    monkeypatch.setattr(Endings, "step", step)
    monkeypatch.setattr(dqn_atari, "time", clock)
    return clock


def test_nothing_of_the_refill_counts(tiny, no_evaluation, clock, points, monkeypatch, tmp_path):
    """Neither its episodes nor its seconds, in the results and in the charts; and it waits for no device."""
    monkeypatch.setattr(dqn_atari, "LOG_EVERY", 21)
    dqn_atari.train(small(tmp_path / "run"))
    before = checkpoint(tmp_path / "run")
    assert before["episodes"] == 28 * 3 and before["wall_time_s"] == clock.now == 200
    points.clear()
    reads = spy(monkeypatch, dqn_atari.Run, "stop_if_not_finite")
    bars = spy(monkeypatch, dqn_atari.tqdm, "set_postfix_str")
    resets = spy(monkeypatch, dqn_atari.AtariEnvs, "reset")
    flags = {"resume": str(tmp_path / "run"), "total_timesteps": 642, "checkpoint_every": 10_000}
    dqn_atari.train(small(tmp_path / "run", **flags))
    after = checkpoint(tmp_path / "run")
    assert clock.now == 200 + 30 + 14 and after["wall_time_s"] == 200 + 14
    assert "filled again: 90 steps" in bars[0][1]
    # 14 counted steps are two whole games in each environment, begun after the refill.
    assert after["episodes"] == before["episodes"] + 2 * 3 and len(resets) == 2
    kept = {(tag, step): value for tag, value, step in points}
    assert {step for _, step in kept} == {621, 642}
    for step, seconds in ((621, 207), (642, 214)):
        assert kept["charts/episodic_length", step] == 7 and kept["charts/episodic_return", step] == -21
        assert kept["charts/SPS", step] == step / seconds
    parts = 2  # tensors of the agent, looked at before each of two checkpoints; and one loss at each point
    assert len(reads) == 2 * parts + 2


def test_games_after_the_refill_are_others_than_those_before(tiny, no_evaluation, monkeypatch, tmp_path):
    monkeypatch.setattr(dqn_atari, "MAX_EVAL_STEPS", 30)
    flags = {"env_id": "ALE/Unequal-v5", "seed": 5}
    Unequal.seeds.clear()
    dqn_atari.train(small(tmp_path / "run", **flags))
    flags |= {"resume": str(tmp_path / "run"), "total_timesteps": 660}
    dqn_atari.train(small(tmp_path / "run", **flags))
    assert len(Unequal.seeds) == 3 and len(set(sum(Unequal.seeds, []))) == 9
    for seeds, key in zip(Unequal.seeds, [(5, 0, 0), (5, 0, 600), (5, 0, 600, 1)], strict=True):
        assert seeds == [seed >> 1 for seed in dqn_atari.env_seeds(3, *key)]


def test_a_refill_can_be_interrupted(tiny, no_evaluation, clock, tmp_path):
    """Ctrl-C in the refill: nothing has been learned, and no second has passed."""
    dqn_atari.train(small(tmp_path / "run"))
    before = checkpoint(tmp_path / "run")
    clock.alarms[220] = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        dqn_atari.train(small(tmp_path / "run", resume=str(tmp_path / "run"), total_timesteps=900))
    assert end.value.code == 130 and clock.now == 220
    after = checkpoint(tmp_path / "run")
    assert after["global_step"] == 600 and after["episodes"] == before["episodes"]
    assert after["wall_time_s"] == before["wall_time_s"]
    assert torch.equal(after["agent"]["head.weight"], before["agent"]["head.weight"])


def test_a_resumed_run_keeps_its_target_and_takes_the_rate_given_now(
    tiny, no_evaluation, monkeypatch, tmp_path
):
    flags = {"target_network_frequency": 10_000, "learning_rate": 0.01}
    dqn_atari.train(small(tmp_path / "run", **flags))
    saved = checkpoint(tmp_path / "run")
    assert not torch.equal(saved["agent"]["head.weight"], saved["target"]["head.weight"])
    steps, real = [], torch.optim.Adam.step

    def step(self, *arguments):
        steps.append(self.param_groups[0]["lr"])
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    flags |= {"resume": str(tmp_path / "run"), "learning_rate": 0.005, "total_timesteps": 660}
    dqn_atari.train(small(tmp_path / "run", **flags))
    resumed = checkpoint(tmp_path / "run")
    assert torch.equal(resumed["target"]["head.weight"], saved["target"]["head.weight"])
    assert not torch.equal(resumed["agent"]["head.weight"], saved["agent"]["head.weight"])
    assert steps == [0.005] * 15
    assert json.loads((tmp_path / "run" / "args.json").read_text())["learning_rate"] == 0.005


def test_exploration_follows_the_budget_given_now(tiny, no_evaluation, points, monkeypatch, tmp_path):
    monkeypatch.setattr(dqn_atari, "LOG_EVERY", 3)
    flags = {"exploration_fraction": 0.5, "end_e": 0.1}
    dqn_atari.train(small(tmp_path / "run", **flags))
    assert points[-3:] and points[-1][2] == 600
    points.clear()
    flags |= {"resume": str(tmp_path / "run"), "total_timesteps": 6000}
    monkeypatch.setattr(dqn_atari.Run, "finish", lambda *_: {})
    real = dqn_atari.Run.goes_on
    monkeypatch.setattr(dqn_atari.Run, "goes_on", lambda run, size: run.step < 610 and real(run, size))
    dqn_atari.train(small(tmp_path / "run", **flags))
    epsilons = [value for tag, value, _ in points if tag == "charts/epsilon"]
    assert epsilons[0] == pytest.approx(1 - 0.9 * (600 - 90) / 3000)


@pytest.mark.parametrize(("checkpoint_every", "saved_step", "end_step"), [(300, 300, 600), (5000, 0, 1002)])
def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(
    tiny, monkeypatch, tmp_path, capsys, checkpoint_every, saved_step, end_step
):
    """Found before the next checkpoint or the next point of the charts, whichever comes first."""
    monkeypatch.setattr(Endings, "broken_from", 400)
    changes = {"total_timesteps": 6000, "learning_rate": 0.01, "checkpoint_every": checkpoint_every}
    with pytest.raises(SystemExit) as end:
        dqn_atari.train(small(tmp_path / "run", **changes))
    assert end.value.code == 1
    assert f"is nan at step {end_step}" in capsys.readouterr().err
    saved = checkpoint(tmp_path / "run")
    assert saved["global_step"] == saved_step
    assert all(weight.isfinite().all() for weight in saved["agent"].values())


# The wiring


@pytest.mark.parametrize("episodic_life", [True, False])
def test_what_the_learner_is_told(tiny, monkeypatch, tmp_path, episodic_life):
    """Environment 0 terminates, 1 is truncated, 2 both; a life is lost in step 3; rewards: 3, 1, −1, …"""
    added = spy(monkeypatch, ReplayMemory, "add")
    result = dqn_atari.train(small(tmp_path / "run", episodic_life=episodic_life))
    assert len(added) == 200
    for t, (_, _, rewards, terminated, next_obs) in enumerate(added):
        step = t % 7 + 1
        assert list(rewards) == [np.sign(5 - 2 * step)] * 3
        life_lost = episodic_life and step == 3
        assert list(terminated) == [life_lost or step == 7, life_lost, life_lost or step == 7]
        newest = [10 + step - k if step - k >= 0 else 0 for k in (3, 2, 1, 0)]
        assert next_obs[:, :, 0, 0].tolist() == [newest] * 3  # never the first frame of the next game
    true_return = sum(5 - 2 * step for step in range(1, 8))  # of whole games, not clipped
    assert result["episodes"] == 28 * 3 and result["mean_reward"] == true_return
    assert checkpoint(tmp_path / "run")["recent_returns"] == [true_return] * (28 * 3)


def test_rewards_are_learned_unclipped_on_request(tiny, no_evaluation, monkeypatch, tmp_path):
    added = spy(monkeypatch, ReplayMemory, "add")
    dqn_atari.train(small(tmp_path / "run", clip_rewards=False))
    assert [call[2][0] for call in added[:7]] == [3, 1, -1, -3, -5, -7, -9]


@pytest.mark.parametrize(("num_envs", "train_frequency"), [(1, 4), (3, 4), (8, 4), (4, 1), (3, 7)])
def test_updates_per_step_and_copies_do_not_depend_on_the_number_of_environments(
    tiny, no_evaluation, monkeypatch, tmp_path, num_envs, train_frequency
):
    updates = spy(monkeypatch, dqn_atari, "td_target")
    copied_at = []
    monkeypatch.setattr(TinyAgent, "load_state_dict", lambda *_: copied_at.append(len(updates)))
    args = small(tmp_path, num_envs=num_envs, train_frequency=train_frequency, target_network_frequency=100)
    args = Args(**{**vars(args), "total_timesteps": 720, "learning_starts": 168})
    dqn_atari.train(args)
    before = 168 // train_frequency  # as many are left out
    assert len(updates) == 720 // train_frequency - before
    copies = range(100 // train_frequency, 720 // train_frequency + 1, 100 // train_frequency)
    assert copied_at == [0, *(k - before for k in copies if k > before)]


@pytest.mark.parametrize(("frequency", "stands"), [(1, False), (10_000, True)])
def test_the_target_stands_still_between_copies(tiny, no_evaluation, tmp_path, frequency, stands):
    dqn_atari.train(small(tmp_path / "run", target_network_frequency=frequency, learning_rate=0.01))
    saved = checkpoint(tmp_path / "run")
    assert torch.equal(saved["agent"]["head.weight"], saved["target"]["head.weight"]) is not stands
    assert not saved["agent"]["head.weight"].isnan().any()


def test_acting_is_random_until_learning_starts(tiny, no_evaluation, monkeypatch, tmp_path):
    added = spy(monkeypatch, ReplayMemory, "add")
    forward = lambda self, x: torch.tensor([[0.0, 1.0]]).repeat(len(x), 1)  # noqa: E731
    monkeypatch.setattr(TinyAgent, "forward", forward)
    monkeypatch.setattr(dqn_atari, "q_loss", lambda *_: torch.zeros((), requires_grad=True))
    args = small(tmp_path, total_timesteps=3000, learning_starts=1200, exploration_fraction=0.2, end_e=0.05)
    dqn_atari.train(args)
    actions = np.concatenate([call[1] for call in added])
    assert abs(actions[:1200].mean() - 0.5) < 0.05
    assert 0.65 < actions[1200:1800].mean() < 0.85  # ε falls from 1 to 0.05: on average half of that is 0
    assert 0.95 < actions[1800:].mean() < 0.99 and len(set(actions[1800:])) == 2


@pytest.mark.parametrize("bf16", [True, False])
def test_what_decides_the_rounding_is_saved_and_read_again(monkeypatch, no_evaluation, tmp_path, bf16):
    """--bf16 as this device has it, --num-threads as they are; the copy in bfloat16 is saved as it is."""
    monkeypatch.setattr(dqn_atari, "has_bf16", lambda device: bf16)
    targets = spy(monkeypatch, dqn_atari, "td_target")
    sizes = {"total_timesteps": 28, "learning_starts": 20, "batch_size": 2}
    args = small(tmp_path / "run", bf16=True, num_threads=2, **sizes)
    try:
        dqn_atari.train(args)
        assert torch.get_num_threads() == 2 and targets
    finally:
        torch.set_num_threads(1)
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert saved["bf16"] is bf16 and saved["num_threads"] == 2
    weights = checkpoint(tmp_path / "run")
    dtypes = {name: weight.dtype for name, weight in weights["target"].items()}
    inner = torch.bfloat16 if bf16 else torch.float32
    assert dtypes["network.2.weight"] == dtypes["network.7.weight"] == inner
    assert dtypes["network.0.weight"] == dtypes["network.9.weight"] == torch.float32
    assert {weight.dtype for weight in weights["agent"].values()} == {torch.float32}
    # A run goes on with the other precision, too.
    monkeypatch.setattr(dqn_atari, "has_bf16", lambda device: not bf16)
    dqn_atari.train(small(tmp_path / "run", bf16=True, resume=str(tmp_path / "run"), **sizes))


# Bad input


@pytest.mark.parametrize(
    "changes",
    [
        {"buffer_size": 6},
        {"learning_starts": 600},
        {"learning_starts": 2},
        {"train_frequency": 0},
        {"target_network_frequency": 0},
        {"end_e": 1.5},
        {"sticky_actions": -0.1},
        {"num_threads": 0},
        {"learning_rate": float("nan")},
        {"gamma": 1.5},
    ],
)
def test_bad_sizes_are_refused(tmp_path, changes, capsys):
    with pytest.raises(SystemExit) as end:
        dqn_atari.train(small(tmp_path / "run", **changes))
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.startswith("error: ")


def test_sizes_at_their_limits_are_taken(tiny, no_evaluation, tmp_path):
    dqn_atari.train(small(tmp_path / "run", buffer_size=7, learning_starts=3))
    dqn_atari.train(small(tmp_path / "other", learning_starts=599))


class Wide(Catch):
    """Passes for a game, and shows pictures of another size."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "img_width": 96})


gym.register("ALE/Wide-v5", vector_entry_point=Wide)


def test_pictures_of_another_size_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        dqn_atari.train(small(tmp_path / "run", env_id="ALE/Wide-v5"))
    assert end.value.code == 2 and "(4, 84, 96)" in capsys.readouterr().err


# The emulator


def test_a_game_with_lives_is_one_episode_with_true_rewards():
    envs, rng = make_envs(Args(), 3), np.random.default_rng(0)
    _, info = envs.reset(seed=[1, 2, 3])
    assert list(info["lives"]) == [3, 3, 3]
    total, length, lives = np.zeros(3), 0, set()
    while True:
        _, rewards, terminated, truncated, info = envs.step(rng.integers(6, size=3))
        total, length = total + rewards, length + 1
        if (terminated | truncated).any():
            break
        lives |= set(info["lives"].tolist())
    n = int(np.flatnonzero(terminated)[0])
    assert lives == {1, 2, 3} and rewards.max() not in (1, -1)
    assert info["episode"]["r"][n] == total[n] > 10 and info["episode"]["l"][n] == length
    envs.close()


def test_final_obs_continues_the_game_and_the_memory_rebuilds_what_the_emulator_showed():
    envs, rng = make_envs(Args(env_id="ALE/Breakout-v5"), 2), np.random.default_rng(1)
    memory, shown, games = ReplayMemory(2000, 2), [], 0
    obs, _ = envs.reset(seed=[4, 5])
    memory.start(np.arange(2), obs)
    while games < 3:
        actions = rng.integers(4, size=2)
        new, rewards, terminated, truncated, info = envs.step(actions)
        ended = terminated | truncated
        games += ended.sum()
        next_obs = np.where(ended[:, None, None, None], info["final_obs"], new) if ended.any() else new
        shown.append((obs, next_obs))
        memory.add(np.full(2, len(shown) % 256), rewards, terminated, next_obs)
        memory.start(np.flatnonzero(ended), new[ended])
        obs = new
    assert memory.valid.sum() == 2 * len(shown) <= 2 * 1000
    torch.manual_seed(0)
    frames, marks, _, _ = memory.sample(200)
    for seen, mark in zip(frames, marks, strict=True):
        candidates = [(s[n], t[n]) for s, t in shown[(mark - 1) % 256 :: 256] for n in range(2)]
        assert any((seen[:4] == s).all() and (seen[1:] == t).all() for s, t in candidates)
    envs.close()


def test_ids_seeds_sticky_actions_and_pictures():
    def play(env_id="ALE/Pong-v5", seeds=(7, 8), render_mode=None, **flags):
        envs = make_envs(Args(env_id=env_id, **flags), len(seeds), render_mode)
        frames = [envs.reset(seed=list(seeds))[0]]
        frames += [envs.step(np.full(len(seeds), 2 + t // 9 % 2))[0] for t in range(40)]
        picture = envs.render() if render_mode else None
        envs.close()
        return np.stack(frames), picture

    plain, _ = play()
    assert plain.shape == (41, 2, 4, 84, 84) and plain.dtype == np.uint8
    assert (plain[:, 0] != plain[:, 1]).any()
    np.testing.assert_array_equal(play("PongNoFrameskip-v4")[0], plain)
    for env_id in ("ALE/Pong-v5", "PongNoFrameskip-v4", "Pong-v4", "PongDeterministic-v4", "Pong-v0"):
        assert Args(env_id=env_id).game == "ALE/Pong-v5"
    assert (play(sticky_actions=0.25)[0] != plain).any()
    assert (play(seeds=(9, 8))[0] != plain).any()
    np.testing.assert_array_equal(play(seeds=(2**32 - 1, 8))[0][:, 1], plain[:, 1])
    filmed, picture = play(render_mode="rgb_array")
    np.testing.assert_array_equal(filmed, plain)
    assert picture.shape == (2, 210, 160, 3) and picture.dtype == np.uint8
    assert len(np.unique(picture[0].reshape(-1, 3), axis=0)) > 3 and (picture[0].std(-1) > 0).any()
    # The film shows the very moment that the network sees.
    view = F.interpolate(torch.from_numpy(picture).permute(0, 3, 1, 2).float(), (84, 84), mode="area").mean(1)
    likeness = [np.corrcoef(view.flatten(), plain[t][:, -1].flatten())[0, 1] for t in (0, 20, 40)]
    assert likeness[2] > 0.9 and likeness[2] == max(likeness)


def test_a_film_ends_with_the_last_picture_of_its_game(monkeypatch, tmp_path):
    """The same game played apart: its terminal screen is what the emulator keeps when it resets by itself."""
    import moviepy.video.io.ffmpeg_writer as writer

    film, played = [], []

    class Film:
        def __init__(self, path, size, fps):
            assert size == (160, 210) and fps == 15
            open(path, "w").close()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write_frame(self, frame):
            film.append(frame.copy())

    def policy(obs):
        played.append(len(played) // 7 % 4)
        return np.array(played[-1:])

    monkeypatch.setattr(writer, "FFMPEG_VideoWriter", Film)
    args = Args(env_id="ALE/Breakout-v5", seed=3)
    dqn_atari.record_video(args, policy, tmp_path / "replay.mp4")
    colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    colour |= {"autoreset_mode": AutoresetMode.SAME_STEP, "repeat_action_probability": 0.0}
    envs = gym.make_vec(args.env_id, 1, "vector_entry_point", **colour)
    shown = [envs.reset(seed=np.array(dqn_atari.env_seeds(1, 3, 1, 0)) >> 1)[0]]
    for action in played:
        obs, _, terminated, truncated, info = envs.step(np.array([action]))
        shown.append(obs)
    assert terminated[0] or truncated[0]
    (last_picture,) = info["final_obs"][0]
    np.testing.assert_array_equal(film[-1], last_picture)
    assert (film[-1] != shown[-1][0, 0]).any(), "that is the next game's first picture"
    np.testing.assert_array_equal(film[:-1], [picture[0, 0] for picture in shown[:-1]])
    envs.close()


# Learning


def test_learns_to_catch(tmp_path):
    """1.0 is the best; without looking ahead, or remembering, or knowing an ending, it is 0.5 or less."""
    sizes = {"total_timesteps": 2000, "learning_starts": 400, "buffer_size": 2000, "eval_episodes": 40}
    rates = {"learning_rate": 1e-3, "target_network_frequency": 100, "exploration_fraction": 0.5}
    rates |= {"batch_size": 16, "train_frequency": 6}
    folder = {"run_dir": str(tmp_path / "run"), "cuda": False}
    result = dqn_atari.train(Args(env_id="ALE/Catch-v5", clip_rewards=False, **sizes, **rates, **folder))
    assert result["mean_reward"] > 0.8
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == result
