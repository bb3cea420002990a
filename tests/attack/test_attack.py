"""A slice of every attack finds nothing, and what they look for would be noticed."""

import time
from types import SimpleNamespace

import attack
import bad_inputs
import cases
import kills
import pytest
from forked import attempt

import sinkprune as sp


@pytest.mark.parametrize("part", attack.PARTS)
def test_a_slice_of_every_attack_finds_nothing(part):
    done, faults = attack.PARTS[part][0](True)
    assert done and faults == []


def test_there_are_enough_bad_inputs_and_controls_among_them(tmp_path):
    found = list(bad_inputs.cases(cases.Bases(tmp_path)))
    assert len({case.name for case in found}) == len(found)
    assert sum(case.expected == "refused" for case in found) >= 600
    assert sum(case.expected == "accepted" for case in found) >= 10


def fail():
    raise KeyError("bug")


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda: None, "accepted"),
        (lambda: sp.load("nowhere"), "refused"),
        (fail, "traceback"),
        (lambda: exec("raise ValueError('two\\nlines')"), "unclear"),
        (lambda: __import__("os").kill(__import__("os").getpid(), 9), "death"),
        (lambda: __import__("time").sleep(9), "endless"),
    ],
    ids=["accepted", "refused", "traceback", "unclear", "death", "endless"],
)
def test_what_becomes_of_an_input_is_told_apart(act, kind):
    assert attempt(act, seconds=1.0).kind == kind


def test_a_writer_that_is_not_atomic_would_be_noticed(tmp_path):
    def torn(version, path):
        path.mkdir(exist_ok=True)
        for name in "ab":
            (path / name).write_text(str(version))
            time.sleep(0.05)

    def read(path):
        return [(path / name).read_text() for name in "ab"]

    verbs = SimpleNamespace(writers={"torn": torn}, readers={"torn": read})
    _, faults = kills.attack(tmp_path, 6, verbs=verbs)
    assert any("torn, killed" in fault for fault in faults)
