"""Calibration rows as the sampler meets them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sinkprune.adapters import adapter_for
from sinkprune.evidence.calibration import Calibration
from sinkprune.generation.batches import batches_of, part_of
from sinkprune.generation.denoising import denoise, encode_prompts, usual_steps


def trajectories(
    model: nn.Module,
    prompts: list[str] | Tensor,
    *,
    tokenizer: Any = None,
    steps: int | None = None,
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
        steps, gen_length: of the sampler; steps None means 64, or fewer (``usual_steps``); ``options``
            are the rest of ``denoise``'s.
        states: how many of the steps' inputs to keep, the first among them; at most ``steps``.
        mask_token_id: instead of the config's; where that names none, the tokenizer's is taken.

    Returns:
        ``states`` x S rows of P + gen_length tokens; the targets are the finished ones.

    Raises:
        ValueError: ``states`` out of range, and what ``denoise`` raises.
    """
    adapter = adapter_for(model)
    if steps is None:
        steps = usual_steps(adapter, gen_length, options.get("block_length"), at_most=64)
    if not 1 <= states <= steps:
        raise ValueError(f"states must lie in 1..{steps} (the steps), got {states}")
    if isinstance(prompts, Tensor):
        ids, valid = prompts, torch.ones_like(prompts)
    else:
        ids, valid = encode_prompts(tokenizer, list(prompts))
    mask_id, device = adapter.mask_id(mask_token_id, tokenizer), adapter.device
    sampler = {"steps": steps, "gen_length": gen_length, "mask_token_id": mask_id, **options}
    canvas = torch.full((len(ids), gen_length), mask_id, dtype=torch.long)
    whole = torch.cat((ids.cpu(), canvas), 1)
    kept = whole.repeat(states, 1, 1)  # [states, S, T]
    for samples in batches_of(valid, len(ids), adapter.block_size):
        rows, mask = (part.to(device) for part in part_of(ids, valid, samples))
        written = slice(ids.shape[1] - rows.shape[1], None)  # after the padding that these do without
        after = [ids.cpu() for ids in denoise(model, rows, mask, **sampler)]
        before = [whole[samples, written], *after[:-1]]
        for state in range(states):
            kept[state, samples, written] = before[state * len(before) // states]
        whole[samples, written] = after[-1]
    seen = None
    if not valid.all():
        seen = torch.cat((valid.bool().cpu(), torch.ones_like(canvas, dtype=torch.bool)), 1).repeat(states, 1)
    inputs = kept.flatten(0, 1)
    return Calibration(inputs, whole.repeat(states, 1), inputs == mask_id, seen)
