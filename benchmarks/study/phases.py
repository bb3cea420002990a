"""Phase schedules beside a static plan of equal average compute, on "tiny": quality and time.

Heads only, by two criteria. "dense, then pruned" runs the early half of a trajectory dense and the late half
without 38 % of the heads; "pruned, then dense" the reverse; "static" leaves out 19 % throughout, so all three
run as many heads on average. Quality is the masked bound: a window with more than half of its tokens masked
is an early state, one with fewer a late one. Run by ``study_weights.py``.
"""

from __future__ import annotations

import torch
from resumable import Row, Rows
from torch import nn

import sinkprune as sp
from sinkprune.checkpoints import checkpoint
from sinkprune.evaluation.predictions import Measurement, bound_masks
from sinkprune.planning.timing import interleaved

RATIO = 0.38
LENGTH, DRAWS, STEPS = 128, 4, 16
CRITERIA = ("sink_variance", "magnitude")


def measure(rows: Rows, windows: int) -> None:
    model, tokenizer = sp.load("tiny")
    text = checkpoint.texts("held_out")
    calibration = checkpoint.texts("calibration")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    starts = torch.linspace(0, len(ids) - LENGTH, windows).long()
    texts = ids[starts[:, None] + torch.arange(LENGTH)]
    known = tokenizer.encode(calibration, add_special_tokens=False)
    prompts = torch.tensor([known[i * 500 : i * 500 + 16] for i in range(8)])
    for criterion in CRITERIA:
        rows.row(f"tiny/phases/{criterion}", lambda c=criterion: _compare(model, texts, prompts, c))


def schedules(model: nn.Module, prompts: torch.Tensor, criterion: str) -> dict[str, sp.PhaseSchedule]:
    profile = sp.profile(model, prompts, steps=STEPS, gen_length=64)
    pruned = sp.plan(model, profile, criterion, RATIO)
    half = sp.plan(model, profile, criterion, RATIO / 2)
    middle = STEPS // 2
    return {
        "dense": sp.PhaseSchedule([0], [None]),
        "static": sp.PhaseSchedule([0], [half]),
        "dense, then pruned": sp.PhaseSchedule([0, middle], [None, pruned]),
        "pruned, then dense": sp.PhaseSchedule([0, middle], [pruned, None]),
        "pruned throughout": sp.PhaseSchedule([0], [pruned]),
    }


def _compare(model: nn.Module, texts: torch.Tensor, prompts: torch.Tensor, criterion: str) -> Row:
    ways = schedules(model, prompts, criterion)
    adapter = sp.adapter_for(model)
    found: Row = {"heads_run": {}, "per_window": {}, "agreement": {}}
    written: dict[str, torch.Tensor] = {}
    for name, schedule in ways.items():
        found["heads_run"][name] = schedule.heads_run(adapter, STEPS)
        found["per_window"][name] = _bound(model, texts, schedule)
        written[name] = _written(model, prompts, schedule)
        same = written[name][:, 16:] == written["dense"][:, 16:]
        found["agreement"][name] = same.float().mean().item()
    calls = {name: lambda s=schedule: _written(model, prompts[:1], s) for name, schedule in ways.items()}
    timings, ratios = interleaved(calls, repeats=7, warmup=1)
    found["ms"] = {name: timing.median / STEPS for name, timing in timings.items()}
    found["speedup"] = ratios
    return found


def _written(model: nn.Module, prompts: torch.Tensor, schedule: sp.PhaseSchedule) -> torch.Tensor:
    with sp.scheduled(model, schedule):
        return list(sp.denoise(model, prompts, steps=STEPS, gen_length=64))[-1]


def _bound(model: nn.Module, texts: torch.Tensor, schedule: sp.PhaseSchedule) -> list[float]:
    """The bound of each window, its early states under the first phase's plan, its late ones under the
    last's."""
    mask_id = sp.adapter_for(model).mask_token_id
    assert mask_id is not None
    everything = torch.ones_like(texts, dtype=torch.bool)
    masked = bound_masks(everything, DRAWS, torch.Generator().manual_seed(0))
    repeated = texts.repeat(DRAWS, 1)
    early = masked.sum(1) > texts.shape[1] / 2
    losses = torch.zeros(len(repeated), dtype=torch.float64)
    for rows, plan in ((early, schedule.plans[0]), (~early, schedule.plans[-1])):
        with sp.scheduled(model, sp.PhaseSchedule([0], [plan])):
            losses[rows], _ = Measurement(model, mask_id, 16, lambda count: None)(
                repeated[rows], masked[rows], None
            )
    return [round(value, 5) for value in losses.view(DRAWS, len(texts)).mean(0).tolist()]
