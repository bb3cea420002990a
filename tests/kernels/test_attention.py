"""The attention kernel against float64, over shapes, heads, masks, dtypes, strides and key shares."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import SHAPES, assert_as_exact
from reserved_memory import reserve

from sinkprune.kernels import reference
from sinkprune.kernels.addressing import split_head_dim
from sinkprune.kernels.attention import attention
from sinkprune.kernels.launch import Tile

TILE = Tile(64, 64, 4, 2)
SMALL = Tile(32, 32, 4, 2)


def run(case, **options):
    return attention(case.q, case.k, case.v, scale=case.scale, **{"tile": TILE, **case.choices, **options})


def plain_16_bit(case):
    """The same mathematics with each intermediate in the inputs' dtype, as PyTorch's own operations do it."""
    groups = reference.default_kv_head_of(case.q.shape[1], case.k.shape[1], case.q.device)
    scores = (case.q @ case.k[:, groups].mT) * case.scale
    out = scores.float().softmax(-1).to(case.q.dtype) @ case.v[:, groups]
    return out, scores.float().logsumexp(-1) * reference.LOG2E


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
def test_output_and_lse_match_float64(case, compact):
    out, lse = run(case, compact=compact)
    exact, exact_lse = reference.attention(*case.double(), compact=compact, **case.choices)
    same, same_lse = reference.attention(case.q, case.k, case.v, compact=compact, **case.choices)
    assert_as_exact(out, exact, same)
    assert_as_exact(lse, exact_lse, same_lse, atol=2e-6)


@pytest.mark.parametrize("shares", [2, 100])
@pytest.mark.parametrize(
    "name", ["odd", "kept-ragged-padded", "block-causal-query-positions", "one-query", "split-dot-80"]
)
def test_key_shares_join_to_the_same_result(name, shares, new_case):
    case = new_case(**SHAPES[name])
    out, lse = run(case, tile=SMALL, shares=shares)
    exact, exact_lse = reference.attention(*case.double(), **case.choices)
    same, same_lse = reference.attention(case.q, case.k, case.v, **case.choices)
    assert_as_exact(out, exact, same)
    assert_as_exact(lse, exact_lse, same_lse, atol=2e-6)


@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_is_no_worse_than_16_bit_pytorch(dtype, d, new_case):
    case = new_case(1, 2, 1, 50, 90, d, dtype=dtype)
    out, lse = run(case)
    exact, exact_lse = reference.attention(*case.double())
    same, same_lse = plain_16_bit(case)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_as_exact(out, exact, same)
    assert_as_exact(lse, exact_lse, same_lse)


def test_strided_views_of_a_fused_projection_are_read_in_place(new_case):
    fused = torch.randn(2, 40, 3, 3, 32)  # [B, L, qkv, H, D]
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    case = new_case(2, 3, 3, 40, 40, 32)
    case.q, case.k, case.v = (t.to(case.q.device) for t in (q, k, v))
    assert not case.q.is_contiguous()
    out, lse = run(case)
    exact, exact_lse = reference.attention(*case.double())
    same, same_lse = reference.attention(case.q, case.k, case.v)
    assert_as_exact(out, exact, same)
    assert_as_exact(lse, exact_lse, same_lse, atol=2e-6)


def test_without_values_only_the_lse_is_computed(new_case):
    case = new_case(2, 4, 2, 37, 71, 16, kept=[1, 3])
    for shares in (1, 3):
        out, lse = attention(
            case.q, case.k, None, scale=case.scale, tile=SMALL, shares=shares, **case.choices
        )
        _, exact = reference.attention(*case.double(), **case.choices)
        assert out.numel() == 0
        torch.testing.assert_close(lse.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
def test_without_the_lse_the_output_is_the_same(compact, shares, new_case):
    case = new_case(2, 4, 2, 37, 71, 16, kept=[1, 3], padding=True)
    options = {"tile": SMALL, "shares": shares, "compact": compact}
    expected, _ = run(case, **options)
    out, lse = run(case, with_lse=False, **options)
    assert torch.equal(out, expected) and lse.numel() == 0


def test_nan_in_padded_keys_and_padded_queries_stays_out(new_case):
    case = new_case(1, 2, 2, 33, 40, 16, padding=True, positions="q")
    hidden, absent = ~case.key_padding_mask[0], case.query_positions[0] < 0
    clean, clean_lse = run(case)
    case.k[:, :, hidden] = case.v[:, :, hidden] = math.nan
    case.q[:, :, absent] = math.nan
    out, lse = run(case)
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)
    assert (out[:, :, absent] == 0).all() and (lse[:, :, absent] == math.inf).all()


def test_nan_in_a_query_marks_its_own_row_only(new_case):
    case = new_case(1, 2, 2, 20, 20, 16)
    case.q[0, 1, 7] = math.nan
    out, lse = run(case)
    bad = torch.zeros_like(lse, dtype=torch.bool)
    bad[0, 1, 7] = True
    assert torch.equal(out.isnan().any(-1), bad) and torch.equal(lse.isnan(), bad)


def test_head_ids_out_of_range_write_nothing_outside(new_case):
    case = new_case(1, 3, 3, 20, 20, 16)
    case.kept_heads = torch.tensor([1, 3, 1000], device=case.q.device)
    out, lse = run(case)
    exact, exact_lse = reference.attention(*case.double(), kept_heads=torch.tensor([1], device=case.q.device))
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


def test_permuting_heads_permutes_results(new_case):
    case = new_case(1, 4, 4, 33, 33, 16)
    order = torch.tensor([2, 0, 3, 1], device=case.q.device)
    out, lse = run(case)
    case.q, case.k, case.v = case.q[:, order], case.k[:, order], case.v[:, order]
    permuted, permuted_lse = run(case)
    assert torch.equal(permuted, out[:, order]) and torch.equal(permuted_lse, lse[:, order])


def test_same_inputs_give_the_same_bits(new_case):
    case = new_case(1, 2, 1, 33, 90, 16)
    first, second = run(case, tile=SMALL, shares=3), run(case, tile=SMALL, shares=3)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("axis", ["row", "head", "sample"])
def test_offsets_beyond_32_bits_reach_the_right_element(axis, device):
    """Views whose far elements lie past 2^31: the memory is reserved, and only the pages touched exist."""
    b, h, length, d = 2, 2, 3, 16
    far = (1 << 31) + 64
    strides = {
        "row": (length * d, length * d * b, far // 2, 1),
        "head": (length * d, far, d, 1),
        "sample": (far, length * d, d, 1),
    }[axis]
    span = sum((size - 1) * stride for size, stride in zip((b, h, length, d), strides, strict=True)) + 1
    q = torch.randn(b, h, length, d, dtype=torch.float16, device=device)
    k = (
        reserve(span, torch.float16, device)
        .as_strided((b, h, length, d), strides)
        .copy_(torch.randn(b, h, length, d))
    )
    wide = reserve(span, torch.float16, device).as_strided((b, h, length, d), strides).copy_(q)
    assert (k[1, 1, -1].data_ptr() - k.data_ptr()) // 2 >= 1 << 31
    out, lse = attention(wide, k, k, scale=0.25, tile=SMALL)
    exact, exact_lse = reference.attention(q.double(), k.double(), k.double(), scale=0.25)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("d", "parts"),
    [(8, (16, 0)), (16, (16, 0)), (60, (64, 0)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (100, (128,
    0)),
     (128, (128, 0)), (144, (128, 16)), (192, (128, 64)), (256, (256, 0))],
)  # fmt: skip
def test_a_head_is_covered_by_few_power_of_two_dots(d, parts):
    assert split_head_dim(d) == parts
