"""Calibration rows as the sampler meets them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sinkprune.adapters import adapter_for
from sinkprune.evidence.calibration import Calibration
from sinkprune.generation.denoising import denoise, encode_prompts


def trajectories(
    model: nn.Module,
    prompts: list[str] | Tensor,
    *,
    tokenizer: Any = None,
    steps: int = 64,
    gen_length: int = 128,
    states: int = 10,
    mask_token_id: int | None = None,
    **options: Any,
) -> Calibration:
    """What the model sees at ``states`` evenly spread steps of denoising ``prompts``: real trajectories
    instead of random masks.

    Args:
        model: of a known family.
        prompts: strings (with ``tokenizer``), or ids int64 ``[S, P]``.
        steps, gen_length: of the sampler; ``options`` are the rest of ``denoise``'s.
        states: how many of the steps' inputs to keep, the first among them; at most ``steps``.
        mask_token_id: instead of the config's; where that names none, the tokenizer's is taken.

    Returns:
        ``states`` x S rows of P + gen_length tokens; the targets are the finished ones.

    Raises:
        ValueError: ``states`` out of range, and what ``denoise`` raises.
    """
    if not 1 <= states <= steps:
        raise ValueError(f"states must lie in 1..{steps} (the steps), got {states}")
    if isinstance(prompts, Tensor):
        ids, valid = prompts, torch.ones_like(prompts)
    else:
        ids, valid = encode_prompts(tokenizer, list(prompts))
    adapter = adapter_for(model)
    mask_id, device = adapter.mask_id(mask_token_id, tokenizer), adapter.device
    sampler = {"steps": steps, "gen_length": gen_length, "mask_token_id": mask_id, **options}
    after = [row.cpu() for row in denoise(model, ids.to(device), valid.to(device), **sampler)]
    canvas = torch.full((len(ids), gen_length), mask_id, dtype=torch.long)
    before = [torch.cat((ids.cpu(), canvas), 1), *after[:-1]]
    kept = [before[i * steps // states] for i in range(states)]
    seen = None
    if not valid.all():
        seen = torch.cat((valid.bool().cpu(), torch.ones_like(canvas, dtype=torch.bool)), 1).repeat(states, 1)
    rows = torch.cat(kept)
    return Calibration(rows, after[-1].repeat(states, 1), rows == mask_id, seen)
