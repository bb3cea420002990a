"""A criterion scores heads: ``[layers, heads]``, higher = keep. One criterion is one file that registers
itself."""

from __future__ import annotations

import difflib
import json
from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar

import torch
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence


class HeadCriterion(ABC):
    """Subclass as a dataclass whose fields are the criterion's settings, and give it a ``name``."""

    name: ClassVar[str]
    needs_profile: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    streams: ClassVar[bool] = True  # asks for no more than one block's weights at a time

    @abstractmethod
    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        """Scores float32 ``[layers, most heads of a layer]``, higher = keep; entries past a layer's heads are
        ignored.

        ``evidence.profile`` and ``evidence.calibration`` are there where ``needs_profile`` and
        ``needs_calibration`` say so.
        """


def head_scores(adapter: Adapter, per_layer: list[Tensor]) -> Tensor:
    """Each layer's scores ``[its heads]`` as one float32 tensor ``[layers, most heads]``."""
    scores = torch.zeros(len(per_layer), max(adapter.geometry().heads))
    for layer, values in enumerate(per_layer):
        scores[layer, : len(values)] = values.detach().float().cpu()
    return scores


_CRITERIA: dict[str, type[HeadCriterion]] = {}


def register_criterion(criterion: type[HeadCriterion]) -> type[HeadCriterion]:
    """Class decorator: make a criterion known by its ``name``."""
    _CRITERIA[criterion.name] = criterion
    return criterion


def criterion_names() -> list[str]:
    return sorted(_CRITERIA)


def criterion_for(name: str | HeadCriterion) -> HeadCriterion:
    """The criterion called ``name``; settings may follow as in ``"sink_variance:gated=true"``.

    Raises ``ValueError`` listing the known criteria, or a criterion's settings.
    """
    if isinstance(name, HeadCriterion):
        return name
    name, _, settings = str(name).partition(":")
    if name not in _CRITERIA:
        near = difflib.get_close_matches(name, _CRITERIA, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown criterion {name!r}; known: {', '.join(criterion_names())}{hint}")
    criterion = _CRITERIA[name]
    known = {f.name for f in fields(criterion)}  # type: ignore[arg-type]
    chosen = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in known or not value:
            raise ValueError(
                f"criterion {name!r} takes {', '.join(sorted(known)) or 'no settings'}, got {setting!r}"
            )
        try:
            chosen[key] = json.loads(value)
        except json.JSONDecodeError:
            chosen[key] = value
    return criterion(**chosen)
