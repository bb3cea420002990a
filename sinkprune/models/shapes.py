"""Sizes of published models, as their config.json says them: laid out without weights for docs/families.md,
for the nearest family of an unknown folder, and for tests at full width. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A published model.

    Attributes:
        config: the keys of its config.json that shape the computation.
        source: the public file they were read from.
        size: what is published of its size, as ``(tensor elements, how that is known)``; None: nothing.
    """

    config: dict[str, Any]
    source: str
    size: tuple[float, str] | None = None
    notes: str = field(default="", kw_only=True)


def _tree(
    kind: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    channels: int,
    vocabulary: int,
    **more: Any,
) -> dict[str, Any]:
    """Keys that Llama's, Qwen2's and Qwen3's configs share."""
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": channels, "vocab_size": vocabulary,
        "hidden_act": "silu",
    } | more  # fmt: skip


def _nemotron(hidden: int, layers: int, channels: int, factor: float) -> dict[str, Any]:
    rope = {
        "rope_type": "yarn", "rope_theta": 1000000.0, "factor": factor, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    return _tree(
        "nemotron_labs_diffusion", hidden, layers, 32, 8, channels, 131072, head_dim=128, block_size=32,
        mask_token_id=100, max_position_embeddings=int(16384 * factor), dlm_paradigm="bidirectional",
        rope_parameters=rope, rms_norm_eps=1e-5,
    )  # fmt: skip


PUBLISHED: dict[str, Shape] = {
    "LLaDA-8B": Shape(
        {
            "model_type": "llada", "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
            "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "mask_token_id": 126336,
            "max_sequence_length": 4096, "rope_theta": 500000.0, "weight_tying": False, "block_type": "llama",
        },
        "GSAI-ML/LLaDA-8B, config.json",
        (8.02e9, "the model card of iLLaDA-8B"),
    ),
    "iLLaDA-8B": Shape(
        _tree("illada", 4096, 32, 32, 8, 14336, 155136, tie_word_embeddings=True),
        "the model card of GSAI-ML/iLLaDA-8B-Base and its modeling_illada.py",
        (7.62e9, "its model card"),
    ),
    "Dream-7B, DiffuCoder": Shape(
        _tree("Dream", 3584, 28, 28, 4, 18944, 152064, rope_theta=1000000.0, mask_token_id=151666),
        "Dream-org/Dream-v0-Base-7B, config.json",
    ),
    "LLaDA2.0-mini, LLaDA2.1-mini": Shape(
        _tree(
            "llada2_moe", 2048, 20, 16, 4, 5120, 157184, head_dim=128, moe_intermediate_size=512,
            num_experts=256, num_experts_per_tok=8, num_shared_experts=1, n_group=8, topk_group=4,
            first_k_dense_replace=1, routed_scaling_factor=2.5, partial_rotary_factor=0.5,
            rope_theta=600000.0, mask_token_id=156895,
        ),
        "inclusionAI/LLaDA2.0-mini, config.json",
        (16e9, "its readme, in whole billions"),
    ),
    "SDAR-8B": Shape(
        _tree("sdar", 4096, 36, 32, 8, 12288, 151936, head_dim=128, block_size=4, mask_token_id=151669),
        "JetLM/SDAR-8B, config.json: the sizes of Qwen3-8B",
    ),
    "Fast-dLLM v2 7B": Shape(
        _tree(
            "Fast_dLLM_Qwen", 3584, 28, 28, 4, 18944, 152064, bd_size=32, rope_theta=1000000.0,
            max_position_embeddings=32768,
        ),
        "Fast_dLLM_v2_7B, config.json",
        (15231233024 / 2, "total_size of its model.safetensors.index.json, bfloat16"),
    ),
    "Stable-DiffCoder-8B": Shape(
        _tree(
            "llama", 4096, 32, 32, 8, 14336, 155136, architectures=["StableDiffcoderForCausalLM"],
            rope_theta=500000.0, max_position_embeddings=8192,
        ),
        "Seed-Coder-8B, config.json: Stable-DiffCoder keeps its architecture",
        (8.25e9, "what an overview quotes of its hub page"),
    ),
    "WeDLM-8B": Shape(
        _tree(
            "wedlm", 4096, 36, 32, 8, 12288, 151936, head_dim=128, qk_norm=True, attention_bias=False,
            rope_theta=1000000.0,
        ),
        "Tencent/WeDLM, readme: initialised from Qwen3-8B, whose sizes these are",
    ),
    "Nemotron-Labs-Diffusion-3B": Shape(
        _nemotron(3072, 26, 9216, 0.25),
        "nvidia/Nemotron-Labs-Diffusion-3B-Base, config.json",
        (7663347000 / 2, "bytes of its model.safetensors, bfloat16, header included"),
    ),
    "Nemotron-Labs-Diffusion-8B": Shape(
        _nemotron(4096, 34, 14336, 16.0), "nvidia/Nemotron-Labs-Diffusion-8B, config.json"
    ),
}  # fmt: skip
