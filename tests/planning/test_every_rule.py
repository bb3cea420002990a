"""Every rule for heads and for channels on every family's toy: what it scores goes in that order, and the
model without it computes what the dense one does with those weights at zero."""

import copy
from functools import cached_property

import pytest
import torch
from family_toys import TOYS
from hf import canvas_logits
from toys import one_thread, tokens  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.channels import CHANNEL_RULES, channel_scores
from sinkprune.planning.criteria import criterion_for, criterion_names

GEMMA = "TransformersDiffusionGemma"
MASK = 60
no_rows = pytest.mark.xfail(
    strict=True, raises=ValueError, reason="DiffusionGemma has no logits of a masked sequence to calibrate on"
)
no_channels = pytest.mark.xfail(
    strict=True, raises=ValueError, reason="its MLPs are experts, whose channels no channel rule scores"
)
EXPERTS = (GEMMA, "LLaDAMoELayers", "RND1Layers")


class Family:
    """A toy, and the evidence that rules read, gathered once."""

    def __init__(self, name: str) -> None:
        self.gemma, self.model = name == GEMMA, TOYS[name]()
        self.adapter = sp.adapter_for(self.model)
        self.geometry = self.adapter.geometry()

    @cached_property
    def rows(self):
        return sp.calibrate(self.model, tokens(2, 12), length=12, levels=(0.5,), mask_token_id=MASK)

    @cached_property
    def profile(self):
        how = {} if self.gemma else {"block_length": 4, "mask_token_id": MASK}
        return sp.profile(self.model, tokens(2, 4), steps=4, gen_length=8, **how)

    @cached_property
    def evidence(self):
        return Evidence(self.profile, self.rows)

    @torch.no_grad()
    def logits(self, model=None):
        model = self.model if model is None else model
        if self.gemma:
            return canvas_logits(model)
        ids = tokens(2, 8).clone()
        ids[:, 5:] = MASK
        return sp.adapter_for(model).predict(ids)

    def without(self, columns):
        """The toy whose matrices have zeros in these columns, by layer and role."""
        twin = copy.deepcopy(self.model)
        with torch.no_grad():
            for (layer, role), ids in columns.items():
                sp.adapter_for(twin).linears(layer)[role].weight[:, sorted(ids)] = 0
        return twin

    @property
    def hooks(self):
        return [m for m in self.model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.fixture(scope="module")
def families():
    return {}


def family(families, name):
    if name not in families:
        families.clear()  # tests come a family at a time
        families[name] = Family(name)
    return families[name]


def cells(rules, refused):
    marks = {(name, rule): refused(name, rule) for name in TOYS for rule in rules}
    return [
        pytest.param(*cell, marks=[mark] if mark else [], id="-".join(cell)) for cell, mark in marks.items()
    ]


def rows_refused(name, rule):
    return no_rows if name == GEMMA and criterion_for(rule).needs_calibration else None


@pytest.mark.parametrize(("name", "rule"), cells(criterion_names(), rows_refused))
def test_every_criterion_prunes_the_heads_of_every_family(families, name, rule):
    toy = family(families, name)
    dense, criterion = toy.logits(), criterion_for(rule)
    scores = criterion.score(toy.adapter, toy.evidence)
    rows = toy.rows if criterion.needs_calibration else None
    profile = toy.profile if criterion.needs_profile else None
    plan = sp.plan(toy.model, profile, rule, ratio=0.25, allocation="equal", calibration=rows)
    gone = {}
    for layer, kept in enumerate(plan.layers):
        heads = toy.geometry.heads[layer]
        lost = set(range(heads)) - set(kept.kept_heads)
        assert len(lost) == heads // 4
        assert scores[layer, sorted(lost)].max() <= scores[layer, kept.kept_heads].min()
        width = toy.adapter.linears(layer)["o"].in_features // heads
        gone[layer, "o"] = {head * width + i for head in lost for i in range(width)}
    masked = sp.apply(copy.deepcopy(toy.model), plan, mode="mask")
    torch.testing.assert_close(toy.logits(masked), toy.logits(toy.without(gone)), atol=2e-5, rtol=0)
    assert not torch.allclose(toy.logits(masked), dense, atol=1e-4)
    assert torch.equal(toy.logits(), dense) and not toy.hooks, "a rule left something behind"


def channels_refused(name, rule):
    return no_channels if name in EXPERTS else None


@pytest.mark.parametrize(("name", "rule"), cells(CHANNEL_RULES, channels_refused))
def test_every_channel_rule_prunes_the_channels_of_every_family(families, name, rule):
    toy = family(families, name)
    layers, gone = [], {}
    for layer in range(toy.geometry.num_layers):
        if "down" not in toy.adapter.linears(layer) and name not in EXPERTS:  # a mixture of experts beside
            layers.append(None)
            continue
        scores = channel_scores(rule, toy.adapter, toy.evidence, layer)
        lost = scores.argsort()[: len(scores) // 4].tolist()
        layers.append(sorted(set(range(len(scores))) - set(lost)))
        gone[layer, "down"] = set(lost)
    assert gone
    plan = sp.plan(toy.model, criterion="magnitude", ratio=0.0)
    for kept, channels in zip(plan.layers, layers, strict=True):
        kept.kept_channels = channels
    masked = sp.apply(copy.deepcopy(toy.model), plan, mode="mask")
    torch.testing.assert_close(toy.logits(masked), toy.logits(toy.without(gone)), atol=2e-5, rtol=0)
    assert not toy.hooks
