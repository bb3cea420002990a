"""Actions in forked children of one process that has imported everything: what becomes of each."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# How the public functions refuse. KeyError, IndexError, AttributeError, RuntimeError and the like are bugs.
REFUSALS = (ValueError, TypeError, OSError, NotImplementedError)
MEMORY_BYTES = 3 << 30  # above what is mapped already
LINE = 400  # characters of a refusal, paths apart


@dataclass
class Outcome:
    """``kind``: ``"accepted"``, ``"refused"``, ``"unclear"`` (refused in several lines or at length),
    ``"traceback"``, ``"death"`` or ``"endless"``; ``said``: the error's text, or as JSON what string or list
    was returned."""

    kind: str
    said: str = ""


def attempt(action: Callable[[], object], seconds: float = 20.0, apart: str = "") -> Outcome:
    """Run ``action`` in a forked child, with ``seconds`` and a limit on its memory. ``apart`` is a path that
    does not count as text."""
    reader, writer = os.pipe()
    stack = os.memfd_create("stack")
    child = os.fork()
    if child == 0:
        os.close(reader)
        faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
        _become(writer, action, apart)
    os.close(writer)
    kind = "death"
    try:
        told = _read(reader, seconds)
        if told is None:
            os.kill(child, signal.SIGUSR1)
            time.sleep(0.3)
            os.kill(child, signal.SIGKILL)
            return Outcome("endless", f"not done after {seconds:.0f} s; {os.pread(stack, 900, 0).decode()}")
        if told:
            return Outcome(*json.loads(told))
    finally:
        os.close(reader)
        os.close(stack)
        _, status = os.waitpid(child, 0)
    return Outcome(kind, f"ended with status {status}")


def result(action: Callable[[], object], seconds: float = 20.0) -> object:
    """What ``action`` returns, in a forked child, as JSON keeps it: the parent's own threads stay few.

    Raises:
        ValueError: it was not accepted; the outcome.
    """
    outcome = attempt(action, seconds)
    if outcome.kind != "accepted":
        raise ValueError(f"{outcome.kind}: {outcome.said}")
    return json.loads(outcome.said)


def _become(writer: int, action: Callable[[], object], apart: str) -> None:
    """In the child: act, say what happened, end without running anything of the parent's."""
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        outcome = acted(action, apart)
        os.write(writer, json.dumps([outcome.kind, outcome.said]).encode())
    finally:
        os._exit(0)


def acted(action: Callable[[], object], apart: str = "") -> Outcome:
    """Run ``action`` here."""
    try:
        returned = action()
    except REFUSALS as error:
        said = str(error)
        if not said.strip() or "\n" in said or len(said.replace(apart, "")) > LINE:
            return Outcome("unclear", f"{type(error).__name__}: {said[:600]}")
        return Outcome("refused", said)
    except BaseException:
        return Outcome("traceback", traceback.format_exc()[-900:])
    plain = returned if isinstance(returned, (str, list)) else None
    return Outcome("accepted", json.dumps(plain))


def _read(reader: int, seconds: float) -> bytes | None:
    """All that comes through a pipe; None where it does not end in time."""
    told, end = b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        block = os.read(reader, 1 << 16)
        if not block:
            return told
        told += block


def support_on_path() -> None:
    """The tests' toys are importable."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
