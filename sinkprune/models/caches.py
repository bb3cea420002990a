"""What a sampler keeps of the tokens it does not run again: one class per cache, sized by the kept heads.

A model that takes a cache is called on a window of the sequence. It asks ``key_positions`` once a forward and
``layer(i)`` in every layer, and neither knows nor asks which cache it is:

    model(ids[:, first:last], valid_keys, positions=torch.arange(first, last), cache=cache)

LLaDA and Dream hand over keys *before* RoPE, as Fast-dLLM's do, and rotate all of them; block-causal families
hand over keys *after* RoPE. Under ``torch.no_grad``: what is held is written in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sinkprune.models.modules import KeyValueCache, Rotary

CACHES: dict[str, type[Cache]] = {}  # by the name that ``denoise`` knows them by


class Cache(ABC):
    """Keys and values ``[B, Hkv, tokens, D]`` of each layer, Hkv being the heads that the layer kept.

    A sampler calls ``begin`` before a block's first forward and runs the tokens of ``window``.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            CACHES[cls.name] = cls

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self.start = self.end = self.total = 0

    def clear(self) -> None:
        """Drop everything: another sequence comes next."""
        self._held.clear()

    def begin(self, start: int, end: int, total: int) -> None:
        """The block of tokens ``start`` … ``end``-1 of ``total`` comes next."""
        self.start, self.end, self.total = start, end, total

    @property
    @abstractmethod
    def window(self) -> tuple[int, int]:
        """First and past-the-last token that the next forward must run."""

    @abstractmethod
    def key_positions(self, positions: Tensor) -> Tensor:
        """Positions int64 ``[..., Lk]`` of the keys that ``layer`` will return, for queries at ``positions``
        ``[..., Lq]``."""

    def layer(self, index: int) -> KeyValueCache:
        """What takes this forward's keys and values ``[B, Hkv, Lq, D]`` of a layer and returns all of them,
        ``[B, Hkv, Lk, D]``. Raises ``ValueError`` where they do not fit those held."""
        return partial(self._update, index)

    def run(
        self,
        index: int,
        layer: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_padding_mask: Tensor | None,
        cached_rotary: Rotary,
    ) -> Tensor:
        """A layer of a model whose keys are held before RoPE: hidden states ``[B, Lq, hidden]`` to the
        same."""
        return layer(x, cos, sin, key_padding_mask, self.layer(index), cached_rotary)

    @property
    def bytes(self) -> int:
        """Memory of what is held now."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def tokens(self) -> int:
        """How many tokens' keys and values are held now."""
        return next((k.shape[2] for k, _ in self._held.values()), 0)

    @property
    def batch(self) -> int:
        """Sequences held now."""
        return next((k.shape[0] for k, _ in self._held.values()), 0)

    def _tensors(self) -> Iterable[Tensor]:
        return (tensor for pair in self._held.values() for tensor in pair)

    @abstractmethod
    def _update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...

    def _of(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor] | None:
        """What is held of a layer, or None. Raises ``ValueError`` where ``k`` is of another geometry."""
        held = self._held.get(layer)
        if held is None:
            return None
        kept, new = (
            f"[batch, key/value heads, head width] = {[*t.shape[:2], t.shape[3]]} in {t.dtype} on {t.device}"
            for t in (held[0], k)
        )
        if kept != new:
            raise ValueError(
                f"a cache serves one model and one batch: that of layer {layer} holds {kept}, got {new}"
            )
        return held


class BlockCache(Cache):
    """Finished blocks of a block-causal family: exact, for nothing that comes later changes them.

    A block's first forward also runs what was finished since the last one, and keeps that.
    """

    name = "block"

    @property
    def window(self) -> tuple[int, int]:
        return self.tokens, self.end

    def key_positions(self, positions: Tensor) -> Tensor:
        before = torch.arange(self.tokens, device=positions.device)
        return torch.cat((before.expand(*positions.shape[:-1], -1), positions), dim=-1)

    def _update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = self._of(layer, k)
        if held is not None:
            k, v = torch.cat((held[0], k), dim=2), torch.cat((held[1], v), dim=2)
        if held is None or held[0].shape[2] < self.start:
            self._held[layer] = _own(k[:, :, : self.start]), _own(v[:, :, : self.start])
        return k, v


class PrefixCache(BlockCache):
    """Fast-dLLM's prefix cache (arXiv 2505.22618): the tokens before the block, as of its first forward.

    That forward runs the whole sequence; the later ones the block and all masked tokens after it. On a
    bidirectional model what is held grows stale within the block: an approximation.
    """

    name = "prefix"

    def begin(self, start: int, end: int, total: int) -> None:
        super().begin(start, end, total)
        self.clear()

    @property
    def window(self) -> tuple[int, int]:
        return self.tokens, self.total


class DualCache(Cache):
    """Fast-dLLM's dual cache (arXiv 2505.22618): every token as of the block's first forward.

    The later forwards run the block alone, in the middle of the sequence, and overwrite its rows in place.
    """

    name = "dual"

    def begin(self, start: int, end: int, total: int) -> None:
        super().begin(start, end, total)
        self.clear()

    @property
    def window(self) -> tuple[int, int]:
        return (self.start, self.end) if self._held else (0, self.total)

    def key_positions(self, positions: Tensor) -> Tensor:
        if not self._held:
            return positions
        return torch.arange(self.total, device=positions.device).expand(*positions.shape[:-1], -1)

    def _update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = self._of(layer, k)
        if held is None:
            self._held[layer] = _own(k), _own(v)
            return k, v
        for kept, new in zip(held, (k, v), strict=True):
            kept[:, :, self.start : self.end] = new
        return held


def key_positions(
    input_ids: Tensor, positions: Tensor | None, cache: Cache | None, attention_mask: Tensor | None = None
) -> Tensor | None:
    """A model's check of a windowed call: positions int64 of the keys that ``cache`` will return, ``[Lk]`` or
    ``[B, Lk]``; None without a cache.

    Raises:
        ValueError: ``positions`` that are not of the ids ``[B, L]``, or a mask that is not of the keys.
    """
    batch, length = input_ids.shape
    if positions is not None and positions.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"positions must have shape {(length,)} or {(batch, length)}, got {tuple(positions.shape)}"
        )
    keys = None
    if cache is not None:
        at = torch.arange(length, device=input_ids.device) if positions is None else positions
        keys = cache.key_positions(at)
    expected = (batch, length if keys is None else keys.shape[-1])
    if attention_mask is not None and attention_mask.shape != expected:
        raise ValueError(f"attention_mask must have shape {expected}, got {tuple(attention_mask.shape)}")
    return keys


def _own(part: Tensor) -> Tensor:
    """A copy that does not keep the tensor it was cut from alive."""
    return part.clone(memory_format=torch.contiguous_format)
