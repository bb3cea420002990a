"""The native SDAR of ``sinkprune.models.sdar``."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn

from sinkprune.adapters.base import AttentionWeights, Facts, register_adapter
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

    def channels_of(self, layer: int) -> int:
        return self.model.config.intermediate_size

    def attention_weights(self, layer: int) -> AttentionWeights:
        dense = cast(SDARAttention, self.attention_of(layer))
        return AttentionWeights(
            dense.q_proj.weight, dense.k_proj.weight, dense.v_proj.weight, dense.o_proj.weight,
            dense.q_proj.bias, dense.k_proj.bias, dense.v_proj.bias, dense.o_proj.bias,
            dense.q_norm, dense.k_norm,
        )  # fmt: skip
