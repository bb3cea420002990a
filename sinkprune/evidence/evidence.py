"""What criteria look at: a profile, calibration rows, what flows through the model on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sinkprune.adapters import Adapter

if TYPE_CHECKING:
    from sinkprune.evidence.activations import LayerActivations
    from sinkprune.evidence.calibration import Calibration
    from sinkprune.evidence.profiles import SinkProfile


@dataclass
class Evidence:
    """What a criterion may look at besides the weights.

    Attributes:
        profile: sink statistics of denoising trajectories, or None.
        calibration: masked rows, or None.
        seed: for criteria that draw.
    """

    profile: SinkProfile | None = None
    calibration: Calibration | None = None
    seed: int = 0
    _activations: Sequence[LayerActivations] | None = field(default=None, repr=False)

    def activations(self, adapter: Adapter) -> Sequence[LayerActivations]:
        """What flows through the model on the calibration rows: one forward of each, however many ask."""
        from sinkprune.evidence.activations import gather

        if self.calibration is None:
            raise ValueError("activations need calibration rows")
        if self._activations is None:
            self._activations = gather(adapter, self.calibration)
        return self._activations
