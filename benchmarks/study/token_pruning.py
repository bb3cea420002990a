"""Token-wise pruning on "tiny": keys (or queries) that were transient sinks one step before are left out.

Held-out windows are denoised with their own tokens in a random order, 16 steps, and judged on what is still
masked, so that every variant meets the same states. After each step a layer's sinks are the positions whose
column mass (heads summed) exceeds mean + 2 standard deviations; a transient one stood out in fewer than half
of the steps so far. In the next step a layer leaves out

* "keys": its transient sinks, for every query; "all sinks": the lasting ones too;
* "queries": the attention output of its transient sinks, whose residual stream goes on;
* "random keys", "least keys": as many keys at random, or of least mass, for comparison.

A key that was left out has no mass, so it is seen again one step later. Run by ``study_weights.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from resumable import Row, Rows
from torch import Tensor

import sinkprune as sp
from sinkprune import ops
from sinkprune.checkpoints import checkpoint
from sinkprune.models.modules import AttentionCall

LENGTH, STEPS, SIGMA = 128, 16, 2.0
VARIANTS = ("nothing", "keys", "queries", "all sinks", "random keys", "least keys")


def measure(rows: Rows, windows: int) -> None:
    model, tokenizer = sp.load("tiny")
    text = checkpoint.texts("held_out")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    starts = torch.linspace(0, len(ids) - LENGTH, windows).long()
    texts = ids[starts[:, None] + torch.arange(LENGTH)]
    for variant in VARIANTS:
        rows.row(f"tiny/tokens/{variant}", lambda v=variant: _follow(model, texts, v))


@torch.no_grad()
def _follow(model: Any, texts: Tensor, variant: str) -> Row:
    """Mean cross entropy of each window over the steps, and the share of positions left out."""
    adapter = sp.adapter_for(model)
    mask_id = adapter.mask_token_id
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(texts.shape, generator=generator).argsort(-1).argsort(-1)
    sinks = Sinks(len(model.blocks), *texts.shape, variant)
    losses = []
    with sinks.leaving_out(model):
        adapter.observe(sinks.observe)
        try:
            for step in range(STEPS):
                masked = order >= step * LENGTH // STEPS
                logits = model(texts.masked_fill(masked, mask_id)).logits
                loss = F.cross_entropy(logits.transpose(1, 2), texts, reduction="none")
                losses.append((loss * masked).sum(1) / masked.sum(1))
                sinks.choose()
        finally:
            adapter.observe(None)
    per_window = torch.stack(losses).mean(0)
    return {
        "per_window": [round(value, 5) for value in per_window.tolist()],
        "left_out": sinks.left_out / (STEPS - 1),
    }


class Sinks:
    """Per layer and window, which positions stood out, and which to leave out in the next step."""

    def __init__(self, layers: int, windows: int, length: int, variant: str) -> None:
        self.variant, self.steps, self.left_out = variant, 0, 0.0
        self.mass = torch.zeros(layers, windows, length)
        self.times = torch.zeros(layers, windows, length)
        self.out = torch.zeros(layers, windows, length, dtype=torch.bool)
        self._generator = torch.Generator().manual_seed(1)

    def observe(self, layer: int, call: AttentionCall) -> None:
        mass = ops.column_mass(call.query, call.key, call.lse, key_padding_mask=call.key_padding_mask)
        self.mass[layer] = mass.sum(1)

    def choose(self) -> None:
        """After a step: what the next one leaves out."""
        self.steps += 1
        threshold = self.mass.mean(-1, keepdim=True) + SIGMA * self.mass.std(-1, keepdim=True, correction=0)
        stands_out = self.mass > threshold
        self.times += stands_out
        transient = stands_out & (self.times < self.steps / 2)
        chosen = stands_out if self.variant == "all sinks" else transient
        if self.variant in ("random keys", "least keys"):
            scores = self.mass.masked_fill(self.out, torch.inf)  # left out before: seen again
            if self.variant == "random keys":
                scores = torch.rand(scores.shape, generator=self._generator)
            ranks = scores.argsort(-1).argsort(-1)
            chosen = ranks < transient.sum(-1, keepdim=True)
        self.out = torch.zeros_like(chosen) if self.variant == "nothing" else chosen
        if self.steps < STEPS:
            self.left_out += self.out.float().mean().item()

    @contextmanager
    def leaving_out(self, model: Any) -> Iterator[None]:
        """While the native model runs: hide keys in each block's call, or zero the queries' output."""

        def hide(layer: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*args[:3], ~self.out[layer], *args[4:])

        def silence(layer: int, out: Tensor) -> Tensor:
            return out.masked_fill(self.out[layer][..., None], 0)

        hooks = []
        for i, block in enumerate(model.blocks):
            if self.variant == "queries":
                hooks.append(block.attn_out.register_forward_hook(lambda m, a, out, i=i: silence(i, out)))
            elif self.variant != "nothing":
                hooks.append(block.register_forward_pre_hook(lambda m, args, i=i: hide(i, args)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
