"""Who sees whom: what limits the keys that a query sees, as one value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Visibility(NamedTuple):
    """The arguments of these names of `sinkprune.ops.attention`, in the order of the op's schema: flat at
    that boundary, one value behind it.

    A padded key is seen by nobody, a query at position -1 sees nothing, and with ``block_size`` a query sees
    the keys whose position's block is not later than its own.
    """

    key_padding_mask: Tensor | None = None  # bool [B, Lk], True = valid
    block_size: int | None = None
    query_positions: Tensor | None = None  # int [B, Lq], -1 = padded; None = 0 … Lq-1
    key_positions: Tensor | None = None  # int [B, Lk]; None = 0 … Lk-1

    @property
    def limited(self) -> bool:
        """Whether anything may be hidden."""
        return any(x is not None for x in self[:3])  # positions of keys alone hide nothing

    def keys(self, lq: int, lk: int, device: torch.device | None = None) -> Tensor | None:
        """Which keys each query sees: bool ``[B or 1, Lq or 1, Lk or 1]``, or None if it is all of them."""
        seen: Tensor | None = None
        if self.key_padding_mask is not None:
            seen = self.key_padding_mask[:, None, :]
        if self.query_positions is not None:
            valid = (self.query_positions >= 0)[:, :, None]
            seen = valid if seen is None else seen & valid
        if self.block_size is not None:
            q_pos, k_pos = (
                torch.arange(length, device=device)[None] if positions is None else positions
                for positions, length in ((self.query_positions, lq), (self.key_positions, lk))
            )
            causal = (k_pos // self.block_size)[:, None, :] <= (q_pos // self.block_size)[:, :, None]
            seen = causal if seen is None else seen & causal
        return seen

    def of(self, samples: slice, queries: slice = slice(None)) -> Visibility:
        """That of some samples, and of some of the queries where their positions are given."""
        padding, block_size, q_pos, k_pos = self
        return Visibility(
            None if padding is None else padding[samples],
            block_size,
            None if q_pos is None else q_pos[samples, queries],
            None if k_pos is None else k_pos[samples],
        )

    def to(self, device: torch.device) -> Visibility:
        """The same on ``device``."""
        return Visibility(*(x.to(device) if isinstance(x, Tensor) else x for x in self))
