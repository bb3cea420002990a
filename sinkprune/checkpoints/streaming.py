"""Pruning a folder whose weights do not fit in memory: one block at a time is read, and written as it is
then.

What a run has done lies beside its goal as ``.NAME.streamed``; the same run, begun again, goes on from there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sinkprune.adapters import adapter_for
from sinkprune.checkpoints.checkpoint import (
    FLOATS,
    describe_model,
    folder_of,
    load_tokenizer,
    read_manifest,
    require_ours,
    require_place,
    tied_names,
    write_beside,
)
from sinkprune.checkpoints.layout import INDEX, lay_out_folder, require_as_many, stored_tensors, weight_files
from sinkprune.evidence.calibration import Calibration
from sinkprune.files import read_json, whole_file, whole_folder, write_whole
from sinkprune.models.marks import mark_source
from sinkprune.models.published import native_kind
from sinkprune.models.streamed import Stream, stream_of
from sinkprune.plans import PrunePlan
from sinkprune.pruning.streaming import apply_streamed

RUN, PLAN = "run.json", "plan.json"
_LOCKED: dict[Path, int] = {}  # work folders that this process is at, and the handles that say so
SCORING, SOLVING = 6, 5  # float64 matrices that are there at once


def opened(
    source: str | Path,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    progress: Callable[[str, int], None] = lambda what, layer: None,
) -> tuple[nn.Module, Any]:
    """A dense model and its tokenizer, as ``load`` gives them, but with its blocks' weights in the files:
    one block at a time is read onto ``device`` when it is reached. ``plan`` and ``calibrate`` take it.

    Args:
        source: a folder, or ``org/name`` on the hub, of a native family, dense, in safetensors.
        out: where the pruned checkpoint shall lie; what is put aside lies beside it.
        progress: told what was done to which block.

    Raises:
        FileNotFoundError, ValueError: as ``load`` does; another kind of folder.
    """
    folder = folder_of(source, revision)
    config = read_json(folder / "config.json")
    if native_kind(config) is None:
        raise ValueError(
            f"{folder}: only native families are read block by block, got {config.get('model_type')!r}"
        )
    require_as_many(folder, config)
    manifest = read_manifest(folder)
    if manifest is not None and manifest["form"] != "dense":
        raise ValueError(f"{folder} is pruned already ({manifest['form']} form): stream the dense model")
    model = lay_out_folder(folder, config).eval().requires_grad_(False)
    read = _reader(model, folder, torch.device(device))
    first, _ = next(model.named_parameters())  # the embedding
    owner, _, name = first.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.Parameter(read([first])[first], requires_grad=False))

    blocks = adapter_for(model).blocks()
    paths = {id(module): path for path, module in model.named_modules()}
    names = [{own: f"{paths[id(block)]}.{own}" for own in block.state_dict()} for block in blocks]
    Stream(model, blocks, names, read, work_folder(out), progress)
    mark_source(model, folder)
    return model, load_tokenizer(folder)


def work_folder(out: str | Path) -> Path:
    """Where a run that will write ``out`` puts what it has done."""
    return Path(out).with_name(f".{Path(out).name}.streamed")


def begin(out: str | Path, run: Mapping[str, Any], *, overwrite: bool = False) -> bool:
    """Make the work folder of ``run``, which says everything that changes its result; whether the same run
    was begun before and goes on. What another run left there is removed.

    Raises:
        FileExistsError: something at ``out`` that may not be replaced.
        OSError: another process is at it.
    """
    require_place(Path(out), overwrite)
    folder, said = work_folder(out), json.dumps(run, sort_keys=True, default=str)
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)
    if (folder / RUN).is_file() and (folder / RUN).read_text("utf-8") == said:
        return True
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    (folder / "weights").mkdir()
    write_whole(folder / RUN, said)
    return False


def _lock(folder: Path) -> None:
    """Hold the work folder for this process. Raises ``OSError`` where another does."""
    if folder in _LOCKED:
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno == errno.EWOULDBLOCK:
            raise OSError(errno.EBUSY, f"another run is writing what {folder} becomes") from None
        return  # a file system without locks
    _LOCKED[folder] = handle


def planned(out: str | Path, make: Callable[[], PrunePlan]) -> PrunePlan:
    """The plan of the run that was begun: ``make``'s, or the one that an earlier try made."""
    path = work_folder(out) / PLAN
    if not path.exists():
        make().save(path)
    return PrunePlan.load(path)


def prune_streamed(
    model: nn.Module,
    plan: PrunePlan,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    repair: str | None = "least_squares",
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """``apply`` and ``save`` of a model of ``opened``: every block is written as soon as it is done.

    The result loads as any other checkpoint. It holds what ``apply`` and ``save`` give in memory, to the bit
    where weights lie aligned there, as ``load`` does not promise, and to rounding elsewhere.
    ``begin`` comes before; killed in between, the same calls go on at the block that was reached.

    Raises:
        ValueError: as ``apply`` does.
        FileExistsError: as ``save`` does.
    """
    out, stream = Path(out), stream_of(model)
    if stream is None:
        raise ValueError("the model's blocks are all in memory: use apply and save")
    weights, total = stream.folder / "weights", len(stream.blocks)
    prefixes = {id(module): path for path, module in model.named_modules()}
    inside = tuple(f"{prefixes[id(block)]}." for block in stream.blocks)
    again = {
        name for names in tied_names(lay_out_folder(Path(), describe_model(model))) for name in names[1:]
    }
    outside = [n for n in model.state_dict() if not n.startswith(inside) and n not in again]
    files = total + len(outside)

    def path_of(number: int) -> Path:
        return weights / f"model-{number + 1:05d}-of-{files:05d}.safetensors"

    def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
        with whole_file(path) as part:
            save_file({n: t.detach().contiguous() for n, t in tensors.items()}, part, {"format": "pt"})

    def write_block(layer: int, block: nn.Module) -> None:
        write(path_of(layer), {inside[layer] + name: t for name, t in block.state_dict().items()})

    written = next((n for n in range(total) if not path_of(n).exists()), total)
    apply_streamed(model, plan, write_block, calibration=calibration, repair=repair, written=written)
    for number, name in enumerate(outside, total):
        if not path_of(number).exists():
            write(path_of(number), stream.read([name]))
    with whole_folder(out, require_ours if overwrite else None) as part:
        for number in range(files):
            _link(path_of(number), part)
        _write_index(part, [path_of(number).name for number in range(files)])
        write_beside(model, part, out.name, tokenizer)
    shutil.rmtree(stream.folder, ignore_errors=True)
    if stream.folder in _LOCKED:
        os.close(_LOCKED.pop(stream.folder))
    return out


def peak_bytes(
    model: nn.Module, calibration: Calibration | None, *, kept_channels: float = 1.0, batch: int = 16
) -> int:
    """Bytes of memory that planning by the calibration rows, repairing and writing take at most, beside
    Python and its libraries: counted from shapes, before anything is read.

    The embedding; one block; the rows' hidden states in two streams and the outputs to fit; the largest of
    the block as it gets, of what the scores of a layer take (``[H D, H D]``), of solving the normal equations
    of its widest projection (``[n, n]``, float64), and of these beside one batch in flight; or, where that is
    more, the embedding beside the largest tensor outside the blocks as it is written. glibc keeps up to a
    quarter more than that unless ``give_memory_back`` was called.
    ``kept_channels``: the share of MLP channels that stay.
    """
    adapter, geometry = adapter_for(model), adapter_for(model).geometry()
    first = next(model.parameters())
    blocks = [sum(t.nbytes for t in block.state_dict().values()) for block in adapter.blocks()]
    inside = {id(p) for block in adapter.blocks() for p in block.parameters()}
    outside = first.nbytes + max(p.nbytes for p in model.parameters() if id(p) not in inside)
    needed = first.nbytes + max(blocks)
    if calibration is None:
        return max(outside, needed + max(blocks))
    rows, length = calibration.ids.shape
    heads = max(geometry.heads) * geometry.head_dim
    channels = max((c for c in geometry.channels if c), default=0)
    widest = max(heads, round(kept_channels * channels))
    hidden = rows * length * geometry.hidden * first.element_size()
    scoring = SCORING * 8 * heads**2
    solving = SOLVING * 8 * widest**2 + 3 * 8 * widest * geometry.hidden
    in_flight = min(batch, rows) * length * (4 * heads + 4 * channels + 4 * geometry.hidden) * 4
    in_flight += 8 * widest * (widest + geometry.hidden)
    return max(outside, needed + 4 * hidden + max(*blocks, scoring, solving, in_flight))


def give_memory_back() -> None:
    """Have the C library map and unmap large tensors one by one, in this process and for good: else it keeps
    up to a quarter of the memory between them. Does nothing where it is not glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def _reader(model: nn.Module, folder: Path, device: torch.device) -> Callable[[list[str]], dict[str, Tensor]]:
    """Reads tensors by their names in ``model`` from the folder's files, opened one at a time."""
    files = weight_files(folder)
    stored_tensors(files)  # what the index promises is there
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    place: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                if name not in shapes:
                    raise ValueError(f"{path}: unexpected tensor {name!r}")
                shape = tuple(handle.get_slice(name).get_shape())
                if shape != shapes[name]:
                    raise ValueError(f"{path}: {name} must have shape {shapes[name]}, got {shape}")
                place[name] = path
    stored = {name: name for name in place}
    for names in tied_names(model):
        there = next((name for name in names if name in place), None)
        stored |= {name: there for name in names if there is not None}
    missing = sorted(set(shapes) - set(stored))
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing from the checkpoint, first {missing[0]!r}")

    def read(names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(place[stored[name]] for name in names):
            with safe_open(path, framework="pt", device=str(device)) as handle:
                for name in names:
                    if place[stored[name]] == path:
                        tensor = handle.get_tensor(stored[name])
                        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
                            raise ValueError(
                                f"{path}: {name} is {tensor.dtype}: quantised weights are not read"
                            )
                        found[name] = tensor.clone()  # so that the file is no longer mapped
        return found

    return read


def _link(path: Path, folder: Path) -> None:
    try:
        os.link(path, folder / path.name)
    except OSError:  # a file system without links
        shutil.copyfile(path, folder / path.name)


def _write_index(folder: Path, names: list[str]) -> None:
    weight_map: dict[str, str] = {}
    size = 0
    for name in names:
        with safe_open(folder / name, framework="pt") as handle:
            weight_map |= dict.fromkeys(handle.keys(), name)
        size += (folder / name).stat().st_size
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
    (folder / INDEX).write_text(text)
