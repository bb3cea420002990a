"""Random calls, most of them wrong in some way: the native ops raise or agree with PyTorch, and never crash.

``make sanitize`` runs this file through a build with address and undefined-behaviour sanitizers, where
reading or writing one byte too far ends the process. ``SINKPRUNE_FUZZ_CALLS`` sets the calls of each test.
"""

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinkprune.kernels import reference
from sinkprune.ops import native, native_mass

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no extension: {native.why_not()}")

CALLS = int(os.environ.get("SINKPRUNE_FUZZ_CALLS", "60"))
fuzz = settings(max_examples=CALLS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

DTYPES = [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn, torch.float64, torch.bool]
HUGE = st.sampled_from([-(2**63), -(2**31), -2, -1, 0, 2**31, 2**62, 2**63 - 1])
REFUSED = (ValueError, TypeError, RuntimeError)


def usually(good: st.SearchStrategy, bad: st.SearchStrategy) -> st.SearchStrategy:
    """Nine in ten good, so that enough calls get past the first check."""
    return st.integers(0, 9).flatmap(lambda i: bad if i == 9 else good)


def sizes(low: int = 1, high: int = 9) -> st.SearchStrategy:
    return st.integers(low, high)


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    numbers = (
        torch.arange(math.prod(shape), dtype=torch.int64).mul_(seed * 2 + 7).remainder_(113).reshape(shape)
    )
    if dtype.itemsize == 1 and dtype.is_floating_point:
        return numbers.to(torch.uint8).view(dtype)
    return numbers.to(dtype)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values in ``shape``, contiguous or a window of something larger, or transposed, or expanded."""
    seed = draw(st.integers(0, 50))
    layout = draw(st.sampled_from(["plain", "plain", "window", "transposed", "expanded"]))
    if layout == "window":
        pad = [draw(st.integers(0, 3)) for _ in shape]
        whole = filled(tuple(n + 2 * p for n, p in zip(shape, pad, strict=True)), dtype, seed)
        return whole[tuple(slice(p, p + n) for n, p in zip(shape, pad, strict=True))]
    if layout == "transposed" and len(shape) == 2:
        return filled(shape[::-1], dtype, seed).t()
    if layout == "expanded" and len(shape) > 1:
        return filled((1, *shape[1:]), dtype, seed).expand(shape)
    return filled(shape, dtype, seed)


@st.composite
def head_ids(draw: st.DrawFn, limit: int) -> Any:
    good = st.sets(st.integers(0, max(0, limit - 1)), min_size=1).map(sorted)
    bad = st.lists(st.one_of(st.integers(-2, limit + 2), HUGE), max_size=limit + 2)
    ids = draw(usually(good, bad))
    return torch.tensor(ids, dtype=torch.int64) if draw(st.booleans()) else ids


def same(got: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        same_kind = got.shape == expected.shape and got.dtype == expected.dtype
        size = expected.element_size()
        raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        return same_kind and torch.equal(got.contiguous().view(raw), expected.contiguous().view(raw))
    if isinstance(expected, (tuple, list)):
        return len(got) == len(expected) and all(same(g, e) for g, e in zip(got, expected, strict=True))
    return got == expected


def agrees_with_torch(call: Any) -> None:
    """``call`` gives the same through the extension and through PyTorch, or the same kind of refusal."""
    outcomes = []
    for path in (native.serves, lambda device: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "serves", path)
            try:
                outcomes.append((call(), None))
            except (ValueError, TypeError) as error:
                outcomes.append((None, str(error)))
    (got, refusal), (expected, other) = outcomes
    assert refusal == other
    assert same(got, expected)


@fuzz
@given(st.data())
def test_gather_heads(data: st.DataObject) -> None:
    heads, d, other = data.draw(sizes()), data.draw(sizes()), data.draw(sizes())
    dim = data.draw(usually(st.integers(0, 1), st.integers(-3, 3)))
    rank = data.draw(usually(st.just(2), st.integers(0, 3)))
    shape = (heads * d, other) if dim == 0 else (other, heads * d)
    shape = {0: (), 1: (heads * d,), 2: shape, 3: (1, *shape)}[rank]
    weight = data.draw(tensors(shape, data.draw(st.sampled_from(DTYPES))))
    head_dim = data.draw(usually(st.just(d), st.one_of(st.integers(-2, 12), HUGE)))
    ids = data.draw(head_ids(heads))
    agrees_with_torch(lambda: native.gather_heads(weight, ids, head_dim, dim))


@fuzz
@given(st.data())
def test_pack_qkv(data: st.DataObject) -> None:
    q, kv, d, hidden = (data.draw(sizes()) for _ in range(4))
    dtype = data.draw(st.sampled_from(DTYPES))
    kinds = [data.draw(usually(st.just(dtype), st.sampled_from(DTYPES))) for _ in range(3)]
    rows = [q * d, kv * d, kv * d]
    w = [data.draw(tensors((r, hidden), kind)) for r, kind in zip(rows, kinds, strict=True)]
    biases: list[Tensor | None] = [None, None, None]
    if data.draw(st.booleans()):
        biases = [data.draw(usually(tensors((r,), dtype), st.none())) for r in rows]
    q_ids, kv_ids = data.draw(head_ids(q)), data.draw(head_ids(kv))
    pad_to = data.draw(usually(st.integers(1, 9), st.integers(-2, 0)))
    agrees_with_torch(lambda: native.pack_qkv(*w, *biases, q_ids, kv_ids, d, pad_to))


@fuzz
@given(st.data())
def test_pack_mlp(data: st.DataObject) -> None:
    channels, hidden = data.draw(sizes(high=40)), data.draw(sizes())
    dtype = data.draw(st.sampled_from(DTYPES))
    gate = data.draw(st.one_of(st.none(), tensors((channels, hidden), dtype)))
    up = data.draw(tensors((channels, hidden), dtype))
    down = data.draw(usually(tensors((hidden, channels), dtype), tensors((hidden, channels + 1), dtype)))
    ids = data.draw(head_ids(channels))
    agrees_with_torch(lambda: native.pack_mlp(gate, up, down, ids))


@fuzz
@given(st.data())
def test_the_raw_gather_refuses_what_the_wrappers_never_send(data: st.DataObject) -> None:
    outs, sources, ids, pieces, dims = [], [], [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        count, limit, piece, other = (data.draw(sizes(0, 5)) for _ in range(4))
        dim = data.draw(usually(st.integers(0, 1), st.integers(-1, 3)))
        dtype = data.draw(st.sampled_from(DTYPES))
        length = data.draw(usually(st.just(count * piece), sizes()))
        shapes = [(length, other), (limit * piece, other)]
        if dim == 1:
            shapes = [shape[::-1] for shape in shapes]
        sources.append(data.draw(tensors(shapes[1], dtype)))
        outs.append(torch.zeros(shapes[0], dtype=data.draw(usually(st.just(dtype), st.sampled_from(DTYPES)))))
        if data.draw(st.integers(0, 15)) == 0:
            outs[-1] = sources[-1]
        listed = data.draw(
            st.lists(usually(st.integers(-1, limit - 1), HUGE), min_size=count, max_size=count)
        )
        small = all(abs(i) < 2**31 for i in listed)
        kind = data.draw(usually(st.just(torch.int64), st.just(torch.int32))) if small else torch.int64
        ids.append(torch.tensor(listed, dtype=kind))
        pieces.append(data.draw(usually(st.just(piece), HUGE)))
        dims.append(dim)
    if data.draw(st.integers(0, 15)) == 0:
        pieces.append(1)
    try:
        torch.ops.sinkprune_native.gather_(outs, sources, ids, pieces, dims)
    except RuntimeError:
        return
    for out, source, index, piece, dim in zip(outs, sources, ids, pieces, dims, strict=True):
        if out.numel() == 0:  # any piece is allowed then, and PyTorch's way would list its rows
            continue
        expected = torch.zeros_like(out)
        native._gather_torch(native._Segment(expected, source, index, piece, dim))
        assert same(out, expected)


@fuzz
@given(st.data())
def test_column_mass(data: st.DataObject) -> None:
    b, hq, hkv, d = (data.draw(sizes(1, 3)) for _ in range(4))
    lq, lk = data.draw(sizes(0, 40)), data.draw(sizes(0, 40))
    dtype = data.draw(usually(st.just(torch.float32), st.sampled_from([torch.float16, torch.bfloat16])))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q = torch.randn(b, hq, lq, d + 2, generator=seed).to(dtype)[..., 1:-1]
    k = torch.randn(b, lk, hkv, d, generator=seed).to(dtype).transpose(1, 2)
    kwargs: dict[str, Any] = {}
    if hq % hkv or data.draw(st.booleans()):
        kwargs["kv_head_of"] = data.draw(
            usually(
                st.lists(st.integers(0, hkv - 1), min_size=hq, max_size=hq),
                st.lists(st.integers(-1, hkv), max_size=4),
            )
        )
    if data.draw(st.booleans()):
        kwargs["kept_heads"] = data.draw(head_ids(hq))
    if data.draw(st.booleans()):
        kwargs["key_padding_mask"] = torch.rand(b, lk, generator=seed) > 0.3
    if data.draw(st.booleans()):
        kwargs["query_positions"] = torch.randint(-1, 50, (b, lq), generator=seed)
        if data.draw(st.booleans()):
            kwargs["block_size"] = data.draw(usually(st.integers(1, 9), st.integers(-1, 0)))
    if data.draw(st.booleans()):
        kwargs["sample"] = data.draw(usually(st.integers(1, 20), st.one_of(HUGE)))
        kwargs["offset"] = data.draw(st.integers(-3, 60))
    lse = torch.randn(b, hq, lq, generator=seed) + 4
    lse = lse.masked_fill(torch.rand(b, hq, lq, generator=seed) > 0.9, math.inf)
    try:
        got = native_mass.column_mass(q, k, lse, **kwargs)
    except (ValueError, TypeError):
        return
    if "offset" in kwargs:
        kwargs["sample"] = max(1, min(kwargs["sample"], lq))
        kwargs["offset"] %= kwargs["sample"]
    for name in ("kept_heads", "kv_head_of"):
        if name in kwargs:
            kwargs[name] = torch.as_tensor(kwargs[name])
    expected = reference.column_mass(q.float(), k.float(), lse, **kwargs)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


@fuzz
@given(st.data())
def test_the_raw_column_mass_refuses_what_the_wrapper_never_sends(data: st.DataObject) -> None:
    b, h, lq, lk, d = (data.draw(sizes(1, 4)) for _ in range(5))

    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        changed = list(shape)
        if data.draw(st.integers(0, 19)) == 0:
            changed[data.draw(st.integers(0, len(shape) - 1))] += data.draw(st.integers(-1, 2))
        if data.draw(st.integers(0, 29)) == 0:
            changed = changed[:-1]
        dtype = data.draw(usually(st.just(dtype), st.sampled_from([*DTYPES, torch.int64, torch.int32])))
        return data.draw(tensors(tuple(max(0, n) for n in changed), dtype))

    def optional(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return tensor(shape, dtype) if data.draw(st.booleans()) else None

    any_ids = st.lists(st.one_of(st.integers(-1, h), HUGE), max_size=4)
    ids = [
        torch.tensor(data.draw(usually(st.just([*range(h)]), any_ids)), dtype=torch.int64) for _ in range(2)
    ]
    arguments = (
        tensor((b, h, lk), torch.float32).clone(),
        tensor((b, h, lq, d), torch.float32),
        tensor((b, h, lk, d), torch.float32),
        tensor((b, h, lq), torch.float32),
        *ids,
        optional((b, lk), torch.bool),
        optional((b, lq), torch.bool),
        optional((b, lq), torch.int32),
        optional((b, lk), torch.int32),
        data.draw(st.floats()),
        data.draw(usually(st.integers(0, 5), HUGE)),
        data.draw(usually(st.integers(1, 5), HUGE)),
    )
    try:
        torch.ops.sinkprune_native.column_mass_(*arguments)
    except REFUSED:
        return
