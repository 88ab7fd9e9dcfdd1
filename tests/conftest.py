"""Every test file can import the scripts by name; a test uses one thread, since tests run side by side."""

import os
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read by PyTorch when it is imported, here and in processes of tests
ALGOS = Path(__file__).parents[1] / "algos"
sys.path.insert(0, str(ALGOS))
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """What a worker gets in one piece: a file, so that its runs are made once. test_run_folder.py takes half
    of all time: there the tests of one script are a piece."""
    for item in items:
        piece = item.path.name
        if piece == "test_run_folder.py":
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            piece += " " + parameters.get("name", parameters.get("finished_run", ""))
        item.add_marker(pytest.mark.xdist_group(piece))


@pytest.fixture(autouse=True)
def one_thread():
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
