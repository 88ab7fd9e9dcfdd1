"""Decision transformer: formulas against plain loops, what may see what, windows, play, data, learning."""

import dataclasses
import json
import math
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import counter_env  # registers the Counter environments
import decision_transformer as dt
import gymnasium as gym
import numpy as np
import pytest
import torch
from decision_transformer import Args, Data, Player
from envs.graph import GraphEnv, distances_to
from gymnasium.utils.env_checker import check_env

SMALL = {"width": 12, "num_heads": 3, "num_layers": 2, "context_length": 4, "max_episode_steps": 9}


class OtherEnv(counter_env.CounterEnv):
    """Shows as many numbers as CartPole, and has an action more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = gym.spaces.Discrete(3)

    def observe(self):
        return np.zeros(4, dtype=np.float32)


gym.register("Other-v0", entry_point=OtherEnv)


def agent_of(discrete=True, obs_dim=5, action_dim=3, **settings):
    torch.manual_seed(0)
    agent = dt.Agent(obs_dim, action_dim, discrete, Args(**(SMALL | settings)))
    agent.last_step.fill_(8)
    return agent.eval()


def random_windows(B, K, obs_dim=5, action_dim=3):
    rng = torch.Generator().manual_seed(1)
    return [
        torch.randn(B, K, generator=rng),
        torch.randn(B, K, obs_dim, generator=rng),
        torch.randn(B, K, action_dim, generator=rng),
        torch.randint(9, (B, K), generator=rng),
    ]


# ---- formulas ----


def test_returns_to_go_against_a_double_loop():
    rewards = np.random.default_rng(0).normal(size=17)
    want = [sum(rewards[k] for k in range(t, 17)) for t in range(17)]
    np.testing.assert_allclose(dt.to_go(rewards), want, rtol=0, atol=1e-12)
    assert dt.to_go(np.array([1, 2, 4])).tolist() == [7.0, 6.0, 4.0]


def test_a_layer_against_plain_loops():
    """Equations (4) and (5) in float64, a head and a token at a time: B, L, E, heads = 2, 7, 12, 3."""
    layer = agent_of().layers[0].double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    got = layer(x)

    def norm(row, part):
        row = (row - row.mean()) / np.sqrt(row.var() + part.eps)
        return row * part.weight.detach().numpy() + part.bias.detach().numpy()

    def linear(row, part):
        return part.weight.detach().numpy() @ row + part.bias.detach().numpy()

    for b in range(2):
        rows = x[b].numpy()
        qkv = [linear(norm(row, layer.attention_norm), layer.query_key_value) for row in rows]
        for i in range(7):
            y = []
            for head in range(3):
                part = slice(4 * head, 4 * head + 4)
                q = qkv[i][:12][part]
                weights = np.array([math.exp(q @ qkv[j][12:24][part] / 2) for j in range(i + 1)])  # √d = 2
                values = [qkv[j][24:][part] for j in range(i + 1)]
                y.extend(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
            row = rows[i] + linear(np.array(y), layer.attention_out)
            hidden = linear(norm(row, layer.mlp_norm), layer.mlp[0])
            row = row + linear(np.maximum(hidden, 0), layer.mlp[2])
            np.testing.assert_allclose(got[b, i].detach().numpy(), row, rtol=0, atol=1e-10)


def test_the_row_of_tokens_and_where_the_action_is_read():
    """Without layers the action is a function of its own state token alone: equations (2), (3) and (6)."""
    agent = agent_of(discrete=False)
    agent.layers = torch.nn.Identity()
    agent.obs_mean.fill_(1.0)
    agent.obs_scale.fill_(0.5)
    seen = []
    agent.norm_in.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    agent.return_scale.fill_(4.0)
    to_go, obs, actions, steps = random_windows(2, 3)
    z = agent(to_go, obs, actions, steps)
    row = seen[0]  # (B, 3K, E)
    for b, t in ((0, 0), (1, 2)):
        e_t = agent.embed_step.weight[steps[b, t]]
        state = agent.embed_obs((obs[b, t] - 1) / 2) + e_t
        torch.testing.assert_close(row[b, 3 * t], agent.embed_return(to_go[b, t : t + 1] / 4) + e_t)
        torch.testing.assert_close(row[b, 3 * t + 1], state)
        torch.testing.assert_close(row[b, 3 * t + 2], agent.embed_action(actions[b, t]) + e_t)
        torch.testing.assert_close(z[b, t], agent.head(agent.norm_out(agent.norm_in(state))).tanh())


def test_losses_and_errors_by_hand():
    real = torch.tensor([[True, True], [True, False]])
    z = torch.tensor([[[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]], [[3.0, 0.0, 0.0], [9.0, 9.0, 0.0]]])
    taken = torch.tensor([[1, 0], [2, 2]])
    one_hot = torch.eye(3)[taken]
    want = 0.0
    for b, t in ((0, 0), (0, 1), (1, 0)):
        p = [math.exp(number) for number in z[b, t].tolist()]
        want -= math.log(p[taken[b, t]] / sum(p)) / 3
    assert dt.action_loss(z, one_hot, real, True).item() == pytest.approx(want, abs=1e-6)
    assert dt.action_error(z, one_hot, real, True).item() == pytest.approx(1 / 3)
    other = torch.tensor([[[2.0, 2, 0], [0, 1, 1]], [[3, 3, 0], [0, 0, 0.0]]])
    assert dt.action_loss(z, other, real, False).item() == pytest.approx((4 + 1 + 1 + 9) / 9)
    assert dt.action_error(z, other, real, False).item() == pytest.approx((2 + 1 + 1 + 3) / 9)


def test_continuous_actions_lie_within_their_bounds_and_come_back():
    space = gym.spaces.Box(np.array([-2.0, 0, -1]), np.array([2.0, 3, 5]), dtype=np.float32)
    actions = np.array([[-2.0, 3, 2], [1, 0, 5]], dtype=np.float32)
    scaled = dt.encode_actions(space, actions)
    np.testing.assert_allclose(scaled, [[-1, 1, 0], [0.5, -1, 1]], atol=1e-6)
    back = dt.decode_actions(space, scaled)
    np.testing.assert_allclose(back, actions, atol=1e-6)
    assert space.contains(back[0]) and scaled.dtype == np.float32


def test_integers_are_vectors_with_a_one():
    space = gym.spaces.Discrete(4)
    assert dt.encode(space, np.array([2, 0])).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert dt.encode_actions(space, np.array([3])).tolist() == [[0, 0, 0, 1]]
    assert dt.decode_actions(space, np.array([3])).tolist() == [3]


# ---- what may see what ----


@pytest.mark.parametrize("condition", [True, False])
def test_nothing_sees_what_comes_later(condition):
    """Whatever changes at step 2 of 4 changes no action before; the action there is its own secret."""
    agent = agent_of(condition=condition)
    windows = random_windows(3, 4)
    before = agent(*windows)
    for which, windows_of in enumerate(("return", "state", "action", "time step")):
        changed = [part.clone() for part in windows]
        changed[which][:, 2] = changed[which][:, 2] * 3 + 1 if which < 3 else (changed[which][:, 2] + 1) % 9
        difference = (agent(*changed) - before).abs().amax((0, 2))  # (K,)
        assert (difference[:2] == 0).all(), f"the {windows_of} of a later step was seen"
        if which == 2:
            assert difference[2] == 0, "the action that is to be predicted was seen"
            assert difference[3] > 1e-4, "earlier actions are part of the history"
        elif which == 0:
            assert (difference[2:] > 1e-4).all() if condition else (difference == 0).all()
        else:
            assert (difference[2:] > 1e-4).all()


def test_a_return_token_never_sees_the_action_it_explains():
    agent = agent_of()
    seen = []
    agent.norm_out.register_forward_hook(lambda module, inputs, output: seen.append(output))
    windows = random_windows(3, 4)
    agent(*windows)
    windows[2][:, 2] += 1
    agent(*windows)
    difference = (seen[1] - seen[0]).abs().amax((0, 2))  # (3K,)
    assert (difference[:8] == 0).all() and (difference[8:] > 1e-5).all()  # a_2 is token 8


def test_a_short_history_is_the_same_padded_or_not():
    agent = agent_of()
    windows = random_windows(2, 4)
    alone = agent(*(part[:, :2] for part in windows))
    for filling in (0, 1):
        padded = [part.clone() for part in windows]
        for part in padded:
            part[:, 2:] = filling
        torch.testing.assert_close(agent(*padded)[:, :2], alone)


def test_later_time_steps_than_the_data_have_share_the_last_embedding():
    agent = agent_of()
    agent.last_step.fill_(5)
    windows = random_windows(1, 3)
    windows[3] = torch.tensor([[5, 5, 5]])
    want = agent(*windows)
    windows[3] = torch.tensor([[5, 6, 10**6]])
    torch.testing.assert_close(agent(*windows), want)


# ---- windows ----


def numbered(lengths):
    """Episodes whose every number says where it is from: 100 · episode + step."""
    episodes = []
    for i, length in enumerate(lengths):
        numbers = 100.0 * i + np.arange(length)
        obs = np.stack((numbers, -numbers), 1).astype(np.float32)
        episodes.append((obs, numbers[:, None].astype(np.float32), np.ones(length)))
    return Data(episodes, torch.device("cpu"))


def test_windows_hold_what_their_episode_holds():
    lengths = [3, 1, 6]
    data = numbered(lengths)
    torch.manual_seed(0)
    (to_go, obs, actions, steps), real = data.windows(300, 4)
    for b in range(300):
        episode, first = divmod(int(obs[b, 0, 0]), 100)
        for k in range(4):
            t = first + k
            assert real[b, k] == (t < lengths[episode])
            if real[b, k]:
                number = 100 * episode + t
                assert obs[b, k].tolist() == [number, -number] and actions[b, k].item() == number
                assert steps[b, k] == t and to_go[b, k] == lengths[episode] - t
    assert all(part.isfinite().all() for part in (to_go, obs, actions))


def test_windows_begin_at_every_step_equally_often():
    data = numbered([3, 1, 6])
    torch.manual_seed(0)
    (_, obs, _, _), _ = data.windows(20_000, 2)
    counts = Counter(obs[:, 0, 0].int().tolist())
    assert len(counts) == 10
    # Each count is binomial with the mean 2,000 and the deviation 42.
    assert max(abs(count - 2000) for count in counts.values()) < 4 * 42.5


# ---- play ----


class Witness(torch.nn.Module):
    """Stands in for the transformer: notes what it is shown, and acts by a rule that is known."""

    context_length = 3
    discrete = True

    def __init__(self):
        super().__init__()
        self.embed_obs = SimpleNamespace(in_features=2)
        self.head = SimpleNamespace(out_features=4)
        self.best_return = torch.tensor(50.0)
        self.shown = []

    def forward(self, to_go, obs, actions, steps):
        self.shown.append([part.clone() for part in (to_go, obs, actions, steps)])
        return torch.nn.functional.one_hot((obs[..., 1].long() + 1) % 4, 4).float()


def test_a_player_shows_the_last_steps_and_what_is_left_of_the_wish():
    """Two environments for six steps; the second one begins a new episode at the fourth. K = 3."""
    agent = Witness()
    player = Player(agent, torch.tensor([10.0, float("nan")]))
    rewards = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0], [8.0, 7.0], [16.0, 7.0], [32.0, 7.0]])
    so_far = np.zeros(2)
    step = np.zeros(2, dtype=int)
    best = np.array([np.nan, 20.0])
    history = [[], []]
    for t in range(6):
        if t == 3:
            step[1], so_far[1], best[1], history[1] = 0, 0.0, np.nan, []
        told = np.stack((step, so_far, best, [100 * t, 100 * t + 1], step), 1).astype(np.float32)
        actions = player.act(told, np.arange(2))
        assert actions.tolist() == ((step + 1) % 4).tolist()
        to_go, obs, taken, steps = agent.shown[-1]
        for row in range(2):
            wish = 10.0 if row == 0 else (20.0 if t < 3 else 50.0)
            history[row].append((wish - so_far[row], 100 * t + row, step[row]))
            want = history[row][-3:]
            for k, (left, number, at) in enumerate(want):
                assert to_go[row, k] == left and obs[row, k, 0] == number and steps[row, k] == at
                if k < len(want) - 1:
                    assert taken[row, k].argmax() == (at + 1) % 4 and taken[row, k].sum() == 1
        so_far += rewards[t]
        step += 1


def test_a_player_serves_the_rows_that_still_play():
    """Alone or beside others, a row is answered the same."""
    agent = agent_of()
    together = Player(agent, torch.tensor([1.0, 2.0, 3.0]))
    alone = Player(agent, torch.tensor([3.0]))
    rng = np.random.default_rng(0)
    for t in range(7):
        told = np.hstack((np.full((3, 1), t), rng.normal(size=(3, 1)), np.full((3, 1), np.nan)))
        told = np.hstack((told, rng.normal(size=(3, 5)))).astype(np.float32)
        rows = np.array([0, 1, 2]) if t < 3 else np.array([0, 2])
        got = together.act(told[rows], rows)
        assert got[-1] == alone.act(told[2:], np.array([0]))[0]
        torch.testing.assert_close(together.to_go[2], alone.to_go[0])
        torch.testing.assert_close(together.actions[2], alone.actions[0])


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both"])
def test_what_is_told_besides_the_observation(ending):
    """The counter pays 1, 2, 3 and ends; then all begins anew."""
    envs = dt.make_envs(Args(env_id=f"Counter-{ending}-v0"), 2)
    obs, _ = envs.reset(seed=[1, 2])
    assert obs[:, :2].tolist() == [[0, 0], [0, 0]] and np.isnan(obs[:, 2]).all() and obs.shape == (2, 5)
    for step, so_far in ((1, 1), (2, 3), (0, 0), (1, 1)):
        obs, *_ = envs.step(np.zeros(2, dtype=int))
        assert obs[:, :2].tolist() == [[step, so_far]] * 2 and obs[0, 4] == step
    assert envs.single_observation_space.shape == (5,)


def test_the_best_return_is_told_where_it_is_known():
    envs = dt.make_envs(Args(), 3)
    graph = envs.unwrapped.envs[0].unwrapped
    obs, _ = envs.reset(seed=[1, 2, 3])
    for _ in range(40):
        nodes = obs[:, 3:].argmax(1)
        begun = obs[:, 0] == 0
        assert (obs[begun, 2] == -graph.distances[nodes[begun]]).all()
        kept = obs[:, 2].copy()
        obs, _, terminated, _, _ = envs.step(np.full(3, 5))
        assert (obs[~terminated, 2] == kept[~terminated]).all()


def test_play_gives_each_episode_its_own_sum(tmp_path):
    """Counters that end after 3 steps, one after 2: 1 + 2 + 3 and 1 + 2, whatever is done."""
    args = Args(env_id="Counter-truncated-v0", **SMALL)
    envs = dt.make_envs(args, 4)
    envs.unwrapped.envs[1].unwrapped.length = 2
    agent = dt.make_agent(args, envs, torch.device("cpu"))
    run = SimpleNamespace(stopped=[])
    returns, lengths = dt.play(agent, envs, torch.zeros(4), [1, 2, 3, 4], run)
    assert returns.tolist() == [6.0, 3.0, 6.0, 6.0] and lengths.tolist() == [3.0, 2.0, 3.0, 3.0]
    assert agent.training
    run.stopped.append(signal.SIGINT)
    assert dt.play(agent, envs, torch.zeros(4), [1, 2, 3, 4], run)[1].tolist() == [0.0] * 4


# ---- data ----


def test_random_play_is_complete_possible_and_seeded():
    args = Args(random_episodes=30, env_kwargs='{"graph_seed": 3}')
    graph = gym.make("envs.graph:Graph-v0", graph_seed=3).unwrapped
    episodes = dt.random_episodes(args)
    assert len(episodes) == 30
    starts = set()
    for obs, actions, rewards in episodes:
        assert len(obs) == len(actions) == len(rewards) <= 10
        nodes = [*obs.argmax(1), actions[-1].argmax()]
        assert all(graph.arrows[a, b] for a, b in zip(nodes, nodes[1:], strict=False))
        assert actions.argmax(1).tolist() == nodes[1:]
        late = nodes[-1] != graph.GOAL
        assert rewards.sum() == (-20 if late else -len(rewards)) and (len(rewards) == 10 or not late)
        starts.add(nodes[0])
    assert len(starts) > 8
    again = dt.random_episodes(args)
    other = dt.random_episodes(dataclasses.replace(args, seed=2))
    assert all((a[0] == b[0]).all() for a, b in zip(episodes, again, strict=True))
    assert any(a[0].shape != b[0].shape or (a[0] != b[0]).any() for a, b in zip(episodes, other, strict=True))


def test_random_actions_and_the_environment_have_seeds_of_their_own(monkeypatch):
    """With one seed for both, the actions would be numbers that the environment drew, too: its noise."""
    make = gym.make
    drawn = []

    def made(env_id):
        env = make(env_id)
        seed, reset = env.action_space.seed, env.reset
        monkeypatch.setattr(env.action_space, "seed", lambda value: drawn.append(value) or seed(value))
        monkeypatch.setattr(env, "reset", lambda seed=None: drawn.append(seed) or reset(seed=seed))
        return env

    monkeypatch.setattr(gym, "make", made)
    dt.random_episodes(Args(env_id="Pendulum-v1", random_episodes=2, max_episode_steps=3))
    actions, environment, *later = drawn
    assert actions != environment and None not in (actions, environment)
    assert set(later) == {None}, "later episodes go on with the same random numbers"


def test_random_play_without_an_end_is_cut():
    args = Args(env_id="Counter-neither-v0", random_episodes=2, max_episode_steps=7)
    assert [len(rewards) for _, _, rewards in dt.random_episodes(args)] == [7, 7]


def refused(capfd, *argv) -> str:
    """What the script says about a command line that it refuses."""
    capfd.readouterr()
    original = sys.argv
    sys.argv = ["decision_transformer.py", *map(str, argv)]
    try:
        with pytest.raises(SystemExit) as stop:
            dt.train(dt.parse_args())
    finally:
        sys.argv = original
    lines = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_bad_wishes_and_settings_are_one_line(capfd, tmp_path):
    new = ("--run-dir", tmp_path / "new")
    for wish in ("some", "nan", "inf", "1e30"):
        refused(capfd, "--target-returns", "1", wish, *new)
    assert "target-returns" in refused(capfd, "--no-condition", "--target-returns", "1", *new)
    assert "heads" in refused(capfd, "--num-heads", "3", *new)
    assert "warmup" in refused(capfd, "--warmup-updates", "1000", "--total-updates", "1000", *new)
    assert "JSON" in refused(capfd, "--env-kwargs", "{", *new)
    assert "JSON" in refused(capfd, "--env-kwargs", "[]", *new)
    assert "no_such" in refused(capfd, "--env-kwargs", '{"no_such": 1}', *new)
    assert "dqn_atari.py" in refused(capfd, "--env-id", "Image-v0", *new)
    assert "no script" in refused(capfd, "--env-id", "Dict-v0", *new)
    assert "NaN" in refused(capfd, "--env-id", "Broken-v0", "--random-episodes", "20", *new)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """A folder for Minari's datasets, and a function that writes one there."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))

    def write(name, env, change=lambda episode: episode, lengths=(5, 2, 9)):
        rng = np.random.default_rng(0)
        env.action_space.seed(0)
        buffers = []
        for T in lengths:
            obs = rng.normal(size=(T + 1, *env.observation_space.shape)).astype(env.observation_space.dtype)
            if isinstance(env.observation_space, gym.spaces.Discrete):
                obs = rng.integers(env.observation_space.n, size=T + 1)
            actions = [env.action_space.sample() for _ in range(T)]
            flags = {"terminations": [False] * (T - 1) + [True], "truncations": [False] * T}
            rewards = rng.normal(size=T).tolist()
            buffer = EpisodeBuffer(observations=list(obs), actions=actions, rewards=rewards, **flags)
            buffers.append(change(buffer))
        minari.create_dataset_from_buffers(name, buffer=buffers, env=env)
        return buffers

    return SimpleNamespace(root=tmp_path / "datasets", write=write)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])
def test_a_dataset_comes_back_as_it_was_written(datasets, env_id):
    env = gym.make(env_id)
    buffers = datasets.write("small/some-v0", env)
    args, dataset = dt.open_dataset(Args(dataset="small/some-v0"))
    assert args.env_id == env_id
    envs = dt.make_envs(args, 1)
    episodes = dt.read_episodes(dataset, envs)
    assert len(episodes) == 3
    for (obs, actions, rewards), buffer in zip(episodes, buffers, strict=True):
        T = len(buffer.rewards)
        assert len(obs) == len(actions) == len(rewards) == T
        for t in range(T):
            if env_id == "FrozenLake-v1":
                assert obs[t].argmax() == buffer.observations[t] and obs[t].sum() == 1
            else:
                np.testing.assert_array_equal(obs[t], buffer.observations[t])
            if env_id == "Pendulum-v1":
                np.testing.assert_allclose(actions[t], buffer.actions[t] / 2, rtol=1e-6)  # bounds are ±2
            else:
                assert actions[t].argmax() == buffer.actions[t]
            assert rewards[t] == buffer.rewards[t]


@pytest.mark.filterwarnings("ignore")
def test_the_environment_is_that_of_the_dataset(datasets):
    datasets.write("small/lake-v0", gym.make("FrozenLake-v1", map_name="8x8", render_mode="rgb_array"))
    args, _ = dt.open_dataset(Args(dataset="small/lake-v0"))
    assert args.env_id == "FrozenLake-v1" and json.loads(args.env_kwargs)["map_name"] == "8x8"
    assert "render_mode" not in json.loads(args.env_kwargs)
    assert dt.make_envs(args, 1).single_observation_space.shape == (3 + 64,)
    named, _ = dt.open_dataset(Args(dataset="small/lake-v0", env_id="CartPole-v1"))
    assert named.env_id == "CartPole-v1" and named.env_kwargs is None
    datasets.write("small/graph-v0", gym.make("envs.graph:Graph-v0", graph_seed=4))
    args, _ = dt.open_dataset(Args(dataset="small/graph-v0"))
    assert args.env_id == Args.env_id and json.loads(args.env_kwargs)["graph_seed"] == 4


@pytest.mark.filterwarnings("ignore")
def test_foreign_and_damaged_datasets_are_one_line(datasets, capfd, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")

    def no_network(name):
        raise OSError("no network")

    monkeypatch.setattr(minari, "download_dataset", no_network)
    new = ("--run-dir", tmp_path / "new", "--eval-episodes", "1")
    assert "no network" in refused(capfd, "--dataset", "no/such-v0", *new)
    refused(capfd, "--dataset", "../x", *new)
    datasets.write("small/cart-v0", gym.make("CartPole-v1"))
    data = datasets.root / "small" / "cart-v0" / "data"
    told = refused(capfd, "--dataset", "small/cart-v0", "--env-id", "Acrobot-v1", *new)
    assert "Box" in told
    assert "Discrete(2)" in refused(capfd, "--dataset", "small/cart-v0", "--env-id", "Other-v0", *new)

    def short(episode):
        return dataclasses.replace(episode, observations=episode.observations[:-1])

    def infinite(episode):
        return dataclasses.replace(episode, rewards=[math.inf] * len(episode.rewards))

    datasets.write("small/short-v0", gym.make("CartPole-v1"), short)
    assert "misses steps" in refused(capfd, "--dataset", "small/short-v0", *new)
    datasets.write("small/infinite-v0", gym.make("CartPole-v1"), infinite)
    assert "infinite" in refused(capfd, "--dataset", "small/infinite-v0", *new)

    metadata = json.loads((data / "metadata.json").read_text())
    whole = (data / "main_data.hdf5").read_bytes()
    (data / "main_data.hdf5").write_bytes(whole[: len(whole) // 2])
    refused(capfd, "--dataset", "small/cart-v0", *new)
    (data / "main_data.hdf5").write_bytes(whole)
    # A stranger's environment is not made, so nothing of it is imported.
    (tmp_path / "his_task.py").write_text("raise SystemExit('his code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    spec = json.loads(metadata["env_spec"]) | {"entry_point": "his_task:Task", "id": "His-v0"}
    for hidden in ("observation_space", None):
        changed = metadata | {"env_spec": json.dumps(spec)}
        changed.pop(hidden, None)
        (data / "metadata.json").write_text(json.dumps(changed))
        assert "his code" not in refused(capfd, "--dataset", "small/cart-v0", *new)
    # Nor by an id that names a module: gym.make would import it.
    named = json.loads(metadata["env_spec"]) | {"id": "his_task:CartPole-v1"}
    (data / "metadata.json").write_text(json.dumps(metadata | {"env_spec": json.dumps(named)}))
    message = refused(capfd, "--dataset", "small/cart-v0", *new)
    assert "his code" not in message and "--env-id his_task:CartPole-v1" in message
    (data / "metadata.json").write_text("{")
    refused(capfd, "--dataset", "small/cart-v0", *new)
    assert not (tmp_path / "new").exists()


# ---- the environment ----


def test_distances_against_floyd_and_warshall():
    rng = np.random.default_rng(0)
    for _ in range(20):
        arrows = rng.random((9, 9)) < 0.2
        want = np.where(arrows, 1.0, np.inf)
        np.fill_diagonal(want, 0.0)
        for k in range(9):
            want = np.minimum(want, want[:, k : k + 1] + want[k : k + 1])
        np.testing.assert_array_equal(distances_to(4, arrows), want[:, 4])


def test_the_graph_keeps_gymnasiums_rules_and_its_own():
    env = GraphEnv(render_mode="rgb_array")
    check_env(env, skip_render_check=False)
    graphs = [GraphEnv(graph_seed=seed) for seed in range(1, 11)]
    assert len({graph.arrows.tobytes() for graph in graphs}) == 10
    for graph in graphs:
        assert (graph.arrows == GraphEnv(graph_seed=graphs.index(graph) + 1).arrows).all()
        assert 1 <= graph.distances[1:].min() and graph.distances.max() <= 10 and graph.distances[0] == 0
        assert not graph.arrows.diagonal().any() and not graph.arrows[graph.GOAL].any()
        assert graph.distances[1:].tolist() == distances_to(0, graph.arrows)[1:].tolist()


def test_walks_on_a_graph_by_hand():
    env = GraphEnv(max_steps=4, late_reward=-7.0, num_nodes=4, edge_probability=0.4, graph_seed=1)
    env.arrows = np.zeros((4, 4), dtype=bool)
    env.arrows[[3, 2, 1, 1], [2, 1, 0, 3]] = True  # 3 → 2 → 1 → 0, and 1 → 3
    env._masks = env.arrows.astype(np.int8)
    env.distances = distances_to(0, env.arrows)
    assert env.distances.tolist() == [0, 1, 2, 3]
    node, info = env.reset(seed=0, options={"start": 3})
    assert node == 3 and info["best_return"] == -3 and info["action_mask"].tolist() == [0, 0, 1, 0]
    got = [env.step(action)[:4] for action in (2, 1, 0)]
    assert got == [(2, -1.0, False, False), (1, -1.0, False, False), (0, -1.0, True, False)]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(1)
    env.reset(options={"start": 3})
    # No arrow from 3 to 0: the walker stays. In the end the time is up.
    got = [env.step(action)[:4] for action in (0, 2, 1, 3)]
    assert [each[0] for each in got] == [3, 2, 1, 3] and [each[1] for each in got] == [-1, -1, -1, -8]
    assert [each[2] for each in got] == [False, False, False, True] and not any(each[3] for each in got)
    env.reset(options={"start": 1})
    # Just in time: the fourth step arrives.
    assert [env.step(action)[1:3] for action in (1, 1, 1, 0)][-1] == (-1.0, True)
    starts = Counter(env.reset(seed=seed)[0] for seed in range(300))
    assert set(starts) == {1, 2, 3} and min(starts.values()) > 70
    with pytest.raises(ValueError):
        env.reset(options={"start": 0})
    with pytest.raises(ValueError):
        env.step(4)


@pytest.mark.parametrize(
    "options",
    [
        *({"num_nodes": 1}, {"num_nodes": 2.5}, {"edge_probability": 0}, {"edge_probability": 2}),
        *({"max_steps": 0}, {"late_reward": math.nan}, {"graph_seed": -1}, {"render_mode": "human"}),
        {"num_nodes": 30, "edge_probability": 0.001},
    ],
)
def test_impossible_graphs_are_refused(options, monkeypatch):
    monkeypatch.setattr("envs.graph.MAX_DRAWS", 100)
    with pytest.raises(ValueError):
        GraphEnv(**options)


def test_an_impossible_large_graph_is_refused_in_seconds():
    """A graph of 1000 nodes takes 10 ms to draw. Graphs of up to 20 nodes have as many tries as ever."""
    began = time.process_time()
    with pytest.raises(ValueError, match="of 100 graphs"):
        GraphEnv(num_nodes=1000, edge_probability=0.003)
    assert time.process_time() - began < 20
    with pytest.raises(ValueError, match="of 100,000 graphs"):
        GraphEnv(num_nodes=3, edge_probability=1e-9)


def test_the_picture_shows_the_way():
    env = GraphEnv(render_mode="rgb_array")
    env.reset(options={"start": int(env.distances.argmax())})
    first = env.render()
    env.step(int(env.arrows[env.node].argmax()))
    second = env.render()
    white = [(frame == 255).all(-1).sum() for frame in (first, second)]
    assert first.dtype == np.uint8 and white[1] > white[0] > 20
    assert GraphEnv().render() is None


# ---- training ----


TINY = {"width": 16, "num_layers": 1, "random_episodes": 50, "eval_episodes": 5, "num_envs": 5}
TINY |= {"batch_size": 8}


def weights(run_dir) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    settings = TINY | {"total_updates": 30, "warmup_updates": 12, "eval_every": 10, "dropout": 0.2}
    dt.train(Args(**settings, run_dir=str(tmp_path / "whole")))
    goes_on = dt.Run.goes_on

    def stops(run, size):
        if run.step == 17 and not run.args.resume:
            run.stopped.append(signal.SIGINT)
        return goes_on(run, size)

    monkeypatch.setattr(dt.Run, "goes_on", stops)
    with pytest.raises(SystemExit):
        dt.train(Args(**settings, run_dir=str(tmp_path / "parts")))
    assert weights(tmp_path / "parts")["global_step"] == 17
    dt.train(Args(**settings, resume=str(tmp_path / "parts")))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, tensor in whole["agent"].items():
        assert torch.equal(tensor, parts["agent"][name]), name
    assert torch.equal(whole["rng_state"], parts["rng_state"])
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts")]
    assert results[0]["mean_reward"] == results[1]["mean_reward"]
    assert results[0]["episodes"] == results[1]["episodes"] == 15


def test_updates_are_those_of_a_slow_reference(tmp_path, monkeypatch):
    """Five updates again: rate, clipped gradient and AdamW by their formulas, in float64."""
    settings = TINY | {"total_updates": 5, "warmup_updates": 2, "dropout": 0.0, "weight_decay": 0.1}
    args = Args(**settings, learning_rate=0.01, max_grad_norm=0.2, run_dir=str(tmp_path / "run"))
    batches = []
    draw = Data.windows

    def drawn(data, *sizes):
        batches.append(draw(data, *sizes))
        return batches[-1]

    make = dt.make_agent
    begun = []

    def made(*arguments):
        agent = make(*arguments)
        begun.append({name: tensor.clone() for name, tensor in agent.state_dict().items()})
        return agent

    monkeypatch.setattr(Data, "windows", drawn)
    monkeypatch.setattr(dt, "make_agent", made)
    dt.train(args)
    envs = dt.make_envs(args, 1)
    agent = make(args, envs, torch.device("cpu"))
    saved = weights(tmp_path / "run")["agent"]
    agent.load_state_dict(saved)  # the buffers
    agent.load_state_dict({n: begun[0][n] for n, _ in agent.named_parameters()}, strict=False)
    agent.double()
    parameters = list(agent.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    for update, rate in enumerate([0.005, 0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3]):
        (to_go, obs, actions, steps), real = batches[update]
        z = agent(to_go.double(), obs.double(), actions.double(), steps)
        log_p = torch.log(z.exp() / z.exp().sum(-1, keepdim=True))
        loss = 0.0
        for b, k in real.nonzero().tolist():
            loss = loss - log_p[b, k, actions[b, k].argmax()] / real.sum()
        gradients = torch.autograd.grad(loss, parameters)
        length = torch.sqrt(sum((g**2).sum() for g in gradients))
        with torch.no_grad():
            for i, p in enumerate(parameters):
                g = gradients[i] * min(1.0, 0.2 / length.item())
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g**2
                p -= rate * 0.1 * p
                n = update + 1
                p -= rate * first[i] / (1 - 0.9**n) / (torch.sqrt(second[i] / (1 - 0.999**n)) + 1e-8)
    for name, p in agent.named_parameters():
        # Adam turns rounding into steps of its own where a gradient is next to nothing.
        assert (p - saved[name]).abs().max() < 2e-3, name
    moved = torch.cat([(p - begun[0][name]).flatten() for name, p in agent.named_parameters()])
    apart = torch.cat([(p - saved[name]).flatten() for name, p in agent.named_parameters()])
    assert apart.norm() < 0.01 * moved.norm()


def test_what_the_data_say_is_in_the_checkpoint(tmp_path):
    settings = TINY | {"env_id": "CartPole-v1", "total_updates": 2, "warmup_updates": 1}
    args = Args(**settings, run_dir=str(tmp_path / "run"))
    dt.train(args)
    episodes = dt.random_episodes(args)
    obs = np.concatenate([part[0] for part in episodes]).astype(np.float64)
    returns = [part[2].sum() for part in episodes]
    saved = weights(tmp_path / "run")["agent"]
    np.testing.assert_allclose(saved["obs_mean"], obs.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(saved["obs_scale"], 1 / obs.std(0), rtol=1e-5)
    to_go = np.concatenate([np.arange(length, 0, -1) for length in returns])  # each step pays 1
    assert saved["return_scale"].item() == pytest.approx(to_go.std(), rel=1e-5)
    assert saved["best_return"] == max(returns)
    assert saved["last_step"] == max(returns) - 1


def test_what_never_changes_is_hidden(tmp_path, monkeypatch):
    """A number that is constant in the data would look huge once it moves; scaling is off on demand."""
    obs = np.array([[1, 2, 3, 0], [1, 2, 3, 1], [1, 2, 3, 0], [1, 2, 3, 1]], dtype=np.float32)
    episode = (obs, np.eye(2, dtype=np.float32)[[0, 1, 1, 0]], np.ones(4))
    monkeypatch.setattr(dt, "random_episodes", lambda args: [episode])
    for norm_obs, want in ((True, [0, 0, 0, 2]), (False, [1, 1, 1, 1])):
        run_dir = tmp_path / str(norm_obs)
        settings = TINY | {"total_updates": 1, "warmup_updates": 0, "env_id": "CartPole-v1"}
        dt.train(Args(**settings, norm_obs=norm_obs, run_dir=str(run_dir)))
        assert weights(run_dir)["agent"]["obs_scale"].tolist() == want


def test_layers_in_bfloat16_keep_their_sums_in_float32():
    windows = random_windows(6, 4)
    whole, half = agent_of(width=48), agent_of(width=48, bf16=True)
    sums = []
    half.layers[0].register_forward_hook(lambda _, inputs, output: sums.extend((*inputs, output)))
    inner = []
    half.layers[1].mlp.register_forward_hook(lambda _, inputs, output: inner.append(output))
    z, rounded = whole(*windows), half(*windows)
    assert {x.dtype for x in sums} == {rounded.dtype} == {torch.float32}
    assert inner[0].dtype == torch.bfloat16
    error = (z - rounded).abs().max() / z.std()
    assert 0 < error < 0.05  # 2 to 3 decimal digits


@pytest.mark.parametrize("has_it", [True, False])
def test_bf16_is_what_the_device_has(tmp_path, monkeypatch, has_it):
    """args.json says what was computed; another device goes on, and evaluates, as it can."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_it})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not has_it)
    assert [dt.has_bf16(torch.device(name)) for name in ("cpu", "cuda")] == [has_it, not has_it]
    settings = TINY | {"total_updates": 3, "warmup_updates": 1, "run_dir": str(tmp_path / "run")}
    dt.train(Args(**settings, bf16=True))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["bf16"] is has_it
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    args = Args(**settings, bf16=has_it)
    envs = dt.make_envs(args, 1)
    assert not dt.make_agent(args, envs, torch.device("cpu")).bf16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert not dt.make_agent(replace(args, bf16=False), envs, torch.device("cpu")).bf16


def test_each_wish_has_its_chart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = TINY | {"total_updates": 4, "warmup_updates": 1, "eval_every": 2}
    dt.train(Args(**settings, target_returns=[-3.0, -8.5], run_dir=str(tmp_path / "run")))
    charts = EventAccumulator(str(tmp_path / "run")).Reload()
    for wish in ("-3", "-8.5"):
        assert [point.step for point in charts.Scalars(f"charts/return_asked_{wish}")] == [2, 4]
    assert {"losses/action_loss", "losses/action_error"} <= set(charts.Tags()["scalars"])


def test_the_episodic_return_is_that_of_the_first_wish(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def play(agent, envs, asked, seeds, run):
        return asked.numpy() * 10, np.full(len(asked), 7)

    monkeypatch.setattr(dt, "play", play)
    settings = TINY | {"total_updates": 2, "warmup_updates": 1, "eval_every": 2, "num_envs": 3}
    dt.train(Args(**settings, target_returns=[-3.0, -8.5], run_dir=str(tmp_path / "run")))
    charts = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [point.value for point in charts.Scalars("charts/episodic_return")] == [-30]
    assert [point.value for point in charts.Scalars("charts/return_asked_-8.5")] == [-85]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["episodes"] == 3


def test_a_wish_reaches_the_evaluation(tmp_path, monkeypatch):
    """--evaluate asks for the first target return, and another one on demand."""
    settings = TINY | {"total_updates": 1, "warmup_updates": 0}
    dt.train(Args(**settings, target_returns=[-3.0, -8.0], run_dir=str(tmp_path / "run")))
    asked = []
    begin = Player.__init__
    monkeypatch.setattr(Player, "__init__", lambda self, a, w: asked.append(w.tolist()) or begin(self, a, w))
    for wishes, want in (([-3.0, -8.0], -3.0), ([-5.0], -5.0)):
        args = Args(**settings, target_returns=wishes)
        dt.evaluate(args, tmp_path / "run", torch.device("cpu"))
        assert asked[-1] == [want] * 5


def test_it_learns_ways_and_does_as_it_is_asked(tmp_path):
    """Random walks return about −15 on this graph, the shortest ways −2.7 on average."""
    settings = {"width": 32, "num_layers": 2, "total_updates": 250, "warmup_updates": 25}
    more = {"env_kwargs": '{"graph_seed": 2}', "eval_every": 1000, "eval_episodes": 60, "batch_size": 48}
    result = dt.train(Args(**settings, **more, run_dir=str(tmp_path / "asked")))
    cloned = dt.train(Args(**settings, **more, condition=False, run_dir=str(tmp_path / "cloned")))
    print(result["mean_reward"], cloned["mean_reward"])
    assert result["mean_reward"] > -7.5
    assert cloned["mean_reward"] < result["mean_reward"] - 2


@pytest.mark.parametrize("bounds", [(-3, 3, np.int64), (-3e38, 3e38, np.float32), (0, np.inf, np.float32)])
def test_actions_that_are_whole_or_have_no_finite_span_are_refused(bounds, capsys):
    low, high, kind = bounds
    space = gym.spaces.Box(low, high, (2,), kind)
    envs = SimpleNamespace(env=dt.make_envs(dt.Args(env_id="CartPole-v1"), 1).env, single_action_space=space)
    with pytest.raises(SystemExit) as end:
        dt.check_spaces(dt.Args(env_id="CartPole-v1"), envs)
    assert end.value.code == 2 and "no script handles" in capsys.readouterr().err
