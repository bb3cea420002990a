"""The study of whole blocks: which are taken out where, and what its section says of rows."""

import pytest
from toys import one_thread  # noqa: F401


def test_places_are_neighbouring_blocks(bench):
    place = bench("study_blocks").place
    assert [place(name, 3, 30) for name in ("first", "after first", "middle", "last")] == [
        [0, 1, 2], [1, 2, 3], [13, 14, 15], [27, 28, 29],
    ]  # fmt: skip


@pytest.fixture
def rows(bench, tmp_path, monkeypatch):
    """All cells of tiny for one count and rule, each judged by which blocks its plan takes out."""
    study = bench("study_blocks")
    for name, value in {
        "COUNTS": {"tiny": (2,)}, "RULES": {"tiny": ("influence", "random")},
        "PLACES": ("after first", "last"), "REPAIRED": {"tiny": ("influence",)},
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)

    def judge(self, model):
        plan = getattr(model, "prune_plan", None)
        gone = [] if plan is None else [i for i, kept in enumerate(plan.layers) if not kept.kept_heads]
        cost = sum(0.1 * (6 - i) for i in gone)  # early blocks are the dear ones
        return {"held_out": [1 + cost, 2 + cost, 3 + cost], "out_of_domain": [2 + cost, 2 + cost]}

    monkeypatch.setattr(study.HeadSubject, "judge", judge)
    yield study.measure(tmp_path, quick=True, only="tiny"), study


def test_every_cell_is_a_row_and_the_section_says_what_they_say(bench, rows):
    found, study = rows
    keys = [f"tiny/blocks/one/None/{layer}/0" for layer in range(6)]
    keys += [f"tiny/blocks/2/{r}/influence/0" for r in study.REPAIRS]
    keys += [
        "tiny/blocks/2/None/last/0",
        f"tiny/blocks/2/None/{study.WIDTH}/0",
        "tiny/mlp_blocks/2/None/influence/0",
    ]
    assert not set(keys) - found.rows.keys()
    text = bench("study_blocks_report").section({"rows": found.rows, "settings": found.settings})
    assert "on tiny not reproduced for what comes after block 0 (+0.350 [+0.350, +0.350] against" in text
    assert (
        "block 0 itself costs +0.600 [+0.600, +0.600], and the cheapest are those of the last third." in text
    )
    assert "| after first - last | **+0.600 [+0.600, +0.600]** |" in text
    assert "| 2 blocks | last | +0.300 [+0.300, +0.300] | – |" in text
    assert "| influence, repaired - as pruned |  | +0.000 [+0.000, +0.000] |" in text
