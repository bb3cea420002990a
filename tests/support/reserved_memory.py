"""Tensors larger than memory: address space is reserved, and only the pages that are touched come to
exist."""

from __future__ import annotations

import mmap

import torch


def reserve(elements: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A one-dimensional tensor over reserved address space: zeros, mapped as long as the tensor lives. On a
    GPU it is ordinary memory, of any values."""
    if torch.device(device).type != "cpu":
        return torch.empty(elements, dtype=dtype, device=device)
    size = torch.empty((), dtype=dtype).element_size()
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on; this is Linux's value
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, elements * size, flags=flags), dtype=dtype)
