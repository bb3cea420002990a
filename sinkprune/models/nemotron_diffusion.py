"""Nemotron-Labs-Diffusion, native: Ministral 3's tree below ``encoder``, with a head called
``diffusion_head`` and YaRN.

What is written is read causally, as the autoregressive half of its training does; the block that is being
filled sees itself and all of that. A block's first token is the causal next token. A whole sequence without
context (``dlm_paradigm = "bidirectional"``) sees itself.

Beyond ``original_max_position_embeddings`` positions the published code scales queries with their position;
that is not computed here, so the context ends there.
Source: nvidia/Nemotron-Labs-Diffusion, config.json, configuration_ and modeling_nemotron_labs_diffusion.py;
YaRN: arXiv 2309.00071.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sinkprune.models.decoder import DecoderConfig, Variation
from sinkprune.models.rotary import rotary_table, yarn_frequencies


@dataclass(kw_only=True)
class NemotronDiffusionConfig(DecoderConfig):
    """The keys of a Nemotron-Labs-Diffusion ``config.json``."""

    head_dim: int | None = 128
    block_size: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    rope_parameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    FAMILY: ClassVar[str] = "Nemotron-Labs-Diffusion"
    MODEL_TYPE: ClassVar[str] = "nemotron_labs_diffusion"
    ARCHITECTURE: ClassVar[str] = "NemotronLabsDiffusionModel"
    ROPE_TYPES: ClassVar[tuple[str, ...]] = ("default", "yarn")
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "dlm_paradigm": "bidirectional",
    }
    VARIES: ClassVar[Variation] = Variation(
        root="encoder",
        head="diffusion_head",
        sees="context",
        seeds=True,
        source="nvidia/Nemotron-Labs-Diffusion-8B, config.json and modeling_nemotron_labs_diffusion.py",
    )

    def check(self) -> None:
        super().check()
        scales = (float(self.rope_parameters.get(key) or 1.0) for key in ("mscale", "mscale_all_dim"))
        if len(set(scales)) > 1 or self.rope_parameters.get("attention_factor") not in (None, 1.0):
            raise ValueError(
                f"{self.FAMILY} config: only a YaRN that leaves the scores' scale as it is (mscale equal to "
                f"mscale_all_dim, no attention_factor) is supported, got {self.rope_parameters}"
            )

    @property
    def context(self) -> int:
        original = self.rope_parameters.get("original_max_position_embeddings")
        if original is None or not self.rope_parameters.get("llama_4_scaling_beta"):
            return self.max_position_embeddings
        return min(self.max_position_embeddings, int(original))

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        rope = self.rope_parameters
        if rope.get("rope_type", "default") == "default":
            return super().table(positions)
        original = rope.get("original_max_position_embeddings") or self.max_position_embeddings
        frequencies = yarn_frequencies(
            self.rotary_width,
            self.rope_theta,
            rope.get("factor") or self.max_position_embeddings / original,
            original,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            device=positions.device,
        )
        return rotary_table(positions, self.rotary_width, self.rope_theta, frequencies)
