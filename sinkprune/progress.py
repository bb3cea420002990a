"""Bars with the time left, for whoever asked for them: the command line on a terminal, ``progress=True``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def shown(asked: bool) -> Iterator[None]:
    """Whether long work shows bars on standard error within, in this thread."""
    before = _SHOWN.set(asked)
    try:
        yield
    finally:
        _SHOWN.reset(before)


def bar(
    what: str, unit: str, items: Iterable[Any] | None = None, *, total: int | None = None, asked: bool = False
) -> Any:
    """A ``tqdm`` over ``items``, or of ``total`` to ``update``; silent unless ``asked`` or ``shown``."""
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=unit, total=total, disable=not (asked or _SHOWN.get()))
