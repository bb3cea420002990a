"""Where sinks form while a model denoises: ``profile`` real trajectories into a ``SinkProfile``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sinkprune.adapters import adapter_for
from sinkprune.evidence.profiles import SinkProfile
from sinkprune.evidence.sinks import SinkGate, SinkStatistics
from sinkprune.evidence.tracking import track
from sinkprune.generation.batches import batches_of, part_of
from sinkprune.generation.denoising import denoise, encode_prompts, usual_steps
from sinkprune.progress import bar as progress_bar


def profile(
    model: nn.Module,
    prompts: str | list[str] | Tensor,
    *,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    steps: int | None = None,
    gen_length: int = 128,
    batch: int = 8,
    gate: SinkGate | None = None,
    progress: bool = False,
    **options: Any,
) -> SinkProfile:
    """Run the sampler on ``prompts`` and gather every head's sink statistics over the real trajectories.

    Args:
        model: of a known family.
        prompts: strings (with ``tokenizer``), or ids int64 ``[S, P]``.
        attention_mask: ``[S, P]``, 1 at valid tokens, of ids that are padded on the left.
        steps, gen_length: of the sampler; steps None means 64, or fewer (``usual_steps``); ``options`` are
            the rest of ``denoise``'s.
        batch: trajectories that run together; prompts of a block-causal model only with those whose lengths
            differ from theirs by whole blocks.
        gate: when a sink counts as standing out.
        progress: show a bar.

    Raises:
        ValueError: what ``denoise`` raises.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Tensor):
        ids, valid = prompts, torch.ones_like(prompts) if attention_mask is None else attention_mask
    elif attention_mask is not None:
        raise ValueError("attention_mask goes with ids: text brings its own")
    else:
        ids, valid = encode_prompts(tokenizer, list(prompts))
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"prompts must be ids [S, P] with S, P >= 1, got {tuple(ids.shape)}")
    if valid.shape != ids.shape:
        raise ValueError(f"attention_mask must have shape {tuple(ids.shape)}, got {tuple(valid.shape)}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    adapter = adapter_for(model)
    device = adapter.device
    if steps is None:
        steps = usual_steps(adapter, gen_length, options.get("block_length"), at_most=64)
    batches = batches_of(valid, batch, adapter.block_size)
    parts: list[SinkStatistics] = []
    padding: list[Tensor] = []  # on the left of each sample, so that positions count from its first token
    with progress_bar("profiling", "step", total=steps * len(batches), asked=progress) as bar:
        for samples in batches:
            rows, mask = (part.to(device) for part in part_of(ids, valid, samples))
            room = steps + gen_length  # a threshold, or a prompt within a block, takes other than `steps`
            with track(
                model, samples=len(rows), gate=gate, trace=True, max_steps=room, this_thread=True
            ) as tracker:
                stream = adapter.sample(rows, mask, steps, gen_length, options)
                if stream is None:
                    mask_id = adapter.mask_id(options.get("mask_token_id"), tokenizer)
                    sampler = {"steps": steps, "gen_length": gen_length, **options, "mask_token_id": mask_id}
                    stream = denoise(model, rows, mask, **sampler)
                for _ in stream:
                    bar.update()
            parts.append(tracker.result())
            padding.append((mask.cumsum(1) == 0).sum(1))
    used = gate or SinkGate()
    said = {name: getattr(value, "name", value) for name, value in options.items() if name != "callback"}
    settings = {"steps": steps, "gen_length": gen_length, "prompts": len(ids), **said}
    settings["gate"] = {"fair_share": used.fair_share, "sigma": used.sigma}
    order = torch.tensor([sample for samples in batches for sample in samples]).argsort()
    first_part = parts[0]
    assert first_part.trace_positions is not None and first_part.trace_mass is not None
    trace = first_part.trace_positions[:, :, 0]
    heads = [adapter.kept_heads(i) for i in range(adapter.geometry().num_layers)]
    result = SinkProfile(
        geometry=adapter.geometry(),
        fingerprint=adapter.fingerprint(),
        heads=heads,
        statistics={name: v[:, order] for name, v in _collect(parts, padding).items()},
        trace_positions=(trace - padding[0][0]).clamp(min=-1).to(torch.int16).cpu(),
        trace_mass=first_part.trace_mass[:, :, 0].half().cpu(),
        settings=settings,
    )
    if adapter.form == "mask":
        result.statistics = {name: _kept_columns(v, heads) for name, v in result.statistics.items()}
        result.trace_positions = _kept_columns(result.trace_positions.transpose(0, 1), heads).transpose(0, 1)
        result.trace_mass = _kept_columns(result.trace_mass.transpose(0, 1), heads).transpose(0, 1)
    return result


def _kept_columns(values: Tensor, heads: list[list[int]]) -> Tensor:
    """A masked model's ``[L, X, all heads]`` as a compact one gives it: kept heads first."""
    order = [kept + sorted(set(range(values.shape[-1])) - set(kept)) for kept in heads]
    width = max(map(len, heads))
    return torch.stack([layer[:, ids[:width]] for layer, ids in zip(values, order, strict=True)])


def _collect(parts: list[SinkStatistics], padding: list[Tensor]) -> dict[str, Tensor]:
    """Statistics of several batches side by side; ``padding`` ``[B]`` is each sample's on the left."""
    columns: dict[str, list[Tensor]] = {}
    for part, shift in zip(parts, padding, strict=True):
        counted = part.position.count > 0
        values = {"mass": part.mass, "margin": part.margin, "fair_shares": part.fair_shares}
        named = {name: value.masked_fill(~counted, torch.nan) for name, value in values.items()}
        for prefix, moments in (("", part.position), ("gated_", part.gated)):
            none = moments.count == 0
            named[f"{prefix}steps_counted"] = moments.count
            named[f"{prefix}position_mean"] = moments.mean - shift[:, None]
            named[f"{prefix}position_variance"] = moments.variance.masked_fill(none, torch.nan)
            named[f"{prefix}position_range"] = moments.range.masked_fill(none, torch.nan)
            named[f"{prefix}moves"] = moments.moves
            named[f"{prefix}mean_move"] = moments.mean_move.masked_fill(none, torch.nan)
        for name, value in named.items():
            columns.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values, dim=1) for name, values in columns.items()}
