"""Rotary position embedding, rotate-half convention (the one LLaDA, Dream and Llama use)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_table(
    positions: Tensor, dim: int, theta: float, frequencies: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles at ``positions``.

    Args:
        positions: integer tensor ``[..., L]``.
        dim: number of rotated features of a head (even).
        theta: base of the geometric frequency series.
        frequencies: float32 ``[dim / 2]`` in place of that series.

    Returns:
        ``(cos, sin)``, each float32 ``[..., L, dim]``, the half table repeated twice.
    """
    frequency = _series(dim, theta, positions.device) if frequencies is None else frequencies
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def _series(dim: int, theta: float, device: torch.device) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def yarn_frequencies(
    dim: int,
    theta: float,
    factor: float,
    original: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    device: torch.device,
) -> Tensor:
    """YaRN's frequencies (arXiv 2309.00071, section 3.2), float32 ``[dim / 2]``.

    Features that turn more than ``beta_fast`` times within ``original`` positions keep their frequency, those
    that turn less than ``beta_slow`` times are slowed by ``factor``, and between those it goes linearly.
    """

    def feature(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(feature(beta_fast)), 0), min(math.ceil(feature(beta_slow)), dim - 1)
    width = max(last - first, 1e-3)
    slowed = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - first) / width).clamp(0, 1)
    series = _series(dim, theta, device)
    return series / factor * slowed + series * (1 - slowed)
