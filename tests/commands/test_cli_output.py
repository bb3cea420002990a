"""What the command line prints: help and version without a command, JSON that any parser reads, and a quiet
end where standard output can't take it."""

import json
import os
import subprocess
import sys

import pytest

import sinkprune as sp
from sinkprune.commands import machine
from sinkprune.commands.main import main

CALL = [sys.executable, "-m", "sinkprune"]


def test_bare_call_helps_and_version_is_the_packages(capsys):
    assert main([]) == 0
    helped = capsys.readouterr().out
    assert all(verb in helped for verb in ("demo", "plan", "apply", "doctor", "--version"))
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"sinkprune {sp.__version__}"


def test_json_has_null_where_a_value_is_not_finite(monkeypatch, capsys):
    facts = {"nan": float("nan"), "in": [{"inf": float("inf")}, (float("-inf"), 1.5)], "n": 3, "s": "NaN"}
    monkeypatch.setattr(machine, "_doctor", lambda options: (facts, ""))
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    read = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read == {"nan": None, "in": [{"inf": None}, [None, 1.5]], "n": 3, "s": "NaN"}


def test_a_file_that_is_there_is_replaced_only_when_asked(tmp_path, capsys):
    out = tmp_path / "plan.json"
    plan = ["plan", "tiny", "--criterion", "magnitude", "--out", str(out), "--quiet"]
    assert main(plan) == 0
    first = out.read_text()
    assert main([*plan, "--ratio", "0.2"]) == 2 and out.read_text() == first
    assert f"{out} exists; choose another path, or --overwrite it" in capsys.readouterr().err
    assert main([*plan, "--ratio", "0.2", "--overwrite"]) == 0 and out.read_text() != first


def test_a_dash_is_standard_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "tiny", "--criterion", "magnitude", "--out", "-", "--quiet"]) == 0
    plan = sp.PrunePlan.from_dict(json.loads(capsys.readouterr().out))
    assert plan.layers == sp.plan(sp.load("tiny")[0], criterion="magnitude").layers
    assert not list(tmp_path.iterdir())


def test_closed_pipe_ends_quietly_with_141():
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(CALL, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_is_one_line_and_2():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(CALL, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "sinkprune: error: standard output: No space left on device\n"


def test_ascii_terminal_takes_every_character():
    code = (
        "import sys; from sinkprune.commands import machine, main;"
        "machine._doctor = lambda options: ({}, '0.1 \\xb1 0.2');"
        "sys.exit(main.main(['doctor']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=False, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0.1 \\xb1 0.2\n", "")
