"""The pretend device's memory: bytes held by tensors that are alive, their peak, and what graphs reserve."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch

TOTAL = 85_000_000_000


class Memory:
    """Counts each storage once while any device tensor over it lives; a graph's pool keeps its peak."""

    def __init__(self) -> None:
        self.total = TOTAL
        self.allocated = self.peak = self.reserved_peak = 0
        self._references: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._pools: dict[Any, int] = {}  # bytes of each pool that its graphs' temporaries need
        self._capturing: tuple[Any, int, int] | None = None

    @property
    def reserved(self) -> int:
        """Bytes taken from the device: of tensors that live, and of pools of graphs."""
        return self.allocated + sum(self._pools.values())

    def watch(self, tensor: Any, storage: torch.UntypedStorage) -> None:
        """Count ``storage`` as long as ``tensor`` lives. Raises ``OutOfMemoryError`` where it has no room."""
        key = storage._cdata
        if not self._references[key]:
            self._sizes[key] = size = storage.nbytes()
            if self.reserved + size > self.total:
                del self._references[key], self._sizes[key]
                free = self.total - self.reserved
                raise torch.cuda.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes, {free} are free"
                )
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            self.reserved_peak = max(self.reserved_peak, self.reserved)
        self._references[key] += 1
        name = id(tensor)
        self._watched[name] = weakref.ref(tensor, lambda _: self._release(name, key))

    def _release(self, name: int, key: int) -> None:
        del self._watched[name]
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self.allocated -= self._sizes.pop(key)

    def begin_capture(self, pool: Any) -> None:
        self._capturing = (pool, self.allocated, self.peak)
        self.peak = self.allocated

    def end_capture(self, graph: Any) -> None:
        """What the capture needed beside what it left alive stays reserved, until its last graph goes."""
        assert self._capturing is not None
        pool, _, before = self._capturing
        temporaries = self.peak - self.allocated
        self._pools[pool] = max(self._pools.get(pool, 0), temporaries)
        self.peak, self._capturing = max(before, self.peak), None
        self.reserved_peak = max(self.reserved_peak, self.reserved)
        _USERS[pool] += 1
        weakref.finalize(graph, self._leave, pool).atexit = False

    def _leave(self, pool: Any) -> None:
        _USERS[pool] -= 1
        if not _USERS[pool]:
            self._pools.pop(pool, None)

    def reset_peak(self) -> None:
        self.peak, self.reserved_peak = self.allocated, self.reserved


_USERS: Counter[Any] = Counter()
memory = Memory()
