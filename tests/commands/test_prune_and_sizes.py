"""``prune`` is plan, apply and save; ``ceiling`` and ``memory`` are the functions, without weights."""

import json

import pytest
import torch

import sinkprune as sp
from sinkprune.checkpoints import checkpoint
from sinkprune.commands.main import main

ROWS = ["--calibration-windows", "4", "--calibration-length", "64", "--quiet"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """tiny pruned by ``prune``, and by ``plan`` and ``apply``, and that plan's file."""
    folder = tmp_path_factory.mktemp("made")
    one, two, plan = (str(folder / name) for name in ("one", "two", "plan.json"))
    assert main(["prune", "tiny", "--ratio", "0.3", "--out", one, *ROWS]) == 0
    assert main(["plan", "tiny", "--ratio", "0.3", "--out", plan, *ROWS]) == 0
    assert main(["apply", "tiny", "--plan", plan, "--out", two, *ROWS]) == 0
    return one, two, plan


def test_prune_writes_what_plan_and_apply_write(made):
    one, two = (sp.load(folder)[0].state_dict() for folder in made[:2])
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_prune_refuses_before_the_work_and_without_repair_changes_nothing_that_stays(made, tmp_path, capsys):
    assert main(["prune", "tiny", "--out", made[0], "--quiet"]) == 2
    assert "exists; choose another path" in capsys.readouterr().err
    out = str(tmp_path / "as it was")
    assert (
        main(["prune", "tiny", "--criterion", "magnitude", "--repair", "none", "--out", out, "--quiet"]) == 0
    )
    dense, _ = sp.load("tiny")
    expected = sp.apply(dense, sp.plan(dense, criterion="magnitude")).state_dict()
    written = sp.load(out)[0].state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_ceiling_and_memory_are_the_functions(made, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", None)  # no weights are loaded
    plan = sp.PrunePlan.load(made[2])
    told = ["--length", "200", "--json"]
    assert main(["ceiling", "tiny", "--plan", made[2], "--roofs", "H100", *told]) == 0
    ceiling = json.loads(capsys.readouterr().out)
    assert ceiling["arithmetic"] == pytest.approx(sp.ceiling(plan.geometry, plan, batch=1, length=200))
    expected = sp.ceiling(plan.geometry, plan, batch=1, length=200, roofs=sp.roofs("H100"))
    assert ceiling["with_roofs"] == pytest.approx(expected)
    for arguments, held in ((["tiny", "--plan", made[2]], plan), ([made[0]], plan), (["tiny"], None)):
        assert main(["memory", *arguments, *told, "--batch", "2"]) == 0
        needed = json.loads(capsys.readouterr().out)
        assert needed["peak"] == sp.memory(plan.geometry, held, batch=2, length=200).peak


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["memory", "tiny", "--length", "100000"],
            "--length must be 1 to 512, the model's context; got 100000",
        ),
        (["memory", "tiny", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["memory", "nowhere"], "expected 'tiny', 'small', a local folder"),
        (["ceiling", "tiny", "--plan", "nowhere"], "--plan: no such file: nowhere; expected a plan, which"),
    ],
)
def test_bad_sizes_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_plan_of_another_model_and_of_a_pruned_one_are_refused(made, tmp_path, capsys):
    assert main(["memory", made[0], "--plan", made[2]]) == 2
    assert "is pruned already: --plan is for a dense model" in capsys.readouterr().err
