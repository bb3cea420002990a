"""benchmarks/performance.py: figures come from committed rows; what nobody measured is called that."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def performance(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("performance")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "before\n<!-- performance -->\nold\n<!-- end performance -->\nafter\n"
    )
    yield module
    for name in ("performance", "speed.latency_groups"):
        del sys.modules[name]


def row(bench, variant, removed=0.0, speedup=1.0, ceiling=1.0, share=None, **changes):
    return {
        "bench": bench, "variant": variant, "shape": "150M", "dtype": "float32", "batch": 1, "length": 256,
        "removed": removed, "median": 1.0, "p20": 0.9, "p80": 1.2, "speedup": speedup, "ceiling": ceiling,
        "tflops": 0.1, "gbytes": 2.0, "peak_bytes": None, "ideal": 1.0, "saved_share": share,
    } | changes  # fmt: skip


def write_run(root, name, rows, device):
    folder = root / "benchmarks" / "results" / name
    folder.mkdir(parents=True)
    document = {
        "command": f"python benchmarks/latency.py --device {device}", "date": "2026-01-02", "device": "it",
        "threads": 2, "versions": {"torch": "2", "sinkprune": "0"}, "rows": rows,
    }  # fmt: skip
    (folder / "latency.json").write_text(json.dumps(document))


def test_a_cpu_run_fills_its_targets_and_leaves_the_gpus_unmeasured(performance, tmp_path):
    rows = [
        row("step (heads)", "heads -38%", 0.38, 1.13, 1.15, 0.9),
        row("step (heads)", "heads -50%", 0.5, 1.2, 1.3, 0.6),
        row("step (head rows)", "32 rows", 0.0, 1.07, 1.08, 0.88),
        row("generation", "dense, statistics every 4th", speedup=0.96, shape="tiny"),
    ]
    write_run(tmp_path, "cpu", rows[::-1], "cpu")
    performance.main()
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert "step 0.60 at least, 1 of 2 rows reach it" in page
    assert "| 4.2 % (tiny, 1 x 256) |" in page
    assert "1.07x of 1.08x (150M, 32 rows of 256)" in page
    gpu = [line for line in page.splitlines() if "| H100, " in line or "| H100 |" in line]
    assert len(gpu) == 4 and all(line.endswith("| not measured |") for line in gpu)
    assert "No GPU was at hand" in page
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| cpu | 150M, 1 x 256 | step | heads -38% | 1.13x | 1.15x |" in readme
    assert "A100 and H100: not measured." in readme
    assert not list(tmp_path.rglob("*.part"))


def test_a_gpu_run_fills_the_gpu_targets(performance, tmp_path):
    where = {"shape": "LLaDA-8B", "dtype": "bfloat16", "length": 1024, "busy": None}
    rows = [
        row("step (heads)", "dense, fused", median=20.0, **where),
        row("step (heads)", "dense, fused, graph", median=18.0, **where | {"busy": 0.97}),
        row("step (heads)", "as users run it", median=27.0, **where),
        row("step (heads+mlp)", "heads+mlp -38%", 0.38, median=13.5, share=0.85, **where),
    ]
    write_run(tmp_path, "h100", rows, "cuda")
    performance.main()
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert "as users run it | H100, bfloat16, LLaDA-8B, 1 x 1024 | 1.50x |" in page
    assert "at least 1.9x | H100, bfloat16, LLaDA-8B, 1 x 1024 | 2.00x |" in page
    assert "| 97 % at least |" in page
    assert "step 0.85 at least, 1 of 1 rows reach it" in page
    assert "No GPU was at hand" not in page


def test_a_readme_without_the_markers_is_left_as_it_is(performance, tmp_path):
    write_run(tmp_path, "cpu", [row("step (heads)", "heads -38%", 0.38)], "cpu")
    (tmp_path / "README.md").write_text("no table here\n")
    with pytest.raises(ValueError, match=r"README\.md must have one <!-- performance -->"):
        performance.main()
    assert (tmp_path / "README.md").read_text() == "no table here\n"
