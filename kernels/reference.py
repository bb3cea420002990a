"""The specification: each kernel's meaning in plain PyTorch, at the precision of its inputs (float64
included).

These twins form whole score matrices and are for tests and for tiny inputs; `sinkprune.ops` holds the fast
paths.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinkprune.kernels.visibility import Visibility

LOG2E = math.log2(math.e)


def default_kv_head_of(hq: int, hkv: int, device: torch.device | None = None) -> Tensor:
    """The usual grouped-query map: query head h reads key/value head ``h // (Hq / Hkv)``. int64 ``[Hq]``."""
    return torch.arange(hq, device=device) // max(hq // max(hkv, 1), 1)


def _scores(q: Tensor, k: Tensor, heads: Tensor, kv_head_of: Tensor | None, scale: float | None) -> Tensor:
    """Base-2 scores ``[B, h, Lq, Lk]`` of the given heads, in float64 for float64 inputs and float32
    otherwise."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = default_kv_head_of(q.shape[1], k.shape[1], q.device) if kv_head_of is None else kv_head_of
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.index_select(1, heads).to(wide), k.index_select(1, groups[heads]).to(wide)
    return (q @ k.mT) * (scale * LOG2E)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kept_heads: Tensor | None = None,
    kv_head_of: Tensor | None = None,
    compact: bool = False,
    scale: float | None = None,
    **visibility: Any,
) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T · scale) v`` of the kept heads and its base-2 log-sum-exp; see
    `sinkprune.ops.attention`."""
    b, hq, lq, d = q.shape
    heads = torch.arange(hq, device=q.device) if kept_heads is None else kept_heads.long()
    kv_head_of = None if kv_head_of is None else kv_head_of.long()
    groups = default_kv_head_of(hq, k.shape[1], q.device) if kv_head_of is None else kv_head_of
    scores = _scores(q, k, heads, kv_head_of, scale)
    seen = Visibility(**visibility).keys(lq, k.shape[2], q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -math.inf)
    if visibility.get("key_padding_mask") is not None:  # a padded value may be anything, NaN included
        v = v.masked_fill(~visibility["key_padding_mask"][:, None, :, None], 0)
    values = v.index_select(1, groups[heads]).to(scores.dtype)
    top = scores.amax(-1, keepdim=True) if k.shape[2] else scores.new_full((b, len(heads), lq, 1), -math.inf)
    weights = torch.exp2(scores - top.masked_fill(top == -math.inf, 0))
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = (weights / total.masked_fill(empty, 1)) @ values
    lse = (top + torch.log2(total)).masked_fill(empty, math.inf).squeeze(-1)
    out = out.to(q.dtype)
    if compact or kept_heads is None:
        return out, lse
    full = out.new_zeros(b, hq, lq, d).index_copy(1, heads, out)
    return full, lse.new_full((b, hq, lq), math.inf).index_copy(1, heads, lse)


def sampled_rows(lq: int, sample: int | None, offset: int) -> slice:
    """The query rows a sampled mass reads: every ``sample``-th from ``offset`` modulo ``min(sample, Lq)``."""
    if sample is None or lq == 0:
        return slice(0, lq, 1)
    return slice(offset % min(sample, lq), lq, sample)


def column_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    kept_heads: Tensor | None = None,
    kv_head_of: Tensor | None = None,
    scale: float | None = None,
    sample: int | None = None,
    offset: int = 0,
    **visibility: Any,
) -> Tensor:
    """Mean over counted queries of ``softmax(q k^T · scale)``: ``[B, Hq, Lk]``; see
    `sinkprune.ops.column_mass`."""
    b, hq, lq, _ = q.shape
    heads = torch.arange(hq, device=q.device) if kept_heads is None else kept_heads.long()
    kv_head_of = None if kv_head_of is None else kv_head_of.long()
    scores = _scores(q, k, heads, kv_head_of, scale)
    seen = Visibility(**visibility).keys(lq, k.shape[2], q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -math.inf)
    if lse is None:
        _, lse = attention(
            q, k, k, kept_heads=heads, kv_head_of=kv_head_of, scale=scale, compact=True, **visibility
        )
    else:
        lse = lse.index_select(1, heads).to(scores.dtype)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    rows = sampled_rows(lq, sample, offset)
    scores, lse = scores[:, :, rows], lse[:, :, rows]
    counted = lse != math.inf
    if visibility.get("query_positions") is not None:
        counted = counted & (visibility["query_positions"] >= 0)[:, None, rows]
    weights = torch.exp2(scores - lse[..., None]).masked_fill(~counted[..., None], 0)
    mass = weights.sum(2) / counted.sum(2).clamp(min=1)[..., None]
    return mass.new_zeros(b, hq, k.shape[2]).index_copy(1, heads, mass)


# Columns of the state row that `sink_update` keeps per (layer, sample, head). A row is 32 floats: one cache
# line. Two runs of eight position columns, over the steps with a sink and over those whose sink stands out:
# count, mean, sum of squared deviations, minimum, maximum, last, number of moves, sum of |move|.
COUNT, GATED = 0, 8
MASS_MEAN, MASS_M2, MARGIN_SUM, SHARE_SUM, GATED_MASS_SUM, STEPS = 16, 17, 18, 19, 20, 21
STATE_WIDTH = 32


def sink_update_(
    mass: Tensor,
    state: Tensor,
    *,
    valid: Tensor | None = None,
    num_keys: int | None = None,
    gate_share: float = 0.0,
    gate_sigma: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Fold one step's column mass into the running statistics, in place; returns ``(position, mass)`` of
    the step.

    Args:
        mass: ``[R, K]``, a row per (layer, sample, head).
        state: ``[R, STATE_WIDTH]`` float, zeros at the start; columns as named in this module.
        valid: bool ``[R, K]``: keys that are not padded. None = all of the first ``num_keys``.
        num_keys: leading columns in use; None = all.
        gate_share, gate_sigma: the sink stands out when its mass is at least ``gate_share`` fair shares (1
            / valid keys) and exceeds mean + ``gate_sigma`` standard deviations of the mass over the valid
            keys.

    A row with a NaN or an infinity among its valid keys, or with no positive mass, has position -1 and
    changes nothing but the number of steps. Ties go to the lowest index.
    """
    rows, keys = mass.shape
    usable = torch.ones_like(mass, dtype=torch.bool) if valid is None else valid.clone()
    if num_keys is not None:
        usable[:, num_keys:] = False
    state[:, STEPS] += 1
    if keys == 0 or rows == 0:
        return torch.full((rows,), -1, dtype=torch.int32), mass.new_zeros(rows)
    a = mass.to(state.dtype).masked_fill(~usable, -1.0)
    finite = torch.isfinite(a).all(1)
    a = torch.where(finite[:, None], a, -1.0)
    top = a.amax(1)
    position = (a == top[:, None]).to(torch.int8).argmax(1)  # the first of equals
    rest = a.scatter(1, position[:, None], -1.0).amax(1).clamp(min=0)
    n = usable.sum(1).to(state.dtype).clamp(min=1)
    held = torch.where(usable & finite[:, None], a, 0.0)
    mean = held.sum(1) / n
    deviation = torch.where(usable, held - mean[:, None], 0.0)
    std = (deviation.square().sum(1) / n).sqrt()
    sink = top > 0
    stands_out = sink & (top * n >= gate_share) & (top > mean + gate_sigma * std)

    p = position.to(state.dtype)
    for first, taken in ((COUNT, sink), (GATED, stands_out)):
        count = state[:, first]
        pos_mean, pos_m2, low, high, last = (state[:, first + i] for i in range(1, 6))
        moved = torch.where(count > 0, (p - last).abs(), 0.0)
        state[:, first + 6] += torch.where(taken & (moved > 0), 1.0, 0.0)
        state[:, first + 7] += torch.where(taken, moved, 0.0)
        new_count = count + 1
        delta = p - pos_mean
        new_mean = pos_mean + delta / new_count
        new = (
            new_count,
            new_mean,
            pos_m2 + delta * (p - new_mean),
            torch.where(count > 0, torch.minimum(low, p), p),
            torch.where(count > 0, torch.maximum(high, p), p),
            p,
        )
        for i, value in enumerate(new):
            state[:, first + i] = torch.where(taken, value, state[:, first + i])
    delta = top - state[:, MASS_MEAN]
    new_mean = state[:, MASS_MEAN] + delta / state[:, COUNT].clamp(min=1)
    state[:, MASS_M2] += torch.where(sink, delta * (top - new_mean), 0.0)
    state[:, MASS_MEAN] = torch.where(sink, new_mean, state[:, MASS_MEAN])
    state[:, MARGIN_SUM] += torch.where(sink, top - rest, 0.0)
    state[:, SHARE_SUM] += torch.where(sink, top * n, 0.0)
    state[:, GATED_MASS_SUM] += torch.where(stands_out, top, 0.0)
    return torch.where(sink, position, -1).to(torch.int32), torch.where(sink, top, 0.0)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(norm, x + residual)`` of ``[..., N]``: the sum and the norm are rounded to x's dtype, then the gain
    multiplies; see `elementwise.rms_norm`."""
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed if weight is None else normed * weight), summed


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Queries ``[B, Hq, Lq, D]`` and keys, normed per head where there are gains, then turned in float32 by
    ``[Lq, R]`` or ``[B, 1, Lq, R]`` tables, rotate-half; see `elementwise.rope_qk`."""
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)[0].to(q.dtype)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)[0].to(k.dtype)
    k_cos, k_sin = cos if k_cos is None else k_cos, sin if k_sin is None else k_sin
    return _turned(q, cos, sin), _turned(k, k_cos, k_sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = cos.shape[-1]
    part = x[..., :rotated].to(torch.promote_types(x.dtype, torch.float32))
    first, second = part.chunk(2, -1)
    part = part * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((part.to(x.dtype), x[..., rotated:]), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[..., N]``, rounded once; see `elementwise.swiglu`."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide * torch.sigmoid(wide) * up.to(wide.dtype)).to(gate.dtype)
