"""Folders that transformers loads in a process of its own, without this package, with the same logits."""

import subprocess
import sys

import pytest
import torch
from exports import EQUAL, MODELS, NARROW, RAGGED, SOME, made, raw_logits
from hf import build
from toys import assert_same_tensors, manual_plan, one_thread, tokens  # noqa: F401

import sinkprune as sp

# family, heads, channels
CASES = {
    "llada, equal": ("llada", EQUAL, NARROW),
    "llada, ragged": ("llada", [[0], [2, 3], [0, 1, 3]], SOME),
    "llada, the first without heads": ("llada", [[], [2, 3], [0, 1, 3]], SOME),
    "llada, tied": ("llada, tied", [[0], [2, 3], [0, 1, 3]], SOME),
    "llada, its own biases": ("llada, biases", [[0], [2, 3], []], SOME),
    "llada, groups": ("llada, groups", RAGGED, SOME),
    "dream, equal": ("dream", EQUAL, NARROW),
    "dream, ragged": ("dream", RAGGED, SOME),
    "illada, equal": ("illada", EQUAL, NARROW),
    "illada, ragged": ("illada", RAGGED, SOME),
    "sdar, equal": ("sdar", EQUAL, NARROW),
    "sdar, ragged": ("sdar", RAGGED, SOME),
    "sdar, tied": ("sdar, tied", RAGGED, SOME),
    "llama, equal": ("llama", EQUAL, NARROW),
    "llama, ragged": ("llama", RAGGED, SOME),
    "qwen3, equal": ("qwen3", EQUAL, NARROW),
    "qwen3, ragged": ("qwen3", RAGGED, SOME),
    "rnd1": ("rnd1", EQUAL, None),
}
LOADER = """
import pathlib, sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])
ids, valid = torch.load(root / "ids.pt")
positions = (valid.cumsum(1) - 1).clamp(min=0)
for folder in sorted(root.glob("*/")):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        plain = model(ids).logits
        padded = model(ids, attention_mask=valid, position_ids=positions).logits
        first = model(ids[:, :8], use_cache=True)  # two whole blocks, then the third on their keys
        rest = model(ids[:, 8:], past_key_values=first.past_key_values).logits
        model.set_attn_implementation("eager")
        eager = model(ids).logits
    torch.save((plain, padded, torch.cat((first.logits, rest), 1), eager), root / (folder.name + ".pt"))
assert "sinkprune" not in sys.modules
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The models, and what a process of transformers alone computes of their exports."""
    root = tmp_path_factory.mktemp("exports")
    models = {}
    for number, (name, (which, heads, channels)) in enumerate(CASES.items()):
        models[name] = made(which, heads, channels)
        sp.export(models[name], root / f"{number:02d}", to="transformers")
    models["biases"] = made("llada", [[0], [], [0, 1, 3]], SOME, repair="least_squares_bias")
    sp.export(models["biases"], root / f"{len(CASES):02d}", to="transformers")
    ids = tokens(2, 12)
    valid = torch.ones_like(ids)
    valid[1, :4] = 0
    torch.save((ids, valid), root / "ids.pt")
    ran = subprocess.run(
        [sys.executable, "-c", LOADER, str(root)], cwd=root, capture_output=True, text=True,
        env={"HF_HOME": str(root), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return {
        name: (model, *torch.load(root / f"{i:02d}.pt")) for i, (name, model) in enumerate(models.items())
    }, (ids, valid)


def close(got, expected):
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", [*CASES, "biases"])
def test_transformers_alone_computes_the_pruned_and_repaired_model(loaded, name):
    results, (ids, valid) = loaded
    model, plain, padded, _, eager = results[name]
    expected = raw_logits(model, ids)
    close(plain, expected)
    close(eager, expected)
    if sp.adapter_for(model).shift:
        return  # ``predict`` re-orders its rows
    with torch.no_grad():
        close(padded[valid.bool()], sp.adapter_for(model).predict(ids, valid.bool())[valid.bool()])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("sdar")])
def test_blocks_run_on_the_keys_of_those_before_as_in_one_go(loaded, name):
    model, _, _, cached, _ = loaded[0][name]
    close(cached, raw_logits(model, loaded[1][0]))


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_read_back_with_its_plan(tmp_path, name):
    which, heads, channels = CASES[name]
    model, ids = made(which, heads, channels), tokens(2, 9)
    back, _ = sp.load(sp.export(model, tmp_path / "m", to="transformers"))
    close(raw_logits(back, ids), raw_logits(model, ids))
    if sp.adapter_for(back).form == "compact":  # our modelling file
        empty = {f"model.transformer.blocks.{i}.attn_norm.weight" for i, kept in enumerate(heads) if not kept}
        dropped = {k: t for k, t in model.state_dict().items() if k not in empty}
        assert_same_tensors({k: t for k, t in back.state_dict().items() if k not in empty}, dropped)
        assert back.prune_plan == model.prune_plan


def test_a_causal_model_stays_causal(tmp_path):
    model, ids = build("llama"), tokens(1, 9)
    sp.apply(model, manual_plan(model, RAGGED, SOME))
    back, _ = sp.load(sp.export(model, tmp_path / "m"))
    with torch.no_grad():
        close(back(ids).logits, model(ids).logits)


def test_half_precision_stays(tmp_path):
    model = made("llada", RAGGED, SOME).bfloat16()
    back, _ = sp.load(sp.export(model, tmp_path / "m"))
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("which", ["llada2", "rnd1"])
def test_layers_that_differ_are_refused_where_the_modelling_file_has_no_words_for_them(tmp_path, which):
    model = MODELS[which]()
    sp.apply(model, manual_plan(model, RAGGED))
    with pytest.raises(ValueError, match=r"layer 0 keeps 2 query heads and layer 2 4|has experts, which"):
        sp.export(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
