"""From a budget and scores to the experts that every layer keeps, and their channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkprune.planning.allocation import (
    Choice,
    Rules,
    Unit,
    attention_removed,
    fewest_channels,
    nearest_channels,
    remove_heads,
)
from sinkprune.plans import Experts, Geometry, LayerPlan, layer_work, stored_parameters

EXPERT_TARGETS = ("experts", "expert_channels")


def require_experts(geometry: Geometry, targets: tuple[str, ...], unit: str, timed: bool) -> None:
    """Raise ``ValueError`` where ``targets`` ask for experts that this model or this budget has not."""
    chosen = [target for target in targets if target in EXPERT_TARGETS]
    if unit == "experts" and targets != ("experts",):
        raise ValueError(f"unit='experts' removes experts only, got targets={targets}")
    if chosen and geometry.experts is None:
        raise ValueError(f"this {geometry.family} model has no experts that can go, got targets={targets}")
    if timed and geometry.experts is not None and targets != ("heads",):
        raise ValueError(f"a target speed chooses heads alone where there are experts, got targets={targets}")


def by_experts(
    geometry: Geometry,
    units: list[list[Unit]],
    ratio: float,
    unit: str,
    targets: tuple[str, ...],
    rules: Rules,
    length: int,
) -> Choice:
    """Take ``ratio`` of all ``unit`` of a model with experts: ``"experts"``, ``"parameters"`` as they are
    stored, or ``"flops"`` at ``length``, of which fewer experts save none.

    Every target gives the same share of its own: experts first, as many in every layer and in every group of
    its router, then heads, and channels make up the difference.

    Raises:
        ValueError: a ratio out of reach (the message says the maximum).
    """
    experts = geometry.experts
    assert experts is not None
    layers = [layer for layer, count in enumerate(experts.count) if count]
    most = min((_most(experts, layer, rules) for layer in layers), default=0)
    if unit == "experts":
        total = float(sum(experts.count))
        worth = float(experts.groups * len(layers))
        _require_reach(ratio * total, most * worth, total, ratio, "of the experts", "experts")
        return _choice(geometry, None, None, round(ratio * total / worth), experts.channels)
    work = _Work(geometry, experts, layers, length if unit == "flops" else 0, rules)
    pools = {
        "heads": work.heads(remove_heads(geometry, units, math.inf, rules.allocation, work.length)),
        "mlp": sum(work.channel * (width - fewest_channels(width, rules)) for width in work.dense),
        "experts": work.expert * most,
        "expert_channels": work.narrower(most if "experts" in targets else 0, work.fewest),
    }
    pools = {target: pool if target in targets else 0 for target, pool in pools.items()}
    budget, reachable = ratio * work.total, sum(pools.values())
    kind = "FLOPs" if work.length else "parameters"
    _require_reach(budget, reachable, work.total, ratio, f"of the block {kind}", " and ".join(targets))
    share = budget / max(1, reachable)
    gone = round(share * most) if pools["experts"] else 0
    heads = remove_heads(geometry, units, share * pools["heads"], rules.allocation, work.length)
    rest = budget - gone * work.expert - work.heads(heads)
    width, channels = experts.channels, None
    spare = work.channel * sum(work.dense) * ("mlp" in targets)
    spare += work.narrower(gone, 0) * ("expert_channels" in targets)
    fraction = rest / max(1, spare)
    if "mlp" in targets:
        channels = [nearest_channels(size - round(fraction * size), size, rules) for size in work.dense]
    if "expert_channels" in targets:
        width = nearest_channels(width - round(fraction * width), width, rules)
    return _choice(geometry, heads, channels, gone, width)


class _Work:
    """What the parts of a model with experts weigh: parameters at length 0, else work of a token."""

    def __init__(
        self, geometry: Geometry, experts: Experts, layers: list[int], length: int, rules: Rules
    ) -> None:
        self.geometry, self.experts, self.layers, self.length = geometry, experts, layers, length
        every = range(geometry.num_layers)
        sizes = zip(geometry.heads, geometry.kv_heads, geometry.channels, strict=True)
        works = [layer_work(geometry, *layer, length) for layer in sizes]
        self.total = sum(works) if length else sum(stored_parameters(geometry, i, None) for i in every)
        self.channel = geometry.mlp_matrices * geometry.hidden
        self.dense = [0 if i in layers else width for i, width in enumerate(geometry.channels)]
        self.fewest = fewest_channels(experts.channels, rules)
        # One expert of every group of every layer, and its row of the router.
        each = self.channel * experts.channels + geometry.hidden
        self.expert = 0 if length else each * experts.groups * len(layers)

    def heads(self, kept: list[list[int]]) -> int:
        return attention_removed(self.geometry, kept, self.length)

    def narrower(self, gone: int, width: int) -> int:
        """Of experts of ``width`` channels, where ``gone`` of every group are out."""
        experts = self.experts
        kept = [experts.count[i] - gone * experts.groups for i in self.layers]
        of_a_layer = [experts.top_k for _ in kept] if self.length else kept
        return self.channel * (experts.channels - width) * sum(of_a_layer)


def _most(experts: Experts, layer: int, rules: Rules) -> int:
    """How many of every group of ``layer`` may go."""
    count = experts.count[layer]
    least = max(experts.fewest(), math.ceil(count * (1 - rules.max_layer_share) - 1e-9))
    return (count - math.ceil(least / experts.groups) * experts.groups) // experts.groups


def _require_reach(budget: float, reachable: float, total: float, ratio: float, of: str, what: str) -> None:
    if budget > reachable + 0.5:
        raise ValueError(
            f"ratio {ratio} is out of reach: removing {what} takes at most "
            f"{math.floor(1000 * reachable / total) / 1000:.3f} {of}"
        )


def _choice(
    geometry: Geometry, heads: list[list[int]] | None, channels: list[int] | None, gone: int, width: int
) -> Choice:
    experts = geometry.experts
    assert experts is not None
    kept = [max(0, count - gone * experts.groups) for count in experts.count]
    whole = [list(range(count)) for count in geometry.heads] if heads is None else heads
    told = {"experts": {"kept": kept, "channels": width, "every": list(experts.count)}}
    return Choice(whole, channels, told)


def keep_experts(
    geometry: Geometry,
    layers: list[LayerPlan],
    choice: Choice,
    scores: list[Tensor] | None,
    channel_scores: list[Tensor] | None,
) -> None:
    """Write into ``layers`` which experts they keep, of each group of the router those with the highest
    scores (ties: the lower id), and of every expert its best channels. None: all."""
    experts = geometry.experts
    assert experts is not None
    told = choice.told["experts"]
    for layer, count in enumerate(experts.count):
        if not count:
            continue
        if scores is not None and told["kept"][layer] < count:
            layers[layer].kept_experts = _best(scores[layer], experts.groups, told["kept"][layer])
        if channel_scores is not None and told["channels"] < experts.channels:
            kept = layers[layer].kept_experts
            chosen = channel_scores[layer][torch.tensor(range(count) if kept is None else kept)]
            best = chosen.topk(told["channels"], dim=-1).indices
            layers[layer].kept_expert_channels = [sorted(ids) for ids in best.tolist()]


def _best(scores: Tensor, groups: int, kept: int) -> list[int]:
    size, each = len(scores) // groups, kept // groups
    found: list[int] = []
    for first in range(0, len(scores), size):
        group = sorted(range(first, first + size), key=lambda expert: (-float(scores[expert]), expert))
        found += group[:each]
    return sorted(found)
