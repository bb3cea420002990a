"""What a layer's linear modules see of the calibration rows: norms or Hessians of their inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Statistic(ABC):
    """Over inputs ``[rows, L, columns]`` in float32, of which some positions may weigh less."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.last: Tensor | None = None  # the input added last: modules that share it share this statistic

    @abstractmethod
    def add(self, x: Tensor) -> None: ...


class Norms(Statistic):
    """Wanda's: the root mean over rows of the squared norm of each input, ``[columns]``."""

    def __init__(self, columns: int, device: torch.device) -> None:
        super().__init__(columns, device)
        self._squares, self._rows = torch.zeros(columns, device=device), 0

    def add(self, x: Tensor) -> None:
        self._squares += x.square().sum((0, 1))
        self._rows += x.shape[0]

    @property
    def value(self) -> Tensor:
        return (self._squares / self._rows).sqrt()


class SummedNorms(Statistic):
    """The sink method's: the sum over rows of the norm of each input, ``[columns]``."""

    def __init__(self, columns: int, device: torch.device) -> None:
        super().__init__(columns, device)
        self.value = torch.zeros(columns, device=device)

    def add(self, x: Tensor) -> None:
        self.value += x.square().sum(1).sqrt().sum(0)


class Hessian(Statistic):
    """SparseGPT's: 2 / rows times the sum of the inputs' outer products, ``[columns, columns]``."""

    def __init__(self, columns: int, device: torch.device) -> None:
        super().__init__(columns, device)
        self._sum, self._rows = torch.zeros(columns, columns, device=device), 0

    def add(self, x: Tensor) -> None:
        flat = x.flatten(0, 1)
        self._sum.addmm_(flat.T, flat)
        self._rows += x.shape[0]

    @property
    def value(self) -> Tensor:
        return self._sum * (2 / self._rows)


@contextmanager
def gathering(
    block: nn.Module,
    linears: dict[str, nn.Module],
    kind: Callable[[int, torch.device], Statistic],
    weights: list[Tensor],
) -> Iterator[dict[str, Statistic]]:
    """While ``block`` runs on the calibration's batches, one after the other: a statistic of each linear
    module's inputs, by role. Modules with the same input share theirs.

    Args:
        block, linears: of one layer.
        kind: makes a statistic of so many columns.
        weights: of every batch, what its positions weigh: float32 ``[rows, L]``, 0 at padding.
    """
    found: dict[str, Statistic] = {}
    batch = -1

    def next_batch(*_: Any) -> None:
        nonlocal batch
        batch += 1

    def look(role: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        if role not in found:
            shared = next((s for s in found.values() if s.last is x), None)
            found[role] = shared or kind(x.shape[-1], x.device)
        statistic = found[role]
        if statistic.last is x:
            return
        statistic.last = x
        weight = weights[batch].to(x.device)
        if x.shape[:-1].numel() != weight.numel():
            raise ValueError(
                f"the {role} module sees {x.shape[:-1].numel()} positions of {weight.numel()}: its inputs "
                "can't be told apart"
            )
        statistic.add(x.detach().view(*weight.shape, -1).float() * weight[..., None])

    hooks = [block.register_forward_pre_hook(next_batch)]
    for role, module in linears.items():
        hooks.append(module.register_forward_pre_hook(lambda m, i, role=role: look(role, m, i)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for statistic in found.values():
            statistic.last = None
