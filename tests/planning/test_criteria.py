"""Criteria: their scores against computations by hand, and the registry."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from toys import MASK, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria import (
    HeadCriterion,
    base,
    criterion_for,
    criterion_names,
    register_criterion,
)
from sinkprune.planning.criteria.magnitude import Magnitude
from sinkprune.planning.criteria.random import Random
from sinkprune.planning.criteria.sink_variance import SinkVariance


def planted_model(wandering_head: int):
    """One layer, four heads: all look at the first token for ever, but one, which looks at masked tokens.

    Queries are a constant (their bias). Keys read two features of the embedding: "is the mask", "is token 1".
    The feature sits in the pair of head features that RoPE turns slowest, so position hardly counts.
    """
    model = toy(n_layers=1, include_qkv_bias=True)
    d, hd, slow = 32, 8, 3
    with torch.no_grad():
        embedding = model.model["transformer"]["wte"].weight
        embedding.mul_(0.05)
        embedding[:, :2] = 0
        embedding[MASK, 0] = embedding[1, 1] = 5.0
        block = model.blocks[0]
        block.attn_norm.weight.fill_(1)
        for part in (block.q_proj, block.k_proj):
            part.weight.zero_()
            part.bias.zero_()
        for head in range(d // hd):
            block.q_proj.bias[head * hd + slow] = 6.0
            block.k_proj.weight[head * hd + slow, 0 if head == wandering_head else 1] = 1.0
    return model


@pytest.mark.parametrize("wandering_head", [0, 2])
def test_a_head_planted_to_wander_is_the_first_to_go(wandering_head):
    model = planted_model(wandering_head)
    prompt = torch.cat((torch.ones(2, 1, dtype=torch.long), tokens(2, 4) % 50 + 5), 1)
    # one block per token: the masks disappear from left to right
    profile = sp.profile(model, prompt, steps=12, gen_length=12, block_length=1)
    scores = SinkVariance().score(sp.adapter_for(model), Evidence(profile))[0]
    assert scores.argmin() == wandering_head
    assert scores[wandering_head] < -1
    others = [head for head in range(4) if head != wandering_head]
    assert scores[others].tolist() == [0, 0, 0]
    assert profile.statistics["position_mean"][0, :, others].unique().tolist() == [0]
    plan = sp.plan(model, profile, criterion="sink_variance", ratio=0.25)
    assert plan.layers[0].kept_heads == others


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
def test_sink_variance_is_minus_the_mean_variance_over_samples_that_counted(gated):
    model = toy(seed=1, sharpness=1.5)
    profile = sp.profile(model, tokens(3, 6), steps=5, gen_length=10)
    prefix = "gated_" if gated else ""
    counted = profile.statistics[prefix + "steps_counted"] > 0
    variance = profile.statistics[prefix + "position_variance"].where(counted, 0).sum(1) / counted.sum(
        1
    ).clamp(1)
    got = SinkVariance(gated=gated).score(sp.adapter_for(model), Evidence(profile))
    torch.testing.assert_close(got, -variance)
    assert torch.isfinite(got).all()
    if gated:
        assert (~counted).all(1).any()  # heads without a single sink that stands out are in the toy too


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_magnitude_is_the_norm_of_a_heads_weights(kv_heads):
    model = toy(n_kv_heads=kv_heads)
    got = Magnitude().score(sp.adapter_for(model), Evidence())
    for layer, block in enumerate(model.blocks):
        for head in range(4):
            kv = head * kv_heads // 4
            parts = [
                block.q_proj.weight.view(4, 8, 32)[head], block.attn_out.weight.view(32, 4, 8)[:, head],
                block.k_proj.weight.view(kv_heads, 8, 32)[kv], block.v_proj.weight.view(kv_heads, 8, 32)[kv],
            ]  # fmt: skip
            expected = torch.cat([p.flatten() for p in parts]).double().norm().item()
            assert got[layer, head].item() == pytest.approx(expected, rel=1e-6)


def test_random_scores_depend_on_the_seed_alone():
    adapter = sp.adapter_for(toy())
    torch.manual_seed(0)
    first = Random().score(adapter, Evidence(seed=5))
    torch.manual_seed(1)
    assert torch.equal(Random().score(adapter, Evidence(seed=5)), first)
    assert not torch.equal(Random().score(adapter, Evidence(seed=6)), first)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("sink_varaince", "sink_variance"), ("magnitud", "magnitude"), ("Random", "random")],
)
def test_a_typo_gets_a_suggestion_and_the_list(typo, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'") as refused:
        sp.plan(toy(), criterion=typo, ratio=0.2)
    assert all(name in str(refused.value) for name in criterion_names())


def test_a_name_like_no_other_gets_the_list_without_a_guess():
    with pytest.raises(ValueError, match="unknown criterion 'xyzzy'; known: ") as refused:
        criterion_for("xyzzy")
    assert "did you mean" not in str(refused.value)


def test_a_new_criterion_is_one_class_that_registers_itself(monkeypatch):
    monkeypatch.setattr(base, "_CRITERIA", dict(base._CRITERIA))

    @register_criterion
    @dataclass
    class LastHeads(HeadCriterion):
        name: ClassVar[str] = "last_heads"
        sign: float = 1.0

        def score(self, adapter, evidence):
            return self.sign * torch.arange(12.0).view(3, 4)

    plan = sp.plan(toy(), criterion="last_heads", ratio=0.25)
    assert [layer.kept_heads for layer in plan.layers] == [[3], [0, 1, 2, 3], [0, 1, 2, 3]]
    turned = sp.plan(toy(), criterion=LastHeads(sign=-1.0), ratio=0.25)
    assert [layer.kept_heads for layer in turned.layers] == [[0, 1, 2, 3], [0, 1, 2, 3], [0]]
    assert turned.criterion == "last_heads"
    assert turned.details["settings"] == {"sign": -1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value):
    class Broken(HeadCriterion):
        name = "broken"

        def score(self, adapter, evidence):
            return torch.zeros(3, 4).index_fill(1, torch.tensor(2), value)

    with pytest.raises(ValueError, match="criterion 'broken' gave scores that are not finite"):
        sp.plan(toy(), criterion=Broken(), ratio=0.25)


def test_the_criteria_of_the_first_release_are_known():
    assert {"sink_variance", "magnitude", "random"} <= set(criterion_names())
