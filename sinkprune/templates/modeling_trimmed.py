"""A pruned diffusion language model whose layers differ in heads and channels, for transformers.

This file travels with a checkpoint that sinkprune exported and needs nothing of sinkprune; it was written for
transformers 5.17, whose configs know ``per_layer_config``. It is the Qwen3 of transformers with sizes of its
own for every layer, with or without a norm of queries and keys, with the biases that the checkpoint has, and
with layers that have no heads left.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A token sees all others (``is_causal`` is false); with ``block_size`` it sees its own block and those before
it, which attention "eager" and "sdpa" can compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)


class TrimmedConfig(Qwen3Config):
    """Qwen3's keys, ``per_layer_config`` with what differs from them in a layer, and:

    Attributes:
        qk_norm: whether queries and keys are normed, head by head.
        biases: names of a layer's linear modules that have a bias.
        block_size: tokens of a block, or None where blocks do not matter.
        logits_shift: 1 where a row of logits is about the next token.
        is_causal: whether a token sees only those before it.
        skip: ``["self_attn"]`` in a layer that has no heads.
    """

    model_type = "sinkprune_trimmed"

    qk_norm: bool = True
    biases: Any = ()
    block_size: int | None = None
    logits_shift: int = 0
    is_causal: bool = False


class NoAttention(nn.Module):
    """What is left of an attention without heads: a bias, or nothing."""

    def __init__(self, hidden: int, biased: bool, index: int) -> None:
        super().__init__()
        self.o_proj = nn.Linear(0, hidden, bias=biased)
        self.index = index

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **keys: Any) -> tuple[Tensor, None]:
        past_key_values = keys.get("cache") if past_key_values is None else past_key_values
        if past_key_values is not None:  # a cache counts its tokens by those of its first layer
            token = hidden_states.new_zeros(*hidden_states.shape[:2], 1)[:, None]
            past_key_values.update(token, token, self.index)
        nothing = torch.zeros_like(hidden_states)
        return (nothing if self.o_proj.bias is None else nothing + self.o_proj.bias), None


def trimmed_layer(config: TrimmedConfig, index: int) -> nn.Module:
    """A decoder layer of the sizes, biases and norms that ``config`` gives layer ``index``."""
    own: Any = config.per_layer_config[index]
    layer: Any = Qwen3DecoderLayer(own, index)
    layer.self_attn.config = config  # which attention runs is said there
    layer.self_attn.is_causal = config.is_causal
    if "self_attn" in (getattr(own, "skip", None) or ()):
        layer.self_attn = NoAttention(config.hidden_size, "self_attn.o_proj" in own.biases, index)
    elif not config.qk_norm:
        layer.self_attn.q_norm, layer.self_attn.k_norm = nn.Identity(), nn.Identity()
    for name in own.biases:
        linear = layer.get_submodule(name)
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    return layer


class TrimmedModel(Qwen3Model):
    config_class = TrimmedConfig

    def __init__(self, config: TrimmedConfig) -> None:
        Qwen3PreTrainedModel.__init__(self, config)  # not Qwen3Model's, which makes layers of one size
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(trimmed_layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = self.has_sliding_layers = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **keys: Any,
    ) -> Any:
        """Qwen3's; a mask of padding ``[B, L]``, or none, is made block-causal where the config has
        blocks. (Arguments by name: vLLM looks for them.)"""
        if self.config.block_size and (attention_mask is None or attention_mask.dim() == 2):
            inputs: Any = inputs_embeds if input_ids is None else input_ids
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            attention_mask = self.block_mask(attention_mask, inputs, seen)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **keys,
        )

    def block_mask(self, valid: Tensor | None, inputs: Tensor, seen: int) -> Tensor:
        """What is added to the scores, ``[B, 1, L, seen + L]``; blocks count from a sequence's first
        token."""
        if valid is None:
            valid = torch.ones(inputs.shape[0], seen + inputs.shape[1], device=inputs.device)
        valid = valid.bool()
        block = (valid.long().cumsum(1) - 1) // self.config.block_size
        visible = (block[:, None, :] <= block[:, seen:, None]) & valid[:, None, :]
        visible |= ~valid[:, seen:, None]  # a row of padding sees anything rather than nothing
        dtype = self.embed_tokens.weight.dtype
        scores = torch.zeros(visible.shape, dtype=dtype, device=inputs.device)
        return scores.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


class TrimmedForCausalLM(Qwen3ForCausalLM):
    config_class = TrimmedConfig

    def __init__(self, config: TrimmedConfig) -> None:
        Qwen3PreTrainedModel.__init__(self, config)
        self.model, self.vocab_size = TrimmedModel(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
