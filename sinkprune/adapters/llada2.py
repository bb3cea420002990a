"""LLaDA2: the native one, and live objects of the published code and its copies (dInfer's, …)."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn

from sinkprune.adapters.base import AttentionWeights, Facts, register_adapter
from sinkprune.adapters.live_layers import BlockCausalLayers, calls_attention, layers_of
from sinkprune.adapters.native import NativeBlockCausal
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


_COUNTS = ("num_heads", "num_key_value_heads", "num_key_value_groups", "head_dim")


@register_adapter
class LLaDA2Layers(BlockCausalLayers):
    """``model.model.layers`` with a fused ``attention.query_key_value`` and experts.

    Plans of the native LLaDA2 fit, and its plans fit there.
    """

    family = "llada2_moe"
    facts = Facts(
        "LLaDA2.0-mini, -flash, copies (dInfer's)", channels="dense layers only; experts keep theirs"
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
