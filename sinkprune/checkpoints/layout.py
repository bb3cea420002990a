"""Models without their weights: laid out on ``meta`` from a config, and the files that will fill them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sinkprune.files import read_json, require_regular
from sinkprune.models import transformers_native
from sinkprune.models.config_keys import PACKED
from sinkprune.models.published import NATIVE, native_kind
from sinkprune.models.transformers_native import transformers_class

INDEX = "model.safetensors.index.json"
MANY = 512  # layers or experts, which are laid out without a look at the weights
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


def stored_tensors(files: dict[Path, list[str] | None]) -> dict[str, str]:
    """The safetensors dtype of every tensor in files of weights, by name, from their headers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is no safetensors file, or has not the tensors that the index promises.
    """
    found: dict[str, str] = {}
    for path, promised in files.items():
        try:
            with safe_open(require_regular(path), framework="pt") as handle:
                here = {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for name in here if promised is None else promised:
            if name not in here:
                raise ValueError(f"{path} is damaged: it has no tensor {name!r}, which {INDEX} promises")
        found |= here
    return found


def require_as_many(folder: Path, config: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a config of more layers or experts than its weights have tensors: laying them
    out could take hours."""
    for key in ("n_layers", "num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"):
        count = config.get(key)
        if type(count) is int and count > MANY and count > len(stored_tensors(weight_files(folder))):
            raise ValueError(
                f"{folder / 'config.json'}: {key} is {count:.3g}, and its weights have fewer tensors"
            )


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
