"""Padding costs only the tiles it touches: which keys are walked, which without a mask, and the values."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import assert_as_exact

from sinkprune.kernels import reference
from sinkprune.kernels.attention import _keys_to_walk, attention
from sinkprune.kernels.launch import Tile

BN = 32


@triton.jit
def walk_kernel(padding, found, lk, BM: tl.constexpr, BN: tl.constexpr):
    o_m = tl.arange(0, BM)
    lo, clear, full, hi, _valid, _sees = _keys_to_walk(
        0, 1, o_m, o_m < BM, padding, padding, lk, 1, BN, False, True, False, False, False
    )
    tl.store(found, lo)
    tl.store(found + 1, clear)
    tl.store(found + 2, full)
    tl.store(found + 3, hi)


def valid_between(length: int, *runs: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(length, dtype=torch.bool)
    for first, end in runs:
        mask[first:end] = True
    return mask


MASKS = {
    "nothing padded": valid_between(100, (0, 100)),
    "right": valid_between(100, (0, 70)),
    "right, at a tile's end": valid_between(100, (0, 64)),
    "left": valid_between(100, (40, 100)),
    "left, at a tile's start": valid_between(128, (64, 128)),
    "both sides": valid_between(160, (35, 150)),
    "within one tile": valid_between(100, (40, 50)),
    "prompt and block": valid_between(160, (0, 50), (128, 160)),
    "holes": valid_between(160, (3, 40), (41, 90), (120, 121)),
    "everything padded": valid_between(100),
    "one key": valid_between(1, (0, 1)),
    "beyond one scan, right": valid_between(2200, (0, 2100)),
    "beyond one scan, left": valid_between(2200, (1500, 2200)),
    "beyond one scan, holes": valid_between(2200, (1100, 1300), (2000, 2100)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_no_valid_key_is_left_out_and_no_padded_one_goes_unmasked(mask, device):
    found = torch.full((4,), -1, dtype=torch.int32, device=device)
    walk_kernel[(1,)](mask.view(torch.uint8).to(device), found, len(mask), BM=16, BN=BN)
    lo, clear, full, hi = found.tolist()
    assert not mask[:lo].any() and not mask[hi:].any()
    assert lo % BN == clear % BN == 0 and clear - lo in (0, BN) and (full - clear) % BN == 0
    assert full == clear or full <= hi
    assert mask[clear:full].all()


@pytest.mark.parametrize("name", ["nothing padded", "right", "left", "both sides", "beyond one scan, left"])
def test_a_run_of_valid_keys_masks_only_the_tiles_at_its_ends(name, device):
    mask = MASKS[name]
    found = torch.full((4,), -1, dtype=torch.int32, device=device)
    walk_kernel[(1,)](mask.view(torch.uint8).to(device), found, len(mask), BM=16, BN=BN)
    lo, clear, full, hi = found.tolist()
    tiles = range(0, len(mask), BN)
    whole = [i for i in tiles if i + BN <= len(mask) and mask[i : i + BN].all()]
    touched = [i for i in tiles if mask[i : i + BN].any()]
    assert list(range(clear, full, BN)) == whole
    assert list(range(lo, hi, BN)) == touched


@pytest.mark.parametrize("block_size", [None, 48])
@pytest.mark.parametrize("shares", [1, 3])
def test_values_under_every_padding(shares, block_size, device):
    masks = [m for m in MASKS.values() if len(m) == 160] + [valid_between(160), valid_between(160, (90, 160))]
    masks.append(valid_between(160, (0, 160)))
    mask = torch.stack(masks).to(device)
    q, k, v = (torch.randn(len(masks), 1, n, 16, device=device) for n in (64, 160, 160))
    hidden = ~mask[:, None, :, None]
    options = {"key_padding_mask": mask, "block_size": block_size, "scale": 0.25}
    expected = reference.attention(q.double(), k.double(), v.double(), **options)
    plain = reference.attention(q, k, v, **options)
    k, v = k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.nan)
    for got, exact, same in zip(
        attention(q, k, v, tile=Tile(64, BN, 4, 2), shares=shares, **options), expected, plain, strict=True
    ):
        assert_as_exact(got, exact, same, atol=2e-6)
