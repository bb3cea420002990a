"""Toy LLaDAs with random weights from the tests' own code, and an independent forward to hold them to."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sinkprune.adapters import adapter_for
from sinkprune.models.llada import LLaDA, LLaDAConfig
from sinkprune.plans import LayerPlan, PrunePlan

MASK = 60  # the mask token of the published toy config


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Import this into a module of toy-sized tests: on busy cores, waiting for a second thread is slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def published_config(**changes):
    """The keys of a published config.json, at toy size."""
    return {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu", "alibi": False,
        "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False, "block_type": "llama", "d_model": 32, "embedding_size": 61,
        "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms",
        "layer_norm_with_affine": True, "mask_token_id": 60, "max_sequence_length": 64, "mlp_hidden_size": 40,
        "mlp_ratio": 4, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3, "pad_token_id": 0, "rms_norm_eps": 1e-5,
        "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
        "vocab_size": 61, "weight_tying": False,
    } | changes  # fmt: skip


def published_tensors(config, seed=0):
    """Random weights under the published names."""
    g = torch.Generator().manual_seed(seed)
    d, f, v = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv = d // config["n_heads"] * config["n_kv_heads"]

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=g) / math.sqrt(columns)

    def gain(n):
        return 1 + 0.2 * torch.randn(n, generator=g)

    tensors = {"model.transformer.wte.weight": matrix(v, d) * 4, "model.transformer.ln_f.weight": gain(d)}
    if not config["weight_tying"]:
        tensors["model.transformer.ff_out.weight"] = matrix(v, d)
        if config["include_bias"]:
            tensors["model.transformer.ff_out.bias"] = torch.randn(v, generator=g)
    for i in range(config["n_layers"]):
        name = f"model.transformer.blocks.{i}."
        tensors[name + "attn_norm.weight"], tensors[name + "ff_norm.weight"] = gain(d), gain(d)
        shapes = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "attn_out": (d, d),
                  "ff_proj": (f, d), "up_proj": (f, d), "ff_out": (d, f)}  # fmt: skip
        for part, (rows, columns) in shapes.items():
            tensors[f"{name}{part}.weight"] = matrix(rows, columns)
            if config["include_bias"] or (
                config["include_qkv_bias"] and part in ("q_proj", "k_proj", "v_proj")
            ):
                tensors[f"{name}{part}.bias"] = torch.randn(rows, generator=g)
        if config["attention_layer_norm"]:
            tensors[name + "q_norm.weight"], tensors[name + "k_norm.weight"] = gain(d), gain(kv)
    return tensors


def write_checkpoint(folder, config, tensors, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
        weight_map |= {name: f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def straight_forward(config, tensors, ids, valid=None, probabilities=None):
    """LLaDA's forward for one sequence at a time, in float64, from the architecture's description.

    ``probabilities``, a list, receives each sequence's attention ``[layers, heads, L, L]``.
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}
    h, kvh = config["n_heads"], config["n_kv_heads"]
    hd = config["d_model"] // h
    outputs = []

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    def linear(x, name):
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def rope(x):  # [L, hd]
        position = torch.arange(x.shape[0], dtype=torch.float64)[:, None]
        angle = position * config["rope_theta"] ** (-torch.arange(0, hd, 2, dtype=torch.float64) / hd)
        a, b = x[:, : hd // 2], x[:, hd // 2 :]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), 1)

    for row, sequence in enumerate(ids):
        seen = torch.ones(len(sequence), dtype=torch.bool) if valid is None else valid[row].bool()
        x = w["model.transformer.wte.weight"][sequence]
        attention = []
        for i in range(config["n_layers"]):
            name = f"model.transformer.blocks.{i}."
            y = norm(x, name + "attn_norm.weight")
            q, k, v = (linear(y, name + part) for part in ("q_proj", "k_proj", "v_proj"))
            if config["attention_layer_norm"]:
                q, k = norm(q, name + "q_norm.weight"), norm(k, name + "k_norm.weight")
            heads = []
            for j in range(h):
                g = j // (h // kvh)
                qj, kj = rope(q[:, j * hd : (j + 1) * hd]), rope(k[:, g * hd : (g + 1) * hd])
                score = qj @ kj.T / math.sqrt(hd)
                score[:, ~seen] = -math.inf
                attention.append(score.softmax(-1))
                heads.append(attention[-1] @ v[:, g * hd : (g + 1) * hd])
            x = x + linear(torch.cat(heads, 1), name + "attn_out")
            y = norm(x, name + "ff_norm.weight")
            gate = linear(y, name + "ff_proj")
            x = x + linear(gate * gate.sigmoid() * linear(y, name + "up_proj"), name + "ff_out")
        if probabilities is not None:
            probabilities.append(torch.stack(attention).unflatten(0, (config["n_layers"], h)))
        x = norm(x, "model.transformer.ln_f.weight")
        head = "wte" if config["weight_tying"] else "ff_out"
        logits = x @ w[f"model.transformer.{head}.weight"].T
        if config["include_bias"] and not config["weight_tying"]:
            logits = logits + w["model.transformer.ff_out.bias"]
        outputs.append(logits / math.sqrt(config["d_model"]) if config["scale_logits"] else logits)
    return torch.stack(outputs)


def toy(seed: int = 0, *, sharpness: float = 1.0, **changes) -> LLaDA:
    """A toy model of ``published_config(**changes)``; ``sharpness`` scales the queries, so sinks form."""
    config = published_config(**changes)
    model = LLaDA(LLaDAConfig.from_dict(config))
    tensors = published_tensors(config, seed)
    for name in tensors:
        if "q_proj" in name:
            tensors[name] *= sharpness
    model.load_state_dict(tensors)
    return model.eval()


def forward_of(model: LLaDA, ids: Tensor, valid: Tensor | None = None, probabilities=None) -> Tensor:
    """The independent float64 logits of a dense toy model."""
    return straight_forward(model.config.to_dict(), model.state_dict(), ids, valid, probabilities)


def tokens(*shape: int, seed: int = 0, vocabulary: int = MASK) -> Tensor:
    """Random ids, none of them the padding or the mask token."""
    return torch.randint(1, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def manual_plan(model: LLaDA, kept_heads: list[list[int]], kept_channels=None) -> PrunePlan:
    """A plan for ``model`` that keeps these heads (and channels) in each layer."""
    adapter = adapter_for(model)
    channels = kept_channels or [None] * len(kept_heads)
    layers = [LayerPlan(h, c) for h, c in zip(kept_heads, channels, strict=True)]
    return PrunePlan(adapter.geometry(), adapter.fingerprint(), layers)


def bits(model: LLaDA) -> dict[str, Tensor]:
    """A copy of every tensor, to compare with later."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


class WordTokenizer:
    """Words ``w7`` to id 7; id 0 pads and ends. As much of a tokenizer as the package asks for."""

    pad_token_id = 0
    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{i}" for i in ids)

    def save_pretrained(self, folder: str) -> None:
        with open(f"{folder}/words.json", "w") as file:
            json.dump({"words": 61}, file)
