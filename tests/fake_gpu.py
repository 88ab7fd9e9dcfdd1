"""A GPU where there is none: its tensors say `fakegpu:0`, and the CPU computes what they hold.

    with fake_gpu() as gpu:
        train(args)                 # on the device DEVICE
    gpu.copies["to the GPU"], gpu.waits

Every operation of PyTorch passes through `FakeGPU.__torch_dispatch__`. It refuses what a GPU would refuse, to
mix tensors of both devices, and the GPU's own random numbers, whose state no checkpoint has. It counts the
copies between the devices, and how often Python has to wait for a number. Since the CPU computes, the results
are those of the CPU, bit for bit. What it cannot show: a GPU's own rounding, and its speed.
"""

import collections
import contextlib

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
COPIES = (aten._to_copy, aten.copy_)
# How long their result is depends on the numbers, so Python has to wait for them.
DATA_DEPENDENT = (aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten._local_scalar_dense)


class Module(backend_registration._DummyBackendModule):
    """What PyTorch expects of the module torch.fakegpu."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("fakegpu", Module())
DEVICE = torch.device("fakegpu", 0)


class OnGPU(torch.Tensor):
    """A tensor of the GPU; `raw` is the CPU's tensor with its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "OnGPU":
        options = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, raw.shape, device=DEVICE, **options)

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor of the GPU after the GPU was gone")

    def __repr__(self, **_) -> str:
        return f"OnGPU({self.raw})"

    def __reduce_ex__(self, protocol):
        return self.raw.__reduce_ex__(protocol)  # torch.save

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError("can't convert a tensor of the GPU to numpy: use Tensor.cpu() first")
        return self.detach().cpu().numpy()

    def tolist(self):
        return self.numpy(force=True).tolist()

    @property
    def data(self) -> "OnGPU":
        return self.detach()

    @data.setter
    def data(self, other: "OnGPU") -> None:
        torch.Tensor.data.__set__(self, other)
        self.raw = other.raw


class FakeGPU(TorchDispatchMode):
    """Does every operation on the CPU, and gives its results to the device that a GPU would give them to."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = collections.Counter()  # "to the GPU" and "to the CPU"
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket
        if name in (aten._pin_memory, aten.is_pinned):
            return args[0].clone() if name is aten._pin_memory else False
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        of_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
        of_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnGPU)]
        device = kwargs.get("device")
        if device is None:
            device = DEVICE if of_gpu and name is not aten.copy_ else "cpu"
            device = args[0].device if name is aten.copy_ else device
        to_gpu = torch.device(device).type == DEVICE.type
        if not of_gpu and not to_gpu:
            return func(*args, **kwargs)
        if name in COPIES:
            if of_gpu and not to_gpu:
                self.copies["to the CPU"] += 1
                self.waits += 1
            elif of_cpu and to_gpu:
                self.copies["to the GPU"] += 1
        elif of_gpu and any(tensor.dim() for tensor in of_cpu):  # a single number may come from the CPU
            shapes = [tuple(tensor.shape) for tensor in of_cpu]
            raise RuntimeError(f"{func}: tensors {shapes} of the CPU beside those of the GPU")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{func} draws random numbers of the GPU: checkpoints have the CPU's state")
        masks = name in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        self.waits += masks or name in DATA_DEPENDENT

        def raw(part):
            return part.raw if isinstance(part, OnGPU) else part

        options = tree_map(raw, kwargs) | ({"device": "cpu"} if "device" in kwargs else {})
        result = func(*tree_map(raw, args), **options)
        if not to_gpu:
            return args[0] if name is aten.copy_ else result
        result = tree_map(lambda part: OnGPU(part) if isinstance(part, torch.Tensor) else part, result)
        # In-place operations and views must return, or share the memory of, what they were given.
        return return_and_correct_aliasing(func, args, kwargs, result) if of_gpu else result


def enter_no_grad(inference_mode) -> None:
    inference_mode.no_grad = torch.no_grad()
    inference_mode.no_grad.__enter__()


def leave_no_grad(inference_mode, *error) -> None:
    inference_mode.no_grad.__exit__(*error)


@contextlib.contextmanager
def fake_gpu():
    """Computes with the device DEVICE in this block. Yields the FakeGPU, which counts."""
    real = torch.inference_mode.__enter__, torch.inference_mode.__exit__
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=DEVICE) makes a copy that is counted
    # Tensors of the inference mode cannot be wrapped: here it is only what torch.no_grad is.
    torch.inference_mode.__enter__ = enter_no_grad
    torch.inference_mode.__exit__ = leave_no_grad
    try:
        with FakeGPU() as gpu:
            yield gpu
    finally:
        torch.inference_mode.__enter__, torch.inference_mode.__exit__ = real
        torch._C._set_only_lift_cpu_tensors(lifts)
