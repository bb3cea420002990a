"""Rotary position embedding, rotate-half convention (the one LLaDA, Dream and Llama use)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles at ``positions``.

    Args:
        positions: integer tensor ``[..., L]``.
        dim: number of rotated features of a head (even).
        theta: base of the geometric frequency series.

    Returns:
        ``(cos, sin)``, each float32 ``[..., L, dim]``, the half table repeated twice.
    """
    half = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / (theta ** (half / dim))
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading features of ``x`` in float32 and return them in ``x``'s dtype.

    Args:
        x: ``[B, H, L, D]``.
        cos, sin: float32, broadcastable to ``[B, H, L, R]`` with ``R <= D``; features from ``R`` on pass
            through.
    """
    rotated = cos.shape[-1]
    part = x[..., :rotated].float()
    first, second = part.chunk(2, dim=-1)
    turned = (part * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)
