"""The native LLaDA2 of ``sinkprune.models.llada2``."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn

from sinkprune.adapters.base import AttentionWeights, Facts, register_adapter
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

    def channels_of(self, layer: int) -> int:
        config = self.model.config
        if layer < config.first_k_dense_replace:
            return config.intermediate_size
        return config.num_experts_per_tok * config.moe_intermediate_size + config.shared_width

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
