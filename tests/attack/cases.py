"""What an attack's case is, what the cases damage, and how a case is judged."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import block_causals
import dreams
import hf
import toys
from forked import Outcome, acted, attempt

import sinkprune as sp
from sinkprune.planning.latency_table import computed_table

MANIFEST, CONFIG, WEIGHTS = "sinkprune.json", "config.json", "model.safetensors"


@dataclass
class Case:
    """``act`` gets a folder of its own, a copy of ``base``'s; ``expected`` is an ``Outcome.kind``."""

    name: str
    base: str
    act: Callable[[Path], object]
    expected: str = "refused"


class Bases:
    """What the cases damage, made once under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = toys.toy(n_kv_heads=2)
        self.plan = sp.plan(self.model, criterion="magnitude", ratio=0.4)
        made = {
            "llada": self.model,
            "dream": dreams.toy_dream(),
            "sdar": block_causals.toy_sdar(),
            "llada2": block_causals.toy_llada2(),
            "qwen3": hf.build("qwen3"),
        }
        for name, model in made.items():
            folder = sp.save(model, root / name)
            for file in (MANIFEST, "README.md"):  # as published
                (folder / file).unlink()
        sp.save(sp.apply(copy.deepcopy(self.model), self.plan), root / "compact")
        sp.save(self.model, root / "dense")
        shards = sp.save(self.model, root / "shards", shard_bytes=20_000)
        (shards / MANIFEST).unlink()
        files = root / "files"
        files.mkdir()
        self.plan.save(files / "plan.json")
        prompts = toys.tokens(2, 6, vocabulary=50)
        sp.profile(self.model, prompts, steps=4, gen_length=8).save(files / "profile.safetensors")
        computed_table(self.model, sp.roofs("H100"), [16, 32]).save(files / "table.json")
        sp.export(self.model, files / "model.gguf", to="gguf")


def after(
    change: Callable[[Path], object], read: Callable[[Path], object] = sp.load
) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        change(folder)
        return read(folder)

    return act


def judge(case: Case, bases: Bases, *, forked: bool = True) -> str | None:
    """What is wrong with the outcome of ``case``; None where it is as expected."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "case"
        shutil.copytree(bases.root / case.base, folder)
        run = partial(attempt, apart=scratch) if forked else acted
        outcome: Outcome = run(partial(case.act, folder))
        left = [path.name for path in folder.rglob(".*.part")]
        written = (folder / "out").is_dir() and not (folder / "out").is_symlink()
        written = written and (folder / "out" / CONFIG).exists()
    if outcome.kind != case.expected:
        return f"{outcome.kind}: {outcome.said}"
    if left or (written and case.expected == "refused"):
        return f"left behind: {left or 'out'}"
    return None
