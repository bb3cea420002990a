"""From scores to a plan: which query heads and MLP channels each layer keeps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sinkprune.adapters import Adapter, Geometry, adapter_for
from sinkprune.costs import model_block_parameters
from sinkprune.criteria import HeadCriterion, criterion_for
from sinkprune.criteria.magnitude import channel_magnitude

if TYPE_CHECKING:
    from sinkprune.profiling import SinkProfile

SCHEMA = 1
TARGETS = ("heads", "mlp")


@dataclass
class LayerPlan:
    """What a layer keeps: sorted query-head ids, and sorted channel ids or None for all."""

    kept_heads: list[int]
    kept_channels: list[int] | None = None


@dataclass
class PrunePlan:
    """A decision about one model, readable as JSON. It never holds weights."""

    geometry: Geometry
    fingerprint: str
    layers: list[LayerPlan]
    criterion: str = "manual"
    ratio: float = 0.0
    unit: str = "heads"
    targets: tuple[str, ...] = ("heads",)
    allocation: str = "global"
    seed: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_layers(self.geometry, self.layers)

    @property
    def heads_removed(self) -> int:
        return sum(self.geometry.heads) - sum(len(layer.kept_heads) for layer in self.layers)

    @property
    def parameters_removed(self) -> float:
        """Share of the block parameters that the plan removes."""
        return 1 - model_block_parameters(self.geometry, self) / model_block_parameters(self.geometry)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self) | {"geometry": self.geometry.to_dict(), "targets": list(self.targets)}
        return {"schema": SCHEMA, "kind": "prune_plan", **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrunePlan:
        """Raises ``ValueError`` where ``values`` is not a plan of this schema."""
        if values.get("kind") != "prune_plan" or values.get("schema") != SCHEMA:
            raise ValueError(
                f"expected a prune plan of schema {SCHEMA}, got kind={values.get('kind')!r} of schema "
                f"{values.get('schema')!r}"
            )
        try:
            known = {k: v for k, v in values.items() if k not in ("schema", "kind")}
            known["geometry"] = Geometry.from_dict(known["geometry"])
            known["layers"] = [LayerPlan(**layer) for layer in known["layers"]]
            known["targets"] = tuple(known["targets"])
            return cls(**known)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"malformed prune plan: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        try:
            values = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a prune plan, got a JSON {type(values).__name__}")
        return cls.from_dict(values)


def validate_layers(geometry: Geometry, layers: list[LayerPlan]) -> None:
    """Raise ``ValueError`` unless every layer's ids are sorted, unique and in range for ``geometry``."""
    if len(layers) != geometry.num_layers:
        raise ValueError(f"a plan for {geometry.num_layers} layers expected, got {len(layers)}")
    for i, layer in enumerate(layers):
        for what, ids, size in (
            ("kept_heads", layer.kept_heads, geometry.heads[i]),
            ("kept_channels", layer.kept_channels, geometry.channels[i]),
        ):
            if ids is None and what == "kept_channels":
                continue
            if ids is None or not all(isinstance(k, int) for k in ids) or ids != sorted(set(ids)):
                raise ValueError(f"layer {i}: {what} must be sorted and unique integers, got {str(ids)[:40]}")
            if ids and not 0 <= ids[0] <= ids[-1] < size:
                raise ValueError(f"layer {i}: {what} must lie in [0, {size}), got {ids[0]}..{ids[-1]}")


def plan(
    model: nn.Module,
    profile: SinkProfile | None = None,
    criterion: str | HeadCriterion = "sink_variance",
    ratio: float = 0.38,
    unit: str = "heads",
    *,
    targets: Iterable[str] = ("heads",),
    allocation: str = "global",
    whole_groups: bool = False,
    min_heads: int = 1,
    seed: int = 0,
) -> PrunePlan:
    """Decide what to remove from ``model``.

    Args:
        model: a dense model of a known family.
        profile: statistics of this model, for criteria that need them.
        criterion: a registered name, or a criterion with its settings.
        ratio: share to remove, in [0, 1).
        unit: what ``ratio`` is a share of: ``"heads"`` (query heads) or ``"parameters"`` (block parameters).
        targets: with ``unit="parameters"``: ``"heads"``, ``"mlp"`` or both, each giving the same share of its
            own.
        allocation: ``"global"`` ranks all layers' heads together, ``"uniform"`` takes the same share of each
            layer.
        whole_groups: remove query heads only together with the key/value head they share.
        min_heads: fewest query heads (or groups, with ``whole_groups``) a layer keeps; 0 allows to empty
            layers.
        seed: for criteria that draw.

    Raises:
        ValueError: an argument out of range, a ratio out of reach (the message says the maximum), or a
            profile of another model.
    """
    adapter = adapter_for(model)
    geometry = adapter.geometry()
    rule = criterion_for(criterion)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a number, got {ratio!r}")
    _check_arguments(adapter, rule, profile, ratio, unit, targets, allocation, min_heads)

    scores = rule.score(adapter, profile, seed)
    if not all(torch.isfinite(scores[i, :n]).all() for i, n in enumerate(geometry.heads)):
        raise ValueError(f"criterion {rule.name!r} gave scores that are not finite")
    units = _head_units(geometry, scores, whole_groups)

    if unit == "heads":
        budget = round(ratio * sum(geometry.heads))
        reachable = sum(sum(len(u.heads) for u in layer[: max(0, len(layer) - min_heads)]) for layer in units)
        if budget > reachable:
            raise ValueError(
                f"ratio {ratio} is out of reach: at most {reachable / sum(geometry.heads):.3f} of the heads "
                f"can go while every layer keeps {min_heads}"
            )
        kept = _remove_heads(geometry, units, budget, allocation, min_heads, by_parameters=False)
        channels: list[list[int] | None] = [None] * geometry.num_layers
    else:
        kept, channels = _remove_parameters(adapter, units, ratio, targets, allocation, min_heads)

    return PrunePlan(
        geometry=geometry,
        fingerprint=adapter.fingerprint(),
        layers=[LayerPlan(heads, chosen) for heads, chosen in zip(kept, channels, strict=True)],
        criterion=rule.name,
        ratio=ratio,
        unit=unit,
        targets=targets,
        allocation=allocation,
        seed=seed,
        details={"settings": vars(rule), "whole_groups": whole_groups, "min_heads": min_heads},
    )


@dataclass
class _Unit:
    """Query heads of one layer that go together, and the score that orders them."""

    score: float
    layer: int
    heads: list[int]


def _check_arguments(
    adapter: Adapter,
    rule: HeadCriterion,
    profile: SinkProfile | None,
    ratio: float,
    unit: str,
    targets: tuple[str, ...],
    allocation: str,
    min_heads: int,
) -> None:
    if adapter.form != "dense":
        raise ValueError(f"the model is already pruned ({adapter.form} form); plan on the dense model")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), got {ratio}")
    if unit not in ("heads", "parameters"):
        raise ValueError(f"unit must be 'heads' or 'parameters', got {unit!r}")
    if not targets or set(targets) - set(TARGETS):
        raise ValueError(f"targets must be chosen from {TARGETS}, got {targets}")
    if unit == "heads" and targets != ("heads",):
        raise ValueError(f"unit='heads' removes heads only, got targets={targets}; use unit='parameters'")
    if allocation not in ("global", "uniform"):
        raise ValueError(f"allocation must be 'global' or 'uniform', got {allocation!r}")
    if min_heads < 0:
        raise ValueError(f"min_heads must be at least 0, got {min_heads}")
    if rule.needs_profile and profile is None:
        raise ValueError(f"criterion {rule.name!r} needs a profile: pass sp.profile(model, prompts, ...)")
    if profile is not None:
        profile.check_model(adapter)


def _head_units(geometry: Geometry, scores: Tensor, whole_groups: bool) -> list[list[_Unit]]:
    """Per layer, its removable units from lowest score to highest; ties go to the lower head id."""
    layers = []
    for layer, heads in enumerate(geometry.heads):
        size = heads // geometry.kv_heads[layer] if whole_groups else 1
        groups = [list(range(first, first + size)) for first in range(0, heads, size)]
        units = [_Unit(scores[layer, group].mean().item(), layer, group) for group in groups]
        layers.append(sorted(units, key=lambda u: (u.score, u.heads)))
    return layers


def _remove_heads(
    geometry: Geometry,
    units: list[list[_Unit]],
    budget: float,
    allocation: str,
    min_heads: int,
    *,
    by_parameters: bool,
) -> list[list[int]]:
    """Remove lowest scores first until ``budget`` (heads, or block parameters) is met to the nearest unit."""
    if allocation == "global":
        order = sorted((u for layer in units for u in layer), key=lambda u: (u.score, u.layer, u.heads))
    else:  # the k-th weakest unit of every layer before the (k+1)-th of any
        order = [layer[k] for k in range(max(map(len, units))) for layer in units if k < len(layer)]
    kept = [set(range(heads)) for heads in geometry.heads]
    left = [len(layer) for layer in units]
    spent = 0.0
    for unit in order:
        if left[unit.layer] <= min_heads:
            continue
        cost = _parameters_of(geometry, kept[unit.layer], unit) if by_parameters else len(unit.heads)
        if spent + cost / 2 > budget:
            break
        kept[unit.layer] -= set(unit.heads)
        left[unit.layer] -= 1
        spent += cost
    return [sorted(heads) for heads in kept]


def _parameters_of(geometry: Geometry, kept: set[int], unit: _Unit) -> int:
    """Parameters that go with ``unit``: its q and o, and the key/value heads that nobody else reads."""
    before = geometry.kv_heads_used(unit.layer, sorted(kept))
    after = geometry.kv_heads_used(unit.layer, sorted(kept - set(unit.heads)))
    return 2 * geometry.hidden * geometry.head_dim * (len(unit.heads) + len(before) - len(after))


def _remove_parameters(
    adapter: Adapter,
    units: list[list[_Unit]],
    ratio: float,
    targets: tuple[str, ...],
    allocation: str,
    min_heads: int,
) -> tuple[list[list[int]], list[list[int] | None]]:
    """Heads and channels whose removal takes ``ratio`` of the block parameters, each target giving the same
    share."""
    geometry = adapter.geometry()
    total = model_block_parameters(geometry)
    fewest = _remove_heads(geometry, units, float("inf"), allocation, min_heads, by_parameters=True)
    every_head = [LayerPlan(heads) for heads in fewest]
    head_pool = total - model_block_parameters(geometry, PrunePlan(geometry, "", every_head))
    mlp_pool = geometry.mlp_matrices * geometry.hidden * sum(max(0, c - 1) for c in geometry.channels)
    pools = {"heads": head_pool if "heads" in targets else 0, "mlp": mlp_pool if "mlp" in targets else 0}
    reachable = sum(pools.values())
    if ratio * total > reachable + 0.5:
        raise ValueError(
            f"ratio {ratio} is out of reach: removing {' and '.join(targets)} takes at most"
            f" {math.floor(1000 * reachable / total) / 1000:.3f} of the block parameters"
        )
    share = ratio * total / max(1, reachable)
    kept = _remove_heads(geometry, units, share * pools["heads"], allocation, min_heads, by_parameters=True)
    if not pools["mlp"]:
        return kept, [None] * geometry.num_layers
    # Heads come in lumps: the channels make up the difference, so that the total is what was asked for.
    taken = total - model_block_parameters(geometry, PrunePlan(geometry, "", [LayerPlan(h) for h in kept]))
    rest = (ratio * total - taken) / (geometry.mlp_matrices * geometry.hidden * sum(geometry.channels))
    channels: list[list[int] | None] = []
    for layer, width in enumerate(geometry.channels):
        keep = min(width, max(1, width - round(rest * width)))
        best = torch.topk(channel_magnitude(adapter.mlp_weights(layer)), keep).indices
        channels.append(sorted(best.tolist()))
    return kept, channels
