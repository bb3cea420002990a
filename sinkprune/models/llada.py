"""LLaDA, native: the published architecture with the published tensor names and configuration keys.

A bidirectional Llama-like transformer (RMSNorm, rotate-half RoPE in float32, SwiGLU, no biases by default,
optional grouped key/value heads, optional full-width qk-norm) that predicts every masked token of a sequence
at once.
Source: "Large Language Diffusion Models" (arXiv 2502.09992) and the configuration files of LLaDA-8B and
LLaDA-1.5.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.caches import Cache, key_positions
from sinkprune.features import LayerParts
from sinkprune.modules import AttentionCall, AttentionObserver, KeyValueCache, Rotary, SinkPrunedAttention
from sinkprune.rotary import apply_rotary, rotary_table

MODEL_TYPE = "llada"


@dataclass
class LLaDAConfig:
    """The keys of a published LLaDA ``config.json`` that shape the computation; the others are kept in
    ``extra``."""

    d_model: int
    n_heads: int
    n_layers: int
    vocab_size: int
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    n_kv_heads: int | None = None
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    attention_layer_norm: bool = False
    attention_layer_norm_with_affine: bool = True
    include_bias: bool = False
    include_qkv_bias: bool = False
    weight_tying: bool = False
    scale_logits: bool = False
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    # Keys whose other published values name architectures that this module does not compute.
    _FIXED: ClassVar[dict[str, Any]] = {
        "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi":
        False, "rope_full_precision": True, "input_emb_norm": False, "bias_for_layer_norm": False,
            "layer_norm_with_affine": True,
    }  # fmt: skip

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> LLaDAConfig:
        """Read a parsed ``config.json``. Raises ``ValueError`` naming the key that does not fit."""
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        for key in ("d_model", "n_heads", "n_layers", "vocab_size"):
            if not isinstance(config.get(key), int) or config[key] < 1:
                raise ValueError(f"LLaDA config: '{key}' must be a positive integer, got {config.get(key)!r}")
        for key, expected in cls._FIXED.items():
            if config.get(key, expected) not in (expected, None):
                raise ValueError(f"LLaDA config: only {key}={expected!r} is supported, got {config[key]!r}")
        known = {key: value for key, value in config.items() if key in names}
        result = cls(**known, extra={key: value for key, value in config.items() if key not in names})
        if result.d_model % result.n_heads or result.n_heads % result.kv_heads or result.head_dim % 2:
            raise ValueError(
                "LLaDA config: d_model must be an even multiple of n_heads and n_heads a multiple of "
                f"n_kv_heads, got d_model={result.d_model}, n_heads={result.n_heads}, "
                f"n_kv_heads={result.kv_heads}"
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to ``config.json``."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {**self._FIXED, **self.extra, **own, "model_type": MODEL_TYPE}

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

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


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 over the last dimension, then a gain."""

    def __init__(self, width: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
        return normed if self.weight is None else normed * self.weight


class LLaDABlock(nn.Module):
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
        self.kept_heads: Tensor | None = None
        self.kept_channels: Tensor | None = None
        self.observer: AttentionObserver | None = None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_padding_mask: Tensor | None,
        cache: KeyValueCache | None = None,
        cached_rotary: Rotary | None = None,
    ) -> Tensor:
        attend = self._attend if self.attention is None else self.attention
        x = x + attend(
            self.attn_norm(x), cos, sin, key_padding_mask, cache=cache, cached_rotary=cached_rotary
        )
        feed = self._feed if self.mlp is None else self.mlp
        return x + feed(self.ff_norm(x))

    def parts(self) -> LayerParts:
        """What a cache runs by itself."""
        compact = self.attention
        return LayerParts(
            self.attn_norm,
            self._attend if compact is None else compact,
            self.v_proj if compact is None else cast(SinkPrunedAttention, compact).values,
            self.ff_norm,
            self._feed if self.mlp is None else self.mlp,
        )

    def _attend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_padding_mask: Tensor | None,
        cache: KeyValueCache | None,
        cached_rotary: Rotary | None,
    ) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:  # over the full width: mixes the heads
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache(k, v)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, *(cached_rotary or (cos, sin)))
        out, lse = ops.attention(q, k, v, kept_heads=self.kept_heads, key_padding_mask=key_padding_mask)
        if self.observer is not None:
            self.observer(AttentionCall(q, k, lse, self.kept_heads, None, key_padding_mask))
        return self.attn_out(out.transpose(1, 2).flatten(2))

    def _feed(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.ff_proj(x)) * self.up_proj(x)
        if self.kept_channels is not None:
            keep = torch.zeros(hidden.shape[-1], dtype=torch.bool, device=hidden.device)
            hidden = hidden * keep.index_fill(0, self.kept_channels, True)
        return self.ff_out(hidden)


@dataclass
class DLMOutput:
    """What a native model returns: ``logits`` ``[B, L, V]``, unshifted (row i predicts token i)."""

    logits: Tensor


class LLaDA(nn.Module):
    """The model: ``forward(input_ids, attention_mask=None, rows=…, *, positions=None, cache=None)``;
    bidirectional."""

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
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def _transformer(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.model["transformer"])

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self._transformer["blocks"])

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def rotary(
        self, length: int, device: torch.device, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(cos, sin)`` float32 ``[length, head_dim]`` of 0 … length-1 (kept up to the longest length seen),
        or of ``positions`` ``[length]``, or ``[B, 1, length, head_dim]`` of ``positions`` ``[B, length]``."""
        if positions is not None:
            cos, sin = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
            return (cos, sin) if positions.dim() == 1 else (cos.unsqueeze(1), sin.unsqueeze(1))
        if self._rotary is None or self._rotary[0].shape[0] < length or self._rotary[0].device != device:
            table = torch.arange(length, device=device)
            self._rotary = rotary_table(table, self.config.head_dim, self.config.rope_theta)
        cos, sin = self._rotary
        return cos[:length], sin[:length]

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
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must have shape [B, L] with L >= 1, got {tuple(input_ids.shape)}")
        if input_ids.shape[1] > self.config.max_sequence_length:
            raise ValueError(
                f"{input_ids.shape[1]} tokens exceed the context of {self.config.max_sequence_length}"
            )
        keys = key_positions(input_ids, positions, cache, attention_mask)
        key_padding_mask = None if attention_mask is None else attention_mask.bool()
        cos, sin = self.rotary(input_ids.shape[1], input_ids.device, positions)
        cached_rotary = None if keys is None else self.rotary(keys.shape[-1], keys.device, keys)
        x = self._transformer["wte"](input_ids)
        for index, block in enumerate(self.blocks):
            if cache is None or cached_rotary is None:
                x = block(x, cos, sin, key_padding_mask)
            else:
                x = cache.run(index, block, x, cos, sin, key_padding_mask, cached_rotary)
        return self._transformer["ln_f"](x)

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
