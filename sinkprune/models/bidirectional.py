"""What the native models whose tokens all see each other share: LLaDA and Dream.

Their caches hold keys before RoPE, so that a window of tokens may be anywhere in the sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn

from sinkprune.models.caches import Cache
from sinkprune.models.common import AttentionCore, NativeLM
from sinkprune.models.modules import KeyValueCache, Rotary
from sinkprune.ops import elementwise


class BidirectionalAttention(AttentionCore):
    """A dense attention on the queries, keys and values that a family projects."""

    head_dim: int

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, L, H * D]``, keys and values ``[B, L, Hkv * D]`` of hidden states
        ``[B, L, hidden]``."""

    def attended_heads(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_padding_mask: Tensor | None,
        cache: KeyValueCache | None,
        cached_rotary: Rotary | None,
    ) -> Tensor:
        """The heads' outputs side by side, ``[B, L, H * D]``. Nothing projected outlives its use."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.project(x))
        if cache is not None:
            k, v = cache(k, v)
        q, k = elementwise.rope_qk(q, k, cos, sin, *(cached_rotary or ()))
        return self.attend(q, k, v, key_padding_mask=key_padding_mask)


class BidirectionalLM(NativeLM):
    """Runs layers that are called as ``layer(x, cos, sin, key_padding_mask, cache, cached_rotary)``."""

    def through(
        self,
        embedding: nn.Module,
        layers: Iterable[nn.Module],
        input_ids: Tensor,
        key_padding_mask: Tensor | None,
        positions: Tensor | None,
        keys: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Hidden states ``[B, L, hidden]`` after ``layers``, with the tokens at ``positions`` and all keys of
        the cache at ``keys`` (``caches.key_positions``)."""
        cos, sin = self.rotary(input_ids.shape[1], input_ids.device, positions)
        cached_rotary = None if keys is None else self.rotary(keys.shape[-1], keys.device, keys)
        x = embedding(input_ids)
        for index, layer in enumerate(layers):
            if cache is None or cached_rotary is None:
                x = layer(x, cos, sin, key_padding_mask)
            else:
                x = cache.run(index, layer, x, cos, sin, key_padding_mask, cached_rotary)
        return x
