"""Flags: those without effect are refused, a missing file is said with what it should have been,
and errors of the Python interface name flags."""

import argparse
import json
import re

import pytest

import sinkprune as sp
from sinkprune.commands import flags
from sinkprune.commands.main import _parser, main

VERBS = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def said(capsys, line):
    """Run, expect exit code 2 and one line on standard error; return what it says after ``error:``."""
    capsys.readouterr()
    assert main([*line.split(), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err.split("error: ")[1].strip()


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("plan nowhere --ratio 0.2 --target-speedup 2 --out p", "--ratio"),
        ("plan nowhere --unit flops --target-latency 2 --out p", "--unit"),
        ("plan nowhere --profile pyproject.toml --out p", "--profile"),
        ("plan nowhere --criterion magnitude --profile pyproject.toml --out p", "--profile"),
        ("plan nowhere --criterion magnitude --calibration-windows 4 --out p", "--calibration-windows"),
        ("plan nowhere --criterion magnitude --calibration README.md --out p", "--calibration"),
        ("plan nowhere --channel-rule flap --out p", "--channel-rule"),
        ("plan nowhere --expert-rule reap --out p", "--expert-rule"),
        ("plan nowhere --block-rule random --out p", "--block-rule"),
        ("plan nowhere --criterion taylor --targets blocks --unit blocks --out p", "--criterion"),
        ("plan nowhere --min-heads 2 --whole-layers --out p", "--min-heads"),
        ("apply nowhere --plan README.md --repair none --calibration README.md --out p", "--calibration"),
        ("apply nowhere --plan README.md --mode mask --seed=2 --out p", "--seed"),
        ("prune nowhere --criterion magnitude --repair none --calibration-l 9 --out p",
         "--calibration-length"),
        ("profile nowhere --prompt a --prompts 3 --out p", "--prompts"),
        ("profile nowhere --prompt a --json --out -", "--json"),
        ("sparsify nowhere --method magnitude --text README.md --out p", "--text"),
        ("sparsify nowhere --method magnitude --sequences 3 --out p", "--sequences"),
        ("eval nowhere --scorer nowhere", "--scorer"),
        ("generate nowhere a --threshold 0.9 --steps 3", "--steps"),
        ("ceiling nowhere --plan README.md --roofs H100 --device cpu", "--device"),
        ("demo --expert-rule reap --out p", "--expert-rule"),
    ],
)  # fmt: skip
def test_a_flag_without_effect_is_refused_before_anything_is_read(line, flag, capsys):
    assert said(capsys, line).startswith(f"{flag} would be ignored: ")


@pytest.mark.parametrize(
    "line",
    [
        "plan nowhere --criterion sink_variance --profile pyproject.toml --out p",
        "plan nowhere --criterion magnitude --targets heads,mlp --unit flops --calibration README.md --out p",
        "plan nowhere --target-speedup 2 --latency-table H100 --out p",
        "plan nowhere --targets mlp --unit parameters --channel-rule flap --calibration-windows 2 --out p",
        "apply nowhere --plan README.md --calibration README.md --out p",
        "prune nowhere --criterion magnitude --calibration README.md --out p",
        "sparsify nowhere --method wanda --text README.md --out p",
        "eval nowhere --generation",
    ],
)
def test_a_flag_that_the_others_look_at_is_not(line, capsys):
    assert re.match(
        r"nowhere: expected 'tiny', 'small', a local folder|README.md is not JSON", said(capsys, line)
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("apply tiny --plan no.json --out p", "--plan: no such file: no.json; expected a plan"),
        ("plan tiny --criterion sink_mass --profile no --out p", "--profile: no such file: no; expected a"),
        ("report tiny tiny --profile no --out p", "--profile: no such file: no; expected a sink profile"),
        ("plan tiny --calibration no --out p", "--calibration: no such file: no; expected a UTF-8 text"),
        ("eval tiny --text no", "--text: no such file: no; expected a UTF-8 text"),
        ("sparsify tiny --text no --out p", "--text: no such file: no; expected a UTF-8 text"),
        ("profile tiny --text no --out p", "--text: no such file: no; expected a UTF-8 text"),
    ],
)  # fmt: skip
def test_a_missing_file_is_said_with_what_was_expected_of_it(line, told, capsys):
    assert said(capsys, line).startswith(told)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("generate tiny a --gen-length 0", "--gen-length must be at least 1, got 0"),
        ("generate tiny a --steps 999", "--steps must be at most --gen-length 64, got 999"),
        ("generate tiny a --block-length 5", "--block-length must divide --gen-length 64, got 5"),
        ("generate tiny a --temperature -1", "--temperature and --cfg-scale must be finite"),
        ("generate tiny a --cfg-scale nan", "--temperature and --cfg-scale must be finite"),
        ("generate tiny a --threshold 3", "--threshold must be above 0"),
        ("generate tiny a --cache no", "--cache must be None or one of"),
        ("generate tiny a --sub-block 8", "--sub-block must divide the block of 64 tokens and needs a"),
        ("plan tiny --ratio 2 --out p", "--ratio must lie in [0, 1), got 2.0"),
        ("plan tiny --unit no --out p", "--unit must be one of"),
        ("plan tiny --targets no --unit flops --criterion random --out p", "--targets must be chosen"),
        ("plan tiny --targets heads,mlp --out p", "--unit 'heads' removes heads only, got --targets"),
        ("plan tiny --allocation no --out p", "--allocation must be one of"),
        ("plan tiny --max-layer-share 2 --out p", "--max-layer-share must lie in (0, 1], got 2.0"),
        ("plan tiny --min-heads -1 --out p", "--min-heads must be at least 0, got -1"),
        ("plan tiny --round-heads 0 --out p", "--round-heads and --round-channels must be at least 1"),
        ("plan tiny --fit no --out p", "--fit must be one of llama.cpp"),
        ("plan tiny --criterion sink_mass --out p", "criterion 'sink_mass' needs --profile FILE, which"),
        ("plan tiny --target-speedup 2 --out p", "a target needs --latency-table: a file, measure, A100"),
        ("plan tiny --target-speedup 2 --target-latency 2 --latency-table H100 --out p",
         "pass either --target-speedup or --target-latency"),
        ("plan tiny --length 513 --out p", "--length must be 1 to 512, the model's context; got 513"),
        ("plan tiny --calibration-windows 0 --out p", "--calibration-windows must be at least 1, got 0"),
        ("plan tiny --mask-token-id -3 --out p", "the mask token must be one of the vocabulary's"),
        ("prune tiny --repair no --out p", "--repair must be one of"),
        ("sparsify tiny --sparsity 2 --out p", "--sparsity must lie in (0, 1), got 2.0"),
        ("sparsify tiny --pattern 1:3 --out p", "--pattern must be 'unstructured', '2:4' or '4:8'"),
        ("sparsify tiny --method no --out p", "--method must be one of"),
        ("eval tiny --windows 0", "--windows, --length, draws and batch must be at least 1"),
        ("eval tiny --levels 2", "--levels and --highest-noise must lie in (0, 1]"),
        ("memory tiny --batch 0", "--batch must be at least 1, got 0"),
        ("export tiny --dtype f16 --out p", "--dtype is of GGUF files; a folder keeps the model's"),
    ],
)  # fmt: skip
def test_errors_name_flags_and_not_arguments(line, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(capsys, line).startswith(told)
    assert not list(tmp_path.iterdir())


def test_no_flags_python_name_is_left_in_any_translated_sentence():
    """Whatever verb, each of its flags as a sentence's subject, and given as an argument."""
    for verb, parser in VERBS.items():
        spelt = {a.dest: a.option_strings[-1] for a in parser._actions if a.option_strings}
        options = argparse.Namespace(command=verb, spelt=spelt)
        for dest, flag in spelt.items():
            assert flags.in_flags(f"{dest} must be 1", options) == f"{flag} must be 1"
            assert flags.in_flags(f"got {dest}=3 of 'x'", options) == f"got {flag} 3 of 'x'"
            kept = f"/tmp/{dest}/a.json is no file; it holds '{dest}'"
            assert flags.in_flags(kept, options) == kept


def test_the_plans_ceiling_is_for_a_length_that_the_model_has(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", "tiny", "--criterion", "magnitude", "--out", str(out), "--json"]) == 0
    ceilings = json.loads(capsys.readouterr().out)["ceilings"]
    model, _ = sp.load("tiny")
    assert ceilings["length"] == sp.adapter_for(model).geometry().context == 512
    plan = sp.PrunePlan.load(out)
    assert ceilings["arithmetic"] == pytest.approx(sp.ceiling(model, plan, batch=1, length=512))


def test_a_scorer_is_looked_at_first_and_must_be_causal(tmp_path, capsys):
    assert said(capsys, "eval nowhere --generation --scorer tiny").startswith(
        "--scorer tiny: expected a causal language model; this one sees later tokens"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mystery"}))
    told = said(capsys, f"eval nowhere --generation --scorer {tmp_path}")
    assert told.startswith(f"--scorer {tmp_path}: expected a causal language model: ")


def test_a_causal_scorer_judges(tmp_path, capsys):
    """One of transformers' own, saved as anybody saves it, with tiny's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = sp.load("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 8, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    small = ["--windows", "2", "--length", "16", "--levels", "0.5", "--json", "--quiet"]
    assert main(["eval", "tiny", "--generation", "--scorer", str(tmp_path), *small]) == 0
    assert (
        json.loads(capsys.readouterr().out)["generation"]["measures"]["continuation_perplexity"]["mean"] > 1
    )
