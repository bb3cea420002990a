"""iLLaDA, native: Llama's tree, all of whose tokens see each other, with the embedding as its head.

It is not LLaDA's tree, though the published samplers of LLaDA run it. A row's logits are about its own token;
the mask token, 5, is the published scripts' argument.
Source: "Improved Large Language Diffusion Models" (arXiv 2606.25331), modeling_illada.py of iLLaDA-8B and the
readme of ML-GSAI/LLaDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sinkprune.models.dream import Dream, DreamConfig


@dataclass(kw_only=True)
class ILLaDAConfig(DreamConfig):
    """The keys of an iLLaDA ``config.json``."""

    attention_bias: bool = False
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8192
    mask_token_id: int | None = 5

    FAMILY: ClassVar[str] = "iLLaDA"
    MODEL_TYPE: ClassVar[str] = "illada"
    ARCHITECTURE: ClassVar[str] = "ILLaDAForCausalLM"
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "layer_norm_eps": None,
    }


class ILLaDA(Dream):
    """The model: called as ``Dream`` is, but a row of its logits is about its own token."""

    config: ILLaDAConfig
