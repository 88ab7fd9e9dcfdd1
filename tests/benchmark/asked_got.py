"""Asked for a return, what does decision_transformer.py get? Beside it what cloning the same data gets.

Run: python tests/benchmark/asked_got.py DATASET     trains three seeds of both, draws the picture

DATASET is a Minari dataset of LunarLander-v3 with good and bad episodes, from algos/tools/collect.py. All
figures go to results/asked_got.csv, the picture to figures/asked_got.png.

    asked      ten target returns from −200 to 280
    got        the mean episodic return of EPISODES episodes for each, of each of the seeds 1, 2 and 3
    rank       correlation of the ranks of asked and got (Spearman's), 1 if more asked is always more got
    cloned     the same with --no-condition, which is behaviour cloning and cannot be asked
"""

import csv
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "algos"))
import decision_transformer as dt  # noqa: E402 (found through the line above)

SETTINGS = {"total_updates": 3000, "context_length": 5, "learning_rate": 1e-3, "warmup_updates": 100}
SETTINGS |= {"eval_every": 10**9, "eval_episodes": 1, "num_envs": 1}
SEEDS = (1, 2, 3)
ASKED = np.linspace(-200, 280, 10)
EPISODES = 30


def play(agent: dt.Agent, args: dt.Args, wishes: np.ndarray) -> np.ndarray:
    """The returns of one episode for each wish, on start seeds that no training and no evaluation uses."""
    envs = dt.make_envs(args, len(wishes))
    seeds = dt.env_seeds(len(wishes), args.seed, 3, 0)
    run = SimpleNamespace(stopped=[])
    returns, _ = dt.play(agent, envs, torch.tensor(wishes, dtype=torch.float32), seeds, run)
    envs.close()
    return returns


def measure(dataset: str, seed: int, condition: bool, **settings) -> tuple[np.ndarray, float]:
    """Train once. Returns the returns that were got, (asked, EPISODES) or (EPISODES,), and seconds of CPU."""
    with tempfile.TemporaryDirectory() as folder:
        given = SETTINGS | {"dataset": dataset, "condition": condition, "run_dir": f"{folder}/run"} | settings
        started = time.process_time()
        dt.train(dt.Args(seed=seed, **given))
        seconds = time.process_time() - started
        args, _ = dt.open_dataset(dt.Args(seed=seed, **given))
        envs = dt.make_envs(args, 1)
        agent = dt.make_agent(args, envs, torch.device("cpu"))
        dt.load_checkpoint(args.run_dir, agent=agent)
    if not condition:
        return play(agent, args, np.zeros(5 * EPISODES)), seconds
    return play(agent, args, ASKED.repeat(EPISODES)).reshape(len(ASKED), EPISODES), seconds


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, for numbers that are all different."""
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


def draw(got: np.ndarray, cloned: np.ndarray, of_data: np.ndarray) -> None:
    """Above: what was got for what was asked. Below: which returns the data hold. got: (seeds, asked)."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot(ASKED, ASKED, color="0.6", linewidth=1, linestyle="--", label="asked")
    errors = np.abs(np.stack((got.min(0), got.max(0))) - got.mean(0))
    above.errorbar(ASKED, got.mean(0), errors, color="tab:blue", marker="o", capsize=3, label="got")
    for i, mean in enumerate(cloned):
        above.axhline(mean, color="tab:orange", linewidth=1, label=None if i else "behaviour cloning")
    above.set(ylabel="episodic return", title=f"LunarLander, runs: {len(got)} (bars: lowest to highest)")
    above.legend(frameon=False)
    below.hist(of_data.clip(-400, 320), bins=60, color="0.7")
    below.set(xlabel="return that is asked for", ylabel="episodes\nin the data")
    for panel in (above, below):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "figures" / "asked_got.png", dpi=100)


def write(rows: list[tuple]) -> None:
    with open(HERE / "results" / "asked_got.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("seed", "asked", "got", "deviation"))
        writer.writerows(rows)


def main() -> None:
    dataset = sys.argv[1]
    _, data = dt.open_dataset(dt.Args(dataset=dataset))
    of_data = np.array([sum(episode.rewards) for episode in data.iterate_episodes()])
    rows = []
    got = []
    cloned = []
    for seed in SEEDS:
        returns, seconds = measure(dataset, seed, condition=True)
        got.append(returns.mean(1))
        rank = rank_correlation(ASKED, got[-1])
        for asked, of_wish in zip(ASKED, returns, strict=True):
            rows.append((seed, round(asked, 1), round(of_wish.mean(), 2), round(of_wish.std(), 2)))
        means = np.round(got[-1], 1).tolist()
        print(f"seed {seed}: rank correlation {rank:.3f}, got {means}, {seconds:.0f} s", flush=True)
        returns, seconds = measure(dataset, seed, condition=False)
        cloned.append(returns.mean())
        rows.append((seed, "cloned", round(returns.mean(), 2), round(returns.std(), 2)))
        print(f"seed {seed}: cloned {returns.mean():.2f} ± {returns.std():.2f}, {seconds:.0f} s", flush=True)
        write(rows)
        draw(np.array(got), np.array(cloned), of_data)


if __name__ == "__main__":
    main()
