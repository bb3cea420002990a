"""Dream: the native one, and live objects of the published Dream and DiffuCoder code and its copies
(Fast-dLLM's, …)."""

from __future__ import annotations

from torch import Tensor, nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.live_layers import LiveLayers, calls_attention, layers_of
from sinkprune.adapters.native import NativeAdapter, shifted_rows
from sinkprune.models.dream import Dream, DreamConfig


@register_adapter
class NativeDream(NativeAdapter):
    family = "dream"
    facts = Facts("Dream-7B, DiffuCoder", export="yes; heads with a modelling file of ours")
    shift = 1
    MODEL, CONFIG = Dream, DreamConfig


_COUNTS = ("num_heads", "num_key_value_heads", "num_key_value_groups", "head_dim", "hidden_size")


@register_adapter
class DreamLayers(LiveLayers):
    """``model.model.layers`` of a bidirectional Qwen2 tree whose logits are a token late, as Dream's are.

    Plans of the native Dream fit, and its plans fit there.
    """

    family = "dream"
    facts = Facts("Dream-7B, DiffuCoder, copies (Fast-dLLM's)")
    shift = 1

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        layers = layers_of(model)
        return bool(layers) and all(_is_dream(getattr(layer, "self_attn", None)) for layer in layers)

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        return super().predict(input_ids, attention_mask)[:, shifted_rows(input_ids, rows)]


def _is_dream(attention: nn.Module | None) -> bool:
    """LLaDA-MoE and SDAR, which predict in place, norm each head's queries; iLLaDA has no biases."""
    return (
        calls_attention(attention, DreamLayers.attention_names.values(), _COUNTS)
        and not getattr(attention, "is_causal", False)
        and not hasattr(attention, "q_norm")
        and getattr(getattr(attention, "q_proj", None), "bias", True) is not None
    )
