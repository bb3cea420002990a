"""A pruned model as one GGUF file for llama.cpp, with the architecture there that computes the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sinkprune.checkpoints.fitting import architecture_for
from sinkprune.checkpoints.gguf_tokenizer import add_tokenizer
from sinkprune.checkpoints.trees import Trimmed, experts_of
from sinkprune.targets import Architecture

if TYPE_CHECKING:
    import gguf

DTYPES = ("f32", "f16", "bf16", "q8_0")
Q8_ROW = 32  # values of a Q8_0 block, which a row must be a multiple of


def gguf_package() -> Any:
    """The ``gguf`` package. Raises ``ValueError`` saying how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"GGUF files need the gguf package: pip install 'sinkprune[export]' ({error})"
        ) from error
    return gguf


def write_gguf(
    trimmed: Trimmed,
    path: Path,
    *,
    dtype: str = "f32",
    tokenizer: Any = None,
    notes: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Write ``trimmed`` to ``path``, one tensor in memory at a time.

    Args:
        trimmed: of ``trees.trim``.
        path: the file, which is overwritten.
        dtype: of matrices: ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"``. Norms and biases stay float32;
            with Q8_0 a matrix whose rows are no multiple of 32 is float16.
        tokenizer: a transformers fast tokenizer, or None.
        notes: strings under ``sinkprune.*``, such as where the model came from.

    Returns:
        What was written: the architecture, whether ``llama-diffusion-cli`` runs it, and the matrices that
            stayed
        float16.

    Raises:
        ValueError: an unknown dtype, no ``gguf`` package, a tokenizer that llama.cpp does not know, or no
            architecture for the model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    gguf = gguf_package()
    architecture = architecture_for(trimmed)
    writer = gguf.GGUFWriter(path, architecture.name)
    _add_sizes(writer, trimmed, architecture)
    writer.add_file_type(
        {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[dtype]  # llama_ftype
    )
    add_tokenizer(writer, tokenizer, trimmed)
    for key, value in (notes or {}).items():
        writer.add_string(f"sinkprune.{key}", value)
    kinds = {}
    shapes = list(_shapes(trimmed, architecture))
    for name, shape in shapes:
        kinds[name] = _kind(name, shape, dtype)
        stored = gguf.GGMLQuantizationType[kinds[name].upper()]
        nbytes = _nbytes(gguf, shape, stored)
        writer.add_tensor_info(name, shape, _numpy_dtype(kinds[name]), nbytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors_of(trimmed, architecture):
        data = tensor.float().contiguous().cpu().numpy()
        stored = gguf.GGMLQuantizationType[kinds[name].upper()]
        writer.write_tensor_data(gguf.quants.quantize(data, stored))
    writer.close()
    wider = [name for name, kind in kinds.items() if dtype == "q8_0" and kind == "f16"]
    return {"architecture": architecture.name, "diffusion_cli": architecture.diffusion, "float16": wider}


def _add_sizes(writer: gguf.GGUFWriter, trimmed: Trimmed, architecture: Architecture) -> None:
    geometry = trimmed.geometry
    writer.add_block_count(geometry.num_layers)
    writer.add_context_length(geometry.context)
    writer.add_embedding_length(geometry.hidden)
    writer.add_vocab_size(geometry.vocabulary)

    def each(sizes: tuple[int, ...]) -> Any:
        return list(sizes) if architecture.ragged else sizes[0]

    writer.add_head_count(each(geometry.heads))
    writer.add_head_count_kv(each(geometry.kv_heads))
    writer.add_feed_forward_length(each(geometry.channels) if not trimmed.experts[0] else _width(trimmed))
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(trimmed.theta)
    writer.add_layer_norm_rms_eps(trimmed.eps)
    writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(bool(trimmed.shift))
    if trimmed.experts[0]:
        writer.add_expert_count(trimmed.experts[0])
        writer.add_expert_used_count(trimmed.experts[1])
        writer.add_expert_feed_forward_length(_width(trimmed))


def _width(trimmed: Trimmed) -> int:
    """Channels of one expert."""
    up = experts_of(trimmed, 0, "ffn_up")
    return 0 if up is None else up.shape[1]


def _names(trimmed: Trimmed) -> Iterator[tuple[str, str]]:
    """GGUF's and the published name of every tensor outside the experts."""
    tree = trimmed.tree
    for name, module in (("token_embd", tree.embedding), ("output_norm", tree.norm), ("output", tree.head)):
        if name != "output" or not trimmed.tied:
            yield f"{name}.weight", f"{module}.weight"
    for layer in range(trimmed.geometry.num_layers):
        empty = trimmed.geometry.heads[layer] == 0
        for part in tree.parts:
            if empty and part.startswith("attn"):
                continue
            for kind in ("weight", "bias"):
                published = tree.name(layer, part, kind)
                if published in trimmed.tensors:
                    yield f"blk.{layer}.{part}.{kind}", published


def tensors_of(trimmed: Trimmed, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by GGUF's name, rows of q and k in the order of the architecture's RoPE."""
    for name, published in _names(trimmed):
        tensor = trimmed.tensors[published]
        if architecture.neighbours and (".attn_q." in name or ".attn_k." in name):
            tensor = neighbours(tensor, tensor.shape[0] // trimmed.geometry.head_dim)
        yield name, tensor
    for layer in range(trimmed.geometry.num_layers) if trimmed.experts[0] else ():
        for part in ("ffn_gate", "ffn_up", "ffn_down"):
            stacked = experts_of(trimmed, layer, part)
            if stacked is not None:
                yield f"blk.{layer}.{part}_exps.weight", stacked


def _shapes(trimmed: Trimmed, architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, tensor in tensors_of(trimmed, architecture):
        yield name, tuple(tensor.shape)


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows ``[heads * D, …]`` of a projection whose heads turn features (i, i + D/2), in the order that turns
    (2 i, 2 i + 1)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(rows: Tensor, heads: int) -> Tensor:
    """``neighbours`` undone."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """In what a tensor is stored."""
    if len(shape) == 1 or "ffn_gate_inp" in name:  # llama.cpp adds and routes in float32
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % Q8_ROW else dtype


def _numpy_dtype(kind: str) -> Any:
    import numpy as np

    return np.dtype({"f32": "float32", "f16": "float16"}.get(kind, "int8"))


def _nbytes(gguf: Any, shape: tuple[int, ...], stored: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[stored]
    count = 1
    for n in shape:
        count *= n
    return count // block * size


def note_of(values: dict[str, Any]) -> str:
    """A note as compact JSON."""
    return json.dumps(values, separators=(",", ":"))
