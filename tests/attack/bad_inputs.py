"""Inputs that are wrong in one way each, and what must become of them: refused in a line, nothing changed.

Among them are controls, which must be accepted, so that a check that refuses everything is noticed.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bad_calls
import torch
from cases import CONFIG, MANIFEST, WEIGHTS, Bases, Case, after
from safetensors.torch import load_file, save_file

import sinkprune as sp
from sinkprune.planning.latency_table import LatencyTable

INDEX = "model.safetensors.index.json"
# No value of any size, count or id.
NO_COUNT = (-1, 0, 1.5, "8", True, None, [], {}, 10**7, 10**30, -(2**63))
NO_POSITIVE = (-1.0, 0, "1e4", True, [], 10**400)
NO_JSON = (
    b"",
    b"{",
    b"[]",
    b"7",
    b"null",
    b'"text"',
    b"\xff\xfe{}",
    b"\xc3\x28",
    b'{"a": 1, "a": 2}',
    b'{"a": NaN}',
    b'{"a": 1e999, "b": -Infinity}',
    b"{" + b'"a":{' * 3000,
    b"[" * 100_000,
    b'{"a": 1} trailing',
    b"\x00" * 64,
)
COUNTS = {
    "llada": ("d_model", "n_heads", "n_layers", "mlp_hidden_size", "vocab_size"),
    "dream": ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size"),
    "sdar": ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim"),
    "llada2": ("hidden_size", "num_experts", "num_experts_per_tok", "n_group", "moe_intermediate_size"),
    "qwen3": ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
}
POSITIVE = {"llada": ("rope_theta", "rms_norm_eps"), "dream": ("rms_norm_eps",), "sdar": ("rms_norm_eps",)}


def cases(bases: Bases, seed: int = 0) -> Iterator[Case]:
    """Every case, the random ones drawn from ``seed``."""
    rng = random.Random(seed)
    for family in COUNTS:
        yield Case(f"{family}: as it is", family, sp.load, "accepted")
        yield from _configs(family)
    for base, names in (("compact", (CONFIG, MANIFEST)), ("shards", (CONFIG, INDEX)), ("dense", (MANIFEST,))):
        yield Case(f"{base}: as it is", base, sp.load, "accepted")
        for name in names:
            yield from _texts(base, name, sp.load)
    yield from _manifests(bases)
    yield from _weights(bases, rng)
    yield from _indices()
    yield from bad_calls.places()
    for name, read in READERS.items():
        yield Case(f"{name}: as it is", "files", partial(_read, name), "accepted")
        if name.endswith("json"):
            yield from _texts("files", name, partial(_read, name))
        yield from _damaged("files", name, partial(_read, name), rng)
        if name == "plan.json":
            yield from _plans(bases, read)
    yield from bad_calls.arguments(bases)
    yield from bad_calls.command_lines()


READERS: dict[str, Callable[[Path], object]] = {
    "plan.json": sp.PrunePlan.load,
    "profile.safetensors": sp.SinkProfile.load,
    "table.json": LatencyTable.load,
    "model.gguf": sp.load,
}


def _read(name: str, folder: Path) -> object:
    return READERS[name](folder / name)


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _set(file: str, key: str, value: Any) -> Callable[[Path], object]:
    return after(lambda folder: _edit(folder / file, lambda v: v.update({key: value})))


def _configs(family: str) -> Iterator[Case]:
    for key in COUNTS[family]:
        for value in NO_COUNT:
            yield Case(f"{family}: {key} = {value!r:.20}", family, _set(CONFIG, key, value))
        yield Case(f"{family}: without {key}", family, after(partial(_drop, CONFIG, key)))
    for key in POSITIVE.get(family, ()):
        for number in NO_POSITIVE:
            yield Case(f"{family}: {key} = {number!r:.20}", family, _set(CONFIG, key, number))
    for value in (10**6, -1, "60", True, [60]):
        if family != "qwen3":
            yield Case(f"{family}: mask_token_id = {value!r}", family, _set(CONFIG, "mask_token_id", value))
    for value in ("unknown", "", 7, None, "__import__('os')"):
        if family != "qwen3" or value == 7:
            yield Case(f"{family}: model_type = {value!r}", family, _set(CONFIG, "model_type", value))
    quantised = {"quant_method": "fp8"}
    yield Case(f"{family}: quantised", family, _set(CONFIG, "quantization_config", quantised))
    yield Case(f"{family}: a harmless key", family, _set(CONFIG, "transformers_version", "9.9"), "accepted")


def _drop(file: str, key: str, folder: Path) -> None:
    _edit(folder / file, lambda values: values.pop(key, None))


def _texts(base: str, name: str, read: Callable[[Path], object]) -> Iterator[Case]:
    for i, text in enumerate(NO_JSON):
        act = after(lambda folder, text=text: (folder / name).write_bytes(text), read)  # type: ignore[misc]
        yield Case(f"{base}/{name}: JSON text {i}", base, act)


def _manifests(bases: Bases) -> Iterator[Case]:
    values = {
        "schema": (0, 2, "1", None, True, 1.5),
        "form": ("", "Dense", None, 7, ["compact"], "mask "),
        "plan": (None, {}, [], "plan", 7),
        "sha256": ({}, [], None, "x", {"config.json": "0" * 64}),
        "sparsity": (7, "x", [], {"method": 3}),
    }
    for key, wrong in values.items():
        for value in wrong:
            yield Case(f"manifest: {key} = {value!r:.30}", "compact", _set(MANIFEST, key, value))
        if key != "sparsity":
            yield Case(f"manifest: without {key}", "compact", after(partial(_drop, MANIFEST, key)))
    hashes = json.loads((bases.root / "compact" / MANIFEST).read_text())["sha256"]
    for name in hashes:
        for value in ("0" * 64, "", None, 7, hashes[name].upper(), hashes[name][:32]):
            act = after(partial(_hash, name, value))
            yield Case(f"manifest: sha256 of {name} = {value!r:.12}", "compact", act)
        yield Case(f"manifest: no sha256 of {name}", "compact", after(partial(_hash, name, ...)))
    for name in ("../x", "/etc/passwd", "a/../../x", "", ".", "nothing", "model.safetensors/"):
        yield Case(f"manifest: names {name!r}", "compact", after(partial(_hash, name, "0" * 64)))
    for layer in range(2):
        for kept in ([99], [0, 0], [2, 1], ["0"], [True], [-1], None, "all", [0.0], [10**30]):
            act = after(partial(_kept, layer, kept))
            yield Case(f"manifest: layer {layer} keeps {kept!r}", "compact", act)


def _hash(name: str, value: Any, folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        if value is ...:
            del values["sha256"][name]
        else:
            values["sha256"][name] = value

    _edit(folder / MANIFEST, change)


def _kept(layer: int, kept: Any, folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["plan"]["layers"][layer]["kept_heads"] = kept

    _edit(folder / MANIFEST, change)


def _weights(bases: Bases, rng: random.Random) -> Iterator[Case]:
    """Of published folders, which no hash vouches for, and of ours, where one byte is enough."""
    for base in ("llada", "sdar", "qwen3"):
        yield from _damaged(base, WEIGHTS, sp.load, rng, count=12)
        names = sorted(load_file(bases.root / base / WEIGHTS))
        for name in (names[0], names[len(names) // 2], names[-1]):
            for how in ("gone", "shape", "rank", "empty", "int8", "renamed"):
                act = after(partial(_tensor, name, how))
                yield Case(f"{base}: {name} {how}", base, act)
        more = "accepted" if base == "qwen3" else "refused"  # transformers leaves it out, and we warn of it
        yield Case(f"{base}: a tensor more", base, after(partial(_tensor, "extra", "more")), more)
    size = (bases.root / "compact" / WEIGHTS).stat().st_size
    for at in sorted(rng.sample(range(size), 25)):
        yield Case(f"compact: byte {at} of the weights", "compact", after(partial(_flip, WEIGHTS, at)))


def _tensor(name: str, how: str, folder: Path) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    if how in ("gone", "renamed"):
        gone = tensors.pop(name)
        tensors |= {name + "_": gone} if how == "renamed" else {}
    elif how == "more":
        tensors[name] = torch.zeros(2)
    else:
        was = tensors[name]
        tensors[name] = {
            "shape": torch.zeros([n + 1 for n in was.shape]),
            "rank": torch.zeros(1, *was.shape),
            "empty": torch.zeros(0),
            "int8": torch.zeros(was.shape, dtype=torch.int8),
        }[how]
    save_file(tensors, path, metadata={"format": "pt"})


def _flip(name: str, at: int, folder: Path) -> None:
    with (folder / name).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


def _damaged(
    base: str, name: str, read: Callable[[Path], object], rng: random.Random, count: int = 8
) -> Iterator[Case]:
    """A file cut at random, grown, empty, all zeros, noise, or with lengths that lie."""
    for _ in range(count):
        share = rng.random() * 0.98
        act = after(lambda f, s=share: _cut(f / name, s), read)  # type: ignore[misc]
        yield Case(f"{base}/{name}: cut at {share:.3f}", base, act)
    contents = {
        "empty": b"",
        "zeros": bytes(4096),
        "noise": random.Random(7).randbytes(4096),
        "a huge header": struct.pack("<Q", 2**62) + b"{}",
        "pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00.",
        "a header that ends nowhere": struct.pack("<Q", 20) + b'{"a": {"dtype": "F32',
    }
    for what, content in contents.items():
        act = after(lambda f, c=content: (f / name).write_bytes(c), read)  # type: ignore[misc]
        yield Case(f"{base}/{name}: {what}", base, act)
    gone = after(lambda f: (f / name).unlink(), read)
    yield Case(f"{base}/{name}: not there", base, gone)
    yield Case(f"{base}/{name}: a folder", base, after(lambda f: _folder(f / name), read))
    yield Case(f"{base}/{name}: a FIFO", base, after(lambda f: _fifo(f / name), read))
    yield Case(f"{base}/{name}: a link to nothing", base, after(lambda f: _link(f / name), read))


def _cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _indices() -> Iterator[Case]:
    def mapped(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        return after(lambda folder: _edit(folder / INDEX, lambda values: change(values["weight_map"])))

    for wrong in ("../x", "/etc/passwd", "", ".", "nothing.safetensors", None, 7, ["a"], CONFIG):
        act = mapped(lambda m, w=wrong: m.update({next(iter(m)): w}))  # type: ignore[misc]
        yield Case(f"index: a shard called {wrong!r}", "shards", act)
    yield Case("index: a tensor less", "shards", mapped(lambda m: m.pop(next(iter(m)))))
    yield Case("index: a tensor more", "shards", mapped(lambda m: m.update(more=next(iter(m.values())))))
    yield Case("index: no map", "shards", _set(INDEX, "weight_map", {}))
    yield Case("index: no object", "shards", _set(INDEX, "weight_map", [1]))
    yield Case(
        "index: a shard less", "shards", after(lambda f: next(iter(sorted(f.glob("*.safetensors")))).unlink())
    )


def _plans(bases: Bases, read: Callable[[Path], object]) -> Iterator[Case]:
    """Every leaf of a plan's file, wrong."""
    values = json.loads((bases.root / "files" / "plan.json").read_text())

    def leaf(*path: Any, value: Any) -> Callable[[Path], object]:
        def change(whole: dict[str, Any]) -> None:
            at: Any = whole
            for step in path[:-1]:
                at = at[step]
            at[path[-1]] = value

        return after(
            lambda f: _edit(f / "plan.json", change), lambda f: _applied(bases, read(f / "plan.json"))
        )

    yield Case(
        "plan: as it is, applied", "files", lambda f: _applied(bases, read(f / "plan.json")), "accepted"
    )
    for key in values:
        if key not in ("details", "criterion", "layers"):
            for value in ("no", [], -1, None):
                told = value == "no" and key in ("unit", "allocation", "fingerprint")  # what only tells
                told |= (value == -1 and key in ("ratio", "seed")) or (value == [] and key == "targets")
                if value != values[key] and not told:
                    yield Case(f"plan: {key} = {value!r}", "files", leaf(key, value=value))
    for key, right in values["geometry"].items():
        for value in (-1, "no", [0] * 99, 10**30):
            if value != right:
                yield Case(
                    f"plan: geometry.{key} = {value!r:.12}", "files", leaf("geometry", key, value=value)
                )
    for kept in ([99], [0, 0], [2, 1], ["0"], [True], [-1], None, "all", {}, [10**30]):
        yield Case(f"plan: keeps heads {kept!r:.12}", "files", leaf("layers", 0, "kept_heads", value=kept))
    for kept in ([99], [0, 0], [2, 1], ["0"], [True], [-1], "all", {}, [10**30]):
        yield Case(
            f"plan: keeps channels {kept!r:.12}", "files", leaf("layers", 0, "kept_channels", value=kept)
        )
        yield Case(
            f"plan: keeps experts {kept!r:.12}", "files", leaf("layers", 0, "kept_experts", value=kept)
        )
    for layers in ([], [{}], [7], "no", None, values["layers"][:1], values["layers"] * 2):
        yield Case(
            f"plan: layers {len(str(layers))} {str(layers)[:9]}", "files", leaf("layers", value=layers)
        )


def _applied(bases: Bases, plan: Any) -> object:
    return sp.apply(copy.deepcopy(bases.model), plan)
