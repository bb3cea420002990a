"""The section on "small": what is there is shown, what is missing is named, the ridges side by side."""

import json
from pathlib import Path

import numpy as np
import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks/results/study/small.json"


@pytest.fixture
def planted(bench):
    """Rows whose losses above dense, on every window, are known."""
    report = bench("study_small_report")
    document = {"settings": json.loads(RESULTS.read_text())["settings"], "rows": {}}

    def plant(key, added):
        row = {text: [4 + added] * 8 for text in report.TEXTS}
        document["rows"][key] = row

    plant("small/dense", 0.0)
    plant("small/dense, fp32", 0.0)
    cells = {
        "heads/0.38/None/reconstruction": 0.5, "heads/0.38/least_squares/reconstruction": 0.25,
        "heads/0.38/least_squares_cv/reconstruction": 0.125, "heads/0.38/None/random": 2.0,
        "heads/0.38/least_squares/random": 1.0,
    }  # fmt: skip
    for number, (key, added) in enumerate(cells.items()):
        plant(f"small/judged/{number}", added)
        document["rows"][f"small/{key}/0"] = {"judged": str(number)}
    return report, document


def test_losses_ridges_and_missing_cells_are_those_of_the_rows(planted):
    report, document = planted
    text = report.section(document)
    assert "| **reconstruction** | +0.500 [+0.500, +0.500] | +0.250 [+0.250, +0.250] |" in text
    assert "| 38% of heads, `reconstruction` | +0.250 [+0.250, +0.250] | +0.125 [+0.125, +0.125] |" in text
    assert "repair matters no more than the rule" in text  # random repaired is behind reconstruction pruned
    assert "heads 38% by `magnitude` (draw 0)" in text
    assert "heads 38% by `reconstruction` (draw 0)" not in text.split("Not measured yet")[1]


def test_the_committed_rows_are_of_the_rule_as_it_is_now(bench):
    study, document = bench("study_small"), json.loads(RESULTS.read_text())
    rows = document["rows"]
    now, before = (
        np.array(rows[f"small/score/{rule}/0"]["scores"]) for rule in ("reconstruction", study.ALIKE_TOKENS)
    )
    assert now.shape == before.shape == (30, 9)
    for layers in (slice(0, 1), slice(11, 17)):  # looked idle beside the others
        old, new = (np.median(scores[layers]) / np.median(scores[1:11]) for scores in (before, now))
        assert old < 0.1 < new
