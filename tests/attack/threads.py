"""Eight threads, every verb: each thread gets what it gets alone."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import toys

import sinkprune as sp

THREADS = 8
ONE_TRACKER = "track"  # in what is said of a second tracker of one model


class Shared:
    """What all threads use at once: one dense model, rows, a plan; pruning works on a thread's own copy."""

    def __init__(self) -> None:
        self.model = toys.toy(n_kv_heads=2)
        self.untouched = copy.deepcopy(self.model)  # a copy of a model that is tracked has its hooks
        ids = toys.tokens(8, 12, vocabulary=50)
        self.rows = sp.calibrate(self.model, ids, levels=(0.3, 0.7), sequences=4, length=12)
        self.plan = sp.plan(self.model, criterion="magnitude", ratio=0.4)
        self.prompts = toys.tokens(2, 6, vocabulary=50)

    def verbs(self) -> dict[str, Callable[[int], Any]]:
        """By name, of a seed."""
        return {
            "profile": lambda seed: (
                sp.profile(self.model, self.prompts, steps=2, gen_length=4, seed=seed).statistics
            ),
            "plan": lambda seed: sp.plan(self.model, calibration=self.rows, ratio=0.4, seed=seed).to_dict(),
            "apply": lambda seed: self._pruned().state_dict(),
            "apply, masked": lambda seed: self._logits(
                sp.apply(copy.deepcopy(self.untouched), self.plan, mode="mask")
            ),
            "save, load": self._round,
            "denoise": lambda seed: list(
                sp.denoise(self.model, self.prompts, steps=2, gen_length=4, seed=seed)
            )[-1],
            "evaluate": lambda seed: sp.evaluate(self.model, toys.tokens(4, 12, vocabulary=50), seed=seed),
            "sparsify": lambda seed: sp.sparsify(
                copy.deepcopy(self.untouched), "magnitude", 0.5
            ).state_dict(),
            "export": self._export,
            "ceiling": lambda seed: sp.ceiling(self.model, self.plan, batch=1, length=16),
        }

    def _pruned(self) -> torch.nn.Module:
        return sp.apply(copy.deepcopy(self.untouched), self.plan, calibration=self.rows)

    @torch.no_grad()
    def _logits(self, model: torch.nn.Module) -> torch.Tensor:
        return model(toys.tokens(2, 12, vocabulary=50)).logits

    def _round(self, seed: int) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return self._logits(sp.load(sp.save(self._pruned(), Path(folder) / "m"))[0])

    def _export(self, seed: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return Path(sp.export(self._pruned(), Path(folder) / "m.gguf", to="gguf")).read_bytes()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return same(vars(a), vars(b)) if hasattr(a, "__dict__") else bool(a == b)


def attack(rounds: int) -> tuple[dict[str, int], list[str]]:
    """Every verb ``rounds`` times in each of eight threads at once, the threads at different verbs.

    Returns:
        How many calls gave a result, and how many were refused since another thread was tracking the model;
        and what went wrong.
    """
    shared = Shared()
    verbs = shared.verbs()
    before = {name: tensor.clone() for name, tensor in shared.model.state_dict().items()}
    alone = {(name, seed): verb(seed) for name, verb in verbs.items() for seed in range(2)}
    faults: list[str] = []
    refused: list[str] = []

    def run(thread: int) -> int:
        calls = 0
        for turn in range(rounds * len(verbs)):
            name = list(verbs)[(turn + thread) % len(verbs)]
            seed = (turn + thread) % 2
            try:
                if not same(verbs[name](seed), alone[name, seed]):
                    faults.append(f"{name}: another result than alone")
            except Exception as error:
                if ONE_TRACKER in str(error):
                    refused.append(name)
                    continue
                faults.append(f"{name}: {type(error).__name__}: {error}")
            calls += 1
        return calls

    with ThreadPoolExecutor(THREADS) as pool:
        calls = sum(pool.map(run, range(THREADS)))
    if not same(dict(shared.model.state_dict()), before):
        faults.append("the shared model changed")
    return {"results": calls, "refused, of one model that another thread tracks": len(refused)}, faults
