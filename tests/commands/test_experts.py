"""Experts on the command line: a plan of them, the smaller folder, and a bad budget in a line."""

import json

import pytest
from block_causals import toy_llada2
from toys import one_thread  # noqa: F401

import sinkprune as sp
from sinkprune.commands.main import main

FEW = ["--calibration-windows", "2", "--calibration-length", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy LLaDA2 that speaks with tiny's tokenizer."""
    _, tokenizer = sp.load("tiny")
    words = len(tokenizer)
    model = toy_llada2(vocab_size=words + 1, mask_token_id=words, pad_token_id=tokenizer.pad_token_id or 0)
    return sp.save(model, tmp_path_factory.mktemp("made") / "dense", tokenizer=tokenizer)


def test_plan_and_apply_of_experts(folder, tmp_path, capsys):
    out = tmp_path / "plan.json"
    asked = ["--targets", "experts", "--unit", "experts", "--ratio", "0.3", "--expert-rule", "reconstruction"]
    assert main(["plan", str(folder), *asked, *FEW, "--out", str(out), "--quiet", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["experts_removed"] == 8
    assert said["plan"]["criterion"] == "reconstruction"
    assert (
        main(["apply", str(folder), "--plan", str(out), *FEW, "--out", str(tmp_path / "m"), "--quiet"]) == 0
    )
    model, _ = sp.load(tmp_path / "m")
    assert [len(layer.mlp.experts) for layer in model.layers[1:]] == [8, 8]


def test_too_many_experts_are_refused_in_a_line(folder, tmp_path, capsys):
    asked = ["--targets", "experts", "--unit", "experts", "--ratio", "0.6", *FEW]
    assert main(["plan", str(folder), *asked, "--out", str(tmp_path / "p"), "--quiet"]) == 2
    line = capsys.readouterr().err.strip()
    assert "at most 0.333 of the experts" in line
    assert "\n" not in line
