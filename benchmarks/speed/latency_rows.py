"""What `latency.py` writes: rows with their counted work, as JSON, CSV, pictures and text."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from speed.latency_groups import Case, Variant

import sinkprune as sp
from sinkprune.evaluation.footprint import counted_peak
from sinkprune.files import whole_file, write_whole
from sinkprune.planning.hardware import Roofs, device_name
from sinkprune.planning.timing import Timing, interleaved


@dataclass
class Row:
    """One timed variant. Times in ms; ``saved_share`` is time saved / the time that arithmetic would save."""

    bench: str
    variant: str
    shape: str
    dtype: str
    batch: int
    length: int
    removed: float
    median: float
    p20: float
    p80: float
    speedup: float  # median over rounds of the group's dense time / this time
    ceiling: float | None  # counted FLOPs, dense / this; None where there are none
    ceiling_roofs: float | None  # least times by this device's roofs, dense / this
    tflops: float
    gbytes: float  # what matrix products and attention cores must move, GB/s
    peak_bytes: int | None  # of new tensors at once: CUDA's allocator, or counted on CPU
    ideal: float | None  # the dense median / ceiling
    saved_share: float | None
    busy: float | None  # share of the time that the GPU computes; None on CPU
    of_roof: float | None = None  # the least time by this device's measured roofs / this time
    backend: str = ""  # of its attention, where one kernel is timed


def rounds_of(bench: str, case: Case, device: str) -> int:
    """A generation is hundreds of steps, and a GPU disturbs them little: few rounds say as much."""
    if device == "cpu":
        return case.rounds
    return min(case.rounds, 3 if bench == "generation" else 8 if bench.startswith("step") else 20)


def time_group(bench: str, variants: list[Variant], case: Case, device: str, roofs: Roofs) -> list[Row]:
    """Interleaved timings of a group; the first variant is the one that ratios refer to."""
    calls = {v.name: v.run for v in variants}
    repeats, once = rounds_of(bench, case, device), case.rounds == 1 or bench == "generation"
    timings, ratios = interleaved(calls, repeats=repeats, warmup=1 if once else 2, device=device)
    timings = {v.name: Timing(*(value / v.calls for value in astuple(timings[v.name]))) for v in variants}
    first, dtype = variants[0], case.dtype
    dense = timings[first.name].median

    def flops(variant: Variant) -> int:
        return variant.times * sum(o.flops for o in variant.operations)

    def moved(variant: Variant) -> int:
        return variant.times * dtype.itemsize * sum(o.elements for o in variant.operations)

    def least(variant: Variant) -> float:
        times = (roofs.seconds(o.flops, o.elements * dtype.itemsize, dtype) for o in variant.operations)
        return variant.times * sum(times)

    rows = []
    for variant in variants:
        timing, ratio = timings[variant.name], ratios[variant.name]
        ceiling = flops(first) / flops(variant) if flops(variant) else None
        saves = ceiling is not None and ceiling > 1
        share = (1 - 1 / ratio) / (1 - 1 / ceiling) if ceiling and saves else None
        rows.append(
            Row(
                bench, variant.name, case.shape, str(dtype).removeprefix("torch."), case.batch, case.length,
                variant.removed, timing.median, timing.p20, timing.p80, ratio, ceiling,
                least(first) / least(variant) if least(variant) else None,
                flops(variant) / timing.median / 1e9, moved(variant) / timing.median / 1e6,
                _peak(variant, device), dense / ceiling if ceiling else None, share,
                _busy(variant.run, 1 if once else 5) if device == "cuda" else None,
                least(variant) / (timing.median / 1e3) if least(variant) else None,
                variant.backend,
            )
        )  # fmt: skip
    return rows


def _peak(variant: Variant, device: str) -> int | None:
    """Most bytes of new tensors at once."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return None if variant.compiled else counted_peak(variant.run)


def _busy(run: Callable[[], object], calls: int) -> float:
    """Kernel time over wall time of ``calls`` calls."""
    from torch.profiler import ProfilerActivity, profile

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
    kernels = sum(event.self_device_time_total for event in seen.key_averages())
    return kernels / 1e3 / start.elapsed_time(end)


@dataclass
class Document:
    """What a run knows so far: written after every group, so that one cut short keeps what it has."""

    command: str
    device: str
    roofs: Roofs
    rows: list[Row]
    failures: list[dict[str, Any]]  # what had no room, by shape, batch, length and level
    complete: bool = False

    def done(self, case: Case) -> set[tuple[str, str]]:
        """(bench, variant) of the case's rows."""
        where = (case.shape, str(case.dtype).removeprefix("torch."), case.batch, case.length)
        return {(r.bench, r.variant) for r in self.rows if (r.shape, r.dtype, r.batch, r.length) == where}

    def add(self, rows: list[Row]) -> None:
        """New rows; a group's dense row, timed again beside each pruned one, is kept once."""
        known = {_key(asdict(row)) for row in self.rows}
        self.rows += [row for row in rows if _key(asdict(row)) not in known]

    @property
    def versions(self) -> dict[str, Any]:
        return {
            "sinkprune": sp.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **(
                {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
                if self.device == "cuda"
                else {}
            ),
        }

    def resume(self, folder: Path) -> None:
        """Take over the rows of an unfinished run of this device and these versions."""
        try:
            before = json.loads((folder / "latency.json").read_text())
        except (OSError, ValueError):
            return
        same = {"device": device_name(torch.device(self.device)), "versions": self.versions}
        if all(before.get(key) == value for key, value in same.items()):
            self.rows = [Row(**row) for row in before["rows"]]

    def write(self, folder: Path) -> None:
        """latency.json, latency.csv and latency.png, each whole or not at all."""
        document = {
            "command": self.command,
            "date": datetime.date.today().isoformat(),
            "device": device_name(torch.device(self.device)),
            "threads": torch.get_num_threads(),
            "versions": self.versions,
            **({"card": card()} if self.device == "cuda" else {}),
            "roofs": asdict(self.roofs),
            "complete": self.complete,
            "failures": self.failures,
            "rows": [asdict(row) for row in self.rows],
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "latency.json", json.dumps(document, indent=1) + "\n")
        if not (self.complete and self.rows):
            return
        with whole_file(folder / "latency.csv") as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(self.rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        with whole_file(folder / "latency.png") as part:
            plot(self.rows, part)


def card() -> dict[str, str]:
    """The GPU's driver, clocks and power limit as ``nvidia-smi`` gives them now; empty without it."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = (
        [value.strip() for value in said.stdout.splitlines()[0].split(",")] if said.stdout.strip() else []
    )
    return dict(zip(fields, values, strict=False))


def plot(rows: list[Row], path: Path) -> None:
    """Measured speed-up against what arithmetic allows, per level; the diagonal is the ideal."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure = Figure(figsize=(5.2 * len(shapes), 4.6), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        top = 1.0
        for i, bench in enumerate(dict.fromkeys(row.bench for row in rows if row.removed)):
            chosen = [r for r in rows if (r.shape, r.bench) == (shape, bench) and r.removed and r.ceiling]
            points = sorted((r.ceiling or 1.0, r.speedup) for r in chosen)
            if points:
                style = {"color": f"C{i}", "markersize": 4, "linewidth": 1}
                axes.plot(*zip(*points, strict=True), "o-", label=bench, **style)
                top = max(top, *(value for point in points for value in point))
        axes.plot([1, top], [1, top], "k:", linewidth=1, label="ideal")
        axes.set(title=shape, xlabel="ceiling (counted FLOPs)", ylabel="measured speed-up over dense, fused")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110, format="png")


def compare(rows: list[Row], old: Path) -> list[str]:
    """Lines saying how each row's ratio changed since ``old``."""
    before = {_key(row): row for row in json.loads(old.read_text())["rows"]}
    lines = []
    for row in rows:
        known = before.get(_key(asdict(row)))
        if known and row.removed:
            where = f"{row.shape:9} {row.bench:22} {row.variant:18} B={row.batch} L={row.length}"
            lines.append(f"{where}: {known['speedup']:.3f} -> {row.speedup:.3f}")
    return lines


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("bench", "variant", "shape", "dtype", "batch", "length"))


def table(rows: list[Row]) -> str:
    lines = [
        f"{'shape':9} {'bench':24} {'variant':29} {'B':>2} {'L':>5} {'ms':>9} {'x':>6} {'ceiling':>8} "
        f"{'by roofs':>8}  saved"
    ]
    for r in rows:
        share, ceiling, by_roofs = (
            "" if value is None else f"{value:.2f}" for value in (r.saved_share, r.ceiling, r.ceiling_roofs)
        )
        lines.append(
            f"{r.shape:9} {r.bench:24} {r.variant:29} {r.batch:2} {r.length:5} {r.median:9.3f} "
            f"{r.speedup:6.2f} {ceiling:>8} {by_roofs:>8} {share:>6}"
        )
    return "\n".join(lines)
