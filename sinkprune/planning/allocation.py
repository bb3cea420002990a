"""From scores to counts: which units of work go first, until a budget is met."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sinkprune.plans import Geometry, layer_work

ALLOCATIONS = ("global", "uniform", "equal")


@dataclass(frozen=True)
class Rules:
    """How units may be removed. Raises ``ValueError`` where a value is out of range.

    Attributes:
        allocation: ``"global"`` ranks all layers' units together, ``"uniform"`` takes the same share of each,
            ``"equal"`` as many of each, exactly.
        min_heads: fewest query heads (or groups, with ``whole_groups``) that a layer keeps.
        max_layer_share: most of a layer's heads, and of its channels, that may go.
        round_heads, round_channels: a layer that loses any keeps a multiple of these.
        whole_groups: query heads go only together with the key/value head they share.
        whole_layers: a layer's heads go all together.
    """

    allocation: str = "global"
    min_heads: int = 1
    max_layer_share: float = 1.0
    round_heads: int = 1
    round_channels: int = 1
    whole_groups: bool = False
    whole_layers: bool = False

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {ALLOCATIONS}, got {self.allocation!r}")
        if self.min_heads < 0:
            raise ValueError(f"min_heads must be at least 0, got {self.min_heads}")
        if not 0 < self.max_layer_share <= 1:
            raise ValueError(f"max_layer_share must lie in (0, 1], got {self.max_layer_share}")
        if min(self.round_heads, self.round_channels) < 1:
            raise ValueError(
                "round_heads and round_channels must be at least 1, got "
                f"{self.round_heads} and {self.round_channels}"
            )


@dataclass(frozen=True)
class Choice:
    """What to keep: query heads of each layer, channel counts (None: all); and what a plan tells of how."""

    heads: list[list[int]]
    channels: list[int] | None = None
    told: dict[str, Any] = field(default_factory=dict)


@dataclass
class Unit:
    """Query heads of one layer that go together, and the score that orders them."""

    score: float
    layer: int
    heads: list[int]


def head_units(geometry: Geometry, scores: Tensor, rules: Rules) -> list[list[Unit]]:
    """Per layer, the units that may go, from lowest score to highest; ties go to the lower head id."""
    layers = []
    for layer, heads in enumerate(geometry.heads):
        if rules.whole_layers:
            layers.append([Unit(scores[layer, :heads].mean().item(), layer, list(range(heads)))])
            continue
        size = heads // geometry.kv_heads[layer] if rules.whole_groups else 1
        groups = [list(range(first, first + size)) for first in range(0, heads, size)]
        units = [Unit(scores[layer, group].mean().item(), layer, group) for group in groups]
        units.sort(key=lambda unit: (unit.score, unit.heads))
        fewest = max(rules.min_heads, math.ceil(len(units) * (1 - rules.max_layer_share) - 1e-9))
        layers.append(_chunks(units, max(1, rules.round_heads // size), fewest))
    return layers


def _chunks(units: list[Unit], size: int, fewest: int) -> list[Unit]:
    """Units joined so that what stays after any number of chunks is a multiple of ``size``, and at least
    ``fewest``."""
    bounds = [0, *range(len(units) % size or size, len(units) - fewest + 1, size)]
    chunks = []
    for start, end in itertools.pairwise(bounds):
        part = units[start:end]
        score = sum(unit.score for unit in part) / len(part)
        chunks.append(Unit(score, part[0].layer, sorted(head for unit in part for head in unit.heads)))
    return chunks


def remove_heads(
    geometry: Geometry, units: list[list[Unit]], budget: float, allocation: str, length: int | None
) -> list[list[int]]:
    """Remove lowest scores first until ``budget`` is met to the nearest unit; the heads left, per layer.

    The budget counts query heads with ``length=None``, else ``layer_work`` at that length (0: parameters).
    """
    if allocation == "equal":
        return _equally(geometry, units, budget, length)
    if allocation == "global":
        order = sorted((u for layer in units for u in layer), key=lambda u: (u.score, u.layer, u.heads))
    else:  # the k-th weakest unit of every layer before the (k+1)-th of any
        most = max(map(len, units), default=0)
        order = [layer[k] for k in range(most) for layer in units if k < len(layer)]
    kept = [set(range(heads)) for heads in geometry.heads]
    spent = 0.0
    for unit in order:
        left = kept[unit.layer] - set(unit.heads)
        if length is None:
            cost = len(unit.heads)
        else:
            cost = _work(geometry, unit.layer, kept[unit.layer], length)
            cost -= _work(geometry, unit.layer, left, length)
        if spent + cost / 2 > budget:
            break
        kept[unit.layer] = left
        spent += cost
    return [sorted(heads) for heads in kept]


def _equally(
    geometry: Geometry, units: list[list[Unit]], budget: float, length: int | None
) -> list[list[int]]:
    """As many of every layer's weakest units, until ``budget`` is met to the nearest."""
    every = [set(range(heads)) for heads in geometry.heads]
    kept, spent = every, 0.0
    for count in range(1, min(map(len, units), default=0) + 1):
        gone = [{head for unit in layer[:count] for head in unit.heads} for layer in units]
        left = [heads - removed for heads, removed in zip(every, gone, strict=True)]
        if length is None:
            total = float(sum(map(len, gone)))
        else:
            total = float(attention_removed(geometry, [sorted(heads) for heads in left], length))
        if (spent + total) / 2 > budget:
            break
        kept, spent = left, total
    return [sorted(heads) for heads in kept]


def most_heads(units: list[list[Unit]]) -> int:
    """Query heads that may go at most."""
    return sum(len(unit.heads) for layer in units for unit in layer)


def by_share(
    geometry: Geometry,
    units: list[list[Unit]],
    ratio: float,
    unit: str,
    targets: tuple[str, ...],
    rules: Rules,
    length: int,
) -> Choice:
    """Take ``ratio`` of all ``unit``: of ``"heads"``, ``"parameters"`` or ``"flops"`` at ``length``.

    Raises ``ValueError`` naming the reachable maximum.
    """
    if unit != "heads":
        return _share_budget(geometry, units, ratio, targets, rules, length if unit == "flops" else 0)
    total, reachable = sum(geometry.heads), most_heads(units)
    budget = round(ratio * total)
    if budget > reachable:
        raise ValueError(
            f"ratio {ratio} is out of reach: at most {reachable / total:.3f} of the heads can go while every "
            f"layer keeps {rules.min_heads}"
        )
    return Choice(remove_heads(geometry, units, budget, rules.allocation, None))


def _share_budget(
    geometry: Geometry,
    units: list[list[Unit]],
    ratio: float,
    targets: tuple[str, ...],
    rules: Rules,
    length: int,
) -> Choice:
    """Heads and channel counts whose removal takes ``ratio`` of all layers' work at ``length``.

    Each target gives the same share of its own. Raises ``ValueError`` naming the reachable maximum.
    """
    total, pools = _pools(geometry, units, targets, rules, length)
    reachable = sum(pools.values())
    if ratio * total > reachable + 0.5:
        raise ValueError(
            f"ratio {ratio} is out of reach: removing {' and '.join(targets)} takes at most"
            f" {math.floor(1000 * reachable / total) / 1000:.3f} of the block "
            f"{'FLOPs' if length else 'parameters'}"
        )
    share = ratio * total / max(1, reachable)
    kept = remove_heads(geometry, units, share * pools["heads"], rules.allocation, length)
    if not pools["mlp"]:
        return Choice(kept)
    # Heads come in lumps: the channels make up the difference, so that the total is what was asked for.
    rest = ratio * total - attention_removed(geometry, kept, length)
    rest /= geometry.mlp_matrices * geometry.hidden * sum(geometry.channels)
    return Choice(
        kept, [nearest_channels(width - round(rest * width), width, rules) for width in geometry.channels]
    )


def reachable_share(
    geometry: Geometry, units: list[list[Unit]], targets: tuple[str, ...], rules: Rules, length: int
) -> float:
    """The most that ``targets`` can give of all layers' work at ``length``."""
    total, pools = _pools(geometry, units, targets, rules, length)
    return sum(pools.values()) / total


def _pools(
    geometry: Geometry, units: list[list[Unit]], targets: tuple[str, ...], rules: Rules, length: int
) -> tuple[int, dict[str, int]]:
    """All layers' work at ``length``, and what each target can give of it."""
    total = sum(
        layer_work(geometry, *sizes, length)
        for sizes in zip(geometry.heads, geometry.kv_heads, geometry.channels, strict=True)
    )
    head_pool = attention_removed(
        geometry, remove_heads(geometry, units, math.inf, rules.allocation, length), length
    )
    channel_work = geometry.mlp_matrices * geometry.hidden
    spare = sum(width - fewest_channels(width, rules) for width in geometry.channels)
    pools = {
        "heads": head_pool if "heads" in targets else 0,
        "mlp": channel_work * spare if "mlp" in targets else 0,
    }
    return total, pools


def best_channels(scores: list[Tensor], counts: list[int]) -> list[list[int]]:
    """The ``counts`` channels of each layer with the highest scores, sorted."""
    return [
        sorted(torch.topk(layer, count).indices.tolist()) for layer, count in zip(scores, counts, strict=True)
    ]


def fewest_channels(width: int, rules: Rules) -> int:
    """Fewest channels that a layer of ``width`` keeps."""
    least = max(1, math.ceil(width * (1 - rules.max_layer_share) - 1e-9))
    return min(width, math.ceil(least / rules.round_channels) * rules.round_channels)


def nearest_channels(wanted: int, width: int, rules: Rules) -> int:
    """The nearest count that the rules allow."""
    nearest = round(wanted / rules.round_channels) * rules.round_channels
    return min(width, max(fewest_channels(width, rules), nearest))


def attention_removed(geometry: Geometry, kept: list[list[int]], length: int) -> int:
    """Work of the heads that are not kept."""
    every = (set(range(heads)) for heads in geometry.heads)
    return sum(
        _work(geometry, layer, heads, length) - _work(geometry, layer, set(kept[layer]), length)
        for layer, heads in enumerate(every)
    )


def _work(geometry: Geometry, layer: int, heads: set[int], length: int) -> int:
    """``layer_work`` of the attention with these query heads."""
    kv_heads = geometry.kv_heads_used(layer, sorted(heads))
    return layer_work(geometry, len(heads), len(kv_heads), 0, length)
