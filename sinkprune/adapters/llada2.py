"""The native LLaDA2 of ``sinkprune.models.llada2``."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn

from sinkprune.adapters.base import AttentionWeights, Facts, Geometry, register_adapter
from sinkprune.adapters.block_causal import NativeBlockCausal
from sinkprune.models.llada2 import LLaDA2, LLaDA2Attention


@register_adapter
class NativeLLaDA2(NativeBlockCausal):
    """Compact modules take the place of ``layer.attention`` and, where it is dense, ``layer.mlp``.

    Experts keep their channels; ``Geometry.channels`` counts those that a token passes through.
    """

    family = "llada2_moe"
    facts = Facts("LLaDA2.0-mini, -flash", channels="dense layers only; experts keep theirs")
    model: LLaDA2
    ATTENTION: ClassVar[dict[str, str]] = {"qkv": "attention.query_key_value", "o": "attention.dense"}

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return isinstance(model, LLaDA2)

    def geometry(self) -> Geometry:
        config = self.model.config
        layers, dense = config.num_hidden_layers, config.first_k_dense_replace
        active = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_width
        return Geometry(
            family=self.family,
            hidden=config.hidden_size,
            head_dim=config.width,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            heads=(config.num_attention_heads,) * layers,
            kv_heads=(config.kv_heads,) * layers,
            channels=tuple(config.intermediate_size if i < dense else active for i in range(layers)),
        )

    def attention_of(self, layer: int) -> nn.Module:
        return self.model.layers[layer].get_submodule("attention")

    def attention_weights(self, layer: int) -> AttentionWeights:
        dense = cast(LLaDA2Attention, self.attention_of(layer))
        rows = [heads * dense.head_dim for heads in dense.split]
        fused = dense.query_key_value
        q, k, v = fused.weight.split(rows)
        q_bias, k_bias, v_bias = (None,) * 3 if fused.bias is None else fused.bias.split(rows)
        return AttentionWeights(
            q, k, v, dense.dense.weight, q_bias, k_bias, v_bias, dense.dense.bias,
            dense.query_layernorm, dense.key_layernorm,
        )  # fmt: skip

    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        block = self.model.layers[layer]
        if attention is not None:
            block.attention = attention
        if mlp is not None:
            block.mlp = mlp
