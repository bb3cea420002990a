"""benchmarks/latency.py: it refuses to report what it can't trust; its ceilings are those of the plans."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import one_thread  # noqa: F401

import sinkprune as sp
from sinkprune.planning import hardware
from sinkprune.planning.costs import step_flops
from sinkprune.pruning import repacking

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "latency.py"
ROOFS = hardware.Roofs("flat", {"float32": 1e11}, 1e10, "measured")


@pytest.fixture(scope="module")
def latency(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(hardware, "measure", lambda device: ROOFS)
        module = importlib.import_module("latency")
        add_toy(module)
        yield module
        for name in ("latency", "speed.latency_groups", "speed.latency_rows"):
            del sys.modules[name]


def add_toy(module):
    module.SHAPES["toy"] = {
        "d_model": 32,
        "n_heads": 8,
        "n_kv_heads": 4,
        "n_layers": 2,
        "mlp_hidden_size": 48,
        "vocab_size": 50,
    }


def toy_run(latency, monkeypatch, folder, *arguments):
    monkeypatch.setattr(
        latency, "cases", lambda device, quick: [latency.Case("toy", torch.float32, 2, 16, 4, 2)]
    )
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
        assert row["peak_bytes"] > 0 and row["busy"] is None
        assert row["tflops"] > 0 and row["gbytes"] > 0
        if row["removed"]:
            assert row["ceiling"] > 1 and row["ceiling_roofs"] > 1
            assert row["ideal"] * row["ceiling"] == pytest.approx(dense_median(rows, row))
    step = next(r for r in rows if r["bench"] == "step (heads)" and r["removed"] == 0.5)
    model = latency.random_model("toy", "cpu", torch.float32)
    plan = sp.plan(model, criterion="random", ratio=0.5, allocation="uniform")
    assert step["ceiling"] == pytest.approx(sp.ceiling(model, plan, batch=2, length=16))
    assert step["ceiling_roofs"] == pytest.approx(sp.ceiling(model, plan, 2, 16, ROOFS))
    assert capsys.readouterr().err.count("without heads a step is at most 25 %: ") == 1
    few = next(r for r in rows if r["bench"] == "step (head rows)" and r["variant"] == "2 rows")
    dense, head = step_flops(plan.geometry, None, 2, 16), 2 * 2 * 32 * 50
    assert few["ceiling"] == pytest.approx(dense / (dense - 14 * head)) and few["saved_share"] is not None
    saved = 1 - 1 / step["speedup"]
    assert step["saved_share"] == pytest.approx(saved / (1 - 1 / step["ceiling"]), rel=1e-6)
    capsys.readouterr()
    assert toy_run(latency, monkeypatch, tmp_path / "again", "--compare", str(tmp_path / "latency.json")) == 0
    assert " -> " in capsys.readouterr().out


def dense_median(rows, row):
    return next(r["median"] for r in rows if r["bench"] == row["bench"])


def test_no_speed_is_reported_when_the_check_fails(latency, monkeypatch, tmp_path, capsys):
    def wrong(model, plan, mode="compact"):
        repacking.apply(model, plan, mode=mode)
        if mode == "compact":
            model.blocks[0].attention.o_proj.weight.mul_(1.5)

    monkeypatch.setattr(latency.sp, "apply", wrong)
    with pytest.raises(SystemExit, match="1"):
        toy_run(latency, monkeypatch, tmp_path / "out")
    captured = capsys.readouterr()
    assert "error: correctness check failed, no speed is reported" in captured.err
    assert captured.out == ""
    assert not list((tmp_path / "out").glob("latency.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cuda", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "latency.py: error: --device cuda asked for, but torch sees no CUDA device"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--length", "100", "--block-length", "32"], "--block-length 32 does not divide the 50 new tokens"),
        (["--length", "100", "--steps", "64"], "--steps 64 is above the 50 new tokens of length 100"),
        (["--length", "64", "--steps", "3", "--block-length", "8"], "a multiple of 4 blocks, got 3"),
        (["--length", "1"], "--length 2, got 1 and 1"),
        (["--batch", "-1"], "--batch must be at least 1 and --length 2, got -1 and 1024"),
    ],
)
def test_a_case_that_makes_no_sense_is_one_line(latency, monkeypatch, tmp_path, capsys, arguments, line):
    argv = ["latency.py", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        latency.main()
    error = capsys.readouterr().err
    assert line in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_case_without_its_shape_is_one_line(latency, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        toy_run(latency, monkeypatch, tmp_path / "out", "--length", "64")
    assert "name its --shape too" in capsys.readouterr().err


def test_a_gpu_too_small_says_how_much_is_needed_and_what_would_fit(latency, monkeypatch, tmp_path, capsys):
    """What the GPU path decides before it allocates anything, with a made-up amount of free memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * 10**9, 40 * 10**9))
    argv = ["latency.py", "--device", "cuda", "--shape", "LLaDA-8B", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        latency.main()
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 2
    assert "left out: LLaDA-8B, 1 x 1024 needs" in error[0]
    assert "GB, 40.0 GB are free: the shape 150M would fit" in error[1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (78 * 10**9, 80 * 10**9))
    with pytest.raises(SystemExit, match="2"):
        monkeypatch.setattr(sys, "argv", [*argv, "--batch", "64"])
        latency.main()
    assert "1 x 4096 tokens would fit" in capsys.readouterr().err


def test_a_published_size_is_timed_within_60_gb(latency):
    for shape in ("LLaDA-8B", "Dream-7B"):
        assert latency.needed_bytes(latency.Case(shape, torch.bfloat16, 1, 1024, 16, 20)) < 60e9


def test_a_run_cut_short_goes_on_where_it_was(latency, monkeypatch, tmp_path):
    """The group that was cut has no rows; what was written before is not timed again."""
    timed = []
    time_group = latency.time_group

    def cut(bench, *arguments):
        if bench.startswith("step (heads)") and "cut" not in timed:
            timed.append("cut")
            raise KeyboardInterrupt
        timed.append(bench)
        return time_group(bench, *arguments)

    monkeypatch.setattr(latency, "time_group", cut)
    with pytest.raises(KeyboardInterrupt):
        toy_run(latency, monkeypatch, tmp_path, "--resume")
    before = json.loads((tmp_path / "latency.json").read_text())
    assert not before["complete"] and before["rows"] and not (tmp_path / "latency.csv").exists()
    first = timed[: timed.index("cut")]
    assert toy_run(latency, monkeypatch, tmp_path, "--resume") == 0
    assert not set(first) & set(timed[len(first) :])
    after = json.loads((tmp_path / "latency.json").read_text())
    assert after["complete"] and after["rows"][: len(before["rows"])] == before["rows"]
    keys = [(r["bench"], r["variant"]) for r in after["rows"]]
    assert len(keys) == len(set(keys)) and ("generation", "as users run it") in keys


def test_a_level_without_room_is_noted_and_the_rest_goes_on(latency, monkeypatch, tmp_path):
    def full(case, device, done):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        yield

    monkeypatch.setitem(latency.LEVELS, "kernel", full)
    assert toy_run(latency, monkeypatch, tmp_path) == 0
    document = json.loads((tmp_path / "latency.json").read_text())
    (lost,) = document["failures"]
    assert (lost["level"], lost["batch"], lost["length"]) == ("kernel", 2, 16) and "9 GiB" in lost["error"]
    assert {r["bench"].split(" (")[0] for r in document["rows"]} == {"layer", "block", "step", "generation"}


def test_compiled_elementwise_work_has_rows_without_a_ceiling(latency, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # what is compiled is not tested here
    assert toy_run(latency, monkeypatch, tmp_path, "--level", "elementwise") == 0
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    names = ["residual + RMSNorm", "RoPE", "SwiGLU"]
    assert list(dict.fromkeys(r["bench"] for r in rows)) == [f"elementwise: {name}" for name in names]
    assert {r["variant"] for r in rows} == {"eager", "torch.compile"}
    assert all(r["ceiling"] is None and r["saved_share"] is None for r in rows)
