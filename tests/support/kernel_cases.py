"""Inputs for tests of the kernels: one call's tensors and choices, and shapes that are odd on purpose."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass
class Case:
    """Inputs of one call, and the keyword arguments that say which heads, keys and queries take part."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kept_heads: torch.Tensor | None = None
    kv_head_of: torch.Tensor | None = None
    key_padding_mask: torch.Tensor | None = None
    block_size: int | None = None
    query_positions: torch.Tensor | None = None
    key_positions: torch.Tensor | None = None

    @property
    def choices(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)[3:]}

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def double(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q.double(), self.k.double(), self.v.double()


def make_case(
    b: int, hq: int, hkv: int, lq: int, lk: int, d: int, *, dtype: torch.dtype = torch.float32,
    kept: list[int] | None = None, groups: list[int] | None = None, padding: bool = False,
    block_size: int | None = None, positions: str = "", device: torch.device | None = None,
) -> Case:  # fmt: skip
    """Random inputs. ``padding`` hides about a third of the keys, and all of the last sample's if there are
    two; ``positions`` holds "q" for random query positions (some -1) and "k" for shuffled key positions."""

    def tensor(h: int, length: int) -> torch.Tensor:
        return torch.randn(b, h, length, d).to(device, dtype)

    case = Case(tensor(hq, lq), tensor(hkv, lk), tensor(hkv, lk), block_size=block_size)
    if kept is not None:
        case.kept_heads = torch.tensor(kept, dtype=torch.int64, device=device)
    if groups is not None:
        case.kv_head_of = torch.tensor(groups, dtype=torch.int64, device=device)
    if padding:
        mask = torch.rand(b, lk) > 0.35
        if b > 1:
            mask[-1] = False
        case.key_padding_mask = mask.to(device)
    if "q" in positions:
        case.query_positions = torch.randint(-1, max(lk, 1), (b, lq)).to(device)
    if "k" in positions:
        case.key_positions = torch.stack([torch.randperm(lk) for _ in range(b)]).to(device) if b else None
    return case


# Odd sizes on purpose: none is a multiple of a tile, and each switch appears both on and off.
SHAPES: dict[str, dict[str, Any]] = {
    "square": dict(b=1, hq=2, hkv=2, lq=64, lk=64, d=32),
    "odd": dict(b=2, hq=4, hkv=2, lq=37, lk=71, d=16),
    "one-query": dict(b=2, hq=2, hkv=1, lq=1, lk=70, d=64),
    "one-key": dict(b=1, hq=2, hkv=1, lq=33, lk=1, d=16),
    "split-dot-80": dict(b=1, hq=1, hkv=1, lq=33, lk=65, d=80),
    "split-dot-96": dict(b=1, hq=1, hkv=1, lq=33, lk=65, d=96),
    "odd-head-60": dict(b=1, hq=2, hkv=1, lq=33, lk=65, d=60),
    "small-head-8": dict(b=1, hq=2, hkv=1, lq=33, lk=65, d=8),
    "wide-head-256": dict(b=1, hq=1, hkv=1, lq=17, lk=33, d=256),
    "kept-ragged-padded": dict(b=2, hq=5, hkv=3, lq=33, lk=70, d=16, kept=[0, 2, 3], groups=[0, 0, 2, 1, 2],
    padding=True), "one-head-kept": dict(b=1, hq=4, hkv=4, lq=40, lk=40, d=16, kept=[3]),
    "no-head-kept": dict(b=2, hq=3, hkv=3, lq=20, lk=20, d=16, kept=[]),
    "no-sample": dict(b=0, hq=3, hkv=3, lq=20, lk=20, d=16),
    "no-query": dict(b=2, hq=3, hkv=3, lq=0, lk=20, d=16),
    "no-key": dict(b=2, hq=3, hkv=3, lq=20, lk=0, d=16),
    "block-causal": dict(b=1, hq=2, hkv=1, lq=75, lk=75, d=16, block_size=8),
    "block-causal-of-one": dict(b=1, hq=2, hkv=1, lq=40, lk=40, d=16, block_size=1, padding=True),
    "block-causal-query-positions": dict(b=2, hq=2, hkv=1, lq=35, lk=90, d=16, block_size=16, positions="q"),
    "block-causal-all-positions": dict(
        b=2, hq=3, hkv=3, lq=35, lk=50, d=16, block_size=4, positions="qk", padding=True, kept=[0, 2]
    ),
    "block-larger-than-all": dict(b=1, hq=2, hkv=1, lq=20, lk=20, d=16, block_size=10**9),
    "padded-queries": dict(b=2, hq=2, hkv=2, lq=33, lk=40, d=16, positions="q"),
}  # fmt: skip


def largest_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference; infinities and NaN must be in the same places."""
    got = got.double()
    finite = torch.isfinite(exact)
    assert torch.equal(finite, torch.isfinite(got)), "infinities or NaN in other places than expected"
    assert torch.equal(got[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0))
    return float((got - exact)[finite].abs().max()) if finite.any() else 0.0


def assert_as_exact(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, atol: float = 1e-6) -> None:
    """The numerics policy: at most twice the error of the same mathematics in PyTorch at the same dtype."""
    assert got.shape == exact.shape
    mine, theirs = largest_error(got, exact), largest_error(plain, exact)
    assert mine <= 2 * theirs + atol, f"error {mine:.2e}, plain PyTorch at the same dtype {theirs:.2e}"
