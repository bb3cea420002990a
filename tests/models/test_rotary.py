"""Rotary embedding as complex multiplication, written out here, and what it must leave alone."""

import pytest
import torch
from toys import one_thread  # noqa: F401

from sinkprune.models.rotary import rotary_table
from sinkprune.ops.elementwise import apply_rotary


def rotated_by_hand(x, positions, theta):
    """Feature i and i + R/2 of a head are one complex number, turned by position / theta^(2i/R)."""
    half = x.shape[-1] // 2
    number = torch.complex(x[..., :half].double(), x[..., half:].double())
    angle = positions.double()[:, None] * theta ** (-torch.arange(half).double() / half)
    turned = number * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("dim", [2, 8, 64])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotation_equals_complex_multiplication(dim, theta):
    x, positions = torch.randn(2, 3, 17, dim, generator=torch.Generator().manual_seed(0)), torch.arange(17)
    got = apply_rotary(x, *rotary_table(positions, dim, theta))
    torch.testing.assert_close(got.double(), rotated_by_hand(x, positions, theta), atol=1e-5, rtol=1e-5)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def score(i, j):
        tables = [rotary_table(torch.tensor([p]), 8, 10_000.0) for p in (i, j)]
        return (apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1])).sum().item()

    assert score(12, 5) == pytest.approx(score(107, 100), abs=1e-4)
    assert score(12, 5) != pytest.approx(score(5, 12), abs=1e-2)


def test_features_beyond_the_table_pass_through_and_the_dtype_stays():
    x = torch.randn(1, 2, 5, 12, generator=torch.Generator().manual_seed(2)).bfloat16()
    tables = rotary_table(torch.arange(5), 8, 10_000.0)
    got = apply_rotary(x, *tables)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[..., 8:], x[..., 8:])
    assert torch.equal(got[..., :8], apply_rotary(x[..., :8].float(), *tables).bfloat16())
    assert torch.equal(got[:, :, 0], x[:, :, 0])  # position 0 turns nothing
