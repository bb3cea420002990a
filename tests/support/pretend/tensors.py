"""Tensors of the pretend device, and the rules by which their operations run or are refused."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from pretend import graphs
from pretend.memory import memory

CUDA = torch.device("cuda", 0)
# Operations that may read CPU tensors beside the device's: copies, and indices that are brought over.
MIXED = ("copy_", "_to_copy", "set_", "index", "index_put", "index_put_")
WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero")
CPU_ONLY = ("_scaled_dot_product_flash_attention_for_cpu", "_flash_attention_forward_for_cpu")

operations: Counter[str] = Counter()
waits: Counter[str] = Counter()
sync_debug_mode = "default"
generators: set[int] = set()  # of the device, by address
# Python implementations of operators for CUDA, by "namespace::name": see `device.install`.
implementations: dict[str, Any] = {}


class DeviceTensor(torch.Tensor):
    """A CUDA tensor to everybody; ``inner`` is the CPU tensor that holds its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        with torch.inference_mode(inner.is_inference()):  # as its values: a view of a normal tensor is one
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=CUDA,
            )
        memory.watch(made, inner.untyped_storage())
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        wait("tolist")
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Tensor:
        made = torch.Tensor.new_tensor(self.inner, data, dtype=dtype, device="cpu", **more)
        return made if device is not None and not on_cuda(device) else made.to(CUDA)

    def __getitem__(self, index: Any) -> Any:
        return torch.Tensor.__getitem__(self, _lists_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _lists_as_tensors(index), value)


def _lists_as_tensors(index: Any) -> Any:
    """C++ would make a CPU tensor of a list where no mode sees it."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_lists_as_tensors, index)) if isinstance(index, tuple) else index


def on_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def wrap(x: Any) -> Any:
    return DeviceTensor(x) if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) else x


def unwrap(x: Any) -> Any:
    return x.inner if isinstance(x, DeviceTensor) else x


def wait(what: str) -> None:
    """The host waits for the device here: refused in a capture, and where the caller forbade it."""
    root = os.getcwd() + os.sep
    frames = [
        f for f in traceback.extract_stack() if f.filename.startswith(root) and "/pretend/" not in f.filename
    ]
    here = f"{frames[-1].filename.removeprefix(root)}:{frames[-1].lineno}" if frames else "?"
    waits[f"{what} at {here}"] += 1
    if graphs.capturing is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what} at {here})")
    if sync_debug_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation ({what} at {here})")


class DeviceMode(TorchDispatchMode):
    """Catches what makes tensors on the device out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


MODE = DeviceMode()


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation as the device would, or refuse it as the device would."""
    # In inference mode operations arrive that are made of others.
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with MODE:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    leaves = tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, DeviceTensor)]
    wished = kwargs.get("device")
    if not ours and not on_cuda(wished):
        return func(*args, **kwargs)
    namespace, name = func._schema.name.split("::")
    if wished is not None and on_cuda(wished) and (torch.device(wished).index or 0) != 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    operations[name] += 1
    if ours and func._schema.name in implementations:
        with MODE:
            return implementations[func._schema.name](*args, **kwargs)
    others = [
        x
        for x in leaves
        if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) and x.device.type == "cpu"
    ]
    if ours:
        _refuse(func, namespace, name, args, others)
    _wait_where_needed(name, args, kwargs, ours, others)
    if name.startswith("_scaled_dot_product_") and ours:
        return _run(_fused(name), name, args, kwargs, func)
    if name == "_fused_sdp_choice":
        return 0  # PyTorch's own mathematics
    return _run(func, name, args, kwargs, func)


def _refuse(func: Any, namespace: str, name: str, args: Any, others: list[Tensor]) -> None:
    known = namespace != "sinkprune_native" or name == "gather_"
    if name in CPU_ONLY or namespace in ("mkldnn", "quantized", "onednn") or not known:
        raise NotImplementedError(
            f"Could not run '{namespace}::{name}' with arguments from the 'CUDA' backend"
        )
    strangers = [x for x in others if x.dim() > 0]
    fine = name in ("copy_", "_to_copy", "set_") or (name in MIXED and isinstance(args[0], DeviceTensor))
    if fine and name.startswith("index_put"):
        fine = isinstance(args[2], DeviceTensor) or args[2].dim() == 0
    if strangers and not fine:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func}, a CPU tensor of shape {tuple(strangers[0].shape)})"
        )


def _wait_where_needed(name: str, args: Any, kwargs: Any, ours: list[Any], others: list[Tensor]) -> None:
    blocking = not kwargs.get("non_blocking") and not (name == "copy_" and len(args) > 2 and args[2])
    if name in WAITS:
        wait(name)
    elif name == "_to_copy":
        leaves = ours and kwargs.get("device") is not None and not on_cuda(kwargs["device"])
        if leaves or (others and blocking):
            wait("a copy to the host" if leaves else "a copy from pageable memory")
        elif others and graphs.capturing is not None:
            wait("a copy from memory of the host")  # its address would be replayed
    elif name == "copy_" and others and others[0].dim() > 0:
        if blocking or graphs.capturing is not None:
            wait("a copy between host and device")
    elif name in MIXED and name.startswith("index"):
        indices = [i for i in args[1] if i is not None]
        fills = name != "index" and unwrap(args[2]).numel() == 1 and not (len(args) > 3 and args[3])
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices) and not fills:
            wait("an index of booleans")
        elif any(not isinstance(i, DeviceTensor) for i in indices):
            wait("an index from the host")
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        wait(name)


def _run(run: Any, name: str, args: Any, kwargs: Any, func: Any) -> Any:
    """``run`` on the CPU tensors; its results as device tensors, and noted by a capture under way."""
    to_host = name == "_to_copy" and kwargs.get("device") is not None and not on_cuda(kwargs["device"])
    options = dict(kwargs)
    generator = options.get("generator")
    if generator is not None and generator._cdata not in generators:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if on_cuda(options.get("device")):
        options["device"] = torch.device("cpu")
    if options.get("pin_memory") is None:
        options.pop("pin_memory", None)
    plain = tree_map(unwrap, (args, options))
    if graphs.capturing is not None and func._schema.is_mutable:
        graphs.capturing.protect(plain)
    result = run(*plain[0], **plain[1])
    if to_host:
        return result
    if graphs.capturing is not None:
        graphs.capturing.record(f"aten.{name}", run, plain, result)
    return _as_given(result, args, kwargs, func)


def _as_given(result: Any, args: Any, kwargs: Any, func: Any) -> Any:
    """Results that are an argument come back as that argument, in place of a second wrapper."""
    given = {id(unwrap(x)): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    if isinstance(result, Tensor):
        return given.get(id(result)) if id(result) in given else wrap(result)
    return tree_map(lambda x: given[id(x)] if id(x) in given else wrap(x), result)


def _fused(name: str) -> Any:
    """PyTorch's fused attention kernels of CUDA, by their mathematics, refusing what they refuse."""

    def run(q: Tensor, k: Tensor, v: Tensor, *args: Any, scale: float | None = None, **options: Any) -> Any:
        cudnn = "cudnn" in name
        if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[3] % 8 or q.shape[3] > 256:
            raise RuntimeError(f"{name}: no kernel for {q.dtype} and heads of {q.shape[3]}")
        if q.shape[1] % k.shape[1] or any(x.stride(3) != 1 for x in (q, k, v)):
            raise RuntimeError(
                f"{name}: no kernel for {q.shape[1]} and {k.shape[1]} heads, or strided features"
            )
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(groups, 1).float() for x in (k, v))
        scores = q.float() @ keys.mT * (q.shape[3] ** -0.5 if scale is None else scale)
        if cudnn and args and args[0] is not None:
            scores = scores + args[0].float()
        natural = scores.logsumexp(-1)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        if cudnn and torch.ops.aten.is_non_overlapping_and_dense(q):
            out = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype)
        out.copy_((scores - natural[..., None]).exp() @ values)
        seed = torch.zeros((), dtype=torch.int64)
        lse = natural.unsqueeze(-1) if cudnn else natural
        return out, lse, None, None, q.shape[2], k.shape[2], seed, seed.clone(), torch.zeros(0)

    return run


@contextlib.contextmanager
def on_the_host() -> Any:
    """Plain PyTorch, without the device's rules."""
    with _disable_current_modes():
        yield
