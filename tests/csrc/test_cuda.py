"""The CUDA part compiles for every architecture we name, without a register spill: that needs no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.skipif(not CSRC.exists(), reason="the source tree is not here")
def test_cuda_kernels_compile_for_every_architecture_without_spilling_registers(tmp_path: Path) -> None:
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    targets = [n for n in (80, 90, 100) if f"compute_{n}" in known]
    assert 80 in targets
    assert 90 in targets
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in targets]
    for source in sorted(CSRC.glob("*.cu")):
        command = [
            NVCC,
            "-std=c++17",
            "-O3",
            "-Xptxas=-v,-warn-spills",
            "--threads=2",
            *flags,
            "-c",
            str(source),
        ]
        done = subprocess.run([*command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)]
        assert len(spills) >= 2 * len(targets), f"ptxas did not report every kernel:\n{done.stderr}"
        assert not any(spills), f"{source.name} spills registers:\n{done.stderr}"
