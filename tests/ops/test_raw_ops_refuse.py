"""The registered ops check what they are handed themselves: each kind of argument that once ended a process,
took for ever or was refused only after something was written."""

import pytest
import torch

from sinkprune.kernels import reference

Q, K = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8)


def shrunken(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(4)
    return t


def attention(**change: object) -> object:
    given = {
        "q": Q, "k": K, "v": K, "kept_heads": None, "kv_head_of": None, "key_padding_mask": None,
        "block_size": None, "query_positions": None, "key_positions": None, "scale": 1.0, "compact": False,
        "backend": "auto",
    }  # fmt: skip
    return torch.ops.sinkprune.attention(**given | change)


def column_mass_(**change: object) -> object:
    given = {
        "q": Q, "k": K, "lse": torch.zeros(1, 4, 3), "kept_heads": None, "kv_head_of": None,
        "key_padding_mask": None, "block_size": None, "query_positions": None, "key_positions": None,
        "scale": 1.0, "sample": None, "offset": None, "out": torch.full((1, 4, 5), 7.0), "backend": "auto",
    }  # fmt: skip
    return torch.ops.sinkprune.column_mass_(**given | change)


ENDLESS = torch.zeros(1, dtype=torch.int64).expand(2**40)
OF_BOTH = [
    ({"k": None}, "k must be a tensor, got None"),
    ({"q": Q.to(torch.complex64), "k": K.to(torch.complex64)}, "floating dtype"),
    ({"q": shrunken(Q)}, "q reaches byte 384 of a storage of 4"),
    ({"k": shrunken(K)}, "k reaches byte"),
    ({"kept_heads": ENDLESS}, "kept_heads must be sorted, unique and within 0..3, got 1099511627776"),
    ({"kept_heads": torch.tensor([0, 4])}, "within 0..3"),
    ({"kv_head_of": torch.tensor([0, 0, 1, 2])}, "within 0..1"),
    ({"kv_head_of": shrunken(torch.tensor([0, 0, 1, 1]))}, "kv_head_of reaches byte"),
    ({"key_padding_mask": torch.ones(1, 9, dtype=torch.bool)}, r"shape \[B, Lk\] = \(1, 5\)"),
    ({"key_positions": torch.zeros(1, 5)}, "key_positions must be int32 or int64"),
    ({"block_size": 0, "query_positions": torch.zeros(1, 3, dtype=torch.int64)}, "block_size must be at"),
]
OF_ATTENTION = [({"v": None}, "v must be a tensor"), ({"v": K[:, :, :4]}, "v must have k's shape")]
OF_MASS = [
    ({"lse": torch.zeros(1, 4, 3).bfloat16()}, "lse must be float32"),
    ({"lse": torch.zeros(1, 4, 9)}, "lse must have shape"),
    ({"sample": 0}, "sample must be at least 1"),
    ({"offset": torch.zeros(2, dtype=torch.int64)}, "offset must be one integer"),
    ({"out": torch.zeros(1, 4, 4)}, "out must have shape"),
    ({"out": torch.zeros(1, 1, 5).expand(1, 4, 5)}, "out must not be expanded"),
    ({"out": torch._neg_view(torch.zeros(1, 4, 5))}, "resolve_neg"),
]


@pytest.mark.parametrize("change, says", OF_BOTH + OF_ATTENTION)
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_attention_refuses_in_a_line(change, says, backend):
    with pytest.raises((ValueError, TypeError), match=says):
        attention(**change, backend=backend)


@pytest.mark.parametrize("change, says", OF_BOTH + OF_MASS)
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_column_mass_refuses_in_a_line_and_writes_nothing(change, says, backend):
    out = torch.full((1, 4, 5), 7.0)
    with pytest.raises((ValueError, TypeError), match=says):
        column_mass_(**{"out": out} | change, backend=backend)
    assert (out == 7).all()


def test_what_fits_is_served():
    out, lse = attention(kept_heads=torch.tensor([0, 2]), compact=True)
    assert out.shape == (1, 2, 3, 8) and lse.shape == (1, 2, 3)
    mass = torch.full((1, 4, 6), 7.0)
    column_mass_(lse=torch.full((1, 4, 3), 5.0).log2(), out=mass)
    assert torch.allclose(mass, torch.tensor([0.2] * 5 + [0.0]).expand(1, 4, 6))


def test_a_negated_view_is_no_state_to_write():
    state = torch.zeros(2, reference.STATE_WIDTH)
    traces = torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2)
    with pytest.raises(ValueError, match="resolve_neg"):
        torch.ops.sinkprune.sink_update_(
            torch._neg_view(torch.ones(2, 9)), state, torch.zeros(2, dtype=torch.int32), None, 9, 4.0, 2.0,
            *traces, "auto",
        )  # fmt: skip
    assert not state.any()


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu"])
@pytest.mark.parametrize("wrong", [torch.zeros(4, dtype=torch.complex64), shrunken(torch.zeros(4))])
def test_elementwise_ops_refuse_what_holds_no_floats(name, wrong):
    rest = {"rms_norm": (None, 1e-6), "add_rms_norm": (torch.zeros(4), None, 1e-6), "swiglu": (wrong,)}[name]
    with pytest.raises(ValueError, match=r"needs floats|reaches byte"):
        getattr(torch.ops.sinkprune, name)(wrong, *rest)
