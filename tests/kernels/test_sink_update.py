"""The sink-update kernel against its twin, which tests/test_sinks.py holds to numbers worked out apart."""

from __future__ import annotations

import math

import pytest
import torch

from sinkprune.kernels import reference
from sinkprune.kernels.sink_update import sink_update_


def both(masses, *, keys, padding=None, gate=(4.0, 2.0), traced=0):
    """State and traces after the same steps by the kernel and by the twin; ``masses`` is one tensor per
    step."""
    device, rows = masses[0].device, masses[0].shape[0]
    sample_of = torch.arange(rows, dtype=torch.int32, device=device) % (
        1 if padding is None else len(padding)
    )
    state = torch.zeros(rows, reference.STATE_WIDTH, device=device)
    positions = torch.full((traced, rows), -1, dtype=torch.int32, device=device)
    sizes = torch.zeros(traced, rows, device=device)
    expected = torch.zeros(rows, reference.STATE_WIDTH, device=device)
    steps = []
    for mass in masses:
        sink_update_(mass, state, sample_of, padding, keys, *gate, positions, sizes)
        valid = None if padding is None else padding[sample_of.long()][:, :keys]
        steps.append(
            reference.sink_update_(
                mass[:, :keys], expected, valid=valid, gate_share=gate[0], gate_sigma=gate[1]
            )
        )
    return state, expected, positions, sizes, steps


@pytest.mark.parametrize("keys", [1, 2, 17, 300, 2500], ids="keys-{}".format)
def test_kernel_and_twin_agree_over_steps(keys, device):
    masses = [torch.softmax(torch.randn(6, keys + 5, device=device) * 3, -1) for _ in range(4)]
    state, expected, positions, sizes, steps = both(masses, keys=keys, traced=3)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)
    for step in range(3):  # the fourth finds no room in the trace
        assert torch.equal(positions[step], steps[step][0])
        torch.testing.assert_close(sizes[step], steps[step][1])


def test_padding_nan_infinity_and_empty_rows(device):
    mass = torch.softmax(torch.randn(8, 40, device=device), -1)
    mass[0, 3] = math.nan
    mass[2, 5] = math.inf
    mass[4] = 0
    padding = torch.rand(2, 40, device=device) > 0.4
    padding[:, :2] = True
    padding[0, 3] = padding[0, 5] = True
    padding[1, 7] = False
    mass[1, 7] = math.nan  # a padded key of sample 1
    state, expected, *_, steps = both([mass, mass.roll(1, 0)], keys=40, padding=padding)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)
    first = steps[0][0].tolist()
    assert first[0] == first[2] == first[4] == -1 and first[1] >= 0
    assert (state[:, reference.STEPS] == 2).all()


def test_a_state_whose_step_count_is_negative_writes_nothing_in_front_of_its_trace(device):
    mass = torch.softmax(torch.randn(3, 20, device=device), -1)
    state = torch.zeros(3, reference.STATE_WIDTH, device=device)
    state[:, reference.STEPS] = torch.tensor([-1.0, 0.0, -2.0], device=device)
    positions = torch.full((6, 3), 7, dtype=torch.int32, device=device)
    sizes = torch.full((6, 3), 7.0, device=device)
    sample_of = torch.zeros(3, dtype=torch.int32, device=device)
    sink_update_(mass, state, sample_of, None, 20, 4.0, 2.0, positions[3:], sizes[3:])
    assert (positions[:3] == 7).all() and (sizes[:3] == 7).all()
    assert positions[3, 1] == mass[1].argmax() and positions[3, [0, 2]].tolist() == [7, 7]


def test_a_sample_with_every_key_padded_has_no_sink(device):
    padding = torch.tensor([[True] * 8, [False] * 8], device=device)
    mass = torch.rand(4, 8, device=device)
    state, expected, *_ = both([mass], keys=8, padding=padding)
    torch.testing.assert_close(state, expected)
    assert state[:, reference.COUNT].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("at", [(3, 9), (0, 2047), (2000, 2100)], ids=str)
def test_ties_go_to_the_lowest_index_within_and_across_blocks(at, device):
    mass = torch.full((1, 2200), 1e-5, device=device)
    mass[0, list(at)] = 0.25
    state, *_ = both([mass], keys=2200)
    assert state[0, 5] == min(at)
    assert state[0, reference.MARGIN_SUM] == 0


def test_the_runner_up_may_lie_in_another_block(device):
    for top, second in ((10, 2100), (2100, 10), (7, 9)):
        mass = torch.full((1, 2200), 1e-5, device=device)
        mass[0, top], mass[0, second] = 0.5, 0.125
        state, *_ = both([mass], keys=2200)
        assert state[0, 5] == top and state[0, reference.MARGIN_SUM] == 0.375
