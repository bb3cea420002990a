"""LLaDA, native: the published architecture with the published tensor names and configuration keys.

A bidirectional Llama-like transformer (RMSNorm, rotate-half RoPE in float32, SwiGLU, no biases by default,
optional grouped key/value heads, optional full-width qk-norm) that predicts every masked token of a sequence
at once.
Source: "Large Language Diffusion Models" (arXiv 2502.09992) and the configuration files of LLaDA-8B and
LLaDA-1.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune.models.bidirectional import BidirectionalAttention, BidirectionalLM
from sinkprune.models.caches import Cache, key_positions
from sinkprune.models.common import DLMOutput, PublishedConfig, skip_channels
from sinkprune.models.features import LayerParts
from sinkprune.models.modules import KeyValueCache, Rotary, SinkPrunedAttention, run_layer
from sinkprune.models.norm import RMSNorm, gated


@dataclass(kw_only=True)
class LLaDAConfig(PublishedConfig):
    """The keys of a LLaDA ``config.json``."""

    d_model: int
    n_heads: int
    n_layers: int
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    n_kv_heads: int | None = None
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rms_norm_eps: float = 1e-5
    attention_layer_norm: bool = False
    attention_layer_norm_with_affine: bool = True
    include_bias: bool = False
    include_qkv_bias: bool = False
    weight_tying: bool = False
    scale_logits: bool = False

    FAMILY: ClassVar[str] = "LLaDA"
    MODEL_TYPE: ClassVar[str] = "llada"
    REQUIRED: ClassVar[tuple[str, ...]] = ("d_model", "n_heads", "n_layers", "vocab_size")
    FIXED: ClassVar[dict[str, Any]] = {
        "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi":
        False, "rope_full_precision": True, "input_emb_norm": False, "bias_for_layer_norm": False,
            "layer_norm_with_affine": True,
    }  # fmt: skip

    def check(self) -> None:
        if self.vocab_size > self.vocabulary_rows:
            raise ValueError(
                f"LLaDA config: embedding_size must be at least vocab_size, got {self.vocabulary_rows} and "
                f"{self.vocab_size}"
            )
        if self.d_model % self.n_heads or self.n_heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(
                "LLaDA config: d_model must be an even multiple of n_heads and n_heads a multiple of "
                f"n_kv_heads, got d_model={self.d_model}, n_heads={self.n_heads}, n_kv_heads={self.kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def rotary_width(self) -> int:
        return self.head_dim

    @property
    def context(self) -> int:
        return self.max_sequence_length

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def mlp_width(self) -> int:
        return self.mlp_hidden_size if self.mlp_hidden_size is not None else self.mlp_ratio * self.d_model

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding table, which the published checkpoints pad beyond ``vocab_size``."""
        return self.embedding_size or self.vocab_size


class LLaDABlock(BidirectionalAttention):
    """One transformer block. It has no attention module: the projections are its own, as in the published
        tree.

    ``kept_heads`` (an int tensor or None for all) skips heads with the weights left as they are;
    ``attention`` and ``mlp``, where set, are the compact modules that replaced the block's projections;
    ``observer`` sees every call.
    """

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, head = config.d_model, config.head_dim
        kv_width = config.kv_heads * head
        qkv_bias = config.include_bias or config.include_qkv_bias
        self.head_dim = head
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.attn_out = nn.Linear(width, width, bias=config.include_bias)
        self.ff_proj = nn.Linear(width, config.mlp_width, bias=config.include_bias)
        self.up_proj = nn.Linear(width, config.mlp_width, bias=config.include_bias)
        self.ff_out = nn.Linear(config.mlp_width, width, bias=config.include_bias)
        self.q_norm = self.k_norm = None
        if config.attention_layer_norm:
            affine = config.attention_layer_norm_with_affine
            self.q_norm = RMSNorm(width, config.rms_norm_eps, affine)
            self.k_norm = RMSNorm(kv_width, config.rms_norm_eps, affine)
        self.attention: nn.Module | None = None
        self.mlp: nn.Module | None = None
        self.kept_channels: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_padding_mask: Tensor | None,
        cache: KeyValueCache | None = None,
        cached_rotary: Rotary | None = None,
    ) -> Tensor:
        attend = self._dense_attention if self.attention is None else self.attention
        feed = self._feed if self.mlp is None else self.mlp
        seen = (cos, sin, key_padding_mask)
        cached = {"cache": cache, "cached_rotary": cached_rotary}
        return run_layer(x, (self.attn_norm, self.ff_norm), attend, feed, *seen, **cached)

    def parts(self) -> LayerParts:
        """What a cache runs by itself."""
        compact = self.attention
        return LayerParts(
            self.attn_norm,
            self._dense_attention if compact is None else compact,
            self.v_proj if compact is None else cast(SinkPrunedAttention, compact).values,
            self.ff_norm,
            self._feed if self.mlp is None else self.mlp,
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:  # over the full width: mixes the heads
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _dense_attention(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_padding_mask: Tensor | None,
        cache: KeyValueCache | None,
        cached_rotary: Rotary | None,
    ) -> Tensor:
        return self.attn_out(self.attended_heads(x, cos, sin, key_padding_mask, cache, cached_rotary))

    def _feed(self, x: Tensor) -> Tensor:
        hidden = gated(x, self.ff_proj, self.up_proj)
        return self.ff_out(skip_channels(hidden, self.kept_channels))


class LLaDA(BidirectionalLM):
    """The model: ``forward(input_ids, attention_mask=None, rows=…, *, positions=None, cache=None)``;
    bidirectional. Row i of its logits predicts token i."""

    config: LLaDAConfig

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocabulary_rows, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            transformer["ff_out"] = nn.Linear(
                config.d_model, config.vocabulary_rows, bias=config.include_bias
            )
        self.model = nn.ModuleDict({"transformer": transformer})

    @property
    def _transformer(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.model["transformer"])

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self._transformer["blocks"])

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Final normed hidden states ``[B, L, d_model]`` for ids ``[B, L]``.

        Args:
            attention_mask: 1 at valid keys: ``[B, L]``, or ``[B, Lk]`` of all keys where there is a cache.
            positions: int64 ``[L]`` or ``[B, L]``, where in the sequence the ids are; None = 0 … L-1.
            cache: of keys before RoPE, and values, of the tokens that are not among the ids.

        Raises:
            ValueError: a shape that does not fit, or more tokens than the context.
        """
        self.check_ids(input_ids)
        keys = key_positions(input_ids, positions, cache, attention_mask)
        key_padding_mask = None if attention_mask is None else attention_mask.bool()
        embedding, norm = (self._transformer[name] for name in ("wte", "ln_f"))
        return norm(self.through(embedding, self.blocks, input_ids, key_padding_mask, positions, keys, cache))

    def head(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states ``[..., d_model]``."""
        transformer = self._transformer
        logits = (
            F.linear(hidden, cast(nn.Embedding, transformer["wte"]).weight)
            if self.config.weight_tying
            else transformer["ff_out"](hidden)
        )
        return logits / self.config.d_model**0.5 if self.config.scale_logits else logits

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rows: slice = slice(None),
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> DLMOutput:
        """Logits of ``rows`` (default: of every token); the LM head runs on those only. The rest as in
        ``hidden``."""
        hidden = self.hidden(input_ids, attention_mask, positions=positions, cache=cache)
        return DLMOutput(self.head(hidden[:, rows]))
