"""A model whose layers differ, as a folder that transformers loads with the small modelling file that goes
with it."""

from __future__ import annotations

import importlib.resources
from typing import Any

from torch import Tensor

from sinkprune.checkpoints.layout import TRIMMED
from sinkprune.checkpoints.trees import LLAMA, Tree, Trimmed

MODELLING = "modeling_trimmed.py"


def modelling_file() -> str:
    """The text of the modelling file, which needs transformers alone."""
    return (importlib.resources.files("sinkprune") / "templates" / MODELLING).read_text("utf-8")


def ragged_config(trimmed: Trimmed) -> dict[str, Any]:
    """The ``config.json`` that the modelling file reads.

    Raises:
        ValueError: a model with experts, or with norms or biases that differ from what the file computes.
    """
    geometry, layers = trimmed.geometry, range(trimmed.geometry.num_layers)
    if trimmed.experts[0]:
        raise ValueError(
            f"{trimmed.family} has experts, which the modelling file for uneven layers does not compute"
        )
    normed = [trimmed.part(i, "attn_q_norm") is not None for i in layers if geometry.heads[i]]
    if len(set(normed)) > 1:
        raise ValueError("some layers norm their queries and keys and others do not")
    for i in layers:
        if geometry.heads[i] and geometry.heads[i] % geometry.kv_heads[i]:
            raise ValueError(
                f"layer {i} has {geometry.heads[i]} query heads on {geometry.kv_heads[i]} key/value heads: "
                "plan with whole_groups=True"
            )
    sizes = {str(i): _layer(trimmed, i) for i in layers}
    tokens = {f"{role}_token_id": token for role, token in trimmed.tokens.items()}
    return {
        "architectures": ["TrimmedForCausalLM"],
        "model_type": TRIMMED,
        "auto_map": {
            "AutoConfig": "modeling_trimmed.TrimmedConfig",
            "AutoModel": "modeling_trimmed.TrimmedModel",
            "AutoModelForCausalLM": "modeling_trimmed.TrimmedForCausalLM",
        },
        "vocab_size": geometry.vocabulary,
        "hidden_size": geometry.hidden,
        "head_dim": geometry.head_dim,
        "num_hidden_layers": geometry.num_layers,
        "num_attention_heads": max(geometry.heads),
        "num_key_value_heads": max(geometry.kv_heads),
        "intermediate_size": max(geometry.channels),
        "max_position_embeddings": geometry.context,
        "rms_norm_eps": trimmed.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": trimmed.theta},
        "tie_word_embeddings": trimmed.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "is_causal": trimmed.causal and trimmed.block_size is None,
        "qk_norm": bool(normed and normed[0]),
        "block_size": trimmed.block_size,
        "logits_shift": trimmed.shift,
        "biases": [],
        "per_layer_config": sizes,
        **tokens,
    }


def _layer(trimmed: Trimmed, layer: int) -> dict[str, Any]:
    """What ``per_layer_config`` says of a layer."""
    geometry = trimmed.geometry
    sizes: dict[str, Any] = {
        "intermediate_size": geometry.channels[layer],
        "biases": [LLAMA.parts[part] for part in trimmed.biases(layer)],
    }
    if geometry.heads[layer] == 0:
        return sizes | {"skip": ["self_attn"]}
    return sizes | {
        "num_attention_heads": geometry.heads[layer],
        "num_key_value_heads": geometry.kv_heads[layer],
    }


def ragged_tensors(trimmed: Trimmed) -> dict[str, Tensor]:
    """The tensors by the names that the modelling file gives them; a tied head is left out."""
    tree = trimmed.tree
    found = {f"{LLAMA.embedding}.weight": trimmed.tensors[f"{tree.embedding}.weight"]}
    found[f"{LLAMA.norm}.weight"] = trimmed.tensors[f"{tree.norm}.weight"]
    if not trimmed.tied:
        found[f"{LLAMA.head}.weight"] = trimmed.tensors[f"{tree.head}.weight"]
    for layer in range(trimmed.geometry.num_layers):
        empty = trimmed.geometry.heads[layer] == 0
        for part in tree.parts:
            if empty and part in ("attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm"):
                continue
            for kind in ("weight", "bias"):
                tensor = trimmed.part(layer, part, kind)
                if tensor is not None:
                    found[LLAMA.name(layer, part, kind)] = tensor
    return found


def published_tensors(tensors: dict[str, Tensor], tree: Tree) -> dict[str, Tensor]:
    """``ragged_tensors`` undone: the tensors by the names of the family's own tree."""
    names = {
        f"{LLAMA.embedding}.": f"{tree.embedding}.",
        f"{LLAMA.norm}.": f"{tree.norm}.",
        f"{LLAMA.head}.": f"{tree.head}.",
    }
    back = {published: part for part, published in LLAMA.parts.items()}
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if f"{module}." in names:
            found[names[f"{module}."] + kind] = tensor
        else:
            layer, _, part = module.removeprefix(LLAMA.layer.format("")).partition(".")
            found[tree.name(int(layer), back[part], kind)] = tensor
    return found
