"""The comparison on a model of one's own, rehearsed on the embedded one."""

import copy
import json

import pytest
from toys import one_thread  # noqa: F401

import sinkprune as sp


@pytest.fixture(scope="module")
def stopped(bench, tmp_path_factory):
    """The script, its options, and the keys that were measured before something stopped it and after that."""
    module, folder = bench("reproduce"), tmp_path_factory.mktemp("reproduced")
    options = module.parsed(["tiny", "--quick", "--length", "32", "--batch", "16", "--out", str(folder)])
    with pytest.MonkeyPatch.context() as patch:
        before, judge = [], module.Reproduction.judge

        def until(self, variant, plan):
            if len(before) == 3:
                raise KeyboardInterrupt
            before.append(variant.key)
            return judge(self, variant, plan)

        patch.setattr(module.Reproduction, "judge", until)
        with pytest.raises(KeyboardInterrupt):
            module.reproduce(options)
        page = (folder / "reproduce.md").read_text()
        after = []
        patch.setattr(module.Reproduction, "judge", lambda *a: (after.append(a[1].key), judge(*a))[1])
        module.reproduce(options)
    return module, options, before, after, page


def test_a_stopped_run_goes_on_where_it_was_and_says_what_is_missing(stopped):
    module, options, before, after, page = stopped
    keys = [variant.key for variant in module.variants()]
    assert before + after == keys and len(before) == 3
    assert f"Not measured yet: {', '.join(after)}." in page
    whole = (options.out / "reproduce.md").read_text()
    assert "Not measured yet" not in whole
    assert all(f"\n| {key} | " in whole for key in keys)
    assert {"sink_variance/repaired", "magnitude"} <= {key.removeprefix("pruned/") for key in keys}
    assert {"zeros/wanda", "zeros/sparsegpt", "zeros/sink_sparsegpt"} <= set(keys)


def test_figures_are_those_of_the_verbs_called_by_hand(stopped):
    _, options, *_ = stopped
    rows = json.loads((options.out / "reproduce.json").read_text())["rows"]
    dense, tokenizer = sp.load("tiny")
    text = sp.texts("calibration")
    calibration = sp.calibrate(dense, text, tokenizer=tokenizer, sequences=4, length=32)
    plan = sp.plan(dense, None, "magnitude", 0.38, calibration=calibration)
    pruned = sp.apply(copy.deepcopy(dense), plan, calibration=calibration)
    measured = {"tokenizer": tokenizer, "windows": 4, "length": 32, "draws": 1}
    for key, model in (("dense", dense), ("pruned/magnitude/repaired", pruned)):
        expected = sp.evaluate(model, sp.texts("held_out"), **measured).per_window
        assert rows[key]["loss"]["held_out"]["windows"] == pytest.approx(expected, rel=1e-5)
    assert rows["pruned/magnitude"]["parameters_removed"] == plan.parameters_removed
    assert rows["pruned/magnitude"]["bytes"]["weights"] < rows["dense"]["bytes"]["weights"]
    assert rows["speed/magnitude"]["dense_ms_per_step"] > 0


def test_rows_of_other_settings_are_refused(stopped):
    module, options, *_ = stopped
    other = copy.copy(options)
    other.ratio = 0.5
    with pytest.raises(ValueError, match="move it away"):
        module.reproduce(other)


def test_tasks_are_asked_of_every_model_and_stand_on_the_page(stopped, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    module, options, *_ = stopped
    rows = [
        {"prompt": "The Congress of the", "choices": [" United States", " of of of the"], "gold": 0},
        {"prompt": "My fellow", "choices": [" citizens", " whereupon"], "gold": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "choose", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "choose.yaml").write_text(json.dumps(task))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "variants", lambda: iter([module.Variant("dense")]))
    asked = copy.copy(options)
    asked.tasks, asked.task_path, asked.task_draws = "choose", tmp_path, 8
    text = module.reproduce(asked).read_text()
    assert "| model | choose, acc |\n|---|---|\n| dense | 1.000 ± 0.000 |" in text


def test_a_tasks_table_pairs_each_figure_with_its_error(bench):
    page = bench("reproduce_page")
    tasks = {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "gsm": {"match,strict": 0.25}}
    rows = {"tasks/arc,gsm/dense": {"tasks": tasks}, "tasks/arc,gsm/other": {"tasks": tasks}}
    text = page._tasks(rows, "arc,gsm", ["dense", "unmeasured", "other"])
    assert text.splitlines()[2:] == [
        "| model | arc, acc | gsm, match |",
        "|---|---|---|",
        "| dense | 0.500 ± 0.196 | 0.250 |",
        "| other | 0.500 ± 0.196 | 0.250 |",
    ]
