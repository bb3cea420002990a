"""Triton: the attention of `attention.py` in a second form, for GPUs that copy whole tiles by themselves.

One group of warps copies tiles of keys and values through tensor descriptors while two others compute, so
that copies, products and exponentials overlap (sm_90 and later). It serves calls without masks, 16-bit, with
heads of 64 or 128; everything else is `attention.py`'s. Twin: `reference.attention`. Whether a device runs it
right, `probe.py` finds out.

    producer    K0 V0 K1 V1 K2 V2 ...        (its own loop, few registers)
    consumers   rows   0 ..  63  of the tile:  S = q K', softmax, acc += P V
                rows  64 .. 127  of the tile:  the same, beside them
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sinkprune.kernels import launch
from sinkprune.kernels.addressing import head_of, kv_of
from sinkprune.kernels.launch import Tile


@triton.jit
def _fold_tile(
    acc, m, total, b_q, k_tiles, v_tiles, i_b, i_kv, i_n, lk, scale_log2,
    BN: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Fold the keys ``i_n .. i_n + BN`` into the running output, maximum and sum."""
    b_k = k_tiles.load([i_b, i_kv, i_n, 0]).reshape(BN, D)
    s = tl.dot(b_q, b_k.T)  # [BM, BN]
    if not EVEN:  # past the last key of a sample the copy leaves zeros, which must draw nothing
        s = tl.where((i_n + tl.arange(0, BN) < lk)[None, :], s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.math.exp2(s * scale_log2 - m_new[:, None])
    decay = tl.math.exp2(m - m_new)
    total = total * decay + tl.sum(p, 1)
    b_v = v_tiles.load([i_b, i_kv, i_n, 0]).reshape(BN, D)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * decay[:, None])
    return acc, m_new, total


@triton.jit(do_not_specialize=["lq", "lk", "hq", "hkv"])
def specialised_kernel(
    q_tiles, k_tiles, v_tiles, out, lse, kept_heads, kv_head_of,
    stride_ob, stride_oh, stride_ol, stride_lb, stride_lh, lq, lk, hq, hkv, scale_log2,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    KEPT: tl.constexpr, MAPPED: tl.constexpr, COMPACT: tl.constexpr, EVEN: tl.constexpr,
    WITH_LSE: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0) * BM
    slot = tl.program_id(1)
    i_b = tl.program_id(2)
    # An id nobody checked writes nothing. No early return: the compiler would not specialise the loop.
    i_h = head_of(slot, kept_heads, KEPT)
    known = (i_h >= 0) & (i_h < hq)
    i_h = tl.where(known, i_h, 0)
    i_kv = kv_of(i_h, kv_head_of, hq, hkv, MAPPED)
    known = known & (i_kv >= 0) & (i_kv < hkv)
    i_kv = tl.where(known, i_kv, 0).to(tl.int32)
    i_oh = slot.to(tl.int64) if COMPACT else i_h
    b_q = q_tiles.load([i_b, i_h.to(tl.int32), i_m, 0]).reshape(BM, D)
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for i_n in tl.range(0, lk, BN, warp_specialize=True):
        acc, m, total = _fold_tile(
            acc, m, total, b_q, k_tiles, v_tiles, i_b, i_kv, i_n, lk, scale_log2, BN, D, EVEN
        )  # fmt: skip
    o_m = i_m + tl.arange(0, BM)
    m_m = (o_m < lq) & known
    if WITH_LSE:
        p_lse = lse + i_b.to(tl.int64) * stride_lb + i_oh * stride_lh
        tl.store(p_lse + o_m, m + tl.math.log2(total), mask=m_m)
    # A plain store: one through a descriptor is not specialised by the compiler.
    p_out = out + i_b.to(tl.int64) * stride_ob + i_oh * stride_oh + (o_m.to(tl.int64) * stride_ol)[:, None]
    b_o = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(p_out + tl.arange(0, D)[None, :], b_o, mask=m_m[:, None])


def serves(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can describe these ``[B, H, L, D]``: 16-bit, D 64 or 128, each row and head
    at a multiple of 16 bytes."""
    for x in tensors:
        if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[3] not in (64, 128):
            return False
        if 0 in x.shape or x.stride(3) != 1 or x.data_ptr() % 16:
            return False
        if any(
            size > 1 and (step % 8 or not step) for size, step in zip(x.shape[:3], x.stride(), strict=False)
        ):
            return False
    return True


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    kept_heads: Tensor | None,
    kv_head_of: Tensor | None,
    scale: float,
    compact: bool,
    tile: Tile,
) -> None:
    """Launch on arguments that `serves` accepts, writing ``out`` and ``lse`` (None = not wanted) of the kept
    heads; shapes as in `attention.attention`, without any mask."""
    b, hq, lq, d = q.shape
    hkv, lk = k.shape[1], k.shape[2]
    h = hq if kept_heads is None else kept_heads.shape[0]
    with launch.on_device(q):
        launch.start(
            specialised_kernel, (-(-lq // tile.block_m), h, b),
            (out, out if lse is None else lse, out if kept_heads is None else kept_heads,
             out if kv_head_of is None else kv_head_of),
            (*out.stride()[:3], *((0, 0) if lse is None else lse.stride()[:2]),
             lq, lk, hq, hkv, scale * launch.LOG2E),
            {"BM": tile.block_m, "BN": tile.block_n, "D": d, "KEPT": kept_heads is not None,
             "MAPPED": kv_head_of is not None, "COMPACT": compact, "EVEN": lk % tile.block_n == 0,
             "WITH_LSE": lse is not None},
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            descriptors=(_tiles(q, tile.block_m), _tiles(k, tile.block_n), _tiles(v, tile.block_n)),
        )  # fmt: skip


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """``x`` ``[B, H, L, D]``, to be copied by tiles of ``rows`` rows of a head; past a sample are zeros."""
    # A dimension of one element may have any stride; the descriptor wants multiples of 16 bytes.
    steps = [step if size > 1 else 8 for size, step in zip(x.shape[:3], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*steps, 1], [1, 1, rows, x.shape[3]])
