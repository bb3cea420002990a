"""The registered ops: opcheck-clean, traceable in full graphs, index lists as tensors, no recompiles by
layer."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SHAPES, make_case

from sinkprune import ops
from sinkprune.evidence.sinks import SinkTracker
from sinkprune.kernels import reference
from sinkprune.ops import native

NAMES = ["odd", "kept-ragged-padded", "block-causal-all-positions", "no-head-kept", "no-sample", "one-query"]
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


def attention_arguments(case, compact, backend):
    return (case.q, case.k, case.v, *case.choices.values(), case.scale, compact, backend)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_attention(name, backend, device):
    if backend == "triton" and name not in ("odd", "kept-ragged-padded", "no-head-kept"):
        pytest.skip("covered by the shapes that stay")
    case = make_case(**dict(SHAPES[name], d=16), device=device)
    for compact in (False, True):
        torch.library.opcheck(
            torch.ops.sinkprune.attention.default,
            attention_arguments(case, compact, backend),
            test_utils=CHECKS[:2] if backend == "triton" else CHECKS,
        )


@pytest.mark.parametrize("backend", ["reference", "sdpa", "native", "triton"])
@pytest.mark.parametrize("name", ["odd", "kept-ragged-padded", "block-causal-all-positions"])
def test_opcheck_column_mass(name, backend, device):
    if backend == "native" and (not native.available() or device.type != "cpu"):
        pytest.skip("the native extension is not here")
    case = make_case(**dict(SHAPES[name], d=16), device=device)
    lse = reference.attention(case.q, case.k, case.v, **case.choices)[1]
    out = torch.zeros(*case.q.shape[:2], case.k.shape[2] + 2, device=device)
    offset = torch.tensor([3], device=device)
    torch.library.opcheck(
        torch.ops.sinkprune.column_mass_.default,
        (case.q, case.k, lse, *case.choices.values(), case.scale, 4, offset, out, backend),
        test_utils=CHECKS[:2] if backend == "triton" else CHECKS,
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck_sink_update(backend, device):
    rows = 6
    state = torch.zeros(rows, reference.STATE_WIDTH, device=device)
    sample_of = torch.arange(rows, dtype=torch.int32, device=device) % 2
    padding = torch.rand(2, 20, device=device) > 0.2
    traces = torch.zeros(3, rows, dtype=torch.int32, device=device), torch.zeros(3, rows, device=device)
    torch.library.opcheck(
        torch.ops.sinkprune.sink_update_.default,
        (torch.rand(rows, 20, device=device), state, sample_of, padding, 20, 4.0, 2.0, *traces, backend),
        test_utils=CHECKS[:2],
    )


def test_one_graph_holds_attention_mass_and_the_update(device):
    """A full step compiled without a break, and again for other heads and lengths without compiling anew."""
    tracker = SinkTracker(1, 4, 1, 64, device)
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def step(q, k, v, kept, offset):
        out, lse = ops.attention(q, k, v, kept_heads=kept)
        ops.column_mass(q, k, lse, kept_heads=kept, sample=4, offset=offset, out=tracker.mass[0])
        tracker.end_step()
        return out

    for length, kept in ((36, [0, 1, 3]), (48, [0, 2, 3]), (40, [0, 1]), (56, [2, 3])):
        q = torch.randn(1, 4, length, 16, device=device)
        heads = torch.tensor(kept, device=device)
        offset = torch.tensor([2], device=device)
        torch.testing.assert_close(step(q, q, q, heads, offset), ops.attention(q, q, q, kept_heads=heads)[0])
        expected = ops.column_mass(q, q, kept_heads=heads, sample=4, offset=offset)
        torch.testing.assert_close(tracker.mass[0][:, :, :length], expected, atol=1e-6, rtol=1e-5)
    assert compilations == 1
    assert int(tracker.result().steps) == 4


def test_the_inductor_runs_the_ops():
    q = torch.randn(2, 4, 33, 16)

    @torch.compile(fullgraph=True)
    def layer(x, heads):
        out, lse = ops.attention(x, x, x, kept_heads=heads)
        return out.transpose(1, 2).flatten(2) * 2, ops.column_mass(x, x, lse, kept_heads=heads)

    heads = torch.tensor([1, 2])
    out, lse = ops.attention(q, q, q, kept_heads=heads)
    expected = out.transpose(1, 2).flatten(2) * 2, ops.column_mass(q, q, lse, kept_heads=heads)
    torch.testing.assert_close(layer(q, heads), expected)


def test_gradients_flow_through_a_compiled_layer():
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    compiled = torch.compile(
        lambda x: ops.attention(x, x, x)[0].square().sum(), fullgraph=True, backend="aot_eager"
    )
    (got,) = torch.autograd.grad(compiled(q), q)
    (expected,) = torch.autograd.grad(ops.attention(q, q, q)[0].square().sum(), q)
    torch.testing.assert_close(got, expected)
    assert got.abs().max() > 0
