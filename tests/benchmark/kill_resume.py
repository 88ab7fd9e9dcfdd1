"""Kills a training run at a random moment (kill -9), resumes it, and prints the score that it reaches.

Run: python tests/benchmark/kill_resume.py [script] [repetitions] [flags of the script …]
Example: python tests/benchmark/kill_resume.py ppo 10
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALGOS = Path(__file__).parents[2] / "algos"


def main(name: str = "ppo", repetitions: str = "10", *flags: str) -> None:
    for repetition in range(1, int(repetitions) + 1):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            command = [sys.executable, str(ALGOS / f"{name}.py")]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(
                [*command, *flags, "--seed", str(repetition), "--run-dir", run_dir], **quiet
            )
            while not list(run_dir.glob("checkpoint.pt")) + list(run_dir.glob("q_table.npz")):
                time.sleep(0.05)
            wait = random.uniform(0, 4)
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            killed = process.wait() == -signal.SIGKILL
            subprocess.run([*command, "--resume", run_dir], check=True, **quiet)
            results = json.loads((run_dir / "results.json").read_text())
        ending = (
            f"killed {wait:.2f} s after the first checkpoint" if killed else "had finished before the kill"
        )
        score = f"{results['mean_reward']:.1f} ± {results['std_reward']:.1f}"
        print(f"seed {repetition}: {ending}, resumed: {score}")


if __name__ == "__main__":
    main(*sys.argv[1:])
