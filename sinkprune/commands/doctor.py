"""What is installed, what was compiled for what, which backend runs each operation, and why not another."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkprune import ops
from sinkprune.adapters import adapter_for
from sinkprune.checkpoints import checkpoint
from sinkprune.files import read_json
from sinkprune.ops import native
from sinkprune.plans import PrunePlan, model_block_parameters
from sinkprune.version import __version__

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def diagnose() -> dict[str, Any]:
    """The facts, JSON-ready: ``versions``, ``device``, ``native`` (build information) and ``backends``; first
    of all a ``warning`` where there is a GPU and the extension has no CUDA part."""
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
    cuda = torch.cuda.is_available()
    q = torch.randn(1, 3, 32, 64, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else None)
    backends: dict[str, Any] = {name: _try_backends(call, q) for name, call in _CALLS.items()}
    backends["attention"] |= {
        "auto takes": ops.attention_backend(q),
        "auto takes, heads skipped": ops.attention_backend(q, irregular=True),
    }
    backends["column_mass"]["auto takes"] = ops.column_mass_backend(q, q, ops.attention(q, q, q)[1])
    repack = native.serves(q.device)
    backends["repack"] = {"takes": "native" if repack else f"pytorch: {native.why_not() or 'CPU build only'}"}
    facts = {"versions": versions, "device": device, "native": native.build_info(), "backends": backends}
    if cuda and not repack:
        reason = native.why_not() or native.build_info().get("cuda_skipped") or "a CPU build"
        said = f"there is a GPU, and the extension's CUDA part is not built ({reason}), so PyTorch repacks"
        return {"warning": f"{said}; SINKPRUNE_CUDA=1 pip install --no-build-isolation . builds it", **facts}
    return facts


def _attention(backend: str, q: Tensor) -> object:
    return ops.attention(q, q, q, kept_heads=[0, 2], backend=backend)


def _column_mass(backend: str, q: Tensor) -> object:
    return ops.column_mass(q, q, ops.attention(q, q, q)[1], kept_heads=[0, 2], backend=backend)


_CALLS: dict[str, Callable[[str, Tensor], object]] = {"attention": _attention, "column_mass": _column_mass}


def _try_backends(call: Callable[[str, Tensor], object], q: Tensor) -> dict[str, str]:
    """Per backend ``"runs"``, or why it can't serve a small call with skipped heads on this machine."""
    answers = {}
    for backend in ops.BACKENDS:
        try:
            call(backend, q)
            answers[backend] = "runs"
        except (ValueError, RuntimeError, ImportError) as error:
            answers[backend] = " ".join(str(error).split())
    return answers


def recognise(source: str | Path) -> dict[str, Any]:
    """What a model folder (or ``"tiny"``) is to the package, laid out without its weights.

    Returns ``family``, ``model_type``, sizes, whether the compact form is possible (or why not) and the mask
    token. Raises what ``load`` raises for a folder it can't read, and ``TypeError`` for an unknown structure.
    """
    folder = checkpoint.folder_of(source)
    config = read_json(folder / "config.json")
    adapter = adapter_for(checkpoint.lay_out_folder(folder, config))
    geometry = adapter.geometry()
    refusal = adapter.refuse_compact()
    pruned: dict[str, Any] = {"form": "dense"}
    if (folder / checkpoint.MANIFEST).exists():
        manifest = read_json(folder / checkpoint.MANIFEST)
        pruned["form"] = manifest.get("form")
        if manifest.get("plan"):
            plan = PrunePlan.from_dict(manifest["plan"])
            pruned["heads_removed"] = plan.heads_removed
            pruned["block_parameters_removed"] = plan.parameters_removed
    return {
        **pruned,
        "folder": str(folder),
        "model_type": config.get("model_type"),
        "family": geometry.family,
        "adapter": type(adapter).__name__,
        "layers": geometry.num_layers,
        "heads": sorted(set(geometry.heads)),
        "kv_heads": sorted(set(geometry.kv_heads)),
        "channels": sorted(set(geometry.channels)),
        "head_dim": geometry.head_dim,
        "hidden": geometry.hidden,
        "context": geometry.context,
        "block_parameters": model_block_parameters(geometry),
        "mask_token_id": adapter.mask_token_id,
        "compact_form": "possible" if refusal is None else f"not possible: {refusal}",
    }


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
