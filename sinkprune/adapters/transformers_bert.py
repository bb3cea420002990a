"""BERT and transformers encoders of its tree."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.transformers_attention import TransformersAdapter
from sinkprune.models.block_causal import positions_of


@register_adapter
class TransformersBert(TransformersAdapter):
    """``encoder.layer.{i}.attention.self.{query,key,value}``, ``attention.output.dense``, and an MLP of two
    matrices: ``intermediate.dense``, ``output.dense``."""

    family = "transformers encoder (BERT)"
    hands_on = False  # it norms what it adds to
    facts = Facts("BERT", export="channels alone: num_attention_heads fixes the width of a head")
    head_dim_name = "attention_head_size"
    mlp_matrices = 2

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Logits as in ``Adapter.predict``; absolute positions count from a sequence's first token."""
        if attention_mask is None:
            return super().predict(input_ids, attention_mask, rows)
        positions = positions_of(attention_mask).clamp(min=0)
        output = self.model(input_ids, attention_mask=attention_mask, position_ids=positions)
        return cast(Tensor, output.logits)[:, rows]

    @staticmethod
    def layers_of(model: nn.Module) -> nn.ModuleList:
        for root in (model, getattr(model, str(model.base_model_prefix), None)):
            layers = getattr(getattr(root, "encoder", None), "layer", None)
            if isinstance(layers, nn.ModuleList):
                return layers
        return nn.ModuleList()

    @staticmethod
    def fits(block: nn.Module) -> bool:
        try:
            attention = block.get_submodule("attention.self")
            for name in ("attention.output.dense", "intermediate.dense", "output.dense"):
                block.get_submodule(name)
        except AttributeError:
            return False
        return all(name in cast(nn.Module, attention)._modules for name in _QKV)

    def attention_of(self, block: nn.Module) -> nn.Module:
        return block.get_submodule("attention.self")

    def projections_of(self, block: nn.Module) -> dict[str, nn.Module]:
        attention = self.attention_of(block)
        found = {role: attention.get_submodule(name) for role, name in zip("qkv", _QKV, strict=True)}
        return found | {"o": block.get_submodule("attention.output.dense")}

    def mlp_of(self, block: nn.Module) -> dict[str, nn.Module]:
        return {
            "up": block.get_submodule("intermediate.dense"),
            "down": block.get_submodule("output.dense"),
        }


_QKV = ("query", "key", "value")
