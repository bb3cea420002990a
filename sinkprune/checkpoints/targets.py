"""What each target can hold of a pruned model: the one table that planning, export and docs/exporting.md read."""

from __future__ import annotations

from dataclasses import dataclass

from sinkprune.checkpoints.trees import Trimmed

LLAMA_CPP = "llama.cpp build 11549 (in xllamacpp 2026.10.11549)"
QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ALL_BIASES = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        neighbours: whether RoPE turns neighbouring features, so that rows of q and k are re-ordered.
        ragged: whether layers may differ in heads and channels, and have no heads.
        free_width: whether heads side by side may be narrower or wider than the hidden states.
        qk_norm: whether it norms each head's queries and keys (it then must have the norms).
        biases: parts whose biases it computes; those of any other it ignores or refuses.
        needs_biases: whether q, k and v must have theirs.
        experts: None for one MLP a layer; else whether a token's experts' weights are normed.
        diffusion: whether ``llama-diffusion-cli`` runs it; others run through the C API and a sampler of yours.
    """

    name: str
    neighbours: bool = False
    ragged: bool = False
    free_width: bool = True
    qk_norm: bool = False
    biases: frozenset[str] = frozenset()
    needs_biases: bool = False
    experts: bool | None = None
    diffusion: bool = True


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llada", neighbours=True),
        Architecture("dream", free_width=False, biases=QKV, needs_biases=True),
        Architecture("deci", neighbours=True, ragged=True, biases=ALL_BIASES, diffusion=False),
        Architecture("qwen3", qk_norm=True, diffusion=False),
        Architecture("llada-moe", free_width=False, qk_norm=True, experts=False),
        Architecture("rnd1", qk_norm=True, experts=True),
    )
}


def why_not(architecture: Architecture, trimmed: Trimmed) -> str | None:
    """The first thing of ``trimmed`` that ``architecture`` can't hold, or None where it holds everything."""
    geometry = trimmed.geometry
    layers = range(geometry.num_layers)
    has_experts = trimmed.experts[0] > 0
    if has_experts != (architecture.experts is not None):
        return "it has experts" if has_experts else "it has no experts"
    if has_experts and trimmed.norm_experts != architecture.experts:
        return f"norm_topk_prob={trimmed.norm_experts}"
    for layer in layers:
        heads, kv_heads = geometry.heads[layer], geometry.kv_heads[layer]
        where = f"layer {layer}"
        if heads and heads % kv_heads:
            return f"{where} has {heads} query heads on {kv_heads} key/value heads"
        if not architecture.ragged:
            first = (geometry.heads[0], geometry.kv_heads[0], geometry.channels[0])
            if (heads, kv_heads, geometry.channels[layer]) != first:
                return (
                    f"{where} has {heads} query heads, {kv_heads} key/value heads and "
                    f"{geometry.channels[layer]} channels, layer 0 {first[0]}, {first[1]} and {first[2]}"
                )
            if not heads:
                return f"{where} has no heads"
        if not architecture.free_width and heads * geometry.head_dim != geometry.hidden:
            return (
                f"{where} has {heads} heads of {geometry.head_dim} features, and side by side they must be as "
                f"wide as the hidden states, {geometry.hidden}"
            )
        if heads and (trimmed.part(layer, "attn_q_norm") is not None) != architecture.qk_norm:
            return f"{where} {'has no' if architecture.qk_norm else 'has a'} norm of queries and keys"
        biases = trimmed.biases(layer)
        dropped = [part for part in biases if part not in architecture.biases]
        if dropped:
            return f"{where} has biases ({', '.join(dropped)}) that it would drop"
        if not heads and "attn_output" in biases:
            return f"{where} has no heads and an output bias, which it would drop"
        if architecture.needs_biases and not {"attn_q", "attn_k", "attn_v"} <= set(biases):
            return f"{where} has no biases of q, k and v"
    return None
