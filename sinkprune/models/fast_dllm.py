"""Fast-dLLM v2, native: Qwen2.5's tree as block diffusion, whose rows of logits are about the next token.

A block's first token comes from the row before it, alone; the others are filled in blocks within the block.
The published config names the block ``bd_size``, and no mask token: the code's own argument does.
Source: "Fast-dLLM v2: Efficient Block-Diffusion LLM" (arXiv 2509.26328), and configuration.py,
modeling.py and config.json of Fast_dLLM_v2_7B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sinkprune.models.decoder import DecoderConfig, Variation


@dataclass(kw_only=True)
class FastDLLMConfig(DecoderConfig):
    """The keys of a Fast-dLLM v2 ``config.json``."""

    bd_size: int = 32
    attention_bias: bool = True
    mask_token_id: int | None = 151665
    rope_theta: float = 1000000.0

    FAMILY: ClassVar[str] = "Fast-dLLM v2"
    MODEL_TYPE: ClassVar[str] = "Fast_dLLM_Qwen"
    ARCHITECTURE: ClassVar[str] = "Fast_dLLM_QwenForCausalLM"
    FIXED: ClassVar[dict[str, Any]] = {**DecoderConfig.FIXED, "attention_bias": True}
    VARIES: ClassVar[Variation] = Variation(
        biased="qkv", shift=1, seeds=True, source="Fast_dLLM_v2_7B, modeling.py and config.json"
    )

    def __post_init__(self) -> None:
        self.block_size = self.bd_size
