"""SinkTracker against statistics worked out from the whole trace, and its edges."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sinkprune import ops
from sinkprune.evidence.sinks import SinkGate, SinkTracker


def masses_of(tracker, steps, sharpness=3.0):
    """Random masses per step and layer: [step][layer] of [B, H, K]."""
    return [[torch.softmax(sharpness * torch.randn(m.shape), -1) for m in tracker.mass] for _ in range(steps)]


def feed(tracker, masses, **options):
    for step in masses:
        for buffer, mass in zip(tracker.mass, step, strict=True):
            buffer.copy_(mass)
        tracker.end_step(**options)


def moments(positions):
    """count, mean, variance, lowest, highest, moves, mean |move| of a plain list of positions."""
    n = len(positions)
    if n == 0:
        return 0, math.nan, 0.0, math.nan, math.nan, 0, 0.0
    mean = sum(positions) / n
    jumps = [abs(b - a) for a, b in pairwise(positions)]
    variance = sum((p - mean) ** 2 for p in positions) / n
    return (
        n, mean, variance, min(positions), max(positions), sum(j > 0 for j in jumps),
        sum(jumps) / max(1, len(jumps)),
    )  # fmt: skip


@pytest.mark.parametrize("num_heads", [3, [2, 0, 3]], ids=["even", "ragged"])
def test_statistics_are_those_of_the_whole_trace(num_heads):
    gate = SinkGate(fair_share=5.0, sigma=1.5)
    tracker = SinkTracker(3, num_heads, batch_size=2, max_keys=20, gate=gate, trace=True)
    masses = masses_of(tracker, 7)
    feed(tracker, masses)
    result = tracker.result()
    assert int(result.steps) == 7 and result.mass.shape == (3, 2, 3)
    for layer, heads in enumerate(result.num_heads):
        for b in range(2):
            for h in range(heads):
                rows = [step[layer][b, h].double() for step in masses]
                best = [row.topk(2) for row in rows]
                positions = [int(t.indices[0]) for t in best]
                tops = torch.stack([t.values[0] for t in best])
                gated = [
                    int(row.argmax())
                    for row in rows
                    if row.max() * 20 >= 5.0 and row.max() > row.mean() + 1.5 * row.std(unbiased=False)
                ]
                at = (layer, b, h)
                for got, expected in ((result.position, moments(positions)), (result.gated, moments(gated))):
                    fields = ("count", "mean", "variance", "minimum", "maximum", "moves", "mean_move")
                    seen = [getattr(got, f)[at] for f in fields]
                    torch.testing.assert_close(
                        torch.stack(seen), torch.tensor(expected).float(), equal_nan=True
                    )
                figures = {
                    "mass": tops.mean(),
                    "fair_shares": 20 * tops.mean(),
                    "margin": torch.stack([t.values[0] - t.values[1] for t in best]).mean(),
                }
                for name, value in figures.items():
                    torch.testing.assert_close(
                        getattr(result, name)[at].double(), value, rtol=1e-4, atol=1e-6
                    )
                assert result.trace_positions[:, layer, b, h].tolist() == positions
                torch.testing.assert_close(
                    result.trace_mass[:, layer, b, h].double(), tops, rtol=1e-6, atol=1e-7
                )
        assert (result.position.count[layer, :, heads:] == 0).all()
        assert (result.trace_positions[:, layer, :, heads:] == -1).all()


def test_moments_do_not_lose_precision_far_from_zero():
    tracker = SinkTracker(1, 1, 1, 100_000)
    positions = [99_990 + i % 3 for i in range(30)]
    for p in positions:
        tracker.mass[0].zero_()
        tracker.mass[0][0, 0, p] = 1.0
        tracker.end_step()
    torch.testing.assert_close(
        tracker.result().position.variance.item(), moments(positions)[2], rtol=5e-3, atol=0
    )


def test_a_nan_or_absent_head_counts_no_step_and_keeps_the_moments():
    tracker = SinkTracker(1, 3, 1, 8, trace=True)
    first, second, third = masses_of(tracker, 3)
    second[0][0, 1, 4] = math.nan
    second[0][0, 2] = 0
    feed(tracker, [first, second, third])
    result = tracker.result()
    assert result.position.count[0, 0].tolist() == [3, 2, 2] and int(result.steps) == 3
    assert result.trace_positions[1, 0, 0, 1:].tolist() == [-1, -1]
    apart = SinkTracker(1, 3, 1, 8)
    feed(apart, [first, third])
    torch.testing.assert_close(result.position.variance[..., 1:], apart.result().position.variance[..., 1:])
    torch.testing.assert_close(result.position.mean_move[..., 1:], apart.result().position.mean_move[..., 1:])


def test_ties_go_to_the_lowest_index():
    tracker = SinkTracker(1, 1, 1, 6, trace=True)
    tracker.mass[0].copy_(torch.tensor([0.1, 0.3, 0.1, 0.3, 0.1, 0.1]))
    tracker.end_step()
    assert tracker.result().trace_positions.item() == 1 and tracker.result().margin.item() == 0


def test_padded_keys_are_never_the_sink_and_do_not_count_as_fair_shares():
    mask = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
    for at_construction in (True, False):
        tracker = SinkTracker(2, 2, 2, 6, key_padding_mask=mask if at_construction else None)
        for mass in tracker.mass:
            mass.copy_(torch.tensor([0.1, 0.2, 0.1, 0.1, 0.4, 0.1]).expand_as(mass))
        tracker.end_step(key_padding_mask=None if at_construction else mask)
        result = tracker.result()
        assert (
            result.position.mean[:, 0].unique().item() == 4
            and result.position.mean[:, 1].unique().item() == 1
        )
        torch.testing.assert_close(result.fair_shares[0, :, 0], torch.tensor([0.4 * 6, 0.2 * 3]))


def test_a_step_may_use_fewer_keys_than_the_buffer():
    tracker = SinkTracker(1, 1, 1, 8)
    tracker.mass[0].copy_(torch.tensor([0.2, 0.5, 0.3, 0, 0, 0, 0, 9.0]))
    tracker.end_step(num_keys=3)
    result = tracker.result()
    assert result.position.mean.item() == 1 and result.fair_shares.item() == pytest.approx(1.5)


def test_reset_forgets_and_keeps_the_buffers():
    tracker = SinkTracker(1, 2, 1, 5, trace=True)
    where = [m.data_ptr() for m in tracker.mass]
    steps = masses_of(tracker, 3)
    feed(tracker, steps)
    before = tracker.result()
    tracker.reset()
    assert int(tracker.result().steps) == 0 and (tracker.result().position.count == 0).all()
    feed(tracker, steps)
    after = tracker.result()
    assert [m.data_ptr() for m in tracker.mass] == where
    assert torch.equal(after.position.variance, before.position.variance)
    assert torch.equal(after.trace_positions, before.trace_positions)


def test_steps_beyond_the_trace_still_count():
    tracker = SinkTracker(1, 1, 1, 5, trace=True, max_steps=2)
    feed(tracker, masses_of(tracker, 5))
    result = tracker.result()
    assert int(result.steps) == 5 and result.trace_positions.shape == (2, 1, 1, 1)


def test_results_are_copies():
    tracker = SinkTracker(1, 1, 1, 5)
    feed(tracker, masses_of(tracker, 2))
    result = tracker.result()
    kept = result.position.mean.clone(), result.mass.clone()
    feed(tracker, masses_of(tracker, 3))
    assert torch.equal(result.position.mean, kept[0]) and torch.equal(result.mass, kept[1])


def test_column_mass_writes_into_the_tracker():
    tracker = SinkTracker(1, 2, 1, 12)
    q = torch.randn(1, 2, 9, 8)
    k = torch.randn(1, 2, 9, 8)
    k[0, 0, 5], k[0, 1, 2] = 30 * q[0, 0].mean(0), 30 * q[0, 1].mean(0)
    ops.column_mass(q, k, out=tracker.mass[0])
    tracker.end_step(num_keys=9)
    mass = torch.softmax(q @ k.mT * 8**-0.5, -1).mean(2)
    torch.testing.assert_close(tracker.result().mass[0], mass.amax(-1))
    assert tracker.result().position.mean[0].tolist() == mass.argmax(-1).tolist()


def test_no_samples_and_no_heads_are_allowed():
    empty = SinkTracker(2, 3, 0, 4, trace=True)
    empty.end_step()
    assert empty.result().mass.shape == (2, 0, 3)
    headless = SinkTracker(2, [0, 0], 2, 4)
    headless.end_step()
    assert headless.result().mass.shape == (2, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((2, [1], 1, 4), "one per layer"), ((0, 1, 1, 4), "one per layer"), ((1, -1, 1, 4), "none negative"),
     ((1, 1, -1, 4), "batch_size >= 0"), ((1, 1, 1, 0), "max_keys >= 1")],
)  # fmt: skip
def test_impossible_sizes_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        SinkTracker(*arguments)


def test_bad_masks_and_lengths_are_refused():
    tracker = SinkTracker(1, 1, 2, 4)
    with pytest.raises(TypeError, match="must be bool"):
        tracker.end_step(key_padding_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"\[2, at most 4\]"):
        tracker.end_step(key_padding_mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"0\.\.4"):
        tracker.end_step(num_keys=5)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        tracker.end_step(num_keys=4, key_padding_mask=torch.ones(2, 3, dtype=torch.bool))
