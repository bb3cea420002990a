"""Somebody else's model made smaller, or skipped in part, in place: its modules keep their identity, their
code and their hooks."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.adapters.base import Adapter, require_eval, require_plain
from sinkprune.models.modules import AttentionObserver

_CHANNELS = "sinkprune_channels"  # the buffer that MLPs' last matrices get


class Selection(nn.Module):
    """What is ours in one attention; buffers, so that it moves with the model and is never saved.

    ``kept_heads`` int ``[h]`` skips the other heads; ``kv_head_of`` int ``[n]`` is each of n query heads'
    key/value head where heads were removed; ``observer`` sees every call.
    """

    kept_heads: Tensor | None
    kv_head_of: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept_heads", None, persistent=False)
        self.register_buffer("kv_head_of", None, persistent=False)
        self.observer: AttentionObserver | None = None

    def idle(self) -> bool:
        """Whether it changes nothing, and nobody looks."""
        return self.kept_heads is None and self.kv_head_of is None and self.observer is None


class Smaller(nn.ModuleDict):
    """A layer's smaller linear layers by role; of attention, also the key/value head of each query head and
    the features of a head."""

    def __init__(
        self, linears: dict[str, nn.Module], kv_head_of: list[int] | None = None, width: int = 0
    ) -> None:
        super().__init__(linears)
        self.kv_head_of, self.width = kv_head_of, width


class InPlaceAdapter(Adapter):
    """An adapter that leaves a model's modules where they are. Roles: ``q k v o``, or ``qkv o`` with rows
    [Q | K | V]; ``gate up down``, ``gate_up down`` or ``up down``.

    An attention that is gone runs on one head of zeros, which no weight makes and nothing reads: somebody
    else's code knows no fewer, and its caches say by the first layer how long they are.
    """

    @abstractmethod
    def attention_linears(self, layer: int) -> dict[str, nn.Module]:
        """The attention's linear layers by role."""

    @abstractmethod
    def mlp_linears(self, layer: int) -> dict[str, nn.Module]:
        """The MLP's by role. Raises ``ValueError`` naming why its channels can't be pruned."""

    @abstractmethod
    def resized(self, layer: int, kv_head_of: list[int], group: int, index: Tensor | None) -> None:
        """Tell the layer what heads its projections give now.

        Args:
            kv_head_of: of each query head.
            group: how many query heads a key/value head serves, rounded down where that differs.
            index: ``kv_head_of`` as a tensor where groups differ, which somebody else's code can't run.
        """

    @abstractmethod
    def select(self, layer: int, heads: Tensor | None) -> None:
        """Skip all heads but these."""

    def attending(self) -> list[int]:
        """The layers whose attention is there to be observed."""
        layers = range(len(self.blocks()))
        return [i for i in layers if self.form != "compact" or self.kept_heads(i)]

    @property
    def dropout(self) -> float | None:
        """Of attention, as the config has it."""
        return getattr(cast(Any, self.model).config, "attention_dropout", 0.0)

    def check(self, kept_heads: list[list[int]], kept_channels: list[list[int] | None], mode: str) -> None:
        super().check(kept_heads, kept_channels, mode)
        require_eval(self.model, self.dropout)
        if mode == "mask":
            return
        for layer, channels in enumerate(kept_channels):
            linears = dict(self.attention_linears(layer))
            if channels is not None:
                linears |= self.mlp_linears(layer)
            for role, linear in linears.items():
                require_plain(layer, role, linear, hooks=False)

    @torch.no_grad()
    def compact(
        self, layer: int, kept_heads: list[int], kept_channels: list[int] | None
    ) -> tuple[nn.Module, nn.Module | None]:
        geometry = self.geometry()
        heads, kv_heads, width = geometry.heads[layer], geometry.kv_heads[layer], geometry.head_dim
        used, owner = geometry.kv_heads_used(layer, kept_heads), geometry.kv_head_of(layer)
        fused = [*kept_heads, *(heads + kv for kv in used), *(heads + kv_heads + kv for kv in used)]
        pieces = {"q": kept_heads, "k": used, "v": used, "qkv": fused, "o": kept_heads}
        attention = Smaller(
            {r: _narrow(m, pieces[r], width, r == "o") for r, m in self.attention_linears(layer).items()},
            [used.index(owner[head]) for head in kept_heads],
            width,
        )
        if kept_channels is None:
            return attention, None
        stacked = [*kept_channels, *(geometry.channels[layer] + i for i in kept_channels)]
        linears = self.mlp_linears(layer).items()
        return attention, Smaller(
            {r: _narrow(m, stacked if r == "gate_up" else kept_channels, 1, r == "down") for r, m in linears}
        )

    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        if isinstance(mlp, Smaller):
            _take_over(self.mlp_linears(layer), mlp)
        if not isinstance(attention, Smaller) or attention.kv_head_of is None:
            return
        linears = self.attention_linears(layer)
        _take_over(linears, attention)
        owner = attention.kv_head_of
        if not owner:
            owner = [0]
            _one_head_of_zeros(linears, attention.width)
        group = max(1, len(owner) // max(1, len(set(owner))))
        index = None
        if owner != [head // group for head in range(len(owner))]:
            weight = next(attention.parameters())
            index = torch.tensor(owner, device="cpu" if weight.is_meta else weight.device)
        self.resized(layer, owner, group, index)

    def mask(self, layer: int, heads: Tensor | None, channels: Tensor | None) -> None:
        down = None if channels is None else self.mlp_linears(layer)["down"]
        self.select(layer, heads)
        for module in self.blocks()[layer].modules():
            if _CHANNELS in module._buffers:
                _keep_all_channels(module)
        if down is not None and channels is not None:
            keep = torch.zeros(cast(nn.Linear, down).in_features, dtype=torch.bool, device=channels.device)
            down.register_buffer(_CHANNELS, keep.index_fill(0, channels, True), persistent=False)
            down.register_forward_pre_hook(_zero_channels)


def _one_head_of_zeros(linears: dict[str, nn.Module], width: int) -> None:
    """Make ``linears`` without heads give and take one of ``width`` features, which is zero."""
    for role, linear in linears.items():
        if role == "o":
            linear.register_forward_pre_hook(_take_nothing)
        else:
            linear.register_forward_hook(partial(_give_zeros, width * len(role)))


def _take_nothing(output: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][..., :0], *args[1:])


def _give_zeros(features: int, linear: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return F.pad(out, (0, features))


def _keep_all_channels(down: nn.Module) -> None:
    for key, hook in list(down._forward_pre_hooks.items()):
        if hook is _zero_channels:
            del down._forward_pre_hooks[key]
    down._buffers.pop(_CHANNELS)
    down._non_persistent_buffers_set.discard(_CHANNELS)


def _zero_channels(down: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * cast(Tensor, down._buffers[_CHANNELS]).to(args[0].device), *args[1:])


def _narrow(linear: nn.Module, pieces: list[int], width: int, columns: bool) -> nn.Module:
    """A new linear layer of the rows or columns of ``linear`` in ``pieces`` of ``width``."""
    source = cast(nn.Linear, linear)
    weight = ops.gather_heads(source.weight, pieces, width, int(columns))
    packed = nn.Linear(1, 1, bias=False, device="meta")  # a shell: its own weight is not wanted
    packed.weight = nn.Parameter(weight, requires_grad=source.weight.requires_grad)
    if source.bias is not None:
        bias = source.bias.detach().clone() if columns else ops.gather_heads(source.bias, pieces, width, 0)
        packed.bias = nn.Parameter(bias, requires_grad=source.bias.requires_grad)
    return packed


def _take_over(linears: dict[str, nn.Module], smaller: Smaller) -> None:
    """Give ``linears`` the parameters of the smaller ones."""
    for role, linear in linears.items():
        target, source = cast(nn.Linear, linear), cast(nn.Linear, smaller[role])
        target.weight, target.bias = source.weight, source.bias
        target.out_features, target.in_features = source.weight.shape
