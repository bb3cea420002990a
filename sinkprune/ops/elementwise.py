"""What lies between a layer's matrix products, in one launch each on CUDA: norm, rotary embedding, SwiGLU.

Everywhere else, under ``torch.compile`` (which fuses them itself) and where our kernels don't serve a call,
they are PyTorch's operations, in the order in which the published models write them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune.ops._backends import _triton_refuses, refuse_unknown
from sinkprune.ops._checks import check_floats

WIDEST_ROW = 1 << 16


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, backend: str = "auto") -> Tensor:
    """Root-mean-square norm in float32 over the last dimension, rounded to x's dtype, then the gain.

    Args:
        x: ``[..., N]``, any strides.
        weight: gain ``[N]``, or None. Where it is wider than ``x``, the result is, too.
        eps: added to the mean square.
        backend: ``"auto"``, ``"reference"`` (PyTorch) or ``"triton"``.

    Raises:
        BackendUnavailable: the forced backend cannot serve the call.
    """
    if _fused(backend, x, x.shape[-1] <= WIDEST_ROW, "rows of at most 65536 elements"):
        return torch.ops.sinkprune.rms_norm.default(x, weight, eps)
    return _rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``, the sum rounded to their dtype; else as `rms_norm`."""
    alike = x.shape == residual.shape and x.dtype == residual.dtype and x.device == residual.device
    if _fused(backend, x, alike and x.shape[-1] <= WIDEST_ROW, "two tensors alike, at most 65536 a row"):
        return torch.ops.sinkprune.add_rms_norm.default(x, residual, weight, eps)
    return _add_norm_by_pytorch(x, residual, weight, eps)


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their positions, rotate-half, in float32.

    Args:
        q, k: ``[B, Hq, Lq, D]`` and ``[B, Hkv, Lk, D]``.
        cos, sin: float32 ``[Lq, R]``, or broadcastable to ``[B, 1, Lq, R]``; R even and at most D, features
            from R on pass through.
        k_cos, k_sin: of the keys, where they are at other positions than the queries.
        q_weight, k_weight: gains ``[D]`` in q's dtype of a norm of every head, with ``eps``, before it is
            turned; both or neither.
        backend: as in `rms_norm`.

    Source: RoFormer (arXiv 2104.09864).
    """
    tables = (cos, sin) if k_cos is None or k_sin is None else (cos, sin, k_cos, k_sin)
    gains = [gain for gain in (q_weight, k_weight) if gain is not None]
    served = (
        q.stride(-1) == k.stride(-1) == 1
        and q.dtype == k.dtype
        and all(
            t.dtype == torch.float32 and (t.dim() == 2 or (t.dim() == 4 and t.shape[1] == 1)) for t in tables
        )
        and len(gains) in (0, 2)
        and all(gain.dtype == q.dtype for gain in gains)
    )
    if _fused(backend, q, served, "contiguous features, float32 tables and gains in q's dtype, both or none"):
        return torch.ops.sinkprune.rope_qk.default(q, k, cos, sin, k_cos, k_sin, q_weight, k_weight, eps)
    return _rope_by_pytorch(q, k, cos, sin, k_cos, k_sin, q_weight, k_weight, eps)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` ``[B, H, L, D]`` alone, by PyTorch's operations; see `rope_qk`."""
    rotated = cos.shape[-1]
    part = x[..., :rotated].float()
    first, second = part.chunk(2, dim=-1)
    turned = (part * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up`` of two ``[..., N]``, which may be halves of one tensor. ``backend`` as in
    `rms_norm`."""
    alike = gate.shape == up.shape and gate.dtype == up.dtype and gate.device == up.device
    if _fused(backend, gate, alike, "two tensors alike"):
        return torch.ops.sinkprune.swiglu.default(gate, up)
    return F.silu(gate) * up


def _fused(backend: str, x: Tensor, served: bool, needs: str) -> bool:
    """Whether our kernel takes the call; a forced backend that can't serve it is refused."""
    if backend == "reference":
        return False
    if backend == "auto":
        return x.is_cuda and served and not torch.compiler.is_compiling() and not _triton_refuses(x, 1.0)
    refused = _triton_refuses(x, 1.0) or ("" if served else f"it needs {needs}")
    refuse_unknown(backend, refused if backend == "triton" else f"{backend} has no elementwise operations")
    return True


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
    return normed if weight is None else normed * weight


# The registered ops: what they refuse, the kernel or PyTorch's operations, and a backward pass by the latter.


def _refuse(op: str, fits: bool, expected: str, *got: Tensor | None) -> None:
    if not fits:
        shapes = ", ".join("none" if t is None else f"{tuple(t.shape)} {t.dtype}" for t in got)
        raise ValueError(f"{op} needs {expected}, got {shapes}")


def _fits_norm(op: str, x: Tensor, weight: Tensor | None) -> None:
    check_floats(op, x=x, weight=weight)
    fits = x.dim() > 0 and x.shape[-1] <= WIDEST_ROW
    if weight is not None:
        fits = fits and weight.shape == x.shape[-1:]
        fits = fits and weight.device == x.device and (weight.numel() < 2 or weight.stride(0) == 1)
    _refuse(
        op, fits, f"floats [..., N], N up to {WIDEST_ROW}, and a contiguous gain [N] beside them", x, weight
    )


def _norm_op(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    _fits_norm("rms_norm", x, weight)
    if _triton_refuses(x, 1.0):
        return _rms_norm(x.contiguous(), weight, eps)
    from sinkprune.kernels import elementwise

    return elementwise.rms_norm(x, weight, eps)[0]


def _add_norm_op(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    _fits_norm("add_rms_norm", x, weight)
    _alike("add_rms_norm", x, residual)
    if _triton_refuses(x, 1.0):
        return _add_norm_by_pytorch(x.contiguous(), residual.contiguous(), weight, eps)
    from sinkprune.kernels import elementwise

    return elementwise.rms_norm(x, weight, eps, residual)


def _alike(op: str, x: Tensor, other: Tensor) -> None:
    check_floats(op, x=x, other=other)
    alike = x.shape == other.shape and x.dtype == other.dtype and x.device == other.device
    _refuse(op, alike and x.dim() > 0, "two float tensors alike [..., N]", x, other)


def _rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, k_cos: Tensor | None, k_sin: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_floats("rope_qk", q=q, k=k, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    heads = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    heads = heads and q.dtype == k.dtype and q.device == k.device
    _refuse("rope_qk", heads, "q and k [B, H, L, D] of one float dtype, batch and width", q, k)
    _refuse("rope_qk", (k_cos is None) == (k_sin is None), "both tables of the keys or none", k_cos, k_sin)
    if k_cos is not None:
        check_floats("rope_qk", k_cos=k_cos, k_sin=k_sin)
    for x, table in (
        (q, (cos, sin)),
        (k, (cos if k_cos is None else k_cos, sin if k_sin is None else k_sin)),
    ):
        _refuse(
            "rope_qk", _fits_tables(x, table), "two float32 tables [L, R] or [B, 1, L, R], R even", x, *table
        )
    gains = [gain for gain in (q_weight, k_weight) if gain is not None]
    fit = all(
        gain.shape == q.shape[3:]
        and gain.dtype == q.dtype
        and gain.device == q.device
        and gain.is_contiguous()
        for gain in gains
    )
    _refuse("rope_qk", fit and len(gains) in (0, 2), "two contiguous gains [D] or none", q_weight, k_weight)
    if _triton_refuses(q, 1.0):
        turned = _rope_by_pytorch(q, k, cos, sin, k_cos, k_sin, q_weight, k_weight, eps)
        return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in turned)  # type: ignore[return-value]
    from sinkprune.kernels import elementwise

    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    return elementwise.rope_qk(
        q, k, cos, sin, k_cos=k_cos, k_sin=k_sin, q_weight=q_weight, k_weight=k_weight, eps=eps
    )


def _fits_tables(x: Tensor, tables: Sequence[Tensor]) -> bool:
    def fits(table: Tensor) -> bool:
        rotated = table.shape[-1] if table.dim() else 0
        sized = table.shape[-2:] == (x.shape[2], rotated) and 0 < rotated <= x.shape[3] and rotated % 2 == 0
        batched = table.dim() == 4 and table.shape[1] == 1 and table.shape[0] in (1, x.shape[0])
        return (
            sized
            and (batched or table.dim() == 2)
            and table.dtype == torch.float32
            and table.device == x.device
        )

    return tables[0].shape == tables[1].shape and all(map(fits, tables))


def _rope_by_pytorch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, k_cos: Tensor | None, k_sin: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q = q if q_weight is None else _rms_norm(q, q_weight, eps)
    k = k if k_weight is None else _rms_norm(k, k_weight, eps)
    of_keys = (cos, sin) if k_cos is None or k_sin is None else (k_cos, k_sin)
    return apply_rotary(q, cos, sin), apply_rotary(k, *of_keys)


def _swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    _alike("swiglu", gate, up)
    if _triton_refuses(gate, 1.0):
        return F.silu(gate.contiguous()) * up
    from sinkprune.kernels import elementwise

    return elementwise.swiglu(gate, up)


def _norm_fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _rope_fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k)
    )


def _register(name: str, schema: str, op: Any, fake: Any, by_pytorch: Any) -> None:
    """Define an op whose gradients are those of ``by_pytorch``, computed anew from its inputs."""
    _library.define(f"{name}{schema}")
    for key in ("CPU", "CUDA"):
        _library.impl(name, op, key)
    _library._register_fake(name, fake)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.at = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(inputs[index] for index in ctx.at))

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.rest)
        for index, saved in zip(ctx.at, ctx.saved_tensors, strict=True):
            inputs[index] = saved.detach().requires_grad_(ctx.needs_input_grad[index])
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            outputs = by_pytorch(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        flowing = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in flowing], [inputs[index] for index in wanted], [g for _, g in flowing],
            allow_unused=True,
        )  # fmt: skip
        result: list[Tensor | None] = [None] * len(inputs)
        for index, gradient in zip(wanted, found, strict=True):
            result[index] = gradient
        return tuple(result)

    torch.library.register_autograd(f"sinkprune::{name}", backward, setup_context=keep, lib=_library)


def _add_norm_by_pytorch(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return _rms_norm(summed, weight, eps), summed


_library = torch.library.Library("sinkprune", "FRAGMENT")
_register("rms_norm", "(Tensor x, Tensor? weight, float eps) -> Tensor", _norm_op, _norm_fake, _rms_norm)
_register(
    "add_rms_norm", "(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    _add_norm_op, lambda x, residual, weight, eps: (_norm_fake(x, weight, eps), x.new_empty(x.shape)),
    _add_norm_by_pytorch,
)  # fmt: skip
_register(
    "rope_qk",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? k_cos, Tensor? k_sin, Tensor? q_weight, "
    "Tensor? k_weight, float eps) -> (Tensor, Tensor)",
    _rope_op, _rope_fake, _rope_by_pytorch,
)  # fmt: skip
_register(
    "swiglu", "(Tensor gate, Tensor up) -> Tensor",
    _swiglu_op, lambda gate, up: gate.new_empty(gate.shape), lambda gate, up: F.silu(gate) * up,
)  # fmt: skip
