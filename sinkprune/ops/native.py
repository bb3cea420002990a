"""The native extension: whether it is there, why not, and repacking by it (`native_mass` is column mass).

Every function here gives the same values with and without the extension: where it is missing, or does not
serve a device, PyTorch does the same work. ``SINKPRUNE_NATIVE=0`` turns the extension off;
``SINKPRUNE_NATIVE=FILE`` loads that build of it instead of the installed one (as ``make sanitize`` does).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

HeadIds = Sequence[int] | Tensor


class PackedQKV(NamedTuple):
    """Query, key and value projections as one dense matrix: what :func:`pack_qkv` returns.

    ``weight`` [R, hidden]; ``bias`` [R] or None; ``row_map`` int64 [R] on the CPU: the row of the original
    ``cat([wq, wk, wv])`` that each row came from, -1 for a row of padding.
    """

    weight: Tensor
    bias: Tensor | None
    row_map: Tensor


class PackedMLP(NamedTuple):
    """An MLP with C channels: ``gate_up`` [2·C, hidden], gate above up ([C, hidden] without a gate), and
    ``down`` [hidden, C]."""

    gate_up: Tensor
    down: Tensor


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension module, or None and the reason."""
    wish = os.environ.get("SINKPRUNE_NATIVE", "")
    if wish == "0":
        return None, "SINKPRUNE_NATIVE=0 turned it off"
    name = "sinkprune._C"
    if wish not in ("", "1"):
        if not Path(wish).is_file():
            return None, f"SINKPRUNE_NATIVE names {wish}, which is not a file"
        loader = importlib.machinery.ExtensionFileLoader(name, wish)
        spec = importlib.util.spec_from_file_location(name, wish, loader=loader)
    else:
        spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        note = Path(__file__).parents[1] / "_C.skipped.txt"
        reason = note.read_text().strip() if note.exists() else "no compiled module came with sinkprune"
        return None, f"not built: {reason}"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        return None, f"built, but it could not be loaded: {error}"
    sys.modules[name] = module
    # Both write into their outputs and return nothing, on fake tensors as on real ones.
    torch.library.register_fake("sinkprune_native::gather_", _nothing)
    torch.library.register_fake("sinkprune_native::column_mass_", _nothing)
    return module, ""


def _nothing(*arguments: object) -> None:
    """The shape function of an op that returns nothing."""


@torch.compiler.assume_constant_result  # loading an extension can't be traced, and does not change
def available() -> bool:
    """Whether the extension is loaded; :func:`why_not` has the reason when it is not."""
    return _load()[0] is not None


def why_not() -> str:
    """Why the extension is not in use, in one line; empty when it is."""
    return _load()[1]


def build_info() -> dict[str, object]:
    """How the extension was built: ``compiler``, ``flags``, ``torch_target``, ``vectors`` (of this CPU),
    ``sanitized``, ``cuda`` (version or None), ``cuda_architectures``, ``cuda_skipped`` (why). Without it
    only ``available`` and ``why_not``."""
    module, reason = _load()
    if module is None:
        return {"available": False, "why_not": reason}
    return {"available": True, **module.build_info()}


def serves(device: torch.device | str) -> bool:
    """Whether repacking on ``device`` runs natively (elsewhere PyTorch does it)."""
    kind = torch.device(device).type.upper()
    return (
        kind in ("CPU", "CUDA")
        and available()
        and torch._C._dispatch_has_kernel_for_dispatch_key("sinkprune_native::gather_", kind)
    )


def gather_heads(
    weight: Tensor, heads: HeadIds, head_dim: int, dim: int, *, out: Tensor | None = None
) -> Tensor:
    """The rows (``dim=0``) or columns (``dim=1``) of the kept heads, dense.

    ``weight`` [num_heads·head_dim, hidden] for ``dim=0``, [hidden, num_heads·head_dim] for ``dim=1``, or a
    bias [num_heads·head_dim] with ``dim=0``; any dtype, any strides (copied first where the last dimension is
    not contiguous). ``heads`` is sorted and unique. ``out``, if given, receives the result and is returned.

    Raises ``ValueError`` for ids that are empty, unsorted, repeated or out of range, a ``head_dim`` that does
    not divide, or an ``out`` of another shape or strided in its last; ``TypeError`` for another dtype.
    """
    source = _matrix(weight, "weight", dims=(1, 2))
    if dim not in (0, 1) or dim >= source.dim():
        raise ValueError(f"dim must be {'0' if source.dim() == 1 else '0 or 1'}, got {dim}")
    ids = head_ids(heads, _pieces(source, head_dim, dim, "weight"), "heads")
    shape = list(source.shape)
    shape[dim] = len(ids) * head_dim
    result = _out(out, shape, source, "out")
    _gather([_Segment(result, source, ids, head_dim, dim)])
    return result


def pack_qkv(
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    bq: Tensor | None,
    bk: Tensor | None,
    bv: Tensor | None,
    q_heads: HeadIds,
    kv_heads: HeadIds,
    head_dim: int,
    pad_to: int = 1,
    *,
    out: Tensor | None = None,
) -> PackedQKV:
    """The kept heads of three projections as one matrix, queries first, then keys, then values.

    ``wq`` [Hq·head_dim, hidden], ``wk`` and ``wv`` [Hkv·head_dim, hidden]; the biases are all given or all
    None. Rows are padded with zeros to a multiple of ``pad_to``. ``out`` [R, hidden] receives the weight.

    Raises as :func:`gather_heads` does; also ``ValueError`` if the projections differ in hidden size, or some
    but not all have a bias, and ``TypeError``/``ValueError`` if they differ in dtype/device.
    """
    sources = [_matrix(w, name) for w, name in ((wq, "wq"), (wk, "wk"), (wv, "wv"))]
    biases = [b for b in (bq, bk, bv) if b is not None]
    if len(biases) not in (0, 3):
        raise ValueError("bq, bk and bv must be all given or all None")
    for w, name in zip(sources[1:], ("wk", "wv"), strict=True):
        _alike(w, sources[0], name, "wq")
        if w.shape[1] != sources[0].shape[1]:
            raise ValueError(f"{name} must have the {sources[0].shape[1]} columns of wq, got {w.shape[1]}")
    if wk.shape != wv.shape:
        raise ValueError(f"wk and wv must have one shape, got {tuple(wk.shape)} and {tuple(wv.shape)}")
    if pad_to < 1:
        raise ValueError(f"pad_to must be at least 1, got {pad_to}")
    q_ids = head_ids(q_heads, _pieces(sources[0], head_dim, 0, "wq"), "q_heads")
    kv_ids = head_ids(kv_heads, _pieces(sources[1], head_dim, 0, "wk"), "kv_heads")

    ids = [q_ids, kv_ids, kv_ids]
    used = sum(len(i) for i in ids) * head_dim
    rows = -(-used // pad_to) * pad_to
    weight = _out(out, [rows, sources[0].shape[1]], sources[0], "out")
    segments = _stacked(weight, sources, ids, head_dim)
    bias = None
    if biases:
        given = [_matrix(b, name, dims=(1,)) for b, name in zip(biases, ("bq", "bk", "bv"), strict=True)]
        for b, w, name in zip(given, sources, ("bq", "bk", "bv"), strict=True):
            _alike(b, sources[0], name, "wq")
            if b.shape[0] != w.shape[0]:
                raise ValueError(f"{name} must have shape [{w.shape[0]}], got {list(b.shape)}")
        bias = sources[0].new_empty(rows)
        segments += _stacked(bias, given, ids, head_dim)
    _gather(segments)
    if rows > used:
        weight[used:].zero_()
        if bias is not None:
            bias[used:].zero_()
    return PackedQKV(weight, bias, _row_map(sources, ids, head_dim, rows))


def pack_o(wo: Tensor, heads: HeadIds, head_dim: int, *, out: Tensor | None = None) -> Tensor:
    """The columns of an output projection ``wo`` [hidden, Hq·head_dim] that read the kept heads, dense."""
    return gather_heads(_matrix(wo, "wo"), heads, head_dim, 1, out=out)


def pack_mlp(gate: Tensor | None, up: Tensor, down: Tensor, channels: HeadIds) -> PackedMLP:
    """An MLP with the kept channels only, gate and up fused into one matrix.

    ``gate`` and ``up`` [channels, hidden] (``gate`` None for an MLP without one), ``down``
    [hidden, channels].
    A bias of ``gate`` or ``up`` is packed by ``gather_heads(bias, channels, 1, 0)``. Raises as
    :func:`gather_heads` does.
    """
    wide = _matrix(up, "up")
    narrow = _matrix(down, "down")
    ids = head_ids(channels, wide.shape[0], "channels")
    if narrow.shape[1] != wide.shape[0]:
        raise ValueError(
            f"down must have the {wide.shape[0]} channels of up as columns, got {narrow.shape[1]}"
        )
    _alike(narrow, wide, "down", "up")
    sources = [wide]
    if gate is not None:
        first = _matrix(gate, "gate")
        _alike(first, wide, "gate", "up")
        if first.shape != wide.shape:
            raise ValueError(f"gate must have the shape of up {list(wide.shape)}, got {list(first.shape)}")
        sources = [first, wide]
    packed = PackedMLP(
        wide.new_empty(len(sources) * len(ids), wide.shape[1]), narrow.new_empty(narrow.shape[0], len(ids))
    )
    segments = _stacked(packed.gate_up, sources, [ids] * len(sources), 1)
    _gather([*segments, _Segment(packed.down, narrow, ids, 1, 1)])
    return packed


class _Segment(NamedTuple):
    """Piece p of ``out`` along ``dim`` becomes piece ``ids[p]`` of ``source``, or zeros where that is -1."""

    out: Tensor
    source: Tensor
    ids: Tensor  # int64, CPU
    piece: int
    dim: int


def _gather(segments: list[_Segment]) -> None:
    """Runs all segments, in one native call (on CUDA: one launch) where the extension serves the device."""
    device = segments[0].source.device
    if serves(device):
        ids = _on_device([s.ids for s in segments], device)
        torch.ops.sinkprune_native.gather_(
            [s.out for s in segments],
            [s.source for s in segments],
            ids,
            [s.piece for s in segments],
            [s.dim for s in segments],
        )
        return
    for s in segments:
        _gather_torch(s)


def _on_device(ids: list[Tensor], device: torch.device) -> list[Tensor]:
    """All index vectors on ``device``, by one transfer."""
    if device.type == "cpu":
        return ids
    return list(torch.cat(ids).to(device, non_blocking=True).split([len(i) for i in ids]))


def _gather_torch(segment: _Segment) -> None:
    """One segment in plain PyTorch: the specification of the native op."""
    out, source, ids, piece, dim = segment
    # By element size: index_select lacks some dtypes (fp8), and bits are all that moves here.
    same_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(source.element_size())
    if same_bits is not None:
        source, out = source.view(same_bits), out.view(same_bits)
    index = (ids[:, None] * piece + torch.arange(piece)).flatten().to(source.device)
    absent = (ids < 0).repeat_interleave(piece).to(source.device)
    if source.shape[dim] == 0:
        out.zero_()
        return
    out.copy_(source.index_select(dim, index.clamp_min(0)))
    if bool((ids < 0).any()):
        out.index_fill_(dim, absent.nonzero().flatten(), 0)


def _stacked(whole: Tensor, sources: list[Tensor], ids: list[Tensor], piece: int) -> list[_Segment]:
    """Segments that put gathered rows one below the other in ``whole``."""
    segments, row = [], 0
    for source, kept in zip(sources, ids, strict=True):
        rows = len(kept) * piece
        segments.append(_Segment(whole[row : row + rows], source, kept, piece, 0))
        row += rows
    return segments


def _row_map(sources: list[Tensor], ids: list[Tensor], head_dim: int, rows: int) -> Tensor:
    row_map = torch.full((rows,), -1, dtype=torch.int64)
    start = filled = 0
    for source, kept in zip(sources, ids, strict=True):
        count = len(kept) * head_dim
        row_map[filled : filled + count] = (
            start + kept[:, None] * head_dim + torch.arange(head_dim)
        ).flatten()
        filled += count
        start += source.shape[0]
    return row_map


def _matrix(weight: Tensor, name: str, dims: tuple[int, ...] = (2,), *, written: bool = False) -> Tensor:
    """``weight`` without its graph, if it is a dense tensor: as it lies where its last dimension is
    contiguous, else (columns side by side in memory) copied, which what is ``written`` can't be."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.layout != torch.strided or weight.is_quantized:
        raise ValueError(f"{name} must be a dense tensor, got {weight.layout}, {weight.dtype}")
    if weight.dim() not in dims:
        expected = " or ".join(map(str, dims))
        raise ValueError(f"{name} must have {expected} dimensions, got shape {list(weight.shape)}")
    if weight.shape[-1] > 1 and weight.stride(-1) != 1:
        if written:
            raise ValueError(
                f"{name} must have a contiguous last dimension, got strides {tuple(weight.stride())}"
            )
        return weight.detach().contiguous()
    return weight.detach()


def _alike(tensor: Tensor, other: Tensor, name: str, other_name: str) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def _out(out: Tensor | None, shape: list[int], like: Tensor, name: str) -> Tensor:
    if out is None:
        return like.new_empty(shape)
    matrix = _matrix(out, name, dims=(len(shape),), written=True)
    _alike(matrix, like, name, "the weight")
    if list(matrix.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(matrix.shape)}")
    return matrix


def _pieces(weight: Tensor, head_dim: int, dim: int, name: str) -> int:
    """How many heads ``weight`` holds along ``dim``."""
    if not isinstance(head_dim, int) or isinstance(head_dim, bool):
        raise TypeError(f"head_dim must be an int, got {type(head_dim).__name__}")
    if head_dim < 1 or weight.shape[dim] % head_dim:
        raise ValueError(
            f"head_dim must divide the {weight.shape[dim]} of {name}'s dimension {dim}, got {head_dim}"
        )
    return weight.shape[dim] // head_dim


def head_ids(ids: HeadIds, limit: int, name: str) -> Tensor:
    """Sorted unique ids below ``limit`` as an int64 CPU vector."""
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {ids.dtype}")
        kept = ids.detach().to("cpu", torch.int64)
    else:
        listed = list(ids)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
            raise TypeError(f"{name} must hold integers, got {listed[:8]}")
        if any(not -(2**63) <= i < 2**63 for i in listed):
            raise ValueError(f"{name} must hold ids in 0…{limit - 1}, got {listed[:8]}")
        kept = torch.tensor(listed, dtype=torch.int64)
    if kept.dim() != 1 or len(kept) == 0:
        raise ValueError(f"{name} must be a non-empty list of ids, got shape {list(kept.shape)}")
    if int(kept.min()) < 0 or int(kept.max()) >= limit:
        raise ValueError(f"{name} must hold ids in 0…{limit - 1}, got {shown(kept)}")
    if not bool((kept[1:] > kept[:-1]).all()):
        raise ValueError(f"{name} must be sorted and unique, got {shown(kept)}")
    return kept.contiguous()


def shown(ids: Tensor) -> str:
    listed = ids[:8].tolist()
    return f"{listed}" if len(ids) <= 8 else f"{listed[:-1]}… ({len(ids)} ids)"
