"""Block diffusion on the tree of Llama, Qwen2 and Qwen3: one set of modules, and a family is a configuration.

``Variation`` is the table of what the published trees differ in; a family's file says its line of it and the
keys of its ``config.json``. RMSNorm, rotate-half RoPE, grouped key/value heads, SwiGLU are common to all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sinkprune.models.block_causal import BlockCausalConfig, BlockCausalLayer, BlockCausalLM
from sinkprune.models.common import AttentionCore, GatedMLP
from sinkprune.models.modules import KeyValueCache
from sinkprune.models.norm import RMSNorm, norm_and_rotate


@dataclass(frozen=True)
class Variation:
    """What a family's tree has that another's has not.

    Attributes:
        root: the module that holds the embedding, the layers and the last norm.
        head: the language-model head.
        biased: the projections that have a bias where ``attention_bias`` says so.
        qk_norm: whether each head's queries and keys are normed before RoPE; None: the config's ``qk_norm``.
        sees: what a token sees. ``"blocks"``: its block of positions and those before. ``"context"``: in the
            block that is filled, that block and all before it; elsewhere, itself and what is before it.
            ``"masks last"``: itself and what is before it, where masked tokens come after all others.
        shift: 1 where a row of logits is about the next token.
        seeds: whether a block's first token is filled alone, from the row before it.
        source: the public code and configuration that this line was read from.
    """

    root: str = "model"
    head: str = "lm_head"
    biased: str = "qkvo"
    qk_norm: bool | None = False
    sees: str = "blocks"
    shift: int = 0
    seeds: bool = False
    source: str = ""


@dataclass(kw_only=True)
class DecoderConfig(BlockCausalConfig):
    """The keys that every such ``config.json`` has."""

    intermediate_size: int
    attention_bias: bool = False

    VARIES: ClassVar[Variation]
    REQUIRED: ClassVar[tuple[str, ...]] = (*BlockCausalConfig.REQUIRED, "intermediate_size")

    @property
    def norms_heads(self) -> bool:
        """Whether each head's queries and keys are normed."""
        qk_norm = self.VARIES.qk_norm
        return bool(getattr(self, "qk_norm", False)) if qk_norm is None else qk_norm


class DecoderAttention(AttentionCore):
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.width
        width, kv_width = config.num_attention_heads * self.head_dim, config.kv_heads * self.head_dim
        biased = config.VARIES.biased if config.attention_bias else ""
        self.q_proj = nn.Linear(hidden, width, bias="q" in biased)
        self.k_proj = nn.Linear(hidden, kv_width, bias="k" in biased)
        self.v_proj = nn.Linear(hidden, kv_width, bias="v" in biased)
        self.o_proj = nn.Linear(width, hidden, bias="o" in biased)
        normed = config.norms_heads
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, cache: KeyValueCache | None = None, **seen: Any
    ) -> Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in projected)
        q, k = norm_and_rotate(q, k, cos, sin, self.q_norm, self.k_norm)
        if cache is not None:
            k, v = cache(k, v)
        return self.o_proj(self.attend(q, k, v, **seen))


class DecoderLayer(BlockCausalLayer):
    ATTENTION = "self_attn"

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(
            config, DecoderAttention(config), GatedMLP(config.hidden_size, config.intermediate_size)
        )


class Decoder(BlockCausalLM):
    """The model: ``forward(input_ids, attention_mask=None, rows=…, *, positions=None, order=None,
    cache=None)``."""

    config: DecoderConfig
    EMBEDDING = "embed_tokens"

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(
            config, lambda index: DecoderLayer(config), root=config.VARIES.root, head=config.VARIES.head
        )
