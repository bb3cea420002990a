"""Interleaved timing on a clock that the test turns."""

import types

import pytest
import torch

from sinkprune.planning import timing


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def taking(clock, calls, name, seconds):
    """A call that takes ``seconds(n)`` on its n-th run."""

    def call():
        clock.seconds += seconds(sum(c == name for c in calls))
        calls.append(name)

    return call


def test_calls_alternate_and_take_turns_to_go_first(clock):
    calls = []
    timing.interleaved(
        {name: taking(clock, calls, name, lambda n: 1.0) for name in "ab"}, repeats=4, warmup=1
    )
    assert "".join(calls) == "ab" + "abba" * 2


def test_times_are_percentiles_in_milliseconds_without_the_warm_up(clock):
    calls = []
    slow_start = {
        "a": taking(clock, calls, "a", lambda n: 100.0 if n < 2 else 0.001 * (n - 1))
    }  # then 1..11 ms
    times, ratios = timing.interleaved(slow_start, repeats=11, warmup=2)
    expected = torch.arange(1.0, 12.0).quantile(torch.tensor([0.5, 0.2, 0.8]))
    assert [times["a"].median, times["a"].p20, times["a"].p80] == pytest.approx(expected.tolist())
    assert ratios == {"a": 1.0}


def test_a_ratio_is_that_of_one_round_so_a_machine_slow_for_a_while_does_not_move_it(clock):
    calls = []

    def load(n):  # the machine slows down five-fold for most of the run
        return 5.0 if n >= 3 else 1.0

    _, ratios = timing.interleaved(
        {
            "dense": taking(clock, calls, "dense", lambda n: 3.0 * load(n)),
            "pruned": taking(clock, calls, "pruned", lambda n: 2.0 * load(n)),
        },
        repeats=8,
        warmup=0,
    )
    assert ratios == {"dense": 1.0, "pruned": pytest.approx(1.5)}


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        timing.interleaved({"a": int}, repeats=0)
