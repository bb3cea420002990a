"""Toy SDARs and LLaDA2s with random weights from the tests' own code, and independent forwards to hold them
to."""

import math

import torch

from sinkprune.models.llada2 import LLaDA2, LLaDA2Config
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


def llada2_config(**changes):
    """The keys of a published LLaDA2 config.json, at toy size: one dense layer, then experts in groups."""
    return {
        "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "attention_dropout": 0.0,
        "first_k_dense_replace": 1, "head_dim": 12, "hidden_act": "silu", "hidden_size": 32,
        "intermediate_size": 40, "max_position_embeddings": 64, "moe_intermediate_size": 14,
        "moe_router_enable_expert_bias": True, "n_group": 4, "norm_topk_prob": True, "num_attention_heads": 4,
        "num_experts": 12, "num_experts_per_tok": 3, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "num_shared_experts": 2, "pad_token_id": 59, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 600000, "routed_scaling_factor": 2.5, "rotary_dim": 6,
        "score_function": "sigmoid", "tie_word_embeddings": False, "topk_group": 2, "use_bias": False,
        "use_qk_norm": True, "use_qkv_bias": False, "use_sliding_window": False, "vocab_size": 61,
        "block_size": 4, "mask_token_id": 60,
    } | changes  # fmt: skip


def llada2_tensors(config, seed=0):
    """Random weights under the published names."""
    w = Drawn(seed)
    d, v, hd, f = (config[k] for k in ("hidden_size", "vocab_size", "head_dim", "moe_intermediate_size"))
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]

    def gated(name, width):
        for part, shape in {"gate": (width, d), "up": (width, d), "down": (d, width)}.items():
            w.matrix(f"{name}{part}_proj", *shape)

    w.matrix("model.word_embeddings", v, d, scale=4)
    w.gain("model.norm", d)
    w.matrix("lm_head", v, d)
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        w.gain(name + "input_layernorm", d)
        w.gain(name + "post_attention_layernorm", d)
        w.matrix(name + "attention.query_key_value", (heads + 2 * kv) * hd, d)
        w.matrix(name + "attention.dense", d, heads * hd)
        if config["use_qkv_bias"]:
            w.bias(name + "attention.query_key_value", (heads + 2 * kv) * hd)
        if config["use_bias"]:
            w.bias(name + "attention.dense", d)
        w.gain(name + "attention.query_layernorm", hd)
        w.gain(name + "attention.key_layernorm", hd)
        if i < config["first_k_dense_replace"]:
            gated(name + "mlp.", config["intermediate_size"])
            continue
        w.matrix(name + "mlp.gate", config["num_experts"], d)
        w[name + "mlp.gate.expert_bias"] = 0.3 * torch.randn(config["num_experts"], generator=w.generator)
        for expert in range(config["num_experts"]):
            gated(f"{name}mlp.experts.{expert}.", f)
        if config["num_shared_experts"]:
            gated(name + "mlp.shared_experts.", f * config["num_shared_experts"])
    return dict(w)


def straight_experts(s, y, name, config):
    """Every token's experts, one token at a time, by sorting."""
    size, rows = config["num_experts"] // config["n_group"], []
    for token in y:
        score = (s.w[name + "gate.weight"] @ token).sigmoid()
        rank = (score + s.w[name + "gate.expert_bias"]).tolist()
        groups = [list(range(first, first + size)) for first in range(0, config["num_experts"], size)]
        groups.sort(key=lambda group: -sum(sorted(rank[e] for e in group)[-2:]))
        reach = [e for group in groups[: config["topk_group"]] for e in group]
        chosen = sorted(reach, key=lambda e: -rank[e])[: config["num_experts_per_tok"]]
        total = sum(score[e] for e in chosen) if len(chosen) > 1 else 1.0
        parts = [score[e] / total * s.gated(token, f"{name}experts.{e}.") for e in chosen]
        rows.append(sum(parts) * config["routed_scaling_factor"])
    routed = torch.stack(rows)
    return routed + s.gated(y, name + "shared_experts.") if config["num_shared_experts"] else routed


def straight_llada2(config, tensors, sequence, positions=None, probabilities=None):
    """Logits ``[L, V]`` of one sequence; ``probabilities``, a list, receives ``[layers, heads, L, L]``."""
    positions = torch.arange(len(sequence)) if positions is None else positions
    hd, h, kv = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    s = Straight(config, tensors, positions, int(hd * config["partial_rotary_factor"]), config["block_size"])
    x = s.w["model.word_embeddings.weight"][sequence]
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        y = s.norm(x, name + "input_layernorm")
        heads = s.linear(y, name + "attention.query_key_value").split(hd, 1)
        q = [s.norm(t, name + "attention.query_layernorm") for t in heads[:h]]
        k = [s.norm(t, name + "attention.key_layernorm") for t in heads[h : h + kv]]
        x = x + s.linear(s.attend(q, k, heads[h + kv :]), name + "attention.dense")
        y = s.norm(x, name + "post_attention_layernorm")
        dense = i < config["first_k_dense_replace"]
        x = x + (s.gated(y, name + "mlp.") if dense else straight_experts(s, y, name + "mlp.", config))
    if probabilities is not None:
        probabilities.append(torch.stack(s.attention))
    return s.norm(x, "model.norm") @ s.w["lm_head.weight"].T


def toy_llada2(seed=0, **changes):
    """A native toy model of ``llada2_config(**changes)``."""
    config = llada2_config(**changes)
    model = LLaDA2(LLaDA2Config.from_dict(config))
    model.load_state_dict(llada2_tensors(config, seed))
    return model.eval()


class Kept:
    """A cache: keys after RoPE and values of the calls so far, side by side."""

    def __init__(self):
        self.pairs, self.at = {}, None

    def key_positions(self, positions):
        self.at = positions if self.at is None else torch.cat((self.at, positions), -1)
        return self.at

    def layer(self, index):
        def update(k, v):
            if index in self.pairs:
                k, v = (torch.cat(pair, 2) for pair in zip(self.pairs[index], (k, v), strict=True))
            self.pairs[index] = k, v
            return k, v

        return update
