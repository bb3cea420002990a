"""Long verbs show how much time is left on a terminal, nothing where there is none or under ``--quiet``."""

import io
import re
import sys

import pytest

import sinkprune as sp
from sinkprune.commands.main import main

FEW = ["--calibration-windows", "4", "--calibration-length", "32"]
LEFT = r"{what}: +100%\|.*?\| (\d+)/\1 \[\d\d:\d\d<\d\d:\d\d"
SMALL = ["--windows", "2", "--length", "16", "--levels", "0.5"]
VERBS = {
    "profile": (["profile", "tiny", "--prompt", "a", "--steps", "4", "--gen-length", "8"], ["profiling"]),
    "plan": (["plan", "tiny", *FEW], ["watching"]),
    "plan by ablation": (["plan", "tiny", "--criterion", "ablation", "--calibration-windows", "1",
                          "--calibration-length", "8"], ["planning"]),
    "plan of blocks": (["plan", "tiny", "--targets", "blocks", "--unit", "blocks", *FEW], ["planning"]),
    "apply": (["apply", "tiny", "--plan", "{plan}", *FEW], ["repairing"]),
    "prune": (["prune", "tiny", *FEW], ["watching", "repairing"]),
    "sparsify": (["sparsify", "tiny", "--method", "wanda", "--sequences", "1", "--length", "32"],
                 ["pruning weights"]),
    "eval": (["eval", "tiny", "--generation", *SMALL], ["evaluating", "generating"]),
    "generate": (["generate", "tiny", "a", "--gen-length", "8"], ["generating"]),
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    model, _ = sp.load("tiny")
    file = tmp_path_factory.mktemp("made") / "plan.json"
    sp.plan(model, criterion="magnitude").save(file)
    return str(file)


def words(verb, plan, folder):
    arguments = [word.format(plan=plan) for word in VERBS[verb][0]]
    return arguments if verb in ("eval", "generate") else [*arguments, "--out", str(folder / "out")]


@pytest.mark.parametrize("verb", VERBS)
def test_a_terminal_sees_the_time_left(verb, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(words(verb, plan, tmp_path)) == 0
    for what in VERBS[verb][1]:
        assert re.search(LEFT.format(what=what), sys.stderr.getvalue()), (what, sys.stderr.getvalue())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["no terminal", "--quiet"])
@pytest.mark.parametrize("verb", ["prune", "eval", "profile"])
def test_no_bar_without_one_or_when_quiet(verb, where, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal() if where == "--quiet" else io.StringIO())
    assert main([*words(verb, plan, tmp_path), *(["--quiet"] if where == "--quiet" else [])]) == 0
    said = sys.stderr.getvalue()
    assert "%|" not in said and "\r" not in said
    assert not said or where == "no terminal"


def test_transformers_own_bars_are_off_meanwhile_and_as_they_were_after(tmp_path, monkeypatch):
    from transformers.utils import logging

    from sinkprune.commands import machine

    seen = []
    monkeypatch.setattr(
        machine, "_doctor", lambda options: (seen.append(logging.is_progress_bar_enabled()), "")
    )
    before = logging.is_progress_bar_enabled()
    for stderr, expected in ((io.StringIO(), False), (Terminal(), before)):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert main(["doctor"]) == 0
        assert seen.pop() is expected and logging.is_progress_bar_enabled() is before
