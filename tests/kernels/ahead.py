"""Compile the kernels for GPUs that are not there, and read what the compiler made of them.

A process of its own: ``TRITON_INTERPRET`` is read when a kernel's module is imported, and here it must be
    off.
``python tests/kernels/ahead.py --quick`` prints one JSON line per compilation; ``--table docs/kernels.md``
compiles every shipped tile and writes the table between the file's markers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sinkprune.kernels import launch
from sinkprune.kernels.attention import attention_kernel, combine_kernel, split_head_dim
from sinkprune.kernels.column_mass import column_mass_kernel, join_shares_kernel
from sinkprune.kernels.launch import Tile

BIN = Path(nvidia.__file__).parent / "bin"
# Per multiprocessor: registers, threads, blocks, shared bytes (each block also takes 1 KiB of its own).
LIMITS = {
    80: (65536, 2048, 32, 167936),
    86: (65536, 1536, 16, 102400),
    90: (65536, 2048, 32, 233472),
    100: (65536, 2048, 32, 233472),
}
ELEMENT = {"16": ("bf16", "fp16"), "32": ("fp32",)}


@dataclass(frozen=True)
class Compiled:
    """One compilation: what was asked for, and what came out."""

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    variant: str
    tile: Tile
    registers: int
    stack: int
    spills: int
    shared_bytes: int
    wgmma: int
    mma: int
    atomics: int
    exp2: int
    instructions: int
    blocks_per_sm: int


def occupancy(arch: int, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks of a kernel that one multiprocessor holds at once."""
    most_registers, most_threads, most_blocks, most_shared = LIMITS[arch]
    per_warp = math.ceil(registers * 32 / 256) * 256
    return min(
        most_registers // (per_warp * warps),
        most_threads // (32 * warps),
        most_blocks,
        most_shared // (shared_bytes + 1024),
    )


def compile_ahead(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, warps: int, stages: int
) -> dict[str, Any]:
    """Machine code for ``arch``. Every pointer and stride is said to be a multiple of 16, the lengths are
    not."""
    names = kernel.arg_names
    unknown = set(kernel.do_not_specialize)
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in constants and n not in unknown and signature[n][0] in "*i"
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(str(BIN / "cuobjdump"), "-res-usage", file.name)
        sass = _output(str(BIN / "nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    ptx = compiled.asm["ptx"]
    registers = int(found[1])
    return {
        "registers": registers,
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "exp2": len(re.findall(r"\bMUFU\.EX2", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "blocks_per_sm": occupancy(arch, registers, compiled.metadata.shared, warps),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# What a variant switches on. "plain": every head, nothing masked; "pruned": a kept subset over ragged
# groups with padding; "causal": block-causal with explicit positions on both sides; "split": key or query
# shares.
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "pruned": {"KEPT": True, "MAPPED": True, "PADDED": True},
    "causal": {"CAUSAL": True, "QUERY_POSITIONS": True, "KEY_POSITIONS": True, "PADDED": True},
    "split": {"SPLIT": True, "COMPACT": True},
    "sampled": {"SAMPLED": True, "OFFSET": True},
}


def types_of(kernel: Any, dtype: str) -> dict[str, str]:
    pointers = {
        "q": dtype, "k": dtype, "v": dtype, "out": dtype, "lse": "fp32", "kept_heads": "i64", "kv_head_of":
        "i64", "padding": "u8", "query_positions": "i64", "key_positions": "i64", "offset": "i64", "counts":
        "fp32", "partial": "fp32", "partial_lse": "fp32", "mass": "fp32", "state": "fp32", "sample_of": "i32",
        "steps": "i64", "trace_positions": "i32", "trace_mass": "fp32",
    }  # fmt: skip
    floats = ("scale_log2", "gate_share", "gate_sigma")
    return {
        n: f"*{pointers[n]}" if n in pointers else "fp32" if n in floats else "i32" for n in kernel.arg_names
    }


def compile_tile(kernel: str, arch: int, dtype: str, head_dim: int, variant: str, tile: Tile) -> Compiled:
    """One tile of attention or column mass in one variant."""
    function = {"attention": attention_kernel, "column_mass": column_mass_kernel}[kernel]
    d1, d2 = split_head_dim(head_dim)
    switches = [n for n in function.arg_names if n.isupper() and n not in ("D", "D1", "D2", "BM", "BN", "BQ")]
    constants: dict[str, Any] = {n: VARIANTS[variant].get(n, False) for n in switches}
    constants |= {"D": head_dim, "D1": d1, "D2": d2, "BN": tile.block_n, "PRECISION": "ieee"}
    constants["BM" if kernel == "attention" else "BQ"] = tile.block_m
    if kernel == "attention":
        constants["WITH_OUT"] = True
    types = types_of(function, dtype)
    if kernel == "column_mass" or variant == "split":
        types["out"] = "*fp32"
    figures = compile_ahead(function, types, constants, arch, tile.num_warps, tile.num_stages)
    return Compiled(kernel, arch, dtype, head_dim, variant, tile, **figures)


def matrix(
    archs: list[int], head_dims: list[int], variants: list[str], bits: str = "16"
) -> Iterator[tuple[Any, ...]]:
    """Arguments of `compile_tile` for the shipped tiles."""
    for arch in archs:
        known = launch.family(f"sm_{arch}")
        for kernel in ("attention", "column_mass"):
            for head_dim in head_dims:
                listed = known.tiles[kernel][bits][launch._head_class(head_dim)]
                for tile in listed:
                    for variant in variants:
                        if variant == ("sampled" if kernel == "attention" else ""):
                            continue
                        yield kernel, arch, ELEMENT[bits][0], head_dim, variant, tile


def show(c: Compiled) -> str:
    t = c.tile
    return (
        f"{c.kernel:12} sm_{c.arch:<4} {c.dtype} D={c.head_dim:<4} {c.variant:8} {t.block_m:>3}x{t.block_n:<3} w{t.num_warps} "
        f"s{t.num_stages} reg {c.registers:3} spills {c.spills:3} stack {c.stack:3} smem {c.shared_bytes:6} "
        f"wgmma {c.wgmma:3} mma {c.mma:3} atom {c.atomics} ex2 {c.exp2:3} ins {c.instructions:5} blocks/SM {c.blocks_per_sm}"
    )
