"""SDAR, native: Qwen3's tree with the published tensor names and configuration keys, as block diffusion.

A norm of each head's queries and keys before RoPE; the heads' width is ``head_dim``, so that side by side the
queries may be wider than ``hidden_size``. A token sees its own block of ``block_size`` positions and those
before it.
Source: "SDAR: A Synergistic Diffusion-AutoRegression Paradigm" (arXiv 2510.06303) and the configuration files
of SDAR-1.7B to 8B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sinkprune.models.decoder import Decoder, DecoderConfig, Variation


@dataclass(kw_only=True)
class SDARConfig(DecoderConfig):
    """The keys of an SDAR ``config.json``."""

    head_dim: int | None = 128

    FAMILY: ClassVar[str] = "SDAR"
    MODEL_TYPE: ClassVar[str] = "sdar"
    VARIES: ClassVar[Variation] = Variation(qk_norm=True, source="JetAstra/SDAR, modeling_sdar.py")


class SDAR(Decoder):
    config: SDARConfig
