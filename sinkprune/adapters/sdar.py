"""The native SDAR of ``sinkprune.models.sdar``."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn

from sinkprune.adapters.base import AttentionWeights, Facts, Geometry, register_adapter
from sinkprune.adapters.block_causal import NativeBlockCausal
from sinkprune.models.sdar import SDAR, SDARAttention


@register_adapter
class NativeSDAR(NativeBlockCausal):
    """Compact modules take the place of ``layer.self_attn`` and ``layer.mlp``."""

    family = "sdar"
    facts = Facts("SDAR-1.7B, 4B, 8B")
    model: SDAR
    ATTENTION: ClassVar[dict[str, str]] = {role: f"self_attn.{role}_proj" for role in "qkvo"}

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return isinstance(model, SDAR)

    def geometry(self) -> Geometry:
        config = self.model.config
        layers = config.num_hidden_layers
        return Geometry(
            family=self.family,
            hidden=config.hidden_size,
            head_dim=config.width,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            heads=(config.num_attention_heads,) * layers,
            kv_heads=(config.kv_heads,) * layers,
            channels=(config.intermediate_size,) * layers,
        )

    def attention_of(self, layer: int) -> nn.Module:
        return self.model.layers[layer].get_submodule("self_attn")

    def attention_weights(self, layer: int) -> AttentionWeights:
        dense = cast(SDARAttention, self.attention_of(layer))
        return AttentionWeights(
            dense.q_proj.weight, dense.k_proj.weight, dense.v_proj.weight, dense.o_proj.weight,
            dense.q_proj.bias, dense.k_proj.bias, dense.v_proj.bias, dense.o_proj.bias,
            dense.q_norm, dense.k_norm,
        )  # fmt: skip

    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        block = self.model.layers[layer]
        if attention is not None:
            block.self_attn = attention
        if mlp is not None:
            block.mlp = mlp
