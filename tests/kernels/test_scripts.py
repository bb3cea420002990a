"""The scripts that need a GPU say so in one line, and leave with code 2, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "benchmarks/kernels.py", "--out", "nowhere"],
        ["bash", "benchmarks/gpu_check.sh", "bench", "nowhere"],
    ],
    ids=["kernels.py", "gpu_check bench"],
)
def test_without_a_gpu_one_line_and_code_two(command, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "needs a CUDA device" in done.stderr
    assert not (ROOT / "nowhere").exists()


def test_an_unknown_stage_is_refused():
    done = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh", "fly"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 64 and "build|test|bench|sanitize" in done.stderr
