"""Dream: the native one, and live objects of the published Dream and DiffuCoder code and its copies
(Fast-dLLM's, …)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sinkprune.adapters.base import (
    Adapter,
    AttentionWeights,
    Facts,
    LayerObserver,
    MLPWeights,
    modules_of,
    register_adapter,
    tensors_of,
)
from sinkprune.adapters.live_layers import LiveLayers, calls_attention, layers_of
from sinkprune.models.caches import Cache
from sinkprune.models.common import GatedMLP
from sinkprune.models.dream import Dream, DreamAttention, DreamConfig, DreamLayer
from sinkprune.plans import Geometry

ATTENTION = {role: f"self_attn.{role}_proj" for role in "qkvo"}
MLP = {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}


@register_adapter
class NativeDream(Adapter):
    """Compact modules take the place of ``layer.self_attn`` and ``layer.mlp``."""

    family = "dream"
    facts = Facts("Dream-7B, DiffuCoder", export="yes; heads with a modelling file of ours")
    caches = ("prefix", "dual", "dllm")
    shift = 1
    model: Dream
    CONFIG: ClassVar[type[DreamConfig]] = DreamConfig

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return isinstance(model, Dream) and type(model.config) is cls.CONFIG

    def _sources(self, input_ids: Tensor, rows: slice) -> Tensor | slice:
        return shifted_rows(input_ids, rows) if self.shift else rows

    def _layer(self, layer: int) -> DreamLayer:
        return cast(DreamLayer, self.model.layers[layer])

    def geometry(self) -> Geometry:
        config = self.model.config
        return Geometry(
            family=self.family,
            hidden=config.hidden_size,
            head_dim=config.head_dim,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            heads=(config.num_attention_heads,) * config.num_hidden_layers,
            kv_heads=(config.kv_heads,) * config.num_hidden_layers,
            channels=(config.intermediate_size,) * config.num_hidden_layers,
        )

    @property
    def mask_token_id(self) -> int | None:
        return self.model.config.mask_token_id

    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    def linears(self, layer: int) -> dict[str, nn.Module]:
        return modules_of(self._layer(layer), ATTENTION | MLP)

    def attention_weights(self, layer: int) -> AttentionWeights:
        return AttentionWeights(**tensors_of(modules_of(self._layer(layer), ATTENTION), layer))

    def mlp_weights(self, layer: int) -> MLPWeights:
        return MLPWeights(**tensors_of(modules_of(self._layer(layer), MLP), layer))

    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        block = self._layer(layer)
        if attention is not None:
            block.self_attn = attention
        if mlp is not None:
            block.mlp = mlp

    def mask(self, layer: int, heads: Tensor | None, channels: Tensor | None) -> None:
        block = self._layer(layer)
        cast(DreamAttention, block.self_attn).kept_heads = heads
        cast(GatedMLP, block.mlp).kept_channels = channels

    def observe(self, observer: LayerObserver | None) -> None:
        for layer in range(len(self.model.layers)):
            attention = cast(DreamAttention, self._layer(layer).self_attn)
            attention.observer = None if observer is None else partial(observer, layer)

    def observed(self) -> bool:
        return self._layer(0).self_attn.observer is not None

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        sources = self._sources(input_ids, rows)
        return self.model(input_ids, attention_mask=attention_mask, rows=sources).logits

    def predict_window(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: slice,
        positions: Tensor,
        cache: Cache,
    ) -> Tensor:
        sources = self._sources(input_ids, rows)
        return self.model(input_ids, attention_mask, rows=sources, positions=positions, cache=cache).logits


def shifted_rows(input_ids: Tensor, rows: slice = slice(None)) -> Tensor:
    """The rows of Dream's logits that predict the tokens at ``rows``: the one before each.

    Row 0 also serves the first token, which no row predicts, as in the published sampler.
    """
    tokens = torch.arange(input_ids.shape[1], device=input_ids.device)[rows]
    return (tokens - 1).clamp(min=0)


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
