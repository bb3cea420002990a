"""Whole blocks, or a half of them, as what goes: orders against their formulas, budgets, refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hf import build
from toys import bits, forward_of, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.calibration import calibrate
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.block_rules import BLOCK_TARGETS, block_order


def rows_of(model, padded=True):
    given = tokens(4, 12, seed=2)
    valid = torch.ones_like(given)
    if padded:
        valid[0, :3] = 0
    return calibrate(model, given, attention_mask=valid, levels=(0.3, 0.7))


def order_of(rule, model, rows, target="blocks", most=9, seed=0):
    return block_order(rule, sp.adapter_for(model), Evidence(None, rows, seed), target, most)


def useless(model, layer):
    """Nothing of a block reaches the stream."""
    with torch.no_grad():
        for role in ("o", "down"):
            sp.adapter_for(model).linears(layer)[role].weight.mul_(1e-4)
    return model


def streams(model, rows):
    """What enters every block and leaves the last, valid tokens: ``[tokens, hidden]`` each."""
    found, adapter = [], sp.adapter_for(model)
    hooks = [b.register_forward_pre_hook(lambda m, args: found.append(args[0])) for b in adapter.blocks()]
    hooks.append(adapter.blocks()[-1].register_forward_hook(lambda m, args, out: found.append(out)))
    with torch.no_grad():
        adapter.predict(rows.ids, rows.valid)
    for hook in hooks:
        hook.remove()
    return [hidden[rows.valid.bool()] for hidden in found]


def test_influence_is_one_minus_the_cosine_between_what_enters_and_leaves():
    model = toy()
    rows = rows_of(model)
    through = streams(model, rows)
    pairs = itertools.pairwise(through)
    expected = [float((1 - F.cosine_similarity(a, b, dim=-1)).mean()) for a, b in pairs]
    found = order_of("influence", model, rows)
    assert [layer for layer, _ in found] == sorted(range(3), key=lambda i: expected[i])
    assert dict(found) == pytest.approx(dict(enumerate(expected)), rel=1e-4)


def test_reconstruction_is_what_a_refit_of_the_projection_before_leaves_over():
    model = toy()
    rows = rows_of(model)
    seen = []
    hook = model.blocks[0].ff_out.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    through = streams(model, rows)
    hook.remove()
    x, change = seen[0][rows.valid.bool()].double(), (through[2] - through[1]).double()
    damping = 1e-2 * x.square().sum(0).mean()
    stacked = torch.cat((x, damping.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)))
    fitted = torch.linalg.lstsq(
        stacked, torch.cat((change, torch.zeros(x.shape[1], change.shape[1])))
    ).solution
    expected = (change - x @ fitted).square().sum() / through[2].double().square().sum()
    scores = dict(order_of("reconstruction", model, rows))
    assert scores[1] == pytest.approx(float(expected), rel=1e-3)
    first = (through[1] - through[0]).square().sum() / through[1].square().sum()
    assert scores[0] == pytest.approx(float(first), rel=1e-4)


def test_ablation_takes_the_cheapest_of_those_left_each_time():
    model = toy()
    rows = rows_of(model, padded=False)

    def loss(out):
        plan = sp.plan(model, ratio=0, criterion="magnitude")
        plan.layers = [type(k)([], []) if i in out else k for i, k in enumerate(plan.layers)]
        sp.apply(model, plan, mode="mask")
        with torch.no_grad():
            logits = model(rows.ids).logits
        sp.restore(model)
        return float(F.cross_entropy(logits[rows.masked], rows.targets[rows.masked]))

    first = min(range(3), key=lambda i: loss({i}))
    second = min({0, 1, 2} - {first}, key=lambda i: loss({first, i}))
    before = bits(model)
    found = order_of("ablation", model, rows, most=2)
    assert [layer for layer, _ in found] == [first, second]
    assert [value for _, value in found] == pytest.approx([loss({first}), loss({first, second})], rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), bits(model).values(), strict=True))


@pytest.mark.parametrize("family", ["llada", "llama"])
@pytest.mark.parametrize("target", BLOCK_TARGETS)
@pytest.mark.parametrize("rule", ["influence", "reconstruction"])
def test_a_block_that_adds_nothing_goes_first(rule, target, family):
    model = useless(toy() if family == "llada" else build("llama"), 1)
    given = tokens(3, 12, seed=2, vocabulary=50)
    rows = calibrate(model, given, levels=(0.5,), mask_token_id=55)
    assert order_of(rule, model, rows, target)[0][0] == 1


def test_random_orders_follow_the_seed():
    model = toy(n_layers=8)
    orders = {tuple(layer for layer, _ in order_of("random", model, None, seed=s)) for s in range(6)}
    assert len(orders) > 3 and all(sorted(order) == list(range(8)) for order in orders)


def test_a_share_of_blocks_is_rounded_to_whole_ones_and_the_plan_says_so():
    model = toy(n_layers=6)
    plan = sp.plan(model, targets="blocks", unit="blocks", ratio=0.3, calibration=rows_of(model))
    gone = [i for i, k in enumerate(plan.layers) if k.kept_heads == [] and k.kept_channels == []]
    told = plan.details["blocks"]
    assert len(gone) == 2 and told["removed"] == gone and told["ratio"] == pytest.approx(1 / 3)
    assert (told["ratio_asked"], told["rule"], plan.criterion) == (0.3, "influence", "influence")
    assert told["depth"] == pytest.approx(sum(gone) / 10)
    assert plan.parameters_removed == pytest.approx(1 / 3)
    assert sp.PrunePlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("target, empty", [("attention", "kept_heads"), ("mlp_blocks", "kept_channels")])
def test_half_of_a_block_goes_alone(target, empty):
    plan = sp.plan(toy(), targets=target, unit="blocks", ratio=0.34, block_rule="random")
    gone = plan.details["blocks"]["removed"]
    assert len(gone) == 1
    for layer, kept in enumerate(plan.layers):
        assert (getattr(kept, empty) == []) == (layer in gone)
        assert len(kept.kept_heads) == 4 or empty == "kept_heads"
        assert kept.kept_channels is None or empty == "kept_channels"


@pytest.mark.parametrize("unit", ["parameters", "flops"])
def test_blocks_share_a_budget_with_heads_and_channels(unit):
    model = toy(n_layers=6, n_kv_heads=2)
    plan = sp.plan(
        model, targets=("blocks", "heads", "mlp"), unit=unit, ratio=0.5, criterion="magnitude",
        block_rule="random", length=64,
    )  # fmt: skip
    gone = plan.details["blocks"]["removed"]
    left = [kept for i, kept in enumerate(plan.layers) if i not in gone]
    assert len(gone) == 1  # a third of the half, to the nearest of six
    assert all(0 < len(kept.kept_channels) < 40 for kept in left) and plan.heads_removed > 4
    if unit == "parameters":
        assert plan.parameters_removed == pytest.approx(0.5, abs=0.01)


def test_more_blocks_go_where_heads_and_channels_cannot_give_the_rest():
    model = toy(n_layers=6)
    plan = sp.plan(
        model, targets=("blocks", "heads"), unit="parameters", ratio=0.7, criterion="magnitude",
        block_rule="random",
    )  # fmt: skip
    assert len(plan.details["blocks"]["removed"]) > 2
    assert plan.parameters_removed == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"targets": "blocks", "ratio": 0.9},
            r"removing blocks takes at most 0\.666 of the blocks while one",
        ),
        (
            {"targets": "attention", "unit": "parameters", "ratio": 0.9},
            r"at most 0\.\d{3} of the block parameters",
        ),
        (
            {"targets": ("blocks", "heads"), "unit": "parameters", "ratio": 0.99, "criterion": "magnitude"},
            r"removing blocks and heads takes at most 0\.\d{3} of the block parameters",
        ),
        ({"targets": ("blocks", "heads")}, "do not share a budget"),
        ({"targets": ("attention", "mlp"), "unit": "parameters"}, "do not share a budget"),
        ({"targets": "blocks", "unit": "heads"}, "use unit='blocks'"),
        ({"targets": "mlp"}, "unit='blocks' removes one of blocks, attention, mlp_blocks"),
        ({"targets": "blocks", "block_rule": "influense"}, "did you mean 'influence'"),
        ({"targets": "blocks", "block_rule": "ablation"}, "'ablation' needs calibration"),
        ({"targets": "blocks", "fit": "transformers"}, "without a target speed or fit"),
    ],
)
def test_what_cannot_be_is_refused_by_one_line(settings, message):
    settings = {"unit": "blocks", "ratio": 0.3, "block_rule": "random"} | settings
    with pytest.raises(ValueError, match=message) as caught:
        sp.plan(toy(), **settings)
    assert "\n" not in str(caught.value)
