"""A2C: the statistics, the noise, the optimizer, what is stored, what is clipped, and learning."""

import json
import math
import subprocess
import sys
from pathlib import Path

import a2c_continuous as a2c
import gymnasium as gym
import numpy as np
import pytest
import torch
from a2c_continuous import Agent, Args, Noise, RMSprop, RunningNorm
from counter_env import CounterEnv

SCRIPT = Path(a2c.__file__)


class CounterBox(CounterEnv):
    """The Counter with two continuous actions of unequal bounds; keeps those it is given."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 400], np.float32))
        self.given = []

    def step(self, action):
        self.given.append(np.array(action))
        return super().step(action)


class Aim(gym.Env):
    """Shows a target, far from 0 and from scale 1, and pays minus the distance of the action from it.

    Episodes are cut after 8 steps. Blind to the target, the best choice is the middle: −10 an episode.
    """

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gym.spaces.Box(0, 5, (1,), np.float32)

    def show(self):
        self.target = self.np_random.uniform(0, 5)
        return np.array([1000 + 100 * self.target], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.show(), {}

    def step(self, action):
        reward, self.steps = -abs(float(action[0]) - self.target), self.steps + 1
        return self.show(), reward, False, self.steps == 8, {}


class Boundless(Aim):
    """An action without bounds."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


gym.register("Aim-v0", entry_point=Aim)
gym.register("Boundless-v0", entry_point=Boundless)
for ending in ("terminated", "truncated", "both", "neither"):
    gym.register(f"CounterBox-{ending}-v0", entry_point=CounterBox, kwargs={"ending": ending})


class Spy:
    """Calls the original and keeps a copy of what it was called with."""

    def __init__(self, original) -> None:
        self.original, self.calls = original, []

    def __call__(self, *args):
        copies = {np.ndarray: np.copy, torch.Tensor: lambda x: x.detach().clone()}
        self.calls.append([copies.get(type(x), lambda x: x)(x) for x in args])
        return self.original(*args)


def make_args(folder: Path, **changes) -> Args:
    small = {"env_id": "Aim-v0", "num_envs": 3, "num_steps": 5, "total_timesteps": 300, "eval_episodes": 2}
    return Args(**{**small, **changes}, run_dir=str(folder))


def test_running_statistics_are_those_of_all_numbers_at_once():
    rng = np.random.default_rng(0)
    batches = [rng.normal(1e4, 3, size=(size, 3)) * [1, 0.01, 0] for size in (1, 7, 2, 50, 1)]
    norm = RunningNorm(3, limit=10.0)
    for batch in batches:
        norm.update(torch.from_numpy(batch))
    everything = np.concatenate(batches)
    np.testing.assert_allclose(norm.mean.numpy(), everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(norm.var.numpy(), everything.var(0), rtol=1e-9, atol=1e-12)
    assert norm.count == 61
    x = everything[:4].astype(np.float32)
    want = (x - everything.mean(0)) / np.sqrt(everything.var(0) + 1e-8)
    np.testing.assert_allclose(norm(torch.from_numpy(x))[:, :2].numpy(), want[:, :2], atol=2e-3)
    assert norm(torch.tensor([[2e4, -2e4, 0.0]])).tolist() == [[10, -10, 0]]  # outliers; a constant is 0


def test_gaussian_log_prob_and_entropy_are_those_of_torch():
    means, actions, stds = torch.randn(6, 3), torch.randn(6, 3) * 4, torch.rand(6, 3) + 0.1
    normal = torch.distributions.MultivariateNormal(means, scale_tril=torch.diag_embed(stds))
    torch.testing.assert_close(a2c.gaussian_log_prob(actions, means, stds), normal.log_prob(actions))
    torch.testing.assert_close(a2c.gaussian_entropy(stds), normal.entropy().mean())


def test_losses_by_hand():
    log_probs, advantages = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([2.0, -1.0, 0.5])
    assert a2c.policy_loss(log_probs, advantages).item() == pytest.approx((2 - 2 + 1.5) / 3)
    assert a2c.value_loss(log_probs, advantages).item() == pytest.approx((9 + 1 + 3.5**2) / 3)


def test_the_loss_is_the_sum_of_its_parts(tmp_path, monkeypatch):
    """Equation (9), and each value beside its own return: (B, 1) against (B,) would compare all pairs."""
    parts = []
    for name in ("policy_loss", "value_loss", "gaussian_entropy"):
        original = getattr(a2c, name)

        def spy(*tensors, original=original, name=name):
            assert len({tensor.shape for tensor in tensors}) == 1 and (
                tensors[0].shape == (15,) or name == "gaussian_entropy"
            )
            parts.append((name, original(*tensors)))
            return parts[-1][1]

        monkeypatch.setattr(a2c, name, spy)
    backward, losses = torch.Tensor.backward, []
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: losses.append(self.item()) or backward(self))
    a2c.train(make_args(tmp_path / "run", total_timesteps=15, vf_coef=0.3, ent_coef=0.2))
    found = dict(parts)
    want = found["policy_loss"] + 0.3 * found["value_loss"] - 0.2 * found["gaussian_entropy"]
    assert losses == [pytest.approx(want.item(), rel=1e-5)]


def test_plain_noise_has_one_deviation_everywhere():
    noise = Noise(5, 2, -1.0, use_sde=False)
    noise.log_std.data = torch.tensor([[-1.0, 0.5]])
    torch.testing.assert_close(noise.std(torch.randn(7, 5)), noise.log_std.exp().expand(7, 2))
    torch.manual_seed(0)
    samples = noise.sample(np.zeros((20_000, 5), np.float32))
    np.testing.assert_allclose(samples.std(0), np.exp([-1.0, 0.5]), rtol=0.03)
    assert abs(np.corrcoef(samples.T)[0, 1]) < 0.03
    assert not np.array_equal(noise.sample(np.ones((3, 5))), noise.sample(np.ones((3, 5))))


def test_state_dependent_noise_has_the_distribution_that_is_claimed():
    """Against the covariance of W, flattened to one vector of F·A independent numbers, under n = M(φ) W."""
    torch.manual_seed(0)
    F, A, B = 4, 3, 6
    noise = Noise(F, A, 0.0, use_sde=True)
    noise.log_std.data = torch.randn(F, A) * 0.5
    features, means, actions = torch.randn(B, F), torch.randn(B, A), torch.randn(B, A)
    maps = torch.stack([torch.kron(row[None], torch.eye(A)) for row in features])  # (B, A, F*A)
    covariance = maps @ torch.diag((2 * noise.log_std.detach()).exp().flatten()) @ maps.mT + 1e-6 * torch.eye(
        A
    )
    want = torch.distributions.MultivariateNormal(means, covariance)
    got = a2c.gaussian_log_prob(actions, means, noise.std(features))
    torch.testing.assert_close(got, want.log_prob(actions), rtol=1e-4, atol=1e-4)
    # And the noise that is really drawn has that covariance.
    phi = features[:1].expand(40_000, F).numpy()
    noise.draw(40_000)
    np.testing.assert_allclose(
        np.cov(noise.sample(phi).T), covariance[0], atol=0.04 * covariance[0].max().item()
    )


def test_noise_is_held_for_a_rollout_and_new_after_it():
    noise = Noise(4, 2, 0.0, use_sde=True)
    phi, psi = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    noise.draw(3)
    first = noise.sample(phi)
    np.testing.assert_array_equal(noise.sample(phi), first)
    np.testing.assert_allclose(noise.sample(phi + psi), first + noise.sample(psi), rtol=1e-5)  # linear in φ
    assert not np.allclose(*noise.sample(np.stack([phi[0]] * 3))[:2])  # each environment has its own
    noise.draw(3)
    assert not np.allclose(noise.sample(phi), first)


def test_noise_does_not_train_the_features():
    noise = Noise(4, 2, 0.0, use_sde=True)
    features = torch.randn(3, 4, requires_grad=True)
    noise.std(features).sum().backward()
    assert features.grad is None and noise.log_std.grad.abs().min() > 0


@pytest.mark.parametrize("use_sde", [True, False])
def test_training_draws_once_a_rollout(use_sde, tmp_path, monkeypatch):
    """With gSDE one W serves the T steps of a rollout."""
    drawn, used = [], []
    draw, sample = Noise.draw, Noise.sample

    def spy_draw(self, num_envs):
        draw(self, num_envs)
        drawn.append(self.W.copy())

    def spy_sample(self, features):
        noise = sample(self, features)
        used.append(self.W.copy())
        return noise

    monkeypatch.setattr(Noise, "draw", spy_draw)
    monkeypatch.setattr(Noise, "sample", spy_sample)
    a2c.train(make_args(tmp_path / "run", total_timesteps=45, use_sde=use_sde))
    assert len(used) == 3 * 5
    matrices = [used[i] for i in range(0, 15, 5)]
    assert not np.array_equal(matrices[0], matrices[1]) and not np.array_equal(matrices[1], matrices[2])
    for i, matrix in enumerate(used):
        assert np.array_equal(matrix, matrices[i // 5]) == (use_sde or i % 5 == 0)


def test_rmsprop_by_the_written_out_formula():
    vector = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = RMSprop([vector], lr=0.5)
    theta, v = [1.0, -2.0, 3.0], [1.0, 1.0, 1.0]
    for step, lr in enumerate((0.5, 0.1, 0.1)):
        grads = [0.3 * (step + 1), 1e-6, -20.0]
        vector.grad = torch.tensor(grads)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for i, g in enumerate(grads):
            v[i] = 0.99 * v[i] + 0.01 * g * g
            theta[i] -= lr * g / math.sqrt(v[i] + 1e-5)
    torch.testing.assert_close(vector.detach(), torch.tensor(theta))


def test_where_epsilon_stands_decides_what_a_tiny_gradient_does():
    """What the docstring claims: inside the root far less than η, outside nearly η."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer, outside = RMSprop([ours], lr=1.0), torch.optim.RMSprop([theirs], lr=1.0, eps=1e-5)
    optimizer.v.fill_(0)
    for _ in range(2000):
        for parameter, stepper in ((ours, optimizer), (theirs, outside)):
            parameter.grad = torch.full((1,), 1e-4)
            before = parameter.item()
            stepper.step()
            moved = before - parameter.item()
            if parameter is ours:
                inside_moved = moved
    assert inside_moved == pytest.approx(0.0316, rel=0.01) and moved == pytest.approx(0.909, rel=0.01)


def test_one_vector_holds_the_parameters():
    agent = Agent(3, 2, Args())
    before = {name: parameter.detach().clone() for name, parameter in agent.named_parameters()}
    vector = a2c.one_vector(agent)
    assert all(torch.equal(parameter, before[name]) for name, parameter in agent.named_parameters())
    for _ in range(2):  # the second pass must find the same gradients again, not twice as many
        vector.grad.zero_()
        (agent.critic(torch.ones(4, 3)).sum() + agent.mean(agent.features(torch.ones(4, 3))).sum()).backward()
    assert vector.grad.norm().item() == pytest.approx(
        math.sqrt(sum(p.grad.square().sum().item() for p in agent.parameters()))
    )
    assert agent.critic[0].weight.grad.abs().sum() > 0
    agent.load_state_dict(Agent(3, 2, Args()).state_dict())  # as --resume does
    with torch.no_grad():
        vector.fill_(0.5)
    assert all((parameter == 0.5).all() for parameter in agent.parameters())


def test_the_numpy_policy_is_the_networks_and_follows_them():
    agent = Agent(3, 2, Args())
    agent.norm_obs.update(torch.randn(50, 3) * 7 + 5)
    policy, obs = agent.in_numpy(), torch.randn(4, 3) * 20
    for _ in range(2):
        features, means = policy(obs.numpy())
        want = agent.features(agent.norm_obs(obs))
        np.testing.assert_allclose(features, want.detach(), atol=1e-6)
        np.testing.assert_allclose(means, agent.mean(want).detach(), atol=1e-6)
        for parameter in agent.parameters():
            parameter.data.mul_(1.5)
        agent.norm_obs.update(torch.randn(50, 3))


def test_to_env_reaches_the_bounds_and_no_further():
    space = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 400], np.float32))
    actions = np.array([[-1, -1], [0, 0.5], [1, 1], [-7, 7]], np.float32)
    np.testing.assert_array_equal(a2c.to_env(actions, space), [[-2, 0], [0, 300], [2, 400], [-2, 400]])


def test_discounted_sums_by_hand():
    rewards, ended = (
        np.array([[1.0, 2], [10, 20], [100, 200]]),
        np.array([[False, True], [False] * 2, [True, False]]),
    )
    sums, after = a2c.discounted_sums(rewards, ended, np.array([4.0, 6.0]), 0.5)
    np.testing.assert_array_equal(sums, [[3, 5], [11.5, 20], [105.75, 210]])
    np.testing.assert_array_equal(after, [0, 210])


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "neither"])
def test_what_is_stored_when_episodes_end(ending, tmp_path, monkeypatch):
    """Two environments, episodes of 3 steps, rollouts of 4; the critic is made to say 10·episode + step."""
    spy, scalars, make_agent = Spy(a2c.gae), [], a2c.make_agent
    monkeypatch.setattr(a2c, "gae", spy)
    monkeypatch.setattr(a2c.SummaryWriter, "add_scalar", lambda self, *point: scalars.append(point))
    monkeypatch.setattr(a2c, "MAX_EVAL_STEPS", 9)

    class Critic(torch.nn.Linear):
        def forward(self, obs):
            return 10 * obs[..., :1] + obs[..., 1:] + 0 * super().forward(obs)

    def agent_with_known_values(*arguments):
        agent = make_agent(*arguments)
        agent.critic = Critic(2, 1)
        return agent

    monkeypatch.setattr(a2c, "make_agent", agent_with_known_values)
    size = {"num_envs": 2, "num_steps": 4, "total_timesteps": 16, "norm_obs": False}
    args = make_args(tmp_path / "run", env_id=f"CounterBox-{ending}-v0", **size, norm_reward=False)
    a2c.train(args)
    rewards, values, next_values, terminated, truncated, gamma, gae_lambda = spy.calls[0]
    both = lambda column: np.repeat(np.array(column)[:, None], 2, axis=1)  # noqa: E731
    assert (gamma, gae_lambda) == (args.gamma, args.gae_lambda)
    points = {(tag, step): value for tag, value, step in scalars}
    if ending == "neither":
        np.testing.assert_array_equal(rewards, both([1, 2, 3, 4]))
        np.testing.assert_array_equal(next_values, both([1, 2, 3, 4]))
        assert not terminated.any() and not truncated.any()
        assert not [tag for tag, _ in points if tag == "charts/episodic_return"]
        return
    np.testing.assert_array_equal(rewards, both([1, 2, 3, 1]))
    np.testing.assert_array_equal(values, both([0, 1, 2, 10]))  # step 3 starts the next episode
    np.testing.assert_array_equal(next_values, both([1, 2, 3, 11]))  # step 2 led to [0, 3], not to the reset
    np.testing.assert_array_equal(terminated, both([False, False, ending in ("terminated", "both"), False]))
    np.testing.assert_array_equal(truncated, both([False, False, ending in ("truncated", "both"), False]))
    assert points["charts/episodic_return", 16] == 6 and points["charts/episodic_length", 16] == 3


def test_rewards_are_scaled_for_the_learner_and_returns_are_true(tmp_path, monkeypatch):
    spy, scalars = Spy(a2c.gae), []
    monkeypatch.setattr(a2c, "gae", spy)
    monkeypatch.setattr(a2c.SummaryWriter, "add_scalar", lambda self, *point: scalars.append(point))
    size = {"num_envs": 2, "num_steps": 4, "total_timesteps": 16, "gamma": 0.5}
    results = a2c.train(make_args(tmp_path / "run", env_id="CounterBox-terminated-v0", **size))
    # The sums of an episode are 1, 2.5 and 4.25; the first two rollouts are 1 2 3 1 and 2 3 1 2.
    sums = [[1, 2.5, 4.25, 1], [2.5, 4.25, 1, 2.5]]
    for call, seen, rewards in zip(
        spy.calls, (sums[0], sums[0] + sums[1]), ([1, 2, 3, 1], [2, 3, 1, 2]), strict=True
    ):
        np.testing.assert_allclose(call[0][:, 0], np.array(rewards) / np.std(seen), rtol=1e-5)
    assert {value for tag, value, _ in scalars if tag == "charts/episodic_return"} == {6}
    assert results["mean_reward"] == 6


def test_both_observations_are_normalised_as_the_policy_saw_them(tmp_path, monkeypatch):
    """Statistics that move within a rollout would show the critic other numbers than the actor."""
    inputs, acted, make_agent = [], [], a2c.make_agent

    def watched(*arguments):
        agent = make_agent(*arguments)
        agent.critic.register_forward_pre_hook(lambda _, x: inputs.append(x[0].clone()))
        policy, norm = agent.in_numpy(), agent.norm_obs
        arrays = lambda obs: (obs.copy(), norm.shift.numpy().copy(), norm.scale.numpy().copy())  # noqa: E731
        agent.in_numpy = lambda: lambda obs: acted.append(arrays(obs)) or policy(obs)
        return agent

    monkeypatch.setattr(a2c, "make_agent", watched)
    a2c.train(make_args(tmp_path / "run", num_steps=8, total_timesteps=72))  # episodes end with the rollouts
    rollouts = [acted[start : start + 8] for start in (0, 8, 16)]  # evaluation acts later
    assert len(inputs) == 3
    for critic_input, rollout in list(zip(inputs, rollouts, strict=True))[1:]:
        want = np.stack([((obs - shift) * scale).clip(-10, 10) for obs, shift, scale in rollout])  # (T, N, D)
        np.testing.assert_allclose(critic_input[0].reshape(want.shape), want, atol=1e-4)
        np.testing.assert_allclose(critic_input[1].reshape(want.shape)[:-1], want[1:], atol=1e-4)
        assert np.abs(critic_input[1].numpy()).max() < 10  # raw values are 1000 and more
        assert all(np.array_equal(rollout[0][1], shift) for _, shift, _ in rollout)
    assert not np.array_equal(rollouts[1][0][1], rollouts[2][0][1])
    seen = np.concatenate([obs for obs, _, _ in acted[:24]])  # each observation counts once
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    np.testing.assert_allclose(weights["norm_obs.mean"], seen.mean(0, dtype=float), rtol=1e-9)


def test_the_sampled_action_is_learned_from_and_the_clipped_one_is_played(tmp_path, monkeypatch):
    spy = Spy(a2c.gaussian_log_prob)
    monkeypatch.setattr(a2c, "gaussian_log_prob", spy)
    made, make_envs = [], a2c.make_envs
    monkeypatch.setattr(a2c, "make_envs", lambda *arguments: made.append(make_envs(*arguments)) or made[-1])
    size = {"num_envs": 2, "num_steps": 4, "total_timesteps": 8, "log_std_init": 2.0, "use_sde": False}
    a2c.train(make_args(tmp_path / "run", env_id="CounterBox-terminated-v0", **size))
    learned = spy.calls[0][0].reshape(4, 2, 2)  # (T, N, A)
    given = np.stack([env.unwrapped.given for env in made[0].unwrapped.envs], axis=1)
    assert (learned.abs() > 1).float().mean() > 0.5
    np.testing.assert_array_equal(given, a2c.to_env(learned.numpy(), made[0].single_action_space))
    assert given[..., 0].min() == -2 and given[..., 1].max() == 400


def test_the_probability_is_that_of_the_policy_that_acted(tmp_path, monkeypatch):
    """(a − μ) / σ is standard normal only if actions, means and deviations belong together."""
    spy = Spy(a2c.gaussian_log_prob)
    monkeypatch.setattr(a2c, "gaussian_log_prob", spy)
    a2c.train(make_args(tmp_path / "run", num_envs=16, total_timesteps=8000))
    z = torch.cat([(actions - means) / stds for actions, means, stds in spy.calls])
    assert z.mean().abs() < 0.06 and abs(z.std() - 1) < 0.05


def test_evaluation_is_the_same_in_a_new_process_and_needs_the_statistics(tmp_path, capfd):
    run_dir = tmp_path / "run"
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", "2048", "--eval-episodes", "3"]
    command = [sys.executable, str(SCRIPT), *flags, "--run-dir", str(run_dir)]
    trained = subprocess.run(command, capture_output=True, text=True, check=True)
    command = [sys.executable, str(SCRIPT), "--evaluate", str(run_dir)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == trained.stdout
    before = (run_dir / "checkpoint.pt").read_bytes()
    saved = json.loads((run_dir / "args.json").read_text())
    del saved["versions"]
    args = Args(**saved)
    score = json.loads((run_dir / "results.json").read_text())["mean_reward"]
    assert a2c.evaluate(args, run_dir, torch.device("cpu"))["mean_reward"] == score
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["agent"]["norm_obs.count"] == 2048
    checkpoint["agent"]["norm_obs.shift"].zero_()
    checkpoint["agent"]["norm_obs.scale"].fill_(1)
    a2c.save_checkpoint(run_dir, checkpoint)
    assert a2c.evaluate(args, run_dir, torch.device("cpu"))["mean_reward"] != score


def weights_after(folder: Path, **changes) -> dict:
    a2c.train(make_args(folder, **changes))
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


def test_processes_give_the_same_numbers(tmp_path):
    size = {"env_id": "Pendulum-v1", "num_envs": 2, "total_timesteps": 1000, "eval_episodes": 1}
    sync, processes = (weights_after(tmp_path / m, vectorization=m, **size) for m in ("sync", "async"))
    assert all(torch.equal(sync[name], processes[name]) for name in sync)


SWITCHES = {
    "ortho_init": True,
    "anneal_lr": False,
    "norm_obs": False,
    "norm_reward": False,
    "max_grad_norm": 0.0,
    "use_sde": False,
    "use_rms_prop": False,
    "ent_coef": 0.1,
    "vf_coef": 2.0,
    "gamma": 0.9,
    "gae_lambda": 0.5,
    "learning_rate": 1e-4,
    "log_std_init": -1.0,
}


def test_every_switch_changes_the_learning(tmp_path):
    """A flag that is read but has no effect would leave the weights as they are without it."""
    usual = weights_after(tmp_path / "usual")
    for name, value in SWITCHES.items():
        other = weights_after(tmp_path / name, **{name: value})
        assert any(
            not torch.equal(usual[key], other.get(key, usual[key])) for key in usual if "norm" not in key
        ), name


def test_without_normalisation_the_network_sees_the_observations(tmp_path):
    weights = weights_after(tmp_path / "run", norm_obs=False)
    assert weights["norm_obs.shift"].tolist() == [0] and weights["norm_obs.scale"].tolist() == [1]
    agent = Agent(1, 1, Args(norm_obs=False))
    assert agent.norm_obs(torch.tensor([[1234.5]])).item() == 1234.5


def test_the_gradient_is_cut_to_its_longest(tmp_path, monkeypatch):
    norms, step = [], RMSprop.step
    monkeypatch.setattr(
        RMSprop, "step", lambda self: norms.append(self.vector.grad.norm().item()) or step(self)
    )
    a2c.train(make_args(tmp_path / "run", max_grad_norm=0.01))
    assert max(norms) == pytest.approx(0.01, rel=1e-4)


def test_gradients_do_not_pile_up(tmp_path, monkeypatch):
    """A rollout whose advantages are all 0 has no gradient, whatever the one before it had."""
    norms, step, calls = [], RMSprop.step, []
    monkeypatch.setattr(
        RMSprop, "step", lambda self: norms.append(self.vector.grad.norm().item()) or step(self)
    )
    monkeypatch.setattr(a2c, "gae", lambda rewards, *_: calls.append(0) or 0 * rewards + (len(calls) == 1))
    a2c.train(make_args(tmp_path / "run", total_timesteps=30, vf_coef=0))
    assert norms[0] > 0 and norms[1] == 0


def test_every_parameter_learns(tmp_path):
    """The critic too: were its targets not cut from its values, its loss would have no gradient."""
    trained = weights_after(tmp_path / "run")
    torch.manual_seed(1)
    for name, fresh in Agent(1, 1, Args()).named_parameters():
        assert not torch.equal(trained[name], fresh), name


def test_spaces_and_packages_that_do_not_serve(tmp_path, capfd, monkeypatch):
    for env_id, words in {
        "CartPole-v1": "ppo.py",
        "Boundless-v0": "finite bounds",
        "no_such_module:Thing-v0": "no_such_module",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            a2c.train(make_args(tmp_path / "run", env_id=env_id))
        assert words in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "pybullet_envs_gymnasium", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="2"):
        a2c.train(make_args(tmp_path / "run", env_id="AntBulletEnv-v0"))
    assert "pip install pybullet_envs_gymnasium" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("use_sde", [True, False])
def test_learns_to_aim(use_sde, tmp_path):
    """Only an eye for the target gets above −10."""
    size = {"num_envs": 4, "num_steps": 8, "total_timesteps": 40_000, "eval_episodes": 20}
    results = a2c.train(make_args(tmp_path / "run", **size, use_sde=use_sde, gamma=0.5))
    assert results["mean_reward"] > -4
