"""A layer on the device starts few kernels, and what they compute is as exact as PyTorch's operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PRETENDED = HERE.parent / "support" / "pretend" / "python"
MODELS = ("llada", "dream", "sdar", "llada2")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def lines():
    environment = {**os.environ, "REAL_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(PRETENDED), str(HERE / "layer_launches.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    return {(line["model"], line["form"]): line for line in found}


@pytest.mark.parametrize("model", MODELS)
def test_a_fused_layer_starts_at_most_twelve_kernels(lines, model):
    starts = lines[model, "fused"]["starts"]
    assert 0 < sum(starts.values()) <= 12, starts
    assert starts["rms_norm_kernel"] == 2 and starts["rope_qk_kernel"] == starts["swiglu_kernel"] == 1


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_as_published_starts_only_its_other_products_besides(lines, model):
    dense, fused = (dict(lines[model, form]["starts"]) for form in ("dense", "fused"))
    products = [sum(starts.pop(name, 0) for name in ("mm", "addmm")) for starts in (dense, fused)]
    assert products[0] > products[1] == 4 and dense == fused


@pytest.mark.parametrize("form", ["dense", "fused"])
@pytest.mark.parametrize("model", MODELS)
def test_the_device_is_as_exact_as_pytorch(lines, model, form):
    line = lines[model, form]
    for bits, floor in ((32, 1e-6), (16, 1e-3)):
        assert line[f"device {bits}"] <= 2 * line[f"pytorch {bits}"] + floor, line
