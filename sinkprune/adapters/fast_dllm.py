"""The published Fast-dLLM v2 code, as live objects. The native one is a line of ``decoders.py``."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.live_layers import BlockCausalLayers, layers_of
from sinkprune.adapters.native import shifted_rows


@register_adapter
class FastDLLMLayers(BlockCausalLayers):
    """``model.model.layers`` of a Qwen2 tree whose attention asks transformers for PyTorch's by name, and
    whose config names the block ``bd_size``.

    It makes its own mask of blocks. Plans of the native Fast-dLLM v2 fit, and its plans fit there.
    """

    family = "fast_dllm_qwen"
    facts = Facts("Fast-dLLM v2 1.5B, 7B")
    shift = 1
    seeds = True
    default_block = 32

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        layers = layers_of(model)
        named = isinstance(getattr(getattr(model, "config", None), "bd_size", None), int)
        return (
            bool(layers)
            and named
            and all(_asks_for_sdpa(getattr(layer, "self_attn", None)) for layer in layers)
        )

    @property
    def block_size(self) -> int:
        return int(self._config.bd_size)

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        with self.hiding(attention_mask):
            output = cast(Any, self.model)(input_ids, use_cache=False, block_size=self.block_size)
        return cast(Tensor, output.logits)[:, shifted_rows(input_ids, rows)]

    def resize(self, site: nn.Module, heads: int, kv_heads: int, group: int) -> None:
        cast(Any, site).num_key_value_groups = group


def _asks_for_sdpa(attention: Any) -> bool:
    code = getattr(type(attention).forward, "__code__", None) if isinstance(attention, nn.Module) else None
    return (
        code is not None
        and "ALL_ATTENTION_FUNCTIONS" in code.co_names
        and "sdpa" in code.co_consts
        and all(isinstance(getattr(attention, f"{role}_proj", None), nn.Module) for role in "qkvo")
        and isinstance(getattr(attention, "num_key_value_groups", None), int)
    )
