"""SDAR, native: Qwen3's tree with the published tensor names and configuration keys, as block diffusion.

RMSNorm, a norm of each head's queries and keys before rotate-half RoPE, grouped key/value heads whose width
is ``head_dim`` (side by side the queries may be wider than ``hidden_size``), SwiGLU. A token sees its own
block of ``block_size`` positions and those before it.
Source: "SDAR: A Synergistic Diffusion-AutoRegression Paradigm" (arXiv 2510.06303) and the configuration files
of SDAR-1.7B to 8B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from sinkprune.models.block_causal import (
    BlockCausalAttention,
    BlockCausalConfig,
    BlockCausalLM,
    GatedMLP,
)
from sinkprune.models.llada import RMSNorm
from sinkprune.modules import KeyValueCache
from sinkprune.rotary import apply_rotary


@dataclass(kw_only=True)
class SDARConfig(BlockCausalConfig):
    """The keys of an SDAR ``config.json``."""

    intermediate_size: int
    head_dim: int | None = 128
    attention_bias: bool = False

    FAMILY: ClassVar[str] = "SDAR"
    MODEL_TYPE: ClassVar[str] = "sdar"
    REQUIRED: ClassVar[tuple[str, ...]] = (*BlockCausalConfig.REQUIRED, "intermediate_size")


class SDARAttention(BlockCausalAttention):
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
        return self.o_proj(self.attend(q, k, v, cache, **seen))


class SDARLayer(nn.Module):
    """One transformer layer. Compact modules replace ``self_attn`` and ``mlp`` themselves."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        self.self_attn: nn.Module = SDARAttention(config)
        self.mlp: nn.Module = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None, **seen: Any
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache=cache, **seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class SDAR(BlockCausalLM):
    """The model: ``forward(input_ids, attention_mask=None, rows=…, *, positions=None, cache=None)``."""

    config: SDARConfig

    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(SDARLayer(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model["embed_tokens"])

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model["layers"])

    @property
    def norm(self) -> RMSNorm:
        return cast(RMSNorm, self.model["norm"])
