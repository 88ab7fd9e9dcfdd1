"""Every test file can import the scripts by name, and small networks run on one thread, as in the scripts."""

import sys
from pathlib import Path

import pytest

ALGOS = Path(__file__).parents[1] / "algos"
sys.path.insert(0, str(ALGOS))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread():
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
