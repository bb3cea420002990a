"""Llama, Qwen2, Qwen3 and other transformers models of their tree, causal or bidirectional."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.transformers_attention import TransformersAdapter

_QKVO = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_SAMPLERS = ("generate_block", "generate_wedlm", "linear_spec_generate")  # methods of diffusion models
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@register_adapter
class TransformersDecoder(TransformersAdapter):
    """``layers.{i}.self_attn.{q,k,v,o}_proj`` and, where the MLP is dense, ``mlp.{gate,up,down}_proj``."""

    family = "transformers decoder (Llama, Qwen2, Qwen3)"
    facts = Facts(
        "Llama, Qwen2, Qwen3 and others of their tree, causal or bidirectional",
        channels="dense layers only; experts keep theirs",
        blocks="yes, without experts; their attention alone with",
    )

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Not diffusion models built on these classes, whose own sampler says who sees whom."""
        return not any(hasattr(model, name) for name in _SAMPLERS) and super().recognises(model)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        attention = block._modules.get("self_attn")
        return (
            attention is not None
            and all(name in attention._modules for name in _QKVO.values())
            and attention._modules["v_proj"] is not None
            and hasattr(attention, "head_dim")
            and not _wide_norm(attention)
        )

    def attention_of(self, block: nn.Module) -> nn.Module:
        return cast(nn.Module, block.self_attn)

    def projections_of(self, block: nn.Module) -> dict[str, nn.Module]:
        attention = self.attention_of(block)
        return {role: attention.get_submodule(name) for role, name in _QKVO.items()}

    def mlp_of(self, block: nn.Module) -> dict[str, nn.Module]:
        mlp = block._modules.get("mlp")
        if mlp is None or any(name not in mlp._modules for name in _MLP.values()):
            raise ValueError("this model's MLPs are a mixture of experts: only heads can be pruned")
        return {role: mlp.get_submodule(name) for role, name in _MLP.items()}

    def _channels(self, block: nn.Module) -> int:
        """Of an expert layer: those that a token passes through."""
        if any(name not in block.get_submodule("mlp")._modules for name in _MLP.values()):
            config = cast(Any, self.attention_of(block)).config  # of this layer
            width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
            shared = getattr(config, "shared_expert_intermediate_size", None) or 0
            return int(config.num_experts_per_tok * width + shared)
        return super()._channels(block)

    @property
    def causal(self) -> bool:
        """Whether a row's logits are of the next token."""
        return bool(getattr(self.config, "is_causal", True))

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        wanted = torch.arange(input_ids.shape[1], device=input_ids.device)[rows]
        if self.causal:
            wanted = (wanted - 1).clamp(min=0)
        model = cast(Any, self.model)
        out = model(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=wanted)
        return cast(Tensor, out.logits)


def _wide_norm(attention: nn.Module) -> bool:
    """Whether a query norm runs over all heads at once, and so mixes them."""
    norm = attention._modules.get("q_norm")
    weight = None if norm is None else getattr(norm, "weight", None)
    return weight is not None and weight.numel() != attention.head_dim
