"""What ``sparsify`` leaves on a model, and a checkpoint's manifest keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from sinkprune.adapters import adapter_for
from sinkprune.evidence.calibration import linear


@dataclass(frozen=True)
class Sparsity:
    """How a model's weights were pruned. The mask itself is in the weights: what was removed is exactly 0.

    Attributes:
        method, sparsity, pattern: as ``sparsify`` was called.
        solves: linear layers (``"layer.role"``) whose Hessian was not positive definite in float32 with the
            usual damping, and the precision and damping (as a share of the mean diagonal) that solved it.
    """

    method: str
    sparsity: float
    pattern: str = "unstructured"
    solves: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sparsity:
        """Raises ``ValueError`` where ``values`` is not such a note."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"malformed sparsity note: {error}") from error


def sparsity_of(model: nn.Module) -> dict[str, float]:
    """Share of exact zeros in each linear layer of a dense-form model's blocks, by ``"layer.role"``."""
    adapter = adapter_for(model)
    return {
        f"{layer}.{role}": 1 - linear(module).weight.count_nonzero().item() / linear(module).weight.numel()
        for layer in range(adapter.geometry().num_layers)
        for role, module in adapter.linears(layer).items()
    }
