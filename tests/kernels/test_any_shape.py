"""Hypothesis over the Triton kernels' shapes: any sizes, heads, masks and positions, against the twins."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import make_case

from sinkprune.kernels import reference
from sinkprune.kernels.attention import attention
from sinkprune.kernels.column_mass import column_mass_
from sinkprune.kernels.launch import Tile


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_attention_and_mass_match_their_twins(device, data):
    draw = data.draw
    hkv = draw(st.integers(1, 2))
    hq = hkv * draw(st.integers(1, 2))
    lq, lk = draw(st.integers(0, 70)), draw(st.integers(0, 70))
    case = make_case(
        draw(st.integers(0, 2)), hq, hkv, lq, lk, draw(st.sampled_from([3, 16, 24, 80])),
        kept=draw(st.none() | st.lists(st.integers(0, hq - 1), unique=True).map(sorted)),
        groups=draw(st.none() | st.lists(st.integers(0, hkv - 1), min_size=hq, max_size=hq)),
        padding=draw(st.booleans()), block_size=draw(st.none() | st.integers(1, 80)),
        positions=draw(st.sampled_from(["q", "qk"])), device=device,
    )  # fmt: skip
    tile, shares, compact = Tile(32, 64, 4, 2), draw(st.sampled_from([1, 2])), draw(st.booleans())
    with np.errstate(all="ignore"):
        got = attention(
            case.q,
            case.k,
            case.v,
            scale=case.scale,
            compact=compact,
            tile=tile,
            shares=shares,
            **case.choices,
        )
        expected = reference.attention(*case.double(), compact=compact, **case.choices)
        torch.testing.assert_close(got[0].double(), expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got[1].double(), expected[1], atol=1e-5, rtol=1e-4)

        lse = reference.attention(case.q, case.k, case.v, **case.choices)[1]
        sample, offset = draw(st.none() | st.integers(1, 80)), draw(st.integers(-100, 100))
        mass = torch.full((*case.q.shape[:2], lk), math.nan, device=device)
        column_mass_(
            mass, case.q, case.k, lse, scale=case.scale, tile=tile, shares=shares, sample=sample,
            offset=torch.tensor([offset], device=device), **case.choices,
        )  # fmt: skip
        exact = reference.column_mass(
            case.q.double(), case.k.double(), sample=sample, offset=offset, **case.choices
        )
        torch.testing.assert_close(mass.double(), exact, atol=2e-6, rtol=1e-4)
