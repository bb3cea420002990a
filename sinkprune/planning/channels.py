"""Rules that score MLP channels: float64 ``[channels]`` of one layer, higher = keep."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from sinkprune.adapters import Adapter, MLPWeights
from sinkprune.evidence.evidence import Evidence


def magnitude(weights: MLPWeights, adapter: Adapter, evidence: Evidence, layer: int) -> Tensor:
    """Root of the summed squares of a channel's gate, up and down weights."""
    parts = [*_rows(weights), weights.down.T]
    return torch.stack([part.detach().double().square().sum(1) for part in parts]).sum(0).sqrt()


def wanda(weights: MLPWeights, adapter: Adapter, evidence: Evidence, layer: int) -> Tensor:
    """Mean of ``|W| · rms(x)`` over a channel's gate and up rows and its down column."""
    seen = evidence.activations(adapter)[layer]
    return _wanda(weights, seen.mlp_moment, seen.channels_moment)


def sink_wanda(weights: MLPWeights, adapter: Adapter, evidence: Evidence, layer: int) -> Tensor:
    """``wanda`` with tokens weighted by 1 - the soft sink mask at the MLP's input (arXiv 2602.17664)."""
    seen = evidence.activations(adapter)[layer]
    return _wanda(weights, seen.mlp_moment_soft, seen.channels_moment)


def flap(weights: MLPWeights, adapter: Adapter, evidence: Evidence, layer: int) -> Tensor:
    """Variance of a channel times the squared norm of its down column (arXiv 2312.11983)."""
    seen = evidence.activations(adapter)[layer]
    variance = seen.channels_moment - seen.channels_mean.square()
    return variance * weights.down.detach().double().square().sum(0)


CHANNEL_RULES: dict[str, Callable[[MLPWeights, Adapter, Evidence, int], Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sink_wanda": sink_wanda,
    "flap": flap,
}
NEED_CALIBRATION = ("wanda", "sink_wanda", "flap")


def check_channel_rule(rule: str) -> None:
    """Raise ``ValueError`` listing the rules unless ``rule`` is one."""
    if rule not in CHANNEL_RULES:
        near = difflib.get_close_matches(str(rule), CHANNEL_RULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown channel rule {rule!r}; known: {', '.join(CHANNEL_RULES)}{hint}")


def channel_scores(rule: str, adapter: Adapter, evidence: Evidence, layer: int) -> Tensor:
    """The scores of ``layer``'s MLP channels, float64 ``[channels]`` on the CPU.

    Raises:
        ValueError: scores that are not finite, which an order of channels would hide.
    """
    scores = CHANNEL_RULES[rule](adapter.mlp_weights(layer), adapter, evidence, layer).cpu()
    if not torch.isfinite(scores).all():
        raise ValueError(f"channel rule {rule!r} gave scores of layer {layer} that are not finite")
    return scores


def _rows(weights: MLPWeights) -> list[Tensor]:
    return [weights.up] if weights.gate is None else [weights.gate, weights.up]


def _wanda(weights: MLPWeights, entry: Tensor, channels: Tensor) -> Tensor:
    rows = [(w.detach().abs().double() @ entry.sqrt()) / len(entry) for w in _rows(weights)]
    return torch.stack(rows).sum(0) + weights.down.detach().abs().double().mean(0) * channels.sqrt()
