"""Every test file can import the scripts by name; a test uses one thread, since tests run side by side."""

import os
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read by PyTorch when it is imported, here and in processes of tests
ALGOS = Path(__file__).parents[1] / "algos"
sys.path.insert(0, str(ALGOS))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread():
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
