"""Criteria that look at calibration rows, and rules for channels and layers, against their formulas."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf import build
from toys import MASK, bits, forward_of, one_thread, straight_forward, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.activations import gather
from sinkprune.evidence.calibration import Calibration, calibrate
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.channels import CHANNEL_RULES, channel_scores
from sinkprune.planning.criteria import criterion_for, criterion_names
from sinkprune.planning.criteria.reconstruction import DAMPING, removal_errors

WIDTH = 8


def rows_of(count=4, length=12, padded=True):
    given = tokens(count, length, seed=2)
    valid = torch.ones_like(given)
    if padded:
        valid[0, :3] = 0
    return calibrate(toy(), given, attention_mask=valid, levels=(0.3, 0.7))


MODELS = {
    "llada": toy,
    "llada, grouped, biases": lambda: toy(n_kv_heads=2, include_bias=True),
    "bert": lambda: build("bert"),
}


def scores_of(name, model, rows=None, profile=None):
    return criterion_for(name).score(sp.adapter_for(model), Evidence(profile, rows))


def given_to(model, rows, role):
    """What reaches a linear module of each layer, its valid tokens: float64 ``[tokens, columns]``."""
    adapter, found = sp.adapter_for(model), []
    layers = range(adapter.geometry().num_layers)
    hooks = [
        adapter.linears(i)[role].register_forward_pre_hook(lambda m, args: found.append(args[0]))
        for i in layers
    ]
    with torch.no_grad():
        adapter.predict(rows.ids, rows.valid)
    for hook in hooks:
        hook.remove()
    return [x.double() if rows.valid is None else x[rows.valid].double() for x in found]


def written(model, rows):
    """What each head adds to the stream: per layer float64 ``[heads, tokens, hidden]``."""
    adapter, layers = sp.adapter_for(model), []
    for i, x in enumerate(given_to(model, rows, "o")):
        o = adapter.attention_weights(i).o.detach().double()
        parts = [slice(head * WIDTH, (head + 1) * WIDTH) for head in range(4)]
        layers.append(torch.stack([x[:, part] @ o[:, part].T for part in parts]))
    return layers


def stream(model, rows):
    """Mean square of each block's outputs over valid tokens and features."""
    found, adapter = [], sp.adapter_for(model)
    hooks = [
        block.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for block in adapter.blocks()
    ]
    with torch.no_grad():
        adapter.predict(rows.ids, rows.valid)
    for hook in hooks:
        hook.remove()
    return [x[rows.valid].double().square().mean().item() for x in found]


@pytest.mark.parametrize("which", MODELS)
def test_norm_fluctuation_and_layer_change_are_energies_of_what_is_written(which):
    model, rows = MODELS[which](), rows_of()
    squares, energies = stream(model, rows), written(model, rows)
    norm, relative, fluctuation, change = (
        scores_of(name, model, rows)
        for name in ("output_norm", "output_norm:relative=true", "fluctuation", "layer_output_change")
    )
    for i, (added, square) in enumerate(zip(energies, squares, strict=True)):
        energy = added.square().sum(2).mean(1)
        torch.testing.assert_close(norm[i].double(), energy.sqrt(), rtol=1e-4, atol=0)
        torch.testing.assert_close(relative[i].double(), (energy / square).sqrt(), rtol=1e-4, atol=0)
        moving = (added - added.mean(1, keepdim=True)).square().sum(2).mean(1) / square
        torch.testing.assert_close(fluctuation[i].double(), moving, rtol=1e-3, atol=1e-7)
        whole = added.sum(0).square().sum(1).mean() / square
        torch.testing.assert_close(change[i].double(), whole.expand(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sink_removed_is_what_is_written_without_the_sinks_column(kv_heads):
    model, rows = toy(n_kv_heads=kv_heads, sharpness=3.0), rows_of()
    probabilities = []
    forward_of(model, rows.ids, rows.valid, probabilities)
    values = []
    hooks = [
        b.v_proj.register_forward_hook(lambda m, a, out: values.append(out.double())) for b in model.blocks
    ]
    with torch.no_grad():
        model(rows.ids, attention_mask=rows.valid)
    for hook in hooks:
        hook.remove()
    got, stood = scores_of("sink_removed", model, rows), 0
    for layer, head in itertools.product(range(3), range(4)):
        shared = head * kv_heads // 4
        o = model.blocks[layer].attn_out.weight[:, head * WIDTH : (head + 1) * WIDTH].detach().double()
        left = []
        for row, attention in enumerate(probabilities):
            seen = attention[layer, head][rows.valid[row]].clone()
            mass = seen.mean(0)
            if mass.max() >= 4 / rows.valid[row].sum():
                stood += 1
                seen[:, mass.argmax()] = 0
            left.append(seen @ values[layer][row, :, shared * WIDTH : (shared + 1) * WIDTH] @ o.T)
        x = torch.cat(left)
        expected = (x - x.mean(0)).square().sum(1).mean() / stream(model, rows)[layer]
        assert got[layer, head].item() == pytest.approx(expected.item(), rel=2e-3)
    assert 0 < stood < 12 * len(rows.ids)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("which", MODELS)
def test_wanda_of_a_head_is_the_mean_of_weights_times_root_mean_squares(which, soft):
    model, rows = MODELS[which](), rows_of()
    adapter = sp.adapter_for(model)
    got = scores_of(f"wanda_head:soft_sink={str(soft).lower()}", model, rows)
    seen, x_q, x_o = gather(adapter, rows), given_to(model, rows, "q"), given_to(model, rows, "o")
    group = 4 // adapter.geometry().kv_heads[0]
    for layer, head in itertools.product(range(3), range(4)):
        w = adapter.attention_weights(layer)
        entry = seen[layer].attention_moment_soft if soft else x_q[layer].square().mean(0)
        own, shared = (slice(h * WIDTH, (h + 1) * WIDTH) for h in (head, head // group))
        parts = [(m.double().abs() * entry.sqrt()).mean() for m in (w.q[own], w.k[shared], w.v[shared])]
        parts.append((w.o[:, own].double().abs() * x_o[layer][:, own].square().mean(0).sqrt()).mean())
        assert got[layer, head].item() == pytest.approx(sum(parts).item(), rel=1e-4)


@pytest.mark.parametrize("which", MODELS)
def test_flap_is_standardised_fluctuation_times_weights(which):
    model, rows = MODELS[which](), rows_of()
    adapter, got = sp.adapter_for(model), scores_of("flap", model, rows)
    for layer, x in enumerate(given_to(model, rows, "o")):
        o = adapter.attention_weights(layer).o.detach().double()
        values = (x.var(0, correction=0) * o.square().sum(0)).view(4, WIDTH).sum(1)
        expected = (values - values.mean()) / values.std(correction=0)
        torch.testing.assert_close(got[layer].double(), expected, atol=2e-3, rtol=2e-3)


def refit_error(x, y, kept):
    """Least squares of ``y`` on the columns ``kept`` of ``x``, by numpy: sum of squares left."""
    if not kept:
        return float((y**2).sum())
    solved = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    return float(((y - x[:, kept] @ solved) ** 2).sum())


def columns(heads, width=3):
    return [head * width + i for head in heads for i in range(width)]


def test_removal_errors_are_those_of_least_squares_refits():
    g = np.random.default_rng(0)
    x = g.normal(size=(200, 12)) @ g.normal(size=(12, 12))
    weight = g.normal(size=(7, 12))
    y = x @ weight.T
    got = removal_errors(torch.from_numpy(weight), torch.from_numpy(x.T @ x), 4).tolist()
    left, worst, before, expected = [0, 1, 2, 3], 0.0, 0.0, [0.0] * 4
    while left:
        costs = {h: refit_error(x, y, columns(o for o in left if o != h)) for h in left}
        cheapest = min(costs, key=costs.get)
        worst = max(worst, costs[cheapest] - before)
        expected[cheapest], before = worst, costs[cheapest]
        left.remove(cheapest)
    assert got == pytest.approx(expected, rel=1e-7)
    assert before == pytest.approx((y**2).sum(), rel=1e-9)


def test_of_two_heads_that_can_stand_in_for_each_other_only_one_is_free():
    g = np.random.default_rng(1)
    x = g.normal(size=(200, 12))
    x[:, 3:6] = x[:, 9:12] @ g.normal(size=(3, 3))
    gram = torch.from_numpy(x.T @ x) + 1e-7 * torch.eye(12, dtype=torch.float64)
    errors = removal_errors(torch.from_numpy(g.normal(size=(7, 12))), gram, 4)
    free = errors < 1e-3
    assert free.sum() == 1
    assert free[1] or free[3]
    assert errors[~free].min() > 10


def attended(model, rows, layer):
    """What the norm before a native LLaDA's MLP is given, its valid tokens: float64 ``[tokens, hidden]``."""
    found = []
    hook = model.blocks[layer].ff_norm.register_forward_pre_hook(lambda m, args: found.append(args[0]))
    with torch.no_grad():
        sp.adapter_for(model).predict(rows.ids, rows.valid)
    hook.remove()
    return found[0][rows.valid].double()


def test_reconstruction_looks_at_centred_damped_inputs_relative_to_each_tokens_stream():
    model, rows = toy(n_kv_heads=2), rows_of()
    got = scores_of("reconstruction", model, rows)
    for layer, x in enumerate(given_to(model, rows, "o")):
        weight = 1 / attended(model, rows, layer).square().mean(1, keepdim=True)
        mean = (x * weight).sum(0) / weight.sum()
        centred = ((x - mean) * weight.sqrt()).numpy() / np.sqrt(len(x))
        strength = DAMPING * (centred**2).sum(0).mean()
        padded = np.vstack([centred, np.sqrt(strength) * np.eye(32)])
        y = padded @ model.blocks[layer].attn_out.weight.detach().double().numpy().T
        costs = [refit_error(padded, y, columns((o for o in range(4) if o != h), WIDTH)) for h in range(4)]
        first = int(np.argmin(costs))
        assert got[layer].argmin() == first
        assert got[layer, first].item() == pytest.approx(costs[first], rel=1e-3)


def test_tokens_with_massive_activations_do_not_hide_what_other_tokens_lose():
    """A token whose hidden state is thousands of times the others': what a head is worth to those stays,
    where a rule that goes by the mean over tokens takes every head for idle."""
    model, rows = toy(), rows_of()
    massive, marked = copy.deepcopy(model), rows.ids[0, 5]
    with torch.no_grad():
        massive.model["transformer"]["wte"].weight[marked, 0] = 1e4
    share = {
        rule: (scores_of(rule, massive, rows).max(1).values / scores_of(rule, model, rows).max(1).values)
        for rule in ("reconstruction", "reconstruction:alike=true", "output_norm:relative=true")
    }
    assert share["reconstruction"].min() > 0.5
    assert max(share["output_norm:relative=true"].max(), share["reconstruction:alike=true"].max()) < 0.01


def masked_by_hand(model, layer, head):
    """A copy whose output projection does not read the head."""
    tensors = bits(model)
    tensors[f"model.transformer.blocks.{layer}.attn_out.weight"][:, head * WIDTH : (head + 1) * WIDTH] = 0
    return tensors


@pytest.mark.parametrize("measure", ["divergence", "loss"])
def test_ablation_is_the_cost_of_each_head_left_out(measure):
    model, rows = toy(n_kv_heads=2), rows_of()
    before = bits(model)

    def log_probabilities(tensors):
        logits = straight_forward(model.config.to_dict(), tensors, rows.ids, rows.valid)
        return logits[rows.masked].log_softmax(-1)

    dense, targets = log_probabilities(model.state_dict()), rows.targets[rows.masked]
    got = scores_of(f"ablation:measure={measure},batch=3", model, rows)
    for layer, head in itertools.product(range(3), range(4)):
        without = log_probabilities(masked_by_hand(model, layer, head))
        if measure == "divergence":
            expected = (dense.exp() * (dense - without)).sum(1).mean()
        else:
            expected = F.nll_loss(without, targets) - F.nll_loss(dense, targets)
        assert got[layer, head].item() == pytest.approx(expected.item(), abs=2e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(block.kept_heads is None for block in model.blocks)


def test_taylor_is_the_slope_of_the_loss_as_a_head_fades():
    model, rows = toy(n_kv_heads=2), rows_of(3, 8)
    got, step = scores_of("taylor:batch=2", model, rows), 1e-5
    config, tensors = model.config.to_dict(), {k: v.double() for k, v in model.state_dict().items()}

    def losses(layer, head, factor):
        name = f"model.transformer.blocks.{layer}.attn_out.weight"
        scaled = tensors[name].clone()
        scaled[:, head * WIDTH : (head + 1) * WIDTH] *= factor
        logits = straight_forward(config, tensors | {name: scaled}, rows.ids, rows.valid)
        return torch.stack([
            F.cross_entropy(row[mask], target[mask])
            for row, mask, target in zip(logits, rows.masked, rows.targets, strict=True)
        ])  # fmt: skip

    for layer, head in itertools.product(range(3), range(4)):
        slope = (losses(layer, head, 1 + step) - losses(layer, head, 1 - step)) / (2 * step)
        assert got[layer, head].item() == pytest.approx(slope.abs().mean().item(), rel=1e-3, abs=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_taylor_goes_through_transformers_modules():
    got = scores_of("taylor", build("bert"), rows_of(3, 8))
    assert (got > 0).all()


def test_rules_of_the_sink_follow_the_profile():
    model = toy(seed=1, sharpness=1.5)
    profile = sp.profile(model, tokens(3, 6), steps=5, gen_length=10)
    mass = torch.nanmean(profile.statistics["mass"], 1)
    torch.testing.assert_close(scores_of("sink_mass", model, profile=profile), mass)
    torch.testing.assert_close(scores_of("sink_mass:keep=weak", model, profile=profile), -mass)
    variance = torch.nanmean(profile.statistics["position_variance"], 1).mean(1)
    got = scores_of("layer_instability", model, profile=profile)
    torch.testing.assert_close(got, -variance[:, None].expand(3, 4))
    gated = profile.statistics["gated_position_variance"]
    per_head = torch.nan_to_num(torch.nanmean(gated, 1))
    got = scores_of("layer_instability:gated=true", model, profile=profile)
    torch.testing.assert_close(got, -per_head.mean(1, keepdim=True).expand(3, 4))
    with pytest.raises(ValueError, match=r"keep must be one of .* got 'both'"):
        scores_of("sink_mass:keep=both", model, profile=profile)


@pytest.mark.parametrize("which", MODELS)
def test_channel_rules_by_hand(which):
    model, rows = MODELS[which](), rows_of()
    adapter, evidence = sp.adapter_for(model), Evidence(calibration=rows)
    seen = gather(adapter, rows)
    entries, channels = given_to(model, rows, "up"), given_to(model, rows, "down")
    for layer in range(3):
        w, x, hidden = adapter.mlp_weights(layer), entries[layer], channels[layer]
        ins = [m.detach().double() for m in (w.gate, w.up) if m is not None]
        down = w.down.detach().double()
        out = down.abs().mean(0) * hidden.square().mean(0).sqrt()
        soft = seen[layer].mlp_moment_soft.sqrt()
        expected = {
            "magnitude": (sum(m.square().sum(1) for m in ins) + down.square().sum(0)).sqrt(),
            "wanda": sum((m.abs() * x.square().mean(0).sqrt()).mean(1) for m in ins) + out,
            "sink_wanda": sum((m.abs() * soft).mean(1) for m in ins) + out,
            "flap": hidden.var(0, correction=0) * down.square().sum(0),
        }
        assert expected.keys() == CHANNEL_RULES.keys()
        for rule, values in expected.items():
            got = channel_scores(rule, adapter, evidence, layer)
            torch.testing.assert_close(got, values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sink_variance:gate=true", "criterion 'sink_variance' takes gated, got 'gate=true'"),
        ("sink_variance:gated", "takes gated, got 'gated'"),
        ("sink_variance:gated=", "takes gated, got 'gated='"),
        ("magnitude:x=1", "criterion 'magnitude' takes no settings, got 'x=1'"),
        ("ablation:measure=loss,size=3", "takes batch, measure, got 'size=3'"),
        ("output_nrom:relative=true", "unknown criterion 'output_nrom'.*did you mean 'output_norm'"),
    ],
)
def test_settings_that_a_criterion_does_not_have_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        criterion_for(name)


def test_settings_follow_the_name():
    rule = criterion_for("ablation:measure=loss,batch=3")
    assert (rule.measure, rule.batch) == ("loss", 3)
    assert criterion_for("sink_variance:gated=true").gated is True
    assert criterion_for("sink_variance:gated=false").gated is False
    made = sp.plan(toy(), criterion="output_norm:relative=true", ratio=0.3, calibration=rows_of())
    assert (made.criterion, made.details["settings"]) == ("output_norm", {"relative": True})
    with pytest.raises(ValueError, match=r"measure must be one of .* got 'flops'"):
        scores_of("ablation:measure=flops", toy(), rows_of())


NEED_ROWS = [name for name in criterion_names() if criterion_for(name).needs_calibration]


def test_the_criteria_that_look_at_rows_are_these():
    assert set(NEED_ROWS) == {
        "ablation", "flap", "fluctuation", "layer_output_change", "output_norm", "reconstruction",
        "sink_removed", "taylor", "wanda_head",
    }  # fmt: skip


@pytest.mark.parametrize("name", NEED_ROWS)
def test_scores_are_float32_repeatable_and_need_their_rows(name):
    model, rows = toy(n_kv_heads=2), rows_of(2, 8)
    with pytest.raises(ValueError, match=f"criterion '{name}' needs calibration=sp.calibrate"):
        sp.plan(model, criterion=name, ratio=0.3)
    first = scores_of(name, model, rows)
    assert (first.dtype, first.shape) == (torch.float32, (3, 4))
    assert torch.equal(scores_of(name, model, rows), first)


def test_rows_of_one_valid_token_are_enough():
    rows = Calibration(torch.full((1, 1), MASK), torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1).bool())
    for name in NEED_ROWS:
        assert torch.isfinite(scores_of(name, toy(), rows)).all(), name
