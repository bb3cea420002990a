"""Rules that order whole blocks, or their attention or MLP alone: which go first."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.calibration import BlockStream, Calibration, linear
from sinkprune.evidence.evidence import Evidence
from sinkprune.progress import bar

# What a target takes of a block: its attention, its MLP.
BLOCK_TARGETS = {"blocks": (True, True), "attention": (True, False), "mlp_blocks": (False, True)}
RIDGE = 1e-2  # of the mean square of the inputs
Order = list[tuple[int, float]]  # layers, first to go first, with the figure that each went at


def influence(adapter: Adapter, evidence: Evidence, target: str, most: int) -> Order:
    """1 - the cosine between what leaves a block and what leaves it without what ``target`` takes, mean over
    valid tokens. For whole blocks that is what enters, and this the block influence of ShortGPT (arXiv
    2403.03853), here on masked rows at several noise levels."""
    scores = []
    for _, _, valid, whole, changed in _steps(adapter, evidence, target):
        pairs = zip(_rows(whole, valid), _rows(changed, valid), strict=True)
        scores.append(float(torch.cat([1 - F.cosine_similarity(x, y, dim=-1) for x, y in pairs]).mean()))
    return _ranked(scores)


def reconstruction(adapter: Adapter, evidence: Evidence, target: str, most: int) -> Order:
    """Squared error that is left when the down projection of the block before is refitted to give what goes
    as well, relative to the energy of what leaves the block. The first block has none before it."""
    scores: list[float] = []
    inputs: list[Tensor] = []  # of the down projection before, batch by batch
    for layer, stream, valid, whole, changed in _steps(adapter, evidence, target):
        leaving = torch.cat(_rows(whole, valid))
        change = leaving - torch.cat(_rows(changed, valid))
        scores.append(_left_over(inputs, change) / float(leaving.square().sum()))
        adapter.reach(layer)
        down, seen = adapter.linears(layer).get("down"), list[Tensor]()
        if down is not None:
            stream.visit(layer, linear(down), seen.append)
        inputs = _rows(seen, valid)
    return _ranked(scores)


def ablation(adapter: Adapter, evidence: Evidence, target: str, most: int) -> Order:
    """Mean cross entropy of the masked tokens without a block, those that went before it being out as well:
    each time the cheapest goes. A forward of all rows for every block that is left, ``most`` times."""
    assert evidence.calibration is not None
    left, order = list(range(adapter.geometry().num_layers)), []
    try:
        for _ in bar("planning", "block", range(most)):
            losses = {}
            for layer in left:
                with without(adapter, layer, target):
                    losses[layer] = _loss(adapter, evidence.calibration)
            cheapest = min(left, key=lambda layer: (losses[layer], layer))
            _take_out(adapter, cheapest, target)
            left.remove(cheapest)
            order.append((cheapest, losses[cheapest]))
    finally:
        for layer, _ in order:
            adapter.mask(layer, None, None)
    return order


def random(adapter: Adapter, evidence: Evidence, target: str, most: int) -> Order:
    """In an order drawn from the seed."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return _ranked(torch.rand(adapter.geometry().num_layers, generator=generator).tolist())


BLOCK_RULES: dict[str, Callable[[Adapter, Evidence, str, int], Order]] = {
    "influence": influence,
    "reconstruction": reconstruction,
    "ablation": ablation,
    "random": random,
}
DATA_FREE = ("random",)
DEFAULT_BLOCK_RULE = "influence"


def check_block_rule(rule: str, evidence: Evidence | None) -> None:
    """Raise ``ValueError`` listing the rules unless ``rule`` is one, or where blocks are chosen by it
    (``evidence`` is given) without the rows that it needs."""
    if rule not in BLOCK_RULES:
        near = difflib.get_close_matches(str(rule), BLOCK_RULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown block rule {rule!r}; known: {', '.join(BLOCK_RULES)}{hint}")
    if evidence is not None and rule not in DATA_FREE and evidence.calibration is None:
        raise ValueError(f"block rule {rule!r} needs calibration=sp.calibrate(model, text, ...)")


def block_order(rule: str, adapter: Adapter, evidence: Evidence, target: str, most: int) -> Order:
    """Layers in the order in which they go, at most ``most``.

    Raises:
        ValueError: figures that are not finite, or a layer that has not got what ``target`` takes.
    """
    if BLOCK_TARGETS[target][1]:
        for layer in range(adapter.geometry().num_layers):
            adapter.mlp_weights(layer)  # a family without prunable channels says so here
    order = BLOCK_RULES[rule](adapter, evidence, target, most)[:most]
    if not torch.isfinite(torch.tensor([figure for _, figure in order])).all():
        raise ValueError(f"block rule {rule!r} gave scores that are not finite")
    return order


@contextmanager
def without(adapter: Adapter, layer: int, target: str) -> Iterator[None]:
    """Run a dense ``layer`` without what ``target`` takes of it."""
    try:
        _take_out(adapter, layer, target)
        yield
    finally:
        adapter.mask(layer, None, None)


def _take_out(adapter: Adapter, layer: int, target: str) -> None:
    none = torch.zeros(0, dtype=torch.long, device=adapter.attention_weights(layer).q.device)
    attention, mlp = BLOCK_TARGETS[target]
    adapter.mask(layer, none if attention else None, none if mlp else None)


Step = tuple[int, BlockStream, list[Tensor | None], list[Tensor], list[Tensor]]


def _steps(adapter: Adapter, evidence: Evidence, target: str) -> Iterator[Step]:
    """Of every layer: the stream before it, its valid tokens, what leaves the layer, and without ``target``,
    ``[rows, L, hidden]`` of each batch."""
    assert evidence.calibration is not None
    stream = BlockStream(adapter, evidence.calibration)
    for layer in bar("planning", "layer", range(adapter.geometry().num_layers)):
        with without(adapter, layer, target):
            changed = stream.outputs(layer)
        yield layer, stream, stream.valid, stream.outputs(layer), changed
        stream.advance(layer)


def _left_over(inputs: list[Tensor], change: Tensor) -> float:
    """Squared error of ``change`` ``[tokens, hidden]`` after its ridge regression on ``inputs``."""
    if not inputs:
        return float(change.square().sum())
    x, y = torch.cat(inputs).double(), change.double()
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return float((y - x @ torch.linalg.solve(gram, x.T @ y)).square().sum())


@torch.no_grad()
def _loss(adapter: Adapter, calibration: Calibration, batch: int = 32) -> float:
    total, count, device = 0.0, 0, adapter.device
    for part in calibration.batches(batch):
        valid = None if part.valid is None else part.valid.to(device)
        logits = adapter.predict(part.ids.to(device), valid)[part.masked.to(device)].float()
        targets = part.targets[part.masked].to(device)
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(logits)
    return total / count


def _rows(batches: list[Tensor], valid: list[Tensor | None]) -> list[Tensor]:
    """The valid tokens of each batch ``[rows, L, n]``, float32 ``[tokens, n]``."""
    return [
        (x.flatten(0, 1) if seen is None else x[seen]).float()
        for x, seen in zip(batches, valid, strict=False)
    ]


def _ranked(scores: list[float]) -> Order:
    """Lowest first; ties go to the lower layer."""
    return sorted(enumerate(scores), key=lambda item: (item[1], item[0]))
