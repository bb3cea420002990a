"""LLaDA: the native one, and live objects of the published code and its copies.

In that code and its copies (Fast-dLLM's, dInfer's, MMaDA's, …) blocks own ``q_proj k_proj v_proj attn_out``
and compute attention in ``_scaled_dot_product_attention``, on queries and keys after RoPE and after
whatever cache the copy keeps: that method is what ours replaces. The published code ignores
``attention_mask``; a pruned model's forward does the same, while every verb of this package hides padding.
Copies that honour a mask or a bias (MMaDA) keep doing so.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, cast

from torch import nn

from sinkprune.adapters.base import Facts, modules_of, register_adapter
from sinkprune.adapters.live import LiveAdapter, LiveAttention
from sinkprune.adapters.native import NativeAdapter
from sinkprune.models.llada import LLaDA
from sinkprune.plans import Geometry

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out"}
MLP = {"gate": "ff_proj", "up": "up_proj", "down": "ff_out"}


@register_adapter
class NativeLLaDA(NativeAdapter):
    """Blocks own their projections; compact modules go into ``block.attention`` and ``block.mlp``."""

    family = "llada"
    facts = Facts(
        "LLaDA-8B, LLaDA-1.5",
        compact="yes, unless its qk-norm runs over the full width",
        export="yes; heads with a modelling file of ours",
    )
    MODEL = LLaDA
    layers = "blocks"
    site = "attention"
    attention_names = ATTENTION
    mlp_names = MLP
    sizes: ClassVar[dict[str, str]] = NativeAdapter.sizes | {
        "layers": "n_layers", "hidden": "d_model", "heads": "n_heads", "channels": "mlp_width",
        "vocabulary": "vocabulary_rows",
    }  # fmt: skip

    def refuse_compact(self) -> str | None:
        if self.model.config.attention_layer_norm:
            return "its qk-norm runs over the full width and mixes the heads (attention_layer_norm=true)"
        return None


_CALL = "_scaled_dot_product_attention"


@register_adapter
class LLaDABlocks(LiveAdapter):
    """``model.model.transformer.blocks``, or ``block_groups`` of them.

    Plans of the native LLaDA fit, and its plans fit there.
    """

    family = "llada"
    facts = Facts(
        "LLaDA-8B, LLaDA-1.5, MMaDA, copies (Fast-dLLM's, dInfer's)",
        compact="yes, unless its qk-norm runs over the full width",
    )

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        blocks = _blocks(model)
        names = (*ATTENTION.values(), "attn_norm", "ff_norm")
        fused = bool(blocks) and hasattr(blocks[0], "att_proj")
        return bool(blocks) and all(
            callable(getattr(block, _CALL, None))
            and hasattr(block, "config")
            and (fused or all(isinstance(getattr(block, name, None), nn.Module) for name in names))
            for block in blocks
        )

    def sites(self) -> list[nn.Module]:
        return _blocks(self.model)

    def blocks(self) -> list[nn.Module]:
        return self.sites()

    @property
    def _config(self) -> Any:
        return cast(Any, self.model).model.config

    def geometry(self) -> Geometry:
        config, layers = self._config, len(self.sites())
        said = Geometry(
            family=self.family,
            hidden=config.d_model,
            head_dim=config.d_model // config.n_heads,
            vocabulary=config.embedding_size or config.vocab_size,
            context=config.max_sequence_length,
            heads=(config.n_heads,) * layers,
            kv_heads=(_kv_heads(config),) * layers,
            channels=tuple(self._channels(block) for block in self.sites()),
        )
        return self.as_built(said)

    def _channels(self, block: nn.Module) -> int:
        """Channels of a gated MLP; 0 where there is none."""
        if not all(hasattr(block, name) for name in MLP.values()):
            return 0
        config = self._config
        width = config.mlp_hidden_size
        return cast(int, config.mlp_ratio * config.d_model if width is None else width)

    @property
    def mask_token_id(self) -> int | None:
        return getattr(cast(Any, self.model).config, "mask_token_id", None)

    def attention_linears(self, layer: int) -> dict[str, nn.Module]:
        block = self.sites()[layer]
        if hasattr(block, "att_proj"):
            raise ValueError(
                "its blocks fuse q, k and v in att_proj (block_type='sequential'), as no published LLaDA "
                "does: such a model can be tracked, not pruned"
            )
        return modules_of(block, ATTENTION)

    def mlp_linears(self, layer: int) -> dict[str, nn.Module]:
        block = self.sites()[layer]
        if not self._channels(block):
            raise ValueError(
                f"the MLP of layer {layer} is not gated (experts?): only its heads can be pruned"
            )
        return modules_of(block, MLP)

    def check(self, kept_heads: list[list[int]], kept_channels: list[list[int] | None], mode: str) -> None:
        for layer, block in enumerate(self.sites()):
            if getattr(block, "tp_size", 1) > 1:
                raise ValueError(
                    f"layer {layer} is a tensor-parallel shard: prune the whole model, then shard it"
                )
        super().check(kept_heads, kept_channels, mode)

    def refuse_compact(self) -> str | None:
        if any(getattr(block, "q_norm", None) is not None for block in self.sites()):
            return "its qk-norm runs over the full width and mixes the heads (attention_layer_norm=true)"
        return None

    def enter(self, site: nn.Module, attention: LiveAttention) -> None:
        # Not a registered attribute: the class's own method of that name would hide it.
        site.__dict__["sinkprune_replaced"] = site.__dict__.get(_CALL)
        site.__dict__[_CALL] = attention

    def leave(self, site: nn.Module) -> None:
        replaced = site.__dict__.pop("sinkprune_replaced")
        del site.__dict__[_CALL]
        if replaced is not None:
            site.__dict__[_CALL] = replaced

    def resize(self, site: nn.Module, heads: int, kv_heads: int, group: int) -> None:
        """The block reads its numbers of heads from its config, which all blocks share: it gets its own."""
        block = cast(Any, site)
        block.config = copy.copy(block.config)
        block.config.n_heads, block.config.n_kv_heads = heads, kv_heads


def _kv_heads(config: Any) -> int:
    """From the model's own config, or a Hugging Face one, which does not work it out."""
    own = getattr(config, "effective_n_kv_heads", None) or getattr(config, "n_kv_heads", None)
    return int(own or (1 if getattr(config, "multi_query_attention", False) else config.n_heads))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of ``model.model.transformer``; none where there is no such tree."""
    transformer = getattr(getattr(model, "model", None), "transformer", None)
    if not isinstance(transformer, nn.ModuleDict):
        return []
    if "block_groups" in transformer:
        return [block for group in transformer["block_groups"].children() for block in group.children()]
    return list(transformer["blocks"].children()) if "blocks" in transformer else []
