"""Counted work of a denoising step, and the best speed-up that arithmetic allows for a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sinkprune.adapters import Geometry, adapter_for

if TYPE_CHECKING:
    from sinkprune.planning import LayerPlan, PrunePlan


def block_parameters(geometry: Geometry, heads: int, kv_heads: int, channels: int) -> int:
    """Weights of a block's matrices: q, o (``heads``), k, v (``kv_heads``), the MLP's (``channels``)."""
    return geometry.hidden * (2 * geometry.head_dim * (heads + kv_heads) + geometry.mlp_matrices * channels)


def layer_sizes(geometry: Geometry, layer: int, kept: LayerPlan | None) -> tuple[int, int, int]:
    """``(query heads, key/value heads, channels)`` of a layer, dense (``kept=None``) or under a plan."""
    if kept is None:
        return geometry.heads[layer], geometry.kv_heads[layer], geometry.channels[layer]
    channels = geometry.channels[layer] if kept.kept_channels is None else len(kept.kept_channels)
    return len(kept.kept_heads), len(geometry.kv_heads_used(layer, kept.kept_heads)), channels


def model_block_parameters(geometry: Geometry, plan: PrunePlan | None = None) -> int:
    """Block parameters of the model, dense or under ``plan``; embeddings, norms and LM head not counted."""
    return sum(
        block_parameters(
            geometry, *layer_sizes(geometry, layer, None if plan is None else plan.layers[layer])
        )
        for layer in range(geometry.num_layers)
    )


def step_flops(geometry: Geometry, plan: PrunePlan | None, batch: int, length: int) -> int:
    """Floating-point operations of one forward: projections, attention core, MLP and LM head of every row.

    A multiply-add counts as two. Norms, RoPE and softmax are left out: they grow with the same sizes and are
    under 2 % of a block.
    """
    rows = batch * length
    total = 2 * rows * geometry.hidden * geometry.vocabulary
    for layer in range(geometry.num_layers):
        sizes = layer_sizes(geometry, layer, None if plan is None else plan.layers[layer])
        core = 4 * rows * length * sizes[0] * geometry.head_dim
        total += 2 * rows * block_parameters(geometry, *sizes) + core
    return total


def ceiling(model: nn.Module | Geometry, plan: PrunePlan, batch: int = 1, length: int = 1024) -> float:
    """The most that ``plan`` can speed up a forward: its dense FLOPs over the plan's FLOPs.

    Args:
        model: a live model, or its ``Geometry``.
        plan: what is removed.
        batch, length: sequences and tokens of the forward, both at least 1.

    Raises:
        ValueError: a plan for another geometry, or sizes below 1.
    """
    geometry = model if isinstance(model, Geometry) else adapter_for(model).geometry()
    if plan.geometry != geometry:
        raise ValueError(f"the plan is for {plan.geometry}, the model is {geometry}")
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")
    return step_flops(geometry, None, batch, length) / step_flops(geometry, plan, batch, length)
