"""PPO: the formulas against independent ones, the endings of episodes, and learning."""

import math

import counter_env  # noqa: F401 (registers the Counter environments)
import numpy as np
import ppo
import pytest
import torch
from ppo import Args, gae, policy_loss, value_loss


def gae_by_definition(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """The sum over k of (γλ)^k δ_{t+k} that GAE abbreviates, up to the step that ends the episode."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(T - t):
                u = t + k
                bootstrap = 0.0 if terminated[u, n] else gamma * next_values[u, n]
                advantages[t, n] += (gamma * gae_lambda) ** k * (rewards[u, n] + bootstrap - values[u, n])
                if terminated[u, n] or truncated[u, n]:
                    break
    return advantages


def test_gae_is_the_sum_of_its_definition_across_all_endings():
    T, N = 7, 5
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminated, truncated = np.zeros((2, T, N), dtype=bool)
    terminated[2, 0] = truncated[2, 1] = terminated[4, 2] = truncated[4, 2] = True  # env 3 and 4: neither
    terminated[6, 3] = truncated[0, 4] = truncated[6, 1] = True  # endings at the edges of the rollout
    got = gae(rewards, values, next_values, terminated, truncated, 0.9, 0.7)
    want = gae_by_definition(rewards, values, next_values, terminated, truncated, 0.9, 0.7)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_gae_by_hand():
    # One environment, two steps, γ = 0.5, λ = 0.5. δ_0 = 1 + 0.5·4 − 2 = 1, δ_1 = 3 + 0.5·6 − 4 = 2.
    arguments = [np.array([[x], [y]], dtype=float) for x, y in ((1, 3), (2, 4), (4, 6))]
    no, end = np.zeros((2, 1), dtype=bool), np.array([[False], [True]])
    np.testing.assert_allclose(gae(*arguments, no, no, 0.5, 0.5)[:, 0], [1 + 0.25 * 2, 2])
    np.testing.assert_allclose(gae(*arguments, no, end, 0.5, 0.5)[:, 0], [1 + 0.25 * 2, 2])
    np.testing.assert_allclose(gae(*arguments, end, no, 0.5, 0.5)[:, 0], [1 + 0.25 * -1, -1])
    np.testing.assert_allclose(gae(*arguments, end[::-1], no, 0.5, 0.5)[:, 0], [-1, 2])


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (0.5, 2.0, 1.0, 2.0),  # a good action became rare: the whole gradient
        (1.1, 2.0, 2.2, 2.0),
        (1.5, 2.0, 2.4, 0.0),  # already likelier: enough
        (0.5, -2.0, -1.6, 0.0),  # already rarer: enough
        (0.9, -2.0, -1.8, -2.0),
        (1.5, -2.0, -3.0, -2.0),  # a bad action became likely: the whole gradient
    ],
)
def test_the_six_cases_of_the_clipped_objective(ratio, advantage, objective, slope):
    # Three rows with the same case: the loss is their mean. The slope is with respect to the ratio.
    log_probs = torch.full((3,), math.log(ratio) - 0.7, dtype=torch.float64, requires_grad=True)
    old = torch.full((3,), -0.7, dtype=torch.float64)
    loss = policy_loss(log_probs, old, torch.full((3,), advantage, dtype=torch.float64), 0.2)
    assert loss.item() == pytest.approx(-objective)
    loss.backward()
    assert log_probs.grad.sum().item() == pytest.approx(-slope * ratio)  # d ratio / d log_prob = ratio


def test_value_loss_plain_and_clipped():
    values, old, returns = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 4.5]), torch.tensor([2.0, 2.0])
    assert value_loss(values, old, returns).item() == pytest.approx(0.5 * (1 + 9) / 2)
    # Clipped to 0.2 and 4.7: errors 1.8² and 2.7²; the larger of each pair counts.
    assert value_loss(values, old, returns, 0.2).item() == pytest.approx(0.5 * (1.8**2 + 9) / 2, rel=1e-6)


def test_log_prob_and_entropy_are_those_of_torch():
    logits, actions = torch.randn(6, 4), torch.tensor([0, 3, 2, 2, 1, 0])
    categorical = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(ppo.log_prob(logits, actions), categorical.log_prob(actions))
    torch.testing.assert_close(ppo.entropy(logits), categorical.entropy().mean())


def test_normalize_and_a_single_advantage():
    x = ppo.normalize(torch.tensor([1.0, 2.0, 6.0]))
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert ppo.normalize(torch.tensor([3.0])).tolist() == [0.0]  # not NaN


class Spy:
    """Calls the original and keeps a copy of what it was called with."""

    def __init__(self, original):
        self.original, self.calls = original, []

    def __call__(self, *args):
        self.calls.append([x.copy() if isinstance(x, np.ndarray) else x for x in args])
        return self.original(*args)


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "neither"])
def test_what_is_stored_when_episodes_end(ending, tmp_path, monkeypatch):
    """Two environments, episodes of 3 steps, rollouts of 4; the critic is made to say 10·episode + step."""
    spy = Spy(gae)
    monkeypatch.setattr(ppo, "gae", spy)
    scalars = []
    monkeypatch.setattr(ppo.SummaryWriter, "add_scalar", lambda self, *point: scalars.append(point))

    class Critic(torch.nn.Linear):
        def forward(self, obs):
            return 10 * obs[:, :1] + obs[:, 1:] + 0 * super().forward(obs)

    make_agent = ppo.make_agent

    def agent_with_known_values(*arguments):
        agent = make_agent(*arguments)
        agent.critic = Critic(2, 1)
        return agent

    monkeypatch.setattr(ppo, "make_agent", agent_with_known_values)
    args = Args(env_id=f"Counter-{ending}-v0", num_envs=2, num_steps=4, total_timesteps=16, num_minibatches=2)
    args = Args(**{**vars(args), "run_dir": str(tmp_path / "run"), "eval_episodes": 1, "update_epochs": 1})
    monkeypatch.setattr(ppo, "MAX_EVAL_STEPS", 9)
    ppo.train(args)

    rewards, values, next_values, terminated, truncated, gamma, gae_lambda = spy.calls[0]
    both = lambda column: np.repeat(np.array(column)[:, None], 2, axis=1)  # noqa: E731
    assert (gamma, gae_lambda) == (args.gamma, args.gae_lambda)
    if ending == "neither":
        np.testing.assert_array_equal(rewards, both([1, 2, 3, 4]))
        np.testing.assert_array_equal(values, both([0, 1, 2, 3]))
        np.testing.assert_array_equal(next_values, both([1, 2, 3, 4]))
        assert not terminated.any() and not truncated.any()
        assert not [point for point in scalars if point[0] == "charts/episodic_return"]
        return
    np.testing.assert_array_equal(rewards, both([1, 2, 3, 1]))
    np.testing.assert_array_equal(values, both([0, 1, 2, 10]))  # step 3 starts the next episode
    np.testing.assert_array_equal(next_values, both([1, 2, 3, 11]))  # step 2 led to [0, 3], not to the reset
    np.testing.assert_array_equal(terminated, both([False, False, ending in ("terminated", "both"), False]))
    np.testing.assert_array_equal(truncated, both([False, False, ending in ("truncated", "both"), False]))
    points = {(tag, step): value for tag, value, step in scalars}
    assert points["charts/episodic_return", 8] == 6 and points["charts/episodic_length", 8] == 3
    assert points["charts/episodic_return", 16] == 6


def test_the_first_ratio_is_one_and_parameters_move(tmp_path, monkeypatch):
    calls = []

    def spy(log_probs, old_log_probs, advantages, clip_coef):
        calls.append((log_probs.detach().clone(), old_log_probs.clone()))
        return policy_loss(log_probs, old_log_probs, advantages, clip_coef)

    monkeypatch.setattr(ppo, "policy_loss", spy)
    args = Args(total_timesteps=512, num_envs=4, num_steps=64, eval_episodes=1, run_dir=str(tmp_path / "run"))
    ppo.train(args)
    first, later = calls[0], calls[args.num_minibatches * 2]
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-6)
    assert (later[0] - later[1]).abs().max() > 1e-4
    torch.manual_seed(args.seed)
    fresh = ppo.Agent(4, 2, True).state_dict()
    trained = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    for name, parameter in trained.items():
        assert not torch.equal(parameter, fresh[name]), name


def test_each_value_is_compared_with_its_own_return(tmp_path, monkeypatch):
    """(B, 1) against (B,) would compare every value with every return, and learn nearly as well."""
    shapes = []

    def spy(values, old_values, returns, clip_coef):
        shapes.append((values.shape, old_values.shape, returns.shape))
        return value_loss(values, old_values, returns, clip_coef)

    monkeypatch.setattr(ppo, "value_loss", spy)
    ppo.train(
        Args(
            total_timesteps=80,
            num_envs=4,
            num_steps=10,
            num_minibatches=2,
            eval_episodes=1,
            run_dir=str(tmp_path / "run"),
        )
    )
    assert shapes and set(shapes) == {((20,),) * 3}


def test_actions_follow_the_policy():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0])
    actions = ppo.sample(logits.expand(40_000, 3), ppo.gumbel_noise(40_000, 3))
    shares = torch.bincount(actions, minlength=3) / 40_000
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=0.01)


SWITCHES = {
    "ortho_init": False,
    "anneal_lr": False,
    "norm_adv": False,
    "clip_vloss": True,
    "max_grad_norm": 0.0,
    "target_kl": 1e-6,
    "ent_coef": 0.1,
    "vf_coef": 2.0,
    "clip_coef": 0.01,
    "gamma": 0.9,
    "gae_lambda": 0.5,
    "learning_rate": 1e-4,
    "update_epochs": 1,
}


def weights_after(folder, **switch) -> dict:
    small = {"total_timesteps": 1024, "num_envs": 4, "num_steps": 64, "eval_episodes": 1}
    ppo.train(Args(**{**small, **switch}, run_dir=str(folder)))
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


def test_every_switch_changes_the_learning(tmp_path):
    """A flag that is read but has no effect would leave the weights as they are without it."""
    usual = weights_after(tmp_path / "usual")
    for name, value in SWITCHES.items():
        other = weights_after(tmp_path / name, **{name: value})
        assert any(not torch.equal(usual[key], other[key]) for key in usual), name


def test_the_entropy_bonus_keeps_the_policy_open(tmp_path):
    logits = [weights_after(tmp_path / str(c), ent_coef=c)["actor.4.bias"].abs().sum() for c in (-1.0, 1.0)]
    agents = [ppo.Agent(4, 2, True) for _ in range(2)]
    for agent, c in zip(agents, (-1.0, 1.0), strict=True):
        agent.load_state_dict(torch.load(tmp_path / str(c) / "checkpoint.pt", weights_only=True)["agent"])
    closed, open_ = (ppo.entropy(agent.actor(torch.randn(50, 4))).item() for agent in agents)
    assert open_ > closed + 0.05, logits


def test_learns_cartpole(tmp_path):
    args = Args(target_return=475, run_dir=str(tmp_path / "run"))
    results = ppo.train(args)
    assert results["mean_reward"] >= 475
    assert results["global_step"] < args.total_timesteps  # --target-return stopped it
