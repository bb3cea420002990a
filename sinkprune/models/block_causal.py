"""What the native block-diffusion models share: a token sees its own block of positions and those before.

A family adds its configuration keys, its layers and where its tensors are.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.caches import Cache, key_positions
from sinkprune.models.llada import DLMOutput, RMSNorm
from sinkprune.modules import AttentionCall, AttentionObserver, KeyValueCache
from sinkprune.rotary import rotary_table

Config = TypeVar("Config", bound="BlockCausalConfig")


@dataclass(kw_only=True)
class BlockCausalConfig:
    """The keys of a published ``config.json`` that shape the computation in every such family; those of no
    consequence are kept in ``extra``."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    block_size: int = 4
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    FAMILY: ClassVar[str]
    MODEL_TYPE: ClassVar[str]
    # Keys that must be positive integers.
    REQUIRED: ClassVar[tuple[str, ...]] = (
        "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
    )  # fmt: skip
    # Keys whose other published values name architectures that the family's module does not compute.
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_sliding_window": False,
    }

    @classmethod
    def from_dict(cls: type[Config], config: dict[str, Any]) -> Config:
        """Read a parsed ``config.json``. Raises ``ValueError`` naming the key that does not fit."""
        for key in cls.REQUIRED:
            if not isinstance(config.get(key), int) or config[key] < 1:
                raise ValueError(
                    f"{cls.FAMILY} config: '{key}' must be a positive integer, got {config.get(key)!r}"
                )
        for key, expected in cls.FIXED.items():
            if config.get(key, expected) not in (expected, None):
                raise ValueError(
                    f"{cls.FAMILY} config: only {key}={expected!r} is supported, got {config[key]!r}"
                )
        rope = config.get("rope_parameters") or {}  # where transformers 5 writes the RoPE keys
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"{cls.FAMILY} config: only rope_type='default' is supported, got {rope['rope_type']!r}"
            )
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        config = {**{key: rope[key] for key in rope.keys() & names}, **config}
        known = {key: value for key, value in config.items() if key in names}
        result = cls(**known, extra={key: value for key, value in config.items() if key not in names})
        result.check()
        return result

    def check(self) -> None:
        """Raise ``ValueError`` naming the sizes that do not fit each other."""
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        if heads % kv_heads or self.rotary_width % 2 or self.width < 1:
            raise ValueError(
                f"{self.FAMILY} config: num_attention_heads must be a multiple of num_key_value_heads and "
                f"the rotated width of a head even, got {heads}, {kv_heads} and {self.rotary_width}"
            )
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(
                f"{self.FAMILY} config: block_size must be a positive integer, got {self.block_size!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to ``config.json``."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {**self.FIXED, **self.extra, **own, "model_type": self.MODEL_TYPE}

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width(self) -> int:
        """Features of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """Leading features of a head that RoPE turns."""
        return self.width


class BlockCausalAttention(nn.Module):
    """The dense attention's core. ``kept_heads`` (an int tensor or None for all) skips heads, ``observer``
    sees every call."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_heads: Tensor | None = None
        self.observer: AttentionObserver | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache | None, **seen: Any) -> Tensor:
        """``[B, Lq, H * D]`` from query ``[B, H, Lq, D]``, key and value ``[B, Hkv, Lq, D]`` after RoPE."""
        if cache is not None:
            k, v = cache(k, v)
        out, lse = ops.attention(q, k, v, kept_heads=self.kept_heads, **seen)
        if self.observer is not None:
            self.observer(AttentionCall(q, k, lse, self.kept_heads, **seen))
        return out.transpose(1, 2).flatten(2)


class GatedMLP(nn.Module):
    """SwiGLU; ``kept_channels`` (an int tensor or None for all) skips channels."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, channels, bias=False)
        self.up_proj = nn.Linear(hidden, channels, bias=False)
        self.down_proj = nn.Linear(channels, hidden, bias=False)
        self.kept_channels: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if self.kept_channels is not None:
            keep = torch.zeros(hidden.shape[-1], dtype=torch.bool, device=hidden.device)
            hidden = hidden * keep.index_fill(0, self.kept_channels, True)
        return self.down_proj(hidden)


class BlockCausalLM(nn.Module):
    """A block-causal language model whose row i of logits is the distribution of token i.

    Subclasses build ``self.model`` and ``self.lm_head`` and say where the parts are.
    """

    config: BlockCausalConfig
    lm_head: nn.Linear | None
    _rotary: tuple[Tensor, Tensor] | None = None

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding: ...

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The layers, called as ``layer(x, cos, sin, cache, **seen)``."""

    @property
    @abstractmethod
    def norm(self) -> RMSNorm: ...

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def rotary(self, length: int, positions: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """``(cos, sin)`` float32 ``[length, rotated]``, or ``[B, 1, length, rotated]`` of ``positions``."""
        width, theta = self.config.rotary_width, self.config.rope_theta
        if positions is not None:
            cos, sin = rotary_table(positions, width, theta)
            return cos.unsqueeze(1), sin.unsqueeze(1)
        if self._rotary is None or self._rotary[0].shape[0] < length or self._rotary[0].device != device:
            self._rotary = rotary_table(torch.arange(length, device=device), width, theta)
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
        """Final normed hidden states ``[B, L, hidden_size]`` for ids ``[B, L]``.

        Args:
            attention_mask: 1 at valid keys: ``[B, L]``, or ``[B, Lk]`` of all keys where there is a cache.
            positions: int64 ``[L]`` or ``[B, L]``, where in the sequence the ids are, which says their block;
                -1 = padding; None = 0 … L-1.
            cache: of keys after RoPE, and values, of the tokens that are not among the ids.

        Raises:
            ValueError: a shape that does not fit, or more tokens than the context.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must have shape [B, L] with L >= 1, got {tuple(input_ids.shape)}")
        batch, length = input_ids.shape
        if length > self.config.max_position_embeddings:
            raise ValueError(f"{length} tokens exceed the context of {self.config.max_position_embeddings}")
        keys = key_positions(input_ids, positions, cache, attention_mask)
        if positions is None and cache is not None:
            positions = torch.arange(length, device=input_ids.device)
        at = None if positions is None else positions.expand(batch, -1)
        cos, sin = self.rotary(length, at, input_ids.device)
        seen = {
            "key_padding_mask": None if attention_mask is None else attention_mask.bool(),
            "block_size": self.config.block_size,
            "query_positions": at,
            "key_positions": at if keys is None else keys.expand(batch, -1),
        }
        x = self.embedding(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if cache is None else cache.layer(index), **seen)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states ``[..., hidden_size]``."""
        return F.linear(hidden, self.embedding.weight) if self.lm_head is None else self.lm_head(hidden)

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


def positions_of(attention_mask: Tensor) -> Tensor:
    """Where each token of a padded batch ``[B, L]`` is in its own sequence: 0, 1, … and -1 at padding."""
    valid = attention_mask.bool()
    return torch.where(valid, valid.cumsum(1) - 1, -1)
