"""The published RND1 code, as live objects."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.live_layers import LiveLayers, calls_attention, layers_of
from sinkprune.adapters.native import shifted_rows

_COUNTS = ("num_heads", "num_key_value_heads", "num_key_value_groups", "head_dim")


@register_adapter
class RND1Layers(LiveLayers):
    """``model.model.layers`` of a bidirectional Qwen3-MoE tree whose logits are of the next token.

    Its attention calls PyTorch's under "sdpa" alone, so no other implementation is recognised.
    """

    family = "rnd1"
    facts = Facts(
        "RND1-Base",
        channels="no: every layer has experts, which keep theirs",
        blocks="attention alone: blocks with experts stay",
    )
    shift = 1
    norm_names: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        names = (*cls.attention_names.values(), *cls.norm_names)
        layers = layers_of(model)
        plain = getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa"
        return (
            bool(layers)
            and plain
            and all(
                calls_attention(getattr(layer, "self_attn", None), names, _COUNTS)
                and not getattr(layer.self_attn, "is_causal", False)
                and not hasattr(layer.self_attn, "hidden_size")
                for layer in layers
            )
        )

    def channels(self, layer: int) -> int:
        config = self._config
        return int(config.num_experts_per_tok * config.moe_intermediate_size)

    def linears(self, layer: int) -> dict[str, nn.Module]:
        return self.attention_linears(layer)

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        return super().predict(input_ids, attention_mask)[:, shifted_rows(input_ids, rows)]

    def resize(self, site: nn.Module, heads: int, kv_heads: int, group: int) -> None:
        attention = cast(Any, site)
        attention.num_heads, attention.num_key_value_heads = heads, kv_heads
        attention.num_key_value_groups = group
