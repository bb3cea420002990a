"""The native LLaDA of ``sinkprune.models.llada``."""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor, nn

from sinkprune.adapters.base import (
    Adapter,
    AttentionWeights,
    Facts,
    Geometry,
    LayerObserver,
    MLPWeights,
    modules_of,
    register_adapter,
    tensors_of,
)
from sinkprune.models.llada import LLaDA, LLaDABlock
from sinkprune.modules import SinkPrunedAttention

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out"}
MLP = {"gate": "ff_proj", "up": "up_proj", "down": "ff_out"}


@register_adapter
class NativeLLaDA(Adapter):
    """Blocks own their projections; compact modules go into ``block.attention`` and ``block.mlp``."""

    family = "llada"
    facts = Facts(
        "LLaDA-8B, LLaDA-1.5",
        compact="yes, unless its qk-norm runs over the full width",
        export="channels alone: n_heads fixes the width of a head",
    )
    caches = ("prefix", "dual", "dllm")
    model: LLaDA

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return isinstance(model, LLaDA)

    def _block(self, layer: int) -> LLaDABlock:
        return cast(LLaDABlock, self.model.blocks[layer])

    def geometry(self) -> Geometry:
        config = self.model.config
        return Geometry(
            family=self.family,
            hidden=config.d_model,
            head_dim=config.head_dim,
            vocabulary=config.vocabulary_rows,
            context=config.max_sequence_length,
            heads=(config.n_heads,) * config.n_layers,
            kv_heads=(config.kv_heads,) * config.n_layers,
            channels=(config.mlp_width,) * config.n_layers,
        )

    @property
    def mask_token_id(self) -> int | None:
        return self.model.config.mask_token_id

    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def linears(self, layer: int) -> dict[str, nn.Module]:
        return modules_of(self._block(layer), ATTENTION | MLP)

    def attention_weights(self, layer: int) -> AttentionWeights:
        return AttentionWeights(**tensors_of(modules_of(self._block(layer), ATTENTION), layer))

    def mlp_weights(self, layer: int) -> MLPWeights:
        return MLPWeights(**tensors_of(modules_of(self._block(layer), MLP), layer))

    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        block = self._block(layer)
        if attention is not None:
            block.attention = attention
            del block.q_proj, block.k_proj, block.v_proj, block.attn_out
        if mlp is not None:
            block.mlp = mlp
            del block.ff_proj, block.up_proj, block.ff_out

    def mask(self, layer: int, heads: Tensor | None, channels: Tensor | None) -> None:
        block = self._block(layer)
        block.kept_heads, block.kept_channels = heads, channels

    def observe(self, observer: LayerObserver | None) -> None:
        for layer in range(self.model.config.n_layers):
            block = self._block(layer)
            target = block if block.attention is None else cast(SinkPrunedAttention, block.attention)
            target.observer = None if observer is None else partial(observer, layer)

    def observed(self) -> bool:
        block = self._block(0)
        target = block if block.attention is None else block.attention
        return target.observer is not None

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, rows=rows).logits

    def refuse_compact(self) -> str | None:
        if self.model.config.attention_layer_norm:
            return "its qk-norm runs over the full width and mixes the heads (attention_layer_norm=true)"
        return None
