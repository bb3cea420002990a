"""iLLaDA: the native one, and live objects of the published code."""

from __future__ import annotations

from typing import Any

from torch import nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.live_layers import LiveLayers, calls_attention, layers_of
from sinkprune.adapters.native import NativeAdapter
from sinkprune.models.dream import Dream
from sinkprune.models.illada import ILLaDAConfig


@register_adapter
class NativeILLaDA(NativeAdapter):
    """Dream's modules without biases; a row of logits is about its own token."""

    family = "illada"
    facts = Facts("iLLaDA-8B", export="yes; heads with a modelling file of ours")
    MODEL, CONFIG = Dream, ILLaDAConfig


_COUNTS = ("num_heads", "num_key_value_heads", "num_key_value_groups", "head_dim", "hidden_size")


@register_adapter
class ILLaDALayers(LiveLayers):
    """``model.model.layers`` of a bidirectional Llama tree without biases and without a norm of queries.

    The published code counts its heads in the attention module, and calls PyTorch's attention under "sdpa"
    alone. Plans of the native iLLaDA fit, and its plans fit there.
    """

    family = "illada"
    facts = Facts("iLLaDA-8B")

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        layers = layers_of(model)
        return bool(layers) and all(_is_illada(getattr(layer, "self_attn", None)) for layer in layers)


def _is_illada(attention: Any) -> bool:
    return (
        calls_attention(attention, ILLaDALayers.attention_names.values(), _COUNTS)
        and not getattr(attention, "is_causal", False)
        and not hasattr(attention, "q_norm")
        and attention.q_proj.bias is None
    )
