"""A GPU that is none: tensors that say they live on cuda:0, hold their numbers on the CPU, and obey
a GPU's rules.

`with pretend_gpu() as gpu:` runs code for `--device cuda` on any machine. RuntimeError where a real
GPU would raise one: tensors of two devices in one operation (scalars of the CPU are welcome
everywhere, CPU indices of a GPU tensor are), a generator of the other device, numpy of a GPU
tensor. `gpu.syncs` counts, by the place in our code, what makes the host wait for the device:
reading a number, copying to the CPU, operations whose shape depends on values.
"""

import collections
import contextlib
import functools
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # imports itself at the first operation otherwise, and meets the stand-ins
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parent.parent
PINS = {aten._pin_memory.default, aten.pin_memory.default}
INDEXING = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip
WAITS = {  # reads a number, or the shape of what comes depends on values
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default,
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
    aten.bincount.default,
}  # fmt: skip


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class OnGpu(torch.Tensor):
    """A tensor of cuda:0 to whoever asks; `inner` holds the numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        like |= {"dtype": inner.dtype, "layout": inner.layout, "device": "cpu"}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, requires_grad=False, **like)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    # what Python sees; autograd's engine sees a CPU and needs no driver
    device = property(lambda self: torch.device("cuda:0"))
    is_cuda = property(lambda self: True)

    def to(self, *args, **kwargs):
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        if "optim" in Path(sys._getframe(1).f_code.co_filename).parent.name:
            return self  # fused optimisers group tensors by the device that C++ sees
        if device is not None and not is_gpu(device):
            if not non_blocking:
                Rules.now.note_sync("to the cpu")
            return self.detach().inner.to(dtype=dtype or self.dtype, copy=True)
        kept = {"dtype": dtype, "memory_format": layout, "copy": kwargs.get("copy") or None}
        kept = {key: value for key, value in kept.items() if value is not None}
        return super().to(**kept) if kept else self

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.to("cpu").tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of pretend_gpu")


def to_inner(value):
    """What the operation is to be done with on the CPU."""
    if isinstance(value, OnGpu):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value


class Rules(TorchDispatchMode):
    now = None  # those in force

    def __init__(self):
        super().__init__()
        self.syncs, self.operations = collections.Counter(), 0
        self.generators = []  # those made for the GPU

    def note_sync(self, what: str) -> None:
        for frame in reversed(traceback.extract_stack()):
            if Path(frame.filename).parent == ROOT:
                self.syncs[f"{Path(frame.filename).name}:{frame.name}: {what}"] += 1
                return
        self.syncs[f"elsewhere: {what}"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        leaves = tree_leaves((args, kwargs))
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        on_gpu = bool(ours) or is_gpu(target)
        if function in PINS:
            return args[0].clone()
        rng = kwargs.get("generator")
        if rng is not None and on_gpu != (rng._cdata in {own._cdata for own in self.generators}):
            raise RuntimeError(f"{function}: expected a generator of the other device")
        if not on_gpu:
            return function(*args, **kwargs)
        self.operations += 1
        to_cpu = target is not None and not is_gpu(target)
        # in a backward pass it is of a cast, undone
        to_cpu = to_cpu and torch._C._current_graph_task_id() == -1
        if ours and target is None:
            self.check_devices(function, args, tensors)
        self.note_waits(function, args, kwargs, to_cpu)
        found = function(*tree_map(to_inner, args), **tree_map(to_inner, kwargs))
        return found if to_cpu else tree_map(self.back(tensors, target), found)

    def check_devices(self, function, args, tensors) -> None:
        others = [t for t in tensors if not isinstance(t, OnGpu) and t.dim()]
        if function in INDEXING:
            others = [] if isinstance(args[0], OnGpu) else others
        if others and function is not aten.copy_.default:
            raise RuntimeError(f"{function}: expected all tensors to be on one device, found two")

    def note_waits(self, function, args, kwargs, to_cpu: bool) -> None:
        by_mask = function in INDEXING and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if function in WAITS or by_mask:
            self.note_sync(str(function))
        copied = function is aten.copy_.default and not isinstance(args[0], OnGpu)
        at_once = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if (to_cpu or copied) and not at_once:
            self.note_sync(f"{function} to the cpu")

    def back(self, tensors, target):
        """What makes a result of an operation one of the GPU."""
        by_inner = {id(t.inner): t for t in tensors if isinstance(t, OnGpu)}
        cpu = {id(t) for t in tensors if not isinstance(t, OnGpu)}

        def wrap(value):
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in cpu:
                return OnGpu(value.clone()) if is_gpu(target) else value
            own = by_inner.get(id(value))
            return OnGpu(value) if own is None else own  # in place it gives its own argument back

        return wrap


@contextlib.contextmanager
def pretend_gpu():
    """One GPU of compute capability for bfloat16, without any."""
    rules, make, numpy = Rules(), torch.Generator, torch.Tensor.numpy
    save, autocast, future = torch.save, torch.autocast, torch.__future__
    gradients = {True: torch.no_grad, False: torch.enable_grad}
    on_cpu = functools.partial(tree_map, to_inner)

    def generator(device="cpu"):
        rng = make()
        if is_gpu(device):
            rules.generators.append(rng)
        return rng

    def refuse(tensor, *args, **kwargs):
        if isinstance(tensor, OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return numpy(tensor, *args, **kwargs)

    stand_ins = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_name", lambda *_: "a GPU that is none"),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_device_properties", lambda *_: mock.Mock(major=9, minor=0)),
        (torch, "Generator", generator),
        (torch.Tensor, "numpy", refuse),
        # inference tensors of a subclass cannot be written to
        (torch, "inference_mode", lambda mode=True: gradients[mode]()),
        # a checkpoint names the device of its tensors; ours are read to the CPU in any case
        (torch, "save", lambda value, file: save(on_cpu(value), file)),
        (torch, "autocast", lambda _, dtype=None, enabled=True: autocast("cpu", dtype, enabled)),
        (Rules, "now", rules),
    ]
    with contextlib.ExitStack() as stack:
        for stand_in in stand_ins:
            stack.enter_context(mock.patch.object(*stand_in))
        torch._C._ensureCUDADeviceGuardSet()  # as torch's fake tensors do without a driver
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        # or Module.to would move our tensors into parameters that are plain ones
        overwrite = future.set_overwrite_module_params_on_conversion
        stack.callback(overwrite, future.get_overwrite_module_params_on_conversion())
        overwrite(True)
        stack.enter_context(rules)
        yield rules
