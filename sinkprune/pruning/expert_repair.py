"""Repair of a mixture of experts that lost some: the down projections of the others, refitted on the tokens
that they now get."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sinkprune.models.common import GatedMLP
from sinkprune.models.experts import ExpertMLP

FEW = 10  # an expert with fewer tokens than as many times its channels is held closer to what it was


@torch.no_grad()
def refit_experts(
    mlp: ExpertMLP,
    tokens: Tensor,
    wanted: Tensor,
    ridge: float,
    change: Callable[[nn.Linear], object] | None = None,
) -> None:
    """Refit the down projections of the experts that stay, one expert after the other.

    Each is moved by the change that leaves the least squared error of the layer's output over the tokens that
    go to it, by ridge regression towards what it is, the others being as they are by then. So the error on
    ``tokens`` never grows. Memory: one expert's Gram matrix.

    Args:
        mlp: in mask form (``ExpertMLP.skip``), or whole.
        tokens: what reaches it, ``[T, hidden]``.
        wanted: what it shall give of them, ``[T, hidden]``.
        ridge: strength, relative to the mean square of an expert's inputs.
        change: called with each projection before it is changed.

    Raises:
        ValueError: activations that are not finite.
    """
    chosen, weights = mlp.gate(tokens)
    left = wanted.float() - mlp(tokens).float()
    for expert in chosen.unique().tolist():
        row, x = mlp.inputs_of(expert, tokens, chosen, weights)
        part = mlp.experts[expert]
        assert isinstance(part, GatedMLP)
        down, columns = part.down_proj, part.kept_channels
        x = x if columns is None else x.index_select(1, columns)
        gram, cross = (x.T @ x).double(), (x.T @ left[row]).double()
        held = max(1.0, FEW * x.shape[1] / len(x))
        gram.diagonal().add_(held * ridge * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
        moved = torch.linalg.solve(gram, cross).T
        if not torch.isfinite(moved).all():
            raise ValueError("activations are not finite")
        if change is not None:
            change(down)
        if columns is None:
            down.weight += moved.to(down.weight.dtype)
        else:
            down.weight[:, columns] += moved.to(down.weight.dtype)
        left[row] -= x @ moved.float().T
