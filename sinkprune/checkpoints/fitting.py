"""Whether a target can hold a model as it is: the first thing that it can't, by name."""

from __future__ import annotations

from sinkprune.checkpoints.trees import Trimmed
from sinkprune.targets import ARCHITECTURES, GGUF_FAMILIES, QKV, Architecture


def architecture_for(trimmed: Trimmed) -> Architecture:
    """The first of the family's architectures of llama.cpp that holds ``trimmed``.

    Raises:
        ValueError: none does; for each, the first layer and rule. Or an autoregressive model.
    """
    if trimmed.family not in GGUF_FAMILIES:
        raise ValueError(
            f"llama.cpp has no architecture for {trimmed.family}; for {', '.join(GGUF_FAMILIES)}"
        )
    if trimmed.causal and trimmed.block_size is None:
        raise ValueError(
            "GGUF is written of diffusion models, and this one is causal: llama.cpp's own tools convert it"
        )
    refused = []
    for name in GGUF_FAMILIES[trimmed.family]:
        reason = why_not(ARCHITECTURES[name], trimmed)
        if reason is None:
            return ARCHITECTURES[name]
        refused.append(f"{name}: {reason}")
    raise ValueError(f"llama.cpp can't hold this {trimmed.family} model: {'; '.join(refused)}")


def why_not(architecture: Architecture, trimmed: Trimmed) -> str | None:
    """The first thing of ``trimmed`` that ``architecture`` can't hold, or None where it holds everything."""
    has_experts = trimmed.experts[0] > 0
    if has_experts != (architecture.experts is not None):
        return "the model has experts" if has_experts else "the model has no experts"
    if has_experts and trimmed.norm_experts != architecture.experts:
        return f"the weights of a token's experts {'sum' if trimmed.norm_experts else 'do not sum'} to 1"
    for layer in range(trimmed.geometry.num_layers):
        reason = _sizes(architecture, trimmed, layer) or _extras(architecture, trimmed, layer)
        if reason is not None:
            return f"layer {layer} {reason}"
    return None


def _uneven(trimmed: Trimmed, layer: int) -> str | None:
    geometry = trimmed.geometry
    sizes, first = (
        (geometry.heads[i], geometry.kv_heads[i], geometry.channels[i]) for i in (layer, 0)
    )  # fmt: skip
    if sizes == first:
        return None
    return (
        f"has {sizes[0]} query heads, {sizes[1]} key/value heads and {sizes[2]} channels, and layer 0 "
        f"{first[0]}, {first[1]} and {first[2]}: plan with fit=…"
    )


def _sizes(architecture: Architecture, trimmed: Trimmed, layer: int) -> str | None:
    geometry = trimmed.geometry
    heads, kv_heads = geometry.heads[layer], geometry.kv_heads[layer]
    if heads and heads % kv_heads:
        return f"has {heads} query heads on {kv_heads} key/value heads"
    if not architecture.ragged:
        uneven = _uneven(trimmed, layer)
        if uneven:
            return uneven
        if not heads:
            return "has no heads"
    if not geometry.channels[layer] and not trimmed.experts[0]:
        return "has no MLP, and llama.cpp skips the attention of such a layer as well"
    if not architecture.free_width and heads * geometry.head_dim != geometry.hidden:
        return (
            f"has {heads} heads of {geometry.head_dim} features, and side by side they must be as wide as "
            f"the hidden states, {geometry.hidden}"
        )
    return None


def _extras(architecture: Architecture, trimmed: Trimmed, layer: int) -> str | None:
    """Experts, norms and biases."""
    if architecture.experts is not None and trimmed.part(layer, "ffn_up") is not None:
        return "has one MLP, no experts"
    heads, biases = trimmed.geometry.heads[layer], trimmed.biases(layer)
    if heads and (trimmed.part(layer, "attn_q_norm") is not None) != architecture.qk_norm:
        return f"has {'no' if architecture.qk_norm else 'a'} norm of queries and keys"
    dropped = [part for part in biases if part not in architecture.biases]
    if not heads and "attn_output" in biases:
        dropped.append("attn_output")
    if dropped:
        return f"has biases ({', '.join(dropped)}) that it would drop"
    if architecture.needs_biases and not set(biases) >= QKV:
        return "has no biases of q, k and v"
    return None
