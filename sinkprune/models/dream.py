"""Dream and DiffuCoder, native: Qwen2's tree with the published tensor names and configuration keys.

A bidirectional transformer (RMSNorm, rotate-half RoPE in float32, grouped key/value heads, biases on q, k and
v only, SwiGLU) whose row i of logits is the distribution of token i + 1: it was trained from an
autoregressive model and keeps its shift.
Source: "Dream 7B" (arXiv 2508.15487) and the configuration files of Dream-7B and DiffuCoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune.models.bidirectional import BidirectionalAttention, BidirectionalLM
from sinkprune.models.caches import Cache, key_positions
from sinkprune.models.common import DLMOutput, GatedMLP, PublishedConfig
from sinkprune.models.features import LayerParts
from sinkprune.models.modules import KeyValueCache, Rotary, run_layer
from sinkprune.models.norm import RMSNorm


@dataclass(kw_only=True)
class DreamConfig(PublishedConfig):
    """The keys of a Dream or DiffuCoder ``config.json``."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    intermediate_size: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    bos_token_id: int | None = None

    FAMILY: ClassVar[str] = "Dream"
    MODEL_TYPE: ClassVar[str] = "Dream"
    REQUIRED: ClassVar[tuple[str, ...]] = (
        "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size",
    )  # fmt: skip
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_sliding_window": False,
    }

    def check(self) -> None:
        heads = self.num_attention_heads
        if self.hidden_size % heads or heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(
                "Dream config: hidden_size must be an even multiple of num_attention_heads and that a "
                f"multiple of num_key_value_heads, got {self.hidden_size}, {heads} and {self.kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        return self.head_dim

    @property
    def context(self) -> int:
        return self.max_position_embeddings

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


class DreamAttention(BidirectionalAttention):
    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        width, kv_width = config.hidden_size, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_padding_mask: Tensor | None,
        *,
        cache: KeyValueCache | None = None,
        cached_rotary: Rotary | None = None,
    ) -> Tensor:
        return self.o_proj(self.attended_heads(x, cos, sin, key_padding_mask, cache, cached_rotary))


class DreamLayer(nn.Module):
    """One transformer layer. Compact modules replace ``self_attn`` and ``mlp`` themselves."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn: nn.Module = DreamAttention(config)
        self.mlp: nn.Module = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_padding_mask: Tensor | None,
        cache: KeyValueCache | None = None,
        cached_rotary: Rotary | None = None,
    ) -> Tensor:
        seen = (cos, sin, key_padding_mask)
        cached = {"cache": cache, "cached_rotary": cached_rotary}
        norms = (self.input_layernorm, self.post_attention_layernorm)
        return run_layer(x, norms, self.self_attn, self.mlp, *seen, **cached)

    def parts(self) -> LayerParts:
        """What a cache runs by itself."""
        attention = self.self_attn
        values = attention.v_proj if isinstance(attention, DreamAttention) else attention.values
        return LayerParts(
            self.input_layernorm,
            attention,
            cast(Callable[[Tensor], Tensor], values),
            self.post_attention_layernorm,
            self.mlp,
        )


class Dream(BidirectionalLM):
    """The model: ``forward(input_ids, attention_mask=None, position_ids=None, rows=…, *, cache=None)``.

    Its logits are the published ones, a token late: ``cat((logits[:, :1], logits[:, :-1]), 1)`` aligns them.
    """

    config: DreamConfig

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(DreamLayer(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model["layers"])

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | str | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Final normed hidden states ``[B, L, hidden_size]`` for ids ``[B, L]``.

        Args:
            attention_mask: 1 at valid keys ``[B, L]`` (``[B, Lk]`` of all keys where there is a cache); or as
                the published sampler builds it: ``"full"`` or bool ``[B, 1, L, L]``, True where both tokens
                are valid.
            positions: int ``[L]`` or ``[B, L]``; None = 0 … L-1 (RoPE is relative: padding needs no other).
            cache: of keys before RoPE, and values, of the tokens that are not among the ids.

        Raises:
            ValueError: a shape that does not fit, or a mask that is more than padding.
        """
        self.check_ids(input_ids)
        keys = key_positions(input_ids, positions, cache)
        shape = input_ids.shape if keys is None else (input_ids.shape[0], keys.shape[-1])
        key_padding_mask = padding_of(attention_mask, torch.Size(shape))
        embedding, norm = (self.model[name] for name in ("embed_tokens", "norm"))
        return norm(self.through(embedding, self.layers, input_ids, key_padding_mask, positions, keys, cache))

    def head(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states ``[..., hidden_size]``."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return F.linear(hidden, cast(nn.Embedding, self.model["embed_tokens"]).weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | str | None = None,
        position_ids: Tensor | None = None,
        rows: slice | Tensor = slice(None),
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> DLMOutput:
        """Logits of ``rows`` (a slice or indices; default: of every row); the LM head runs on those only.

        ``position_ids`` is the published name of ``positions``. The rest as in ``hidden``.
        """
        positions = position_ids if positions is None else positions
        return DLMOutput(self.head(self.hidden(input_ids, attention_mask, positions, cache)[:, rows]))


def padding_of(attention_mask: Tensor | str | None, shape: torch.Size) -> Tensor | None:
    """The key padding mask, bool ``[B, L]``, of a mask as ``Dream.hidden`` takes it."""
    if attention_mask is None or (isinstance(attention_mask, str) and attention_mask == "full"):
        return None
    batch, length = shape
    if isinstance(attention_mask, Tensor) and attention_mask.shape == shape:
        return attention_mask.bool()
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, 1, length, length):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else repr(attention_mask)
        raise ValueError(
            f"attention_mask must be 'full' or have shape {(batch, length)} or {(batch, 1, length, length)}, "
            f"got {got}"
        )
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"attention_mask of four dimensions must be bool, got {attention_mask.dtype}")
    pairs = attention_mask[:, 0]
    valid = pairs.any(1)
    if not torch.equal(pairs, valid[:, None, :] & valid[:, :, None]):
        raise ValueError("attention_mask must be padding alone: True where both tokens are valid")
    return valid
