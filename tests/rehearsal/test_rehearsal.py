"""The first run on a GPU, rehearsed on a pretend device (tests/support/pretend): every stage reaches its end.

No time that comes out of it means anything, and none is kept.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PRETENDED = ROOT / "tests" / "support" / "pretend" / "python"
SANITIZER = """#!/usr/bin/env bash
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 9
while [[ "$1" == --* ]]; do
  case "$1" in --tool | --error-exitcode) shift ;; esac
  shift
done
exec "$@"
"""
STAGES = "build,test,sanitize,quick-kernels,quick-latency,quick-repack"
# One of each kind: `make rehearse` runs all that have a size for it.
TESTS = "gpu and (never or outlives or trusted) or odd and full"

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: run benchmarks/gpu_check.sh"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    tool = folder / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(PRETENDED),
        "REAL_PYTHON": sys.executable,
        "REHEARSED_TESTS": TESTS,
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


def gpu_check(environment, folder, *arguments):
    command = ["bash", "benchmarks/gpu_check.sh", "--state", folder / "state", "--out", folder / "out"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540
    )


def test_the_device_refuses_what_a_real_one_refuses(environment):
    done = subprocess.run(
        [PRETENDED, "tests/rehearsal/device_rules.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert "same device" in said["two devices"]
    assert "cannot be accessed from Triton" in said["a CPU tensor in a kernel"]
    for what in ("a read", "a copy to the host", "an index of booleans"):
        assert "not permitted when stream is capturing" in said[f"{what} in a capture"]
    assert "synchronizing CUDA operation" in said["a read in strict mode"]
    assert "illegal memory access" in said["freed memory"]
    assert "out of memory" in said["no room"]
    assert said["a read outside"] == "went through"
    yes = [what for what, answer in said.items() if answer == "True"]
    assert len(yes) == 4, said


def test_every_stage_reaches_its_end_and_is_packed_and_resumed(environment, tmp_path):
    done = gpu_check(environment, tmp_path, "--budget", "500s", "--only", STAGES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["gpu-check.tar.gz"]
    with tarfile.open(tmp_path / "out" / "gpu-check.tar.gz") as archive:
        names = {Path(name).as_posix() for name in archive.getnames()}
    assert {"results/quick/kernels.json", "results/quick/latency.json", "results/quick/repack.json"} <= names
    assert {"results/doctor.json", "results/gpu-tests.xml", "test.done", "about"} <= names
    assert "build.done" not in names  # another machine builds for itself

    latency = json.loads((tmp_path / "state/results/quick/latency.json").read_text())
    assert latency["complete"] and not latency["failures"]
    benches = {row["bench"] for row in latency["rows"]}
    assert {"step (heads)", "step, graph (heads)", "generation", "kernel: attention"} <= benches
    ours, gathered = (
        next(r for r in latency["rows"] if r["variant"] == name)
        for name in ("heads -50%", "heads -50%, gather + SDPA")
    )
    assert (ours["backend"], gathered["backend"]) == ("triton", "sdpa")
    log = (tmp_path / "state" / "quick-latency.log").read_text()
    held, estimated = map(int, re.findall(r"pretended: (\d+) bytes at most, (\d+) estimated", log)[0])
    # Of a toy, float32 temporaries of norms and RoPE in three graphs weigh as much as a model.
    assert 0.4 * estimated <= held <= 1.4 * estimated

    again = gpu_check(environment, tmp_path, "--budget", "60s", "--only", STAGES)
    assert again.returncode == 0 and again.stdout.count(" is done") == len(STAGES.split(","))


def test_no_speed_is_measured_while_tests_fail_and_the_rest_is_kept(environment, tmp_path):
    options = {**environment, "REHEARSED_TESTS": "no-such-test"}  # pytest finds nothing to run: code 5
    done = gpu_check(options, tmp_path, "--only", "test,quick-repack")
    assert done.returncode == 1 and "quick-repack is left out" in done.stdout
    assert (tmp_path / "out" / "gpu-check.tar.gz").exists()
    assert not (tmp_path / "state" / "results" / "quick").exists()


def test_a_budget_that_is_spent_ends_in_time_with_its_own_code(environment, tmp_path):
    done = gpu_check(environment, tmp_path, "--budget", "18s", "--only", "test,sanitize")
    assert done.returncode == 75 and "run it again with --state" in done.stderr
    assert (tmp_path / "out" / "gpu-check.tar.gz").exists()


def test_a_build_without_the_cuda_part_is_a_loud_failure(environment, tmp_path):
    done = gpu_check({**environment, "SINKPRUNE_NATIVE": "0"}, tmp_path, "--only", "build,quick-repack")
    assert done.returncode == 1
    assert "the CUDA part of the extension is not there" in done.stdout
    facts = json.loads((tmp_path / "state" / "results" / "doctor.json").read_text())
    assert next(iter(facts)) == "warning" and "CUDA part is not built" in facts["warning"]
    assert not (tmp_path / "state" / "build.done").exists()


def test_a_state_of_another_commit_or_card_is_refused(environment, tmp_path):
    (tmp_path / "state" / "results").mkdir(parents=True)
    (tmp_path / "state" / "about").write_text("abc on NVIDIA A100\n")
    done = gpu_check(environment, tmp_path, "--only", "quick-repack")
    assert done.returncode == 64 and "is of abc on NVIDIA A100" in done.stderr
