"""Repair without retraining: output and down projections refitted so that a pruned layer gives what the dense
one gave."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from sinkprune.adapters import Adapter
from sinkprune.evidence.calibration import BlockStream, Calibration, linear
from sinkprune.plans import Geometry, LayerPlan
from sinkprune.progress import bar
from sinkprune.pruning.expert_repair import refit_experts

if TYPE_CHECKING:
    from sinkprune.plans import PrunePlan

REPAIRS = ("least_squares", "least_squares_cv", "least_squares_bias", "bias")
UNBIASED = ("least_squares", "least_squares_cv")
RIDGE = 1e-2  # of the mean square of the inputs, pulling towards the weights as they are
RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # that cross-validation tries


@contextmanager
def repaired(
    adapter: Adapter,
    plan: PrunePlan,
    calibration: Calibration,
    method: str = "least_squares",
    *,
    ridge: float = RIDGE,
    batch: int = 16,
    keep_originals: bool = True,
    progress: bool = False,
    walk: Walk | None = None,
) -> Iterator[None]:
    """Refit the projections of a dense model for ``plan``; if what follows fails, put the old ones back.

    Layer by layer, on the outputs of the already pruned and repaired layers before it: the kept columns of
    the output projection, then of the down projection (of a mixture, of the experts that stay), and its bias
    where it has one, are those that come
    closest in squared error to the dense layer's outputs, by ridge regression towards the weights as they
    are. Layers before the
    first that loses something are left as they are; later ones make up for what reaches them changed. Kept
    columns change; the others are what packing drops.

    Under ``"least_squares"`` the projection before attention or an MLP that is gone, or before whole blocks,
    is fitted to what it and they wrote together, where a layer adds to what enters it.

    Memory: hidden states of the calibration rows twice, one layer's outputs, and one Gram matrix of the kept
    columns in float64; with ``keep_originals`` also the projections as they were.

    Args:
        adapter: of a dense model.
        plan: what will be kept.
        calibration: rows to fit on; fewer tokens than kept columns rely on the ridge, and are warned of.
        method: ``"least_squares"``, which adds no biases; ``"least_squares_cv"``, whose ridge is chosen for
            every projection by two-fold cross-validation, over the halves of every row's positions, and
            which leaves alone what no ridge betters; ``"least_squares_bias"``, which gives every refitted
            projection a bias; or ``"bias"``, which only gives back the means of what was removed (FLAP,
            arXiv 2312.11983).
        ridge: strength, relative to the inputs' mean square.
        walk: of a model whose blocks come and go: is told of every layer that is done, and knows which were
            done before.

    Raises:
        ValueError: an unknown method, a projection that is not an ordinary linear layer, or activations that
            are not finite.
    """
    if method not in REPAIRS:
        raise ValueError(f"repair must be one of {REPAIRS} or None, got {method!r}")
    originals: list[tuple[nn.Linear, Tensor, Tensor | None]] = []
    layers = range(adapter.geometry().num_layers)
    first = _first_loss(adapter.geometry(), plan)
    warned = False
    try:
        dense, pruned = (BlockStream(adapter, calibration, batch) for _ in range(2))
        wanted = _Targets(adapter, plan, dense, fold=method == "least_squares")
        start = 0 if walk is None else walk.begin(dense, pruned)
        for layer in bar("repairing", "layer", layers[start:], asked=progress):
            if layer < first - wanted.ahead(first):
                dense.advance(layer)
                pruned.advance(layer)
                if walk is not None:
                    walk.done(layer, dense, pruned, wanted.is_level)
                continue
            if walk is not None:
                walk.hold(layer)
            experts = adapter.expert_mlp(layer) if method != "bias" else None
            fits, targets = _fits(adapter, plan, layer), wanted.of(layer, experts)
            _skip(adapter, layer, plan.layers[layer])
            try:
                for (module, columns), target in zip(fits, targets[: len(fits)], strict=True):
                    if target is None:
                        continue
                    if keep_originals:
                        originals.append((module, module.weight.detach().clone(), module.bias))
                    sums = _Sums(
                        columns, target, pruned.valid, folds=2 if method == "least_squares_cv" else 1
                    )
                    pruned.visit(layer, module, sums.add)
                    if not warned and method != "bias" and sums.count < len(columns):
                        warned = True
                        warnings.warn(
                            f"repair has {sums.count} calibration tokens for {len(columns)} columns of layer "
                            f"{layer}: calibrate on more rows",
                            stacklevel=5,  # the call of apply, which torch wraps
                        )
                    biased = method not in UNBIASED or module.bias is not None
                    strength = sums.best_ridge(module) if method == "least_squares_cv" else ridge
                    weight, bias = sums.solve(module, None if method == "bias" else strength, biased=biased)
                    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                        raise ValueError(f"layer {layer}: activations are not finite; nothing was repaired")
                    with torch.no_grad():
                        module.weight[:, columns] = weight.to(module.weight.dtype)
                        if biased:
                            fitted = bias.to(module.weight.dtype)
                            module.bias = nn.Parameter(
                                fitted, (module.weight if module.bias is None else module.bias).requires_grad
                            )
                if experts is not None and not experts.gone:
                    save = _saver(originals) if keep_originals else None
                    given = cast(list[Tensor], targets[-1])
                    refit_experts(experts, pruned.tokens(layer, experts), pruned.flat(given), ridge, save)
                del targets
                pruned.advance(layer)
            finally:
                _skip(adapter, layer, None)
            if walk is not None:
                walk.done(layer, dense, pruned, wanted.is_level)
        yield
    except BaseException:
        with torch.no_grad():
            for module, weight, old_bias in reversed(originals):
                module.weight.copy_(weight)
                module.register_parameter("bias", cast(nn.Parameter | None, old_bias))
        raise


class Walk(Protocol):
    """Who goes through a model's layers with its repair, where they are not all there at once."""

    def begin(self, dense: BlockStream, pruned: BlockStream) -> int:
        """The layer to begin at, with the hidden states before it in both streams."""

    def hold(self, layer: int) -> None:
        """The layer is about to be changed: it stays as it is made until it is done."""

    def done(self, layer: int, dense: BlockStream, pruned: BlockStream, level: bool) -> None:
        """Nothing changes in the layer any more; ``level``: the dense stream is not ahead of the other."""


def add_biases(adapter: Adapter, plan: PrunePlan) -> list[nn.Linear]:
    """Give a dense model the biases that repairing it for ``plan`` added, of zeros; the modules that got one.

    Plans from before repairs without biases do not say whether theirs added some: it did.
    """
    return [m for layer in range(adapter.geometry().num_layers) for m in add_bias(adapter, plan, layer)]


def add_bias(adapter: Adapter, plan: PrunePlan, layer: int) -> list[nn.Linear]:
    """``add_biases`` of one layer."""
    biased = plan.details.get("repair", {"biases": False}).get("biases", True)
    if not biased or layer < _first_loss(adapter.geometry(), plan):
        return []
    added = [module for module, _ in _fits(adapter, plan, layer) if module.bias is None]
    for module in added:
        zeros = module.weight.new_zeros(module.out_features)
        module.bias = nn.Parameter(zeros, module.weight.requires_grad)
    return added


def _first_loss(geometry: Geometry, plan: PrunePlan) -> int:
    """The first layer that loses something; the number of layers where none does."""
    layers = range(geometry.num_layers)
    return next((i for i in layers if _loses(geometry, plan, i)), geometry.num_layers)


def _loses(geometry: Geometry, plan: PrunePlan, layer: int) -> bool:
    kept = plan.layers[layer]
    fewer = len(kept.kept_heads) < geometry.heads[layer]
    return fewer or kept.kept_channels is not None or kept.takes_experts


def _fits(adapter: Adapter, plan: PrunePlan, layer: int) -> list[tuple[nn.Linear, Tensor]]:
    """The layer's projections to refit, in the order in which they run, and the columns that they keep."""
    adapter.reach(layer)
    geometry, kept, linears = adapter.geometry(), plan.layers[layer], adapter.linears(layer)
    output = linear(linears["o"])
    width = output.in_features // geometry.heads[layer]
    device = output.weight.device
    heads = torch.tensor(kept.kept_heads, dtype=torch.long, device=device)
    found = [(output, (heads[:, None] * width + torch.arange(width, device=device)).flatten())]
    if "down" in linears:
        down = linear(linears["down"])
        channels = range(down.in_features) if kept.kept_channels is None else kept.kept_channels
        found.append((down, torch.tensor(list(channels), dtype=torch.long, device=device)))
    return found


class _Sums:
    """Normal equations of one projection, gathered batch by batch in float64; in ``folds``, by position."""

    def __init__(
        self, columns: Tensor, targets: list[Tensor], valid: list[Tensor | None], folds: int = 1
    ) -> None:
        self.columns, self.targets, self.valid, self.seen = columns, targets, valid, 0
        self.count = 0
        self.parts = [_Sums(columns, [], []) for _ in range(folds)] if folds > 1 else []
        self.gram = self.cross = self.x_sum = self.y_sum = torch.zeros(
            (), dtype=torch.float64, device=columns.device
        )

    def add(self, x: Tensor) -> None:
        """One batch's inputs of the projection, ``[B, L, columns]``."""
        valid, y = self.valid[self.seen], self.targets[self.seen]
        self.seen += 1
        for index, part in enumerate(self.parts):
            at = torch.arange(x.shape[1], device=x.device) * len(self.parts) // x.shape[1] == index
            part.count_in(x[:, at], y[:, at], None if valid is None else valid[:, at])
        self.count_in(x, y, valid)

    def count_in(self, x: Tensor, y: Tensor, valid: Tensor | None) -> None:
        rows = (slice(None), slice(None)) if valid is None else valid
        x = x[rows].reshape(-1, x.shape[-1]).index_select(1, self.columns).float()
        y = y[rows].reshape(-1, y.shape[-1]).float()
        self.count += len(x)
        if self.count == len(x):
            self.gram, self.cross = (x.T @ x).double(), (x.T @ y).double()
        else:
            self.gram += x.T @ x
            self.cross += x.T @ y
        self.x_sum = self.x_sum + x.double().sum(0)
        self.y_sum = self.y_sum + y.double().sum(0)

    def best_ridge(self, module: nn.Linear) -> float | None:
        """The one of ``RIDGES`` that fits every fold best when it was fitted on the others; None where no fit
        does better there than the weights as they are."""
        if not len(self.columns) or any(part.count == 0 for part in self.parts):
            return RIDGE if len(self.columns) else None
        tried = (None, *RIDGES)
        errors = torch.zeros(len(tried), dtype=torch.float64)
        biased = module.bias is not None
        for one, other in (self.parts, self.parts[::-1]):
            for index, ridge in enumerate(tried):
                weight, bias = one.solve(module, ridge, biased=biased)
                errors[index] += other.error(weight, bias)
        return tried[int(errors.argmin())]

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Squared error of ``[hidden, n]`` and ``[hidden]`` over what was counted, less that of zeros."""
        fitted = (weight @ self.gram * weight).sum() - 2 * (weight.T * self.cross).sum()
        shift = self.count * bias.square().sum() + 2 * bias @ (weight @ self.x_sum - self.y_sum)
        return float(fitted + shift)

    def solve(self, module: nn.Linear, ridge: float | None, *, biased: bool) -> tuple[Tensor, Tensor]:
        """The kept columns ``[hidden, n]`` and the bias ``[hidden]``, zero unless ``biased``; ``ridge=None``
        leaves the columns."""
        n = max(1, self.count)
        weight = module.weight.detach()[:, self.columns].double()
        x_mean, y_mean = self.x_sum / n, self.y_sum / n
        if ridge is not None and len(self.columns):
            gram, cross = self.gram / n, self.cross / n
            mean_square = gram.diagonal().mean()
            if biased:
                gram -= x_mean[:, None] * x_mean
                cross = cross - x_mean[:, None] * y_mean
            # What the weights as they are leave over is fitted: the ridge pulls towards them, not to zero.
            # It is a share of the mean square, which rows that are all alike have and their spread has not.
            left = cross - gram @ weight.T
            gram.diagonal().add_(ridge * mean_square + torch.finfo(torch.float32).tiny)
            weight = weight + torch.linalg.solve(gram, left, left=True).T
        return weight, y_mean - weight @ x_mean if biased else torch.zeros_like(y_mean)


class _Targets:
    """What the projections of each layer shall give: what the dense ones gave, batch by batch, and with
    ``fold`` what comes after and is gone. The dense stream runs ahead over that."""

    def __init__(self, adapter: Adapter, plan: PrunePlan, dense: BlockStream, *, fold: bool) -> None:
        self._adapter, self._plan, self._dense, self._fold = adapter, plan, dense, fold
        self._seen: dict[int, list[list[Tensor] | None]] = {}
        self._plain: dict[int, bool] = {}  # whether a layer only adds its projections' outputs

    @property
    def is_level(self) -> bool:
        """Whether the dense stream stands where the pruned one does."""
        return not self._seen

    def ahead(self, first: int) -> bool:
        """Whether the layer before ``first`` is refitted for what ``first`` lost."""
        return self._fold and 0 < first < len(self._plan.layers) and not self._plan.layers[first].kept_heads

    def of(self, layer: int, experts: nn.Module | None = None) -> list[list[Tensor] | None]:
        """One list of batches for each of ``_fits``, and for ``experts``; None where a projection before
        gives it."""
        found = self._collect(layer, experts)
        if self._fold and self._plain[layer]:
            kept = [len(columns) > 0 for _, columns in _fits(self._adapter, self._plan, layer)]
            if any(kept):
                last = max(i for i, any_left in enumerate(kept) if any_left)
                for part in range(last + 1, len(found)):
                    self._give(layer, part, found[last])
                self._give_following(layer, found[last])
        return self._seen.pop(layer)

    def _give_following(self, layer: int, into: list[Tensor] | None) -> None:
        for after in range(layer + 1, len(self._plan.layers)):
            if self._plan.layers[after].kept_heads:
                return
            found = self._collect(after)
            if not self._plain[after]:
                return
            self._give(after, 0, into)
            if self._plan.layers[after].kept_channels != []:
                return
            for part in range(1, len(found)):
                self._give(after, part, into)

    def _give(self, layer: int, part: int, into: list[Tensor] | None) -> None:
        """Add what a part that is gone wrote, but for its bias, which stays, to another's targets."""
        outputs, bias = self._seen[layer][part], _fits(self._adapter, self._plan, layer)[part][0].bias
        assert into is not None and outputs is not None
        into[:] = [
            batch + (written if bias is None else written - bias.detach())
            for batch, written in zip(into, outputs, strict=True)
        ]
        self._seen[layer][part] = None

    def _collect(self, layer: int, experts: nn.Module | None = None) -> list[list[Tensor] | None]:
        if layer not in self._seen:
            before = self._dense.hidden[0].float()
            watched: list[nn.Module] = [module for module, _ in _fits(self._adapter, self._plan, layer)]
            with _outputs([*watched, *([] if experts is None else [experts])]) as outputs:
                self._dense.advance(layer)
            self._seen[layer] = list(outputs)
            self._plain[layer] = False
            if self._fold and self._adapter.expert_mlp(layer) is None:
                change = self._dense.hidden[0].float() - before
                written = torch.stack([batches[0].float() for batches in outputs]).sum(0)
                near = (change - written).norm() <= 0.02 * change.norm()  # to rounding in bfloat16
                self._plain[layer] = bool(near)
        return self._seen[layer]


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """The outputs of modules while the blocks run, one list of batches for each."""
    found: list[list[Tensor]] = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda m, args, out, into=into: into.append(out.detach()))
        for module, into in zip(modules, found, strict=True)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _saver(originals: list[tuple[nn.Linear, Tensor, Tensor | None]]) -> Callable[[nn.Linear], object]:
    return lambda module: originals.append((module, module.weight.detach().clone(), module.bias))


def _skip(adapter: Adapter, layer: int, kept: LayerPlan | None) -> None:
    """Mask form of one layer; None undoes it."""
    device = adapter.attention_weights(layer).q.device
    chosen = (None, None) if kept is None else (kept.kept_heads, kept.dense_channels)
    index = (None if ids is None else torch.tensor(ids, dtype=torch.long, device=device) for ids in chosen)
    adapter.mask(layer, *index)
    adapter.skip_experts(layer, kept)
