"""The study of the ridge: every cell is measured, and its section says what the rows say."""

import pytest
from toys import one_thread  # noqa: F401


def test_every_cell_is_a_row_and_the_section_says_which_is_better(bench, tmp_path, monkeypatch):
    study = bench("study_repairs")
    cost = {"least_squares": 0.5, "least_squares_cv": 0.25, None: 0.0}

    def judge(self, model):
        more = cost[model.prune_plan.details["repair"]["method"]] if hasattr(model, "prune_plan") else 0.0
        return {"held_out": [1 + more, 2 + more], "out_of_domain": [3.0 + more, 3.5 + more]}

    monkeypatch.setattr(study.HeadSubject, "judge", judge)
    monkeypatch.setattr(study, "PARAMETERS", (0.38,))
    found = study.measure(tmp_path, None, quick=True)
    text = study.section({"rows": found.rows, "settings": found.settings})
    for removed in (
        "38% of heads by `reconstruction`",
        "38% of heads by `random`",
        "38% of block parameters",
    ):
        assert (
            f"| {removed} | tiny, held out | +0.500 [+0.500, +0.500] | +0.250 [+0.250, +0.250] "
            "| **-0.250 [-0.250, -0.250]** |" in text
        )
    assert "rxnfp |" not in text
    with pytest.raises(ValueError, match="measured with"):
        study.Rows(found.path, {"windows": 1})
