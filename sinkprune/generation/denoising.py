"""Denoising: blocks filled left to right, a forward a step, under any sampler and any cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.generation.batches import batches_of, part_of
from sinkprune.generation.graphs import StepGraph
from sinkprune.generation.samplers import Sampler, make_sampler
from sinkprune.generation.samplers import transfer_counts as transfer_counts
from sinkprune.generation.windows import Block, Reader, blocks_of, cache_for
from sinkprune.models.caches import Cache
from sinkprune.progress import bar as progress_bar

REMASKING = ("low_confidence", "random")


class Step(NamedTuple):
    """What a ``callback`` gets after each forward."""

    ids: Tensor  # int64 [B, P + gen_length], as yielded
    new: Tensor  # bool [B, P + gen_length], the tokens that this step committed
    forwards: int  # so far, this one counted
    block: int  # of ``blocks``
    blocks: int
    cache_bytes: int  # held by the cache now


@torch.no_grad()
def denoise(
    model: nn.Module,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    steps: int | None = None,
    gen_length: int = 128,
    block_length: int | None = None,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    algorithm: str | None = None,
    threshold: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    sub_block: int | None = None,
    stop_token_id: int | Sequence[int] | None = None,
    cache: str | Cache | None = None,
    mask_token_id: int | None = None,
    seed: int | None = None,
    callback: Callable[[Step], object] | None = None,
    graphs: bool | StepGraph = False,
) -> Iterator[Tensor]:
    """Fill ``gen_length`` masked tokens after the prompts, one forward a step, and yield the ids after each.

    Blocks of ``block_length`` are filled left to right, each in its share of ``steps``; a step commits the
    masked tokens of the block that ``algorithm`` is surest of. By default that is the published LLaDA sampler
    (arXiv 2502.09992, algorithms 4 and 5). The mask token itself is never drawn.

    A block-causal model fills its own blocks of positions, over the tokens up to the block's end only; where
    the prompt ends within a block, the first one has fewer tokens, and fewer steps, and there is one more.

    Args:
        model: of a known family.
        prompt_ids: int64 ``[B, P]``, P >= 1, left-padded where prompts differ in length.
        attention_mask: ``[B, P]``, 1 at valid tokens; None where nothing is padded.
        steps: forwards in total, a multiple of the number of blocks, at most ``gen_length``; not used with a
            threshold. None means 128, or fewer (``usual_steps``).
        gen_length: tokens to fill.
        block_length: tokens of a block, dividing ``gen_length``; None means one block, or those of the model
            or of its published sampler.
        temperature: 0 takes the argmax; above, Gumbel noise in float64.
        cfg_scale: weight of classifier-free guidance; the unconditional half masks the prompt.
        remasking: ``"low_confidence"`` or ``"random"``.
        algorithm: a rule of ``sinkprune.generation.samplers`` instead: those two, or Dream's ``"origin"``,
            ``"maskgit_plus"``, ``"topk_margin"``, ``"entropy"`` with its schedule.
        threshold: commit every token with at least this confidence, and always the surest one, until the
            block is full (Fast-dLLM, arXiv 2505.22618): the number of forwards depends on the text.
        top_p, top_k: draw from the likeliest tokens only (of the tempered distribution): the
            fewest whose probabilities reach ``top_p``, then ``top_k`` of them. Dream's rules are sure of what
            is left; LLaDA's of the whole distribution, so that they heed limits at a temperature only.
        sub_block: with a threshold, fill each block in parts of so many tokens, left to right, over forwards
            of the whole block (Fast-dLLM v2, arXiv 2509.26328: 8); it divides the block.
        stop_token_id: end-of-text tokens. Once every sample has one with nothing masked before it, nothing
            more is run, and the last yield has each sample's first such token from there on.
        cache: ``"prefix"`` or ``"dual"`` (approximate), ``"block"`` (exact, block-causal models), or one of
            ``sinkprune.models.caches``, emptied first. Under a cache a shifted model (Dream) spends a block's
            first step on the block's first token alone, as in Fast-dLLM: no later window predicts that one.
        mask_token_id: where the model's config lacks one.
        seed: of the noise and of random remasking; None draws from torch's global generator.
        callback: gets a ``Step`` after each forward.
        graphs: replay each step as a CUDA graph (nothing changes on CPU); a ``StepGraph`` of this model keeps
            its graphs for the next call. Not with a cache.

    Yields:
        int64 ``[B, P + gen_length]``, a fresh tensor each step.

    Raises:
        ValueError: an argument out of range, an empty prompt, a total beyond the context, a cache that the
            model does not take, or padding that its blocks can't express.
    """
    adapter = adapter_for(model)
    if steps is None:
        steps = usual_steps(adapter, gen_length, block_length, at_most=128)
    canvas = _prepare(
        adapter,
        prompt_ids,
        attention_mask,
        steps=steps,
        gen_length=gen_length,
        block_length=block_length,
        mask_token_id=mask_token_id,
        threshold=threshold,
    )
    if remasking not in REMASKING:
        raise ValueError(f"remasking must be one of {REMASKING}, got {remasking!r}")
    if not (0 <= temperature < math.inf and 0 <= cfg_scale < math.inf):
        raise ValueError(
            f"temperature and cfg_scale must be finite and at least 0, got {temperature} and {cfg_scale}"
        )
    if sub_block is not None:
        block = canvas.blocks[0].rows.stop - canvas.blocks[0].start
        if threshold is None or sub_block < 1 or block % sub_block:
            raise ValueError(
                f"sub_block must divide the block of {block} tokens and needs a threshold, got {sub_block} "
                f"and threshold={threshold}"
            )
    generator = None if seed is None else torch.Generator(prompt_ids.device).manual_seed(seed)
    sampler = make_sampler(
        algorithm or remasking, temperature, generator, threshold, top_p=top_p, top_k=top_k
    )
    kept, prompt = cache_for(adapter, cache), prompt_ids.shape[1]
    reader = Reader(
        adapter, kept, canvas.valid, prompt_length=prompt, mask_id=canvas.mask_id, cfg_scale=cfg_scale
    )
    if graphs:
        if kept is not None:
            raise ValueError("graphs replay whole sequences: pass either graphs or a cache")
        reader.predict = graphs if isinstance(graphs, StepGraph) else StepGraph(model)
    current, forwards, wanted = canvas.ids, 0, prompt + gen_length
    stops = _stops(stop_token_id, prompt_ids.device)
    for index, block in enumerate(canvas.blocks):
        reader.begin(block, current.shape[1])
        for ids, new in fill(block.rows, current, reader, sampler, canvas.steps, sub_block):
            current, forwards = ids, forwards + 1
            if callback is not None:
                held = 0 if kept is None else kept.bytes
                callback(Step(ids[:, :wanted], new[:, :wanted], forwards, index, len(canvas.blocks), held))
            ended = None if stops is None else _ended(ids[:, :wanted], prompt, stops, canvas.mask_id)
            yield ids[:, :wanted] if ended is None else ended
            if ended is not None:
                return


def _stops(given: int | Sequence[int] | None, device: torch.device) -> Tensor | None:
    """Stop tokens int64 ``[n]``, or None."""
    stops = [given] if isinstance(given, int) else list(given or ())
    return torch.tensor(stops, device=device) if stops else None


def _ended(ids: Tensor, prompt: int, stops: Tensor, mask_id: int) -> Tensor | None:
    """``ids`` ``[B, T]`` with each sample's first stop token from there on; None where a sample goes on."""
    written = ids[:, prompt:]
    after = torch.isin(written, stops).cumsum(1) > 0
    if not bool(after.any(1).all()) or bool((written.eq(mask_id) & ~after).any()):
        return None
    first = after.long().argmax(1, keepdim=True)
    return torch.cat((ids[:, :prompt], torch.where(after, written.gather(1, first), written)), dim=1)


def fill(
    rows: slice,
    ids: Tensor,
    reader: Reader,
    sampler: Sampler,
    steps: int,
    sub_block: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Fill a block's ``rows`` of ids ``[B, T]``, by parts of ``sub_block`` positions of it; yield the ids,
    and which are new, after each forward."""
    left = rows.stop - rows.start  # masked tokens of a sample, as the schedule counts them
    steps = min(steps, left)
    for step in range(steps):
        tokens, confidence = sampler.draw(reader.logits(ids, rows))
        masked = ids[:, rows] == reader.mask_id
        only = reader.out_of_reach(rows) if step == 0 and steps > 1 else 0
        if only:
            chosen = masked & (torch.arange(masked.shape[1], device=ids.device) < only)
        else:
            among = masked if sub_block is None else masked & _first_part(masked, sub_block)
            chosen = sampler.choose(confidence, among, left, step, steps)
        left -= only or sampler.count(left, step, steps)
        new = torch.zeros_like(ids, dtype=torch.bool)
        new[:, rows] = chosen
        ids = ids.clone()
        ids[:, rows] = torch.where(chosen, tokens, ids[:, rows])
        yield ids, new
        if sampler.threshold is not None and not bool((masked & ~chosen).any()):
            return


def _first_part(masked: Tensor, sub_block: int) -> Tensor:
    """Bool ``[R]``: the first part of ``sub_block`` positions, counted back from the last of ``masked``
    ``[B, R]``, in which any sample has a masked token."""
    rows = masked.shape[1]
    part = torch.arange(-rows, 0, device=masked.device) // sub_block
    return part == part[masked.any(0).long().argmax()]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | list[str],
    *,
    steps: int | None = None,
    gen_length: int = 64,
    progress: bool = False,
    callback: Callable[[Step], object] | None = None,
    **options: Any,
) -> str | list[str]:
    """Continue ``prompt`` and return the new text (a list for a list of prompts).

    ``callback`` and ``options`` are those of ``denoise``; ``steps`` None means 64, or fewer
    (``usual_steps``); where the config names no mask token, the one of ``tokenizer`` is taken. ``progress``
    counts tokens, for the number of forwards may depend on the text. Prompts of a block-causal model run with
    those whose lengths differ from theirs by whole blocks, the longest first; ``callback`` sees one such
    group after the other. Raises ``ValueError`` for an empty prompt, and what ``denoise`` raises.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    adapter = adapter_for(model)
    if steps is None:
        steps = usual_steps(adapter, gen_length, options.get("block_length"), at_most=64)
    device = adapter.device
    ids, attention_mask = encode_prompts(tokenizer, prompts)
    options["mask_token_id"] = adapter.mask_id(options.get("mask_token_id"), tokenizer)
    with progress_bar("generating", "token", total=gen_length * len(ids), asked=progress) as bar:

        def report(step: Step) -> None:
            if not bar.disable:
                bar.update(int(step.new.sum()))
            if callback is not None:
                callback(step)

        texts = [""] * len(ids)
        lengths = attention_mask.sum(1).tolist()
        together = batches_of(attention_mask, len(ids), adapter.block_size)
        for samples in sorted(together, key=lambda group: -max(lengths[i] for i in group)):
            rows, mask = (part.to(device) for part in part_of(ids, attention_mask, samples))
            *_, final = denoise(
                model, rows, mask, steps=steps, gen_length=gen_length, callback=report, **options
            )
            for sample, row in zip(samples, final[:, rows.shape[1] :].tolist(), strict=True):
                texts[sample] = decode(tokenizer, row)
    return texts[0] if isinstance(prompt, str) else texts


def usual_steps(adapter: Adapter, gen_length: int, block_length: int | None = None, *, at_most: int) -> int:
    """Forwards where none are asked for: as many for each block, at least one, no more than tokens, and
    ``at_most`` in all where there are not more blocks than that."""
    block = block_length or adapter.block_size or min(adapter.usual_block or gen_length, gen_length)
    blocks = max(1, -(-gen_length // max(1, block)))
    return max(1, min(at_most, gen_length) // blocks) * blocks


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


class _Canvas(NamedTuple):
    """What is filled: masked ids ``[B, T]``, their validity (None: all), and in which blocks."""

    ids: Tensor
    valid: Tensor | None
    mask_id: int
    blocks: list[Block]
    steps: int  # of a block, at most


def _prepare(
    adapter: Adapter,
    prompt_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    steps: int,
    gen_length: int,
    block_length: int | None,
    mask_token_id: int | None,
    threshold: float | None,
) -> _Canvas:
    """Check the arguments and lay the canvas out."""
    geometry = adapter.geometry()
    _check_prompts(prompt_ids, attention_mask, geometry.vocabulary)
    if gen_length < 1:
        raise ValueError(f"gen_length must be at least 1, got {gen_length}")
    own = adapter.block_size
    usual = own or min(adapter.usual_block or gen_length, gen_length)
    block = usual if block_length is None else block_length
    if block < 1 or gen_length % block:
        raise ValueError(f"block_length must divide gen_length={gen_length}, got {block}")
    if own is not None and block != own:
        raise ValueError(
            f"{adapter.family} is block-causal: its blocks have {own} tokens, got block_length {block}"
        )
    count = gen_length // block
    if threshold is not None:
        steps = gen_length
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if steps < count or steps % count or steps > gen_length:
        multiple = f"a multiple of {count} blocks and " if count > 1 else ""
        raise ValueError(f"steps must be {multiple}at most gen_length={gen_length}, got {steps}")
    mask_id = adapter.mask_id(mask_token_id)
    blocks = blocks_of(prompt_ids.shape[1], gen_length, block, aligned=own is not None)
    total = blocks[-1].rows.stop
    if total > geometry.context:
        raise ValueError(
            f"prompt of {prompt_ids.shape[1]} and gen_length of {gen_length} tokens exceed the context of "
            f"{geometry.context}"
        )
    canvas = prompt_ids.new_full((prompt_ids.shape[0], total - prompt_ids.shape[1]), mask_id)
    ids, valid = torch.cat((prompt_ids, canvas), dim=1), None
    if attention_mask is not None and not bool(attention_mask.all()):
        if own is not None:
            _check_padding(attention_mask, own)
        valid = torch.cat((attention_mask, torch.ones_like(canvas)), dim=1)
    return _Canvas(ids, valid, mask_id, blocks, steps // count)


def _check_prompts(prompt_ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> None:
    if not isinstance(prompt_ids, Tensor):
        raise TypeError(f"prompt_ids must be a tensor [B, P], got {type(prompt_ids).__name__}")
    if prompt_ids.dim() != 2 or not prompt_ids.numel():
        raise ValueError(
            f"prompt_ids must have shape [B, P] with B and P >= 1, got {tuple(prompt_ids.shape)}"
        )
    whole = prompt_ids.dtype in (torch.int64, torch.int32)
    if not whole or prompt_ids.min() < 0 or prompt_ids.max() >= vocabulary:
        raise ValueError(f"prompt_ids must be integers in [0, {vocabulary}), got {prompt_ids.dtype} values")
    if attention_mask is not None and attention_mask.shape != prompt_ids.shape:
        raise ValueError(
            f"attention_mask must have shape {tuple(prompt_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    if attention_mask is not None:
        _check_left_padded(attention_mask)


def _check_left_padded(attention_mask: Tensor) -> None:
    """Raise ``ValueError`` unless every row of ``[B, P]`` is zeros, then ones, and ends in a one."""
    valid = attention_mask != 0
    wrong = (~valid[:, -1] | (valid[:, :-1] & ~valid[:, 1:]).any(1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            "prompts must be padded on the left (attention_mask 0…0 1…1 in each row, at least one 1), since "
            f"the new tokens follow the last column: rows {wrong[:8]} are not"
        )


def _check_padding(attention_mask: Tensor, block: int) -> None:
    """Raise ``ValueError`` where padding moves a block-causal model's blocks against each other."""
    padding = (attention_mask == 0).sum(1).tolist()
    if any(count % block for count in padding):
        raise ValueError(
            f"a block-causal model with blocks of {block} takes prompts whose lengths differ by multiples of "
            f"that, got padding of {padding}: sp.generate runs them in groups"
        )


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text up to the first end-of-text token."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)
