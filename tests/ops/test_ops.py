"""The operations on CPU: every backend against the specification, gradients, and what bad input is told."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SHAPES, make_case

from sinkprune import ops
from sinkprune.kernels.visibility import Visibility
from sinkprune.ops import _pytorch, native

MASS_BACKENDS = [
    "sdpa",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built")),
]


def independent(case):
    """Attention and mass in float64 by loops over samples and heads, sharing no code with the package."""
    q, k, v = case.double()
    b, hq, lq, d = q.shape
    hkv, lk = k.shape[1:3]
    kept = range(hq) if case.kept_heads is None else case.kept_heads.tolist()
    out, lse, mass = torch.zeros_like(q), torch.full((b, hq, lq), math.inf), torch.zeros(b, hq, lk)
    out, lse, mass = out.double(), lse.double(), mass.double()
    for i, h in itertools.product(range(b), kept):
        group = h // (hq // hkv) if case.kv_head_of is None else int(case.kv_head_of[h])
        counted = 0
        for row in range(lq):
            at = row if case.query_positions is None else int(case.query_positions[i, row])
            seen = [
                at >= 0
                and (case.key_padding_mask is None or bool(case.key_padding_mask[i, j]))
                and (
                    case.block_size is None
                    or (j if case.key_positions is None else int(case.key_positions[i, j])) // case.block_size
                    <= at // case.block_size
                )
                for j in range(lk)
            ]
            if not any(seen):
                continue
            weights = [
                math.exp(float(q[i, h, row] @ k[i, group, j]) / math.sqrt(d)) if s else 0.0
                for j, s in enumerate(seen)
            ]
            weights = torch.tensor(weights, dtype=torch.float64)
            out[i, h, row] = (weights / weights.sum()) @ v[i, group]
            lse[i, h, row] = math.log2(float(weights.sum()))
            mass[i, h] += weights / weights.sum()
            counted += 1
        mass[i, h] /= max(counted, 1)
    return out, lse, mass


@pytest.mark.parametrize(
    "name", ["one-query", "odd-head-60", "kept-ragged-padded", "block-causal-all-positions", "no-key"]
)
def test_the_specification_matches_loops_written_apart(name):
    shape = dict(SHAPES[name], lq=min(SHAPES[name]["lq"], 9), lk=min(SHAPES[name]["lk"], 12))
    case = make_case(**shape, dtype=torch.float64)
    out, lse = ops.attention(case.q, case.k, case.v, backend="reference", **case.choices)
    mass = ops.column_mass(case.q, case.k, backend="reference", **case.choices)
    expected = independent(case)
    torch.testing.assert_close((out, lse), expected[:2])
    torch.testing.assert_close(mass.double(), expected[2], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("layout", ["full", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_through_pytorch_matches_the_specification(name, dtype, layout):
    case = make_case(**SHAPES[name], dtype=dtype)
    got = ops.attention(case.q, case.k, case.v, layout=layout, **case.choices)
    expected = ops.attention(case.q, case.k, case.v, layout=layout, backend="reference", **case.choices)
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("sample", [None, 5])
@pytest.mark.parametrize("backend", MASS_BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_column_mass_matches_the_specification(name, backend, sample):
    case = make_case(**SHAPES[name])
    _, lse = ops.attention(case.q, case.k, case.v, **case.choices)
    options = {"sample": sample, "offset": None if sample is None else torch.tensor(7), **case.choices}
    expected = ops.column_mass(case.q.double(), case.k.double(), backend="reference", **options)
    for given_lse in (lse, None):
        if backend == "native" and given_lse is None:
            continue
        out = torch.full((*lse.shape[:2], case.k.shape[2] + 4), math.nan)
        mass = ops.column_mass(case.q, case.k, given_lse, out=out, backend=backend, **options)
        assert mass._base is out and (out[:, :, case.k.shape[2] :] == 0).all()
        torch.testing.assert_close(mass, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 40, 10_000])
def test_blocks_of_any_size_give_the_same_mass(block, monkeypatch):
    monkeypatch.setattr(_pytorch, "BLOCK_SCORES", block)
    for name in ("odd", "kept-ragged-padded", "block-causal-all-positions", "padded-queries"):
        case = make_case(**SHAPES[name])
        expected = ops.column_mass(case.q, case.k, backend="reference", **case.choices)
        lse = ops.attention(case.q, case.k, case.v, **case.choices)[1]
        for given_lse in (lse, None):
            mass = ops.column_mass(case.q, case.k, given_lse, backend="sdpa", **case.choices)
            torch.testing.assert_close(mass, expected, atol=2e-6, rtol=1e-5)


def test_column_mass_never_holds_the_scores_of_all_heads():
    q = torch.randn(1, 8, 256, 16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return result

    with Watch():
        _pytorch.column_mass_(torch.empty(1, 8, 256), q, q, None, None, None, Visibility(), 0.25, None, None)
    assert largest <= max(_pytorch.BLOCK_SCORES, q.numel())


def test_a_padded_value_may_be_nan():
    case = make_case(1, 2, 2, 9, 12, 8, padding=True)
    clean = ops.attention(case.q, case.k, case.v, **case.choices)
    case.k[:, :, ~case.key_padding_mask[0]] = case.v[:, :, ~case.key_padding_mask[0]] = math.nan
    torch.testing.assert_close(ops.attention(case.q, case.k, case.v, **case.choices), clean)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("name", ["odd", "kept-ragged-padded", "block-causal"])
def test_gradients_are_those_of_plain_pytorch(name, backend):
    case = make_case(**SHAPES[name], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (case.q, case.k, case.v)]
    out, lse = ops.attention(*inputs, backend=backend, **case.choices)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    groups = (
        torch.arange(case.q.shape[1]) // (case.q.shape[1] // case.k.shape[1])
        if case.kv_head_of is None
        else case.kv_head_of
    )
    at = torch.arange(case.q.shape[2])
    mask = torch.ones(case.q.shape[0], 1, case.q.shape[2], case.k.shape[2], dtype=torch.bool)
    if case.key_padding_mask is not None:
        mask = mask & case.key_padding_mask[:, None, None]
    if case.block_size is not None:
        mask = mask & (at[None] // case.block_size <= at[:, None] // case.block_size)
    plain = F.scaled_dot_product_attention(
        inputs[0], inputs[1][:, groups], inputs[2][:, groups], attn_mask=mask
    )
    empty = ~mask.any(-1, keepdim=True)
    plain = plain.masked_fill(empty, 0)
    if case.kept_heads is not None:
        keep = torch.zeros(case.q.shape[1], dtype=torch.bool).index_fill(0, case.kept_heads, True)
        plain = plain.masked_fill(~keep[None, :, None, None], 0)
    torch.testing.assert_close(got, torch.autograd.grad((plain * weight).sum(), inputs))
    assert not lse.requires_grad


def test_backends_that_cannot_serve_a_call_say_why(monkeypatch):
    q = torch.randn(1, 2, 8, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ops.BackendUnavailable, match="CUDA tensor, or the interpreter"):
        ops.attention(q, q, q, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ops.BackendUnavailable, match="no gradients"):
        ops.attention(q.clone().requires_grad_(), q, q, backend="triton")
    with pytest.raises(ops.BackendUnavailable, match="float64"):
        ops.column_mass(q.double(), q.double(), backend="triton")
    with pytest.raises(ops.BackendUnavailable, match="limit is 256, got 512"):
        wide = torch.randn(1, 1, 2, 512)
        ops.attention(wide, wide, wide, backend="triton")
    with pytest.raises(ops.BackendUnavailable, match="has no attention"):
        ops.attention(q, q, q, backend="native")
    with pytest.raises(ops.BackendUnavailable, match="native"):
        ops.column_mass(q, q, backend="native")
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.attention(q, q, q, backend="fastest")


def test_auto_takes_the_fused_kernel_and_the_native_mass_on_cpu():
    q = torch.randn(1, 2, 8, 16)
    assert ops.attention_backend(q) == ops.attention_backend(q, irregular=True, masked=True) == "sdpa"
    lse = ops.attention(q, q, q)[1]
    assert ops.column_mass_backend(q, q, lse) == ("native" if native.available() else "sdpa")
    assert ops.column_mass_backend(q, q, None) == "sdpa"


Q = torch.zeros(2, 4, 6, 8)
K = torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"q": Q[0]}, ValueError, r"q must have shape \[B, H, L, D\], got \(4, 6, 8\)"),
        ({"k": K.double()}, TypeError, "k must have q's floating dtype"),
        ({"q": Q.int(), "k": K.int(), "v": K.int()}, TypeError, "floating dtype"),
        ({"v": K[:, :, :4]}, ValueError, "v must have k's shape"),
        ({"k": K[:1], "v": K[:1]}, ValueError, "agree in B and D"),
        ({"k": K.to("meta")}, ValueError, "k must be on q's device"),
        ({"q": Q.mT.contiguous().mT}, ValueError, "contiguous in its last dimension"),
        ({"k": K[:, [0, 0, 0]], "v": K[:, [0, 0, 0]]}, ValueError, "multiple of Hkv, got Hq=4 and Hkv=3"),
        ({"kept_heads": [1, 0]}, ValueError, "sorted and unique, got"),
        ({"kept_heads": [1, 1]}, ValueError, "sorted and unique"),
        ({"kept_heads": torch.tensor([0, 4])}, ValueError, "within 0..3"),
        ({"kept_heads": [-1]}, ValueError, "within 0..3"),
        ({"kept_heads": torch.tensor([[0]])}, ValueError, "one dimension"),
        ({"kept_heads": torch.tensor([0.0])}, TypeError, "int32 or int64"),
        ({"kv_head_of": [0, 0, 1]}, ValueError, "length Hq=4, got 3"),
        ({"kv_head_of": [0, 0, 1, 2]}, ValueError, "within 0..1"),
        ({"key_padding_mask": torch.ones(2, 6, dtype=torch.bool)}, ValueError, r"\[B, Lk\] = \(2, 5\)"),
        ({"key_padding_mask": torch.ones(2, 5)}, TypeError, "bool"),
        ({"block_size": 4}, ValueError, "needs query_positions"),
        ({"block_size": 0, "query_positions": torch.zeros(2, 6).int()}, ValueError, "at least 1"),
        ({"query_positions": torch.zeros(2, 6)}, TypeError, "int32 or int64"),
        ({"query_positions": torch.zeros(2, 5).int()}, ValueError, r"\(2, 6\), got \(2, 5\)"),
        ({"key_positions": torch.zeros(1, 5).int()}, ValueError, r"\(2, 5\), got \(1, 5\)"),
        ({"layout": "dense"}, ValueError, "layout must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_named_with_what_was_expected(change, error, says):
    arguments = {"q": Q, "k": K, "v": K, **change}
    with pytest.raises(error, match=says):
        ops.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"lse": torch.zeros(2, 4, 5)}, ValueError, r"\[B, Hq, Lq\] = \(2, 4, 6\)"),
        ({"lse": torch.zeros(2, 4, 6).half()}, TypeError, "float32"),
        ({"sample": 0}, ValueError, "at least 1"),
        ({"offset": torch.zeros(2).int()}, ValueError, "one integer"),
        ({"offset": torch.zeros(1)}, ValueError, "one integer"),
        ({"out": torch.zeros(2, 4, 4)}, ValueError, "at least Lk"),
        ({"out": torch.zeros(2, 4, 5).int()}, TypeError, "float32"),
    ],
)
def test_bad_mass_arguments_are_named(change, error, says):
    with pytest.raises(error, match=says):
        ops.column_mass(Q, K, **change)


def test_gather_heads_takes_rows_or_columns_and_checks_its_input():
    weight = torch.randn(12, 5)
    by_hand = torch.cat([weight[0:3], weight[6:9]])
    assert torch.equal(ops.gather_heads(weight, [0, 2], 3, 0), by_hand)
    assert torch.equal(ops.gather_heads(weight.mT.contiguous(), torch.tensor([0, 2]), 3, 1), by_hand.mT)
    assert torch.equal(ops.gather_heads(weight[:, 0].contiguous(), [0, 2], 3, 0), by_hand[:, 0])
    assert ops.gather_heads(weight, [], 3, 0).shape == (0, 5)
    for bad, says in (([2, 0], "sorted"), ([4], "within"), ([0], None)):
        with pytest.raises(ValueError, match=says or "multiple of head_dim=5"):
            ops.gather_heads(weight, bad, 3 if says else 5, 0)
    with pytest.raises(ValueError, match="dim must be 0 or 1"):
        ops.gather_heads(weight, [0], 3, 2)


def test_gather_heads_carries_gradients():
    weight = torch.randn(6, 4, requires_grad=True)
    ops.gather_heads(weight, [1], 2, 0).sum().backward()
    assert weight.grad is not None and weight.grad.sum(1).tolist() == [0, 0, 4, 4, 0, 0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_any_choice_matches_the_specification(data):
    """Hypothesis over the shape space, for the paths that run on CPU."""
    draw = data.draw
    hkv = draw(st.integers(1, 3))
    hq = hkv * draw(st.integers(1, 3))
    lq, lk = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    case = make_case(
        draw(st.integers(0, 2)), hq, hkv, lq, lk, draw(st.sampled_from([1, 3, 16, 33])),
        kept=draw(st.none() | st.lists(st.integers(0, hq - 1), unique=True).map(sorted)),
        groups=draw(st.none() | st.lists(st.integers(0, hkv - 1), min_size=hq, max_size=hq)),
        padding=draw(st.booleans()), block_size=draw(st.none() | st.integers(1, 25)),
        positions=draw(st.sampled_from(["q", "qk"])),
    )  # fmt: skip
    expected = ops.attention(case.q, case.k, case.v, backend="reference", **case.choices)
    got = ops.attention(case.q, case.k, case.v, **case.choices)
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=1e-5)
    sample = draw(st.none() | st.integers(1, 25))
    options = {"sample": sample, "offset": draw(st.none() | st.integers(-50, 50)), **case.choices}
    exact = ops.column_mass(case.q.double(), case.k.double(), backend="reference", **options)
    for lse in (expected[1], None):
        mass = ops.column_mass(case.q, case.k, lse, **options)
        torch.testing.assert_close(mass, exact, atol=2e-6, rtol=1e-5)
        total = mass.sum(-1)
        assert torch.all((total - 1).abs().minimum(total.abs()) < 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_dtypes_are_those_of_pytorchs_attention(dtype):
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    v = torch.randn(2, 4, 7, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        expected = F.scaled_dot_product_attention(q, k, v)
        got, lse = ops.attention(q, k, v)
        mass = ops.column_mass(q, k, lse)
        assert ops.attention(q.double(), k.double(), v.double())[0].dtype == torch.float64
    assert got.dtype == expected.dtype == dtype and lse.dtype == mass.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    plain = (q.to(dtype).float() @ k.to(dtype).float().mT * 8**-0.5).softmax(-1).mean(2)
    torch.testing.assert_close(mass, plain, atol=2e-3, rtol=2e-2)
