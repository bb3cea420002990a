"""dLLM-Cache: besides keys and values, what a token's layers added to it is kept, and only some tokens run.

Source: "dLLM-Cache: Accelerating Diffusion Large Language Models with Adaptive Caching" (arXiv 2506.06295)
and the rules of its code: the first layer runs every token; the others the prompt every ``prompt_interval``
steps, the response every ``response_interval``, and between those the share ``update_ratio`` of the response
whose values turned furthest from the cached ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune.models.caches import Cache
from sinkprune.models.modules import Rotary, added, is_gone


class LayerParts(NamedTuple):
    """A layer that adds ``attend(attention_norm(x))``, then ``feed(mlp_norm(x))`` to ``x``.

    ``x`` is ``[B, L, hidden]``; ``values`` gives the value heads side by side of normed states, ``[B, L, kept
    heads · width]``.
    """

    attention_norm: Callable[[Tensor], Tensor]
    attend: Callable[..., Tensor]
    values: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    feed: Callable[[Tensor], Tensor]


class Layer(Protocol):
    def parts(self) -> LayerParts: ...


class FeatureCache(Cache):
    """dLLM-Cache. A step hands the whole sequence to the model, whose layers run the tokens that need it.

    Similarity is over the key/value heads that the layer kept. A layer that kept none runs its MLP for the
    whole response. Intervals of 1 keep nothing stale.
    """

    name = "dllm"

    def __init__(
        self, prompt_interval: int = 50, response_interval: int = 7, update_ratio: float = 0.25
    ) -> None:
        super().__init__()
        if prompt_interval < 1 or response_interval < 1 or not 0 <= update_ratio <= 1:
            raise ValueError(
                "intervals must be at least 1 and update_ratio within 0..1, got "
                f"{prompt_interval}, {response_interval} and {update_ratio}"
            )
        self.prompt_interval, self.response_interval = prompt_interval, response_interval
        self.update_ratio = update_ratio
        self._added: dict[int, tuple[Tensor, Tensor]] = {}  # by a layer's attention and MLP, [B, T, hidden]
        self._rows = torch.empty(0)  # the tokens int64 [B, n] that the current layer runs
        self._step, self._prompt = -1, -1

    def clear(self) -> None:
        super().clear()
        self._added.clear()
        self._step, self._prompt = -1, -1

    def begin(self, start: int, end: int, total: int) -> None:
        super().begin(start, end, total)
        self._prompt = start if self._prompt < 0 else self._prompt

    @property
    def window(self) -> tuple[int, int]:
        return 0, self.total

    def key_positions(self, positions: Tensor) -> Tensor:
        return positions

    def _tensors(self) -> Iterable[Tensor]:
        yield from super()._tensors()
        for pair in self._added.values():
            yield from pair

    def run(
        self,
        index: int,
        layer: Layer,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_padding_mask: Tensor | None,
        cached_rotary: Rotary,
    ) -> Tensor:
        self._step += index == 0
        parts = layer.parts()
        if is_gone(parts.attend) and is_gone(parts.feed):
            return added(added(x, parts.attention_norm, parts.attend), parts.mlp_norm, parts.feed)
        normed = parts.attention_norm(x)
        self._rows = rows = self._stale(index, normed, parts)
        if index not in self._added:
            self._added[index] = torch.zeros_like(x), torch.zeros_like(x)
        attended, fed = self._added[index]
        if rows.shape[1] == 0:
            return x + attended + fed
        turn = (table.expand(x.shape[0], 1, -1, -1)[:, 0] for table in (cos, sin))
        at = (_take(table, rows).unsqueeze(1) for table in turn)
        new = parts.attend(
            _take(normed, rows), *at, key_padding_mask, cache=self.layer(index), cached_rotary=cached_rotary
        )
        _put(attended, rows, new)
        x = x + attended
        _put(fed, rows, parts.feed(parts.mlp_norm(_take(x, rows))))
        return x + fed

    def _stale(self, index: int, normed: Tensor, parts: LayerParts) -> Tensor:
        """The tokens int64 ``[B, n]`` that a layer runs; it also renews the response's values."""
        batch, total = normed.shape[:2]
        everything = torch.arange(total, device=normed.device).expand(batch, -1)
        prompt = self._step % self.prompt_interval == 0 or index == 0
        response = self._step % self.response_interval == 0 or index == 0
        if prompt and response:
            return everything
        of_prompt = everything[:, : self._prompt if prompt else 0]
        held = self._held.get(index)
        if response or held is None:
            return torch.cat((of_prompt, everything[:, self._prompt :]), dim=1)
        count = int((total - self._prompt) * self.update_ratio)
        if count == 0:
            return of_prompt
        values = parts.values(normed[:, self._prompt :])
        cached = held[1][:, :, self._prompt :]  # [B, Hkv, response, D]
        likeness = F.cosine_similarity(values, cached.transpose(1, 2).flatten(2), dim=-1)
        cached.copy_(values.unflatten(-1, (-1, cached.shape[-1])).transpose(1, 2))
        turned = likeness.topk(count, dim=-1, largest=False).indices + self._prompt
        return torch.cat((of_prompt, turned), dim=1)

    def _update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = self._of(layer, k)
        if held is None:
            room = (*k.shape[:2], self.total, k.shape[3])
            held = self._held[layer] = k.new_zeros(room), v.new_zeros(room)
        for kept, new in zip(held, (k, v), strict=True):
            index = self._rows[:, None, :, None].expand_as(new)
            kept.scatter_(2, index, new)
        return held


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """``[B, n, features]`` of ``x`` ``[B, T, features]``."""
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _put(x: Tensor, rows: Tensor, new: Tensor) -> None:
    x.scatter_(1, rows.unsqueeze(-1).expand_as(new), new)
