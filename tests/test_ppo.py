"""PPO: whole iterations against slow, independent ones; the formulas, endings, evaluation, and learning."""

import copy
import json
import math
from dataclasses import replace

import counter_env  # noqa: F401 (registers the Counter environments)
import gymnasium as gym
import numpy as np
import ppo
import pytest
import torch
from gymnasium.vector import AutoresetMode
from ppo import Args, gae, policy_loss, value_loss


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
        reward = self.x[action] - 0.3 * action
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


gym.register("EndingsPPO-v0", entry_point=Endings)
gym.register("LengthsPPO-v0", entry_point=Lengths)


def small(folder, **settings) -> Args:
    """Settings of a short run in this folder."""
    usual = {
        "env_id": "EndingsPPO-v0",
        "num_envs": 3,
        "num_steps": 7,
        "num_minibatches": 3,
        "update_epochs": 3,
        "total_timesteps": 70,
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

    monkeypatch.setattr(ppo.SummaryWriter, "add_scalar", add_scalar)
    return points


class Spy:
    """Calls the original and keeps a copy of what it was called with."""

    def __init__(self, original):
        self.original, self.calls = original, []

    def __call__(self, *args):
        self.calls.append([x.clone().detach() if isinstance(x, torch.Tensor) else copy.copy(x) for x in args])
        return self.original(*args)


def saved_agent(args: Args) -> dict:
    return torch.load(f"{args.run_dir}/checkpoint.pt", weights_only=True)["agent"]


# ---- whole iterations ----


def network(weights, name, obs):
    """One network for one observation."""
    x = torch.as_tensor(obs, dtype=torch.float64)
    for layer in (0, 2):
        x = torch.tanh(weights[f"{name}.{layer}.weight"] @ x + weights[f"{name}.{layer}.bias"])
    return weights[f"{name}.4.weight"] @ x + weights[f"{name}.4.bias"]


def probabilities(weights, obs):
    powers = network(weights, "actor", obs).exp()
    return powers / powers.sum()


def mean(numbers):
    return sum(numbers) / len(numbers)


def slow_rollout(args, weights, envs, observed, scores, lengths):
    """The rows of one rollout. observed: what each environment shows now. scores, lengths: so far, lists."""
    noise = -torch.empty(args.num_steps, args.num_envs, 3).exponential_().log()
    rows = []
    ended = []  # (episodic return, length)
    for t in range(args.num_steps):
        for n, env in enumerate(envs):
            p = probabilities(weights, observed[n])
            a = max(range(3), key=lambda i: p[i].log().item() + noise[t, n, i].item())
            next_obs, reward, terminated, truncated, _ = env.step(a)
            row = {"obs": observed[n], "a": a, "r": float(reward), "old_p": p[a].item()}
            row["v"] = network(weights, "critic", observed[n]).item()
            row["next_v"] = network(weights, "critic", next_obs).item()
            row["terminated"] = terminated
            row["ended"] = terminated or truncated
            rows.append(row)
            observed[n] = next_obs
            scores[n] += reward
            lengths[n] += 1
            if row["ended"]:
                ended.append((scores[n], lengths[n]))
                scores[n] = lengths[n] = 0
                observed[n] = env.reset()[0]
    for i, row in enumerate(rows):  # A = Σ_k (γλ)^k δ_{t+k} up to the end of episode and rollout
        row["A"] = 0.0
        for k, later in enumerate(rows[i :: args.num_envs]):
            delta = later["r"] - later["v"]
            if not later["terminated"]:
                delta += args.gamma * later["next_v"]
            row["A"] += (args.gamma * args.gae_lambda) ** k * delta
            if later["ended"]:
                break
        row["R"] = row["A"] + row["v"]
    return rows, ended


def slow_loss(args, weights, rows):
    """Equations (5) to (9), row by row: the loss, and what is logged of it."""
    advantages = [row["A"] for row in rows]
    if args.norm_adv:
        centre = mean(advantages)
        spread = math.sqrt(mean([(a - centre) ** 2 for a in advantages])) + 1e-8
        advantages = [(a - centre) / spread for a in advantages]
    low, high = 1 - args.clip_coef, 1 + args.clip_coef
    objectives, errors, entropies, ratios = [], [], [], []
    for row, advantage in zip(rows, advantages, strict=True):
        p = probabilities(weights, row["obs"])
        ratio = p[row["a"]] / row["old_p"]
        clipped = ratio if low <= ratio <= high else torch.tensor(low if ratio < low else high)
        objectives.append(min(ratio * advantage, clipped * advantage))
        value = network(weights, "critic", row["obs"])[0]
        error = (value - row["R"]) ** 2
        if args.clip_vloss:
            near = min(max(value, row["v"] - args.clip_coef), row["v"] + args.clip_coef)
            error = max(error, (near - row["R"]) ** 2)
        errors.append(error)
        entropies.append(-sum(p[i] * p[i].log() for i in range(3)))
        ratios.append(ratio.item())
    policy_part = -mean(objectives)
    value_part = mean(errors) / 2
    logged = {
        "policy_loss": policy_part.item(),
        "value_loss": value_part.item(),
        "entropy": mean(entropies).item(),
        "approx_kl": mean([r - 1 - math.log(r) for r in ratios]),
        "clip_fraction": mean([float(not low <= r <= high) for r in ratios]),
    }
    return policy_part + args.vf_coef * value_part - args.ent_coef * mean(entropies), logged


def slow_ppo(args: Args, iterations: int):
    """Plain PPO in float64 with an Adam of its own: the weights at the end, and a list of what is logged."""
    torch.manual_seed(args.seed)
    first = ppo.Agent(4, 3, args.ortho_init).state_dict()
    weights = {name: x.double().requires_grad_() for name, x in first.items()}
    momentum = {name: torch.zeros_like(x) for name, x in weights.items()}
    square = {name: torch.zeros_like(x) for name, x in weights.items()}
    envs = [Endings() for _ in range(args.num_envs)]
    seeds = ppo.env_seeds(args.num_envs, args.seed, 0, 0)
    observed = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    scores = [0] * args.num_envs
    lengths = [0] * args.num_envs
    size = args.num_envs * args.num_steps
    updates = 0
    logs = []
    for iteration in range(iterations):
        rows, ended = slow_rollout(args, weights, envs, observed, scores, lengths)
        rate = args.learning_rate
        if args.anneal_lr:
            rate *= 1 - iteration * size / args.total_timesteps
        epochs = 0
        while epochs < args.update_epochs:
            epochs += 1
            order = torch.randperm(size).tolist()
            for start in range(0, size, size // args.num_minibatches):
                minibatch = [rows[i] for i in order[start : start + size // args.num_minibatches]]
                loss, log = slow_loss(args, weights, minibatch)
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
                    weights[name] = (x - rate * m / (v.sqrt() + 1e-8)).detach().requires_grad_()
            if args.target_kl is not None and log["approx_kl"] > args.target_kl:
                break
        residuals = np.var([row["R"] - row["v"] for row in rows])
        log |= {"grad_norm": norm, "explained_variance": 1 - residuals / np.var([row["R"] for row in rows])}
        log = {f"losses/{name}": value for name, value in log.items()}
        log |= {"charts/learning_rate": rate, "charts/episodic_return": mean([score for score, _ in ended])}
        log["charts/episodic_length"] = mean([length for _, length in ended])
        logs.append(log | {"epochs": epochs})
    return weights, logs


WHOLE = {
    "defaults": {},
    "all on": {
        "ent_coef": 0.03,
        "clip_vloss": True,
        "clip_coef": 0.05,
        "max_grad_norm": 0.1,
        "learning_rate": 2e-3,
        "gamma": 0.9,
        "gae_lambda": 0.7,
        "vf_coef": 1.3,
        "seed": 5,
    },
    "all off": {
        "ortho_init": False,
        "anneal_lr": False,
        "norm_adv": False,
        "max_grad_norm": 0.0,
        "gae_lambda": 1.0,
        "num_minibatches": 1,
        "learning_rate": 5e-3,
        "ent_coef": -0.1,
    },
    "target kl": {"target_kl": 0.003, "learning_rate": 5e-3, "update_epochs": 6, "clip_coef": 0.1},
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_iterations_equal_slow_ones(name, tmp_path, charts):
    """Three rollouts with all endings: every weight and every logged number."""
    args = small(tmp_path, **WHOLE[name])
    ppo.train(args)
    got = saved_agent(args)
    iterations = args.total_timesteps // args.batch_size
    assert iterations == 3
    want, logs = slow_ppo(args, iterations)
    for i, log in enumerate(logs):
        step = (i + 1) * args.batch_size
        epochs = log.pop("epochs")
        assert set(log) == {tag for tag, at in charts if at == step} - {"charts/SPS"}
        for tag, value in log.items():
            assert charts[tag, step] == pytest.approx(value, rel=2e-4, abs=2e-6), (tag, step)
    for key, x in want.items():
        torch.testing.assert_close(got[key].double(), x.detach(), rtol=0, atol=2e-5)
    # What the settings are there for did happen.
    if name == "all on":
        assert 0 < log["losses/clip_fraction"] < 1 and log["losses/grad_norm"] > args.max_grad_norm
    if name == "target kl":
        assert 1 < epochs < args.update_epochs


def test_the_learning_rate_falls_from_the_full_one_and_is_never_0(tmp_path, charts, monkeypatch):
    used = []

    class Adam(torch.optim.Adam):
        def step(self):
            used.append(self.param_groups[0]["lr"])
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    args = small(tmp_path, total_timesteps=21 * 4, learning_rate=0.1, update_epochs=1)
    ppo.train(args)
    assert used == pytest.approx([0.1] * 3 + [0.075] * 3 + [0.05] * 3 + [0.025] * 3)
    logged = [value for (tag, _), value in charts.items() if tag == "charts/learning_rate"]
    assert logged == pytest.approx([0.1, 0.075, 0.05, 0.025])


# ---- formulas ----


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


def test_value_loss_plain():
    values, old, returns = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 4.5]), torch.tensor([2.0, 2.0])
    assert value_loss(values, old, returns).item() == pytest.approx(0.5 * (1 + 9) / 2)


@pytest.mark.parametrize(
    ("new", "returns", "error"),
    [
        (1.0, 2.0, 1.8),  # above the range 0 ± 0.2: 0.2 counts, for it is further from the return
        (1.0, -2.0, 3.0),  # the value itself is further
        (-1.0, -2.0, 1.8),  # below the range: −0.2 counts
        (-1.0, 2.0, 3.0),
        (0.1, 2.0, 1.9),  # within the range
        (-0.1, 2.0, 2.1),
    ],
)
def test_the_value_clip_has_two_bounds(new, returns, error):
    # The old value is 3: a clip around 0 instead of around it would show.
    new, old, returns = (torch.tensor([x + 3.0, 3.0]) for x in (new, 0.0, returns))
    returns[1] = 3.0  # the second row has no error: the loss is half the mean
    assert value_loss(new, old, returns, 0.2).item() == pytest.approx(0.5 * error**2 / 2, rel=1e-5)


def test_log_prob_and_entropy_are_those_of_torch():
    logits, actions = torch.randn(6, 4), torch.tensor([0, 3, 2, 2, 1, 0])
    categorical = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(ppo.log_prob(logits, actions), categorical.log_prob(actions))
    torch.testing.assert_close(ppo.entropy(logits), categorical.entropy().mean())


def test_normalize_and_a_single_advantage():
    x = ppo.normalize(torch.tensor([1.0, 2.0, 6.0]))
    torch.testing.assert_close(x, torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(14 / 3))
    assert ppo.normalize(torch.tensor([3.0])).tolist() == [0.0]  # not NaN


def test_gumbel_noise_has_its_mean_and_variance():
    noise = ppo.gumbel_noise(200, 300, 4)
    assert noise.shape == (200, 300, 4)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


# ---- networks ----


def test_orthogonal_weights():
    """Rows or columns at right angles, all of the length that the gain says; biases 0."""
    agent = ppo.Agent(7, 3, ortho_init=True)
    for network, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, gain in ((0, math.sqrt(2)), (2, math.sqrt(2)), (4, last)):
            w = network[layer].weight.detach()
            small = w @ w.T if len(w) <= w.shape[1] else w.T @ w
            torch.testing.assert_close(small, gain**2 * torch.eye(len(small)), rtol=0, atol=1e-5)
            assert not network[layer].bias.any()
    plain = ppo.Agent(7, 3, ortho_init=False)
    w = plain.actor[2].weight.detach()
    assert (w @ w.T - 2 * torch.eye(64)).abs().max() > 0.1 and plain.actor[2].bias.any()


def test_the_shape_of_the_networks():
    agent = ppo.Agent(7, 3, ortho_init=True)
    for network, outputs in ((agent.actor, 3), (agent.critic, 1)):
        assert [type(layer).__name__ for layer in network] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
        assert [tuple(network[i].weight.shape) for i in (0, 2, 4)] == [(64, 7), (64, 64), (outputs, 64)]
    assert not {id(x) for x in agent.actor.parameters()} & {id(x) for x in agent.critic.parameters()}


# ---- environments, acting, endings ----


def test_a_film_keeps_the_last_picture_and_training_resets_at_once():
    args = Args(env_id="Counter-terminated-v0")
    envs = ppo.make_envs(args, 2)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and envs.num_envs == 2
    assert not hasattr(envs.unwrapped, "processes")  # all in this process
    film = ppo.make_envs(args, 1, render_mode="rgb_array")
    for each in (envs, film):
        each.reset(seed=1)
        for _ in range(3):
            obs, _, _, _, info = each.step(np.zeros(each.num_envs, dtype=int))
    assert film.render()[0][0, 0, 0] == 30  # the third step
    assert obs.tolist() == [[0, 3]]
    assert info["episode"]["r"].tolist() == [6]


@pytest.mark.parametrize("gumbel", [True, False])
def test_actions_follow_the_policy_with_and_without_gumbel_noise(gumbel, tmp_path, monkeypatch):
    logits = torch.tensor([1.0, 0.0, -1.0])
    make_agent = ppo.make_agent

    def agent_with_known_logits(*arguments):
        agent = make_agent(*arguments)
        agent.actor[4].weight.data.zero_()
        agent.actor[4].bias.data.copy_(logits)
        return agent

    spy = Spy(ppo.log_prob)
    monkeypatch.setattr(ppo, "make_agent", agent_with_known_logits)
    monkeypatch.setattr(ppo, "log_prob", spy)
    size = {"num_steps": 4000, "num_envs": 2, "num_minibatches": 1, "total_timesteps": 8000}
    ppo.train(small(tmp_path, gumbel=gumbel, update_epochs=1, **size))
    actions = spy.calls[0][1].reshape(4000, 2)
    for n in range(2):
        shares = torch.bincount(actions[:, n], minlength=3) / 4000
        torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=0.03)
    # Environments and steps draw on their own: two draws agree as often as chance has it.
    same = (logits.softmax(-1) ** 2).sum().item()
    assert (actions[:, 0] == actions[:, 1]).float().mean().item() == pytest.approx(same, abs=0.03)
    assert (actions[1:] == actions[:-1]).float().mean().item() == pytest.approx(same, abs=0.03)


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both", "neither"])
def test_what_is_stored_when_episodes_end(ending, tmp_path, monkeypatch, charts):
    """Two environments, episodes of 3 steps, rollouts of 4; the critic is made to say 10·episode + step."""
    spy = Spy(gae)
    monkeypatch.setattr(ppo, "gae", spy)

    class Critic(torch.nn.Linear):
        def forward(self, obs):
            return 10 * obs[:, :1] + obs[:, 1:] + 0 * super().forward(obs)

    make_agent = ppo.make_agent

    def agent_with_known_values(*arguments):
        agent = make_agent(*arguments)
        agent.critic = Critic(2, 1)
        return agent

    monkeypatch.setattr(ppo, "make_agent", agent_with_known_values)
    monkeypatch.setattr(ppo, "MAX_EVAL_STEPS", 9)
    settings = {"num_envs": 2, "num_steps": 4, "total_timesteps": 16, "num_minibatches": 2}
    args = small(tmp_path, env_id=f"Counter-{ending}-v0", update_epochs=1, **settings)
    results = ppo.train(args)

    rewards, values, next_values, terminated, truncated, gamma, gae_lambda = spy.calls[0]
    both = lambda column: np.repeat(np.array(column)[:, None], 2, axis=1)  # noqa: E731
    assert (gamma, gae_lambda) == (args.gamma, args.gae_lambda)
    if ending == "neither":
        np.testing.assert_array_equal(rewards, both([1, 2, 3, 4]))
        np.testing.assert_array_equal(values, both([0, 1, 2, 3]))
        np.testing.assert_array_equal(next_values, both([1, 2, 3, 4]))
        assert not terminated.any() and not truncated.any()
        assert not [tag for tag, _ in charts if tag == "charts/episodic_return"]
        assert results["mean_reward"] == 45  # an evaluation without an end is cut after MAX_EVAL_STEPS
        return
    np.testing.assert_array_equal(rewards, both([1, 2, 3, 1]))
    np.testing.assert_array_equal(values, both([0, 1, 2, 10]))  # step 3 starts the next episode
    np.testing.assert_array_equal(next_values, both([1, 2, 3, 11]))  # step 2 led to [0, 3], not to the reset
    np.testing.assert_array_equal(terminated, both([False, False, ending in ("terminated", "both"), False]))
    np.testing.assert_array_equal(truncated, both([False, False, ending in ("truncated", "both"), False]))
    assert charts["charts/episodic_return", 8] == 6 and charts["charts/episodic_length", 8] == 3
    assert charts["charts/episodic_return", 16] == 6
    assert results["mean_reward"] == 6


# ---- the end of training, evaluation ----


@pytest.mark.parametrize(("target", "steps"), [(6, 300), (6.01, 600), (None, 600)])
def test_target_return_stops_after_100_episodes_that_reach_it(target, steps, tmp_path):
    """Episodes of 3 steps and 6 points: 300 steps are the first with 100 of them."""
    settings = {"num_envs": 2, "num_steps": 30, "total_timesteps": 600, "num_minibatches": 2}
    args = small(tmp_path, env_id="Counter-terminated-v0", target_return=target, **settings)
    assert ppo.train(args)["global_step"] == steps


def test_bad_settings_and_a_nan_end_the_training(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ppo.train(small(tmp_path, total_timesteps=20))  # less than a rollout
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        ppo.train(small(tmp_path, env_id="Broken-v0", num_envs=1, num_minibatches=1))
    assert stop.value.code == 1
    assert "at step 42" in capsys.readouterr().err  # NaN from step 40 on, rollouts of 7 steps


def test_what_could_not_be_read_again_replaces_no_checkpoint(tmp_path):
    ppo.save_checkpoint(tmp_path, {"step": 1, "weights": torch.ones(2)})
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(Exception, match="numpy"):
        ppo.save_checkpoint(tmp_path, {"step": 2, "weights": np.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_training_and_evaluation_share_no_seed(tmp_path):
    Endings.seeds.clear()
    args = small(tmp_path, eval_episodes=43)
    ppo.train(args)
    # Three environments to train; three rounds of twenty to evaluate, the last one for three episodes.
    assert len(Endings.seeds) == 3 + 60
    assert len(set(Endings.seeds)) == 63
    # Another run, and the rest of this one after a kill, have others.
    assert not set(Endings.seeds) & set(ppo.env_seeds(50, args.seed + 1, 0, 0))
    Endings.seeds.clear()
    ppo.train(replace(args, run_dir=None, resume=args.run_dir, total_timesteps=91, eval_episodes=1))
    resumed = Endings.seeds[:3]
    assert not set(resumed) & set(ppo.env_seeds(3, args.seed, 0, 0)) and len(set(resumed)) == 3


def test_evaluation_takes_the_likeliest_action_and_counts_one_episode_each(tmp_path, monkeypatch, capsys):
    """23 episodes of 1, 2, …, 20, 1, 2, 3 steps; action 2, only a little likelier, pays 3 points a step."""
    make_agent = ppo.make_agent

    def agent_with_known_logits(*arguments):
        agent = make_agent(*arguments)
        agent.actor[4].weight.data.zero_()
        agent.actor[4].bias.data.copy_(torch.tensor([0.0, 0.0, 0.1]))
        return agent

    monkeypatch.setattr(ppo, "make_agent", agent_with_known_logits)
    args = small(tmp_path, env_id="LengthsPPO-v0", learning_rate=0.0, eval_episodes=23)
    make_envs = ppo.make_envs

    def count_from_1(*arguments):
        Lengths.made = 0
        return make_envs(*arguments)

    monkeypatch.setattr(ppo, "make_envs", count_from_1)
    results = ppo.train(args)
    scores = [3 * length for length in [*range(1, 21), 1, 2, 3]]
    assert results["mean_reward"] == pytest.approx(np.mean(scores))
    assert results["std_reward"] == pytest.approx(np.std(scores))
    assert results["score"] == pytest.approx(np.mean(scores) - np.std(scores))
    assert results["eval_episodes"] == 23 and results["global_step"] == 63 and results["seed"] == args.seed
    assert results["algo"] == "ppo" and results["env_id"] == "LengthsPPO-v0" and results["episodes"] > 3
    assert results["steps_per_second"] == pytest.approx(63 / results["wall_time_s"])
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"{np.mean(scores):.2f} ± {np.std(scores):.2f} over 23 episodes" in capsys.readouterr().out
    assert not (tmp_path / "run" / "replay.mp4").exists()


def test_evaluation_plays_as_plain_environments_do(tmp_path):
    """Greedy episodes of single environments, one after the other, have the same sums of rewards."""
    args = small(tmp_path, eval_episodes=22, total_timesteps=210, learning_rate=0.01)
    results = ppo.train(args)
    weights = {name: x.double() for name, x in saved_agent(args).items()}
    scores = []
    for first in (0, 20):
        for seed in ppo.env_seeds(20, args.seed, 1, first):
            env = Endings()
            obs, _ = env.reset(seed=seed)
            score = 0.0
            over = False
            while not over:
                action = network(weights, "actor", obs).argmax().item()
                obs, reward, terminated, truncated, _ = env.step(action)
                score += reward
                over = terminated or truncated
            scores.append(score)
    assert results["mean_reward"] == pytest.approx(np.mean(scores[:22]), rel=1e-6)
    assert results["std_reward"] == pytest.approx(np.std(scores[:22]), rel=1e-6)


# ---- learning ----

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
    usual = {"env_id": "CartPole-v1", "num_envs": 4, "num_steps": 64, "num_minibatches": 4}
    args = small(folder, **{**usual, "update_epochs": 4, "total_timesteps": 512, **switch})
    ppo.train(args)
    return saved_agent(args)


def test_every_switch_changes_the_learning(tmp_path):
    """A flag that is read but has no effect would leave the weights as they are without it."""
    usual = weights_after(tmp_path / "usual")
    for name, value in SWITCHES.items():
        other = weights_after(tmp_path / name, **{name: value})
        assert any(not torch.equal(usual[key], other[key]) for key in usual), name


def test_the_entropy_bonus_keeps_the_policy_open(tmp_path):
    entropies = []
    for bonus in (-1.0, 1.0):
        agent = ppo.Agent(4, 2, True)
        agent.load_state_dict(weights_after(tmp_path / str(bonus), ent_coef=bonus, total_timesteps=1024))
        entropies.append(ppo.entropy(agent.actor(torch.randn(50, 4))).item())
    assert entropies[1] > entropies[0] + 0.05


def test_learns_cartpole(tmp_path):
    args = Args(target_return=475, run_dir=str(tmp_path / "run"))
    results = ppo.train(args)
    assert results["mean_reward"] >= 475
    assert results["global_step"] < args.total_timesteps  # --target-return stopped it
