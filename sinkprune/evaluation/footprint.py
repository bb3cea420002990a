"""Peak memory of generation, computed from sizes: weights, cache, what a block needs at once, logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinkprune.adapters import adapter_for
from sinkprune.generation.samplers import FLOAT64_ELEMENTS
from sinkprune.models.caches import Cache
from sinkprune.models.marks import form_of, plan_of
from sinkprune.planning.costs import dtype_of
from sinkprune.plans import (
    Geometry,
    PrunePlan,
    all_layer_sizes,
    block_parameters,
    layer_sizes,
    model_block_parameters,
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one generation. A block's activations and the logits are never alive together.

    Attributes:
        weights: all parameters.
        cache: keys and values held between steps.
        activations: of the block that needs most, residual stream included.
        logits: of the LM head's rows.
        sampling: what the LM head reads, and what the sampler makes of the logits.
    """

    weights: int
    cache: int
    activations: int
    logits: int
    sampling: int

    @property
    def peak(self) -> int:
        return self.weights + self.cache + max(self.activations, self.logits + self.sampling)


def memory(
    model: nn.Module | Geometry,
    plan: PrunePlan | None = None,
    batch: int = 1,
    length: int = 1024,
    dtype: torch.dtype | None = None,
    *,
    head_rows: int | None = None,
    cached: int = 0,
) -> Memory:
    """Peak bytes of denoising ``[batch, length]`` tokens with a native model, dense or under ``plan``.

    Counted operation by operation for the native LLaDA and Dream (RoPE and norms in float32 beside the
    model's dtype); workspaces of libraries and the allocator's slack come on top. Under classifier-free
    guidance pass twice the batch.

    Args:
        model: a live model as it is, or a ``Geometry`` (weights then without biases, embeddings untied).
        plan: what is removed from a dense model; None = nothing, or what a pruned model lacks already.
        dtype: of weights and activations; None = the model's (bfloat16 for a ``Geometry``).
        head_rows: rows of each sequence that the LM head runs on, the sampler's block; None = all.
        cached: tokens of each sequence whose keys and values a cache holds.

    Raises:
        ValueError: a plan for another geometry, or sizes below 1.
    """
    geometry = model if isinstance(model, Geometry) else adapter_for(model).geometry()
    held = None if isinstance(model, Geometry) else plan_of(model)
    compact = plan is not None or (not isinstance(model, Geometry) and form_of(model) == "compact")
    if plan is not None and (plan.geometry != geometry or held is not None):
        raise ValueError("the plan is for another geometry, or the model is pruned already: pass plan=None")
    rows_of_head = length if head_rows is None else head_rows
    if min(batch, length, rows_of_head) < 1 or cached < 0:
        raise ValueError(
            f"batch, length and head_rows must be at least 1, got {batch}, {length} and {rows_of_head}"
        )
    dtype = dtype_of(model) if dtype is None else dtype
    size = dtype.itemsize
    sizes = all_layer_sizes(geometry, plan if plan is not None else held if compact else None)
    cache = 2 * size * batch * cached * geometry.head_dim * sum(kv_heads for _, kv_heads, _ in sizes)
    rows = batch * length
    return Memory(
        _weights(model, geometry, plan, size),
        cache,
        max(_block_bytes(geometry, *layer, rows, size, compact) for layer in sizes)
        + 8 * length * geometry.head_dim,  # the rotary table
        size * batch * rows_of_head * geometry.vocabulary,
        _sampling_bytes(geometry, batch * rows_of_head, rows, size),
    )


def longest(
    model: nn.Module | Geometry,
    available: int,
    plan: PrunePlan | None = None,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    *,
    head_rows: int | None = None,
    cached: bool = False,
) -> int:
    """The most tokens of a sequence whose generation fits into ``available`` bytes; 0 where none does.

    The model's context is not looked at. ``cached``: a cache holds every token.
    """

    def fits(length: int) -> bool:
        rows = None if head_rows is None else min(head_rows, length)
        held = length if cached else 0
        return memory(model, plan, batch, length, dtype, head_rows=rows, cached=held).peak <= available

    least, most = 0, 1
    while fits(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def check_fits(needed: Memory, device: torch.device | str, fitting: int, what: str) -> None:
    """Raise ``ValueError``, before anything is loaded, where a GPU has less free memory than ``needed``.

    ``fitting`` is the length that would fit (0: none), ``what`` names the model. CPUs are not checked.
    """
    where = torch.device(device)
    if where.type != "cuda":
        return
    free = torch.cuda.mem_get_info(where)[0]
    if needed.peak > free:
        advice = f"{fitting} tokens would fit" if fitting else f"its weights alone take {_gb(needed.weights)}"
        raise ValueError(f"{what} needs {_gb(needed.peak)}, {device} has {_gb(free)} free: {advice}")


def counted_peak(call: Callable[[], object]) -> int:
    """The most bytes of new tensors that are alive at once while ``call`` runs, counted at every operation.

    Works on any device; what an operation allocates for itself while it runs is not seen.
    """
    with _LiveBytes() as live, torch.no_grad():
        call()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations bring about until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given:  # neither a view nor in place
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _weights(model: nn.Module | Geometry, geometry: Geometry, plan: PrunePlan | None, size: int) -> int:
    """Bytes of all parameters under ``plan``."""
    removed = 0
    if plan is not None:
        removed = model_block_parameters(geometry) - model_block_parameters(geometry, plan)
    if isinstance(model, Geometry):
        blocks = sum(block_parameters(geometry, *layer) for layer in all_layer_sizes(geometry, None))
        outside = geometry.hidden * (2 * geometry.vocabulary + 2 * geometry.num_layers + 1)
        return size * (blocks + outside - removed)
    return size * (sum(parameter.numel() for parameter in model.parameters()) - removed)


def _block_bytes(
    geometry: Geometry, heads: int, kv_heads: int, channels: int, rows: int, size: int, compact: bool
) -> int:
    """Bytes alive at the fullest moment of a block: in RoPE, in attention, in the MLP or in a norm."""
    d, n, m = geometry.hidden, heads * geometry.head_dim, kv_heads * geometry.head_dim
    # RoPE in float32: the input (a copy unless it is float32), two products and their sum.
    turning = (4 if size < 4 else 3) * max(4, size)
    projected = 2 * d + n + 2 * m  # residual stream, normed input, query, key, value
    turned = max(turning * n, n * size + turning * m)
    attended = n + m + n + d if compact else max(n + m + n, n + d)
    attention = projected * size + max(turned, size * attended)
    # Two residual streams (the caller still holds the block's input) and the normed one.
    up = (3 if compact else 2) * channels if geometry.mlp_matrices == 3 else channels
    mlp = size * (3 * d + up + channels)
    norm = 2 * d * size + (8 * d if size < 4 else size * d)
    return rows * max(attention, mlp, norm)


def _sampling_bytes(geometry: Geometry, head_rows: int, rows: int, size: int) -> int:
    """Final hidden states, and the sampler's float64 logits, noise and sums of both, some rows at a time."""
    part = min(head_rows * geometry.vocabulary, max(FLOAT64_ELEMENTS, geometry.vocabulary))
    return rows * geometry.hidden * size + 4 * 8 * part


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


class CacheSize(NamedTuple):
    """Bytes of keys and values: of the model as it is, and of the dense one."""

    bytes: int
    dense: int

    @property
    def saved(self) -> int:
        return self.dense - self.bytes


def cache_size(model: nn.Module, tokens: int, batch: int = 1) -> CacheSize:
    """What a cache of ``tokens`` tokens of ``batch`` sequences takes in the model's dtype.

    A compact layer caches the key/value heads that its kept heads read; a masked one still caches all.
    """
    adapter = adapter_for(model)
    geometry = adapter.geometry()
    plan = plan_of(model) if adapter.form == "compact" else None
    each = 2 * batch * tokens * geometry.head_dim * dtype_of(model).itemsize
    kept = [
        layer_sizes(geometry, layer, None if plan is None else plan.layers[layer])[1]
        for layer in range(geometry.num_layers)
    ]
    return CacheSize(each * sum(kept), each * sum(geometry.kv_heads))


def saved_bytes(model: nn.Module, cache: Cache) -> int:
    """How much more the keys and values that ``cache`` holds of ``model`` would be of the dense model."""
    return cache_size(model, cache.tokens, cache.batch).saved
