"""Which heads and channels to remove from "small": a table of cells that fits into hours on one CPU core.

    python benchmarks/study/study_small.py [--draws 5] [--cells rules] [--cells draws] [--quick] [--out DIR]

Its forwards cost thirty of tiny's, so that not every rule is measured at every ratio and draw:

| cells | heads or parameters | rules | removed | draws |
|---|---|---|---|---|
| ``rules`` | heads | all of ``study_heads.CRITERIA`` but ``ALIKE`` | 38 % | 1 |
| | the same, repaired by ``least_squares_cv`` | the default | 38 % of heads; 38, 50 % of parameters | 1 |
| | block parameters | the default; ``random`` at 38 % | 12.5, 25, 38, 50, 62 % | 1 |
| | block parameters | the default, channels by every rule | 38 % | 1 |
| ``draws`` | heads | ``LEADING`` | 38, 62 % | all |

Each as pruned and repaired, on the same windows and masks. Models are judged in bfloat16, which halves the
time (the dense one in float32 too, to see that it may be); statistics and repair are in float32. Rows are
kept in ``small.json``; a second run goes on where the first stopped, and both kinds of cells may run side
by side. ``study_small_report.section`` writes them as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from resumable import Row, Rows
from study_heads import (
    ALIKE,
    CHANNEL_RULE,
    CHANNEL_RULES,
    CRITERIA,
    DATA_FREE,
    HEADLINE,
    PAPER,
    HeadSubject,
    Study,
)
from study_weights import Sizes
from torch import nn

from sinkprune.planning.planner import DEFAULT_CRITERION

ROOT = Path(__file__).parents[2]
LEADING = (DEFAULT_CRITERION, PAPER, "magnitude", "output_norm", "random", "taylor")
HIGH = 0.62
RATIOS = (0.125, 0.25, HEADLINE, 0.5, HIGH)
REPAIRS = (None, "least_squares")
CELLS = ("rules", "draws")
ALIKE_TOKENS = "reconstruction:alike=true"  # the default as it was before small was there
CHOSEN_RIDGE = "least_squares_cv"


class SmallSubject(HeadSubject):
    """The model "small", judged in bfloat16."""

    def __init__(self, sizes: Sizes, sequences: int) -> None:
        super().__init__("small", sizes, sequences)

    def judge(self, model: nn.Module) -> Row:
        try:
            return super().judge(model.bfloat16())
        finally:
            model.float()

    def judge_exactly(self) -> Row:
        """The dense model in float32."""
        return super().judge(self.dense())


class SmallStudy(Study):
    """The cells of the table."""

    subject: SmallSubject

    def measure(self, cells: Sequence[str]) -> None:
        self.rows.row("small/dense, fp32", self.subject.judge_exactly)
        self.rows.row("small/dense", lambda: self.subject.judge(self.subject.dense()))
        for part in cells:
            {"rules": self._every_rule, "draws": self._every_draw}[part]()

    def _every_rule(self) -> None:
        rest = (rule for rule in CRITERIA if rule not in (*LEADING, *ALIKE))
        for criterion in (*LEADING, *rest, ALIKE_TOKENS):
            for repair in REPAIRS:
                self.heads_row(criterion, 0, HEADLINE, repair=repair)
        for criterion in (DEFAULT_CRITERION, ALIKE_TOKENS):
            self.heads_row(criterion, 0, HEADLINE, repair=CHOSEN_RIDGE)
        for repair in (*REPAIRS, CHOSEN_RIDGE):
            for ratio in (HEADLINE, 0.5):
                self.parameters_row(DEFAULT_CRITERION, CHANNEL_RULE, 0, ratio, repair)
        for ratio in RATIOS:
            for criterion in (DEFAULT_CRITERION, "random") if ratio == HEADLINE else (DEFAULT_CRITERION,):
                for repair in REPAIRS:
                    self.parameters_row(criterion, CHANNEL_RULE, 0, ratio, repair)
        for rule in CHANNEL_RULES:
            for repair in REPAIRS:
                self.parameters_row(DEFAULT_CRITERION, rule, 0, HEADLINE, repair)

    def _every_draw(self) -> None:
        """One draw of all first, then what is quick, then repair on the other draws."""
        cells = [
            (repair is not None and draw > 0, draw, ratio, criterion, repair)
            for draw in range(self.draws)
            for ratio in (HIGH, HEADLINE)
            for criterion in LEADING
            for repair in REPAIRS
            if repair is not None or not draw or criterion not in DATA_FREE
        ]
        for _, draw, ratio, criterion, repair in sorted(cells, key=lambda cell: cell[:2]):
            self.heads_row(criterion, draw, ratio, repair=repair)


def measure(draws: int, out: Path, cells: Sequence[str] = CELLS, *, quick: bool = False) -> Rows:
    """The rows of ``cells``, of the table above."""
    sizes = Sizes(4, 1, 1) if quick else Sizes(windows=32, draws=1)
    sequences, draws = (1, 1) if quick else (12, draws)
    settings = {"windows": sizes.windows, "masks": sizes.draws, "draws": draws, "rows": sequences}
    rows = Rows(
        out / "small.json", settings | {"length": 128, "reconstruction": "tokens by their own states"}
    )
    SmallStudy(SmallSubject(sizes, sequences), rows, draws).measure(cells)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=5, help="calibration draws (default: %(default)s)")
    parser.add_argument("--cells", choices=CELLS, action="append", help="a part of the table (default: all)")
    parser.add_argument("--quick", action="store_true", help="a small slice, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/study")
    options = parser.parse_args()
    rows = measure(options.draws, options.out, options.cells or CELLS, quick=options.quick)
    print(f"wrote {rows.path}")


if __name__ == "__main__":
    main()
