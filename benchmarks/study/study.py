"""The whole study: which heads and weights to remove, and what is true of sinks. Writes docs/study.md.

    python benchmarks/study/study.py [--reactions FILE] [--page] [--quick] [--jobs N] [--out DIR]

Three stages, each resumable: ``study_heads`` (heads.json), ``study_claims`` (claims.json) and
``study_weights`` (weights.json). Their parts for each model run side by side, a thread each; what is timed
runs last, alone. What they print goes to ``<part>.log``. ``--page`` only writes the page, from what is there,
with the sections that hours of ``study_small``, minutes of ``study_claims --model small``, half an hour of
``study_blocks`` and as long of ``study_repairs`` give.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import study_blocks_report
import study_heads_report
import study_repairs
import study_small_report
import study_weights_report
from study_heads import PAPER
from study_heads_report import losses, marked
from tqdm import tqdm

from sinkprune.evaluation.intervals import Interval
from sinkprune.planning.planner import DEFAULT_CRITERION

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs/study.md"
STAGES = ("heads", "claims", "weights", "small", "claims_small", "blocks", "repairs")

HEAD = """# Study: what to remove

`make study REACTIONS=FILE` measures everything on this page and writes it: 83 minutes on two CPU cores from
an empty folder, in parts that resume. `FILE` holds reactions, one SMILES a line; without it rxnfp is left
out.

Three models: "small" (134.5 M parameters, 30 layers of 9 query and 3 key/value heads), SmolLM2 made a masked
diffusion model of English; "tiny", which this package ships (6.0 M, 6 layers of 8 heads, trained here on
presidential speeches); and `rxnfp` (6.7 M, 12 x 4 heads), a masked language model of chemical reactions that
nobody here trained. All are small beside LLaDA-8B or Dream-7B; what holds for those has to be measured there
(`python benchmarks/reproduce.py MODEL_DIR`).

What follows from it: `{default}` is the default criterion, `flap` the default rule for MLP channels, and
least-squares repair (on tiny and rxnfp measured with biases: `repair="least_squares_bias"`) what `sp.apply`
does with calibration rows; `sp.sparsify` defaults to `sparsegpt`. The
paper's rule is `criterion="{paper}"`, its weight-level methods are `sink_wanda` and `sink_sparsegpt`."""


def page(out: Path) -> str:
    """The page, of the stages that are there."""
    found = {name: json.loads(path.read_text()) for name in STAGES if (path := out / f"{name}.json").exists()}
    parts = [HEAD.format(default=DEFAULT_CRITERION, paper=PAPER), _verdicts(found)]
    if "small" in found:
        parts.append(study_small_report.section(found["small"], found.get("claims_small")))
    if "blocks" in found:
        parts.append(study_blocks_report.section(found["blocks"]))
    if "heads" in found:
        parts.append(study_heads_report.section(found["heads"]))
    if "repairs" in found:
        parts.append(study_repairs.section(found["repairs"]))
    if "claims" in found and "generation" in found["claims"]["rows"]:
        parts.append(_generation(found["claims"]["rows"]["generation"]))
    if "weights" in found:
        parts.append(study_weights_report.section(found["weights"]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _verdicts(found: dict[str, Any]) -> str:
    """The paper's findings, one line each."""
    lines = ["## The paper's findings", "", "| claim | measured | verdict |", "|---|---|---|"]
    claims = found.get("claims", {}).get("rows", {})
    lines += [*_movement(claims), *_hiding(claims), *_halves(claims), *_against(found)]
    lines.append("| sink-aware weights ≥ Wanda, ≥ SparseGPT | below, weight-level pruning | see there |")
    return "\n".join(lines)


def _movement(claims: dict[str, Any]) -> list[str]:
    lines = []
    if "halves" in claims:
        whole = claims["halves"]["whole"]
        plain, gated = whole["heads_moving_over_3"], whole["heads_moving_over_3_gated"]
        verdict = ("reproduced" if share > 0.7 else "not reproduced" for share in (plain, gated))
        lines.append(
            "| sinks move over denoising steps, in > 70 % of heads by more than 3 positions "
            f"| tiny: {plain:.0%} of heads by argmax, {gated:.0%} counting only sinks that stand out "
            f"| {next(verdict)} by argmax, {next(verdict)} for sinks that stand out |"
        )
    if "autoregressive" in claims:
        every, newest = (claims["autoregressive"][name] for name in ("all_queries", "newest_query"))
        still, alone = (row["heads_moving_over_3_gated"] < 0.2 for row in (every, newest))
        verdict = "reproduced" if still and alone else "in part" if still else "not reproduced"
        lines.append(
            "| sinks of autoregressive models do not move | SmolLM2-135M while it writes: "
            f"{every['heads_moving_over_3']:.0%} of heads by argmax, "
            f"{every['heads_moving_over_3_gated']:.0%} gated; of the newest query alone "
            f"{newest['heads_moving_over_3']:.0%} and "
            f"{newest['heads_moving_over_3_gated']:.0%}; {every['mass_at_0']:.0%} of all attention is on "
            f"position 0 | {verdict}: the mean over all queries leans to early keys under a causal mask |"
        )
    return lines


def _hiding(claims: dict[str, Any]) -> list[str]:
    """What hiding every head's sink costs, beside hiding another key."""
    lines = []
    for name, title in (("hiding/tiny", "tiny"), ("hiding/SmolLM2", "SmolLM2-135M, autoregressive")):
        if name in claims:
            modes = {k: v["added"] for k, v in claims[name].items() if isinstance(v, dict) and "added" in v}
            shown = ", ".join(f"{k} {v['mean']:+.3f}" for k, v in modes.items())
            little, masked = modes["sink"]["mean"] < 0.1, name == "hiding/tiny"
            lines.append(
                f"| hiding every head's sink costs {'little in DLMs' if masked else 'much in AR models'} "
                f"| {title}: nats per token, {shown} "
                f"| {'reproduced' if little == masked else 'not reproduced'} (line at 0.1 nat) |"
            )
    return lines


def _halves(claims: dict[str, Any]) -> list[str]:
    if "halves" not in claims:
        return []
    early, late = claims["halves"]["early"], claims["halves"]["late"]
    shares = [half["heads_moving_over_3_gated"] for half in (early, late)]
    steps = [half["moves_per_step_gated"] for half in (early, late)]
    return [
        f"| sinks move early rather than late | tiny, sinks that stand out: {shares[0]:.0%} of heads move in "
        f"the first half, {shares[1]:.0%} in the second, in {steps[0]:.0%} and {steps[1]:.0%} of the steps | "
        f"{'reproduced' if steps[0] > steps[1] else 'not reproduced'} |"
    ]


def _against(found: dict[str, Any]) -> list[str]:
    """The paper's rule against magnitude and against chance, at equal heads."""
    if "heads" not in found:
        return []
    rows, lines = found["heads"]["rows"], []
    for rival in ("magnitude", "random"):
        shown, better = [], []
        for model, texts in study_heads_report.TEXTS.items():
            for text, title in texts.items():
                if f"{model}/dense" not in rows:
                    continue
                sides = [losses(rows, model, text, f"heads/0.38/None/{name}") for name in (PAPER, rival)]
                if sides[0] is None or sides[1] is None:
                    continue
                value = study_heads_report.difference(sides[0], sides[1])
                shown.append(f"{title} {marked(value)}")
                better.append(value.high < 0)
        verdict = (
            "reproduced" if better and all(better) else "not reproduced" if not any(better) else "in part"
        )
        lines.append(
            f"| removing heads with unstable sinks beats {rival} at 38 % of heads | variance minus {rival}: "
            f"{'; '.join(shown)} | {verdict} |"
        )
    return lines


def _generation(row: dict[str, Any]) -> str:
    """What pruned models write: change of each measure against dense, and likeness to dense's text."""
    names = ("infilling_accuracy", "infilling_bleu", "infilling_rouge_l", "continuation_bleu",
             "continuation_rouge_l", "continuation_distinct_2")  # fmt: skip
    lines = [
        "## What is written: 38 % of heads removed, tiny",
        "",
        "`python benchmarks/study/study_claims.py`. Held-out windows, temperature 0; change against the "
        "dense model with 95 % intervals over texts (accuracy as a share, BLEU and ROUGE-L 0…100). Last "
        "column: ROUGE-L of the continuations with the dense model's as references.",
        "",
        "| model | " + " | ".join(name.replace("_", " ") for name in names) + " | like dense |",
        "|---" * (2 + len(names)) + "|",
    ]
    dense = row["dense"]["measures"]
    lines.append("| dense | " + " | ".join(f"{dense[name]['mean']:.3f}" for name in names) + " | |")
    for variant, values in row.items():
        if variant in ("dense", "seconds"):
            continue
        cells = [marked(Interval(*values["minus dense"][name])) for name in names]
        like = values["likeness to dense"]["continuation_rouge_l"][0]
        lines.append(f"| {variant} | {' | '.join(cells)} | {like:.1f} |")
    return "\n".join(lines)


def run(out: Path, reactions: Path | None, jobs: int, *, quick: bool) -> None:
    """Measure what is not there yet. Raises ``RuntimeError`` that names the log of a part that failed."""
    models = ("tiny",) if reactions is None else ("rxnfp", "tiny")
    parts = [(stage, model) for stage in ("heads", "weights") for model in models] + [("claims", None)]
    if reactions is not None and not reactions.is_file():
        raise FileNotFoundError(f"no file of reactions at {reactions}")
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(parts) + 1, unit="part") as bar:

        def measure(part: tuple[str, str | None]) -> None:
            _part(out, reactions, *part, quick=quick)
            bar.update()

        with ThreadPoolExecutor(jobs) as pool:
            for done in as_completed([pool.submit(measure, part) for part in parts]):
                done.result()
        measure(("weights", "timed"))


def _part(out: Path, reactions: Path | None, stage: str, only: str | None, *, quick: bool) -> None:
    command = [sys.executable, str(FOLDER / f"study_{stage}.py"), "--out", str(out)]
    command += ["--quick"] if quick else []
    command += [] if only is None else ["--only", only]
    command += ["--reactions", str(reactions)] if only == "rxnfp" else []
    log = out / f"{stage}-{only or 'all'}.log"
    environment = os.environ if only == "timed" else os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: see {log}")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reactions", type=Path, help="a file of reaction SMILES, one a line")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--quick", action="store_true", help="a small slice, to see that it works")
    parser.add_argument("--jobs", type=int, default=cores, help="parts side by side (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/study")
    options = parser.parse_args()
    if not options.page:
        run(options.out, options.reactions, options.jobs, quick=options.quick)
    text = page(options.out)
    target = (
        PAGE
        if options.out.resolve() == (ROOT / "benchmarks/results/study").resolve()
        else options.out / "study.md"
    )
    target.write_text(text)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
