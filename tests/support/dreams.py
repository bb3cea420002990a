"""Toy Dreams with random weights from the tests' own code, and an independent forward to hold them to."""

import math

import torch

from sinkprune.models.dream import Dream, DreamConfig


def published_config(**changes):
    """The keys of a published Dream config.json, at toy size."""
    return {
        "architectures": ["DreamModel"], "model_type": "Dream", "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 40, "mask_token_id": 60, "max_position_embeddings": 64,
        "max_window_layers": 28, "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "pad_token_id": 59, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 61,
    } | changes  # fmt: skip


def published_tensors(config, seed=0):
    """Random weights under the published names."""
    g = torch.Generator().manual_seed(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=g) / math.sqrt(columns)

    def gain():
        return 1 + 0.2 * torch.randn(d, generator=g)

    tensors = {"model.embed_tokens.weight": matrix(v, d) * 4, "model.norm.weight": gain()}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(v, d)
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        tensors |= {
            name + norm + ".weight": gain() for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for part, rows in (("q", d), ("k", kv), ("v", kv)):
            tensors[f"{name}self_attn.{part}_proj.weight"] = matrix(rows, d)
            if config.get("attention_bias", True):
                tensors[f"{name}self_attn.{part}_proj.bias"] = torch.randn(rows, generator=g)
        tensors[name + "self_attn.o_proj.weight"] = matrix(d, d)
        for part, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            tensors[f"{name}mlp.{part}_proj.weight"] = matrix(*shape)
    return tensors


def straight_forward(config, tensors, ids, valid=None, probabilities=None):
    """Dream's forward for one sequence at a time, in float64, from the architecture's description.

    ``probabilities``, a list, receives each sequence's attention ``[layers, heads, L, L]``.
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}
    h, kvh = config["num_attention_heads"], config["num_key_value_heads"]
    hd = config["hidden_size"] // h
    outputs = []

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name + ".weight"]

    def linear(x, name):
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def rope(x):  # [L, hd]: pairs (i, i + hd / 2) turn by position / theta^(2 i / hd)
        position = torch.arange(len(x), dtype=torch.float64)[:, None]
        angle = position / config["rope_theta"] ** (torch.arange(hd // 2, dtype=torch.float64) * 2 / hd)
        turned = torch.complex(x[:, : hd // 2], x[:, hd // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), 1)

    for row, sequence in enumerate(ids):
        seen = torch.ones(len(sequence), dtype=torch.bool) if valid is None else valid[row].bool()
        x = w["model.embed_tokens.weight"][sequence]
        attention = []
        for i in range(config["num_hidden_layers"]):
            name = f"model.layers.{i}."
            y = norm(x, name + "input_layernorm")
            q, k, v = (linear(y, f"{name}self_attn.{part}_proj").split(hd, 1) for part in "qkv")
            heads = []
            for j in range(h):
                g = j // (h // kvh)
                score = rope(q[j]) @ rope(k[g]).T / math.sqrt(hd)
                score[:, ~seen] = -math.inf
                attention.append(score.softmax(-1))
                heads.append(attention[-1] @ v[g])
            x = x + linear(torch.cat(heads, 1), name + "self_attn.o_proj")
            y = norm(x, name + "post_attention_layernorm")
            gate = linear(y, name + "mlp.gate_proj")
            x = x + linear(gate * gate.sigmoid() * linear(y, name + "mlp.up_proj"), name + "mlp.down_proj")
        if probabilities is not None:
            probabilities.append(torch.stack(attention).unflatten(0, (config["num_hidden_layers"], h)))
        head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
        outputs.append(norm(x, "model.norm") @ w[head + ".weight"].T)
    return torch.stack(outputs)


def toy_dream(seed=0, **changes):
    """A native toy model of ``published_config(**changes)``."""
    config = published_config(**changes)
    model = Dream(DreamConfig.from_dict(config))
    model.load_state_dict(published_tensors(config, seed))
    return model.eval()
