"""LLaDA2, native: the published tensor names and configuration keys of LLaDA2.0-mini and -flash.

Block-causal attention on one fused projection [Q | K | V], a norm of each head's queries and keys, RoPE of
the leading part of a head, and from layer ``first_k_dense_replace`` on a mixture of experts. The router's
scores are sigmoids. A bias that only chooses is added, then the best ``topk_group`` of ``n_group`` groups of
experts are taken (by their two largest), and in them the best ``num_experts_per_tok`` experts, whose outputs
are weighted by the scores without the bias, normed to sum to ``routed_scaling_factor``.
Source: "LLaDA2.0: Scaling Up Diffusion Language Models to 100B" (arXiv 2512.15745) and its published
configuration files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune.models.block_causal import BlockCausalConfig, BlockCausalLayer, BlockCausalLM
from sinkprune.models.common import AttentionCore, GatedMLP
from sinkprune.models.modules import KeyValueCache
from sinkprune.models.norm import RMSNorm, norm_and_rotate


@dataclass(kw_only=True)
class LLaDA2Config(BlockCausalConfig):
    """The keys of an LLaDA2 ``config.json``."""

    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int | None = None
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    routed_scaling_factor: float = 1.0
    partial_rotary_factor: float = 0.5
    use_qkv_bias: bool = False
    use_bias: bool = False
    block_size: int = 32  # the published samplers' block_length: no published config names it

    FAMILY: ClassVar[str] = "LLaDA2"
    MODEL_TYPE: ClassVar[str] = "llada2_moe"
    REQUIRED: ClassVar[tuple[str, ...]] = (
        *BlockCausalConfig.REQUIRED, "intermediate_size", "moe_intermediate_size", "num_experts",
        "num_experts_per_tok",
    )  # fmt: skip
    FIXED: ClassVar[dict[str, Any]] = {
        **BlockCausalConfig.FIXED,
        "norm_head": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
    }

    def check(self) -> None:
        super().check()
        if self.extra.get("expert_capacity") is not None:
            raise ValueError(
                "LLaDA2 config: expert_capacity routes the tokens of a block together (LLaDA2.2), which is "
                f"not computed here, got {self.extra['expert_capacity']!r}"
            )
        if self.num_experts % self.n_group or self.n_group < self.topk_group:
            raise ValueError(
                "LLaDA2 config: num_experts must be a multiple of n_group and topk_group at most n_group, "
                f"got {self.num_experts}, {self.n_group} and {self.topk_group}"
            )
        reach = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reach or (self.n_group > 1 and self.num_experts // self.n_group < 2):
            raise ValueError(
                f"LLaDA2 config: {self.num_experts_per_tok} experts of a token must lie in {self.topk_group} "
                f"groups of at least 2, got {self.n_group} groups of {self.num_experts // self.n_group}"
            )

    @property
    def rotary_width(self) -> int:
        return int(self.width * self.partial_rotary_factor)

    @property
    def shared_width(self) -> int:
        """Channels of the shared experts, which are one MLP."""
        return self.moe_intermediate_size * (self.num_shared_experts or 0)

    @property
    def layer_channels(self) -> tuple[int, ...]:
        """Channels of each layer's dense MLP, or of the experts that a token passes through."""
        routed = self.num_experts_per_tok * self.moe_intermediate_size + self.shared_width
        dense = self.first_k_dense_replace
        return tuple(
            self.intermediate_size if layer < dense else routed for layer in range(self.num_hidden_layers)
        )


class LLaDA2Attention(AttentionCore):
    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.head_dim = config.width
        self.split = (config.num_attention_heads, config.kv_heads, config.kv_heads)
        hidden, width = config.hidden_size, config.num_attention_heads * self.head_dim
        self.query_key_value = nn.Linear(hidden, sum(self.split) * self.head_dim, bias=config.use_qkv_bias)
        self.dense = nn.Linear(width, hidden, bias=config.use_bias)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, cache: KeyValueCache | None = None, **seen: Any
    ) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.split, dim=1)
        q, k = norm_and_rotate(q, k, cos, sin, self.query_layernorm, self.key_layernorm)
        if cache is not None:
            k, v = cache(k, v)
        return self.dense(self.attend(q, k, v, **seen))


class Router(nn.Module):
    """Which experts a token goes to, and how much each counts."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids int64 and weights float32, ``[T, k]`` each, of tokens ``[T, hidden]``."""
        config = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        ranks = scores + cast(Tensor, self.expert_bias).float()
        if config.n_group > 1:
            groups = ranks.unflatten(-1, (config.n_group, -1))
            best = groups.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            open_groups = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            ranks = groups.masked_fill(~open_groups[..., None], -torch.inf).flatten(-2)
        experts = ranks.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, experts)
        if config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor


class ExpertMLP(nn.Module):
    """The experts that a token is routed to, one expert at a time, and those that every token goes to."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(GatedMLP(hidden, width) for _ in range(config.num_experts))
        if config.shared_width:
            self.shared_experts = GatedMLP(hidden, config.shared_width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        chosen, weights = self.gate(tokens)
        routed = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            row, place = (chosen == expert).nonzero(as_tuple=True)
            out = self.experts[expert](tokens[row])
            routed.index_add_(0, row, out.float() * weights[row, place, None])
        routed = routed.to(x.dtype).view_as(x)
        return routed + self.shared_experts(x) if hasattr(self, "shared_experts") else routed


class LLaDA2Layer(BlockCausalLayer):
    """Compact modules replace its MLP only where that is dense."""

    ATTENTION = "attention"

    def __init__(self, config: LLaDA2Config, index: int) -> None:
        attention, dense = LLaDA2Attention(config), index < config.first_k_dense_replace
        mlp = GatedMLP(config.hidden_size, config.intermediate_size) if dense else ExpertMLP(config)
        super().__init__(config, attention, mlp)


class LLaDA2(BlockCausalLM):
    """The model: ``forward(input_ids, attention_mask=None, rows=…, *, positions=None, cache=None)``."""

    config: LLaDA2Config
    EMBEDDING = "word_embeddings"

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config, lambda index: LLaDA2Layer(config, index))
