"""transformers' own models: pruned equals zeroed by hand, statistics equal materialised attention."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from hf import (
    FAMILIES,
    build,
    canvas_logits,
    diffusion_gemma,
    out_projections,
    padded,
    valid_logits,
    zeroed_by_hand,
)
from torch.nn.attention.flex_attention import create_block_mask
from toys import assert_same_tensors, bits, manual_plan, one_thread, tokens  # noqa: F401

import sinkprune as sp
from sinkprune.adapters.transformers_masks import whole_mask
from sinkprune.planning.criteria import criterion_for, criterion_names

ALL = [[0, 1, 2, 3]] * 3
UNEVEN = [[0, 2], [1], [0, 1, 3]]
CHANNELS = [list(range(0, 40, 3)), None, [5]]
every_family = pytest.mark.parametrize("family", FAMILIES)


def runs_ours(model):
    """Whether each layer's attention is ours; the model's own config is the user's in any case."""
    adapter = sp.adapter_for(model)
    assert model.config._attn_implementation != "sinkprune"
    names = {adapter.attention_of(block).config._attn_implementation for block in adapter.blocks()}
    assert names in ({"sinkprune"}, {model.config._attn_implementation})
    return names == {"sinkprune"}


every_padding = pytest.mark.parametrize("padding", ["none", "left", "right"])


@every_padding
@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["heads", "heads and channels"])
@every_family
def test_masked_and_compact_equal_zeroed_by_hand(family, channels, padding):
    model = build(family)
    plan = manual_plan(model, UNEVEN, channels)
    expected = valid_logits(zeroed_by_hand(model, UNEVEN, channels), padding)
    assert (expected - valid_logits(model, padding)).abs().max() > 1e-2
    masked = valid_logits(sp.apply(copy.deepcopy(model), plan, mode="mask"), padding)
    compact = valid_logits(sp.apply(model, plan), padding)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(compact, expected, atol=1e-5, rtol=0)


@every_padding
@pytest.mark.parametrize("how", ["mask", "compact", "our attention"])
@every_family
def test_nothing_pruned_changes_nothing(family, how, padding):
    model = build(family)
    expected = valid_logits(model, padding)
    if how == "our attention":
        with sp.track(model):
            assert runs_ours(model)
            got = valid_logits(model, padding)
    else:
        got = valid_logits(sp.apply(model, manual_plan(model, ALL), mode=how), padding)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert not runs_ours(model)  # nothing of ours is active: transformers' own runs


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("bert")])
def test_padding_on_either_side_gives_the_logits_of_the_tokens_alone(family):
    model = build(family)
    sp.apply(model, manual_plan(model, UNEVEN))
    ids, valid = padded("left")
    with torch.no_grad():
        alone = model(ids[1:, 4:]).logits[0]
        left = model(ids, attention_mask=valid).logits[1, 4:]
        right = model(ids.roll(-4, 1), attention_mask=valid.roll(-4, 1)).logits[1, :-4]
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=0)


def materialised_mass(model, padding):
    """Column mass per layer ``[2, H, L]`` from transformers' eager attention."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    ids, valid = padded(padding)
    with torch.no_grad():
        layers = model(ids, attention_mask=valid, output_attentions=True).attentions
    counted = valid.bool()[:, None, :, None]
    return [p.float().masked_fill(~counted, 0).sum(2) / valid.sum(1)[:, None, None] for p in layers]


@every_padding
@pytest.mark.parametrize("form", ["dense", "compact"])
@every_family
def test_tracked_mass_equals_materialised_attention(family, form, padding):
    model = build(family)
    kept = ALL if form == "dense" else UNEVEN
    expected = materialised_mass(zeroed_by_hand(model, kept), padding)
    if form == "compact":
        sp.apply(model, manual_plan(model, kept))
    ids, valid = padded(padding)
    with torch.no_grad(), sp.track(model) as tracker:
        model(ids, attention_mask=valid)
    for layer, mass in enumerate(tracker.tracker.mass):
        torch.testing.assert_close(
            mass[:, :, : ids.shape[1]], expected[layer][:, kept[layer]], atol=1e-5, rtol=0
        )


@every_family
def test_what_is_saved_loads_with_the_same_bits(tmp_path, family):
    for form in ("dense", "mask", "compact"):
        model = build(family)
        if form != "dense":
            sp.apply(model, manual_plan(model, UNEVEN, CHANNELS), mode=form)
        back, _ = sp.load(sp.save(model, tmp_path / form, shard_bytes=20_000))
        assert type(back) is type(model)
        assert sp.adapter_for(back).form == form
        assert_same_tensors(back.state_dict(), model.state_dict())
        torch.testing.assert_close(valid_logits(back), valid_logits(model), atol=1e-5, rtol=0)
        names = [name for name, _ in model.named_parameters()]
        assert [name for name, _ in back.named_parameters()] == names  # what was tied is tied


def test_a_published_folder_loads_as_the_class_it_names(tmp_path):
    model = build("qwen2")
    model.save_pretrained(tmp_path / "m")
    back, tokenizer = sp.load(tmp_path / "m", dtype=torch.float64)
    assert type(back) is transformers.Qwen2ForCausalLM and tokenizer is None
    assert {p.dtype for p in back.parameters()} == {torch.float64}
    assert_same_tensors(back.float().state_dict(), model.state_dict())


def test_loading_never_holds_the_dense_weights_of_a_compact_model(tmp_path, monkeypatch):
    model = build("llama")
    sp.apply(model, manual_plan(model, UNEVEN, CHANNELS))
    folder = sp.save(model, tmp_path / "m")
    pack, devices = sp.ops.gather_heads, set()

    def watched(weight, *args):
        devices.add(weight.device.type)
        return pack(weight, *args)

    monkeypatch.setattr(sp.ops, "gather_heads", watched)
    sp.load(folder)
    assert devices == {"meta"}


@every_family
def test_masked_models_are_restored(family):
    model = build(family)
    before, dense = bits(model), valid_logits(model)
    modules = [name for name, _ in model.named_modules()]
    sp.apply(model, manual_plan(model, UNEVEN, CHANNELS), mode="mask")
    assert runs_ours(model)
    sp.restore(model)
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(valid_logits(model), dense)
    assert not runs_ours(model)
    assert [name for name, _ in model.named_modules()] == modules
    sp.apply(model, manual_plan(model, UNEVEN))
    assert sp.adapter_for(model).form == "compact"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_users_own_attention_comes_back_after_tracking_also_on_an_exception(implementation):
    model = build("llama")
    model.set_attn_implementation(implementation)
    with pytest.raises(KeyError), sp.track(model):
        assert runs_ours(model)
        raise KeyError
    assert not runs_ours(model) and model.config._attn_implementation == implementation
    with sp.track(model), pytest.raises(RuntimeError, match="tracked already"), sp.track(model):
        pass


@pytest.mark.parametrize("family", ["qwen3", "bert", "modernbert"])
def test_heads_stay_skipped_when_the_user_chooses_another_attention_and_in_copies(family):
    model = build(family)
    dense, plan = valid_logits(model), manual_plan(model, UNEVEN)
    expected = valid_logits(zeroed_by_hand(model, UNEVEN))
    sp.apply(model, plan, mode="mask")
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        twin = copy.deepcopy(model)
        for one in (model, twin):
            torch.testing.assert_close(valid_logits(one), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(valid_logits(sp.restore(twin)), dense, atol=1e-5, rtol=0)
        assert twin.config._attn_implementation == implementation and not runs_ours(twin)


@every_padding
@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
@every_family
def test_masks_made_for_another_attention_hide_the_same_from_ours(family, implementation, padding):
    """FlashAttention itself is not needed: every call of it becomes ours."""
    model, plan = build(family), manual_plan(build(family), UNEVEN)
    expected = valid_logits(sp.apply(copy.deepcopy(model), plan, mode="mask"), padding)
    model.config._attn_implementation_internal = implementation
    sp.apply(model, plan, mode="mask")
    torch.testing.assert_close(valid_logits(model, padding), expected, atol=1e-5, rtol=0)


def test_a_flex_mask_and_a_window_with_a_cache_hide_what_their_functions_say():
    query, key = torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 7, 8)
    flex = create_block_mask(lambda b, h, q, k: (k <= q + 4) & (k > b), 2, None, 3, 7, device="cpu")
    got = whole_mask(flex, query, key, False, "flex_attention", {})
    assert got[1, 0].int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1]]
    window = {"sliding_window": 2}
    got = whole_mask(None, query, key, True, "flash_attention_2", window)  # queries are the last of the keys
    assert got[0, 0].int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]]
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]])}
    with pytest.raises(ValueError, match="does not know packed sequences"):
        whole_mask(None, key, key, True, "flash_attention_2", packed)


def test_profile_plan_and_generate_work_on_a_bidirectional_model():
    model = build("llama, bidirectional, MHA, tied")
    ids = torch.randint(3, 60, (2, 5))
    profile = sp.profile(model, ids, steps=4, gen_length=8)
    sp.apply(model, sp.plan(model, profile, "sink_variance", ratio=0.4))
    *_, out = sp.denoise(model, ids, steps=4, gen_length=8)
    assert out.shape == (2, 13) and (out != 60).all()


def test_a_causal_model_predicts_a_token_from_the_row_before():
    model = build("llama")
    ids, valid = padded("none")
    with torch.no_grad():
        rows = model(ids).logits
        got = sp.adapter_for(model).predict(ids, valid, slice(3, 6))
    torch.testing.assert_close(got, rows[:, 2:5], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_compact_causal_model_generates_with_its_cache():
    model = build("qwen3")
    twin = zeroed_by_hand(model, UNEVEN)
    sp.apply(model, manual_plan(model, UNEVEN))
    ids, valid = padded("left")
    options = {"attention_mask": valid, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), twin.generate(ids, **options))


def unchanged(model, message, action, error=ValueError):
    before = bits(model)
    with pytest.raises(error, match=message):
        action()
    assert_same_tensors(model.state_dict(), before)
    assert not runs_ours(model)


def test_what_cannot_be_pruned_is_refused_by_name_before_anything_changes():
    model = build("llama")
    plan = manual_plan(model, UNEVEN)
    model.model.layers[2].self_attn.q_proj = torch.nn.utils.parametrizations.weight_norm(
        model.model.layers[2].self_attn.q_proj
    )
    unchanged(
        model,
        "q projection of layer 2 is a Parametrized.*use mode='mask'",
        lambda: sp.apply(model, manual_plan(model, UNEVEN)),
    )
    model = build("llama")
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    shared = manual_plan(model, UNEVEN)
    unchanged(model, "layers 0 and 2 share their attention", lambda: sp.apply(model, shared, mode="mask"))
    model = build("bert").train()
    shaking = manual_plan(model, UNEVEN)
    unchanged(model, "training mode with attention dropout 0.1", lambda: sp.apply(model, shaking))
    model = build("llama")
    other = build("llama", seed=1)
    unchanged(other, "other weights", lambda: sp.apply(other, plan))
    sp.apply(model, plan)
    with pytest.raises(ValueError, match=r"already pruned .compact form."):
        sp.apply(model, plan)


def test_a_model_on_meta_is_refused():
    model = build("llama").to("meta")
    with pytest.raises(ValueError, match="is on the meta device"):
        sp.apply(model, manual_plan(model, UNEVEN))


def test_experts_keep_their_channels_and_lose_heads():
    values = FAMILIES["qwen3"][1] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**values)).eval()
    with pytest.raises(ValueError, match="mixture of experts: only heads"):
        sp.plan(model, criterion="magnitude", ratio=0.2, unit="parameters", targets=("mlp",))
    expected = valid_logits(zeroed_by_hand(model, UNEVEN))
    plan = manual_plan(model, UNEVEN)
    torch.testing.assert_close(valid_logits(sp.apply(model, plan)), expected, atol=1e-5, rtol=0)


def test_albert_is_refused_because_its_layers_share_their_weights():
    config = transformers.AlbertConfig(
        vocab_size=61, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=40
    )
    with pytest.raises(TypeError, match="same layer weights at every depth"):
        sp.adapter_for(transformers.AlbertForMaskedLM(config))


def test_a_model_nobody_knows_is_refused_with_the_known_families():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    )
    with pytest.raises(TypeError, match=r"GPT2LMHeadModel; known families: .*Llama"):
        sp.adapter_for(model)


def test_diffusion_gemma_is_masked_profiled_saved_and_restored_but_not_compacted(tmp_path):
    model = diffusion_gemma()
    dense, plan = canvas_logits(model), manual_plan(model, UNEVEN)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        decoder = [m for m in out_projections(twin) if any(m is n for n in twin.model.decoder.modules())]
        for kept, projection in zip(UNEVEN, decoder, strict=True):  # the encoder's are the same tensors
            width = projection.in_features // 4
            for head in set(range(4)) - set(kept):
                projection.weight[:, head * width : (head + 1) * width] = 0
    with pytest.raises(ValueError, match="encoder and decoder share every projection"):
        sp.apply(model, plan)
    sp.apply(model, plan, mode="mask")
    torch.testing.assert_close(canvas_logits(model), canvas_logits(twin), atol=1e-5, rtol=0)
    back, _ = sp.load(sp.save(model, tmp_path / "m"))
    torch.testing.assert_close(canvas_logits(back), canvas_logits(model), atol=1e-5, rtol=0)
    assert torch.equal(canvas_logits(sp.restore(model)), dense)
    profile = sp.profile(model, torch.randint(3, 50, (2, 6)), steps=3, gen_length=8)
    assert profile.statistics["steps_counted"].max() == 3
    assert sp.plan(model, profile, "sink_variance", ratio=0.4).heads_removed == 5


def test_every_rule_plans_diffusion_gemma_or_is_refused_and_no_hook_stays():
    """It can't be calibrated, since it has no logits of a masked sequence: rules of rows say so."""
    model = diffusion_gemma()
    before = canvas_logits(model)
    rows = sp.calibrate(model, tokens(200), length=16, sequences=4, mask_token_id=56)
    profile = sp.profile(model, torch.randint(3, 50, (2, 6)), steps=2, gen_length=8)
    for name in criterion_names():
        try:
            plan = sp.plan(model, profile, name, ratio=0.3, calibration=rows)
        except ValueError as refused:
            assert criterion_for(name).needs_calibration and "denoises a canvas" in str(refused)
        else:
            assert not criterion_for(name).needs_calibration and plan.heads_removed == 4
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(canvas_logits(model), before)


def test_our_package_does_not_import_transformers_before_the_user_does():
    code = (
        "import sys, torch, sinkprune as sp\n"
        "try: sp.adapter_for(torch.nn.Linear(2, 2))\n"
        "except TypeError: pass\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3, bidirectional"])
def test_padding_on_the_left_changes_no_prediction(name):
    model = build(name)
    ids = torch.tensor([[11, 12, 13, 14, 15]])
    padded, valid = (
        torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1),
        (torch.arange(9) >= 4).long()[None],
    )
    adapter = sp.adapter_for(model)
    got, alone = adapter.predict(padded, valid)[:, 4:], adapter.predict(ids)
    torch.testing.assert_close(got, alone, atol=2e-5, rtol=1e-4)
