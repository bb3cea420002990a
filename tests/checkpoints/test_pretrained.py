"""transformers' habits on a pruned model: what ``save_pretrained`` writes loads again, or it refuses."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from exports import EQUAL, NARROW, RAGGED, SOME
from hf import build
from toys import assert_same_tensors, manual_plan, one_thread, tokens  # noqa: F401
from transformers import AutoModelForCausalLM

import sinkprune as sp


def pruned(name="qwen3, bidirectional", heads=RAGGED, channels=SOME, mode="compact"):
    model = build(name)
    return sp.apply(model, manual_plan(model, heads, channels), mode=mode)


@torch.no_grad()
def close(got, model, ids):
    expected = model(ids).logits
    assert (got(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3, bidirectional"])
@pytest.mark.parametrize("sizes", [(EQUAL, NARROW), (RAGGED, SOME)], ids=["equal", "ragged"])
def test_what_is_saved_from_pretrained_loads(tmp_path, name, sizes):
    model = pruned(name, *sizes)
    for folder in (tmp_path / "new", tmp_path / "new"):  # also over what was saved before
        assert model.save_pretrained(folder) is None
        back = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=sizes[0] is RAGGED)
        close(back, model, tokens(2, 9))
    again, _ = sp.load(tmp_path / "new")
    close(again, model, tokens(2, 9))


def test_a_dense_folder_is_taken_over_with_no_weights_left_of_it(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "notes.txt").write_text("mine")
    model = pruned("llama")
    model.save_pretrained(tmp_path, max_shard_size="5GB")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "modeling_trimmed.py", "notes.txt",
        "sinkprune_export.json",
    }  # fmt: skip
    close(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True), model, tokens(1, 9))


@pytest.mark.parametrize(
    ("make", "verb", "message"),
    [
        (lambda: pruned(mode="mask"), "save_pretrained", "would lose the mask"),
        (lambda: pruned(mode="mask"), "push_to_hub", "would lose the mask"),
        (lambda: pruned("bert", EQUAL, None), "save_pretrained", "its heads would have 16 features"),
        (lambda: pruned("bert", EQUAL, None), "push_to_hub", "its heads would have 16 features"),
    ],
)
def test_what_could_not_be_loaded_is_refused_with_the_verb_to_use(tmp_path, make, verb, message):
    model = make()
    with pytest.raises(ValueError, match=message) as error:
        getattr(model, verb)(str(tmp_path / "m"))  # push_to_hub: before anything is asked of a hub
    assert "sinkprune.save(model, folder)" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_arguments_that_would_be_ignored_are_refused(tmp_path):
    for name, value in (("variant", "fp16"), ("push_to_hub", True), ("state_dict", {})):
        with pytest.raises(ValueError, match=f"takes no {name}"):
            pruned().save_pretrained(tmp_path / "m", **{name: value})
    pruned().save_pretrained(tmp_path / "m", is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_push_to_hub_uploads_what_is_saved(monkeypatch):
    seen = {}

    def upload(self, folder, *_, **__):
        seen["names"] = {path.name for path in folder_of(folder)}
        seen["model"] = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    def folder_of(folder):
        from pathlib import Path

        return Path(folder).iterdir()

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Api)
    monkeypatch.setattr(
        transformers.utils.hub,
        "create_and_tag_model_card",
        lambda *_, **__: type("Card", (), {"save": lambda self, path: None})(),
    )
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    model = pruned()
    model.push_to_hub("org/name")
    assert {"config.json", "model.safetensors", "modeling_trimmed.py"} <= seen["names"]
    close(seen["model"], model, tokens(1, 9))


def test_the_verbs_follow_the_model(tmp_path):
    """Copies and unpickled models save themselves; a restored model saves as transformers does."""
    model = pruned()
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        twin.save_pretrained(tmp_path / str(number))
        back = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), trust_remote_code=True)
        close(back, twin, tokens(1, 9))
    masked = sp.restore(pruned("llama", mode="mask"))
    masked.save_pretrained(tmp_path / "dense")
    assert_same_tensors(
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict(), build("llama").state_dict()
    )
    loaded, _ = sp.load(sp.save(model, tmp_path / "ours"))
    loaded.save_pretrained(tmp_path / "loaded")
    assert json.loads((tmp_path / "loaded/config.json").read_text())["model_type"] == "sinkprune_trimmed"


def test_trainer_trains_a_pruned_model_and_its_checkpoints_load(tmp_path):
    pytest.importorskip("accelerate")
    model = pruned("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = tokens(8, 12)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, seed=1,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if "o_proj" in name)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-4", trust_remote_code=True)
    close(back, model.eval(), ids)
    trainer.save_model(str(tmp_path / "final"))
    close(sp.load(tmp_path / "final")[0], model, ids)


def test_what_is_saved_says_what_was_done_to_it_and_its_card_may_be_edited(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model, _ = sp.load(tmp_path / "base")
    sp.apply(model, manual_plan(model, RAGGED, SOME))
    folder = sp.save(model, tmp_path / "m")
    card = (folder / "README.md").read_text()
    numbers = [sum(p.numel() for p in m.model.layers.parameters()) for m in (build("llama"), model)]
    norms = 3 * 2 * 32
    share = 100 * (1 - (numbers[1] - norms) / (numbers[0] - norms))
    assert f"4 of 12 query heads and {share:.1f} % of the block parameters" in card
    assert "layer by layer: 2, 2, 4." in card and "from base." in card and 'sp.load("m")' in card
    (folder / "README.md").write_text("mine")
    sp.save(sp.load(folder)[0], folder, overwrite=True)
