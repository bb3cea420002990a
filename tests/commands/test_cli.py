"""The command line on the embedded model: every verb works; bad input gets one clear line and exit code 2."""

import json
import runpy
import subprocess
import sys

import pytest

import sinkprune as sp
from sinkprune.checkpoints.checkpoint import asset, texts
from sinkprune.commands import arguments as shared
from sinkprune.commands.arguments import prompts_from
from sinkprune.commands.main import main
from sinkprune.evaluation import report
from sinkprune.planning import planner as planning

PROMISED = [
    "model.parameters",
    "profile.steps",
    "profile.heads_moving_over_3",
    "plan.criterion",
    "plan.parameters_removed",
    "quality.dense.nll",
    "quality.pruned.nll",
    "speed.dense_ms_per_step",
    "speed.pruned_ms_per_step",
    "speed.ratio",
    "speed.ceiling",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A profile, a plan and a pruned checkpoint of "tiny", made by the commands themselves."""
    folder = tmp_path_factory.mktemp("made")
    prompt = ["--prompt", "My fellow citizens"]
    short = ["--steps", "4", "--gen-length", "8"]
    run("profile", "tiny", *prompt, *short, "--out", folder / "profile.safetensors")
    few = ["--calibration-windows", 2, "--calibration-length", 32]
    run("plan", "tiny", *few, "--out", folder / "plan.json")
    run("apply", "tiny", "--plan", folder / "plan.json", *few, "--out", folder / "pruned")
    return folder


@pytest.fixture
def short_report(monkeypatch):
    """What a report measures, on little text and in few rounds."""
    for name, value in {"WINDOWS": 4, "ROUNDS": 5, "STEPS": 16, "NEW_TOKENS": 32}.items():
        monkeypatch.setattr(report, name, value)


def run(*arguments):
    assert main([*map(str, arguments), "--quiet"]) == 0


def refused(capsys, *arguments):
    """Run, expect exit code 2 and exactly one line on standard error; return it."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    return captured.err


def test_profile_plan_apply_generate_eval(made, capsys):
    plan = sp.PrunePlan.load(made / "plan.json")
    assert plan.heads_removed == round(0.38 * sum(plan.geometry.heads))
    capsys.readouterr()
    run("generate", made / "pruned", "The Congress", "--steps", "4", "--gen-length", "8", "--json")
    result = json.loads(capsys.readouterr().out)
    model, tokenizer = sp.load(made / "pruned")
    assert result["text"] == sp.generate(model, tokenizer, "The Congress", steps=4, gen_length=8)
    run("eval", made / "pruned", "--windows", "2", "--length", "32", "--json")
    result = json.loads(capsys.readouterr().out)
    text = texts("held_out")
    assert result["nll"] == sp.evaluate(model, text, tokenizer=tokenizer, windows=2, length=32).nll


def test_eval_against_another_model_pairs_text_and_what_is_written(made, capsys):
    capsys.readouterr()
    short = ["--windows", "3", "--length", "16", "--levels", "0.3,0.5", "--highest-noise", "0.5"]
    run("eval", made / "pruned", "--against", "tiny", *short, "--generation", "--json")
    result = json.loads(capsys.readouterr().out)
    text = texts("held_out")
    options = {"windows": 3, "length": 16, "levels": (0.3, 0.5), "highest_noise": 0.5}
    pruned, dense = (sp.load(name) for name in (made / "pruned", "tiny"))
    qualities = [sp.evaluate(m, text, tokenizer=t, **options) for m, t in (pruned, dense)]
    assert result["against"]["nll"] == qualities[1].nll
    assert result["difference"]["nll"] == qualities[0].interval(qualities[1])._asdict()
    assert result["difference"]["t=0.3"] == qualities[0].interval(qualities[1], 0.3)._asdict()
    sizes = {"windows": 3, "prompt_length": 8, "gen_length": 8}
    written = [sp.evaluate_generation(m, t, text, **sizes) for m, t in (pruned, dense)]
    assert result["generation"]["measures"] == written[0].summary()
    assert result["generation"]["difference"]["infilling_accuracy"]["mean"] == pytest.approx(
        written[0].minus(written[1])["infilling_accuracy"].mean
    )
    assert result["generation"]["likeness"].keys() == written[0].likeness(written[1]).keys()
    run("eval", made / "pruned", "--against", "tiny", *short)
    assert "against tiny (95 % intervals):" in capsys.readouterr().out


def test_report_is_self_contained_and_says_what_the_files_say(made, tmp_path, capsys, short_report):
    capsys.readouterr()
    profile = made / "profile.safetensors"
    run("report", "tiny", made / "pruned", "--profile", profile, "--out", tmp_path / "r", "--json")
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "r" / "report.json").read_text())
    assert printed == written
    html = (tmp_path / "r" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2
    assert "http" not in html.replace("arXiv", "")
    assert f"{written['quality']['pruned']['nll']:.3f}" in html
    assert written["model"]["parameters"] == sum(p.numel() for p in sp.load("tiny")[0].parameters())
    kept = sum(map(len, written["plan"]["kept_heads"]))
    assert kept == written["model"]["total_heads"] - written["plan"]["heads_removed"]
    assert 1 < written["speed"]["ceiling"] < 2
    assert written["memory"]["pruned_bytes"] < written["memory"]["dense_bytes"]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("arguments", [["--criterion", "magnitud"], ["--ratio", "2"]], ids=" ".join)
def test_demo_refuses_before_the_long_work_and_makes_no_folder(tmp_path, capsys, arguments):
    assert main(["demo", "--out", str(tmp_path / "d"), *arguments]) == 2
    assert "loading" not in capsys.readouterr().err and not (tmp_path / "d").exists()


def test_demo_writes_what_it_promises(tmp_path, capsys, short_report):
    run("demo", "--out", tmp_path / "d", "--prompts", "2", "--steps", "8", "--gen-length", "16")
    written = json.loads((tmp_path / "d" / "report.json").read_text())
    for path in PROMISED:
        value = written
        for key in path.split("."):
            value = value[key]
        assert value is not None
    assert written["profile"]["steps"] == 8
    for name in ("report.html", "heads.png", "positions.png", "profile.safetensors", "plan.json"):
        assert (tmp_path / "d" / name).stat().st_size > 0


def test_doctor_names_versions_and_backends(capsys):
    run("doctor", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["sinkprune"] == sp.__version__
    attention = facts["backends"]["attention"]
    assert attention["auto"] == "runs" and attention[attention["auto takes"]] == "runs"
    assert facts["backends"]["repack"]["takes"] == "native" or facts["backends"]["repack"]["takes"].count(
        ": "
    )
    assert "available" in facts["native"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "no/such/folder", "hello"], "expected 'tiny', 'small', a local folder with"),
        (["generate", "tiny", ""], "a prompt must have at least one token"),
        (["generate", "tiny", "word " * 600], "exceed the context of 512"),
        (["generate", "tiny", "a", "--steps", "200"], "at most --gen-length 64, got 200"),
        (["plan", "tiny", "--out", "/no/such/folder/plan.json"], "not a folder that can be written"),
        (["plan", "tiny", "--criterion", "magnitud", "--out", "plan.json"], "did you mean 'magnitude'"),
        (["plan", "tiny", "--ratio", "1.5", "--out", "plan.json"], "in [0, 1), got 1.5"),
        (["plan", "tiny", "--criterion", "sink_variance", "--out", "plan.json"], "needs --profile FILE"),
        (["plan", "tiny", "--profile", "missing", "--out", "plan.json"], "expected a sink profile, which"),
        (["profile", "tiny", "--out", "p.safetensors"], "at least one --prompt"),
        (["profile", "tiny", "--prompt", "a", "--out", "/proc/nope/p"], "not a folder that can be written"),
        (["demo", "--out", "/proc/nope"], "/proc/nope"),
        (["eval", "tiny", "--text", "missing.txt"], "missing.txt"),
        (["eval", "tiny", "--levels", "a half"], "expected numbers between commas, got 'a half'"),
        (["eval", "tiny", "--levels", "1.5"], "must lie in (0, 1], got (1.5,)"),
        (["tune", "tiny", "--length", "64"], "there is no CUDA device"),
        (["generate", "tiny", "a", "--temperature", "nan"], "must be finite"),
        (["generate", "tiny", "a", "--steps", "0"], "positive integer, got 0"),
        (["generate", "tiny", "a", "--device", "tpu"], "must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_plan_or_profile_of_another_model_is_refused(made, tmp_path, capsys):
    plan = json.loads((made / "plan.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(plan | {"fingerprint": "0" * 64}))
    line = refused(capsys, "apply", "tiny", "--plan", tmp_path / "other.json", "--out", tmp_path / "x")
    assert "other weights" in line and not (tmp_path / "x").exists()
    plan["geometry"]["heads"] = [4] * 6
    (tmp_path / "other.json").write_text(json.dumps(plan))
    refused(capsys, "apply", "tiny", "--plan", tmp_path / "other.json", "--out", tmp_path / "x")
    (tmp_path / "other.json").write_text("{")
    assert "is not JSON" in refused(capsys, "apply", "tiny", "--plan", tmp_path / "other.json", "--out", "x")
    already = refused(capsys, "apply", made / "pruned", "--plan", made / "plan.json", "--out", tmp_path / "x")
    assert "already pruned" in already
    line = refused(capsys, "apply", "tiny", "--plan", made / "profile.safetensors", "--out", tmp_path / "x")
    assert "is not JSON" in line
    pruned = made / "pruned"
    files = ["--profile", made / "profile.safetensors", "--out", tmp_path / "r"]
    assert "already pruned" in refused(capsys, "report", pruned, pruned, *files)
    run("doctor", pruned, "--json")
    assert json.loads(capsys.readouterr().out)["heads_removed"] == 18
    (tmp_path / "p").write_bytes((made / "profile.safetensors").read_bytes()[:1000])
    by = ["--criterion", "sink_variance", "--profile", tmp_path / "p"]
    line = refused(capsys, "plan", "tiny", *by, "--out", tmp_path / "plan.json")
    assert "is not a sink profile" in line


def test_a_checkpoint_is_not_overwritten_unasked(made, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    arguments = ["apply", "tiny", "--plan", made / "plan.json", "--out", tmp_path / "mine"]
    assert "exists" in refused(capsys, *arguments)
    assert "choose another path" in refused(capsys, *arguments, "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_prompts_are_spread_over_the_text():
    _, tokenizer = sp.load("tiny")
    text = " ".join(f"sentence number {i} of many." for i in range(200))
    prompts = prompts_from(text, tokenizer, count=4, tokens=8)
    assert len(set(prompts)) == 4
    assert text.startswith(prompts[0])
    with pytest.raises(ValueError, match="got"):
        prompts_from("short", tokenizer, count=4)


def test_doctor_says_what_a_model_was_recognised_as(tmp_path, capsys):
    run("doctor", "tiny", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["layers"], facts["heads"]) == ("llada", 6, [8])
    assert facts["compact_form"] == "possible"
    config = json.loads((asset("tiny") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_layer_norm": True}))
    run("doctor", tmp_path, "--json")
    assert "mixes the heads" in json.loads(capsys.readouterr().out)["compact_form"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mystery"}))
    run("doctor", tmp_path, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "unknown" and "mystery" in facts["refused"]


@pytest.mark.parametrize("address", ["sinkprune", "sinkprune.cli"])
def test_the_command_line_runs_as_a_module(address, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [address, "generate", "tiny", "The Congress", "--gen-length", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(address, run_name="__main__")
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "sinkprune generate: error: --gen-length must be at least 1, got 0"


def test_the_given_mask_token_is_what_is_written_over(capsys):
    """By a verb that writes and by one that reads; an id outside the vocabulary is one line."""
    model, tokenizer = sp.load("tiny")
    sizes = {"gen_length": 8, "steps": 4}
    arguments = ["generate", "tiny", "The Congress", "--gen-length", "8", "--steps", "4", "--json"]
    for given in (model.config.mask_token_id, 5):
        run(*arguments, "--mask-token-id", given)
        text = sp.generate(model, tokenizer, "The Congress", mask_token_id=given, **sizes)
        assert json.loads(capsys.readouterr().out)["text"] == text
    size = sp.adapter_for(model).geometry().vocabulary
    assert f"one of the vocabulary's {size} ids" in refused(capsys, *arguments, "--mask-token-id", size)


def test_help_is_light():
    probe = """
import sys
from sinkprune.commands.main import main
try:
    main(["--help"])
except SystemExit:
    print(sorted({"torch", "numpy", "transformers", "tqdm"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True
    )
    assert "demo" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_parsers_default_criterion_is_the_plans():
    assert shared.DEFAULT_CRITERION == planning.DEFAULT_CRITERION
