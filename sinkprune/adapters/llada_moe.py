"""The published LLaDA-MoE code and its copies (dInfer's, …), as live objects."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.live_layers import LiveLayers, calls_attention, layers_of

_COUNTS = ("num_heads", "num_key_value_heads", "num_key_value_groups", "head_dim", "hidden_size")


@register_adapter
class LLaDAMoELayers(LiveLayers):
    """``model.model.layers`` of a bidirectional tree with a norm of each head's queries and keys.

    A row of its logits is about its own token, and it takes no cache.
    """

    family = "llada_moe"
    facts = Facts(
        "LLaDA-MoE-7B-A1B",
        channels="dense layers only; experts keep theirs",
        blocks="attention alone: blocks with experts stay",
    )
    norm_names: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        names = (*cls.attention_names.values(), *cls.norm_names)
        layers = layers_of(model)
        return bool(layers) and all(
            calls_attention(getattr(layer, "self_attn", None), names, _COUNTS)
            and not getattr(layer.self_attn, "is_causal", False)
            for layer in layers
        )

    def channels(self, layer: int) -> int:
        config = self._config
        if self._mlp(layer):
            return int(config.dense_intermediate_size)
        shared = config.shared_expert_intermediate_size or 0
        return int(config.expert_intermediate_size * config.num_experts_per_tok + shared)
