"""Where sinks form while a model denoises: ``profile`` real trajectories into a ``SinkProfile``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm

from sinkprune.adapters import Adapter, Geometry, adapter_for
from sinkprune.generation import denoise, encode_prompts
from sinkprune.sinks import SinkGate, SinkStatistics
from sinkprune.tracking import track
from sinkprune.version import __version__

SCHEMA = 1
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
