"""Whether a device runs the specialised attention right: asked once, in a process of its own, and remembered.

A kernel whose warps wait for each other can hang, and a compiler that does not know its form can end the
process. So a child process compares it with the plain form and with the specification in float64, within a
time limit. Until it has agreed, and wherever it does not, the plain form serves. The answer is kept beside
the tuner's file, for one GPU model, one Triton and one text of the kernel.
What the child does is `agreement.py`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from sinkprune.kernels import launch

LIMIT_SECONDS = 300
AGREES, DIFFERS, CANNOT_ASK = 0, 1, 3


def specialised_works(device: torch.device) -> bool:
    """Whether ``attention`` may take the specialised form on ``device``: never on a CPU, and on a GPU whose
    family ships tiles for it if it agreed there. The first call may take a minute; it never waits for the
    device and may be made while a graph is captured."""
    if device.type != "cuda":
        return False
    return _works_on(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _works_on(index: int) -> bool:
    known, _ = launch.device_family(torch.device("cuda", index))
    if "attention_specialised" not in known.tiles:
        return False
    name = torch.cuda.get_device_properties(index).name
    path = answers_path(name)
    answers = _read(path)
    if _key() not in answers:
        answer = ask(index)
        if answer is None:
            return False
        if answer:
            warnings.warn(f"attention keeps to its plain form on {name}: {answer}", stacklevel=2)
        answers = {**_read(path), _key(): answer}
        _write(path, answers)
    return not answers[_key()]


def ask(index: int, limit: float = LIMIT_SECONDS) -> str | None:
    """What speaks against the specialised form on a GPU, from a child process: "" if nothing does, None if
    it could not be asked (no memory left, the device exclusively ours)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sinkprune.kernels.agreement", str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return f"its specialised form did not end in {limit:.0f} s"
    except OSError:
        return None
    said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    if done.returncode == CANNOT_ASK:
        return None
    if done.returncode == AGREES:
        return ""
    return said if done.returncode == DIFFERS else f"the probe ended with code {done.returncode}: {said}"


def answers_path(device_name: str) -> Path:
    """Where the answers for a GPU model are kept: beside what the tuner measured there."""
    tuned = launch.tuned_path(device_name)
    return tuned.with_name(tuned.name.replace("tiles-", "specialised-", 1))


@functools.cache
def _key() -> str:
    import triton

    from sinkprune.kernels import addressing, attention_specialised

    text = b"".join(Path(str(m.__file__)).read_bytes() for m in (addressing, attention_specialised))
    return f"triton {triton.__version__}, torch {torch.__version__}, {hashlib.sha256(text).hexdigest()[:16]}"


def _read(path: Path) -> dict[str, str]:
    try:
        answers = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return answers if isinstance(answers, dict) else {}


def _write(path: Path, answers: dict[str, str]) -> None:
    """Whole or not at all; a folder that cannot be written costs the next process its own question."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(answers, indent=1) + "\n")
        part.replace(path)
