"""The torch-free half of csrc/ on every processor it is written for, against plain loops in double precision.

Those are the instruction sets of this machine, and aarch64 by the distribution's cross compiler under qemu.

``SINKPRUNE_AARCH64=1`` (``make aarch64``) makes a missing compiler or emulator a failure.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++20", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]  # as in setup.py

pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="the source tree is not here")


def sources(*, torch_free: bool) -> list[Path]:
    outside = re.compile(r"#include <(torch|pybind11)/")
    return [p for p in sorted(CSRC.glob("*.cpp")) if bool(outside.search(p.read_text())) != torch_free]


def compiled(compiler: str, where: Path, *flags: str) -> Path:
    program = where / "vectors_check"
    inputs = [Path(__file__).with_name("vectors_check.cpp"), *sources(torch_free=True)]
    command = [compiler, *FLAGS, "-O3", *flags, f"-I{CSRC}", *map(str, inputs), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def passes(*command: object, isa: str = "") -> str:
    """Runs the check and returns the instruction set that it names."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={**os.environ, "SINKPRUNE_CPU_ISA": isa}
    )
    assert done.returncode == 0, done.stderr + done.stdout
    match = re.fullmatch(r"(\w+): (\d+) checks, 0 failures\n", done.stdout)
    assert match, done.stdout
    assert int(match[2]) > 30_000
    return match[1]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_every_instruction_set_of_this_processor_agrees_with_plain_loops(tmp_path: Path) -> None:
    program = compiled("c++", tmp_path)
    widest = passes(program)
    for narrower in ("avx2", "generic"):
        assert passes(program, isa=narrower) in (narrower, widest)


def aarch64_missing() -> str:
    missing = [tool for tool in (CROSS, EMULATOR) if shutil.which(tool) is None]
    return f"no {' and no '.join(missing)}: apt-get install g++-{CROSS[:-4]} qemu-user" if missing else ""


needs_aarch64 = pytest.mark.skipif(
    bool(aarch64_missing()) and os.environ.get("SINKPRUNE_AARCH64") != "1", reason=aarch64_missing() or "-"
)


@needs_aarch64
def test_aarch64_agrees_with_plain_loops_under_emulation(tmp_path: Path) -> None:
    assert not aarch64_missing(), aarch64_missing()
    assert passes(EMULATOR, compiled(CROSS, tmp_path, "-static")) == "generic"


@needs_aarch64
def test_the_ops_and_the_module_compile_for_aarch64() -> None:
    """Their headers are this machine's: both processors lay out the same types."""
    assert not aarch64_missing(), aarch64_missing()
    pybind11 = importlib.util.find_spec("pybind11")
    if pybind11 is None or pybind11.origin is None:
        pytest.skip("pybind11 is not installed")
    includes = [f"-isystem{Path(torch.__file__).parent / 'include'}"]
    includes += [
        f"-isystem{Path(pybind11.origin).parent / 'include'}",
        f"-isystem{sysconfig.get_paths()['include']}",
    ]
    defines = [
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
        "-DTORCH_STABLE_ONLY",
        "-DSINKPRUNE_SANITIZED=0",
    ]
    defines += ['-DSINKPRUNE_TORCH_TARGET="2.11"', '-DSINKPRUNE_CUDA_SKIPPED="not asked for"']
    inputs = sources(torch_free=False)
    assert {"module.cpp", "ops.cpp"} <= {path.name for path in inputs}
    command = [CROSS, *FLAGS, "-fsyntax-only", *defines, *includes, *map(str, inputs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
