"""Saving and loading: the same bits back, or one clear error and nothing half-written."""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil

import hf
import pytest
import torch
from block_causals import llada2_config, sdar_config
from dreams import published_config as dream_config
from safetensors.torch import load_file, save_file
from toys import (  # noqa: F401
    WordTokenizer,
    assert_same_tensors,
    manual_plan,
    one_thread,
    published_config,
    published_tensors,
    tokens,
    toy,
    write_checkpoint,
)

import sinkprune as sp
from sinkprune import files

KEPT = [[0, 2], [1], [0, 1, 3]]
CHANNELS = [list(range(0, 40, 3)), None, [5]]


def pruned(form, **changes):
    model = toy(**({"n_kv_heads": 2} | changes))
    return model if form == "dense" else sp.apply(model, manual_plan(model, KEPT, CHANNELS), mode=form)


def logits(model):
    with torch.no_grad():
        return model(tokens(2, 9, seed=3)).logits


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1], ids=["one file", "shards", "a shard per tensor"])
@pytest.mark.parametrize(
    "changes", [{}, {"include_bias": True, "weight_tying": True}], ids=["gqa", "biases, tied"]
)
@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_what_is_saved_loads_bit_for_bit(tmp_path, form, changes, shard_bytes):
    model = pruned(form, **changes)
    folder = sp.save(model, tmp_path / "m", shard_bytes=shard_bytes)
    back, tokenizer = sp.load(folder)
    assert_same_tensors(back.state_dict(), model.state_dict())
    assert torch.equal(logits(back), logits(model))
    assert sp.adapter_for(back).form == form
    assert getattr(back, "prune_plan", None) == getattr(model, "prune_plan", None)
    assert not back.training
    assert tokenizer is None
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (len(names) == 1) == (shard_bytes == 10**9)
    assert all(os.path.getsize(folder / name) > 0 for name in names)
    if shard_bytes == 20_000:
        assert all(sum(t.nbytes for t in load_file(folder / name).values()) <= 20_000 for name in names)


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_a_loaded_model_can_be_saved_again(tmp_path, form):
    model = pruned(form)
    first, _ = sp.load(sp.save(model, tmp_path / "a"))
    second, _ = sp.load(sp.save(first, tmp_path / "b"))
    assert torch.equal(logits(second), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_a_checkpoint_keeps_its_dtype_or_takes_the_one_asked_for(tmp_path, form, dtype):
    folder = sp.save(pruned(form), tmp_path / "m")
    converted, _ = sp.load(folder, dtype=dtype)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    expected = logits(sp.load(folder)[0].to(dtype))
    assert torch.equal(logits(converted), expected)
    kept, _ = sp.load(sp.save(converted, tmp_path / "again"))
    assert {p.dtype for p in kept.parameters()} == {dtype}


@pytest.mark.parametrize("form", ["mask", "compact"])
def test_a_plan_of_the_loaded_model_knows_its_weights(tmp_path, form):
    folder = sp.save(pruned(form), tmp_path / "m")
    back, _ = sp.load(folder)
    with pytest.raises(ValueError, match=f"already pruned .{form} form."):
        sp.plan(back, criterion="magnitude", ratio=0.2)
    if form == "mask":
        sp.restore(back)
        assert torch.equal(logits(back), logits(toy(n_kv_heads=2)))


def test_nothing_is_pickled_on_the_way_out_or_in(tmp_path, monkeypatch):
    def refuse(*args, **keywords):
        pytest.fail("pickle was used")

    for module, name in [
        (torch, "load"),
        (torch, "save"),
        *((pickle, n) for n in ("dump", "dumps", "load", "loads")),
    ]:
        monkeypatch.setattr(module, name, refuse)
    folder = sp.save(pruned("compact"), tmp_path / "m", shard_bytes=20_000)
    sp.load(folder)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}


def test_the_manifest_names_schema_provenance_and_the_hash_of_every_file(tmp_path):
    import hashlib

    folder = sp.save(pruned("compact"), tmp_path / "m", shard_bytes=20_000)
    manifest = json.loads((folder / "sinkprune.json").read_text())
    assert (manifest["schema"], manifest["form"]) == (1, "compact")
    assert manifest["provenance"] == {"sinkprune": sp.__version__, "torch": torch.__version__}
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in ("sinkprune.json", "README.md")  # which is for people to edit
    }
    assert manifest["sha256"] == expected


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize(
    "name", ["config.json", "model-00002-of-*.safetensors", "model.safetensors.index.json"]
)
def test_a_changed_file_is_named(tmp_path, name, damage):
    folder = sp.save(pruned("compact"), tmp_path / "m", shard_bytes=20_000)
    (path,) = folder.glob(name)
    if damage is flip or path.suffix != ".json":
        damage(path)
    else:
        path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
        sp.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = sp.save(pruned("dense"), tmp_path / "m")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json|model\.safetensors is missing"):
        sp.load(folder)


def edit(values, key, value):
    if value is KeyError:
        del values[key]
    else:
        values[key] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", 2, "expected schema 1, got 2"),
        ("schema", KeyError, "expected schema 1, got None"),
        ("form", "sparse", "malformed manifest"),
        ("form", KeyError, "malformed manifest"),
        ("sha256", KeyError, "malformed manifest"),
        ("sha256", [], "malformed manifest"),
        ("plan", KeyError, "malformed manifest"),
        ("plan", None, "malformed manifest"),
        ("plan", {"kind": "prune_plan", "schema": 1}, "malformed prune plan"),
        ("plan", [], "prune plan|malformed manifest"),
    ],
)
@pytest.mark.parametrize("form", ["mask", "compact"])
def test_a_tampered_manifest_is_refused(tmp_path, form, key, value, message):
    folder = sp.save(pruned(form), tmp_path / "m")
    path = folder / "sinkprune.json"
    values = json.loads(path.read_text())
    edit(values, key, value)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        sp.load(folder)


def test_a_plan_for_another_model_in_the_manifest_is_refused(tmp_path):
    folder = sp.save(pruned("compact"), tmp_path / "m")
    path = folder / "sinkprune.json"
    values = json.loads(path.read_text())
    values["plan"] = manual_plan(toy(), KEPT).to_dict()
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"the plan in sinkprune\.json does not fit config\.json"):
        sp.load(folder)


def published(folder, shards=1, **changes):
    config = published_config(**changes)
    return write_checkpoint(folder, config, published_tensors(config), shards)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = "model.transformer.blocks.1.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"1 tensors are missing from the checkpoint, first '{NAME}'"),
        (lambda t: t.update({NAME: torch.zeros(8, 32)}), r"k_proj.weight must .*\(32, 32\), got \(8, 32\)"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensor 'extra'"),
    ],
    ids=["missing", "wrong shape", "unexpected"],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    folder = published(tmp_path / "m")
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        sp.load(folder)


def test_a_truncated_published_checkpoint_is_damaged(tmp_path):
    folder = published(tmp_path / "m")
    truncate(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        sp.load(folder)


def test_a_shard_without_a_tensor_that_the_index_promises_is_damaged(tmp_path):
    folder = published(tmp_path / "m", shards=2)
    rewrite(folder / "model-00001-of-00002.safetensors", lambda t: t.pop(next(iter(t))))
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is damaged"):
        sp.load(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = published(tmp_path / "m", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors is missing"):
        sp.load(folder)


@pytest.mark.parametrize("text", ['{"weight_map": {}}', '{"weight_map": []}', "{}", "[]", "not json"])
def test_an_index_that_maps_nothing_is_refused(tmp_path, text):
    folder = published(tmp_path / "m", shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        sp.load(folder)


@pytest.mark.parametrize("model_type", ["gpt2", None])
def test_an_unknown_model_type_is_refused_with_the_known_ones(tmp_path, model_type):
    folder = published(tmp_path / "m", model_type=model_type)
    with pytest.raises(ValueError, match=f"unknown model_type {model_type!r}; known: .*llada"):
        sp.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    folder = published(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        sp.load(folder)


def test_a_folder_that_is_not_there_or_has_no_weights_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected 'tiny', 'small', a local folder"):
        sp.load(tmp_path / "nowhere")
    folder = published(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors"):
        sp.load(folder)


class BrokenTokenizer:
    def save_pretrained(self, folder):
        raise OSError("disk full")


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_tokenizer_is_saved_beside_the_weights(tmp_path):
    folder = sp.save(pruned("dense"), tmp_path / "m", tokenizer=WordTokenizer())
    assert json.loads((folder / "words.json").read_text()) == {"words": 61}


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        sp.save(pruned("dense"), tmp_path / "m", tokenizer=BrokenTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_path_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        sp.save(pruned("dense"), tmp_path / "file" / "m")
    assert snapshot(tmp_path) == {"file": b"in the way"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_overwritten(tmp_path, overwrite):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("in the way")
    before = snapshot(tmp_path)
    for name in ("notes", "file"):
        with pytest.raises(FileExistsError, match="choose another path"):
            sp.save(pruned("dense"), tmp_path / name, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_our_checkpoint_is_replaced_only_when_asked(tmp_path):
    folder = sp.save(pruned("dense"), tmp_path / "m", shard_bytes=20_000)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        sp.save(pruned("compact"), folder)
    assert snapshot(tmp_path) == before
    sp.save(pruned("compact"), folder, overwrite=True)
    assert sp.adapter_for(sp.load(folder)[0]).form == "compact"
    names = ["README.md", "config.json", "model.safetensors", "sinkprune.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("moment", ["writing", "exchanging", "renaming"])
def test_a_failed_overwrite_keeps_the_old_checkpoint(tmp_path, monkeypatch, moment):
    folder = sp.save(pruned("dense"), tmp_path / "m")
    before = snapshot(tmp_path)
    rename, calls = os.rename, []

    def fail(*_):
        raise OSError(errno.EIO if moment == "exchanging" else errno.ENOSYS, "the disk went away")

    def fail_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("the disk went away")
        rename(source, target)

    tokenizer = BrokenTokenizer() if moment == "writing" else None
    if moment != "writing":
        monkeypatch.setattr(files, "_rename", fail)
    if moment == "renaming":
        monkeypatch.setattr(files.os, "rename", fail_at_the_second)
    with pytest.raises(OSError, match="disk"):
        sp.save(pruned("compact"), folder, overwrite=True, tokenizer=tokenizer)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("owner", ["theirs", "ours"])
def test_files_that_save_did_not_write_are_never_deleted(tmp_path, owner):
    folder = tmp_path / "m"
    if owner == "ours":
        sp.save(pruned("compact"), folder, tokenizer=WordTokenizer())
    else:
        folder.mkdir()
        (folder / "sinkprune.json").write_text("{}")
    (folder / "inner").mkdir()
    (folder / "inner" / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"inner/thesis\.tex|no checkpoint that save wrote"):
        sp.save(pruned("dense"), folder, overwrite=True)
    assert snapshot(tmp_path) == before


def test_every_file_that_save_writes_is_named_with_its_hash(tmp_path):
    folder = sp.save(pruned("compact"), tmp_path / "m", tokenizer=WordTokenizer(), shard_bytes=20_000)
    found = snapshot(folder)
    hashes = json.loads(found.pop("sinkprune.json"))["sha256"]
    assert found.pop("README.md")  # for people to edit
    assert hashes == {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
    assert len(hashes) > 3 and "words.json" in hashes


@pytest.mark.parametrize("family", ["llada", "bert"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "tokenizer.json"])
def test_a_file_without_a_hash_is_never_read(tmp_path, family, name):
    """A file beside hashed weights, which would be read instead of them or with them."""
    model = pruned("dense") if family == "llada" else hf.build("bert")
    folder = sp.save(model, tmp_path / "m")
    zeros = {k: torch.zeros_like(v) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(zeros, folder / "x.safetensors")
    (folder / name).write_text(json.dumps({"weight_map": dict.fromkeys(zeros, "x.safetensors")}))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is not named by sinkprune\.json"):
        sp.load(folder)


@pytest.mark.parametrize("name", ["../out.safetensors", "/out.safetensors", 7])
def test_names_outside_the_folder_are_refused(tmp_path, name):
    folder = published(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not the name of a file in the folder"):
        sp.load(folder)
    ours = sp.save(pruned("dense"), tmp_path / "ours")
    manifest = json.loads((ours / "sinkprune.json").read_text())
    manifest["sha256"] = {str(name): "0" * 64} | manifest["sha256"]
    (ours / "sinkprune.json").write_text(json.dumps(manifest))
    with pytest.raises((ValueError, FileNotFoundError), match=r"is not in the folder|7 is missing"):
        sp.load(ours)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"vocab_size": 61, "vocab_size": 62}', "the key 'vocab_size' is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        ('{"rope_theta": NaN}', "NaN is no number of JSON"),
        ('{"rope_theta": -Infinity}', "-Infinity is no number of JSON"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "sinkprune.json", "model.safetensors.index.json"])
def test_json_that_readers_disagree_on_is_refused(tmp_path, file, text, message):
    folder = sp.save(pruned("compact"), tmp_path / "m")
    if "index" in file:
        (folder / "sinkprune.json").unlink()
    (folder / file).write_text(text)
    if file == "config.json":
        (folder / "sinkprune.json").unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(file)} is not JSON.*{message}") as caught:
        sp.load(folder)
    assert len(str(caught.value)) < 200 + len(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config is not computed here",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive number, got '1e4'"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a positive number, got -1e-06"),
        ({"mask_token_id": 10**6}, "mask_token_id must be one of .* ids, got 1000000"),
        ({"vocab_size": True}, "'vocab_size' must be a positive integer, got True"),
    ],
)
@pytest.mark.parametrize("family", [published_config, dream_config, sdar_config, llada2_config])
def test_keys_that_change_what_is_computed_are_refused_by_name(tmp_path, family, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(family() | changes))
    with pytest.raises(ValueError, match=message):
        sp.load(tmp_path)


def test_quantised_weights_of_a_class_of_transformers_are_refused(tmp_path):
    model = hf.build("qwen3")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(ValueError, match=r"quantization_config in .*: quantised weights"):
        sp.load(tmp_path)


def test_a_relative_path_with_a_slash_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sp.save(pruned("dense"), "out/")
    sp.load("out/")
    shutil.rmtree("out")


def test_only_native_models_are_saved(tmp_path):
    with pytest.raises(TypeError, match="save writes native models, got Linear"):
        sp.save(torch.nn.Linear(2, 2), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_compact_checkpoint_is_smaller_on_disk_by_what_was_removed(tmp_path):
    model = toy()
    sizes = {}
    for form in ("dense", "compact"):
        if form == "compact":
            sp.apply(model, manual_plan(model, [[0, 2], [1], [0, 1, 3]]))
        file = sp.save(model, tmp_path / form) / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        sizes[form] = file.stat().st_size - header
    removed_heads, head_dim, width, float32 = 6, 8, 32, 4
    assert sizes["dense"] - sizes["compact"] == removed_heads * 4 * head_dim * width * float32
