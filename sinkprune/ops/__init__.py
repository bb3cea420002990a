"""The operations under everything else, through one dispatch point: attention, column mass, head gathering,
and what lies between a layer's products (`elementwise`).

`attention` and `column_mass` accept any strides with a contiguous last dimension, on CPU and CUDA.
``backend`` names the code that runs:

- ``"reference"``: plain PyTorch, the specification (`sinkprune.kernels.reference`);
- ``"sdpa"``: PyTorch's fused attention; for column mass, PyTorch in blocks;
- ``"native"``: the C++ extension (column mass and head gathering, on CPU);
- ``"triton"``: our kernels, on CUDA or in Triton's interpreter;
- ``"auto"``: the fastest that can serve the call. A forced backend that cannot serve it raises and says why.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinkprune.kernels import reference
from sinkprune.kernels.visibility import Visibility
from sinkprune.ops import _pytorch
from sinkprune.ops._backends import (
    BACKENDS,
    BackendUnavailable,
    attention_refused,
    choose_attention,
    choose_column_mass,
    refuse_unknown,
)
from sinkprune.ops._checks import (
    Index,
    check_attention,
    check_heads,
    check_offset,
    is_listed,
)
from sinkprune.ops.elementwise import add_rms_norm, rms_norm, rope_qk, swiglu

__all__ = [
    "BACKENDS", "BackendUnavailable", "add_rms_norm", "attention", "attention_backend", "base2_lse",
    "column_mass", "column_mass_backend", "gather_heads", "rms_norm", "rope_qk", "sink_update", "swiglu",
]  # fmt: skip
LAYOUTS = ("full", "compact")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kept_heads: Index | None = None,
    kv_head_of: Index | None = None,
    key_padding_mask: Tensor | None = None,
    block_size: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    layout: str = "full",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention of the kept heads, with the log-sum-exp that statistics reuse.

    Args:
        q: ``[B, Hq, Lq, D]``, float32, float16, bfloat16 (float64 on the reference and the CPU paths).
        k, v: ``[B, Hkv, Lk, D]``, q's dtype; under ``torch.autocast`` all three are cast to its dtype first.
        kept_heads: sorted unique query-head ids to compute, int sequence or tensor ``[h]``; None = all.
        kv_head_of: the key/value head of every query head, ``[Hq]``; None = ``h // (Hq / Hkv)``.
        key_padding_mask: bool ``[B, Lk]``, True = valid.
        block_size: block-causal attention; a query sees the keys whose position's block is not later than
            its own.
        query_positions: int ``[B, Lq]``; -1 = padded query. Needed with ``block_size`` unless both sides
            are 0…L-1.
        key_positions: int ``[B, Lk]``; None = 0…Lk-1.
        scale: multiplies the scores; None = ``D ** -0.5``.
        layout: ``"full"`` returns all heads, zeros (lse +inf) where not kept; ``"compact"`` only the kept
            ones.
        backend: see the module.

    Returns:
        ``out`` ``[B, Hq or h, Lq, D]`` in q's dtype, and ``lse`` ``[B, Hq or h, Lq]``, the base-2
        log-sum-exp of the scaled scores in float32 (float64 for float64 inputs). A row that sees no key has
        output 0 and lse +inf.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, shape, dtype, device or values.
        BackendUnavailable: the forced backend cannot serve the call.
    """
    q, k, v = _autocast(q, k, v)
    seen = Visibility(key_padding_mask, block_size, query_positions, key_positions)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    compact = layout == "compact"
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    heads: Any = kept_heads
    groups: Any = kv_head_of
    if needs_grad or is_listed(heads, groups, q):  # the op checks what it can take, which is tensors
        heads, groups = check_attention((q, k, v), heads, groups, seen)
    scale = _scale(q, scale)
    if not needs_grad:
        return torch.ops.sinkprune.attention.default(q, k, v, heads, groups, *seen, scale, compact, backend)
    refuse_unknown(backend, attention_refused("sdpa" if backend == "auto" else backend, q, scale, True))
    if backend != "reference":  # an op would cut the graph, so autograd sees PyTorch's own operations
        return _pytorch.attention(q, k, v, heads, groups, seen, scale, compact, differentiable=True)
    out, lse = reference.attention(
        q, k, v, kept_heads=heads, kv_head_of=groups, compact=compact, scale=scale, **seen._asdict()
    )
    return out, lse.detach()


def _scale(q: Tensor, scale: float | None) -> float:
    """A head that is too small for the default is the op's to refuse."""
    return max(1, q.shape[-1] if q.dim() else 1) ** -0.5 if scale is None else scale


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under ``torch.autocast``, the tensors in its dtype, as PyTorch's own attention takes them (float64
    stays)."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    wide = torch.float64
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != wide else t for t in tensors)


def attention_backend(
    q: Tensor, *, irregular: bool = False, masked: bool = False, needs_grad: bool = False
) -> str:
    """The backend that ``attention(..., backend="auto")`` takes for such queries.

    ``irregular``: some heads are skipped or ``kv_head_of`` is ragged; ``masked``: padding, block-causal or
    padded queries; ``needs_grad``: an input requires a gradient.
    """
    return choose_attention(q, q.shape[-1] ** -0.5, irregular, masked, needs_grad)


def column_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    kept_heads: Index | None = None,
    kv_head_of: Index | None = None,
    key_padding_mask: Tensor | None = None,
    block_size: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    sample: int | None = None,
    offset: Tensor | int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much attention each key draws: the mean over counted queries of ``softmax(q k^T · scale)``.

    Each kept head's row sums to 1. Heads not kept, and heads whose every query is padded or sees no key,
    give zeros.

    Args:
        q, k, kept_heads, kv_head_of, key_padding_mask, block_size, key_positions, scale: as in `attention`.
        lse: ``[B, Hq, Lq]`` as `attention` returned it in the full layout (base-2; see `base2_lse` for
            others); None computes it.
        query_positions: int ``[B, Lq]``; queries at -1 are not counted. Pass it for padded batches: a
            padding mask alone hides keys, not queries.
        sample: read every ``sample``-th query row only, starting at ``offset``; None = all rows, the exact
            mass.
        offset: integer or integer tensor of one element (on the device, so that a graph can advance it),
            taken modulo ``min(sample, Lq)``; None = 0.
        out: float32 ``[B, Hq, >= Lk]`` to write into; columns from Lk on are set to zero.
        backend: see the module.

    Returns:
        ``[B, Hq, Lk]`` float32: ``out[:, :, :Lk]`` where ``out`` is given.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, shape, dtype, device or values.
        BackendUnavailable: the forced backend cannot serve the call.

    Source: the column sums of arXiv 2602.17664 ("Sink-Aware Pruning for Diffusion Language Models"), here
        kept
    per head and normalised.
    """
    q, k = _autocast(q, k)
    seen = Visibility(key_padding_mask, block_size, query_positions, key_positions)
    offset = check_offset(offset, q.device)
    heads, groups = kept_heads, kv_head_of
    if is_listed(heads, groups, q):
        heads, groups = check_attention((q, k), heads, groups, seen)
    if out is None:
        out = torch.empty(*q.shape[:2], *k.shape[2:3], dtype=torch.float32, device=q.device)
    scale = _scale(q, scale)
    with torch.no_grad():
        torch.ops.sinkprune.column_mass_.default(
            q, k, lse, heads, groups, *seen, scale, sample, offset, out, backend
        )
    return out[:, :, : k.shape[2]]


def column_mass_backend(q: Tensor, k: Tensor, lse: Tensor | None) -> str:
    """The backend that ``column_mass(..., backend="auto")`` takes for such tensors."""
    return choose_column_mass(q, k, lse, q.shape[-1] ** -0.5)


def base2_lse(lse: Tensor) -> Tensor:
    """A natural log-sum-exp, as FlashAttention, cuDNN and PyTorch return it, in this package's convention.

    Base 2, and +inf for empty rows (FlashAttention-3 writes -inf there). PyTorch's CPU kernel writes 0 for an
    empty row, which nothing distinguishes from a true 0: mask such rows before.
    """
    return (lse * reference.LOG2E).masked_fill(lse == -math.inf, math.inf)


def gather_heads(weight: Tensor, heads: Index, head_dim: int, dim: int) -> Tensor:
    """The rows (``dim=0``) or columns (``dim=1``) of ``weight`` that belong to the kept heads, dense.

    Args:
        weight: ``[H · head_dim, in]`` for ``dim=0`` (or a bias ``[H · head_dim]``), ``[out, H · head_dim]``
            for ``dim=1``.
        heads: sorted unique head ids, int sequence or tensor ``[h]``.
        head_dim: rows or columns per head.
        dim: 0 or 1.

    Raises:
        ValueError, TypeError: the sizes or the ids do not fit.
    """
    if dim not in (0, 1) or dim >= weight.dim() or weight.dim() > 2:
        raise ValueError(
            f"dim must be 0 or 1 of a weight with one or two dimensions, got dim={dim}, {tuple(weight.shape)}"
        )
    if head_dim < 1 or weight.shape[dim] % head_dim:
        raise ValueError(
            f"weight's dimension {dim} must be a multiple of head_dim={head_dim}, got {tuple(weight.shape)}"
        )
    kept = check_heads(heads, weight.shape[dim] // head_dim, weight.device)
    assert kept is not None
    if not (torch.is_grad_enabled() and weight.requires_grad) and weight.stride(-1) == 1 and kept.numel():
        from sinkprune.ops import native

        if native.serves(weight.device) and not torch.compiler.is_compiling():
            return native.gather_heads(weight, kept, head_dim, dim)
    return weight.unflatten(dim, (-1, head_dim)).index_select(dim, kept).flatten(dim, dim + 1)


def sink_update(
    mass: Tensor,
    state: Tensor,
    sample_of: Tensor,
    key_padding_mask: Tensor | None,
    num_keys: int,
    gate_share: float,
    gate_sigma: float,
    trace_positions: Tensor,
    trace_mass: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Fold one step's mass of all layers into the running statistics, in place: `SinkTracker.end_step`.

    Args:
        mass: float32 ``[R, K]``, a row per (layer, sample, head).
        state: float32 ``[R, 32]``, columns as in `sinkprune.kernels.reference`.
        sample_of: int32 ``[R]``, the row's sample in ``key_padding_mask``.
        key_padding_mask: bool ``[B, >= num_keys]``, True = valid, or None.
        num_keys: leading columns in use.
        gate_share, gate_sigma: see `sinkprune.evidence.sinks.SinkGate`.
        trace_positions, trace_mass: int32 and float32 ``[S, R]``, S = 0 for no trace.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.
    """
    torch.ops.sinkprune.sink_update_.default(
        mass, state, sample_of, key_padding_mask, num_keys, gate_share, gate_sigma, trace_positions,
        trace_mass, backend,
    )  # fmt: skip
