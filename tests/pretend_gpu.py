"""A GPU that is none: tensors that say they live on cuda:0, hold their numbers on the CPU, and obey a GPU's rules.

`with pretend_gpu() as gpu:` runs code for `--device cuda` on any machine. RuntimeError where a real GPU would raise
one: tensors of two devices in one operation (scalars of the CPU are welcome everywhere, CPU indices of a GPU tensor
are), a generator of the other device, numpy of a GPU tensor. `gpu.syncs` counts, by the place in our code, what makes
the host wait for the device: reading a number, copying to the CPU, operations whose shape depends on values.
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
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda:0")
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
BY_VALUE = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip


class OnGpu(torch.Tensor):
    """A tensor of cuda:0 to whoever asks; `inner` holds the numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="cpu", requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    device = property(lambda self: DEVICE)  # what Python sees; autograd's engine sees a CPU and needs no driver
    is_cuda = property(lambda self: True)

    def __repr__(self) -> str:
        return f"OnGpu({self.inner!r})"

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
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of pretend_gpu")


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def to_inner(value):
    """What the operation is to be done with on the CPU."""
    if isinstance(value, OnGpu):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value


class Rules(TorchDispatchMode):
    now = None  # those in force

    def __init__(self):
        super().__init__()
        self.syncs = collections.Counter()
        self.generators = []  # those made for the GPU
        self.operations = 0

    def note_sync(self, what: str) -> None:
        for frame in reversed(traceback.extract_stack()):
            if Path(frame.filename).parent == ROOT:
                self.syncs[f"{Path(frame.filename).name}:{frame.name}: {what}"] += 1
                return
        self.syncs[f"elsewhere: {what}"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = tree_flatten((args, kwargs))[0]
        leaves = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        target = next((leaf for leaf in flat if isinstance(leaf, torch.device)), None)
        ours = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
        if function in (aten._pin_memory.default, aten.pin_memory.default):
            return args[0].clone()
        rng, on_gpu = kwargs.get("generator"), bool(ours) or is_gpu(target)
        if rng is not None and on_gpu != (rng._cdata in {own._cdata for own in self.generators}):
            wanted, found = ("cuda", "cpu") if on_gpu else ("cpu", "cuda")
            raise RuntimeError(f"{function}: expected a {wanted!r} generator, found {found!r}")
        if not on_gpu:
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return function(*args, **kwargs)
        self.operations += 1
        name = str(function)
        others = [leaf for leaf in leaves if not isinstance(leaf, OnGpu) and leaf.dim()]
        to_cpu = target is not None and not is_gpu(target)
        to_cpu = to_cpu and torch._C._current_graph_task_id() == -1  # in a backward pass it is of a cast, undone
        if others and ours and target is None and function not in {*INDEXING, aten.copy_.default}:
            raise RuntimeError(f"{name}: expected all tensors to be on one device, found cuda:0 and cpu")
        if function in INDEXING and ours and not isinstance(args[0], OnGpu):
            raise RuntimeError(f"{name}: a tensor of the cpu indexed by one of cuda:0")
        if function in READS or function in BY_VALUE:
            self.note_sync(name)
        if function in INDEXING and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
        ):
            self.note_sync(f"{name} with a mask")
        if to_cpu or (function is aten.copy_.default and ours and not isinstance(args[0], OnGpu)):
            if not kwargs.get("non_blocking") and not (len(args) > 2 and args[2]):
                self.note_sync(f"{name} to the cpu")
        kwargs.pop("pin_memory", None)
        inner_args, inner_kwargs = tree_map(to_inner, (args, kwargs))
        found = function(*inner_args, **inner_kwargs)
        if to_cpu:
            return found
        by_inner = {id(t.inner): t for t in ours}
        cpu = {id(leaf) for leaf in leaves if not isinstance(leaf, OnGpu)}

        def back(value):
            if isinstance(value, torch.Tensor) and id(value) in cpu and is_gpu(target):
                return OnGpu(value.clone())
            if not isinstance(value, torch.Tensor) or id(value) in cpu:
                return value
            own = by_inner.get(id(value))
            return OnGpu(value) if own is None else own  # an operation in place gives its own argument back

        return tree_map(back, found)


@contextlib.contextmanager
def pretend_gpu():
    """One GPU of compute capability for bfloat16, without any."""
    rules, make = Rules(), torch.Generator

    def generator(device="cpu"):
        rng = make()
        if is_gpu(device):
            rules.generators.append(rng)
        return rng

    class Event:
        def record(self):
            pass

        def synchronize(self):
            pass

    numpy = torch.Tensor.numpy

    def refuse(tensor, *args, **kwargs):
        if isinstance(tensor, OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return numpy(tensor, *args, **kwargs)

    here = {
        "is_available": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1,
        "set_device": lambda device: None,
        "current_device": lambda: 0, "get_device_name": lambda *_: "a GPU that is none", "Event": Event,
        "get_device_capability": lambda *_: (9, 0), "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: mock.Mock(major=9, minor=0),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, stand_in in here.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch, "Generator", generator))
        stack.enter_context(mock.patch.object(torch.Tensor, "numpy", refuse))
        # inference tensors of a subclass cannot be written to
        gradients = {True: torch.no_grad, False: torch.enable_grad}
        stack.enter_context(mock.patch.object(torch, "inference_mode", lambda mode=True: gradients[mode]()))
        save = torch.save  # a checkpoint names the device of its tensors; ours are read to the CPU in any case
        on_cpu = functools.partial(tree_map, lambda value: value.inner if isinstance(value, OnGpu) else value)
        stack.enter_context(mock.patch.object(torch, "save", lambda value, file: save(on_cpu(value), file)))
        autocast = torch.autocast
        stack.enter_context(
            mock.patch.object(
                torch, "autocast", lambda device, dtype=None, enabled=True: autocast("cpu", dtype, enabled)
            )
        )
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._ensureCUDADeviceGuardSet()  # as torch's own fake tensors do where there is no driver
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        future = torch.__future__  # or Module.to would move our tensors into parameters that are plain ones
        stack.callback(
            future.set_overwrite_module_params_on_conversion, future.get_overwrite_module_params_on_conversion()
        )
        future.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(mock.patch.object(Rules, "now", rules))
        stack.enter_context(rules)
        yield rules
