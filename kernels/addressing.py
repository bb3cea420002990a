"""Triton: what the kernels share: which head a program works on, and loads of tiles that end at odd sizes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(p, m_rows, m_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A 2-D tile, zeros where masked; a mask that is known to be all true costs nothing."""
    if ROWS and COLS:
        return tl.load(p, mask=m_rows[:, None] & m_cols[None, :], other=0.0)
    elif ROWS:
        return tl.load(p, mask=m_rows[:, None], other=0.0)
    elif COLS:
        return tl.load(p, mask=m_cols[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def head_of(slot, kept_heads, KEPT: tl.constexpr):
    """The query head of a grid slot, as int64: offsets are multiplied in 64 bits."""
    if KEPT:
        return tl.load(kept_heads + slot).to(tl.int64)
    else:
        return slot.to(tl.int64)


@triton.jit
def kv_of(i_h, kv_head_of, hq, hkv, MAPPED: tl.constexpr):
    """The key/value head that query head ``i_h`` reads, as int64."""
    if MAPPED:
        return tl.load(kv_head_of + i_h).to(tl.int64)
    else:
        return i_h // (hq // hkv)


def split_head_dim(d: int) -> tuple[int, int]:
    """``(D1, D2)``: the power-of-two dots that cover a head: 80 = 64 + 16, 96 = 64 + 32, 128 = 128 + 0."""
    d1 = max(16, 1 << (d.bit_length() - 1))
    rest = d - d1
    if rest <= 0:
        return d1, 0
    d2 = max(16, 1 << (rest - 1).bit_length())
    return (d1 * 2, 0) if d2 == d1 else (d1, d2)
