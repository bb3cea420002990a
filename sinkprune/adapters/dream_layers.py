"""The published Dream and DiffuCoder code and its copies (Fast-dLLM's, …), as live objects.

Layers own ``self_attn`` with ``q_proj k_proj v_proj o_proj`` and call PyTorch's
``scaled_dot_product_attention`` inside its forward, after RoPE and after whatever cache the copy keeps: that
call is what ours replaces, while the forward runs. Masks that the upstream code passes are honoured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sinkprune.adapters.base import Geometry, register_adapter
from sinkprune.adapters.dream import shifted_rows
from sinkprune.adapters.live import LiveAdapter, LiveAttention

_CALL = "scaled_dot_product_attention"
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@register_adapter
class DreamLayers(LiveAdapter):
    """``model.model.layers`` of a bidirectional Qwen2 tree whose logits are a token late, as Dream's are.

    Plans of the native Dream fit, and its plans fit there.
    """

    family = "dream"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        layers = getattr(getattr(model, "model", None), "layers", None)
        if not isinstance(layers, nn.ModuleList) or not layers or not hasattr(model, "lm_head"):
            return False
        return all(_is_dream_attention(getattr(layer, "self_attn", None)) for layer in layers)

    def sites(self) -> list[nn.Module]:
        return [layer.self_attn for layer in cast(Any, self.model).model.layers]

    def blocks(self) -> list[nn.Module]:
        return list(cast(Any, self.model).model.layers)

    @property
    def _config(self) -> Any:
        return cast(Any, self.model).config

    def geometry(self) -> Geometry:
        config, layers = self._config, len(self.sites())
        heads = config.num_attention_heads
        return Geometry(
            family=self.family,
            hidden=config.hidden_size,
            head_dim=cast(int, self.sites()[0].head_dim),
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            heads=(heads,) * layers,
            kv_heads=(config.num_key_value_heads or heads,) * layers,
            channels=tuple(config.intermediate_size if self._mlp(i) else 0 for i in range(layers)),
        )

    @property
    def mask_token_id(self) -> int | None:
        return getattr(self._config, "mask_token_id", None)

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        return super().predict(input_ids, attention_mask)[:, shifted_rows(input_ids, rows)]

    def attention_linears(self, layer: int) -> dict[str, nn.Module]:
        return {role: self.sites()[layer].get_submodule(name) for role, name in _ATTENTION.items()}

    def _mlp(self, layer: int) -> dict[str, nn.Module]:
        mlp = cast(Any, self.model).model.layers[layer].mlp
        dense = all(isinstance(getattr(mlp, name, None), nn.Module) for name in _MLP.values())
        return {role: getattr(mlp, name) for role, name in _MLP.items()} if dense else {}

    def mlp_linears(self, layer: int) -> dict[str, nn.Module]:
        found = self._mlp(layer)
        if not found:
            raise ValueError(
                f"the MLP of layer {layer} is not gated (experts?): only its heads can be pruned"
            )
        return found

    def enter(self, site: nn.Module, attention: LiveAttention) -> None:
        replaced = site.__dict__.get("forward")
        site.__dict__["forward"] = _Forward(site.forward, attention, replaced)

    def leave(self, site: nn.Module) -> None:
        replaced = cast(_Forward, site.__dict__.pop("forward")).replaced
        if replaced is not None:
            site.__dict__["forward"] = replaced

    def resize(self, site: nn.Module, heads: int, kv_heads: int, group: int) -> None:
        """``hidden_size`` is the width of the heads side by side; a group of one leaves keys as they are."""
        attention = cast(Any, site)
        attention.num_heads, attention.num_key_value_heads = heads, kv_heads
        attention.num_key_value_groups = group
        attention.hidden_size = heads * attention.head_dim


class _Forward:
    """The upstream forward, with ``attention`` in the place of its attention call."""

    def __init__(self, forward: Callable[..., Any], attention: LiveAttention, replaced: Any) -> None:
        self.forward, self.attention, self.replaced = forward, attention, replaced
        functools.update_wrapper(self, forward, updated=())

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if keywords.get("output_attentions"):
            raise ValueError(
                "pruned or tracked attention has no probabilities: call without output_attentions"
            )
        with _Intercept(self.attention):
            return self.forward(*args, **keywords)


class _Intercept(TorchFunctionMode):
    def __init__(self, attention: LiveAttention) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_dream_attention(attention: Any) -> bool:
    """Whether its forward projects with q, k, v and o, calls PyTorch's attention, and is not causal.

    transformers' own models hand the call to a function by name, and keep their head counts in the config.
    """
    if not isinstance(attention, nn.Module) or getattr(attention, "is_causal", False):
        return False
    counts = ("num_heads", "num_key_value_heads", "num_key_value_groups", "head_dim", "hidden_size")
    forward = getattr(type(attention).forward, "__code__", None)
    return (
        all(isinstance(getattr(attention, name, None), nn.Module) for name in _ATTENTION.values())
        and all(isinstance(getattr(attention, name, None), int) for name in counts)
        and forward is not None
        and _CALL in forward.co_names
    )
