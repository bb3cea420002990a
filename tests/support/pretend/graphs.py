"""CUDA graphs of the pretend device: what a capture ran is run again, on the addresses of then."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from pretend.memory import memory

_pools = itertools.count(1)
_members: dict[Any, list[weakref.ref[CUDAGraph]]] = {}
capturing: CUDAGraph | None = None


class _Address:
    """A tensor of outside the capture: a graph knows where it lay, and does not keep it."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.size = tensor.dtype, tensor.size()
        self.stride, self.offset = tensor.stride(), tensor.storage_offset()

    def tensor(self, who: str) -> Tensor:
        if self.storage.expired():
            raise RuntimeError(
                f"CUDA error: an illegal memory access was encountered: {who}, replayed, reads a tensor "
                f"{tuple(self.size)} of {self.dtype} that was freed after the capture"
            )
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class CUDAGraph:
    """As ``torch.cuda.CUDAGraph``: ``replay`` runs what `graph` recorded, over its own and outside memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._calls: list[tuple[str, Callable[..., Any], Any, Any]] = []
        self._own: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._recorded = False
        self._order, self._pool = 0, None

    def protect(self, arguments: Any) -> None:
        """A capture runs nothing: note what outside memory held before a call that may write to it."""
        for x in tree_leaves(arguments):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._own and storage._cdata not in self._before:
                    self._before[storage._cdata] = storage, storage.clone()

    def finish(self, succeeded: bool) -> None:
        """Outside memory is as it was before the capture, and what the graph made holds nothing yet."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()
        for storage in self._own.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)  # NaN, or -1
        self._recorded = succeeded

    def record(self, name: str, run: Callable[..., Any], arguments: Any, result: Any) -> None:
        """Note a call on CPU tensors; ``result`` is what it returned, the place of all later results."""

        def keep(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x if x.untyped_storage()._cdata in self._own else _Address(x)

        noted = tree_map(keep, arguments)
        read = {x.untyped_storage()._cdata for x in tree_leaves(arguments) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in read:
                self._own[x.untyped_storage()._cdata] = x.untyped_storage()
        fresh = tree_map(
            lambda x: x if isinstance(x, Tensor) and x.untyped_storage()._cdata not in read else None,
            result,
        )
        self._calls.append((name, run, noted, fresh))

    def replay(self) -> None:
        if not self._recorded:
            raise RuntimeError("called CUDAGraph.replay without a preceding successful capture")
        if capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (a replay)")
        with _disable_current_modes(), torch.inference_mode():
            self._spoil_later_ones()
            for name, run, noted, fresh in self._calls:
                args, kwargs = tree_map(
                    lambda x, who=name: x.tensor(who) if isinstance(x, _Address) else x, noted
                )
                result = run(*args, **kwargs)
                for place, value in zip(tree_leaves(fresh), tree_leaves(result), strict=True):
                    if isinstance(place, Tensor):
                        place.copy_(value)

    def _spoil_later_ones(self) -> None:
        """Graphs of one pool share it: what a later one left may lie where this one computes."""
        for member in _members.get(self._pool, []):
            other = member()
            if other is not None and other._order > self._order:
                for *_, fresh in other._calls:
                    for x in tree_leaves(fresh):
                        if isinstance(x, Tensor) and x.is_floating_point():
                            x.fill_(torch.nan)

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def pool(self) -> Any:
        return self._pool


class graph:
    """As ``torch.cuda.graph``: what runs inside goes into the graph."""

    def __init__(self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, **options: Any) -> None:
        self.graph = cuda_graph
        cuda_graph._pool = graph_pool_handle() if pool is None else pool

    def __enter__(self) -> None:
        global capturing
        if capturing is not None:
            raise RuntimeError("CUDA error: a capture is under way already")
        gc.collect()
        capturing = self.graph
        memory.begin_capture(self.graph._pool)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        global capturing
        capturing = None
        memory.end_capture(self.graph)
        with _disable_current_modes(), torch.inference_mode():
            self.graph.finish(kind is None)
        members = _members.setdefault(self.graph._pool, [])
        self.graph._order = len(members)
        members.append(weakref.ref(self.graph))


def graph_pool_handle() -> tuple[int, int]:
    return (0, next(_pools))
