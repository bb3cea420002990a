"""Structural twins of the published LLaDA and Dream code, written from the architectures' description.

Same module trees, tensor names, forward signatures and cache layouts as what users load with remote code,
and none of its code. Class names are ours, so that recognition by class name would fail.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from dreams import published_config as dream_config
from dreams import published_tensors as dream_tensors
from torch import nn
from toys import published_config as llada_config
from toys import published_tensors as llada_tensors


class Output(NamedTuple):
    logits: torch.Tensor
    past_key_values: list | None


class Gain(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def turn(x, positions, theta):
    """RoPE of ``[B, H, L, D]`` at ``[L]``: feature pairs (i, i + D/2) as complex numbers."""
    half = x.shape[-1] // 2
    angle = positions[:, None].float() / theta ** (torch.arange(half) / half)
    z = torch.complex(x[..., :half].float(), x[..., half:].float()) * torch.polar(torch.ones(()), angle)
    return torch.cat((z.real, z.imag), -1).to(x.dtype)


class LLaDAConfigTwin(SimpleNamespace):
    @property
    def effective_n_kv_heads(self):
        return self.n_kv_heads or self.n_heads


class BlockTwin(nn.Module):
    """``honours_bias``: as MMaDA's. ``fused``: q, k and v in one projection and an MLP without gate."""

    def __init__(self, config, fused=False, honours_bias=False):
        super().__init__()
        self.config, self.honours_bias = config, honours_bias
        width, hd = config.d_model, config.d_model // config.n_heads
        sizes = [width, hd * config.effective_n_kv_heads, hd * config.effective_n_kv_heads]
        bias = config.include_bias or config.include_qkv_bias
        self.attn_norm, self.ff_norm = (Gain(width, config.rms_norm_eps) for _ in range(2))
        self.q_norm = self.k_norm = None
        if config.attention_layer_norm:
            self.q_norm, self.k_norm = (
                Gain(sizes[0], config.rms_norm_eps),
                Gain(sizes[1], config.rms_norm_eps),
            )
        if fused:
            self.sizes, self.att_proj = sizes, nn.Linear(width, sum(sizes), bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, size, bias=bias) for size in sizes)
            self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=config.include_bias)
        self.attn_out = nn.Linear(width, width, bias=config.include_bias)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=config.include_bias)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=config.include_bias)

    def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=True)

    def attention(
        self, q, k, v, attention_bias=None, layer_past=None, use_cache=False, replace_position=None
    ):
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        heads = (self.config.n_heads, *[self.config.effective_n_kv_heads] * 2)
        hd = q.shape[-1] // heads[0]
        q, k, v = (t.unflatten(-1, (n, hd)).transpose(1, 2) for t, n in zip((q, k, v), heads, strict=True))
        end = None
        if layer_past is not None and replace_position is not None:  # a block's rows, mid-sequence, in place
            where = replace_position[0].nonzero()[:, 0]
            for kept, new in zip(layer_past, (k, v), strict=True):
                kept[:, :, where] = new
            (k, v), end = layer_past, int(where[-1]) + 1
        elif layer_past is not None:
            k, v = (torch.cat((past, new), 2) for past, new in zip(layer_past, (k, v), strict=True))
        present = (k, v) if use_cache else None  # keys before RoPE
        end = k.shape[2] if end is None else end
        theta = self.config.rope_theta
        q = turn(q, torch.arange(end - q.shape[2], end), theta)
        k = turn(k, torch.arange(k.shape[2]), theta)
        out = self._scaled_dot_product_attention(
            q, k, v, attn_mask=attention_bias if self.honours_bias else None,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        return self.attn_out(out.transpose(1, 2).flatten(2)), present

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False, replace_position=None):
        y = self.attn_norm(x)
        fused = hasattr(self, "att_proj")
        qkv = (
            self.att_proj(y).split(self.sizes, -1)
            if fused
            else (self.q_proj(y), self.k_proj(y), self.v_proj(y))
        )
        out, present = self.attention(*qkv, attention_bias, layer_past, use_cache, replace_position)
        x = x + out
        y = self.ff_norm(x)
        hidden = F.silu(self.ff_proj(y)) * (1.0 if fused else self.up_proj(y))
        return x + self.ff_out(hidden), present


class LLaDATwin(nn.Module):
    """``model.transformer`` inside ``model``; ignores ``attention_mask``, as the published code does."""

    def __init__(self, config, group=0, **options):
        super().__init__()
        self.config = config
        blocks = nn.ModuleList(BlockTwin(config, **options) for _ in range(config.n_layers))
        grouped = nn.ModuleList(
            nn.ModuleList(blocks[i : i + group]) for i in range(0, len(blocks), group or 99)
        )
        self.model = nn.Module()
        self.model.config = config
        self.model.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "block_groups" if group else "blocks": grouped if group else blocks,
                "ln_f": Gain(config.d_model, config.rms_norm_eps),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=config.include_bias),
            }
        )

    def blocks(self):
        tree = self.model.transformer
        return [b for g in tree["block_groups"] for b in g] if "block_groups" in tree else tree["blocks"]

    def forward(
        self, input_ids, attention_mask=None, attention_bias=None, past_key_values=None, use_cache=False,
        replace_position=None,
    ):  # fmt: skip
        tree, presents = self.model.transformer, []
        x = tree["wte"](input_ids)
        for i, block in enumerate(self.blocks()):
            past = None if past_key_values is None else past_key_values[i]
            x, present = block(
                x, attention_bias=attention_bias, layer_past=past, use_cache=use_cache,
                replace_position=replace_position,
            )  # fmt: skip
            presents.append(present)
        logits = tree["ff_out"](tree["ln_f"](x))
        return Output(logits=logits, past_key_values=presents if use_cache else None)


def llada_twin(seed=0, group=0, honours_bias=False, **changes):
    """A twin with the weights of ``toys.published_tensors``."""
    config = llada_config(**changes)
    model = LLaDATwin(LLaDAConfigTwin(**config), group=group, honours_bias=honours_bias)
    tensors = llada_tensors(config, seed)
    if group:
        at = {i: f"block_groups.{i // group}.{i % group}." for i in range(config["n_layers"])}
        tensors = {
            name.replace(f"blocks.{name.split('.')[3]}.", at[int(name.split(".")[3])])
            if "blocks" in name
            else name: t
            for name, t in tensors.items()
        }
    model.load_state_dict(tensors)
    return model.eval()


class DreamAttentionTwin(nn.Module):
    """Caches: pairs of keys before RoPE and values, ``[B, P, Hkv · D]``; or an object with ``update``, which
    gets keys after RoPE."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.is_causal, self.theta = layer_idx, False, config.rope_theta
        self.hidden_size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.attention_dropout = config.attention_dropout
        kv_width = self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(self.hidden_size, self.hidden_size)
        self.k_proj, self.v_proj = (nn.Linear(self.hidden_size, kv_width) for _ in range(2))
        self.o_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None,
        output_attentions=False, use_cache=False, cache_position=None, position_embeddings=None,
        replace_position=None, dual_cache=False,
    ):  # fmt: skip
        batch, length, _ = hidden_states.shape
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        end, store = None, hasattr(past_key_value, "update")
        if dual_cache:
            where = replace_position[0].nonzero()[:, 0]
            for kept, new in zip(past_key_value, (k, v), strict=True):
                kept[:, where] = new
            (k, v), end = past_key_value, int(where[-1]) + 1
        elif past_key_value is not None and not store:
            k, v = (torch.cat((past, new), 1) for past, new in zip(past_key_value, (k, v), strict=True))
        present = (k, v) if use_cache and not store else past_key_value
        q = q.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (t.view(batch, -1, self.num_key_value_heads, self.head_dim).transpose(1, 2) for t in (k, v))
        first = past_key_value.length(self.layer_idx) if store else 0
        end = first + k.shape[2] if end is None else end
        q = turn(q, torch.arange(end - length, end), self.theta)
        k = turn(k, torch.arange(first, first + k.shape[2]), self.theta)
        if store:
            k, v = past_key_value.update(k, v, self.layer_idx)
        k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(batch, length, self.hidden_size)
        return self.o_proj(out), None, present


class Store:
    """A cache object with ``update``."""

    def __init__(self):
        self.kept = {}

    def length(self, layer):
        return self.kept[layer][0].shape[2] if layer in self.kept else 0

    def update(self, k, v, layer):
        if layer in self.kept:
            k, v = (torch.cat(pair, 2) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = (k, v)
        return k, v


class DreamMLPTwin(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DreamLayerTwin(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn, self.mlp = DreamAttentionTwin(config, layer_idx), DreamMLPTwin(config)
        self.input_layernorm, self.post_attention_layernorm = (
            Gain(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )

    def forward(self, hidden_states, **keywords):
        out, _, present = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **keywords)
        x = hidden_states + out
        return x + self.mlp(self.post_attention_layernorm(x)), present


class DreamTwin(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(DreamLayerTwin(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = Gain(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
        dual_cache=False, replace_position=None,
    ):  # fmt: skip
        x, presents = self.model.embed_tokens(input_ids), []
        for i, layer in enumerate(self.model.layers):
            past = past_key_values[i] if isinstance(past_key_values, list) else past_key_values
            x, present = layer(
                x, attention_mask=attention_mask, past_key_value=past, use_cache=use_cache,
                dual_cache=dual_cache, replace_position=replace_position,
            )  # fmt: skip
            presents.append(present)
        return Output(logits=self.lm_head(self.model.norm(x)), past_key_values=presents)


def dream_twin(seed=0, **changes):
    """A twin with the weights of ``dreams.published_tensors``."""
    config = dream_config(**changes)
    model = DreamTwin(SimpleNamespace(**config))
    model.load_state_dict(dream_tensors(config, seed))
    return model.eval()
