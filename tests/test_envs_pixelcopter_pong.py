"""Pixelcopter and Pong against recordings of the original games, plain rewrites, and Gymnasium's rules.

The recordings in tests/data/ were taken from the original PLE games. They lack a few events (a second batch
of terrain, a point won, the end of a match), which the rewrites below cover: one game, one object at a time.
"""

import importlib
import inspect
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

IDS = {"pixelcopter": "envs.pixelcopter:Pixelcopter-v0", "pong": "envs.pong:PongPLE-v0"}
NUM_EPISODES = {"pixelcopter": 8, "pong": 4}
DATA = Path(__file__).parent / "data"

both = pytest.mark.parametrize("name", IDS)
all_modes = pytest.mark.parametrize("mode", list(AutoresetMode))


def make(name, **kwargs):
    return gym.make(IDS[name], **kwargs)


def make_vec(name, num_envs, mode=AutoresetMode.SAME_STEP, **kwargs):
    return gym.make_vec(
        IDS[name], num_envs=num_envs, vectorization_mode="vector_entry_point", autoreset_mode=mode, **kwargs
    )


def make_sync(name, num_envs, mode=AutoresetMode.SAME_STEP, max_episode_steps=None):
    fns = [lambda: make(name, max_episode_steps=max_episode_steps)] * num_envs
    return SyncVectorEnv(fns, autoreset_mode=mode)


class OldRandom:
    """The original's random numbers under the names of NumPy's Generator."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)
        self.uniform = self.state.uniform
        self.integers = self.state.randint
        self.random = self.state.random_sample


# --- against the recordings ---


@pytest.fixture(scope="module")
def recordings():
    files = {}
    for name, count in NUM_EPISODES.items():
        with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
            keys = ("seed", "actions", "rewards", "terminated", "obs")
            files[name] = [{key: file[f"{key}_{k}"] for key in keys} for k in range(count)]
    return files


@both
def test_single_env_reproduces_the_recordings(name, recordings):
    env = make(name, max_episode_steps=-1).unwrapped
    for recording in recordings[name]:
        env.np_random = OldRandom(int(recording["seed"]))
        obs32, obs64, ends = [env.reset()[0]], [env.game.observe()[0]], []
        for action in recording["actions"]:
            obs, *end, _ = env.step(int(action))
            obs32.append(obs)
            obs64.append(env.game.observe()[0])
            ends.append(end)
        rewards, terminated, truncated = np.array(ends).T
        np.testing.assert_allclose(obs64, recording["obs"], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(obs32, np.array(obs64, np.float32))
        np.testing.assert_array_equal(rewards, recording["rewards"])
        np.testing.assert_array_equal(terminated, recording["terminated"])
        assert not truncated.any()


@both
def test_vector_env_reproduces_the_recordings_side_by_side(name, recordings):
    episodes = recordings[name]
    envs = make_vec(name, len(episodes))
    envs.np_random = [OldRandom(int(episode["seed"])) for episode in episodes]
    lengths = np.array([len(episode["actions"]) for episode in episodes])
    actions = np.zeros((lengths.max(), len(episodes)), int)
    for i, episode in enumerate(episodes):
        actions[: lengths[i], i] = episode["actions"]
    obs32, obs64, ends = [envs.reset()[0]], [envs.game.observe()], []
    for t in range(len(actions)):
        obs, *end, infos = envs.step(actions[t])
        for i in np.flatnonzero(t + 1 == lengths):
            if episodes[i]["terminated"][-1]:  # a game that goes on has its own observation there
                obs[i] = infos["final_obs"][i]
        obs32.append(obs)
        obs64.append(envs.game.observe())
        ends.append(end)
    for i, (episode, n) in enumerate(zip(episodes, lengths, strict=True)):
        np.testing.assert_allclose(np.array(obs64)[:n, i], episode["obs"][:n], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(np.array(obs32)[: n + 1, i], episode["obs"].astype(np.float32))
        rewards, terminated, truncated = np.array(ends)[:n, :, i].T
        np.testing.assert_array_equal(rewards, episode["rewards"])
        np.testing.assert_array_equal(terminated, episode["terminated"])
        assert not truncated.any()


# --- against rewrites that go object by object ---


def rectangle(x, y, width, height):
    left, top = int(x) - width // 2, int(y) - height // 2
    return left, top, left + width, top + height


def overlap(a, b):
    return a[0] < b[2] and a[2] > b[0] and a[1] < b[3] and a[3] > b[1]


class PlainPixelcopter:
    """One game with lists of [x, y], as the rules tell it."""

    def __init__(self, rng):
        self.rng = rng
        self.y, self.momentum = 24.0, 0.0
        self.blocks, self.terrain = [], []
        self.add_block()
        self.add_terrain(0, 4 * 48)

    def add_block(self):
        x = self.rng.integers(48, 72)
        self.blocks.append([float(x), float(self.rng.integers(12, 36))])

    def add_terrain(self, start, end):
        frequency = 4.5 / 48 + self.rng.uniform(-0.01, 0.01)
        for x in range(start + 2, end + 2, 4):
            y = int(24 + 6 * np.sin(frequency * x + self.rng.uniform(0.0, 0.5)))
            self.terrain.append([float(x), float(y)])

    def step(self, action):
        shift = 0.0004 * 48 * (1000 / 30)
        self.momentum += (-0.875 if action == 0 else 0.09) * 0.0004 * 48 * (1000 / 30)
        self.momentum *= 0.99
        self.y += self.momentum
        for thing in self.blocks + self.terrain:
            thing[0] -= shift
        player = rectangle(16, self.y, 2, 2)
        dead = any(overlap(player, rectangle(*block, 4, 9)) for block in self.blocks)
        for x, y in self.terrain:
            if overlap(player, rectangle(x, y, 4, 72)):
                dead |= self.y - 2.4 <= y - 12 or self.y >= y + 12
        reward = 0.0
        for block in list(self.blocks):
            if block[0] <= 16 and len(self.blocks) == 1:
                reward += 1
                self.add_block()
            if block[0] <= -4:
                self.blocks.remove(block)
        for piece in list(self.terrain):
            if piece[0] <= -4:
                self.terrain.remove(piece)
                reward += 1
        dead |= self.y < 6 or self.y > 42
        if len(self.terrain) <= 13:
            self.add_terrain(48, 5 * 48)
        return reward - 5 * dead, dead

    def observe(self):
        player = rectangle(16, self.y, 2, 2)
        middle = next(y for x, y in self.terrain if overlap(player, rectangle(x, y, 4, 72)))
        x, y = min(block for block in self.blocks if block[0] > 16)
        room = (self.y - (middle - 12), middle + 12 - self.y)
        return np.array([self.y, self.momentum, *room, x - 16, y, y + 9])

    @staticmethod
    def policy(obs, rng):
        """Through the middle of the tunnel, around the block on the roomier side; now and then by chance."""
        if rng.random() < 0.01:
            return int(rng.integers(2))
        middle = obs[0] - obs[2] + 13
        above, below = obs[5] - 7, obs[5] + 10
        around = above if above - middle + 8 > middle + 9 - below else below
        target = np.clip(around if obs[4] < 20 else middle, 9, 39)
        return int(obs[0] + 8 * obs[1] < target)


class PlainPong:
    """One match, one scalar at a time, as the rules tell it."""

    dt = 1000 / 30 / 1000

    def __init__(self, rng):
        self.rng = rng
        self.agent = self.opponent = 24.0
        self.v, self.points = 0.0, [0, 0]
        direction = 1 if rng.random() > 0.5 else -1
        self.y = 24.0
        self.serve(direction)
        self.last = (self.x, self.y)

    def serve(self, direction):
        self.x, self.vx = 32.0, 36.0 * direction
        self.vy = self.rng.random() * 36 - 18

    def meets(self, x, y):
        (x0, y0), (x2, y2) = self.last, (x, y - 3.5)
        s1, s2 = (self.x - x0, self.y - y0), (0.0, y + 3.5 - y2)
        d = -s2[0] * s1[1] + s1[0] * s2[1]
        s = (-s1[1] * (x0 - x2) + s1[0] * (y0 - y2)) / d
        t = (s2[0] * (y0 - y2) - s2[1] * (x0 - x2)) / d
        return 0 <= s <= 1 and 0 <= t <= 1

    def step(self, action):
        self.x += self.vx * self.dt
        self.y += self.vy * self.dt
        hit = False
        if self.x <= 5 and self.meets(4.5, self.agent):
            self.x, self.vx, self.vy = max(0, self.x) + 1, -(self.vx + 1.8), self.vy + 2 * self.v
            hit = True
        if self.x >= 59 and self.meets(59.5, self.opponent):
            self.x, self.vx = min(64, self.x) - 1, -(self.vx + 1.8)
            hit = True
        if hit:
            self.vy += self.rng.random() * 0.001 - 0.0005
        if self.y - 1 <= 0:
            self.vy, self.y = self.vy * -0.99, self.y + 1
        if self.y + 1 >= 48:
            self.vy, self.y = self.vy * -0.99, self.y - 1
        self.last = (self.x, self.y)

        for winner, point in ((1, self.x <= 0), (0, self.x >= 64)):
            if point:
                self.points[winner] += 1
                sign = 1 if winner == 0 else -1
                self.serve(sign)
                over = self.points[winner] == 11
                return sign * (6.0 if over else 1.0), over

        self.v = (self.v + (-19.2, 19.2, 0.0)[action] * self.dt) * 0.9
        self.agent += self.v
        if self.agent - 3.5 <= 0:
            self.agent, self.v = 3.5, 0.0
        if self.agent + 3.5 >= 48:
            self.agent, self.v = 44.5, 0.0
        if self.vx >= 0 and self.x >= 32:
            speed = -0.6 * 48 if self.opponent > self.y else 0.6 * 48
        else:
            speed = -0.6 * 48 / 4 if self.opponent > 24 else 0.6 * 48 / 4
        self.opponent = min(max(self.opponent, 3.5), 44.5) + speed * self.dt
        return 0.0, False

    def observe(self):
        return np.array([self.agent, self.v, self.opponent, self.x, self.y, self.vx, self.vy])

    @staticmethod
    def policy(obs, rng):
        """Follows the ball, and now and then moves by chance, so that paddle and ball meet in all ways."""
        return int(obs[0] < obs[4]) if rng.random() < 0.9 else int(rng.integers(3))


PLAIN = {"pixelcopter": PlainPixelcopter, "pong": PlainPong}


@pytest.mark.parametrize("name, plain", PLAIN.items())
def test_games_follow_a_plain_rewrite_for_whole_episodes(name, plain):
    envs = make_vec(name, 4)
    streams = [np.random.default_rng(seed) for seed in range(4)]
    envs.np_random = [np.random.default_rng(seed) for seed in range(4)]
    obs, _ = envs.reset()
    games = [plain(rng) for rng in streams]
    chance = np.random.default_rng(5)
    seen, lengths, longest = set(), np.zeros(4, int), 0
    for _ in range(4_000):
        if name == "pong":
            # Points against the opponent are hard to come by: in half of the games, it gets steep balls.
            for i in (0, 1):
                if games[i].vx > 0 and 40 < games[i].x < 42:
                    envs.game.ball_vy[i] = games[i].vy = np.copysign(80.0, games[i].vy)
        actions = np.array([plain.policy(o, chance) for o in obs])
        # The others find out how careless play ends.
        actions[2:] = (1, 0) if name == "pixelcopter" else chance.integers(3, size=2)
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        lengths += 1
        for i, game in enumerate(games):
            reward, over = game.step(actions[i])
            assert (rewards[i], terminated[i]) == (reward, over)
            last = infos["final_obs"][i] if over or truncated[i] else obs[i]
            np.testing.assert_allclose(last, game.observe(), rtol=1e-6, atol=1e-6)
            seen.add(reward)
            if over or truncated[i]:
                longest, lengths[i] = max(longest, lengths[i]), 0
                games[i] = plain(streams[i])
                np.testing.assert_allclose(obs[i], games[i].observe(), rtol=1e-6, atol=1e-6)
    if name == "pixelcopter":
        assert longest > 530, "no episode lived long enough for a third batch of terrain"
        assert {-5.0, 0.0, 1.0, 2.0} <= seen
    else:
        assert {-6.0, -1.0, 0.0, 1.0, 6.0} <= seen, "not every way to score has happened"


def test_pixelcopter_ends_near_the_edge_of_the_screen_without_any_terrain():
    """With the original's terrain the tunnel is always met first, so the rule needs a tunnel of its own."""
    envs = make_vec("pixelcopter", 6)
    envs.reset(seed=0)
    game = envs.game
    game.y[:] = [5.9, 6.1, 41.9, 42.1, 6.1, 41.9]
    game.piece_y[:] = [10, 10, 38, 38, 16, 29]
    game.momentum[:] = -0.09 * 0.0004 * 48 * 1000 / 30  # hovers for the next frame
    terminated = envs.step(np.ones(6, dtype=int))[2]
    assert terminated.tolist() == [True, False, False, True, True, True]


# --- as Gymnasium environments ---


@both
def test_env_checker_is_content(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(name).unwrapped)


@both
@all_modes
def test_vector_env_equals_single_envs_in_lockstep(name, mode):
    """7 games, 2,000 frames: every array and info that SyncVectorEnv returns over single environments."""
    num_envs, limit = 7, {"pixelcopter": 150, "pong": 600}[name]
    envs = make_vec(name, num_envs, mode, max_episode_steps=limit)
    reference = make_sync(name, num_envs, mode, limit)
    assert envs.metadata["autoreset_mode"] == mode
    assert envs.observation_space == reference.observation_space
    assert envs.action_space == reference.action_space
    results = [env.reset(seed=3) for env in (envs, reference)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    rng = np.random.default_rng(0)
    num_terminated = num_truncated = 0
    for _ in range(2_000):
        actions = np.array([PLAIN[name].policy(obs, rng) for obs in results[0][0]])
        actions[::2] = rng.integers(envs.single_action_space.n, size=4)
        results = [env.step(actions) for env in (envs, reference)]
        for ours, theirs in zip(results[0][:4], results[1][:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        compare_infos(results[0][4], results[1][4])
        _, _, terminated, truncated, _ = results[0]
        num_terminated += terminated.sum()
        num_truncated += truncated.sum()
        done = terminated | truncated
        if mode == AutoresetMode.DISABLED and done.any():
            with pytest.raises(ResetNeeded):
                envs.step(actions)
            # SyncVectorEnv takes the mask out of the options it is handed, so each gets its own.
            obs = [env.reset(options={"reset_mask": done.copy()})[0] for env in (envs, reference)]
            np.testing.assert_array_equal(*obs)
            results[0] = (obs[0], *results[0][1:])
    assert num_truncated > 0 and num_terminated > 0


def compare_infos(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key == "final_obs":
            assert ours[key].dtype == value.dtype == object
            for a, b in zip(ours[key], value, strict=True):
                assert (a is None) == (b is None)
                np.testing.assert_array_equal(a, b)
        elif isinstance(value, dict):
            assert ours[key] == value == {}
        else:
            np.testing.assert_array_equal(ours[key], value)


@both
def test_final_obs_precedes_the_reset(name):
    """A game alone and the same game in a batch: final_obs is where it ended, obs where the next starts."""
    single, envs = make(name, max_episode_steps=40), make_vec(name, 2, max_episode_steps=40)
    obs, _ = envs.reset(seed=[8, 9])
    assert (single.reset(seed=9)[0] == obs[1]).all()
    for _ in range(40):
        obs, _, terminated, truncated, infos = envs.step(np.array([1, 1]))
        last, _, over, cut, _ = single.step(1)
        assert (over, cut) == (terminated[1], truncated[1])
        if over or cut:
            break
        assert (last == obs[1]).all()
    assert infos["_final_obs"][1]
    np.testing.assert_array_equal(infos["final_obs"][1], last)
    assert (infos["final_obs"][1] != obs[1]).any()
    np.testing.assert_array_equal(obs[1], single.reset()[0])
    # What was handed out must not change under the caller's hands.
    kept, copied = infos["final_obs"][1], infos["final_obs"][1].copy()
    envs.step(np.array([0, 0]))
    np.testing.assert_array_equal(kept, copied)


@both
def test_time_limit_truncates_and_does_not_terminate(name):
    default = {"pixelcopter": 10_000, "pong": 5_000}[name]
    assert make(name).spec.max_episode_steps == default
    assert make_vec(name, 2).max_episode_steps == default
    envs = make_vec(name, 3, max_episode_steps=5)
    envs.reset(seed=0)
    for t in range(1, 16):
        _, _, terminated, truncated, _ = envs.step(np.array([1, 1, 1]))
        assert not terminated.any()
        assert (truncated == (t % 5 == 0)).all(), t


@both
def test_seeds_decide_everything(name):
    def play(env, num_envs, seed):
        rng = np.random.default_rng(1)
        history = [env.reset(seed=seed)[0]]
        for _ in range(300):
            history.append(env.step(rng.integers(env.single_action_space.n, size=num_envs))[0])
        return np.array(history)

    envs = make_vec(name, 3)
    first, again, other = (play(envs, 3, seed) for seed in (7, 7, 17))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (first[0, i] != first[0, j]).any(), "sub-environments must not start alike"
    listed = play(envs, 3, [7, 8, 9])
    np.testing.assert_array_equal(first, listed)
    envs.reset(seed=7)
    assert envs.np_random_seed == (7, 8, 9)
    unseeded, fresh = envs.reset()[0], make_vec(name, 3).reset()[0]
    assert (unseeded != first[0]).any() and (unseeded != fresh).any()


@both
def test_statistics_wrapper_counts_true_returns(name):
    envs = RecordEpisodeStatistics(make_vec(name, 5, max_episode_steps=120))
    envs.reset(seed=0)
    rng, returns, lengths, episodes = np.random.default_rng(0), np.zeros(5), np.zeros(5), 0
    for _ in range(400):
        _, rewards, terminated, truncated, infos = envs.step(rng.integers(2, size=5))
        returns += rewards
        lengths += 1
        done = terminated | truncated
        if done.any():
            np.testing.assert_array_equal(infos["_episode"], done)
            np.testing.assert_allclose(infos["episode"]["r"][done], returns[done])
            np.testing.assert_array_equal(infos["episode"]["l"][done], lengths[done])
            returns[done] = lengths[done] = 0
            episodes += done.sum()
    assert episodes >= 15


@both
def test_observations_stay_inside_their_space(name):
    envs, chance = make_vec(name, 8), np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    for t in range(600):
        assert obs.dtype == np.float32 and envs.observation_space.contains(obs)
        actions = [PLAIN[name].policy(o, chance) for o in obs] if t % 200 < 100 else np.full(8, t // 200 % 2)
        obs, _, _, _, infos = envs.step(np.array(actions))
        for final in infos.get("final_obs", []):
            assert final is None or envs.single_observation_space.contains(final)


@both
@all_modes
def test_bad_calls_are_refused(name, mode):
    envs, env = make_vec(name, 2, mode), make(name).unwrapped
    if mode != AutoresetMode.NEXT_STEP:
        with pytest.raises(ResetNeeded):
            envs.step(np.array([0, 0]))
    envs.reset(seed=0)
    env.reset(seed=0)
    n = int(envs.single_action_space.n)
    for actions in ([0], [[0], [0]], [0, n], [-1, 0], [0.0, 1.0], 0):
        with pytest.raises(ValueError, match="actions"):
            envs.step(np.array(actions))
    for action in (n, -1, 0.5):
        with pytest.raises(ValueError, match="action"):
            env.step(action)
    with pytest.raises(ValueError, match="one entry"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="one entry"):
        envs.reset(options={"reset_mask": np.array([True])})
    for kwargs in ({"render_mode": "human"}, {"autoreset_mode": "never"}):
        with pytest.raises(ValueError):
            type(envs)(num_envs=2, **kwargs)
    with pytest.raises(ValueError, match="rgb_array"):
        type(env)(render_mode="human")


@both
def test_a_game_that_is_over_needs_a_reset(name):
    """Or it would go on, with rewards of a match that has ended. The same before the first reset."""
    env = make(name).unwrapped
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    terminated = False
    while not terminated:
        last, _, terminated, _, _ = env.step(1)
    for _ in range(2):
        with pytest.raises(ResetNeeded):
            env.step(1)
    np.testing.assert_array_equal(env.game.observe()[0].astype(np.float32), last)
    env.reset(seed=0)
    assert not env.step(1)[2]


def test_in_pong_the_agent_gets_faster_than_the_opponent():
    """The numbers of the docstring: the agent gets to 4.4 px a frame, the opponent has 0.96."""
    env = make("pong").unwrapped
    env.reset(seed=0)
    game = env.game
    steps = []
    for action in [0] * 30 + [1] * 30:
        before = game.agent_y[0], game.opponent_y[0]
        env.step(action)
        steps.append((abs(game.agent_y[0] - before[0]), abs(game.opponent_y[0] - before[1])))
    agent, opponent = np.array(steps).T
    assert agent.max() == pytest.approx(4.44, abs=0.01)
    assert agent[0] == pytest.approx(0.9 * 19.2 / 30) and agent[0] < opponent.max() < agent[1]
    assert opponent.max() == pytest.approx(0.96)
    # Without walls it would come close to 5.76, where u = 0.9 (u + P Δ).
    game.agent_v[0] = 5.76
    game.agent_y[0] = 24.0
    env.step(1)
    assert game.agent_v[0] == pytest.approx(5.76)


@both
def test_render_draws_what_the_observation_says(name):
    env = make(name, render_mode="rgb_array")
    envs = make_vec(name, 3, render_mode="rgb_array")
    obs, _ = env.reset(seed=4)
    envs.reset(seed=[3, 4, 5])
    for action in (1, 1, 0, 1):
        obs, *_ = env.step(action)
        envs.step(np.full(3, action))
    frame = env.render()
    shape = {"pixelcopter": (480, 480, 3), "pong": (480, 640, 3)}[name]
    assert frame.shape == shape and frame.dtype == np.uint8
    assert env.metadata["render_fps"] == envs.metadata["render_fps"] == 30
    frames = envs.render()
    assert isinstance(frames, tuple) and len(frames) == 3
    np.testing.assert_array_equal(frames[1], frame)
    assert (frames[0] != frame).any()
    assert make(name).unwrapped.render() is None and make_vec(name, 3).render() is None

    pixels = frame[5::10, 5::10]
    white = np.argwhere((pixels == 255).all(axis=-1))
    if name == "pixelcopter":
        y = int(obs[0])
        assert sorted(map(tuple, white)) == [(y - 1, 15), (y - 1, 16), (y, 15), (y, 16)]
        column = (pixels[:, 16] == (120, 240, 80)).all(axis=-1)
        middle = int(obs[0] - obs[2] + 12)
        assert column[: middle - 12].all() and not column[middle - 12 : middle + 12].any()
        assert column[middle + 12 :].all()
    else:
        agent, opponent, (x, y) = int(obs[0]), int(obs[2]), obs[3:5].astype(int)
        expected = {(agent + d, 4) for d in range(-3, 4)} | {(opponent + d, 60) for d in range(-3, 4)}
        expected |= {(y + dy, x + dx) for dy in (-1, 0) for dx in (-1, 0)}
        assert set(map(tuple, white)) == expected


def test_the_two_files_share_their_gymnasium_part():
    """Everything but the game is the same text in both files."""
    texts = []
    for name, title, width in (("pixelcopter", "Pixelcopter", 480), ("pong", "Pong", 640)):
        module = importlib.import_module(f"envs.{name}")
        text = "".join(inspect.getsource(getattr(module, title + kind)) for kind in ("Env", "VectorEnv"))
        texts.append(text.replace(title, "Game").replace(f"(480, {width}, 3)", "frame"))
    assert texts[0] == texts[1]
