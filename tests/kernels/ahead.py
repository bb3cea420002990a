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

from sinkprune.kernels import launch, roofline
from sinkprune.kernels.attention import attention_kernel, split_head_dim
from sinkprune.kernels.column_mass import column_mass_kernel
from sinkprune.kernels.launch import Tile
from sinkprune.kernels.sink_update import sink_update_kernel

BIN = Path(nvidia.__file__).parent / "bin"
# Per multiprocessor: registers, threads, blocks, shared bytes (each block also takes 1 KiB of its own).
LIMITS = {
    80: (65536, 2048, 32, 167936),
    86: (65536, 1536, 16, 102400),
    90: (65536, 2048, 32, 233472),
    100: (65536, 2048, 32, 233472),
}


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


def compile_sink_update(arch: int) -> Compiled:
    """The sink update at 4096 keys, with padding and a trace."""
    constants = {"WIDTH": 32, "BK": 2048, "PADDED": True, "TRACED": True}
    figures = compile_ahead(sink_update_kernel, types_of(sink_update_kernel, "fp32"), constants, arch, 4, 3)
    return Compiled("sink_update", arch, "fp32", 0, "traced", Tile(1, 2048, 4, 3), **figures)


def quick() -> Iterator[Compiled]:
    """What every test run compiles: the first tile of the sizes that models use, and each switch once."""
    for arch, kernel, head_dim, variant in (
        (90, "attention", 128, "plain"),
        (90, "attention", 128, "causal"),
        (90, "attention", 64, "pruned"),
        (90, "attention", 80, "plain"),
        (90, "attention", 128, "split"),
        (90, "column_mass", 128, "plain"),
        (90, "column_mass", 64, "sampled"),
        (90, "column_mass", 128, "causal"),
        (80, "attention", 128, "plain"),
        (80, "column_mass", 64, "pruned"),
        (100, "attention", 128, "pruned"),
        (100, "column_mass", 128, "plain"),
    ):
        tile = tiles(arch, kernel, head_dim)[0]
        yield compile_tile(kernel, arch, "bf16", head_dim, variant, tile)
    yield compile_sink_update(90)


def tiles(arch: int, kernel: str, head_dim: int, bits: str = "16") -> list[Tile]:
    """The shipped tiles of one bucket."""
    return launch.family(f"sm_{arch}").tiles[kernel][bits][launch.head_class(head_dim)]


def everything(archs: list[int]) -> Iterator[Compiled]:
    """Every shipped 16-bit tile at every head size that differs, in every variant; fp32 once per size."""
    for arch in archs:
        for kernel in ("attention", "column_mass"):
            for head_dim in (64, 80, 96, 128, 256):
                variants = ("plain", "pruned", "causal", "split" if kernel == "attention" else "sampled")
                for tile in tiles(arch, kernel, head_dim):
                    for variant in variants:
                        yield compile_tile(kernel, arch, "bf16", head_dim, variant, tile)
            if arch == 90:
                for head_dim in (64, 128):
                    for tile in tiles(arch, kernel, head_dim, "32"):
                        yield compile_tile(kernel, arch, "fp32", head_dim, "plain", tile)
        yield compile_sink_update(arch)


def table(compiled: list[Compiled]) -> str:
    """Markdown: a row per tile, each figure the worst over its variants."""
    lines = [
        "| GPU | kernel | dtype | D | tile | warps | stages | registers | spills | shared KiB | wgmma "
        "| blocks/SM |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[object, ...], list[Compiled]] = {}
    for c in compiled:
        rows.setdefault((c.arch, c.kernel, c.dtype, c.head_dim, c.tile), []).append(c)
    for (arch, kernel, dtype, head_dim, _), same in rows.items():
        t = same[0].tile
        spills = max(c.spills for c in same)
        spilling = ", ".join(sorted({c.variant for c in same if c.spills or c.stack}))
        cells = [
            f"sm_{arch}",
            kernel,
            dtype,
            head_dim or "-",
            f"{t.block_m}x{t.block_n}",
            t.num_warps,
            t.num_stages,
            max(c.registers for c in same),
            f"{spills} ({spilling})" if spilling else 0,
            f"{max(c.shared_bytes for c in same) / 1024:.0f}",
            "yes" if min(c.wgmma for c in same) else "no",
            min(c.blocks_per_sm for c in same),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def roofline_table() -> str:
    """Markdown: the least work and time of each kernel at LLaDA-8B's and Dream-7B's shapes, computed."""
    lines = [
        "| kernel | shape | GFLOP | MB | G exp2 | A100 us | H100 us | binds on H100 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    works: list[tuple[str, str, roofline.Work]] = []
    for model, heads, kv in (("LLaDA-8B", 32, 32), ("Dream-7B", 28, 4)):
        for n in (1024, 4096):
            shape = f"{model}, N={n}, B=1"
            works.append(("attention", shape, roofline.attention_work(1, heads, kv, n, n, 128)))
            works.append(("column_mass, exact", shape, roofline.column_mass_work(1, heads, kv, n, n, 128)))
            works.append(("column_mass, 1/16", shape, roofline.column_mass_work(1, heads, kv, n, n, 128, 16)))
    works.append(("sink_update", "32 layers x 32 heads x 4096 keys", roofline.sink_update_work(1024, 4096)))
    for kernel, shape, work in works:
        a100, h100 = (roofline.least_seconds(work, gpu) for gpu in ("A100", "H100"))
        lines.append(
            f"| {kernel} | {shape} | {work.flops / 1e9:.1f} | {work.bytes / 1e6:.1f} "
            f"| {work.exponentials / 1e9:.3f} | {a100[0] * 1e6:.1f} | {h100[0] * 1e6:.1f} | {h100[1]} |"
        )
    return "\n".join(lines)


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace what lies between ``<!-- marker -->`` and ``<!-- end marker -->``."""
    document = path.read_text()
    start, end = f"<!-- {marker} -->", f"<!-- end {marker} -->"
    before, rest = document.split(start)
    path.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the set of the default tests, as JSON lines")
    parser.add_argument("--table", type=Path, help="compile everything and write the tables into this file")
    parser.add_argument("--roofline", type=Path, help="only write the computed times into this file")
    parser.add_argument("--archs", default="80,86,90,100", help="compute capabilities, times ten")
    arguments = parser.parse_args()
    if arguments.quick:
        for c in quick():
            print(json.dumps(asdict(c)), flush=True)
    for path in (arguments.roofline, arguments.table):
        if path is not None:
            write_between(path, "roofline", roofline_table())
    if arguments.table is not None:
        compiled = []
        for c in everything([int(a) for a in arguments.archs.split(",")]):
            compiled.append(c)
            print(
                f"{c.kernel} sm_{c.arch} {c.dtype} D={c.head_dim} {c.variant} {c.tile}: "
                f"{c.registers} registers, {c.spills} spills, {c.blocks_per_sm} blocks/SM",
                file=sys.stderr,
                flush=True,
            )
        write_between(arguments.table, "compiled", table(compiled))


if __name__ == "__main__":
    main()
