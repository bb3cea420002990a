"""No kernel reads or writes outside its tensors: each lies against a forbidden page (see guarded.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

GUARDED = Path(__file__).with_name("guarded.py")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU, compute-sanitizer does it"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GUARDED), *arguments], capture_output=True, text=True)


def test_no_kernel_leaves_its_tensors():
    done = run()
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    assert "no access out of bounds" in done.stdout


def test_a_planted_fault_is_seen():
    assert run("--plant").returncode == -signal.SIGSEGV
