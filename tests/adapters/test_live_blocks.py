"""Blocks, attentions and MLPs that are gone in somebody else's model, whose code goes on running."""

import copy

import pytest
import torch
from family_toys import TOYS
from hf import build
from toys import manual_plan, one_thread, tokens  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp
from sinkprune.adapters import adapter_for
from sinkprune.adapters.in_place import InPlaceAdapter
from sinkprune.evidence.calibration import calibrate

# Whose MLPs stay whole in somebody else's model.
EXPERTS = ("LLaDA2Layers", "LLaDAMoELayers", "RND1Layers")
REFUSED = ("TransformersDiffusionGemma",)
IN_PLACE = [
    name
    for name, make in TOYS.items()
    if name not in REFUSED and isinstance(adapter_for(make()), InPlaceAdapter)
]
HEADS = [0, 1, 2, 3]
GONE = {
    "blocks": ([[], HEADS, []], [[], None, []]),
    "attention": ([HEADS, [], HEADS], [None] * 3),
    "mlp_blocks": ([HEADS] * 3, [[], None, []]),
}


def logits(model):
    ids = tokens(2, 12, seed=4, vocabulary=30)
    valid = torch.ones_like(ids)
    valid[1, :4] = 0
    with torch.no_grad():
        return adapter_for(model).predict(ids, valid)[valid.bool()]


CASES = [
    (family, what) for family in IN_PLACE for what in GONE if what == "attention" or family not in EXPERTS
]


@pytest.mark.parametrize("family, what", CASES)
def test_a_part_that_is_gone_equals_one_that_writes_nothing(family, what):
    heads, channels = GONE[what]
    model = TOYS[family]().eval()
    plan = manual_plan(model, heads, channels)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for layer in range(3):
            linears = adapter_for(expected).linears(layer)
            for role, kept in (("o", heads[layer]), ("down", channels[layer])):
                if kept == []:
                    linears[role].weight.zero_()
    masked, wanted = sp.apply(copy.deepcopy(model), plan, mode="mask"), logits(expected)
    torch.testing.assert_close(logits(masked), wanted, atol=2e-5, rtol=1e-4)
    compact = sp.apply(model, plan)
    torch.testing.assert_close(logits(copy.deepcopy(compact)), wanted, atol=2e-5, rtol=1e-4)
    for layer in range(3):
        for role, linear in adapter_for(compact).linears(layer).items():
            kept = heads[layer] if role in ("q", "k", "v", "qkv", "o") else channels[layer]
            assert (linear.weight.numel() == 0) == (kept == [])


@pytest.mark.parametrize("family", ["llada", "llada, biases", "dream", "llama", "bert", "modernbert"])
def test_it_is_saved_and_loads_as_it_was(family, tmp_path):
    makes = {
        "llada": lambda: llada_twin(n_kv_heads=2),
        "llada, biases": lambda: llada_twin(include_bias=True),
        "dream": dream_twin,
    }
    model = makes[family]() if family in makes else build(family)
    rows = calibrate(model, tokens(4, 12, vocabulary=30), levels=(0.5,), mask_token_id=40)
    sp.apply(model, manual_plan(model, *GONE["blocks"]), calibration=rows)
    loaded, _ = sp.load(sp.save(model, tmp_path / "saved", tokenizer=None))
    assert loaded.prune_plan == model.prune_plan
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


def test_upstream_caches_keep_their_lengths_without_the_first_block():
    """transformers' asks its first layer how many tokens it holds."""
    model = build("qwen3")
    sp.apply(model, manual_plan(model, *GONE["blocks"]))
    found = [
        model.generate(tokens(1, 6, vocabulary=30), max_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["LLaDABlocks", "DreamLayers", "DDiTBlocks", "TransformersModernBert"])
def test_trackers_see_only_the_attentions_that_are_there(family):
    model = TOYS[family]().eval()
    plan, ids = manual_plan(model, *GONE["blocks"]), tokens(2, 12, vocabulary=30)
    found = []
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), plan, mode=mode)
        with sp.track(pruned) as tracker:
            adapter_for(pruned).predict(ids)
            with pytest.raises(RuntimeError, match="being tracked already"), sp.track(pruned):
                pass
        found.append(tracker.result())
    masked, compact = found
    assert (masked.position.count[0] == 0).all() and (masked.position.count[1] == 1).all()
    assert torch.equal(compact.position.count, masked.position.count)
    torch.testing.assert_close(compact.mass[1], masked.mass[1], atol=1e-5, rtol=1e-4)


def test_repair_is_that_of_the_native_model(tmp_path):
    """Where the projection before learns what is gone as well."""
    model = llada_twin()
    native, _ = sp.load(sp.save(model, tmp_path / "dense", tokenizer=None))
    rows = calibrate(model, tokens(24, 16, vocabulary=30), levels=(0.3, 0.6), mask_token_id=40)
    plan = manual_plan(model, [HEADS, [], HEADS], [None, [], None])
    before = model.model.transformer.blocks[0].ff_out.weight.clone()
    repaired = logits(sp.apply(model, plan, calibration=rows))
    assert not torch.equal(model.model.transformer.blocks[0].ff_out.weight, before)
    expected = logits(sp.apply(native, plan, calibration=rows))
    torch.testing.assert_close(repaired, expected, atol=1e-3, rtol=1e-3)
