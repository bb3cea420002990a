"""Toy SDARs and LLaDA2s with random weights from the tests' own code, and independent forwards to hold them
to."""

import math

import torch

from sinkprune.models.sdar import SDAR, SDARConfig


def sdar_config(**changes):
    """The keys of a published SDAR config.json, at toy size; the heads side by side are wider than hidden."""
    return {
        "architectures": ["SDARForCausalLM"], "model_type": "sdar", "attention_bias": False,
        "attention_dropout": 0.0, "block_size": 4, "eos_token_id": 0, "head_dim": 10, "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 40, "mask_token_id": 60, "max_position_embeddings": 64,
        "max_window_layers": 36, "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 61,
    } | changes  # fmt: skip


class Drawn(dict):
    """Random tensors by name."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, name, rows, columns, scale=1.0):
        drawn = torch.randn(rows, columns, generator=self.generator)
        self[name + ".weight"] = drawn * scale / math.sqrt(columns)

    def bias(self, name, size):
        self[name + ".bias"] = torch.randn(size, generator=self.generator)

    def gain(self, name, size):
        self[name + ".weight"] = 1 + 0.2 * torch.randn(size, generator=self.generator)


def sdar_tensors(config, seed=0):
    """Random weights under the published names."""
    w = Drawn(seed)
    d, f, v, hd = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    width, kv = hd * config["num_attention_heads"], hd * config["num_key_value_heads"]
    w.matrix("model.embed_tokens", v, d, scale=4)
    w.gain("model.norm", d)
    if not config["tie_word_embeddings"]:
        w.matrix("lm_head", v, d)
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        w.gain(name + "input_layernorm", d)
        w.gain(name + "post_attention_layernorm", d)
        for part, shape in {"q": (width, d), "k": (kv, d), "v": (kv, d), "o": (d, width)}.items():
            w.matrix(f"{name}self_attn.{part}_proj", *shape)
            if config["attention_bias"]:
                w.bias(f"{name}self_attn.{part}_proj", shape[0])
        w.gain(name + "self_attn.q_norm", hd)
        w.gain(name + "self_attn.k_norm", hd)
        for part, shape in {"gate": (f, d), "up": (f, d), "down": (d, f)}.items():
            w.matrix(f"{name}mlp.{part}_proj", *shape)
    return dict(w)


class Straight:
    """One sequence's forward in float64, step by step, from the architectures' descriptions.

    ``positions``: of the tokens; ``block``: size of a block of positions. ``attention`` collects every
    layer's probabilities ``[heads, L, L]``.
    """

    def __init__(self, config, tensors, positions, rotated, block):
        self.config = config
        self.w = {name: tensor.double() for name, tensor in tensors.items()}
        self.positions, self.rotated, self.block, self.attention = positions, rotated, block, []

    def norm(self, x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return x / scale * self.w[name + ".weight"]

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def gated(self, x, name):
        gate = self.linear(x, name + "gate_proj")
        return self.linear(gate * gate.sigmoid() * self.linear(x, name + "up_proj"), name + "down_proj")

    def rope(self, x):  # [L, D]: pairs (i, i + rotated / 2) turn by position / theta^(2 i / rotated)
        half = self.rotated // 2
        exponent = torch.arange(half, dtype=torch.float64) / half
        angle = self.positions.double()[:, None] / self.config["rope_theta"] ** exponent
        a, b = x[:, :half], x[:, half : self.rotated]
        turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        return torch.cat((*turned, x[:, self.rotated :]), 1)

    def attend(self, queries, keys, values):
        """Heads' outputs side by side, of lists of ``[L, D]``."""
        of_block = self.positions // self.block
        hidden = of_block[None, :] > of_block[:, None]
        group, heads, outputs = len(queries) // len(keys), [], []
        for j, q in enumerate(queries):
            score = self.rope(q) @ self.rope(keys[j // group]).T / math.sqrt(q.shape[1])
            heads.append(score.masked_fill(hidden, -math.inf).softmax(-1))
            outputs.append(heads[-1] @ values[j // group])
        self.attention.append(torch.stack(heads))
        return torch.cat(outputs, 1)


def straight_sdar(config, tensors, sequence, positions=None, probabilities=None):
    """Logits ``[L, V]`` of one sequence; ``probabilities``, a list, receives ``[layers, heads, L, L]``."""
    positions = torch.arange(len(sequence)) if positions is None else positions
    hd = config["head_dim"]
    s = Straight(config, tensors, positions, hd, config["block_size"])
    x = s.w["model.embed_tokens.weight"][sequence]
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        y = s.norm(x, name + "input_layernorm")
        q, k, v = (s.linear(y, f"{name}self_attn.{part}_proj").split(hd, 1) for part in "qkv")
        q = [s.norm(t, name + "self_attn.q_norm") for t in q]
        k = [s.norm(t, name + "self_attn.k_norm") for t in k]
        x = x + s.linear(s.attend(q, k, v), name + "self_attn.o_proj")
        x = x + s.gated(s.norm(x, name + "post_attention_layernorm"), name + "mlp.")
    if probabilities is not None:
        probabilities.append(torch.stack(s.attention))
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return s.norm(x, "model.norm") @ s.w[head + ".weight"].T


def toy_sdar(seed=0, **changes):
    """A native toy model of ``sdar_config(**changes)``."""
    config = sdar_config(**changes)
    model = SDAR(SDARConfig.from_dict(config))
    model.load_state_dict(sdar_tensors(config, seed))
    return model.eval()
