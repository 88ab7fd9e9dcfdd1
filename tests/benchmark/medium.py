r"""Two robots, learned from recordings of half-way agents: decision transformer, behaviour cloning, the data.

Run: python tests/benchmark/medium.py

It wants two datasets. Each is played by an agent that had a fifth of its usual training, with 0, 10, 20 and
30% of its actions drawn at random:

    python algos/ppo_continuous.py --env-id Hopper-v5 --total-timesteps 200000 --seed 102 \
        --eval-episodes 20 --run-dir runs/hopper
    python algos/tools/collect.py runs/hopper --dataset-id hopper/medium-v0 \
        --episodes 800 --random-share 0 0.1 0.2 0.3
    python algos/ppo_continuous.py --env-id HalfCheetah-v5 --total-timesteps 200000 --seed 103 \
        --eval-episodes 20 --run-dir runs/cheetah
    python algos/tools/collect.py runs/cheetah --dataset-id halfcheetah/medium-v0 \
        --episodes 400 --random-share 0 0.1 0.2 0.3

All figures go to results/medium.csv, and a table of them is printed:

    data        mean return of all episodes of the dataset; best tenth: of its best episodes
    asked       decision_transformer.py, asked for TARGETS, seeds 1, 2, 3: mean of 40 episodes each
    cloned      the same with --no-condition, which is behaviour cloning
    asked, bf16 asked, with --bf16 (the hopper only)
    normalised  0 for random play, 100 for D4RL's expert, https://arxiv.org/abs/2004.07219
"""

import csv
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "algos"))
import decision_transformer as dt  # noqa: E402 (found through the line above)

SETTINGS = {"total_updates": 2500, "context_length": 20, "learning_rate": 1e-3, "warmup_updates": 100}
SETTINGS |= {"dropout": 0.1, "eval_every": 10**9, "eval_episodes": 40, "num_envs": 1}
TARGETS = {"hopper/medium-v0": 3300.0, "halfcheetah/medium-v0": 4300.0}
RANDOM = {"hopper/medium-v0": -20.27, "halfcheetah/medium-v0": -280.18}  # returns in D4RL
EXPERT = {"hopper/medium-v0": 3234.3, "halfcheetah/medium-v0": 12135.0}
SEEDS = (1, 2, 3)
COLUMNS = ("dataset", "what", "seed", "mean", "deviation", "normalised", "seconds")


def normalised(dataset: str, returns: float) -> float:
    """0: random play, 100: D4RL's expert."""
    return 100 * (returns - RANDOM[dataset]) / (EXPERT[dataset] - RANDOM[dataset])


def best_tenth(returns: np.ndarray) -> np.ndarray:
    """The highest returns, a tenth of all. (n,) -> (n // 10,)."""
    return np.sort(returns)[len(returns) - len(returns) // 10 :]


def row(dataset: str, what: str, seed: int | str, mean: float, deviation: float, seconds: float = 0) -> dict:
    down = float(np.floor(100 * mean) / 100)  # never rounded up
    score = float(np.floor(10 * normalised(dataset, mean)) / 10)
    values = (down, round(float(deviation), 2), score, round(seconds))
    return dict(zip(COLUMNS, (dataset, what, seed, *values), strict=True))


def measure(dataset: str, seed: int, condition: bool, **settings) -> dict:
    """Train once; the row of its evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        given = SETTINGS | {"dataset": dataset, "condition": condition, "run_dir": f"{folder}/run"} | settings
        if condition:
            given["target_returns"] = [TARGETS[dataset]]
        started = time.process_time()
        results = dt.train(dt.Args(seed=seed, **given))
        had = json.loads(Path(f"{folder}/run/args.json").read_text())  # bf16: if the processor has it
    what = ("asked" if condition else "cloned") + (", bf16" if had["bf16"] else "")
    seconds = time.process_time() - started
    return row(dataset, what, seed, results["mean_reward"], results["std_reward"], seconds)


def main() -> None:
    rows = []
    for dataset in TARGETS:
        _, data = dt.open_dataset(dt.Args(dataset=dataset))
        returns = np.array([episode.rewards.sum() for episode in data.iterate_episodes()])
        for what, some in (("data", returns), ("best tenth", best_tenth(returns))):
            rows.append(row(dataset, what, "", some.mean(), some.std()))
            print(rows[-1], flush=True)
        for seed in SEEDS:
            more = (
                [(True, True)] if dataset == next(iter(TARGETS)) and dt.has_bf16(torch.device("cpu")) else []
            )
            for condition, bf16 in ((True, False), (False, False), *more):
                rows.append(measure(dataset, seed, condition, bf16=bf16))
                print(rows[-1], flush=True)
        with open(HERE / "results" / "medium.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
