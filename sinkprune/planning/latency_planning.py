"""From scores and a latency table to per-layer counts: the least loss that reaches a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkprune.planning.allocation import Choice, Rules, Unit, fewest_channels
from sinkprune.planning.latency_table import LatencyTable
from sinkprune.plans import Geometry

# The time budget is cut into this many ticks; what rounding costs is less than a tick a layer.
TICKS = 1 << 13


@dataclass(frozen=True)
class LatencyAllocation:
    """What each layer keeps, and what that should take.

    Attributes:
        kept_heads: sorted query-head ids of each layer.
        channels: channel count of each layer.
        seconds, dense_seconds: of a step, by the table.
        loss: the share of all score that goes, in [0, 1).
    """

    kept_heads: list[list[int]]
    channels: list[int]
    seconds: float
    dense_seconds: float
    loss: float


@dataclass(frozen=True)
class _Option:
    """One count that a layer's heads or channels may have."""

    count: int
    seconds: float
    loss: float
    heads: tuple[int, ...] = ()


def allocate(
    geometry: Geometry,
    scores: Tensor,
    units: list[list[Unit]],
    table: LatencyTable,
    *,
    length: int,
    target_seconds: float,
    rules: Rules,
    channel_scores: list[Tensor] | None = None,
) -> LatencyAllocation:
    """Choose head and channel counts so that a step takes at most ``target_seconds`` at the least loss.

    A layer's units go in their order, its channels in that of their scores; among the counts, those that save
    no time over a larger one are never taken. Which count in which layer is a knapsack, solved exactly up to
    a rounding of ``1 / TICKS`` of the budget, so the result is deterministic, and a lower target never loses
    less.

    The loss of a head is its score above the lowest one, of a channel its score. All heads together weigh
    what their share of the block parameters is, all channels theirs: on average a parameter is a parameter.

    Args:
        geometry: of the dense model.
        scores: float ``[layers, >= heads]``, higher = keep.
        units: of each layer, the heads that may go, weakest first (
            ``allocation.head_units``); an empty list keeps all.
        table: for this model's sizes and ``length``.
        target_seconds: of a whole step.
        rules: of the channels: the largest share that may go, and the multiples to keep.
        channel_scores: of each layer ``[channels]``, at least 0, higher = keep; None keeps all channels.

    Raises:
        ValueError: a table for other sizes, or a target out of reach (the message says the best reachable).
    """
    table.check(geometry, length)
    dense = table.step_seconds(geometry, None, length)
    worth = _head_worth(geometry, scores)
    layers = range(geometry.num_layers)
    groups = [_head_options(geometry, worth[i], units[i], table, length, i) for i in layers]
    groups += _channel_options(geometry, table, length, channel_scores, rules)
    fixed = table.rest[length]
    fastest = fixed + sum(options[-1].seconds for options in groups)
    if fastest > target_seconds * (1 + 1e-9):
        raise ValueError(
            f"a step of {1e3 * target_seconds:.3f} ms is out of reach at length {length}: the best reachable "
            f"is {1e3 * fastest:.3f} ms, {dense / fastest:.2f}x faster than dense ({1e3 * dense:.3f} ms)"
        )
    chosen = _cheapest(groups, target_seconds - fixed)
    return LatencyAllocation(
        kept_heads=[list(option.heads) for option in chosen[: geometry.num_layers]],
        channels=[option.count for option in chosen[geometry.num_layers :]],
        seconds=fixed + sum(option.seconds for option in chosen),
        dense_seconds=dense,
        loss=sum(option.loss for option in chosen),
    )


def by_time(
    geometry: Geometry,
    scores: Tensor,
    units: list[list[Unit]],
    targets: tuple[str, ...],
    table: LatencyTable | None,
    length: int | None,
    goal: tuple[float | None, float | None],
    rules: Rules,
    channel_scores: Callable[[], list[Tensor]],
) -> Choice:
    """``allocate`` what ``targets`` name until ``goal`` is reached: ``(target_speedup, target_latency)``, one
    of them None."""
    if table is None:
        raise ValueError(
            "a target needs a latency_table: sp.measured_table(model, [length]) or computed_table"
        )
    at, seconds = target_of(geometry, table, length, *goal)
    worth = channel_scores() if "mlp" in targets else None
    if "heads" not in targets:
        units = [[] for _ in geometry.heads]
    found = allocate(
        geometry, scores, units, table, length=at, target_seconds=seconds, rules=rules, channel_scores=worth
    )
    told = {
        "length": at,
        "target_speedup": goal[0],
        "target_latency": goal[1],
        "latency_table": f"{table.device} ({table.source}, {table.dtype}, batch {table.batch})",
        "seconds_per_step": found.seconds,
        "dense_seconds_per_step": found.dense_seconds,
        "score_lost": found.loss,
    }
    return Choice(found.kept_heads, None if worth is None else found.channels, told)


def target_of(
    geometry: Geometry,
    table: LatencyTable,
    length: int | None,
    target_speedup: float | None,
    target_latency: float | None,
) -> tuple[int, float]:
    """``(length, seconds a step may take)`` for a speed-up over the dense model, or for seconds a step.

    Raises ``ValueError`` unless exactly one target is given and is a positive number, and the length is the
    table's (None: the only one it has).
    """
    if (target_speedup is None) == (target_latency is None):
        raise ValueError("pass either target_speedup or target_latency")
    given = target_speedup if target_latency is None else target_latency
    assert given is not None
    if not (math.isfinite(given) and given > 0):
        raise ValueError(f"a target must be a positive number, got {given}")
    if length is None:
        if len(table.lengths) != 1:
            raise ValueError(f"the latency table knows lengths {table.lengths}: say which one to plan for")
        length = table.lengths[0]
    dense = table.step_seconds(geometry, None, length)
    return length, given if target_speedup is None else dense / given


def _head_options(
    geometry: Geometry, worth: Tensor, units: list[Unit], table: LatencyTable, length: int, layer: int
) -> list[_Option]:
    """What a layer's heads may be, from all of them down; only counts that save time."""
    kept, loss = set(range(geometry.heads[layer])), 0.0
    options = []
    for gone in [[], *(unit.heads for unit in units)]:
        kept -= set(gone)
        loss += float(worth[gone].sum())
        ids = tuple(sorted(kept))
        used = len(geometry.kv_heads_used(layer, list(ids)))
        options.append(_Option(len(ids), table.attention_seconds(length, len(ids), used), loss, ids))
    return _falling(options)


def _head_worth(geometry: Geometry, scores: Tensor) -> list[Tensor]:
    """Per layer, each head's share of the total that heads are worth; float64, at least 0."""
    rows = [scores[layer, :heads].double() for layer, heads in enumerate(geometry.heads)]
    lowest = min(float(row.min()) for row in rows if len(row))
    above = [row - lowest for row in rows]
    total = sum(float(row.sum()) for row in above)
    share = 1 - _channel_share(geometry)
    if total == 0:  # all alike
        return [torch.full_like(row, share / sum(geometry.heads)) for row in above]
    return [row * (share / total) for row in above]


def _channel_share(geometry: Geometry) -> float:
    """The channels' share of the block parameters."""
    channels = geometry.mlp_matrices * sum(geometry.channels)
    heads = 2 * geometry.head_dim * (sum(geometry.heads) + sum(geometry.kv_heads))
    return channels / (channels + heads)


def _channel_options(
    geometry: Geometry,
    table: LatencyTable,
    length: int,
    channel_scores: list[Tensor] | None,
    rules: Rules,
) -> list[list[_Option]]:
    """What each layer's channels may be, from all of them down; only counts that save time."""
    if channel_scores is None:
        return [[_Option(c, table.mlp_seconds(length, c), 0.0)] for c in geometry.channels]
    total = sum(float(row.double().sum()) for row in channel_scores)
    scale = _channel_share(geometry) / total if total > 0 else 0.0
    result = []
    for channels, row in zip(geometry.channels, channel_scores, strict=True):
        lost = torch.cat((torch.zeros(1, dtype=torch.float64), row.double().cpu().sort().values.cumsum(0)))
        fewest, step = fewest_channels(channels, rules), rules.round_channels
        known = table.channel_counts(length, channels)[::-1]
        counts = [c for c in known if c == channels or (c >= fewest and c % step == 0)]
        result.append(
            _falling(
                [_Option(c, table.mlp_seconds(length, c), scale * float(lost[channels - c])) for c in counts]
            )
        )
    return result


def _falling(options: list[_Option]) -> list[_Option]:
    """The options, from the largest count down, that are really faster than every larger one."""
    kept = [options[0]]
    for option in options[1:]:
        if option.seconds < kept[-1].seconds:
            kept.append(option)
    return kept


def _cheapest(groups: list[list[_Option]], budget: float) -> list[_Option]:
    """One option of each group: the least total loss within ``budget`` seconds; ties keep more.

    Dynamic programming over ticks. Rounding every time up may miss the budget by a tick a group, so a few
    ticks more are searched, from the loosest down, and the first choice whose true times fit is taken.
    """
    if sum(options[0].seconds for options in groups) <= budget:
        return [options[0] for options in groups]
    tick = budget / TICKS
    width = TICKS + len(groups) + 1
    least = torch.zeros(width, dtype=torch.float64)
    choices = torch.empty(len(groups), width, dtype=torch.int32)
    costs = [[math.ceil(option.seconds / tick - 1e-9) for option in options] for options in groups]
    for i, options in enumerate(groups):
        best = torch.full((width,), math.inf, dtype=torch.float64)
        choice = torch.zeros(width, dtype=torch.int32)
        for j, option in enumerate(options):
            cost = costs[i][j]
            if cost >= width:
                continue
            candidate = torch.full((width,), math.inf, dtype=torch.float64)
            candidate[cost:] = least[: width - cost] + option.loss
            better = candidate < best
            best, choice = torch.where(better, candidate, best), choice.masked_fill(better, j)
        least, choices[i] = best, choice
    for last in range(width - 1, -1, -1):
        if math.isinf(least[last]):
            break
        at, picked = last, []
        for i in range(len(groups) - 1, -1, -1):
            j = int(choices[i, at])
            picked.append(groups[i][j])
            at -= costs[i][j]
        if sum(option.seconds for option in picked) <= budget * (1 + 1e-9):
            return picked[::-1]
    return [options[-1] for options in groups]  # only the fastest of everything fits
