"""ALBERT, which is refused by name: one set of weights serves all its layers."""

from __future__ import annotations

from torch import nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.transformers_attention import TransformersAdapter, is_transformers_model


@register_adapter
class TransformersAlbert(TransformersAdapter):
    """Recognised, so that the refusal can say why."""

    family = "transformers encoder with shared layers (ALBERT, refused)"
    facts = Facts(
        "ALBERT",
        **dict.fromkeys(("mask", "compact", "channels", "blocks", "export"), "no: its layers are one layer"),
    )

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return is_transformers_model(model) and any(
            name.rpartition(".")[2] == "albert_layer_groups" for name, _ in model.named_modules()
        )

    def __init__(self, model: nn.Module) -> None:
        raise TypeError(
            f"{type(model).__name__} runs the same layer weights at every depth (ALBERT's shared "
            "layers): its heads have no statistics of their own per layer, and pruning one prunes all"
        )

    def attention_of(self, block: nn.Module) -> nn.Module:
        raise NotImplementedError

    def projections_of(self, block: nn.Module) -> dict[str, nn.Module]:
        raise NotImplementedError
