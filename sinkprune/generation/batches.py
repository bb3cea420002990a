"""Which prompts run together."""

from __future__ import annotations

from torch import Tensor


def batches_of(valid: Tensor, batch: int, block: int | None) -> list[list[int]]:
    """Samples of ``valid`` ``[S, P]`` that run together, at most ``batch``; the first sample is in the first.
    With a ``block``, a block-causal model's, those whose lengths are alike modulo it: padding then never
    moves their blocks against each other."""
    groups: dict[int, list[int]] = {}
    for sample, length in enumerate((valid != 0).sum(1).tolist()):
        groups.setdefault(0 if block is None else length % block, []).append(sample)
    return [group[i : i + batch] for group in groups.values() for i in range(0, len(group), batch)]


def part_of(ids: Tensor, valid: Tensor, samples: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, P']`` of ``samples`` of ``[S, P]``, without the padding that none of them needs."""
    rows, mask = ids[samples], valid[samples]
    first = int(mask.any(0).float().argmax())
    return rows[:, first:], mask[:, first:]
