"""Compile the kernels for GPUs that are not there, and read what the compiler made of them.

What is compiled is what a call launches: the calls below run up to the launcher, on tensors of a model's
shapes without memory. A process of its own: ``TRITON_INTERPRET`` is read when a kernel's module is imported,
and here it must be off. ``python tests/kernels/ahead.py --quick`` prints one JSON line per compilation;
``--table docs/kernels.md`` compiles every shipped tile and writes the tables between the file's markers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from least_times import Work, attention_work, column_mass_work, least_seconds, sink_update_work
from machine_code import TENSOR_CORE, Code, compile_for, launches

from sinkprune.kernels import launch, reference
from sinkprune.kernels.attention import attention
from sinkprune.kernels.column_mass import column_mass_
from sinkprune.kernels.elementwise import rms_norm, rope_qk, swiglu
from sinkprune.kernels.launch import Tile
from sinkprune.kernels.sink_update import sink_update_

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    tensor_core: int
    warpgroup: bool
    atomics: int
    instructions: int
    # Instructions of the unmasked loop per 64 keys (attention) or 64 query rows (column mass).
    loop_per_64: float
    blocks_per_sm: int
    ones: tuple[str, ...]
    warps: int
    tile_copies: int
    wide_accesses: int
    block_barriers: int


def _figures(code: Code, tile: Tile, stride: int) -> dict[str, Any]:
    loop = code.main_loop
    return {
        "registers": code.registers,
        "stack": code.stack,
        "spills": code.spills,
        "shared_bytes": code.shared_bytes,
        "tensor_core": loop.count(*TENSOR_CORE) if loop else 0,
        "warpgroup": bool(loop and loop.count("HGMMA", "UTCHMMA")),
        "atomics": code.atomics,
        "instructions": code.instructions,
        "loop_per_64": len(loop) * 64 / stride if loop else 0.0,
        "blocks_per_sm": code.blocks_per_sm,
        "ones": code.ones,
        "warps": code.warps,
        "tile_copies": sum(one.count("UTMALDG") for one in code.loops),
        "wide_accesses": code.wide_accesses,
        "block_barriers": max((one.block_barriers(32 * code.warps) for one in code.loops), default=0),
    }


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# What a variant switches on, and its length: "plain": every head, nothing masked; "pruned": a kept subset
# over ragged groups, with padding where the form takes it; "causal": block-causal with explicit positions on
# both sides; "split": key or query shares. Lengths that 16 does not divide leave fewer strides to specialise.
LENGTHS = {"plain": 1024, "split": 1024, "sampled": 1024, "pruned": 1001, "causal": 1001}
HEADS = 32
SIZES = {
    "attention": (64, 80, 96, 128, 256),
    "attention_specialised": (64, 128),
    "column_mass": (64, 80, 96, 128, 256),
}
VARIANTS = {
    "attention": ("plain", "pruned", "causal", "split"),
    "attention_specialised": ("plain", "pruned"),
    "column_mass": ("plain", "pruned", "causal", "sampled"),
}


def call_of(kernel: str, dtype: str, head_dim: int, variant: str, tile: Tile) -> Callable[[], object]:
    """The call whose launch is compiled."""
    n = LENGTHS[variant]

    def heads() -> torch.Tensor:
        return _empty(1, n, HEADS, head_dim, dtype=DTYPES[dtype]).transpose(1, 2)

    q, k, v = heads(), heads(), heads()
    options: dict[str, Any] = {"scale": head_dim**-0.5, "tile": tile, "shares": 1}
    if variant in ("pruned", "causal") and not tile.specialised:
        options["key_padding_mask"] = _empty(1, n, dtype=torch.bool)
    if variant == "pruned":
        options["kept_heads"] = _empty(HEADS // 2, dtype=torch.int64)
        options["kv_head_of"] = _empty(HEADS, dtype=torch.int64)
    if variant == "causal":
        positions = _empty(1, n, dtype=torch.int64)
        options |= {"block_size": 32, "query_positions": positions, "key_positions": positions}
    if variant == "split":
        options["shares"] = 4
    if kernel.startswith("attention"):
        return lambda: attention(q, k, v, **options)
    if variant == "sampled":
        options |= {"sample": 16, "offset": _empty(1, dtype=torch.int64)}
    return lambda: column_mass_(_empty(1, HEADS, n), q, k, _empty(1, HEADS, n), **options)


def compile_tile(kernel: str, arch: int, dtype: str, head_dim: int, variant: str, tile: Tile) -> Compiled:
    """One tile of attention or column mass in one variant."""
    first = launches(call_of(kernel, dtype, head_dim, variant, tile))[0]
    stride = tile.block_m if kernel == "column_mass" else tile.block_n
    figures = _figures(compile_for(arch, first), tile, stride)
    return Compiled(kernel, arch, dtype, head_dim, variant, tile, **figures)


def elementwise_calls() -> dict[str, tuple[int, Callable[[], object]]]:
    """Per name, the row's width and a call at LLaDA-8B's sizes; the normed rotation at LLaDA2's."""
    n, wide, channels = 1024, 4096, 12288
    x, gain = _empty(1, n, wide, dtype=torch.bfloat16), _empty(wide, dtype=torch.bfloat16)
    gate = _empty(1, n, channels, dtype=torch.bfloat16)
    q, k = (_empty(1, n, h, 128, dtype=torch.bfloat16).transpose(1, 2) for h in (32, 4))
    table, half = _empty(n, 128), _empty(n, 64)
    norm = _empty(128, dtype=torch.bfloat16)
    return {
        "rms_norm": (wide, lambda: rms_norm(x, gain, 1e-5, x)),
        "rms_norm of heads": (128, lambda: rms_norm(q.transpose(1, 2), norm, 1e-5)),
        "rope_qk": (128, lambda: rope_qk(q, q, table, table)),
        "rope_qk of half, normed": (
            128, lambda: rope_qk(q, k, half, half, q_weight=norm, k_weight=norm)
        ),
        "swiglu": (channels, lambda: swiglu(gate, gate)),
    }  # fmt: skip


def compile_elementwise(arch: int) -> Iterator[Compiled]:
    """The elementwise kernels, each in one pass."""
    for name, (width, call) in elementwise_calls().items():
        (first,) = launches(call)
        rows = first.options.get("ROWS") or first.options.get("BT") or 1
        tile = Tile(rows, first.options.get("BLOCK") or width, first.options["num_warps"], 3)
        figures = _figures(compile_for(arch, first), tile, 64)
        yield Compiled(name, arch, "bf16", width, "elementwise", tile, **figures)


def compile_sink_update(arch: int) -> Compiled:
    """The sink update at 4096 keys, with padding and a trace."""
    rows, keys = 1024, 4096
    sample_of = _empty(rows, dtype=torch.int32)
    trace = _empty(8, rows, dtype=torch.int32), _empty(8, rows)
    (first,) = launches(
        lambda: sink_update_(
            _empty(rows, keys), _empty(rows, reference.STATE_WIDTH), sample_of,
            _empty(1, keys, dtype=torch.bool), keys, 4.0, 2.0, *trace,
        )
    )  # fmt: skip
    tile = Tile(1, first.options["BK"], first.options["num_warps"], 3)
    figures = _figures(compile_for(arch, first), tile, 64)
    return Compiled("sink_update", arch, "fp32", 0, "traced", tile, **figures)


def quick() -> Iterator[Compiled]:
    """What every test run compiles: the first tile of the sizes that models use, and each switch once."""
    for arch, kernel, head_dim, variant in (
        (90, "attention", 128, "plain"),
        (90, "attention", 128, "pruned"),
        (90, "attention", 128, "causal"),
        (90, "attention", 64, "pruned"),
        (90, "attention", 80, "plain"),
        (90, "attention", 128, "split"),
        (90, "attention_specialised", 128, "plain"),
        (90, "attention_specialised", 128, "pruned"),
        (90, "attention_specialised", 64, "pruned"),
        (90, "column_mass", 128, "plain"),
        (90, "column_mass", 64, "sampled"),
        (90, "column_mass", 128, "causal"),
        (80, "attention", 128, "plain"),
        (80, "column_mass", 64, "pruned"),
        (100, "attention", 128, "pruned"),
        (100, "attention_specialised", 128, "pruned"),
        (100, "column_mass", 128, "plain"),
    ):
        tile = tiles(arch, kernel, head_dim)[0]
        yield compile_tile(kernel, arch, "bf16", head_dim, variant, tile)
    yield compile_sink_update(90)
    yield from compile_elementwise(90)


def tiles(arch: int, kernel: str, head_dim: int, bits: str = "16") -> list[Tile]:
    """The shipped tiles of one bucket."""
    heads = launch.family(f"sm_{arch}").tiles.get(kernel, {}).get(bits, {})
    return heads.get(launch.head_class(head_dim), []) if head_dim in SIZES[kernel] else []


def everything(archs: list[int]) -> Iterator[Compiled]:
    """Every shipped 16-bit tile at every head size that differs, in every variant; fp32 once per size."""
    for arch in archs:
        for kernel, sizes in SIZES.items():
            for head_dim in sizes:
                for tile in tiles(arch, kernel, head_dim):
                    for variant in VARIANTS[kernel]:
                        yield compile_tile(kernel, arch, "bf16", head_dim, variant, tile)
            for head_dim in (64, 128) if arch == 90 else ():
                for tile in tiles(arch, kernel, head_dim, "32"):
                    yield compile_tile(kernel, arch, "fp32", head_dim, "plain", tile)
        yield compile_sink_update(arch)
        yield from compile_elementwise(arch)


def table(compiled: list[Compiled]) -> str:
    """Markdown: a row per tile, each figure the worst over its variants."""
    lines = [
        "| GPU | kernel | dtype | D | tile | warps | stages | registers | spills | loop / 64 | shared KiB "
        "| wgmma | blocks/SM |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
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
            f"{min(c.loop_per_64 for c in same):.0f}" if same[0].tensor_core else "-",
            f"{max(c.shared_bytes for c in same) / 1024:.0f}",
            "yes" if all(c.warpgroup for c in same) else "no",
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
    works: list[tuple[str, str, Work]] = []
    for model, heads, kv in (("LLaDA-8B", 32, 32), ("Dream-7B", 28, 4)):
        for n in (1024, 4096):
            shape = f"{model}, N={n}, B=1"
            works.append(("attention", shape, attention_work(1, heads, kv, n, n, 128)))
            works.append(("column_mass, exact", shape, column_mass_work(1, heads, kv, n, n, 128)))
            works.append(("column_mass, 1/16", shape, column_mass_work(1, heads, kv, n, n, 128, 16)))
    works.append(("sink_update", "32 layers x 32 heads x 4096 keys", sink_update_work(1024, 4096)))
    works += [(name, "LLaDA-8B, N=1024, B=1", Work(0.0, n, 0.0)) for name, n in layer_bytes().items()]
    for kernel, shape, work in works:
        a100, h100 = (least_seconds(work, gpu) for gpu in ("A100", "H100"))
        lines.append(
            f"| {kernel} | {shape} | {work.flops / 1e9:.1f} | {work.bytes / 1e6:.1f} "
            f"| {work.exponentials / 1e9:.3f} | {a100[0] * 1e6:.1f} | {h100[0] * 1e6:.1f} | {h100[1]} |"
        )
    return "\n".join(lines)


def layer_bytes(tokens: int = 1024, width: int = 4096, channels: int = 12288) -> dict[str, float]:
    """Bytes that the elementwise work of one LLaDA-8B layer moves in 16 bits: two norms with the residual
    sums before them, the rotation of q and k, SwiGLU; by our kernels and by PyTorch's operations one by one.

    Unfused, an element costs a norm 24 bytes (to float32, norm, back, gain) and its sum 6; a rotation 52 (to
    float32, times cos, half negated, joined, times sin, added, back); SwiGLU 10.
    """
    rows = float(tokens * width)
    return {
        "rms_norm with its sum": 8 * rows,
        "rope_qk": 4 * 2 * rows,
        "swiglu": 6.0 * tokens * channels,
        "elementwise of a layer": 2 * 8 * rows + 4 * 2 * rows + 6.0 * tokens * channels,
        "the same by PyTorch's operations": 2 * 30 * rows + 52 * 2 * rows + 10.0 * tokens * channels,
    }


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
                f"{c.registers} registers, {c.spills} spills, {c.loop_per_64:.0f} instructions per 64, "
                f"{c.blocks_per_sm} blocks/SM",
                file=sys.stderr,
                flush=True,
            )
        write_between(arguments.table, "compiled", table(compiled))


if __name__ == "__main__":
    main()
