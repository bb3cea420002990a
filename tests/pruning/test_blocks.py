"""Blocks that are gone: masked equals compact, they cost nothing, and the block before makes up for them."""

import copy

import pytest
import torch
from block_causals import toy_llada2, toy_sdar
from dreams import toy_dream
from toys import one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.calibration import calibrate
from sinkprune.models.caches import CACHES
from sinkprune.models.norm import RMSNorm
from sinkprune.plans import LayerPlan

MODELS = {
    "llada": toy,
    "llada, grouped": lambda: toy(n_kv_heads=2),
    "llada, biases": lambda: toy(include_bias=True, weight_tying=True),
    "dream": toy_dream,
    "sdar": toy_sdar,
    "llada2": toy_llada2,  # whose MLPs are experts, and stay
}
GONE = {"block": ([], []), "attention": ([], None), "mlp": (None, [])}


def plan_without(model, gone, what="block"):
    """A plan that takes ``what`` of the layers ``gone`` and leaves the rest."""
    plan = sp.plan(model, ratio=0, criterion="magnitude")
    heads, channels = GONE[what]
    for layer in gone:
        plan.layers[layer] = LayerPlan(plan.layers[layer].kept_heads if heads is None else heads, channels)
    return plan


def logits(model, padded=True):
    ids = tokens(2, 11, seed=4, vocabulary=40)
    valid = torch.ones_like(ids)
    if padded:
        valid[1, :3] = 0
    with torch.no_grad():
        return sp.adapter_for(model).predict(ids, valid if padded else None)[valid.bool()]


@pytest.mark.parametrize(
    "family, what", [("llada2", "attention"), *((f, w) for f in MODELS if f != "llada2" for w in GONE)]
)
def test_masked_and_compact_equal_a_model_whose_parts_write_nothing(family, what):
    model = MODELS[family]().eval()
    plan = plan_without(model, [1], what)
    expected = copy.deepcopy(model)
    roles = {"block": ("o", "down"), "attention": ("o",), "mlp": ("down",)}[what]
    with torch.no_grad():
        for role in roles:
            sp.adapter_for(expected).linears(1)[role].weight.zero_()
    masked = sp.apply(copy.deepcopy(model), plan, mode="mask")
    torch.testing.assert_close(logits(masked), logits(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(sp.apply(model, plan)), logits(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_a_block_that_is_gone_runs_no_norm_and_no_attention(family):
    model = MODELS[family]().eval()
    plan = plan_without(model, [0])
    compact = sp.apply(model, plan)
    ran = []
    for module in sp.adapter_for(compact).blocks()[0].modules():
        if isinstance(module, (RMSNorm, torch.nn.Linear, sp.SinkPrunedAttention)):
            module.register_forward_pre_hook(lambda m, args: ran.append(m))
    logits(compact, padded=False)
    assert ran == []
    assert sum(p.numel() for p in sp.adapter_for(compact).blocks()[0].parameters()) == sum(
        m.weight.numel() for m in sp.adapter_for(compact).blocks()[0].modules() if isinstance(m, RMSNorm)
    )


@pytest.mark.parametrize("gone", [[0], [1], [0, 2]], ids=str)
@pytest.mark.parametrize("family, cache", [("llada", "prefix"), ("llada", "dual"), ("llada", "dllm"),
                                           ("dream", "dual"), ("sdar", "block")])  # fmt: skip
def test_caches_hold_nothing_of_blocks_that_are_gone_and_generate_the_masked_models_tokens(
    family, cache, gone
):
    model = MODELS[family]().eval()
    plan = plan_without(model, gone)
    prompt = tokens(2, 4, vocabulary=40)
    settings = {"steps": 8, "gen_length": 8, "block_length": 4}
    found = []
    for form in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), plan, mode=form)
        holder = CACHES[cache]()
        *_, ids = sp.denoise(pruned, prompt, cache=holder, **settings)
        found.append(ids)
        held = set(holder._held)
    assert torch.equal(*found)
    assert held == set(range(len(plan.layers))) - set(gone)
    assert not set(getattr(holder, "_added", {})) & set(gone)


@pytest.mark.parametrize("family", ["llada, biases", "dream", "sdar"])
def test_a_checkpoint_without_blocks_loads_as_it_was_saved(family, tmp_path):
    model = MODELS[family]().eval()
    given = tokens(4, 12, vocabulary=40)
    rows = calibrate(model, given, levels=(0.5,))
    sp.apply(model, plan_without(model, [1]), calibration=rows)
    folder = sp.save(model, tmp_path / "saved", tokenizer=None)
    loaded, _ = sp.load(folder)
    assert loaded.prune_plan == model.prune_plan and loaded.prune_plan.layers[1] == LayerPlan([], [])
    assert torch.equal(logits(loaded), logits(model))


def test_profiles_and_phases_see_the_shorter_model():
    model = toy()
    plan = plan_without(model, [0])
    compact = sp.apply(copy.deepcopy(model), plan)
    profile = sp.profile(compact, tokens(2, 4), steps=4, gen_length=8)
    assert profile.heads[0] == [] and profile.heads[1] == [0, 1, 2, 3]
    assert (profile.statistics["steps_counted"][1] == 4).all()
    ids = tokens(1, 9)
    with torch.no_grad(), sp.scheduled(model, sp.PhaseSchedule([0, 1], [None, plan])):
        whole, shorter = model(ids).logits, model(ids).logits
        expected = compact(ids).logits
    assert not torch.allclose(whole, shorter)
    torch.testing.assert_close(shorter, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", GONE)
def test_the_projection_before_learns_what_goes_where_it_can(what):
    """A block that writes a linear map of what the projection before it reads is given back whole."""
    model = toy(seed=3)
    given = tokens(24, 16)
    rows = calibrate(model, given, levels=(0.3, 0.6))
    plan = plan_without(model, [1], what)
    dense = logits(model)
    bare = logits(sp.apply(copy.deepcopy(model), plan)) - dense
    repaired = logits(sp.apply(copy.deepcopy(model), plan, calibration=rows)) - dense
    assert repaired.norm() < bare.norm()


def test_repair_of_the_projection_before_is_the_least_squares_fit_of_both():
    model = toy(seed=3)
    rows = calibrate(model, tokens(24, 16), levels=(0.3, 0.6))
    plan = plan_without(model, [1])
    inputs, entering, leaving = [], [], []
    adapter = sp.adapter_for(model)

    def look(module, args, out):
        inputs.append(args[0])
        entering.append(out)

    hooks = [
        model.blocks[0].ff_out.register_forward_hook(look),
        model.blocks[1].register_forward_hook(lambda m, args, out: leaving.append(out - args[0])),
    ]
    with torch.no_grad():
        adapter.predict(rows.ids)
    for hook in hooks:
        hook.remove()
    x = inputs[0].flatten(0, 1).double()
    y = (entering[0] + leaving[0]).flatten(0, 1).double()
    weight = model.blocks[0].ff_out.weight.detach().double()
    damping = 1e-2 * x.square().mean() * len(x)
    stacked = torch.cat((x, damping.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)))
    wanted = torch.cat((y, damping.sqrt() * weight.T))
    expected = torch.linalg.lstsq(stacked, wanted).solution.T
    compact = sp.apply(model, plan, calibration=rows)
    got = compact.blocks[0].ff_out.weight.double()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    assert compact.blocks[2].ff_out.weight.shape == weight.shape


def test_a_repair_that_fails_in_a_gap_leaves_the_model_as_it_was(monkeypatch):
    from sinkprune.pruning import repacking

    model = toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = calibrate(model, tokens(4, 12), levels=(0.5,))

    def fail(*args, **keywords):
        raise RuntimeError("no room")

    monkeypatch.setattr(repacking, "install_compact", fail)
    with pytest.raises(RuntimeError, match="no room"):
        sp.apply(model, plan_without(model, [1]), calibration=rows)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_without_two_blocks_of_six_repair_is_no_worse_than_none_on_a_trained_model():
    model, tokenizer = sp.load("tiny")
    rows = calibrate(model, sp.texts("calibration"), tokenizer=tokenizer, sequences=16)
    plan = sp.plan(model, targets="blocks", unit="blocks", ratio=0.34, calibration=rows)
    settings = {"tokenizer": tokenizer, "windows": 16, "draws": 1, "levels": (0.5,)}
    found = []
    for calibration in (None, rows):
        pruned = sp.apply(copy.deepcopy(model), plan, calibration=calibration)
        found.append(sp.evaluate(pruned, sp.texts("held_out"), **settings))
    bare, repaired = found
    assert repaired.interval(bare).high < 0
