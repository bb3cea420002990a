"""Allocation: caps, rounding, whole layers and FLOPs, counted by hand."""

import pytest
import torch
from toys import MASK, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.calibration import Calibration, calibrate
from sinkprune.planning.allocation import Rules, best_channels, fewest_channels, head_units, remove_heads
from sinkprune.planning.criteria import HeadCriterion
from sinkprune.plans import Geometry

MODEL = toy(n_layers=4, n_kv_heads=2)
WIDE = toy(n_heads=8, n_kv_heads=2, d_model=64, mlp_hidden_size=96)


def removed(plan):
    return [n - len(layer.kept_heads) for n, layer in zip(plan.geometry.heads, plan.layers, strict=True)]


class ByLayer(HeadCriterion):
    """Every head of layer 0 before any of layer 1, and so on."""

    name = "by_layer"

    def score(self, adapter, evidence):
        heads = max(adapter.geometry().heads)
        return torch.arange(float(heads * adapter.geometry().num_layers)).view(-1, heads)


def multiply_adds(config, heads, channels, length):
    """Per token of one layer: projections of the kept heads and of the key/value heads they read, scores and
    mix, MLP."""
    d, hd, group = config.d_model, config.head_dim, config.n_heads // config.kv_heads
    key_values = len({head // group for head in heads})
    projections = 2 * d * hd * len(heads) + 2 * d * hd * key_values
    return projections + 2 * length * hd * len(heads) + 3 * d * channels


def model_multiply_adds(model, plan, length):
    config = model.config
    every = [(range(config.n_heads), config.mlp_width)] * config.n_layers
    if plan is not None:
        every = [
            (p.kept_heads, config.mlp_width if p.kept_channels is None else len(p.kept_channels))
            for p in plan.layers
        ]
    return sum(multiply_adds(config, heads, channels, length) for heads, channels in every)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_no_layer_loses_more_than_its_cap(share):
    options = {"criterion": ByLayer(), "max_layer_share": share, "min_heads": 0}
    most = int(8 * share + 1e-9)
    plan = sp.plan(WIDE, ratio=most / 8 * 0.5, **options)
    assert plan.heads_removed == round(most * 3 * 0.5)
    filled = plan.heads_removed
    expected = [min(most, max(0, filled - most * i)) for i in range(3)]
    assert removed(plan) == expected
    if share < 1:
        with pytest.raises(ValueError, match=f"at most {most / 8:.3f} of the heads can go"):
            sp.plan(WIDE, ratio=most / 8 + 0.1, **options)


def test_the_cap_holds_for_channels_and_whole_groups():
    plan = sp.plan(
        WIDE, criterion=ByLayer(), ratio=0.3, unit="parameters", targets=("heads", "mlp"),
        max_layer_share=0.5, whole_groups=True,
    )  # fmt: skip
    assert max(removed(plan)) <= 4
    assert all(gone % 4 == 0 for gone in removed(plan))
    assert all(len(layer.kept_channels) >= 48 for layer in plan.layers)
    with pytest.raises(ValueError, match=r"removing mlp takes at most 0\.\d+ of the block parameters"):
        sp.plan(WIDE, criterion=ByLayer(), ratio=0.7, unit="parameters", targets="mlp", max_layer_share=0.5)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_a_layer_that_loses_heads_keeps_a_multiple(multiple, allocation):
    for ratio in (0.1, 0.25, 0.4, 0.5):
        plan = sp.plan(WIDE, criterion="random", ratio=ratio, round_heads=multiple, allocation=allocation)
        assert all(gone == 0 or (8 - gone) % multiple == 0 for gone in removed(plan))
        assert all(8 - gone >= 1 for gone in removed(plan))
        assert abs(plan.heads_removed - 24 * ratio) <= multiple / 2 + 0.5


def test_rounding_removes_the_weakest_heads_first():
    scores = torch.tensor([[5.0, 1.0, 4.0, 0.0, 3.0, 2.0, 7.0, 6.0]])
    geometry = Geometry("toy", 8, 1, 10, 10, (8,), (8,), (0,))
    units = head_units(geometry, scores, Rules(round_heads=3, min_heads=1))[0]
    assert [unit.heads for unit in units] == [[1, 3], [2, 4, 5]]  # 6 are left, then 3
    assert [unit.score for unit in units] == [0.5, 3.0]
    kept = remove_heads(geometry, [units], 5, "global", None)
    assert kept == [[0, 6, 7]]


@pytest.mark.parametrize("multiple", [8, 16, 32])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.55])
def test_a_layer_that_loses_channels_keeps_a_multiple(multiple, ratio):
    plan = sp.plan(
        WIDE, criterion="magnitude", ratio=ratio, unit="parameters", targets=("heads", "mlp"),
        round_channels=multiple,
    )  # fmt: skip
    for layer in plan.layers:
        assert len(layer.kept_channels) % multiple == 0
        assert layer.kept_channels == sorted(set(layer.kept_channels))
    off = 3 * 64 * 3 * multiple / 2 + 4 * 64 * 8 / 2  # a layer's rounding in every layer, and half a head
    asked = ratio * model_multiply_adds(WIDE, None, 0)
    assert abs(model_multiply_adds(WIDE, None, 0) - model_multiply_adds(WIDE, plan, 0) - asked) <= off + 1


@pytest.mark.parametrize(
    ("width", "share", "multiple", "fewest"),
    [
        (96, 1.0, 1, 1), (96, 0.5, 1, 48), (96, 1.0, 16, 16), (96, 0.6, 16, 48), (10, 1.0, 16, 10),
        (10, 0.9, 1, 1),
    ],
)  # fmt: skip
def test_the_fewest_channels_of_a_layer(width, share, multiple, fewest):
    assert fewest_channels(width, Rules(max_layer_share=share, round_channels=multiple)) == fewest


@pytest.mark.parametrize("targets", [("heads",), ("mlp",), ("heads", "mlp")])
@pytest.mark.parametrize("length", [1, 64, 4096])
@pytest.mark.parametrize("model", [MODEL, WIDE], ids=["small", "wide"])
def test_a_share_of_flops_is_met_to_the_nearest_unit(model, length, targets):
    total = model_multiply_adds(model, None, length)
    per_head = 2 * model.config.head_dim * (2 * model.config.d_model + length)
    per_channel = 3 * model.config.d_model * model.config.n_layers
    unit = {("heads",): per_head, ("mlp",): per_channel}.get(targets, max(per_head, per_channel))
    tried = 0
    for ratio in (0.005, 0.05, 0.1, 0.3, 0.5):
        options = {"unit": "flops", "length": length, "targets": targets, "criterion": "random"}
        try:
            plan = sp.plan(model, ratio=ratio, **options)
        except ValueError as error:
            assert "of the block FLOPs" in str(error)
            continue
        tried += 1
        gone = total - model_multiply_adds(model, plan, length)
        assert abs(gone - ratio * total) <= unit / 2 + 1
        assert (plan.unit, plan.details["length"]) == ("flops", length)
    assert tried >= 1


def test_whole_layers_go_together_by_their_mean_score():
    scores = torch.tensor(
        [[3.0, 3.0, 3.0, 3.0], [9.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [4.0, 4.0, 4.0, 4.0]]
    )

    class Fixed(HeadCriterion):
        name = "fixed"

        def score(self, adapter, evidence):
            return scores

    for count, gone in ((1, [2]), (2, [1, 2]), (3, [0, 1, 2])):
        plan = sp.plan(MODEL, criterion=Fixed(), ratio=count / 4, whole_layers=True)
        assert [i for i, layer in enumerate(plan.layers) if not layer.kept_heads] == gone
        assert all(len(layer.kept_heads) in (0, 4) for layer in plan.layers)


def test_a_rule_for_layers_takes_whole_layers_and_the_model_runs_without_them():
    rows = calibrate(toy(), tokens(100), sequences=3, length=10)
    model = toy()
    with torch.no_grad():
        model.blocks[1].attn_out.weight.mul_(0.01)
    plan = sp.plan(model, criterion="layer_output_change", ratio=1 / 3, whole_layers=True, calibration=rows)
    assert [len(layer.kept_heads) for layer in plan.layers] == [4, 0, 4]
    with torch.no_grad():
        before = model(rows.ids).logits
        after = sp.apply(model, plan)(rows.ids).logits
    assert (before - after).abs().max() < 0.1


@pytest.mark.parametrize("rule", ["wanda", "sink_wanda", "flap"])
def test_channel_rules_choose_the_channels_of_the_highest_scores(rule):
    from sinkprune.evidence.evidence import Evidence
    from sinkprune.planning.channels import channel_scores

    rows = calibrate(WIDE, tokens(100), sequences=3, length=10)
    options = {"criterion": "magnitude", "ratio": 0.2, "unit": "parameters", "targets": ("mlp",)}
    plan = sp.plan(WIDE, calibration=rows, channel_rule=rule, **options)
    for i, layer in enumerate(plan.layers):
        scores = channel_scores(rule, sp.adapter_for(WIDE), Evidence(calibration=rows), i).tolist()
        best = sorted(range(96), key=lambda c, scores=scores: -scores[c])[: len(layer.kept_channels)]
        assert layer.kept_channels == sorted(best)
    assert plan.details["channel_rule"] == rule
    with pytest.raises(ValueError, match=f"channel rule '{rule}' needs calibration=sp.calibrate"):
        sp.plan(WIDE, channel_rule=rule, **options)


def test_best_channels_are_sorted_ids_of_the_largest():
    assert best_channels([torch.tensor([0.0, 5.0, 3.0, 9.0])], [2]) == [[1, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_layer_share": 0.0}, r"max_layer_share must lie in \(0, 1\], got 0.0"),
        ({"max_layer_share": 1.5}, r"max_layer_share must lie in \(0, 1\], got 1.5"),
        ({"max_layer_share": float("nan")}, "max_layer_share must lie in"),
        ({"round_heads": 0}, "round_heads and round_channels must be at least 1, got 0 and 1"),
        ({"round_channels": -4}, "must be at least 1, got 1 and -4"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"channel_rule": "wnada"}, "unknown channel rule 'wnada'; known: .*did you mean 'wanda'"),
        ({"channel_rule": "xyz"}, "unknown channel rule 'xyz'; known: magnitude, wanda, sink_wanda, flap$"),
        ({"criterion": "output_norm"}, "criterion 'output_norm' needs calibration=sp.calibrate"),
        ({"unit": "flop"}, "unit must be one of .*, got 'flop'"),
        ({"ratio": 0.9, "unit": "flops"}, r"ratio 0.9 is out of reach: removing heads takes at most 0\.\d+"),
        ({"ratio": 0.6, "max_layer_share": 0.5}, "at most 0.500 of the heads can go"),
        ({"ratio": 0.9, "round_heads": 2}, "at most 0.500 of the heads can go"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sp.plan(MODEL, **({"criterion": "random", "ratio": 0.3} | change))


def test_activations_that_are_not_finite_are_refused():
    model = toy()
    with torch.no_grad():
        model.blocks[2].q_proj.weight[0, 0] = float("nan")
    ids = tokens(2, 6)
    rows = Calibration(ids, ids, ids == MASK)
    for rule in ("wanda", "flap"):
        with pytest.raises(ValueError, match="activations of layer 2 are not finite"):
            sp.plan(
                model, criterion="random", ratio=0.2, unit="parameters", targets="mlp", channel_rule=rule,
                calibration=rows,
            )  # fmt: skip


def test_a_plan_with_evidence_depends_on_its_arguments_alone():
    rows = calibrate(MODEL, tokens(100), sequences=3, length=10)
    options = {"criterion": "flap", "ratio": 0.3, "unit": "flops", "targets": ("heads", "mlp")}
    one, two = (sp.plan(MODEL, calibration=rows, channel_rule="flap", **options) for _ in range(2))
    assert one == two
    assert one.details | {"round_heads": 1, "max_layer_share": 1.0, "whole_layers": False} == one.details
