"""What goes with a checkpoint beside its weights: the code that its config names, how to generate, the
tokenizer.

Files are copied from where the model was loaded, and never run.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from sinkprune.checkpoints.hub import name_of_cached
from sinkprune.models.marks import noted_source

GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def source_of(model: nn.Module) -> Path | None:
    """The local folder that the model was loaded from, by ``sp.load`` or by transformers; None if not
    known."""
    config = getattr(model, "config", None)
    found = noted_source(model) or getattr(config, "_name_or_path", None)
    return Path(found) if found and Path(found).is_dir() else None


def name_of(model: nn.Module) -> str:
    """The name of that folder, or of the model on the hub with its commit, or ``""``."""
    source = source_of(model)
    return "" if source is None else name_of_cached(source) or source.resolve().name


def loads_by_itself(model: nn.Module) -> bool:
    """Whether transformers can load the model's own config: by a class of its own, or by code beside it."""
    if type(model).__module__.startswith("transformers."):
        return True
    source = source_of(model)
    config = _json(source / "config.json") if source is not None else {}
    modules = list(_modules(config))
    return bool(modules) and source is not None and all((source / name).is_file() for name in modules)


def copy(
    model: nn.Module, folder: Path, config: dict[str, Any], *, tokenizer: bool, missing_ok: bool = False
) -> None:
    """Copy into ``folder`` what goes with the model: ``generation_config.json``, every file of code that
    ``config["auto_map"]`` names and that those import, and with ``tokenizer`` the tokenizer's files and code.

    Raises:
        FileNotFoundError: the config names code that is not there, unless ``missing_ok``.
    """
    source = source_of(model)
    try:
        wanted = _code(source, config)
    except FileNotFoundError:
        if not missing_ok:
            raise
        wanted = []
    if source is not None:
        plain = [GENERATION, *(TOKENIZER if tokenizer else ())]
        wanted += [name for name in plain if (source / name).is_file()]
        if tokenizer:
            wanted += _code(source, _json(source / "tokenizer_config.json"))
    for name in dict.fromkeys(wanted):
        assert source is not None
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _code(source: Path | None, config: dict[str, Any]) -> list[str]:
    """Files of code that a config names, and those that they import from beside them."""
    found: list[str] = []
    queue = list(_modules(config))
    while queue:
        name = queue.pop()
        if name in found:
            continue
        if source is None or not (source / name).is_file():
            where = (
                "the folder that the model was loaded from is not known"
                if source is None
                else f"not in {source}"
            )
            raise FileNotFoundError(
                f"the config's auto_map needs {name}, {where}: put it there, or take auto_map out of the "
                f"config"
            )
        found.append(name)
        queue += [other for other in _imports(source / name) if (source / other).is_file()]
    return found


def _modules(config: dict[str, Any]) -> Iterator[str]:
    """Files named by ``auto_map``; those of other repositories (``repo--module.Class``) stay references."""
    for value in (config.get("auto_map") or {}).values():
        for reference in value if isinstance(value, (list, tuple)) else [value]:
            if reference and "--" not in reference:
                module = reference.rpartition(".")[0]
                if not re.fullmatch(r"\w+(\.\w+)*", module):
                    raise ValueError(f"auto_map names {reference!r}, expected module.Class")
                yield module.replace(".", "/") + ".py"


def _imports(path: Path) -> list[str]:
    """Files beside ``path`` that it imports relatively."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return [name.replace(".", "/") + ".py" for name in names]


def _json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return values if isinstance(values, dict) else {}
