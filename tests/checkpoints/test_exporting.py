"""A uniform plan's model as an ordinary checkpoint: read by other programs, with the same logits."""

import json

import pytest
import torch
import transformers
from block_causals import straight_sdar, toy_llada2, toy_sdar
from dreams import toy_dream
from hf import build, padded
from layer_twins import sdar_twin
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp

WHOLE = [[0, 1], [2, 3], [0, 1]]  # one group of two query heads in each layer
ONE_EACH = [[0, 3], [1, 2], [1, 3]]  # both groups, a query head of each
CHANNELS = [[0, 7, 9], [1, 2, 3], [5, 6, 39]]


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
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
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


@pytest.mark.parametrize("model", [toy, toy_dream], ids=["llada", "dream"])
def test_channels_alone_can_be_said_where_heads_cannot(tmp_path, model):
    dense, ids = model(), tokens(2, 9)
    narrow = pruned(model(), [[0, 1, 2, 3]] * 3, CHANNELS)
    loaded, _ = sp.load(sp.export(narrow, tmp_path / "m"))
    close(loaded(ids).logits, narrow(ids).logits)
    with pytest.raises(ValueError, match=r"can't say 2 query and \d key/value heads of 8 features"):
        sp.export(pruned(dense), tmp_path / "heads")


def test_a_plan_that_is_uniform_by_construction_exports(tmp_path):
    model = toy_sdar()
    plan = sp.plan(model, criterion="random", ratio=0.5, allocation="uniform", whole_groups=True)
    sp.apply(model, plan)
    loaded, _ = sp.load(sp.export(model, tmp_path / "m"))
    close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


@pytest.mark.parametrize(
    ("model", "heads", "channels", "message"),
    [
        (toy_sdar, [[0, 1], [2], [0, 1]], None, "layer 0 keeps 2 query heads and layer 1 1"),
        (toy_sdar, [[0, 1], [1, 2], [0, 1]], None, "layer 0 keeps 1 key/value heads and layer 1 2"),
        (toy_sdar, WHOLE, [[0, 1], [0, 1], [3]], "layer 0 keeps 2 channels and layer 2 1"),
        (toy_sdar, [[0, 1, 2], [1, 2, 3], [0, 1, 3]], None, r"layer 0 keeps \[1, 2\] query heads of its"),
        (toy_sdar, WHOLE, [[0, 1], None, [3, 4]], "can't say"),
        (toy, WHOLE, None, "can't say 2 query and 2 key/value heads of 8 features"),
        (toy_dream, WHOLE, None, "its heads would have 16 features"),
        (lambda: build("bert"), WHOLE, None, "its heads would have 16 features"),
        (lambda: build("modernbert"), WHOLE, None, "its heads would have 16 features"),
    ],
    ids=[
        "heads", "kv heads", "channels", "uneven groups", "some layers", "llada", "dream", "bert",
        "modernbert",
    ],
)  # fmt: skip
def test_what_no_config_can_say_is_refused_with_the_reason_and_writes_nothing(
    tmp_path, model, heads, channels, message
):
    with pytest.raises(ValueError, match=message):
        sp.export(pruned(model(), heads, channels), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_other_forms_models_and_places_are_refused(tmp_path):
    model = toy_sdar()
    with pytest.raises(ValueError, match="the model is in dense form"):
        sp.export(model, tmp_path / "m")
    masked = sp.apply(toy_sdar(), manual_plan(model, WHOLE), mode="mask")
    with pytest.raises(ValueError, match="the model is in mask form"):
        sp.export(masked, tmp_path / "m")
    with pytest.raises(ValueError, match="uniform=True"):
        sp.export(pruned(model), tmp_path / "m", uniform=False)
    with pytest.raises(TypeError, match="got LayersTwin"):
        sp.export(pruned(sdar_twin()), tmp_path / "m")
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
