"""Every native family on Llama's, Qwen2's and Qwen3's tree, by the same tests: published names, an
independent forward, padding, pruned forms, caches, files and exports."""

import copy
import json

import pytest
import torch
from decoders import FAMILIES, MASK, predicted
from toys import assert_same_tensors, manual_plan, one_thread, tokens, write_checkpoint  # noqa: F401

import sinkprune as sp

HEADS = [[0, 2], [1], [0, 1, 3]]
CHANNELS = [[0, 7, 9], None, [5]]
UNIFORM = [[0, 1], [2, 3], [0, 1]]  # a whole group of every layer


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def half_masked(*shape, seed=0):
    """Random ids of which about half the tokens from the fifth on are masked."""
    ids = tokens(*shape, seed=seed)
    hide = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    hide[..., :5] = False
    return ids.masked_fill(hide, MASK)


def expected_of(family, model, ids, start=0):
    config = model.config.to_dict() | {"rope_theta": model.config.rope_theta}
    return torch.stack([predicted(family, config, model.state_dict(), row, start) for row in ids])


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("shards", [1, 2])
def test_published_files_load_under_their_names_and_give_the_logits_of_a_plain_forward(
    family, tmp_path, shards
):
    config, tensors = family.config(), family.tensors()
    model, _ = sp.load(write_checkpoint(tmp_path / "m", config, tensors, shards))
    assert_same_tensors(dict(model.state_dict()), tensors)
    adapter, ids = sp.adapter_for(model), half_masked(2, 14, seed=1)
    assert adapter.family == next(name for name, one in FAMILIES.items() if one is family)
    assert adapter.mask_token_id == MASK and adapter.block_size == family.block
    close(adapter.predict(ids), expected_of(family, model, ids))
    close(adapter.predict(ids, rows=slice(8, 12)), expected_of(family, model, ids, 8)[:, :4])
    written = model.config.to_dict()
    assert {key: written.get(key) for key in config} == config


def test_heads_of_their_own_width_biases_and_other_sizes_fit_too(family):
    for changes in ({"num_key_value_heads": 4}, {"num_key_value_heads": 1, "num_hidden_layers": 2}):
        model, ids = family.toy(**changes), half_masked(1, 11, seed=2)
        close(sp.adapter_for(model).predict(ids), expected_of(family, model, ids))


def test_a_padded_sequence_gets_what_it_gets_alone(family):
    adapter, ids = sp.adapter_for(family.toy()), half_masked(2, 12, seed=3)
    valid = torch.ones_like(ids)
    valid[1, :4] = 0  # a whole block
    got = adapter.predict(ids, valid, slice(8, 12))
    close(got[1:], adapter.predict(ids[1:, 4:], rows=slice(4, 8)))
    close(got[:1], adapter.predict(ids[:1], rows=slice(8, 12)))


@pytest.mark.parametrize("heads", [HEADS, [[0, 1, 2], [], [1, 3]]], ids=["uneven", "a layer without heads"])
def test_masked_and_compact_models_equal_one_zeroed_by_hand(family, heads):
    model, ids = family.toy(), half_masked(2, 12, seed=4)
    plan, zeroed = manual_plan(model, heads, CHANNELS), copy.deepcopy(model)
    width = sp.adapter_for(model).geometry().head_dim
    with torch.no_grad():
        for i, layer in enumerate(zeroed.layers):
            for head in set(range(4)) - set(heads[i]):
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
            for channel in () if CHANNELS[i] is None else set(range(40)) - set(CHANNELS[i]):
                layer.mlp.down_proj.weight[:, channel] = 0
    expected = expected_of(family, zeroed, ids)
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), plan, mode=mode)
        close(sp.adapter_for(pruned).predict(ids), expected)
    masked = sp.restore(sp.apply(copy.deepcopy(model), plan, mode="mask"))
    assert torch.equal(sp.adapter_for(masked).predict(ids), sp.adapter_for(model).predict(ids))


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_exact_caches_change_no_token(family, form):
    model, prompt = family.toy(seed=5), tokens(2, 6, seed=6)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS), mode=form)
    options = dict(steps=8, gen_length=8, block_length=4)
    plain = [ids.clone() for ids in sp.denoise(model, prompt, **options)]
    cache = "block" if "block" in sp.adapter_for(model).caches else _all_renewed()
    cached = list(sp.denoise(model, prompt, cache=cache, **options))
    assert (plain[-1] != MASK).all() and torch.equal(plain[-1], cached[-1])


def _all_renewed():
    from sinkprune.models.features import FeatureCache

    return FeatureCache(1, 1, 1.0)


def test_it_profiles_plans_and_repairs(family):
    model = family.toy()
    profile = sp.profile(model, tokens(2, 4), steps=8, gen_length=8)
    plan = sp.plan(model, profile, "sink_variance", ratio=0.5)
    rows = sp.calibrate(model, tokens(4, 16), sequences=4)
    pruned = sp.apply(copy.deepcopy(model), plan)
    refitted = sp.plan(model, criterion="reconstruction", ratio=0.5, calibration=rows)
    assert refitted.heads_removed == plan.heads_removed > 0
    *_, out = sp.denoise(pruned, tokens(2, 4), steps=8, gen_length=8)
    assert (out != MASK).all()


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_every_form_is_saved_and_loaded(family, tmp_path, form):
    model, ids = family.toy(), half_masked(2, 9)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS, CHANNELS), mode=form)
    sp.save(model, tmp_path / "m")
    loaded, _ = sp.load(tmp_path / "m")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    got, expected = (sp.adapter_for(m).predict(ids) for m in (loaded, model))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert sp.adapter_for(loaded).form == form and type(loaded) is type(model)


def test_a_uniform_plan_is_exported_as_a_smaller_checkpoint_of_the_family(family, tmp_path):
    config = family.config(head_dim=8) if family.kind != "illada" else family.config()
    model = family.toy(**({} if family.kind == "illada" else {"head_dim": 8}))
    plan, ids = manual_plan(model, UNIFORM, [[0, 3, 5]] * 3), half_masked(2, 10)
    pruned = sp.apply(model, plan)
    expected = sp.adapter_for(pruned).predict(ids)
    sp.export(pruned, tmp_path / "e")
    written = json.loads((tmp_path / "e" / "config.json").read_text())
    assert written["intermediate_size"] == 3
    # iLLaDA's config says no width of a head: fewer heads need our modelling file
    own = "sinkprune_trimmed" if family.kind == "illada" else config["model_type"]
    assert written["model_type"] == own
    loaded, _ = sp.load(tmp_path / "e")
    torch.testing.assert_close(sp.adapter_for(loaded).predict(ids), expected, atol=1e-5, rtol=0)


def test_what_a_config_says_and_the_family_does_not_compute_is_refused_by_key(family):
    for key, value in (("hidden_act", "gelu"), ("intermediate_size", None)):
        with pytest.raises(ValueError, match=key):
            family.toy(**{key: value})


def test_the_yarn_of_another_scale_is_refused():
    rope = FAMILIES["nemotron_labs_diffusion"].keys["rope_parameters"]
    with pytest.raises(ValueError, match="leaves the scores' scale as it is"):
        FAMILIES["nemotron_labs_diffusion"].toy(rope_parameters=rope | {"mscale": 0.7})
    model = FAMILIES["nemotron_labs_diffusion"].toy(
        rope_parameters=rope | {"llama_4_scaling_beta": 0.1}, max_position_embeddings=64
    )
    assert sp.adapter_for(model).geometry().context == 16  # where queries would begin to be scaled
