"""The compact layers that replace a model's dense ones: fewer rows, one fused matrix per GEMM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.kernels.visibility import Visibility
from sinkprune.models.norm import add_and_norm, norm_and_rotate
from sinkprune.ops import elementwise, native


class AttentionCall(NamedTuple):
    """One attention as an observer sees it, after RoPE; the arguments of ``ops.column_mass``."""

    query: Tensor  # [B, H, Lq, D]
    key: Tensor  # [B, Hkv, Lk, D]
    lse: Tensor | None = None  # base-2 log-sum-exp [B, H, Lq], where attention returned it
    kept_heads: Tensor | None = None
    kv_head_of: Tensor | None = None
    key_padding_mask: Tensor | None = None  # bool [B, Lk], True = valid
    block_size: int | None = None
    query_positions: Tensor | None = None  # int [B, Lq], -1 = padded
    key_positions: Tensor | None = None  # int [B, Lk]
    scale: float | None = None
    # Any other visibility, bool (True = seen) or added to the scores, broadcastable to [B, H, Lq, Lk].
    mask: Tensor | None = None

    @property
    def seen(self) -> Visibility:
        """Who sees whom, a mask aside."""
        return Visibility(self.key_padding_mask, self.block_size, self.query_positions, self.key_positions)


AttentionObserver = Callable[[AttentionCall], None]
# Takes this call's keys and values [B, Hkv, L, D], keeps them, and returns all that attention shall see.
KeyValueCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Rotary = tuple[Tensor, Tensor]  # cos and sin, float32, broadcastable to [B, H, L, rotated features]


class SinkPrunedAttention(nn.Module):
    """Self-attention with only the kept heads, on a fused query/key/value projection.

    Args:
        qkv_weight: ``[(n + 2 m) * head_dim, hidden]``: rows of the n kept query heads, then of their m key
            heads, then of their m value heads.
        o_weight: ``[hidden, n * head_dim]``.
        head_dim: features of a head.
        kept_heads: the n original ids of the query heads, sorted.
        kv_head_of: for each of the n query heads, which of the m key/value heads it reads; every one of
            0 … m-1 is read.
        qkv_bias, o_bias: optional, ``[(n + 2 m) * head_dim]`` and ``[hidden]``.
        q_norm, k_norm: optional modules over the last dimension of ``[B, heads, L, head_dim]``, before RoPE
            (a norm over the full width mixes heads and can't be compacted).
        scale: of the scores; None = ``head_dim ** -0.5``.

    Raises:
        ValueError: sizes that do not fit each other.

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
        *,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if len(kv_head_of) != len(kept_heads):
            raise ValueError(
                f"kv_head_of must have one entry per kept head: {len(kept_heads)}, got {len(kv_head_of)}"
            )
        if set(kv_head_of) != set(range(len(set(kv_head_of)))):
            raise ValueError(f"kv_head_of must use every key/value head from 0 up, got {list(kv_head_of)}")
        self.head_dim, self.kept_heads, self.scale = head_dim, list(kept_heads), scale
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
        self.q_norm, self.k_norm = q_norm, k_norm
        equal = [head * self.num_kv_heads // self.num_heads for head in range(self.num_heads)]
        grouped = self.num_heads % max(1, self.num_kv_heads) == 0 and list(kv_head_of) == equal
        index = None if grouped else torch.tensor(kv_head_of, device=_index_device(qkv_weight))
        self.register_buffer("kv_head_of", index, persistent=False)
        self.observer: AttentionObserver | None = None

    @classmethod
    def from_projections(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        *,
        head_dim: int,
        kept_heads: list[int] | None = None,
        kv_head_of: list[int] | None = None,
        q_bias: Tensor | None = None,
        k_bias: Tensor | None = None,
        v_bias: Tensor | None = None,
        o_bias: Tensor | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        scale: float | None = None,
    ) -> SinkPrunedAttention:
        """Build the compact layer from a dense layer's bare weights, which are copied.

        Args:
            q: ``[H * head_dim, hidden]``; k, v: ``[Hkv * head_dim, hidden]``; o: ``[hidden, H * head_dim]``.
            head_dim: features of a head.
            kept_heads: sorted query-head ids to keep; None keeps all.
            kv_head_of: the key/value head of each of the H query heads; None = ``h // (H / Hkv)``.
            q_bias, k_bias, v_bias, o_bias: optional; q, k and v all or none.
            q_norm, k_norm, scale: as in the constructor.

        Raises:
            ValueError: sizes or ids that do not fit.
        """
        if q.shape[0] % head_dim or k.shape[0] % head_dim:
            raise ValueError(f"head_dim {head_dim} must divide q's {q.shape[0]} and k's {k.shape[0]} rows")
        heads, kv_heads = q.shape[0] // head_dim, k.shape[0] // head_dim
        if kv_head_of is None:
            if not kv_heads or heads % kv_heads:
                raise ValueError(f"{heads} query heads do not group over {kv_heads} key/value heads")
            kv_head_of = [head // (heads // kv_heads) for head in range(heads)]
        kept = list(range(heads)) if kept_heads is None else list(kept_heads)
        if any(not 0 <= head < heads for head in kept):
            raise ValueError(f"kept_heads must lie within 0..{heads - 1}, got {kept}")
        used = sorted({kv_head_of[head] for head in kept})
        with torch.no_grad():
            if kept:
                qkv, bias, _ = native.pack_qkv(q, k, v, q_bias, k_bias, v_bias, kept, used, head_dim)
                columns = native.pack_o(o, kept, head_dim)
            else:  # what is left of the layer is the output's bias
                qkv, bias, columns = q.new_empty(0, q.shape[1]), None, o.new_empty(o.shape[0], 0)
            packed = cls(
                qkv,
                columns,
                head_dim,
                kept,
                [used.index(kv_head_of[head]) for head in kept],
                qkv_bias=bias,
                o_bias=None if o_bias is None else o_bias.detach().clone(),
                q_norm=q_norm,
                k_norm=k_norm,
                scale=scale,
            )
        trains_as(packed.qkv_proj.weight, q, k, v)
        trains_as(packed.qkv_proj.bias, q_bias, k_bias, v_bias)
        trains_as(packed.o_proj.weight, o)
        trains_as(packed.o_proj.bias, o_bias)
        return packed

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        block_size: int | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        cached_rotary: Rotary | None = None,
    ) -> Tensor:
        """Attend from ``x`` ``[B, Lq, hidden]`` and return ``[B, Lq, hidden]``.

        Args:
            cos, sin: float32 of this call's positions, ``[Lq, rotated]`` or broadcastable to
                ``[B, 1, Lq, rotated]``; with fewer than head_dim features the rest passes through; None for
                no RoPE.
            key_padding_mask: bool ``[B, Lk]``, True = valid.
            block_size, query_positions, key_positions: block-causal attention, as in ``ops.attention``.
            cache: takes this call's keys and values ``[B, m, Lq, head_dim]`` and returns all of them
                ``[B, m, Lk, head_dim]``. It holds keys after RoPE, unless ``cached_rotary`` is given.
            cached_rotary: for caches of keys before RoPE: cos and sin of all ``Lk`` keys.
        """
        if self.num_heads == 0:
            return self.o_proj(x.new_zeros(*x.shape[:-1], 0))
        q, k, v = self.project(x)
        if cached_rotary is None:
            q, k = self.turn(q, k, cos, sin)
            k, v = (k, v) if cache is None else cache(k, v)
        else:
            if cos is None or sin is None:
                raise ValueError("cached_rotary needs cos and sin, of the queries, beside it; got none")
            q, k = self.turn(q, k, None, None)
            k, v = (k, v) if cache is None else cache(k, v)
            q, k = elementwise.rope_qk(q, k, cos, sin, *cached_rotary)
        seen = Visibility(key_padding_mask, block_size, query_positions, key_positions)
        out, lse = ops.attention(q, k, v, kv_head_of=self.kv_head_of, scale=self.scale, **seen._asdict())
        if self.observer is not None:
            self.observer(AttentionCall(q, k, lse, None, self.kv_head_of, scale=self.scale, **seen._asdict()))
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[B, n, L, D]``, key and value ``[B, m, L, D]`` of ``x`` ``[B, L, hidden]``."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return q, k, v

    def turn(self, q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys normed, where the layer has norms, and rotated, where there are angles."""
        if cos is not None and sin is not None:
            return norm_and_rotate(q, k, cos, sin, self.q_norm, self.k_norm)
        q = q if self.q_norm is None else self.q_norm(q)
        return q, k if self.k_norm is None else self.k_norm(k)

    def values(self, x: Tensor) -> Tensor:
        """The kept value heads side by side, ``[B, L, m * head_dim]``, without the queries and keys."""
        first = (self.num_heads + self.num_kv_heads) * self.head_dim
        bias = self.qkv_proj.bias
        return F.linear(x, self.qkv_proj.weight[first:], None if bias is None else bias[first:])

    def unpacked(self) -> dict[str, dict[str, Tensor]]:
        """``{"weight": …, "bias": …}``, those that are there, by role: q, k, v, o, q_norm, k_norm; views of
        the packed tensors."""
        rows = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        norms = {"q_norm": self.q_norm, "k_norm": self.k_norm}
        return {
            **_split(self.qkv_proj, rows, "qkv"),
            "o": self.o_proj.state_dict(),
            **{role: norm.state_dict() for role, norm in norms.items() if norm is not None},
        }


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
        return self.down_proj(elementwise.swiglu(gate, up))

    def unpacked(self) -> dict[str, dict[str, Tensor]]:
        """As ``SinkPrunedAttention.unpacked``: gate, up, down."""
        rows = [self.down_proj.in_features] * 2
        return {**_split(self.gate_up_proj, rows, ("gate", "up")), "down": self.down_proj.state_dict()}


def is_gone(part: object) -> bool:
    """Whether a compact attention or MLP keeps nothing but, maybe, its output's bias."""
    if isinstance(part, SinkPrunedAttention):
        return part.num_heads == 0
    return isinstance(part, CompactMLP) and part.down_proj.in_features == 0


def run_layer(
    x: Tensor,
    norms: tuple[nn.Module, nn.Module],
    attend: Callable[..., Tensor],
    feed: Callable[[Tensor], Tensor],
    *seen: Any,
    **cached: Any,
) -> Tensor:
    """A pre-norm block on ``x`` ``[B, L, hidden]``: attention, then the MLP, each with its norm and added."""
    if is_gone(attend) or is_gone(feed):
        return added(added(x, norms[0], attend, *seen, **cached), norms[1], feed)
    normed, x = add_and_norm(x, attend(norms[0](x), *seen, **cached), norms[1])
    return x + feed(normed)


def added(
    x: Tensor, norm: Callable[[Tensor], Tensor], part: Callable[..., Tensor], *args: Any, **keywords: Any
) -> Tensor:
    """``x`` ``[B, L, hidden]`` plus ``part(norm(x), …)``; a part that is gone costs no norm and no call."""
    if not is_gone(part):
        return x + part(norm(x), *args, **keywords)
    output = cast(Any, part.o_proj if isinstance(part, SinkPrunedAttention) else cast(Any, part).down_proj)
    return x if output.bias is None else x + output.bias


def _split(fused: nn.Linear, rows: list[int], roles: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Weight and bias of each projection that ``fused`` was packed from."""
    pieces = {kind: tensor.split(rows) for kind, tensor in fused.state_dict().items()}
    return {role: {kind: parts[i] for kind, parts in pieces.items()} for i, role in enumerate(roles)}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that holds ``weight`` itself, not a copy."""
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")  # a shell: its own weight is not wanted
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
    return layer


def trains_as(parameter: Tensor | None, *sources: Tensor | None) -> None:
    """Let a packed ``parameter`` train where one of its sources did."""
    if parameter is not None:
        parameter.requires_grad_(any(source is not None and source.requires_grad for source in sources))


def _index_device(weight: Tensor) -> torch.device:
    """Indices stay real while a model is laid out on ``meta``."""
    return torch.device("cpu") if weight.is_meta else weight.device
