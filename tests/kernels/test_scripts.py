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
        ["bash", "benchmarks/gpu_check.sh", "--out", "nowhere", "--state", "nowhere/state"],
    ],
    ids=["kernels.py", "gpu_check"],
)
def test_without_a_gpu_one_line_and_code_two(command, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "needs a CUDA device" in done.stderr
    assert not (ROOT / "nowhere").exists()


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["--only", "fly"], ["--budget", "soon"], ["--state"]],
    ids=" ".join,
)
def test_what_it_does_not_know_is_refused(arguments):
    done = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 64 and len(done.stderr.splitlines()) == 1 and "gpu_check: " in done.stderr


def test_the_host_s_cost_is_measured_without_a_gpu():
    """Each call gets up to its launch with the driver replaced, and is given a positive time."""
    script = ROOT / "tests" / "kernels" / "host_cost.py"
    done = subprocess.run(
        [sys.executable, str(script), "--repeats", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    times = {name: float(microseconds) for name, microseconds in rows}
    assert {"attention", "attention, specialised", "column_mass", "swiglu"} <= times.keys()
    assert min(times.values()) > 0
