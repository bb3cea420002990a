"""Which heads to remove: every criterion, at several ratios and calibration draws, with and without repair.

    python benchmarks/study/study_heads.py [--reactions FILE] [--draws 5] [--only MODEL] [--quick]

On "tiny" (speeches held out, and the King James Bible) and, with a file of reactions, on rxnfp. Scores are
computed once a draw and kept as rows of their own; a plan that two criteria agree on is judged once. Every
model is judged on the same windows and masks. Rows are kept in ``heads.json``; a second run goes on where the
first stopped. ``study_heads_report.section`` writes them as Markdown. ``study_small`` does it for "small".
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from resumable import Row, Rows
from study_weights import SPEAKERS, Sizes, Subject
from torch import Tensor

import sinkprune as sp
from sinkprune.adapters import Adapter
from sinkprune.checkpoints import checkpoint
from sinkprune.evidence.calibration import Calibration, calibrate
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria import HeadCriterion, criterion_for
from sinkprune.plans import PrunePlan

ROOT = Path(__file__).parents[2]
PAPER = "sink_variance"
CRITERIA = (
    PAPER, "sink_variance:gated=true", "sink_mass:keep=strong", "sink_mass:keep=weak", "sink_removed",
    "magnitude", "wanda_head", "wanda_head:soft_sink=true", "output_norm", "output_norm:relative=true",
    "fluctuation", "flap", "reconstruction", "taylor", "ablation", "random",
)  # fmt: skip
DATA_FREE = ("magnitude",)
CHANNEL_RULES = ("magnitude", "wanda", "sink_wanda", "flap")
CHANNEL_RULE = "flap"  # what all head rules are compared with
HEADLINE = 0.38
RATIOS = (0.125, 0.25, 0.5, 0.625, 0.75)
LEVELS = {"tiny": (0.15, 0.5, 0.85), "small": (0.15, 0.5, 0.85), "rxnfp": (0.15, 0.3, 0.5)}
ABLATED = {"tiny": 1 / 2, "small": 1 / 12, "rxnfp": 1 / 2}  # share of the rows
ALIKE = ("sink_mass:keep=strong", "output_norm:relative=true", "wanda_head:soft_sink=true")  # to others
MAIN = (PAPER, "magnitude", "wanda_head", "output_norm", "flap", "reconstruction", "taylor", "random")


@dataclass
class Fixed(HeadCriterion):
    """Scores that were computed before."""

    name: ClassVar[str] = "fixed"
    values: Tensor

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        return self.values


class HeadSubject(Subject):
    """A model with calibration rows, a profile and scores for each draw."""

    def __init__(self, name: str, sizes: Sizes, sequences: int, reactions_file: Path | None = None) -> None:
        super().__init__(name, sizes, reactions_file)
        self.sequences = sequences
        self.evidence: dict[int, Evidence] = {}

    def rows(self, draw: int, sequences: int) -> Calibration:
        options: dict[str, Any] = {"levels": LEVELS[self.name], "sequences": sequences, "seed": draw}
        if self.name in SPEAKERS:
            text = checkpoint.texts("calibration")
            return calibrate(self.model, text, tokenizer=self.tokenizer, **options)
        options |= {"attention_mask": self.rest_valid, "never_mask": self.tokenizer.special}
        return calibrate(self.model, self.rest, **options)

    def profile(self, draw: int) -> sp.SinkProfile:
        """Real trajectories: prompts of this draw's own, half of each sequence generated."""
        rows = self.rows(draw, 8)
        prompts = rows.targets[:8, : 64 if self.name == "rxnfp" else 32]
        length = 32 if self.name == "rxnfp" else 64
        return sp.profile(self.model, prompts, steps=length // 2, gen_length=length, seed=draw)

    def evidence_of(self, draw: int) -> Evidence:
        if draw not in self.evidence:
            self.evidence[draw] = Evidence(None, self.rows(draw, self.sequences), draw)
        return self.evidence[draw]

    def score(self, criterion: str, draw: int) -> Row:
        self.dense()
        evidence = self.evidence_of(draw)
        rule = criterion_for(criterion)
        if rule.needs_profile and evidence.profile is None:
            evidence.profile = self.profile(draw)
        if criterion.startswith("ablation"):  # a forward per head: on fewer rows
            share = max(1, int(self.sequences * ABLATED[self.name]))
            evidence = Evidence(None, self.rows(draw, share), draw)
        started = time.monotonic()
        adapter = sp.adapter_for(self.model)
        scores = rule.score(adapter, evidence)
        return {"scores": scores.tolist(), "scoring": round(time.monotonic() - started, 2)}


@dataclass
class Study:
    """All rows of one subject."""

    subject: HeadSubject
    rows: Rows
    draws: int

    def headline(self) -> None:
        """Every criterion at 38 % of heads: as pruned, then repaired."""
        name = self.subject.name
        self.rows.row(f"{name}/dense", lambda: self.subject.judge(self.subject.dense()))
        for criterion in CRITERIA:
            for draw in self._draws(criterion):
                self.heads_row(criterion, draw, HEADLINE)
                if name == "tiny" and draw < 2:
                    self.heads_row(criterion, draw, HEADLINE, spare_first=True)
        for criterion in CRITERIA:
            if criterion not in ALIKE:
                for draw in range(self.draws):
                    self.heads_row(criterion, draw, HEADLINE, repair="least_squares")
        for draw in range(self.draws):
            self.heads_row("flap", draw, HEADLINE, repair="bias")

    def parameters(self) -> None:
        """38 % of block parameters, heads and MLP: the main rules, one MLP rule for all; every MLP rule."""
        rules = [(criterion, CHANNEL_RULE) for criterion in MAIN]
        rules += [("reconstruction", rule) for rule in CHANNEL_RULES if rule != CHANNEL_RULE]
        for criterion, rule in rules:
            for draw in range(self.draws):
                for repair in (None, "least_squares"):
                    self.parameters_row(criterion, rule, draw, HEADLINE, repair)

    def ratios(self) -> None:
        """The other ratios of heads, and of block parameters, on one draw (random: all)."""
        for ratio in RATIOS:
            for criterion in CRITERIA:
                for draw in range(self.draws if criterion == "random" else 1):
                    self.heads_row(criterion, draw, ratio)
        for ratio in RATIOS:
            for criterion in ("reconstruction", "magnitude"):
                self.heads_row(criterion, 0, ratio, repair="least_squares")
                self.parameters_row(criterion, CHANNEL_RULE, 0, ratio, "least_squares")

    def _draws(self, criterion: str) -> range:
        return range(1 if criterion in DATA_FREE else self.draws)

    def _scores(self, criterion: str, draw: int) -> Tensor:
        draw = 0 if criterion in DATA_FREE else draw
        key = f"{self.subject.name}/score/{criterion}/{draw}"
        return torch.tensor(self.rows.row(key, partial(self.subject.score, criterion, draw))["scores"])

    def heads_row(
        self, criterion: str, draw: int, ratio: float, *, repair: str | None = None, spare_first: bool = False
    ) -> None:
        scores = self._scores(criterion, draw)
        if spare_first:
            scores[0] += 2 * (scores.max() - scores.min()) + 1
        kind = "heads, layer 0 whole" if spare_first else "heads"
        plan = sp.plan(self.subject.dense(), criterion=Fixed(scores), ratio=ratio)
        self._row(f"{kind}/{ratio}/{repair}/{criterion}/{draw}", plan, draw, repair)

    def parameters_row(self, criterion: str, rule: str, draw: int, ratio: float, repair: str | None) -> None:
        calibration = self.subject.rows(draw, self.subject.sequences)
        plan = sp.plan(
            self.subject.dense(), criterion=Fixed(self._scores(criterion, draw)), ratio=ratio,
            unit="parameters", targets=("heads", "mlp"), channel_rule=rule, calibration=calibration,
        )  # fmt: skip
        self._row(f"parameters, {rule}/{ratio}/{repair}/{criterion}/{draw}", plan, draw, repair)

    def _row(self, key: str, plan: PrunePlan, draw: int, repair: str | None) -> None:
        """Judge a plan under its own name, once: criteria that agree share the judgement."""
        kept = [[layer.kept_heads, layer.kept_channels] for layer in plan.layers]
        seed = draw if repair else "-"  # what is not repaired does not depend on the rows
        digest = hashlib.sha1(json.dumps([kept, repair, seed]).encode()).hexdigest()[:12]
        name = self.subject.name
        self.rows.row(f"{name}/judged/{digest}", partial(self._judge, plan, draw, repair))
        facts = {"judged": digest, "kept": [len(layer.kept_heads) for layer in plan.layers]}
        self.rows.row(f"{name}/{key}", lambda: facts | {"parameters": plan.parameters_removed})

    def _judge(self, plan: PrunePlan, draw: int, repair: str | None) -> Row:
        model = self.subject.dense()
        if repair is None:
            sp.apply(model, plan, mode="mask")
            try:
                return self.subject.judge(model)
            finally:
                sp.restore(model)
        calibration = self.subject.rows(draw, self.subject.sequences)
        return self.subject.judge(
            sp.apply(copy.deepcopy(model), plan, calibration=calibration, repair=repair)
        )


def measure(
    reactions_file: Path | None, draws: int, out: Path, *, quick: bool = False, only: str | None = None
) -> Rows:
    """All rows, the headline of every model first; ``only`` one model's."""
    sizes = Sizes(4, 1, 1, 8) if quick else Sizes(windows=96, draws=1, reactions=300)
    sequences, draws = (2, 1) if quick else (24, draws)
    settings = {"windows": sizes.windows, "masks": sizes.draws, "reactions": sizes.reactions}
    rows = Rows(out / "heads.json", settings | {"draws": draws, "rows": sequences, "length": 128})
    studies = []
    if only in (None, "tiny"):
        studies.append(Study(HeadSubject("tiny", sizes, sequences), rows, draws))
    if only in (None, "rxnfp") and reactions_file is not None:
        studies.append(Study(HeadSubject("rxnfp", sizes, sequences, reactions_file), rows, draws))
    for stage in (Study.headline, Study.parameters, Study.ratios):
        for study in studies:
            stage(study)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reactions", type=Path, help="a file of reaction SMILES, one a line")
    parser.add_argument("--draws", type=int, default=5, help="calibration draws (default: %(default)s)")
    parser.add_argument("--only", choices=("tiny", "rxnfp"), help="one model")
    parser.add_argument("--quick", action="store_true", help="a small slice, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/study")
    options = parser.parse_args()
    if options.only == "rxnfp" and options.reactions is None:
        parser.error("--only rxnfp needs --reactions FILE")
    rows = measure(options.reactions, options.draws, options.out, quick=options.quick, only=options.only)
    print(f"wrote {rows.path}")


if __name__ == "__main__":
    main()
