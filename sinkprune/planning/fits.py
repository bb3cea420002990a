"""Plans that a target can hold: its constraints as rules, and what keeping to them cost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from sinkprune.planning.allocation import Rules, head_units, remove_heads
from sinkprune.plans import Geometry
from sinkprune.targets import Fit


def fitted(rules: Rules, fit: Fit, geometry: Geometry, targets: tuple[str, ...]) -> Rules:
    """``rules`` made as strict as ``fit`` is.

    Raises:
        ValueError: the target can't have fewer heads, or not whole layers without them.
    """
    if fit.heads and "heads" in targets:
        raise ValueError(f"fit {fit.target}: no heads can go: {fit.heads}")
    if rules.whole_layers and fit.equal:
        raise ValueError(
            f"fit {fit.target}: every layer keeps as many heads, so none can lose all (whole_layers)"
        )
    group = max(heads // kv_heads for heads, kv_heads in zip(geometry.heads, geometry.kv_heads, strict=True))
    return replace(
        rules,
        allocation="equal" if fit.equal else rules.allocation,
        whole_groups=True,
        min_heads=max(rules.min_heads, 1) if fit.equal else rules.min_heads,
        round_heads=math.lcm(rules.round_heads, fit.groups * group if fit.groups > 1 else 1),
        round_channels=math.lcm(rules.round_channels, fit.round_channels),
    )


def cost(
    fit: Fit,
    geometry: Geometry,
    scores: Tensor,
    asked: Rules,
    kept: list[list[int]],
    channels: list[int] | None,
    ratio: float,
    removed: float,
) -> dict[str, Any]:
    """What the fit cost: the share that goes instead of the one asked for, and the scores of the heads that
    go beside those of as many heads that would have gone without it.

    Args:
        scores: the criterion's, ``[layers, most heads]``.
        asked: the rules as given, without the fit.
        kept: query heads of every layer.
        channels: counts that every layer keeps, where channels go.
        ratio, removed: the share asked for, and what goes.
    """
    gone = sum(geometry.heads) - sum(map(len, kept))
    free = remove_heads(geometry, head_units(geometry, scores, asked), gone, asked.allocation, None)

    def lost(left: list[list[int]]) -> float:
        return sum(
            scores[layer, head].item()
            for layer, heads in enumerate(geometry.heads)
            for head in set(range(heads)) - set(left[layer])
        )

    return {
        "target": fit.target,
        "heads": sorted({len(heads) for heads in kept}),
        "channels": None if channels is None else sorted(set(channels)),
        "ratio_asked": ratio,
        "ratio": removed,
        "score_removed": lost(kept),
        "score_removed_without": lost(free),
    }


def cost_text(cost: dict[str, Any]) -> str:
    """The cost in a line."""
    sizes = ", ".join(map(str, cost["heads"]))
    channels = "" if cost["channels"] is None else f", {', '.join(map(str, cost['channels']))} channels"
    return (
        f"to fit {cost['target']}: {sizes} query heads{channels} a layer; {100 * cost['ratio']:.1f} % goes "
        f"where {100 * cost['ratio_asked']:.1f} % was asked; heads that go score "
        f"{cost['score_removed']:.4g}, and {cost['score_removed_without']:.4g} without the fit"
    )
