"""What every transformers-native family shares: our attention behind transformers' attention interface.

transformers' attention modules hand their queries, keys and values to a function chosen by name in their
config. While something of ours is active in one (skipped heads, unevenly shared key/value heads, an
observer) it has a config of its own in which that name is "sinkprune". The model's config stays the user's:
what masks it makes does not change while another thread's forward is under way.
"""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.adapters.base import AttentionWeights, LayerObserver, MLPWeights, split_fused, tensors_of
from sinkprune.adapters.in_place import InPlaceAdapter, Selection
from sinkprune.adapters.masked import masked_attention, masked_call
from sinkprune.adapters.sizes import one_width
from sinkprune.adapters.transformers_masks import whole_mask
from sinkprune.models.modules import AttentionCall
from sinkprune.plans import Geometry

NAME = "sinkprune"
_SELECTION = "sinkprune_heads"  # the submodule that attention modules get


class HeadSelection(Selection):
    """``config`` is the attention module's own, which it has again when this goes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function behind the name "sinkprune" in transformers' ``AttentionInterface``.

    Args:
        module: the attention module, with a ``Selection`` where something is to be done.
        query: ``[B, H, Lq, D]``; key, value: ``[B, Hkv, Lk, D]``.
        attention_mask: as transformers makes it for the model's own attention: bool or additive
            ``[B, 1, Lq, Lk]``, FlashAttention's ``[B, Lk]``, FlexAttention's block mask, or None.

    Returns:
        ``(out [B, Lq, H, D], None)``; heads that are skipped give zeros.

    Raises:
        ValueError: attention dropout together with a selection, or scores capped or biased in a way that
            PyTorch's attention has no argument for.
    """
    selection = cast("HeadSelection | None", module._modules.get(_SELECTION))
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if selection is not None:
        name = selection.config._attn_implementation or ""
        attention_mask = whole_mask(attention_mask, query, key, is_causal, name, options)
    if selection is None or selection.idle():
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            **options,
        )  # fmt: skip
    if dropout:
        raise ValueError("pruned or tracked attention has no dropout: call model.eval() first")
    for option in ("softcap", "s_aux", "position_bias"):
        if options.get(option) is not None:
            raise ValueError(f"pruned or tracked attention does not know {option!r}")
    kept, owner, observer = selection.kept_heads, selection.kv_head_of, selection.observer
    is_causal = is_causal and attention_mask is None and query.shape[2] > 1
    if is_causal and key.shape[2] > query.shape[2]:  # an empty static cache: the rest of it is not filled
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    padding_only = (
        attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.shape[1] == 1
        and (attention_mask.shape[2] == 1 or attention_mask.stride(2) == 0)
    )
    if not is_causal and (attention_mask is None or padding_only):
        padding = None
        if attention_mask is not None:
            padding = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        out, lse = ops.attention(
            query, key, value, kept_heads=kept, kv_head_of=owner, key_padding_mask=padding, scale=scaling
        )
        call = AttentionCall(query, key, lse, kept, owner, padding, scale=scaling)
    else:
        out = masked_attention(query, key, value, attention_mask, is_causal, scaling, kept, owner)
        call = AttentionCall(query, key, None, kept, owner, scale=scaling)
        if observer is not None and attention_mask is None:
            call = call._replace(block_size=1)
        elif observer is not None:
            call = masked_call(call, cast(Tensor, attention_mask), queries_last=True)
    if observer is not None:
        observer(call)
    return out.transpose(1, 2), None


def _register() -> None:
    """Make the name known to transformers, for attention and for masks (else masks arrive as None)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def is_transformers_model(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model whose attention goes through the attention interface."""
    module = sys.modules.get("transformers.modeling_utils")  # none loaded: then this is none of its models
    return (
        module is not None
        and isinstance(model, module.PreTrainedModel)
        and bool(model._can_set_attn_implementation())
    )


class TransformersAdapter(InPlaceAdapter):
    """A transformers-native model, changed in place: smaller linear layers in the same modules.

    A family names its layers and where their matrices are.
    """

    head_dim_name = "head_dim"  # of the attention module

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        if not is_transformers_model(model):
            return False
        layers = cls.layers_of(model)
        return bool(layers) and all(cls.fits(block) for block in layers)

    @staticmethod
    def layers_of(model: nn.Module) -> nn.ModuleList:
        """The layers of a model or of the backbone in it; empty where there are none."""
        for root in (model, getattr(model, "model", None)):
            layers = getattr(root, "layers", None)
            if isinstance(layers, nn.ModuleList):
                return layers
        return nn.ModuleList()

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether a layer is one of this family's. (A family that overrides ``recognises`` needs none.)"""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        return list(self.layers_of(self.model))

    @abstractmethod
    def attention_of(self, block: nn.Module) -> nn.Module:
        """The module that calls the attention interface."""

    @abstractmethod
    def projections_of(self, block: nn.Module) -> dict[str, nn.Module]:
        """The attention's linear layers by role."""

    def mlp_of(self, block: nn.Module) -> dict[str, nn.Module]:
        """The MLP's linear layers by role. Raises ``ValueError`` naming why it can't be pruned."""
        raise ValueError(f"MLP channels of {self.family} models can't be pruned, only heads")

    def attention_linears(self, layer: int) -> dict[str, nn.Module]:
        return self.projections_of(self.blocks()[layer])

    def mlp_linears(self, layer: int) -> dict[str, nn.Module]:
        return self.mlp_of(self.blocks()[layer])

    def linears(self, layer: int) -> dict[str, nn.Module]:
        block = self.blocks()[layer]
        try:
            mlp = self.mlp_of(block)
        except ValueError:  # experts: their channels are never pruned
            mlp = {}
        return self.projections_of(block) | mlp

    @property
    def config(self) -> Any:
        return cast(Any, self.model).config.get_text_config()

    def _attention(self, layer: int) -> nn.Module:
        return self.attention_of(self.blocks()[layer])

    def _head_dim(self, layer: int) -> int:
        return cast(int, getattr(self._attention(layer), self.head_dim_name))

    def _channels(self, block: nn.Module) -> int:
        return cast(int, cast(Any, self.mlp_of(block)["down"]).in_features)

    def geometry(self) -> Geometry:
        config, blocks = self.config, self.blocks()
        owns: list[Any] = [self.attention_of(block).config for block in blocks]  # layers' may differ
        heads = tuple(cast(int, own.num_attention_heads) for own in owns)
        said = Geometry(
            family=self.family,
            hidden=config.hidden_size,
            head_dim=one_width([self._head_dim(layer) for layer in range(len(blocks))]),
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            heads=heads,
            kv_heads=tuple(getattr(o, "num_key_value_heads", None) or o.num_attention_heads for o in owns),
            channels=tuple(self._channels(block) for block in blocks),
            mlp_matrices=self.mlp_matrices,
        )
        return self.as_built(said)

    mlp_matrices = 3

    @property
    def mask_token_id(self) -> int | None:
        return getattr(self.config, "mask_token_id", None)

    def attention_weights(self, layer: int) -> AttentionWeights:
        weights = tensors_of(self.projections_of(self.blocks()[layer]), layer)
        if "qkv" in weights:
            split_fused(weights, (len(weights["qkv"]) // 3,) * 3)
        attention = self._attention(layer)
        return AttentionWeights(
            **weights,
            q_norm=attention._modules.get("q_norm"),
            k_norm=attention._modules.get("k_norm"),
        )

    def mlp_weights(self, layer: int) -> MLPWeights:
        found = cast(dict[str, Any], self.mlp_of(self.blocks()[layer]))
        if "gate_up" in found:
            gate, up = found["gate_up"].weight.chunk(2)
            return MLPWeights(gate, up, found["down"].weight)
        gate = found["gate"].weight if "gate" in found else None
        return MLPWeights(gate, found["up"].weight, found["down"].weight)

    @property
    def dropout(self) -> float | None:
        found = getattr(self.config, "attention_dropout", None)
        return getattr(self.config, "attention_probs_dropout_prob", 0.0) if found is None else found

    def resized(self, layer: int, kv_head_of: list[int], group: int, index: Tensor | None) -> None:
        if index is not None:
            self._selection(layer).kv_head_of = index
        module, heads = self._attention(layer), len(kv_head_of)
        # The module's own attributes follow, so that equal groups run on any attention implementation.
        for name, value in (
            ("num_key_value_groups", group),
            ("num_attention_heads", heads),
            ("all_head_size", heads * self._head_dim(layer)),
        ):
            if hasattr(module, name):
                setattr(module, name, value)
        self._switch()

    def select(self, layer: int, heads: Tensor | None) -> None:
        for attention in self.attentions_of(layer):
            selection_of(attention).kept_heads = heads
        self._switch()

    def attentions_of(self, layer: int) -> list[nn.Module]:
        """The attentions of one set of projections."""
        return [self._attention(layer)]

    def _selection(self, layer: int) -> HeadSelection:
        return selection_of(self._attention(layer))

    def observe(self, observer: LayerObserver | None) -> None:
        for layer in self.attending():
            selection = self._selection(layer)
            selection.observer = None if observer is None else partial(observer, layer)
        self._switch()

    def observed(self) -> bool:
        layers = range(len(self.blocks()))
        found = (cast(Any, self._attention(layer)._modules.get(_SELECTION)) for layer in layers)
        return any(selection is not None and selection.observer is not None for selection in found)

    def _switch(self) -> None:
        """Turn attention modules to our attention where something of ours is active, the others back."""
        for attention in list(self.model.modules()):
            selection = attention._modules.get(_SELECTION)
            if not isinstance(selection, HeadSelection):
                continue
            module = cast(Any, attention)
            if selection.idle():
                module.config = selection.config
                _exchange_submodules(module, {k: v for k, v in module._modules.items() if k != _SELECTION})
            elif module.config is selection.config:
                _register()
                config = copy.copy(selection.config)
                config._attn_implementation_internal = NAME
                module.config = config


def selection_of(attention: nn.Module) -> HeadSelection:
    """The attention module's selection, made where there is none."""
    if attention._modules.get(_SELECTION) is None:
        selection = HeadSelection(attention.config)
        _exchange_submodules(attention, {**attention._modules, _SELECTION: selection})
    return cast(HeadSelection, attention._modules[_SELECTION])


def _exchange_submodules(module: nn.Module, modules: dict[str, nn.Module | None]) -> None:
    """As a whole: another thread may be walking through the old ones."""
    module.__dict__["_modules"] = modules
