"""Draw figures/reinforce_baselines.png: what reward-to-go and baselines do to the variance of the gradient.

    python tests/benchmark/reinforce_baselines.py           trains 4 variants x 3 seeds on CartPole, a minute

Advantages are not normalised here, or their scale would hide the difference. A longer episode has a larger
gradient, so the variance is drawn against the return that the policy has reached. All points are in the CSV.
"""

import csv
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[2] / "algos"))
import reinforce

FIGURES = Path(__file__).parent / "figures"
VARIANTS = {
    "none, whole return": {"baseline": "none", "reward_to_go": False},
    "none": {"baseline": "none"},
    "batch": {"baseline": "batch"},
    "value": {"baseline": "value"},
}
BINS = [20, 40, 80, 160, 320]  # of the return; above, whole batches reach 500 and nothing varies


def points(flags: dict, seed: int) -> list[tuple[int, float, float]]:
    """Train and return (episodes, return, variance of the gradient estimate) for each update."""
    with tempfile.TemporaryDirectory() as run_dir:
        args = reinforce.Args(seed=seed, normalize_returns=False, eval_episodes=1, run_dir=run_dir, **flags)
        reinforce.train(args)
        accumulator = EventAccumulator(run_dir)
        accumulator.Reload()
        tags = ("charts/episodic_return", "charts/grad_variance")
        returns, variances = ([event.value for event in accumulator.Scalars(tag)] for tag in tags)
    return [(args.num_envs * (i + 1), *pair) for i, pair in enumerate(zip(returns, variances, strict=True))]


def main() -> None:
    rows = [
        (name, seed, *point)
        for name, flags in VARIANTS.items()
        for seed in (1, 2, 3)
        for point in points(flags, seed)
    ]
    FIGURES.mkdir(exist_ok=True)
    with open(FIGURES / "reinforce_baselines.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["baseline", "seed", "episodes", "episodic_return", "grad_variance"])
        writer.writerows((*row[:3], f"{row[3]:.1f}", f"{row[4]:.3g}") for row in rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name in VARIANTS:
        data = np.array([row[1:] for row in rows if row[0] == name])  # seed, episodes, return, variance
        episodes = np.unique(data[:, 1])
        runs = np.stack([data[data[:, 0] == seed, 2] for seed in np.unique(data[:, 0])])
        left.plot(episodes, runs.mean(0), label=name)
        left.fill_between(episodes, runs.min(0), runs.max(0), alpha=0.15)
        bins = np.digitize(data[:, 2], BINS)
        medians = [
            np.median(data[bins == b, 3]) if (bins == b).any() else np.nan for b in range(1, len(BINS))
        ]
        right.plot(np.sqrt(np.multiply(BINS[:-1], BINS[1:])), medians, "o-", label=name)
        print(
            f"{name:20}",
            "  ".join(f"{x:10.3g}" for x in medians),
            f"   last 100 episodes {runs[:, -12:].mean():.0f}",
        )
    left.set(
        xlabel="episodes",
        ylabel="return (mean and range of 3 seeds)",
        title="CartPole-v1, --no-normalize-returns",
    )
    right.set(xscale="log", yscale="log", xlabel="return reached", ylabel="variance of the gradient estimate")
    right.set_xticks([25, 50, 100, 200], ["25", "50", "100", "200"])
    right.minorticks_off()
    right.set_title("median over updates and seeds")
    left.legend(title="--baseline")
    figure.tight_layout()
    figure.savefig(FIGURES / "reinforce_baselines.png", dpi=100)


if __name__ == "__main__":
    main()
