"""The head study: a slice of it end to end, on the embedded model, and the page that is written from it."""

import json
import types

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


@pytest.fixture
def launched(bench, monkeypatch):
    """The study's launcher, whose parts are written down and not run; a part named in ``failing`` fails."""
    study = bench("study")
    study.commands, study.failing = [], None

    def run(command, stdout, stderr, env):
        study.commands.append((command, env.get("OMP_NUM_THREADS")))
        failed = study.failing is not None and command[1].endswith(f"study_{study.failing}.py")
        return types.SimpleNamespace(returncode=int(failed))

    monkeypatch.setattr(study.subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    return study


def test_every_part_of_the_study_runs_and_what_is_timed_runs_last(launched, tmp_path):
    reactions = tmp_path / "reactions.txt"
    reactions.write_text("CC>>CC\n")
    launched.run(tmp_path / "out", reactions, 2, quick=True)
    seen = {}
    for command, threads in launched.commands:
        stage = command[1].rpartition("/")[2]
        only = command[command.index("--only") + 1] if "--only" in command else None
        assert command[2:4] == ["--out", str(tmp_path / "out")] and "--quick" in command
        assert ("--reactions" in command) == (only == "rxnfp")
        seen[stage, only] = threads
    parts = [(f"study_{s}.py", m) for s in ("heads", "weights") for m in ("rxnfp", "tiny")]
    assert seen.keys() == {*parts, ("study_claims.py", None), ("study_weights.py", "timed")}
    assert seen.pop(("study_weights.py", "timed")) == "7" and set(seen.values()) == {"1"}
    assert "timed" in launched.commands[-1][0]
    launched.commands.clear()
    launched.run(tmp_path / "out", None, 1, quick=False)
    assert len(launched.commands) == 4 and not any("rxnfp" in command for command, _ in launched.commands)


def test_a_part_that_fails_is_named_with_its_log(launched, tmp_path):
    launched.failing = "claims"
    with pytest.raises(RuntimeError, match=r"study_claims\.py .* failed: see .*claims-all\.log"):
        launched.run(tmp_path, None, 2, quick=True)
    with pytest.raises(FileNotFoundError, match=r"no file of reactions at nowhere\.txt"):
        launched.run(tmp_path, launched.Path("nowhere.txt"), 2, quick=True)
