"""Installs the pretend device: PyTorch's and Triton's entries, replaced in this process for good."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import subprocess
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from pretend import graphs, tensors
from pretend.memory import memory
from pretend.tensors import DeviceTensor, on_cuda, on_the_host, unwrap, wrap

PROPERTIES = types.SimpleNamespace(
    name="Pretend H100 (no GPU)",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block_optin=232448,
    warp_size=32,
)
launches: Counter[str] = Counter()
LARGEST_GRID = (2**31 - 1, 65535, 65535)


def install() -> None:
    """Make this process see one pretend device. Call it before anything of the project is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    _cuda()
    _making_tensors()
    _operators()
    _triton()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    ctypes.CDLL(str(_guard()))
    tensors.MODE.__enter__()


def _guard() -> Path:
    """The library of guard.cpp, compiled once for a PyTorch (a second or two)."""
    source = Path(__file__).with_name("guard.cpp")
    build = Path(__file__).parents[3] / "build"
    build.mkdir(exist_ok=True)
    library = build / f"pretend-guard-{torch.__version__}.so"
    with (build / "pretend-guard.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
            home = Path(torch.__file__).parent
            command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-shared", "-fPIC"]
            command += ["-isystem", str(home / "include"), str(source), "-o", f"{library}.part"]
            subprocess.run([*command, f"-L{home / 'lib'}", "-lc10"], check=True)
            Path(f"{library}.part").replace(library)
    return library


class Event:
    """The wall clock stands in for the device's."""

    def __init__(self, enable_timing: bool = False, **options: Any) -> None:
        self.timed, self.at = enable_timing, None

    def record(self, stream: Any = None) -> None:
        if graphs.capturing is not None and self.timed:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (a timed event)")
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        if graphs.capturing is not None:
            raise RuntimeError(
                "CUDA error: operation not permitted when stream is capturing (Event.synchronize)"
            )

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        if not (self.timed and end.timed):
            raise RuntimeError("both events must be created with enable_timing=True")
        if self.at is None or end.at is None:
            raise RuntimeError("both events must be recorded before calculating elapsed time")
        return max(1e-4, (end.at - self.at) * 1e3)


class Stream:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        synchronize()


class _Scope:
    """A context that changes nothing: there is one device and one stream."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> _Scope:
        return self

    def __exit__(self, *problem: Any) -> None:
        pass


def synchronize(device: Any = None) -> None:
    if graphs.capturing is not None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing (synchronize)")


def _cuda() -> None:
    def debug_mode(mode: Any) -> None:
        tensors.sync_debug_mode = mode

    PROPERTIES.total_memory = memory.total
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "device": _Scope,
        "device_of": _Scope,
        "synchronize": synchronize,
        "Event": Event,
        "Stream": Stream,
        "stream": _Scope,
        "current_stream": Stream,
        "default_stream": Stream,
        "CUDAGraph": graphs.CUDAGraph,
        "graph": graphs.graph,
        "graph_pool_handle": graphs.graph_pool_handle,
        "is_current_stream_capturing": lambda: graphs.capturing is not None,
        "memory_allocated": lambda device=None: memory.allocated,
        "max_memory_allocated": lambda device=None: memory.peak,
        "memory_reserved": lambda device=None: memory.reserved,
        "max_memory_reserved": lambda device=None: memory.reserved_peak,
        "reset_peak_memory_stats": lambda device=None: memory.reset_peak(),
        "mem_get_info": lambda device=None: (memory.total - memory.reserved, memory.total),
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "set_sync_debug_mode": debug_mode,
        "clock_rate": lambda device=None: 1980,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.backends.cudnn.version = lambda: 91000
    torch.version.cuda = "13.0"


class DeviceGenerator(torch.Generator):
    """A generator of the device draws on the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        (tensors.generators.add if on_cuda(device) else tensors.generators.discard)(made._cdata)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


def _making_tensors() -> None:
    """What makes tensors out of Python's values does so where no mode sees it."""

    def through_host(make: Any) -> Any:
        def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Any:
            if isinstance(data, DeviceTensor) or not on_cuda(device):
                return make(data, *args, **({} if device is None else {"device": device}), **options)
            return make(data, *args, **options).to(torch.device(device))

        return made

    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, through_host(getattr(torch, name)))
    torch.Generator = DeviceGenerator  # type: ignore[misc]
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]
    compiled = torch.compile

    def compile(model: Any = None, **options: Any) -> Any:
        """No compiler makes code for a device that is not there: the function as it is."""
        return (lambda f: f) if model is None else model

    compile.__wrapped__ = compiled  # type: ignore[attr-defined]
    torch.compile = compile  # type: ignore[assignment]

    class Unprofiled(_Scope):
        """No kernel ran on a device, so none took time."""

        def key_averages(self) -> list[Any]:
            return []

    torch.profiler.profile = Unprofiled  # type: ignore[assignment,misc]


def _operators() -> None:
    """The project's own operators for CUDA, as Python functions and as C++ that the build would bring."""
    register = torch.library.Library.impl

    def impl(self: Any, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> Any:
        if dispatch_key == "CUDA":
            name = op_name if isinstance(op_name, str) else op_name._schema.name.split("::")[-1]
            tensors.implementations[f"{self.ns}::{name.split('::')[-1]}"] = fn
        return register(self, op_name, fn, dispatch_key, **options)

    torch.library.Library.impl = impl  # type: ignore[method-assign]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

    def has(name: str, key: Any) -> bool:
        return has_kernel(name, "CPU" if name == "sinkprune_native::gather_" and key == "CUDA" else key)

    torch._C._dispatch_has_kernel_for_dispatch_key = has


class Compiled:
    """What a launch returns: launched again, it takes every argument by position, constants included."""

    def __init__(self, kernel: Any, names: list[str]) -> None:
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any) -> None:
            if len(arguments) != len(self.names):
                raise TypeError(f"a compiled kernel takes {len(self.names)} arguments, got {len(arguments)}")
            self.kernel.run(*arguments, grid=grid, warmup=False)

        return launch


def _triton() -> None:
    import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    interpreter.mend()
    interpret = InterpretedFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name = self.fn.__name__
        named = dict(zip(self.arg_names, arguments, strict=False)) | options
        size = grid(named) if callable(grid) else grid
        if any(not 0 < n <= most for n, most in zip(size, LARGEST_GRID, strict=False)):
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: {name} with grid {size}")
        for key, value in named.items():
            held = getattr(value, "base", value)
            if isinstance(held, torch.Tensor) and not isinstance(held, DeviceTensor):
                raise ValueError(
                    f"Pointer argument ({key} of {name}) cannot be accessed from Triton (cpu tensor?)"
                )
        launches[name] += 1

        def on_tensors(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            interpret(self, *arguments, grid=size, warmup=warmup, **options)

        plain = tree_map(_unwrap_argument, (arguments, options))
        with on_the_host():
            if graphs.capturing is not None:
                graphs.capturing.protect(plain)
            on_tensors(*plain)
            if graphs.capturing is not None:
                graphs.capturing.record(name, on_tensors, (plain, {}), None)
        return Compiled(self, self.arg_names)

    InterpretedFunction.run = run


def _unwrap_argument(x: Any) -> Any:
    if hasattr(x, "base") and hasattr(x, "block_shape"):  # a tensor descriptor
        return type(x)(unwrap(x.base), x.shape, x.strides, x.block_shape, x.padding)
    return unwrap(x)


__all__ = ["install", "launches", "memory", "wrap"]
