"""The head study: a slice of it end to end, on the embedded model, and the page that is written from it."""

import json

import numpy as np
import pytest
from toys import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def slice_of_study(bench, tmp_path_factory):
    """Rows of three rules at two ratios, on four windows."""
    heads, report, study = bench("study_heads"), bench("study_heads_report"), bench("study")
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        for module in (heads, report):
            patch.setattr(module, "CRITERIA", ("magnitude", "reconstruction", "random"))
            patch.setattr(module, "RATIOS", (0.25,))
            patch.setattr(module, "MAIN", ("reconstruction",))
            patch.setattr(module, "CHANNEL_RULES", ("wanda", "flap"))
        patch.setattr(report, "PICTURES", folder)
        yield heads.measure(None, 1, folder, quick=True), report, study, folder


def test_a_slice_of_the_study_is_measured_resumed_and_written(bench, slice_of_study):
    rows, report, study, folder = slice_of_study
    heads = bench("study_heads")
    dense = rows.rows["tiny/dense"]["held_out"]
    pruned = report.losses(rows.rows, "tiny", "held_out", "heads/0.38/None/reconstruction")
    assert pruned.shape == (1, len(dense))
    again = heads.measure(None, 1, folder, quick=True)  # everything is there: nothing is measured twice
    assert again.rows == rows.rows
    text = study.page(folder)
    assert "**reconstruction**" in text
    loss = np.mean(pruned) - np.mean(dense)
    assert f"| **reconstruction** | {loss:+.3f} [" in text
    assert (folder / "heads.png").stat().st_size > 0
    document = json.loads((folder / "heads.json").read_text())
    assert document["rows"].keys() == rows.rows.keys()


def test_a_plan_that_two_rules_agree_on_is_judged_once(slice_of_study):
    rows = slice_of_study[0].rows
    judged = {key for key in rows if "/judged/" in key}
    named = [row["judged"] for key, row in rows.items() if "judged" in row]
    assert {key.rpartition("/")[2] for key in judged} == set(named)
    assert len(named) > len(set(named))


def test_draws_of_an_unfinished_study_do_not_pair(bench):
    report = bench("study_heads_report")
    with pytest.raises(ValueError, match="2 and 3 calibration draws do not pair"):
        report.difference(np.zeros((2, 4)), np.zeros((3, 4)))
    assert report.difference(np.ones((3, 4)), np.zeros((1, 4))).mean == 1
