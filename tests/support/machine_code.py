"""Machine code of a Triton launch for a GPU that is not there, and what can be read off it.

`launches` records what a call would launch, with the arguments it would pass, and `compile_for` compiles one
of them as Triton's own launcher would: the same types, the same strides of 1 and the same multiples of 16
specialised. ``TRITON_INTERPRET`` must be off before a kernel's module is imported.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

BIN = Path(nvidia.__file__).parent / "bin"
# Per multiprocessor: registers, threads, blocks, shared bytes (each block also takes 1 KiB of its own).
LIMITS = {
    80: (65536, 2048, 32, 167936),
    86: (65536, 1536, 16, 102400),
    90: (65536, 2048, 32, 233472),
    100: (65536, 2048, 32, 233472),
}
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: the kernel, its grid, its arguments and options."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code: how often each instruction stands in it, and in which words."""

    lines: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.lines)

    def count(self, *names: str) -> int:
        """Instructions whose name starts with one of ``names``."""
        return sum(_name(line).startswith(names) for line in self.lines)

    def block_barriers(self, threads: int) -> int:
        """Barriers that every thread of the block waits at; one of a part names its fewer threads."""
        waits = [line for line in self.lines if _name(line).startswith("BAR.")]
        parts = [re.search(r",\s*(0x[0-9a-f]+)\s*$", line) for line in waits]
        return sum(part is None or int(part[1], 16) >= threads for part in parts)


@dataclass(frozen=True)
class Code:
    """What the compiler made of a launch for one GPU."""

    registers: int
    stack: int
    spills: int
    shared_bytes: int
    warps: int
    instructions: int
    blocks_per_sm: int
    atomics: int
    ones: tuple[str, ...]  # arguments whose value of 1 is part of the code
    loops: tuple[Loop, ...]

    @property
    def main_loop(self) -> Loop | None:
        """The shortest innermost loop on tensor cores: the one that runs where nothing is masked."""
        inner = [loop for loop in self.loops if loop.count(*TENSOR_CORE)]
        return min(inner, key=len) if inner else None


def launches(call: Callable[[], object]) -> list[Launch]:
    """What ``call`` would launch; nothing is launched. Tensors may lie on the meta device."""
    seen: list[Launch] = []

    def record(
        self: JITFunction[Any], *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> None:
        seen.append(Launch(self, grid, args, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return seen


def compile_for(arch: int, launch: Launch) -> Code:
    """``launch`` in the machine code of compute capability ``arch`` / 10."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(str(BIN / "cuobjdump"), "-res-usage", file.name)
        sass = _output(str(BIN / "nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    lines, loops = _read(sass)
    registers, warps = int(found[1]), compiled.metadata.num_warps
    return Code(
        registers=registers,
        stack=int(found[2]),
        spills=sum(_name(line).startswith(("STL", "LDL")) for line in lines),
        shared_bytes=compiled.metadata.shared,
        warps=warps,
        instructions=len(lines),
        blocks_per_sm=occupancy(arch, registers, compiled.metadata.shared, warps),
        atomics=len(re.findall(r"\b(?:atom|red)\.", compiled.asm["ptx"])),
        ones=tuple(p.name for p in kernel.params if not p.is_constexpr and constants.get((p.num,)) == 1),
        loops=loops,
    )


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


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _name(line: str) -> str:
    """An instruction's name, without the predicate it may run under."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]


def _read(sass: str) -> tuple[list[str], tuple[Loop, ...]]:
    """The instructions, and the innermost loops of those that use tensor cores or load whole tiles."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for text in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", text):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text):
            lines.append(instruction[1])
    spans = []
    for end, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], end + 1) <= end:
            spans.append((labels[jump[1]], end))
    working = [
        (first, last)
        for first, last in spans
        if any(_name(line).startswith((*TENSOR_CORE, "UTMALDG")) for line in lines[first : last + 1])
    ]
    inner = [
        (first, last)
        for first, last in working
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in working)
    ]
    return lines, tuple(Loop(tuple(lines[first : last + 1])) for first, last in inner)
