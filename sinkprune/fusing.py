"""The dense model on fused matrices: what a compact model runs, with nothing removed."""

from __future__ import annotations

from torch import nn

from sinkprune.adapters import adapter_for
from sinkprune.planning import LayerPlan, PrunePlan
from sinkprune.repacking import apply


def fuse(model: nn.Module, *, low_memory: bool = False) -> nn.Module:
    """Fuse query/key/value and gate/up projections of a dense model, in place, and return it.

    That is ``apply`` of a plan that keeps everything: same tokens up to rounding, three matrix products
    fewer in every layer. The model counts as compact afterwards, so profile, plan and apply it before.

    Args:
        model: a dense model of a known family.
        low_memory: as in ``apply``.

    Raises:
        ValueError: a model that is pruned or fused already, or that can't take the compact form.
    """
    adapter = adapter_for(model)
    geometry = adapter.geometry()
    gated = geometry.mlp_matrices == 3
    layers = [
        LayerPlan(list(range(heads)), list(range(channels)) if gated else None)
        for heads, channels in zip(geometry.heads, geometry.channels, strict=True)
    ]
    plan = PrunePlan(geometry, adapter.fingerprint(), layers, criterion="nothing", ratio=0.0)
    return apply(model, plan, low_memory=low_memory)
