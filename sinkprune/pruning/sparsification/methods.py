"""Which entries of one matrix go, and what becomes of the others: magnitude, Wanda, SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # of the Hessian's mean diagonal
BLOCK = 128  # columns whose mask SparseGPT chooses together


@dataclass(frozen=True)
class Target:
    """What a matrix shall look like: a share of zeros, or ``zeros`` in every ``group`` inputs of a row."""

    share: float
    zeros: int = 0
    group: int = 0

    @classmethod
    def of(cls, sparsity: float, pattern: str) -> Target:
        """Raises ``ValueError`` for a sparsity outside (0, 1), an unknown pattern, or one of another
        sparsity."""
        if not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
            raise ValueError(f"sparsity must lie in (0, 1), got {sparsity!r}")
        if pattern == "unstructured":
            return cls(sparsity)
        known = {"2:4": cls(0.5, 2, 4), "4:8": cls(0.5, 4, 8)}
        if pattern not in known:
            raise ValueError(f"pattern must be 'unstructured', '2:4' or '4:8', got {pattern!r}")
        if sparsity != known[pattern].share:
            raise ValueError(f"pattern {pattern} is a sparsity of {known[pattern].share}, got {sparsity}")
        return known[pattern]


def prune_magnitude(weight: Tensor, target: Target) -> Tensor:
    """``[rows, columns]`` without the entries of least magnitude, of the whole matrix."""
    scores = weight.abs()
    if target.group:
        return weight.masked_fill(_lowest_of_groups(scores, target), 0)
    return weight.masked_fill(_lowest(scores.reshape(1, -1), target.share).view_as(weight), 0)


def prune_wanda(weight: Tensor, norms: Tensor, target: Target) -> Tensor:
    """``[rows, columns]`` without the entries of least ``|W| * norms`` of each row; norms ``[columns]`` of
    the inputs (arXiv 2306.11695, equation 1)."""
    scores = weight.abs() * norms
    chosen = _lowest_of_groups(scores, target) if target.group else _lowest(scores, target.share)
    return weight.masked_fill(chosen, 0)


def prune_sparsegpt(weight: Tensor, inverse_factor: Tensor, target: Target) -> Tensor:
    """``[rows, columns]`` pruned left to right, the later columns making up for the error of the earlier
    ones (arXiv 2301.00774, algorithm 1).

    Args:
        weight: of the ``inverse_factor``'s dtype.
        inverse_factor: the upper Cholesky factor of the inverse Hessian, ``[columns, columns]``.
        target: reached in every block of ``BLOCK`` columns, over all rows together, or in every group.
    """
    columns = weight.T.contiguous()  # a column of the matrix is a row here, whole in memory
    for first in range(0, len(columns), BLOCK):
        last = min(first + BLOCK, len(columns))
        block, factor = columns[first:last], inverse_factor[first:last, first:last]
        importance = factor.diagonal().square()[:, None]
        removed = torch.zeros_like(block, dtype=torch.bool)
        if not target.group:
            scores = block.square() / importance
            removed = _lowest(scores.reshape(1, -1), target.share).view_as(block)
        errors = torch.zeros_like(block)
        for i in range(last - first):
            if target.group and i % target.group == 0:
                part = slice(i, i + target.group)
                scores = block[part].square() / importance[part]
                removed[part] = _lowest_of_groups(scores.T, target).T
            errors[i] = torch.where(removed[i], block[i], 0.0) / factor[i, i]
            block[i].masked_fill_(removed[i], 0)
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        columns[last:] -= inverse_factor[first:last, last:].T @ errors
    return columns.T.contiguous()


@dataclass(frozen=True)
class Solve:
    """A factor of an inverse Hessian, the precision it took and the damping that went into it."""

    factor: Tensor
    dtype: torch.dtype
    damping: float


def invert(hessian: Tensor) -> Solve:
    """The upper Cholesky factor of the inverse of ``hessian`` ``[n, n]``, damped by 1 % of its mean diagonal.

    Inputs that were always 0 get a 1 on the diagonal. float64 where float32 is not positive definite, and
    then, if need be, ten times the damping.

    Raises:
        ValueError: a Hessian that is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the inputs of a linear layer are not finite on the calibration rows")
    dead = hessian.diagonal() == 0
    damping = DAMPING
    while True:
        for dtype in (torch.float32, torch.float64):
            matrix = hessian.to(dtype, copy=True)
            diagonal = matrix.diagonal()
            diagonal[dead] = 1
            diagonal += damping * diagonal.mean()
            factor = _inverse_factor(matrix)
            if factor is not None:
                return Solve(factor, dtype, damping)
        damping *= 10


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse, or None where ``matrix`` is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper


def _lowest(scores: Tensor, share: float) -> Tensor:
    """The ``int(share * columns)`` lowest scores of each row, bool; ties go to the lower column."""
    count = int(share * scores.shape[1])
    chosen = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def _lowest_of_groups(scores: Tensor, target: Target) -> Tensor:
    """The ``target.zeros`` lowest scores of every ``target.group`` columns of a row, bool."""
    groups = scores.reshape(-1, target.group)
    return _lowest(groups, target.zeros / target.group).view_as(scores)
