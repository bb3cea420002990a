"""What the compiler makes of the kernels for GPUs that are not here (see ahead.py, which runs apart)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from least_times import attention_work, column_mass_work, least_seconds

from sinkprune.kernels import launch

AHEAD = Path(__file__).with_name("ahead.py")


@pytest.fixture(scope="module")
def compiled():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, str(AHEAD), "--quick"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def named(c):
    return f"{c['kernel']} sm_{c['arch']} D={c['head_dim']} {c['variant']} {c['tile']}"


def test_nothing_spills_and_nothing_lives_on_the_stack(compiled):
    assert len(compiled) >= 12
    for c in compiled:
        assert c["spills"] == 0 and c["stack"] == 0, named(c)


def test_shared_memory_fits_the_device(compiled):
    for c in compiled:
        assert c["shared_bytes"] <= launch.family(f"sm_{c['arch']}").shared_bytes, named(c)


def test_tensor_cores_are_used_and_warpgroup_ones_where_there_are_any(compiled):
    for c in compiled:
        if not c["kernel"].startswith(("attention", "column_mass")):
            continue
        if c["arch"] in (90, 100):
            held = c["tile"]["block_n" if c["kernel"] == "column_mass" else "block_m"]
            assert held < 64 or c["warpgroup"], named(c)
        else:
            assert c["tensor_core"] > 0, named(c)


def test_as_many_blocks_fit_a_multiprocessor_as_the_tile_claims(compiled):
    for c in compiled:
        if c["variant"] in ("plain", "pruned", "split"):
            assert c["blocks_per_sm"] >= c["tile"]["blocks_per_sm"], named(c)


def test_no_atomics_so_the_order_of_additions_is_fixed(compiled):
    for c in compiled:
        assert c["atomics"] == 0, named(c)


def test_what_is_compiled_is_what_is_launched(compiled):
    """A launch specialises strides of 1, but no length, not even one of 1."""
    (mass,) = (c for c in compiled if c["kernel"] == "column_mass" and c["arch"] == 100)
    assert mass["ones"] == ["stride_ll"]
    assert all("n_shares" not in c["ones"] for c in compiled)


def test_attention_needs_few_instructions_per_key(compiled):
    """The loop of 64 keys was 377 instructions with tiles of 128 x 64."""
    seen = [c for c in compiled if (c["kernel"], c["arch"], c["head_dim"]) == ("attention", 90, 128)]
    assert {c["variant"] for c in seen} == {"plain", "pruned", "causal", "split"}
    for c in seen:
        assert (c["tile"]["block_m"], c["tile"]["block_n"]) == (128, 128)
        # With explicit positions on both sides every tile is masked.
        assert c["loop_per_64"] <= (900 if c["variant"] == "causal" else 260), named(c)


def test_the_specialised_form_is_specialised(compiled):
    """A compiler that cannot specialise the loop says nothing: it makes four warps that spill."""
    seen = [c for c in compiled if c["kernel"] == "attention_specialised"]
    assert {(c["arch"], c["head_dim"]) for c in seen} == {(90, 64), (90, 128), (100, 128)}
    for c in seen:
        assert c["warps"] > c["tile"]["num_warps"] and c["tile_copies"] > 0, named(c)
        assert c["registers"] <= 168, named(c)
        if c["arch"] == 90:
            assert c["block_barriers"] == 0, named(c)
            # The last keys of a sample, where its tiles are not whole, cost a comparison in every tile.
            assert c["loop_per_64"] <= (240 if c["variant"] == "plain" else 300), named(c)


def test_elementwise_kernels_move_16_bytes_at_a_time(compiled):
    """Of 16-bit rows whose width 16 divides; a mask that the compiler cannot follow makes it 2 bytes."""
    seen = {c["kernel"]: c["wide_accesses"] for c in compiled if c["variant"] == "elementwise"}
    assert set(seen) == {"rms_norm", "rms_norm of heads", "rope_qk", "rope_qk of half, normed", "swiglu"}
    assert all(seen.values()), seen


def test_column_mass_cleans_the_log_sum_exp_outside_its_loop(compiled):
    """313 instructions per 64 rows with the cleaning, the counting and the row mask in the loop."""
    for c in compiled:
        if c["kernel"] == "column_mass" and c["arch"] == 90 and c["variant"] == "plain":
            assert c["loop_per_64"] <= 230, named(c)


def test_the_table_goes_between_its_markers(tmp_path):
    document = tmp_path / "kernels.md"
    document.write_text("before\n<!-- roofline -->\nold\n<!-- end roofline -->\nafter\n")
    subprocess.run(
        [sys.executable, str(AHEAD), "--roofline", str(document)], check=True, env=dict(os.environ)
    )
    text = document.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and "old" not in text
        and "| attention |" in text
    )


def test_rooflines_are_the_textbook_numbers():
    work = attention_work(1, 32, 32, 1024, 1024, 128)
    assert work.flops == 4 * 32 * 1024 * 1024 * 128 and work.exponentials == 32 * 1024 * 1024
    half = attention_work(1, 16, 32, 1024, 1024, 128)
    assert half.flops * 2 == work.flops and half.exponentials * 2 == work.exponentials
    exact = column_mass_work(1, 32, 32, 1024, 1024, 128)
    assert exact.flops * 2 == work.flops
    assert column_mass_work(1, 32, 32, 1024, 1024, 128, sample=16).flops * 16 == exact.flops
    seconds, binding = least_seconds(work, "H100")
    assert binding == "tensor cores" and seconds == pytest.approx(work.flops / 989e12)
