"""Structural twins of the published MDLM and BD3LM code, written from its interface; none of its code."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from block_causals import Drawn
from torch import nn
from upstream_twins import turn


def ddit_config(**changes):
    """The keys of a published BD3LM config.json, at toy size; MDLM has fewer of them."""
    return {
        "adaln": True, "attn_backend": "sdpa", "block_size": 4, "cond_dim": 12, "cross_attn": True,
        "dropout": 0.1, "hidden_dim": 32, "model_length": 16, "n_blocks": 3, "n_heads": 4,
        "time_conditioning": False, "vocab_size": 61,
    } | changes  # fmt: skip


def regular_attention_multi_headed(qkv):
    """Heads side by side of packed ``[B, L, 3, H, D]``, with materialised probabilities."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    probabilities = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (probabilities @ v).transpose(1, 2).flatten(2)


def varlen(qkv, cu_seqlens, length, dropout, causal=False):
    """FlashAttention's signature: ``[B * L, H, D]`` of ``[B * L, 3, H, D]``."""
    assert not causal and cu_seqlens[-1] == len(qkv)
    packed = qkv.unflatten(0, (-1, length))
    return regular_attention_multi_headed_original(packed).unflatten(-1, qkv.shape[-2:]).flatten(0, 1)


regular_attention_multi_headed_original = regular_attention_multi_headed
flash_attn = SimpleNamespace(flash_attn_interface=SimpleNamespace(flash_attn_varlen_qkvpacked_func=varlen))


class NormTwin(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight


class BlockTwin(nn.Module):
    """``call``: which attention the forward calls."""

    def __init__(self, config, call):
        super().__init__()
        d = config.hidden_dim
        self.n_heads, self.call, self.block_size, self.n = config.n_heads, call, config.block_size, 16
        self.attn_backend, self.kv_cache, self.cache_idx = config.attn_backend, None, 0
        self.norm1, self.norm2 = NormTwin(d), NormTwin(d)
        self.attn_qkv, self.attn_out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * d)

    def forward(self, x, c, mask=None, store_kv=False):
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        rows = self.attn_qkv(self.norm1(x) * (1 + scale) + shift)
        if self.kv_cache is not None:
            self.kv_cache[:, self.cache_idx : self.cache_idx + self.block_size] = rows
            rows = self.kv_cache[:, : self.cache_idx + self.block_size].clone()
        if store_kv:
            self.cache_idx += self.block_size
        qkv = rows.unflatten(-1, (3, self.n_heads, -1))
        positions = torch.arange(qkv.shape[1])
        turned = [turn(qkv[:, :, i].transpose(1, 2), positions, 10000.0).transpose(1, 2) for i in (0, 1)]
        qkv = torch.stack((*turned, qkv[:, :, 2]), 2)
        if self.call == "packed":
            out = regular_attention_multi_headed(qkv)
        elif self.call == "varlen":
            batch, length = qkv.shape[:2]
            ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32)
            out = flash_attn.flash_attn_interface.flash_attn_varlen_qkvpacked_func(
                qkv.flatten(0, 1), ends, length, 0.0, causal=False
            )
            out = out.unflatten(0, (batch, length)).flatten(2)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(
                query=q, key=k, value=v, attn_mask=mask, is_causal=False, scale=q.shape[-1] ** -0.5
            ).transpose(1, 2).flatten(2)  # fmt: skip
        if self.kv_cache is not None:
            out = out[:, -self.block_size :]
        x = x + gate * self.attn_out(out)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class BackboneTwin(nn.Module):
    def __init__(self, config, call):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_dim))
        self.sigma_map = nn.Linear(1, config.cond_dim)
        self.blocks = nn.ModuleList(BlockTwin(config, call) for _ in range(config.n_blocks))
        self.norm_final = NormTwin(config.hidden_dim)
        self.linear = nn.Linear(config.hidden_dim, config.vocab_size)


class DDiTTwin(nn.Module):
    """``call="sdpa"``: BD3LM, whose forward in ``sample_mode`` takes the clean half of the mask."""

    def __init__(self, config, call):
        super().__init__()
        self.config, self.call = config, call
        self.backbone = BackboneTwin(config, call)

    def reset_kv_cache(self, batch):
        for block in self.backbone.blocks:
            block.kv_cache = torch.zeros(batch, self.config.model_length, 3 * self.config.hidden_dim)
            block.cache_idx = 0

    def forward(self, input_ids=None, timesteps=None, sample_mode=None, store_kv=None, return_dict=None):
        backbone, more = self.backbone, {}
        if self.call == "sdpa":
            assert sample_mode
            of_block = torch.arange(input_ids.shape[1]) // self.config.block_size
            mask = of_block[None, :] <= of_block[:, None]
            cached = backbone.blocks[0].kv_cache is not None
            more = {"mask": None if cached else mask, "store_kv": store_kv}
        x = backbone.embedding[input_ids]
        c = F.silu(backbone.sigma_map(torch.zeros_like(timesteps)[:, None]))
        for block in backbone.blocks:
            x = block(x, c, **more)
        return SimpleNamespace(logits=backbone.linear(backbone.norm_final(x)))


def ddit_twin(call, seed=0, **changes):
    """A twin with random weights, those of the modulations small."""
    values = ddit_config(**changes)
    if call != "sdpa":
        values["cross_attn"] = False
    model, drawn = DDiTTwin(SimpleNamespace(**values), call), Drawn(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            drawn[name] = torch.randn(tensor.shape, generator=drawn.generator) / tensor.shape[1] ** 0.5
        else:
            drawn[name] = 0.5 * torch.randn(tensor.shape, generator=drawn.generator) + 1
    model.load_state_dict(dict(drawn))
    return model.eval()
