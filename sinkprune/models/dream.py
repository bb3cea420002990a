"""Dream and DiffuCoder, native: Qwen2's tree with the published tensor names and configuration keys.

A bidirectional transformer (RMSNorm, rotate-half RoPE in float32, grouped key/value heads, biases on q, k and
v only, SwiGLU) whose row i of logits is the distribution of token i + 1: it was trained from an
autoregressive model and keeps its shift.
Source: "Dream 7B" (arXiv 2508.15487) and the configuration files of Dream-7B and DiffuCoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.caches import Cache, key_positions
from sinkprune.features import LayerParts
from sinkprune.models.llada import DLMOutput, RMSNorm
from sinkprune.modules import AttentionCall, AttentionObserver, KeyValueCache, Rotary
from sinkprune.rotary import apply_rotary, rotary_table

MODEL_TYPE = "Dream"


@dataclass
class DreamConfig:
    """The keys of a published ``config.json`` that shape the computation; the others are kept in
    ``extra``."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 131072
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    # Keys whose other published values name architectures that this module does not compute.
    _FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_sliding_window": False,
    }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> DreamConfig:
        """Read a parsed ``config.json``. Raises ``ValueError`` naming the key that does not fit."""
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        for key in (
            "hidden_size",
            "num_attention_heads",
            "num_hidden_layers",
            "intermediate_size",
            "vocab_size",
        ):
            if not isinstance(config.get(key), int) or config[key] < 1:
                raise ValueError(f"Dream config: '{key}' must be a positive integer, got {config.get(key)!r}")
        for key, expected in cls._FIXED.items():
            if config.get(key, expected) not in (expected, None):
                raise ValueError(f"Dream config: only {key}={expected!r} is supported, got {config[key]!r}")
        rope = config.get("rope_parameters") or {}  # where transformers 5 writes the RoPE keys
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"Dream config: only rope_type='default' is supported, got {rope['rope_type']!r}"
            )
        config = {"rope_theta": rope["rope_theta"], **config} if "rope_theta" in rope else config
        known = {key: value for key, value in config.items() if key in names}
        result = cls(**known, extra={key: value for key, value in config.items() if key not in names})
        heads = result.num_attention_heads
        if result.hidden_size % heads or heads % result.kv_heads or result.head_dim % 2:
            raise ValueError(
                "Dream config: hidden_size must be an even multiple of num_attention_heads and that a "
                f"multiple of num_key_value_heads, got {result.hidden_size}, {heads} and {result.kv_heads}"
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to ``config.json``."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {**self._FIXED, **self.extra, **own, "model_type": MODEL_TYPE}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


class DreamAttention(nn.Module):
    """Dense attention; ``kept_heads`` (an int tensor or None for all) skips heads, ``observer`` sees every
    call."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        width, kv_width = config.hidden_size, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, width, bias=True)
        self.k_proj = nn.Linear(width, kv_width, bias=True)
        self.v_proj = nn.Linear(width, kv_width, bias=True)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.kept_heads: Tensor | None = None
        self.observer: AttentionObserver | None = None

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
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in projected)
        if cache is not None:
            k, v = cache(k, v)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, *(cached_rotary or (cos, sin)))
        out, lse = ops.attention(q, k, v, kept_heads=self.kept_heads, key_padding_mask=key_padding_mask)
        if self.observer is not None:
            self.observer(AttentionCall(q, k, lse, self.kept_heads, None, key_padding_mask))
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DreamMLP(nn.Module):
    """SwiGLU; ``kept_channels`` (an int tensor or None for all) skips channels."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.kept_channels: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if self.kept_channels is not None:
            keep = torch.zeros(hidden.shape[-1], dtype=torch.bool, device=hidden.device)
            hidden = hidden * keep.index_fill(0, self.kept_channels, True)
        return self.down_proj(hidden)


class DreamLayer(nn.Module):
    """One transformer layer. Compact modules replace ``self_attn`` and ``mlp`` themselves."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn: nn.Module = DreamAttention(config)
        self.mlp: nn.Module = DreamMLP(config)
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
        x = x + self.self_attn(
            self.input_layernorm(x), cos, sin, key_padding_mask, cache=cache, cached_rotary=cached_rotary
        )
        return x + self.mlp(self.post_attention_layernorm(x))

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


class Dream(nn.Module):
    """The model: ``forward(input_ids, attention_mask=None, position_ids=None, rows=…, *, cache=None)``.

    Its logits are the published ones, a token late: ``cat((logits[:, :1], logits[:, :-1]), 1)`` aligns them.
    """

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
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model["layers"])

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def rotary(self, length: int, positions: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """``(cos, sin)`` float32 ``[length, head_dim]`` of 0 … length-1 or of ``positions`` ``[length]``; or
        ``[B, 1, length, head_dim]`` of ``positions`` ``[B, length]``."""
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
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must have shape [B, L] with L >= 1, got {tuple(input_ids.shape)}")
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[1]} tokens exceed the context of {self.config.max_position_embeddings}"
            )
        keys = key_positions(input_ids, positions, cache)
        shape = input_ids.shape if keys is None else (input_ids.shape[0], keys.shape[-1])
        key_padding_mask = padding_of(attention_mask, torch.Size(shape))
        cos, sin = self.rotary(input_ids.shape[1], positions, input_ids.device)
        cached_rotary = None if keys is None else self.rotary(keys.shape[-1], keys, keys.device)
        x = self.model["embed_tokens"](input_ids)
        for index, layer in enumerate(self.layers):
            if cache is None or cached_rotary is None:
                x = layer(x, cos, sin, key_padding_mask)
            else:
                x = cache.run(index, layer, x, cos, sin, key_padding_mask, cached_rotary)
        return self.model["norm"](x)

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
