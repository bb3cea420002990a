"""Wall-clock of pruned inference: kernel, attention layer, block, step and generation, beside its ceiling.

    python benchmarks/latency.py --device cpu --quick --out benchmarks/results/cpu
    python benchmarks/latency.py --device cuda --out benchmarks/results/h100
    python benchmarks/latency.py --device cpu --quick --out new --compare benchmarks/results/cpu/latency.json
    python benchmarks/latency.py --device cuda --shape LLaDA-8B --length 2048 --batch 1 --steps 32 --out new

Every group of variants is timed turn by turn in one process; a row quotes medians, ratios are medians over
rounds. If a group's own correctness check fails, no speed is printed. Writes latency.json after every group,
latency.csv and latency.png at the end; ``--resume`` goes on with what is there. A case that a GPU has no room
for is left out, with a line; asked for alone, it is an error. On CUDA times are of device events, kernels as
graphs of 20 calls, one pruned model at a time beside the dense ones.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from speed.latency_groups import (
    SHAPES,
    Case,
    CheckFailed,
    Done,
    Groups,
    elementwise_groups,
    geometry_of,
    kernel_groups,
    model_groups,
    needed_bytes,
    random_model,
)
from speed.latency_rows import Document, compare, table, time_group
from tqdm import tqdm

import sinkprune as sp
from sinkprune.planning.costs import ceiling
from sinkprune.planning.hardware import Roofs, roofs
from sinkprune.plans import LayerPlan

__all__ = ["SHAPES", "Case", "cases", "main", "random_model"]
LEVELS: dict[str, Callable[[Case, str, Done], Groups]] = {
    "kernel": kernel_groups,
    "model": model_groups,
    "elementwise": elementwise_groups,
}


def cases(device: str, quick: bool) -> list[Case]:
    """What is timed when nothing else is asked for."""
    single, half = torch.float32, torch.bfloat16
    if device == "cpu":
        if quick:
            return [Case("tiny", single, 1, 256, 8, 11), Case("150M", single, 1, 256, 0, 5)]
        grid = [Case("tiny", single, b, n, 8, 15 if b == 1 else 5) for b in (1, 4, 8) for n in (256, 512)]
        return grid + [Case("150M", single, 1, n, 4 if n == 256 else 0, 9) for n in (256, 512, 1024)]
    lengths, batches = ((1024,), (1,)) if quick else ((256, 1024, 2048, 4096), (1, 4, 8))
    return [Case(s, half, b, n, 16, 20) for s in ("LLaDA-8B", "Dream-7B") for b in batches for n in lengths]


def fail(line: str, code: int = 2) -> NoReturn:
    print(f"latency.py: error: {line}", file=sys.stderr)
    raise SystemExit(code)


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases to time: the one asked for, or those of ``cases`` that fit."""
    if options.shape is None:
        if (options.batch, options.length, options.steps, options.block_length) != (None,) * 4:
            fail("--batch, --length, --steps and --block-length describe one case: name its --shape too")
        wanted = cases(options.device, options.quick)
    else:
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        batch, length = options.batch or 1, options.length or 1024
        rounds = 5 if options.quick else 20
        wanted = [Case(options.shape, dtype, batch, length, options.steps or 0, rounds, options.block_length)]
        check_case(wanted[0])
    if options.device != "cuda":
        return wanted
    free = torch.cuda.mem_get_info()[0]
    fitting = [case for case in wanted if needed_bytes(case) <= free]
    for case in wanted:
        if case not in fitting:
            needed = f"{case.shape}, {case.batch} x {case.length} needs {needed_bytes(case) / 1e9:.0f} GB"
            print(f"latency.py: left out: {needed}, {free / 1e9:.0f} GB are free", file=sys.stderr)
    if not fitting:
        smallest = min(wanted, key=needed_bytes)
        halves = (Case(smallest.shape, smallest.dtype, 1, n, 0, 1) for n in (4096, 2048, 1024, 512, 256, 64))
        room = next((f"1 x {c.length} tokens" for c in halves if needed_bytes(c) <= free), None)
        sizes = {s: needed_bytes(Case(s, smallest.dtype, 1, 256, 0, 1)) for s in SHAPES}
        others = [s for s in sorted(sizes, key=lambda s: -sizes[s]) if sizes[s] <= free]
        advice = room or (f"the shape {others[0]}" if others else "none of the shapes")
        fail(
            f"{smallest.shape} needs {needed_bytes(smallest) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            f"{advice} would fit"
        )
    return fitting


def check_case(case: Case) -> None:
    """End with one line where a case's numbers do not fit each other."""
    if min(case.batch, case.length) < 1 or case.length < 2:
        fail(f"--batch must be at least 1 and --length 2, got {case.batch} and {case.length}")
    block = case.block_length or case.new_tokens
    if block < 1 or case.new_tokens % block:
        fail(
            f"--block-length {block} does not divide the {case.new_tokens} new tokens of length {case.length}"
        )
    blocks = case.new_tokens // block
    if case.steps > case.new_tokens:
        fail(f"--steps {case.steps} is above the {case.new_tokens} new tokens of length {case.length}")
    if case.steps < 0 or case.steps % blocks:
        fail(f"--steps must be a multiple of {blocks} blocks, got {case.steps}")


def announce(case: Case, known: Roofs) -> str:
    """The ceilings of a case's plans, before anything is pruned."""
    geometry = geometry_of(case.shape)
    lines = []
    for share in (0.25, 0.38, 0.5):
        kept = [round((1 - share) * heads) for heads in geometry.heads]
        plan = sp.PrunePlan(geometry, "", [LayerPlan(list(range(n))) for n in kept])
        both = (ceiling(geometry, plan, case.batch, case.length, r, case.dtype) for r in (None, known))
        lines.append("{:.0f} %: {:.2f}x ({:.2f}x by roofs)".format(100 * share, *both))
    return f"{case.shape} {case.batch} x {case.length}: without heads a step is at most " + ", ".join(lines)


@torch.inference_mode()
def run(options: argparse.Namespace, chosen: list[Case], document: Document) -> None:
    """Time every group that is not there yet, writing after each; a level without room is noted and left."""
    for case in chosen:
        print(announce(case, document.roofs), file=sys.stderr)
        with tqdm(desc=f"{case.shape} {case.batch} x {case.length}", unit="group") as bar:
            for level in options.level or ("kernel", "model"):
                try:
                    time_level(level, case, options, document, bar.update)
                except torch.cuda.OutOfMemoryError as error:
                    why = " ".join(str(error).split())[:200]
                    lost = {"shape": case.shape, "batch": case.batch, "length": case.length, "level": level}
                    document.failures.append({**lost, "error": why})
                    print(f"latency.py: no room for {lost}: {why}", file=sys.stderr)
                    document.write(options.out)
                if options.device == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()
    document.complete = True


def time_level(
    level: str, case: Case, options: argparse.Namespace, document: Document, tick: Callable[[], object]
) -> None:
    for bench, variants in LEVELS[level](case, options.device, document.done(case)):
        if not all((bench, variant.name) in document.done(case) for variant in variants):
            document.add(time_group(bench, variants, case, options.device, document.roofs))
            document.write(options.out)
        variants.clear()  # the next group's models come into being while this name is held
        tick()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=best)
    parser.add_argument("--quick", action="store_true", help="few shapes, under three minutes on two cores")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="go on where a run into --out was cut short")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print how ratios changed since")
    parser.add_argument("--level", action="append", choices=list(LEVELS), help="default: kernel and model")
    parser.add_argument("--shape", choices=list(SHAPES), help="time this shape alone, as the next four say")
    parser.add_argument("--batch", type=int, help="default 1")
    parser.add_argument("--length", type=int, help="prompt and new tokens, half each; default 1024")
    parser.add_argument("--steps", type=int, help="forwards of a generation; default: none is timed")
    parser.add_argument("--block-length", type=int, help="default: all new tokens")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda asked for, but torch sees no CUDA device")
    if options.compare and not options.compare.is_file():
        fail(f"--compare {options.compare} is not a file")
    chosen = chosen_cases(options)
    command = " ".join(["python benchmarks/latency.py", *sys.argv[1:]])
    known = roofs(options.device, again=True)  # of this run, whatever the disk remembers
    document = Document(command, options.device, known, [], [])
    if options.resume:
        document.resume(options.out)
    try:
        run(options, chosen, document)
    except CheckFailed as error:
        (options.out / "latency.json").unlink(missing_ok=True)
        fail(f"correctness check failed, no speed is reported: {error}", 1)
    document.write(options.out)
    rows = document.rows
    print(table(rows))
    if options.compare:
        print("\n".join(compare(rows, options.compare)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
