"""What a launch needs besides its tensors: the tile, how far to split, the device.

Tiles come from ``configs/<family>.json``, one file per GPU family, listed per kernel, dtype width and head
size; among the tiles listed for a bucket, the one whose grid fills its last wave best is taken. `overrides`
holds what the opt-in tuner measured on this machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkprune.files import write_whole
from sinkprune.kernels.visibility import Visibility

LOG2E = math.log2(math.e)
CONFIGS = Path(__file__).parent / "configs"
# Key shares or query shares beyond this cost more to join than they win.
MOST_SHARES = 32


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of one kernel, and how many of its blocks one multiprocessor holds at
    once."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    blocks_per_sm: int = 1
    # Time per query row relative to the family's best plain tile, all waves being full: an estimate from
    # the machine code until `tuning.tune` has measured.
    cost: float = 1.0
    # For the form of attention that copies through tensor descriptors (see `attention_specialised`).
    specialised: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """One GPU family: its name, multiprocessors, shared memory per block in bytes, and tiles per kernel and
    bucket."""

    name: str
    multiprocessors: int
    shared_bytes: int
    tiles: dict[str, dict[str, dict[str, list[Tile]]]]


@functools.cache
def family(name: str) -> Family:
    """Read ``configs/<name>.json``."""
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    tiles = {
        kernel: {
            bits: {head: [Tile(**t) for t in listed] for head, listed in heads.items()}
            for bits, heads in widths.items()
        }
        for kernel, widths in raw["tiles"].items()
    }
    return Family(name, raw["multiprocessors"], raw["shared_bytes"], tiles)


def family_of(capability: tuple[int, int]) -> str:
    """The family whose tiles suit a compute capability: a consumer GPU has too little shared memory for
    sm_80's."""
    major, minor = capability
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    return "sm_86"


@functools.cache
def _device_family(index: int) -> tuple[Family, int]:
    properties = torch.cuda.get_device_properties(index)
    overrides.update(read_tuned(tuned_path(properties.name)))
    return family(family_of((properties.major, properties.minor))), properties.multi_processor_count


def device_family(device: torch.device) -> tuple[Family, int]:
    """``(family, multiprocessors)`` of a device; the interpreter on a CPU stands in for an sm_90."""
    if device.type != "cuda":
        return family("sm_90"), 1
    return _device_family(torch.cuda.current_device() if device.index is None else device.index)


# (kernel, dtype bits, head class, rows bucket, keys bucket, programs bucket)
Bucket = tuple[str, str, str, int, int, int]
# What the opt-in tuner measured on this machine: (tile, shares) per bucket.
overrides: dict[Bucket, tuple[Tile, int]] = {}


def tuned_path(device_name: str) -> Path:
    """Where the tuner keeps what it measured: under ``XDG_CACHE_HOME``, one file per GPU model."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "".join(c if c.isalnum() else "-" for c in device_name)
    return cache / "sinkprune" / f"tiles-{name}.json"


def read_tuned(path: Path) -> dict[Bucket, tuple[Tile, int]]:
    """The tuner's choices; empty where there is no file. A file that cannot be read is ignored with a
    warning."""
    if not path.exists():
        return {}
    try:
        return {
            (kernel, bits, head, int(rows), int(keys), int(programs)): (
                Tile(**entry["tile"]),
                int(entry["shares"]),
            )
            for entry in json.loads(path.read_text())
            for kernel, bits, head, rows, keys, programs in [entry["bucket"]]
        }
    except (ValueError, TypeError, KeyError, OSError) as error:
        warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
        return {}


def write_tuned(path: Path, chosen: dict[Bucket, tuple[Tile, int]]) -> None:
    """Add ``chosen`` to the file, replacing buckets it already has; written whole or not at all."""
    entries = read_tuned(path) | chosen
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        [
            {"bucket": list(b), "tile": asdict(tile), "shares": shares}
            for b, (tile, shares) in entries.items()
        ],
        indent=1,
    )
    write_whole(path, text + "\n")


def bucket(
    kernel: str, q: Tensor, rows: int, keys: int, programs: int
) -> tuple[str, str, str, int, int, int]:
    """What a tuned choice is filed under: lengths and grid sizes rounded up to powers of two."""
    up = tuple((max(x, 1) - 1).bit_length() for x in (rows, keys, programs))
    return kernel, _bits(q), head_class(q.shape[-1]), up[0], up[1], up[2]


def attention_tile(
    q: Tensor, *, rows: int, keys: int, programs: int, specialised: bool = False
) -> tuple[Tile, int]:
    """``(tile, key shares)`` for ``rows`` queries of ``programs`` = batch x kept heads against ``keys``
    keys; ``specialised``: tiles of `attention_specialised` may serve the call."""
    known, multiprocessors = device_family(q.device)  # reads the tuned file the first time
    chosen = overrides.get(bucket("attention", q, rows, keys, programs)) if overrides else None
    if chosen is not None and (specialised or not chosen[0].specialised):
        return chosen
    return choose_tile(
        "attention", known, multiprocessors, _bits(q), q.shape[-1], rows, keys, programs, specialised
    )


def column_mass_tile(q: Tensor, *, rows: int, keys: int, programs: int) -> tuple[Tile, int]:
    """``(tile, query shares)`` for ``keys`` keys of ``programs`` = batch x kept heads, walking ``rows``
    queries."""
    known, multiprocessors = device_family(q.device)  # reads the tuned file the first time
    chosen = overrides.get(bucket("column_mass", q, rows, keys, programs)) if overrides else None
    if chosen is not None:
        return chosen
    return choose_tile("column_mass", known, multiprocessors, _bits(q), q.shape[-1], keys, rows, programs)


@functools.lru_cache(maxsize=4096)
def choose_tile(
    kernel: str,
    known: Family,
    multiprocessors: int,
    bits: str,
    head_dim: int,
    grid_rows: int,
    walk: int,
    programs: int,
    specialised: bool = False,
) -> tuple[Tile, int]:
    """The listed tile with the cheapest waves, and into how many shares to split its walk so that the GPU
    fills.

    ``grid_rows`` is what the grid is cut along (queries for attention, keys for column mass), ``walk`` what
    each program loops over.
    """
    along, across = ("block_m", "block_n") if kernel == "attention" else ("block_n", "block_m")
    best: tuple[float, Tile, int] | None = None
    for tile in listed_tiles(known, kernel, bits, head_dim, specialised):
        held, step = getattr(tile, along), getattr(tile, across)
        blocks = -(-grid_rows // held) * programs
        at_once = multiprocessors * tile.blocks_per_sm
        shares = 1
        if (
            blocks * 2 <= at_once and not tile.specialised
        ):  # less than half a wave: let several programs share a walk of at least 4 steps each
            shares = max(1, min(MOST_SHARES, at_once // blocks, walk // (4 * step)))
        steps = -(-walk // (step * shares)) * step
        # In the last wave an SM holds fewer blocks at once, and each then has more of it.
        full, tail = divmod(blocks * shares, at_once)
        turns = full * tile.blocks_per_sm - (-tail // multiprocessors)
        cost = turns * held * steps * tile.cost + (0 if shares == 1 else 2 * held * step)
        if best is None or cost < best[0]:
            best = (cost, tile, shares)
    assert best is not None
    return best[1], best[2]


def listed_tiles(
    known: Family, kernel: str, bits: str, head_dim: int, specialised: bool = False
) -> list[Tile]:
    """The shipped tiles of a bucket; ``specialised`` adds those of the second form of the kernel."""
    tiles = known.tiles[kernel][bits][head_class(head_dim)]
    if specialised:
        more = known.tiles.get(f"{kernel}_specialised", {}).get(bits, {})
        tiles = tiles + more.get(head_class(head_dim), [])
    return tiles


def _bits(q: Tensor) -> str:
    return "16" if q.element_size() == 2 else "32"


def head_class(head_dim: int) -> str:
    return next(name for name in ("64", "96", "128", "256") if head_dim <= int(name))


# Compiled kernels by everything that Triton compiles for, so that a launch need not look at it again.
_compiled: dict[tuple[Any, ...], Any] = {}
MOST_COMPILED = 4096


def start(
    kernel: Any,
    grid: tuple[int, int, int],
    pointers: tuple[Tensor, ...],
    scalars: tuple[int | float, ...],
    constants: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int = 3,
    descriptors: tuple[Any, ...] = (),
) -> None:
    """``kernel[grid](*descriptors, *pointers, *scalars, **constants)`` on the current device.

    What Triton compiles for depends on dtypes, on addresses and integers that are 1 or multiples of 16, and
    on the constants. Once a kernel was launched with the same of each, its code is launched straight away:
    Triton's own look at every argument takes longer than all the rest.
    """
    first = pointers[0]
    key = (
        id(kernel), first.device, scalars, tuple(constants.values()), num_warps, num_stages,
        tuple([x.dtype for x in pointers]), tuple([x.data_ptr() & 15 for x in pointers]),
        tuple([(x.base.dtype, *x.block_shape) for x in descriptors]),
    )  # fmt: skip
    ready = _compiled.get(key)
    if ready is not None:
        ready[grid](*descriptors, *pointers, *scalars, *constants.values())
        return
    made = kernel[grid](
        *descriptors, *pointers, *scalars, **constants, num_warps=num_warps, num_stages=num_stages
    )
    if made is not None:  # the interpreter compiles nothing
        if len(_compiled) >= MOST_COMPILED:  # lengths are part of the key, and nobody bounds those
            _compiled.clear()
        _compiled[key] = made


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows(x: Tensor) -> Tensor:
    """``x`` ``[B, L]`` with its last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def rows_of_bytes(mask: Tensor) -> Tensor:
    """A bool mask as bytes, its last dimension contiguous: Triton has no pointer to bits."""
    return rows(mask).view(torch.uint8)


def visibility(seen: Visibility) -> Visibility:
    """As kernels read it: rows of bytes, and of positions."""
    padding, block_size, query_positions, key_positions = seen
    return Visibility(
        None if padding is None else rows_of_bytes(padding),
        block_size,
        None if query_positions is None else rows(query_positions),
        None if key_positions is None else rows(key_positions),
    )
