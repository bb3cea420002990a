"""DiffusionGemma: a causal encoder fills a cache, a bidirectional decoder of the same weights denoises.

Profiles, tracks and masks the decoder's heads; a masked head is skipped in the encoder too, whose weights are
the same. The compact form is refused: encoder and decoder share every projection, full-attention layers have
wider heads than the others, and their values come from the keys' projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from sinkprune.adapters.base import AttentionWeights, Facts, check_ready, register_adapter, require_eval
from sinkprune.adapters.transformers_attention import (
    TransformersAdapter,
    is_transformers_model,
)
from sinkprune.plans import Geometry


@register_adapter
class TransformersDiffusionGemma(TransformersAdapter):
    """``model.decoder.layers.{i}`` and ``model.encoder.language_model.layers.{i}``, tied."""

    family = "transformers block diffusion (DiffusionGemma)"
    facts = Facts(
        "DiffusionGemma",
        compact="no: encoder and decoder share projections",
        channels="no: they run beside experts",
        blocks="attention alone, in mask form",
        export="no",
    )

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return is_transformers_model(model) and _parts(model) is not None

    def blocks(self) -> list[nn.Module]:
        return list(cast(nn.ModuleList, self.step_module.layers))

    def _encoder_blocks(self) -> list[nn.Module]:
        parts = _parts(self.model)
        assert parts is not None
        return list(cast(nn.ModuleList, parts[0].get_submodule("language_model.layers")))

    @property
    def step_module(self) -> nn.Module:
        """The decoder: the encoder's forwards are no denoising steps."""
        parts = _parts(self.model)
        assert parts is not None
        return parts[1]

    @property
    def usual_block(self) -> int:
        """Its canvas."""
        return int(cast(Any, self.model).config.canvas_length)

    def attention_of(self, block: nn.Module) -> nn.Module:
        return cast(nn.Module, block.self_attn)

    def projections_of(self, block: nn.Module) -> dict[str, nn.Module]:
        attention = self.attention_of(block)
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
        return {role: getattr(attention, name) for role, name in names.items()}

    def mlp_of(self, block: nn.Module) -> dict[str, nn.Module]:
        raise ValueError("DiffusionGemma's MLPs run beside a mixture of experts: only heads can be pruned")

    def _channels(self, block: nn.Module) -> int:
        config = self.config
        return int(
            config.intermediate_size + (config.top_k_experts or 0) * (config.moe_intermediate_size or 0)
        )

    def geometry(self) -> Geometry:
        """``head_dim`` is that of the narrowest layers, the sliding ones."""
        config, layers = self.config, range(len(self.blocks()))
        groups = [cast(int, self._attention(layer).num_key_value_groups) for layer in layers]
        return Geometry(
            family=self.family,
            hidden=config.hidden_size,
            head_dim=min(self._head_dim(layer) for layer in layers),
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            heads=(config.num_attention_heads,) * len(layers),
            kv_heads=tuple(config.num_attention_heads // group for group in groups),
            channels=tuple(self._channels(block) for block in self.blocks()),
        )

    def attention_weights(self, layer: int) -> AttentionWeights:
        """The values of a full-attention layer come from its keys' projection."""
        found = cast(dict[str, Any], self.projections_of(self.blocks()[layer]))
        value = found["k"] if found["v"] is None else found["v"]
        return AttentionWeights(found["q"].weight, found["k"].weight, value.weight, found["o"].weight)

    def check(self, kept_heads: list[list[int]], kept_channels: list[list[int] | None], mode: str) -> None:
        check_ready(self.model)
        if any(channels is not None for channels in kept_channels):
            self.mlp_of(self.blocks()[0])
        if mode == "compact":
            raise ValueError(
                f"this model can't take the compact form: {self.refuse_compact()}; use mode='mask'"
            )
        require_eval(self.model, self.config.attention_dropout)

    def refuse_compact(self) -> str | None:
        return (
            "its encoder and decoder share every projection, its full-attention layers have wider heads than "
            "the others and take their values from the keys' projection"
        )

    def attentions_of(self, layer: int) -> list[nn.Module]:
        return [self.attention_of(block[layer]) for block in (self.blocks(), self._encoder_blocks())]

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        raise ValueError("DiffusionGemma denoises a canvas after a cached prompt: use model.generate")

    def sample(
        self, input_ids: Tensor, attention_mask: Tensor, steps: int, gen_length: int, options: dict[str, Any]
    ) -> Iterator[Any]:
        """The model's own ``generate``, which may stop early; ``options`` are its."""
        canvas = cast(Any, self.model).config.canvas_length
        canvases = -(-gen_length // canvas)
        if steps % canvases:
            raise ValueError(f"steps must be a multiple of {canvases} canvases of {canvas}, got {steps}")
        cast(Any, self.model).generate(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=gen_length,
            max_denoising_steps=steps // canvases,
            **options,
        )
        return iter(())


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The encoder and the decoder, where their layers are twins."""
    for root in (model, getattr(model, "model", None)):
        encoder, decoder = getattr(root, "encoder", None), getattr(root, "decoder", None)
        own = getattr(getattr(encoder, "language_model", None), "layers", None)
        other = getattr(decoder, "layers", None)
        if (
            isinstance(own, nn.ModuleList)
            and isinstance(other, nn.ModuleList)
            and len(own) == len(other) > 0
            and all(hasattr(layer, "self_attn") and hasattr(layer, "experts") for layer in [*own, *other])
        ):
            assert encoder is not None and decoder is not None
            return encoder, decoder
    return None
