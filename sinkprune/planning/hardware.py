"""How fast a device can be at best: arithmetic and memory traffic, measured once or from a data sheet."""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sinkprune.files import write_whole

SCHEMA = 1


@dataclass(frozen=True)
class Roofs:
    """The roofs of a roofline: what no operation on the device can beat.

    Attributes:
        flops: FLOP/s of matrix products, by dtype name.
        bandwidth: bytes per second, read and written.
        source: ``"measured"`` or ``"data sheet"``.
        memory, multiprocessors, family: of a GPU: bytes, count, and whose kernel tiles suit it
            (``kernels/configs``).
    """

    device: str
    flops: dict[str, float]
    bandwidth: float
    source: str
    memory: int | None = None
    multiprocessors: int | None = None
    family: str | None = None

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in ``dtype``. Raises ``ValueError`` where that is not known."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops:
            raise ValueError(f"the roofs of {self.device} cover {', '.join(self.flops)}, not {name}")
        return self.flops[name]

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The least time of an operation: its arithmetic or its traffic, whichever takes longer."""
        return max(flops / self.peak(dtype), moved / self.bandwidth)


# NVIDIA's data sheets (A100 80 GB SXM: DS-10031; H100 SXM: NVIDIA H100 Tensor Core GPU; H200 SXM: NVIDIA H200
# Tensor Core GPU): float32 without tensor cores, as PyTorch multiplies it by default, and nominal memory. The
# 16-bit rates and bandwidths are those of `sinkprune.kernels.roofline`.
DATA_SHEETS = {
    "A100": ("sm_80", 108, 19.5e12, 80 * 10**9),
    "H100": ("sm_90", 132, 67e12, 80 * 10**9),
    "H200": ("sm_90", 132, 67e12, 141 * 10**9),
}


def data_sheet(name: str) -> Roofs:
    """Roofs of ``"A100"``, ``"H100"`` or ``"H200"`` (the SXM boards), for planning without the device."""
    from sinkprune.kernels.roofline import PEAKS

    if name not in DATA_SHEETS:
        raise ValueError(f"data sheets are known of {', '.join(DATA_SHEETS)}, not of {name!r}")
    family, multiprocessors, single, memory = DATA_SHEETS[name]
    half = PEAKS[name].flops
    flops = {"bfloat16": half, "float16": half, "float32": single}
    return Roofs(name, flops, PEAKS[name].bytes, "data sheet", memory, multiprocessors, family)


def roofs(device: torch.device | str, *, path: Path | None = None, again: bool = False) -> Roofs:
    """Roofs of a device of this machine, measured once and then read from the disk; or a data sheet's.

    Args:
        device: ``"cpu"`` (with the threads PyTorch uses now), ``"cuda"`` or ``"cuda:1"``; or ``"A100"``,
            ``"H100"``, ``"H200"``, whose data sheet says.
        path: the file; None = ``roofs-<device>.json`` in ``$XDG_CACHE_HOME/sinkprune``.
        again: measure although the file is there.

    Raises:
        ValueError: not a name of a device.
        RuntimeError: there is no such device.
    """
    if device in DATA_SHEETS:
        return data_sheet(str(device))
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"roofs are of cpu, cuda, cuda:N, {', '.join(DATA_SHEETS)}, not of {device!r}"
        ) from None
    if where.type not in ("cpu", "cuda") or (
        where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count()
    ):
        raise RuntimeError(f"roofs are measured on cpu or cuda, and there is no device {device}")
    path = cache_path(device_name(where)) if path is None else path
    known = None if again else _read(path)
    if known is None:
        known = measure(where)
        _write(path, known)
    return known


def device_name(device: torch.device) -> str:
    """What tells one device's measurements from another's: the GPU's name, or the CPU's and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def cache_path(name: str, kind: str = "roofs") -> Path:
    """Where measurements of a device are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sinkprune" / f"{kind}-{''.join(c if c.isalnum() else '-' for c in name)}.json"


@torch.inference_mode()
def measure(device: torch.device, *, elements: int | None = None, size: int | None = None) -> Roofs:
    """Time a copy of ``elements`` float32 and a ``size``³ matrix product per dtype; the fastest round counts.

    A roof is what the device reaches when nothing disturbs it, hence the fastest and not the median. On a
    CPU only float32 is timed: its 16-bit products may be a hundred times slower, and nobody wants them.
    """
    cuda = device.type == "cuda"
    elements = elements or (1 << 28 if cuda else 1 << 25)
    size = size or (8192 if cuda else 2048)
    bandwidth = _bandwidth(device, elements)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if cuda else (torch.float32,)
    flops = {str(dtype).removeprefix("torch."): _rate(device, dtype, size) for dtype in dtypes}
    if not cuda:
        return Roofs(device_name(device), flops, bandwidth, "measured")
    from sinkprune.kernels.launch import family_of

    facts = torch.cuda.get_device_properties(device)
    return Roofs(
        device_name(device), flops, bandwidth, "measured", facts.total_memory, facts.multi_processor_count,
        family_of((facts.major, facts.minor)),
    )  # fmt: skip


def _bandwidth(device: torch.device, elements: int) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.empty(elements, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), device)


def _fastest(call: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Seconds of the fastest of some calls, after two to warm up."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    best = float("inf")
    for round_ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if round_ >= 2:
            best = min(best, time.perf_counter() - start)
    return best


def _read(path: Path) -> Roofs | None:
    """The roofs in a file; None where there is none, or (with a warning) where it can't be read."""
    try:
        values = json.loads(path.read_text())
        if values.pop("schema") != SCHEMA:
            return None
        return Roofs(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is ignored and measured again: {error}", stacklevel=3)
        return None


def _write(path: Path, value: Roofs) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"schema": SCHEMA, **asdict(value)}, indent=1) + "\n")
