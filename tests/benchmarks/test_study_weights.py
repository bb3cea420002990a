"""The weight-level study: rows are kept, verdicts follow from them, left-out tokens are really left out."""

import sys

import numpy as np
import pytest
import torch
from toys import one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.calibration import TEN_LEVELS, calibrate
from sinkprune.generation.trajectories import trajectories
from sinkprune.pruning.sparsification import sparsity_of


def test_rows_that_are_there_are_not_measured_again_and_other_settings_are_refused(bench, tmp_path):
    module = bench("resumable")
    calls = []
    for _ in range(2):
        rows = module.Rows(tmp_path / "rows.json", {"windows": 2})
        assert rows.row("a", lambda: calls.append(1) or {"loss": 0.5})["loss"] == 0.5
        assert len(calls) == 1
    with pytest.raises(ValueError, match=r"measured with \{'windows': 2\}, not \{'windows': 1\}"):
        module.Rows(tmp_path / "rows.json", {"windows": 1})
    with pytest.raises(KeyboardInterrupt):
        rows.row("b", _interrupt)
    assert list(module.Rows(tmp_path / "rows.json", {"windows": 2}).rows) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_rows_of_two_processes_in_one_file_are_all_kept(bench, tmp_path):
    one, other = (bench("resumable").Rows(tmp_path / "rows.json", {}) for _ in range(2))
    one.row("a", lambda: {"loss": 1.0})
    other.row("b", lambda: {"loss": 2.0})
    one.row("c", lambda: {"loss": 3.0})
    assert one.row("b", lambda: pytest.fail("measured again"))["loss"] == 2.0
    assert sorted(bench("resumable").Rows(tmp_path / "rows.json", {}).rows) == ["a", "b", "c"]


def _interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "gain, verdict",
    [
        ({"25 %": 0.0, "50 %": 0.02, "75 %": 0.1, "2:4": 0.02}, "holds"),
        ({"25 %": 0.0, "50 %": 0.0, "75 %": 0.0, "2:4": 0.0}, "not worse, and no gain shown"),
        ({"25 %": 0.0, "50 %": -0.02, "75 %": -0.1, "2:4": 0.0}, "does not hold here"),
        (
            {"25 %": 0.05, "50 %": 0.02, "75 %": 0.05, "2:4": 0.02},
            "not worse, with gains that do not grow throughout",
        ),
    ],
)
def test_the_verdict_follows_from_planted_rows(bench, gain, verdict, tmp_path, monkeypatch):
    report = bench("study_weights_report")
    monkeypatch.setattr(report, "PICTURES", tmp_path)
    if verdict != "holds":  # once is enough
        monkeypatch.setattr(report, "_pictures", lambda rows, models: None)
    text = report.section({"settings": SETTINGS, "rows": planted(gain)})
    assert f"{verdict}.**" in text
    assert "No GPU was at hand" in text
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == ({"weights.png", "sink_gain.png"} if verdict == "holds" else set())


def test_a_study_of_one_model_has_every_row_the_report_reads(bench, tmp_path):
    study, report = bench("study_weights"), bench("study_weights_report")
    rows = bench("resumable").Rows(tmp_path / "weights.json", {})
    model = toy(sharpness=2.0, n_layers=1)
    study.measure(toy_subject(study.Subject, model), rows, draws=1)
    assert sparsity_of(model) == pytest.approx(dict.fromkeys(sparsity_of(model), 0.0))
    text = report._quality(rows.rows, ["tiny"]) + report._verdicts(rows.rows, ["tiny"])
    assert text.count("sink_sparsegpt") == 4
    assert "–" not in report._why(rows.rows, ["tiny"])
    for setting, zeros in (("25 %", 0.25), ("75 %", 0.75), ("2:4", 0.5)):
        row = rows.rows[f"tiny/{setting}/sink_wanda/0"]
        assert row["zeros"] == pytest.approx(zeros, abs=0.02)
    masked = rows.rows["tiny/75 %/wanda/0"]["held_out"]
    assert masked != rows.rows["tiny/75 %/wanda, unmasked text/0"]["held_out"]
    assert masked != rows.rows["tiny/75 %/wanda, trajectories/0"]["held_out"]


def toy_subject(kind, model):
    """The study's subject around a toy model that reads random ids."""

    class Subject(kind):
        def __init__(self):
            self.name, self.model = "tiny", model
            self._dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def calibration(self, draw):
            return calibrate(model, tokens(64), sequences=1, length=16, levels=TEN_LEVELS, seed=draw)

        def trajectories(self, draw):
            return trajectories(model, tokens(1, 4, seed=draw), steps=10, gen_length=12)

        def judge(self, pruned):
            quality = sp.evaluate(pruned, tokens(64, seed=7), windows=3, length=16, draws=1, levels=())
            return {text: quality.per_window for text in ("held_out", "out_of_domain")}

    return Subject()


SETTINGS = {"calibration draws": 3, "sequences": 8, "windows": 20, "draws": 2, "reactions": 5}


def planted(gain):
    """Rows of "tiny" in which sink-aware pruning is better than plain by ``gain``, plus noise they share."""
    generator = np.random.default_rng(0)
    base = {text: 4 + generator.random(20) for text in ("held_out", "out_of_domain")}

    def row(offset):
        noise = 0.001 * generator.standard_normal(20)
        return {text: list(values + offset + noise) for text, values in base.items()}

    rows = {"tiny/dense": row(0)}
    for setting, better in gain.items():
        for draw in range(3):
            rows[f"tiny/{setting}/magnitude/{draw}"] = row(0.5)
            for method in ("wanda", "sparsegpt"):
                rows[f"tiny/{setting}/{method}/{draw}"] = row(0.3)
                rows[f"tiny/{setting}/sink_{method}/{draw}"] = row(0.3 - better)
            for control in ("sink_wanda, no sinks", "wanda, unmasked text"):
                rows[f"tiny/{setting}/{control}/{draw}"] = row(0.3)
    facts = ("positions", "touched", "between", "touched_are_masked", "tokens_are_masked")
    rows["tiny/mask/0"] = dict.fromkeys(facts, 1.0)
    rows["tiny/agreement/0"] = dict.fromkeys(("sink_wanda", "another draw", "magnitude"), 0.1)
    ways = ("dense", "static", "dense, then pruned", "pruned, then dense", "pruned throughout")
    same = dict.fromkeys(ways, 1.0)
    window = {way: row(0)["held_out"] for way in ways}
    for criterion in ("sink_variance", "magnitude"):
        rows[f"tiny/phases/{criterion}"] = {
            "heads_run": same, "agreement": same, "ms": same, "speedup": same, "per_window": window,
        }  # fmt: skip
    for variant in ("nothing", "keys", "queries", "all sinks", "random keys", "least keys"):
        rows[f"tiny/tokens/{variant}"] = {"per_window": row(0)["held_out"], "left_out": 0.02}
    forms = ("dense", "compact", "dense, int8", "compact, int8")
    same = dict.fromkeys(forms, 1.0)
    window = {form: row(0)["held_out"] for form in forms}
    rows["tiny/int8"] = {"per_window": window, "bytes": same, "ms": same, "speedup": same,
                         "parameters_removed": 0.4}  # fmt: skip
    return rows


def test_keys_left_out_in_every_layer_are_keys_that_nobody_sees(bench):
    module, model, ids = bench("token_pruning"), toy(sharpness=2.0), tokens(2, 12)
    out = torch.zeros(2, 12, dtype=torch.bool)
    out[0, [1, 5]] = out[1, 7] = True
    sinks = module.Sinks(3, 2, 12, "keys")
    sinks.out[:] = out
    with torch.no_grad():
        with sinks.leaving_out(model):
            got = model(ids).logits
        expected = model(ids, attention_mask=~out).logits
        dense = model(ids).logits
    torch.testing.assert_close(got[~out], expected[~out])
    assert not torch.allclose(dense, got)
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_transient_sinks_stood_out_last_and_in_fewer_than_half_of_the_steps(bench):
    sinks = bench("token_pruning").Sinks(1, 1, 10, "keys")
    flat, left, right = torch.ones(10), torch.ones(10), torch.ones(10)
    left[2], right[7] = 9.0, 9.0
    chosen = []
    for mass in (left, left, flat, right, right, right, right):
        sinks.mass[0, 0] = mass
        sinks.choose()
        chosen.append(sinks.out[0, 0].nonzero().flatten().tolist())
    # 7 stands out in 1 of 4, 2 of 5, 3 of 6 (no longer fewer than half) and 4 of 7 steps
    assert chosen == [[], [], [], [7], [7], [], []]


def test_timing_2_4_without_a_gpu_is_refused_in_one_line_that_says_why(bench, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["semi_structured.py"])
    assert bench("semi_structured").main() == 2
    captured = capsys.readouterr()
    assert "on a CPU zeros in the weights make nothing faster" in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""
