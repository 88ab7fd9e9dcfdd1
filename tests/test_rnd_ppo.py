"""RND-PPO: novelty, its filter and its statistics, the two kinds of endings, and curiosity against none."""

import signal

import ale_py
import counter_env  # also registers the Counter environments
import gymnasium as gym
import numpy as np
import pytest
import rnd_ppo
import torch
from rnd_ppo import Agent, Args, RunningNorm, discounted_past, gae

gym.register_envs(ale_py)
SMALL = {"env_id": "Counter-terminated-v0", "num_envs": 4, "num_steps": 8, "num_minibatches": 2}
SMALL |= {"update_epochs": 1, "init_steps": 4, "total_timesteps": 64, "eval_episodes": 1}


class Corridor(gym.Env):
    """Ten doors in a row, four switches each: the right one opens, the wrong ones throw back to the start.

    Observes which door is next, one-hot. Pays 1 behind the last door, which 4¹⁰ random tries find once.
    """

    SWITCHES = (2, 0, 3, 1, 1, 2, 0, 3, 2, 1)

    def __init__(self, render_mode=None):
        self.observation_space = gym.spaces.Box(0, 1, (len(self.SWITCHES) + 1,), np.float32)
        self.action_space = gym.spaces.Discrete(4)
        self.picture = np.eye(len(self.SWITCHES) + 1, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.door = 0
        return self.picture[0].copy(), {}

    def step(self, action):
        self.door = self.door + 1 if action == self.SWITCHES[self.door] else 0
        out = self.door == len(self.SWITCHES)
        return self.picture[self.door].copy(), float(out), out, False, {}


gym.register("Corridor-v0", entry_point=Corridor, max_episode_steps=40)


def corridor(tmp_path, int_coef):
    more = {"num_envs": 16, "num_minibatches": 4, "total_timesteps": 81_920, "learning_rate": 1e-3}
    more |= {"eval_episodes": 20, "init_steps": 50, "gamma": 0.99}
    return rnd_ppo.train(Args(env_id="Corridor-v0", int_coef=int_coef, run_dir=str(tmp_path / "run"), **more))


def test_curiosity_finds_what_chance_does_not(tmp_path):
    assert corridor(tmp_path / "curious", 1.0)["mean_reward"] >= 0.9
    assert corridor(tmp_path / "indifferent", 0.0)["mean_reward"] == 0


def test_the_filter_runs_over_time():
    novelty = np.array([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])  # T = 2, N = 3
    want = [[1 + 4, 10 + 2, 100], [2 + 0.5 * 5, 20 + 0.5 * 12, 200 + 0.5 * 100]]
    np.testing.assert_allclose(discounted_past(novelty, np.array([8.0, 4.0, 0.0]), 0.5), want)


def test_the_filter_goes_on_with_the_next_rollout():
    novelty = np.random.default_rng(0).random((12, 5))
    first = discounted_past(novelty[:7], np.zeros(5), 0.9)
    both = np.concatenate([first, discounted_past(novelty[7:], first[-1], 0.9)])
    np.testing.assert_allclose(both, discounted_past(novelty, np.zeros(5), 0.9))
    by_definition = sum(0.9 ** (11 - k) * novelty[k] for k in range(12))
    np.testing.assert_allclose(both[-1], by_definition)


def test_statistics_are_those_of_all_elements():
    """Batches of unequal sizes, far from 0: every element counts once, not every batch."""
    data = torch.from_numpy(np.random.default_rng(1).normal([100, -3, 0.5], [2, 5, 0.1], (1009, 3))).float()
    stats = RunningNorm(3, limit=5.0)
    for batch in data.split([1, 500, 7, 200, 301]):
        stats.update(batch)
    assert stats.count == 1009
    torch.testing.assert_close(stats.mean.float(), data.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.var.float(), data.var(0, correction=0), rtol=1e-4, atol=1e-5)
    x = torch.tensor([[104.0, 1000.0, 0.5]])
    want = ((x - data.mean(0)) / data.std(0, correction=0)).clamp(-5, 5)
    torch.testing.assert_close(stats(x), want, rtol=1e-3, atol=1e-3)
    assert stats(x)[0, 1] == 5


def test_statistics_of_scalars_and_of_constants():
    stats = RunningNorm(limit=5.0)
    stats.update(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert (stats.mean.item(), stats.var.item()) == (3.0, 3.5)
    constant = RunningNorm(2, limit=5.0)
    constant.update(torch.ones(10, 2))
    assert constant(torch.tensor([[1.0, 0.9]])).tolist() == [[0.0, -5.0]]


def test_novelty_falls_where_the_predictor_was_and_stays_elsewhere():
    torch.manual_seed(0)
    agent = Agent((2, 6), 3, True, True)
    seen, unseen = torch.randn(64, 1, 6) + 2, torch.randn(64, 1, 6) - 2
    agent.norm_obs.update(torch.cat([seen, unseen]))
    before = agent.novelty(seen).mean().item(), agent.novelty(unseen).mean().item()
    target = [p.clone() for p in agent.target.parameters()]
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        agent.novelty(seen).mean().backward()
        optimizer.step()
    assert agent.novelty(seen).mean().item() < 0.02 * before[0]
    assert agent.novelty(unseen).mean().item() > 0.3 * before[1]
    assert all(torch.equal(*pair) for pair in zip(target, agent.target.parameters(), strict=True))
    with torch.no_grad():  # (11) spelled out
        x = agent.norm_obs(unseen)
        want = [(agent.predictor(x)[i] - agent.target(x)[i]).square().mean() for i in range(64)]
    torch.testing.assert_close(agent.novelty(unseen).detach(), torch.stack(want))


def test_curiosity_looks_at_the_newest_frame_and_the_policy_at_all_four():
    torch.manual_seed(0)
    agent = Agent((4, 84, 84), 5, True, True)
    obs = torch.randint(0, 255, (2, 4, 84, 84), dtype=torch.uint8)
    agent.norm_obs.update(agent.newest(obs))
    assert agent.norm_obs.mean.shape == (1, 84, 84) and agent.norm_obs.count == 2
    older, newer = obs.clone(), obs.clone()
    older[:, 0] = 0
    newer[:, 3] = 255
    logits, values = agent(obs)
    assert logits.shape == (2, 5) and values.shape == (2, 2)
    novelty, of_older, of_newer = (agent.novelty(agent.newest(x)) for x in (obs, older, newer))
    assert novelty.shape == (2,) and torch.equal(of_older, novelty) and not torch.equal(of_newer, novelty)
    assert not torch.equal(agent(older)[0], logits)


def test_curiosity_looks_at_the_newest_observation_and_the_policy_at_its_memory_too():
    torch.manual_seed(0)
    agent, obs = Agent((2, 5), 4, True, True), torch.randn(7, 2, 5)
    agent.norm_obs.update(agent.newest(obs))
    assert torch.equal(agent.newest(obs)[:, 0], obs[:, 1]) and agent.norm_obs.count == 7
    for row in range(2):
        other = obs.clone()
        other[:, row] += 1
        assert not torch.equal(agent(other)[0], agent(obs)[0])


class Path(gym.vector.VectorEnv):
    """Two environments that observe 1, 2, 3, … and 10, 20, 30, …; episodes of 2 and of 3 steps."""

    num_envs, single_action_space = 2, gym.spaces.Discrete(2)
    single_observation_space = gym.spaces.Box(np.float32([0, -1]), np.float32([99, 1]))

    def observe(self):
        return np.stack([self.time * [1, 10], np.ones(2)], axis=1).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.time = np.ones(2)
        return self.observe(), {}

    def step(self, actions):
        self.time += 1
        ended, info = self.time == [3, 4], {}
        if ended.any():
            info["final_obs"] = np.array([*self.observe(), None], dtype=object)[:2]
            self.time[ended] = 1
        return self.observe(), np.zeros(2), ended & [True, False], ended & [False, True], info


def test_memory_by_hand():
    """(15) with β = .75, to the end of an episode and not beyond."""
    envs = rnd_ppo.MemoryTrace(Path(), 0.75)
    space = envs.single_observation_space
    assert space.shape == (2, 2) and space.high[:, 0].tolist() == [99, 99] and space.low[0, 1] == -1
    assert envs.observation_space.shape == (2, 2, 2)
    obs, _ = envs.reset()
    assert obs[..., 0].tolist() == [[1, 1], [10, 10]] and (obs[..., 1] == 1).all()
    first, *_ = envs.step(None)
    assert first[..., 0].tolist() == [[1.25, 2], [12.5, 20]]
    second, _, terminated, _, info = envs.step(None)
    assert terminated.tolist() == [True, False]
    assert info["final_obs"][0][:, 0].tolist() == [1.6875, 3]
    assert second[..., 0].tolist() == [[1, 1], [16.875, 30]]  # the first environment forgot
    third, _, _, truncated, info = envs.step(None)
    assert truncated.tolist() == [False, True]
    assert info["final_obs"][1][:, 0].tolist() == [22.65625, 40]
    assert third[..., 0].tolist() == [[1.25, 2], [10, 10]]
    assert first[..., 0].tolist() == [[1.25, 2], [12.5, 20]]  # what was given out does not change


class Spy:
    """Calls the original and keeps copies of what it was called with."""

    def __init__(self, original):
        self.original, self.calls = original, []

    def __call__(self, *args):
        self.calls.append([x.copy() if isinstance(x, np.ndarray) else x for x in args])
        return self.original(*args)


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "neither"])
def test_what_is_stored_when_episodes_end(ending, tmp_path, monkeypatch):
    """Two environments, episodes of 3 steps, rollouts of 4. Networks with known answers, from observations
    [episode, step]: value E 10·episode + step, value I 100 more, novelty 10·episode + step + 1000."""
    spies = {name: Spy(getattr(rnd_ppo, name)) for name in ("gae", "discounted_past")}
    for name, spy in spies.items():
        monkeypatch.setattr(rnd_ppo, name, spy)

    def known(obs):
        return 10 * obs[:, -1, 0] + obs[:, -1, 1]

    def forward(self, obs):
        values = torch.stack([known(obs), known(obs) + 100], dim=-1)
        return self.actor(obs), values + 0 * self.critic(obs)

    def novelty(self, obs):
        return known(obs) + 1000 + 0 * self.predictor[1].weight.sum()

    monkeypatch.setattr(Agent, "forward", forward)
    monkeypatch.setattr(Agent, "novelty", novelty)
    monkeypatch.setattr(rnd_ppo, "MAX_EVAL_STEPS", 9)
    own = {"env_id": f"Counter-{ending}-v0", "num_envs": 2, "num_steps": 4, "total_timesteps": 16}
    args = Args(**SMALL | own, run_dir=str(tmp_path / "run"))
    rnd_ppo.train(args)

    (extrinsic, intrinsic, *_), (past, later) = spies["gae"].calls, spies["discounted_past"].calls
    rewards, values, next_values, terminated, truncated, gamma, gae_lambda = extrinsic
    int_rewards, int_values, int_next_values, int_terminated, int_truncated, int_gamma, _ = intrinsic
    assert (gamma, int_gamma, gae_lambda) == (args.gamma, args.int_gamma, args.gae_lambda)
    # Random steps came before: the first rollout starts with a later episode, at its beginning.
    e = values[0, 0]
    both = lambda column: np.repeat(np.array(column)[:, None], 2, axis=1)  # noqa: E731
    ends = ending != "neither"
    np.testing.assert_array_equal(rewards, both([1, 2, 3, 1 if ends else 4]))
    np.testing.assert_array_equal(values, both([e, e + 1, e + 2, e + 10 if ends else e + 3]))
    np.testing.assert_array_equal(int_values, values + 100)
    # Novelty is that of the observation before the reset …
    seen = both([1, 2, 3, 11 if ends else 4]) + e + 1000
    np.testing.assert_array_equal(past[0], seen)
    # … but its return goes on with the first observation after the reset, as if nothing had ended.
    np.testing.assert_array_equal(
        int_next_values, both([1, 2, 10 if ends else 3, 11 if ends else 4]) + e + 100
    )
    assert not int_terminated.any() and not int_truncated.any()
    np.testing.assert_array_equal(terminated, both([False, False, ending in ("terminated", "both"), False]))
    np.testing.assert_array_equal(truncated, both([False, False, ending in ("truncated", "both"), False]))
    # After a time limit, the extrinsic return looks at the observation before the reset.
    rows = [0, 1, 3] if ending in ("terminated", "both") else [0, 1, 2, 3]
    np.testing.assert_array_equal(next_values[rows], (seen - 1000)[rows])
    # Intrinsic rewards: novelty over the deviation of the discounted past, which goes on.
    sums = discounted_past(seen, np.zeros(2), args.int_gamma)
    np.testing.assert_allclose(int_rewards, seen / sums.std(), rtol=1e-5)
    np.testing.assert_array_equal(past[1], [0, 0])
    np.testing.assert_allclose(later[1], sums[-1], rtol=1e-6)


def test_two_streams_by_hand():
    """γ = λ = .5, V = 0, rewards 1, 2, 4 and an ending in the middle, unseen by curiosity."""
    rewards, zeros = np.array([[1.0], [2.0], [4.0]]), np.zeros((3, 1))
    end, never = np.array([[False], [True], [False]]), np.zeros((3, 1), dtype=bool)
    np.testing.assert_allclose(gae(rewards, zeros, zeros, end, never, 0.5, 0.5)[:, 0], [1.5, 2, 4])
    np.testing.assert_allclose(gae(rewards, zeros, zeros, never, never, 0.5, 0.5)[:, 0], [1.75, 3, 4])


def test_value_loss_by_hand():
    values, returns = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 2.0], [3.0, 1.0], [2.0, 3.0]]),
    )
    torch.testing.assert_close(rnd_ppo.value_loss(values, returns), torch.tensor([5 / 6, 3.0]))


def test_the_loss_is_the_sum_of_its_parts(tmp_path, monkeypatch):
    """Equation (9): two values, two returns, the predictor's error on its share of the minibatch."""
    parts = {}

    def spy(owner, name):
        original = getattr(owner, name)

        def wrapper(*arguments):
            parts[name] = (arguments, original(*arguments))
            return parts[name][1]

        monkeypatch.setattr(owner, name, wrapper)

    for name in ("policy_loss", "value_loss", "entropy"):
        spy(rnd_ppo, name)
    spy(Agent, "novelty")
    backward, losses = torch.Tensor.backward, []

    def check(loss):
        v_loss, int_v_loss = parts["value_loss"][1]
        want = parts["policy_loss"][1] + 0.7 * (v_loss + int_v_loss) - 0.2 * parts["entropy"][1]
        losses.append((loss.item(), (want + parts["novelty"][1].mean()).item()))
        assert [x.shape for x in parts["value_loss"][0]] == [(16, 2)] * 2
        assert len(parts["novelty"][1]) == 8
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", check)
    flags = SMALL | {"vf_coef": 0.7, "ent_coef": 0.2, "total_timesteps": 32}
    rnd_ppo.train(Args(**flags, run_dir=str(tmp_path / "run")))
    assert losses
    for loss, want in losses:
        assert loss == pytest.approx(want, rel=1e-5)


def test_ctrl_c_before_the_first_step_saves(tmp_path, monkeypatch):
    update = rnd_ppo.RunningNorm.update
    monkeypatch.setattr(
        rnd_ppo.RunningNorm, "update", lambda *batch: signal.raise_signal(signal.SIGINT) or update(*batch)
    )
    with pytest.raises(SystemExit) as stopped:
        rnd_ppo.train(Args(**SMALL, run_dir=str(tmp_path / "run")))
    assert stopped.value.code == 130 and checkpoint(tmp_path / "run")["global_step"] == 0


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_what_training_moves_and_what_it_leaves(tmp_path):
    rnd_ppo.train(Args(**SMALL, run_dir=str(tmp_path / "run")))
    trained, args = checkpoint(tmp_path / "run")["agent"], Args(**SMALL)
    torch.manual_seed(args.seed)
    fresh = Agent((2, 2), 2, True, True).state_dict()
    for name in fresh:
        assert torch.equal(trained[name], fresh[name]) == name.startswith("target."), name
    # Elements, not batches: 4 random steps and 16 of training in 4 environments.
    assert trained["norm_obs.count"] == 4 * 4 + 64 and trained["norm_past.count"] == 64


def test_no_curiosity_is_plain_ppo(tmp_path):
    rnd_ppo.train(Args(**SMALL, int_coef=0.0, run_dir=str(tmp_path / "run")))
    trained = checkpoint(tmp_path / "run")["agent"]
    torch.manual_seed(1)
    fresh = Agent((2, 2), 2, True, True).state_dict()
    for name in fresh:
        untouched = name.startswith(("target.", "predictor.", "norm_past."))
        assert torch.equal(trained[name], fresh[name]) == untouched or name == "critic.5.weight", name
    assert torch.equal(trained["critic.5.weight"][1], fresh["critic.5.weight"][1])  # the intrinsic value
    assert not torch.equal(trained["critic.5.weight"][0], fresh["critic.5.weight"][0])


def test_resume_restores_the_statistics(tmp_path):
    run = str(tmp_path / "run")
    rnd_ppo.train(Args(**SMALL, run_dir=run))
    before = checkpoint(tmp_path / "run")
    spied = Spy(discounted_past)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rnd_ppo, "discounted_past", spied)
        rnd_ppo.train(Args(**SMALL | {"total_timesteps": 96}, resume=run))
    after = checkpoint(tmp_path / "run")
    np.testing.assert_allclose(spied.calls[0][1], before["carry"], rtol=1e-6)
    assert max(before["carry"]) > 0 and after["carry"] != before["carry"]
    # The random steps beforehand are not taken again.
    assert after["agent"]["norm_obs.count"] == before["agent"]["norm_obs.count"] + 32
    assert after["agent"]["norm_past.count"] == before["agent"]["norm_past.count"] + 32


@pytest.mark.parametrize(
    "switch",
    [
        {"ortho_init": False},
        {"anneal_lr": False},
        {"norm_adv": False},
        {"norm_obs": False},
        {"max_grad_norm": 0.0},
        {"predictor_share": 1.0},
        {"clip_rewards": True},
        {"ext_coef": 1.0},
        {"int_coef": 0.5},
        {"int_gamma": 0.5},
        {"ent_coef": 0.0},
        {"init_steps": 9},
        {"memory": 0.5},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_every_switch_is_read(switch, tmp_path):
    weights = []
    for name, changed in (("with", {}), ("without", switch)):
        rnd_ppo.train(Args(**SMALL | changed, run_dir=str(tmp_path / name)))
        weights.append(checkpoint(tmp_path / name)["agent"]["actor.1.weight"])
    assert not torch.equal(*weights)


def test_evaluation_samples_and_repeats(tmp_path):
    args = Args(**SMALL, run_dir=str(tmp_path / "run"))
    rnd_ppo.train(args)
    envs, device = rnd_ppo.make_envs(args, 3), torch.device("cpu")
    obs = np.zeros((300, 2, 2), dtype=np.float32)
    policy, _ = rnd_ppo.load_policy(args, envs, tmp_path / "run", device)
    actions = policy(obs)
    assert 0 < actions.mean() < 1 and not np.array_equal(actions, policy(obs))
    policy, _ = rnd_ppo.load_policy(args, envs, tmp_path / "run", device)
    np.testing.assert_array_equal(actions, policy(obs))


class Cells(counter_env.CounterEnv):
    """Walks on by one of five cells a step; the next episode starts where the last one ended."""

    def reset(self, **kwargs):
        obs, _ = super().reset(**kwargs)
        return obs, {"cell": 2 * self.episode % 5}

    def step(self, action):
        *others, _ = super().step(action)
        return *others, {"cell": (2 * self.episode + self.step_count) % 5}


gym.register("Cells-v0", entry_point=Cells)


def test_each_episode_counts_its_own_cells(tmp_path, monkeypatch):
    scalars = []
    monkeypatch.setattr(gym.vector.SyncVectorEnv, "NUM_CELLS", 5, raising=False)
    monkeypatch.setattr(rnd_ppo.SummaryWriter, "add_scalar", lambda self, *point: scalars.append(point))
    own = {"env_id": "Cells-v0", "num_steps": 3, "total_timesteps": 36}
    rnd_ppo.train(Args(**SMALL | own, run_dir=str(tmp_path / "run")))
    # Steps 1 and 2 of three; from then on also the first cell after the reset.
    assert [round(y, 3) for tag, y, _ in scalars if tag == "charts/share_of_cells"] == [0.4, 0.6, 0.6]


def test_pyramids_counts_cells(tmp_path, monkeypatch):
    """The share of squares an episode has seen: 1,000 decisions of a fresh policy see a few of the 81."""
    scalars = []
    monkeypatch.setattr(rnd_ppo.SummaryWriter, "add_scalar", lambda self, *point: scalars.append(point))
    monkeypatch.setattr(rnd_ppo, "MAX_EVAL_STEPS", 9)
    own = {"env_id": "envs.pyramids:Pyramids-v0", "num_steps": 1008, "total_timesteps": 4032}
    rnd_ppo.train(Args(**SMALL | own, run_dir=str(tmp_path / "run")))
    (share,) = [value for tag, value, _ in scalars if tag == "charts/share_of_cells"]
    assert 2 / 81 < share < 0.7


def test_minigrid_and_atari_run(tmp_path, monkeypatch):
    monkeypatch.setattr(rnd_ppo, "MAX_EVAL_STEPS", 9)
    for name, env_id in (("grid", "MiniGrid-DoorKey-8x8-v0"), ("atari", "ALE/MontezumaRevenge-v5")):
        args = Args(**SMALL | {"env_id": env_id}, capture_video=name == "atari", run_dir=str(tmp_path / name))
        rnd_ppo.train(args)
        stats = checkpoint(tmp_path / name)["agent"]
        shape = (1, 147) if name == "grid" else (1, 84, 84)
        assert stats["norm_obs.mean"].shape == shape and stats["norm_obs.count"] == 16 + 64
    assert (tmp_path / "atari" / "replay.mp4").stat().st_size > 1000
    assert not torch.equal(stats["actor.0.weight"], torch.zeros(()))


def test_atari_episodes_end_as_the_others_do():
    """final_obs of an Atari batch is an array without a mask; the adapter's seeds must not be too large."""
    envs = rnd_ppo.make_envs(Args(env_id="ALE/MontezumaRevenge-v5"), 2, "rgb_array")
    assert envs.reset(seed=[2**32 - 1, 5])[0].shape == (2, 4, 84, 84)
    assert envs.render()[0].shape == (210, 160, 3)
    assert envs.unwrapped.spec.kwargs["max_num_frames_per_episode"] == 18_000
    assert not envs.unwrapped.spec.kwargs["reward_clipping"]
    envs.close()


@pytest.mark.parametrize(
    ("env_id", "answer"),
    [
        ("Pyramid-v0", "nearest known names"),
        ("FrozenLake-v1", "q_learning.py"),
        ("Pendulum-v1", "a2c_continuous.py"),
        ("Tuple-v0", "q_learning.py"),
        ("Dict-v0", "no script"),
        ("MiniGrid-DoorKey-9x9-v0", "MiniGrid-DoorKey-8x8-v0"),
    ],
)
def test_environments_of_other_kinds(env_id, answer, capsys):
    with pytest.raises(SystemExit) as stopped:
        rnd_ppo.make_envs(Args(env_id=env_id), 1)
    assert stopped.value.code == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", [{"predictor_share": 0.0}, {"predictor_share": 1.5}, {"init_steps": 0}, {"memory": 1.0}]
)
def test_bad_numbers(bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        rnd_ppo.train(Args(**SMALL | bad, run_dir=str(tmp_path / "run")))
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.count("\n") == 1
