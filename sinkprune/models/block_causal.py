"""What the native block-diffusion models share: a token sees its own block of positions and those before.

A family adds its configuration keys, its layers and where its tensors are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune.models.caches import Cache, key_positions
from sinkprune.models.common import DLMOutput, NativeLM, PublishedConfig
from sinkprune.models.modules import KeyValueCache, run_layer
from sinkprune.models.norm import RMSNorm


@dataclass(kw_only=True)
class BlockCausalConfig(PublishedConfig):
    """The keys that every such family has."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    block_size: int = 4
    bos_token_id: int | None = None

    REQUIRED: ClassVar[tuple[str, ...]] = (
        "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
    )  # fmt: skip
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_sliding_window": False,
    }

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

    @property
    def context(self) -> int:
        return self.max_position_embeddings

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width(self) -> int:
        """Features of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        return self.width


class BlockCausalLayer(nn.Module):
    """One transformer layer, whose attention is the module called ``ATTENTION``. Compact modules replace that
    and a dense ``mlp``."""

    ATTENTION: ClassVar[str]

    def __init__(self, config: BlockCausalConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.add_module(self.ATTENTION, attention)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None, **seen: Any
    ) -> Tensor:
        norms = (self.input_layernorm, self.post_attention_layernorm)
        return run_layer(x, norms, getattr(self, self.ATTENTION), self.mlp, cos, sin, cache=cache, **seen)


class BlockCausalLM(NativeLM):
    """A block-causal language model whose row i of logits is the distribution of token i.

    Subclasses name the embedding and build each layer, called as ``layer(x, cos, sin, cache, **seen)``.
    """

    config: BlockCausalConfig
    EMBEDDING: ClassVar[str]

    def __init__(
        self,
        config: BlockCausalConfig,
        build: Callable[[int], nn.Module],
        *,
        root: str = "model",
        head: str = "lm_head",
    ) -> None:
        super().__init__()
        self.config = config
        self._root, self._head = root, head
        parts = {
            self.EMBEDDING: nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(map(build, range(config.num_hidden_layers))),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        }
        self.add_module(root, nn.ModuleDict(parts))
        tied = config.tie_word_embeddings
        self.add_module(head, None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False))

    def _part(self, name: str) -> nn.Module:
        return cast(nn.ModuleDict, self.get_submodule(self._root))[name]

    @property
    def embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self._part(self.EMBEDDING))

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self._part("layers"))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        order: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Final normed hidden states ``[B, L, hidden_size]`` for ids ``[B, L]``.

        Args:
            attention_mask: 1 at valid keys: ``[B, L]``, or ``[B, Lk]`` of all keys where there is a cache.
            positions: int64 ``[L]`` or ``[B, L]``, where in the sequence the ids are, which says their block;
                -1 = padding; None = 0 … L-1.
            order: int64 of the same shape, where blocks do not say who sees whom: a token sees those of its
                order and below. With a cache, what it holds has the orders 0, 1, ….
            cache: of keys after RoPE, and values, of the tokens that are not among the ids.

        Raises:
            ValueError: a shape that does not fit, or more tokens than the context.
        """
        self.check_ids(input_ids)
        batch, length = input_ids.shape
        keys = key_positions(input_ids, positions, cache, attention_mask)
        if positions is None and cache is not None:
            positions = torch.arange(length, device=input_ids.device)
        at = None if positions is None else positions.expand(batch, -1)
        cos, sin = self.rotary(length, input_ids.device, at)
        block_size = self.config.block_size
        if order is not None:
            block_size, at = 1, order.expand(batch, -1)
            keys = None if cache is None else cache.key_positions(order)
        seen = {
            "key_padding_mask": None if attention_mask is None else attention_mask.bool(),
            "block_size": block_size,
            "query_positions": at,
            "key_positions": at if keys is None else keys.expand(batch, -1),
        }
        x = self.embedding(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if cache is None else cache.layer(index), **seen)
        return self._part("norm")(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states ``[..., hidden_size]``."""
        own = self._modules[self._head]
        return F.linear(hidden, self.embedding.weight) if own is None else own(hidden)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rows: slice | Tensor = slice(None),
        *,
        positions: Tensor | None = None,
        order: Tensor | None = None,
        cache: Cache | None = None,
    ) -> DLMOutput:
        """Logits of ``rows`` (a slice or indices; default: of every token); the LM head runs on those only.
        The rest as in ``hidden``."""
        hidden = self.hidden(input_ids, attention_mask, positions=positions, order=order, cache=cache)
        return DLMOutput(self.head(hidden[:, rows]))


def positions_of(attention_mask: Tensor) -> Tensor:
    """Where each token of a padded batch ``[B, L]`` is in its own sequence: 0, 1, … and -1 at padding."""
    valid = attention_mask.bool()
    return torch.where(valid, valid.cumsum(1) - 1, -1)
