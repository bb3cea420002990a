"""Plain data about a model: its geometry, what a plan keeps of each layer, the sizes that follow."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sinkprune.files import read_json, write_whole


@dataclass(frozen=True)
class Experts:
    """The routed experts of a dense model, of which a token goes through ``top_k``.

    Attributes:
        count: experts of every layer, 0 where its MLP is dense.
        channels: of one expert.
        top_k: experts that a token goes to.
        shared: channels that every token goes through beside them.
        groups, open_groups: into how many equal groups the router divides them, and from how many of those a
            token's experts come; a group ranks by its two best.
    """

    count: tuple[int, ...]
    channels: int
    top_k: int
    shared: int = 0
    groups: int = 1
    open_groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.open_groups <= self.groups or any(count % self.groups for count in self.count):
            raise ValueError(
                f"experts must lie in equal groups, and a token's in some of them, got {self.count} experts, "
                f"{self.groups} groups and {self.open_groups} of them"
            )

    def fewest(self) -> int:
        """The fewest experts with which the router still finds ``top_k`` for every token."""
        ranked = 2 if self.groups > 1 else 1
        return self.groups * max(ranked, math.ceil(self.top_k / self.open_groups))

    def group_of(self, layer: int, expert: int) -> int:
        """The router's group that ``expert`` of ``layer`` is in."""
        return expert // (self.count[layer] // self.groups)

    def refusal(self, layer: int, kept: list[int]) -> str | None:
        """Why the router of ``layer`` can't run on the experts ``kept``; None where it can, or has none."""
        if not kept:
            return None
        counts = [0] * self.groups
        for expert in kept:
            counts[self.group_of(layer, expert)] += 1
        if len(set(counts)) > 1:
            return f"every group of experts must keep as many, got {', '.join(map(str, counts))}"
        if len(kept) < self.fewest():
            return (
                f"{self.fewest()} experts at least must stay (top {self.top_k}, from {self.open_groups} of "
                f"{self.groups} groups), got {len(kept)}"
            )
        return None


@dataclass(frozen=True)
class Geometry:
    """Sizes of a dense model. ``heads``, ``kv_heads`` and ``channels`` have one entry per layer.

    ``channels`` are those that a token goes through; where there are experts, that is less than what is
    stored. ``mlp_matrices`` of a layer's MLP: 3 where it is gated, 2 where it is not. Plans from before there
    was ``experts`` say nothing of them, so that equality leaves them out: ``agrees`` asks.
    """

    family: str
    hidden: int
    head_dim: int
    vocabulary: int
    context: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]
    mlp_matrices: int = 3
    experts: Experts | None = field(default=None, compare=False)

    @property
    def num_layers(self) -> int:
        return len(self.heads)

    def kv_head_of(self, layer: int) -> list[int]:
        """The key/value head that each query head of ``layer`` reads."""
        group = self.heads[layer] // self.kv_heads[layer]
        return [head // group for head in range(self.heads[layer])]

    def kv_heads_used(self, layer: int, heads: list[int]) -> list[int]:
        """The key/value heads that the query heads ``heads`` of ``layer`` read, sorted."""
        owner = self.kv_head_of(layer)
        return sorted({owner[head] for head in heads})

    def experts_of(self, layer: int) -> int:
        """Routed experts of ``layer``; 0 where its MLP is dense."""
        return 0 if self.experts is None else self.experts.count[layer]

    def of_layers(self, layers: list[int]) -> Geometry:
        """Of a model with these layers alone, in this order."""
        heads, kv_heads, channels = (
            tuple(sizes[i] for i in layers) for sizes in (self.heads, self.kv_heads, self.channels)
        )
        experts = self.experts
        if experts is not None:
            experts = replace(experts, count=tuple(experts.count[i] for i in layers))
        return replace(self, heads=heads, kv_heads=kv_heads, channels=channels, experts=experts)

    def agrees(self, other: Geometry) -> bool:
        """Whether both are of one model, as far as both say."""
        unsaid = self.experts is None or other.experts is None
        return self == other and (unsaid or self.experts == other.experts)

    def to_dict(self) -> dict[str, Any]:
        values = _lists(asdict(self))
        experts = values.pop("experts")
        return values if experts is None else values | {"experts": _lists(experts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Geometry:
        fields: dict[str, Any] = _tuples(values)
        if fields.get("experts") is not None:
            fields["experts"] = Experts(**_tuples(fields["experts"]))
        return cls(**fields)


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


SCHEMA = 2  # where a plan says something of experts; others are written as schema 1, which they are
SCHEMAS = (1, 2)


@dataclass
class LayerPlan:
    """What a layer keeps: sorted ids of query heads, channels and experts; None = all.

    ``kept_channels`` are the dense MLP's; in a layer with experts those that every token goes through beside
    them. ``kept_expert_channels`` has a list for each kept expert, all of one length. A layer without
    attention keeps no heads; one without its MLP no channels and, where it has experts, none of those.
    """

    kept_heads: list[int]
    kept_channels: list[int] | None = None
    kept_experts: list[int] | None = None
    kept_expert_channels: list[list[int]] | None = None

    @property
    def dense_channels(self) -> list[int] | None:
        """``kept_channels`` of a dense MLP; None where a mixture of experts goes as a whole."""
        return None if self.kept_experts == [] else self.kept_channels

    @property
    def is_gone(self) -> bool:
        """Whether a layer with a dense MLP keeps nothing."""
        return self.kept_heads == [] and self.kept_channels == [] and self.kept_experts is None

    @property
    def takes_experts(self) -> bool:
        """Whether experts go, or channels of them."""
        return self.kept_experts is not None or self.kept_expert_channels is not None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; experts are named where the plan says something of them."""
        return {k: v for k, v in asdict(self).items() if v is not None or not k.startswith("kept_expert")}


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
        kinds: dict[str, Any] = {
            "fingerprint": str,
            "criterion": str,
            "ratio": (int, float),
            "unit": str,
            "allocation": str,
            "seed": int,
            "details": dict,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind) or isinstance(getattr(self, name), bool):
                raise ValueError(f"a plan's {name} can't be {getattr(self, name)!r:.40}")
        if not all(isinstance(target, str) for target in self.targets):
            raise ValueError(f"a plan's targets are names, got {self.targets!r:.40}")

    @property
    def heads_removed(self) -> int:
        return sum(self.geometry.heads) - sum(len(layer.kept_heads) for layer in self.layers)

    @property
    def experts_removed(self) -> int:
        counts = (self.geometry.experts_of(layer) for layer in range(self.geometry.num_layers))
        kept = (layer.kept_experts for layer in self.layers)
        return sum(0 if k is None else count - len(k) for count, k in zip(counts, kept, strict=True))

    @property
    def parameters_removed(self) -> float:
        """Share of the block parameters that the plan removes."""
        return 1 - model_block_parameters(self.geometry, self) / model_block_parameters(self.geometry)

    def to_dict(self) -> dict[str, Any]:
        layers = [layer.to_dict() for layer in self.layers]
        geometry, targets = self.geometry.to_dict(), list(self.targets)
        values = asdict(self) | {"geometry": geometry, "layers": layers, "targets": targets}
        experts = "experts" in geometry or any("kept_experts" in layer for layer in layers)
        return {"schema": SCHEMA if experts else 1, "kind": "prune_plan", **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrunePlan:
        """Raises ``ValueError`` where ``values`` is not a plan of a known schema."""
        if values.get("kind") != "prune_plan" or values.get("schema") not in SCHEMAS:
            raise ValueError(
                f"expected a prune plan of schema {' or '.join(map(str, SCHEMAS))}, got "
                f"kind={values.get('kind')!r} of schema {values.get('schema')!r}"
            )
        try:
            known = {k: v for k, v in values.items() if k not in ("schema", "kind")}
            known["geometry"] = Geometry.from_dict(known["geometry"])
            known["layers"] = [LayerPlan(**layer) for layer in known["layers"]]
            if not isinstance(known["targets"], list):
                raise TypeError(f"targets must be a list, got {known['targets']!r:.40}")
            known["targets"] = tuple(known["targets"])
            return cls(**known)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"malformed prune plan: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read what ``save`` wrote. Raises ``ValueError`` for anything else, naming the file."""
        try:
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def validate_layers(geometry: Geometry, layers: list[LayerPlan]) -> None:
    """Raise ``ValueError`` unless every layer's ids are sorted, unique and in range for ``geometry``, and the
    router of what experts stay can run."""
    if len(layers) != geometry.num_layers:
        raise ValueError(f"a plan for {geometry.num_layers} layers expected, got {len(layers)}")
    if geometry.experts is not None and len(geometry.experts.count) != geometry.num_layers:
        raise ValueError(f"experts of {geometry.num_layers} layers expected, got {geometry.experts.count}")
    for i, layer in enumerate(layers):
        _require_ids(f"layer {i}: kept_heads", layer.kept_heads, geometry.heads[i])
        experts = geometry.experts if geometry.experts_of(i) else None
        if layer.kept_channels is not None:
            size = geometry.channels[i] if experts is None else experts.shared
            _require_ids(f"layer {i}: kept_channels", layer.kept_channels, size)
        if experts is not None:
            _validate_experts(i, layer, experts)
        elif layer.kept_experts is not None or layer.kept_expert_channels is not None:
            raise ValueError(f"layer {i}: kept_experts of a layer without experts in the plan's geometry")


def _require_ids(what: str, ids: list[int] | None, size: int) -> None:
    if not isinstance(ids, list) or not all(type(k) is int for k in ids) or ids != sorted(set(ids)):
        raise ValueError(f"{what} must be sorted and unique integers, got {str(ids)[:40]}")
    if ids and not 0 <= ids[0] <= ids[-1] < size:
        raise ValueError(f"{what} must lie in [0, {size}), got {ids[0]}..{ids[-1]}")


def _validate_experts(i: int, layer: LayerPlan, experts: Experts) -> None:
    kept, channels = layer.kept_experts, layer.kept_expert_channels
    if kept is not None:
        _require_ids(f"layer {i}: kept_experts", kept, experts.count[i])
        refusal = experts.refusal(i, kept)
        if refusal:
            raise ValueError(f"layer {i}: {refusal}")
    if (kept == []) != (layer.kept_channels == []):
        raise ValueError(
            f"layer {i}: kept_experts and kept_channels are both empty, where the MLP goes, or neither is"
        )
    if channels is None:
        return
    expected = experts.count[i] if kept is None else len(kept)
    if len(channels) != expected or len({len(ids) for ids in channels}) != 1 or not channels[0]:
        lengths = sorted({len(ids) for ids in channels})
        raise ValueError(
            f"layer {i}: kept_expert_channels must have one list for each of {expected} kept experts, all of "
            f"one length of at least 1, got {len(channels)} of lengths {lengths}"
        )
    for expert, ids in enumerate(channels):
        _require_ids(f"layer {i}: kept_expert_channels[{expert}]", ids, experts.channels)


def block_parameters(geometry: Geometry, heads: int, kv_heads: int, channels: int) -> int:
    """Weights of a block's matrices: q, o (``heads``), k, v (``kv_heads``), the MLP's (``channels``)."""
    return geometry.hidden * (2 * geometry.head_dim * (heads + kv_heads) + geometry.mlp_matrices * channels)


def layer_work(geometry: Geometry, heads: int, kv_heads: int, channels: int, length: int = 0) -> int:
    """Multiply-adds of a block per token of a forward over ``length`` tokens; at length 0 the parameters that
    a token goes through."""
    core = 2 * length * geometry.head_dim * heads
    return block_parameters(geometry, heads, kv_heads, channels) + core


def layer_sizes(geometry: Geometry, layer: int, kept: LayerPlan | None) -> tuple[int, int, int]:
    """``(query heads, key/value heads, channels that a token goes through)`` of a layer, dense
    (``kept=None``) or under a plan."""
    if kept is None:
        return geometry.heads[layer], geometry.kv_heads[layer], geometry.channels[layer]
    channels = geometry.channels[layer] if kept.kept_channels is None else len(kept.kept_channels)
    experts = geometry.experts
    if experts is not None and experts.count[layer]:
        count, width, shared = expert_sizes(geometry, layer, kept)
        channels = shared + (experts.top_k * width if count else 0)
    return len(kept.kept_heads), len(geometry.kv_heads_used(layer, kept.kept_heads)), channels


def expert_sizes(geometry: Geometry, layer: int, kept: LayerPlan | None) -> tuple[int, int, int]:
    """``(experts, channels of one, channels beside them)`` of a layer, dense or under a plan; zeros where
    there are no experts."""
    experts = geometry.experts
    if experts is None or not experts.count[layer]:
        return 0, 0, 0
    count, width, shared = experts.count[layer], experts.channels, experts.shared
    if kept is not None:
        count = count if kept.kept_experts is None else len(kept.kept_experts)
        width = len(kept.kept_expert_channels[0]) if kept.kept_expert_channels else width
        shared = shared if kept.kept_channels is None else len(kept.kept_channels)
    return count, width, shared


def stored_parameters(geometry: Geometry, layer: int, kept: LayerPlan | None) -> int:
    """Weights of a layer's matrices as they are stored: every expert, and its row of the router."""
    heads, kv_heads, channels = layer_sizes(geometry, layer, kept)
    if not geometry.experts_of(layer):
        return block_parameters(geometry, heads, kv_heads, channels)
    count, width, shared = expert_sizes(geometry, layer, kept)
    return block_parameters(geometry, heads, kv_heads, shared + count * width) + count * geometry.hidden


def model_block_parameters(geometry: Geometry, plan: PrunePlan | None = None) -> int:
    """Stored block parameters of the model, dense or under ``plan``; embeddings, norms and LM head not
    counted."""
    layers = range(geometry.num_layers)
    return sum(stored_parameters(geometry, i, None if plan is None else plan.layers[i]) for i in layers)


def all_layer_sizes(geometry: Geometry, plan: PrunePlan | None) -> list[tuple[int, int, int]]:
    """``layer_sizes`` of every layer."""
    layers = range(geometry.num_layers)
    return [layer_sizes(geometry, i, None if plan is None else plan.layers[i]) for i in layers]
