"""The structured sections of docs/study.md and their pictures, from the rows of ``study_heads.py``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from study_heads import CHANNEL_RULE, CHANNEL_RULES, CRITERIA, HEADLINE, MAIN, PAPER, RATIOS

from sinkprune.evaluation.intervals import Interval, bootstrap_difference
from sinkprune.planning.planner import DEFAULT_CRITERION

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs/study"
TEXTS = {"tiny": {"held_out": "tiny, held out", "out_of_domain": "tiny, other domain"},
         "rxnfp": {"reactions": "rxnfp, reactions, t ≤ 0.5"}}  # fmt: skip
REPAIRS = (None, "least_squares")
RIVALS = ("magnitude", "wanda_head", "output_norm", "taylor", "flap", "random", PAPER)
PUBLISHED_REPAIR = {"flap": "bias"}  # what a rival's authors do after pruning
COMMAND = "python benchmarks/study/study_heads.py --reactions FILE"
PLOTTED = (PAPER, "sink_variance:gated=true", "magnitude", "wanda_head", "output_norm", "reconstruction")

HEADLINE_TEXT = """## Which heads: 38 % of them removed

`{command}`

Nats per masked token above the dense model; 95 % intervals, paired over texts and, where a rule looks at
data, {draws} calibration draws of {rows} windows at three noise levels. The same windows and masks for all.
"Repaired" is the least-squares refit on the rows of the draw. Ablation removes one head at a time, on
half of those rows."""
LAYER_0 = """Layer 0 whole: the same rules, with tiny's layer 0 out of their reach. Its heads were
initialised as readers of neighbouring tokens and stayed diffuse, which is no property of masked diffusion
models at large; rules that take diffuse heads for idle remove them, and most of what they cost on tiny comes
from there. `ablation`, `sink_removed` and `fluctuation` are other rules of this package, so they are not
counted among the rivals above."""
PARAMETERS_TEXT = """## 38 % of the block parameters, heads and MLP

Heads and channels each give 38 % of their own. Channels go by `{rule}` whatever the head rule."""
AGAINST_TEXT = "Below 0, the default is better; bold, the interval leaves 0 out."
AS_PUBLISHED_TEXT = """As they come: the default is repaired, which is what `sp.apply` does with
calibration rows; `flap` has the bias compensation of its authors, the other rivals nothing."""
CHANNELS_TEXT = """### MLP rules

The same with heads by `reconstruction` and every channel rule."""
RATIOS_TEXT = """## Other ratios

Not repaired; nats above dense. One calibration draw, at 38 % and of `random` the mean of all."""


def section(results: dict[str, Any]) -> str:
    """Markdown of everything that ``results``, the parsed ``heads.json``, has rows for; draws pictures."""
    rows, settings = results["rows"], results["settings"]
    models = [model for model in TEXTS if f"{model}/dense" in rows]
    heading = HEADLINE_TEXT.format(command=COMMAND, **settings)
    against = f"### The default, `{DEFAULT_CRITERION}`, against its rivals\n\n{AGAINST_TEXT}"
    parts = [
        heading,
        _headline(rows, models),
        against,
        _against(rows, models, "heads"),
        AS_PUBLISHED_TEXT,
        _against(rows, models, "heads", as_published=True),
        _gap(rows, models),
        LAYER_0,
    ]
    kind = f"parameters, {CHANNEL_RULE}"
    parts += [PARAMETERS_TEXT.format(rule=CHANNEL_RULE), _table(rows, models, kind, MAIN)]
    parts += ["The default against its rivals, as above:", _against(rows, models, kind)]
    parts += [CHANNELS_TEXT, _channels(rows, models), RATIOS_TEXT, _ratios(rows, models), _cost(rows)]
    _pictures(rows, models)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def loss(rows: dict[str, Any], model: str, text: str, key: str) -> Interval | None:
    """Nats above dense with their interval; None where the study has no such rows."""
    values = losses(rows, model, text, key)
    return None if values is None else bootstrap_difference(values, rows[f"{model}/dense"][text])


def losses(rows: dict[str, Any], model: str, text: str, key: str) -> np.ndarray | None:
    """Per calibration draw and text ``[draws, texts]``; None where the study has no such rows."""
    found = []
    for draw in range(100):
        row = rows.get(f"{model}/{key}/{draw}")
        judged = None if row is None else rows.get(f"{model}/judged/{row['judged']}")
        if judged is None:
            break
        found.append(judged[text])
    return np.array(found) if found else None


def _key(kind: str, repair: str | None, criterion: str, ratio: float = HEADLINE) -> str:
    return f"{kind}/{ratio}/{repair}/{criterion}"


def _texts(models: list[str]) -> list[tuple[str, str, str]]:
    return [(model, text, title) for model in models for text, title in TEXTS[model].items()]


def _headline(rows: dict[str, Any], models: list[str]) -> str:
    texts = _texts(models)
    lines = [
        "| rule | "
        + " | ".join(f"{title} | repaired" for _, _, title in texts)
        + " | tiny, held out, layer 0 whole |",
        "|---" * (2 + 2 * len(texts)) + "|",
    ]
    order = sorted(CRITERIA, key=lambda name: _sum(rows, texts, _key("heads", "least_squares", name)))
    for name in order:
        cells = [
            signed(loss(rows, model, text, _key("heads", repair, name)))
            for model, text, _ in texts
            for repair in REPAIRS
        ]
        whole = loss(rows, "tiny", "held_out", _key("heads, layer 0 whole", None, name))
        shown = f"**{name}**" if name == DEFAULT_CRITERION else name
        lines.append(f"| {shown} | {' | '.join(cells)} | {signed(whole)} |")
    biased = [signed(loss(rows, m, t, _key("heads", "bias", "flap"))) for m, t, _ in texts]
    cells = [cell for value in biased for cell in ("", value)]
    lines.append(f"| flap with its own bias repair | {' | '.join(cells)} | |")
    dense = (f"{title} {np.mean(rows[f'{m}/dense'][t]):.3f}" for m, t, title in texts)
    return "\n".join(lines) + f"\n\nDense: {'; '.join(dense)}. Bold: the default."


def _sum(rows: dict[str, Any], texts: list[tuple[str, str, str]], key: str) -> float:
    found = [loss(rows, model, text, key) for model, text, _ in texts]
    return sum(np.inf if value is None else value.mean for value in found)


def _against(rows: dict[str, Any], models: list[str], kind: str, *, as_published: bool = False) -> str:
    """The default rule minus each rival, paired over texts and draws: both as pruned, then both repaired; or
    the default repaired, and each rival with what repair its authors give it."""
    texts = _texts(models)
    titles = [title if as_published else f"{title} | repaired" for _, _, title in texts]
    lines = ["| rival | " + " | ".join(titles) + " |"]
    lines.append("|---" * (1 + len(texts) * (1 if as_published else 2)) + "|")
    found: list[Interval | None] = []
    for rival in RIVALS:
        cells = []
        for model, text, _ in texts:
            for repair in ("least_squares",) if as_published else REPAIRS:
                theirs = PUBLISHED_REPAIR.get(rival) if as_published else repair
                ours = losses(rows, model, text, _key(kind, repair, DEFAULT_CRITERION))
                other = losses(rows, model, text, _key(kind, theirs, rival))
                found.append(None if ours is None or other is None else difference(ours, other))
                cells.append(marked(found[-1]))
        lines.append(f"| {rival} | {' | '.join(cells)} |")
    values = [value for value in found if value is not None]
    better, worse = sum(value.high < 0 for value in values), sum(value.low > 0 for value in values)
    lines += [
        "",
        f"The default is clearly better in {better} of {len(values)} comparisons, clearly worse in {worse}.",
    ]
    return "\n".join(lines)


def difference(a: np.ndarray, b: np.ndarray) -> Interval:
    """``a`` minus ``b``; a rule that looks at no data has one draw, which pairs with each of the other's."""
    if 1 < min(len(a), len(b)) < max(len(a), len(b)):
        raise ValueError(f"{len(a)} and {len(b)} calibration draws do not pair: the study is unfinished")
    return bootstrap_difference(a[0] if len(a) == 1 else a, b[0] if len(b) == 1 else b)


def _gap(rows: dict[str, Any], models: list[str]) -> str:
    """How much of the way from random to measured single-head ablation the default goes, not repaired."""
    parts = []
    for model, text, title in _texts(models):
        found = [
            loss(rows, model, text, _key("heads", None, name))
            for name in ("random", "ablation", DEFAULT_CRITERION)
        ]
        if None in found:
            continue
        random, ablation, ours = (value.mean for value in found if value is not None)
        parts.append(
            f"{title}: {(random - ours) / (random - ablation):.0%}"
            if random > ablation
            else f"{title}: single-head ablation ({ablation:+.3f}) is no better than random ({random:+.3f})"
        )
    return (
        "From random to single-head ablation, without repair, the default goes: "
        + "; ".join(parts)
        + ". Above 100 % it does better than ablation, which looks at one head at a time."
    )


def _table(rows: dict[str, Any], models: list[str], kind: str, names: tuple[str, ...]) -> str:
    texts = _texts(models)
    lines = [
        "| rule | " + " | ".join(f"{title} | repaired" for _, _, title in texts) + " |",
        "|---" * (1 + 2 * len(texts)) + "|",
    ]
    for name in sorted(names, key=lambda n: _sum(rows, texts, _key(kind, "least_squares", n))):
        cells = [
            signed(loss(rows, model, text, _key(kind, repair, name)))
            for model, text, _ in texts
            for repair in REPAIRS
        ]
        lines.append(f"| {f'**{name}**' if name == DEFAULT_CRITERION else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _channels(rows: dict[str, Any], models: list[str]) -> str:
    texts = _texts(models)
    lines = [
        "| channels by | " + " | ".join(f"{title} | repaired" for _, _, title in texts) + " |",
        "|---" * (1 + 2 * len(texts)) + "|",
    ]
    for rule in CHANNEL_RULES:
        cells = [
            signed(loss(rows, model, text, _key(f"parameters, {rule}", repair, "reconstruction")))
            for model, text, _ in texts
            for repair in REPAIRS
        ]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratios(rows: dict[str, Any], models: list[str]) -> str:
    parts = []
    for model in models:
        text = next(iter(TEXTS[model]))
        ratios = sorted((*RATIOS, HEADLINE))
        lines = [f"**{TEXTS[model][text]}**", "", "| rule | " + " | ".join(f"{r:.1%}" for r in ratios) + " |"]
        lines.append("|---" * (1 + len(ratios)) + "|")
        for name in CRITERIA:
            found = [loss(rows, model, text, _key("heads", None, name, ratio)) for ratio in ratios]
            cells = ["–" if value is None else f"{value.mean:+.3f}" for value in found]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n\n![Loss by ratio](study/heads.png)"


def _cost(rows: dict[str, Any]) -> str:
    """Seconds to score tiny, of draw 0; the activations are gathered by the first rule that asks."""
    found = {name: rows.get(f"tiny/score/{name}/0") for name in CRITERIA}
    seconds = {name: row["seconds"] for name, row in found.items() if row is not None}
    cheap = sum(value for name, value in seconds.items() if name != "ablation")
    return (
        f"Scoring tiny by every rule but ablation took {cheap:.0f} s, profile included; ablation, on half of "
        f"the rows, {seconds.get('ablation', math.nan):.0f} s: one thread, beside another part of the study."
    )


def _pictures(rows: dict[str, Any], models: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    PICTURES.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(models), figsize=(5.2 * len(models), 3.8), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        text = next(iter(TEXTS[model]))
        ratios = np.array(sorted((*RATIOS, HEADLINE)))
        band = [losses(rows, model, text, _key("heads", None, "random", r)) for r in ratios]
        dense = np.mean(rows[f"{model}/dense"][text])
        present = [i for i, values in enumerate(band) if values is not None]
        spread = [band[i].mean(1) - dense for i in present]  # type: ignore[union-attr]
        low, high = [s.min() for s in spread], [s.max() for s in spread]
        axis.fill_between(100 * ratios[present], low, high, color="0.9", label="random")
        for name in PLOTTED:
            found = {r: loss(rows, model, text, _key("heads", None, name, r)) for r in ratios}
            points = [(100 * r, value.mean) for r, value in found.items() if value is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axis.set(title=TEXTS[model][text], xlabel="heads removed, %", ylabel="nats above dense")
        axis.set_ylim(0, 1.2)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURES / "heads.png", dpi=110)
    plt.close(figure)


def signed(value: Interval | None) -> str:
    return "–" if value is None else f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def marked(value: Interval | None) -> str:
    if value is None:
        return "–"
    mark = "**" if value.low > 0 or value.high < 0 else ""
    return f"{mark}{signed(value)}{mark}"
