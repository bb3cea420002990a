"""Which experts go: rules against references of the tests' own, budgets against what is stored."""

import numpy as np
import pytest
import torch
from block_causals import toy_llada2
from toys import one_thread  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.expert_rules import RIDGE, expert_channel_scores, expert_scores

TEXT = torch.randint(0, 59, (400,), generator=torch.Generator().manual_seed(5))


def rows_of(model, sequences=6):
    return sp.calibrate(model, TEXT, sequences=sequences, length=16, levels=(0.3, 0.8), seed=1)


def plan(model, **settings):
    return sp.plan(
        model, calibration=rows_of(model), **{"targets": ["experts"], "unit": "experts"} | settings
    )


def seen_by(model, calibration, layer):
    """What reaches the experts of a layer in a plain forward, ``[tokens, hidden]``."""
    seen = []
    hook = model.layers[layer].mlp.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(calibration.ids)
    hook.remove()
    return torch.cat(seen)


def routed(mlp, token, out=()):
    """A token's experts and weights, one by one, without those that are out."""
    score = (mlp.gate.weight.detach() @ token).sigmoid()
    rank = {e: float(score[e] + mlp.gate.expert_bias[e]) for e in range(12)}
    groups = [[e for e in range(3 * g, 3 * g + 3) if e not in out] for g in range(4)]
    groups.sort(key=lambda group: -sum(sorted(rank[e] for e in group)[-2:]))
    best = sorted((e for group in groups[:2] for e in group), key=lambda e: -rank[e])[:3]
    whole = sum(float(score[e]) for e in best)
    return {e: 2.5 * float(score[e]) / whole for e in best}


def hidden(mlp, expert, token):
    gate, up = (mlp.experts[expert].get_submodule(n).weight @ token for n in ("gate_proj", "up_proj"))
    return (torch.nn.functional.silu(gate) * up).detach().double().numpy()


def gives(mlp, expert, token):
    return mlp.experts[expert].down_proj.weight.detach().double().numpy() @ hidden(mlp, expert, token)


def test_reap_is_the_mean_weighted_norm_over_an_experts_own_tokens():
    model = toy_llada2()
    calibration = rows_of(model, 2)
    got = expert_scores("reap", sp.adapter_for(model), Evidence(calibration=calibration))
    mlp, sums, counts = model.layers[2].mlp, np.zeros(12), np.zeros(12)
    for token in seen_by(model, calibration, 2):
        for expert, weight in routed(mlp, token).items():
            sums[expert] += weight * np.linalg.norm(gives(mlp, expert, token))
            counts[expert] += 1
    np.testing.assert_allclose(got[2].numpy(), sums / np.maximum(counts, 1), rtol=1e-4)
    assert len(got[0]) == 0


def test_reconstruction_is_what_the_best_refit_leaves_over():
    """Ridge regressions as augmented least squares, token lists in Python."""
    model = toy_llada2()
    calibration = rows_of(model, 2)
    got = expert_scores("reconstruction", sp.adapter_for(model), Evidence(calibration=calibration))[1]
    mlp, tokens = model.layers[1].mlp, seen_by(model, calibration, 1)
    ways = [routed(mlp, token) for token in tokens]
    dense = [sum(w * gives(mlp, e, t) for e, w in way.items()) for way, t in zip(ways, tokens, strict=True)]
    energy = sum((d**2).sum() for d in dense)
    for expert in (0, 4, 11):
        entering, lost, total = {}, {}, 0.0
        for token, way, before in zip(tokens, ways, dense, strict=True):
            if expert not in way:
                continue
            again = routed(mlp, token, out=(expert,))
            left = before - sum(w * gives(mlp, e, token) for e, w in again.items())
            new = max((e for e in again if e not in way), key=lambda e: again[e])
            entering.setdefault(new, []).append(again[new] * hidden(mlp, new, token))
            lost.setdefault(new, []).append(left)
        for other, x in entering.items():
            own = [
                way[other] * hidden(mlp, other, t)
                for way, t in zip(ways, tokens, strict=True)
                if other in way
            ]
            own = np.array(own).reshape(-1, 14)
            ridge = np.sqrt(RIDGE * ((own**2).sum() + (np.array(x) ** 2).sum()) / 14) * np.eye(14)
            stacked = np.concatenate((np.array(x), own, ridge))
            wanted = np.concatenate((np.array(lost[other]), np.zeros((len(own) + 14, 32))))
            fitted = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
            total += ((wanted - stacked @ fitted) ** 2).sum()
        assert float(got[expert]) == pytest.approx(total / energy, rel=1e-3)


def test_ablation_is_the_divergence_of_a_router_that_never_chooses_the_expert():
    model = toy_llada2()
    calibration = rows_of(model, 1)
    got = expert_scores("ablation", sp.adapter_for(model), Evidence(calibration=calibration))[2]
    with torch.no_grad():
        dense = model(calibration.ids).logits[calibration.masked].log_softmax(-1)
        model.layers[2].mlp.gate.expert_bias[7] = -100
        without = model(calibration.ids).logits[calibration.masked].log_softmax(-1)
    assert float(got[7]) == pytest.approx(float((dense.exp() * (dense - without)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("rule", ["reap", "reconstruction", "ablation"])
def test_experts_that_no_token_goes_to_go_first(rule):
    model = toy_llada2()
    useless = [1, 5, 6, 10]  # one of every group
    with torch.no_grad():
        for layer in (1, 2):
            model.layers[layer].mlp.gate.expert_bias[useless] = -100
    made = plan(model, ratio=4 / 12, expert_rule=rule)
    for layer in (1, 2):
        assert sorted(set(range(12)) - set(made.layers[layer].kept_experts)) == useless
    dense = model(TEXT[None, :20]).logits
    torch.testing.assert_close(sp.apply(model, made)(TEXT[None, :20]).logits, dense, atol=1e-5, rtol=1e-5)


def test_a_plan_of_experts_by_chance_needs_no_rows_and_keeps_groups_equal():
    model = toy_llada2()
    made = sp.plan(model, ratio=0.2, unit="experts", targets="experts", expert_rule="random", seed=3)
    assert made.criterion == "random"
    for layer in (1, 2):
        groups = [expert // 3 for expert in made.layers[layer].kept_experts]
        assert [groups.count(group) for group in range(4)] == [2] * 4
    assert made.layers[0].kept_experts is None
    assert made.layers[0].kept_heads == [0, 1, 2, 3]
    again = sp.plan(model, ratio=0.2, unit="experts", targets="experts", expert_rule="random", seed=4)
    assert made.layers != again.layers


def test_one_budget_takes_experts_heads_and_channels_to_what_was_asked():
    model = toy_llada2(num_experts=24)
    before = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and "norm" not in name)
    made = plan(
        model, ratio=0.35, unit="parameters", targets=["heads", "mlp", "experts", "expert_channels"],
        criterion="magnitude",
    )  # fmt: skip
    assert made.parameters_removed == pytest.approx(0.35, abs=0.01)
    assert {len(layer.kept_experts) for layer in made.layers[1:]} == {16}
    assert made.layers[0].kept_channels is not None
    assert made.heads_removed
    widths = {len(ids) for layer in made.layers[1:] for ids in layer.kept_expert_channels}
    assert len(widths) == 1
    sp.apply(model, made)
    after = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and "norm" not in name)
    assert 1 - after / before == pytest.approx(made.parameters_removed)


def test_channels_of_experts_are_those_that_give_most():
    model = toy_llada2()
    calibration = rows_of(model, 2)
    mlp, sums, counts = model.layers[1].mlp, np.zeros((12, 14)), np.zeros((12, 1))
    for token in seen_by(model, calibration, 1):
        for expert, weight in routed(mlp, token).items():
            sums[expert] += (weight * hidden(mlp, expert, token)) ** 2
            counts[expert] += 1
    downs = np.array([(e.down_proj.weight.detach().double().numpy() ** 2).sum(0) for e in mlp.experts])
    got = expert_channel_scores(sp.adapter_for(model), Evidence(calibration=calibration))[1].numpy()
    used = counts[:, 0] > 0
    np.testing.assert_allclose(got[used], (sums / np.maximum(counts, 1) * downs)[used], rtol=1e-4)
    made = sp.plan(
        model, ratio=0.1, unit="flops", targets="expert_channels", calibration=calibration, length=64
    )
    best = made.layers[1].kept_expert_channels
    for expert in np.flatnonzero(used):
        assert set(best[expert]) == set(np.argsort(-got[expert])[: len(best[expert])])


def test_channels_of_a_mixed_model_are_those_of_its_dense_layers():
    made = plan(toy_llada2(), ratio=0.05, unit="parameters", targets=["mlp"])
    assert made.layers[0].kept_channels is not None
    assert [layer.kept_channels for layer in made.layers[1:]] == [None, None]
    assert made.parameters_removed == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.4}, "ratio 0.4 is out of reach: removing experts takes at most 0.333 of the experts"),
        ({"ratio": 0.5, "unit": "parameters"}, "experts takes at most 0.196 of the block parameters"),
        ({"ratio": 0.1, "unit": "flops"}, "removing experts takes at most 0.000 of the block FLOPs"),
        ({"ratio": 0.5, "unit": "parameters", "targets": ["mlp"]}, r"removing mlp takes at most 0\.0\d\d of"),
        ({"unit": "heads"}, "use unit='experts'"),
        ({"targets": ["experts", "mlp"]}, "unit='experts' removes experts only"),
        ({"expert_rule": "reep"}, "unknown expert rule 'reep'; known: .* did you mean 'reap'"),
        ({"max_layer_share": 0.1, "ratio": 0.2}, "takes at most 0.000 of the experts"),
        ({"target_speedup": 1.2}, "a target speed chooses heads alone where there are experts"),
    ],
)  # fmt: skip
def test_a_bad_budget_is_refused_in_one_line_that_names_the_maximum(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan(toy_llada2(), **settings)
    assert "\n" not in str(caught.value)


def test_the_most_that_is_named_can_be_had():
    made = plan(toy_llada2(), ratio=0.333)
    assert {len(layer.kept_experts) for layer in made.layers[1:]} == {8}


def test_a_rule_that_reads_rows_is_refused_without_them():
    with pytest.raises(ValueError, match="expert rule 'reap' needs calibration"):
        sp.plan(toy_llada2(), ratio=0.2, unit="experts", targets="experts")


def test_a_model_without_experts_is_told_so():
    model, _ = sp.load("tiny")
    with pytest.raises(ValueError, match="this llada model has no experts that can go"):
        sp.plan(model, ratio=0.2, unit="experts", targets="experts", expert_rule="random")


def test_a_damaged_expert_is_named():
    model = toy_llada2()
    with torch.no_grad():
        model.layers[2].mlp.experts[4].up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"experts\.4\.up_proj projection's weight of layer 2 is not finite"):
        plan(model, ratio=0.2, expert_rule="random")
