"""Whole blocks on the command line: a plan of them, the shorter model, and a bad budget in a line."""

import io
import json

import matplotlib.image
from toys import one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.commands.main import main
from sinkprune.evaluation.report import heads_figure
from sinkprune.plans import LayerPlan

FEW = ["--calibration-windows", "2", "--calibration-length", "16"]


def test_plan_and_apply_of_blocks(tmp_path, capsys):
    out = tmp_path / "plan.json"
    asked = ["--targets", "blocks", "--unit", "blocks", "--ratio", "0.25"]
    assert main(["plan", "tiny", *asked, *FEW, "--out", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    gone = sp.PrunePlan.load(out).details["blocks"]["removed"]
    assert f"all of blocks {', '.join(map(str, gone))}, by influence; mean depth" in said
    assert main(["apply", "tiny", "--plan", str(out), *FEW, "--out", str(tmp_path / "m"), "--quiet"]) == 0
    model, _ = sp.load(tmp_path / "m")
    empty = [i for i, kept in enumerate(model.prune_plan.layers) if kept == LayerPlan([], [])]
    assert empty == gone and len(gone) == round(len(model.prune_plan.layers) / 4)


def test_all_blocks_are_refused_in_a_line(tmp_path, capsys):
    asked = ["--targets", "blocks", "--unit", "blocks", "--ratio", "0.99", "--block-rule", "random"]
    assert main(["plan", "tiny", *asked, "--out", str(tmp_path / "p"), "--quiet", "--json"]) == 2
    line = capsys.readouterr().err.strip()
    layers = sp.adapter_for(sp.load("tiny")[0]).geometry().num_layers
    most = int(1000 * (layers - 1) / layers) / 1000
    said = json.loads(line)["error"] if line.startswith("{") else line
    assert f"at most {most:.3f} of the blocks" in str(said) and "\n" not in line


def test_the_reports_picture_shows_blocks_that_are_gone_in_the_colour_of_what_is_removed():
    model = toy()
    profile = sp.profile(model, tokens(1, 4), steps=2, gen_length=4)
    plan = sp.plan(model, ratio=0, criterion="magnitude")
    whole, dark = heads_figure(plan, profile), []
    plan.layers = [LayerPlan([], []) if i == 1 else kept for i, kept in enumerate(plan.layers)]
    for png in (whole, heads_figure(plan, profile)):
        pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
        dark.append((abs(pixels - [11 / 255, 110 / 255, 110 / 255]).max(-1) < 0.02).sum())
    assert 0.4 < dark[1] / dark[0] < 0.85  # two of three layers, less the room of the MLPs' column
