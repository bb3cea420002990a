"""Native models larger than memory: laid out on ``meta``, with the parameters of one block at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[list[str]], Mapping[str, Tensor]]


class Stream:
    """Reads a block's parameters when the block is reached, and lets those of the one before go.

    A block is reached by its forward, or by an adapter that reads its weights. What is held (``holding``)
    stays, changes and all, while others come and go; what is finished is never read again.

    Args:
        model: laid out on ``meta``, but for the embedding and the last norm.
        blocks: its transformer blocks.
        names: of the model's parameters that each block has, by the names in the block.
        read: gives the tensors of these names, in memory of their own on ``device``.
        folder: where evidence is put that is too large to be kept, and what a run goes on from.
        progress: told what was done to which block.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        names: list[dict[str, str]],
        read: Read,
        folder: Path,
        progress: Callable[[str, int], None] = lambda what, layer: None,
    ) -> None:
        self.blocks, self.read, self.folder, self.progress = blocks, read, folder, progress
        self._names, self._present, self._held = names, set[int](), set[int]()
        self._finished = set[int]()
        model.__dict__["stream"] = self  # no submodule, and not copied with the state
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda module, args, index=index: self.reach(index))

    def reach(self, layer: int) -> None:
        """Have the parameters of block ``layer``, and of no other one that is not held."""
        if layer in self._present or layer in self._finished:
            return
        for other in self._present - self._held:
            self._let_go(other)
        _trim()
        own = self._names[layer]
        tensors = self.read(list(own.values()))
        self.blocks[layer].load_state_dict(
            {inside: tensors[name] for inside, name in own.items()}, assign=True
        )
        self._present.add(layer)

    @contextmanager
    def holding(self, layer: int) -> Iterator[None]:
        """Keep block ``layer`` as it is made here until the end."""
        self.reach(layer)
        self._held.add(layer)
        try:
            yield
        finally:
            self._held.discard(layer)

    def finish(self, layer: int) -> None:
        """Let block ``layer`` go for good."""
        self._held.discard(layer)
        self._finished.add(layer)
        self._let_go(layer)

    def _let_go(self, layer: int) -> None:
        self._present.discard(layer)
        for module in self.blocks[layer].modules():
            for name, parameter in module.named_parameters(recurse=False):
                away = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                setattr(module, name, away)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="meta"))


def _trim() -> None:
    """Give freed memory back to the system, where the C library can: it keeps blocks' worth of it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def stream_of(model: Any) -> Stream | None:
    """The stream that reads ``model``'s blocks, or None where they are all there."""
    found = getattr(model, "__dict__", {}).get("stream")
    return found if isinstance(found, Stream) else None
