"""REINFORCE: returns, baselines and gradients by hand, what lies beyond an episode's end, and learning."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import counter_env  # noqa: F401 (registers the Counter environments)
import gymnasium as gym
import numpy as np
import pytest
import reinforce
import torch
from reinforce import Args, RunningNorm, in_a_row, mean_of_others, returns_to_go
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_returns_by_hand_with_unequal_lengths():
    # Three episodes of 3, 1 and 2 steps; the 9s belong to later episodes. γ = 0.5.
    rewards = np.array([[1.0, 5.0, 0.0], [2.0, 9.0, 4.0], [4.0, 9.0, 9.0]])
    playing = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 0]], dtype=bool)
    want = np.array([[3.0, 5.0, 2.0], [4.0, 0.0, 4.0], [4.0, 0.0, 0.0]])
    np.testing.assert_array_equal(returns_to_go(rewards, playing, np.zeros(3), 0.5) * playing, want)
    # Worth 8 after the last step of the second and third episode: 5 + 4 and 4 + 4, then 0 + 0.5 * 8.
    want[:, 1:] = [[9.0, 4.0], [0.0, 8.0], [0.0, 0.0]]
    np.testing.assert_array_equal(returns_to_go(rewards, playing, np.array([0, 8, 8]), 0.5) * playing, want)


def test_restarted_credit_by_hand():
    # A lost and a won point, then play without a result. γ = 0.5.
    rewards = np.array([[0.0], [-1.0], [0.0], [0.0], [1.0], [0.0]])
    playing = np.ones((6, 1), dtype=bool)
    got = returns_to_go(rewards, playing, np.array([4.0]), 0.5, restart=True)
    np.testing.assert_array_equal(got[:, 0], [-0.5, -1.0, 0.25, 0.5, 1.0, 2.0])
    got = returns_to_go(rewards, playing, np.array([4.0]), 0.5)
    np.testing.assert_array_equal(got[4:, 0], [2.0, 2.0])


def test_returns_do_not_change_what_they_are_given():
    rewards, last_values = np.ones((3, 2)), np.ones(2)
    playing = np.array([[1, 1], [1, 0], [1, 0]], dtype=bool)
    returns_to_go(rewards, playing, last_values, 0.9, restart=True)
    assert (rewards == 1).all() and (last_values == 1).all() and playing.sum() == 4


def test_mean_of_others_by_hand():
    returns = np.array([[1.0, 2.0, 6.0], [3.0, 100.0, 5.0], [7.0, 100.0, 100.0]])
    playing = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 0]], dtype=bool)
    want = np.array([[4.0, 3.5, 1.5], [5.0, np.nan, 3.0], [0.0, np.nan, np.nan]])
    np.testing.assert_array_equal(mean_of_others(returns, playing)[playing], want[playing])


def test_in_a_row_puts_one_episode_after_the_other_and_drops_the_rest():
    T, N, D = 4, 3, 2
    x = np.arange(T * N * D).reshape(T, N, D)
    lengths = [2, 4, 1]
    playing = np.arange(T)[:, None] < lengths
    pieces = in_a_row(x, playing).split(lengths)
    for n, piece in enumerate(pieces):
        np.testing.assert_array_equal(piece, x[: lengths[n], n])


def test_merged_statistics_are_those_of_all_rows():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal([1.0, -50.0, 3.0], [0.1, 20.0, 4.0], (101, 3)))
    stats = RunningNorm(3, limit=5.0)
    for batch in rows.split([1, 70, 30]):
        stats.update(batch)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.var, rows.var(0, correction=0), rtol=1e-5)
    assert stats.count == 101


# A tiny world whose every episode can be listed: at first, action 1 ends it with 3, action 0 pays 1 and leads
# on; then action 1 pays 2, action 0 costs 1. So an episode is (1,), (0, 0) or (0, 1).
EPISODES = {(1,): [3.0], (0, 0): [1.0, -1.0], (0, 1): [1.0, 2.0]}


def episode_terms(logits, actions):
    """The gradients of ln π(a_t|s_t) for each step of an episode, (T, 2, 2), by the formula 1[a] − π."""
    terms = np.zeros((2, 2, 2))
    for t, action in enumerate(actions):
        terms[t, t] = np.eye(2)[action] - np.exp(logits[t]) / np.exp(logits[t]).sum()
    return terms


@pytest.mark.parametrize("to_go", [True, False])
def test_no_baseline_changes_the_expected_gradient_exactly(to_go):
    """All triples of episodes, weighted by their probability, against the gradient of J itself."""
    logits = np.array([[0.3, -0.2], [-0.5, 0.4]])
    weights = torch.tensor(logits, requires_grad=True)
    log_pi = weights.log_softmax(-1)
    log_p = {e: sum(log_pi[t, a] for t, a in enumerate(e)) for e in EPISODES}
    sum(log_p[e].exp() * sum(EPISODES[e]) for e in EPISODES).backward()
    exact = weights.grad.numpy()

    N, means, variances = 3, {}, {}
    for baseline in ("none", "batch", "value"):
        mean, square = 0.0, 0.0
        for batch in itertools.product(EPISODES, repeat=N):
            playing = np.array([[t < len(e) for e in batch] for t in range(2)])
            rewards = np.array([[EPISODES[e][t] if t < len(e) else 77.0 for e in batch] for t in range(2)])
            credit = returns_to_go(rewards, playing, np.zeros(N), 1.0)
            if not to_go:
                credit[:] = credit[0]
            if baseline == "batch":
                credit = credit - mean_of_others(credit, playing)
            elif baseline == "value":
                credit = credit - np.array([[2.2], [0.8]])  # any function of the state
            terms = np.stack([episode_terms(logits, e) for e in batch], axis=1)  # (T, N, 2, 2)
            gradient = (credit[:, :, None, None] * terms)[playing].sum(0) / N
            probability = np.exp(sum(log_p[e].item() for e in batch))
            mean = mean + probability * gradient
            square = square + probability * gradient**2
        means[baseline], variances[baseline] = mean, (square - mean**2).sum()
    for mean in means.values():
        np.testing.assert_allclose(mean, exact, rtol=0, atol=1e-12)
    assert variances["value"] < variances["none"] and variances["batch"] < variances["none"]


class Fork(gym.Env):
    """The tiny world above; what comes after the first episode pays 1000 and must never be seen."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, truncates: bool = False, render_mode: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.truncates, self.episodes = truncates, 0

    def observe(self):
        return np.array([1, self.step_count] if self.episodes == 1 else [9, 9], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        # A seed comes with the reset that starts an update; the automatic ones bring none.
        self.episodes = 1 if seed is not None else self.episodes + 1
        self.step_count, self.first = 0, None
        return self.observe(), {}

    def step(self, action):
        self.first = action if self.step_count == 0 else self.first
        played = (1,) if self.first == 1 else (0, action)
        reward = EPISODES[played][self.step_count] if self.step_count or self.first else 1.0
        self.step_count += 1
        end = self.step_count == len(played)
        reward = float(reward) if self.episodes == 1 else 1000.0
        return self.observe(), reward, end and not self.truncates, end and self.truncates, {}


gym.register("Fork-v0", entry_point=Fork)
gym.register("ForkTruncated-v0", entry_point=Fork, kwargs={"truncates": True})
V_WEIGHT, V_BIAS = (0.5, -2.0), 1.0  # V([1, step]) = 1.5 − 2 step


def chart(run_dir, tag):
    accumulator = EventAccumulator(str(run_dir))
    accumulator.Reload()
    return [event.value for event in accumulator.Scalars(tag)]


@pytest.mark.parametrize("env_id", ["Fork-v0", "ForkTruncated-v0"])
@pytest.mark.parametrize(
    "flags",
    [
        {"baseline": "none"},
        {"baseline": "batch"},
        {"baseline": "value"},
        {"baseline": "none", "reward_to_go": False},
        {"baseline": "value", "reward_to_go": False},
        {"baseline": "none", "restart_credit": True, "clip_rewards": True},
        {"baseline": "batch", "normalize_returns": True},
        {"baseline": "none", "entropy_coef": 0.1},
    ],
    ids=lambda flags: " ".join(map(str, flags.items())),
)
def test_the_gradient_of_one_update_by_hand(flags, env_id, tmp_path, monkeypatch):
    """Policy softmax(W s + b) from W = 0.1·[[1, 2], [3, 4]]: every number of the update from plain loops."""
    played, grads = [], []
    make_agent, log_prob = reinforce.make_agent, reinforce.log_prob

    def known_agent(args, envs, device):
        agent = make_agent(args, envs, device)
        agent.load_state_dict(
            agent.state_dict()
            | {"actor.0.weight": 0.1 * torch.tensor([[1.0, 2], [3, 4]]), "actor.0.bias": torch.zeros(2)}
            | ({} if agent.critic is None else {"critic.0.weight": torch.tensor([V_WEIGHT])})
            | ({} if agent.critic is None else {"critic.0.bias": torch.tensor([V_BIAS])})
        )
        return agent

    class Spy(torch.optim.SGD):
        def __init__(self, parameters, lr, fused):
            super().__init__(parameters, lr=0.0)

        def step(self):
            grads.append([p.grad for p in self.param_groups[0]["params"]])

    def spy_log_prob(logits, actions):
        played.append(tuple(actions.tolist()))
        return log_prob(logits, actions)

    monkeypatch.setattr(reinforce, "make_agent", known_agent)
    monkeypatch.setattr(reinforce, "log_prob", spy_log_prob)
    monkeypatch.setattr(torch.optim, "Adam", Spy)
    N, gamma = 5, 0.5
    flags = {"normalize_returns": False, "gamma": gamma} | flags
    run = {"env_id": env_id, "num_envs": N, "total_episodes": N, "eval_episodes": 1, "seed": 2}
    args = Args(hidden_sizes=[], run_dir=str(tmp_path), **run, **flags)
    results = reinforce.train(args)
    assert len(played) == N and {len(e) for e in played} == {1, 2}, "one episode each, of unequal lengths"
    assert results["episodes"] == N and results["global_step"] == sum(map(len, played))
    assert chart(tmp_path, "charts/episodic_return") == pytest.approx(
        [np.mean([sum(EPISODES[e]) for e in played])]
    )

    def value(step):
        return V_WEIGHT[0] + V_WEIGHT[1] * step + V_BIAS

    G, returns_to_go_of = [], []
    for e in played:
        following = value(len(e)) if args.baseline == "value" and "Truncated" in env_id else 0.0
        returns = []
        for reward in reversed(EPISODES[e]):
            reward = np.sign(reward) if args.clip_rewards else reward
            following = reward + (0.0 if args.restart_credit and reward else gamma * following)
            returns.insert(0, following)
        returns_to_go_of.append(returns)
        G.append(returns if args.reward_to_go else [returns[0]] * len(returns))
    A = []
    for i, e in enumerate(played):
        for t in range(len(e)):
            others = [G[j][t] for j in range(N) if j != i and len(played[j]) > t]
            b = {"none": 0.0, "batch": np.mean(others) if others else 0.0, "value": value(t)}[args.baseline]
            A.append(G[i][t] - b)
    if args.normalize_returns:
        A = (np.array(A) - np.mean(A)) / np.std(A)
    W, steps, per_episode, A = 0.1 * np.array([[1, 2], [3, 4]]), sum(map(len, played)), [], list(A)
    for e in played:
        gradient = np.zeros((2, 3))  # of the loss by W and b
        for t, action in enumerate(e):
            s = np.array([1.0, t])
            pi = np.exp(W @ s) / np.exp(W @ s).sum()
            H = -(pi * np.log(pi)).sum()
            by_logits = A.pop(0) * (pi - np.eye(2)[action]) + args.entropy_coef * pi * (np.log(pi) + H)
            gradient += by_logits[:, None] * np.append(s, 1.0)
        per_episode.append(N * gradient / steps)
    got = np.column_stack([grads[0][0].numpy(), grads[0][1].numpy()])
    np.testing.assert_allclose(got, np.mean(per_episode, axis=0), rtol=1e-5, atol=1e-6)
    variance = np.var(per_episode, axis=0, ddof=1).sum() / N
    assert chart(tmp_path, "charts/grad_variance") == pytest.approx([variance], rel=1e-4)
    if args.baseline == "value":
        # The value network's steps, one a minibatch: the policy must have no gradient in them.
        assert len(grads) == 1 + len(torch.zeros(steps).chunk(N)) and all(g is None for g in grads[1][:2])
        errors = [value(t) - x for e in returns_to_go_of for t, x in enumerate(e)]
        sizes = [len(chunk) for chunk in torch.zeros(steps).chunk(N)]
        bias_gradients = [g[3].item() for g in grads[1:]]
        assert np.average(bias_gradients, weights=sizes) == pytest.approx(np.mean(errors), abs=1e-5)


def test_observation_statistics_count_every_step_once_and_nothing_unseen(tmp_path):
    run = {"env_id": "Fork-v0", "num_envs": 4, "total_episodes": 12, "eval_episodes": 1, "hidden_sizes": [8]}
    results = reinforce.train(Args(normalize_obs=True, run_dir=str(tmp_path), **run))
    agent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]
    steps = results["global_step"]
    assert agent["norm_obs.count"] == steps
    # Every episode has one step at [1, 0]; a second one at [1, 1]. What comes later would bring nines.
    share = (steps - 12) / steps
    np.testing.assert_allclose(agent["norm_obs.mean"], [1.0, share], rtol=1e-5)
    np.testing.assert_allclose(agent["norm_obs.var"], [0.0, share * (1 - share)], atol=1e-6)


def test_scaled_observations():
    envs = reinforce.make_envs(Args(), 2)
    agent = reinforce.make_agent(Args(normalize_obs=True), envs, torch.device("cpu"))
    agent.norm_obs.shift.copy_(torch.tensor([1.0, 2, 3, 4]))
    agent.norm_obs.scale.copy_((torch.tensor([4.0, 1, 0.25, 0]) + 1e-8).rsqrt())
    got = agent.scale(np.array([[3.0, 2, 2, 4], [1, 99, 3, 5]]))
    np.testing.assert_allclose(got, [[1, 0, -2, 0], [0, 5, 0, 5]], atol=1e-5)
    plain = reinforce.make_agent(Args(), envs, torch.device("cpu"))
    np.testing.assert_array_equal(plain.scale(np.array([[3.0, 2, 2, 4]])), [[3, 2, 2, 4]])


@pytest.mark.parametrize(
    ("env_id", "native"),
    [("envs.pixelcopter:Pixelcopter-v0", True), ("envs.pong:PongPLE-v0", True), ("CartPole-v1", False)],
)
def test_batched_environments_are_used_where_they_can_reset_in_the_same_step(env_id, native):
    envs = reinforce.make_envs(Args(env_id=env_id), 3)
    assert isinstance(envs.unwrapped, gym.vector.SyncVectorEnv) != native
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    envs.reset(seed=[1, 2, 3])
    for _ in range(600):
        _, _, terminated, truncated, info = envs.step(np.zeros(3, dtype=np.int64))
        if (terminated | truncated).any():
            return
    pytest.fail("no episode ended")


def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path):
    flags = {"anneal_lr": False, "normalize_obs": True, "baseline": "value"} | {
        "eval_episodes": 2,
        "num_envs": 4,
    }
    whole = reinforce.train(Args(total_episodes=48, run_dir=str(tmp_path / "whole"), **flags))
    reinforce.train(Args(total_episodes=24, run_dir=str(tmp_path / "parts"), **flags))
    parts = reinforce.train(Args(total_episodes=48, resume=str(tmp_path / "parts"), **flags))
    assert parts["global_step"] == whole["global_step"] and parts["mean_reward"] == whole["mean_reward"]
    files = [tmp_path / name / "checkpoint.pt" for name in ("whole", "parts")]
    one, other = (torch.load(file, weights_only=True)["agent"] for file in files)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_every_update_plays_new_episodes(tmp_path, monkeypatch):
    seeds, env_seeds = [], reinforce.env_seeds
    monkeypatch.setattr(reinforce, "env_seeds", lambda *key: seeds.append(env_seeds(*key)) or seeds[-1])
    reinforce.train(Args(num_envs=2, total_episodes=8, eval_episodes=1, run_dir=str(tmp_path)))
    assert len(seeds) == 4 + 1 and len(set(itertools.chain(*seeds))) == 4 * 2 + 1  # the last is evaluation


def test_the_learning_rate_falls_to_zero(tmp_path):
    for name, anneal in (("falls", True), ("stays", False)):
        run = {"num_envs": 2, "total_episodes": 8, "eval_episodes": 1, "learning_rate": 0.4}
        reinforce.train(Args(anneal_lr=anneal, run_dir=str(tmp_path / name), **run))
    assert chart(tmp_path / "falls", "charts/learning_rate") == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert chart(tmp_path / "stays", "charts/learning_rate") == pytest.approx([0.4] * 4)


@pytest.mark.parametrize(
    "flags",
    [
        {"num_envs": 1},  # the default baseline compares episodes
        {"restart_credit": True, "reward_to_go": False},
        {"total_episodes": 7},
        {"hidden_sizes": [64, 0]},
    ],
)
def test_flags_that_cannot_work_together(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        reinforce.train(Args(run_dir=str(tmp_path / "run"), **flags))
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_single_environment_learns_from_one_episode_at_a_time(tmp_path):
    run = {"num_envs": 1, "baseline": "none", "total_episodes": 3, "eval_episodes": 1}
    assert reinforce.train(Args(run_dir=str(tmp_path), **run))["episodes"] == 3


def test_an_episode_that_never_ends_can_be_interrupted(tmp_path):
    script = Path(reinforce.__file__)
    command = [sys.executable, script, "--env-id", "counter_env:Counter-neither-v0", "--run-dir", tmp_path]
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=script.parent)
    deadline = time.time() + 60
    while not (tmp_path / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err


def test_cartpole_is_solved_by_the_defaults(tmp_path):
    """A broken return, baseline or mask does not get there in 640 episodes; random play scores 22."""
    results = reinforce.train(Args(run_dir=str(tmp_path)))
    assert results["episodes"] <= 640 and results["score"] >= 475
