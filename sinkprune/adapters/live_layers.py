"""Upstream code in transformers' style, as live objects: what Dream, SDAR, LLaDA2 and LLaDA-MoE share.

``model.model.layers`` own an attention module that calls PyTorch's ``scaled_dot_product_attention`` inside
its forward, after RoPE and after whatever cache the copy keeps: that call is what ours replaces, while the
forward runs. Masks that the upstream code passes are honoured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sinkprune.adapters.live import LiveAdapter, LiveAttention
from sinkprune.adapters.native import MLP
from sinkprune.adapters.sizes import one_width
from sinkprune.models.block_causal import positions_of
from sinkprune.plans import Geometry

_CALLS = {"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"}  # itself, or transformers' registry


class LiveLayers(LiveAdapter):
    """A family names where in a layer its matrices are."""

    site: ClassVar[str] = "self_attn"  # the attention module of a layer
    attention_names: ClassVar[dict[str, str]] = {role: f"{role}_proj" for role in "qkvo"}
    norm_names: ClassVar[tuple[str, ...]] = ()  # of the modules over a head's queries and keys

    @property
    def _config(self) -> Any:
        return cast(Any, self.model).config

    def blocks(self) -> list[nn.Module]:
        return list(layers_of(self.model))

    def sites(self) -> list[nn.Module]:
        return [layer.get_submodule(self.site) for layer in layers_of(self.model)]

    def geometry(self) -> Geometry:
        config, layers = self._config, len(self.sites())
        heads = config.num_attention_heads
        said = Geometry(
            family=self.family,
            hidden=config.hidden_size,
            head_dim=one_width([cast(int, site.head_dim) for site in self.sites()]),
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            heads=(heads,) * layers,
            kv_heads=(config.num_key_value_heads or heads,) * layers,
            channels=tuple(self.channels(layer) for layer in range(layers)),
        )
        return self.as_built(said)

    def channels(self, layer: int) -> int:
        """Of a layer's gated MLP; where there is none, of the experts that a token passes through."""
        return cast(int, self._config.intermediate_size) if self._mlp(layer) else 0

    @property
    def mask_token_id(self) -> int | None:
        return getattr(self._config, "mask_token_id", None)

    def attention_linears(self, layer: int) -> dict[str, nn.Module]:
        site = self.sites()[layer]
        return {role: site.get_submodule(name) for role, name in self.attention_names.items()}

    def norms(self, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
        site = self.sites()[layer]
        found = [site._modules.get(name) for name in self.norm_names] or [None, None]
        return found[0], found[1]

    def _mlp(self, layer: int) -> dict[str, nn.Module]:
        block = self.blocks()[layer]
        mlp = block._modules.get("mlp")
        names = {role: name.removeprefix("mlp.") for role, name in MLP.items()}
        dense = mlp is not None and all(isinstance(getattr(mlp, n, None), nn.Module) for n in names.values())
        return {role: block.get_submodule(name) for role, name in MLP.items()} if dense else {}

    def mlp_linears(self, layer: int) -> dict[str, nn.Module]:
        found = self._mlp(layer)
        if not found:
            raise ValueError(
                f"the MLP of layer {layer} is not gated (experts?): only its heads can be pruned"
            )
        return found

    def linears(self, layer: int) -> dict[str, nn.Module]:
        return self.attention_linears(layer) | self._mlp(layer)

    def check(self, kept_heads: list[list[int]], kept_channels: list[list[int] | None], mode: str) -> None:
        super().check(kept_heads, kept_channels, mode)
        for layer, site in enumerate(self.sites()):
            if hasattr(site, "_hf_hook"):
                raise ValueError(
                    f"layer {layer}'s attention carries a hook of accelerate's, which undoes what is pruned "
                    "when it goes: call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
                )

    def enter(self, site: nn.Module, attention: LiveAttention) -> None:
        replaced = site.__dict__.get("forward")
        site.__dict__["forward"] = _Forward(site.forward, attention, replaced)

    def leave(self, site: nn.Module) -> None:
        replaced = cast(_Forward, site.__dict__.pop("forward")).replaced
        if replaced is not None:
            site.__dict__["forward"] = replaced

    def resize(self, site: nn.Module, heads: int, kv_heads: int, group: int) -> None:
        """``hidden_size``, where there is one, is the width of the heads side by side; a group of one leaves
        keys as they are."""
        attention = cast(Any, site)
        attention.num_heads, attention.num_key_value_heads = heads, kv_heads
        attention.num_key_value_groups = group
        attention.hidden_size = heads * attention.head_dim


class BlockCausalLayers(LiveLayers):
    """Upstream code that is block-causal by the mask that its sampler passes."""

    default_block: ClassVar[int]  # where the config names none

    @property
    def block_size(self) -> int:
        return getattr(self._config, "block_size", None) or self.default_block

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Logits as in ``Adapter.predict``. Blocks of a padded sequence count from its first token."""
        positions = positions_of(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        block = positions // self.block_size
        mask = block[:, None, None, :] <= block[:, None, :, None]  # what upstream asks for, and ours replaces
        with self.hiding(attention_mask):
            output = cast(Any, self.model)(
                input_ids, attention_mask=mask, position_ids=positions.clamp(min=0), use_cache=False
            )
        return cast(Tensor, output.logits)[:, rows]

    @contextmanager
    def hiding(
        self,
        attention_mask: Tensor | None,
        block_size: int | None = None,
        positions: Tensor | None = None,
    ) -> Iterator[None]:
        if positions is None and attention_mask is not None:
            positions = positions_of(attention_mask)
        with super().hiding(attention_mask, block_size or self.block_size, positions):
            yield


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
        given = [x for x in args if isinstance(x, Tensor) and x.dim() == 4]
        shapes = [x.shape for x in (*given, keywords.get("attention_mask")) if isinstance(x, Tensor)]
        with InterceptAttention(self.attention, shapes):
            return self.forward(*args, **keywords)


class InterceptAttention(TorchFunctionMode):
    """``attention`` in the place of PyTorch's. ``masks``: the shapes of the masks that the forward was given;
    every other function, and ``torch.all`` of anything else, answers as ever."""

    def __init__(self, attention: LiveAttention, masks: Iterable[torch.Size] = ()) -> None:
        super().__init__()
        self.attention, self.masks = attention, set(masks)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        if func is torch.all and len(args) == 1 and not kwargs and self._is_mask(args[0]):
            # SDAR asks whether all keys are seen, to call FlashAttention instead: say no
            return torch.zeros((), dtype=torch.bool)
        return func(*args, **(kwargs or {}))

    def _is_mask(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dtype == torch.bool and x.shape in self.masks


def layers_of(model: nn.Module) -> nn.ModuleList:
    """``model.model.layers`` of a language model; empty where there is no such tree."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) and hasattr(model, "lm_head") else nn.ModuleList()


def calls_attention(attention: Any, modules: Iterable[str], counts: Iterable[str]) -> bool:
    """Whether ``attention`` has these submodules and integers, and its forward calls PyTorch's attention.

    transformers' own models hand the call to a function by name, and keep their head counts in the config.
    """
    forward = getattr(type(attention).forward, "__code__", None) if isinstance(attention, nn.Module) else None
    return (
        forward is not None
        and not _CALLS.isdisjoint(forward.co_names)
        and all(isinstance(getattr(attention, name, None), nn.Module) for name in modules)
        and all(isinstance(getattr(attention, name, None), int) for name in counts)
    )
