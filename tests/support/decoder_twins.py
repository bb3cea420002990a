"""Structural twins of the published iLLaDA, RND1 and Fast-dLLM v2 code, written from its interface and with
none of its code, under names of ours."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from block_causals import Drawn
from decoders import FAMILIES, tree_tensors
from layer_twins import LayersTwin, LayerTwin, MLPTwin, RoutedTwin, part_turned
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from upstream_twins import Gain


class ILLaDAAttentionTwin(nn.Module):
    """No cache; projections, RoPE and repeated keys in a method of their own."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.hidden_size = config, layer_idx, config.hidden_size
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        kv = self.num_key_value_heads * self.head_dim
        self.q_proj, self.o_proj = (
            nn.Linear(self.hidden_size, self.hidden_size, bias=False) for _ in range(2)
        )
        self.k_proj, self.v_proj = (nn.Linear(self.hidden_size, kv, bias=False) for _ in range(2))

    def split(self, x, position_ids):
        batch, length, _ = x.shape
        heads = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
        q, k, v = (
            project(x).view(batch, length, count, self.head_dim).transpose(1, 2)
            for project, count in zip((self.q_proj, self.k_proj, self.v_proj), heads, strict=True)
        )
        q, k = (part_turned(t, position_ids, self.head_dim, self.config.rope_theta) for t in (q, k))
        return q, *(t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))

    def forward(self, x, position_ids, attention_mask=None, **keywords):
        q, k, v = self.split(x, position_ids)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
        return self.o_proj(out.transpose(1, 2).contiguous().view(*x.shape[:2], -1)), None


class RND1AttentionTwin(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.head_dim, self.num_heads = config.head_dim, config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        width, kv = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, kv, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (Gain(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x, position_ids, attention_mask=None, **keywords):
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = (part_turned(t, position_ids, self.head_dim, self.config.rope_theta) for t in (q, k))
        k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=0.0, is_causal=self.is_causal
        )
        out = out.transpose(1, 2).contiguous().view(batch, length, self.num_heads * self.head_dim)
        return self.o_proj(out), None


class FastDLLMAttentionTwin(nn.Module):
    """Asks transformers for PyTorch's attention, under the mask of blocks that the model makes."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, kv = self.head_dim**-0.5, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, kv, bias=True) for _ in range(2))
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, position_ids, attention_mask=None, **keywords):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (part_turned(t, position_ids, self.head_dim, self.config.rope_theta) for t in (q, k))
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = attend(self, q, k, v, attention_mask, is_causal=False, dropout=0.0, scaling=self.scaling)
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), None


class FastDLLMTwin(LayersTwin):
    def forward(self, input_ids, use_cache=False, block_size=32):
        block = torch.arange(input_ids.shape[1]) // block_size
        mask = (block[None, :] <= block[:, None])[None, None]
        return super().forward(input_ids, attention_mask=mask)


def _tree_twin(name, attention, model, seed, changes):
    family = FAMILIES[name]
    values = family.config(**changes)
    config = SimpleNamespace(**values)
    layers = [
        LayerTwin(
            config, attention(config, i), MLPTwin(config.hidden_size, config.intermediate_size), "self_attn"
        )
        for i in range(config.num_hidden_layers)
    ]
    twin, tensors = model(config, layers, "embed_tokens"), tree_tensors(family, values, seed)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    twin.load_state_dict(tensors)
    if config.tie_word_embeddings:
        twin.lm_head.weight = twin.model.embed_tokens.weight
    return twin.eval()


def illada_twin(seed=0, **changes):
    return _tree_twin("illada", ILLaDAAttentionTwin, LayersTwin, seed, changes)


def fast_dllm_twin(seed=0, **changes):
    return _tree_twin("fast_dllm_qwen", FastDLLMAttentionTwin, FastDLLMTwin, seed, changes)


def rnd1_twin(seed=0, **changes):
    values = {
        "_attn_implementation": "sdpa", "attention_dropout": 0.0, "head_dim": 10, "hidden_size": 32,
        "mask_token_id": 60, "max_position_embeddings": 64, "moe_intermediate_size": 14,
        "num_attention_heads": 4, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "vocab_size": 61,
    } | changes  # fmt: skip
    config = SimpleNamespace(**values)
    layers = [
        LayerTwin(
            config,
            RND1AttentionTwin(config, i),
            RoutedTwin(config, config.moe_intermediate_size, normed=True),
            "self_attn",
        )
        for i in range(config.num_hidden_layers)
    ]
    model, drawn = LayersTwin(config, layers, "embed_tokens"), Drawn(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            drawn.matrix(name.removesuffix(".weight"), *tensor.shape, scale=4 if "embed" in name else 1)
        else:
            drawn.gain(name.removesuffix(".weight"), *tensor.shape)
    model.load_state_dict(dict(drawn))
    return model.eval()
