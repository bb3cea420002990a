"""Plain data about a model: its geometry, what a plan keeps of each layer, the sizes that follow."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sinkprune.files import write_whole


@dataclass(frozen=True)
class Geometry:
    """Sizes of a dense model. ``heads``, ``kv_heads`` and ``channels`` have one entry per layer.

    ``mlp_matrices`` of a layer's MLP: 3 where it is gated, 2 where it is not.
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

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Geometry:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


SCHEMA = 1


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
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

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


def block_parameters(geometry: Geometry, heads: int, kv_heads: int, channels: int) -> int:
    """Weights of a block's matrices: q, o (``heads``), k, v (``kv_heads``), the MLP's (``channels``)."""
    return geometry.hidden * (2 * geometry.head_dim * (heads + kv_heads) + geometry.mlp_matrices * channels)


def layer_work(geometry: Geometry, heads: int, kv_heads: int, channels: int, length: int = 0) -> int:
    """Multiply-adds of a block per token of a forward over ``length`` tokens; at length 0 its parameters."""
    core = 2 * length * geometry.head_dim * heads
    return block_parameters(geometry, heads, kv_heads, channels) + core


def layer_sizes(geometry: Geometry, layer: int, kept: LayerPlan | None) -> tuple[int, int, int]:
    """``(query heads, key/value heads, channels)`` of a layer, dense (``kept=None``) or under a plan."""
    if kept is None:
        return geometry.heads[layer], geometry.kv_heads[layer], geometry.channels[layer]
    channels = geometry.channels[layer] if kept.kept_channels is None else len(kept.kept_channels)
    return len(kept.kept_heads), len(geometry.kv_heads_used(layer, kept.kept_heads)), channels


def model_block_parameters(geometry: Geometry, plan: PrunePlan | None = None) -> int:
    """Block parameters of the model, dense or under ``plan``; embeddings, norms and LM head not counted."""
    return sum(block_parameters(geometry, *sizes) for sizes in all_layer_sizes(geometry, plan))


def all_layer_sizes(geometry: Geometry, plan: PrunePlan | None) -> list[tuple[int, int, int]]:
    """``layer_sizes`` of every layer."""
    layers = range(geometry.num_layers)
    return [layer_sizes(geometry, i, None if plan is None else plan.layers[i]) for i in layers]
