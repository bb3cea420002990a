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
WORKING = (*TENSOR_CORE, "UTMALDG")


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
    wide_accesses: int  # loads and stores of 16 bytes a thread
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
        wide_accesses=sum(bool(re.match(r"(?:LDG|STG)\S*\.128", _name(line))) for line in lines),
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
    loops = [body for body in _loops(lines, labels) if any(_name(lines[i]).startswith(WORKING) for i in body)]
    inner = [body for body in loops if not any(other < body for other in loops)]
    return lines, tuple(Loop(tuple(lines[i] for i in sorted(body))) for body in inner)


def _loops(lines: list[str], labels: dict[str, int]) -> list[frozenset[int]]:
    """Natural loops, as sets of instructions: what reaches a jump back to a head that every path to it
    passes. Waits that the compiler put aside, behind the code, jump back too, but to no such head."""
    jumps = {i: _jump(line, labels) for i, line in enumerate(lines)}
    starts = {0, *labels.values(), *(i + 1 for i, (target, _) in jumps.items() if target is not None)}
    starts = sorted(i for i in starts | {i + 1 for i in jumps if _leaves(lines[i])} if i < len(lines))
    block_of = {first: number for number, first in enumerate(starts)}
    ends = [after - 1 for after in starts[1:]] + [len(lines) - 1]
    following: list[list[int]] = []
    for number, last in enumerate(ends):
        target, falls_through = jumps[last]
        next_ones = [] if target is None else [block_of[target]]
        if falls_through and number + 1 < len(starts):
            next_ones.append(number + 1)
        following.append(next_ones)
    before: list[list[int]] = [[] for _ in starts]
    for number, next_ones in enumerate(following):
        for after in next_ones:
            before[after].append(number)
    dominators = _dominators(before)
    loops: dict[int, set[int]] = {}
    for number, next_ones in enumerate(following):
        for head in next_ones:
            if dominators[number] >> head & 1:
                body, waiting = loops.setdefault(head, {head}), [number]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting.extend(before[block])
    return [
        frozenset(i for block in body for i in range(starts[block], ends[block] + 1))
        for body in loops.values()
    ]


def _dominators(before: list[list[int]]) -> list[int]:
    """For each block, as bits, the blocks that every path to it passes."""
    everything = (1 << len(before)) - 1
    found = [1] + [everything] * (len(before) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(before)):
            passed = everything
            for earlier in before[block]:
                passed &= found[earlier]
            if passed | 1 << block != found[block]:
                found[block] = passed | 1 << block
                changed = True
    return found


def _jump(line: str, labels: dict[str, int]) -> tuple[int | None, bool]:
    """Where an instruction jumps to, and whether the next one may follow it."""
    found = re.match(r"(@\S+\s+)?BRA\S*\s+(.*?)`\((\.L_x_\d+)\)", line)
    if found is None:
        return None, not _leaves(line)
    return labels[found[3]], bool(found[1] or found[2].strip())


def _leaves(line: str) -> bool:
    return line.startswith(("EXIT", "RET", "BPT", "KILL"))
