"""The paper's comparison on a model of your own: dense, pruned, repaired, and with zeros in its weights.

    python benchmarks/reproduce.py MODEL_DIR [--ratio 0.38] [--unit heads] [--sparsity 0.5] [--out DIR]
        [--calibration FILE] [--text FILE]... [--tasks hellaswag,gsm8k] [--limit N] [--device cuda] [--quick]

For whoever has LLaDA-8B, Dream-7B or another model that ``sp.load`` reads:

* heads (or with ``--unit parameters`` heads and MLP channels) removed by the default rule, by the paper's
  (``sink_variance``) and by ``magnitude``, as pruned and repaired;
* zeros by ``magnitude``, ``wanda``, ``sparsegpt`` and the paper's ``sink_wanda`` and ``sink_sparsegpt``;
* of each: the loss bound on held-out text, beside the dense model's on the same windows and masks; with
  ``--tasks``, lm-eval's figures (``pip install lm-eval``); memory; of dense and compact models, time of a
  forward, the two turn by turn.

One model is held at a time, but for the timing (``--no-speed`` leaves it out). Rows are kept in
``<out>/reproduce.json``, and what is there is not measured again: stop it when you like, and run it again.
``<out>/reproduce.md`` is the page, written anew after every row.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "study"))
from reproduce_page import page
from resumable import Row, Rows

import sinkprune as sp
from sinkprune.evaluation.report import measure_speed
from sinkprune.evidence.calibration import TEN_LEVELS
from sinkprune.files import write_whole
from sinkprune.planning.planner import DEFAULT_CRITERION
from sinkprune.pruning.sparsification import METHODS

RULES = (DEFAULT_CRITERION, "sink_variance", "magnitude")


@dataclass(frozen=True)
class Variant:
    """One model of the comparison: ``rule`` a criterion for heads or a method for weights, or None: dense."""

    kind: str
    rule: str | None = None
    repair: bool = False

    @property
    def key(self) -> str:
        return "dense" if self.rule is None else f"{self.kind}/{self.rule}{'/repaired' * self.repair}"


def variants() -> Iterator[Variant]:
    yield Variant("dense")
    for rule in RULES:
        yield Variant("pruned", rule)
        yield Variant("pruned", rule, repair=True)
    for method in METHODS:
        yield Variant("zeros", method)


@dataclass
class Reproduction:
    """Models of one folder, and what is measured of them."""

    options: argparse.Namespace

    @cached_property
    def texts(self) -> dict[str, str]:
        if self.options.text:
            return {path.stem: path.read_text("utf-8") for path in self.options.text}
        return {name: sp.texts(name) for name in ("held_out", "out_of_domain")}

    @cached_property
    def calibration_text(self) -> str:
        path = self.options.calibration
        return sp.texts("calibration") if path is None else path.read_text("utf-8")

    def settings(self) -> Row:
        """What rows depend on: rows of other settings are refused."""
        options = self.options
        names = ("ratio", "unit", "sparsity", "windows", "draws", "length", "sequences", "dtype", "seed")
        texts = [self.calibration_text, *self.texts.values()]
        return {
            "model": str(options.model),
            **{name: getattr(options, name) for name in names},
            "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
        }

    def load(self) -> tuple[nn.Module, Any]:
        dtype = None if self.options.dtype is None else getattr(torch, self.options.dtype)
        model, tokenizer = sp.load(self.options.model, device=self.options.device, dtype=dtype)
        if tokenizer is None:
            raise ValueError(f"{self.options.model} has no tokenizer, and texts need one")
        return model, tokenizer

    def calibrate(self, model: nn.Module, tokenizer: Any, **levels: Any) -> sp.Calibration:
        return sp.calibrate(
            model, self.calibration_text, tokenizer=tokenizer, sequences=self.options.sequences,
            length=self.options.length, seed=self.options.seed, **levels,
        )  # fmt: skip

    def planned(self, rule: str) -> Row:
        """The plan of a rule, from the dense model: for both of its variants and for its timing."""
        model, tokenizer = self.load()
        options, profile = self.options, None
        if rule.startswith("sink_"):
            ids = torch.tensor(tokenizer.encode(self.calibration_text, add_special_tokens=False))
            prompts = ids[: 8 * 32].view(8, 32)[: 1 if options.quick else 8]
            steps = 8 if options.quick else 64
            profile = sp.profile(model, prompts, steps=steps, gen_length=2 * steps, seed=options.seed)
        targets = ("heads",) if options.unit == "heads" else ("heads", "mlp")
        plan = sp.plan(
            model, profile, rule, options.ratio, options.unit, targets=targets,
            calibration=self.calibrate(model, tokenizer), seed=options.seed,
        )  # fmt: skip
        return {"plan": plan.to_dict()}

    def model(self, variant: Variant, plan: sp.PrunePlan | None) -> tuple[nn.Module, Any]:
        model, tokenizer = self.load()
        if plan is not None:
            rows = self.calibrate(model, tokenizer) if variant.repair else None
            sp.apply(model, plan, calibration=rows, low_memory=True)
        elif variant.rule is not None:
            rows = self.calibrate(model, tokenizer, levels=TEN_LEVELS)
            sp.sparsify(model, variant.rule, self.options.sparsity, calibration=rows)
        return model, tokenizer

    def judge(self, variant: Variant, plan: sp.PrunePlan | None) -> Row:
        """Loss by text and window, and bytes."""
        model, tokenizer = self.model(variant, plan)
        options, found = self.options, {}
        for name, text in self.texts.items():
            quality = sp.evaluate(
                model, text, tokenizer=tokenizer, windows=options.windows, length=options.length,
                draws=options.draws, batch=options.batch, seed=options.seed,
            )  # fmt: skip
            found[name] = {"windows": quality.per_window, "accuracy": quality.per_window_accuracy[0.5]}
        need = sp.memory(model, length=options.length)
        bytes_ = {"weights": need.weights, "peak": need.peak}
        removed = None if plan is None else plan.parameters_removed
        return {"loss": found, "bytes": bytes_, "parameters_removed": removed}

    def tasks(self, variant: Variant, plan: sp.PrunePlan | None) -> Row:
        """lm-eval's figures with their standard errors."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        from sinkprune.evaluation.lm_eval_model import LMEvalModel

        model, tokenizer = self.model(variant, plan)
        wrapped = LMEvalModel(model, tokenizer, draws=self.options.task_draws, batch=self.options.batch)
        names = self.options.tasks.split(",")
        path = self.options.task_path
        manager = TaskManager(include_path=None if path is None else str(path), include_defaults=path is None)
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=names, task_manager=manager, limit=self.options.limit
        )
        return {"tasks": {n: _numbers(v) for n, v in found["results"].items()}, "asked": names}

    def speed(self, plan: sp.PrunePlan) -> Row:
        dense, _ = self.load()
        pruned, _ = self.load()
        sp.fuse(dense)  # what the pruned model has too
        sp.apply(pruned, plan, low_memory=True)
        rounds = 3 if self.options.quick else 20
        return measure_speed(dense, pruned, plan, length=self.options.length, rounds=rounds)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, float)}


def reproduce(options: argparse.Namespace) -> Path:
    """Measure what is not there yet; the page's path.

    Raises:
        ValueError: rows in the folder that other settings gave; what the library raises for the model.
    """
    work = Reproduction(options)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "reproduce.json", work.settings())
    target = options.out / "reproduce.md"

    def write() -> None:
        write_whole(target, page(rows.rows, rows.settings, [variant.key for variant in variants()]))

    plans: dict[str | None, sp.PrunePlan] = {}
    for variant in variants():
        if variant.kind == "pruned" and variant.rule is not None and variant.rule not in plans:
            found = rows.row(f"plan/{variant.rule}", partial(work.planned, variant.rule))
            plans[variant.rule] = sp.PrunePlan.from_dict(found["plan"])
        plan = plans[variant.rule] if variant.kind == "pruned" else None
        rows.row(variant.key, partial(work.judge, variant, plan))
        write()
    if not options.no_speed:
        for rule, plan in plans.items():
            rows.row(f"speed/{rule}", partial(work.speed, plan))
            write()
    asked = options.tasks if options.limit is None else f"{options.tasks}, the first {options.limit} of each"
    for variant in variants() if options.tasks else ():
        plan = plans[variant.rule] if variant.kind == "pruned" else None
        key = f"tasks/{asked}/{variant.key}"
        rows.row(key, partial(work.tasks, variant, plan))
        write()
    return target


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder, org/name on the hub, small or tiny")
    parser.add_argument("--ratio", type=float, default=0.38, help="to remove (default: %(default)s)")
    parser.add_argument("--unit", choices=("heads", "parameters"), default="heads", help="of the ratio")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of weights (default: %(default)s)")
    parser.add_argument("--calibration", type=Path, help="a text (default: the embedded one)")
    parser.add_argument("--text", type=Path, action="append", help="held-out text (default: embedded ones)")
    parser.add_argument("--sequences", type=int, default=32, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="of each text (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=2, help="masks of each window (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows per forward (default: %(default)s)")
    parser.add_argument("--tasks", help="of lm-eval, by commas")
    parser.add_argument("--task-path", type=Path, help="a folder of task files, instead of lm-eval's own")
    parser.add_argument("--task-draws", type=int, default=128, help="masks a continuation, of lm-eval's")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the file's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-speed", action="store_true", help="two models are never held at once")
    parser.add_argument("--quick", action="store_true", help="a small slice, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("reproduced"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.sequences, options.windows, options.draws, options.length = 4, 4, 1, min(64, options.length)
    return options


def main() -> None:
    try:
        print(f"wrote {reproduce(parsed())}")
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")


if __name__ == "__main__":
    main()
