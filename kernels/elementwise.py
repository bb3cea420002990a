"""Triton: what lies between the matrix products of a layer, each in one pass over memory.

Norm with the residual sum before it, rotary position embedding of queries and keys together (with their norm
where a model has one), and SwiGLU. All arithmetic is in float32, and results are rounded where PyTorch's own
operations round. Twins: `reference.rms_norm`, `reference.rope_qk`, `reference.swiglu`.

    x + residual ─▶ sum ─▶ sum / rms · weight          q heads │ k heads  ─▶ turned by one table of angles
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkprune.kernels import launch

WIDEST_ROW = 1 << 16
# Tokens and heads that one program of the rotary kernel turns by the angles it holds.
TOKENS, HEADS = 32, 4


@triton.jit(do_not_specialize=["n_rows", "eps"])
def rms_norm_kernel(
    x, residual, weight, normed, summed, stride_x, stride_r, n, n_rows, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WITH_RESIDUAL: tl.constexpr, WITH_WEIGHT: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_n = tl.arange(0, BLOCK)[None, :]
    m = (o_r < n_rows) & (o_n < n)
    b_x = tl.load(x + o_r * stride_x + o_n, mask=m, other=0.0)  # [ROWS, BLOCK]
    if WITH_RESIDUAL:
        b_r = tl.load(residual + o_r * stride_r + o_n, mask=m, other=0.0)
        b_x = (b_x.to(tl.float32) + b_r.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(summed + o_r * n + o_n, b_x, mask=m)
    wide = b_x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / n + eps)
    b_y = (wide * scale[:, None]).to(x.dtype.element_ty)
    if WITH_WEIGHT:  # a product of the rounded norm, as in PyTorch
        b_y = b_y.to(tl.float32) * tl.load(weight + o_n, mask=o_n < n, other=0.0).to(tl.float32)
    tl.store(normed + o_r * n + o_n, b_y.to(normed.dtype.element_ty), mask=m)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(norm of x + residual, x + residual)``, or of ``x`` alone, which then comes back itself.

    Args:
        x: float32, float16 or bfloat16 ``[..., N]``, N at most 65536.
        weight: gain ``[N]``, or None.
        residual: of x's shape and dtype, or None.

    The norm has x's dtype, or the wider one of ``weight``; both results are contiguous.
    """
    n = x.shape[-1]
    if n > WIDEST_ROW:
        raise ValueError(f"rms_norm takes rows of at most {WIDEST_ROW} elements, got {n}")
    rows = _rows(x)
    others = rows if residual is None else _rows(residual)
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    summed = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return normed, summed
    block = max(16, 1 << (n - 1).bit_length())
    held = max(1, 2048 // block)
    with launch.on_device(x):
        launch.start(
            rms_norm_kernel, (-(-rows.shape[0] // held), 1, 1),
            (rows, others, rows if weight is None else weight, normed, summed),
            (rows.stride(0), others.stride(0), n, rows.shape[0], eps),
            {"ROWS": held, "BLOCK": block, "WITH_RESIDUAL": residual is not None,
             "WITH_WEIGHT": weight is not None},
            num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    return normed, summed


@triton.jit
def _turn_heads(
    x, y, cos, sin, weight, i_t, i_b, first, n_heads, length,
    stride_xb, stride_xh, stride_xl, stride_tb, stride_tl, eps,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BT: tl.constexpr, HEADS: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Turn ``HEADS`` heads of ``BT`` tokens: features 0 .. R/2 against R/2 .. R; those from R on pass."""
    dtype = x.dtype.element_ty
    o_t = (i_t * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    o_r = tl.arange(0, HALF)[None, :]
    m_t = o_t < length
    m_r = m_t & (o_r < R // 2)
    table = i_b * stride_tb + o_t * stride_tl + o_r
    cos1 = tl.load(cos + table, mask=m_r, other=0.0)  # [BT, HALF]
    cos2 = tl.load(cos + table + R // 2, mask=m_r, other=0.0)
    sin1 = tl.load(sin + table, mask=m_r, other=0.0)
    sin2 = tl.load(sin + table + R // 2, mask=m_r, other=0.0)
    o_d = R + tl.arange(0, REST if REST > 0 else 1)[None, :]
    m_d = m_t & (o_d < D)
    for i_h in tl.range(first, tl.minimum(first + HEADS, n_heads)):
        p_x = x + i_b * stride_xb + tl.cast(i_h, tl.int64) * stride_xh + o_t * stride_xl
        p_y = y + ((i_b * length + o_t) * n_heads + i_h) * D
        a = tl.load(p_x + o_r, mask=m_r, other=0.0).to(tl.float32)
        b = tl.load(p_x + o_r + R // 2, mask=m_r, other=0.0).to(tl.float32)
        if REST > 0:
            rest = tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32)
        if NORMED:
            squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
            if REST > 0:
                squares += tl.sum(rest * rest, 1)
            scale = tl.rsqrt(squares / D + eps)[:, None]
            w_a = tl.load(weight + o_r, mask=o_r < R // 2, other=0.0).to(tl.float32)
            w_b = tl.load(weight + o_r + R // 2, mask=o_r < R // 2, other=0.0).to(tl.float32)
            a = ((a * scale).to(dtype).to(tl.float32) * w_a).to(dtype).to(tl.float32)
            b = ((b * scale).to(dtype).to(tl.float32) * w_b).to(dtype).to(tl.float32)
            if REST > 0:
                w_rest = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
                rest = (rest * scale).to(dtype).to(tl.float32) * w_rest
        tl.store(p_y + o_r, (a * cos1 - b * sin1).to(dtype), mask=m_r)
        tl.store(p_y + o_r + R // 2, (b * cos2 + a * sin2).to(dtype), mask=m_r)
        if REST > 0:
            tl.store(p_y + o_d, rest.to(dtype), mask=m_d)


@triton.jit(do_not_specialize=["lq", "lk", "hq", "hkv", "q_groups", "eps"])
def rope_qk_kernel(
    q, k, q_out, k_out, q_cos, q_sin, k_cos, k_sin, q_weight, k_weight,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_qtb, stride_qtl, stride_ktb, stride_ktl, lq, lk, hq, hkv, q_groups, eps,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BT: tl.constexpr, HEADS: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0)
    group = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    if group < q_groups:
        _turn_heads(
            q, q_out, q_cos, q_sin, q_weight, i_t, i_b, group * HEADS, hq, lq,
            stride_qb, stride_qh, stride_ql, stride_qtb, stride_qtl, eps,
            D, R, HALF, REST, BT, HEADS, NORMED,
        )  # fmt: skip
    else:
        _turn_heads(
            k, k_out, k_cos, k_sin, k_weight, i_t, i_b, (group - q_groups) * HEADS, hkv, lk,
            stride_kb, stride_kh, stride_kl, stride_ktb, stride_ktl, eps,
            D, R, HALF, REST, BT, HEADS, NORMED,
        )  # fmt: skip


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
    """Queries and keys turned by their positions' angles, rotate-half, in one launch.

    Args:
        q, k: ``[B, Hq, Lq, D]`` and ``[B, Hkv, Lk, D]``, any strides with a contiguous last dimension.
        cos, sin: float32 ``[Lq, R]`` or ``[B, 1, Lq, R]``, R even and at most D; features from R on pass.
        k_cos, k_sin: of the keys, where they are at other positions than the queries.
        q_weight, k_weight: gains ``[D]`` of a norm of each head before it is turned; both or neither.

    Both results lie in memory as ``[B, L, H, D]``.
    """
    b, hq, lq, d = q.shape
    hkv, lk = k.shape[1], k.shape[2]
    rotated = cos.shape[-1]
    out = tuple(
        torch.empty(b, n, h, d, dtype=x.dtype, device=x.device) for x, h, n in ((q, hq, lq), (k, hkv, lk))
    )
    if out[0].numel() + out[1].numel():
        of_q, of_k = (
            _table(cos, sin),
            _table(cos if k_cos is None else k_cos, sin if k_sin is None else k_sin),
        )
        gains = (q if q_weight is None else q_weight, k if k_weight is None else k_weight)
        q_groups, k_groups = -(-hq // HEADS), -(-hkv // HEADS)
        rest = d - rotated
        with launch.on_device(q):
            launch.start(
                rope_qk_kernel, (-(-max(lq, lk) // TOKENS), q_groups + k_groups, b),
                (q, k, *out, of_q[0], of_q[1], of_k[0], of_k[1], *gains),
                (*q.stride()[:3], *k.stride()[:3], *of_q[2], *of_k[2], lq, lk, hq, hkv, q_groups, eps),
                {"D": d, "R": rotated, "HALF": 1 << (rotated // 2 - 1).bit_length(),
                 "REST": 1 << (rest - 1).bit_length() if rest else 0, "BT": TOKENS, "HEADS": HEADS,
                 "NORMED": q_weight is not None},
                num_warps=4,
            )  # fmt: skip
    return out[0].transpose(1, 2), out[1].transpose(1, 2)


@triton.jit
def swiglu_kernel(gate, up, out, stride_g, stride_u, n, BLOCK: tl.constexpr):
    i_r = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_g = tl.load(gate + i_r * stride_g + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_u = tl.load(up + i_r * stride_u + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_o = b_g / (1.0 + tl.exp(-b_g)) * b_u
    tl.store(out + i_r * n + o_n, b_o.to(out.dtype.element_ty), mask=m_n)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[..., N]``, contiguous; halves of one fused projection are read in place."""
    n = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        gates, ups = _rows(gate), _rows(up)
        block = min(1024, max(16, 1 << (n - 1).bit_length()))
        with launch.on_device(gate):
            launch.start(
                swiglu_kernel, (gates.shape[0], -(-n // block), 1), (gates, ups, out),
                (gates.stride(0), ups.stride(0), n), {"BLOCK": block}, num_warps=4,
            )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """``x`` ``[..., N]`` as rows ``[R, N]`` with contiguous elements, a view where there is one."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _table(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A table of angles and its strides per sample and token: one ``[L, R]`` serves every sample."""
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0), cos.shape[-1])
