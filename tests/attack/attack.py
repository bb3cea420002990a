"""Attack the package and count what becomes of it: the table of docs/reliability.md.

    python tests/attack/attack.py [--quick] [--only PART]

Bad inputs, kills, threads, and writers beside a reader; nonsense for the raw operations is
``tests/csrc/raw_calls.py``, which ``make attack`` runs too. Exit code 1 where anything is not as it should
be.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]

import bad_inputs  # noqa: E402
import cases  # noqa: E402
import kills  # noqa: E402
import threads  # noqa: E402
import torch  # noqa: E402
import writers  # noqa: E402

Result = tuple[str, list[str]]  # what was done, what went wrong


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sinkprune-attack-") as folder:
        yield Path(folder)


def inputs(share: int) -> Result:
    """Every ``share``-th bad input."""
    with scratch() as folder:
        bases = cases.Bases(folder)
        chosen = list(bad_inputs.cases(bases))[::share]
        faults = [f"{case.name}: {fault}" for case in chosen if (fault := cases.judge(case, bases))]
    expected = Counter(case.expected for case in chosen)
    return f"{expected['refused']} to be refused, {expected['accepted']} controls", faults


def killed(count: int) -> Result:
    with scratch() as folder:
        counts, faults = kills.attack(folder, count)
    seen = ", ".join(f"{value} {name}" for name, value in counts.items())
    return seen, faults


def threaded(rounds: int) -> Result:
    counts, faults = threads.attack(rounds)
    seen = ", ".join(f"{value} {name}" for name, value in counts.items())
    return f"{threads.THREADS} threads at {len(threads.Shared().verbs())} verbs: {seen}", faults


def written(seconds: float) -> Result:
    with scratch() as folder:
        counts, faults = writers.attack(folder, seconds)
    seen = ", ".join(f"{value} {name}" for name, value in sorted(counts.items()))
    return f"{writers.WRITERS} writers, a reader, {seconds:.0f} s: {seen}", faults


PARTS: dict[str, tuple[Callable[[bool], Result], str]] = {
    "inputs": (lambda quick: inputs(12 if quick else 1), "bad inputs"),
    "kills": (lambda quick: killed(12 if quick else 320), "kills"),
    "threads": (lambda quick: threaded(1 if quick else 20), "threads"),
    "writers": (lambda quick: written(3 if quick else 60), "writers"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a slice of under a minute")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        return sum(_faults(name, options.quick) for name in options.only) > 0
    print("| attack | done | not as it should be | seconds |\n|---|---|---|---|", flush=True)
    quick = ["--quick"] * options.quick  # each part in a process of its own, which has no threads to fork
    parts = [[sys.executable, __file__, "--only", name, *quick] for name in PARTS]
    return max(subprocess.run(part, check=False).returncode for part in parts)


def _faults(name: str, quick: bool) -> int:
    """Run a part and print its row; how many faults it found."""
    part, title = PARTS[name]
    started = time.monotonic()
    done, faults = part(quick)
    print(f"| {title} | {done} | {len(faults)} | {time.monotonic() - started:.0f} |", flush=True)
    for fault in faults[:40]:
        print(f"    {fault}", file=sys.stderr)
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())
