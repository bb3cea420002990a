"""LLaDA's sampler: semi-autoregressive blocks, remasking, Gumbel noise, guidance, padded batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sinkprune.adapters import Adapter, adapter_for

REMASKING = ("low_confidence", "random")
FLOAT64_ELEMENTS = 1 << 22  # 32 MB: logits turned to float64 at once


@torch.no_grad()
def denoise(
    model: nn.Module,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int | None = None,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_token_id: int | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Fill ``gen_length`` masked tokens after the prompts, one forward a step, and yield the ids after each.

    The published LLaDA sampler (arXiv 2502.09992, algorithms 4 and 5): blocks of ``block_length`` are filled
    left to right, each in its share of ``steps``; a step commits the masked positions of the block with the
    largest probability of their drawn token (or random ones). The mask token itself is never drawn.

    Args:
        model: of a known family.
        prompt_ids: int64 ``[B, P]``, P >= 1, left-padded where prompts differ in length.
        attention_mask: ``[B, P]``, 1 at valid tokens; None where nothing is padded.
        steps: forwards in total, a multiple of the number of blocks, at most ``gen_length``.
        gen_length: tokens to fill.
        block_length: tokens of a block, dividing ``gen_length``; None means one block.
        temperature: 0 takes the argmax; above, Gumbel noise in float64.
        cfg_scale: weight of classifier-free guidance; the unconditional half masks the prompt.
        remasking: ``"low_confidence"`` or ``"random"``.
        mask_token_id: where the model's config lacks one.
        seed: of the noise and of random remasking; None draws from torch's global generator.

    Yields:
        int64 ``[B, P + gen_length]``, a fresh tensor each step.

    Raises:
        ValueError: an argument out of range, an empty prompt, or a total beyond the context.
    """
    ids, valid, mask_id, block_length = _prepare(
        model, prompt_ids, attention_mask, steps, gen_length, block_length, remasking, mask_token_id
    )
    if not (0 <= temperature < math.inf and 0 <= cfg_scale < math.inf):
        raise ValueError(
            f"temperature and cfg_scale must be finite and at least 0, got {temperature} and {cfg_scale}"
        )
    adapter = adapter_for(model)
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    prompt_length = prompt_ids.shape[1]
    blocks = gen_length // block_length
    for block in range(blocks):
        start = prompt_length + block * block_length
        rows = slice(start, start + block_length)  # the only rows that may be committed
        for count in transfer_counts(block_length, steps // blocks):
            logits = _guided_logits(adapter, ids, valid, prompt_length, mask_id, cfg_scale, rows)
            logits[..., mask_id] = -torch.inf
            drawn, confidence = _draw(logits, temperature, remasking, generator)
            confidence = confidence.masked_fill(ids[:, rows] != mask_id, -torch.inf)
            chosen = confidence.topk(count, dim=-1).indices
            ids = ids.scatter(1, chosen + start, drawn.gather(1, chosen))
            yield ids


def transfer_counts(masked: int, steps: int) -> list[int]:
    """How many of ``masked`` tokens each of ``steps`` commits: as even as can be, the larger ones first."""
    base, extra = divmod(masked, steps)
    return [base + (i < extra) for i in range(steps)]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | list[str],
    *,
    steps: int = 64,
    gen_length: int = 64,
    progress: bool = False,
    **options: Any,
) -> str | list[str]:
    """Continue ``prompt`` and return the new text (a list for a list of prompts).

    ``options`` are those of ``denoise``. Raises ``ValueError`` for an empty prompt, and what it raises.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    device = next(model.parameters()).device
    ids, attention_mask = encode_prompts(tokenizer, prompts)
    final = ids
    stream = denoise(
        model, ids.to(device), attention_mask.to(device), steps=steps, gen_length=gen_length, **options
    )
    for ids_now in tqdm(stream, total=steps, desc="generating", disable=not progress):
        final = ids_now
    texts = [_decode(tokenizer, row[ids.shape[1] :].tolist()) for row in final]
    return texts[0] if isinstance(prompt, str) else texts


def encode_prompts(tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, int64 ``[B, P]`` each. Raises ``ValueError`` for an empty prompt."""
    if tokenizer is None:
        raise ValueError("text prompts need a tokenizer")
    if not prompts:
        raise ValueError("at least one prompt is needed, got none")
    rows = [list(tokenizer.encode(text, add_special_tokens=False)) for text in prompts]
    for text, row in zip(prompts, rows, strict=True):
        if not row:
            raise ValueError(f"a prompt must have at least one token, got {text!r}")
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _prepare(
    model: nn.Module,
    prompt_ids: Tensor,
    attention_mask: Tensor | None,
    steps: int,
    gen_length: int,
    block_length: int | None,
    remasking: str,
    mask_token_id: int | None,
) -> tuple[Tensor, Tensor | None, int, int]:
    """Check the arguments; return the masked canvas, its attention mask, the mask id and the block length."""
    if prompt_ids.dim() != 2 or prompt_ids.shape[1] < 1:
        raise ValueError(f"prompt_ids must have shape [B, P] with P >= 1, got {tuple(prompt_ids.shape)}")
    vocabulary = adapter_for(model).geometry().vocabulary
    if prompt_ids.is_floating_point() or prompt_ids.min() < 0 or prompt_ids.max() >= vocabulary:
        raise ValueError(f"prompt_ids must be integers in [0, {vocabulary}), got {prompt_ids.dtype} values")
    if attention_mask is not None and attention_mask.shape != prompt_ids.shape:
        raise ValueError(
            f"attention_mask must have shape {tuple(prompt_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    if gen_length < 1:
        raise ValueError(f"gen_length must be at least 1, got {gen_length}")
    block = gen_length if block_length is None else block_length
    if block < 1 or gen_length % block:
        raise ValueError(f"block_length must divide gen_length={gen_length}, got {block}")
    blocks = gen_length // block
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if steps < blocks or steps % blocks or steps > gen_length:
        raise ValueError(
            f"steps must be a multiple of {blocks} blocks and at most gen_length={gen_length}, got {steps}"
        )
    if remasking not in REMASKING:
        raise ValueError(f"remasking must be one of {REMASKING}, got {remasking!r}")
    adapter = adapter_for(model)
    mask_id = adapter.mask_token_id if mask_token_id is None else mask_token_id
    if mask_id is None:
        raise ValueError("the model's config names no mask token: pass mask_token_id")
    total, context = prompt_ids.shape[1] + gen_length, adapter.geometry().context
    if total > context:
        raise ValueError(
            f"prompt of {prompt_ids.shape[1]} and gen_length of {gen_length} tokens exceed the context of "
            f"{context}"
        )
    canvas = prompt_ids.new_full((prompt_ids.shape[0], gen_length), mask_id)
    valid = None if attention_mask is None else torch.cat((attention_mask, torch.ones_like(canvas)), dim=1)
    if valid is not None and bool(valid.all()):
        valid = None
    return torch.cat((prompt_ids, canvas), dim=1), valid, mask_id, block


def _guided_logits(
    adapter: Adapter,
    ids: Tensor,
    valid: Tensor | None,
    prompt_length: int,
    mask_id: int,
    cfg_scale: float,
    rows: slice,
) -> Tensor:
    """Logits ``[B, R, V]`` of ``rows``; with guidance both halves run in one batch, the conditional first."""
    if cfg_scale == 0:
        return adapter.predict(ids, valid, rows)
    blind = ids.clone()
    blind[:, :prompt_length] = mask_id
    both = None if valid is None else torch.cat((valid, valid))
    conditional, unconditional = adapter.predict(torch.cat((ids, blind)), both, rows).chunk(2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def _draw(
    logits: Tensor, temperature: float, remasking: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A token for each row of ``[B, R, V]`` and the confidence in it, ``[B, R]`` int64 and float64.

    Gumbel-max noise and probabilities in float64 (float32 noise lowers quality in masked diffusion: arXiv
    2409.02908), a bounded number of rows at a time.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    tokens, probabilities = [], []
    for part in flat.split(max(1, FLOAT64_ELEMENTS // flat.shape[-1])):
        wide = part.double()
        if temperature:
            noise = torch.empty_like(wide).exponential_(generator=generator).clamp_min_(1e-300).log_()
            token = (wide / temperature - noise).argmax(-1, keepdim=True)
        else:
            token = part.argmax(-1, keepdim=True)
        tokens.append(token)
        if remasking == "low_confidence":
            probabilities.append((wide.gather(-1, token) - wide.logsumexp(-1, keepdim=True)).exp())
        else:
            size = token.shape
            draw = torch.rand(size, device=token.device, generator=generator, dtype=torch.float64)
            probabilities.append(draw)
    shape = logits.shape[:-1]
    return torch.cat(tokens).view(shape), torch.cat(probabilities).view(shape)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    """Text up to the first end-of-text token."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)
