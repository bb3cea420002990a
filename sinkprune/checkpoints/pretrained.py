"""``save_pretrained`` and ``push_to_hub`` of a pruned model: what transformers loads again, or a refusal."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from sinkprune.checkpoints import side_files
from sinkprune.checkpoints.checkpoint import as_native
from sinkprune.checkpoints.exporting import export, folder_content
from sinkprune.checkpoints.rebuilding import MANIFEST
from sinkprune.models.marks import form_of
from sinkprune.targets import TARGETS

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_IGNORED = {  # of transformers' save_pretrained, with what asks for nothing
    "push_to_hub": (False,), "variant": (None,), "distributed_checkpoint": (False,), "state_dict": (None,),
}  # fmt: skip


def save_pretrained(
    model: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True, **keys: Any
) -> None:
    """Write a compact model so that ``from_pretrained`` loads it, as ``sp.export(to="hf")`` does, into a
    folder that may be there already, as transformers does.

    ``max_shard_size`` and ``token`` are taken and not looked at.

    Raises:
        ValueError: a model in mask form, one that neither its family's config nor our modelling file can
            say, or an argument that would be ignored; nothing is written.
    """
    for name, allowed in _IGNORED.items():
        if keys.get(name, allowed[0]) not in allowed:
            raise ValueError(f"save_pretrained of a pruned model takes no {name}: {_verbs('save_directory')}")
    if not is_main_process:
        return
    folder = Path(save_directory)
    _require_writable(model, "save_pretrained")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as part:
        made = export(model, Path(part) / "it")
        _as_transformers_saves(model, made)
        new = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
        for path in new:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / path, folder / path)
    for path in folder.iterdir():  # of what was saved there before
        if _WEIGHTS.fullmatch(path.name) and Path(path.name) not in new:
            path.unlink()


def push_to_hub(model: Any, repo_id: str, **keys: Any) -> Any:
    """transformers' own, of what ``save_pretrained`` writes; refused before anything is created."""
    _require_writable(model, "push_to_hub")
    return type(model).push_to_hub(model, repo_id, **keys)


def _require_writable(model: nn.Module, verb: str) -> None:
    if form_of(model) == "mask":
        raise ValueError(f"{verb} would lose the mask and write the dense model: {_verbs()}")
    try:
        folder_content(as_native(model), TARGETS["transformers"], "hf")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{verb} can't write this pruned model ({error}): {_verbs()}") from error


def _verbs(folder: str = "folder") -> str:
    return f"sinkprune.save(model, {folder}) keeps it whole, and sinkprune.load reads it"


def _as_transformers_saves(model: Any, folder: Path) -> None:
    """Without the tokenizer's files, and with how the model generates now."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for name in (side_files.GENERATION, *side_files.TOKENIZER):  # may be written again at any time
        (folder / name).unlink(missing_ok=True)
        manifest["sha256"].pop(name, None)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
