"""Runs gpu_cases.py, in processes of its own: where PyTorch has met the imitated GPU, it can no longer fork,
as other tests do."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("gpu_cases.py")


@pytest.mark.parametrize("part", ["learns_what", "how_often"])
def test_scripts_on_an_imitated_gpu(part):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", CASES, "-k", part]
    run = subprocess.run(command, cwd=CASES.parents[1], capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
