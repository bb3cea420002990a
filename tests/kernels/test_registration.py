"""The registered ops: opcheck-clean, traceable in full graphs, index lists as tensors, no recompiles by
layer."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SHAPES, make_case

from sinkprune import ops
from sinkprune.evidence.sinks import SinkTracker
from sinkprune.kernels import reference
from sinkprune.ops import elementwise, native

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


def elementwise_calls(device, gradients):
    def made(*shape):
        return torch.randn(*shape, device=device, requires_grad=gradients)

    q, k = made(2, 5, 4, 16).transpose(1, 2), made(2, 5, 2, 16).transpose(1, 2)
    table, of_keys = torch.randn(5, 8, device=device), torch.randn(2, 1, 5, 8, device=device)
    table, of_keys = (table, table + 1), (of_keys, of_keys + 1)
    op = torch.ops.sinkprune
    return {
        "norm": (op.rms_norm.default, (made(3, 5, 32), made(32), 1e-6)),
        "norm of a view, no gain": (op.rms_norm.default, (made(3, 5, 32).transpose(0, 1), None, 1e-6)),
        "sum and norm": (op.add_rms_norm.default, (made(3, 5, 32), made(3, 5, 32), made(32), 1e-6)),
        "rotary": (op.rope_qk.default, (q, k, *table, None, None, None, None, 1e-6)),
        "normed, other angles for keys": (
            op.rope_qk.default, (q, k, *table, *of_keys, made(16), made(16), 1e-6),
        ),
        "swiglu of halves": (op.swiglu.default, made(3, 5, 32).chunk(2, -1)),
    }  # fmt: skip


CALLS = list(elementwise_calls("cpu", False))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_elementwise(name, device):
    op, arguments = elementwise_calls(device, True)[name]
    torch.library.opcheck(op, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_elementwise_ops_are_those_of_pytorch(name, device):
    op, arguments = elementwise_calls(device, True)[name]
    public = getattr(elementwise, op._schema.name.split("::")[1])
    options = {}
    if public is elementwise.rope_qk:
        *arguments, q_weight, k_weight, eps = arguments
        options = {"q_weight": q_weight, "k_weight": k_weight, "eps": eps}
    inputs = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    gradients = []
    for backend in ("reference", "triton"):
        out = public(*arguments, **options, backend=backend)
        out = out if isinstance(out, tuple) else (out,)
        gradients.append(torch.autograd.grad([o.square().sum() for o in out], inputs, retain_graph=True))
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op, x: op.rms_norm(x, x[0, :5], 1e-6), r"rms_norm needs .* got \(4, 8\).* \(5,\)"),
        (lambda op, x: op.rms_norm(x.long(), None, 1e-6), "rms_norm needs floats"),
        (lambda op, x: op.add_rms_norm(x, x[:2], None, 1e-6), "add_rms_norm needs two float tensors alike"),
        (lambda op, x: op.swiglu(x, x.double()), "swiglu needs two float tensors alike"),
        (lambda op, x: rope(op, x, x), "rope_qk needs q and k"),
        (lambda op, x: rope(op, x[None, None], x[None, None], x[:3], x[:3]), "needs two float32 tables"),
        (lambda op, x: rope(op, x[None, None], x[None, None], x[:, :3], x[:, :3]), "R even"),
        (lambda op, x: rope(op, x[None, None], x[None, None], gain=x[0]), "two contiguous gains"),
    ],
)  # fmt: skip
def test_elementwise_ops_refuse_what_would_read_beyond_their_tensors(call, message, device):
    with pytest.raises(ValueError, match=message):
        call(torch.ops.sinkprune, torch.randn(4, 8, device=device))


def rope(op, q, k, cos=None, sin=None, gain=None):
    table = torch.ones(4, 8, device=q.device)
    cos, sin = (table if t is None else t for t in (cos, sin))
    return op.rope_qk(q, k, cos, sin, None, None, gain, None, 1e-6)


def test_a_forced_backend_that_cannot_serve_an_elementwise_call_says_why(device):
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ops.BackendUnavailable, match="native has no elementwise operations"):
        elementwise.swiglu(x, x, backend="native")
    with pytest.raises(ops.BackendUnavailable, match="it has no float64"):
        elementwise.rms_norm(x.double(), None, 1e-6, backend="triton")
    with pytest.raises(ops.BackendUnavailable, match="two tensors alike"):
        elementwise.swiglu(x, x[:1], backend="triton")


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
