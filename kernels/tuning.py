"""Opt-in preparation of the Triton kernels for one GPU: compile ahead of the first step, and measure tiles.

Nothing here runs by itself. `warmup` compiles what a model will launch, so that no step waits for a compiler;
`tune` times every shipped tile on this GPU and keeps the fastest per shape bucket in a file that later runs
read.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REPEATS = 20  # timed rounds; in each of them every candidate runs once, so that drift hits all alike


@dataclass(frozen=True)
class Shape:
    """What a model launches: query heads in use, key/value heads, head size, and the sizes of a step."""

    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16


def _require_cuda(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"the kernels run on CUDA only, and there is no CUDA device (asked for {device})")
    return device


def _inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    def randn(heads: int, length: int) -> Tensor:
        # [B, L, H, D] in memory, as projections leave it: the strides decide how loads compile.
        x = torch.randn(shape.batch, length, heads, shape.head_dim, device=device, dtype=shape.dtype)
        return x.transpose(1, 2)

    keys, values = (randn(shape.kv_heads, shape.keys) for _ in range(2))
    return randn(shape.heads, shape.queries), keys, values


def warmup(shapes: Sequence[Shape], device: torch.device | str = "cuda") -> int:
    """Compile the kernels that these shapes may launch: every shipped tile of their head size, for all
    heads and for a kept subset, with and without padding, whole and shared out, exact and sampled.

    Lengths are not compiled in, so afterwards no step of any length waits for the compiler. Returns the
    number of kernels launched.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    from sinkprune.kernels import launch
    from sinkprune.kernels.attention import attention
    from sinkprune.kernels.column_mass import column_mass_

    where = _require_cuda(device)
    launches = 0
    for shape in shapes:
        q, k, v = _inputs(shape, where)
        kept = torch.arange(0, shape.heads, 2, device=where)
        groups = torch.arange(shape.heads, device=where) // max(1, shape.heads // shape.kv_heads)
        mask = torch.ones(shape.batch, shape.keys, dtype=torch.bool, device=where)
        offset = torch.zeros(1, dtype=torch.int64, device=where)
        mass = torch.empty(shape.batch, shape.heads, shape.keys, device=where)
        known, _ = launch.device_family(where)
        bits, head = "16" if q.element_size() == 2 else "32", launch.head_class(shape.head_dim)
        for kept_heads, padding, shares in itertools.product((None, kept), (None, mask), (1, 2)):
            options: dict[str, Any] = {
                "kept_heads": kept_heads,
                "kv_head_of": None if kept_heads is None else groups,
                "key_padding_mask": padding,
                "scale": shape.head_dim**-0.5,
                "shares": shares,
            }
            for tile in known.tiles["attention"][bits][head]:
                _, lse = attention(q, k, v, tile=tile, **options)
                launches += 1
            for tile in known.tiles["column_mass"][bits][head]:
                column_mass_(mass, q, k, lse, tile=tile, **options)
                column_mass_(mass, q, k, lse, tile=tile, sample=16, offset=offset, **options)
                launches += 2
    torch.cuda.synchronize(where)
    return launches


def tune(
    shapes: Sequence[Shape],
    device: torch.device | str = "cuda",
    *,
    report: Callable[[str], None] = lambda line: None,
) -> dict[Any, Any]:
    """Time every shipped tile, with several shares, on each shape; keep the fastest per bucket and store them
    where later runs on this GPU model read.

    Args:
        shapes: what to tune for; each is filed under its bucket (lengths and grid rounded up to powers of
            two).
        report: called with one line per shape and kernel.

    Returns:
        ``{bucket: (tile, shares)}`` as stored.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    from sinkprune.kernels import launch

    where = _require_cuda(device)
    chosen: dict[Any, Any] = {}
    for shape in shapes:
        q, k, v = _inputs(shape, where)
        for kernel, candidates in _candidates(q, k, v).items():
            medians = _interleaved(list(candidates.values()), where)
            best, (tile, shares) = min(zip(medians, candidates, strict=True), key=lambda pair: pair[0])
            programs = shape.batch * shape.heads
            chosen[launch.bucket(kernel, q, shape.queries, shape.keys, programs)] = tile, shares
            report(f"{kernel} {shape}: {best * 1e3:.1f} us with {tile}, {shares} shares")
    name = torch.cuda.get_device_properties(where).name
    launch.write_tuned(launch.tuned_path(name), chosen)
    launch.overrides.update(chosen)
    return chosen


def _candidates(q: Tensor, k: Tensor, v: Tensor) -> dict[str, dict[Any, Callable[[], object]]]:
    """Per kernel, ``{(tile, shares): launch}`` for the tiles shipped for this device and head size."""
    from sinkprune.kernels import launch
    from sinkprune.kernels.attention import attention
    from sinkprune.kernels.column_mass import column_mass_

    scale = q.shape[-1] ** -0.5
    groups = torch.arange(q.shape[1], device=q.device) // max(1, q.shape[1] // k.shape[1])
    known, _ = launch.device_family(q.device)
    bits, head = "16" if q.element_size() == 2 else "32", launch.head_class(q.shape[-1])
    _, lse = attention(q, k, v, kv_head_of=groups, scale=scale)
    mass = torch.empty(q.shape[0], q.shape[1], k.shape[2], device=q.device)

    def attend(tile: launch.Tile, shares: int) -> Callable[[], object]:
        return lambda: attention(q, k, v, kv_head_of=groups, scale=scale, tile=tile, shares=shares)

    def count(tile: launch.Tile, shares: int) -> Callable[[], object]:
        return lambda: column_mass_(mass, q, k, lse, kv_head_of=groups, scale=scale, tile=tile, shares=shares)

    def grid(kernel: str) -> Iterator[tuple[launch.Tile, int]]:
        return itertools.product(known.tiles[kernel][bits][head], (1, 2, 4, 8))

    return {
        "attention": {pair: attend(*pair) for pair in grid("attention")},
        "column_mass": {pair: count(*pair) for pair in grid("column_mass")},
    }


def _interleaved(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Median milliseconds of each call, timed by device events, one round after another, L2 flushed before
    each."""
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device)
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:  # compiles
        call()
    for _ in range(REPEATS):
        for call, seen in zip(calls, times, strict=True):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            seen.append(start.elapsed_time(end))
    return [statistics.median(seen) for seen in times]
