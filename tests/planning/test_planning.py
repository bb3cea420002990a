"""Plans: the counts they promise, what they refuse, and their files."""

import json
import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.plans import LayerPlan, PrunePlan

MODELS = {
    "mha": toy(n_layers=3),
    "gqa": toy(n_layers=4, n_kv_heads=2),
    "one key/value head": toy(n_kv_heads=1),
    "small mlp": toy(mlp_hidden_size=6),
    "wide mlp": toy(mlp_hidden_size=200, n_layers=2),
}
some_model = st.sampled_from(list(MODELS))
some_ratio = st.integers(0, 999).map(lambda n: n / 1000)


def parameters(model, kept_heads=None, kept_channels=None):
    """Block parameters that stay, counted from the shapes of the live matrices."""
    config, total = model.config, 0
    group = config.n_heads // config.kv_heads
    for layer in range(config.n_layers):
        heads = range(config.n_heads) if kept_heads is None else kept_heads[layer]
        chosen = None if kept_channels is None else kept_channels[layer]
        channels = config.mlp_width if chosen is None else len(chosen)
        key_values = len({head // group for head in heads})
        total += config.head_dim * config.d_model * (2 * len(heads) + 2 * key_values)
        total += channels * config.d_model * 3
    return total


def removed(plan):
    return [n - len(layer.kept_heads) for n, layer in zip(plan.geometry.heads, plan.layers, strict=True)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    which=some_model,
    ratio=some_ratio,
    allocation=st.sampled_from(["global", "uniform"]),
    whole_groups=st.booleans(),
    min_heads=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_a_share_of_heads_is_met_to_the_nearest_unit(which, ratio, allocation, whole_groups, min_heads, seed):
    model = MODELS[which]
    config = model.config
    total, group = config.n_heads * config.n_layers, config.n_heads // config.kv_heads if whole_groups else 1
    reachable = total - min(min_heads * group, config.n_heads) * config.n_layers
    options = {"allocation": allocation, "whole_groups": whole_groups, "min_heads": min_heads, "seed": seed}
    if round(ratio * total) > reachable:
        with pytest.raises(ValueError, match=f"at most {reachable / total:.3f} of the heads can go"):
            sp.plan(model, criterion="random", ratio=ratio, **options)
        return
    plan = sp.plan(model, criterion="random", ratio=ratio, **options)
    assert plan.heads_removed == sum(removed(plan))
    assert abs(plan.heads_removed - ratio * total) <= (0.5 if group == 1 else group / 2 + 0.5)
    for layer, gone in zip(plan.layers, removed(plan), strict=True):
        assert len(layer.kept_heads) >= min(min_heads * group, config.n_heads)
        assert layer.kept_heads == sorted(set(layer.kept_heads))
        if whole_groups:
            assert gone % group == 0
            together = {
                tuple(range(h // group * group, h // group * group + group)) for h in layer.kept_heads
            }
            assert sorted(h for members in together for h in members) == layer.kept_heads
    if allocation == "uniform":
        assert max(removed(plan)) - min(removed(plan)) <= group


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    which=some_model,
    ratio=some_ratio,
    allocation=st.sampled_from(["global", "uniform"]),
    targets=st.sampled_from([("heads",), ("mlp",), ("heads", "mlp")]),
    whole_groups=st.booleans(),
)
@example("small mlp", 0.127, "global", ("heads", "mlp"), False)  # a head is more than was asked for
def test_a_share_of_parameters_is_met_to_the_nearest_unit(which, ratio, allocation, targets, whole_groups):
    model = MODELS[which]
    config = model.config
    total = parameters(model)
    group = config.n_heads // config.kv_heads
    least_heads = (
        [list(range(group if whole_groups else 1))] * config.n_layers if "heads" in targets else None
    )
    least_channels = [[0]] * config.n_layers if "mlp" in targets else None
    most = 1 - parameters(model, least_heads, least_channels) / total
    options = {"targets": targets, "allocation": allocation, "whole_groups": whole_groups}
    if ratio * total > most * total + 0.5:
        stated = f"at most {math.floor(most * 1000) / 1000:.3f} of the block parameters"
        with pytest.raises(ValueError, match=stated):
            sp.plan(model, criterion="magnitude", ratio=ratio, unit="parameters", **options)
        return
    plan = sp.plan(model, criterion="magnitude", ratio=ratio, unit="parameters", **options)
    kept, channels = [p.kept_heads for p in plan.layers], [p.kept_channels for p in plan.layers]
    gone = total - parameters(model, kept, channels)
    assert plan.parameters_removed == pytest.approx(gone / total)
    per_head = 2 * config.head_dim * config.d_model
    head_unit = per_head * (group + 1 if whole_groups else 2)
    channel_unit = 3 * config.d_model * config.n_layers  # a channel goes from every layer at once
    if targets == ("heads",):
        assert abs(gone - ratio * total) <= head_unit / 2 + 1e-6
        assert channels == [None] * config.n_layers
    elif targets == ("mlp",):
        assert abs(gone - ratio * total) <= channel_unit / 2 + 1e-6
        assert removed(plan) == [0] * config.n_layers
    else:
        assert abs(gone - ratio * total) <= max(channel_unit, head_unit) / 2 + 1e-6
    assert min(map(len, kept)) >= 1
    assert all(chosen is None or len(chosen) >= 1 for chosen in channels)


@pytest.mark.parametrize("which", list(MODELS))
@pytest.mark.parametrize("targets", [("heads",), ("mlp",), ("heads", "mlp")])
def test_the_maximum_that_the_error_states_can_be_had(which, targets):
    options = {"criterion": "magnitude", "unit": "parameters", "targets": targets}
    with pytest.raises(ValueError, match="is out of reach") as refused:
        sp.plan(MODELS[which], ratio=0.999, **options)
    stated = float(re.search(r"at most ([\d.]+)", str(refused.value))[1])
    plan = sp.plan(MODELS[which], ratio=stated, **options)
    assert plan.parameters_removed == pytest.approx(stated, abs=0.06)


def magnitudes(model):
    """Norm of each head's weights, head by head."""
    hd, scores = model.config.head_dim, []
    for block in model.blocks:
        row = []
        for head in range(model.config.n_heads):
            own, shared = (
                slice(head * hd, head * hd + hd),
                head // (model.config.n_heads // model.config.kv_heads),
            )
            read = slice(shared * hd, shared * hd + hd)
            parts = [
                block.q_proj.weight[own], block.attn_out.weight[:, own], block.k_proj.weight[read],
                block.v_proj.weight[read],
            ]  # fmt: skip
            row.append(torch.cat([p.flatten() for p in parts]).double().norm().item())
        scores.append(row)
    return scores


@pytest.mark.parametrize("which", ["mha", "gqa"])
def test_global_allocation_removes_the_lowest_scores_of_the_whole_model(which):
    model = MODELS[which]
    scores = magnitudes(model)
    order = sorted((s, layer, head) for layer, row in enumerate(scores) for head, s in enumerate(row))
    expected = {(layer, head) for _, layer, head in order[:3]}
    plan = sp.plan(model, criterion="magnitude", ratio=3 / len(order))
    got = {
        (i, head) for i, layer in enumerate(plan.layers) for head in range(4) if head not in layer.kept_heads
    }
    assert got == expected


def test_uniform_allocation_removes_the_lowest_scores_of_each_layer():
    plan = sp.plan(MODELS["mha"], criterion="magnitude", ratio=0.5, allocation="uniform")
    for row, layer in zip(magnitudes(MODELS["mha"]), plan.layers, strict=True):
        assert layer.kept_heads == sorted(sorted(range(4), key=lambda h, row=row: row[h])[2:])


def test_mlp_pruning_keeps_the_channels_of_largest_magnitude():
    model = MODELS["wide mlp"]
    plan = sp.plan(model, criterion="magnitude", ratio=0.3, unit="parameters", targets=("mlp",))
    for block, layer in zip(model.blocks, plan.layers, strict=True):
        norms = [
            torch.cat((block.ff_proj.weight[c], block.up_proj.weight[c], block.ff_out.weight[:, c])).norm()
            for c in range(200)
        ]
        best = sorted(range(200), key=lambda c, norms=norms: -norms[c])[: len(layer.kept_channels)]
        assert layer.kept_channels == sorted(best)


def test_no_layer_is_emptied_unless_asked_for():
    model = toy()
    with torch.no_grad():  # every head of layer 1 is the least of all
        for part in ("q_proj", "k_proj", "v_proj", "attn_out"):
            getattr(model.blocks[1], part).weight.mul_(1e-3)
    careful = sp.plan(model, criterion="magnitude", ratio=0.5)
    assert len(careful.layers[1].kept_heads) == 1
    assert careful.heads_removed == 6
    explicit = sp.plan(model, criterion="magnitude", ratio=0.5, min_heads=0)
    assert explicit.layers[1].kept_heads == []
    assert explicit.heads_removed == 6


def test_a_plan_depends_on_its_arguments_alone():
    def make(seed):
        return sp.plan(MODELS["gqa"], criterion="random", ratio=0.4, seed=seed)

    torch.manual_seed(0)
    first = make(7)
    torch.manual_seed(1)
    assert make(7) == first
    assert make(8).layers != first.layers


def test_planning_leaves_the_model_as_it_is():
    model = toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sp.plan(model, criterion="magnitude", ratio=0.4, unit="parameters", targets=("heads", "mlp"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sp.adapter_for(model).form == "dense"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"ratio": float("nan")}, "got nan"),
        ({"unit": "layers"}, "unit must be one of .*, got 'layers'"),
        ({"targets": ("neurons",)}, "targets must be chosen from"),
        ({"targets": ()}, "targets must be chosen from"),
        ({"targets": ("heads", "mlp")}, "use unit='parameters'"),
        ({"allocation": "local"}, "allocation must be one of .*, got 'local'"),
        ({"min_heads": -1}, "min_heads must be at least 0, got -1"),
        ({"criterion": "sink_variance"}, "criterion 'sink_variance' needs a profile"),
        ({"ratio": 0.9}, "at most 0.750 of the heads can go while every layer keeps 1"),
        ({"min_heads": 4}, "at most 0.000 of the heads can go while every layer keeps 4"),
        ({"min_heads": 4, "unit": "parameters"}, "at most 0.000 of the block parameters"),
    ],
)
def test_bad_planning_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sp.plan(MODELS["mha"], **({"criterion": "random", "ratio": 0.3} | change))


@pytest.mark.parametrize("unit", ["heads", "parameters"])
def test_a_ratio_of_zero_removes_nothing_even_where_nothing_can_go(unit):
    plan = sp.plan(MODELS["mha"], criterion="random", ratio=0, min_heads=4, unit=unit)
    assert plan.heads_removed == 0
    assert plan.parameters_removed == 0


def test_a_profile_of_other_weights_is_refused():
    profile = sp.profile(toy(seed=5), tokens(1, 4), steps=2, gen_length=4)
    with pytest.raises(ValueError, match="taken of other weights"):
        sp.plan(toy(seed=6), profile, "sink_variance", ratio=0.3)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_a_pruned_model_is_not_planned_again(mode):
    model = toy()
    sp.apply(model, sp.plan(model, criterion="magnitude", ratio=0.3), mode=mode)
    with pytest.raises(ValueError, match=f"already pruned .{mode} form."):
        sp.plan(model, criterion="magnitude", ratio=0.3)


@pytest.mark.parametrize("targets", [("heads",), ("heads", "mlp")])
def test_a_plan_survives_its_file(tmp_path, targets):
    plan = sp.plan(
        MODELS["gqa"], criterion="magnitude", ratio=0.2, unit="parameters", targets=targets, seed=3
    )
    path = tmp_path / "plan.json"
    plan.save(path)
    assert PrunePlan.load(path) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert PrunePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        manual_plan(MODELS["mha"], [[0]] * 3).save(tmp_path / "no such folder" / "plan.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        manual_plan(MODELS["mha"], [[0]] * 3).save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def change(*path, value):
    """An edit of a plan's JSON."""

    def edit(values):
        *parents, last = path
        for key in parents:
            values = values[key]
        if value is KeyError:
            del values[last]
        else:
            values[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("schema", value=99), "expected a prune plan of schema 1 or 2, got .*99"),
        (change("kind", value="sink_profile"), "got kind='sink_profile'"),
        (change("layers", value=KeyError), "malformed prune plan"),
        (change("layers", value=None), "malformed prune plan"),
        (change("layers", 0, value=5), "malformed prune plan"),
        (change("geometry", value=KeyError), "malformed prune plan"),
        (change("geometry", value=None), "malformed prune plan"),
        (change("geometry", "heads", value=4), "malformed prune plan"),
        (change("surprise", value=1), "malformed prune plan"),
        (change("layers", value=[]), "a plan for 3 layers expected, got 0"),
        (change("layers", 1, "kept_heads", value=[2, 1]), "layer 1: kept_heads must be sorted"),
        (change("layers", 1, "kept_heads", value=[1, 1]), "layer 1: kept_heads must be sorted and unique"),
        (change("layers", 1, "kept_heads", value=[0.5]), "layer 1: kept_heads .*integers"),
        (change("layers", 1, "kept_heads", value="01"), "layer 1: kept_heads"),
        (change("layers", 1, "kept_heads", value=None), "kept_heads"),
        (change("layers", 1, "kept_heads", value=3), "kept_heads|malformed"),
        (change("layers", 1, "kept_heads", value=[4]), r"kept_heads must lie in \[0, 4\), got 4"),
        (change("layers", 1, "kept_heads", value=[-1, 2]), r"must lie in \[0, 4\), got -1"),
        (change("layers", 2, "kept_channels", value=[40]), r"kept_channels must lie in \[0, 40\), got 40"),
    ],
)  # fmt: skip
def test_a_tampered_plan_is_refused(tmp_path, edit, message):
    path = tmp_path / "plan.json"
    values = manual_plan(MODELS["mha"], [[0], [1, 2], [3]]).to_dict()
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        PrunePlan.load(path)


@pytest.mark.parametrize("text", ["", "not json", "[1, 2]", '"plan"', "{}"])
def test_a_file_that_is_no_plan_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json|expected a prune plan"):
        PrunePlan.load(path)


def test_a_plan_by_hand_is_checked_too():
    geometry = sp.adapter_for(MODELS["mha"]).geometry()
    with pytest.raises(ValueError, match="layer 0: kept_heads"):
        PrunePlan(geometry, "", [LayerPlan([3, 0]), LayerPlan([0]), LayerPlan([0])])
