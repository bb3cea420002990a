"""A mixture of experts: which experts a token goes to, what they give, and fewer or narrower ones of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune.models.common import GatedMLP


@dataclass(frozen=True)
class Routing:
    """How a token's experts are chosen and weighted.

    The scores are sigmoids, or a softmax. The best ``open_groups`` of ``groups`` equal groups of experts are
    taken (by their two largest scores, the router's bias added), and in them the best ``top_k`` experts.
    Their weights are the scores without the bias, summing to ``scale`` where ``normed``, else times
    ``scale``.
    """

    top_k: int
    groups: int = 1
    open_groups: int = 1
    sigmoid: bool = True
    normed: bool = True
    scale: float = 1.0


class Router(nn.Module):
    """Which experts a token goes to, and how much each counts.

    ``kept_experts`` (an int tensor or None for all) are those that it still chooses among.
    """

    def __init__(self, routing: Routing, hidden: int, experts: int, *, biased: bool = True) -> None:
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        nn.init.normal_(self.weight, std=hidden**-0.5)
        if biased:
            self.register_buffer("expert_bias", torch.zeros(experts))
        self.kept_experts: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids int64 and weights float32, ``[T, k]`` each, of tokens ``[T, hidden]``."""
        routing = self.routing
        logits = F.linear(x.float(), self.weight.float())
        if self.kept_experts is not None and not routing.sigmoid:
            logits = logits + self._hidden(logits)
        scores = logits.sigmoid() if routing.sigmoid else logits.softmax(-1)
        bias = self._buffers.get("expert_bias")
        ranks = scores if bias is None else scores + bias.float()
        if self.kept_experts is not None:
            ranks = ranks + self._hidden(ranks)
        if routing.groups > 1:
            groups = ranks.unflatten(-1, (routing.groups, -1))
            best = groups.topk(2, dim=-1).values.sum(-1).topk(routing.open_groups, dim=-1).indices
            open_groups = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            ranks = groups.masked_fill(~open_groups[..., None], -torch.inf).flatten(-2)
        experts = ranks.topk(routing.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if routing.normed and routing.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * routing.scale

    def _hidden(self, ranks: Tensor) -> Tensor:
        """-inf at the experts that are not kept, else 0: ``[experts]``."""
        out = ranks.new_full(ranks.shape[-1:], -torch.inf)
        return out.index_fill(0, cast(Tensor, self.kept_experts), 0.0)

    def keeping(self, experts: Sequence[int]) -> Router:
        """A router of the rows ``experts`` alone."""
        index = torch.tensor(list(experts), device=self.weight.device)
        bias = self._buffers.get("expert_bias")
        with torch.device("meta"):
            smaller = Router(self.routing, self.weight.shape[1], len(index), biased=bias is not None)
        smaller.weight = _rows(self.weight, index, 0)
        if bias is not None:
            smaller.expert_bias = bias.index_select(0, index)
        return smaller


class ExpertMLP(nn.Module):
    """The experts that a token is routed to, one expert at a time, and those that every token goes to.

    Args:
        routing: how experts are chosen.
        hidden, width: features of a token, channels of an expert.
        experts: how many there are.
        shared: channels that every token goes through beside them, 0 = none.
        biased: whether the router has a bias that only chooses.
    """

    def __init__(
        self, routing: Routing, hidden: int, width: int, experts: int, shared: int = 0, *, biased: bool = True
    ) -> None:
        super().__init__()
        self.gate = Router(routing, hidden, experts, biased=biased)
        self.experts = nn.ModuleList(GatedMLP(hidden, width) for _ in range(experts))
        if shared:
            self.shared_experts = GatedMLP(hidden, shared)
        self.gone = False

    def forward(self, x: Tensor) -> Tensor:
        if self.gone:
            return torch.zeros_like(x)
        tokens = x.flatten(0, -2)
        routed = self.routed(tokens, *self.gate(tokens)).to(x.dtype).view_as(x)
        return routed + self.shared_experts(x) if hasattr(self, "shared_experts") else routed

    def routed(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What the experts ``chosen`` ``[T, k]`` give of ``tokens``, by ``weights``, float32
        ``[T, hidden]``."""
        routed = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            row, place = (chosen == expert).nonzero(as_tuple=True)
            out = self.experts[expert](tokens[row])
            routed.index_add_(0, row, out.float() * weights[row, place, None])
        return routed

    def inputs_of(
        self, expert: int, tokens: Tensor, chosen: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which of ``tokens`` go to ``expert``, int ``[n]``, and what its down projection gets of them times
        their weights, float32 ``[n, channels]``."""
        row, place = (chosen == expert).nonzero(as_tuple=True)
        return row, self.hidden_of(expert, tokens[row]) * weights[row, place, None]

    def hidden_of(self, expert: int, tokens: Tensor) -> Tensor:
        """What an expert's down projection gets of ``tokens``, float32 ``[n, channels]``."""
        return cast(GatedMLP, self.experts[expert]).hidden(tokens).float()

    def skip(self, experts: Tensor | None, channels: Tensor | None) -> None:
        """Leave out all but ``experts`` int ``[n]`` (none: the whole MLP) and of each of them all but
        ``channels`` int ``[n, c]``, the weights staying as they are. None: keep all."""
        self.gone = experts is not None and len(experts) == 0
        self.gate.kept_experts = None if self.gone else experts
        kept = range(len(self.experts)) if experts is None else experts.tolist()
        for expert in self.experts:
            cast(GatedMLP, expert).kept_channels = None
        for at, expert in enumerate(kept if channels is not None else ()):
            cast(GatedMLP, self.experts[expert]).kept_channels = cast(Tensor, channels)[at]

    def keeping(
        self, experts: Sequence[int] | None, channels: Sequence[Sequence[int]] | None = None
    ) -> ExpertMLP:
        """An MLP of these ``experts`` alone, and of each of them of these ``channels``; None: all. Experts
        that stay whole are the same modules."""
        kept = range(len(self.experts)) if experts is None else experts
        first = cast(GatedMLP, self.experts[0])
        with torch.device("meta"):
            smaller = ExpertMLP(self.gate.routing, first.up_proj.in_features, 1, 0)
        smaller.gate = self.gate.keeping(kept)
        chosen = [cast(GatedMLP, self.experts[expert]) for expert in kept]
        if channels is not None:
            chosen = [_narrower(expert, ids) for expert, ids in zip(chosen, channels, strict=True)]
        smaller.experts = nn.ModuleList(chosen)
        if hasattr(self, "shared_experts"):
            smaller.shared_experts = self.shared_experts
        return smaller.train(self.training)


def _narrower(expert: GatedMLP, channels: Sequence[int]) -> GatedMLP:
    index = torch.tensor(list(channels), device=expert.up_proj.weight.device)
    with torch.device("meta"):
        smaller = GatedMLP(expert.up_proj.in_features, len(index))
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        smaller.get_submodule(name).weight = _rows(expert.get_submodule(name).weight, index, dim)  # type: ignore[assignment, arg-type]
    return smaller


def _rows(weight: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(weight.detach().index_select(dim, index), weight.requires_grad)
