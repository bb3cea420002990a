"""Stable-DiffCoder, native: Seed-Coder's (Llama's) tree as block diffusion.

Its config.json is Llama's: ``architectures`` alone tells them apart. The block and the mask token are the
published sampler's arguments, 4 and 5.
Source: "Stable-DiffCoder" (arXiv 2601.15892) and modeling_stable_diffcoder.py; the sizes are Seed-Coder's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sinkprune.models.decoder import DecoderConfig, Variation


@dataclass(kw_only=True)
class StableDiffCoderConfig(DecoderConfig):
    """The keys of a Stable-DiffCoder ``config.json``."""

    block_size: int = 4
    mask_token_id: int | None = 5

    FAMILY: ClassVar[str] = "Stable-DiffCoder"
    MODEL_TYPE: ClassVar[str] = "llama"
    ARCHITECTURE: ClassVar[str] = "StableDiffcoderForCausalLM"
    FIXED: ClassVar[dict[str, Any]] = {**DecoderConfig.FIXED, "mlp_bias": False, "layer_norm_eps": None}
    VARIES: ClassVar[Variation] = Variation(source="Stable-DiffCoder-8B, modeling_stable_diffcoder.py")
