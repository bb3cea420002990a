"""A uniform plan's model as an ordinary checkpoint of its own family: the config of a smaller dense one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.checkpoints.checkpoint import describe_model
from sinkprune.checkpoints.layout import lay_out_config
from sinkprune.checkpoints.trees import layers_left, renamed
from sinkprune.models.marks import plan_of
from sinkprune.models.modules import CompactMLP, SinkPrunedAttention
from sinkprune.models.transformers_native import is_transformers_native
from sinkprune.plans import Experts, Geometry, PrunePlan, expert_sizes, layer_sizes

# Keys of a config.json: query heads, key/value heads, features of a head, channels, layers
_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "num_hidden_layers")
_LLADA_KEYS = ("n_heads", "n_kv_heads", None, "mlp_hidden_size", "n_layers")  # its heads share d_model


def smaller(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The dense model that a compact ``model`` equals, over its tensors, and its config; it has fewer layers
    where whole blocks are gone.

    Raises:
        ValueError: a plan that is not uniform (naming the layers), or sizes or a repair's biases that the
            family's config can't express (naming what it fixes).
    """
    config, adapter = describe_model(model), adapter_for(model)
    plan = plan_of(model)
    assert plan is not None
    here = layers_left(model)
    plan = replace(plan, geometry=plan.geometry.of_layers(here), layers=[plan.layers[i] for i in here])
    kept = _kept_sizes(plan)
    _check_uniform(plan, kept, here)
    small, config = _lay_out(config, plan, kept, here)
    if plan.details.get("repair", {"biases": False}).get("biases", True):
        _check_biases(adapter_for(small))
    _fill(small, model, adapter, here)
    return small, config


def _kept_sizes(plan: PrunePlan) -> Geometry:
    """What is left of every layer."""
    dense = plan.geometry
    return replace(
        dense,
        heads=tuple(len(layer.kept_heads) for layer in plan.layers),
        kv_heads=tuple(len(dense.kv_heads_used(i, p.kept_heads)) for i, p in enumerate(plan.layers)),
        channels=tuple(layer_sizes(dense, i, layer)[2] for i, layer in enumerate(plan.layers)),
        experts=_kept_experts(plan),
    )


def _kept_experts(plan: PrunePlan) -> Experts | None:
    """What is left of the experts. Raises ``ValueError`` where layers keep different numbers of them."""
    dense = plan.geometry.experts
    if dense is None:
        return None
    sizes = [expert_sizes(plan.geometry, i, layer)[:2] for i, layer in enumerate(plan.layers)]
    of_experts = [size for i, size in enumerate(sizes) if dense.count[i]]
    if len(set(of_experts)) != 1:
        raise ValueError(
            f"the plan is not uniform: layers keep {sorted(set(of_experts))} (experts, channels of each); "
            "save() it as it is"
        )
    return replace(dense, count=tuple(count for count, _ in sizes), channels=of_experts[0][1])


def _check_uniform(plan: PrunePlan, kept: Geometry, here: list[int]) -> None:
    pruned = [i for i, layer in enumerate(plan.layers) if layer.kept_channels is not None]
    channels = [kept.channels[i] for i in pruned]
    for what, sizes, layers in (
        ("query heads", kept.heads, range(kept.num_layers)),
        ("key/value heads", kept.kv_heads, range(kept.num_layers)),
        ("channels", channels, pruned),
    ):
        for layer, size in zip(layers, sizes, strict=True):
            if size != sizes[0]:
                first, other = here[layers[0]], here[layer]
                raise ValueError(
                    f"the plan is not uniform: layer {first} keeps {sizes[0]} {what} and layer {other} "
                    f"{size}; plan with allocation='uniform', whole_groups=True and a ratio that takes as "
                    "many of every layer, or save() it as it is"
                )
    for layer, layer_plan in enumerate(plan.layers):
        owner = [plan.geometry.kv_head_of(layer)[head] for head in layer_plan.kept_heads]
        shares = {owner.count(head) for head in owner}
        if len(shares) != 1:
            raise ValueError(
                f"the plan is not uniform: layer {here[layer]} keeps {sorted(shares)} query heads of its "
                "key/value heads; plan with whole_groups=True, or save() it as it is"
            )


def _lay_out(
    config: dict[str, Any], plan: PrunePlan, kept: Geometry, here: list[int]
) -> tuple[nn.Module, dict[str, Any]]:
    """The smaller dense model on ``meta`` and its config. Raises ``ValueError`` where no config says it."""
    heads, kv_heads, head_dim, channels, layers = _LLADA_KEYS if "n_heads" in config else _KEYS
    pruned = [i for i, layer in enumerate(plan.layers) if layer.kept_channels is not None]
    config = dict(config)
    if len(here) < config[layers]:
        kinds = config.get("layer_types")
        config |= {layers: len(here)} | ({"layer_types": [kinds[i] for i in here]} if kinds else {})
    if kept.kv_heads != plan.geometry.kv_heads or kept.heads != plan.geometry.heads:
        config |= {heads: kept.heads[0], kv_heads: kept.kv_heads[0]}
        config |= {head_dim: kept.head_dim} if head_dim else {}
    if pruned:
        config[channels] = kept.channels[pruned[0]]
    experts = plan.geometry.experts
    if experts is not None and kept.experts is not None and kept.experts != experts:
        if not {"num_experts", "moe_intermediate_size"} <= config.keys():
            raise ValueError(_inexpressible(kept, "it names no num_experts and moe_intermediate_size"))
        config |= {"num_experts": max(kept.experts.count), "moe_intermediate_size": kept.experts.channels}
    try:
        small = lay_out_config(config)
        got = adapter_for(small).geometry()
    except (TypeError, ValueError) as error:
        raise ValueError(_inexpressible(kept, str(error))) from error
    if not got.agrees(kept):
        reason = (
            f"its heads would have {got.head_dim} features, its MLPs {sorted(set(got.channels))} channels"
        )
        raise ValueError(_inexpressible(kept, reason))
    return small, config


def _check_biases(small: Adapter) -> None:
    """Raise ``ValueError`` where the family's config has no room for the biases of a repair."""
    linears = small.linears(small.geometry().num_layers - 1)
    for role in ("o", "down"):
        if role in linears and linears[role].bias is None:
            raise ValueError(
                f"the repair gave the {role} projections biases, which a config of {small.family} can't say: "
                "apply without repair, or save() it as it is"
            )


def _inexpressible(kept: Geometry, reason: str) -> str:
    return (
        f"a config of {kept.family} can't say {kept.heads[0]} query and {kept.kv_heads[0]} key/value heads "
        f"of {kept.head_dim} features and {sorted(set(kept.channels))} channels: {reason}"
    )


def _fill(small: nn.Module, model: nn.Module, adapter: Adapter, here: list[int]) -> None:
    """Give ``small`` the tensors of the layers ``here`` of the compact ``model``, not copied."""
    wanted = small.state_dict()
    new = dict(zip(here, _paths(small, adapter_for(small)), strict=True))
    given = renamed(
        model.state_dict(), {path: new.get(layer) for layer, path in enumerate(_paths(model, adapter))}
    )
    tensors = {name: tensor for name, tensor in given.items() if name in wanted}
    if not is_transformers_native(model):  # transformers' modules kept their names
        tensors |= _unpacked(small, adapter, here)
    small.load_state_dict(tensors, assign=True)
    if is_transformers_native(model):
        cast(Any, small).tie_weights()


def _paths(model: nn.Module, adapter: Adapter) -> list[str]:
    """What each of the blocks is called."""
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in adapter.blocks()]


def _unpacked(small: nn.Module, adapter: Adapter, here: list[int]) -> dict[str, Tensor]:
    """The compact layers' tensors under the names of the dense linear modules and norms of ``small``."""
    target = adapter_for(small)
    names = {module: name for name, module in small.named_modules()}
    tensors: dict[str, Tensor] = {}
    blocks = adapter.blocks()
    for layer, block in enumerate(blocks[i] for i in here):
        linears, weights = target.linears(layer), target.attention_weights(layer)
        roles: dict[str, Any] = {**linears, "q_norm": weights.q_norm, "k_norm": weights.k_norm}
        for packed in block.modules():
            if not isinstance(packed, (SinkPrunedAttention, CompactMLP)):
                continue
            parts = packed.unpacked()
            if isinstance(packed, SinkPrunedAttention):
                parts["qkv"] = packed.qkv_proj.state_dict()
            for role, module in roles.items():
                if module is not None and role in parts:
                    tensors |= {f"{names[module]}.{kind}": tensor for kind, tensor in parts[role].items()}
    return tensors
