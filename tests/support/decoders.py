"""Toy checkpoints of the families on Llama's, Qwen2's and Qwen3's tree with random weights, and one plain
forward to hold all of them to, which is told who sees whom as a matrix."""

import math
from dataclasses import dataclass, field

import torch
from block_causals import Drawn

from sinkprune.models.published import NATIVE

MASK = 60
_COMMON = {
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 40,
    "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 61,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What a family's published files look like, and what they mean."""

    kind: str  # in NATIVE
    keys: dict  # of config.json, beside the common ones
    root: str = "model"
    head: str = "lm_head"
    biased: str = ""
    qk_norm: bool = False
    sees: str = "blocks"
    shift: int = 0
    block: int | None = 4
    defaults: dict = field(default_factory=dict)  # what the published config leaves to the code

    def config(self, **changes):
        return _COMMON | self.keys | changes

    def tensors(self, seed=0, **changes):
        return tree_tensors(self, self.config(**changes), seed)

    def toy(self, seed=0, **changes):
        config = self.config(**changes)
        model = NATIVE[self.kind](config)
        model.load_state_dict(tree_tensors(self, config, seed))
        return model.eval()


_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
FAMILIES = {
    "illada": Family(
        "illada",
        {
            "architectures": ["ILLaDAForCausalLM"], "model_type": "illada", "attention_bias": False,
            "layer_norm_eps": None, "mlp_bias": False, "resid_pdrop": 0.0, "tie_word_embeddings": True,
            "mask_token_id": MASK,
        },
        sees="all", block=None,
    ),
    "fast_dllm_qwen": Family(
        "Fast_dLLM_Qwen",
        {
            "architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": 4,
            "conplemenrary_mask": True, "rope_scaling": None, "sliding_window": None,
            "use_sliding_window": False, "mask_token_id": MASK,
        },
        biased="qkv", shift=1,
    ),
    "stable_diffcoder": Family(
        "StableDiffcoderForCausalLM",
        {
            "architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama", "attention_bias": False,
            "head_dim": 8, "layer_norm_eps": None, "mlp_bias": False, "rope_scaling": None,
            "mask_token_id": MASK,
        },
    ),
    "wedlm": Family(
        "wedlm",
        {
            "architectures": ["WeDLMForCausalLM"], "model_type": "wedlm", "attention_bias": True,
            "head_dim": 10, "qk_norm": True, "rope_scaling": None, "sliding_window": None,
            "mask_token_id": MASK,
        },
        biased="qkv", qk_norm=True, sees="masks last", block=None,
    ),
    "nemotron_labs_diffusion": Family(
        "nemotron_labs_diffusion",
        {
            "architectures": ["NemotronLabsDiffusionModel"], "model_type": "nemotron_labs_diffusion",
            "attention_bias": False, "block_size": 4, "dlm_paradigm": "bidirectional", "head_dim": 10,
            "mlp_bias": False, "sliding_window": None, "rope_parameters": _YARN, "mask_token_id": MASK,
        },
        root="encoder", head="diffusion_head", sees="context", block=None,
    ),
}  # fmt: skip


def tree_tensors(family, config, seed=0):
    """Random weights under the published names."""
    w = Drawn(seed)
    d, f, v = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    hd = config.get("head_dim") or d // config["num_attention_heads"]
    width, kv = hd * config["num_attention_heads"], hd * config["num_key_value_heads"]
    w.matrix(f"{family.root}.embed_tokens", v, d, scale=4)
    w.gain(f"{family.root}.norm", d)
    if not config["tie_word_embeddings"]:
        w.matrix(family.head, v, d)
    for i in range(config["num_hidden_layers"]):
        name = f"{family.root}.layers.{i}."
        w.gain(name + "input_layernorm", d)
        w.gain(name + "post_attention_layernorm", d)
        for part, shape in {"q": (width, d), "k": (kv, d), "v": (kv, d), "o": (d, width)}.items():
            w.matrix(f"{name}self_attn.{part}_proj", *shape)
            if part in family.biased:
                w.bias(f"{name}self_attn.{part}_proj", shape[0])
        if family.qk_norm:
            w.gain(name + "self_attn.q_norm", hd)
            w.gain(name + "self_attn.k_norm", hd)
        for part, shape in {"gate": (f, d), "up": (f, d), "down": (d, f)}.items():
            w.matrix(f"{name}mlp.{part}_proj", *shape)
    return dict(w)


def frequencies(config, width):
    """Turns a token of each pair of features: transformers' own YaRN, or the geometric series."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") == "yarn":
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        keys = ("hidden_size", "num_attention_heads", "max_position_embeddings")
        values = {key: config[key] for key in keys} | {"head_dim": width, "rope_theta": rope["rope_theta"]}
        asked = LlamaConfig(**values, rope_parameters=rope, rope_scaling=rope)
        asked.rope_theta = rope["rope_theta"]
        found, scale = ROPE_INIT_FUNCTIONS["yarn"](asked, "cpu")
        assert scale == 1
        return found.double()
    return config["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def visible(family, ids, start=0, mask=MASK):
    """Bool ``[L, L]``: whom each token of one sequence sees, where tokens from ``start`` on are filled."""
    length = len(ids)
    seen = torch.zeros(length, length, dtype=torch.bool)
    known = [i for i in range(length) if ids[i] != mask]
    ranks = {token: rank for rank, token in enumerate(known + [i for i in range(length) if ids[i] == mask])}
    for i in range(length):
        for j in range(length):
            if family.sees == "all":
                seen[i, j] = True
            elif family.sees == "blocks":
                seen[i, j] = j // family.block <= i // family.block
            elif family.sees == "context":
                seen[i, j] = j <= i or i >= start
            else:
                seen[i, j] = ranks[j] <= ranks[i]
    return seen


def straight(family, config, tensors, ids, start=0):
    """Logits ``[L, V]`` of one sequence in float64, as the tree gives them (of a shifted family: of the next
    token)."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    hd = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    angle = torch.arange(len(ids), dtype=torch.float64)[:, None] * frequencies(config, hd)
    hidden = ~visible(family, ids, start)
    group = config["num_attention_heads"] // config["num_key_value_heads"]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name + ".weight"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def rope(x):
        a, b = x[:, : hd // 2], x[:, hd // 2 :]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), 1)

    x = w[f"{family.root}.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        name = f"{family.root}.layers.{i}."
        y = norm(x, name + "input_layernorm")
        q, k, v = (linear(y, f"{name}self_attn.{part}_proj").split(hd, 1) for part in "qkv")
        if family.qk_norm:
            q = [norm(t, name + "self_attn.q_norm") for t in q]
            k = [norm(t, name + "self_attn.k_norm") for t in k]
        heads = []
        for j, query in enumerate(q):
            score = rope(query) @ rope(k[j // group]).T / math.sqrt(hd)
            heads.append(score.masked_fill(hidden, -math.inf).softmax(-1) @ v[j // group])
        x = x + linear(torch.cat(heads, 1), name + "self_attn.o_proj")
        y = norm(x, name + "post_attention_layernorm")
        gate = linear(y, name + "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(y, name + "mlp.up_proj"), name + "mlp.down_proj")
    head = f"{family.root}.embed_tokens" if config["tie_word_embeddings"] else family.head
    return norm(x, f"{family.root}.norm") @ w[head + ".weight"].T


def predicted(family, config, tensors, ids, start=0):
    """Logits of each token of one sequence from ``start`` on: row i is about token ``start`` + i."""
    logits = straight(family, config, tensors, ids, start)
    rows = [i - family.shift for i in range(start, len(ids))]
    if family.sees == "context" and start:
        rows[0] = start - 1
    return logits[[max(row, 0) for row in rows]]
