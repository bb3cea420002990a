"""A uniform plan's model as an ordinary checkpoint: read by other programs, with the same logits."""

import json

import pytest
import torch
import transformers
from block_causals import straight_sdar, toy_llada2, toy_sdar
from dreams import toy_dream
from hf import build, padded
from layer_twins import llada_moe_twin, sdar_twin
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
import sinkprune.checkpoints.checkpoint
from sinkprune.evidence.calibration import Calibration

WHOLE = [[0, 1], [2, 3], [0, 1]]  # one group of two query heads in each layer
ONE_EACH = [[0, 3], [1, 2], [1, 3]]  # both groups, a query head of each
MIDDLE = [[0, 1], [0, 1, 2, 3], [0, 1]]
UNEVEN = [[0, 1, 2], [1, 2, 3], [0, 1, 3]]
CHANNELS = [[0, 7, 9], [1, 2, 3], [5, 6, 39]]


def toy_llama():
    return build("llama")


def pruned(model, heads=WHOLE, channels=None):
    return sp.apply(model, manual_plan(model, heads, channels))


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [WHOLE, ONE_EACH], ids=["whole groups", "one of each group"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "llama, bidirectional, MHA, tied"])
def test_transformers_reads_its_own_class(tmp_path, name, heads):
    model = pruned(build(name), heads, CHANNELS)
    folder = sp.export(model, tmp_path / "m")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
    ids, valid = padded("left")
    close(loaded(ids, attention_mask=valid).logits, model(ids, attention_mask=valid).logits)
    assert loaded.config.head_dim == 8 and loaded.config.num_attention_heads == 2
    assert loaded.config.intermediate_size == 3
    again, _ = sp.load(folder)
    assert sp.adapter_for(again).form == "dense"
    close(again(ids, attention_mask=valid).logits, model(ids, attention_mask=valid).logits)


@pytest.mark.parametrize("heads", [WHOLE, ONE_EACH], ids=["whole groups", "one of each group"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tie_word_embeddings": True}])
def test_a_native_sdar_becomes_a_smaller_sdar(tmp_path, heads, changes):
    model, ids = pruned(toy_sdar(**changes), heads, CHANNELS), tokens(2, 9)
    folder = sp.export(model, tmp_path / "m")
    loaded, _ = sp.load(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "sinkprune_export.json",
    ]  # fmt: skip
    assert sp.adapter_for(loaded).form == "dense"
    close(loaded(ids).logits, model(ids).logits)
    config = json.loads((folder / "config.json").read_text())  # and by a reader that is not ours
    expected = torch.stack([straight_sdar(config, loaded.state_dict(), sequence) for sequence in ids])
    torch.testing.assert_close(model(ids).logits.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [WHOLE, ONE_EACH], ids=["whole groups", "one of each group"])
def test_a_native_llada2_becomes_a_smaller_llada2(tmp_path, heads):
    model, ids = pruned(toy_llada2(use_qkv_bias=True), heads, [[0, 7, 9], None, None]), tokens(2, 9)
    loaded, _ = sp.load(sp.export(model, tmp_path / "m"))
    close(loaded(ids).logits, model(ids).logits)
    assert sp.adapter_for(loaded).geometry().heads == (2, 2, 2)
    assert sp.adapter_for(loaded).geometry().channels == (3, 70, 70)


WITHOUT_ONE = ([[0, 1, 2, 3], [], [0, 1, 2, 3]], [None, [], None])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2, sliding"])
def test_a_model_without_a_block_is_one_of_fewer_layers_to_transformers(tmp_path, name):
    model = pruned(build(name, attention_bias=False) if name == "llama" else build(name), *WITHOUT_ONE)
    folder = sp.export(model, tmp_path / "m")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
    assert len(loaded.model.layers) == loaded.config.num_hidden_layers == 2
    ids, valid = padded("left")
    close(loaded(ids, attention_mask=valid).logits, model(ids, attention_mask=valid).logits)


@pytest.mark.parametrize(
    "make", [toy, toy_dream, toy_sdar, toy_llama], ids=["llada", "dream", "sdar", "llama"]
)
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 2]], ids=["blocks alone", "and heads"])
def test_a_model_without_blocks_is_exported_and_read_back(tmp_path, make, heads):
    """Alone as fewer layers of the family; beside heads that differ with our modelling file."""
    ids, gone = tokens(2, 9), pruned(make(), [[], heads, [0, 1, 2, 3]], [[], None, None])
    folder = sp.export(gone, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    assert config.get("n_layers", config.get("num_hidden_layers")) == 2
    loaded, _ = sp.load(folder)
    close(loaded(ids).logits, gone(ids).logits)
    if (folder / "modeling_trimmed.py").exists():
        assert loaded.prune_plan == gone.prune_plan
    else:
        assert len(heads) == 4 and len(sp.adapter_for(loaded).blocks()) == 2


def test_a_block_whose_biases_are_left_stays_a_layer(tmp_path):
    model, ids = toy_sdar(attention_bias=True), tokens(2, 9)
    torch.nn.init.normal_(model.model.layers[1].self_attn.o_proj.bias)
    gone = pruned(model, *WITHOUT_ONE)
    folder = sp.export(gone, tmp_path / "m")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    close(sp.load(folder)[0](ids).logits, gone(ids).logits)


@pytest.mark.parametrize("model", [toy, toy_dream], ids=["llada", "dream"])
def test_channels_alone_can_be_said_by_the_familys_config_where_heads_cannot(tmp_path, model):
    ids, narrow = tokens(2, 9), pruned(model(), [[0, 1, 2, 3]] * 3, CHANNELS)
    folder = sp.export(narrow, tmp_path / "m")
    loaded, _ = sp.load(folder)
    assert sp.adapter_for(loaded).form == "dense" and not (folder / "modeling_trimmed.py").exists()
    close(loaded(ids).logits, narrow(ids).logits)
    fewer = pruned(model())
    folder = sp.export(fewer, tmp_path / "heads")
    assert (folder / "modeling_trimmed.py").exists()
    close(sp.load(folder)[0](ids).logits, fewer(ids).logits)


def test_a_plan_that_is_uniform_by_construction_exports(tmp_path):
    model = toy_sdar()
    plan = sp.plan(model, criterion="random", ratio=0.5, allocation="uniform", whole_groups=True)
    sp.apply(model, plan)
    loaded, _ = sp.load(sp.export(model, tmp_path / "m"))
    close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


@pytest.mark.parametrize(
    ("model", "to", "heads", "channels", "message"),
    [
        (toy_sdar, "sglang", [[0, 1], [2], [0, 1]], None, "layer 0 keeps 2 query heads and layer 1 1"),
        (toy_sdar, "sglang", [[0, 1], [1, 2], [0, 1]], None, "layer 0 keeps 1 key/value heads and layer 1 2"),
        (toy_sdar, "lmdeploy", WHOLE, [[0, 1], [0, 1], [3]], "layer 0 keeps 2 channels and layer 2 1"),
        (toy_sdar, "sglang", UNEVEN, None, r"layer 0 keeps \[1, 2\] query heads of its"),
        (toy_sdar, "hf", UNEVEN, None, "its query heads share key/value heads unevenly"),
        (toy_sdar, "lmdeploy", WHOLE, [[0, 1], None, [3, 4]], "can't say"),
        (toy_sdar, "vllm", MIDDLE, None, "its Transformers backend runs llada, dream, .*; not sdar"),
        (toy_llada2, "hf", MIDDLE, None, "layer 0 keeps 2 query heads and layer 1 4"),
        (toy, "sglang", WHOLE, None, "sglang 0.5.23 runs llada2_moe, sdar; not llada"),
        (lambda: build("bert"), "hf", WHOLE, None, "its heads would have 16 features"),
        (lambda: build("modernbert"), "hf", WHOLE, None, "its heads would have 16 features"),
    ],
    ids=[
        "heads", "kv heads", "channels", "uneven groups", "uneven groups, any", "some layers", "vllm",
        "llada2", "family", "bert", "modernbert",
    ],
)  # fmt: skip
def test_what_a_target_cannot_hold_is_refused_with_the_reason_and_writes_nothing(
    tmp_path, model, to, heads, channels, message
):
    with pytest.raises(ValueError, match=message):
        sp.export(pruned(model(), heads, channels), tmp_path / "m", to=to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["sglang", "lmdeploy"])
def test_biases_that_an_engine_would_skip_are_refused(tmp_path, to):
    ids = tokens(24, 12)
    rows = Calibration(ids, ids, ids == 60, None)
    model = sp.apply(
        toy_sdar(), manual_plan(toy_sdar(), WHOLE), calibration=rows, repair="least_squares_bias"
    )
    with pytest.raises(ValueError, match="the repair gave the o projections biases"):
        sp.export(model, tmp_path / "m", to=to)
    assert not list(tmp_path.iterdir())


def test_other_forms_models_and_places_are_refused(tmp_path):
    model = toy_sdar()
    with pytest.raises(ValueError, match="the model is in dense form"):
        sp.export(model, tmp_path / "m")
    masked = sp.apply(toy_sdar(), manual_plan(model, WHOLE), mode="mask")
    with pytest.raises(ValueError, match="the model is in mask form"):
        sp.export(masked, tmp_path / "m")
    with pytest.raises(TypeError, match="there is none for LayersTwin"):
        sp.export(pruned(llada_moe_twin()), tmp_path / "m")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists"):
        sp.export(model, tmp_path / "there")


def test_a_failed_write_leaves_nothing(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sp.export(pruned(toy_sdar()), tmp_path / "m", tokenizer=Broken())
    assert not list(tmp_path.iterdir())


def test_a_live_object_is_exported_as_the_native_model_it_equals(tmp_path):
    model, ids = pruned(sdar_twin(), WHOLE, CHANNELS), tokens(1, 9)
    loaded, _ = sp.load(sp.export(model, tmp_path / "m"))
    assert sp.adapter_for(loaded).geometry().heads == (2, 2, 2)
    close(loaded(ids).logits, sp.adapter_for(model).predict(ids))


CODE = """
from .configuration_sdar import SDARConfig
from .deeper import part
import torch

raise SystemExit("code of a checkpoint must not run")
"""


@pytest.fixture
def published(tmp_path):
    """A published SDAR: config with ``auto_map``, the code it names, how to generate, a tokenizer."""
    folder = tmp_path / "published"
    sp.save(toy_sdar(), folder)
    (folder / "sinkprune.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForMaskedLM": "elsewhere/repo--modeling.Model",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_sdar.py").write_text(CODE)
    for name in ("configuration_sdar.py", "deeper.py", "unrelated.py"):
        (folder / name).write_text("raise SystemExit('code of a checkpoint must not run')\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["tokenization_sdar.T", null]}}'
    )
    (folder / "tokenization_sdar.py").write_text("raise SystemExit\n")
    return folder


BESIDE = {
    "configuration_sdar.py", "modeling_sdar.py", "deeper.py", "generation_config.json",
    "tokenizer_config.json", "tokenization_sdar.py",
}  # fmt: skip


@pytest.mark.parametrize("saved", [False, True], ids=["", "saved between"])
def test_every_file_that_a_published_folder_needs_goes_along_and_none_is_run(
    tmp_path, published, saved, monkeypatch
):
    monkeypatch.setattr(
        sinkprune.checkpoints.checkpoint, "load_tokenizer", lambda folder: None
    )  # its code is not run either
    model, _ = sp.load(published)
    sp.apply(model, manual_plan(model, WHOLE, CHANNELS))
    if saved:
        model, _ = sp.load(sp.save(model, tmp_path / "pruned"))
    folder = sp.export(model, tmp_path / "m", to="sglang")
    names = {path.name for path in folder.iterdir()}
    assert names == BESIDE | {"config.json", "model.safetensors", "sinkprune_export.json"}
    for name in BESIDE:
        assert (folder / name).read_text() == (published / name).read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_sdar.SDARModel" and config["head_dim"] == 10
    manifest = json.loads((folder / "sinkprune_export.json").read_text())
    assert (manifest["target"], manifest["source"]) == ("sglang", "pruned" if saved else "published")
    assert manifest["sha256"].keys() == names - {"sinkprune_export.json"}
    assert manifest["plan"]["layers"][1]["kept_heads"] == [2, 3]


@pytest.mark.parametrize("name", ["modeling_sdar.py", "configuration_sdar.py"])
def test_code_that_is_not_there_is_named_and_nothing_is_written(tmp_path, published, name, monkeypatch):
    monkeypatch.setattr(sinkprune.checkpoints.checkpoint, "load_tokenizer", lambda folder: None)
    model, _ = sp.load(published)
    sp.apply(model, manual_plan(model, WHOLE))
    (published / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"auto_map needs {name}"):
        sp.export(model, tmp_path / "m")
    assert {path.name for path in tmp_path.iterdir()} == {"published"}


@pytest.mark.parametrize("reference", ["../evil.Model", "a b.Model", "/etc/x.Model", "Model"])
def test_an_auto_map_that_leaves_the_folder_is_refused(tmp_path, published, reference, monkeypatch):
    monkeypatch.setattr(sinkprune.checkpoints.checkpoint, "load_tokenizer", lambda folder: None)
    model, _ = sp.load(published)
    sp.apply(model, manual_plan(model, WHOLE))
    model.config.extra["auto_map"] = {"AutoModel": reference}
    with pytest.raises(ValueError, match="auto_map names"):
        sp.export(model, tmp_path / "m")


def test_a_folder_with_our_modelling_file_gets_no_code_of_the_family(tmp_path, published, monkeypatch):
    monkeypatch.setattr(sinkprune.checkpoints.checkpoint, "load_tokenizer", lambda folder: None)
    model, _ = sp.load(published)
    sp.apply(model, manual_plan(model, [[0, 1], [0, 1, 2, 3], [0, 1]]))
    names = {path.name for path in sp.export(model, tmp_path / "m").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "sinkprune_export.json", "modeling_trimmed.py",
        "generation_config.json", "tokenizer_config.json", "tokenization_sdar.py",
    }  # fmt: skip


def test_a_trimmed_folder_without_its_manifest_is_refused(tmp_path):
    folder = sp.export(pruned(toy()), tmp_path / "m")
    (folder / "sinkprune_export.json").unlink()
    with pytest.raises(ValueError, match=r"no sinkprune_export.json, which says what the model was"):
        sp.load(folder)
