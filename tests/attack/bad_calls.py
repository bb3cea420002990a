"""Arguments, command lines and places to write to that are wrong in one way each."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import toys
from cases import CONFIG, Bases, Case, after

import sinkprune as sp
from sinkprune.commands.main import main


def places() -> Iterator[Case]:
    """Where something is written: nothing that is there may be lost."""

    def saved(folder: Path) -> object:
        return sp.save(toys.toy(), folder / "out", overwrite=True)

    def planned(folder: Path) -> object:
        return sp.plan(toys.toy(), criterion="magnitude", ratio=0.4).save(folder / "out")

    makers: dict[str, Callable[[Path], object]] = {
        "a file": lambda f: (f / "out").write_text("mine"),
        "a FIFO": lambda f: os.mkfifo(f / "out"),
        "a link": lambda f: (f / "out").symlink_to(f / CONFIG),
        "a link to a folder": lambda f: (f / "out").symlink_to(f),
        "a link to nothing": lambda f: (f / "out").symlink_to("nowhere"),
        "a folder of others": lambda f: ((f / "out").mkdir(), (f / "out" / "mine").write_text("mine")),
        "a device": lambda f: os.mknod(f / "out", 0o600 | 0o020000, os.makedev(1, 3)),
    }
    for what, make in makers.items():
        if what == "a device" and os.geteuid() != 0:
            continue
        yield Case(f"save onto {what}", "llada", after(make, saved))
        if what != "a file":
            yield Case(f"a plan onto {what}", "llada", after(make, planned))

    def under_a_file(folder: Path) -> object:
        return sp.save(toys.toy(), folder / CONFIG / "out")

    yield Case("save under a file", "llada", under_a_file)
    yield Case("a name too long", "llada", lambda folder: sp.save(toys.toy(), folder / ("x" * 300)))


def arguments(bases: Bases) -> Iterator[Case]:
    """Of the Python verbs."""
    model, ids = bases.model, toys.tokens(2, 8, vocabulary=50)
    nan, inf = float("nan"), float("inf")

    def call(verb: Callable[..., object], *given: Any, **named: Any) -> Callable[[Path], object]:
        return lambda folder: verb(copy.deepcopy(model), *given, **named)

    for ratio in (-0.1, 1.5, nan, inf, "0.3", None, [0.3], 1.0):
        yield Case(f"plan(ratio={ratio!r})", "llada", call(sp.plan, criterion="magnitude", ratio=ratio))
    wrong: dict[str, tuple[Any, ...]] = {
        "criterion": ("", "no", 7, "random:x=1"),
        "unit": ("", "head", 7),
        "targets": ((), ("no",), "no", 7),
        "allocation": ("", "no", 7),
        "min_heads": (-1, 99, "1", 1.5),
        "round_heads": (0, -1, "2"),
        "max_layer_share": (-1, 2, nan, "1"),
        "fit": ("", "no", 7),
        "length": (0, -1, "x", 1.5),
        "target_speedup": (0, -1, nan, "2"),
        "channel_rule": ("no", 7),
        "seed": ("x", 1.5),
    }
    for name, values in wrong.items():
        for value in values:
            options = {"criterion": "random", "ratio": 0.4} | {name: value}
            yield Case(f"plan({name}={value!r})", "llada", call(sp.plan, **options))
    for name, values in {"mode": ("", "no", 7), "repair": ("no", 7)}.items():
        for value in values:
            rows = sp.calibrate(model, ids, levels=(0.5,), sequences=1, length=8)
            act = call(sp.apply, bases.plan, calibration=rows, **{name: value})
            yield Case(f"apply({name}={value!r})", "llada", act)
    shapes: dict[str, Any] = {
        "floats": ids.float(),
        "too large ids": ids + 1000,
        "negative ids": ids - 1000,
        "no tokens": ids[:, :0],
        "no rows": ids[:0],
        "one dimension": ids[0],
        "three": ids[None],
        "None": None,
        "a list of nothing": [],
        "text without a tokenizer": "text",
        "booleans": ids > 3,
    }
    for what, prompts in shapes.items():
        yield Case(f"denoise of {what}", "llada", call(_denoised, prompts, steps=2, gen_length=4))
        yield Case(f"profile of {what}", "llada", call(sp.profile, prompts, steps=2, gen_length=4))
    numbers: dict[str, tuple[Any, ...]] = {
        "steps": (0, -1, 1.5, "2", True, 10**9),
        "gen_length": (0, -4, 1.5, "4"),
        "block_length": (0, 3, -1, "2"),
        "temperature": (-1.0, nan, "1"),
        "top_p": (-1.0, 2.0, nan),
        "top_k": (0, -1, 1.5),
        "threshold": (-1.0, 2.0, nan),
        "cache": ("no", 7),
        "mask_token_id": (-1, 10**6, "60"),
        "algorithm": ("no", 7),
    }
    for name, values in numbers.items():
        for value in values:
            options = {"steps": 2, "gen_length": 4} | {name: value}
            yield Case(f"denoise({name}={value!r})", "llada", call(_denoised, ids, **options))
    for name, value in {"method": "no", "sparsity": 1.5, "pattern": "3:2"}.items():
        options = {"method": "magnitude", "sparsity": 0.5} | {name: value}
        yield Case(f"sparsify({name}={value!r})", "llada", call(sp.sparsify, **options))


def _denoised(model: torch.nn.Module, prompts: Any, **options: Any) -> object:
    return list(sp.denoise(model, prompts, **options))


def command_lines() -> Iterator[Case]:
    """Through ``main``: exit code 2 and one line."""
    lines = {
        "plan": (
            "--ratio 2",
            "--ratio nan",
            "--ratio x",
            "--criterion no",
            "--unit no",
            "--targets no",
            "--fit no",
            "--profile nothing",
            "--calibration nothing",
            "--min-heads -1",
            "--device no",
            "--roofs no",
            "--latency-table nothing --target-speedup 2",
            "--length 0",
            "--seed x",
            "--no-such-flag",
        ),
        "apply": ("--plan nothing", "--plan {base}/config.json", "--mode no --plan {base}/config.json"),
        "profile": (
            "--prompt x --steps 0",
            "--text nothing",
            "--text {base}/model.safetensors",
            "--prompt x --steps x",
        ),
        "export": ("--to no", "--to gguf --dtype no"),
        "eval": ("--text nothing", "--device cuda:99"),
        "generate": ("--prompt x --steps -1", "--prompt x --cache no", "--prompt x --temperature -1"),
    }
    for verb, endings in lines.items():
        for ending in endings:
            out = "" if verb in ("eval", "generate") else " --out {base}/out"
            for model in ("{base}", "nothing"):
                words = f"{verb} {model} {ending}{out}"
                yield Case(f"sinkprune {words}", "llada", partial(_command, words))


def _command(words: str, folder: Path) -> None:
    """Raises what the command line said, as a refusal; anything else is a fault."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main([*words.format(base=folder).split(), "--quiet"])
    except SystemExit as error:  # argparse: usage, then a line
        code = error.code
        said = io.StringIO(said.getvalue().splitlines()[-1])
    lines = said.getvalue().strip()
    if code == 2:
        raise ValueError(lines)
    if code != 0:
        raise RuntimeError(f"exit code {code}: {lines}")
