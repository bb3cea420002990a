"""Run the kernels on tensors that end, or begin, at a page nobody may touch: out of bounds is a fault.

A process of its own, since a fault ends it. ``--plant`` passes a mask shorter than the
keys, to prove that it would.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
import torch
from kernel_cases import SHAPES, Case, make_case

from sinkprune.kernels import attention as attention_module
from sinkprune.kernels import column_mass as mass_module
from sinkprune.kernels import elementwise, reference
from sinkprune.kernels import sink_update as sink_module
from sinkprune.kernels.launch import Tile

LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
at_end = True


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of ``x`` that lies flush against a forbidden page, after it or before it."""
    if x.numel() == 0:
        return x
    size = x.numel() * x.element_size()
    pages = -(-size // PAGE)
    block = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    for forbidden in (start, start + (pages + 1) * PAGE):
        if LIBC.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    copy = torch.frombuffer(block, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)


class GuardedTorch:
    """``torch``, but what a launch allocates is guarded too."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, **options: Any) -> torch.Tensor:
        return guarded(torch.empty(*size, **options))

    def zeros(self, *size: Any, **options: Any) -> torch.Tensor:
        return guarded(torch.zeros(*size, **options))


def guard(case: Case) -> Case:
    tensors = {name: guarded(x) for name, x in vars(case).items() if isinstance(x, torch.Tensor)}
    return Case(**{**vars(case), **tensors})


def run(case: Case, shares: int) -> None:
    tile = Tile(32, 32, 4, 2)
    options = {"scale": case.scale, "tile": tile, "shares": shares, **case.choices}
    _, lse = attention_module.attention(case.q, case.k, case.v, **options)
    attention_module.attention(case.q, case.k, case.v, compact=True, **options)
    out = guarded(torch.zeros(*case.q.shape[:2], case.k.shape[2]))
    mass_module.column_mass_(out, case.q, case.k, guarded(lse), **options)
    offset = guarded(torch.tensor([7]))
    mass_module.column_mass_(out, case.q, case.k, guarded(lse), sample=5, offset=offset, **options)


def run_specialised() -> None:
    """Tiles of 64 rows over samples of 37 queries and 70 keys."""
    case = guard(make_case(2, 3, 3, 37, 70, 64, dtype=torch.float16, kept=[0, 2]))
    tile = Tile(64, 64, 4, 2, specialised=True)
    attention_module.attention(case.q, case.k, case.v, scale=1.0, tile=tile, compact=True, **case.choices)
    attention_module.attention(case.q, case.k, case.v, scale=1.0, tile=tile, with_lse=False)


def run_elementwise() -> None:
    """Rows of 37 and heads of 20, 12 of them turned."""
    x, gain = guarded(torch.randn(5, 37)), guarded(torch.randn(37))
    elementwise.rms_norm(x, gain, 1e-6, guarded(torch.randn(5, 37)))
    elementwise.swiglu(x, guarded(torch.randn(5, 37)))
    q, k = (guarded(torch.randn(2, 33, h, 20)).transpose(1, 2) for h in (5, 2))
    table, norm = guarded(torch.randn(33, 12)), guarded(torch.randn(20))
    elementwise.rope_qk(q, k, table, table, q_weight=norm, k_weight=norm)


def main() -> None:
    global at_end
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plant", action="store_true")
    arguments = parser.parse_args()
    attention_module.torch = mass_module.torch = elementwise.torch = GuardedTorch()  # type: ignore[assignment]
    np.seterr(all="ignore")
    if arguments.plant:
        case = make_case(1, 1, 1, 16, 5000, 16)
        case.key_padding_mask = guarded(torch.ones(1, 100, dtype=torch.bool))
        attention_module.attention(case.q, case.k, case.v, scale=1.0, tile=Tile(32, 32), **case.choices)
        print("the planted fault went unseen")
        return
    shapes = ("odd", "one-query", "split-dot-80", "kept-ragged-padded", "block-causal-all-positions")
    for at_end in (True, False):
        for name in shapes if at_end else shapes[:1]:
            run(guard(make_case(**SHAPES[name])), shares=1 + at_end)
        run_specialised()
        run_elementwise()
        for keys in (17, 2100):
            sink_module.sink_update_(
                guarded(torch.rand(6, keys)),
                guarded(torch.zeros(6, reference.STATE_WIDTH)),
                guarded(torch.arange(6, dtype=torch.int32) % 2),
                guarded(torch.rand(2, keys) > 0.3),
                keys,
                4.0,
                2.0,
                guarded(torch.zeros(1, 6, dtype=torch.int32)),
                guarded(torch.zeros(1, 6)),
            )
    print("no access out of bounds")


if __name__ == "__main__":
    main()
