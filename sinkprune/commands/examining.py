"""What a model folder is to the package: ``sinkprune doctor MODEL_DIR``, from its config, the names in its
weight files, and a few rows of its tensors. A folder without weights will do."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.checkpoints import checkpoint
from sinkprune.checkpoints.layout import TRIMMED, lay_out_folder, weight_files
from sinkprune.commands import doctor, families_page
from sinkprune.commands.families_tables import LENGTH, SHARE, dense_layers, even_plan
from sinkprune.evaluation.footprint import memory
from sinkprune.files import read_json
from sinkprune.models.published import NATIVE, native_kind
from sinkprune.models.shapes import PUBLISHED
from sinkprune.planning.costs import ceiling
from sinkprune.plans import PrunePlan
from sinkprune.targets import TARGETS, fit_for

ROWS, TENSORS = 64, 12  # read of each of so many tensors, to count their zeros


def examine(source: str | Path) -> dict[str, Any]:
    """JSON-ready facts of a folder (or ``"tiny"``): ``doctor.recognise``'s, what works and what is refused,
    ceilings, memory and zeros; of an unknown tree, the nearest family and the first tensor that differs.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a config.json that is no JSON object.
    """
    folder = checkpoint.folder_of(source)
    config = read_json(folder / "config.json")
    if config.get("model_type") == TRIMMED:
        return {"folder": str(folder), "form": "an export whose layers differ, which sp.load reads back"}
    try:
        adapter = adapter_for(lay_out_folder(folder, config))
    except (TypeError, ValueError) as error:
        return _unknown(folder, config, error)
    facts = doctor.recognise(source)
    geometry, plan = adapter.geometry(), _plan(folder)
    row = dict(zip(families_page.COLUMNS, families_page.row(type(adapter)), strict=True))
    facts["parameters"] = sum(parameter.numel() for parameter in adapter.model.parameters())
    facts["sampler"] = row["sampler"]
    facts["block"] = adapter.block_size or adapter.usual_block or "yours"
    facts["caches"] = row["caches"]
    facts["works"] = _works(adapter, row, facts["form"])
    facts["exports to"] = {name: _exports(name, geometry.family) for name in TARGETS}
    length, dense = min(LENGTH, geometry.context), dense_layers(adapter)
    heads, both = even_plan(geometry, SHARE, 0, set()), even_plan(geometry, SHARE, SHARE, dense)
    facts["ceiling"] = {
        "of": f"a forward of 1 x {length} tokens, arithmetic",
        f"without {SHARE:.0%} of the heads": round(ceiling(geometry, heads, length=length), 3),
        "and as many channels": round(ceiling(geometry, both, length=length), 3),
    }
    facts |= _weights(folder, adapter, plan)
    return facts


def _plan(folder: Path) -> PrunePlan | None:
    path = folder / checkpoint.MANIFEST
    planned = read_json(path).get("plan") if path.exists() else None
    return None if planned is None else PrunePlan.from_dict(planned)


def _works(adapter: Adapter, row: dict[str, str], form: str) -> dict[str, str]:
    """Per verb or target ``"yes"``, or why not."""
    layers = adapter.geometry().num_layers
    pruned = None if form == "dense" else f"no: the folder holds a model in {form} form"
    refusal = adapter.refuse_compact()
    compact = row["compact"] if row["compact"].startswith("no") else "yes"
    compact = compact if refusal is None else f"no: {refusal}"
    dense, channels = dense_layers(adapter), "yes"
    if len(dense) < layers:
        try:
            adapter.mlp_weights(next(layer for layer in range(layers) if layer not in dense))
        except ValueError as error:
            channels = f"{len(dense)} of {layers} layers: {error}" if dense else f"no: {error}"
    mask = adapter.mask_token_id
    return {
        "profile, generate": "yes" if mask is not None else "with mask_token_id: the config names none",
        "plan, apply (mask)": pruned or row["mask"],
        "plan, apply (compact)": pruned or compact,
        "targets: heads": pruned or "yes",
        "targets: mlp": pruned or channels,
        "save": row["save and load"],
    }


def _exports(target: str, family: str) -> str:
    try:
        fit = fit_for(target, family)
    except ValueError as error:
        return f"no: {error}"
    return "yes" if not fit.heads else f"channels alone: {fit.heads}"


def _weights(folder: Path, adapter: Adapter, plan: PrunePlan | None) -> dict[str, Any]:
    """What the weight files hold, and whether a forward fits here."""
    files: list[Path] = []
    with suppress(FileNotFoundError):
        files = [path for path in weight_files(folder) if path.is_file()]
    stored = sum(path.stat().st_size for path in files)
    geometry = adapter.geometry()
    dtype = _dtype(files) or torch.bfloat16
    length = min(LENGTH, geometry.context)
    rows = min(length, adapter.block_size or adapter.usual_block or 128)  # of the head: a block's
    needed = memory(geometry, plan, length=length, dtype=dtype, head_rows=rows)
    needed = replace(needed, weights=stored or needed.weights)
    free, where = _free()
    facts: dict[str, Any] = {
        "weights": f"{stored / 1e9:.2f} GB in {len(files)} files" if files else "none here: config alone",
        "memory": {
            "of": f"generation at 1 x {length} tokens in {str(dtype).removeprefix('torch.')}",
            "needed_bytes": needed.peak,
            "free_bytes": free,
            "fits": f"yes, {where}" if needed.peak <= free else f"no, not {where}",
        },
    }
    if files:
        share, count = _zeros(files)
        facts["zeros"] = f"{share:.0%} of what was read of {count} matrices"
        sparsity = None
        if (folder / checkpoint.MANIFEST).exists():
            sparsity = read_json(folder / checkpoint.MANIFEST).get("sparsity")
        if sparsity:
            facts["sparsity"] = f"{sparsity['sparsity']:.0%}, {sparsity['pattern']}, by {sparsity['method']}"
    return facts


def _free() -> tuple[int, str]:
    """Free bytes of the GPU, or of the machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "on the GPU"
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024, "in this machine's memory"
    return 0, "known on this machine"


def _names(files: list[Path]) -> list[tuple[Path, str]]:
    """Tensors of weight files in order. Raises ``ValueError`` for a damaged file."""
    found = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as handle:
                found += [(path, name) for name in handle.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return found


def _dtype(files: list[Path]) -> torch.dtype | None:
    """The dtype of the first matrix."""
    for path, name in _names(files[:1]):
        with safe_open(path, framework="pt") as handle:
            part = handle.get_slice(name)
            if len(part.get_shape()) == 2:
                return part[:1].dtype
    return None


def _zeros(files: list[Path]) -> tuple[float, int]:
    """The share of exact zeros in ``ROWS`` rows of ``TENSORS`` matrices spread over the files, embeddings and
    heads left out, and how many there were."""
    names = [pair for pair in _names(files) if re.search(r"\.\d+\.", pair[1]) and pair[1].endswith("weight")]
    zeros = numbers = count = 0
    for path, name in names[:: max(1, len(names) // TENSORS)]:
        with safe_open(path, framework="pt") as handle:
            part = handle.get_slice(name)
            if len(part.get_shape()) != 2:
                continue
            rows = part[:ROWS]
        zeros, numbers, count = zeros + int((rows == 0).sum()), numbers + rows.numel(), count + 1
    return zeros / max(1, numbers), count


def _unknown(folder: Path, config: dict[str, Any], error: Exception) -> dict[str, Any]:
    """Why a folder is not known, and the family whose tensor names are nearest."""
    facts: dict[str, Any] = {
        "folder": str(folder),
        "model_type": config.get("model_type"),
        "family": "unknown",
        "refused": " ".join(str(error).split()),
    }
    files: list[Path] = []
    with suppress(FileNotFoundError):
        files = [path for path in weight_files(folder) if path.is_file()]
    if not files:
        return facts | {"weights": "none here: with them, the nearest family would be named"}
    names = sorted(name for _, name in _names(files))
    trees = {name: _tree(shape.config) for name, shape in PUBLISHED.items()}
    found = {_pattern(name) for name in names}
    nearest = max(trees, key=lambda name: len(found & trees[name]) / len(found | trees[name]))
    tree = trees[nearest]
    facts["nearest"] = f"{nearest}, {len(found & tree)} of {len(found | tree)} kinds of tensors the same"
    foreign = next((name for name in names if _pattern(name) not in tree), None)
    missing = sorted(tree - found)
    if foreign is not None:
        facts["first tensor that differs"] = f"{foreign}, which {nearest} has not"
    elif missing:
        facts["first tensor that differs"] = f"{missing[0]}, which is missing here"
    else:
        facts["first tensor that differs"] = "none: names agree, so the config alone is in the way"
    return facts


def _tree(config: dict[str, Any]) -> set[str]:
    """Names of a published model's tensors, numbers as ``{}``: of its first layers, which have every kind."""
    layers = "n_layers" if "n_layers" in config else "num_hidden_layers"
    with torch.device("meta"):
        model = NATIVE[native_kind(config) or ""](config | {layers: 2})
    return {_pattern(name) for name in model.state_dict()}


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".{}", name)
