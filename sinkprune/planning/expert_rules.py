"""Rules that score experts, and channels of experts: float64, higher = keep, on masked rows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.calibration import BlockStream
from sinkprune.evidence.evidence import Evidence
from sinkprune.models.common import GatedMLP
from sinkprune.models.experts import ExpertMLP
from sinkprune.planning.criteria.ablation import Ablation
from sinkprune.progress import bar

RIDGE = 1e-2  # of the mean square of the inputs, as in repair
DEFAULT_EXPERT_RULE = "reap"


def reap(adapter: Adapter, evidence: Evidence) -> list[Tensor]:
    """Mean over the tokens that go to an expert of its weight there times the norm of what it gives (REAP,
    arXiv 2510.13999); 0 for one that no token goes to."""
    found = _zeros(adapter)
    for layer, mlp, tokens in expert_inputs(adapter, evidence):
        chosen, weights = mlp.gate(tokens)
        for expert in chosen.unique().tolist():
            row, place = (chosen == expert).nonzero(as_tuple=True)
            out = mlp.experts[expert](tokens[row]).float().norm(dim=-1)
            found[layer][expert] = (out * weights[row, place]).mean().double()
    return found


def reconstruction(adapter: Adapter, evidence: Evidence) -> list[Tensor]:
    """Squared error of the layer's output without an expert, relative to that output's energy.

    Its tokens go where the router then sends them, and the down projection of the expert that each token
    newly goes to is refitted, by ridge regression on the tokens that it has and those that it gets.
    """
    found = _zeros(adapter)
    for layer, mlp, tokens in expert_inputs(adapter, evidence):
        chosen, weights = mlp.gate(tokens)
        dense = mlp.routed(tokens, chosen, weights)
        energy = dense.double().square().sum()
        grams: dict[int, Tensor] = {}
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).any(-1).nonzero().squeeze(-1)
            others = [e for e in range(len(mlp.experts)) if e != expert]
            try:
                mlp.skip(torch.tensor(others, device=tokens.device), None)
                again, counts = mlp.gate(tokens[rows])
                lost = dense[rows] - mlp.routed(tokens[rows], again, counts)
            finally:
                mlp.skip(None, None)
            new = (again[:, :, None] != chosen[rows][:, None, :]).all(-1)
            place = (counts * new).argmax(-1, keepdim=True)
            newcomer, counted = again.gather(-1, place).squeeze(-1), counts.gather(-1, place)
            for other in newcomer.unique().tolist():
                if other not in grams:
                    own = mlp.inputs_of(other, tokens, chosen, weights)[1]
                    grams[other] = (own.T @ own).double()
                at = newcomer == other
                entering = mlp.hidden_of(other, tokens[rows[at]]) * counted[at]
                found[layer][expert] += (
                    _left_over(grams[other], entering.double(), lost[at].double()) / energy
                )
    return found


def ablation(adapter: Adapter, evidence: Evidence) -> list[Tensor]:
    """Divergence of the masked tokens' distribution, in nats, when an expert alone is out: a forward of all
    rows for each."""
    assert evidence.calibration is not None
    found, measure = _zeros(adapter), Ablation()
    dense = measure.predictions(adapter, evidence.calibration)
    for layer, scores in enumerate(found):
        mlp = adapter.expert_mlp(layer)
        for expert in range(len(scores) if mlp is not None else 0):
            others = [e for e in range(len(scores)) if e != expert]
            assert mlp is not None
            try:
                mlp.skip(torch.tensor(others, device=mlp.gate.weight.device), None)
                scores[expert] = measure.cost(adapter, evidence.calibration, dense)
            finally:
                mlp.skip(None, None)
    return found


def random(adapter: Adapter, evidence: Evidence) -> list[Tensor]:
    """Uniform in [0, 1), drawn by the seed."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return [torch.rand(len(scores), generator=generator).double() for scores in _zeros(adapter)]


EXPERT_RULES: dict[str, Callable[[Adapter, Evidence], list[Tensor]]] = {
    "reap": reap,
    "reconstruction": reconstruction,
    "random": random,
    "ablation": ablation,
}


def check_expert_rule(rule: str, evidence: Evidence | None) -> None:
    """Raise ``ValueError`` for an unknown rule, or where it is asked and ``evidence`` lacks its rows."""
    if rule not in EXPERT_RULES:
        near = difflib.get_close_matches(str(rule), EXPERT_RULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown expert rule {rule!r}; known: {', '.join(EXPERT_RULES)}{hint}")
    if rule != "random" and evidence is not None and evidence.calibration is None:
        raise ValueError(f"expert rule {rule!r} needs calibration=sp.calibrate(model, text, ...)")


def expert_scores(rule: str, adapter: Adapter, evidence: Evidence) -> list[Tensor]:
    """The scores of every layer's experts, float64 ``[experts]`` on the CPU (empty where there are none).

    Raises:
        ValueError: scores that are not finite, which an order of experts would hide.
    """
    with torch.no_grad():
        found = [scores.cpu() for scores in EXPERT_RULES[rule](adapter, evidence)]
    for layer, scores in enumerate(found):
        if not torch.isfinite(scores).all():
            raise ValueError(f"expert rule {rule!r} gave scores of layer {layer} that are not finite")
    return found


@torch.no_grad()
def expert_channel_scores(adapter: Adapter, evidence: Evidence) -> list[Tensor]:
    """Of every layer's experts' channels, float64 ``[experts, channels]`` on the CPU: what a channel gives,
    mean over the expert's tokens of its weighted activation squared times the squared norm of its down
    column; without calibration rows, and for experts without tokens, the norm of its weights."""
    found = []
    for layer in range(adapter.geometry().num_layers):
        mlp = adapter.expert_mlp(layer)
        rows = [] if mlp is None else [_magnitude(cast(GatedMLP, expert)) for expert in mlp.experts]
        found.append(torch.stack(rows) if rows else torch.zeros(0, 0, dtype=torch.float64))
    if evidence.calibration is None:
        return found
    for layer, mlp, tokens in expert_inputs(adapter, evidence):
        chosen, weights = mlp.gate(tokens)
        for expert in chosen.unique().tolist():
            x = mlp.inputs_of(expert, tokens, chosen, weights)[1].double()
            down = cast(GatedMLP, mlp.experts[expert]).down_proj.weight.double().square().sum(0)
            found[layer][expert] = (x.square().mean(0) * down).cpu()
    return found


def expert_inputs(adapter: Adapter, evidence: Evidence) -> Iterator[tuple[int, ExpertMLP, Tensor]]:
    """Every layer with experts, those, and the valid tokens that reach them on the calibration rows,
    ``[tokens, hidden]``: one layer's at a time."""
    assert evidence.calibration is not None
    with torch.no_grad():
        stream = BlockStream(adapter, evidence.calibration)
        for layer in bar("planning", "layer", range(adapter.geometry().num_layers)):
            mlp = adapter.expert_mlp(layer)
            if mlp is not None:
                yield layer, mlp, stream.tokens(layer, mlp)
            stream.advance(layer)


def _left_over(gram: Tensor, x: Tensor, lost: Tensor) -> Tensor:
    """Squared error ``|lost - x d|² + tr dᵀ gram d``, and a ridge, at the best change ``d`` of a down
    projection."""
    cross, gram = x.T @ lost, gram + x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    fitted = torch.linalg.solve(gram, cross)
    return (lost.square().sum() - (cross * fitted).sum()).clamp(min=0)


def _magnitude(expert: GatedMLP) -> Tensor:
    parts = [expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight.T]
    return torch.stack([part.double().square().sum(1) for part in parts]).sum(0).sqrt().cpu()


def _zeros(adapter: Adapter) -> list[Tensor]:
    geometry = adapter.geometry()
    counts = [geometry.experts_of(layer) for layer in range(geometry.num_layers)]
    return [torch.zeros(count, dtype=torch.float64, device=adapter.device) for count in counts]
