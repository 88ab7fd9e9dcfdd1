"""DQN: targets by hand, the memory against lists of stacks, the emulator's endings, wiring, and learning."""

import json
import signal

import dqn_atari
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dqn_atari import Agent, Args, ReplayMemory, epsilon, make_envs, q_loss, td_target
from gymnasium.vector import AutoresetMode


class Game(gym.vector.VectorEnv):
    """Catch: games of 4 steps that need all of DQN at once.

    The ball is seen left or right in the first frame only. In steps 1 to 3, action 0 takes half a point and
    ends the game, action 1 waits; in step 4 the side where the ball was pays 1, the other −1. To wait pays
    only for who looks ahead, and the last step only for who remembers the oldest frame of the stack.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    length = 4

    def __init__(self, num_envs, autoreset_mode=None, stack_num=4, img_height=84, img_width=84, **options):
        assert autoreset_mode is AutoresetMode.SAME_STEP and options["reward_clipping"] is False
        self.num_envs, self.shape = num_envs, (stack_num, img_height, img_width)
        self.single_observation_space = gym.spaces.Box(0, 255, self.shape, np.uint8)
        self.single_action_space = gym.spaces.Discrete(2)
        self.action_space = gym.spaces.MultiDiscrete([2] * num_envs)
        self.stacks = np.zeros((num_envs, *self.shape), dtype=np.uint8)

    def reset(self, *, seed=None, options=None):
        assert len(seed) == self.num_envs
        self.rngs = [np.random.default_rng(one) for one in seed]
        self.side, self.time = np.zeros((2, self.num_envs), dtype=int)
        for n in range(self.num_envs):
            self.begin(n)
        return self.stacks.copy(), {"lives": self.lives()}

    def begin(self, n):
        self.side[n], self.time[n] = self.rngs[n].integers(2), 0
        self.stacks[n] = 0
        self.draw(n)

    def draw(self, n):
        self.stacks[n] = np.roll(self.stacks[n], -1, axis=0)
        self.stacks[n, -1] = 0
        if self.time[n] == 0:
            self.stacks[n, -1, 30:54, 10 + 40 * self.side[n] : 34 + 40 * self.side[n]] = 255

    def lives(self):
        return np.zeros(self.num_envs, dtype=np.int32)

    def rules(self, n, action):
        """Reward, terminated, truncated of the step just made."""
        if self.time[n] < self.length:
            return (0.5, True, False) if action == 0 else (0.0, False, False)
        return (1.0 if action == self.side[n] else -1.0), True, False

    def step(self, actions):
        self.time += 1
        outcomes = [self.rules(n, action) for n, action in enumerate(actions)]
        for n in range(self.num_envs):
            self.draw(n)
        rewards, terminated, truncated = (np.array(x) for x in zip(*outcomes, strict=True))
        info = {}
        if (terminated | truncated).any():
            info["final_obs"] = self.stacks.copy()
            for n in np.flatnonzero(terminated | truncated):
                info["final_obs"][n] = self.stacks[n]
                self.begin(n)
        return self.stacks.copy(), rewards, terminated, truncated, info | {"lives": self.lives()}


class Endings(Game):
    """Frames that count the steps of a game of 7, whose environments end in different ways.

    A life of 3 is lost in step 3; two are won in step 6, and the next game begins with fewer again."""

    length, broken_from = 7, np.inf

    def draw(self, n):
        self.stacks[n] = np.roll(self.stacks[n], -1, axis=0)
        self.stacks[n, -1] = 10 + self.time[n]

    def lives(self):
        return np.array([3, 3, 3, 2, 2, 2, 4])[self.time]

    def rules(self, n, action):
        end = self.time[n] == self.length
        self.total = getattr(self, "total", 0) + 1
        pay = np.nan if self.total > self.broken_from else float(5 - 2 * self.time[n])
        return pay, end and n % 3 in (0, 2), end and n % 3 in (1, 2)


class TinyAgent(torch.nn.Module):
    """Stands in for the network where only the wiring is tested."""

    def __init__(self):
        super().__init__()
        self.rest, self.head = torch.nn.Identity(), torch.nn.Linear(4, 2)
        self.calls = 0

    def forward(self, frames):
        self.calls += 1
        return self.head(frames[:, :, 0, 0].to(self.head.weight.dtype)).float()


gym.register("ALE/Catch-v5", vector_entry_point=Game)
gym.register("ALE/Endings-v5", vector_entry_point=Endings)


@pytest.fixture(autouse=True)
def keep_ctrl_c(monkeypatch):
    monkeypatch.setattr(dqn_atari, "NUM_THREADS", 1)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny(monkeypatch):
    """Replaces the network; the list collects the agents in the order in which they are made."""
    made = []

    def make_agent(args, envs, device):
        made.append(TinyAgent())
        return made[-1]

    monkeypatch.setattr(dqn_atari, "make_agent", make_agent)
    return made


def small(run_dir, **changes) -> Args:
    sizes = {
        "num_envs": 3,
        "total_timesteps": 600,
        "learning_starts": 90,
        "buffer_size": 200,
        "batch_size": 7,
    }
    sizes |= {
        "eval_episodes": 3,
        "checkpoint_every": 300,
        "run_dir": str(run_dir),
        "cuda": False,
        "bf16": False,
    }
    return Args(**{"env_id": "ALE/Endings-v5", **sizes, **changes})


# The maths


def test_td_target_by_hand():
    rewards, terminated = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([False, False, True])
    copy = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 0.0, 2.0, 1.0], [9.0, 9.0, 9.0, 9.0]])
    online = torch.tensor([[5.0, 6.0, 0.0, 1.0], [0.0, 1.0, 7.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    # The network that learns chooses actions 1 and 2, worth 2 and 2 to the copy, whose own best are 4 and 8.
    double = td_target(rewards, terminated, copy, online, 0.5)
    plain = td_target(rewards, terminated, copy, None, 0.5)
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


def test_network_scales_bytes_and_agrees_in_both_precisions():
    torch.manual_seed(0)
    agent = Agent(6, bf16=False, ortho_init=True).to(memory_format=torch.channels_last)
    frames = torch.randint(0, 256, (5, 5, 84, 84), dtype=torch.uint8)[:, 1:]  # a view, as it is in training
    x = F.conv2d(frames.contiguous().float() / 255, agent.first.weight, agent.first.bias, stride=4)
    q = agent(frames)
    assert q.shape == (5, 6)
    np.testing.assert_allclose(q.detach(), agent.head(agent.rest(x)).detach(), atol=1e-5)
    half = Agent(6, bf16=True, ortho_init=True)
    half.load_state_dict(agent.state_dict())
    targets = torch.linspace(-1, 1, 5)
    gradients = []
    for network in (agent, half):
        q_loss(network(frames), torch.arange(5), targets).backward()
        assert network.first.weight.dtype == network(frames).dtype == torch.float32
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    np.testing.assert_allclose(half(frames).detach(), q.detach(), atol=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_half_precision_keeps_small_differences_between_actions():
    agent = Agent(6, bf16=True, ortho_init=True)
    with torch.no_grad():
        agent.head.weight.zero_()
        agent.head.bias.copy_(
            -1.8 + 0.001 * torch.arange(6)
        )  # as in Pong; bfloat16 would make them two values
        q = agent(torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8))
    np.testing.assert_allclose(q[0].diff(), 0.001, atol=1e-6)


def test_initial_weights_keep_small_differences_between_frames():
    """Pong's bright ground with the ball in two places: the last hidden layer must tell them apart."""
    differences = []
    for ortho_init in (True, False):
        torch.manual_seed(0)
        agent = Agent(6, bf16=False, ortho_init=ortho_init)
        frames = torch.full((2, 4, 84, 84), 107, dtype=torch.uint8)
        frames[0, :, 40:42, 30] = frames[1, :, 50:52, 60] = 236
        with torch.no_grad():
            features = agent.rest(F.conv2d(frames / 255, agent.first.weight, agent.first.bias, stride=4))
            differences.append((features[0] - features[1]).norm().item())
            assert (agent(frames).abs().max() < 0.05) or not ortho_init
    assert differences[0] > 30 * differences[1]


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
    for step in range(6000):
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
    machine = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": (2**30 + 50_000_000) // 4096}
    monkeypatch.setattr(dqn_atari.os, "sysconf", machine.get)
    with pytest.raises(SystemExit) as end:
        ReplayMemory(10_000_000, 8)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "70.6 GB" in message and message.count("\n") == 1
    largest = int(message.split()[-1])
    assert 6950 < largest < 7080
    ReplayMemory(largest, 8)
    with pytest.raises(SystemExit):
        ReplayMemory(largest + 16, 8)


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
        frames += [envs.step(np.full(len(seeds), 2 + t // 9 % 2))[0] for t in range(60)]
        picture = envs.render() if render_mode else None
        envs.close()
        return np.stack(frames), picture

    plain, _ = play()
    assert plain.shape == (61, 2, 4, 84, 84) and plain.dtype == np.uint8
    assert (plain[:, 0] != plain[:, 1]).any()
    for env_id in ("PongNoFrameskip-v4", "Pong-v4", "PongDeterministic-v4", "Pong-v0"):
        np.testing.assert_array_equal(play(env_id)[0], plain)
    assert (play(sticky_actions=0.25)[0] != plain).any()
    assert (play(seeds=(9, 8))[0] != plain).any()
    np.testing.assert_array_equal(play(seeds=(2**32 - 1, 8))[0][:, 1], plain[:, 1])
    filmed, picture = play(render_mode="rgb_array")
    np.testing.assert_array_equal(filmed, plain)
    assert picture.shape == (2, 210, 160, 3) and picture.dtype == np.uint8
    assert len(np.unique(picture[0].reshape(-1, 3), axis=0)) > 3 and (picture[0].std(-1) > 0).any()
    # The film shows the very moment that the network sees.
    view = F.interpolate(torch.from_numpy(picture).permute(0, 3, 1, 2).float(), (84, 84), mode="area").mean(1)
    likeness = [np.corrcoef(view.flatten(), plain[t][:, -1].flatten())[0, 1] for t in (0, 30, 60)]
    assert likeness[2] > 0.9 and likeness[2] == max(likeness)


# The wiring


def spy(monkeypatch, owner, name) -> list:
    """Collects the arguments of all calls, and lets them pass."""
    calls, real = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


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
    assert result["episodes"] == 28 * 3
    assert result["mean_reward"] == sum(
        5 - 2 * step for step in range(1, 8)
    )  # the true return of whole games
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["recent_returns"] == [result["mean_reward"]] * (28 * 3)


def test_rewards_are_learned_unclipped_on_request(tiny, monkeypatch, tmp_path):
    added = spy(monkeypatch, ReplayMemory, "add")
    dqn_atari.train(small(tmp_path / "run", clip_rewards=False))
    assert [call[2][0] for call in added[:7]] == [3, 1, -1, -3, -5, -7, -9]


@pytest.mark.parametrize(("num_envs", "train_frequency"), [(1, 4), (3, 4), (8, 4), (4, 1), (3, 7)])
def test_updates_per_step_and_copies_do_not_depend_on_the_number_of_environments(
    tiny, monkeypatch, tmp_path, num_envs, train_frequency
):
    updates = spy(monkeypatch, dqn_atari, "td_target")
    copied_at = []
    monkeypatch.setattr(TinyAgent, "load_state_dict", lambda *_: copied_at.append(len(updates)))
    args = small(tmp_path, num_envs=num_envs, train_frequency=train_frequency, target_network_frequency=100)
    args = Args(**{**vars(args), "total_timesteps": 720, "learning_starts": 168})
    monkeypatch.setattr(dqn_atari, "evaluate", lambda *_: {})
    dqn_atari.train(args)
    steps = range(train_frequency, 720 + 1, train_frequency)
    first = len([step for step in steps if step <= 168])
    assert len(updates) == len(steps) - first
    expected = [
        k + 1 - first for k, step in enumerate(steps) if step // 100 > (step - train_frequency) // 100
    ]
    assert copied_at == [0, *(k for k in expected if k > 0)]


@pytest.mark.parametrize(("frequency", "stands"), [(1, False), (10_000, True)])
def test_the_target_stands_still_between_copies(tiny, tmp_path, frequency, stands):
    dqn_atari.train(small(tmp_path / "run", target_network_frequency=frequency, learning_rate=0.01))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert torch.equal(saved["agent"]["head.weight"], saved["target"]["head.weight"]) is not stands
    assert not saved["agent"]["head.weight"].isnan().any()


def test_the_agent_and_the_copy_value_the_right_stacks(tiny, monkeypatch, tmp_path):
    """Q(s, a) is learned, Q⁻(s', ·) is looked up, and without double DQN the agent never sees s'."""
    for double_q in (True, False):
        tiny.clear()
        seen = {}

        def forward(self, frames, real=TinyAgent.forward, seen=seen):
            seen.setdefault(id(self), []).append((frames[:, :, 0, 0].clone(), torch.is_grad_enabled()))
            return real(self, frames)

        with monkeypatch.context() as patch:
            patch.setattr(TinyAgent, "forward", forward)
            samples = spy(patch, dqn_atari, "td_target")
            # Beyond t_0 every action is greedy: the calls that act hold 3 stacks, those that learn 7.
            dqn_atari.train(small(tmp_path / f"{double_q}", double_q=double_q, end_e=0.0))
        agent, target = ([x for x in seen[id(network)] if len(x[0]) == 7] for network in tiny[:2])
        assert len(target) == len(samples) and len(agent) == len(samples) * (2 if double_q else 1)
        assert not any(grad for _, grad in target)
        learned = [stack for stack, grad in agent if grad]
        for stack, (successor, _) in zip(learned, target, strict=True):
            assert torch.equal(stack[:, 1:], successor[:, :-1])
            assert (successor[:, -1] == stack[:, -1] + 1).all()


def test_acting_is_random_until_learning_starts(tiny, monkeypatch, tmp_path):
    added = spy(monkeypatch, ReplayMemory, "add")
    monkeypatch.setattr(dqn_atari, "evaluate", lambda *_: {})
    monkeypatch.setattr(TinyAgent, "forward", lambda self, x: torch.tensor([[0.0, 1.0]]).repeat(len(x), 1))
    monkeypatch.setattr(dqn_atari, "q_loss", lambda *_: torch.zeros((), requires_grad=True))
    args = small(tmp_path, total_timesteps=3000, learning_starts=1200, exploration_fraction=0.2, end_e=0.05)
    dqn_atari.train(args)
    actions = np.concatenate([call[1] for call in added])
    assert abs(actions[:1200].mean() - 0.5) < 0.05
    assert 0.65 < actions[1200:1800].mean() < 0.85  # ε falls from 1 to 0.05: on average half of that is 0
    assert 0.95 < actions[1800:].mean() < 0.99 and len(set(actions[1800:])) == 2


def test_a_resumed_run_fills_its_memory_before_it_learns_on(tiny, monkeypatch, tmp_path):
    added, real, updates = spy(monkeypatch, ReplayMemory, "add"), dqn_atari.td_target, []
    monkeypatch.setattr(dqn_atari, "td_target", lambda *args: updates.append(len(added)) or real(*args))
    dqn_atari.train(small(tmp_path / "run"))
    assert len(updates) == 600 // 4 - 90 // 4
    updates.clear()
    added.clear()
    result = dqn_atari.train(small(tmp_path / "run", resume=str(tmp_path / "run"), total_timesteps=900))
    assert result["global_step"] == 900
    # 30 steps of 3 environments fill the memory, none of them counts, and the ratio of updates stays.
    assert len(added) == 30 + 300 // 3
    assert len(updates) == 900 // 4 - 600 // 4 and updates[0] == 30 + 2


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
    assert f"the loss is nan at step {end_step}" in capsys.readouterr().err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == saved_step
    assert all(weight.isfinite().all() for weight in saved["agent"].values())


def test_evaluation_is_nearly_greedy_and_repeats_itself(tiny, monkeypatch, tmp_path):
    dqn_atari.train(small(tmp_path / "run"))
    monkeypatch.setattr(TinyAgent, "forward", lambda self, x: torch.tensor([[0.0, 1.0]]).repeat(len(x), 1))
    envs = make_envs(small(tmp_path), 3)
    plays = []
    for _ in range(2):
        policy, _ = dqn_atari.load_policy(small(tmp_path), envs, tmp_path / "run", torch.device("cpu"))
        plays.append(np.concatenate([policy(np.zeros((50, 4, 84, 84), dtype=np.uint8)) for _ in range(100)]))
    np.testing.assert_array_equal(plays[0], plays[1])
    assert 0 < (plays[0] == 0).mean() < dqn_atari.EVAL_EPSILON  # half of the random actions are greedy ones


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
    ],
)
def test_bad_sizes_are_refused(tmp_path, changes, capsys):
    with pytest.raises(SystemExit) as end:
        dqn_atari.train(small(tmp_path / "run", **changes))
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.startswith("error: ")


def test_learns_to_catch(tmp_path):
    """1.0 is the best; who does not look ahead, remember, or tell an ending from a pause gets 0.5 or less."""
    sizes = {"total_timesteps": 2800, "learning_starts": 400, "buffer_size": 2000, "eval_episodes": 40}
    rates = {"learning_rate": 5e-4, "target_network_frequency": 100, "exploration_fraction": 0.5}
    folder = {"run_dir": str(tmp_path / "run"), "cuda": False}
    result = dqn_atari.train(Args(env_id="ALE/Catch-v5", clip_rewards=False, **sizes, **rates, **folder))
    assert result["mean_reward"] > 0.8
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == result
