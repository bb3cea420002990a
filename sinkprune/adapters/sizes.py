"""How many heads and channels the modules of a layer have, whatever a config says of them."""

from __future__ import annotations

from torch import Tensor, nn


def built_sizes(layer: int, linears: dict[str, nn.Module], head_dim: int) -> tuple[int, int, int] | None:
    """Query heads, key/value heads and channels (0 without MLP) of a layer's linear modules.

    Args:
        linears: by role, as ``Adapter.linears`` names them.
        head_dim: features of a head.

    Returns:
        None where a module does not tell its sizes (quantised).

    Raises:
        ValueError: modules that don't fit each other, naming the layer and what they give and take.
    """
    found = {role: _shape(linear) for role, linear in linears.items() if linear is not None}
    sizes = {role: shape for role, shape in found.items() if shape is not None}
    if sizes.keys() != found.keys():
        return None
    queries = sizes["o"][1]
    if "qkv" in sizes:
        keys = values = (sizes["qkv"][0] - queries) // 2
        fits = sizes["qkv"][0] == queries + 2 * keys
    else:
        keys = sizes["k"][0]
        values = sizes["v"][0] if "v" in sizes else keys
        fits = sizes["q"][0] == queries
    given = ", ".join(f"{role} {rows}x{columns}" for role, (rows, columns) in sizes.items())
    if not fits or keys != values or keys < head_dim or queries % head_dim or keys % head_dim:
        raise ValueError(
            f"the attention of layer {layer} does not fit together: {given} in heads of {head_dim} features"
        )
    heads, kv_heads = queries // head_dim, keys // head_dim
    if heads % kv_heads:
        raise ValueError(
            f"layer {layer} has {heads} query heads on {kv_heads} key/value heads: groups of equal size are "
            "needed, as in an unpruned model"
        )
    channels = sizes["down"][1] if "down" in sizes else 0
    wanted = {"gate": channels, "up": channels, "gate_up": 2 * channels}
    if any(sizes[role][0] != rows for role, rows in wanted.items() if role in sizes):
        raise ValueError(f"the MLP of layer {layer} does not fit together: {given}")
    return heads, kv_heads, channels


def one_width(widths: list[int]) -> int:
    """What every layer's heads have as features. Raises ``ValueError`` where layers differ."""
    for layer, width in enumerate(widths):
        if width != widths[0]:
            raise ValueError(
                f"heads of layer {layer} have {width} features and those of layer 0 {widths[0]}: a plan "
                "knows one width"
            )
    return widths[0]


def _shape(linear: nn.Module) -> tuple[int, int] | None:
    """Features that ``linear`` gives and takes; None where it does not say."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
        return weight.shape[0], weight.shape[1]
    rows, columns = getattr(linear, "out_features", None), getattr(linear, "in_features", None)
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None
