"""``sparsify``: weights to zero, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.evidence.calibration import BlockStream, Calibration, linear
from sinkprune.evidence.sink_mask import SinkMask, sink_masks
from sinkprune.models.marks import mark_sparsity, noted_sparsity
from sinkprune.progress import bar
from sinkprune.pruning.sparsification.methods import (
    DAMPING,
    Target,
    invert,
    prune_magnitude,
    prune_sparsegpt,
    prune_wanda,
)
from sinkprune.pruning.sparsification.note import Sparsity, sparsity_of
from sinkprune.pruning.sparsification.statistics import Hessian, Norms, Statistic, SummedNorms, gathering

METHODS = ("magnitude", "wanda", "sparsegpt", "sink_wanda", "sink_sparsegpt")
SPARSE_ALREADY = 0.1  # share of exact zeros in one matrix


@torch.no_grad()
def sparsify(
    model: nn.Module,
    method: str = "sparsegpt",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    calibration: Calibration | None = None,
    *,
    sink_mask: SinkMask | None = None,
    batch: int = 16,
    progress: Callable[[str], object] | None = None,
) -> nn.Module:
    """Set a share of the weights of every block's linear layers to 0, in place, and return the model.

    Layer by layer: a layer's inputs come from the layers before it as they are pruned, and statistics are
    held for one layer at a time. Embeddings, norms, biases and the LM head stay as they are.

    * ``magnitude``: the smallest ``|W|`` of each matrix; needs no calibration.
    * ``wanda``: the smallest ``|W| * ||X||`` of each row (arXiv 2306.11695).
    * ``sparsegpt``: by the inverse Hessian in blocks of 128 columns, updating the weights that stay; 1 %
      damping (arXiv 2301.00774).
    * ``sink_wanda``, ``sink_sparsegpt``: the same with every position of X multiplied by 1 - its ``SinkMask``
      (arXiv 2602.17664). ``sink_wanda`` sums a norm of every row where ``wanda`` takes the norm over all
      rows, as the public code does.

    Against that public code: it prunes nothing before it has gathered ``sink_wanda``'s norms of all layers,
    and gathers ``sink_sparsegpt``'s Hessian (and those of ``wanda`` and ``sparsegpt``) on text without
    masks; here every method sees the same masked rows, layer after layer, so that methods differ in nothing
    else. Its pattern is ignored by ``sink_wanda``; here no method ignores it. The sink masks are taken from
    the dense model once, one per row, summed over layers, as there; there is no variance over steps in them.

    Args:
        model: of a known family in its dense form.
        method: one of ``METHODS``.
        sparsity: share of zeros, in (0, 1).
        pattern: ``"unstructured"``, or ``"2:4"`` or ``"4:8"``: so many zeros in every 4 or 8 inputs.
        calibration: from ``calibrate(model, text, levels=TEN_LEVELS)`` or ``trajectories(model, prompts)``.
        sink_mask: the constants of the sink methods' mask.
        batch: rows per forward.
        progress: called with a line after each layer.

    Memory: the linear layers' weights once more until the end, from which a failure restores them; the
    calibration's hidden states; the Hessians or norms of one layer.

    Raises:
        ValueError: an argument out of range, a pattern that does not divide a layer's width, too few
            calibration tokens for a Hessian, or a model that is masked, compact, sparse already, compiled,
            sharded or quantised, or whose layers share weights. The model is as it was.
    """
    target = Target.of(sparsity, pattern)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    adapter = adapter_for(model)
    linears = _check(adapter, target, pattern)
    if method != "magnitude":
        _check_calibration(calibration, method, linears)
    originals = [(module, module.weight.detach().clone()) for layer in linears for module in layer.values()]
    report = progress or (lambda line: None)
    solves: dict[str, dict[str, Any]] = {}
    try:
        if method == "magnitude" or calibration is None:
            for module, weight in originals:
                module.weight.copy_(prune_magnitude(weight.float(), target))
        else:
            rule = (sink_mask or SinkMask()) if method.startswith("sink_") else None
            weights = _position_weights(adapter, calibration, rule, batch)
            stream = BlockStream(adapter, calibration, batch)
            for layer, modules in enumerate(bar("pruning weights", "layer", linears)):
                solves |= _prune_layer(adapter, stream, layer, modules, method, target, weights)
                stream.advance(layer)
                report(f"layer {layer + 1} of {len(linears)}")
    except BaseException:
        for module, weight in originals:
            module.weight.copy_(weight)
        raise
    mark_sparsity(model, Sparsity(method, sparsity, pattern, solves))
    return model


def _prune_layer(
    adapter: Adapter,
    stream: BlockStream,
    layer: int,
    modules: dict[str, nn.Linear],
    method: str,
    target: Target,
    weights: list[Tensor],
) -> dict[str, dict[str, Any]]:
    """Gather one layer's statistics, prune its matrices, and say which Hessians needed more than usual."""
    hessian = method.endswith("sparsegpt")
    kind: type[Statistic] = Hessian if hessian else SummedNorms if method == "sink_wanda" else Norms
    block = adapter.blocks()[layer]
    with gathering(block, dict(modules), kind, weights) as found:
        stream.visit(layer, list(modules.values())[-1], lambda x: None)  # the last module called
    unseen = sorted(set(modules) - set(found))
    if unseen:
        raise ValueError(f"layer {layer} never called its linear module {unseen[0]!r}")
    solves = {}
    inverses: dict[int, Any] = {}
    for role, module in modules.items():
        statistic: Any = found[role]
        if not hessian:
            module.weight.copy_(prune_wanda(module.weight.float(), statistic.value, target))
            continue
        if id(statistic) not in inverses:
            inverses[id(statistic)] = (invert(statistic.value), statistic.value.diagonal() == 0)
        solve, dead = inverses[id(statistic)]
        weight = module.weight.to(solve.dtype).masked_fill(dead, 0)  # inputs that are always 0
        module.weight.copy_(prune_sparsegpt(weight, solve.factor, target))
        if solve.dtype != torch.float32 or solve.damping != DAMPING:
            how = {"dtype": str(solve.dtype).removeprefix("torch."), "damping": solve.damping}
            solves[f"{layer}.{role}"] = how
    return solves


def _position_weights(
    adapter: Adapter, calibration: Calibration, rule: SinkMask | None, batch: int
) -> list[Tensor]:
    """What every position of the calibration weighs: 0 at padding, 1 - the sink mask with a ``rule``, else
    1."""
    valid = [
        torch.ones(part.ids.shape) if part.valid is None else part.valid.float()
        for part in calibration.batches(batch)
    ]
    if rule is None:
        return valid
    masks = sink_masks(adapter, calibration, rule, batch)
    return [(1 - mask) * real.to(mask) for mask, real in zip(masks, valid, strict=True)]


def _check(adapter: Adapter, target: Target, pattern: str) -> list[dict[str, nn.Linear]]:
    """The linear modules of every layer, after every refusal that needs no calibration."""
    geometry = adapter.geometry()
    adapter.require_dense("sparsify")
    if noted_sparsity(adapter.model) is not None:
        raise ValueError("the model is sparse already: sparsify the dense model")
    layers = range(geometry.num_layers)
    adapter.check([list(range(heads)) for heads in geometry.heads], [None for _ in layers], "mask")
    adapter.require_plain()
    linears = []
    for layer in layers:
        modules = {role: linear(module) for role, module in adapter.linears(layer).items()}
        for role, module in modules.items():
            width = module.weight.shape[1]
            if target.group and width % target.group:
                raise ValueError(
                    f"pattern {pattern} needs widths that {target.group} divides: {role} of layer {layer} "
                    f"has {width}"
                )
        linears.append(modules)
    for name, share in sparsity_of(adapter.model).items():
        if share >= SPARSE_ALREADY:
            raise ValueError(f"the model is sparse already: {100 * share:.0f} % of {name} are zeros")
    return linears


def _check_calibration(
    calibration: Calibration | None, method: str, linears: list[dict[str, nn.Linear]]
) -> None:
    if not isinstance(calibration, Calibration):
        raise ValueError(f"method {method!r} needs calibration=calibrate(model, text, ...)")
    valid = calibration.valid
    tokens = calibration.ids.numel() if valid is None else int(valid.sum())
    widest = max(module.weight.shape[1] for layer in linears for module in layer.values())
    if method.endswith("sparsegpt") and tokens < widest:
        raise ValueError(
            f"{method} needs at least {widest} calibration tokens, the inputs of the widest linear layer, "
            f"got {tokens}"
        )
