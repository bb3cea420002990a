"""Microseconds of Python per kernel call, everything but the launch itself: no GPU is needed.

The calls run on CPU tensors up to compiled code that does nothing, so that allocation, choice of a tile,
and Triton's and our own look at the arguments are counted, and the driver is not. A process of its own:
Triton's driver is replaced. ``python tests/kernels/host_cost.py``
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sinkprune.kernels import launch
from sinkprune.kernels.attention import attention
from sinkprune.kernels.column_mass import column_mass_
from sinkprune.kernels.elementwise import rms_norm, rope_qk, swiglu


class NoDriver:
    """An H100 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Nothing:
    """Compiled code that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: object) -> None: ...

    def run(self, *arguments: object) -> None: ...

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.run


def compile_nothing(self: JITFunction[Any], key: str, signature: Any, device: int, *rest: Any) -> Nothing:
    return self.device_caches[device][0].setdefault(key, Nothing())


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of several rounds: whatever else the machine does only adds to it."""
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best * 1e6


def calls() -> dict[str, Callable[[], object]]:
    """Calls at LLaDA-8B's sizes."""
    q, k, v = (torch.zeros(1, 1024, 32, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    x, gain = q.transpose(1, 2).flatten(2), torch.zeros(4096, dtype=torch.bfloat16)
    gate, table = torch.zeros(1, 1024, 12288, dtype=torch.bfloat16), torch.zeros(1024, 128)
    mass, lse = torch.zeros(1, 32, 1024), torch.zeros(1, 32, 1024)
    pruned: dict[str, Any] = {
        "kept_heads": torch.arange(16),
        "kv_head_of": torch.arange(32),
        "key_padding_mask": torch.ones(1, 1024, dtype=torch.bool),
        "compact": True,  # the full layout is cleared first, which takes a CPU long
        "scale": 0.1,
    }
    offset = torch.zeros(1, dtype=torch.int64)
    specialised = launch.family("sm_90").tiles["attention_specialised"]["16"]["128"][0]
    return {
        "two empty tensors": lambda: (torch.empty_like(x), torch.empty_like(lse)),
        "attention": lambda: attention(q, k, v, scale=0.1),
        "attention, heads kept, padding, compact": lambda: attention(q, k, v, **pruned),
        "attention, specialised": lambda: attention(q, k, v, scale=0.1, tile=specialised),
        "column_mass": lambda: column_mass_(mass, q, k, lse, scale=0.1),
        "column_mass, sampled": lambda: column_mass_(mass, q, k, lse, scale=0.1, sample=16, offset=offset),
        "rms_norm with its sum": lambda: rms_norm(x, gain, 1e-5, x),
        "rope_qk": lambda: rope_qk(q, k, table, table),
        "swiglu": lambda: swiglu(gate, gate),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=500, help="calls per round, of ten rounds")
    repeats = parser.parse_args().repeats
    driver.set_active(NoDriver())
    JITFunction._do_compile = compile_nothing
    print("| call | us |\n|---|---|")
    for name, call in calls().items():
        call()
        print(f"| {name} | {microseconds(call, repeats):.1f} |", flush=True)


if __name__ == "__main__":
    main()
