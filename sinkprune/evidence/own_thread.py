"""Hooks that see the forwards of one thread only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def own_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook`` for the calls of the thread that asks for it; in others', which share the model, it does
    nothing."""
    thread = threading.get_ident()

    def only(*args: Any, **keywords: Any) -> Any:
        return hook(*args, **keywords) if threading.get_ident() == thread else None

    return only
