"""From an order of blocks to a plan: how many go, and what the blocks that stay lose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sinkprune.planning.allocation import Choice, Rules, by_share, head_units, reachable_share
from sinkprune.planning.block_rules import BLOCK_TARGETS, Order
from sinkprune.plans import Geometry, layer_work


@dataclass(frozen=True)
class Budget:
    """What shall go: ``ratio`` of all ``unit``: ``"blocks"``, ``"parameters"``, ``"flops"`` at ``length``."""

    ratio: float
    unit: str
    length: int

    @property
    def work_length(self) -> int:
        return self.length if self.unit == "flops" else 0


def block_target(
    geometry: Geometry, targets: tuple[str, ...], unit: str, *, only_share: bool = True
) -> str | None:
    """The one of ``targets`` that takes whole blocks or halves of them, or None.

    Raises ``ValueError`` where it does not go with the others, with ``unit``, with a target speed
    or a fit, or with experts.
    """
    chosen = [target for target in targets if target in BLOCK_TARGETS]
    if not chosen:
        if unit == "blocks":
            raise ValueError(
                f"unit='blocks' removes one of {', '.join(BLOCK_TARGETS)}, got targets={targets}"
            )
        return None
    if not only_share:
        raise ValueError(f"targets {targets} take a ratio, without a target speed or fit")
    if geometry.experts is not None and chosen != ["attention"]:
        raise ValueError(f"blocks with experts stay whole in plans, got targets={targets}")
    if len(targets) > 1 and (chosen != ["blocks"] or unit == "blocks"):
        raise ValueError(
            f"targets {targets} do not share a budget: attention and mlp_blocks go alone, and blocks with "
            "heads or mlp by unit='parameters' or 'flops'"
        )
    if unit == "heads":
        raise ValueError(f"unit='heads' removes heads only, got targets={targets}; use unit='blocks'")
    return chosen[0]


def by_blocks(
    geometry: Geometry,
    order: Order,
    target: str,
    budget: Budget,
    targets: tuple[str, ...],
    rules: Rules,
    scores: Tensor,
) -> Choice:
    """Take blocks in ``order``, to the nearest whole one of the budget, or of their part of it where
    ``targets`` has more: then the blocks that stay give the rest, and more blocks go where they can't.

    Args:
        order: of all blocks but one.
        scores: of heads ``[layers, most heads]``, read where they go too.

    Raises:
        ValueError: a ratio out of reach (the message says the maximum).
    """
    layers, alone = range(geometry.num_layers), len(targets) == 1
    works = [_work(geometry, layer, target, budget) for layer in layers]
    total = sum(_work(geometry, layer, "everything", budget) for layer in layers)
    budgeted = budget.ratio * total
    if alone and budget.unit == "blocks":
        budgeted = float(round(budgeted))
    count = _nearest([works[layer] for layer, _ in order], budgeted / len(targets))
    most = sum(works[layer] for layer, _ in order)
    if alone:
        if budgeted > most + 0.5:
            raise ValueError(_out_of_reach(budget, most / total, target))
        return _choice(
            geometry, order[:count], target, budget, sum(works[i] for i, _ in order[:count]) / total
        )
    rest_of = tuple(name for name in targets if name != target)
    for gone in range(count, len(order) + 1):
        out = {layer for layer, _ in order[:gone]}
        left = [layer for layer in layers if layer not in out]
        small = geometry.of_layers(left)
        units = head_units(small, scores[left], rules)
        spent = sum(works[layer] for layer in out)
        ratio = max(0.0, (budgeted - spent) / (total - spent))
        reach = reachable_share(small, units, rest_of, rules, budget.work_length)
        if ratio <= reach:
            rest = by_share(small, units, ratio, budget.unit, rest_of, rules, budget.length)
            return _choice(geometry, order[:gone], target, budget, spent / total, left, rest)
    raise ValueError(_out_of_reach(budget, (spent + reach * (total - spent)) / total, " and ".join(targets)))


def block_channels(choice: Choice, scores: list[Tensor], geometry: Geometry) -> list[list[int] | None]:
    """The channels that every layer keeps under a choice of ``by_blocks``; ``scores`` of each layer's
    are read where some go."""
    told, counts = choice.told["blocks"], choice.channels
    kept: list[list[int] | None] = []
    for layer, width in enumerate(geometry.channels):
        if layer in told["removed"] and BLOCK_TARGETS[told["target"]][1]:
            kept.append([])
        elif counts is None or counts[layer] == width:
            kept.append(None)
        else:
            kept.append(sorted(scores[layer].topk(counts[layer]).indices.tolist()))
    return kept


def _choice(
    geometry: Geometry,
    gone: Order,
    target: str,
    budget: Budget,
    share: float,
    left: list[int] | None = None,
    rest: Choice | None = None,
) -> Choice:
    out, depth = [layer for layer, _ in gone], geometry.num_layers - 1
    heads = [
        [] if i in out and BLOCK_TARGETS[target][0] else list(range(n)) for i, n in enumerate(geometry.heads)
    ]
    channels = None
    if rest is not None and left is not None:
        for at, layer in enumerate(left):
            heads[layer] = rest.heads[at]
        if rest.channels is not None:
            channels = list(geometry.channels)
            for at, layer in enumerate(left):
                channels[layer] = rest.channels[at]
    told: dict[str, Any] = {
        "target": target,
        "removed": sorted(out),
        "order": [[layer, figure] for layer, figure in gone],
        "ratio_asked": budget.ratio,
        "ratio": share,
        "depth": sum(out) / (len(out) * depth) if out and depth else None,
    }
    return Choice(heads, channels, {"blocks": told})


def _work(geometry: Geometry, layer: int, target: str, budget: Budget) -> int:
    if budget.unit == "blocks":
        return 1
    attention, mlp = BLOCK_TARGETS.get(target, (True, True))
    heads, kv_heads = (geometry.heads[layer], geometry.kv_heads[layer]) if attention else (0, 0)
    return layer_work(geometry, heads, kv_heads, geometry.channels[layer] if mlp else 0, budget.work_length)


def _nearest(works: list[int], budget: float) -> int:
    spent, count = 0.0, 0
    while count < len(works) and spent + works[count] / 2 <= budget:
        spent += works[count]
        count += 1
    return count


def _out_of_reach(budget: Budget, most: float, what: str) -> str:
    of = {"blocks": "blocks", "flops": "block FLOPs", "parameters": "block parameters"}[budget.unit]
    return (
        f"ratio {budget.ratio} is out of reach: removing {what} takes at most {int(1000 * most) / 1000:.3f} "
        f"of the {of} while one block stays"
    )
