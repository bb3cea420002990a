"""Triton: how much attention each key draws, from Q, K and the saved log-sum-exp, without forming N x N
anything.

One program holds `BN` keys of one kept head on chip and walks the query rows. Scores are computed transposed,
``K q^T``, so that the column sum is a sum along a row: each thread adds up its own elements over the whole
walk, and one reduction at the end joins the threads. No atomics, and a fixed order, so the same inputs give
the same bits.
Twin: `reference.column_mass`.

    grid  x: key tiles        y: kept heads      z: samples x query shares
           ┌────────── query rows ──────────┐
     keys  │ BQ │ BQ │ BQ │ ...             │ →  acc[BN, BQ] += 2^(K q^T - lse)  →  sum over BQ / count
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkprune.kernels import launch
from sinkprune.kernels.addressing import head_of, kv_of, load_tile, split_head_dim
from sinkprune.kernels.attention import attention
from sinkprune.kernels.launch import Tile
from sinkprune.kernels.visibility import Visibility

LENGTHS = ["lq", "lk", "hq", "hkv", "n_shares", "block_size", "sample"]
COUNTED_AT_ONCE = tl.constexpr(512)


@triton.jit
def _rows_to_walk(
    i_s, n_shares, lq, sample, offset, BQ: tl.constexpr,
    SAMPLED: tl.constexpr, OFFSET: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``(start, step, lo, hi)``: of the query rows ``start, start + step, ...`` this share walks those
    numbered ``lo .. hi``."""
    start = 0
    step = 1
    n_rows = lq
    if SAMPLED:
        step = sample
        if OFFSET:
            usable = tl.minimum(sample, lq)
            start = (tl.load(offset) % usable).to(tl.int32)
            start = tl.where(start < 0, start + usable, start)
        n_rows = tl.cdiv(lq - start, sample)
    lo = 0
    hi = n_rows
    if SPLIT:
        share = tl.cdiv(tl.cdiv(n_rows, BQ), n_shares) * BQ
        lo = i_s * share
        hi = tl.minimum(n_rows, lo + share)
    return start, step, lo, hi


@triton.jit
def _count_rows(
    p_lse, p_positions, lo, hi, start, step, stride_ll, QUERY_POSITIONS: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """How many of the rows ``lo .. hi`` count, and whether any has a log-sum-exp of -inf, as
    FlashAttention-3 writes for a row that sees nothing: looked at once, so that the loop need not."""
    counted = tl.zeros([AT_ONCE], tl.float32)
    minus = tl.zeros([AT_ONCE], tl.float32)
    for i_t in tl.range(lo, hi, AT_ONCE):
        o_t = i_t + tl.arange(0, AT_ONCE)
        m_q = o_t < hi
        o_q = start + o_t * step
        if QUERY_POSITIONS:
            m_q = m_q & (tl.load(p_positions + o_q, mask=m_q, other=-1) >= 0)
        b_lse = tl.load(p_lse + o_q.to(tl.int64) * stride_ll, mask=m_q, other=float("inf"))
        counted += tl.where(tl.abs(b_lse) == float("inf"), 0.0, 1.0)
        minus += tl.where(b_lse == -float("inf"), 1.0, 0.0)
    return tl.sum(counted, 0), tl.sum(minus, 0) > 0


@triton.jit
def _weights(
    b_k1, b_k2, p_q, p_lse, p_positions, seen_from, i_t, hi, start, step, stride_ql, stride_ll, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, QUERY_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention weights of the held keys under the query rows ``i_t .. i_t + BQ``: ``[BN, BQ]``."""
    o_t = i_t + tl.arange(0, BQ)
    m_q = o_t < hi
    q_position = start + o_t * step
    o_q = q_position.to(tl.int64)
    if QUERY_POSITIONS:
        q_position = tl.load(p_positions + o_q, mask=m_q, other=-1).to(tl.int32)
        m_q = q_position >= 0
    if MASKED:
        b_lse = tl.load(p_lse + o_q * stride_ll, mask=m_q, other=float("inf"))
        b_lse = tl.where(b_lse == -float("inf"), float("inf"), b_lse)
    else:
        b_lse = tl.load(p_lse + o_q * stride_ll)
    o_d1 = tl.arange(0, D1)
    p_rows = p_q + (o_q * stride_ql)[:, None]
    b_q1 = load_tile(p_rows + o_d1[None, :], m_q, o_d1 < D, MASKED, D1 > D)  # [BQ, D1]
    s = tl.dot(b_k1, tl.trans(b_q1), input_precision=PRECISION)  # [BN, BQ]
    if D2 > 0:
        o_d2 = D1 + tl.arange(0, D2)
        b_q2 = load_tile(p_rows + o_d2[None, :], m_q, o_d2 < D, MASKED, D1 + D2 > D)
        s = tl.dot(b_k2, tl.trans(b_q2), s, input_precision=PRECISION)
    p = tl.math.exp2(s * scale_log2 - b_lse[None, :])  # an empty row: 2^(s - inf) = 0
    if CAUSAL:
        p = tl.where(seen_from[:, None] <= q_position[None, :], p, 0.0)
    return p


@triton.jit(do_not_specialize=LENGTHS)
def column_mass_kernel(
    q, k, lse, out, counts, kept_heads, kv_head_of, padding, query_positions, key_positions, offset,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_lb, stride_lh, stride_ll,
    stride_ob, stride_oh, stride_os, stride_pb, stride_qpb, stride_kpb,
    lq, lk, hq, hkv, n_shares, block_size, sample, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
    KEPT: tl.constexpr, MAPPED: tl.constexpr, SAMPLED: tl.constexpr, OFFSET: tl.constexpr,
    SPLIT: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, QUERY_POSITIONS: tl.constexpr,
    KEY_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BN
    slot = tl.program_id(1)
    i_z = tl.program_id(2)
    i_b = (i_z // n_shares).to(tl.int64)
    i_s = i_z % n_shares
    i_h = head_of(slot, kept_heads, KEPT)
    if (i_h < 0) | (i_h >= hq):
        return
    i_kv = kv_of(i_h, kv_head_of, hq, hkv, MAPPED)
    if (i_kv < 0) | (i_kv >= hkv):
        return

    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < lk
    o_d1 = tl.arange(0, D1)
    p_k = k + i_b * stride_kb + i_kv * stride_kh + (o_n.to(tl.int64) * stride_kl)[:, None]
    b_k1 = load_tile(p_k + o_d1[None, :], m_n, o_d1 < D, True, D1 > D)  # [BN, D1], stays on chip
    b_k2 = b_k1
    if D2 > 0:
        o_d2 = D1 + tl.arange(0, D2)
        b_k2 = load_tile(p_k + o_d2[None, :], m_n, o_d2 < D, True, D1 + D2 > D)
    seen_from = o_n
    if CAUSAL:
        k_position = o_n
        if KEY_POSITIONS:
            k_position = tl.load(key_positions + i_b * stride_kpb + o_n, mask=m_n, other=0).to(tl.int32)
        seen_from = k_position // block_size * block_size  # the first position that sees the key

    start, step, lo, hi = _rows_to_walk(i_s, n_shares, lq, sample, offset, BQ, SAMPLED, OFFSET, SPLIT)
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_lse = lse + i_b * stride_lb + i_h * stride_lh
    p_positions = query_positions + i_b * stride_qpb
    counted_rows, dirty = _count_rows(
        p_lse, p_positions, lo, hi, start, step, stride_ll, QUERY_POSITIONS, COUNTED_AT_ONCE
    )
    if CAUSAL and not (QUERY_POSITIONS or KEY_POSITIONS or SAMPLED):
        # No query of an earlier block sees these keys: such rows are counted, not computed.
        skip = tl.minimum(i_n // block_size * block_size, hi)
        lo = lo + tl.maximum(skip - lo, 0) // BQ * BQ
    # Whole tiles of rows whose log-sum-exp is clean need no mask. A padded query may hold NaN: each row's
    # load is masked then.
    full = lo
    if not QUERY_POSITIONS:
        full = tl.where(dirty, lo, lo + tl.maximum(hi - lo, 0) // BQ * BQ)
    acc = tl.zeros([BN, BQ], tl.float32)
    if not QUERY_POSITIONS:
        for i_t in tl.range(lo, full, BQ):
            acc += _weights(
                b_k1, b_k2, p_q, p_lse, p_positions, seen_from, i_t, hi, start, step,
                stride_ql, stride_ll, scale_log2, D, D1, D2, BQ, False, CAUSAL, False, PRECISION,
            )  # fmt: skip
    for i_t in tl.range(full, hi, BQ):
        acc += _weights(
            b_k1, b_k2, p_q, p_lse, p_positions, seen_from, i_t, hi, start, step,
            stride_ql, stride_ll, scale_log2, D, D1, D2, BQ, True, CAUSAL, QUERY_POSITIONS, PRECISION,
        )  # fmt: skip
    total = tl.sum(acc, 1)  # [BN]
    if PADDED:
        valid = tl.load(padding + i_b * stride_pb + o_n, mask=m_n, other=0) != 0
        total = tl.where(valid, total, 0.0)
    if SPLIT:
        p_out = out + i_s.to(tl.int64) * stride_os + i_b * stride_ob + slot.to(tl.int64) * stride_oh
        tl.store(p_out + o_n, total, mask=m_n)
        if i_n == 0:
            n_heads = tl.num_programs(1).to(tl.int64)
            n_samples = tl.num_programs(2) // n_shares
            tl.store(counts + (i_s * n_samples + i_b) * n_heads + slot, counted_rows)
    else:
        p_out = out + i_b * stride_ob + i_h * stride_oh
        tl.store(p_out + o_n, total / tl.maximum(counted_rows, 1.0), mask=m_n)


@triton.jit(do_not_specialize=["lk", "hq", "n_shares"])
def join_shares_kernel(
    partial, counts, out, kept_heads, stride_ob, stride_oh, lk, hq, n_shares,
    BN: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Add the query shares in their order and divide by the queries counted."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < lk
    slot = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    h = tl.num_programs(1).to(tl.int64)
    b = tl.num_programs(2).to(tl.int64)
    i_h = head_of(slot, kept_heads, KEPT)
    if (i_h < 0) | (i_h >= hq):
        return
    total = tl.zeros([BN], tl.float32)
    counted = 0.0
    for i_s in tl.range(0, n_shares):
        row = (i_s * b + i_b) * h + slot
        total += tl.load(partial + row * lk + o_n, mask=m_n, other=0.0)
        counted += tl.load(counts + row)
    tl.store(out + i_b * stride_ob + i_h * stride_oh + o_n, total / tl.maximum(counted, 1.0), mask=m_n)


def column_mass_(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    kept_heads: Tensor | None = None,
    kv_head_of: Tensor | None = None,
    scale: float,
    sample: int | None = None,
    offset: Tensor | None = None,
    tile: Tile | None = None,
    shares: int | None = None,
    **visibility: Any,
) -> None:
    """Launch on checked arguments, writing ``out`` ``[B, Hq, >= Lk]``; shapes as in
    `sinkprune.ops.column_mass`, ``visibility`` as in `Visibility`.

    Without ``lse`` it is computed first, by the attention kernel without its output. In ``tile``,
    ``block_n`` is the keys held and ``block_m`` the query rows per iteration; ``shares`` splits the query
    walk.
    """
    b, hq, lq, d = q.shape
    hkv, lk = k.shape[1], k.shape[2]
    h = hq if kept_heads is None else kept_heads.shape[0]
    if kept_heads is not None or out.shape[2] > lk or 0 in (b, h, lq, lk):
        out.zero_()
    if 0 in (b, h, lq, lk):
        return
    if lse is None:
        _, lse = attention(
            q, k, None, kept_heads=kept_heads, kv_head_of=kv_head_of, scale=scale, **visibility
        )
    rows = lq if sample is None else -(-lq // sample)
    if tile is None:
        tile, chosen = launch.column_mass_tile(q, rows=rows, keys=lk, programs=b * h)
        shares = chosen if shares is None else shares
    shares = max(1, min(shares or 1, -(-rows // tile.block_m)))
    split = shares > 1
    d1, d2 = split_head_dim(d)
    to, counts, o_strides = out, out, (out.stride(0), out.stride(1), 0)
    if split:
        to = torch.empty(shares, b, h, lk, dtype=torch.float32, device=q.device)
        counts = torch.empty(shares, b, h, dtype=torch.float32, device=q.device)
        o_strides = (to.stride(1), to.stride(2), to.stride(0))
    padding, block_size, query_positions, key_positions = launch.visibility(Visibility(**visibility))
    optional = (kept_heads, kv_head_of, padding, query_positions, key_positions, offset)
    constants = {
        "D": d, "D1": d1, "D2": d2, "BN": tile.block_n, "BQ": tile.block_m,
        "KEPT": kept_heads is not None, "MAPPED": kv_head_of is not None, "SAMPLED": sample is not None,
        "OFFSET": offset is not None, "SPLIT": split, "PADDED": padding is not None,
        "CAUSAL": block_size is not None, "QUERY_POSITIONS": query_positions is not None,
        "KEY_POSITIONS": key_positions is not None, "PRECISION": "ieee",
    }  # fmt: skip
    with launch.on_device(q):
        launch.start(
            column_mass_kernel, (-(-lk // tile.block_n), h, b * shares),
            (q, k, lse, to, counts, *[out if x is None else x for x in optional]),
            (*q.stride()[:3], *k.stride()[:3], *lse.stride(), *o_strides,
             *[0 if x is None else x.stride(0) for x in optional[2:5]],
             lq, lk, hq, hkv, shares, min(block_size or 1, 1 << 29), sample or 1, scale * launch.LOG2E),
            constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if split:
            width = min(1024, 1 << (lk - 1).bit_length())
            launch.start(
                join_shares_kernel, (-(-lk // width), h, b),
                (to, counts, out, out if kept_heads is None else kept_heads),
                (out.stride(0), out.stride(1), lk, hq, shares),
                {"BN": width, "KEPT": kept_heads is not None}, num_warps=4,
            )  # fmt: skip
