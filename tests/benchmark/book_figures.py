"""Draws four figures of Sutton and Barto's book from runs of sarsa.py and q_learning.py.

Run: python tests/benchmark/book_figures.py                all four, some minutes on one core
     python tests/benchmark/book_figures.py walk n_step    some of them: walk, n_step, cliff, blackjack

The book: http://incompleteideas.net/book/the-book-2nd.html. Every run is `train` of the script itself; only
the run folder is left out, for there are thousands of runs. Curves go to results/book_*.csv, what was
measured beside what is published to results/book.csv, pictures to figures/book_*.png.

    walk       example 6.2: temporal differences and Monte Carlo predict a random walk over 5 states
    n_step     figure 7.2: n from 1 to 512 on a random walk over 19 states
    cliff      example 6.6: Sarsa, Expected Sarsa and Q-learning while they learn; what three ways are worth
    blackjack  figure 5.2: the policy that Monte Carlo learns, and what it is worth exactly
"""

import csv
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "algos"))
import q_learning  # noqa: E402
import sarsa  # noqa: E402

WALK_RUNS = 400  # of each setting; the book's 100 leave a noise of 0.006, more than a tenth of some errors
N_STEP_RUNS = 100
CLIFF_RUNS = 50
# Example 6.2: (n, α) -> RMS error after 100 episodes, read off the book's figure and simulated anew.
WALK = {(1, 0.05): 0.035, (1, 0.1): 0.05, (1, 0.15): 0.07}
WALK |= {(0, 0.01): 0.095, (0, 0.02): 0.085, (0, 0.03): 0.094, (0, 0.04): 0.112}
# Figure 7.2: n -> the best α and the RMS error in the first 10 episodes with it.
N_STEP = {1: (0.8, 0.347), 2: (0.6, 0.28), 4: (0.4, 0.267), 8: (0.2, 0.282), 16: (0.15, 0.315)}
N_STEP |= {32: (0.1, 0.371), 512: (0.02, 0.49)}
# Example 6.6: episodic return while learning, read off the book's figure.
CLIFF = {"Sarsa": -25.0, "Q-learning": -50.0}
# What three ways are worth with ε = 0.1 and ε = 0, by dynamic programming; the rows count from the top.
WAYS = {"two rows up": (0, -22.3, -17.0), "one row up": (1, -20.8, -15.0), "at the edge": (2, -45.8, -13.0)}
BLACKJACK = -0.0431  # what the best policy is worth
BLACKJACK_SETTINGS = {"n_step": 0, "total_episodes": 500_000, "learning_rate": 0.1, "lr_visits": 100.0}


class Bare:
    """What `train` asks of its class Run, without a folder: the budget, counters, a call after episodes."""

    def __init__(self, args, budget, q_table, visits, rng) -> None:
        self.budget = budget
        self.q_table = q_table
        self.step = 0
        self.episodes = 0

    def goes_on(self, size: int) -> bool:
        return self.episodes + size <= self.budget

    def episodes_ended(self, returns, lengths) -> None:
        self.episodes += len(returns)
        self.after_episode(self.q_table, returns[0])

    def stop_if_not_finite(self, value) -> None:
        assert np.isfinite(value)

    def log_is_due(self) -> bool:
        return False

    def finish(self) -> np.ndarray:
        return np.array(self.q_table)


def learn(script, after_episode=lambda q_table, episodic_return: None, **settings) -> np.ndarray:
    """`script.train` without a run folder. Returns the table, (|S|, |A|).

    after_episode is called with the table and the episodic return whenever an episode has ended.
    """
    run = type("Run", (Bare,), {"after_episode": staticmethod(after_episode)})
    with mock.patch.multiple(script, Run=run, check_args=lambda args: None):
        return script.train(script.Args(**settings))


def errors_of_a_walk(runs: int, **settings) -> np.ndarray:
    """RMS error over the states after every episode, the mean of `runs` runs. Returns (episodes,)."""
    env = gym.make("envs.random_walk:RandomWalk-v0", **settings.pop("options"))
    truth = env.unwrapped.values()
    errors = []

    def after_episode(q_table, episodic_return):
        values = np.array([row[0] for row in q_table[1:-1]])
        errors.append(np.sqrt(np.mean((values - truth) ** 2)))

    options = f'{{"num_states": {len(truth)}, "left_reward": {env.unwrapped.left_reward}}}'
    for seed in range(1, runs + 1):
        walk = {"env_id": "envs.random_walk:RandomWalk-v0", "env_kwargs": options, "lr_visits": 0.0}
        learn(sarsa, after_episode, seed=seed, **walk, **settings)
    return np.reshape(errors, (runs, -1)).mean(0)


def write(name: str, columns: list[str], rows: list[tuple]) -> None:
    with open(HERE / "results" / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / "figures" / f"{name}.png", dpi=100)


def walk(runs: int = WALK_RUNS) -> list[tuple]:
    """Example 6.2. Returns rows of (what, measured, published)."""
    task = {"options": {"num_states": 5, "left_reward": 0.0}, "total_episodes": 100, "initial_value": 0.5}
    settings = [(1, 0.03), *WALK]
    curves = {}
    for n, alpha in settings:
        curves[n, alpha] = errors_of_a_walk(runs, n_step=n, learning_rate=alpha, **task)
    rows = [
        (n, alpha, i + 1, f"{error:.4f}") for (n, alpha), c in curves.items() for i, error in enumerate(c)
    ]
    write("book_walk", ["n_step", "learning_rate", "episode", "rms_error"], rows)

    start = np.sqrt(np.mean((0.5 - np.arange(1, 6) / 6) ** 2))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = {
        1: ["#9ecae1", "#6baed6", "#2171b5", "#08306b"],
        0: ["#fdae6b", "#fd8d3c", "#d94801", "#7f2704"],
    }
    for n, name in ((0, "Monte Carlo, --n-step 0"), (1, "TD(0), --n-step 1")):
        for (_, alpha), colour in zip([key for key in settings if key[0] == n], colours[n], strict=True):
            curve = [start, *curves[n, alpha]]
            axes.plot(curve, color=colour, label=f"{name}, α = {alpha:g}")
            if (n, alpha) in WALK:
                axes.plot(100, WALK[n, alpha], "x", color=colour, markersize=9, clip_on=False)
    axes.plot([], [], "x", color="grey", label="published")
    axes.set(xlabel="episodes", ylabel="RMS error of the values", xlim=(0, 100), ylim=(0, 0.25))
    axes.set_title(f"Random walk over 5 states, mean of {runs} runs (the book's example 6.2)")
    axes.legend(fontsize=8, ncols=2)
    save(figure, "book_walk")
    names = {0: "Monte Carlo", 1: "TD(0)"}
    return [(f"{names[n]}, α = {a:g}", curves[n, a][-1], mark) for (n, a), mark in WALK.items()]


def n_step(runs: int = N_STEP_RUNS) -> list[tuple]:
    """Figure 7.2. Returns rows of (what, measured, published)."""
    task = {"options": {}, "total_episodes": 10}
    grid = {n: (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0) for n in (1, 2, 4)}
    grid |= {8: (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), 16: (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)}
    grid |= {32: (0.02, 0.05, 0.1, 0.15, 0.2, 0.25), 64: (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12)}
    grid |= {n: (0.01, 0.02, 0.03, 0.04, 0.06, 0.08) for n in (128, 256, 512)}
    curves = {}
    for n, rates in grid.items():
        for alpha in rates:
            error = errors_of_a_walk(runs, n_step=n, learning_rate=alpha, **task).mean()
            curves.setdefault(n, {})[alpha] = error
    rows = [(n, alpha, f"{error:.4f}") for n, curve in curves.items() for alpha, error in curve.items()]
    write("book_n_step", ["n_step", "learning_rate", "rms_error"], rows)

    start = np.sqrt(np.mean(np.linspace(-0.9, 0.9, 19) ** 2))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (n, curve) in enumerate(curves.items()):
        colour = f"C{i}"
        axes.plot([0, *curve], [start, *curve.values()], color=colour, label=f"n = {n}")
        if n in N_STEP:
            axes.plot(*N_STEP[n], "x", color=colour, markersize=9)
    axes.plot([], [], "x", color="grey", label="published")
    axes.set(xlabel="α", ylabel="RMS error of the values", xlim=(0, 1), ylim=(0.23, 0.58))
    axes.set_title(f"Random walk over 19 states, first 10 episodes, mean of {runs} runs (figure 7.2)")
    axes.legend(fontsize=8)
    save(figure, "book_n_step")
    return [(f"n = {n}, α = {alpha:g}", curves[n][alpha], mark) for n, (alpha, mark) in N_STEP.items()]


UP, RIGHT, DOWN = 0, 1, 2


def way(row: int) -> np.ndarray:
    """The policy that walks along a row of the map: 2 is at the edge of the cliff, 1 and 0 are above it.

    Below that row it goes up, above it right, in the last column down. Returns an action for all 48 states.
    """
    policy = np.full((4, 12), RIGHT)
    policy[row + 1 :] = UP
    policy[:3, 11] = DOWN
    return policy.ravel()


def worth(policy: np.ndarray, epsilon: float) -> float:
    """The exact value of the start if this policy acts ε-greedily. policy: an action for all 48 states."""
    table = gym.make("CliffWalking-v1").unwrapped.P
    matrix = np.eye(48)
    rewards = np.zeros(48)
    for s in range(47):  # the last state is the goal
        for a in range(4):
            chance = epsilon / 4 + (1 - epsilon) * (a == policy[s])
            for p, s2, r, terminated in table[s][a]:
                rewards[s] += chance * p * r
                matrix[s, s2] -= chance * p * (not terminated)
    return float(np.linalg.solve(matrix, rewards)[36])


def greedy_way(q_table: np.ndarray) -> str:
    """Which way the greedy policy walks: the highest row that it visits, or that it never arrives."""
    table = gym.make("CliffWalking-v1").unwrapped.P
    state = 36
    rows = []
    for _ in range(48):
        ((_, state, _, terminated),) = table[state][int(q_table[state].argmax())]
        if terminated:
            return {row: name for name, (row, _, _) in WAYS.items()}[min(rows)]
        rows.append(state // 12)
    return "never arrives"


def cliff(runs: int = CLIFF_RUNS) -> list[tuple]:
    """Example 6.6, and α = 1 as in figure 6.3. Returns rows of (what, measured, published)."""
    task = {"env_id": "CliffWalking-v1", "total_episodes": 500, "learning_rate": 0.5, "gamma": 1.0}
    task |= {"lr_visits": 0.0, "max_epsilon": 0.1, "min_epsilon": 0.1, "max_steps": 10_000}
    algorithms = {
        "Sarsa": (sarsa, {}),
        "Expected Sarsa": (sarsa, {"expected": True}),
        "Q-learning": (q_learning, {}),
        "Q-learning by sarsa.py": (sarsa, {"expected": True, "greedy_target": True}),
        "Sarsa, α = 1": (sarsa, {"learning_rate": 1.0}),
        "Expected Sarsa, α = 1": (sarsa, {"learning_rate": 1.0, "expected": True}),
    }
    curves = {}
    ways = {}
    for name, (script, flags) in algorithms.items():
        returns = []
        found = []
        for seed in range(1, runs + 1):
            q_table = learn(script, lambda q, r, out=returns: out.append(r), seed=seed, **(task | flags))
            found.append(greedy_way(q_table))
        curves[name] = np.reshape(returns, (runs, -1)).mean(0)
        ways[name] = {way: found.count(way) for way in (*WAYS, "never arrives")}
    rows = [(name, i + 1, f"{value:.2f}") for name, c in curves.items() for i, value in enumerate(c)]
    write("book_cliff", ["algorithm", "episode", "episodic_return"], rows)

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {"Sarsa": "C0", "Expected Sarsa": "C2", "Q-learning": "C3"}
    for name, colour in colours.items():
        smooth = np.convolve(curves[name], np.ones(10) / 10, "valid")
        left.plot(np.arange(10, 501), smooth, color=colour, label=name)
        if name in CLIFF:
            left.axhline(CLIFF[name], color=colour, linestyle=":", label=f"{name}, published")
    left.set(xlabel="episodes", ylabel="episodic return", xlim=(0, 500), ylim=(-100, 0))
    left.set_title(f"while learning, mean of {runs} runs and 10 episodes")
    left.legend(fontsize=8, loc="lower right")
    draw_ways(right, {name: ways[name] for name in colours})
    save(figure, "book_cliff")

    result = [(f"{name}, episodes 101 to 500", curves[name][100:].mean(), CLIFF.get(name)) for name in curves]
    for name, (row, exploring, greedy) in WAYS.items():
        result.append((f"{name}, ε = 0.1", worth(way(row), 0.1), exploring))
        result.append((f"{name}, ε = 0", worth(way(row), 0.0), greedy))
    for name, counts in ways.items():
        result += [
            (f"{name}: greedy way {way}, runs of {runs}", count, None) for way, count in counts.items()
        ]
    return result


def draw_ways(axes, ways: dict[str, dict[str, int]]) -> None:
    """The map with the three ways, and how many runs of each algorithm end with which as their greedy one."""
    tiles = np.ones((4, 12))
    tiles[3, 1:11] = 0.7
    axes.imshow(tiles, cmap="gray", vmin=0, vmax=1.05)
    axes.set_xticks(np.arange(0.5, 11.5), [])
    axes.set_yticks(np.arange(0.5, 3.5), [])
    axes.grid(color="0.85")
    axes.tick_params(length=0)
    axes.text(5.5, 3, "the cliff", ha="center", va="center")
    axes.text(0, 3.25, "start", ha="center", va="center", fontsize=8)
    axes.text(11, 3.25, "goal", ha="center", va="center", fontsize=8)
    text = [f"{'worth with':14}{'ε = 0.1':>8}{'ε = 0':>7}   " + "".join(f"{name:>16}" for name in ways)]
    for i, (name, (row, _, _)) in enumerate(WAYS.items()):
        shift = 0.15 * (1 - i)
        columns = [shift, shift, *range(1, 11), 11 - shift, 11 - shift]
        axes.plot(columns, [3, *[row] * 12, 3], color=f"C{4 + i}", linewidth=3)
        axes.text(5.5, row - 0.12, name, color=f"C{4 + i}", ha="center", va="bottom", fontsize=9)
        values = f"{worth(way(row), 0.1):8.1f}{worth(way(row), 0.0):7.0f}   "
        text.append(f"{name:14}{values}" + "".join(f"{counts[name]:16}" for counts in ways.values()))
    text.append(f"{'never arrives':32}" + "".join(f"{c['never arrives']:16}" for c in ways.values()))
    axes.set_title("three ways: exact values, and the runs that end with each")
    style = {"ha": "center", "va": "top", "fontsize": 7, "family": "monospace"}
    axes.text(0.5, -0.1, "\n".join(text), transform=axes.transAxes, **style)


CARDS = {card: (4 if card == 10 else 1) / 13 for card in range(1, 11)}  # an ace is 1; 10 has four faces


def add(total: int, ace: bool, card: int) -> tuple[int, bool]:
    """A hand's sum with one card more. ace: whether an ace counts 11; it counts 1 where 11 is too much."""
    total += card
    if card == 1 and total + 10 <= 21:
        return total + 10, True
    if total > 21 and ace:
        return total - 10, False
    return total, ace


@cache
def dealer(total: int, ace: bool) -> dict[int, float]:
    """Chances of the sums with which a dealer ends who draws below 17; 22 stands for every sum above 21."""
    if total >= 17:
        return {min(total, 22): 1.0}
    chances: dict[int, float] = {}
    for card, p in CARDS.items():
        for end, q in dealer(*add(total, ace, card)).items():
            chances[end] = chances.get(end, 0.0) + p * q
    return chances


@cache
def worth_of_sticking(total: int, shown: int) -> float:
    chances = dealer(*add(0, False, shown))
    return sum(p * ((end == 22 or total > end) - (end != 22 and total < end)) for end, p in chances.items())


def hands(policy: np.ndarray | None):
    """A function of a hand to what sticking and hitting are worth if `policy` goes on; None is the best one.

    policy: (32, 11, 2), the action for the player's sum, the card shown, a usable ace: 0 sticks, 1 hits.
    """

    @cache
    def both(total: int, shown: int, ace: bool) -> tuple[float, float]:
        hit = 0.0
        for card, p in CARDS.items():
            total2, ace2 = add(total, ace, card)
            if total2 > 21:
                hit -= p
            else:
                action = None if policy is None else policy[total2, shown, int(ace2)]
                values = both(total2, shown, ace2)
                hit += p * (max(values) if action is None else values[action])
        return worth_of_sticking(total, shown), hit

    return both


def best_in_blackjack() -> np.ndarray:
    """The best policy, (32, 11, 2); 0 for hands that do not exist."""
    both = hands(None)
    policy = np.zeros((32, 11, 2), dtype=int)
    for shown in CARDS:
        for ace in (0, 1):
            for total in range(12 if ace else 4, 22):
                policy[total, shown, ace] = int(np.argmax(both(total, shown, bool(ace))))
    return policy


def worth_in_blackjack(policy: np.ndarray) -> float:
    """The exact value of a policy, (32, 11, 2), in Blackjack-v1 with sab=True, over an infinite deck."""
    both = hands(policy)
    mean = 0.0
    for first, p in CARDS.items():
        for second, q in CARDS.items():
            total, ace = add(*add(0, False, first), second)
            for shown, s in CARDS.items():
                action = policy[total, shown, int(ace)]
                value = both(total, shown, ace)[action]
                if total == 21 and action == 0:
                    # Ace and ten at once win, unless the dealer has them, too.
                    value = 1.0 - {1: CARDS[10], 10: CARDS[1]}.get(shown, 0.0)
                mean += p * q * s * value
    return mean


def blackjack(seeds: int = 3) -> list[tuple]:
    """Figure 5.2. Returns rows of (what, measured, published)."""
    every = BLACKJACK_SETTINGS["total_episodes"] // 50
    curves = []
    policies = []

    def after_episode(q_table, episodic_return):
        counter[0] += 1
        if counter[0] % every == 0:
            curve.append(worth_in_blackjack(np.array(q_table).argmax(1).reshape(32, 11, 2)))

    task = {"env_id": "Blackjack-v1", "env_kwargs": '{"sab": true}', **BLACKJACK_SETTINGS}
    for seed in range(1, seeds + 1):
        counter = [0]
        curve = []
        q_table = learn(sarsa, after_episode, seed=seed, **task)
        policies.append(q_table.argmax(1).reshape(32, 11, 2))
        curves.append(curve)
    rows = [(s + 1, (i + 1) * every, f"{v:.5f}") for s, c in enumerate(curves) for i, v in enumerate(c)]
    write("book_blackjack", ["seed", "episode", "exact_value"], rows)

    figure = Figure(figsize=(12, 4.3), layout="constrained")
    maps = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    best = best_in_blackjack()
    for axes, ace, name in zip(maps, (1, 0), ("usable ace", "no usable ace"), strict=False):
        image = policies[0][11:22, 1:, ace]
        axes.imshow(image, origin="lower", cmap="Pastel1_r", vmin=0, vmax=1, aspect="auto")
        for (row, column), hit in np.ndenumerate(image):
            differs = hit != best[11 + row, 1 + column, ace]
            style = {"weight": "bold", "color": "C3"} if differs else {}
            axes.text(column, row, "hit" if hit else "stick", ha="center", va="center", fontsize=7, **style)
        axes.set_xticks(range(10), ["A", *range(2, 11)])
        axes.set_yticks(range(11), range(11, 22))
        axes.set(title=name, xlabel="the dealer shows", ylabel="the player's sum", ylim=(ace - 0.5, 10.5))
    figure.suptitle("Blackjack by Monte Carlo, seed 1; bold: the best policy does the opposite")
    for seed, curve in enumerate(curves):
        maps[2].plot(np.arange(1, 51) * every, curve, label=f"seed {seed + 1}: {curve[-1]:.4f}")
    maps[2].axhline(BLACKJACK, color="grey", linestyle=":", label=f"the best policy: {BLACKJACK}")
    maps[2].set(title="exact value of the greedy policy", xlabel="episodes", ylim=(-0.1, -0.04))
    maps[2].legend(fontsize=8)
    save(figure, "book_blackjack")
    result = [("the best policy", worth_in_blackjack(best_in_blackjack()), BLACKJACK)]
    for limit, mark in ((20, -0.350), (17, -0.076)):
        policy = np.zeros((32, 11, 2), dtype=int)
        policy[:limit] = 1
        result.append((f"stick on {limit} and above", worth_in_blackjack(policy), mark))
    return result + [(f"learned, seed {s + 1}", curve[-1], BLACKJACK) for s, curve in enumerate(curves)]


FIGURES = {"walk": walk, "n_step": n_step, "cliff": cliff, "blackjack": blackjack}


def main(*names: str) -> None:
    path = HERE / "results" / "book.csv"
    rows = []
    if path.exists():
        with open(path) as file:
            rows = [row for row in csv.reader(file)][1:]
    for name in names or FIGURES:
        measured = FIGURES[name]()
        rows = [row for row in rows if row[0] != name]
        for what, value, mark in measured:
            rows.append([name, what, f"{value:.4g}", "" if mark is None else f"{mark:.4g}"])
            print(*rows[-1], sep="   ", flush=True)
        write("book", ["figure", "what", "measured", "published"], rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
