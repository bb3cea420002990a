"""Models of transformers' own classes, for loading and saving.

Nothing here runs code that a checkpoint brings along, reads a pickle or downloads anything.
"""

from __future__ import annotations

import json
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

# transformers and ``parameters_on_meta`` replace functions of PyTorch while they make a model: one at a time.
_MAKING = threading.RLock()


def is_transformers_native(model: nn.Module) -> bool:
    """Whether ``model`` is of a class that transformers itself defines and exports."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not type(model).__module__.startswith("transformers."):
        return False
    return getattr(transformers, type(model).__name__, None) is type(model)


def transformers_class(config: dict[str, Any]) -> Any:
    """The class that a parsed ``config.json`` names, or None where transformers has no such class."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names = config.get("architectures")
    if config.get("model_type") not in CONFIG_MAPPING_NAMES or not isinstance(names, list) or len(names) != 1:
        return None
    found = getattr(transformers, str(names[0]), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def describe(model: Any) -> dict[str, Any]:
    """The ``config.json`` of a model: of the dense one, also when the model is pruned."""
    values: dict[str, Any] = json.loads(model.config.to_json_string())
    values["architectures"] = [type(model).__name__]
    for key in ("_attn_implementation", "attn_implementation"):
        values.pop(key, None)
    return values


def lay_out(config: dict[str, Any]) -> nn.Module:
    """A model of this config with its parameters on ``meta`` and its buffers (rotary frequencies) real."""
    from transformers import CONFIG_MAPPING

    model_class = transformers_class(config)
    try:
        with parameters_on_meta():
            model: nn.Module = model_class(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    except Exception as error:  # of many kinds, its validators' own among them
        raise _unreadable("its config.json", error) from error
    return model


def _unreadable(what: str, error: Exception) -> ValueError:
    """What transformers said, in a line: of its validators' errors the cause is the last."""
    words = " ".join(str(error).partition("Exception raised from")[0].split())
    return ValueError(f"transformers can't read {what}: {words[:300] or type(error).__name__}")


def load_published(folder: Path, config: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A dense checkpoint that another program wrote, through transformers, which knows older tensor names.

    Raises:
        ValueError: tensors that are missing or misshapen.
    """
    model_class = transformers_class(config)
    try:
        with _MAKING:
            model, report = model_class.from_pretrained(
                str(folder),
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        raise _unreadable(str(folder), error) from error
    missing, beside = (sorted(report[key]) for key in ("missing_keys", "unexpected_keys"))
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing from the checkpoint, first {missing[0]!r}")
    if beside:
        warnings.warn(
            f"{folder}: {len(beside)} tensors are of no part of {model_class.__name__} and left out, first "
            f"{beside[0]!r}",
            stacklevel=4,  # the call of load
        )
    result: nn.Module = model
    return result


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that this thread makes inside have their parameters on ``meta``; buffers are as always."""
    thread = threading.get_ident()
    with _MAKING:
        original = nn.Module.register_parameter

        def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and not param.is_meta and threading.get_ident() == thread:
                param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            original(module, name, param)

        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]
