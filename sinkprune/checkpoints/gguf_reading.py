"""Reading GGUF files of diffusion models back: those that ``export`` wrote, and others' LLaDA and Dream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinkprune.checkpoints.gguf_tokenizer import read_tokenizer
from sinkprune.checkpoints.gguf_writing import gguf_package, halves
from sinkprune.checkpoints.rebuilding import rebuilt
from sinkprune.checkpoints.trees import LLADA, LLAMA, Tree
from sinkprune.plans import PrunePlan
from sinkprune.targets import ARCHITECTURES, Architecture

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_gguf(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """``(model in evaluation mode, tokenizer or None)`` of a GGUF file.

    A file that ``export`` wrote gives the compact model with its plan; another's of LLaDA or Dream the dense
    native model.

    Args:
        path: the file.
        device, dtype: of the parameters; dtype None takes that of the embedding, and float32 where it is
            quantised.

    Raises:
        ValueError: not a GGUF file, an architecture that says too little of a diffusion model, experts, or
            tensors that do not fit.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a GGUF file that can be read: {error}") from error
    keys = {name: field.contents() for name, field in reader.fields.items()}
    name = str(keys.get("general.architecture"))
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ValueError(f"{path}: architecture {name!r} is not read; known: {', '.join(ARCHITECTURES)}")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    plan = None
    if "sinkprune.config" in keys:
        config = json.loads(keys["sinkprune.config"])
        if "sinkprune.plan" in keys:
            plan = PrunePlan.from_dict(json.loads(keys["sinkprune.plan"]))
    else:
        config = _config_of(path, name, keys, tied="output.weight" not in stored)
    tree = LLADA if config.get("model_type") == "llada" else LLAMA
    if dtype is None:
        dtype = _DTYPES.get(stored["token_embd.weight"].tensor_type.name, torch.float32)
    head_dim = int(keys[f"{name}.attention.key_length"]) if f"{name}.attention.key_length" in keys else 0
    head_dim = head_dim or int(keys[f"{name}.rope.dimension_count"])
    tensors: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        found = _tensor(gguf, tensor, architecture, head_dim).to(dtype)
        if "_exps." in key:
            experts[key] = found
        else:
            tensors[published_name(path, key, tree)] = found
    tensors |= _experts(experts, tree)
    return rebuilt(config, plan, tensors, device=device, dtype=dtype), read_tokenizer(keys)


def published_name(path: Path, name: str, tree: Tree) -> str:
    """The published name of GGUF's ``blk.3.attn_q.weight`` and the like."""
    start = {"token_embd": tree.embedding, "output_norm": tree.norm, "output": tree.head}
    if not name.startswith("blk."):
        part, _, kind = name.rpartition(".")
        if part in start:
            return f"{start[part]}.{kind}"
    else:
        _, layer, part, kind = name.split(".")
        if part in tree.parts:
            return tree.name(int(layer), part, kind)
    raise ValueError(f"{path}: tensor {name} is not read")


def _experts(stacked: dict[str, Tensor], tree: Tree) -> dict[str, Tensor]:
    """Experts as transformers' classes hold them: gate and up in one parameter, ``[experts, rows,
    columns]``."""
    found: dict[str, Tensor] = {}
    for name, down in stacked.items():
        if "ffn_down" in name:
            gate, up = (stacked[name.replace("ffn_down", part)] for part in ("ffn_gate", "ffn_up"))
            base = f"{tree.layer.format(name.split('.')[1])}.mlp.experts."
            found |= {base + "gate_up_proj": torch.cat((gate, up), 1), base + "down_proj": down}
    return found


def _tensor(gguf: Any, stored: Any, architecture: Architecture, head_dim: int) -> Tensor:
    """A tensor in float32, rows of q and k in the published order."""
    data = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    if architecture.neighbours and (".attn_q." in stored.name or ".attn_k." in stored.name):
        return halves(data, data.shape[0] // head_dim)
    return data


def _config_of(path: Path, name: str, keys: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The config of a dense LLaDA or Dream that others converted."""
    if name not in ("llada", "dream"):
        raise ValueError(
            f"{path}: architecture {name!r} does not say which diffusion model it is: only files that "
            "sinkprune wrote (sinkprune.config) are read"
        )
    given = {key.removeprefix(f"{name}."): value for key, value in keys.items() if key.startswith(f"{name}.")}
    heads = given["attention.head_count"]
    width = given.get("attention.key_length", given["embedding_length"] // heads)
    if width * heads != given["embedding_length"]:
        raise ValueError(
            f"{path}: {heads} heads of {width} features for hidden states of {given['embedding_length']}, "
            "and no plan that says what was removed"
        )
    vocabulary = given.get("vocab_size") or len(keys["tokenizer.ggml.tokens"])
    config = {
        "mask_token_id": keys.get("tokenizer.ggml.mask_token_id"),
        "pad_token_id": keys.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": keys.get("tokenizer.ggml.eos_token_id"),
        "rms_norm_eps": given["attention.layer_norm_rms_epsilon"],
        "rope_theta": given.get("rope.freq_base", 10000.0),
        "vocab_size": vocabulary,
    }
    if name == "llada":
        return config | {
            "model_type": "llada",
            "d_model": given["embedding_length"],
            "n_heads": heads,
            "n_kv_heads": given.get("attention.head_count_kv", heads),
            "n_layers": given["block_count"],
            "mlp_hidden_size": given["feed_forward_length"],
            "embedding_size": vocabulary,
            "max_sequence_length": given["context_length"],
            "weight_tying": tied,
        }
    return config | {
        "model_type": "Dream",
        "hidden_size": given["embedding_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": given.get("attention.head_count_kv", heads),
        "num_hidden_layers": given["block_count"],
        "intermediate_size": given["feed_forward_length"],
        "max_position_embeddings": given["context_length"],
        "tie_word_embeddings": tied,
    }
