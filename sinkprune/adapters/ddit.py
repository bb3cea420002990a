"""The published MDLM and BD3LM models, as live objects: blocks of a diffusion transformer with adaLN.

A block fuses q, k and v in ``attn_qkv`` ("(three h d)") and calls, in its forward, one of three attentions,
which ours replaces while the forward runs: PyTorch's (BD3LM), one of its own on packed heads (MDLM without
FlashAttention) or FlashAttention's on packed sequences (MDLM).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sinkprune.adapters.base import Facts, MLPWeights, register_adapter
from sinkprune.adapters.live import LiveAdapter, LiveAttention
from sinkprune.adapters.live_layers import InterceptAttention
from sinkprune.models.block_causal import positions_of
from sinkprune.plans import Geometry

_PACKED = "regular_attention_multi_headed"
_VARLEN = "flash_attn_varlen_qkvpacked_func"


@register_adapter
class DDiTBlocks(LiveAdapter):
    """``model.backbone.blocks``, and logits of ``model(input_ids, timesteps)`` about each row's own token."""

    family = "ddit"
    facts = Facts(
        "MDLM, BD3LM",
        mask="yes, unless it runs FlexAttention",
        sampler="masked denoising (MDLM), block diffusion (BD3LM)",
    )

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        blocks = getattr(getattr(model, "backbone", None), "blocks", None)
        return (
            isinstance(blocks, nn.ModuleList)
            and len(blocks) > 0
            and hasattr(model, "config")
            and all(
                isinstance(block._modules.get("attn_qkv"), nn.Module)
                and isinstance(block._modules.get("attn_out"), nn.Module)
                and isinstance(getattr(block, "n_heads", None), int)
                and isinstance(block._modules.get("mlp"), nn.Sequential)
                for block in blocks
            )
        )

    @property
    def _config(self) -> Any:
        return cast(Any, self.model).config

    def blocks(self) -> list[nn.Module]:
        return self.sites()

    def sites(self) -> list[nn.Module]:
        return list(cast(Any, self.model).backbone.blocks)

    def geometry(self) -> Geometry:
        config, layers = self._config, len(self.sites())
        said = Geometry(
            family=self.family,
            hidden=config.hidden_dim,
            head_dim=config.hidden_dim // config.n_heads,
            vocabulary=config.vocab_size,
            context=config.model_length,
            heads=(config.n_heads,) * layers,
            kv_heads=(config.n_heads,) * layers,
            channels=(4 * config.hidden_dim,) * layers,
            mlp_matrices=2,
        )
        return self.as_built(said)

    @property
    def mask_token_id(self) -> int:
        """The one after the tokenizer's last: the vocabulary's last."""
        return int(self._config.vocab_size) - 1

    @property
    def block_size(self) -> int | None:
        """BD3LM's; None for MDLM, which sees everything."""
        config = self._config
        return int(config.block_size) if getattr(config, "cross_attn", False) else None

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Logits as in ``Adapter.predict``, without a cache. Blocks of a padded sequence count from its first
        token. Raises ``ValueError`` for a model that needs to be told the noise level."""
        if getattr(self._config, "time_conditioning", False):
            raise ValueError(
                "the model is conditioned on the noise level (time_conditioning=True): it can be tracked in "
                "a loop of your own, but not sampled here"
            )
        more = {} if self.block_size is None else {"sample_mode": True}
        noise = torch.zeros(len(input_ids), device=input_ids.device)
        with self.hiding(attention_mask):
            output = cast(Any, self.model)(input_ids=input_ids, timesteps=noise, return_dict=True, **more)
        return cast(Tensor, output.logits)[:, rows]

    @contextmanager
    def hiding(
        self,
        attention_mask: Tensor | None,
        block_size: int | None = None,
        positions: Tensor | None = None,
    ) -> Iterator[None]:
        if attention_mask is not None and self.block_size is not None:
            block_size, positions = self.block_size, positions_of(attention_mask)
        with super().hiding(attention_mask, block_size, positions):
            yield

    def attention_linears(self, layer: int) -> dict[str, nn.Module]:
        site = self.sites()[layer]
        return {"qkv": site.get_submodule("attn_qkv"), "o": site.get_submodule("attn_out")}

    def mlp_linears(self, layer: int) -> dict[str, nn.Module]:
        mlp = cast(nn.Sequential, self.sites()[layer].mlp)
        return {"up": mlp[0], "down": mlp[2]}

    def mlp_weights(self, layer: int) -> MLPWeights:
        up, down = (cast(nn.Linear, linear) for linear in self.mlp_linears(layer).values())
        return MLPWeights(None, up.weight, down.weight, None, up.bias, down.bias)

    def check(self, kept_heads: list[list[int]], kept_channels: list[list[int] | None], mode: str) -> None:
        if mode == "mask":
            self._require_known_attention()
        super().check(kept_heads, kept_channels, mode)

    def observe(self, observer: Any) -> None:
        if observer is not None:
            self._require_known_attention()
        super().observe(observer)

    def _require_known_attention(self) -> None:
        if any(getattr(site, "attn_backend", "sdpa") != "sdpa" for site in self.sites()):
            raise ValueError(
                "the model runs FlexAttention, whose heads can't be skipped or tracked: load it with "
                "attn_backend='sdpa'"
            )

    def enter(self, site: nn.Module, attention: LiveAttention) -> None:
        site.__dict__["forward"] = _Forward(site.forward, attention, site.__dict__.get("forward"))

    def leave(self, site: nn.Module) -> None:
        replaced = cast(_Forward, site.__dict__.pop("forward")).replaced
        if replaced is not None:
            site.__dict__["forward"] = replaced

    def resize(self, site: nn.Module, heads: int, kv_heads: int, group: int) -> None:
        cast(Any, site).n_heads = heads
        site.register_forward_pre_hook(_fit_cache)


def _fit_cache(site: nn.Module, args: tuple[Any, ...]) -> None:
    """BD3LM makes room in every block for the keys of all heads: cut it to those that are left."""
    block: Any = site
    rows = block.attn_qkv.out_features
    cache = getattr(block, "kv_cache", None)
    if cache is not None and cache.shape[-1] != rows:
        block.kv_cache = cache[..., :rows].clone()


class _Forward:
    """A block's forward, with ``attention`` in the place of its attention call."""

    def __init__(self, forward: Callable[..., Any], attention: LiveAttention, replaced: Any) -> None:
        self.forward, self.attention, self.replaced = forward, attention, replaced
        functools.update_wrapper(self, forward, updated=())

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        names = getattr(self.forward, "__globals__", {})
        with ExitStack() as stack:
            if _PACKED in names:
                stack.enter_context(_swapped(names, _PACKED, self._packed))
            flash = getattr(names.get("flash_attn"), "flash_attn_interface", None)
            if hasattr(flash, _VARLEN):
                stack.enter_context(_swapped(vars(flash), _VARLEN, self._varlen))
            stack.enter_context(InterceptAttention(self.attention))
            return self.forward(*args, **keywords)

    def _packed(self, qkv: Tensor) -> Tensor:
        """Heads side by side, ``[B, L, H * D]``, of ``[B, L, 3, H, D]``."""
        return self._attend(qkv).flatten(2)

    def _varlen(
        self, qkv: Tensor, cu_seqlens: Tensor, length: int, dropout: float = 0.0, causal: bool = False
    ) -> Tensor:
        """FlashAttention's signature: ``[B * L, 3, H, D]`` to ``[B * L, H, D]``, all of one length."""
        if len(qkv) != (len(cu_seqlens) - 1) * length:
            raise ValueError("pruned or tracked attention does not know packed sequences of several lengths")
        return self._attend(qkv.unflatten(0, (-1, length)), dropout, causal).flatten(0, 1)

    def _attend(self, qkv: Tensor, dropout: float = 0.0, causal: bool = False) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return cast(Tensor, self.attention(q, k, v, dropout_p=dropout, is_causal=causal)).transpose(1, 2)


@contextmanager
def _swapped(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    original, names[name] = names[name], value
    try:
        yield
    finally:
        names[name] = original
