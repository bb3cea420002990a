"""Follow every head's attention sink through the denoising steps, on the device, in constant memory.

Per step and layer `ops.column_mass` writes into `SinkTracker.mass`; `SinkTracker.end_step` then folds all
layers into the running statistics in one launch, and `SinkTracker.result` reads them out at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkprune import ops
from sinkprune.kernels import reference as layout


@dataclass(frozen=True)
class SinkGate:
    """When a step's sink counts as standing out, rather than being the argmax of a diffuse head.

    Both conditions must hold, over the valid keys of the (sample, layer, head) at that step:

    Attributes:
        fair_share: sink mass ≥ ``fair_share`` × 1 / (number of valid keys).
        sigma: sink mass > mean + ``sigma`` × standard deviation of the column mass.
    """

    fair_share: float = 4.0
    sigma: float = 2.0


@dataclass(frozen=True)
class PositionMoments:
    """How the sink position moved over the counted steps; each tensor ``[L, B, H]``, float32.

    A (layer, sample, head) with no counted step has count 0, mean, minimum, maximum NaN and the rest 0.

    Attributes:
        count: steps counted.
        mean, variance: of the position in tokens (population variance, tokens²).
        minimum, maximum: the lowest and highest position seen.
        moves: steps whose position differs from the last counted one's (at most count - 1).
        mean_move: mean of |move| in tokens over the count - 1 transitions, zero moves included.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor
    minimum: Tensor
    maximum: Tensor
    moves: Tensor
    mean_move: Tensor

    @property
    def range(self) -> Tensor:
        """Highest minus lowest position, ``[L, B, H]``, tokens; 0 where nothing was counted."""
        return (self.maximum - self.minimum).nan_to_num(0.0)


@dataclass(frozen=True)
class SinkStatistics:
    """What a `SinkTracker` saw. Tensors are ``[L, B, H]`` float32 on the tracker's device, H the most heads
    of a layer.

    Heads a layer does not have carry count 0, like heads that were never kept.

    Attributes:
        position: moments over every step that had a sink (argmax with positive, finite mass).
        gated: the same over the steps where the sink stands out (`SinkGate`).
        mass: mean sink mass over the counted steps.
        margin: mean of the largest minus the second largest column mass.
        fair_shares: mean of sink mass × number of valid keys: 1 is a uniform head.
        steps: number of steps the tracker saw, counted or not; int64 scalar tensor.
        num_heads: heads of each layer.
        trace_positions: int32 ``[steps, L, B, H]``, -1 = no sink; None unless traced.
        trace_mass: float32 ``[steps, L, B, H]``; None unless traced.
    """

    position: PositionMoments
    gated: PositionMoments
    mass: Tensor
    margin: Tensor
    fair_shares: Tensor
    steps: Tensor
    num_heads: tuple[int, ...]
    trace_positions: Tensor | None = None
    trace_mass: Tensor | None = None


class SinkTracker:
    """Running sink statistics of every (layer, sample, head); state stays on the device and is updated in
    place.

    Args:
        num_layers: layers tracked.
        num_heads: query heads per layer; one int, or one per layer.
        batch_size: samples per step.
        max_keys: the longest key length; a step may use fewer.
        device: where the state lives.
        gate: when a sink stands out, for the gated statistics.
        key_padding_mask: bool ``[B, <= max_keys]``, True = valid, for every step; `end_step` may override it.
        trace: also keep the position and mass of every step, up to ``max_steps`` (8 bytes per step, sample
            and head).
        max_steps: steps the trace has room for; later ones still enter the statistics.

    Attributes:
        mass: per layer, a float32 buffer ``[B, H, max_keys]`` for ``ops.column_mass(out=...)``.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int | Sequence[int],
        batch_size: int,
        max_keys: int,
        device: torch.device | str = "cpu",
        *,
        gate: SinkGate | None = None,
        key_padding_mask: Tensor | None = None,
        trace: bool = False,
        max_steps: int = 1024,
    ) -> None:
        heads = (num_heads,) * num_layers if isinstance(num_heads, int) else tuple(num_heads)
        if num_layers < 1 or len(heads) != num_layers or min(heads) < 0:
            raise ValueError(
                f"num_heads must be one int or one per layer ({num_layers}), none negative, got {num_heads}"
            )
        if batch_size < 0 or max_keys < 1:
            raise ValueError(f"expected batch_size >= 0 and max_keys >= 1, got {batch_size} and {max_keys}")
        self.num_heads = heads
        self.batch_size = batch_size
        self.max_keys = max_keys
        self.gate = SinkGate() if gate is None else gate
        self.device = torch.device(device)
        starts = [0]
        for h in heads:
            starts.append(starts[-1] + batch_size * h)
        rows = starts[-1]
        self._mass = torch.zeros(rows, max_keys, dtype=torch.float32, device=self.device)
        self._state = torch.zeros(rows, layout.STATE_WIDTH, dtype=torch.float32, device=self.device)
        self._sample_of = torch.cat(
            [torch.arange(batch_size, dtype=torch.int32).repeat_interleave(h) for h in heads]
        ).to(self.device)
        traced = max_steps if trace else 0
        self._trace_positions = torch.full((traced, rows), -1, dtype=torch.int32, device=self.device)
        self._trace_mass = torch.zeros(traced, rows, dtype=torch.float32, device=self.device)
        self._starts = starts
        self._padding = self._check_padding(key_padding_mask)
        self.mass = [
            self._mass[start:end].view(batch_size, h, max_keys)
            for start, end, h in zip(starts, starts[1:], heads, strict=False)
        ]

    def end_step(self, *, key_padding_mask: Tensor | None = None, num_keys: int | None = None) -> None:
        """Fold the masses of this step into the statistics: one launch for all layers, no synchronisation.

        Args:
            key_padding_mask: bool ``[B, <= max_keys]`` for this step, True = valid; None = the constructor's.
            num_keys: leading keys in use this step; None = the mask's length, or ``max_keys`` without one.
        """
        padding = self._padding if key_padding_mask is None else self._check_padding(key_padding_mask)
        if num_keys is None:
            num_keys = self.max_keys if padding is None else padding.shape[1]
        elif not 0 <= num_keys <= self.max_keys or (padding is not None and padding.shape[1] < num_keys):
            limit = self.max_keys if padding is None else padding.shape[1]
            raise ValueError(f"num_keys must lie within 0..{limit}, got {num_keys}")
        ops.sink_update(
            self._mass,
            self._state,
            self._sample_of,
            padding,
            num_keys,
            self.gate.fair_share,
            self.gate.sigma,
            self._trace_positions,
            self._trace_mass,
        )

    def reset(self) -> None:
        """Forget every step. Buffers keep their addresses, so a captured graph stays valid."""
        self._mass.zero_()
        self._state.zero_()
        self._trace_positions.fill_(-1)
        self._trace_mass.zero_()

    def result(self) -> SinkStatistics:
        """The statistics so far, copied out of the running state (synchronises only if a trace is kept)."""
        state = self._by_layer(self._state, fill=0.0)  # [L, B, H, STATE_WIDTH]
        divisor = state[..., layout.COUNT].clamp(min=1)
        steps = self._state[:1, layout.STEPS].sum().long()  # every row counts the same steps
        positions = masses = None
        if self._trace_positions.shape[0]:
            kept = min(int(steps), self._trace_positions.shape[0])
            positions = self._by_layer(self._trace_positions[:kept].T, fill=-1).movedim(-1, 0)
            masses = self._by_layer(self._trace_mass[:kept].T, fill=0.0).movedim(-1, 0)
        return SinkStatistics(
            position=_moments(state[..., layout.COUNT : layout.COUNT + 8]),
            gated=_moments(state[..., layout.GATED : layout.GATED + 8]),
            mass=state[..., layout.MASS_MEAN].clone(),
            margin=state[..., layout.MARGIN_SUM] / divisor,
            fair_shares=state[..., layout.SHARE_SUM] / divisor,
            steps=steps,
            num_heads=self.num_heads,
            trace_positions=positions,
            trace_mass=masses,
        )

    def _by_layer(self, rows: Tensor, fill: float) -> Tensor:
        """``[R, X]`` to ``[L, B, Hmax, X]``, missing heads filled."""
        most = max(self.num_heads)
        result = rows.new_full((len(self.num_heads), self.batch_size, most, rows.shape[1]), fill)
        for layer, h in enumerate(self.num_heads):
            part = rows[self._starts[layer] : self._starts[layer + 1]]
            result[layer, :, :h] = part.reshape(self.batch_size, h, rows.shape[1])
        return result

    def _check_padding(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        if mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool (True = valid), got {mask.dtype}")
        if mask.dim() != 2 or mask.shape[0] != self.batch_size or mask.shape[1] > self.max_keys:
            raise ValueError(
                f"key_padding_mask must have shape [{self.batch_size}, at most {self.max_keys}], "
                f"got {tuple(mask.shape)}"
            )
        if mask.device != self._mass.device:
            raise ValueError(f"key_padding_mask must be on {self._mass.device}, got {mask.device}")
        return mask


def _moments(columns: Tensor) -> PositionMoments:
    count, mean, m2, low, high, _, moves, moved = columns.unbind(-1)
    none = count == 0
    return PositionMoments(
        count=count.clone(),
        mean=mean.masked_fill(none, torch.nan),
        variance=m2 / count.clamp(min=1),
        minimum=low.masked_fill(none, torch.nan),
        maximum=high.masked_fill(none, torch.nan),
        moves=moves.clone(),
        mean_move=moved / (count - 1).clamp(min=1),
    )
