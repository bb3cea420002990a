"""LLaDA2: the native one, and live objects of the published code and its copies (dInfer's, …)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.live_layers import BlockCausalLayers, calls_attention, layers_of
from sinkprune.adapters.native import NativeBlockCausal
from sinkprune.models.llada2 import LLaDA2


@register_adapter
class NativeLLaDA2(NativeBlockCausal):
    """``Geometry.channels`` of a layer with experts counts those that a token passes through."""

    family = "llada2_moe"
    facts = Facts(
        "LLaDA2.0-mini, -flash",
        channels="of dense layers, and of experts",
        blocks="attention alone: blocks with experts stay",
    )
    MODEL = LLaDA2
    site = "attention"
    attention_names: ClassVar[dict[str, str]] = {"qkv": "attention.query_key_value", "o": "attention.dense"}
    norm_names = ("query_layernorm", "key_layernorm")
    sizes: ClassVar[dict[str, str]] = NativeBlockCausal.sizes | {
        "channels": "layer_channels",
        "experts": "experts",
    }


_COUNTS = ("num_heads", "num_key_value_heads", "num_key_value_groups", "head_dim")


@register_adapter
class LLaDA2Layers(BlockCausalLayers):
    """``model.model.layers`` with a fused ``attention.query_key_value`` and experts.

    Plans of the native LLaDA2 fit, and its plans fit there.
    """

    family = "llada2_moe"
    facts = Facts(
        "LLaDA2.0-mini, -flash, copies (dInfer's)",
        channels="dense layers only; experts keep theirs",
        blocks="attention alone: blocks with experts stay",
    )
    site = "attention"
    attention_names: ClassVar[dict[str, str]] = {"qkv": "query_key_value", "o": "dense"}
    norm_names: ClassVar[tuple[str, ...]] = ("query_layernorm", "key_layernorm")
    default_block = 32

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        names = (*cls.attention_names.values(), *cls.norm_names)
        layers = layers_of(model)
        return bool(layers) and all(
            calls_attention(getattr(layer, "attention", None), names, _COUNTS) for layer in layers
        )

    def channels(self, layer: int) -> int:
        config = self._config
        if self._mlp(layer):
            return int(config.intermediate_size)
        experts = config.num_experts_per_tok + (config.num_shared_experts or 0)
        return int(experts * config.moe_intermediate_size)

    def check(self, kept_heads: list[list[int]], kept_channels: list[list[int] | None], mode: str) -> None:
        for layer, site in enumerate(self.sites()):
            if getattr(site, "tp_size", 1) > 1:
                raise ValueError(
                    f"layer {layer} is a tensor-parallel shard: prune the whole model, then shard it"
                )
        super().check(kept_heads, kept_channels, mode)
