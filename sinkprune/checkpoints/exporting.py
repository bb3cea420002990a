"""A pruned model as something that other programs load: an ordinary folder, or a GGUF file."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinkprune.adapters import adapter_for
from sinkprune.checkpoints import gguf_writing, own_family, ragged, side_files
from sinkprune.checkpoints.checkpoint import as_native, describe_model, hashes_of, write_shards, write_tensors
from sinkprune.checkpoints.layout import lay_out_config
from sinkprune.checkpoints.rebuilding import MANIFEST
from sinkprune.checkpoints.trees import Trimmed, trim
from sinkprune.files import whole_file, whole_folder
from sinkprune.models.marks import plan_of
from sinkprune.targets import TARGETS, Target
from sinkprune.version import __version__

FORMS = {"hf": "transformers", "gguf": "llama.cpp"}  # what may be asked for beside a target's name
_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def export(
    model: nn.Module, out: str | Path, *, to: str = "hf", dtype: str | None = None, tokenizer: Any = None
) -> Path:
    """Write a compact ``model`` as something that programs without this package load.

    It appears whole or not at all. ``sp.load`` reads it back.

    Args:
        model: compact, native or of a transformers class, or a live LLaDA, Dream, SDAR or LLaDA2 object; for
            ``"gguf"`` it may be dense.
        out: a folder, or for ``"gguf"`` a file; must not exist.
        to: ``"hf"``: the family's own config of a smaller dense model where that can say what is left (as
            many heads and channels in every layer), else a modelling file that goes with the checkpoint.
            ``"gguf"``: one file for llama.cpp. Or the name of a target (``sinkprune.targets.TARGETS``), whose
            rules are then checked.
        dtype: of a GGUF file's matrices: ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"``; None = the model's.
        tokenizer: saved with it; None = a folder gets the tokenizer's files of the folder that the model was
            loaded from, a GGUF file none.

    Raises:
        FileExistsError: something is there.
        FileNotFoundError: the config's ``auto_map`` names code that is not where the model was loaded from.
        TypeError: a live object of upstream code without a native model, or an unknown class.
        ValueError: an unknown target, a model that is not compact, or one that the target can't hold: the
            first layer and rule.
    """
    target = TARGETS.get(FORMS.get(to, to))
    if target is None:
        raise ValueError(f"to must be one of {', '.join([*FORMS, *TARGETS])}, got {to!r}")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another path")
    if target.form == "gguf":
        return _write_gguf(model, out, dtype, tokenizer)
    model = as_native(model)
    if dtype is not None:
        raise ValueError(
            f"dtype is of GGUF files; a folder keeps the model's, got dtype={dtype!r} for {to!r}"
        )
    config = describe_model(model)
    tensors, smaller_config, code = folder_content(model, target, to)
    _write_folder(model, out, tensors, smaller_config, code, config, target, tokenizer)
    return out


def folder_content(
    model: nn.Module, target: Target, to: str
) -> tuple[nn.Module | dict[str, Tensor], dict[str, Any], bool]:
    """What a folder would hold: a smaller model or its tensors, its config, and whether our modelling file
    goes with it. Raises what ``export`` raises."""
    adapter = adapter_for(model)
    if adapter.form != "compact" or plan_of(model) is None:
        raise ValueError(f"the model is in {adapter.form} form: apply a plan with mode='compact' first")
    if adapter.family not in target.families and to not in FORMS:
        raise ValueError(
            f"{target.name} {target.source} runs {', '.join(target.families)}; not {adapter.family}"
        )
    refusal: ValueError | None = None
    if target.own_config or to == "hf" or side_files.loads_by_itself(model):
        try:
            small, config = own_family.smaller(model)
            return small, config, False
        except ValueError as error:
            if target.own_config:
                raise
            refusal = error
    try:
        trimmed = _trimmed(model)
    except TypeError as error:  # no description of its tree: then the family's own config had to say it
        raise refusal or error from error
    return ragged.ragged_tensors(trimmed), ragged.ragged_config(trimmed), True


def _trimmed(model: nn.Module) -> Trimmed:
    """``trim`` of a model whose layers are those of its config, which goes along so that it is read back."""
    with suppress(TypeError):  # such a file is not read back
        config = describe_model(model)
        said, here = adapter_for(lay_out_config(config)).geometry(), adapter_for(model).geometry()
        if not said.agrees(here):
            raise ValueError(
                f"by the model's config its layers have {said.heads} heads and {said.channels} channels, and "
                f"they have {here.heads} and {here.channels}: what was exported could not be read back"
            )
    return trim(model)


def _write_gguf(model: nn.Module, out: Path, dtype: str | None, tokenizer: Any) -> Path:
    with suppress(TypeError):  # a live object of a family that has no native model is written as it is
        model = as_native(model)
    trimmed = _trimmed(model)
    if dtype is None:
        dtype = _DTYPES.get(next(iter(trimmed.tensors.values())).dtype, "f32")
    notes = {"version": __version__, "family": trimmed.family, "source": side_files.name_of(model)}
    plan = plan_of(model)
    with suppress(TypeError):  # such a file is not read back
        notes["config"] = gguf_writing.note_of(describe_model(model))
    if plan is not None:
        notes["plan"] = gguf_writing.note_of(plan.to_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as part:
        gguf_writing.write_gguf(trimmed, part, dtype=dtype, tokenizer=tokenizer, notes=notes)
    return out


def _write_folder(
    model: nn.Module,
    out: Path,
    tensors: nn.Module | dict[str, Tensor],
    config: dict[str, Any],
    code: bool,
    dense: dict[str, Any],
    target: Target,
    tokenizer: Any,
) -> None:
    with whole_folder(out) as part:
        if isinstance(tensors, nn.Module):
            write_shards(tensors, part)
        else:
            write_tensors(tensors, part)
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if code:
            (part / ragged.MODELLING).write_text(ragged.modelling_file())
        side_files.copy(model, part, {} if code else config, tokenizer=tokenizer is None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(part))
        plan = plan_of(model)
        assert plan is not None
        manifest = {
            "schema": 1,
            "target": target.name,
            "sinkprune": __version__,
            "source": side_files.name_of(model),
            "family": adapter_for(model).family,
            "config": dense,
            "plan": plan.to_dict(),
            "sha256": hashes_of(part),
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
