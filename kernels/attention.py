"""Triton: exact attention of the kept heads only, with its base-2 log-sum-exp.

One program computes `BM` query rows of one kept head against all its keys (or one share of them, when
queries are few and the keys are split), with the online softmax in float32. Pruned heads have no program.
Twin: `reference.attention`.

    grid  x: query tiles      y: kept heads      z: samples x key shares
           ┌──────────── keys ───────────┐
      q    │ BN │ BN │ BN │ ...          │ →  m, total, acc  →  out = acc / total,  lse = m + log2 total
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkprune.kernels import attention_specialised, launch, probe
from sinkprune.kernels.addressing import head_of, kv_of, load_tile, split_head_dim
from sinkprune.kernels.launch import Tile
from sinkprune.kernels.visibility import Visibility

# No recompilation as lengths change, not even at a length of 1 or a multiple of 16.
LENGTHS = ["lq", "lk", "hq", "hkv", "n_shares", "block_size"]
KEYS_SCANNED_AT_ONCE = tl.constexpr(1024)


@triton.jit
def _valid_keys(p_padding, lk, AT_ONCE: tl.constexpr):
    """``(first, hole, end)``: the first valid key, the first padded one after it, and where the last ends.

    Keys ``first .. hole`` are all valid, none outside ``first .. end`` is.
    """
    first = lk
    hole = lk
    end = 0
    for i_n in tl.range(0, lk, AT_ONCE):
        o_n = i_n + tl.arange(0, AT_ONCE)
        valid = tl.load(p_padding + o_n, mask=o_n < lk, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(valid, o_n, lk), 0))
        end = tl.maximum(end, tl.max(tl.where(valid, o_n + 1, 0), 0))
        hole = tl.minimum(hole, tl.min(tl.where(valid | (o_n < first), lk, o_n), 0))
    return first, hole, end


@triton.jit
def _keys_to_walk(
    i_s, n_shares, o_m, m_m, p_padding, p_query_positions, lk, block_size,
    BN: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr,
    QUERY_POSITIONS: tl.constexpr, KEY_POSITIONS: tl.constexpr,
):  # fmt: skip
    """``(lo, clear, full, hi, m_valid, sees)``: the keys walked are ``lo .. hi``, and every query sees all
    of ``clear .. full``; ``m_valid`` are the queries that are not padded, and with CAUSAL a query sees the
    keys at positions before ``sees``."""
    lo = 0
    hi = lk
    if SPLIT:
        share = tl.cdiv(tl.cdiv(lk, BN), n_shares) * BN
        lo = i_s * share
        hi = tl.minimum(lk, lo + share)
    hole = lk
    clear = lo
    if PADDED:
        first, hole, end = _valid_keys(p_padding, lk, KEYS_SCANNED_AT_ONCE)
        lo = tl.maximum(lo, first // BN * BN)
        hi = tl.minimum(hi, end)
        clear = lo + tl.where(first > lo, BN, 0)
    m_valid = m_m
    q_position = o_m
    if QUERY_POSITIONS:
        q_position = tl.load(p_query_positions + o_m, mask=m_m, other=-1).to(tl.int32)
        m_valid = q_position >= 0
    sees = q_position
    if CAUSAL:  # the division by the block size happens here, once per query
        sees = tl.where(m_valid, (q_position // block_size + 1) * block_size, 0)
        if not KEY_POSITIONS:  # keys are in order: skip the blocks that nobody sees
            hi = tl.minimum(hi, tl.max(sees, 0))
            hole = tl.minimum(hole, tl.min(tl.where(m_valid, sees, 2147483647), 0))
    full = clear
    if not (CAUSAL and KEY_POSITIONS):
        full = clear + tl.maximum(tl.minimum(hole, hi) - clear, 0) // BN * BN
    return lo, clear, full, hi, m_valid, sees


@triton.jit
def _attend_block(
    acc1, acc2, m, total, b_q1, b_q2, p_k, p_v, p_padding, p_key_positions, i_n, lk, sees,
    stride_kl, stride_vl, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, KEY_POSITIONS: tl.constexpr,
    WITH_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys ``i_n .. i_n + BN`` into the running maximum, sum and output."""
    o_n = tl.arange(0, BN)
    o_d1 = tl.arange(0, D1)
    m_d1 = o_d1 < D
    m_n = i_n + o_n < lk
    if PADDED:
        m_n = m_n & (tl.load(p_padding + i_n + o_n, mask=m_n, other=0) != 0)
    # Row offsets in int64: a stride of 2^25 elements overflows int32 at the 64th row.
    if MASKED:
        o_k = (i_n + o_n).to(tl.int64) * stride_kl
        o_v = (i_n + o_n).to(tl.int64) * stride_vl
    else:
        p_k += tl.cast(i_n, tl.int64) * stride_kl
        p_v += tl.cast(i_n, tl.int64) * stride_vl
        o_k = o_n.to(tl.int64) * stride_kl
        o_v = o_n.to(tl.int64) * stride_vl
    b_k1 = load_tile(p_k + o_k[:, None] + o_d1[None, :], m_n, m_d1, MASKED, D1 > D)  # [BN, D1]
    s = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)  # [BM, BN]
    if D2 > 0:
        o_d2 = D1 + tl.arange(0, D2)
        m_d2 = o_d2 < D
        b_k2 = load_tile(p_k + o_k[:, None] + o_d2[None, :], m_n, m_d2, MASKED, D1 + D2 > D)
        s = tl.dot(b_q2, tl.trans(b_k2), s, input_precision=PRECISION)
    if MASKED:
        s = tl.where(m_n[None, :], s, -float("inf"))
        if CAUSAL:
            k_position = i_n + o_n
            if KEY_POSITIONS:
                k_position = tl.load(p_key_positions + i_n + o_n, mask=i_n + o_n < lk, other=0).to(tl.int32)
            s = tl.where(k_position[None, :] < sees[:, None], s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    # A row that has seen nothing yet keeps m = -inf; subtracting 0 instead keeps exp2 away from inf - inf.
    shift = tl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
    p = tl.math.exp2(s * scale_log2 - shift[:, None])  # [BM, BN]
    decay = tl.math.exp2(m - shift)
    total = total * decay + tl.sum(p, 1)
    if WITH_OUT:
        b_v1 = load_tile(p_v + o_v[:, None] + o_d1[None, :], m_n, m_d1, MASKED, D1 > D)  # [BN, D1]
        b_p = p.to(b_v1.dtype)
        acc1 = tl.dot(b_p, b_v1, acc1 * decay[:, None], input_precision=PRECISION)
        if D2 > 0:
            b_v2 = load_tile(p_v + o_v[:, None] + o_d2[None, :], m_n, m_d2, MASKED, D1 + D2 > D)
            acc2 = tl.dot(b_p, b_v2, acc2 * decay[:, None], input_precision=PRECISION)
    return acc1, acc2, m_new, total


@triton.jit(do_not_specialize=LENGTHS)
def attention_kernel(
    q, k, v, out, lse, kept_heads, kv_head_of, padding, query_positions, key_positions,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, stride_os, stride_lb, stride_lh, stride_ls,
    stride_pb, stride_qpb, stride_kpb,
    lq, lk, hq, hkv, n_shares, block_size, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KEPT: tl.constexpr, MAPPED: tl.constexpr, COMPACT: tl.constexpr, SPLIT: tl.constexpr,
    PADDED: tl.constexpr, CAUSAL: tl.constexpr, QUERY_POSITIONS: tl.constexpr, KEY_POSITIONS: tl.constexpr,
    WITH_OUT: tl.constexpr, WITH_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0) * BM
    slot = tl.program_id(1)
    i_z = tl.program_id(2)
    i_b = (i_z // n_shares).to(tl.int64)
    i_s = i_z % n_shares
    i_h = head_of(slot, kept_heads, KEPT)
    if (i_h < 0) | (i_h >= hq):  # an id nobody checked: no program may write outside its tensors
        return
    i_kv = kv_of(i_h, kv_head_of, hq, hkv, MAPPED)
    if (i_kv < 0) | (i_kv >= hkv):
        return
    i_oh = slot.to(tl.int64) if COMPACT else i_h

    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < lq
    o_d1 = tl.arange(0, D1)
    p_q = q + i_b * stride_qb + i_h * stride_qh + (o_m.to(tl.int64) * stride_ql)[:, None]
    p_k = k + i_b * stride_kb + i_kv * stride_kh
    p_v = v + i_b * stride_vb + i_kv * stride_vh
    p_padding = padding + i_b * stride_pb
    p_key_positions = key_positions + i_b * stride_kpb
    b_q1 = load_tile(p_q + o_d1[None, :], m_m, o_d1 < D, True, D1 > D)  # [BM, D1]
    b_q2 = b_q1
    if D2 > 0:
        o_d2 = D1 + tl.arange(0, D2)
        b_q2 = load_tile(p_q + o_d2[None, :], m_m, o_d2 < D, True, D1 + D2 > D)  # [BM, D2]

    lo, clear, full, hi, m_valid, sees = _keys_to_walk(
        i_s, n_shares, o_m, m_m, p_padding, query_positions + i_b * stride_qpb, lk, block_size,
        BN, SPLIT, PADDED, CAUSAL, QUERY_POSITIONS, KEY_POSITIONS,
    )  # fmt: skip
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc1 = tl.zeros([BM, D1], tl.float32)
    acc2 = tl.zeros([BM, D2 if D2 > 0 else 1], tl.float32)
    if not (CAUSAL and KEY_POSITIONS):
        for i_n in tl.range(clear, full, BN):
            acc1, acc2, m, total = _attend_block(
                acc1, acc2, m, total, b_q1, b_q2, p_k, p_v, p_padding, p_key_positions, i_n, lk, sees,
                stride_kl, stride_vl, scale_log2, D, D1, D2, BN,
                False, False, False, False, WITH_OUT, PRECISION,
            )  # fmt: skip
    if not PADDED:  # no tile before the clear ones needs a mask, only those after
        lo = full
    skipped = full - clear if PADDED else 0
    for i_t in tl.range(lo, hi - skipped, BN):
        i_n = tl.where(i_t < clear, i_t, i_t + skipped) if PADDED else i_t
        acc1, acc2, m, total = _attend_block(
            acc1, acc2, m, total, b_q1, b_q2, p_k, p_v, p_padding, p_key_positions, i_n, lk, sees,
            stride_kl, stride_vl, scale_log2, D, D1, D2, BN,
            True, PADDED, CAUSAL, KEY_POSITIONS, WITH_OUT, PRECISION,
        )  # fmt: skip

    empty = (total == 0.0) | (m_valid == 0)
    if WITH_LSE:
        p_lse = lse + i_b * stride_lb + i_oh * stride_lh + i_s.to(tl.int64) * stride_ls
        tl.store(p_lse + o_m, tl.where(empty, float("inf"), m + tl.math.log2(total)), mask=m_m)
    if WITH_OUT:
        inverse = tl.where(empty, 0.0, 1.0 / total)
        p_out = out + i_b * stride_ob + i_oh * stride_oh + i_s.to(tl.int64) * stride_os
        p_out = p_out + (o_m.to(tl.int64) * stride_ol)[:, None]
        # `where`, not a product: a padded query may hold NaN.
        b_o = tl.where(empty[:, None], 0.0, acc1 * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(p_out + o_d1[None, :], b_o, mask=m_m[:, None] & (o_d1 < D)[None, :])
        if D2 > 0:
            b_o = tl.where(empty[:, None], 0.0, acc2 * inverse[:, None]).to(out.dtype.element_ty)
            tl.store(p_out + o_d2[None, :], b_o, mask=m_m[:, None] & (o_d2 < D)[None, :])


@triton.jit(do_not_specialize=["lq", "hq", "n_shares"])
def combine_kernel(
    partial, partial_lse, out, lse, kept_heads, stride_ob, stride_oh, stride_ol, lq, hq, n_shares,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, KEPT: tl.constexpr, COMPACT: tl.constexpr,
    WITH_OUT: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """Join the key shares, in their order: ``lse = log2 sum 2^lse_s``, ``out = sum 2^(lse_s - lse)
    out_s``."""
    i_m = tl.program_id(0) * BM
    slot = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    h = tl.num_programs(1).to(tl.int64)
    b = tl.num_programs(2).to(tl.int64)
    i_h = head_of(slot, kept_heads, KEPT)
    if (i_h < 0) | (i_h >= hq):
        return
    i_oh = slot if COMPACT else i_h
    h_out = h if COMPACT else hq
    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < lq
    o_d = tl.arange(0, DP)
    m_tile = m_m[:, None] & (o_d < D)[None, :]
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for i_s in tl.range(0, n_shares):
        row = ((i_s * b + i_b) * h + slot) * lq + o_m
        part = tl.load(partial_lse + row, mask=m_m, other=float("inf"))
        part = tl.where(part == float("inf"), -float("inf"), part)  # a share that saw nothing
        m_new = tl.maximum(m, part)
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        decay = tl.math.exp2(m - shift)
        weight = tl.math.exp2(part - shift)
        total = total * decay + weight
        if WITH_OUT:
            b_o = tl.load(partial + row[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
            acc = acc * decay[:, None] + b_o * weight[:, None]
        m = m_new
    empty = total == 0.0
    if WITH_LSE:
        p_lse = lse + (i_b * h_out + i_oh) * lq
        tl.store(p_lse + o_m, tl.where(empty, float("inf"), m + tl.math.log2(total)), mask=m_m)
    if WITH_OUT:
        b_o = tl.where(empty[:, None], 0.0, acc / total[:, None]).to(out.dtype.element_ty)
        p_out = out + i_b * stride_ob + i_oh * stride_oh + (o_m.to(tl.int64) * stride_ol)[:, None]
        tl.store(p_out + o_d[None, :], b_o, mask=m_tile)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    kept_heads: Tensor | None = None,
    kv_head_of: Tensor | None = None,
    scale: float,
    compact: bool = False,
    with_lse: bool = True,
    tile: Tile | None = None,
    shares: int | None = None,
    **visibility: Any,
) -> tuple[Tensor, Tensor]:
    """Launch on checked arguments; shapes as in `sinkprune.ops.attention`, ``visibility`` as in `Visibility`.

    Without ``v`` only the log-sum-exp is computed, and with ``with_lse`` off only the output: the other
    result is then an empty tensor. ``tile`` and ``shares`` (key shares per query tile) override the shipped
    launch configuration; a specialised tile that cannot serve the call raises ValueError.
    """
    b, hq, lq, d = q.shape
    lk = k.shape[2]
    h = hq if kept_heads is None else kept_heads.shape[0]
    h_out = h if compact else hq
    partly = kept_heads is not None and not compact
    with_lse = with_lse or v is None
    shape = (b, lq, h_out if v is not None else 0, d)
    out = (torch.zeros if partly else torch.empty)(shape, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(b, h_out, lq if with_lse else 0, dtype=torch.float32, device=q.device)
    if partly or lk == 0:
        lse.fill_(math.inf)
    if 0 in (b, h, lq, lk):
        return out.zero_(), lse
    seen = Visibility(**visibility)
    masked = any(x is not None for x in seen)
    if tile is None:
        specialised = (
            v is not None
            and not masked
            and probe.specialised_works(q.device)
            and attention_specialised.serves(q, k, v)
        )
        tile, chosen = launch.attention_tile(q, rows=lq, keys=lk, programs=b * h, specialised=specialised)
        shares = chosen if shares is None else shares
    if tile.specialised:
        if v is None or masked or not attention_specialised.serves(q, k, v):
            raise ValueError(
                "a specialised tile serves calls with values and without masks, 16-bit, heads of 64 or 128 "
                f"at multiples of 16 bytes, got {q.dtype}, head {d}, strides {q.stride()}, masked={masked}"
            )
        attention_specialised.attend(
            q, k, v, out, lse if with_lse else None, kept_heads=kept_heads, kv_head_of=kv_head_of,
            scale=scale, compact=compact, tile=tile,
        )  # fmt: skip
        return out, lse
    shares = max(1, min(shares or 1, -(-lk // tile.block_n)))
    _launch(q, k, v, out, lse, kept_heads, kv_head_of, seen, scale, compact, with_lse, tile, shares)
    return out, lse


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept_heads: Tensor | None,
    kv_head_of: Tensor | None,
    seen: Visibility,
    scale: float,
    compact: bool,
    with_lse: bool,
    tile: Tile,
    shares: int,
) -> None:
    """The kernel of this file over ``shares`` shares of the keys, which a second one joins."""
    b, hq, lq, d = q.shape
    hkv, lk = k.shape[1], k.shape[2]
    h = hq if kept_heads is None else kept_heads.shape[0]
    split = shares > 1
    d1, d2 = split_head_dim(d)
    to, to_lse = out, lse
    o_strides = (*out.stride()[:3], 0)
    l_strides = (*lse.stride()[:2], 0)
    if split:
        to = torch.empty(shares, b, h, lq, d if v is not None else 0, dtype=torch.float32, device=q.device)
        to_lse = torch.empty(shares, b, h, lq, dtype=torch.float32, device=q.device)
        o_strides = (*to.stride()[1:4], to.stride(0))
        l_strides = (*to_lse.stride()[1:3], to_lse.stride(0))
    padding, block_size, query_positions, key_positions = launch.visibility(seen)
    values = k if v is None else v
    optional = (kept_heads, kv_head_of, padding, query_positions, key_positions)
    constants = {
        "D": d, "D1": d1, "D2": d2, "BM": tile.block_m, "BN": tile.block_n,
        "KEPT": kept_heads is not None, "MAPPED": kv_head_of is not None, "COMPACT": compact or split,
        "SPLIT": split, "PADDED": padding is not None, "CAUSAL": block_size is not None,
        "QUERY_POSITIONS": query_positions is not None, "KEY_POSITIONS": key_positions is not None,
        "WITH_OUT": v is not None, "WITH_LSE": with_lse or split, "PRECISION": "ieee",
    }  # fmt: skip
    with launch.on_device(q):
        launch.start(
            attention_kernel, (-(-lq // tile.block_m), h, b * shares),
            (q, k, values, to, to_lse, *[q if x is None else x for x in optional]),
            (*q.stride()[:3], *k.stride()[:3], *values.stride()[:3], *o_strides, *l_strides,
             *[0 if x is None else x.stride(0) for x in optional[2:]],
             lq, lk, hq, hkv, shares, min(block_size or 1, 1 << 29), scale * launch.LOG2E),
            constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if split:
            rows = min(16, 1 << (lq - 1).bit_length())
            launch.start(
                combine_kernel, (-(-lq // rows), h, b),
                (to, to_lse, out, lse, lse if kept_heads is None else kept_heads),
                (*out.stride()[:3], lq, hq, shares),
                {"D": d, "DP": 1 << (d - 1).bit_length(), "BM": rows, "KEPT": kept_heads is not None,
                 "COMPACT": compact, "WITH_OUT": v is not None, "WITH_LSE": with_lse},
                num_warps=4,
            )  # fmt: skip
