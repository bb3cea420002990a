"""Rules of denoising: which token each masked row would take, how sure that is, and which rows to commit.

One rule is one small class under ``@register_sampler``; ``denoise(algorithm=name)`` finds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

FLOAT64_ELEMENTS = 1 << 22  # 32 MB: logits turned to float64 at once
DREAM_EPS = 1e-3  # the time at which Dream's schedule ends

_SAMPLERS: dict[str, type[Sampler]] = {}
# Published rules that are not masked filling, by the names that engines give them.
_ELSEWHERE = {
    "editing": "LLaDA2.1's token editing",
    "joint_threshold": "LLaDA2.1's token editing",
    "joint_threshold_indel": "LLaDA2.2's insertion and deletion",
    "levenshtein_joint": "LLaDA2.2's insertion and deletion",
}


def register_sampler(name: str) -> Callable[[type[Sampler]], type[Sampler]]:
    """Class decorator: make a rule known to ``denoise`` by its name."""

    def register(sampler: type[Sampler]) -> type[Sampler]:
        _SAMPLERS[name] = sampler
        return sampler

    return register


def make_sampler(
    name: str,
    temperature: float,
    generator: torch.Generator | None,
    threshold: float | None = None,
    *,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Sampler:
    """The rule of that name. Raises ``ValueError`` for an unknown one, a threshold that it can't take, or
    limits out of range."""
    if name in _ELSEWHERE:
        raise ValueError(
            f"algorithm {name!r} changes what is written ({_ELSEWHERE[name]}), and denoise only fills masked "
            "tokens: run the model's own generate, with sp.track around it"
        )
    if name not in _SAMPLERS:
        raise ValueError(f"algorithm must be one of {', '.join(sorted(_SAMPLERS))}, got {name!r}")
    sampler = _SAMPLERS[name]
    if threshold is not None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
        if not sampler.is_probability:
            known = ", ".join(sorted(n for n, s in _SAMPLERS.items() if s.is_probability))
            raise ValueError(
                f"a threshold needs an algorithm whose confidence is a probability ({known}), got {name!r}"
            )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k!r}")
    return sampler(temperature, generator, threshold, top_p, top_k)


class Sampler(ABC):
    """``temperature``: 0 takes the argmax; above, Gumbel noise in float64. ``threshold``: commit all rows at
    least that sure, and always the surest one, instead of the schedule's number of rows. ``top_p``: draw from
    the fewest likeliest tokens whose probabilities reach that sum; ``top_k``: from that many."""

    is_probability: ClassVar[bool] = True  # whether a threshold in (0, 1] means something

    def __init__(
        self,
        temperature: float,
        generator: torch.Generator | None,
        threshold: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
    ) -> None:
        self.temperature, self.generator, self.threshold = temperature, generator, threshold
        self.top_p, self.top_k = top_p, top_k

    @abstractmethod
    def confidence(self, logits: Tensor, limited: Tensor, token: Tensor) -> Tensor:
        """How sure each row is, float64 ``[n]``, of its token ``[n, 1]`` under float64 logits ``[n, V]``,
        ``limited`` as they were drawn from."""

    def count(self, left: int, step: int, steps: int) -> int:
        """How many of a block's ``left`` masked tokens its ``step`` of ``steps`` commits: as even as can be,
        the larger ones first."""
        return transfer_counts(left, steps - step)[0]

    def limited(self, logits: Tensor) -> Tensor:
        """``logits`` ``[n, V]`` over the temperature, -inf outside ``top_p`` and then ``top_k``."""
        logits = logits / self.temperature if self.temperature else logits
        if self.top_p is not None and self.top_p < 1:
            from transformers import TopPLogitsWarper

            logits = TopPLogitsWarper(self.top_p)(None, logits)
        if self.top_k is not None:
            from transformers import TopKLogitsWarper

            logits = TopKLogitsWarper(self.top_k)(None, logits)
        return logits

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each row of ``[B, R, V]`` and the confidence in it, ``[B, R]`` int64 and float64.

        Noise and probabilities in float64 (float32 noise lowers quality in masked diffusion: arXiv
        2409.02908), a bounded number of rows at a time. Raises ``ValueError`` for logits that are NaN or
        infinite.
        """
        flat = logits.reshape(-1, logits.shape[-1])
        tokens, sureness, finite = [], [], []
        for part in flat.split(max(1, FLOAT64_ELEMENTS // flat.shape[-1])):
            wide = part.double()
            limited = self.limited(wide)
            if self.temperature:
                noise = torch.empty_like(wide).exponential_(generator=self.generator).clamp_min_(1e-300)
                token = (limited - noise.log_()).argmax(-1, keepdim=True)
            else:
                token = part.argmax(-1, keepdim=True)
            tokens.append(token)
            finite.append(wide.gather(-1, token).isfinite())  # argmax points at a NaN where there is one
            sureness.append(self.confidence(wide, limited, token))
        if not bool(torch.cat(finite).all()):  # the one look of the host at a step
            raise ValueError(
                "the model's logits are NaN or infinite: no token can be chosen (a dtype too narrow for "
                "the weights, or damaged weights?)"
            )
        shape = logits.shape[:-1]
        return torch.cat(tokens).view(shape), torch.cat(sureness).view(shape)

    def choose(self, confidence: Tensor, masked: Tensor, left: int, step: int, steps: int) -> Tensor:
        """Which of the ``masked`` rows to commit, bool ``[B, R]``; ``left``: how many are masked in a
        sample."""
        confidence = confidence.masked_fill(~masked, -torch.inf)
        if self.threshold is not None:
            return masked & ((confidence >= self.threshold) | _largest(confidence, 1))
        return masked & _largest(confidence, self.count(left, step, steps))


def transfer_counts(masked: int, steps: int) -> list[int]:
    """How many of ``masked`` tokens each of ``steps`` commits: as even as can be, the larger ones first."""
    base, extra = divmod(masked, steps)
    return [base + (i < extra) for i in range(steps)]


def _largest(confidence: Tensor, count: int) -> Tensor:
    chosen = confidence.topk(count, dim=-1).indices
    return torch.zeros_like(confidence, dtype=torch.bool).scatter_(1, chosen, True)


@register_sampler("low_confidence")
class LowConfidence(Sampler):
    """LLaDA's (arXiv 2502.09992): the probability of the token, whatever the temperature it was drawn at."""

    def confidence(self, logits: Tensor, limited: Tensor, token: Tensor) -> Tensor:
        return (logits.gather(-1, token) - logits.logsumexp(-1, keepdim=True)).exp().squeeze(-1)


@register_sampler("random")
class Random(Sampler):
    """LLaDA's random remasking."""

    is_probability = False

    def confidence(self, logits: Tensor, limited: Tensor, token: Tensor) -> Tensor:
        size = token.shape[0]
        return torch.rand(size, device=token.device, generator=self.generator, dtype=torch.float64)


class DreamSampler(Sampler):
    """Dream's rules (arXiv 2508.15487) look at the distribution they draw from and follow a linear time from
    1 to ``DREAM_EPS``."""

    def released(self, step: int, steps: int) -> Tensor:
        """The share of the masked tokens that a step commits: a float32 scalar, as published."""
        times = torch.linspace(1, DREAM_EPS, steps + 1)
        return torch.ones(()) if step == steps - 1 else 1 - times[step + 1] / times[step]

    def count(self, left: int, step: int, steps: int) -> int:
        return int(left * self.released(step, steps))


@register_sampler("maskgit_plus")
class MaskGITPlus(DreamSampler):
    """The probability of the token."""

    def confidence(self, logits: Tensor, limited: Tensor, token: Tensor) -> Tensor:
        return limited.softmax(-1).gather(-1, token).squeeze(-1)


@register_sampler("topk_margin")
class TopKMargin(DreamSampler):
    """The two largest probabilities' difference."""

    def confidence(self, logits: Tensor, limited: Tensor, token: Tensor) -> Tensor:
        first, second = limited.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return first - second


@register_sampler("entropy")
class Entropy(DreamSampler):
    """The negative entropy."""

    is_probability = False

    def confidence(self, logits: Tensor, limited: Tensor, token: Tensor) -> Tensor:
        return -torch.special.entr(limited.softmax(-1)).sum(-1)


@register_sampler("origin")
class Origin(DreamSampler):
    """Every masked token is committed with the probability that the schedule gives, whoever is sure."""

    is_probability = False

    def confidence(self, logits: Tensor, limited: Tensor, token: Tensor) -> Tensor:
        size = token.shape[0]
        return torch.rand(size, device=token.device, generator=self.generator, dtype=torch.float64)

    def choose(self, confidence: Tensor, masked: Tensor, left: int, step: int, steps: int) -> Tensor:
        return masked & (confidence < self.released(step, steps).item())
