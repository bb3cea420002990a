"""Repair of what is left of a mixture: against an independent fit, on rows that it did not see, undone."""

import numpy as np
import pytest
import torch
from block_causals import toy_llada2
from toys import one_thread  # noqa: F401

import sinkprune as sp
from sinkprune.models.experts import ExpertMLP, Routing
from sinkprune.plans import LayerPlan, PrunePlan
from sinkprune.pruning.expert_repair import refit_experts
from sinkprune.pruning.repair import RIDGE

ALL, EIGHT = [0, 1, 2, 3], [0, 2, 3, 5, 6, 7, 9, 11]


def mixture(experts=4, top_k=1):
    torch.manual_seed(2)
    mlp = ExpertMLP(Routing(top_k, sigmoid=False), 12, 6, experts)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return mlp


def tokens_and_outputs(mlp, count=400):
    tokens = torch.randn(count, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return tokens, mlp(tokens)


def test_where_every_token_has_one_expert_each_fit_is_plain_ridge_regression():
    mlp = mixture()
    tokens, wanted = tokens_and_outputs(mlp)
    mlp.skip(torch.tensor([0, 2]), None)
    before = [mlp.experts[e].down_proj.weight.detach().clone() for e in range(4)]
    with torch.no_grad():
        chosen, weights = mlp.gate(tokens)
    refit_experts(mlp, tokens, wanted, RIDGE)
    for expert in (0, 2):
        own = (chosen[:, 0] == expert).numpy()
        with torch.no_grad():
            x = (mlp.experts[expert].hidden(tokens[own]) * weights[own]).double().numpy()
        y = wanted[own].double().numpy() - x @ before[expert].double().numpy().T
        ridge = np.sqrt(RIDGE * (x**2).sum() / 6) * np.eye(6)
        fitted = np.linalg.lstsq(
            np.concatenate((x, ridge)), np.concatenate((y, np.zeros((6, 12)))), rcond=None
        )[0]
        got = mlp.experts[expert].down_proj.weight.detach().double().numpy() - before[expert].double().numpy()
        np.testing.assert_allclose(got, fitted.T, atol=1e-4)
    for expert in (1, 3):
        assert torch.equal(mlp.experts[expert].down_proj.weight, before[expert]), "what goes is left as it is"


@pytest.mark.parametrize("channels", [None, [[0, 2, 3], [1, 2, 5], [0, 4, 5]]])
def test_the_error_on_the_tokens_never_grows_and_falls_where_tokens_share_experts(channels):
    mlp = mixture(top_k=2)
    tokens, wanted = tokens_and_outputs(mlp)
    mlp.skip(torch.tensor([0, 1, 3]), None if channels is None else torch.tensor(channels))
    with torch.no_grad():
        errors = [(wanted - mlp(tokens)).square().sum().item()]
        for _ in range(3):
            refit_experts(mlp, tokens, wanted, RIDGE)
            errors.append((wanted - mlp(tokens)).square().sum().item())
    assert errors[1] < 0.95 * errors[0]
    assert errors == sorted(errors, reverse=True)


def divergence(dense, pruned, ids):
    with torch.no_grad():
        before, after = (m(ids).logits.log_softmax(-1) for m in (dense, pruned))
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize(
    "layer",
    [
        LayerPlan(ALL, kept_experts=EIGHT),
        LayerPlan(ALL, kept_expert_channels=[list(range(7))] * 12),
        LayerPlan([0, 3], kept_experts=EIGHT, kept_expert_channels=[list(range(9))] * 8),
    ],
    ids=["experts", "channels", "all"],
)
def test_a_repaired_model_is_closer_to_the_dense_one_on_rows_it_did_not_see(layer):
    dense = toy_llada2()
    text = torch.randint(0, 59, (4000,), generator=torch.Generator().manual_seed(5))
    rows = sp.calibrate(dense, text[:3000], sequences=48, length=24, levels=(0.3, 0.7), seed=1)
    held_out = sp.calibrate(dense, text[3000:], sequences=16, length=24, levels=(0.5,), seed=2).ids
    geometry = sp.adapter_for(dense).geometry()
    plan = PrunePlan(geometry, "", [LayerPlan(ALL), layer, LayerPlan(ALL)])
    plain, repaired = sp.apply(toy_llada2(), plan), sp.apply(toy_llada2(), plan, calibration=rows)
    assert divergence(dense, repaired, held_out) < 0.8 * divergence(dense, plain, held_out)


def test_a_failed_repair_leaves_every_expert_as_it_was():
    model = toy_llada2()
    rows = sp.calibrate(model, torch.arange(59), sequences=4, length=16, seed=1)
    with torch.no_grad():
        model.layers[2].mlp.experts[3].up_proj.weight[0, 0] = torch.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = PrunePlan(
        sp.adapter_for(model).geometry(), "", [LayerPlan(ALL), *[LayerPlan(ALL, kept_experts=EIGHT)] * 2]
    )
    with pytest.raises(ValueError, match="not finite"):
        sp.apply(model, plan, calibration=rows)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert sp.adapter_for(model).form == "dense"
    assert model.layers[1].mlp.gate.kept_experts is None
