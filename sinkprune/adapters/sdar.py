"""The native SDAR of ``sinkprune.models.sdar``."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn

from sinkprune.adapters.base import AttentionWeights, Facts, modules_of, register_adapter, tensors_of
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
        tensors = tensors_of(modules_of(self.layer_of(layer), self.ATTENTION), layer)
        return AttentionWeights(**tensors, q_norm=dense.q_norm, k_norm=dense.k_norm)
