"""The paper's findings about sinks, measured: where they move, what hiding them costs, and what the default
plan leaves of generated text.

    python benchmarks/study/study_claims.py [--model small] [--quick] [--out DIR]

Rows are kept in ``claims.json``, of "small" (its sinks alone) in ``claims_small.json``; a second run goes on
where the first stopped.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import study_autoregressive
import study_sinks
import torch
from resumable import Row, Rows
from torch import Tensor

import sinkprune as sp
from sinkprune.checkpoints import checkpoint

ROOT = Path(__file__).parents[2]
RATIO = 0.38


def measure(out: Path, *, quick: bool = False) -> Rows:
    """All rows, the cheap ones first."""
    settings = {"prompts": 2 if quick else 8, "steps": 8 if quick else 64, "windows": 4 if quick else 24}
    rows = Rows(out / "claims.json", settings)
    model, tokenizer = sp.load("tiny")
    prompts = _windows(tokenizer, "calibration", settings["prompts"], 16)
    rows.row("halves", lambda: _halves(model, prompts, settings["steps"]))
    rows.row("hiding/tiny", lambda: _hiding(model, tokenizer, settings["windows"]))
    rows.row("generation", lambda: _generation(model, tokenizer, settings["windows"]))
    if not quick:
        rows.row("autoregressive", study_autoregressive.study)
        rows.row("hiding/SmolLM2", _hiding_causal)
    return rows


def measure_small(out: Path, *, quick: bool = False) -> Rows:
    """Where the sinks of "small" move, and what hiding them costs."""
    settings = {"prompts": 2 if quick else 4, "steps": 8 if quick else 32, "windows": 2 if quick else 8}
    rows = Rows(out / "claims_small.json", settings)
    model, tokenizer = sp.load("small")
    prompts, steps = _windows(tokenizer, "calibration", settings["prompts"], 16), settings["steps"]
    length = {"steps": steps, "gen_length": 2 * steps}
    rows.row("whole", lambda: study_sinks.whole(model, prompts, **length))
    rows.row("halves", lambda: study_sinks.by_half(model, prompts, **length))
    rows.row("hiding", lambda: _hiding(model, tokenizer, settings["windows"]))
    return rows


def _halves(model: Any, prompts: Tensor, steps: int) -> Row:
    """Sinks over a whole trajectory, and in each half of it."""
    length = 2 * steps
    profile = sp.profile(model, prompts, steps=steps, gen_length=length)
    whole = {"whole": profile.summary() | {"settings": None}}
    return whole | study_sinks.by_half(model, prompts, steps=steps, gen_length=length)


def _hiding(model: Any, tokenizer: Any, windows: int) -> Row:
    text = checkpoint.texts("held_out")
    return study_sinks.masked_model(
        model, text, tokenizer=tokenizer, windows=windows, draws=2, levels=(), length=128
    )


def _hiding_causal() -> Row:
    model, tokenizer = study_autoregressive.load()
    text = checkpoint.texts("held_out")
    ids = torch.tensor(tokenizer(text[:8000], add_special_tokens=False).input_ids[: 8 * 128])
    return study_sinks.causal_model(model, ids.view(8, 128), draws=1)


def _generation(model: Any, tokenizer: Any, windows: int) -> Row:
    """Text of the dense model, of the default plan and of the paper's rule, all at 38 % of heads."""
    text = checkpoint.texts("held_out")
    calibration = checkpoint.texts("calibration")
    calibrated = sp.calibrate(model, calibration, tokenizer=tokenizer, sequences=24)
    prompts = _windows(tokenizer, "calibration", 8, 16)
    profile = sp.profile(model, prompts, steps=32, gen_length=64)
    variants = {"dense": model}
    for name, criterion, rows in (
        ("default", None, calibrated),
        ("default, not repaired", None, None),
        ("paper's rule", "sink_variance", None),
        ("paper's rule, repaired", "sink_variance", calibrated),
    ):
        options = {} if criterion is None else {"criterion": criterion}
        plan = sp.plan(model, profile, ratio=RATIO, calibration=calibrated, **options)
        variants[name] = sp.apply(copy.deepcopy(model), plan, calibration=rows)
    found = {
        name: sp.evaluate_generation(variant, tokenizer, text, windows=windows)
        for name, variant in variants.items()
    }
    return {
        name: {
            "measures": quality.summary(),
            "minus dense": _rounded(quality.minus(found["dense"])),
            "likeness to dense": _rounded(quality.likeness(found["dense"])),
        }
        for name, quality in found.items()
    }


def _rounded(intervals: dict[str, Any]) -> dict[str, list[float]]:
    return {name: [round(value, 5) for value in interval] for name, interval in intervals.items()}


def _windows(tokenizer: Any, name: str, count: int, tokens: int) -> Tensor:
    text = checkpoint.asset(f"text/{name}.txt").read_text("utf-8")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    starts = torch.linspace(0, len(ids) - tokens, count).long()
    return ids[starts[:, None] + torch.arange(tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--quick", action="store_true", help="a small slice, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/study")
    options = parser.parse_args()
    found = (measure_small if options.model == "small" else measure)(options.out, quick=options.quick)
    print(f"wrote {found.path}")


if __name__ == "__main__":
    main()
