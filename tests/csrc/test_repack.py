"""Repacking moves bits: every result equals the PyTorch formulation exactly, in every dtype and layout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sinkprune.ops import native

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float64,
    torch.complex128,
]


def random_bits(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A tensor of arbitrary bits, NaN payloads included, so that only an exact copy passes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(bits(got), bits(expected))


def rows_of(heads: list[int], head_dim: int) -> Tensor:
    return torch.tensor([head * head_dim + row for head in heads for row in range(head_dim)])


def by_bits(weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """The PyTorch formulation, by indexing, on bytes (some dtypes have no indexing)."""
    size = weight.element_size()
    raw = weight.contiguous().view(torch.uint8).unflatten(-1, (-1, size))
    return raw.index_select(dim, index).flatten(-2).view(weight.dtype)


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test through the extension and again through its PyTorch fallback."""
    if request.param == "torch":
        monkeypatch.setattr(native, "serves", lambda device: False)
    elif not native.available():
        pytest.skip(f"the extension is not available: {native.why_not()}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_gather_heads_moves_every_dtype_bit_for_bit(path: str, dtype: torch.dtype, dim: int) -> None:
    heads, head_dim = [0, 1, 4, 6], 5
    weight = (
        random_bits(7 * head_dim, 33, dtype=dtype) if dim == 0 else random_bits(33, 7 * head_dim, dtype=dtype)
    )
    assert_same_bits(
        native.gather_heads(weight, heads, head_dim, dim), by_bits(weight, dim, rows_of(heads, head_dim))
    )


def layer(dtype: torch.dtype, *, bias: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    """Query, key and value projections of 6 and 3 heads of 4, over 20 columns."""
    w = [random_bits(rows, 20, dtype=dtype, seed=i) for i, rows in enumerate((24, 12, 12))]
    b = [random_bits(rows, dtype=dtype, seed=9 + i) if bias else None for i, rows in enumerate((24, 12, 12))]
    return w, b


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("pad_to", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_pack_qkv_stacks_the_kept_heads_and_says_where_each_row_came_from(
    path: str, dtype: torch.dtype, pad_to: int, bias: bool
) -> None:
    w, b = layer(dtype, bias=bias)
    q_heads, kv_heads = [0, 1, 5], [0, 2]
    packed = native.pack_qkv(*w, *b, q_heads, kv_heads, 4, pad_to)
    used = (3 + 2 + 2) * 4
    assert packed.weight.shape == (32 if pad_to == 16 else used, 20)
    index = [rows_of(q_heads, 4), rows_of(kv_heads, 4), rows_of(kv_heads, 4)]
    expected = torch.cat([bits(by_bits(m, 0, i)) for m, i in zip(w, index, strict=True)])
    assert torch.equal(bits(packed.weight[:used]), expected)
    assert not bits(packed.weight[used:]).any()
    starts = torch.tensor([0, 24, 36])
    assert (
        packed.row_map[:used].tolist()
        == torch.cat([i + s for i, s in zip(index, starts, strict=True)]).tolist()
    )
    assert (packed.row_map[used:] == -1).all()
    if not bias:
        assert packed.bias is None
    else:
        expected = torch.cat([bits(by_bits(m, 0, i)) for m, i in zip(b, index, strict=True)])
        assert torch.equal(bits(packed.bias[:used]), expected)
        assert not bits(packed.bias[used:]).any()


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_pack_mlp_keeps_channels_of_all_its_matrices(path: str, gated: bool) -> None:
    gate, up = (random_bits(30, 12, dtype=torch.bfloat16, seed=i) for i in range(2))
    down = random_bits(12, 30, dtype=torch.bfloat16, seed=2)
    channels = [0, 3, 4, 5, 17, 29]
    packed = native.pack_mlp(gate if gated else None, up, down, channels)
    index = torch.tensor(channels)
    rows = [by_bits(m, 0, index) for m in ([gate, up] if gated else [up])]
    assert torch.equal(bits(packed.gate_up), torch.cat([bits(r) for r in rows]))
    assert_same_bits(packed.down, by_bits(down, 1, index))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_piece_that_no_id_names_becomes_zeros(path: str, dim: int) -> None:
    """-1 among the ids, which the wrappers never send: heads spread out, nothing where some are gone."""
    weight = random_bits(24, 24, dtype=torch.float16)
    heads = [1, 2, 5]
    rows = rows_of(heads, 4)
    compact = by_bits(weight, dim, rows)
    whole = torch.full((24, 24), 7.0, dtype=torch.float16)
    native._gather([native._Segment(whole, compact, torch.tensor([-1, 0, 1, -1, -1, 2]), 4, dim)])
    kept = torch.zeros(24, dtype=torch.bool)
    kept[rows] = True
    expected = torch.where(kept[:, None] if dim == 0 else kept, weight.view(torch.int16), 0)
    assert_same_bits(whole, expected.view(torch.float16))


def test_row_strides_are_followed_and_the_rest_of_the_buffer_is_left_alone(path: str) -> None:
    """A window of a larger weight, into a window of a larger buffer, on sizes no vector width divides."""
    whole = random_bits(40, 37, dtype=torch.float16)
    weight = whole[3:31, 2:35]
    buffer = torch.full((20, 50), 7.0, dtype=torch.float16)
    out = buffer[1:15, 4:37]
    got = native.gather_heads(weight, [0, 3], 7, 0, out=out)
    assert got.data_ptr() == out.data_ptr()
    assert_same_bits(out, by_bits(weight, 0, rows_of([0, 3], 7)))
    out.zero_()
    out += 7
    assert (buffer == 7).all()


def test_large_matrices_take_the_streaming_path_and_keep_their_bits() -> None:
    """Beyond 4 MiB the stores go past the cache, with unaligned heads and tails copied apart."""
    if not native.available():
        pytest.skip(f"the extension is not available: {native.why_not()}")
    weight = random_bits(1601, 4099, dtype=torch.int8)[1:, 3:]
    heads = [0, 2, 3, 7, 11, 12, 13, 14]
    for dim, head_dim in ((0, 100), (1, 256)):
        got = native.gather_heads(weight, heads, head_dim, dim)
        assert_same_bits(got, weight.index_select(dim, rows_of(heads, head_dim)))
    packed = native.pack_mlp(None, weight, random_bits(3000, 1600, dtype=torch.int8), range(0, 1600, 3))
    assert_same_bits(packed.gate_up, weight[::3])


def test_offsets_beyond_two_gibibytes() -> None:
    """The last rows of a weight whose bytes do not fit in 32 bits, without touching the memory between."""
    rows, width = 9, 2**28
    if not native.available():
        pytest.skip(f"the extension is not available: {native.why_not()}")
    weight = torch.empty(rows * width, dtype=torch.uint8).view(rows, width)  # untouched pages cost nothing
    weight[0, -5:], weight[8, -5:] = 0, 9
    narrow = weight[:, -5:]
    assert native.gather_heads(narrow, [0, 8], 1, 0).tolist() == [[0] * 5, [9] * 5]


def test_parameters_that_require_gradients_are_packed_without_a_graph(path: str) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 6))
    assert not native.gather_heads(weight, [1], 4, 0).requires_grad


def test_meta_tensors_give_shapes() -> None:
    w = [torch.empty(rows, 20, device="meta") for rows in (24, 12, 12)]
    packed = native.pack_qkv(*w, None, None, None, [0, 5], [2], 4)
    assert packed.weight.device.type == "meta"
    assert packed.weight.shape == (16, 20)


def weight(*shape: int) -> Tensor:
    return torch.zeros(shape or (24, 10))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: native.gather_heads(weight(), [], 4, 0), ValueError, "non-empty"),
        (lambda: native.gather_heads(weight(), [6], 4, 0), ValueError, r"0…5, got \[6\]"),
        (lambda: native.gather_heads(weight(), [-1], 4, 0), ValueError, r"0…5, got \[-1\]"),
        (lambda: native.gather_heads(weight(), [2**70], 4, 0), ValueError, "0…5"),
        (lambda: native.gather_heads(weight(), [1, 0], 4, 0), ValueError, r"sorted and unique, got \[1, 0\]"),
        (lambda: native.gather_heads(weight(), [1, 1], 4, 0), ValueError, "sorted and unique"),
        (lambda: native.gather_heads(weight(), [1.5], 4, 0), TypeError, "integers"),
        (lambda: native.gather_heads(weight(), torch.ones(3), 4, 0), TypeError, "got torch.float32"),
        (lambda: native.gather_heads(weight(), [0], 5, 0), ValueError, "head_dim must divide the 24"),
        (lambda: native.gather_heads(weight(), [0], 0, 0), ValueError, "head_dim"),
        (lambda: native.gather_heads(weight(), [0], 4, 2), ValueError, "dim must be 0 or 1, got 2"),
        (lambda: native.gather_heads(weight(1, 2, 3), [0], 1, 0), ValueError, "1 or 2 dimensions"),
        (lambda: native.gather_heads([1], [0], 1, 0), TypeError, "must be a tensor, got list"),
        (lambda: native.gather_heads(weight(), [0], 4, 0, out=weight(3, 10)), ValueError, r"shape \[4, 10\]"),
        (lambda: native.gather_heads(weight(), [0], 4, 0, out=weight(4, 10).half()), TypeError, "dtype"),
        (lambda: native.gather_heads(torch.zeros(4, 4).to_sparse(), [0], 4, 0), ValueError, "dense"),
        (lambda: native.pack_o(weight(10), [0], 5), ValueError, "wo must have 2 dimensions"),
        (lambda: native.pack_mlp(weight(6, 4), weight(6, 4), weight(4, 5), [0]), ValueError, "down"),
        (lambda: native.pack_mlp(weight(5, 4), weight(6, 4), weight(4, 6), [0]), ValueError, "gate"),
        (lambda: native.pack_mlp(None, weight(6, 4).half(), weight(4, 6), [0]), TypeError, "dtype of up"),
    ],
)  # fmt: skip
def test_bad_input_raises_and_names_what_was_expected(
    path: str, call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wk": weight(12, 19)}, "20 columns of wq"),
        ({"wk": weight(12, 20).double()}, "dtype of wq"),
        ({"wk": weight(8, 20)}, "one shape"),
        ({"wk": weight(12, 20).to("meta")}, "device of wq"),
        ({"bq": None}, "all given or all None"),
        ({"bk": weight(11)}, r"bk must have shape \[12\]"),
        ({"q_heads": [6]}, "q_heads must hold ids in 0…5"),
        ({"kv_heads": [3]}, "kv_heads must hold ids in 0…2"),
        ({"pad_to": 0}, "pad_to must be at least 1"),
    ],
)
def test_pack_qkv_refuses_what_does_not_belong_together(path: str, change: dict, message: str) -> None:
    arguments = {
        "wq": weight(24, 20), "wk": weight(12, 20), "wv": weight(12, 20),
        "bq": weight(24), "bk": weight(12), "bv": weight(12),
        "q_heads": [0], "kv_heads": [0], "head_dim": 4, "pad_to": 1,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        native.pack_qkv(**{**arguments, **change})


def test_the_native_op_refuses_by_itself_what_the_wrappers_never_send() -> None:
    if not native.available():
        pytest.skip(f"the extension is not available: {native.why_not()}")
    gather = torch.ops.sinkprune_native.gather_
    source, ids = torch.zeros(8, 3), torch.tensor([0, 1])
    for outs, sources, index, pieces, dims, message in [
        ([torch.zeros(4, 3)], [source], [torch.tensor([0, 9])], [2], [0], "is 9, expected -1 or one of 4"),
        ([torch.zeros(4, 3)], [source], [ids.int()], [2], [0], "int64"),
        ([torch.zeros(4, 3)], [source], [ids], [3], [0], "do not divide"),
        ([torch.zeros(4, 3)], [source], [ids], [2**62], [0], "do not divide"),
        ([torch.zeros(5, 3)], [source], [ids], [2], [0], "do not fill"),
        ([torch.zeros(4, 3).half()], [source], [ids], [2], [0], "one dtype"),
        ([source[:4]], [source], [ids], [2], [0], "share memory"),
        ([torch.zeros(1, 3).expand(4, 3)], [source], [ids], [2], [0], "overlap"),
        ([torch.zeros(4, 3)], [source], [ids], [2, 2], [0], "one length"),
        ([torch.zeros(4, 3)], [source], [ids], [2], [2], "dims"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            gather(outs, sources, index, pieces, dims)


def test_the_ops_keep_the_promises_of_their_schemas() -> None:
    """What each writes is what its schema says, on real tensors and on fake ones."""
    if not native.available():
        pytest.skip(f"the extension is not available: {native.why_not()}")
    checks = ("test_schema", "test_faketensor")
    ids = torch.tensor([0, 2])
    gather = torch.ops.sinkprune_native.gather_.default
    torch.library.opcheck(
        gather, ([torch.zeros(4, 3)], [torch.ones(8, 3)], [ids], [2], [0]), test_utils=checks
    )
    q, lse = torch.randn(1, 2, 5, 4), torch.ones(1, 2, 5)
    heads = torch.arange(2)
    arguments = (torch.zeros(1, 2, 5), q, q.clone(), lse, heads, heads, None, None, None, None, 0.5, 0, 1)
    torch.library.opcheck(torch.ops.sinkprune_native.column_mass_.default, arguments, test_utils=checks)
