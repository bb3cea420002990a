"""The specialised form of attention against float64: tails, samples, grouped and kept heads, strides."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import assert_as_exact

from sinkprune.kernels import attention_specialised, launch, reference
from sinkprune.kernels.attention import attention
from sinkprune.kernels.launch import Tile

TILE = Tile(64, 64, 4, 2, specialised=True)
PLAIN = Tile(64, 64, 4, 2)


def check(case, **options):
    """Twice the plain form's error at most, against float64."""
    options = {"scale": case.scale, **case.choices, **options}
    got = attention(case.q, case.k, case.v, tile=TILE, **options)
    same = attention(case.q, case.k, case.v, tile=PLAIN, **options)
    options.pop("scale")
    exact = reference.attention(*case.double(), scale=case.scale, **options)
    for mine, theirs, truth in zip(got, same, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
        assert_as_exact(mine, truth, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("b", "hq", "hkv", "lq", "lk", "d"),
    [(2, 2, 2, 70, 100, 64), (2, 2, 1, 33, 128, 64), (1, 1, 1, 1, 1, 64), (3, 1, 1, 65, 63, 128)],
    ids=["tails of two samples", "grouped, whole tiles", "one key", "three samples"],
)
def test_values_match_float64(b, hq, hkv, lq, lk, d, dtype, new_case):
    check(new_case(b, hq, hkv, lq, lk, d, dtype=dtype))


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
def test_kept_heads_over_ragged_groups(compact, new_case):
    case = new_case(2, 5, 3, 40, 70, 64, dtype=torch.float16, kept=[0, 2, 3], groups=[0, 0, 2, 1, 2])
    check(case, compact=compact)


def test_the_tail_of_a_sample_takes_nothing_from_the_next(new_case):
    """Tiles of keys run over a sample's end; what lies there in memory is the next sample, NaN here."""
    case = new_case(2, 1, 1, 40, 70, 64, dtype=torch.float16)
    clean = attention(case.q, case.k, case.v, scale=case.scale, tile=TILE)
    case.k[1, :, 0] = case.v[1] = math.nan
    got = attention(case.q, case.k, case.v, scale=case.scale, tile=TILE)
    for after, before in zip(got, clean, strict=True):
        assert torch.equal(after[0], before[0]) and after[1].isnan().all()


def test_views_of_a_fused_projection_are_read_in_place(new_case):
    fused = torch.randn(1, 40, 3, 2, 64)  # [B, L, qkv, H, D]; a sample of one has a stride nobody minds
    case = new_case(1, 2, 2, 40, 40, 64, dtype=torch.float16)
    case.q, case.k, case.v = (
        fused[:, :, i].transpose(1, 2).to(case.q.device, torch.float16) for i in range(3)
    )
    case.q = case.q.as_strided(case.q.shape, (1, *case.q.stride()[1:]))
    assert not case.q.is_contiguous()
    check(case)


def test_only_what_is_asked_for_is_written(new_case):
    case = new_case(1, 2, 2, 40, 70, 64, dtype=torch.float16)
    both = attention(case.q, case.k, case.v, scale=case.scale, tile=TILE)
    out, lse = attention(case.q, case.k, case.v, scale=case.scale, tile=TILE, with_lse=False)
    assert torch.equal(out, both[0]) and lse.numel() == 0


def test_head_ids_out_of_range_write_nothing_outside(new_case):
    case = new_case(1, 3, 3, 20, 20, 64, dtype=torch.float16)
    only = {"kept_heads": torch.tensor([1], device=case.q.device)}
    expected = attention(case.q, case.k, case.v, scale=case.scale, tile=TILE, **only)
    case.kept_heads = torch.tensor([1, 3, 1000], device=case.q.device)
    got = attention(case.q, case.k, case.v, scale=case.scale, tile=TILE, **case.choices)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"d": 80},
        {"padding": True},
        {"block_size": 4},
        {"positions": "q"},
    ],
    ids=str,
)
def test_what_it_does_not_serve_is_refused(change, new_case):
    case = new_case(1, 2, 2, 20, 20, **{"d": 64, "dtype": torch.float16, **change})
    with pytest.raises(ValueError, match="specialised tile serves"):
        attention(case.q, case.k, case.v, scale=case.scale, tile=TILE, **case.choices)


def test_rows_off_a_multiple_of_16_bytes_are_not_served():
    rows = torch.zeros(2, 20, 3, 64 + 4, dtype=torch.float16)
    assert attention_specialised.serves(rows[..., :64].contiguous().transpose(1, 2))
    assert not attention_specialised.serves(rows[..., :64].transpose(1, 2))  # a step of 136 bytes
    shifted = torch.zeros(2 * 3 * 20 * 64 + 1, dtype=torch.float16)[1:].view(2, 3, 20, 64)
    assert not attention_specialised.serves(shifted)
    assert not attention_specialised.serves(rows[:, :1, :, :64].expand(2, 20, 3, 64).contiguous()[:, :, :0])
    assert not attention_specialised.serves(
        torch.zeros(2, 1, 20, 64, dtype=torch.float16).expand(2, 3, 20, 64)
    )


def test_full_grids_take_it_where_the_device_runs_it_and_few_queries_split_their_keys_as_before():
    known = launch.family("sm_90")

    def choose(rows, keys, programs, specialised):
        return launch.choose_tile(
            "attention", known, 132, "16", 128, rows, keys, programs, specialised=specialised
        )

    assert choose(4096, 4096, 32, True)[0].specialised and choose(4096, 4096, 32, True)[1] == 1
    assert not choose(4096, 4096, 32, False)[0].specialised
    tile, shares = choose(16, 8192, 8, True)
    assert not tile.specialised and shares > 1


def test_a_tuned_choice_of_it_is_left_where_it_cannot_serve(monkeypatch):
    q = torch.zeros(1, 4, 100, 64, dtype=torch.bfloat16)
    key = launch.bucket("attention", q, 100, 1000, 4)
    monkeypatch.setattr(launch, "overrides", {key: (TILE, 1)})
    assert launch.attention_tile(q, rows=100, keys=1000, programs=4, specialised=True) == (TILE, 1)
    assert not launch.attention_tile(q, rows=100, keys=1000, programs=4)[0].specialised
