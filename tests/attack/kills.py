"""Writers killed at random moments: there is the old or the new, whole, and the next run cleans up."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import toys
from forked import result

import sinkprune as sp
from sinkprune.checkpoints import streaming


class Verbs:
    """Writing verbs of a toy: each writes what ``version`` (0 or 1) says to a path, and is read back."""

    def __init__(self) -> None:
        self.models = [toys.toy(n_kv_heads=2, seed=seed) for seed in (0, 1)]
        self.plans = [sp.plan(model, criterion="magnitude", ratio=0.4) for model in self.models]
        self.prompts = toys.tokens(1, 6, vocabulary=50)
        self.writers: dict[str, Callable[[int, Path], object]] = {
            "save": lambda version, path: sp.save(self.models[version], path, overwrite=True),
            "save in shards": lambda version, path: sp.save(
                self.models[version], path, overwrite=True, shard_bytes=20_000
            ),
            "apply": self._apply,
            "plan": lambda version, path: self.plans[version].save(path),
            "profile": self._profile,
            "export": self._export,
            "prune, streamed": self._stream,
        }
        self.readers: dict[str, Callable[[Path], object]] = {
            "save": self._weights, "save in shards": self._weights, "apply": self._weights,
            "plan": lambda path: sp.PrunePlan.load(path).fingerprint,
            "profile": lambda path: sp.SinkProfile.load(path).fingerprint,
            "export": self._weights, "prune, streamed": self._weights,
        }  # fmt: skip

    def _apply(self, version: int, path: Path) -> object:
        model = sp.apply(copy.deepcopy(self.models[version]), self.plans[version])
        return sp.save(model, path, overwrite=True)

    def _profile(self, version: int, path: Path) -> object:
        return sp.profile(self.models[version], self.prompts, steps=2, gen_length=4).save(path)

    def _export(self, version: int, path: Path) -> object:
        path.unlink(missing_ok=True)  # an export replaces nothing
        return sp.export(self.models[version], path, to="gguf")

    def _stream(self, version: int, path: Path) -> object:
        dense = path.parent / f"dense {version}"
        if not dense.exists():
            sp.save(self.models[version], dense, overwrite=True)
        model, _ = streaming.opened(dense, path)
        streaming.begin(path, {"version": version}, overwrite=True)
        rows = sp.calibrate(model, self.prompts[0].repeat(30), length=8, sequences=2)
        plan = streaming.planned(path, lambda: sp.plan(model, calibration=rows, ratio=0.4))
        return streaming.prune_streamed(model, plan, path, calibration=rows, overwrite=True)

    @staticmethod
    def _weights(path: Path) -> object:
        model, _ = sp.load(path)
        return next(iter(model.state_dict().values())).flatten()[:5].tolist()


def killed(write: Callable[[], object], after: float) -> bool:
    """Whether ``write``, in a forked child, was killed after so many seconds; False where it ended before."""
    child = os.fork()
    if child == 0:
        try:
            write()
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def parts_of(folder: Path) -> list[str]:
    return [path.name for kind in ("part", "streamed") for path in folder.rglob(f".*.{kind}")]


def attack(folder: Path, kills: int, seed: int = 0, verbs: Any = None) -> tuple[dict[str, int], list[str]]:
    """Kill writers ``kills`` times in all, the verbs (default: ``Verbs``) in turn, over an old state or none.

    Returns:
        Counts (kills, parts left by kills, states seen) and what went wrong.
    """
    verbs, rng = verbs or Verbs(), random.Random(seed)
    counts = {"kills": 0, "left by kills": 0, "old": 0, "new": 0, "absent": 0}
    faults: list[str] = []
    seconds, expected = {}, {}
    for name, write in verbs.writers.items():
        for version in (0, 1):
            path = folder / _named(name, version)
            started = time.monotonic()
            _write(write, version, path)
            seconds[name] = time.monotonic() - started
            expected[name, version] = result(partial(verbs.readers[name], path))
    tries = 0
    while counts["kills"] < kills and tries < 4 * kills:
        name = list(verbs.writers)[tries % len(verbs.writers)]
        tries += 1
        path = folder / _named(name, 1 + tries)
        there = rng.random() < 0.7
        if there:
            _write(verbs.writers[name], 0, path)
        was_killed = killed(partial(verbs.writers[name], 1, path), rng.random() * 1.1 * seconds[name])
        counts["kills"] += was_killed
        if not was_killed:  # a warm writer is faster than its first run was
            seconds[name] *= 0.7
        counts["left by kills"] += len(parts_of(folder))
        state = _state(verbs, name, path, expected)
        may_be_absent = not there or name == "export"
        if state not in ("old", "new") and not (may_be_absent and state == "absent"):
            faults.append(f"{name}, killed: {state}")
        counts[state] = counts.get(state, 0) + 1
        _write(verbs.writers[name], 1, path)  # the next run
        if parts_of(folder):
            faults.append(f"{name}: the next run leaves {parts_of(folder)[:2]}")
        if _state(verbs, name, path, expected) != "new":
            faults.append(f"{name}: the next run writes something else")
    if counts["kills"] < kills:
        faults.append(f"only {counts['kills']} of {kills} came in time")
    return counts, faults


def _write(writer: Callable[[int, Path], object], version: int, path: Path) -> None:
    """In a child that nobody kills."""
    result(lambda: str(writer(version, path)))


def _named(verb: str, number: int) -> str:
    return f"{verb}-{number}{'.gguf' if verb == 'export' else ''}"


def _state(verbs: Any, name: str, path: Path, expected: dict[tuple[str, int], object]) -> str:
    if not path.exists():
        return "absent"
    try:
        found = result(partial(verbs.readers[name], path))
    except Exception as error:
        return f"unreadable ({error})"
    return {0: "old", 1: "new"}.get(next((v for v in (0, 1) if expected[name, v] == found), 2), "another")
