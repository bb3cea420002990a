"""SDAR, native: Qwen3's tree with the published tensor names and configuration keys, as block diffusion.

RMSNorm, a norm of each head's queries and keys before rotate-half RoPE, grouped key/value heads whose width
is ``head_dim`` (side by side the queries may be wider than ``hidden_size``), SwiGLU. A token sees its own
block of ``block_size`` positions and those before it.
Source: "SDAR: A Synergistic Diffusion-AutoRegression Paradigm" (arXiv 2510.06303) and the configuration files
of SDAR-1.7B to 8B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sinkprune.models.block_causal import BlockCausalConfig, BlockCausalLayer, BlockCausalLM
from sinkprune.models.common import AttentionCore, GatedMLP, RMSNorm
from sinkprune.models.modules import KeyValueCache
from sinkprune.models.rotary import apply_rotary


@dataclass(kw_only=True)
class SDARConfig(BlockCausalConfig):
    """The keys of an SDAR ``config.json``."""

    intermediate_size: int
    head_dim: int | None = 128
    attention_bias: bool = False

    FAMILY: ClassVar[str] = "SDAR"
    MODEL_TYPE: ClassVar[str] = "sdar"
    REQUIRED: ClassVar[tuple[str, ...]] = (*BlockCausalConfig.REQUIRED, "intermediate_size")


class SDARAttention(AttentionCore):
    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        hidden, bias, self.head_dim = config.hidden_size, config.attention_bias, config.width
        width, kv_width = config.num_attention_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, hidden, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, cache: KeyValueCache | None = None, **seen: Any
    ) -> Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in projected)
        q, k = apply_rotary(self.q_norm(q), cos, sin), apply_rotary(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache(k, v)
        return self.o_proj(self.attend(q, k, v, **seen))


class SDARLayer(BlockCausalLayer):
    ATTENTION = "self_attn"

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(
            config, SDARAttention(config), GatedMLP(config.hidden_size, config.intermediate_size)
        )


class SDAR(BlockCausalLM):
    """The model: ``forward(input_ids, attention_mask=None, rows=…, *, positions=None, cache=None)``."""

    config: SDARConfig
    EMBEDDING = "embed_tokens"

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config, lambda index: SDARLayer(config))
