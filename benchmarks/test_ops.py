"""pytest-benchmark of the small operations: `pytest benchmarks`."""

import pytest
import torch

import sinkprune as sp

SHAPES = {"tiny": (1, 8, 256, 32), "150M": (1, 12, 256, 64)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def query(request):
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all heads", "half the heads"])
def test_attention(benchmark, query, share):
    kept = list(range(round(query.shape[1] * share)))
    out, _ = benchmark(sp.ops.attention, query, query, query, kept_heads=kept, layout="compact")
    assert out.shape[1] == len(kept)


@pytest.mark.parametrize("sample", [None, 16], ids=["exact", "1/16 of the rows"])
def test_column_mass(benchmark, query, sample):
    _, lse = sp.ops.attention(query, query, query)
    mass = benchmark(sp.ops.column_mass, query, query, lse, sample=sample)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), atol=1e-4, rtol=0)


def test_sink_update(benchmark):
    tracker = sp.SinkTracker(32, 32, 1, 1024)
    for mass in tracker.mass:
        mass.copy_(torch.rand(mass.shape).softmax(-1))
    benchmark(tracker.end_step)
    assert int(tracker.result().steps) > 0
