"""Structural twins of the published SDAR, LLaDA2 and LLaDA-MoE code, written from its interface.

Same module trees, tensor names, forward signatures, masks and cache protocol as what users load with remote
code, and none of its code. Class names are ours, so that recognition by class name would fail.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from block_causals import Drawn, llada2_config, llada2_tensors, sdar_config, sdar_tensors
from torch import nn
from upstream_twins import Gain, Output, turn

flash_calls = []


def flash_attn_func(q, k, v, causal=False, softmax_scale=None):
    """FlashAttention's signature: ``[B, L, H, D]``."""
    flash_calls.append(q.shape)
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v)


def part_turned(x, positions, rotated, theta):
    """RoPE of the leading features of ``[B, H, L, D]`` at ``[B, L]``."""
    rows = [turn(x[i : i + 1, ..., :rotated], p, theta) for i, p in enumerate(positions)]
    return torch.cat((torch.cat(rows), x[..., rotated:]), -1)


class SDARAttentionTwin(nn.Module):
    """The mask is required; where it hides nothing FlashAttention runs. The cache is transformers', written
    only with ``store_kv``."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.hidden_size = config.head_dim, config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width, kv = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm, self.k_norm = (Gain(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x, position_ids, attention_mask, past_key_value=None, store_kv=False, **keywords):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = (part_turned(t, position_ids, self.head_dim, self.config.rope_theta) for t in (q, k))
        if past_key_value is not None and store_kv:
            k, v = past_key_value.update(k, v, self.layer_idx)
        elif past_key_value is not None and self.layer_idx < len(past_key_value.layers):
            past = past_key_value.layers[self.layer_idx]
            k, v = torch.cat((past.keys, k), 2), torch.cat((past.values, v), 2)
        if torch.all(attention_mask.bool()):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = flash_attn_func(q, k, v, causal=False, softmax_scale=self.scaling).flatten(2)
        else:
            out = F.scaled_dot_product_attention(
                query=q, key=k, value=v, attn_mask=attention_mask.bool(), is_causal=False, scale=self.scaling,
                enable_gqa=True,
            ).transpose(1, 2).flatten(2)  # fmt: skip
        return self.o_proj(out), None


class MLPTwin(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LLaDA2AttentionTwin(nn.Module):
    """The mask must be ``[B, 1, Lq, Lk]`` where there is one."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_value_heads, self.hidden_size = config.num_key_value_heads, config.hidden_size
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.rope_dim = int(self.head_dim * config.partial_rotary_factor)
        rows = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.query_key_value = nn.Linear(self.hidden_size, rows, bias=config.use_qkv_bias)
        self.dense = nn.Linear(self.num_heads * self.head_dim, self.hidden_size, bias=config.use_bias)
        self.query_layernorm, self.key_layernorm = (
            Gain(self.head_dim, config.rms_norm_eps) for _ in range(2)
        )

    def forward(self, x, position_ids, attention_mask=None, past_key_value=None, **keywords):
        batch, length, _ = x.shape
        counts = [self.num_heads, self.num_key_value_heads, self.num_key_value_heads]
        heads = self.query_key_value(x).view(batch, length, sum(counts), self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in heads.split(counts, dim=-2))
        q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k = (part_turned(t, position_ids, self.rope_dim, self.config.rope_theta) for t in (q, k))
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx)
        k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        if attention_mask is not None and attention_mask.shape != (batch, 1, length, k.shape[2]):
            raise ValueError(f"mask of {tuple(attention_mask.shape)}")
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, dropout_p=0.0,
            is_causal=self.is_causal and attention_mask is None and length > 1,
        )  # fmt: skip
        return self.dense(out.transpose(1, 2).reshape(batch, length, -1)), None, past_key_value


class GateTwin(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, x):
        c, score = self.config, (x @ self.weight.T).sigmoid()
        rank = (score + self.expert_bias).unflatten(-1, (c.n_group, -1))
        best = rank.sort(-1).values[..., -2:].sum(-1).argsort(-1, descending=True)[..., : c.topk_group]
        keep = F.one_hot(best, c.n_group).sum(-2, keepdim=True).mT.bool()
        chosen = rank.masked_fill(~keep, -1e9).flatten(-2).argsort(-1, descending=True)
        chosen = chosen[..., : c.num_experts_per_tok]
        weight = score.gather(-1, chosen)
        return chosen, weight / weight.sum(-1, keepdim=True) * c.routed_scaling_factor


class ExpertsTwin(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.moe_intermediate_size
        self.gate = GateTwin(config)
        self.experts = nn.ModuleList(MLPTwin(config.hidden_size, width) for _ in range(config.num_experts))
        self.shared_experts = MLPTwin(config.hidden_size, width * config.num_shared_experts)

    def forward(self, x):
        chosen, weight = self.gate(x)
        every = torch.stack([expert(x) for expert in self.experts], -2)  # [B, L, experts, hidden]
        part = every.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (part * weight[..., None]).sum(-2) + self.shared_experts(x)


class LLaDAMoEAttentionTwin(nn.Module):
    """No cache, no mask, and the heads side by side as wide as ``hidden_size``."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.hidden_size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        kv = self.num_key_value_heads * self.head_dim
        self.q_proj, self.o_proj = (
            nn.Linear(self.hidden_size, self.hidden_size, bias=False) for _ in range(2)
        )
        self.k_proj, self.v_proj = (nn.Linear(self.hidden_size, kv, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (Gain(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x, position_ids, attention_mask=None, past_key_value=None, **keywords):
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).reshape(-1, self.head_dim)).reshape(batch, length, -1)
        k = self.k_norm(self.k_proj(x).reshape(-1, self.head_dim)).reshape(batch, length, -1)
        q = q.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        q, k = (part_turned(t, position_ids, self.head_dim, self.config.rope_theta) for t in (q, k))
        k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
        return self.o_proj(out.transpose(1, 2).contiguous().view(batch, length, self.hidden_size)), None, None


class RoutedTwin(nn.Module):
    """Experts of ``width``: softmax scores as they are (LLaDA-MoE), or made to sum to 1 (RND1)."""

    def __init__(self, config, width, normed=False):
        super().__init__()
        self.top, self.normed = config.num_experts_per_tok, normed
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(MLPTwin(config.hidden_size, width) for _ in range(config.num_experts))

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).topk(self.top, -1)
        weight = weight / weight.sum(-1, keepdim=True) if self.normed else weight
        every = torch.stack([expert(x) for expert in self.experts], -2)
        part = every.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (part * weight[..., None]).sum(-2)


class LayerTwin(nn.Module):
    def __init__(self, config, attention, mlp, name):
        super().__init__()
        self.add_module(name, attention)
        self.name, self.mlp = name, mlp
        self.input_layernorm, self.post_attention_layernorm = (
            Gain(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )

    def forward(self, x, **keywords):
        x = x + self.get_submodule(self.name)(self.input_layernorm(x), **keywords)[0]
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class LayersTwin(nn.Module):
    def __init__(self, config, layers, embedding):
        super().__init__()
        self.config, self.embedding = config, embedding
        self.model = nn.Module()
        self.model.add_module(embedding, nn.Embedding(config.vocab_size, config.hidden_size))
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = Gain(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
        store_kv=False,
    ):  # fmt: skip
        x = self.model.get_submodule(self.embedding)(input_ids)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1])[None]
        for layer in self.model.layers:
            (x,) = layer(
                x, attention_mask=attention_mask, position_ids=position_ids.expand(x.shape[:2]),
                past_key_value=past_key_values, store_kv=store_kv,
            )  # fmt: skip
        return Output(logits=self.lm_head(self.model.norm(x)), past_key_values=past_key_values)


def sdar_twin(seed=0, **changes):
    """A twin with the weights of ``block_causals.sdar_tensors``."""
    values = sdar_config(**changes)
    config = SimpleNamespace(**values)
    layers = (
        LayerTwin(
            config,
            SDARAttentionTwin(config, i),
            MLPTwin(config.hidden_size, config.intermediate_size),
            "self_attn",
        )
        for i in range(config.num_hidden_layers)
    )
    model = LayersTwin(config, layers, "embed_tokens")
    model.load_state_dict(sdar_tensors(values, seed))
    return model.eval()


def llada2_twin(seed=0, **changes):
    """A twin with the weights of ``block_causals.llada2_tensors``."""
    values = llada2_config(**changes)
    config = SimpleNamespace(**values)
    layers = []
    for i in range(config.num_hidden_layers):
        dense = i < config.first_k_dense_replace
        mlp = MLPTwin(config.hidden_size, config.intermediate_size) if dense else ExpertsTwin(config)
        layers.append(LayerTwin(config, LLaDA2AttentionTwin(config, i), mlp, "attention"))
    model = LayersTwin(config, layers, "word_embeddings")
    model.load_state_dict(llada2_tensors(values, seed))
    return model.eval()


def llada_moe_config(**changes):
    """The keys of a published LLaDA-MoE config.json, at toy size."""
    return {
        "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0,
        "dense_intermediate_size": 40, "expert_intermediate_size": 14, "hidden_size": 32,
        "mask_token_id": 60, "max_position_embeddings": 64, "moe_layer_freq": [0, 1, 1],
        "num_attention_heads": 4, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3,
        "num_key_value_heads": 4, "qk_layernorm": True, "rms_norm_eps": 1e-5, "rope_theta": 50000,
        "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "vocab_size": 61,
    } | changes  # fmt: skip


def llada_moe_twin(seed=0, **changes):
    """A twin with random weights."""
    config = SimpleNamespace(**llada_moe_config(**changes))
    layers = []
    for i, routed in enumerate(config.moe_layer_freq):
        mlp = (
            RoutedTwin(config, config.expert_intermediate_size)
            if routed
            else MLPTwin(config.hidden_size, config.dense_intermediate_size)
        )
        layers.append(LayerTwin(config, LLaDAMoEAttentionTwin(config, i), mlp, "self_attn"))
    model = LayersTwin(config, layers, "embed_tokens")
    drawn = Drawn(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            drawn.matrix(name.removesuffix(".weight"), *tensor.shape, scale=4 if "embed" in name else 1)
        else:
            drawn.gain(name.removesuffix(".weight"), *tensor.shape)
    model.load_state_dict(dict(drawn))
    return model.eval()
