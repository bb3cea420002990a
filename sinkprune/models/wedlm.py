"""WeDLM, native: Qwen2.5's or Qwen3's tree, causal over an order in which masked tokens come last.

A masked token sees every token that is known, wherever it stands, and the masked ones before it; positions
for RoPE stay the true ones, and a row's logits are about its own token.
Source: "WeDLM" (arXiv 2512.22737) and Tencent/WeDLM: hf_compat/configuration_wedlm.py, modeling_wedlm.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sinkprune.models.decoder import DecoderConfig, Variation


@dataclass(kw_only=True)
class WeDLMConfig(DecoderConfig):
    """The keys of a WeDLM ``config.json``."""

    attention_bias: bool = True
    qk_norm: bool = False
    block_size: int = 16  # the published engine's wedlm_window_size

    FAMILY: ClassVar[str] = "WeDLM"
    MODEL_TYPE: ClassVar[str] = "wedlm"
    ARCHITECTURE: ClassVar[str] = "WeDLMForCausalLM"
    FIXED: ClassVar[dict[str, Any]] = DecoderConfig.FIXED
    VARIES: ClassVar[Variation] = Variation(
        biased="qkv",
        qk_norm=None,
        sees="masks last",
        source="Tencent/WeDLM, hf_compat/modeling_wedlm.py and configuration_wedlm.py",
    )
