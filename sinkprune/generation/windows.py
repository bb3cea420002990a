"""Which tokens a denoising step runs: blocks of the canvas, and the window that a cache leaves of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.models.caches import CACHES, Cache

Predict = Callable[[Tensor, Tensor | None, slice], Tensor]  # as ``Adapter.predict``


class Block(NamedTuple):
    """Tokens ``rows`` are filled together. The block of positions that they end begins at ``start``, earlier
    where it holds the end of the prompt too."""

    start: int
    rows: slice


def blocks_of(prompt_length: int, gen_length: int, block_length: int, aligned: bool) -> list[Block]:
    """The blocks of a canvas, left to right: counted from the prompt's end, or (``aligned``) from position 0
    as a block-causal model has them, the last one whole."""
    first = prompt_length - prompt_length % block_length if aligned else prompt_length
    starts = range(first, prompt_length + gen_length, block_length)
    return [Block(start, slice(max(start, prompt_length), start + block_length)) for start in starts]


def new_cache(name: str | None) -> Cache | None:
    """An empty cache by its name. Raises ``ValueError`` for an unknown one."""
    if name is None:
        return None
    if name not in CACHES:
        raise ValueError(f"cache must be None or one of {', '.join(sorted(CACHES))}, got {name!r}")
    return CACHES[name]()


def cache_for(adapter: Adapter, cache: str | Cache | None) -> Cache | None:
    """An empty cache for one generation. Raises ``ValueError`` for one that the model can't use."""
    cache = cache if isinstance(cache, Cache) else new_cache(cache)
    if cache is None:
        return None
    if cache.name not in adapter.caches:
        model = f"{adapter.family} ({type(adapter.model).__name__})"
        takes = f"takes the cache {' or '.join(adapter.caches)}" if adapter.caches else "takes no cache"
        raise ValueError(f"{model} {takes}, got {cache.name!r}")
    cache.clear()
    return cache


class Reader:
    """Logits of a block's tokens, from a forward of the whole sequence or of the cache's window.

    ``valid`` ``[B, T]`` is 1 at tokens that are not padding, or None. With ``cfg_scale`` both halves run in
    one batch, the conditional first.
    """

    def __init__(
        self,
        adapter: Adapter,
        cache: Cache | None,
        valid: Tensor | None,
        *,
        prompt_length: int,
        mask_id: int,
        cfg_scale: float,
    ) -> None:
        self.adapter, self.cache = adapter, cache
        self.predict: Predict = adapter.predict
        self.valid = valid if valid is None or cfg_scale == 0 else torch.cat((valid, valid))
        self.prompt_length, self.mask_id, self.cfg_scale = prompt_length, mask_id, cfg_scale
        self.start = 0  # of the block that is filled

    def begin(self, block: Block, total: int) -> None:
        """``block`` of a sequence of ``total`` tokens comes next."""
        self.start = block.start
        if self.cache is not None:
            self.cache.begin(block.start, block.rows.stop, total)

    def logits(self, ids: Tensor, rows: slice) -> Tensor:
        """``[B, R, V]`` of ``rows`` of ids ``[B, T]``; the mask token is never drawn."""
        if self.cfg_scale == 0:
            logits = self._forward(ids, rows)
        else:
            blind = ids.clone()
            blind[:, : self.prompt_length] = self.mask_id
            conditional, unconditional = self._forward(torch.cat((ids, blind)), rows).chunk(2)
            logits = unconditional + (self.cfg_scale + 1) * (conditional - unconditional)
        logits[..., self.mask_id] = -torch.inf
        return logits

    def out_of_reach(self, rows: slice) -> int:
        """How many of the first ``rows`` the block's first forward fills alone: those that the next ones
        can't predict, for a shifted model's row i is about token i + 1, and the window may begin at the
        block; and the one that a model which ``seeds`` its blocks takes from what is before them."""
        if self.adapter.seeds and rows.start == self.start:
            return 1
        if self.cache is None:
            return 0
        return max(0, self.cache.window[0] + self.adapter.shift - rows.start)

    def _forward(self, ids: Tensor, rows: slice) -> Tensor:
        if self.cache is None:
            seen = slice(None if self.adapter.looks_ahead else rows.stop)  # no later block is seen
            valid = None if self.valid is None else self.valid[:, seen]
            return self.predict(ids[:, seen], valid, rows)
        first, last = self.cache.window
        positions = torch.arange(first, last, device=ids.device)
        valid = None if self.valid is None else self.valid[:, self.cache.key_positions(positions)]
        rows = slice(rows.start - first, rows.stop - first)
        return self.adapter.predict_window(ids[:, first:last], valid, rows, positions, self.cache)
