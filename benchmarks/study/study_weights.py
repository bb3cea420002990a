"""Weight-level pruning, phase schedules, token-wise pruning and int8, measured.

    python benchmarks/study/study_weights.py [--reactions FILE] [--draws 2] [--only PART] [--quick]

On "tiny" (speeches held out, and the King James Bible) and, with a file of reactions, on rxnfp. Every method
of one setting sees the same calibration rows; every model is judged on the same windows and masks. Rows are
kept in ``weights.json``; a second run goes on where the first stopped. ``study_weights_report.section``
writes them as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import phases
import quantised
import reactions
import token_pruning
import torch
from resumable import Row, Rows
from study_weights_report import section as section
from torch import Tensor, nn

import sinkprune as sp
from sinkprune.checkpoints import checkpoint
from sinkprune.evidence.calibration import TEN_LEVELS, Calibration, calibrate
from sinkprune.evidence.sink_mask import SinkMask, sink_masks
from sinkprune.generation.trajectories import trajectories
from sinkprune.models.marks import mark_sparsity
from sinkprune.pruning.sparsification import METHODS, sparsify, sparsity_of

ROOT = Path(__file__).parents[2]
SETTINGS = {"25 %": (0.25, "unstructured"), "50 %": (0.5, "unstructured"), "75 %": (0.75, "unstructured"),
            "2:4": (0.5, "2:4")}  # fmt: skip
NO_SINKS = SinkMask(sigma=1e9)
SPEAKERS = ("tiny", "small")  # trained on addresses: of those held out, and of the King James Bible
IN_DOMAIN = {"tiny": TEN_LEVELS, "rxnfp": tuple(level / 2 for level in TEN_LEVELS)}


@dataclass
class Sizes:
    windows: int = 32  # of held-out text, and half as many of the other one
    draws: int = 2  # masks of each window
    sequences: int = 5  # calibration windows, each at ten noise levels
    reactions: int = 64


class Subject:
    """A model to prune, what it is calibrated on and what it is judged on."""

    def __init__(self, name: str, sizes: Sizes, reactions_file: Path | None = None) -> None:
        self.name, self.sizes = name, sizes
        if name in SPEAKERS:
            self.model, self.tokenizer = sp.load(name)
        else:
            assert reactions_file is not None
            self.model, self.tokenizer = reactions.load()
            ids, valid = reactions.read_reactions(reactions_file, self.tokenizer, most_tokens=96)
            order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
            judged = order[: sizes.reactions]
            judged = judged[valid[judged].sum(1).argsort(stable=True)]  # by length: little is padded
            self.judged, self.judged_valid = ids[judged], valid[judged]
            self.rest, self.rest_valid = (x[order[sizes.reactions :]] for x in (ids, valid))
        self._dense = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def dense(self) -> nn.Module:
        """The model with its own weights again."""
        self.model.load_state_dict(self._dense)
        mark_sparsity(self.model, None)
        return self.model

    def calibration(self, draw: int) -> Calibration:
        """Rows of one draw: ten noise levels, up to one half where the model knows no more."""
        options: dict[str, Any] = {
            "levels": IN_DOMAIN[self.name],
            "sequences": self.sizes.sequences,
            "seed": draw,
        }
        if self.name in SPEAKERS:
            text = checkpoint.texts("calibration")
            return calibrate(self.model, text, tokenizer=self.tokenizer, **options)
        options |= {"attention_mask": self.rest_valid, "never_mask": self.tokenizer.special}
        return calibrate(self.model, self.rest, **options)

    def trajectories(self, draw: int) -> Calibration:
        """The same number of rows, as real denoising meets them ("tiny" only)."""
        text = checkpoint.texts("calibration")
        ids = torch.tensor(self.tokenizer.encode(text, add_special_tokens=False))
        generator = torch.Generator().manual_seed(draw)
        starts = torch.randint(0, len(ids) - 32, (self.sizes.sequences,), generator=generator)
        prompts = ids[starts[:, None] + torch.arange(32)]
        options = {"steps": 32, "gen_length": 96, "temperature": 1.0, "seed": draw}
        return trajectories(self.model, prompts, **options)

    def judge(self, model: nn.Module) -> Row:
        """Cross entropy of every window, by text: of the bound, or up to t = 0.5 for rxnfp."""
        draws = self.sizes.draws
        if self.name == "rxnfp":
            quality = sp.evaluate(
                model, self.judged, attention_mask=self.judged_valid, never_mask=self.tokenizer.special,
                highest_noise=0.5, draws=draws, levels=(),
            )  # fmt: skip
            return {"reactions": _rounded(quality.per_window)}
        found = {}
        for text, windows in (("held_out", self.sizes.windows), ("out_of_domain", self.sizes.windows // 2)):
            words = checkpoint.asset(f"text/{text}.txt").read_text("utf-8")
            quality = sp.evaluate(
                model, words, tokenizer=self.tokenizer, windows=windows, draws=draws, levels=()
            )
            found[text] = _rounded(quality.per_window)
        return found


def measure(subject: Subject, rows: Rows, draws: int) -> None:
    """Every method in every setting, then what explains the difference."""
    name = subject.name
    rows.row(f"{name}/dense", lambda: subject.judge(subject.dense()))
    for setting in SETTINGS:
        for method in METHODS:
            for draw in range(1 if method == "magnitude" else draws):
                rows.row(
                    f"{name}/{setting}/{method}/{draw}",
                    partial(_pruned, subject, method, setting, partial(subject.calibration, draw)),
                )
    for draw in range(draws):
        rows.row(f"{name}/mask/{draw}", partial(_mask_facts, subject, draw))
        rows.row(f"{name}/agreement/{draw}", partial(_agreement, subject, draw))
        for setting in ("50 %", "75 %"):
            for label, method, rule, calibration in _controls(subject, draw):
                rows.row(
                    f"{name}/{setting}/{label}/{draw}",
                    partial(_pruned, subject, method, setting, calibration, rule),
                )
    subject.dense()


def _pruned(
    subject: Subject,
    method: str,
    setting: str,
    calibration: Callable[[], Calibration],
    rule: SinkMask | None = None,
) -> Row:
    share, pattern = SETTINGS[setting]
    model = sparsify(subject.dense(), method, share, pattern, calibration(), sink_mask=rule)
    shares, note = sparsity_of(model), vars(model)["sparsity"]
    zeros = round(sum(shares.values()) / len(shares), 4)
    return subject.judge(model) | {"zeros": zeros, "solves": note.solves}


Control = tuple[str, str, SinkMask | None, Callable[[], Calibration]]


def _controls(subject: Subject, draw: int) -> Iterator[Control]:
    """What else differs between the public code's two sides, one thing at a time."""
    yield "sink_wanda, no sinks", "sink_wanda", NO_SINKS, partial(subject.calibration, draw)
    yield "wanda, unmasked text", "wanda", None, partial(_unmasked, subject, draw)
    if subject.name == "tiny":
        yield "wanda, trajectories", "wanda", None, partial(subject.trajectories, draw)
        yield "sink_wanda, trajectories", "sink_wanda", None, partial(subject.trajectories, draw)


def _unmasked(subject: Subject, draw: int) -> Calibration:
    """The same windows without masks, as the public code calibrates Wanda and SparseGPT."""
    calibration = subject.calibration(draw)
    return Calibration(calibration.targets, calibration.targets, calibration.masked, calibration.valid)


def _mask_facts(subject: Subject, draw: int) -> Row:
    """How many positions the sink mask touches, and how much of it lies between yes and no."""
    adapter = sp.adapter_for(subject.dense())
    calibration = subject.calibration(draw)
    mask = torch.cat(sink_masks(adapter, calibration, SinkMask()))
    valid = torch.ones_like(mask) if calibration.valid is None else calibration.valid.to(mask)
    touched = (mask > 0.5).float()
    levels = touched.sum(1).view(len(IN_DOMAIN[subject.name]), -1).mean(1)
    masked = calibration.masked.to(mask.device)
    return {
        "positions": valid.sum(1).mean().item(),
        "touched": touched.sum(1).mean().item(),
        "between": ((mask > 0.05) & (mask < 0.95)).float().sum(1).mean().item(),
        "touched_by_level": levels.tolist(),
        "touched_are_masked": ((touched * masked).sum() / touched.sum().clamp(min=1)).item(),
        "tokens_are_masked": (masked.sum() / valid.sum()).item(),
    }


def _agreement(subject: Subject, draw: int) -> Row:
    """Share of the weights on which two ways to choose 50 % disagree."""

    def zeros(method: str, seed: int) -> Tensor:
        model = sparsify(subject.dense(), method, 0.5, calibration=subject.calibration(seed))
        adapter = sp.adapter_for(model)
        layers = range(adapter.geometry().num_layers)
        modules = [module for layer in layers for module in adapter.linears(layer).values()]
        return torch.cat([(module.get_parameter("weight") == 0).flatten() for module in modules])

    wanda = zeros("wanda", draw)
    return {
        "sink_wanda": (wanda != zeros("sink_wanda", draw)).float().mean().item(),
        "another draw": (wanda != zeros("wanda", draw + 100)).float().mean().item(),
        "magnitude": (wanda != zeros("magnitude", draw)).float().mean().item(),
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reactions", type=Path, help="a file of reaction SMILES, one a line")
    parser.add_argument("--draws", type=int, default=2, help="calibration draws (default: %(default)s)")
    parser.add_argument("--only", choices=("tiny", "rxnfp", "timed"), help="a model's, or what is timed")
    parser.add_argument("--quick", action="store_true", help="a small slice, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/study")
    options = parser.parse_args()
    if options.only == "rxnfp" and options.reactions is None:
        parser.error("--only rxnfp needs --reactions FILE")
    sizes = Sizes(4, 1, 1, 8) if options.quick else Sizes()
    draws = 1 if options.quick else options.draws
    rows = Rows(options.out / "weights.json", {**vars(sizes), "calibration draws": draws, "length": 128})
    if options.only in (None, "tiny"):
        measure(Subject("tiny", sizes), rows, draws)
    if options.only in (None, "rxnfp") and options.reactions is not None:
        measure(Subject("rxnfp", sizes, options.reactions), rows, draws)
    if options.only in (None, "timed"):
        for part in (phases, token_pruning, quantised):
            part.measure(rows, sizes.windows)
    print(f"wrote {rows.path}")


if __name__ == "__main__":
    main()
