"""The weight-level sections of docs/study.md and their pictures, from the rows of ``study_weights.py``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sinkprune.evaluation.intervals import Interval, bootstrap_difference, bootstrap_interval
from sinkprune.pruning.sparsification import METHODS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/study/weights.json"
PICTURES = ROOT / "docs/study"
SETTINGS = ("25 %", "50 %", "75 %", "2:4")
SHARES = {"25 %": 25, "50 %": 50, "75 %": 75}
TEXTS = {"tiny": {"held_out": "tiny, held out", "out_of_domain": "tiny, other domain"},
         "rxnfp": {"reactions": "rxnfp, reactions, t ≤ 0.5"}}  # fmt: skip
PAIRS = (("sink_wanda", "wanda"), ("sink_sparsegpt", "sparsegpt"))
COMMAND = "python benchmarks/study/study_weights.py --reactions FILE"

INTRODUCTION = """## Weight-level pruning: the paper's own experiment

`{command}`

Zeros in the weights of all blocks, by `sp.sparsify`; {calibrations} calibration draws of {sequences}
windows, each at ten noise levels (up to 0.5 for rxnfp, which never saw more noise). All methods of a draw
see the same rows. Figures are nats per masked token, intervals 95 %, paired over texts and calibration
draws: {windows} windows of held-out text x {draws} masks, half as many of the other text, {reactions}
reactions."""
VERDICTS = """### Is sink-aware at least as good?

Sink-aware minus plain: below 0, sink-aware is better. The last column is the difference at 75 % less that
at 25 %: below 0 where gains grow with sparsity. Bold: the interval leaves 0 out."""
CONTROLS = """The mask is all but hard, for its mass is a sum over queries, heads and layers (a row's mean
is heads x layers), and 5 times a difference of that size saturates the sigmoid. It takes a few positions of
a row out of a sum over all of them.

One change at a time, minus `wanda` on the same masked rows. The public code's two sides differ in more
than sinks: its Wanda is calibrated on text without masks, its sink method on ten noise levels, and it
sums norms of rows where Wanda sums squares. "No sinks" is the sink method with an empty mask."""
PHASES = """## Phase schedules

`{command}` (benchmarks/study/phases.py)

"tiny", heads only, in mask form, 16 steps. Loss against dense, on held-out windows whose early states
(more than half masked) run under the first phase. *Same tokens*: share of 64 generated tokens equal to
the dense model's. Only attention's core shrinks when a schedule skips heads; projections, MLP and memory
do not."""
TOKENS = """## Token-wise pruning

`{command}` (benchmarks/study/token_pruning.py)

"tiny", held-out windows denoised in 16 steps; positions that were transient sinks one step before, left
out layer by layer, beside about as many others."""
INT8 = """## Compact first, then int8

`{command}` (benchmarks/study/quantised.py)

"tiny" without {removed:.0%} of its block parameters (by `magnitude`, not repaired), and PyTorch's dynamic
int8 quantisation of every linear layer, LM head included, on the CPU; 1 x 128 tokens."""
NOT_MEASURED = """## Not measured

2:4 executed: `python benchmarks/semi_structured.py` times PyTorch's semi-structured kernels against dense
ones on a GPU. No GPU was at hand, so no figure is claimed. On a CPU zeros make nothing faster."""


def section(results: dict[str, Any]) -> str:
    """Markdown of everything that ``results``, the parsed ``weights.json``, has rows for; draws the pictures.

    Raises:
        KeyError: rows of an unfinished study.
    """
    rows = results["rows"]
    models = [model for model in TEXTS if f"{model}/dense" in rows]
    parts = [_introduction(results), _quality(rows, models), _verdicts(rows, models), _why(rows, models)]
    parts += [_phases(rows), _tokens(rows), _int8(rows), NOT_MEASURED]
    _pictures(rows, models)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _introduction(results: dict[str, Any]) -> str:
    settings = results["settings"]
    return INTRODUCTION.format(command=COMMAND, calibrations=settings["calibration draws"], **settings)


def _quality(rows: dict[str, Any], models: list[str]) -> str:
    lines = ["### Loss against the dense model", ""]
    for model, text, title in _texts(models):
        dense = _values(rows, f"{model}/dense", text)
        lines += [
            f"**{title}**, dense {bootstrap_interval(dense).mean:.3f}",
            "",
            "| method | " + " | ".join(SETTINGS) + " |",
            "|---" * (1 + len(SETTINGS)) + "|",
        ]
        for method in METHODS:
            cells = []
            for setting in SETTINGS:
                pruned = _values(rows, f"{model}/{setting}/{method}", text)
                cells.append(_signed(bootstrap_difference(pruned, dense)))
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines) + "\n![Loss by sparsity](study/weights.png)"


def _verdicts(rows: dict[str, Any], models: list[str]) -> str:
    lines = [
        VERDICTS,
        "",
        "| model, text | pair | " + " | ".join(SETTINGS) + " | 75 % - 25 % |",
        "|---" * (3 + len(SETTINGS)) + "|",
    ]
    outcomes: dict[str, list[str]] = {"compared": [], "grows": []}
    for model, text, title in _texts(models):
        for sink, plain in PAIRS:
            found = {s: _difference(rows, f"{model}/{s}", sink, plain, text) for s in SETTINGS}
            sides = {
                s: _values(rows, f"{model}/{s}/{sink}", text) - _values(rows, f"{model}/{s}/{plain}", text)
                for s in ("25 %", "75 %")
            }
            growth = bootstrap_difference(sides["75 %"], sides["25 %"])
            outcomes["compared"] += [_verdict(found[s]) for s in ("50 %", "75 %", "2:4")]
            outcomes["grows"].append(_verdict(growth))
            cells = [_marked(found[s]) for s in SETTINGS] + [_marked(growth)]
            lines.append(f"| {title} | {sink} - {plain} | {' | '.join(cells)} |")
    compared, grows = outcomes["compared"], outcomes["grows"]
    lines += [
        "",
        f"Of {len(compared)} comparisons at 50 %, 75 % and 2:4, sink-aware is better in "
        f"{compared.count('better')}, worse in {compared.count('worse')}, and {compared.count('even')} "
        f"intervals hold 0. Gains grow with sparsity in {grows.count('better')} of {len(grows)} and shrink "
        f"in {grows.count('worse')}.",
        "",
        '**Verdict on "sink-aware ≥ Wanda and ≥ SparseGPT, gains grow with sparsity": '
        f"{_judgement(compared, grows)}.**",
        "",
        "![Sink-aware minus plain](study/sink_gain.png)",
    ]
    return "\n".join(lines)


def _judgement(compared: list[str], grows: list[str]) -> str:
    if compared.count("worse"):
        return (
            "does not hold here"
            if compared.count("worse") > compared.count("better")
            else "holds only in part"
        )
    if not compared.count("better"):
        return "not worse, and no gain shown"
    return (
        "holds"
        if grows.count("better") == len(grows)
        else "not worse, with gains that do not grow throughout"
    )


def _why(rows: dict[str, Any], models: list[str]) -> str:
    lines = [
        "### Why",
        "",
        "| | " + " | ".join(models) + " |",
        "|---" * (1 + len(models)) + "|",
    ]
    facts = {
        "positions of a row": ("mask", "positions", "{:.0f}"),
        "of them taken for sinks": ("mask", "touched", "{:.1f}"),
        "neither one nor the other (0.05 < mask < 0.95)": ("mask", "between", "{:.1f}"),
        "share of masked tokens among the sinks": ("mask", "touched_are_masked", "{:.0%}"),
        "share of masked tokens among all": ("mask", "tokens_are_masked", "{:.0%}"),
        "weights on which sink_wanda and wanda disagree, 50 %": ("agreement", "sink_wanda", "{:.1%}"),
        "two calibration draws of wanda disagree": ("agreement", "another draw", "{:.1%}"),
        "magnitude and wanda disagree": ("agreement", "magnitude", "{:.1%}"),
    }
    for label, (kind, name, form) in facts.items():
        cells = [form.format(np.mean([r[name] for r in _draws(rows, f"{m}/{kind}")])) for m in models]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        CONTROLS,
        "",
        "| model, text | sparsity | sink_wanda | sink_wanda, no sinks | wanda, unmasked text "
        "| wanda, trajectories | sink_wanda, trajectories |",
        "|---" * 7 + "|",
    ]
    others = ("sink_wanda", "sink_wanda, no sinks", "wanda, unmasked text", "wanda, trajectories",
              "sink_wanda, trajectories")  # fmt: skip
    for model, text, title in _texts(models):
        for setting in ("50 %", "75 %"):
            cells = [
                _marked(_difference(rows, f"{model}/{setting}", other, "wanda", text))
                if f"{model}/{setting}/{other}/0" in rows
                else "–"
                for other in others
            ]
            lines.append(f"| {title} | {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _phases(rows: dict[str, Any]) -> str:
    lines = [PHASES.format(command=COMMAND)]
    for criterion in ("sink_variance", "magnitude"):
        row = rows[f"tiny/phases/{criterion}"]
        dense = row["per_window"]["dense"]
        lines += [
            "",
            f"**{criterion}**",
            "",
            "| schedule | heads run | loss | against static | same tokens | ms/step | speed-up |",
            "|---" * 7 + "|",
        ]
        for name, values in row["per_window"].items():
            against = "" if name in ("dense", "static", "pruned throughout") else _marked(
                bootstrap_difference(values, row["per_window"]["static"])
            )  # fmt: skip
            loss = "0" if name == "dense" else _signed(bootstrap_difference(values, dense))
            lines.append(
                f"| {name} | {row['heads_run'][name]:.1%} | {loss} | {against} "
                f"| {row['agreement'][name]:.0%} | {row['ms'][name]:.2f} | {row['speedup'][name]:.2f} |"
            )
    return "\n".join(lines)


def _tokens(rows: dict[str, Any]) -> str:
    dense = rows["tiny/tokens/nothing"]["per_window"]
    lines = [
        TOKENS.format(command=COMMAND),
        "",
        "| left out | share of positions | loss | against random keys |",
        "|---|---|---|---|",
    ]
    random = rows["tiny/tokens/random keys"]["per_window"]
    for name in ("keys", "queries", "all sinks", "random keys", "least keys"):
        row = rows[f"tiny/tokens/{name}"]
        against = "" if name == "random keys" else _marked(bootstrap_difference(row["per_window"], random))
        loss = _signed(bootstrap_difference(row["per_window"], dense))
        lines.append(f"| {name} | {row['left_out']:.1%} | {loss} | {against} |")
    worse = bootstrap_difference(rows["tiny/tokens/keys"]["per_window"], random).low > 0
    saved = rows["tiny/tokens/keys"]["left_out"]
    verdict = (
        "costs more than leaving out about as many keys at random"
        if worse
        else "costs no more than random keys"
    )
    lines += [
        "",
        f"**Verdict:** leaving transient sinks out of the keys {verdict}, and could save at most "
        f"{saved:.1%} of attention's core, itself a small part of a step. It is not in the package.",
    ]
    return "\n".join(lines)


def _int8(rows: dict[str, Any]) -> str:
    row = rows["tiny/int8"]
    lines = [
        INT8.format(command=COMMAND, removed=row["parameters_removed"]),
        "",
        "| model | NLL | against dense | MB on disk | ms | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in row["per_window"].items():
        loss = "" if name == "dense" else _signed(bootstrap_difference(values, row["per_window"]["dense"]))
        lines.append(
            f"| {name} | {np.mean(values):.3f} | {loss} | {row['bytes'][name] / 1e6:.1f} "
            f"| {row['ms'][name]:.2f} | {row['speedup'][name]:.2f} |"
        )
    return "\n".join(lines)


def _pictures(rows: dict[str, Any], models: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    PICTURES.mkdir(parents=True, exist_ok=True)
    texts = list(_texts(models))
    figure, axes = plt.subplots(1, len(texts), figsize=(4.2 * len(texts), 3.4), squeeze=False)
    for axis, (model, text, title) in zip(axes[0], texts, strict=True):
        dense = _values(rows, f"{model}/dense", text)
        for method in METHODS:
            found = [
                bootstrap_difference(_values(rows, f"{model}/{setting}/{method}", text), dense)
                for setting in SHARES
            ]
            style = "--" if method.startswith("sink") else "-"
            _line(axis, list(SHARES.values()), found, method, style)
        axis.set(title=title, xlabel="zeros, %", ylabel="nats above dense", xticks=list(SHARES.values()))
    axes[0][0].legend(fontsize=8)
    _save(figure, "weights.png")
    figure, axes = plt.subplots(1, len(texts), figsize=(4.2 * len(texts), 3.4), squeeze=False)
    for axis, (model, text, title) in zip(axes[0], texts, strict=True):
        for sink, plain in PAIRS:
            found = [_difference(rows, f"{model}/{setting}", sink, plain, text) for setting in SHARES]
            _line(axis, list(SHARES.values()), found, f"{sink} - {plain}", "-")
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set(
            title=title, xlabel="zeros, %", ylabel="nats, below 0: sinks help", xticks=list(SHARES.values())
        )
    axes[0][0].legend(fontsize=8)
    _save(figure, "sink_gain.png")


def _line(axis: Any, x: list[int], found: list[Interval], label: str, style: str) -> None:
    means = np.array([value.mean for value in found])
    spread = [means - [value.low for value in found], [value.high for value in found] - means]
    axis.errorbar(
        x, means, yerr=np.abs(spread), label=label, linestyle=style, marker="o", capsize=3, markersize=4
    )


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(PICTURES / name, dpi=110)


def _texts(models: list[str]) -> Iterable[tuple[str, str, str]]:
    return [(model, text, title) for model in models for text, title in TEXTS[model].items()]


def _draws(rows: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The rows of every draw of ``key``."""
    found = []
    while f"{key}/{len(found)}" in rows:
        found.append(rows[f"{key}/{len(found)}"])
    if not found:
        raise KeyError(f"the study has no row {key}/0")
    return found


def _values(rows: dict[str, Any], key: str, text: str) -> np.ndarray:
    """Loss of every window: ``[windows]`` of a row without draws, else ``[draws, windows]``."""
    if key in rows:
        return np.array(rows[key][text])
    return np.array([row[text] for row in _draws(rows, key)])


def _difference(rows: dict[str, Any], prefix: str, a: str, b: str, text: str) -> Interval:
    return bootstrap_difference(_values(rows, f"{prefix}/{a}", text), _values(rows, f"{prefix}/{b}", text))


def _verdict(interval: Interval) -> str:
    return "better" if interval.high < 0 else "worse" if interval.low > 0 else "even"


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} ({interval.low:+.3f}…{interval.high:+.3f})"


def _marked(interval: Interval) -> str:
    """The difference in bold where its interval leaves 0 out."""
    text = f"{interval.mean:+.4f} ({interval.low:+.4f}…{interval.high:+.4f})"
    return text if _verdict(interval) == "even" else f"**{text}**"


if __name__ == "__main__":
    print(section(json.loads(RESULTS.read_text())))
