"""What every script does on a GPU, tried on one that the CPU imitates, by test_gpu.py (see fake_gpu.py)."""

import importlib
import shutil
import signal
from contextlib import nullcontext

import counter_env  # noqa: F401 (registers small environments)
import pytest
import torch
from fake_gpu import DEVICE, fake_gpu
from torch.nn.attention import SDPBackend, sdpa_kernel

PONG = ["--env-id", "ALE/Pong-v5", "--no-bf16"]  # no autocast for a device that PyTorch does not know
ROLLOUT = ["--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2", "--update-epochs", "2"]
TINY = {  # the flag of the budget, half of a budget, flags
    "reinforce": ("--total-episodes", 4, ["--num-envs", "2", "--baseline", "value", "--normalize-obs"]),
    "a2c_continuous": ("--total-timesteps", 64, ["--env-id", "Pendulum-v1", "--num-envs", "4"]),
    "ppo": ("--total-timesteps", 32, [*ROLLOUT, "--clip-vloss"]),
    "ppo_continuous": ("--total-timesteps", 32, ["--env-id", "Pendulum-v1", *ROLLOUT, "--use-sde"]),
    "ppo_atari": ("--total-timesteps", 32, [*PONG, *ROLLOUT]),
    "rnd_ppo": ("--total-timesteps", 32, ["--env-id", "CartPole-v1", *ROLLOUT, "--init-steps", "8"]),
    "icm_ppo": ("--total-timesteps", 32, ["--env-id", "CartPole-v1", *ROLLOUT, "--init-steps", "8"]),
    "dqn": ("--total-timesteps", 60, ["--learning-starts", "20", "--buffer-size", "100"]),
    "dqn_atari": (
        "--total-timesteps",
        40,
        [*PONG, "--learning-starts", "20", "--buffer-size", "100", "--target-network-frequency", "20"],
    ),
    "decision_transformer": (
        "--total-updates",
        4,
        ["--env-id", "CartPole-v1", "--warmup-updates", "1", "--random-episodes", "5", "--eval-every", "2"],
    ),
}


@pytest.fixture(autouse=True)
def handlers():
    """A run of a script in this process changes what Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(monkeypatch, name: str, on_gpu: bool, *flags) -> tuple[dict, list]:
    """Train, or evaluate; returns the results, and how often the training waited and copied to the GPU."""
    module = importlib.import_module(name)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--eval-episodes", "1", *map(str, flags)])
    args = module.parse_args()
    counts = []
    # The CPU's own attention, in one piece, rounds otherwise than the same in several operations.
    attention = sdpa_kernel(SDPBackend.MATH)
    with monkeypatch.context() as patch, attention, fake_gpu() if on_gpu else nullcontext() as gpu:
        setup, finish = module.setup_torch, module.Run.finish

        def finish_and_count(run, device):
            counts.extend((gpu.waits, gpu.copies["to the GPU"]) if on_gpu else ())
            return finish(run, device)

        patch.setattr(module, "MAX_EVAL_STEPS", 20)
        patch.setattr(module.Run, "finish", finish_and_count)
        if on_gpu:
            patch.setattr(module, "setup_torch", lambda args: (setup(args), DEVICE)[1])
        device = module.setup_torch(args)
        if args.evaluate:
            return module.evaluate(args, module.Path(args.evaluate), device), counts
        return module.train(args), counts


def differences(one, other, place: str = "") -> list[str]:
    """Where two checkpoints differ; the time that a run took may."""
    if isinstance(one, dict):
        keys = (one.keys() | other.keys()) - {"wall_time_s"}
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{place}/{key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for n, pair in pairs for d in differences(*pair, f"{place}/{n}")]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    else:
        same = one == other
    return [] if same else [place]


@pytest.mark.parametrize("name", TINY)
def test_a_gpu_learns_what_the_cpu_learns_and_checkpoints_fit_both(name, tmp_path, monkeypatch):
    """Begun, resumed and evaluated on either device: the same weights and scores, bit for bit."""
    budget, half, flags = TINY[name]
    first, last, scores = {}, {}, []
    for run, on_gpu in (("cpu", False), ("gpu", True)):
        start(monkeypatch, name, on_gpu, "--run-dir", tmp_path / run, budget, half, *flags)
        first[run] = torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)
    shutil.copytree(tmp_path / "cpu", tmp_path / "mixed")  # begun on the CPU, resumed on the GPU
    for run, on_gpu in (("cpu", False), ("gpu", True), ("mixed", True)):
        results, _ = start(monkeypatch, name, on_gpu, "--resume", tmp_path / run, budget, 2 * half)
        last[run] = torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)
        scores.append(results["mean_reward"])
    for run, on_gpu in (("cpu", True), ("gpu", False)):
        results, _ = start(monkeypatch, name, on_gpu, "--evaluate", tmp_path / run)
        scores.append(results["mean_reward"])
    assert differences(first["cpu"], last["cpu"]), "nothing was learned"
    assert differences(first["cpu"], first["gpu"]) == []
    assert differences(last["cpu"], last["gpu"]) == differences(last["cpu"], last["mixed"]) == []
    assert len(set(scores)) == 1


@pytest.mark.parametrize(
    ("name", "less", "more", "waits", "copies"),
    [
        ("ppo_atari", ["--update-epochs", "1"], ["--update-epochs", "3"], 0, 0),
        ("ppo_atari", ["--num-steps", "8"], ["--num-steps", "16"], 8, 8),
        ("ppo", ["--update-epochs", "1"], ["--update-epochs", "3"], 2, 2),
        ("rnd_ppo", ["--update-epochs", "1"], ["--update-epochs", "3"], 0, 2),
        ("rnd_ppo", ["--num-steps", "8"], ["--num-steps", "16"], 8, 8),
        ("icm_ppo", ["--update-epochs", "1"], ["--update-epochs", "3"], 0, 2),
        ("icm_ppo", ["--num-steps", "8"], ["--num-steps", "16"], 8, 8),
    ],
)
def test_how_often_python_waits_for_a_gpu(name, less, more, waits, copies, tmp_path, monkeypatch):
    """In one rollout, with more of something: a step should wait for its actions only, an epoch hardly."""
    counts = []
    for number, flags in enumerate((less, more)):
        rollout = 2 * int(flags[1] if flags[:1] == ["--num-steps"] else 8)
        command = ["--run-dir", tmp_path / str(number), *TINY[name][2], *flags, "--total-timesteps", rollout]
        counts.append(start(monkeypatch, name, True, *command)[1])
    assert [more - less for less, more in zip(*counts, strict=True)] == [waits, copies]
