"""What each head and channel count costs in time on one device: measured, or computed from its roofs.

Time does not fall with every head removed: a GPU works in waves of blocks, a CPU in vectors. A table says
where it falls, so that a plan can stop on the steps (`sinkprune.planning.latency_planning`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sinkprune.adapters import adapter_for
from sinkprune.files import read_json, write_whole
from sinkprune.models.modules import CompactMLP, SinkPrunedAttention
from sinkprune.models.rotary import rotary_table
from sinkprune.planning.costs import Operation, attention_operations, mlp_operations, step_operations
from sinkprune.planning.hardware import Roofs, device_name
from sinkprune.planning.timing import interleaved
from sinkprune.plans import Geometry, all_layer_sizes

if TYPE_CHECKING:
    from sinkprune.plans import PrunePlan

SCHEMA = 1


@dataclass
class LatencyTable:
    """Seconds of one layer's attention and MLP by what they keep, and of the rest of a step.

    Attributes:
        device: its name.
        source: ``"measured"`` or ``"computed"``.
        dtype, batch: of the forwards.
        hidden, head_dim, mlp_matrices: the layer's sizes that the times hold for.
        attention: by ``(length, query heads, key/value heads)``.
        mlp: by ``(length, channels)``.
        rest: by length: LM head, embedding, norms, everything that no plan changes.
    """

    device: str
    source: str
    dtype: str
    batch: int
    hidden: int
    head_dim: int
    mlp_matrices: int
    attention: dict[tuple[int, int, int], float] = field(default_factory=dict)
    mlp: dict[tuple[int, int], float] = field(default_factory=dict)
    rest: dict[int, float] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        return sorted(self.rest)

    def channel_counts(self, length: int, channels: int) -> list[int]:
        """The counts up to ``channels`` whose time is known, rising. Raises ``ValueError`` without any."""
        counts = sorted(count for at, count in self.mlp if at == length and count <= channels)
        if not counts or counts[-1] != channels:
            raise ValueError(f"the table has no time of {channels} channels at length {length}")
        return counts

    def attention_seconds(self, length: int, heads: int, kv_heads: int) -> float:
        """One layer's attention; 0 for no heads. Raises ``ValueError`` where the table does not say."""
        if heads == 0:
            return 0.0
        if (length, heads, kv_heads) not in self.attention:
            raise ValueError(
                f"the table has no time of {heads} query and {kv_heads} key/value heads at length {length}"
            )
        return self.attention[length, heads, kv_heads]

    def mlp_seconds(self, length: int, channels: int) -> float:
        """One layer's MLP, between two known counts the larger one's; 0 for no channels."""
        if channels == 0:
            return 0.0
        above = [count for at, count in self.mlp if at == length and count >= channels]
        if not above:
            raise ValueError(f"the table has no time of {channels} channels at length {length}")
        return self.mlp[length, min(above)]

    def step_seconds(self, geometry: Geometry, plan: PrunePlan | None, length: int) -> float:
        """A step of the dense model, or under a plan. Raises ``ValueError`` for another model's sizes."""
        self.check(geometry, length)
        return self.rest[length] + sum(
            self.attention_seconds(length, heads, kv_heads) + self.mlp_seconds(length, channels)
            for heads, kv_heads, channels in all_layer_sizes(geometry, plan)
        )

    def check(self, geometry: Geometry, length: int) -> None:
        """Raise ``ValueError`` unless the table is about such layers and knows the length."""
        own = (self.hidden, self.head_dim, self.mlp_matrices)
        if own != (geometry.hidden, geometry.head_dim, geometry.mlp_matrices):
            raise ValueError(
                f"the latency table is for hidden size, head size and MLP matrices {own}, the model has "
                f"{(geometry.hidden, geometry.head_dim, geometry.mlp_matrices)}"
            )
        if length not in self.rest:
            raise ValueError(f"the latency table knows lengths {self.lengths}, got {length}")

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        values = vars(self) | {
            "attention": [[*key, seconds] for key, seconds in self.attention.items()],
            "mlp": [[*key, seconds] for key, seconds in self.mlp.items()],
            "rest": [[key, seconds] for key, seconds in self.rest.items()],
        }
        write_whole(path, json.dumps({"schema": SCHEMA, "kind": "latency_table", **values}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Raises ``ValueError`` where the file is not a table of this schema."""
        try:
            values = read_json(path)
            if values.pop("kind") != "latency_table" or values.pop("schema") != SCHEMA:
                raise ValueError(f"not a latency table of schema {SCHEMA}")
            attention = {(n, heads, kv_heads): s for n, heads, kv_heads, s in values.pop("attention")}
            mlp = {(n, channels): s for n, channels, s in values.pop("mlp")}
            rest = dict(values.pop("rest"))
            return cls(**values, attention=attention, mlp=mlp, rest=rest)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} can't be read as a latency table: {error}") from error


def computed_table(
    model: nn.Module | Geometry,
    roofs: Roofs,
    lengths: Iterable[int],
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> LatencyTable:
    """A table from the device's roofs, with the waves of blocks where it is a GPU; for planning without it.

    A matrix product takes whole waves of its best tile; an attention core, the waves of the tile that its
    kernel would choose; neither less than its traffic. Nothing is measured, and overheads are left out.
    """
    geometry = model if isinstance(model, Geometry) else adapter_for(model).geometry()
    table = _empty(geometry, roofs.device, "computed", dtype, batch)

    def total(operations: list[Operation], length: int, heads: int = 0) -> float:
        return sum(_seconds(o, roofs, dtype, geometry.head_dim, batch, length, heads) for o in operations)

    for length in lengths:
        for heads, kv_heads in _head_counts(geometry):
            operations = attention_operations(geometry, heads, kv_heads, batch, length)
            table.attention[length, heads, kv_heads] = total(operations, length, heads)
        for channels in sorted({c for width in geometry.channels for c in channel_steps(width)}):
            table.mlp[length, channels] = total(mlp_operations(geometry, channels, batch, length), length)
        table.rest[length] = total(step_operations(geometry, None, batch, length)[-1:], length)
    return table


@torch.inference_mode()
def measured_table(
    model: nn.Module, lengths: Iterable[int], batch: int = 1, rounds: int = 10
) -> LatencyTable:
    """Time compact layers of the model's sizes, turn by turn, on its device and in its dtype.

    The layers hold random weights: only their sizes matter. ``rest`` is a whole dense step less its layers.

    Raises:
        ValueError: a model that is pruned already, or whose MLP is not gated.
    """
    adapter = adapter_for(model)
    adapter.require_dense("measure")
    geometry = adapter.geometry()
    if geometry.mlp_matrices != 3:
        raise ValueError("measuring needs a gated MLP: compute the table from roofs instead")
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    table = _empty(geometry, device_name(device), "measured", dtype, batch)
    for length in lengths:
        x = torch.randn(batch, length, geometry.hidden, device=device, dtype=dtype)
        cos, sin = rotary_table(torch.arange(length, device=device), geometry.head_dim, 1e4)
        layers = {key: _attention(geometry, *key, weight) for key in _head_counts(geometry)}
        calls = {str(key): partial(layer, x, cos, sin) for key, layer in layers.items()}
        seconds = _time(calls, rounds, device.type)
        table.attention |= {(length, *key): seconds[str(key)] for key in layers}
        counts = sorted({c for width in geometry.channels for c in channel_steps(width)}, reverse=True)
        blocks = {count: _mlp(geometry, count, weight) for count in counts}
        seconds = _time({str(c): partial(mlp, x) for c, mlp in blocks.items()}, rounds, device.type)
        table.mlp |= {(length, count): seconds[str(count)] for count in counts}
        del layers, blocks, calls
        ids = torch.randint(0, geometry.vocabulary, (batch, length), device=device)
        step = _time({"step": partial(adapter.predict, ids)}, rounds, device.type)["step"]
        table.rest[length] = 0.0
        table.rest[length] = max(0.0, step - table.step_seconds(geometry, None, length))
    return table


def channel_steps(channels: int) -> list[int]:
    """The channel counts that a table lists: about 32 steps, multiples of 64 where a layer is that wide."""
    step = max(1, channels // 32)
    step = -(-step // 64) * 64 if step >= 48 else step
    return [*range(step, channels, step), channels]


def _empty(geometry: Geometry, device: str, source: str, dtype: torch.dtype, batch: int) -> LatencyTable:
    name = str(dtype).removeprefix("torch.")
    return LatencyTable(
        device, source, name, batch, geometry.hidden, geometry.head_dim, geometry.mlp_matrices
    )


def _head_counts(geometry: Geometry) -> list[tuple[int, int]]:
    """Every count of query heads with every count of key/value heads that they can read, the most first."""
    pairs = set()
    for heads, kv_heads in set(zip(geometry.heads, geometry.kv_heads, strict=True)):
        group = heads // kv_heads
        pairs |= {(h, kv) for kv in range(1, kv_heads + 1) for h in range(kv, group * kv + 1)}
    return sorted(pairs, reverse=True)


# Output tiles of GPU matrix products, and time per element relative to the largest: a guess at cuBLAS's.
_GEMM_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 1.0), (128, 64, 1.1), (64, 64, 1.25))


def _seconds(
    o: Operation, roofs: Roofs, dtype: torch.dtype, head_dim: int, batch: int, length: int, heads: int
) -> float:
    """An operation's least time, in whole waves where the roofs are a GPU's."""
    least = roofs.seconds(o.flops, o.elements * dtype.itemsize, dtype)
    if roofs.multiprocessors is None or roofs.family is None:
        return least
    each = roofs.peak(dtype) / roofs.multiprocessors
    if o.name == "core":
        return max(least, _core_waves(roofs, dtype, head_dim, batch * heads, length) / each)
    rows, columns, inner = o.shape
    waves = min(
        -(-(-(-rows // m) * -(-columns // n)) // roofs.multiprocessors) * 2 * m * n * inner * cost
        for m, n, cost in _GEMM_TILES
    )
    return max(least, waves / each)


def _core_waves(roofs: Roofs, dtype: torch.dtype, head_dim: int, programs: int, length: int) -> float:
    """FLOPs that the busiest multiprocessor computes in attention of ``programs`` = batch x heads."""
    from sinkprune.kernels import launch

    assert roofs.family is not None and roofs.multiprocessors is not None
    known, bits = launch.family(roofs.family), "16" if dtype.itemsize == 2 else "32"
    tile, shares = launch.choose_tile(
        "attention", known, roofs.multiprocessors, bits, head_dim, length, length, programs
    )
    blocks = -(-length // tile.block_m) * programs * shares
    walked = -(-length // (tile.block_n * shares)) * tile.block_n
    return -(-blocks // roofs.multiprocessors) * 4 * tile.block_m * walked * head_dim * tile.cost


def _attention(geometry: Geometry, heads: int, kv_heads: int, like: torch.Tensor) -> nn.Module:
    """A compact attention layer with random weights; query heads spread over the key/value heads."""
    rows = (heads + 2 * kv_heads) * geometry.head_dim
    qkv = like.new_empty(rows, geometry.hidden).normal_(0, 0.02)
    out = like.new_empty(geometry.hidden, heads * geometry.head_dim).normal_(0, 0.02)
    owner = [head * kv_heads // heads for head in range(heads)]
    return SinkPrunedAttention(qkv, out, geometry.head_dim, list(range(heads)), owner)


def _mlp(geometry: Geometry, channels: int, like: torch.Tensor) -> nn.Module:
    gate_up = like.new_empty(2 * channels, geometry.hidden).normal_(0, 0.02)
    return CompactMLP(gate_up, like.new_empty(geometry.hidden, channels).normal_(0, 0.02))


def _time(calls: dict[str, Any], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each call: the first one's median, divided by the ratios within rounds."""
    timings, ratios = interleaved(calls, repeats=rounds, device=device)
    first = timings[next(iter(calls))].median / 1e3
    return {name: first / ratio for name, ratio in ratios.items()}
