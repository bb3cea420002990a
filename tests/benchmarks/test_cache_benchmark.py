"""benchmarks/cache.py: its predictions count the forwards that ran; it refuses what it can't trust."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.models.caches import DualCache

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cache.py"
OPTIONS = {"steps": 4, "gen_length": 8, "block_length": 4, "threshold": None}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cache_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cache_benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cache_benchmark"]


@pytest.mark.parametrize(
    ("cache", "ran"), [(None, [13] * 4), ("prefix", [13, 8, 13, 4]), ("dual", [13, 4, 13, 4])]
)
def test_predictions_count_the_forwards_that_ran(script, cache, ran):
    """Of a model of width 32 with three layers of two, one and no heads of 8, 40 channels and 61 words."""
    model = toy()
    sp.apply(model, manual_plan(model, [[0, 1], [2], []]))
    _, forwards, flops, _ = script.counted(model, tokens(2, 5), OPTIONS | {"cache": cache})
    expected = 0
    for queries in ran:
        for heads in (2, 1, 0):
            expected += 2 * 2 * queries * 32 * (4 * 8 * heads + 3 * 40)  # q, k, v, o, MLP
            expected += 2 * 4 * queries * 13 * 8 * heads  # scores and their use, over all 13 keys
        expected += 2 * 2 * 4 * 32 * 61  # logits of the block
    assert (forwards, flops) == (4, expected)


def test_rows_hold_ratios_and_what_changed(script, tmp_path):
    dense, pruned = toy(), toy()
    sp.apply(pruned, manual_plan(pruned, [[0, 1], [2], [0, 3]]))
    with torch.no_grad():
        rows = script.measure({"dense": dense, "pruned": pruned}, tokens(2, 5), OPTIONS, 1, "cpu")
    assert [(row.model, row.cache) for row in rows] == [
        (model, cache) for model in ("dense", "pruned") for cache in ("none", "prefix", "dual")
    ]
    assert rows[0].speedup == rows[0].predicted == 1
    assert rows[0].changed == rows[3].changed == 0
    assert all(row.predicted_by_cache > 1 for row in rows if row.cache != "none")
    assert rows[5].cache_bytes_saved == rows[2].cache_bytes - rows[5].cache_bytes > 0
    script.write(tmp_path / "deep" / "cache.json", rows, {}, "cpu")
    assert len(json.loads((tmp_path / "deep" / "cache.json").read_text())["rows"]) == 6
    assert script.table(rows).count("dual") == 2


def test_a_cache_that_changes_a_text_in_which_it_is_not_used_stops_the_run(script, monkeypatch):
    monkeypatch.setattr(DualCache, "_update", lambda self, layer, k, v: (k, v.roll(1, 2)))
    with pytest.raises(script.CheckFailed, match="nothing is reused"):
        script.measure({"dense": toy()}, tokens(1, 5), OPTIONS, 1, "cpu")
