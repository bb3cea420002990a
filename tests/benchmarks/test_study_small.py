"""The study of "small": its table of cells, measured here with tiny in its place."""

import numpy as np
import pytest
import torch
from toys import one_thread  # noqa: F401

import sinkprune as sp


@pytest.fixture(scope="module")
def cells(bench, tmp_path_factory):
    """Rows of both kinds of cells, cut to three rules, measured by two runs that share a file."""
    study, weights = bench("study_small"), bench("study_weights")
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights.sp, "load", lambda name, load=sp.load: load({"small": "tiny"}[name]))
        patch.setattr(study, "CRITERIA", ("reconstruction", "wanda_head", "magnitude"))
        patch.setattr(study, "LEADING", ("reconstruction", "magnitude"))
        patch.setattr(study, "RATIOS", (0.38,))
        patch.setattr(study, "CHANNEL_RULES", ("magnitude", "flap"))
        first = study.measure(1, folder, ("rules",), quick=True)
        before = dict(first.rows)
        yield study.measure(1, folder, ("draws",), quick=True), before, study, folder


def test_the_table_of_cells_is_measured_in_parts_of_one_file(cells):
    rows, before, _, folder = cells
    measured = rows.rows
    for repair in (None, "least_squares"):
        for rule in ("reconstruction", "wanda_head", "magnitude"):
            assert f"small/heads/0.38/{repair}/{rule}/0" in before
        for rule in ("reconstruction", "random"):
            assert f"small/parameters, flap/0.38/{repair}/{rule}/0" in before
        assert f"small/parameters, magnitude/0.38/{repair}/reconstruction/0" in before
        for rule in ("reconstruction", "magnitude"):
            assert f"small/heads/0.62/{repair}/{rule}/0" in measured
        assert f"small/heads/0.62/{repair}/wanda_head/0" not in measured
    assert {key: measured[key] for key in before} == before  # the second part measured none of them again
    assert rows.path == folder / "small.json"


def test_the_subject_is_judged_in_bfloat16_and_is_itself_again_afterwards(cells):
    rows, _, study, _ = cells
    exact, judged = (np.array(rows.rows[f"small/dense{which}"]["held_out"]) for which in (", fp32", ""))
    assert not np.array_equal(exact, judged)
    assert np.allclose(exact, judged, atol=0.05)
    subject = study.SmallSubject(study.Sizes(4, 1, 1), 1)
    weights = [p.clone() for p in subject.dense().parameters()]
    subject.judge(subject.model)
    dense = subject.dense()
    assert all(torch.equal(a, b) for a, b in zip(weights, dense.parameters(), strict=True))
    assert all(p.dtype == torch.float32 for p in dense.parameters())
