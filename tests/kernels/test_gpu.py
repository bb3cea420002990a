"""What only a GPU can show: graphs, device guards, no synchronisation, the fused kernels' log-sum-exp, long
inputs."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_case

from sinkprune import ops
from sinkprune.evidence.sinks import SinkTracker
from sinkprune.kernels import agreement, launch, probe, reference

pytestmark = pytest.mark.gpu


@pytest.fixture
def q():
    return torch.randn(1, 100, 8, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def step(q, kept, offset, tracker):
    out, lse = ops.attention(q, q, q, kept_heads=kept)
    ops.column_mass(q, q, lse, kept_heads=kept, sample=16, offset=offset, out=tracker.mass[0])
    tracker.end_step(num_keys=q.shape[2])
    return out


def test_a_whole_step_is_captured_and_replays_with_the_offset_moved(q):
    kept = torch.tensor([0, 3, 5], device="cuda")
    offset = torch.zeros(1, dtype=torch.int64, device="cuda")
    tracker, apart = (SinkTracker(1, 8, 1, 512, "cuda") for _ in range(2))
    step(q, kept, offset, tracker)
    tracker.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(q, kept, offset, tracker)
        offset += 1
    tracker.reset()
    for i in range(8):
        graph.replay()
        expected = step(q, kept, torch.tensor([i], device="cuda"), apart)
        assert torch.equal(out, expected) and torch.equal(tracker.mass[0], apart.mass[0])
    assert int(tracker.result().steps) == 8
    torch.testing.assert_close(tracker.result().position.variance, apart.result().position.variance)


def test_a_step_never_waits_for_the_device(q):
    kept = torch.tensor([0, 3, 5], device="cuda")
    offset = torch.zeros(1, dtype=torch.int64, device="cuda")
    tracker = SinkTracker(1, 8, 1, 512, "cuda")
    step(q, kept, offset, tracker)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(q, kept, offset, tracker)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("length", [1, 63, 1024, 4097])
def test_the_same_bits_from_run_to_run(length):
    case = make_case(
        2, 8, 2, length, length, 128, dtype=torch.bfloat16, padding=length > 1, device=torch.device("cuda")
    )
    runs = [ops.attention(case.q, case.k, case.v, backend="triton", **case.choices) for _ in range(3)]
    masses = [ops.column_mass(case.q, case.k, runs[0][1], backend="triton", **case.choices) for _ in range(3)]
    for other, mass in zip(runs[1:], masses[1:], strict=True):
        assert torch.equal(other[0], runs[0][0]) and torch.equal(other[1], runs[0][1])
        assert torch.equal(mass, masses[0])


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_the_fused_kernels_log_sum_exp_is_ours(kv_heads):
    q = torch.randn(1, 8, 133, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, kv_heads, 200, 128, device="cuda", dtype=torch.bfloat16)
    out, lse = ops.attention(q, k, k, backend="sdpa")
    ours, our_lse = ops.attention(q, k, k, backend="triton")
    torch.testing.assert_close(lse, our_lse, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(out, ours, atol=2e-2, rtol=2e-2)
    exact = reference.column_mass(q.float(), k.float())
    torch.testing.assert_close(ops.column_mass(q, k, lse), exact, atol=1e-5, rtol=2e-2)


def test_the_specialised_form_is_taken_where_it_agrees_and_repeats_its_bits():
    device = torch.device("cuda", torch.cuda.current_device())
    if not probe.specialised_works(device):
        pytest.skip("its family has no specialised tiles, or the probe's answer speaks against them")
    assert agreement.disagreement(device, length=1000) == ""
    q, k, v = (torch.randn(2, 16, 4096, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
    tile, _ = launch.attention_tile(q, rows=4096, keys=4096, programs=32, specialised=True)
    assert tile.specialised
    first = ops.attention(q, k, v, backend="triton")
    for _ in range(20):  # warps that race show in some of many blocks
        again = ops.attention(q, k, v, backend="triton")
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_a_launch_goes_to_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    q = torch.randn(1, 2, 64, 64, device="cuda:1", dtype=torch.float16)
    with torch.cuda.device(0):
        out, _ = ops.attention(q, q, q, backend="triton")
    assert out.device == q.device and torch.isfinite(out).all()


def test_head_ids_on_the_device_are_trusted_and_guarded(q):
    out, lse = ops.attention(q, q, q, kept_heads=torch.tensor([2, 99], device="cuda"), backend="triton")
    torch.cuda.synchronize()
    expected = ops.attention(q, q, q, kept_heads=[2], backend="triton")
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
