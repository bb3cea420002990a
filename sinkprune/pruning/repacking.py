"""Putting a plan into a model: skipped heads (mask form) or really smaller matrices (compact form)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sinkprune.adapters import Adapter, AttentionWeights, MLPWeights, adapter_for
from sinkprune.adapters.base import is_hooked
from sinkprune.evidence.calibration import Calibration
from sinkprune.models.marks import mark
from sinkprune.models.modules import CompactMLP, SinkPrunedAttention, trains_as
from sinkprune.models.streamed import stream_of
from sinkprune.ops import native
from sinkprune.plans import Geometry, LayerPlan, PrunePlan
from sinkprune.pruning.repair import UNBIASED, add_biases, repaired


@torch.inference_mode(False)  # else the new weights could never train
def apply(
    model: nn.Module,
    plan: PrunePlan,
    mode: str = "compact",
    *,
    calibration: Calibration | None = None,
    repair: str | None = "least_squares",
    low_memory: bool = False,
) -> nn.Module:
    """Prune ``model`` in place and return it.

    Args:
        model: a dense model of the plan's geometry and fingerprint.
        plan: what to keep.
        mode: ``"compact"`` makes the matrices smaller; ``"mask"`` skips heads and channels with the weights
            as they are, and ``restore`` undoes it.
        calibration: rows of ``sp.calibrate`` to repair the kept projections on; None leaves their weights as
            they are.
        repair: with ``calibration``: ``"least_squares"`` refits output and down projections to the dense
            layers' outputs, and their biases where they have some; ``"least_squares_cv"`` does so as far as
            it helps on rows that a fit has not seen, at three times the cost, which pays where calibration
            tokens are few for the columns; ``"least_squares_bias"`` also gives
            biases to those that have none, which most engines can't load; ``"bias"`` only gives back, as
            biases, the means of what was removed; None does nothing.
        low_memory: replace layer by layer, so that the peak is one layer's projections more than the model. A
            failure half-way then leaves the model part compact; without it, the model is as it was.

    Raises:
        ValueError: a repair in mask form; a model that is pruned already, compiled, sharded, on ``meta`` or
            with layers that share weights; a plan for another model; a layer that can't be compacted.
    """
    adapter = adapter_for(model)
    if stream_of(model) is not None:
        raise ValueError("this model's blocks are read one at a time: prune it by prune_streamed")
    plan = checked(adapter, plan, mode)
    if mode == "mask":
        if calibration is not None and repair is not None:
            raise ValueError("repair changes weights, which the mask form leaves as they are: repair=None")
        _mask(adapter, plan)
    elif calibration is None or repair is None:
        install_compact(model, plan, low_memory=low_memory)
    else:
        with repaired(adapter, plan, calibration, repair, keep_originals=not low_memory):
            install_compact(model, plan, low_memory=low_memory)
        plan = repaired_by(plan, repair, calibration)
    mark(model, plan, mode)
    return model


def checked(adapter: Adapter, plan: PrunePlan, mode: str) -> PrunePlan:
    """The plan to apply to a dense model, without what it says of another's repair. Raises as ``apply``."""
    if not isinstance(plan, PrunePlan):
        raise TypeError(f"plan must be a PrunePlan (see PrunePlan.load), got {type(plan).__name__}")
    if mode not in ("compact", "mask"):
        raise ValueError(f"mode must be 'compact' or 'mask', got {mode!r}")
    adapter.require_dense("apply the plan to")
    _require_geometry(adapter, plan)
    if plan.fingerprint and plan.fingerprint != adapter.fingerprint():
        raise ValueError(
            "the plan was made for other weights (float16 copies count as such): its fingerprint differs"
        )
    adapter.check(*_kept(plan), mode)
    adapter.check_experts(plan.layers)
    if "repair" in plan.details:
        plan = replace(plan, details={k: v for k, v in plan.details.items() if k != "repair"})
    return plan


def repaired_by(plan: PrunePlan, repair: str, calibration: Calibration) -> PrunePlan:
    """The plan, which says how it was repaired."""
    rows, length = calibration.ids.shape
    noted = {"method": repair, "rows": rows, "length": length, "biases": repair not in UNBIASED}
    return replace(plan, details=plan.details | {"repair": noted})


def lay_out(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Give a dense ``model`` the modules that it has after ``plan``, in place, to load a state into.

    What ``apply`` of the same plan made, with the biases that its repair added, which are zero until they are
    loaded. The weights are packed as they are and may be on ``meta``; the fingerprint is not asked for.

    Args:
        model: a dense model of the plan's geometry, of any weights.
        plan: ``model.prune_plan`` of the model whose state is to be loaded, which says how it was repaired.

    Raises:
        ValueError: a model that is pruned already, another geometry, or a layer that can't be compacted; the
            model is left as it was.
    """
    adapter = adapter_for(model)
    adapter.require_dense("lay the plan out on")
    _require_geometry(adapter, plan)
    if is_hooked(model) or not any(parameter.is_meta for parameter in model.parameters()):
        adapter.check(*_kept(plan), "compact")
    adapter.check_experts(plan.layers)
    added = add_biases(adapter, plan) if "repair" in plan.details else []
    try:
        install_compact(model, plan)
    except BaseException:
        for module in added:
            module.register_parameter("bias", None)
        raise
    mark(model, plan, "compact")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``apply(..., mode="mask")``. Raises ``ValueError`` for a compact model, whose weights are gone."""
    adapter = adapter_for(model)
    if adapter.form == "compact":
        raise ValueError("a compact model can't be restored: load the dense checkpoint again")
    for layer in range(adapter.geometry().num_layers):
        adapter.mask(layer, None, None)
        adapter.skip_experts(layer, None)
    mark(model, None, "dense")
    return model


def _require_geometry(adapter: Adapter, plan: PrunePlan) -> None:
    planned, here = plan.geometry, adapter.geometry()
    if not planned.agrees(here):
        pairs = {name: (size, getattr(here, name)) for name, size in vars(planned).items()}
        differ = (f"{name} {a!r} in the plan and {b!r} here" for name, (a, b) in pairs.items() if a != b)
        raise ValueError(f"the plan is for another geometry: {', '.join(differ)}")


def _kept(plan: PrunePlan) -> tuple[list[list[int]], list[list[int] | None]]:
    """Heads that every layer keeps, and channels of its dense MLP."""
    return [layer.kept_heads for layer in plan.layers], [layer.dense_channels for layer in plan.layers]


def install_compact(model: nn.Module, plan: PrunePlan, *, low_memory: bool = False) -> None:
    """Replace the projections of every layer that the plan changes. Works on ``meta`` tensors too."""
    adapter = adapter_for(model)
    geometry = adapter.geometry()
    refusal = adapter.refuse_compact()
    if refusal:
        raise ValueError(f"this model can't take the compact form: {refusal}; use mode='mask'")
    layers = range(geometry.num_layers)
    if low_memory:
        for layer in layers:
            adapter.install(layer, *compact_layer(adapter, plan, layer))
        return
    modules = [compact_layer(adapter, plan, layer) for layer in layers]  # all of them before the first change
    for layer in layers:
        adapter.install(layer, *modules[layer])


def compact_layer(adapter: Adapter, plan: PrunePlan, layer: int) -> tuple[nn.Module, nn.Module | None]:
    """The compact modules of ``layer``, beside the dense tensors they were packed from."""
    kept = plan.layers[layer]
    own = adapter.compact(layer, kept.kept_heads, kept.kept_channels)
    if own is not None:
        return own
    attention = compact_attention(
        adapter.attention_weights(layer), adapter.geometry(), layer, kept.kept_heads
    )
    channels = kept.dense_channels
    if channels is not None:
        return attention, compact_mlp(adapter.mlp_weights(layer), channels)
    return attention, _compact_experts(adapter, layer, kept)


def _compact_experts(adapter: Adapter, layer: int, kept: LayerPlan) -> nn.Module | None:
    """The layer's mixture of the experts that it keeps; None where they all stay."""
    dense = adapter.expert_mlp(layer)
    if dense is None or not kept.takes_experts:
        return None
    if kept.kept_experts != []:
        return dense.keeping(kept.kept_experts, kept.kept_expert_channels)
    router = dense.gate.weight
    return CompactMLP(router.new_empty(0, router.shape[1]), router.new_empty(router.shape[1], 0))


def compact_attention(
    weights: AttentionWeights, geometry: Geometry, layer: int, kept_heads: list[int]
) -> SinkPrunedAttention:
    """Pack the kept query heads, and the key/value heads that they read, into one fused layer."""
    return SinkPrunedAttention.from_projections(
        **vars(weights),
        head_dim=geometry.head_dim,
        kept_heads=kept_heads,
        kv_head_of=geometry.kv_head_of(layer),
    )


@torch.no_grad()
def compact_mlp(weights: MLPWeights, channels: list[int]) -> CompactMLP:
    """Pack the kept channels of a gated MLP, gate and up fused."""
    if weights.gate is None:
        raise ValueError("this MLP is not gated, and CompactMLP is")
    if channels:
        gate_up, down = native.pack_mlp(weights.gate, weights.up, weights.down, channels)
    else:  # what is left of the layer is the output's bias
        gate_up, down = (
            weights.up.new_empty(0, weights.up.shape[1]),
            weights.down.new_empty(weights.down.shape[0], 0),
        )
    bias = None
    if channels and weights.gate_bias is not None and weights.up_bias is not None:
        index = torch.tensor(channels, device=weights.gate_bias.device)
        bias = torch.cat((weights.gate_bias[index], weights.up_bias[index]))
    mlp = CompactMLP(gate_up, down, bias, _copy(weights.down_bias))
    trains_as(mlp.gate_up_proj.weight, weights.gate, weights.up)
    trains_as(mlp.gate_up_proj.bias, weights.gate_bias, weights.up_bias)
    trains_as(mlp.down_proj.weight, weights.down)
    trains_as(mlp.down_proj.bias, weights.down_bias)
    return mlp


def mask_indices(adapter: Adapter, plan: PrunePlan) -> list[tuple[Tensor | None, Tensor | None]]:
    """Heads and channels of every layer as ``Adapter.mask`` takes them, on the layer's device; None = all."""
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for layer, kept in enumerate(plan.layers):
        device = adapter.attention_weights(layer).q.device
        chosen = kept.dense_channels
        channels = None if chosen is None else torch.tensor(chosen, dtype=torch.long, device=device)
        everything = len(kept.kept_heads) == plan.geometry.heads[layer]
        heads = None if everything else torch.tensor(kept.kept_heads, dtype=torch.long, device=device)
        found.append((heads, channels))
    return found


def _mask(adapter: Adapter, plan: PrunePlan) -> None:
    for layer, (heads, channels) in enumerate(mask_indices(adapter, plan)):
        adapter.mask(layer, heads, channels)
        adapter.skip_experts(layer, plan.layers[layer])


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def fuse(model: nn.Module, *, low_memory: bool = False) -> nn.Module:
    """Fuse query/key/value and gate/up projections of a dense model, in place, and return it.

    That is ``apply`` of a plan that keeps everything: same tokens up to rounding, three matrix products
    fewer in every layer. The model counts as compact afterwards, so profile, plan and apply it before.

    Args:
        model: a dense model of a known family.
        low_memory: as in ``apply``.

    Raises:
        ValueError: a model that is pruned or fused already, or that can't take the compact form.
    """
    adapter = adapter_for(model)
    if type(adapter).compact is not Adapter.compact:
        raise ValueError(
            f"a live {adapter.family} model keeps its own modules, so there is nothing to fuse: load it as a "
            "native model"
        )
    geometry = adapter.geometry()
    layers = []
    for layer, (heads, channels) in enumerate(zip(geometry.heads, geometry.channels, strict=True)):
        dense = geometry.mlp_matrices == 3 and not geometry.experts_of(layer)
        layers.append(LayerPlan(list(range(heads)), list(range(channels)) if dense else None))
    plan = PrunePlan(geometry, adapter.fingerprint(), layers, criterion="nothing", ratio=0.0)
    return apply(model, plan, low_memory=low_memory)
