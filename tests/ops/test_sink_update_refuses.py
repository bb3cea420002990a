"""The raw op takes addresses, so whatever does not fit is refused before the first write."""

from typing import Any

import pytest
import torch

from sinkprune.kernels import reference
from sinkprune.ops import sink_update


def fitting() -> dict[str, Any]:
    return {
        "mass": torch.rand(4, 9),
        "state": torch.zeros(4, reference.STATE_WIDTH),
        "sample_of": torch.tensor([0, 0, 1, 1], dtype=torch.int32),
        "key_padding_mask": torch.ones(2, 9, dtype=torch.bool),
        "num_keys": 9,
        "gate_share": 4.0,
        "gate_sigma": 2.0,
        "trace_positions": torch.zeros(3, 4, dtype=torch.int32),
        "trace_mass": torch.zeros(3, 4),
    }


def shrunken() -> torch.Tensor:
    mass = torch.rand(4, 9)
    mass.untyped_storage().resize_(64)
    return mass


UNFIT = {
    "rows": {"mass": torch.rand(3, 9)},
    "rank": {"mass": torch.rand(36)},
    "dtype": {"mass": torch.rand(4, 9, dtype=torch.float64)},
    "strides": {"mass": torch.rand(9, 4).t()},
    "storage": {"mass": shrunken()},
    "state's width": {"state": torch.zeros(4, reference.STATE_WIDTH - 1)},
    "state's rows apart": {"state": torch.zeros(8, reference.STATE_WIDTH)[::2]},
    "state's count is negative": {"state": torch.full((4, reference.STATE_WIDTH), -2.0)},
    "state's count is NaN": {"state": torch.full((4, reference.STATE_WIDTH), float("nan"))},
    "sample below": {"sample_of": torch.tensor([0, -1, 1, 1], dtype=torch.int32)},
    "sample beyond": {"sample_of": torch.tensor([0, 0, 2, 1], dtype=torch.int32)},
    "no samples": {"key_padding_mask": torch.ones(0, 9, dtype=torch.bool)},
    "short padding": {"key_padding_mask": torch.ones(2, 8, dtype=torch.bool)},
    "keys beyond": {"num_keys": 10},
    "keys below": {"num_keys": -1},
    "trace's rows": {"trace_positions": torch.zeros(3, 5, dtype=torch.int32)},
    "traces differ": {"trace_mass": torch.zeros(2, 4)},
    "trace's dtype": {"trace_positions": torch.zeros(3, 4, dtype=torch.int64)},
    "backend": {"backend": "native_"},
    "another op's backend": {"backend": "sdpa"},
}


def test_what_every_refusal_below_starts_from_is_served() -> None:
    given = fitting()
    sink_update(**given)
    assert given["state"][:, reference.STEPS].tolist() == [1.0] * 4
    assert torch.equal(given["trace_positions"][0].long(), given["mass"].argmax(1))


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_and_nothing_is_written(name: str) -> None:
    given = fitting() | UNFIT[name]
    written = [given[of] for of in ("state", "trace_positions", "trace_mass")]
    before = [tensor.clone() for tensor in written]
    with pytest.raises((ValueError, TypeError)):
        sink_update(**given)
    for tensor, held in zip(written, before, strict=True):
        torch.testing.assert_close(tensor, held, rtol=0, atol=0, equal_nan=True)
