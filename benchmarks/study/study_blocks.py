"""Which blocks to remove: one at a time, by rule and by depth, as pruned and repaired.

    python benchmarks/study/study_blocks.py [--only MODEL] [--quick] [--out DIR]

On "tiny" (five calibration draws) and "small" (one draw, judged in bfloat16 on half as many windows, without
``ablation``, whose forwards would take hours, and repaired by the default rule alone, minutes a cell).
``first``, ``after first``, ``middle`` and ``last`` are as many neighbouring blocks. ``heads, mlp`` is as
large a share of block parameters, by the default rules for heads and channels. Rows are kept in
``blocks.json``; a second run goes on where the first stopped. ``study_blocks_report.section`` writes them as
Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resumable import Rows
from study_heads import CHANNEL_RULE, HeadSubject, Study
from study_small import SmallSubject
from study_weights import Sizes

import sinkprune as sp
from sinkprune.planning.block_rules import DEFAULT_BLOCK_RULE
from sinkprune.planning.planner import DEFAULT_CRITERION
from sinkprune.plans import LayerPlan, PrunePlan

ROOT = Path(__file__).parents[2]
MODELS = ("tiny", "small")
COUNTS = {"tiny": (1, 2), "small": (3, 6)}
RULES = {
    "tiny": ("influence", "reconstruction", "ablation", "random"),
    "small": ("influence", "reconstruction", "random"),
}
ABLATED = 2  # draws of ``ablation``, a forward of all rows for every block that is left
PLACES = ("first", "after first", "middle", "last")
WIDTH = "heads, mlp"
REPAIRED = {"tiny": (*RULES["tiny"], *PLACES, WIDTH), "small": (DEFAULT_BLOCK_RULE,)}
TARGETS = ("blocks", "attention", "mlp_blocks")
REPAIRS = (None, "least_squares")


def place(name: str, count: int, layers: int) -> list[int]:
    """The ``count`` neighbouring layers of ``layers`` that a name of ``PLACES`` stands for."""
    starts = {"first": 0, "after first": 1, "middle": (layers - count) // 2, "last": layers - count}
    return list(range(starts[name], starts[name] + count))


@dataclass
class BlockStudy(Study):
    """All cells of one model."""

    plans: dict[tuple[str, int, str, int], PrunePlan] = field(default_factory=dict)

    def measure(self) -> None:
        name, layers = self.subject.name, sp.adapter_for(self.subject.dense()).geometry().num_layers
        counts, mended = COUNTS[name], REPAIRED[name]
        self.rows.row(f"{name}/dense", lambda: self.subject.judge(self.subject.dense()))
        for count in counts:
            for where in PLACES:
                self._place(where, count, layers, None)
            self._rules("blocks", count, None, RULES[name])
        for layer in range(layers):
            self._row(f"blocks/one/None/{layer}/0", self._without([layer]), 0, None)
        for count in counts[::-1]:
            self._rules("blocks", count, "least_squares", [rule for rule in RULES[name] if rule in mended])
        for repair in REPAIRS if WIDTH in mended else (None,):
            for count in counts:
                self._width(count, count / layers, repair)
            for target in TARGETS[1:]:
                self._rules(target, counts[-1], repair, (DEFAULT_BLOCK_RULE,))
        for count in counts:
            for where in PLACES:
                if where in mended:
                    self._place(where, count, layers, "least_squares")

    def _place(self, where: str, count: int, layers: int, repair: str | None) -> None:
        plan = self._without(place(where, count, layers))
        self._row(f"blocks/{count}/{repair}/{where}/0", plan, 0, repair)

    def _rules(self, target: str, count: int, repair: str | None, rules: Sequence[str]) -> None:
        for rule in rules:
            for draw in range(ABLATED if rule == "ablation" else self.draws):
                key = f"{target}/{count}/{repair}/{rule}/{draw}"
                if (
                    f"{self.subject.name}/{key}" not in self.rows.rows
                ):  # a plan takes longer than its judgement
                    self._row(key, self._planned(target, count, rule, draw), draw, repair)

    def _planned(self, target: str, count: int, rule: str, draw: int) -> PrunePlan:
        """Kept, since the plan of what is repaired is that of what is not."""
        key = target, count, rule, draw
        if key not in self.plans:
            model = self.subject.dense()
            self.plans[key] = sp.plan(
                model, targets=target, unit="blocks", ratio=count / len(sp.adapter_for(model).blocks()),
                block_rule=rule, calibration=self.subject.rows(draw, self.subject.sequences), seed=draw,
            )  # fmt: skip
        return self.plans[key]

    def _width(self, count: int, ratio: float, repair: str | None) -> None:
        calibration = self.subject.rows(0, self.subject.sequences)
        plan = sp.plan(
            self.subject.dense(), criterion=DEFAULT_CRITERION, ratio=ratio, unit="parameters",
            targets=("heads", "mlp"), channel_rule=CHANNEL_RULE, calibration=calibration,
        )  # fmt: skip
        self._row(f"blocks/{count}/{repair}/{WIDTH}/0", plan, 0, repair)

    def _without(self, gone: list[int]) -> PrunePlan:
        plan = sp.plan(self.subject.dense(), ratio=0, criterion="magnitude")
        plan.layers = [LayerPlan([], []) if i in gone else kept for i, kept in enumerate(plan.layers)]
        return plan


def measure(out: Path, *, quick: bool = False, only: str | None = None) -> Rows:
    """All rows, or those of one model."""
    windows = {"tiny": 4, "small": 4} if quick else {"tiny": 32, "small": 16}
    sequences, draws = (2, 1) if quick else (12, 5)
    settings = {"windows": windows, "rows": sequences, "draws": {"tiny": draws, "small": 1}, "length": 128}
    rows = Rows(out / "blocks.json", settings)
    for name in MODELS if only is None else (only,):
        sizes = Sizes(windows=windows[name], draws=1)
        subject = SmallSubject(sizes, sequences) if name == "small" else HeadSubject(name, sizes, sequences)
        BlockStudy(subject, rows, settings["draws"][name]).measure()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=MODELS, help="one model")
    parser.add_argument("--quick", action="store_true", help="a small slice, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/study")
    options = parser.parse_args()
    print(f"wrote {measure(options.out, quick=options.quick, only=options.only).path}")


if __name__ == "__main__":
    main()
