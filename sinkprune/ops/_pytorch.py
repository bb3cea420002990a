"""Through PyTorch's own fused operations: attention that hands out its log-sum-exp, and a blocked column
mass."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune.kernels import reference
from sinkprune.kernels.reference import LOG2E, sampled_rows
from sinkprune.kernels.visibility import Visibility

# Scores formed at once: 2 MiB of float32, so that a block stays in the cache while it is read twice.
BLOCK_SCORES = 1 << 19


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_heads: Tensor | None,
    kv_head_of: Tensor | None,
    seen: Visibility,
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
        owner = _key_heads(hq, k.shape[1], kept_heads, kv_head_of, q.device)
        q = q if kept_heads is None else q.index_select(1, kept_heads)
        k, v = k.index_select(1, owner), v.index_select(1, owner)
    padding = seen.key_padding_mask
    if padding is not None and not differentiable and bool(padding.all()):
        padding = None
    if padding is not None:  # a padded key or value may be anything, NaN included
        hidden = ~padding[:, None, :, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    pairs = seen._replace(key_padding_mask=padding).keys(lq, lk, q.device)
    heads = q.shape[1]
    if 0 in (b, heads, lq, lk):  # the fused CPU kernel divides by zero on these
        out = q.new_zeros(b, heads, lq, d)
        lse = torch.full((b, heads, lq), math.inf, dtype=_wide(q), device=q.device)
    else:
        out, lse = (_cuda_attention if q.is_cuda else _cpu_attention)(q, k, v, pairs, scale)
        if pairs is not None:
            empty = ~pairs.any(-1)[:, None]
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
    seen: Visibility,
    scale: float,
    sample: int | None,
    offset: Tensor | None,
) -> None:
    """Write the column mass into ``out`` ``[B, Hq, >= Lk]``, never forming more than `BLOCK_SCORES` scores
    at once."""
    b, hq, lq, _ = q.shape
    n, lk, wide = hq if kept_heads is None else len(kept_heads), k.shape[2], _wide(q)
    rows = sampled_rows(lq, sample, 0 if offset is None else int(offset))
    q = q[:, :, rows]
    if 0 in (b, n, q.shape[2], lk):
        out.zero_()
        return
    lowest = None if lse is None else _lowest(lse[:, :, rows].to(wide), kept_heads, seen, rows)
    seen = _of_rows(seen, rows, b, lq, k.device, with_lse=lse is not None)
    if kept_heads is not None or kv_head_of is not None or n != k.shape[1]:
        k = k.index_select(1, _key_heads(hq, k.shape[1], kept_heads, kv_head_of, k.device))
    q = q if kept_heads is None else q.index_select(1, kept_heads)
    q, k = q.to(wide).flatten(0, 1), k.to(wide)
    if seen.key_padding_mask is not None:
        k = k.masked_fill(~seen.key_padding_mask[:, None, :, None], 0)
    k = k.flatten(0, 1)

    mass = torch.zeros(b * n, lk, dtype=wide, device=q.device)
    number = torch.zeros(b * n, 1, dtype=wide, device=q.device)
    for heads, block, pairs in _blocks(b, n, q.shape[1], lk, seen, q.device):
        if lowest is None:
            weights, counted = _softmax_weights(q[heads, block], k[heads].mT, pairs, scale)
        else:
            weights, counted = _weights(q[heads, block], k[heads].mT, lowest[heads, block], pairs, scale)
        mass[heads] += weights.sum(1)
        number[heads] += counted
    mass = (mass / number.clamp_(min=1)).reshape(b, n, lk)
    if out.shape[2] > lk:
        out[:, :, lk:].zero_()
    if kept_heads is None:
        out[:, :, :lk] = mass
    else:
        out[:, :, :lk].zero_().index_copy_(1, kept_heads, mass.to(out.dtype))


def _lowest(lse: Tensor, kept_heads: Tensor | None, seen: Visibility, rows: slice) -> Tensor:
    """Minus the log-sum-exp, ``[B · h, rows, 1]``. An empty row adds nothing: exp2(s - inf) = 0. A padded
    query is made one."""
    lse = lse if kept_heads is None else lse.index_select(1, kept_heads)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    if seen.query_positions is not None:
        lse = lse.masked_fill((seen.query_positions < 0)[:, None, rows], math.inf)
    return -lse.flatten(0, 1)[..., None]


def _of_rows(
    seen: Visibility, rows: slice, b: int, lq: int, device: torch.device, with_lse: bool
) -> Visibility:
    """What the sampled rows see, None for what hides nothing."""
    padding, block_size, positions, _ = seen
    if padding is not None and bool(padding.all()):
        padding = None
    if block_size is None and with_lse:  # the log-sum-exp says which rows count
        positions = None
    elif block_size is not None and positions is None:
        positions = torch.arange(lq, device=device)[None].expand(b, lq)
    positions = None if positions is None else positions[:, rows]
    return seen._replace(key_padding_mask=padding, query_positions=positions)


def _key_heads(
    hq: int, hkv: int, kept_heads: Tensor | None, kv_head_of: Tensor | None, device: torch.device
) -> Tensor:
    """The key/value head of each head that is kept."""
    owner = reference.default_kv_head_of(hq, hkv, device) if kv_head_of is None else kv_head_of
    return owner if kept_heads is None else owner.index_select(0, kept_heads)


def _blocks(
    b: int, n: int, lq: int, lk: int, seen: Visibility, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Which of the ``b · n`` heads, which query rows, and what those see: `BLOCK_SCORES` scores or fewer."""
    rows_at_once = max(1, min(lq, BLOCK_SCORES // lk))
    heads_at_once = max(1, BLOCK_SCORES // (lk * lq)) if rows_at_once == lq else 1
    # Rows of one sample share what they see, so where something is hidden heads at once are of one sample.
    together = n if seen.limited else b * n
    for start in range(0, b * n, together):
        for first in range(start, start + together, heads_at_once):
            heads = slice(first, min(first + heads_at_once, start + together))
            sample = slice(first // n, first // n + 1)
            for row in range(0, lq, rows_at_once):
                block = slice(row, min(row + rows_at_once, lq))
                pairs = seen.of(sample, block).keys(block.stop - row, lk, device) if seen.limited else None
                yield heads, block, pairs


def _weights(
    q: Tensor, keys: Tensor, lowest: Tensor, pairs: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention weights ``[heads, rows, Lk]`` by the log-sum-exp, and how many rows of a head count."""
    weights = torch.baddbmm(lowest, q, keys, alpha=scale * LOG2E).exp2_()
    if pairs is not None:
        weights.masked_fill_(~pairs, 0)
    return weights, (lowest != -math.inf).sum(1)


def _softmax_weights(
    q: Tensor, keys: Tensor, pairs: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | int]:
    """The same without it."""
    scores = torch.bmm(q, keys).mul_(scale)
    if pairs is None:
        return torch.softmax(scores, -1), q.shape[1]
    weights = torch.softmax(scores.masked_fill_(~pairs, -math.inf), -1)
    empty = ~pairs.any(-1, keepdim=True)
    return weights.masked_fill_(empty, 0), (~empty).expand(1, q.shape[1], 1).sum(1)
