"""The norm of all native models, and what can run in the same pass over memory as it."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune.ops import elementwise


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 over the last dimension, then a gain."""

    def __init__(self, width: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return elementwise.rms_norm(x, self.weight, self.eps)


def add_and_norm(x: Tensor, added: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``(norm(x + added), x + added)``."""
    if x.is_cuda and _bare(norm):
        return elementwise.add_rms_norm(x, added, norm.weight, norm.eps)
    x = x + added
    del added  # what is summed is gone before the norm makes more
    return norm(x), x


def gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """``silu(gate(x)) * up(x)``, in one pass on CUDA; elsewhere the gate is gone before ``up`` runs."""
    if x.is_cuda:
        return elementwise.swiglu(gate(x), up(x))
    return F.silu(gate(x)) * up(x)


def norm_and_rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_norm: nn.Module | None, k_norm: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, H, L, D]`` normed by ``q_norm`` and ``k_norm``, where there are any, and turned
    as in ``elementwise.rope_qk``."""
    if _bare(q_norm) and _bare(k_norm) and q_norm.eps == k_norm.eps:
        gains = (q_norm.weight, k_norm.weight)
        if gains[0] is not None and gains[1] is not None and gains[0].dtype == gains[1].dtype == q.dtype:
            eps = q_norm.eps
            return elementwise.rope_qk(q, k, cos, sin, q_weight=gains[0], k_weight=gains[1], eps=eps)
    q = q if q_norm is None else q_norm(q)
    k = k if k_norm is None else k_norm(k)
    return elementwise.rope_qk(q, k, cos, sin)


def _bare(norm: nn.Module | None) -> TypeGuard[RMSNorm]:
    """Whether calling ``norm`` does no more than its arithmetic: our own, and no hook watches it."""
    return type(norm) is RMSNorm and not norm._forward_hooks and not norm._forward_pre_hooks
