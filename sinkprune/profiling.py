"""Where sinks form while a model denoises: ``track`` any loop, or ``profile`` real trajectories into a
``SinkProfile``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm

from sinkprune import ops
from sinkprune.adapters import Adapter, Geometry, adapter_for
from sinkprune.adapters.base import is_compiled
from sinkprune.generation import denoise, encode_prompts
from sinkprune.modules import AttentionCall
from sinkprune.sinks import SinkGate, SinkStatistics, SinkTracker
from sinkprune.version import __version__

SCHEMA = 1
MOST_KEYS = 8192  # keys that a tracker makes room for unasked
FAR = 3  # positions: the paper's headline counts heads whose sink moves further than this


@dataclass
class SinkProfile:
    """Sink statistics of a model over denoising trajectories.

    ``statistics`` maps a name to a float32 tensor ``[L, S, H]`` (layers, samples, most heads of a layer):

    | name | meaning (over the counted steps of a trajectory) |
    |---|---|
    | ``steps_counted`` | steps on which the head had a sink |
    | ``position_mean``, ``position_variance``, ``position_range`` | of the sink position, in tokens (tokens²,
    tokens) |
    | ``moves``, ``mean_move`` | number of moves; mean of the absolute move, zero moves included, in tokens |
    | ``mass``, ``margin``, ``fair_shares`` | means of the sink mass, of its lead over the runner-up, of mass
    x valid keys |
    | ``gated_…`` | the same position statistics over the steps on which the sink stands out (``gate``) |

    Entries of heads that a layer does not have, or of trajectories without a counted step, are NaN in the
    means and 0 in the counts. ``trace_positions`` int16 and ``trace_mass`` float16, ``[steps, L, H]``, are
    those of the first sample (-1 = no sink).
    """

    geometry: Geometry
    fingerprint: str
    heads: list[list[int]]  # per layer, the original ids of the heads in columns 0, 1, ...
    statistics: dict[str, Tensor]
    trace_positions: Tensor
    trace_mass: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of a trajectory."""
        return self.trace_positions.shape[0]

    @property
    def samples(self) -> int:
        return self.statistics["moves"].shape[1]

    def head_mean(self, name: str) -> Tensor:
        """A statistic averaged over samples: float32 ``[L, H]``; samples without a counted step do not
        count."""
        return self.statistics[name].nanmean(1).nan_to_num(0.0)

    def moving_share(self, *, further_than: float = FAR, gated: bool = False) -> float:
        """Share of heads whose sink moves further than ``further_than`` positions: its range, mean over
            samples.

        Gated, a head that never has a sink that stands out does not move.
        """
        prefix = "gated_" if gated else ""
        moved = self.head_mean(f"{prefix}position_range") > further_than
        present = self._present()
        return (moved & present).sum().item() / max(1, int(present.sum()))

    def sink_share(self, *, least: float = 0.5) -> float:
        """Share of heads whose sink stands out (``gate``) on at least ``least`` of the counted steps."""
        gated, counted = self.statistics["gated_steps_counted"], self.statistics["steps_counted"]
        share = gated.sum(1) / counted.sum(1).clamp(min=1)
        present = self._present()
        return ((share >= least) & present).sum().item() / max(1, int(present.sum()))

    def _present(self) -> Tensor:
        """Bool ``[L, H]``: which entries are heads that exist."""
        widths = torch.tensor([len(heads) for heads in self.heads])
        return torch.arange(self.statistics["moves"].shape[-1]) < widths[:, None]

    def summary(self) -> dict[str, Any]:
        """The figures of the report: JSON-ready."""
        return {
            "steps": self.steps,
            "samples": self.samples,
            "heads_moving_over_3": self.moving_share(),
            "heads_moving_over_3_gated": self.moving_share(gated=True),
            "heads_with_a_sink": self.sink_share(),
            "mean_sink_mass": self.statistics["mass"].nanmean().item(),
            "settings": self.settings,
        }

    def check_model(self, adapter: Adapter) -> None:
        """Raise ``ValueError`` unless this profile was taken of ``adapter``'s model."""
        if self.geometry != adapter.geometry():
            raise ValueError(f"the profile is of {self.geometry}, the model is {adapter.geometry()}")
        if self.fingerprint != adapter.fingerprint():
            raise ValueError(
                "the profile was taken of other weights: its fingerprint differs from the model's"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, its description in the header as JSON; atomically."""
        path = Path(path)
        description = {
            "schema": SCHEMA,
            "kind": "sink_profile",
            "sinkprune": __version__,
            "geometry": self.geometry.to_dict(),
            "fingerprint": self.fingerprint,
            "heads": self.heads,
            "settings": self.settings,
        }
        tensors = {**self.statistics, "trace_positions": self.trace_positions, "trace_mass": self.trace_mass}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        part = path.with_name(path.name + ".part")
        try:
            part.write_bytes(save(contiguous, metadata={"sink_profile": json.dumps(description)}))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> SinkProfile:
        """Read what ``save`` wrote. Raises ``ValueError`` for anything else."""
        data = Path(path).read_bytes()
        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            description = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["sink_profile"])
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a sink profile: {error}") from error
        if description.get("schema") != SCHEMA:
            raise ValueError(
                f"{path}: expected a sink profile of schema {SCHEMA}, got {description.get('schema')!r}"
            )
        try:
            return cls(
                geometry=Geometry.from_dict(description["geometry"]),
                fingerprint=description["fingerprint"],
                heads=description["heads"],
                trace_positions=tensors.pop("trace_positions"),
                trace_mass=tensors.pop("trace_mass"),
                statistics=tensors,
                settings=description["settings"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: malformed sink profile: {error}") from error


class ModelTracker:
    """The ``SinkTracker`` of a model inside ``track``: made at the first forward, when the batch size is
        known.

    Every forward of the model is one step.
    """

    def __init__(
        self,
        adapter: Adapter,
        samples: int | None,
        every: int,
        max_keys: int | None,
        options: dict[str, Any],
    ) -> None:
        self._max_keys = min(adapter.geometry().context, MOST_KEYS) if max_keys is None else max_keys
        self._adapter, self._samples, self._every, self._options = adapter, samples, every, options
        self._heads = [len(adapter.kept_heads(i)) for i in range(adapter.geometry().num_layers)]
        if adapter.form == "mask":
            self._heads = list(adapter.geometry().heads)
        self._phase = (
            0  # forwards since the last one looked at; at most `every` values, so few recompilations
        )
        self._forwards: Tensor | None = None  # int64 on the device, so that a graph can count
        self._positions: tuple[Tensor, Tensor] | None = None  # of the padding mask they were made from
        self._seen: tuple[Tensor | None, int] | None = None
        self.tracker: SinkTracker | None = None

    @property
    def steps(self) -> int:
        """Forwards seen so far."""
        return 0 if self._forwards is None else int(self._forwards)

    def result(self) -> SinkStatistics:
        """The statistics so far. Raises ``RuntimeError`` before the first forward."""
        if self.tracker is None:
            raise RuntimeError("nothing was tracked: run the model inside sp.track(...)")
        return self.tracker.result()

    def reset(self) -> None:
        if self.tracker is not None:
            self.tracker.reset()
        if self._forwards is not None:
            self._forwards.zero_()
        self._phase = 0

    def observe(self, layer: int, call: AttentionCall) -> None:
        """Write one layer's column mass into the tracker."""
        if self._phase:
            return
        samples = call.query.shape[0] if self._samples is None else self._samples
        length = call.key.shape[2]
        if self.tracker is None:
            self._forwards = torch.zeros((), dtype=torch.int64, device=call.query.device)
            self.tracker = SinkTracker(
                len(self._heads),
                self._heads,
                samples,
                self._max_keys,
                call.query.device,
                **self._options,
            )
        if (
            samples != self.tracker.batch_size
            or call.query.shape[0] < samples
            or length > self.tracker.max_keys
        ):
            raise ValueError(
                f"inside one track, forwards must have {self.tracker.batch_size} samples of at most "
                f"{self.tracker.max_keys} keys, got {call.query.shape[0]} of {length}; open a new "
                "track (max_keys= makes room)"
            )
        mask = None if call.key_padding_mask is None else call.key_padding_mask[:samples]
        self._seen = (mask, length)
        room = self.tracker.mass[layer]
        in_place = room.device == call.query.device and call.mask is None
        if call.mask is not None:
            mass = masked_column_mass(call, self._counted_queries(call, samples), samples)
        else:
            mass = ops.column_mass(
                call.query[:samples],
                call.key[:samples],
                None if call.lse is None else call.lse[:samples],
                kept_heads=call.kept_heads,
                kv_head_of=call.kv_head_of,
                key_padding_mask=mask,
                block_size=call.block_size,
                query_positions=self._counted_queries(call, samples),
                key_positions=None if call.key_positions is None else call.key_positions[:samples],
                scale=call.scale,
                out=room if in_place else None,
            )
        if not in_place:  # a layer on another device of a device map, or a mask of its own
            room[:, :, :length] = mass
            room[:, :, length:] = 0

    def _counted_queries(self, call: AttentionCall, samples: int) -> Tensor | None:
        """The call's query positions, or those of the valid tokens where queries are the keys' own tokens."""
        if call.query_positions is not None:
            return call.query_positions[:samples]
        if call.key_padding_mask is None or call.query.shape[2] != call.key.shape[2]:
            return None
        if self._positions is None or self._positions[0] is not call.key_padding_mask:
            mask = call.key_padding_mask[:samples]
            index = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
            self._positions = (call.key_padding_mask, torch.where(mask, index, -1))
        return self._positions[1]

    def end_step(self) -> None:
        """Fold the step's masses into the statistics."""
        if self._seen is not None and self.tracker is not None:
            mask, length = self._seen
            mask = None if mask is None else mask.to(self.tracker.device)
            self.tracker.end_step(key_padding_mask=mask, num_keys=length)
            self._seen = None
        if self._forwards is not None:
            self._forwards += 1
            self._phase = (self._phase + 1) % self._every


def masked_column_mass(call: AttentionCall, query_positions: Tensor | None, samples: int) -> Tensor:
    """The column mass of a call with any other mask: float32 ``[samples, H, Lk]``, from probabilities of one
    head at a time.

    The mean over the queries that see a key and are not padded (``query_positions`` -1).
    """
    query, key, mask = call.query[:samples].float(), call.key[:samples].float(), call.mask
    assert mask is not None
    heads, group = query.shape[1], query.shape[1] // max(1, key.shape[1])
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    owner = [head // group for head in range(heads)] if call.kv_head_of is None else call.kv_head_of.tolist()
    mask = mask.expand(query.shape[0] if mask.shape[0] == 1 else mask.shape[0], *mask.shape[1:])[:samples]
    mass = query.new_zeros(samples, heads, key.shape[2])
    for head in range(heads) if call.kept_heads is None else call.kept_heads.tolist():
        scores = query[:, head] @ key[:, owner[head]].mT * scale  # [samples, Lq, Lk]
        layer_mask = mask[:, min(head, mask.shape[1] - 1)]
        if layer_mask.dtype != torch.bool:
            scores, layer_mask = scores + layer_mask, layer_mask > torch.finfo(layer_mask.dtype).min / 2
        counted = layer_mask.any(-1).expand(scores.shape[:2])
        if query_positions is not None:
            counted = counted & (query_positions >= 0)
        weights = scores.masked_fill(~layer_mask, -torch.inf).softmax(-1).masked_fill(~counted[..., None], 0)
        mass[:, head] = weights.sum(1) / counted.sum(1, keepdim=True).clamp(min=1)
    return mass


@contextmanager
def track(
    model: nn.Module,
    *,
    samples: int | None = None,
    every: int = 1,
    max_keys: int | None = None,
    gate: SinkGate | None = None,
    trace: bool = False,
    max_steps: int = 1024,
) -> Iterator[ModelTracker]:
    """Gather sink statistics of every forward inside the ``with``; everything is as before outside it.

        with sp.track(model) as tracker:
            for x in my_sampler(model, prompt): ...
        statistics = tracker.result()

    Args:
        model: of a known family, dense, masked or compact.
        samples: leading rows of the batch to follow (under classifier-free guidance: the conditional half);
            None = all.
        every: look at every ``every``-th forward only.
        max_keys: longest key length to make room for; None = the model's context, at most 8192.
        gate: when a sink counts as standing out.
        trace, max_steps: also keep each step's positions and masses.

    Raises:
        RuntimeError: the model is being tracked already, or is compiled (hooks added after compilation never
            fire).
    """
    if is_compiled(model):
        raise RuntimeError("the model is compiled: track the original model first, then compile it")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    adapter = adapter_for(model)
    if adapter.observed():
        raise RuntimeError("the model is being tracked already; nested tracks are not supported")
    tracker = ModelTracker(
        adapter, samples, every, max_keys, {"gate": gate, "trace": trace, "max_steps": max_steps}
    )
    hook = adapter.step_module.register_forward_hook(lambda module, inputs, output: tracker.end_step())
    adapter.observe(tracker.observe)
    try:
        yield tracker
    finally:
        adapter.observe(None)
        hook.remove()


def profile(
    model: nn.Module,
    prompts: str | list[str] | Tensor,
    *,
    tokenizer: Any = None,
    steps: int = 64,
    gen_length: int = 128,
    batch: int = 8,
    gate: SinkGate | None = None,
    progress: bool = False,
    **options: Any,
) -> SinkProfile:
    """Run the sampler on ``prompts`` and gather every head's sink statistics over the real trajectories.

    Args:
        model: of a known family.
        prompts: strings (with ``tokenizer``), or ids int64 ``[S, P]``.
        steps, gen_length: of the sampler; ``options`` are the rest of ``denoise``'s.
        batch: trajectories that run together.
        gate: when a sink counts as standing out.
        progress: show a bar.

    Raises:
        ValueError: what ``denoise`` raises.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Tensor):
        ids, valid = prompts, torch.ones_like(prompts)
    else:
        ids, valid = encode_prompts(tokenizer, list(prompts))
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"prompts must be ids [S, P] with S, P >= 1, got {tuple(ids.shape)}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    adapter = adapter_for(model)
    device = next(model.parameters()).device
    parts: list[SinkStatistics] = []
    padding: list[Tensor] = []  # on the left of each sample, so that positions count from its first token
    with tqdm(
        total=steps * -(-len(ids) // batch), desc="profiling", unit="step", disable=not progress
    ) as bar:
        for first in range(0, len(ids), batch):
            rows, mask = ids[first : first + batch].to(device), valid[first : first + batch].to(device)
            narrow = int(mask.any(0).float().argmax())  # padding that this part of the batch does not need
            room = steps + gen_length  # a threshold, or a prompt within a block, takes other than `steps`
            with track(model, samples=len(rows), gate=gate, trace=True, max_steps=room) as tracker:
                rows, mask = rows[:, narrow:], mask[:, narrow:]
                stream = adapter.sample(rows, mask, steps, gen_length, options)
                if stream is None:
                    stream = denoise(model, rows, mask, steps=steps, gen_length=gen_length, **options)
                for _ in stream:
                    bar.update()
            parts.append(tracker.result())
            padding.append((mask.cumsum(1) == 0).sum(1))
    used = gate or SinkGate()
    said = {name: getattr(value, "name", value) for name, value in options.items() if name != "callback"}
    settings = {"steps": steps, "gen_length": gen_length, "prompts": len(ids), **said}
    settings["gate"] = {"fair_share": used.fair_share, "sigma": used.sigma}
    first_part = parts[0]
    assert first_part.trace_positions is not None and first_part.trace_mass is not None
    trace = first_part.trace_positions[:, :, 0]
    heads = [adapter.kept_heads(i) for i in range(adapter.geometry().num_layers)]
    result = SinkProfile(
        geometry=adapter.geometry(),
        fingerprint=adapter.fingerprint(),
        heads=heads,
        statistics=_collect(parts, padding),
        trace_positions=(trace - padding[0][0]).clamp(min=-1).to(torch.int16).cpu(),
        trace_mass=first_part.trace_mass[:, :, 0].half().cpu(),
        settings=settings,
    )
    if adapter.form == "mask":
        result.statistics = {name: _kept_columns(v, heads) for name, v in result.statistics.items()}
        result.trace_positions = _kept_columns(result.trace_positions.transpose(0, 1), heads).transpose(0, 1)
        result.trace_mass = _kept_columns(result.trace_mass.transpose(0, 1), heads).transpose(0, 1)
    return result


def _kept_columns(values: Tensor, heads: list[list[int]]) -> Tensor:
    """A masked model's ``[L, X, all heads]`` as a compact one gives it: kept heads first."""
    order = [kept + sorted(set(range(values.shape[-1])) - set(kept)) for kept in heads]
    width = max(map(len, heads))
    return torch.stack([layer[:, ids[:width]] for layer, ids in zip(values, order, strict=True)])


def _collect(parts: list[SinkStatistics], padding: list[Tensor]) -> dict[str, Tensor]:
    """Statistics of several batches side by side; ``padding`` ``[B]`` is each sample's on the left."""
    columns: dict[str, list[Tensor]] = {}
    for part, shift in zip(parts, padding, strict=True):
        counted = part.position.count > 0
        values = {"mass": part.mass, "margin": part.margin, "fair_shares": part.fair_shares}
        named = {name: value.masked_fill(~counted, torch.nan) for name, value in values.items()}
        for prefix, moments in (("", part.position), ("gated_", part.gated)):
            none = moments.count == 0
            named[f"{prefix}steps_counted"] = moments.count
            named[f"{prefix}position_mean"] = moments.mean - shift[:, None]
            named[f"{prefix}position_variance"] = moments.variance.masked_fill(none, torch.nan)
            named[f"{prefix}position_range"] = moments.range.masked_fill(none, torch.nan)
            named[f"{prefix}moves"] = moments.moves
            named[f"{prefix}mean_move"] = moments.mean_move.masked_fill(none, torch.nan)
        for name, value in named.items():
            columns.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values, dim=1) for name, values in columns.items()}
