"""Three writers and a reader of one folder: who reads sees one whole checkpoint, who loses gets one line."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import toys
from forked import acted

import sinkprune as sp

WRITERS = 3


def attack(folder: Path, seconds: float) -> tuple[dict[str, int], list[str]]:
    """Write and read for so long.

    Returns:
        How often each was done, and what went wrong.
    """
    models = [toys.toy(seed=seed, n_kv_heads=2 + 2 * (seed % 2)) for seed in range(WRITERS)]
    known = [_first(model) for model in models]
    goal, end = folder / "shared", time.monotonic() + seconds
    sp.save(models[0], goal)
    logs = [folder / f"writer-{i}" for i in range(WRITERS)]
    children = [_writer(models[i], goal, end, logs[i]) for i in range(WRITERS)]
    counts: Counter[str] = Counter()
    faults: list[str] = []
    try:
        while time.monotonic() < end:
            try:
                found = _first(sp.load(goal)[0])
                counts["read"] += 1
                if found not in known:
                    faults.append("read: a mixture")
            except Exception as error:
                faults.append(f"read: {type(error).__name__}: {error}")
    finally:
        for child in children:
            _, status = os.waitpid(child, 0)
            if status:
                faults.append(f"a writer ended with status {status}")
    for log in logs:
        for line in log.read_text().splitlines():
            kind = line.partition(": ")[0]
            counts["written" if kind == "accepted" else "refused in a line"] += 1
            if kind not in ("accepted", "refused"):
                faults.append(f"writer: {line}")
    if left := [path.name for path in folder.rglob(".*.part")]:
        faults.append(f"left: {left[:3]}")
    return dict(counts), faults


def _writer(model: object, goal: Path, end: float, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(int(end - time.monotonic()) + 60)
    try:
        with log.open("w") as lines:
            while time.monotonic() < end:
                outcome = acted(lambda: sp.save(model, goal, overwrite=True))  # type: ignore[arg-type]
                print(f"{outcome.kind}: {' '.join(outcome.said.split())}", file=lines)
    finally:
        os._exit(0)


def _first(model: object) -> list[float]:
    return next(iter(model.state_dict().values())).flatten()[:6].tolist()  # type: ignore[attr-defined]
