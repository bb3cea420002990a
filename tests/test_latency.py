"""benchmarks/latency.py: it refuses to report what it can't trust; its ceilings are those of the plans."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sinkprune as sp

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "latency.py"


@pytest.fixture(scope="module")
def latency():
    spec = importlib.util.spec_from_file_location("latency", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["latency"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.SHAPES["toy"] = {
        "d_model": 32,
        "n_heads": 8,
        "n_kv_heads": 4,
        "n_layers": 2,
        "mlp_hidden_size": 48,
        "vocab_size": 50,
    }
    yield module
    del sys.modules["latency"]


def toy_run(latency, monkeypatch, folder, *arguments):
    monkeypatch.setattr(latency, "cases", lambda device, quick: [("toy", torch.float32, 2, 16, 4, 2)])
    monkeypatch.setattr(sys, "argv", ["latency.py", "--device", "cpu", "--out", str(folder), *arguments])
    return latency.main()


def test_every_level_is_timed_and_written(latency, monkeypatch, tmp_path, capsys):
    assert toy_run(latency, monkeypatch, tmp_path) == 0
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    benches = {row["bench"].split(" (")[0] for row in rows}
    assert benches == {"kernel: attention", "kernel: statistics", "layer", "block", "step", "generation"}
    assert len((tmp_path / "latency.csv").read_text().splitlines()) == len(rows) + 1
    assert (tmp_path / "latency.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.part"))
    for row in rows:
        assert row["p20"] <= row["median"] <= row["p80"]
        assert row["peak_bytes"] is None
        if row["removed"] and math.isfinite(row["ceiling"]):
            assert row["ceiling"] > 1
    step = next(r for r in rows if r["bench"] == "step (heads)" and r["removed"] == 0.5)
    model = latency.random_model("toy", "cpu", torch.float32)
    plan = sp.plan(model, criterion="random", ratio=0.5, allocation="uniform")
    assert step["ceiling"] == pytest.approx(sp.ceiling(model, plan, batch=2, length=16))
    saved = 1 - 1 / step["speedup"]
    assert step["saved_share"] == pytest.approx(saved / (1 - 1 / step["ceiling"]), rel=1e-6)
    capsys.readouterr()
    assert toy_run(latency, monkeypatch, tmp_path / "again", "--compare", str(tmp_path / "latency.json")) == 0
    assert " -> " in capsys.readouterr().out


def test_no_speed_is_reported_when_the_check_fails(latency, monkeypatch, tmp_path, capsys):
    def wrong(model, plan, mode="compact"):
        sp.repacking.apply(model, plan, mode=mode)
        if mode == "compact":
            model.blocks[0].attention.o_proj.weight.mul_(1.5)

    monkeypatch.setattr(latency.sp, "apply", wrong)
    assert toy_run(latency, monkeypatch, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "correctness check failed, no speed is reported" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cuda", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "latency.py: error: --device cuda asked for, but torch sees no CUDA device"
    assert not (tmp_path / "out").exists()
