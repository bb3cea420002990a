"""``sinkprune sparsify`` on the embedded model."""

import json

import pytest

import sinkprune as sp
from sinkprune.commands.main import main
from sinkprune.pruning.sparsification import sparsity_of

SMALL = ["--sequences", "1", "--length", "64", "--quiet"]

COMMAND = ["sparsify", "tiny", "--method", "sink_wanda"]


def test_the_command_writes_a_checkpoint_that_loads_sparse(tmp_path, capsys):
    out = tmp_path / "sparse"
    assert main([*COMMAND, "--pattern", "2:4", "--out", str(out), "--json", *SMALL]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["method"], result["sparsity"], result["pattern"]) == ("sink_wanda", 0.5, "2:4")
    model, tokenizer = sp.load(out)
    assert set(sparsity_of(model).values()) == {0.5}
    assert model.sparsity.pattern == "2:4"
    assert tokenizer is not None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sparsity", "1.5"], "sparsity must lie in (0, 1), got 1.5"),
        (["--sparsity", "0.3", "--pattern", "2:4"], "pattern 2:4 is a sparsity of 0.5, got 0.3"),
        (["--method", "wander"], "method must be one of magnitude, wanda"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--method", "sparsegpt", "--sequences", "1", "--length", "16"], "at least 512 calibration tokens"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    assert main(["sparsify", "tiny", "--out", str(tmp_path / "sparse"), *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_refused_before_the_work(tmp_path, capsys):
    assert main(["sparsify", "no such model", "--out", str(tmp_path), *SMALL]) == 2
    assert "exists; choose another path" in capsys.readouterr().err
