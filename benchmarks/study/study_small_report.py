"""The section on "small" in docs/study.md, from the rows of ``study_small.py`` and ``study_claims.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
from study_heads import ALIKE, CHANNEL_RULE, CHANNEL_RULES, CRITERIA, HEADLINE, PAPER
from study_heads_report import loss, losses, marked, signed
from study_small import ALIKE_TOKENS, CHOSEN_RIDGE, HIGH, LEADING, RATIOS, REPAIRS

from sinkprune.evaluation.intervals import Interval, bootstrap_difference
from sinkprune.planning.planner import DEFAULT_CRITERION

Rows = dict[str, Any]
TEXTS = {"held_out": "addresses held out", "out_of_domain": "King James Bible"}
RULES = (*(rule for rule in CRITERIA if rule not in ALIKE), ALIKE_TOKENS)
RIDGED = (
    ("heads", HEADLINE, DEFAULT_CRITERION),
    ("heads", HEADLINE, ALIKE_TOKENS),
    (f"parameters, {CHANNEL_RULE}", HEADLINE, DEFAULT_CRITERION),
    (f"parameters, {CHANNEL_RULE}", 0.5, DEFAULT_CRITERION),
)
COLUMNS = " | ".join(f"{title} | repaired" for title in TEXTS.values())
RULER = "|---" * (1 + 2 * len(TEXTS)) + "|"

HEAD = """## "small": 135 M parameters, grouped heads, English

`python benchmarks/study/study_small.py` ({measured} of {cells} cells measured)

SmolLM2-135M, born autoregressive and turned into a masked diffusion model ([its
card](../sinkprune/assets/small/README.md)): 30 layers of 9 query and 3 key/value heads. Nats per masked token
above the dense model, judged in bfloat16 on {windows} windows of {length} tokens of addresses held out and
half as many of the King James Bible; calibrated on {rows} windows at three noise levels; intervals 95 %,
paired over windows and over as many calibration draws as a cell has."""

STREAM = """`reconstruction:alike=true` is what `reconstruction` was before it weighed every token by its own
hidden state. The mean square of the stream, by which that form, `fluctuation` and `sink_removed`
divide, is up to 55 times a typical token's on this model, since a few tokens carry huge activations
from layer 11 on; and layer 0's attention writes to a stream five hundred times smaller than what
its MLP makes of it. So they empty layer 0 and the middle. On tiny, where no token is like that,
both forms keep the same heads at 38 %."""
RIDGE = """The ridge of the repair, by the default rules, one draw: `least_squares` has a fixed one,
`least_squares_cv` takes for every projection the one that does best on positions that were not fitted."""


def section(found: Rows, claims: Rows | None = None) -> str:
    """Markdown of what ``small.json`` has rows for, and of ``claims_small.json`` where there is one."""
    rows, settings = found["rows"], found["settings"]
    wanted = _cells(settings["draws"])
    have = sum(f"small/{key}" in rows for key in wanted)
    parts = [HEAD.format(measured=have, cells=len(wanted), **settings), _dense(rows)]
    parts += ["### Every head rule, 38 % of heads", _rules(rows), _verdict(rows)]
    parts.append(STREAM)
    parts += ["### The leading rules, calibration drawn anew", _leading(rows, settings["draws"])]
    parts += ["### Block parameters, heads and MLP", _parameters(rows)]
    parts += ["### Fixed ridge against one by cross-validation", _ridges(rows)]
    if claims is not None:
        parts += ["### Sinks of a model born autoregressive", _sinks(claims["rows"], claims["settings"])]
    missing = [key for key in wanted if f"small/{key}" not in rows]
    if missing:
        parts.append(f"Not measured yet: {_named(missing)}.")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _cells(draws: int) -> list[str]:
    """Keys of the whole table, ``kind/ratio/repair/rule/draw``."""
    keys = [f"heads/{HEADLINE}/{repair}/{rule}/0" for rule in RULES for repair in REPAIRS]
    kind = f"parameters, {CHANNEL_RULE}"
    keys += [f"{kind}/{ratio}/{repair}/{DEFAULT_CRITERION}/0" for ratio in RATIOS for repair in REPAIRS]
    keys += [f"{kind}/{HEADLINE}/{repair}/random/0" for repair in REPAIRS]
    others = (rule for rule in CHANNEL_RULES if rule != CHANNEL_RULE)
    keys += [
        f"parameters, {rule}/{HEADLINE}/{repair}/{DEFAULT_CRITERION}/0"
        for rule in others
        for repair in REPAIRS
    ]
    keys += [
        f"heads/{ratio}/{repair}/{rule}/{draw}"
        for draw in range(draws)
        for ratio in (HEADLINE, HIGH)
        for rule in LEADING
        for repair in REPAIRS
        if rule != "magnitude" or repair is not None or not draw
    ]
    keys += [f"{kind}/{ratio}/{CHOSEN_RIDGE}/{rule}/0" for kind, ratio, rule in RIDGED]
    return list(dict.fromkeys(keys))


def _ridges(rows: Rows) -> str:
    found = []
    for kind, ratio, rule in RIDGED:
        key = f"small/{kind}/{ratio}/{{}}/{rule}/0"
        if key.format(CHOSEN_RIDGE) not in rows:
            continue
        cells = [
            signed(_cell(rows, kind, ratio, repair, rule, text))
            for text in TEXTS
            for repair in ("least_squares", CHOSEN_RIDGE)
        ]
        what = "heads" if kind == "heads" else "parameters"
        found.append(f"| {ratio:.0%} of {what}, `{rule}` | {' | '.join(cells)} |")
    if not found:
        return ""
    titles = " | ".join(f"{title} | cross-validated" for title in TEXTS.values())
    return "\n".join([RIDGE, "", f"| removed | {titles} |", RULER, *found])


def _named(keys: list[str]) -> str:
    """Cells in words, draws of one cell together."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        cell, _, draw = key.rpartition("/")
        groups.setdefault(cell, []).append(draw)
    words = []
    for cell, draws in groups.items():
        kind, ratio, repair, rule = cell.split("/")
        form = "" if repair == "None" else ", repaired"
        words.append(f"{kind} {float(ratio):.0%} by `{rule}`{form} (draw {', '.join(draws)})")
    return "; ".join(words)


def _dense(rows: Rows) -> str:
    shown = []
    for text, title in TEXTS.items():
        exact, judged = rows["small/dense, fp32"][text], rows["small/dense"][text]
        change = bootstrap_difference(judged, exact)
        shown.append(
            f"{title} {np.mean(judged):.3f} nats (in float32 {np.mean(exact):.3f}, {signed(change)})"
        )
    return f"Dense: {'; '.join(shown)}."


def _cell(rows: Rows, kind: str, ratio: float, repair: str | None, rule: str, text: str) -> Interval | None:
    return loss(rows, "small", text, f"{kind}/{ratio}/{repair}/{rule}")


def _first_draw(rows: Rows, kind: str, ratio: float, repair: str | None, rule: str, text: str) -> Any:
    values = losses(rows, "small", text, f"{kind}/{ratio}/{repair}/{rule}")
    return None if values is None else values[0]


def _rules(rows: Rows) -> str:
    """All rules on the same draw, the best repaired one first."""

    def one(repair: str | None, rule: str, text: str) -> Interval | None:
        values = _first_draw(rows, "heads", HEADLINE, repair, rule, text)
        return None if values is None else bootstrap_difference(values, rows["small/dense"][text])

    def mean(rule: str) -> float:
        value = one("least_squares", rule, "held_out") or one(None, rule, "held_out")
        return np.inf if value is None else value.mean

    lines = [f"| rule | {COLUMNS} |", RULER]
    for rule in sorted(RULES, key=mean):
        cells = [signed(one(repair, rule, text)) for text in TEXTS for repair in REPAIRS]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {_bold(rule)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bold(rule: str) -> str:
    return f"**{rule}**" if rule == DEFAULT_CRITERION else rule


def _minus(
    rows: Rows, one: str, other: str, text: str, repair: str | None, ratio: float = HEADLINE
) -> Interval | None:
    """A rule less another, paired over windows and over the draws that both have."""
    sides = [losses(rows, "small", text, f"heads/{ratio}/{repair}/{rule}") for rule in (one, other)]
    if sides[0] is None or sides[1] is None:
        return None
    draws = min(len(side) for side in sides if side is not None)
    return bootstrap_difference(sides[0][:draws], sides[1][:draws])


def _verdict(rows: Rows) -> str:
    """The default and the paper's rule against the others, and what repair does beside the choice."""
    lines = [f"Differences, below 0 the first is better; bold, 0 is outside:\n\n| | {COLUMNS} |", RULER]
    rivals = [rule for rule in RULES if rule != DEFAULT_CRITERION]
    pairs = [(DEFAULT_CRITERION, rule) for rule in rivals]
    pairs += [(PAPER, rule) for rule in ("random", "magnitude")]
    for one, other in pairs:
        values = [_minus(rows, one, other, text, repair) for text in TEXTS for repair in REPAIRS]
        if any(value is not None for value in values):
            lines.append(f"| {one} - {other} | {' | '.join(map(marked, values))} |")
    return "\n".join(lines) + "\n\n" + _spread(rows)


def _spread(rows: Rows) -> str:
    """How far the rules are apart, and how much repair takes away, over the rules measured both ways."""
    both = []
    for rule in RULES:
        pair = [_first_draw(rows, "heads", HEADLINE, repair, rule, "held_out") for repair in REPAIRS]
        if pair[0] is not None and pair[1] is not None:
            both.append((rule, [float(np.mean(v) - np.mean(rows["small/dense"]["held_out"])) for v in pair]))
    if len(both) < 2:
        return ""
    plain, mended = (np.array([values[i] for _, values in both]) for i in range(2))
    best = both[int(plain.argmin())][0]
    worst = both[int(mended.argmax())][0]
    more = "more" if mended.max() < plain.min() else "no more"
    return (
        f"Over the {len(both)} rules measured both ways, on addresses held out: they lie between "
        f"{plain.min():+.3f} and {plain.max():+.3f} as pruned (mean {plain.mean():+.3f}), between "
        f"{mended.min():+.3f} and {mended.max():+.3f} repaired (mean {mended.mean():+.3f}). The worst rule "
        f"repaired (`{worst}`) costs {'less' if more == 'more' else 'more'} than the best one unrepaired "
        f"(`{best}`): repair matters {more} than the rule here."
    )


def _leading(rows: Rows, draws: int) -> str:
    lines = []
    for ratio in (HEADLINE, HIGH):
        found = []
        for rule in LEADING:
            cells, counts = [], []
            for text in TEXTS:
                for repair in REPAIRS:
                    values = losses(rows, "small", text, f"heads/{ratio}/{repair}/{rule}")
                    counts.append("–" if values is None else str(len(values)))
                    cells.append(signed(_cell(rows, "heads", ratio, repair, rule, text)))
            if set(counts) != {"–"}:
                found.append(f"| {_bold(rule)} | {' | '.join(cells)} | {', '.join(counts[:2])} |")
        if found:
            titles = f"| {ratio:.0%} of heads by | {COLUMNS} | draws, pruned and repaired |"
            lines += [titles, RULER + "---|", *found, ""]
    return "\n".join(lines)


def _parameters(rows: Rows) -> str:
    lines = [f"| removed | heads by | channels by | {COLUMNS} |", "|---|---" + RULER]
    cells = [(ratio, DEFAULT_CRITERION, CHANNEL_RULE) for ratio in RATIOS]
    cells += [(HEADLINE, "random", CHANNEL_RULE)]
    cells += [(HEADLINE, DEFAULT_CRITERION, rule) for rule in CHANNEL_RULES if rule != CHANNEL_RULE]
    for ratio, rule, channels in cells:
        values = [
            _cell(rows, f"parameters, {channels}", ratio, repair, rule, text)
            for text in TEXTS
            for repair in REPAIRS
        ]
        if any(value is not None for value in values):
            lines.append(f"| {ratio:.1%} | {rule} | {channels} | {' | '.join(map(signed, values))} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def _sinks(rows: Rows, settings: Rows) -> str:
    lines = [
        f"`python benchmarks/study/study_claims.py --model small`: {settings['prompts']} prompts of 16 "
        f"tokens, {settings['steps']} steps for {2 * settings['steps']} tokens.",
        "",
        "| | all steps | first half | second half |",
        "|---|---|---|---|",
    ]
    parts = [rows.get("whole"), *(rows.get("halves", {}).get(half) for half in ("early", "late"))]
    for name, title in (
        ("heads_moving_over_3", "heads whose sink moves by more than 3 positions, by argmax"),
        ("heads_moving_over_3_gated", "the same, counting only sinks that stand out"),
        ("moves_per_step", "steps on which the argmax moves"),
        ("moves_per_step_gated", "the same, of sinks that stand out"),
        ("heads_with_a_sink", "heads with a sink that stands out on most steps"),
        ("at_position_0", "trajectories of a head that never leave position 0"),
        ("mass_at_0", "attention on position 0"),
        ("mean_sink_mass", "attention on the sink"),
    ):
        cells = ["" if part is None or name not in part else f"{part[name]:.0%}" for part in parts]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    if "hiding" in rows:
        modes = {k: v["added"] for k, v in rows["hiding"].items() if isinstance(v, dict) and "added" in v}
        shown = ", ".join(f"{name} {signed(Interval(**value))}" for name, value in modes.items())
        lines += ["", f"Hiding one key of every head costs, in nats per token: {shown}."]
    return "\n".join(lines)
