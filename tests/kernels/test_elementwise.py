"""The elementwise kernels against float64, over odd sizes, dtypes, views and tables of angles."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import assert_as_exact
from reserved_memory import reserve

from sinkprune.kernels import elementwise, reference
from sinkprune.models.rotary import rotary_table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


def rounding(dtype):
    """What one rounding to ``dtype`` may cost a number around 4."""
    return 4 * torch.finfo(dtype).eps


@each_dtype
@pytest.mark.parametrize("n", [1, 7, 128, 300, 4096])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_norm_matches_float64(n, with_residual, dtype, device):
    x, residual = (torch.randn(3, 5, n, device=device).to(dtype) for _ in range(2))
    residual = residual if with_residual else None
    weight = torch.rand(n, device=device).to(dtype) + 0.5
    normed, summed = elementwise.rms_norm(x, weight, 1e-5, residual)
    same, same_sum = reference.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(summed, same_sum) and normed.dtype == dtype
    exact = F.rms_norm(summed.double(), (n,), weight.double(), 1e-5)
    assert_as_exact(normed, exact, same, atol=1e-6)


def test_norm_without_a_gain_with_a_wide_one_and_of_nothing(device):
    x = torch.randn(6, 33, device=device).bfloat16()
    normed, same = elementwise.rms_norm(x, None, 1e-6)
    assert same is x
    torch.testing.assert_close(normed, reference.rms_norm(x, None, 1e-6)[0], atol=rounding(x.dtype), rtol=0)
    wide = torch.rand(33, device=device)
    normed, _ = elementwise.rms_norm(x, wide, 1e-6)
    assert normed.dtype == torch.float32 == reference.rms_norm(x, wide, 1e-6)[0].dtype
    empty, _ = elementwise.rms_norm(x[:0], None, 1e-6, x[:0])
    assert empty.shape == (0, 33)
    with pytest.raises(ValueError, match="at most 65536 elements, got 65537"):
        elementwise.rms_norm(x.new_zeros(1, 65537), None, 1e-6)


def test_norm_of_a_row_of_zeros_and_of_nan_and_of_views(device):
    x = torch.randn(4, 2, 24, device=device)
    x[0] = 0
    x[1, 0, 3] = math.nan
    view = x.transpose(0, 1)  # rows a view has no single stride for
    normed, _ = elementwise.rms_norm(view, None, 1e-6)
    assert normed[:, 0].eq(0).all() and normed[0, 1].isnan().all()
    rest = normed[:, 2:]
    torch.testing.assert_close(rest, reference.rms_norm(view, None, 1e-6)[0][:, 2:], atol=1e-6, rtol=1e-5)
    every_second = torch.randn(5, 48, device=device)[:, ::2]
    torch.testing.assert_close(
        elementwise.rms_norm(every_second, None, 1e-6)[0],
        reference.rms_norm(every_second, None, 1e-6)[0],
        atol=1e-6,
        rtol=1e-5,
    )


def heads(b, h, length, d, device, dtype=torch.float32):
    """As a projection leaves them: ``[B, L, H, D]`` in memory."""
    return torch.randn(b, length, h, d, device=device).to(dtype).transpose(1, 2)


@each_dtype
@pytest.mark.parametrize(
    ("hq", "hkv", "lq", "d", "rotated"),
    [(4, 4, 37, 16, 16), (5, 2, 33, 24, 12), (6, 1, 1, 60, 6), (2, 2, 64, 128, 64), (1, 1, 3, 2, 2)],
    ids=["all features", "half of 24", "6 of 60", "half of 128", "two features"],
)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_rotation_matches_float64(hq, hkv, lq, d, rotated, normed, dtype, device):
    q, k = heads(2, hq, lq, d, device, dtype), heads(2, hkv, lq, d, device, dtype)
    cos, sin = rotary_table(torch.arange(lq, device=device) * 3, rotated, 10000.0)
    gains = {}
    if normed:
        gains = {f"{x}_weight": torch.rand(d, device=device).to(dtype) + 0.5 for x in "qk"}
    got = elementwise.rope_qk(q, k, cos, sin, **gains)
    same = reference.rope_qk(q, k, cos, sin, **gains)
    wide = {name: gain.double() for name, gain in gains.items()}
    exact = reference.rope_qk(q.double(), k.double(), cos.double(), sin.double(), **wide)
    for mine, theirs, truth in zip(got, same, exact, strict=True):
        assert mine.dtype == dtype and mine.transpose(1, 2).is_contiguous()
        assert_as_exact(mine, truth, theirs)


def test_rotation_turns_pairs_by_their_angle(device):
    """A quarter turn takes (1, 0) to (0, 1), whatever the convention of the twin."""
    q = torch.zeros(1, 1, 1, 4, device=device)
    q[..., 0] = 1
    angle = torch.tensor([[math.pi / 2, 0.0, math.pi / 2, 0.0]], device=device)
    turned, _ = elementwise.rope_qk(q, q, angle.cos(), angle.sin())
    torch.testing.assert_close(turned.flatten(), torch.tensor([0.0, 0, 1, 0], device=device))


def test_keys_may_lie_at_other_positions_and_samples_have_their_own(device):
    q, k = heads(2, 3, 10, 16, device), heads(2, 2, 70, 16, device)
    at = torch.randint(0, 500, (2, 10), device=device), torch.randint(0, 500, (70,), device=device)
    cos, sin = (t.unsqueeze(1) for t in rotary_table(at[0], 16, 1e4))
    k_cos, k_sin = rotary_table(at[1], 16, 1e4)
    got = elementwise.rope_qk(q, k, cos, sin, k_cos=k_cos, k_sin=k_sin)
    for sample in range(2):
        alone = rotary_table(at[0][sample], 16, 1e4)
        expected = reference.rope_qk(
            q[sample : sample + 1], k[sample : sample + 1], *alone, k_cos=k_cos, k_sin=k_sin
        )
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine[sample : sample + 1], theirs, atol=1e-6, rtol=1e-5)


def test_rotation_reads_a_fused_projection_in_place_and_leaves_it_as_it_was(device):
    fused = torch.randn(2, 9, 3, 4, 16, device=device)  # [B, L, qkv, H, D]
    before = fused.clone()
    q, k = (fused[:, :, i].transpose(1, 2) for i in range(2))
    cos, sin = rotary_table(torch.arange(9, device=device), 16, 1e4)
    got, expected = elementwise.rope_qk(q, k, cos, sin), reference.rope_qk(q, k, cos, sin)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert torch.equal(fused, before)


def test_rotation_of_no_tokens_and_of_no_sample(device):
    cos, sin = rotary_table(torch.arange(0, device=device), 8, 1e4)
    q, k = elementwise.rope_qk(heads(2, 3, 0, 8, device), heads(2, 1, 0, 8, device), cos, sin)
    assert q.shape == (2, 3, 0, 8) and k.shape == (2, 1, 0, 8)


@each_dtype
@pytest.mark.parametrize("n", [1, 17, 1024, 2500])
def test_swiglu_matches_float64(n, dtype, device):
    gate, up = (torch.randn(2, 3, n, device=device).to(dtype) * 4 for _ in range(2))
    exact = F.silu(gate.double()) * up.double()
    got = elementwise.swiglu(gate, up)
    assert got.dtype == dtype
    assert_as_exact(got, exact, F.silu(gate) * up)
    torch.testing.assert_close(reference.swiglu(gate, up), got, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)


def test_swiglu_reads_the_halves_of_a_projection_and_keeps_its_ends(device):
    fused = torch.randn(3, 5, 2 * 40, device=device)
    gate, up = fused.chunk(2, -1)
    torch.testing.assert_close(elementwise.swiglu(gate, up), F.silu(gate) * up, atol=1e-6, rtol=1e-5)
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, math.nan, 3.0]], device=device)
    up = torch.tensor([[2.0, 2.0, 2.0, 2.0, 2.0, math.inf]], device=device)
    expected = F.silu(gate) * up
    torch.testing.assert_close(elementwise.swiglu(gate, up), expected, atol=1e-6, rtol=1e-5, equal_nan=True)
    assert elementwise.swiglu(gate[:0], up[:0]).shape == (0, 6)


def test_offsets_beyond_32_bits_reach_the_right_element(device):
    """Rows that lie 2^30 and more elements apart: the memory is reserved, and only pages touched exist."""
    far, n = (1 << 30) + 64, 20
    near = torch.randn(4, n, dtype=torch.float16, device=device)
    wide = reserve(3 * far + n, torch.float16, device).as_strided((4, n), (far, 1)).copy_(near)
    torch.testing.assert_close(elementwise.swiglu(wide, wide), reference.swiglu(near, near))
    torch.testing.assert_close(
        elementwise.rms_norm(wide, None, 1e-6)[0], reference.rms_norm(near, None, 1e-6)[0]
    )
    q = wide.as_strided((1, 1, 4, n), (0, 0, far, 1))
    cos, sin = rotary_table(torch.arange(4, device=device), n, 1e4)
    torch.testing.assert_close(
        elementwise.rope_qk(q, q, cos, sin)[0], reference.rope_qk(near[None, None], q, cos, sin)[0]
    )
