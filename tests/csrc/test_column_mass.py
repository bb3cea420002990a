"""The native column mass against float64 PyTorch, within twice the error of float32 PyTorch."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sinkprune.kernels import reference
from sinkprune.ops import native, native_mass

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no extension: {native.why_not()}")


def inputs(
    b: int, hq: int, hkv: int, lq: int, lk: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(b, hq, lq, d, generator=g).to(dtype),
        torch.randn(b, hkv, lk, d, generator=g).to(dtype),
    )


def lse_of(q: Tensor, k: Tensor, **arguments: object) -> Tensor:
    """The float32 log-sum-exp of all heads, from the float64 reference."""
    _, lse = reference.attention(q.double(), k.double(), k.double(), **arguments)
    return lse.float()


def expected_mass(q: Tensor, k: Tensor, **arguments: object) -> Tensor:
    return reference.column_mass(q.double(), k.double(), **arguments)


def assert_as_good_as_torch(got: Tensor, q: Tensor, k: Tensor, lse: Tensor, **arguments: object) -> None:
    truth = expected_mass(q, k, **arguments)
    plain = reference.column_mass(q.float(), k.float(), lse, **arguments)
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * (plain.double() - truth).abs().max().item() + 2e-7 * truth.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, float32 PyTorch allows {allowed:.3g}"


@pytest.mark.parametrize("lq, lk", [(1, 1), (63, 111), (64, 64), (257, 129), (1, 300), (300, 1), (200, 1500)])
@pytest.mark.parametrize("d", [1, 60, 64, 128])
def test_matches_the_reference_at_odd_sizes(lq: int, lk: int, d: int) -> None:
    q, k = inputs(2, 3, 3, lq, lk, d)
    lse = lse_of(q, k)
    got = native_mass.column_mass(q, k, lse)
    assert_as_good_as_torch(got, q, k, lse)
    assert got.sum(-1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize(
    "case", ["kept", "gqa", "ragged", "padding", "sampled", "positions", "blocks", "all"]
)
def test_matches_the_reference_with_every_option(case: str) -> None:
    b, hq, hkv, lq, lk, d = 2, 6, 3, 90, 150, 32
    q, k = inputs(b, hq, hkv, lq, lk, d)
    g = torch.Generator().manual_seed(1)
    seen: dict[str, object] = {}
    rest: dict[str, object] = {}
    if case in ("kept", "all"):
        rest["kept_heads"] = torch.tensor([0, 2, 5])
    if case in ("ragged", "all"):
        rest["kv_head_of"] = torch.tensor([2, 0, 0, 1, 2, 2])
    if case in ("padding", "all"):
        seen["key_padding_mask"] = torch.rand(b, lk, generator=g) > 0.3
    if case in ("positions", "blocks", "all"):
        positions = torch.stack([torch.randperm(lk, generator=g)[:lq] for _ in range(b)])
        positions[:, -7:] = -1
        seen["query_positions"] = positions
    if case in ("blocks", "all"):
        seen["block_size"] = 16
        seen["key_positions"] = torch.stack([torch.randperm(lk, generator=g) for _ in range(b)])
    sampled = {"sample": 7, "offset": 3} if case in ("sampled", "all") else {}
    lse = lse_of(q, k, kv_head_of=rest.get("kv_head_of"), **seen)
    got = native_mass.column_mass(q, k, lse, **rest, **seen, **sampled)
    assert_as_good_as_torch(got, q, k, lse, **rest, **seen, **sampled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    q, k = inputs(1, 2, 2, 70, 90, 48, dtype)
    q[0, 0, 0, 0] = 6e-8  # a float16 subnormal
    lse = lse_of(q, k)
    assert_as_good_as_torch(native_mass.column_mass(q, k, lse), q, k, lse)


def test_any_stride_with_a_contiguous_last_dimension() -> None:
    qkv = torch.randn(2, 50, 3, 4, 40)  # [B, L, 3, H, D], as a fused projection gives
    q, k, _ = (t.transpose(1, 2) for t in qkv[..., :32].unbind(2))
    lse = lse_of(q, k)
    assert torch.equal(
        native_mass.column_mass(q, k, lse), native_mass.column_mass(q.contiguous(), k.contiguous(), lse)
    )


def test_writes_into_a_longer_buffer_and_clears_the_rest() -> None:
    q, k = inputs(1, 4, 4, 33, 40, 16)
    lse = lse_of(q, k)
    out = torch.full((1, 4, 64), math.nan)
    assert native_mass.column_mass(q, k, lse, kept_heads=[1, 3], out=out) is not None
    assert torch.equal(out[..., :40], native_mass.column_mass(q, k, lse, kept_heads=[1, 3]))
    assert not out[..., 40:].any()
    assert not out[:, [0, 2]].any()


def test_rows_that_saw_no_key_are_not_counted_even_when_they_hold_nan() -> None:
    q, k = inputs(1, 1, 1, 20, 30, 8)
    lse = lse_of(q, k)
    few = native_mass.column_mass(q[:, :, 5:], k, lse[:, :, 5:])
    q[:, :, :5] = math.nan
    lse[:, :, :3], lse[:, :, 3:5] = math.inf, -math.inf
    assert torch.equal(native_mass.column_mass(q, k, lse), few)
    lse[:] = math.inf
    assert not native_mass.column_mass(q, k, lse).any()


def test_padded_keys_may_hold_anything_and_nan_elsewhere_shows() -> None:
    q, k = inputs(1, 1, 1, 20, 30, 8)
    mask = torch.ones(1, 30, dtype=torch.bool)
    mask[:, 11] = False
    lse = lse_of(q, k, key_padding_mask=mask)
    clean = native_mass.column_mass(q, k, lse, key_padding_mask=mask)
    k[:, :, 11] = math.nan
    assert torch.equal(native_mass.column_mass(q, k, lse, key_padding_mask=mask), clean)
    k[:, :, 12] = math.nan
    assert native_mass.column_mass(q, k, lse, key_padding_mask=mask)[0, 0, 12].isnan()


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    q, k = inputs(1, 1, 1, 300, 700, 64)
    lse = lse_of(q, k)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native_mass.column_mass(q, k, lse))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_extreme_scores_neither_overflow_nor_turn_negative() -> None:
    q = torch.full((1, 1, 4, 1), 300.0)
    k = torch.tensor([-300.0, 0.0, 299.0, 300.0]).reshape(1, 1, 4, 1)
    lse = lse_of(q, k)
    assert native_mass.column_mass(q, k, lse).flatten().tolist() == [
        0.0,
        0.0,
        0.0,
        pytest.approx(1, abs=5e-3),
    ]
    wrong = native_mass.column_mass(q, k, torch.full((1, 1, 4), -1e30))
    assert (wrong[0, 0, 1:] == math.inf).all()


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_narrower_vectors_agree(isa: str) -> None:
    """The paths of other CPUs, in a process of their own because the choice is made once."""
    code = (
        "import sys, torch; from sinkprune.ops import native, native_mass; from tests_column_mass import *\n"
        "assert native.build_info()['vectors'] in (sys.argv[1], 'generic')\n"
        "test_matches_the_reference_at_odd_sizes(63, 111, 60)\n"
        "test_matches_the_reference_with_every_option('all')\n"
    )
    loader = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('tests_column_mass', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['tests_column_mass'] = module\n"
        "spec.loader.exec_module(module)\n"
    )
    environment = {**os.environ, "SINKPRUNE_CPU_ISA": isa}
    run = subprocess.run([sys.executable, "-c", loader + code, isa], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-2000:]


@pytest.mark.parametrize(
    "change, error",
    [
        ({"kept_heads": [1, 0]}, "sorted and unique"),
        ({"kept_heads": [4]}, "0…3"),
        ({"kept_heads": []}, "non-empty"),
        ({"kv_head_of": [0, 0, 0, 9]}, "kv_head_of"),
        ({"sample": 0}, "sample"),
        ({"block_size": 0}, "block_size"),
        ({"key_padding_mask": torch.ones(1, 3, dtype=torch.bool)}, "key_padding_mask"),
        ({"query_positions": torch.ones(1, 10)}, "query_positions"),
        ({"out": torch.empty(1, 4, 5)}, "out"),
        ({"lse": torch.empty(1, 4, 11)}, "lse"),
        ({"k": torch.empty(1, 4, 10, 9)}, "D"),
        ({"k": torch.empty(1, 4, 10, 8, dtype=torch.float16)}, "dtype"),
    ],
)
def test_bad_arguments_raise_and_name_what_was_expected(change: dict, error: str) -> None:
    q, k = inputs(1, 4, 4, 10, 10, 8)
    arguments = {"q": q, "k": k, "lse": lse_of(q, k), **change}
    with pytest.raises((ValueError, TypeError), match=error):
        native_mass.column_mass(arguments.pop("q"), arguments.pop("k"), arguments.pop("lse"), **arguments)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux keeps the peak of memory use"
)
def test_memory_stays_far_below_the_scores() -> None:
    """At most an eighth of the score matrix, in a process of its own: here a few per cent of it."""
    code = (
        "import torch\nfrom sinkprune.ops import native, native_mass\n"
        "def held(field):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))\n"
        "q, k = torch.randn(2, 1, 8, 1024, 64)\n"
        "lse, out = torch.full((1, 8, 1024), 12.0), torch.zeros(1, 8, 1024)\n"
        "native_mass.column_mass(q[:, :, :32], k[:, :, :32], lse[:, :, :32])\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = held('VmRSS')\n"
        "native_mass.column_mass(q, k, lse, out=out)\n"
        "print(held('VmHWM') - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 8 * 1024 * 1024 * 4 // 8
