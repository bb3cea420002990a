"""Live iLLaDA, RND1 and Fast-dLLM v2 objects: recognised by structure, pruned in place, equal to the native
models where there are any."""

import copy

import pytest
import torch
from decoder_twins import fast_dllm_twin, illada_twin, rnd1_twin
from decoders import FAMILIES
from toys import manual_plan, one_thread, tokens  # noqa: F401

import sinkprune as sp

HEADS = [[0, 2], [1], [0, 1, 3]]
TWINS = {"illada": illada_twin, "rnd1": rnd1_twin, "fast_dllm_qwen": fast_dllm_twin}
NATIVE = {name: TWINS[name] for name in ("illada", "fast_dllm_qwen")}


def padded(length=12):
    valid = torch.ones(2, length, dtype=torch.long)
    valid[1, :4] = 0
    return valid


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_recognised_and_predicts_as_its_own_code_does(name):
    model, ids = TWINS[name](), tokens(2, 12)
    adapter = sp.adapter_for(model)
    assert adapter.family == name and type(adapter).__name__.endswith("Layers")
    logits = model(ids, block_size=4).logits if name == "fast_dllm_qwen" else model(ids).logits
    rows = [max(i - adapter.shift, 0) for i in range(12)]
    close(adapter.predict(ids), logits[:, rows])
    close(adapter.predict(ids, rows=slice(3, 6)), logits[:, rows[3:6]])
    close(adapter.predict(ids, padded())[1:, 5:], adapter.predict(ids[1:, 4:])[:, 1:])
    assert not [key for key, _ in model.named_modules() if "sinkprune" in key]


@pytest.mark.parametrize("name", NATIVE)
def test_a_live_object_equals_the_native_model_and_is_saved_as_one(name, tmp_path):
    model, own, ids, valid = TWINS[name](), FAMILIES[name].toy(), tokens(2, 12), padded()
    live, native = sp.adapter_for(model), sp.adapter_for(own)
    assert live.geometry() == native.geometry() and live.block_size == native.block_size
    rows = valid.bool()
    rows[1, 4] = False  # of a shifted model: the first token, which no row predicts
    close(live.predict(ids, valid)[rows], native.predict(ids, valid)[rows])
    sp.apply(model, manual_plan(model, HEADS, [[0, 7], None, [5]]))
    expected = sp.adapter_for(model).predict(ids)
    sp.save(model, tmp_path / "m")
    loaded, _ = sp.load(tmp_path / "m")
    close(sp.adapter_for(loaded).predict(ids), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", TWINS)
def test_pruned_heads_equal_heads_zeroed_by_hand(name, kv_heads):
    model, ids = TWINS[name](num_key_value_heads=kv_heads), tokens(2, 12)
    zeroed, width = copy.deepcopy(model), sp.adapter_for(model).geometry().head_dim
    with torch.no_grad():
        for kept, layer in zip(HEADS, zeroed.model.layers, strict=True):
            for head in set(range(4)) - set(kept):
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    expected, valid = sp.adapter_for(zeroed).predict(ids), padded()
    hidden = sp.adapter_for(zeroed).predict(ids, valid)[valid.bool()]
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), manual_plan(model, HEADS), mode=mode)
        close(sp.adapter_for(pruned).predict(ids), expected)
        close(sp.adapter_for(pruned).predict(ids, valid)[valid.bool()], hidden)


@pytest.mark.parametrize("name", TWINS)
def test_it_is_profiled_and_writes(name):
    model = TWINS[name]()
    profile = sp.profile(model, tokens(2, 4), steps=8, gen_length=8)
    sp.apply(model, sp.plan(model, profile, "sink_variance", ratio=0.4))
    *_, ids = sp.denoise(model, tokens(2, 4), steps=8, gen_length=8)
    assert (ids != 60).all()


def test_rnd1_under_another_attention_is_not_recognised():
    with pytest.raises(TypeError, match="no adapter recognises"):
        sp.adapter_for(rnd1_twin(_attn_implementation="eager"))


@pytest.mark.parametrize("method", ["generate_block", "generate_wedlm", "linear_spec_generate"])
def test_a_diffusion_model_on_transformers_classes_is_not_taken_for_what_it_is_built_on(method):
    from hf import build

    model = build("llama")
    assert sp.adapter_for(model).family.startswith("transformers decoder")
    setattr(model, method, lambda: None)
    with pytest.raises(TypeError, match="no adapter recognises"):
        sp.adapter_for(model)
