"""A criterion scores heads: ``[layers, heads]``, higher = keep. One criterion is one file that registers
itself."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from sinkprune.adapters import Adapter

if TYPE_CHECKING:
    from sinkprune.profiling import SinkProfile


class HeadCriterion(ABC):
    """Subclass as a dataclass whose fields are the criterion's settings, and give it a ``name``."""

    name: ClassVar[str]
    needs_profile: ClassVar[bool] = False

    @abstractmethod
    def score(self, adapter: Adapter, profile: SinkProfile | None, seed: int) -> Tensor:
        """Scores float32 ``[layers, most heads of a layer]``, higher = keep; entries past a layer's heads are
        ignored.

        ``profile`` is there where ``needs_profile`` says so; ``seed`` is for criteria that draw.
        """


_CRITERIA: dict[str, type[HeadCriterion]] = {}


def register_criterion(criterion: type[HeadCriterion]) -> type[HeadCriterion]:
    """Class decorator: make a criterion known by its ``name``."""
    _CRITERIA[criterion.name] = criterion
    return criterion


def criterion_names() -> list[str]:
    return sorted(_CRITERIA)


def criterion_for(name: str | HeadCriterion) -> HeadCriterion:
    """The criterion called ``name`` with its defaults. Raises ``ValueError`` listing the known ones."""
    if isinstance(name, HeadCriterion):
        return name
    if name not in _CRITERIA:
        near = difflib.get_close_matches(str(name), _CRITERIA, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown criterion {name!r}; known: {', '.join(criterion_names())}{hint}")
    return _CRITERIA[name]()
