"""Asking whether a device runs the specialised attention: who asks, what is remembered, what is found."""

from __future__ import annotations

import os
import subprocess
import warnings
from types import SimpleNamespace

import pytest
import torch

from sinkprune.kernels import agreement, launch, probe
from sinkprune.kernels import attention as attention_module
from sinkprune.kernels.launch import Tile


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A device of the sm_90 family; returns what child processes were started, and sets what they answer."""
    asked = SimpleNamespace(times=0, code=0, said="", raises=None)

    def run(command, **options):
        asked.times += 1
        assert command[1:] == ["-m", "sinkprune.kernels.agreement", "0"]
        assert "TRITON_INTERPRET" not in options["env"]
        if asked.raises:
            raise asked.raises
        return subprocess.CompletedProcess(command, asked.code, asked.said, "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "_device_family", lambda index: (launch.family("sm_90"), 132))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="Some H100"))
    monkeypatch.setattr(probe.subprocess, "run", run)
    probe._works_on.cache_clear()
    yield asked
    probe._works_on.cache_clear()


def works() -> bool:
    probe._works_on.cache_clear()
    return probe.specialised_works(torch.device("cuda", 0))


def test_an_agreement_is_asked_for_once_and_remembered(hopper):
    assert works() and works() and hopper.times == 1


def test_a_disagreement_is_said_once_and_remembered(hopper):
    hopper.code, hopper.said = probe.DIFFERS, "head 64: the output is off by 1.0e+00"
    with pytest.warns(UserWarning, match=r"keeps to its plain form on Some H100: head 64: the output is off"):
        assert not works()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not works()
    assert hopper.times == 1


@pytest.mark.parametrize(
    ("code", "raises", "match"),
    [(-6, None, "code -6"), (0, subprocess.TimeoutExpired("python", 300), "did not end in 300 s")],
    ids=["crash", "hang"],
)
def test_a_crash_and_a_hang_speak_against_it(code, raises, match, hopper):
    hopper.code, hopper.raises = code, raises
    with pytest.warns(UserWarning, match=match):
        assert not works()
    hopper.raises = None
    assert not works() and hopper.times == 1


@pytest.mark.parametrize("raises", [None, OSError("no more processes")], ids=["busy device", "no process"])
def test_what_could_not_be_asked_is_asked_again(raises, hopper):
    hopper.code, hopper.raises = probe.CANNOT_ASK, raises
    assert not works()
    hopper.code, hopper.raises = 0, None
    assert works() and hopper.times == 2


def test_another_text_of_the_kernel_is_another_question(hopper, monkeypatch):
    assert works()
    monkeypatch.setattr(probe, "_key", lambda: "another triton")
    assert works() and hopper.times == 2


def test_a_broken_file_and_a_folder_that_cannot_be_written_cost_a_question(hopper, tmp_path):
    path = probe.answers_path("Some H100")
    path.parent.mkdir(parents=True)
    path.write_text("[not json")
    assert works() and hopper.times == 1
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file where the folder should be")
    assert works() and hopper.times == 2


def test_a_cpu_and_a_family_without_such_tiles_are_never_asked(hopper, monkeypatch):
    assert not probe.specialised_works(torch.device("cpu"))
    monkeypatch.setattr(launch, "_device_family", lambda index: (launch.family("sm_80"), 108))
    assert not works() and hopper.times == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_child_says_that_there_is_no_device():
    assert probe.ask(0) is None
    assert agreement.main(0) == probe.CANNOT_ASK


SMALL = {"batch": 1, "heads": 2, "length": 20}


@pytest.fixture
def small_tiles(monkeypatch):
    known = launch.family("sm_90")
    plain, specialised = Tile(32, 32, 4, 2), Tile(32, 32, 4, 2, specialised=True)
    tiles = {
        "attention": {"16": {"64": [plain], "128": [plain]}},
        "attention_specialised": {"16": {"64": [specialised], "128": [specialised]}},
    }
    small = launch.Family(known.name, known.multiprocessors, known.shared_bytes, tiles)
    monkeypatch.setattr(launch, "device_family", lambda device: (small, 1))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU the probe itself does it")
def test_it_finds_agreement_in_the_interpreter(small_tiles):
    assert agreement.disagreement(torch.device("cpu"), **SMALL) == ""


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="plants faults in the interpreter")
@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (lambda out, lse, count: out.mul_(1.02), "output is off"),
        (lambda out, lse, count: lse.add_(0.01), "lse is off"),
        (lambda out, lse, count: out[:, :, -1].fill_(float("nan")), "output is off by inf"),
        (lambda out, lse, count: out.add_(count * 1e-3), "changes from run to run"),
    ],
    ids=["scale", "lse", "nan", "race"],
)
def test_it_finds_planted_faults(fault, match, small_tiles, monkeypatch):
    attend, count = attention_module.attention_specialised.attend, iter(range(100))

    def broken(q, k, v, out, lse, **options):
        attend(q, k, v, out, lse, **options)
        fault(out, lse, next(count))

    monkeypatch.setattr(attention_module.attention_specialised, "attend", broken)
    assert match in agreement.disagreement(torch.device("cpu"), **SMALL)
