"""Repacking moves bits: every result equals the PyTorch formulation exactly, in every dtype and layout."""

import pytest
import torch
from torch import Tensor

from sinkprune import native

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
