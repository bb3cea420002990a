"""The compact layers that replace a model's dense ones: fewer rows, one fused matrix per GEMM."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.rotary import apply_rotary


class AttentionCall(NamedTuple):
    """One attention as an observer sees it, after RoPE; the arguments of ``ops.column_mass``."""

    query: Tensor  # [B, H, Lq, D]
    key: Tensor  # [B, Hkv, Lk, D]
    lse: Tensor | None  # base-2 log-sum-exp [B, H, Lq], where attention returned it
    kept_heads: Tensor | None
    kv_head_of: Tensor | None
    key_padding_mask: Tensor | None  # bool [B, Lk], True = valid


AttentionObserver = Callable[[AttentionCall], None]


class SinkPrunedAttention(nn.Module):
    """Self-attention with only the kept heads, on a fused query/key/value projection.

    Args:
        qkv_weight: ``[(n + 2 m) * head_dim, hidden]``: rows of the n kept query heads, then of their m key
            heads, then of their m value heads.
        o_weight: ``[hidden, n * head_dim]``.
        head_dim: features of a head.
        kept_heads: the n original ids of the query heads, sorted.
        kv_head_of: for each of the n query heads, which of the m key/value heads it reads.
        qkv_bias, o_bias: optional, ``[(n + 2 m) * head_dim]`` and ``[hidden]``.

    ``observer``, where set, is called with an ``AttentionCall`` after each attention.
    """

    kv_head_of: Tensor | None

    def __init__(
        self,
        qkv_weight: Tensor,
        o_weight: Tensor,
        head_dim: int,
        kept_heads: list[int],
        kv_head_of: list[int],
        qkv_bias: Tensor | None = None,
        o_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        if len(kv_head_of) != len(kept_heads):
            raise ValueError(
                f"kv_head_of must have one entry per kept head: {len(kept_heads)}, got {len(kv_head_of)}"
            )
        self.head_dim, self.kept_heads = head_dim, list(kept_heads)
        self.num_heads, self.num_kv_heads = len(kept_heads), len(set(kv_head_of))
        rows = (self.num_heads + 2 * self.num_kv_heads) * head_dim
        if qkv_weight.shape[0] != rows or o_weight.shape[1] != self.num_heads * head_dim:
            raise ValueError(
                f"{self.num_heads} query and {self.num_kv_heads} key/value heads of {head_dim} features need "
                f"{rows} rows and {self.num_heads * head_dim} columns, got {qkv_weight.shape[0]} and "
                f"{o_weight.shape[1]}"
            )
        self.qkv_proj = _linear(qkv_weight, qkv_bias)
        self.o_proj = _linear(o_weight, o_bias)
        one_to_one = kv_head_of == list(range(self.num_heads))
        index = None if one_to_one else torch.tensor(kv_head_of, device=_index_device(qkv_weight))
        self.register_buffer("kv_head_of", index, persistent=False)
        self.observer: AttentionObserver | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend over ``x`` ``[B, L, hidden]``; cos and sin float32 ``[L, rotated]``; mask bool ``[B, L]``,
        True = valid."""
        if self.num_heads == 0:
            return self.o_proj(x.new_zeros(*x.shape[:-1], 0))
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turning = self.num_heads + self.num_kv_heads
        q, k = apply_rotary(heads[:, :turning], cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        out, lse = ops.attention(
            q, k, heads[:, turning:], kv_head_of=self.kv_head_of, key_padding_mask=key_padding_mask
        )
        if self.observer is not None:
            self.observer(AttentionCall(q, k, lse, None, self.kv_head_of, key_padding_mask))
        return self.o_proj(out.transpose(1, 2).flatten(2))


class CompactMLP(nn.Module):
    """SwiGLU over the kept channels: gate and up fused ``[2 c, hidden]``, down ``[hidden, c]``."""

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        if gate_up.shape[0] != 2 * down.shape[1]:
            raise ValueError(f"gate_up must have {2 * down.shape[1]} rows, got {gate_up.shape[0]}")
        self.gate_up_proj = _linear(gate_up, gate_up_bias)
        self.down_proj = _linear(down, down_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that holds ``weight`` itself, not a copy."""
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")  # a shell: its own weight is not wanted
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
    return layer


def _index_device(weight: Tensor) -> torch.device:
    """Indices stay real while a model is laid out on ``meta``."""
    return torch.device("cpu") if weight.is_meta else weight.device
