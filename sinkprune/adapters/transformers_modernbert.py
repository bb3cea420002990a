"""ModernBERT: fused projections, gated MLPs, and sliding windows in most layers."""

from __future__ import annotations

from torch import nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.transformers_attention import TransformersAdapter


@register_adapter
class TransformersModernBert(TransformersAdapter):
    """``layers.{i}.attn.{Wqkv,Wo}`` and ``layers.{i}.mlp.{Wi,Wo}``, whose ``Wi`` is gate and up in one."""

    family = "transformers encoder (ModernBERT)"
    hands_on = False  # what it does depends on its number
    facts = Facts("ModernBERT", export="channels alone: num_attention_heads fixes the width of a head")

    @staticmethod
    def fits(block: nn.Module) -> bool:
        attention, mlp = block._modules.get("attn"), block._modules.get("mlp")
        return (
            attention is not None
            and mlp is not None
            and {"Wqkv", "Wo"} <= set(attention._modules)
            and {"Wi", "Wo"} <= set(mlp._modules)
            and hasattr(attention, "head_dim")
        )

    def attention_of(self, block: nn.Module) -> nn.Module:
        return block.get_submodule("attn")

    def projections_of(self, block: nn.Module) -> dict[str, nn.Module]:
        return {"qkv": block.get_submodule("attn.Wqkv"), "o": block.get_submodule("attn.Wo")}

    def mlp_of(self, block: nn.Module) -> dict[str, nn.Module]:
        return {"gate_up": block.get_submodule("mlp.Wi"), "down": block.get_submodule("mlp.Wo")}
