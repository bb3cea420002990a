"""The example under every verb's ``--help`` runs as it is printed, on the embedded model and little text."""

import argparse
import shlex
import shutil

import pytest

import sinkprune as sp
from sinkprune.commands.main import _parser, main
from sinkprune.evaluation import report

VERBS = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
FEW = ["--calibration-windows", "4", "--calibration-length", "32"]
SMALLER = {  # added to what is printed, so that all take a quarter of a minute instead of two
    "demo": ["--prompts", "1", "--steps", "8", "--gen-length", "16", *FEW],
    "prune": FEW,
    "plan": FEW,
    "apply": FEW,
    "sparsify": ["--sequences", "1", "--length", "32"],
    "eval": ["--windows", "2", "--length", "16"],
    "profile": ["--steps", "8", "--gen-length", "16"],
    "generate": ["--steps", "8", "--gen-length", "16"],
}


def examples():
    for verb, parser in VERBS.items():
        for line in parser.epilog.removeprefix("example: ").split("; "):
            yield pytest.param(verb, line, id=line)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What examples read that other verbs wrote."""
    folder = tmp_path_factory.mktemp("made")
    model, tokenizer = sp.load("tiny")
    sp.profile(model, ["a"], tokenizer=tokenizer, steps=4, gen_length=8).save(folder / "profile.safetensors")
    plan = sp.plan(model, criterion="magnitude")
    plan.save(folder / "plan.json")
    sp.save(sp.apply(model, plan), folder / "pruned", tokenizer=tokenizer)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("verb", "line"), list(examples()))
def test_the_example_runs(verb, line, made, tmp_path, monkeypatch, capsys):
    for name, value in {"WINDOWS": 4, "ROUNDS": 2, "STEPS": 8, "NEW_TOKENS": 32}.items():
        monkeypatch.setattr(report, name, value)
    words = shlex.split(line)
    assert words[:2] == ["sinkprune", verb]
    written = words[words.index("--out") + 1].rstrip("/") if "--out" in words else None
    for path in made.iterdir():
        if path.name != written:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    code = main([*words[1:], *SMALLER.get(verb, []), "--quiet"])
    said = capsys.readouterr()
    if verb == "tune":  # of a GPU
        assert code == 0 or "this machine has 0 CUDA devices" in said.err
    else:
        assert code == 0, said.err
        assert said.out and (written is None or (tmp_path / written).exists())


def test_every_verb_has_an_example():
    assert all(parser.epilog.startswith("example: sinkprune ") for parser in VERBS.values())
