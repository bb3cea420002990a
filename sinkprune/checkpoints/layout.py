"""Models without their weights: laid out on ``meta`` from a config, and the files that will fill them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sinkprune.models import transformers_native
from sinkprune.models.common import PACKED
from sinkprune.models.published import NATIVE, native_kind
from sinkprune.models.transformers_native import transformers_class

INDEX = "model.safetensors.index.json"
TRIMMED = "sinkprune_trimmed"  # the model_type of exports whose layers differ


def lay_out_folder(folder: Path, config: dict[str, Any]) -> nn.Module:
    """``lay_out_config``, where the folder of the config is known. Raises as ``check_known`` does."""
    if native_kind(config) is None:
        check_known(folder, config)
    return lay_out_config(config)


def lay_out_config(config: dict[str, Any]) -> nn.Module:
    """The dense model of a parsed ``config.json``, native or of transformers, with its parameters on
    ``meta``."""
    native = NATIVE.get(native_kind(config) or "")
    if native is None:
        return transformers_native.lay_out(config)
    with torch.device("meta"):
        return native(config)


def install_tensors(model: nn.Module, tensors: dict[str, Tensor], device: str | torch.device) -> None:
    """Give a model laid out on ``meta`` all its ``tensors``, which lie on ``device``; not copied."""
    model.load_state_dict(tensors, assign=True)
    if transformers_native.is_transformers_native(model):
        cast(Any, model).tie_weights()
    for module in model.modules():  # indices were laid out on the CPU
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(module, name, buffer.to(device))


def check_known(folder: Path, config: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the config is of a class of transformers with weights as they are."""
    for key in PACKED:
        if config.get(key) is not None:
            raise ValueError(f"{folder}: {key} in config.json: quantised weights are not read")
    if transformers_class(config) is None:
        raise ValueError(
            f"{folder}: unknown model_type {config.get('model_type')!r}; known: {', '.join(NATIVE)}, and "
            f"transformers' own, whose class 'architectures' names (got {config.get('architectures')!r})"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object, each key once and every number finite. Raises ``ValueError`` naming the file where
    it isn't one."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice[:80]!r} is there twice")
        return found

    def refused(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=once, parse_constant=refused)
    except RecursionError:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Safetensors files and the tensors the index promises in each (None: whatever is there)."""
    if (folder / INDEX).exists():
        promised: dict[Path, list[str] | None] = {}
        weight_map = read_json(folder / INDEX).get("weight_map")
        for tensor, name in weight_map.items() if isinstance(weight_map, dict) else ():
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{folder / INDEX}: {name!r} is not the name of a file in the folder")
            names = promised.setdefault(folder / name, [])
            assert names is not None
            names.append(tensor)
        if promised:
            return promised
        raise ValueError(f"{folder / INDEX}: no weight_map")
    if (folder / "model.safetensors").exists():
        return {folder / "model.safetensors": None}
    raise FileNotFoundError(f"{folder}: expected model.safetensors or {INDEX}")
