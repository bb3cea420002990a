"""The column-mass kernel against float64: exact and sampled, from any log-sum-exp, split or not."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import SHAPES, assert_as_exact
from reserved_memory import reserve

from sinkprune import ops
from sinkprune.kernels import reference
from sinkprune.kernels.column_mass import column_mass_
from sinkprune.kernels.launch import Tile

TILE = Tile(64, 64, 4, 2)
SMALL = Tile(32, 32, 4, 2)


def run(case, lse=None, spare=3, **options):
    """The kernel's mass; the buffer is poisoned, and ``spare`` columns wider than the keys."""
    b, hq = case.q.shape[:2]
    out = torch.full((b, hq, case.k.shape[2] + spare), math.nan, device=case.q.device)
    column_mass_(out, case.q, case.k, lse, scale=case.scale, **{"tile": TILE, **case.choices, **options})
    assert (out[:, :, case.k.shape[2] :] == 0).all()
    return out[:, :, : case.k.shape[2]]


def lse_of(case):
    return reference.attention(case.q, case.k, case.v, **case.choices)[1]


def exact_mass(case, **sampling):
    return reference.column_mass(case.q.double(), case.k.double(), **sampling, **case.choices)


def test_exact_mass_matches_float64_and_sums_to_one(case):
    mass = run(case, lse_of(case))
    exact = exact_mass(case)
    assert_as_exact(mass, exact, reference.column_mass(case.q, case.k, **case.choices), atol=2e-7)
    kept = range(case.q.shape[1]) if case.kept_heads is None else case.kept_heads.tolist()
    total = exact.sum(-1)
    for head in range(case.q.shape[1]):
        seen = total[:, head] > 0
        expected = torch.ones if head in kept else torch.zeros
        assert torch.allclose(
            mass[:, head].sum(-1)[seen], expected(int(seen.sum()), device=mass.device), atol=1e-5
        )


@pytest.mark.parametrize("name", ["odd", "kept-ragged-padded", "block-causal", "block-causal-all-positions"])
def test_without_an_lse_it_is_computed(name, new_case):
    case = new_case(**SHAPES[name])
    torch.testing.assert_close(run(case).double(), exact_mass(case), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shares", [2, 100])
@pytest.mark.parametrize(
    "name", ["odd", "kept-ragged-padded", "block-causal", "block-causal-query-positions"]
)
def test_query_shares_add_up_to_the_same_mass(name, shares, new_case):
    case = new_case(**SHAPES[name])
    mass = run(case, lse_of(case), tile=SMALL, shares=shares)
    torch.testing.assert_close(mass.double(), exact_mass(case), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("offset", [None, 0, 2, 16, 10**6, -1])
def test_sampled_rows_start_at_the_offset_modulo_the_usable_rows(offset, new_case):
    case = new_case(2, 2, 1, 37, 40, 16, positions="q")
    at = None if offset is None else torch.tensor([offset], device=case.q.device)
    mass = run(case, lse_of(case), sample=5, offset=at)
    exact = exact_mass(case, sample=5, offset=offset or 0)
    torch.testing.assert_close(mass.double(), exact, atol=1e-6, rtol=1e-5)


def test_a_stride_longer_than_the_queries_reads_one_row(new_case):
    case = new_case(1, 1, 1, 5, 20, 16)
    mass = run(case, lse_of(case), sample=16, offset=torch.tensor([8], device=case.q.device))
    row = torch.softmax(case.q.double()[:, :, 8 % 5] @ case.k.double()[0, 0].mT * case.scale, -1)
    torch.testing.assert_close(mass.double(), row, atol=1e-6, rtol=1e-5)


def test_sampled_means_over_a_full_stride_of_offsets_average_to_the_exact_mass(new_case):
    case = new_case(1, 2, 1, 32, 40, 16)
    lse = lse_of(case)
    sampled = [run(case, lse, sample=4, offset=torch.tensor([i], device=case.q.device)) for i in range(4)]
    torch.testing.assert_close(torch.stack(sampled).mean(0), run(case, lse), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_inputs_give_float32_mass(dtype, new_case):
    case = new_case(1, 2, 1, 50, 70, 80, dtype=dtype)
    exact = exact_mass(case)
    scores = (case.q @ case.k.expand_as(case.k[:, [0, 0]]).mT) * case.scale
    mass = run(case, lse_of(case))
    assert mass.dtype == torch.float32
    assert_as_exact(mass, exact, scores.float().softmax(-1).mean(2))


def test_conventions_of_other_kernels_are_understood(new_case):
    case = new_case(2, 2, 2, 33, 40, 16, padding=True)
    lse = lse_of(case)
    natural = lse / reference.LOG2E
    flash3 = natural.masked_fill(lse == math.inf, -math.inf)
    expected = run(case, lse)
    torch.testing.assert_close(run(case, ops.base2_lse(flash3)), expected)
    assert torch.equal(run(case, lse.masked_fill(lse == math.inf, -math.inf)), expected)
    strided = lse.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(case, strided), expected)


@pytest.mark.parametrize("shares", [1, 2])
def test_a_few_empty_rows_among_whole_tiles_add_nothing(shares, new_case):
    """Whole tiles of rows are walked without a mask, unless some log-sum-exp is -inf."""
    case = new_case(1, 2, 2, 130, 40, 16)
    lse = lse_of(case)
    lse[0, 1, [3, 64, 129]] = math.inf
    mass = run(case, lse, tile=SMALL, shares=shares)
    scores = case.q.double() @ case.k.double().mT * case.scale * reference.LOG2E
    counted = torch.tensor([130, 127], device=lse.device)[:, None]
    exact = torch.exp2(scores - lse[..., None]).sum(2) / counted
    torch.testing.assert_close(mass.double(), exact, atol=2e-7, rtol=1e-5)
    flash3 = lse.masked_fill(lse == math.inf, -math.inf)
    torch.testing.assert_close(run(case, flash3, tile=SMALL, shares=shares), mass, atol=1e-7, rtol=1e-6)


def test_nan_in_padded_keys_and_padded_queries_stays_out(new_case):
    case = new_case(1, 2, 2, 33, 40, 16, padding=True, positions="q")
    lse, clean = lse_of(case), run(case, lse_of(case))
    case.k[:, :, ~case.key_padding_mask[0]] = math.nan
    case.q[:, :, case.query_positions[0] < 0] = math.nan
    assert torch.equal(run(case, lse), clean)


def test_a_nan_query_turns_the_head_to_nan(new_case):
    case = new_case(1, 2, 2, 20, 20, 16)
    case.q[0, 1, 7] = math.nan
    mass = run(case)
    assert mass[0, 1].isnan().all() and not mass[0, 0].isnan().any()


def test_permuting_heads_permutes_mass(new_case):
    case = new_case(1, 4, 4, 33, 33, 16)
    order = torch.tensor([2, 0, 3, 1], device=case.q.device)
    mass, lse = run(case, lse_of(case)), lse_of(case)
    case.q, case.k = case.q[:, order], case.k[:, order]
    assert torch.equal(run(case, lse[:, order]), mass[:, order])


def test_same_inputs_give_the_same_bits(new_case):
    case = new_case(1, 2, 1, 90, 33, 16)
    lse = lse_of(case)
    assert torch.equal(run(case, lse, tile=SMALL, shares=3), run(case, lse, tile=SMALL, shares=3))


@pytest.mark.parametrize("axis", ["row", "head"])
def test_offsets_beyond_32_bits_reach_the_right_element(axis, device):
    h, length, d = 2, 3, 16
    far = (1 << 31) + 64
    strides = {"row": (0, length * d, far // 2, 1), "head": (0, far, d, 1)}[axis]
    span = sum((size - 1) * stride for size, stride in zip((1, h, length, d), strides, strict=True)) + 1
    near = torch.randn(1, h, length, d, dtype=torch.float16, device=device)
    wide = reserve(span, torch.float16, device).as_strided((1, h, length, d), strides).copy_(near)
    out = torch.empty(1, h, length, device=device)
    column_mass_(out, wide, wide, scale=0.25, tile=SMALL)
    exact = reference.column_mass(near.double(), near.double(), scale=0.25)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=2e-3)
