"""The section on whole blocks in docs/study.md, from the rows of ``study_blocks.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
from study_blocks import COUNTS, MODELS, PLACES, REPAIRS, RULES, TARGETS, WIDTH
from study_heads_report import loss, losses, marked, signed

from sinkprune.evaluation.intervals import Interval, bootstrap_difference
from sinkprune.planning.block_rules import DEFAULT_BLOCK_RULE

Rows = dict[str, Any]
TEXTS = {"held_out": "held out", "out_of_domain": "King James Bible"}

HEAD = """## Whole blocks

`python benchmarks/study/study_blocks.py`: nats per masked token above the dense model without whole blocks,
as pruned and with least-squares repair (which fits the projection before a gap to what it and the gap
wrote). Calibrated on {rows} windows of {length} tokens at three noise levels; tiny on {tiny} windows held
out and five calibration draws, small in bfloat16 on {small} windows and one draw; intervals 95 %, paired
over windows and draws. On small, `ablation` was not measured, and repair for the default rule alone."""

ONE = """### One block at a time: are early ones redundant?

Published of LLaDA: its early layers are redundant. Mean over the blocks of a third of the depth, each taken
out alone, not repaired:"""

MANY = """### Several at once

`first`, `after first`, `middle` and `last` are neighbours; `{width}` is as large a share of the block
parameters, by the default rules for heads and channels. Bold is the default rule; – is not measured."""


def section(found: Rows) -> str:
    """Markdown of what ``blocks.json`` has rows for."""
    rows, settings = found["rows"], found["settings"]
    models = [model for model in MODELS if f"{model}/dense" in rows]
    parts = [HEAD.format(**(settings | settings["windows"])), ONE, _thirds(rows, models)]
    parts += [MANY.format(width=WIDTH), *(_table(rows, model) for model in models), _verdict(rows, models)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _alone(rows: Rows, model: str, text: str) -> np.ndarray | None:
    """Losses above dense of every block taken out alone ``[layers, texts]``; None where some are missing."""
    found: list[np.ndarray] = []
    while (one := losses(rows, model, text, f"blocks/one/None/{len(found)}")) is not None:
        found.append(one[0])
    last = f"{model}/blocks/one/None/{len(found)}/0"
    return None if not found or last in rows else np.array(found)


def _parts(each: np.ndarray) -> list[np.ndarray]:
    """Mean losses ``[texts]`` over the first third of the blocks, that without block 0, the middle and the
    last third."""
    first, middle, last = np.array_split(each, 3)
    return [part.mean(0) for part in (first, first[1:], middle, last)]


def _thirds(rows: Rows, models: list[str]) -> str:
    lines = [
        "| model | text | first third | without block 0 | middle | last third | without block 0, less last "
        "| cheapest | dearest |"
    ]
    lines.append("|---" * 9 + "|")
    for model in models:
        for text, title in TEXTS.items():
            each = _alone(rows, model, text)
            if each is None:
                continue
            dense = rows[f"{model}/dense"][text]
            parts = _parts(each)
            cells = [signed(bootstrap_difference(part, dense)) for part in parts]
            apart = marked(bootstrap_difference(parts[1], parts[3]))
            costs = each.mean(1) - np.mean(dense)
            ends = (f"block {layer} ({costs[layer]:+.3f})" for layer in (costs.argmin(), costs.argmax()))
            lines.append(f"| {model} | {title} | {' | '.join(cells)} | {apart} | {' | '.join(ends)} |")
    return "\n".join(lines)


def _table(rows: Rows, model: str) -> str:
    titles = " | ".join(f"{title} | repaired" for title in TEXTS.values())
    lines = [f"| {model}, removed | by | {titles} |", "|---" * (2 + 2 * len(TEXTS)) + "|"]
    cases = [("blocks", count, by) for count in COUNTS[model] for by in (*RULES[model], *PLACES, WIDTH)]
    cases += [(target, COUNTS[model][-1], DEFAULT_BLOCK_RULE) for target in TARGETS[1:]]
    names = {"blocks": "blocks", "attention": "attentions", "mlp_blocks": "MLPs"}
    for target, count, by in cases:
        cells = [
            signed(loss(rows, model, text, f"{target}/{count}/{repair}/{by}"))
            for text in TEXTS
            for repair in REPAIRS
        ]
        if set(cells) != {"–"}:
            named = f"**{by}**" if by == DEFAULT_BLOCK_RULE else by
            lines.append(f"| {count} {names[target]} | {named} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _minus(rows: Rows, model: str, count: int, one: str, other: str, repair: str | None) -> Interval | None:
    sides = [losses(rows, model, "held_out", f"blocks/{count}/{repair}/{by}") for by in (one, other)]
    measured = [side for side in sides if side is not None]
    if len(measured) < 2:
        return None
    draws = min((len(side) for side in measured if len(side) > 1), default=1)  # of an unfinished study
    return bootstrap_difference(*(side[0] if len(side) == 1 else side[:draws] for side in measured))


def _verdict(rows: Rows, models: list[str]) -> str:
    pairs = [(DEFAULT_BLOCK_RULE, rule) for rule in ("random", "reconstruction", "ablation")]
    pairs += [("after first", "last"), (DEFAULT_BLOCK_RULE, WIDTH)]
    titles = [(model, count, repair) for model in models for count in COUNTS[model] for repair in REPAIRS]
    named = " | ".join(f"{m}, {count}{', repaired' if repair else ''}" for m, count, repair in titles)
    lines = ["Differences on text held out, below 0 the first is better; bold, 0 is outside:", ""]
    lines += [f"| | {named} |", "|---" * (1 + len(titles)) + "|"]
    for one, other in pairs:
        values = [_minus(rows, model, count, one, other, repair) for model, count, repair in titles]
        if any(value is not None for value in values):
            lines.append(f"| {one} - {other} | {' | '.join(map(marked, values))} |")
    mended = [_repair(rows, model, count) for model, count, repair in titles if repair]
    values = [value for one in mended for value in ("", marked(one))]
    lines.append(f"| {DEFAULT_BLOCK_RULE}, repaired - as pruned | {' | '.join(values)} |")
    return "\n".join(lines) + "\n\n" + _said(rows, models)


def _repair(rows: Rows, model: str, count: int) -> Interval | None:
    keys = [f"blocks/{count}/{repair}/{DEFAULT_BLOCK_RULE}" for repair in ("least_squares", None)]
    after, before = (losses(rows, model, "held_out", key) for key in keys)
    if after is None or before is None:
        return None
    draws = min(len(after), len(before))
    return bootstrap_difference(after[:draws], before[:draws])


def _said(rows: Rows, models: list[str]) -> str:
    """The published claim against what was measured, on text held out."""
    words = []
    for model in models:
        each = _alone(rows, model, "held_out")
        if each is None:
            continue
        dense = rows[f"{model}/dense"]["held_out"]
        _, early, middle, last = _parts(each)
        cheapest = min((early.mean(), "first third"), (middle.mean(), "middle"), (last.mean(), "last third"))
        apart, first = bootstrap_difference(early, last), bootstrap_difference(each[0], dense)
        verdict = "reproduced" if apart.high < 0 else "not reproduced" if apart.low > 0 else "open"
        words.append(
            f"on {model} {verdict} for what comes after block 0 ({signed(apart)} against the last third), "
            f"block 0 itself costs {signed(first)}, and the cheapest are those of the {cheapest[1]}"
        )
    return f"Early blocks are the redundant ones: {'; '.join(words)}." if words else ""
