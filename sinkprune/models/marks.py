"""What is noted on a model that was pruned, and how transformers' own verbs save it then.

The notes lie on models of anybody's class: they are read and written here alone.
"""

from __future__ import annotations

import copy
import importlib
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from sinkprune.plans import PrunePlan

VERBS = ("save_pretrained", "push_to_hub")


def mark(model: nn.Module, plan: PrunePlan | None, form: str) -> None:
    """Note on the model what was done to it; ``save_pretrained`` and ``push_to_hub``, where it has them,
    write what it is now, or refuse."""
    model.prune_plan, model.prune_form = plan, form  # type: ignore[assignment]
    for verb in VERBS:
        if hasattr(type(model), verb):
            vars(model).pop(verb, None)
            if form != "dense":
                setattr(model, verb, PrunedVerb(model, verb))


def plan_of(model: nn.Module) -> PrunePlan | None:
    """The plan that was applied to ``model``, or None."""
    return getattr(model, "prune_plan", None)


def form_of(model: nn.Module) -> str:
    """``"dense"``, ``"mask"`` or ``"compact"``."""
    return getattr(model, "prune_form", "dense")


def mark_sparsity(model: nn.Module, sparsity: Any) -> None:
    """Note how zeros came into the weights; None: they are dense."""
    model.sparsity = sparsity


def noted_sparsity(model: nn.Module) -> Any:
    """What ``mark_sparsity`` noted, or None."""
    return getattr(model, "sparsity", None)


def mark_source(model: nn.Module, folder: str | Path | None) -> None:
    """Note the folder that ``model`` was loaded from."""
    model.loaded_from = None if folder is None else str(folder)  # type: ignore[assignment]


def noted_source(model: nn.Module) -> str | None:
    """What ``mark_source`` noted, or None."""
    return getattr(model, "loaded_from", None)


class PrunedVerb:
    """A verb of transformers on one pruned model, whose config describes the dense one."""

    def __init__(self, model: nn.Module, verb: str) -> None:
        self._model, self._verb = weakref.ref(model), verb  # no circle: the weights go when the model goes

    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        # The one look upwards: saving is a floor above, and it is transformers that calls here.
        saving = importlib.import_module("sinkprune.checkpoints.pretrained")
        return getattr(saving, self._verb)(self._model(), *arguments, **keys)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedVerb:
        return PrunedVerb(copy.deepcopy(self._model(), memo), self._verb)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return PrunedVerb, (self._model(), self._verb)
