"""Triton: one denoising step's sinks folded into the running statistics, all layers, samples and heads at
once.

One program owns one row, a (layer, sample, head), and walks its column mass twice: for the largest mass,
its lowest index and the runner-up, then for the spread around the mean. It then updates that row's 32
floats of state in place. It
reads what it writes, so it must run exactly once per step: never autotune it. Twin: `reference.sink_update_`.

    mass [R, K]  ──row r──▶  max, argmax, runner-up, spread  ──▶  state [R, 32]   (+ trace [S, R])
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sinkprune.kernels import launch
from sinkprune.kernels.reference import STATE_WIDTH


@triton.jit
def _fold_position(p_state, position, taken):
    """Eight columns: count, mean, sum of squared deviations, minimum, maximum, last, moves, sum of |move|."""
    count = tl.load(p_state)
    mean = tl.load(p_state + 1)
    spread = tl.load(p_state + 2)
    low = tl.load(p_state + 3)
    high = tl.load(p_state + 4)
    last = tl.load(p_state + 5)
    moves = tl.load(p_state + 6)
    moved = tl.load(p_state + 7)
    later = count > 0
    move = tl.where(later, tl.abs(position - last), 0.0)
    delta = position - mean
    new_mean = mean + delta / (count + 1)
    tl.store(p_state, count + 1, mask=taken)
    tl.store(p_state + 1, new_mean, mask=taken)
    tl.store(p_state + 2, spread + delta * (position - new_mean), mask=taken)
    tl.store(p_state + 3, tl.where(later, tl.minimum(low, position), position), mask=taken)
    tl.store(p_state + 4, tl.where(later, tl.maximum(high, position), position), mask=taken)
    tl.store(p_state + 5, position, mask=taken)
    tl.store(p_state + 6, moves + tl.where(move > 0, 1.0, 0.0), mask=taken)
    tl.store(p_state + 7, moved + move, mask=taken)
    return count


@triton.jit(do_not_specialize=["num_keys", "trace_steps", "rows"])
def sink_update_kernel(
    mass, state, sample_of, padding, trace_positions, trace_mass,
    stride_m, stride_p, num_keys, rows, trace_steps, gate_share, gate_sigma,
    WIDTH: tl.constexpr, BK: tl.constexpr, PADDED: tl.constexpr, TRACED: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    p_mass = mass + i_r * stride_m
    p_state = state + i_r * WIDTH
    p_valid = padding
    if PADDED:
        p_valid = padding + tl.load(sample_of + i_r).to(tl.int64) * stride_p
    o_k = tl.arange(0, BK)

    top = -1.0
    rest = -1.0
    position = 0
    total = 0.0
    valid_keys = 0
    broken = 0
    for i_k in tl.range(0, num_keys, BK):
        m_k = i_k + o_k < num_keys
        if PADDED:
            m_k = m_k & (tl.load(p_valid + i_k + o_k, mask=m_k, other=0) != 0)
        a = tl.load(p_mass + i_k + o_k, mask=m_k, other=-1.0)
        broken += tl.sum(((a != a) | (tl.abs(a) == float("inf"))).to(tl.int32), 0)
        valid_keys += tl.sum(m_k.to(tl.int32), 0)
        total += tl.sum(tl.where(m_k, a, 0.0), 0)
        here = tl.max(a, 0)
        where = tl.min(tl.where(a == here, o_k, BK), 0)  # the lowest index among equals
        second = tl.max(tl.where(o_k == where, -1.0, a), 0)
        rest = tl.maximum(tl.minimum(top, here), tl.where(here > top, second, tl.maximum(rest, second)))
        position = tl.where(here > top, i_k + where, position)
        top = tl.maximum(top, here)
    n = tl.maximum(valid_keys, 1).to(tl.float32)
    mean = total / n
    squares = 0.0
    for i_k in tl.range(0, num_keys, BK):
        m_k = i_k + o_k < num_keys
        if PADDED:
            m_k = m_k & (tl.load(p_valid + i_k + o_k, mask=m_k, other=0) != 0)
        a = tl.load(p_mass + i_k + o_k, mask=m_k, other=0.0)
        away = tl.where(m_k, a - mean, 0.0)
        squares += tl.sum(away * away, 0)
    spread = tl.sqrt(squares / n)
    rest = tl.maximum(rest, 0.0)
    sink = (broken == 0) & (top > 0)
    stands_out = sink & (top * n >= gate_share) & (top > mean + gate_sigma * spread)

    where_now = position.to(tl.float32)
    count = _fold_position(p_state, where_now, sink)
    _fold_position(p_state + 8, where_now, stands_out)
    mass_mean = tl.load(p_state + 16)
    delta = top - mass_mean
    new_mean = mass_mean + delta / (count + 1)
    tl.store(p_state + 16, new_mean, mask=sink)
    tl.store(p_state + 17, tl.load(p_state + 17) + delta * (top - new_mean), mask=sink)
    tl.store(p_state + 18, tl.load(p_state + 18) + top - rest, mask=sink)
    tl.store(p_state + 19, tl.load(p_state + 19) + top * n, mask=sink)
    tl.store(p_state + 20, tl.load(p_state + 20) + top, mask=stands_out)
    steps = tl.load(p_state + 21)
    tl.store(p_state + 21, steps + 1)
    if TRACED:
        step = steps.to(tl.int64)
        fits = (step >= 0) & (step < trace_steps)  # a state is a caller's: its count may be anything
        tl.store(trace_positions + step * rows + i_r, tl.where(sink, position, -1), mask=fits)
        tl.store(trace_mass + step * rows + i_r, tl.where(sink, top, 0.0), mask=fits)


def sink_update_(
    mass: Tensor,
    state: Tensor,
    sample_of: Tensor,
    key_padding_mask: Tensor | None,
    num_keys: int,
    gate_share: float,
    gate_sigma: float,
    trace_positions: Tensor,
    trace_mass: Tensor,
) -> None:
    """Launch on checked arguments: ``mass`` ``[R, K]``, ``state`` ``[R, 32]``, ``sample_of`` int32 ``[R]``.

    The traces are ``[S, R]``, S = 0 for none; the step is the row's own count of steps, which is on the
    device.
    """
    rows = mass.shape[0]
    if rows == 0:
        return
    padding = None if key_padding_mask is None else launch.rows_of_bytes(key_padding_mask)
    width = min(2048, max(16, 1 << (num_keys - 1).bit_length()))
    with launch.on_device(mass):
        launch.start(
            sink_update_kernel, (rows, 1, 1),
            (mass, state, sample_of, state if padding is None else padding, trace_positions, trace_mass),
            (mass.stride(0), 0 if padding is None else padding.stride(0), num_keys, rows,
             trace_positions.shape[0], gate_share, gate_sigma),
            {"WIDTH": STATE_WIDTH, "BK": width, "PADDED": padding is not None,
             "TRACED": trace_positions.shape[0] > 0},
            num_warps=4,
        )  # fmt: skip
