"""Two claims about sinks: what it costs to hide them from attention, and when in denoising they move.

Hiding: each head of every layer loses one key of each sample, its sink or another one, and the negative
log-likelihood says what that cost. After "Attention sinks in diffusion language models" (arXiv 2510.15731),
which finds masked diffusion models robust to it and autoregressive ones not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from study_autoregressive import FAR, movement
from torch import Tensor, nn

import sinkprune as sp
from sinkprune.evidence.sinks import SinkGate

MASKED_MODES = ("sink", "other", "standing sink", "standing other")
CAUSAL_MODES = ("sink", "other", "first")


def masked_model(model: nn.Module, text: Any, *, draws: int = 3, **options: Any) -> dict[str, Any]:
    """``cost_of_hiding`` for a masked model, judged by ``sp.evaluate(model, text, **options)``."""
    return cost_of_hiding(
        model, lambda: sp.evaluate(model, text, **options).per_window, MASKED_MODES, draws=draws
    )


def causal_model(model: nn.Module, ids: Tensor, *, draws: int = 3, batch: int = 8) -> dict[str, Any]:
    """``cost_of_hiding`` for a causal transformers model, judged by next-token loss on ids ``[N, L]``."""
    return cost_of_hiding(model, lambda: next_token_nll(model, ids, batch), CAUSAL_MODES, draws=draws)


def cost_of_hiding(
    model: nn.Module, judge: Callable[[], Sequence[float]], modes: Sequence[str], *, draws: int = 3
) -> dict[str, Any]:
    """Nats per token that hiding a key of every head adds.

    | mode | key hidden from all queries that see another one |
    |---|---|
    | ``sink`` | the one with the largest column mass |
    | ``other`` | any other valid one, drawn anew in each of ``draws`` runs |
    | ``standing sink``, ``standing other`` | the same, in heads whose sink stands out (``SinkGate``) |
    | ``first`` | position 0 |

    Args:
        model: native, or of transformers.
        judge: runs the model and gives nats per token of each text.
        modes: of the table.
        draws: runs of modes that draw.

    Returns:
        JSON-ready: ``nll`` of the untouched model; of each mode ``added`` with a 95 % interval over texts
        and draws, the mean column mass hidden, and the share of (sample, head) that lost a key; and the
        intervals of ``sink`` against ``other``.
    """
    base = list(judge())
    added: dict[str, list[list[float]]] = {}
    result: dict[str, Any] = {"nll": sum(base) / len(base), "texts": len(base)}
    for mode in modes:
        runs, hider = [], KeyHider(mode)
        for draw in range(draws if "other" in mode else 1):
            hider.generator.manual_seed(draw)
            with hiding(model, hider):
                runs.append(list(judge()))
        added[mode] = runs
        result[mode] = {
            "added": sp.bootstrap_difference(runs, base)._asdict(),
            "hidden_mass": hider.mass / max(1, hider.hidden),
            "heads_touched": hider.hidden / max(1, hider.seen),
        }
    for sink, other in (("sink", "other"), ("standing sink", "standing other")):
        if sink in added:
            difference = sp.bootstrap_difference(added[sink][0], added[other])
            result[f"{sink} against {other}"] = difference._asdict()
    return result


@torch.no_grad()
def next_token_nll(model: nn.Module, ids: Tensor, batch: int = 8) -> list[float]:
    """Mean next-token loss of each row of ids ``[N, L]``, nats per token."""
    losses: list[float] = []
    for part in ids.split(batch):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        losses += F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").mean(1).tolist()
    return losses


class KeyHider:
    """Attention in plain PyTorch in which heads lose a key.

    Attributes:
        seen, hidden: (sample, head) pairs of all layers so far, and those that lost a key.
        mass: column mass of the hidden keys, summed.
    """

    def __init__(self, mode: str, gate: SinkGate | None = None) -> None:
        if mode not in {*MASKED_MODES, *CAUSAL_MODES}:
            raise ValueError(f"unknown mode {mode!r}")
        self.mode, self.gate = mode, gate or SinkGate()
        self.generator = torch.Generator()
        self.seen = self.hidden = 0
        self.mass = 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
        """Attention ``[B, H, L, D]`` of queries and keys of the same tokens.

        Args:
            visible: bool ``[B, 1, L, L]``; a token that no query sees is padding.
        """
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        scores = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)
        valid = visible.any(-2)  # [B, 1, L]
        weights = scores.softmax(-1).nan_to_num(0.0)
        mass = (weights * valid[..., None]).sum(-2) / valid.sum(-1, keepdim=True)  # [B, H, L]
        chosen, touched = self._choose(mass, valid)
        hide = F.one_hot(chosen, mass.shape[-1]).bool() & touched[..., None]
        self.seen, self.hidden = self.seen + touched.numel(), self.hidden + int(touched.sum())
        self.mass += mass[hide].sum().item()
        left = visible & ~hide[:, :, None]
        left = torch.where(left.any(-1, keepdim=True), left, visible)
        return scores.masked_fill(~left, -torch.inf).softmax(-1).nan_to_num(0.0) @ value

    def _choose(self, mass: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The key of each (sample, head), ``[B, H]``, and whether it is to be hidden."""
        largest, sink = mass.max(-1)
        count = valid.sum(-1)  # [B, 1]
        touched = torch.ones_like(sink, dtype=torch.bool)
        if self.mode.startswith("standing"):
            mean = 1 / count
            spread = ((mass - mean[..., None]) ** 2 * valid).sum(-1).div(count).sqrt()
            touched = (largest >= self.gate.fair_share * mean) & (largest > mean + self.gate.sigma * spread)
        if self.mode == "first":
            return torch.zeros_like(sink), touched
        if self.mode.endswith("sink"):
            return sink, touched
        noise = torch.rand(mass.shape, generator=self.generator).to(mass.device)
        noise = noise.masked_fill(~valid.expand_as(noise), -1).scatter(-1, sink[..., None], -1)
        return noise.argmax(-1), touched & (count > 1)


@contextmanager
def hiding(model: nn.Module, hider: KeyHider) -> Iterator[None]:
    """Let ``hider`` compute the attention of ``model``, native or of transformers, inside the ``with``."""
    if hasattr(model, "set_attn_implementation"):
        with _in_transformers(model, hider):
            yield
        return
    original = sp.ops.attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, None]:
        if any(option is not None for option in others.values()):
            raise ValueError(f"only dense bidirectional models are studied, got {sorted(others)}")
        visible = torch.ones(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool)
        if key_padding_mask is not None:
            visible = visible & key_padding_mask[:, None, None]
        return hider(query, key, value, visible, query.shape[-1] ** -0.5), None

    sp.ops.attention = attention  # native models look it up at each call
    try:
        yield
    finally:
        sp.ops.attention = original


@contextmanager
def _in_transformers(model: Any, hider: KeyHider) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        visible = torch.ones(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool)
        if mask is not None:
            visible = visible & mask
        elif module.is_causal:
            visible = visible.tril()
        scale = options.get("scaling")
        out = hider(query, key, value, visible, query.shape[-1] ** -0.5 if scale is None else scale)
        return out.transpose(1, 2), None

    AttentionInterface.register("study_hidden_keys", attention)
    AttentionMaskInterface.register("study_hidden_keys", sdpa_mask)
    original = model.config._attn_implementation
    model.set_attn_implementation("study_hidden_keys")
    try:
        yield
    finally:
        model.set_attn_implementation(original)


def whole(
    model: nn.Module, prompts: Tensor, *, steps: int = 64, gen_length: int = 128, **options: Any
) -> dict[str, Any]:
    """``movement`` over all of denoising, with the mean column mass at position 0; arguments as in
    ``by_half``."""
    at_zero = []
    with sp.track(model, max_keys=prompts.shape[1] + gen_length) as tracker:
        for _ in sp.denoise(model, prompts, steps=steps, gen_length=gen_length, **options):
            assert tracker.tracker is not None
            at_zero.append(torch.stack([mass[:, :, 0].mean() for mass in tracker.tracker.mass]))
        return movement(tracker.result(), torch.stack(at_zero).mean(0))


def by_half(
    model: nn.Module, prompts: Tensor, *, steps: int = 64, gen_length: int = 128, **options: Any
) -> dict[str, Any]:
    """Where sinks moved in the first and in the second half of denoising.

    Args:
        model: of a known family that ``sp.denoise`` samples.
        prompts: int64 ``[B, P]``, not padded.
        steps, gen_length: even numbers of forwards, and tokens; ``options`` are the rest of ``denoise``'s.

    Returns:
        JSON-ready: ``early`` and ``late`` as ``movement`` gives them, and the shares of heads whose range is
        above ``FAR`` in ``both``, ``early_only``, ``late_only`` and ``neither``, plain and gated.
    """
    if steps < 2 or steps % 2:
        raise ValueError(f"two halves need an even number of steps, got {steps}")
    halves = []
    with sp.track(model, max_keys=prompts.shape[1] + gen_length) as tracker:
        stream = sp.denoise(model, prompts, steps=steps, gen_length=gen_length, **options)
        for step, _ in enumerate(stream, 1):
            if step % (steps // 2) == 0:
                halves.append(tracker.result())
                tracker.reset()
    result: dict[str, Any] = {"early": movement(halves[0]), "late": movement(halves[1])}
    for suffix, name in (("", "position"), ("_gated", "gated")):
        moved = []
        for half in halves:
            moments = getattr(half, name)
            span = moments.range.masked_fill(moments.count == 0, torch.nan).nanmean(1).nan_to_num(0.0)
            exists = torch.arange(span.shape[1]) < torch.tensor(half.num_heads)[:, None]
            moved.append((span > FAR)[exists])
        early, late = moved
        parts = {
            "both": early & late,
            "early_only": early & ~late,
            "late_only": ~early & late,
            "neither": ~early & ~late,
        }
        result[f"heads_moving_over_3{suffix}"] = {k: v.float().mean().item() for k, v in parts.items()}
    return result
