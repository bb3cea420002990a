"""What is installed, what was compiled for what, which backend runs each operation, and why not another."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sinkprune import native, ops
from sinkprune.version import __version__

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def diagnose() -> dict[str, Any]:
    """The facts, JSON-ready: ``versions``, ``device``, ``native`` (build information) and ``backends``."""
    versions: dict[str, str | None] = {"sinkprune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device: dict[str, Any] = {"cuda": torch.cuda.is_available(), "threads": torch.get_num_threads()}
    if device["cuda"]:
        properties = torch.cuda.get_device_properties(0)
        device |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    backends = {name: _try_backends(call) for name, call in _CALLS.items()}
    return {"versions": versions, "device": device, "native": native.build_info(), "backends": backends}


def _attention(backend: str, q: Tensor) -> object:
    return ops.attention(q, q, q, kept_heads=[0, 2], backend=backend)


def _column_mass(backend: str, q: Tensor) -> object:
    return ops.column_mass(q, q, kept_heads=[0, 2], backend=backend)


_CALLS: dict[str, Callable[[str, Tensor], object]] = {"attention": _attention, "column_mass": _column_mass}


def _try_backends(call: Callable[[str, Tensor], object]) -> dict[str, str]:
    """Per backend ``"runs"``, or why it can't serve a small call with skipped heads on this machine."""
    cuda = torch.cuda.is_available()
    q = torch.randn(1, 3, 32, 64, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else None)
    answers = {}
    for backend in ops.BACKENDS:
        try:
            call(backend, q)
            answers[backend] = "runs"
        except (ValueError, RuntimeError, ImportError) as error:
            answers[backend] = " ".join(str(error).split())
    return answers


def describe(facts: dict[str, Any]) -> str:
    """``diagnose``'s facts as indented lines for a terminal."""
    lines: list[str] = []

    def add(value: Any, depth: int) -> None:
        for key, item in value.items():
            if isinstance(item, dict):
                lines.append("  " * depth + f"{key}:")
                add(item, depth + 1)
            else:
                text = ", ".join(map(str, item)) if isinstance(item, list) else item
                lines.append("  " * depth + f"{key}: {text}")

    add(facts, 0)
    return "\n".join(lines)
