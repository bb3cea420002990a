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
from typing import Any, ClassVar

from torch import Tensor, nn

from sinkprune.models.block_causal import BlockCausalConfig, BlockCausalLayer, BlockCausalLM
from sinkprune.models.common import AttentionCore, GatedMLP
from sinkprune.models.experts import ExpertMLP, Routing
from sinkprune.models.modules import KeyValueCache
from sinkprune.models.norm import RMSNorm, norm_and_rotate
from sinkprune.plans import Experts


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
        "use_qk_norm": True,
    }

    def check(self) -> None:
        super().check()
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
    def routing(self) -> Routing:
        return Routing(
            self.num_experts_per_tok, self.n_group, self.topk_group, scale=self.routed_scaling_factor
        )

    @property
    def experts(self) -> Experts:
        dense = self.first_k_dense_replace
        return Experts(
            tuple(0 if layer < dense else self.num_experts for layer in range(self.num_hidden_layers)),
            self.moe_intermediate_size,
            self.num_experts_per_tok,
            self.shared_width,
            self.n_group,
            self.topk_group,
        )

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


class LLaDA2Layer(BlockCausalLayer):
    """Its MLP is dense, or a mixture of experts."""

    ATTENTION = "attention"

    def __init__(self, config: LLaDA2Config, index: int) -> None:
        attention, dense = LLaDA2Attention(config), index < config.first_k_dense_replace
        hidden, width = config.hidden_size, config.moe_intermediate_size
        if dense:
            mlp: nn.Module = GatedMLP(hidden, config.intermediate_size)
        else:
            mlp = ExpertMLP(config.routing, hidden, width, config.num_experts, config.shared_width)
        super().__init__(config, attention, mlp)


class LLaDA2(BlockCausalLM):
    """The model: ``forward(input_ids, attention_mask=None, rows=…, *, positions=None, cache=None)``."""

    config: LLaDA2Config
    EMBEDDING = "word_embeddings"

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config, lambda index: LLaDA2Layer(config, index))
