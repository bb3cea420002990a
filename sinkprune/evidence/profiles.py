"""Sink statistics of a model over denoising trajectories, on disk and in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.files import require_regular, write_whole
from sinkprune.plans import Geometry
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
        """Write ``to_bytes``, atomically."""
        write_whole(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """One safetensors file, its description in the header as JSON."""
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
        return save(contiguous, metadata={"sink_profile": json.dumps(description)})

    @classmethod
    def load(cls, path: str | Path) -> SinkProfile:
        """Read what ``save`` wrote. Raises ``ValueError`` for anything else."""
        data = require_regular(path).read_bytes()
        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            description = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["sink_profile"])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
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
