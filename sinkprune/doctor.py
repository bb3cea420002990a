"""What is installed, what was compiled for what, which backend runs each operation, and why not another."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

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
    return {"versions": versions, "device": device, "native": native.build_info(), "backends": ops.explain()}


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
