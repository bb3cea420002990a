"""Through PyTorch's own fused operations: attention that hands out its log-sum-exp, and a blocked column
mass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune.kernels import reference
from sinkprune.kernels.reference import LOG2E, sampled_rows, visible_keys

# Scores formed at once: 2 MiB of float32, so that a block stays in the cache while it is read twice.
BLOCK_SCORES = 1 << 19


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_heads: Tensor | None,
    kv_head_of: Tensor | None,
    key_padding_mask: Tensor | None,
    block_size: int | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    compact: bool,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of the kept heads: gather them, run the fused kernel, scatter the result.

    ``differentiable`` keeps to operations that autograd follows; the log-sum-exp never carries a gradient.
    """
    b, hq, lq, d = q.shape
    lk = k.shape[2]
    # Grouped heads share keys inside the fused kernels, but their CPU backward does not know groups.
    regular = kept_heads is None and kv_head_of is None and not (differentiable and k.shape[1] != hq)
    if not regular:
        if kv_head_of is None:
            kv_head_of = reference.default_kv_head_of(hq, k.shape[1], q.device)
        if kept_heads is not None:
            q, kv_head_of = q.index_select(1, kept_heads), kv_head_of.index_select(0, kept_heads)
        k, v = k.index_select(1, kv_head_of), v.index_select(1, kv_head_of)
    if key_padding_mask is not None and not differentiable and bool(key_padding_mask.all()):
        key_padding_mask = None
    if key_padding_mask is not None:  # a padded key or value may be anything, NaN included
        hidden = ~key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    seen = visible_keys(
        lq,
        lk,
        key_padding_mask=key_padding_mask,
        block_size=block_size,
        query_positions=query_positions,
        key_positions=key_positions,
        device=q.device,
    )
    heads = q.shape[1]
    if 0 in (b, heads, lq, lk):  # the fused CPU kernel divides by zero on these
        out = q.new_zeros(b, heads, lq, d)
        lse = torch.full((b, heads, lq), math.inf, dtype=_wide(q), device=q.device)
    else:
        out, lse = (_cuda_attention if q.is_cuda else _cpu_attention)(q, k, v, seen, scale)
        if seen is not None:
            empty = ~seen.any(-1)[:, None]
            out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, math.inf)
    if compact or kept_heads is None:
        return out, lse
    full = out.new_zeros(b, lq, hq, d).transpose(1, 2).index_copy(1, kept_heads, out)
    return full, lse.new_full((b, hq, lq), math.inf).index_copy(1, kept_heads, lse)


def _cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    bias = None
    if seen is not None:
        bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -math.inf)[:, None]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, natural = flash(q, k, v, attn_mask=bias, scale=scale)
    # Its log-sum-exp lies as [B, L, H]; ours as [B, H, L], whatever the lengths.
    return out, torch.mul(natural.detach(), LOG2E, out=natural.new_empty(natural.shape))


def _cuda_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """cuDNN where it is on and its heads match, else FlashAttention; under a mask or in another dtype,
    whatever PyTorch picks, with the log-sum-exp computed apart."""
    fused = seen is None and q.element_size() == 2 and q.shape[3] % 8 == 0 and q.shape[3] <= 256
    if fused and k.shape[1] == q.shape[1] and q.shape[3] <= 128 and _prefers_cudnn(q.device):
        out, natural = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, False, False, scale=scale
        )[:2]
        return out, natural.detach().reshape(q.shape[:3]) * LOG2E
    if fused:
        out, natural = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, False, False, scale=scale
        )[:2]
        return out, natural.detach() * LOG2E
    mask = None if seen is None else seen[:, None]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out, _lse_apart(q.detach(), k.detach(), seen, scale)


def _prefers_cudnn(device: torch.device) -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(device)[0] >= 9


def _lse_apart(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Base-2 log-sum-exp of regular heads, a sample and a block of query rows at a time."""
    b, h, lq, _ = q.shape
    lse = torch.empty(b, h, lq, dtype=_wide(q), device=q.device)
    at_once = max(1, BLOCK_SCORES * 16 // max(1, h * k.shape[2]))
    keys = k.repeat_interleave(h // k.shape[1], 1) if k.shape[1] != h else k
    for i in range(b):
        for row in range(0, lq, at_once):
            scores = (q[i, :, row : row + at_once] @ keys[i].mT).to(lse.dtype) * scale
            if seen is not None:
                rows = seen[min(i, seen.shape[0] - 1)]
                scores.masked_fill_(~(rows if rows.shape[0] == 1 else rows[row : row + at_once]), -math.inf)
            lse[i, :, row : row + at_once] = scores.logsumexp(-1) * LOG2E
    return lse


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def column_mass_(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    kept_heads: Tensor | None,
    kv_head_of: Tensor | None,
    key_padding_mask: Tensor | None,
    block_size: int | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    sample: int | None,
    offset: Tensor | None,
) -> None:
    """Write the column mass into ``out`` ``[B, Hq, >= Lk]``, never forming more than `BLOCK_SCORES` scores
    at once."""
    b, hq, lq, d = q.shape
    lk = k.shape[2]
    wide = _wide(q)
    rows = sampled_rows(lq, sample, 0 if offset is None else int(offset))
    q = q[:, :, rows]
    counted = None if query_positions is None else (query_positions >= 0)[:, rows]
    if block_size is not None:
        query_positions = (
            torch.arange(lq, device=q.device)[None].expand(b, lq)
            if query_positions is None
            else query_positions
        )[:, rows]
    else:
        query_positions = None
    if lse is not None:
        lse = lse[:, :, rows]

    heads = torch.arange(hq, device=q.device) if kept_heads is None else kept_heads
    groups = heads // (hq // max(k.shape[1], 1)) if kv_head_of is None and hq else heads
    if kv_head_of is not None:
        groups = kv_head_of.index_select(0, heads)
    n, lq = len(heads), q.shape[2]
    if 0 in (b, n, lq, lk):
        out.zero_()
        return

    q = q if kept_heads is None else q.index_select(1, heads)
    if kept_heads is not None or kv_head_of is not None or n != k.shape[1]:
        k = k.index_select(1, groups)
    q, k = q.to(wide).reshape(b * n, lq, d), k.to(wide).reshape(b * n, lk, d)
    if key_padding_mask is not None and not bool(key_padding_mask.all()):
        k = k.reshape(b, n, lk, d).masked_fill(~key_padding_mask[:, None, :, None], 0).reshape(b * n, lk, d)
    else:
        key_padding_mask = None
    if lse is not None:
        lse = (lse if kept_heads is None else lse.index_select(1, heads)).to(wide).reshape(b * n, lq, 1)
        # An empty row adds nothing: exp2(s - inf) = 0. A padded query is made one.
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        if counted is not None:
            lse = lse.reshape(b, n, lq).masked_fill(~counted[:, None], math.inf).reshape(b * n, lq, 1)
        negative_lse = -lse

    mass = torch.zeros(b * n, lk, dtype=wide, device=q.device)
    number = torch.zeros(b * n, 1, dtype=wide, device=q.device)
    rows_at_once = max(1, min(lq, BLOCK_SCORES // lk))
    heads_at_once = max(1, BLOCK_SCORES // (lk * lq)) if rows_at_once == lq else 1
    # Rows of one sample share their visibility mask, so a block of heads with a mask stays within one sample.
    masked = (
        key_padding_mask is not None or query_positions is not None or (lse is None and counted is not None)
    )
    if masked:
        heads_at_once = min(heads_at_once, n)
    for first in _starts(b, n, heads_at_once, within_sample=masked):
        last = min(first + heads_at_once, (first // n + 1) * n if masked else b * n)
        keys = k[first:last].mT
        for row in range(0, lq, rows_at_once):
            block = slice(row, min(row + rows_at_once, lq))
            seen = None
            if masked:
                sample_id = slice(first // n, first // n + 1)
                seen = visible_keys(
                    block.stop - row,
                    lk,
                    key_padding_mask=None if key_padding_mask is None else key_padding_mask[sample_id],
                    block_size=None if query_positions is None else block_size,
                    query_positions=None if query_positions is None else query_positions[sample_id, block],
                    key_positions=None if key_positions is None else key_positions[sample_id],
                    device=q.device,
                )
                if lse is None and counted is not None and query_positions is None:
                    valid = counted[sample_id, block][..., None]
                    seen = valid if seen is None else seen & valid
            if lse is None:
                scores = torch.bmm(q[first:last, block], keys).mul_(scale)
                if seen is not None:
                    scores.masked_fill_(~seen, -math.inf)
                weights = torch.softmax(scores, -1)
                if seen is not None:
                    empty = ~seen.any(-1, keepdim=True)
                    weights.masked_fill_(empty, 0)
                    number[first:last] += (~empty).expand(1, block.stop - row, 1).sum(1)
                else:
                    number[first:last] += block.stop - row
            else:
                weights = torch.baddbmm(
                    negative_lse[first:last, block], q[first:last, block], keys, alpha=scale * LOG2E
                ).exp2_()
                if seen is not None:
                    weights.masked_fill_(~seen, 0)
                number[first:last] += (lse[first:last, block] != math.inf).sum(1)
            mass[first:last] += weights.sum(1)
    mass = (mass / number.clamp_(min=1)).reshape(b, n, lk)
    if out.shape[2] > lk:
        out[:, :, lk:].zero_()
    if kept_heads is None:
        out[:, :, :lk] = mass
    else:
        out[:, :, :lk].zero_().index_copy_(1, heads, mass.to(out.dtype))


def _starts(b: int, n: int, heads_at_once: int, within_sample: bool) -> list[int]:
    if not within_sample:
        return list(range(0, b * n, heads_at_once))
    return [i * n + h for i in range(b) for h in range(0, n, heads_at_once)]
