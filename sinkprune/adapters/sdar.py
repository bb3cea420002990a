"""SDAR: live objects of the published code and its copies. The native one is a line of ``decoders.py``."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.live_layers import BlockCausalLayers, calls_attention, layers_of

_COUNTS = ("num_attention_heads", "num_key_value_heads", "num_key_value_groups", "head_dim")


@register_adapter
class SDARLayers(BlockCausalLayers):
    """``model.model.layers`` of a Qwen3 tree whose attention takes the mask of blocks.

    Where nothing is hidden the upstream code calls FlashAttention, elsewhere PyTorch's: ours replaces both.
    Plans of the native SDAR fit, and its plans fit there.
    """

    family = "sdar"
    facts = Facts("SDAR-1.7B, 4B, 8B")
    norm_names: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")
    default_block = 4

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        names = (*cls.attention_names.values(), *cls.norm_names)
        layers = layers_of(model)
        return bool(layers) and all(
            calls_attention(getattr(layer, "self_attn", None), names, _COUNTS) for layer in layers
        )

    def resize(self, site: nn.Module, heads: int, kv_heads: int, group: int) -> None:
        attention = cast(Any, site)
        attention.num_attention_heads, attention.num_key_value_heads = heads, kv_heads
        attention.num_key_value_groups = group
