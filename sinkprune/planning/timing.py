"""Timing two or more things side by side, so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int = 20, warmup: int = 3, device: str = "cpu"
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Time ``calls`` turn by turn in one process.

    Returns:
        ``(timings, ratios)``: per name its ``Timing``, and the median over rounds of the first call's time
        over its own (a ratio within a round cancels what slows the machine for longer than a round).
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    clock = _events if device == "cuda" else _wall
    for _ in range(warmup):
        for call in calls.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats):
        names = list(calls) if round_ % 2 == 0 else list(calls)[::-1]
        for name in names:
            samples[name].append(clock(calls[name]))
    times = {name: torch.tensor(values, dtype=torch.float64) for name, values in samples.items()}
    first = times[next(iter(calls))]
    timings = {
        name: Timing(value.quantile(0.5).item(), value.quantile(0.2).item(), value.quantile(0.8).item())
        for name, value in times.items()
    }
    return timings, {name: (first / value).quantile(0.5).item() for name, value in times.items()}


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _events(call: Callable[[], object]) -> float:
    """Between two events of an idle device: without the host's way to the first launch and back."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
