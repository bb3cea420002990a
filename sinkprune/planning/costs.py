"""Counted work of a denoising step, and the best speed-up that arithmetic allows for a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sinkprune.adapters import adapter_for
from sinkprune.plans import Geometry, all_layer_sizes, block_parameters

if TYPE_CHECKING:
    from sinkprune.planning.hardware import Roofs
    from sinkprune.plans import PrunePlan


def step_flops(geometry: Geometry, plan: PrunePlan | None, batch: int, length: int) -> int:
    """Floating-point operations of one forward: projections, attention core, MLP and LM head of every row.

    A multiply-add counts as two. Norms, RoPE and softmax are left out: they grow with the same sizes and are
    under 2 % of a block.
    """
    rows = batch * length
    total = 2 * rows * geometry.hidden * geometry.vocabulary
    for sizes in all_layer_sizes(geometry, plan):
        core = 4 * rows * length * sizes[0] * geometry.head_dim
        total += 2 * rows * block_parameters(geometry, *sizes) + core
    return total


@dataclass(frozen=True)
class Operation:
    """A matrix product, or an attention core: its FLOPs, and the elements it must read and write.

    ``shape`` of a product is ``(rows, columns, inner)``.
    """

    name: str
    flops: int
    elements: int
    shape: tuple[int, int, int] = (0, 0, 0)


def attention_operations(
    geometry: Geometry, heads: int, kv_heads: int, batch: int, length: int
) -> list[Operation]:
    """Fused query/key/value projection, attention core and output projection of one layer."""
    if not heads:
        return []
    rows, hidden, width = batch * length, geometry.hidden, heads * geometry.head_dim
    joint = (heads + 2 * kv_heads) * geometry.head_dim
    return [
        _product("qkv", rows, joint, hidden),
        Operation("core", 4 * rows * length * width, rows * (joint + width)),
        _product("out", rows, hidden, width),
    ]


def mlp_operations(geometry: Geometry, channels: int, batch: int, length: int) -> list[Operation]:
    """The products into the channels (gate and up fused, where there is a gate) and out of them."""
    if not channels:
        return []
    rows, hidden = batch * length, geometry.hidden
    return [
        _product("up", rows, (geometry.mlp_matrices - 1) * channels, hidden),
        _product("down", rows, hidden, channels),
    ]


def step_operations(
    geometry: Geometry, plan: PrunePlan | None, batch: int, length: int, head_rows: int | None = None
) -> list[Operation]:
    """The operations of one forward, whose FLOPs sum to ``step_flops`` when the LM head runs on every row.

    ``head_rows``: rows of each sequence that the LM head runs on; None = all. Norms, RoPE, SwiGLU and the
    embedding are left out: fused into their neighbours they move nothing of their own.
    """
    operations = []
    for heads, kv_heads, channels in all_layer_sizes(geometry, plan):
        operations += attention_operations(geometry, heads, kv_heads, batch, length)
        operations += mlp_operations(geometry, channels, batch, length)
    rows = batch * (length if head_rows is None else head_rows)
    return [*operations, _product("head", rows, geometry.vocabulary, geometry.hidden)]


def _product(name: str, rows: int, columns: int, inner: int) -> Operation:
    """``[rows, inner] @ [inner, columns]``: input and weight read once, output written once."""
    elements = rows * inner + inner * columns + rows * columns
    return Operation(name, 2 * rows * columns * inner, elements, (rows, columns, inner))


def step_seconds(
    geometry: Geometry,
    plan: PrunePlan | None,
    batch: int,
    length: int,
    roofs: Roofs,
    dtype: torch.dtype,
    head_rows: int | None = None,
) -> float:
    """The least time of one forward: the sum of each operation's arithmetic or traffic, the longer one."""
    return sum(
        roofs.seconds(operation.flops, operation.elements * dtype.itemsize, dtype)
        for operation in step_operations(geometry, plan, batch, length, head_rows)
    )


def ceiling(
    model: nn.Module | Geometry,
    plan: PrunePlan,
    batch: int = 1,
    length: int = 1024,
    roofs: Roofs | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """The most that ``plan`` can speed up a forward: its dense FLOPs over the plan's FLOPs.

    With ``roofs`` it is the ratio of the least times instead, from FLOPs and bytes: on few tokens a step
    waits for its weights, and what a plan saves is their traffic.

    Args:
        model: a live model, or its ``Geometry``.
        plan: what is removed.
        batch, length: sequences and tokens of the forward, both at least 1.
        roofs: of the device (``sinkprune.planning.hardware``), measured or from a data sheet.
        dtype: of weights and activations, which matters with ``roofs`` only; None = the model's (bfloat16
            for a ``Geometry``).

    Raises:
        ValueError: a plan for another geometry, sizes below 1, or roofs that do not cover the dtype.
    """
    geometry = model if isinstance(model, Geometry) else adapter_for(model).geometry()
    if plan.geometry != geometry:
        raise ValueError(f"the plan is for {plan.geometry}, the model is {geometry}")
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")
    if roofs is None:
        return step_flops(geometry, None, batch, length) / step_flops(geometry, plan, batch, length)
    dtype = dtype or dtype_of(model)
    dense, pruned = (step_seconds(geometry, p, batch, length, roofs, dtype) for p in (None, plan))
    return dense / pruned


def dtype_of(model: nn.Module | Geometry) -> torch.dtype:
    """The dtype of a model's weights; bfloat16 for a ``Geometry``, which has none."""
    return torch.bfloat16 if isinstance(model, Geometry) else next(model.parameters()).dtype


def ceilings(
    model: nn.Module | Geometry,
    plan: PrunePlan,
    batch: int,
    length: int,
    roofs: Roofs,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Both ceilings, JSON-ready. ``with_roofs`` is None where the roofs do not cover the dtype (None: the
    model's)."""
    dtype = dtype or dtype_of(model)
    known = str(dtype).removeprefix("torch.") in roofs.flops
    return {
        "batch": batch,
        "length": length,
        "arithmetic": ceiling(model, plan, batch, length),
        "with_roofs": ceiling(model, plan, batch, length, roofs, dtype) if known else None,
        "roofs": f"{roofs.device} ({roofs.source})",
    }


def ceilings_text(values: dict[str, Any]) -> str:
    """``ceilings`` as a sentence's end."""
    text = (
        f"at most {values['arithmetic']:.2f}x at {values['batch']} x {values['length']} tokens (arithmetic)"
    )
    if values["with_roofs"] is None:
        return text
    return f"{text}, {values['with_roofs']:.2f}x with the roofs of {values['roofs']}"
