"""Layers that are not what the config says: narrowed by other tools, or with a config each."""

import copy

import pytest
import torch
from block_causals import toy_sdar
from decoder_twins import illada_twin
from dreams import toy_dream
from hf import build
from layer_twins import sdar_twin
from torch import nn
from toys import assert_same_tensors, bits, manual_plan, one_thread, tokens, toy  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp

FAMILIES = {
    "native LLaDA": toy, "native Dream": toy_dream, "native SDAR": toy_sdar, "live LLaDA": llada_twin,
    "live Dream": dream_twin, "live SDAR": sdar_twin, "live iLLaDA": illada_twin,
    "Qwen3": lambda: build("qwen3, bidirectional"), "BERT": lambda: build("bert"),
    "ModernBERT": lambda: build("modernbert"),
}  # fmt: skip
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
LEFT = [0, 3, 4, 8, 15, 16, 22, 23, 39]  # channels of layer 1
HEADS, CHANNELS = [[0, 2], [1], [0, 1, 3]], [None, [0, 4, 7], [5, 6]]


def smaller(linear, rows=None, columns=None):
    """As a tool that prunes does it: a parameter of fewer rows or columns in the same module."""
    with torch.no_grad():
        weight = linear.weight if rows is None else linear.weight[rows]
        weight = weight if columns is None else weight[:, columns]
        if rows is not None and linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows].clone())
    linear.weight = nn.Parameter(weight.clone())
    linear.out_features, linear.in_features = weight.shape


def narrowed(model, layer=1):
    """``model`` with the channels LEFT of one layer; and its linear layers by role."""
    linears = sp.adapter_for(model).linears(layer)
    smaller(linears["down"], columns=LEFT)
    for role in {"gate", "up", "gate_up"} & set(linears):
        smaller(linears[role], LEFT + [40 + i for i in LEFT] if role == "gate_up" else LEFT)
    return linears


def zeroed_by_hand(model, heads, channels):
    """A copy with zeros in the columns that read removed heads and channels."""
    model = copy.deepcopy(model)
    adapter = sp.adapter_for(model)
    for layer in range(3):
        linears, width = adapter.linears(layer), adapter.geometry().head_dim
        with torch.no_grad():
            for head in set(range(4)) - set(heads[layer]):
                linears["o"].weight[:, head * width : (head + 1) * width] = 0
            down = linears["down"].weight
            down[:, list(set(range(down.shape[1])) - set(channels[layer] or range(down.shape[1])))] = 0
    return model


@torch.no_grad()
def logits(model):
    return sp.adapter_for(model).predict(tokens(2, 8))


@every_family
def test_a_narrowed_mlp_is_planned_and_pruned_by_what_it_holds(make):
    model = make()
    whole = zeroed_by_hand(model, [list(range(4))] * 3, [None, LEFT, None])
    narrowed(model)
    adapter = sp.adapter_for(model)
    assert adapter.geometry().channels == (40, len(LEFT), 40)
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-5, rtol=1e-4)
    wanted = {"ratio": 0.3, "unit": "parameters", "targets": ("heads", "mlp")}
    plan = sp.plan(model, criterion="magnitude", **wanted)
    assert 0 < len(plan.layers[1].kept_channels) < len(LEFT)
    by_hand = manual_plan(model, HEADS, CHANNELS)
    expected = logits(zeroed_by_hand(model, HEADS, CHANNELS))
    for how in ({"mode": "mask"}, {}, {"low_memory": True}):
        pruned = sp.apply(copy.deepcopy(model), by_hand, **how)
        torch.testing.assert_close(logits(pruned), expected, atol=2e-5, rtol=1e-4)
        assert sp.adapter_for(pruned).geometry() == adapter.geometry()


@every_family
def test_what_no_config_says_is_not_saved(make, tmp_path):
    model = make()
    narrowed(model)
    for form in ("dense", "mask", "compact"):
        pruned = copy.deepcopy(model)
        if form != "dense":
            sp.apply(pruned, manual_plan(pruned, HEADS, CHANNELS), mode=form)
        with pytest.raises(
            ValueError, match=r"by (its|the model's) config|channels .* in the plan and \(40, 40"
        ):
            sp.save(pruned, tmp_path / "m")
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["native LLaDA", "native SDAR", "live Dream", "Qwen3"])
def test_what_could_not_be_read_back_is_not_exported(name, tmp_path):
    """Where layers come out alike a config can say them, whatever they were; else the dense one is needed."""
    model, ids = FAMILIES[name](), tokens(2, 8)
    narrowed(model)
    sp.apply(model, manual_plan(model, [[0, 1]] * 3, [[0, 1, 2]] * 3))
    with pytest.raises(ValueError, match=r"by the model's config|channels .* in the plan and \(40, 40"):
        sp.export(model, tmp_path / "m.gguf", to="gguf")
    if name in ("native SDAR", "Qwen3"):
        back, _ = sp.load(sp.export(model, tmp_path / "m"))
        torch.testing.assert_close(sp.adapter_for(back).predict(ids), logits(model), atol=2e-5, rtol=1e-4)
    else:
        with pytest.raises(ValueError, match=r"by the model's config|channels .* in the plan and \(40, 40"):
            sp.export(model, tmp_path / "m")
    assert {path.name for path in tmp_path.iterdir()} <= {"m"}


def of_several_configs():
    """A Qwen3 whose layers have 4 query heads on 2, 2 on 1 and 4 on 4."""
    model = build("qwen3, bidirectional")
    own = {1: {"num_attention_heads": 2, "num_key_value_heads": 1}, 2: {"num_key_value_heads": 4}}
    own[2]["intermediate_size"] = 24
    config = copy.deepcopy(model.config)
    config.per_layer_config = own
    torch.manual_seed(1)
    for layer in own:
        module = model.model.layers[layer]
        module.self_attn = type(module.self_attn)(config.per_layer_config[layer], layer)
        module.mlp = type(module.mlp)(config.per_layer_config[layer])
    model.config = model.model.config = config
    return model.eval()


def test_layers_with_a_config_each_are_read_layer_by_layer():
    model = of_several_configs()
    geometry = sp.adapter_for(model).geometry()
    assert (
        geometry.heads == (4, 2, 4) and geometry.kv_heads == (2, 1, 4) and geometry.channels == (40, 40, 24)
    )
    heads, channels = [[0, 2], [1], [0, 1, 3]], [None, [0, 7], [5, 6, 23]]
    expected = logits(zeroed_by_hand(model, [heads[0], [1, 2, 3], heads[2]], channels))
    plan = manual_plan(model, heads, channels)
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), plan, mode=mode)
        torch.testing.assert_close(logits(pruned), expected, atol=1e-5, rtol=1e-4)
    profile = sp.profile(model, tokens(2, 4), steps=2, gen_length=2)
    assert sp.plan(model, profile, "sink_variance", ratio=0.4).heads_removed == 4


def query_rows(linears):
    smaller(linears["q"], rows=list(range(24)))


def three_heads_on_two(linears):
    smaller(linears["q"], rows=list(range(24)))
    smaller(linears["o"], columns=list(range(24)))


def values_without_their_keys(linears):
    smaller(linears["v"], rows=list(range(8)))


def up_without_gate(linears):
    smaller(linears["up"], rows=LEFT)


@pytest.mark.parametrize(
    ("make", "broken", "message"),
    [
        (lambda: build("qwen3"), query_rows, r"of layer 1 does not fit together: q 24x32, .*o 32x32"),
        (lambda: build("qwen3"), three_heads_on_two, "layer 1 has 3 query heads on 2 key/value heads"),
        (dream_twin, values_without_their_keys, "attention of layer 1 does not fit together: .* v 8x32"),
        (toy, up_without_gate, "the MLP of layer 1 does not fit together: .* up 9x32, down 32x40"),
        (lambda: llada_twin(n_kv_heads=2), three_heads_on_two, "layer 1 has 3 query heads on 2 key"),
        (toy, three_heads_on_two, "layer 1 has 3 query heads on 4 key/value heads"),
    ],
)  # fmt: skip
def test_modules_that_do_not_fit_each_other_are_refused_by_layer(make, broken, message):
    model = make()
    plan = manual_plan(make(), HEADS)
    broken(sp.adapter_for(model).linears(1))
    before = bits(model)
    for verb in (
        lambda: sp.plan(model, criterion="magnitude", ratio=0.3),
        lambda: sp.apply(model, plan),
        lambda: sp.profile(model, tokens(1, 4), steps=1, gen_length=1),
    ):
        with pytest.raises(ValueError, match=message):
            verb()
    assert_same_tensors(model.state_dict(), before)


def test_native_layers_with_other_heads_than_their_config_says_are_refused():
    """Which the forward reads: nothing it computed would be right."""
    model = toy()
    linears = sp.adapter_for(model).linears(1)
    for role in "qkv":
        smaller(linears[role], rows=list(range(16)))
    smaller(linears["o"], columns=list(range(16)))
    with pytest.raises(ValueError, match=r"have \(4, 2, 4\) query heads .* config.* says \(4, 4, 4\)"):
        sp.plan(model, criterion="magnitude", ratio=0.3)


def test_heads_of_several_widths_are_refused():
    for model in (build("llama"), sdar_twin()):
        attention = model.model.layers[2].self_attn
        usual, attention.head_dim = attention.head_dim, 16
        with pytest.raises(ValueError, match=f"layer 2 have 16 features and those of layer 0 {usual}"):
            sp.plan(model, criterion="magnitude", ratio=0.3)
