"""Sink statistics of any loop over a model: ``track``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.adapters import Adapter, adapter_for
from sinkprune.adapters.base import is_compiled
from sinkprune.evidence.sinks import SinkGate, SinkStatistics, SinkTracker
from sinkprune.kernels.visibility import Visibility
from sinkprune.models.modules import AttentionCall

MOST_KEYS = 8192  # keys that a tracker makes room for unasked


class ModelTracker:
    """The ``SinkTracker`` of a model inside ``track``: made at the first forward, when the batch size is
        known.

    Every forward of the model is one step.
    """

    def __init__(
        self,
        adapter: Adapter,
        samples: int | None,
        every: int,
        max_keys: int | None,
        options: dict[str, Any],
    ) -> None:
        self._max_keys = min(adapter.geometry().context, MOST_KEYS) if max_keys is None else max_keys
        self._adapter, self._samples, self._every, self._options = adapter, samples, every, options
        self._heads = [len(adapter.kept_heads(i)) for i in range(adapter.geometry().num_layers)]
        if adapter.form == "mask":
            self._heads = list(adapter.geometry().heads)
        self._phase = (
            0  # forwards since the last one looked at; at most `every` values, so few recompilations
        )
        self._forwards: Tensor | None = None  # int64 on the device, so that a graph can count
        self._seen: tuple[Tensor | None, int] | None = None
        self.tracker: SinkTracker | None = None

    @property
    def steps(self) -> int:
        """Forwards seen so far."""
        return 0 if self._forwards is None else int(self._forwards)

    def result(self) -> SinkStatistics:
        """The statistics so far. Raises ``RuntimeError`` before the first forward."""
        if self.tracker is None:
            raise RuntimeError("nothing was tracked: run the model inside sp.track(...)")
        return self.tracker.result()

    def reset(self) -> None:
        if self.tracker is not None:
            self.tracker.reset()
        if self._forwards is not None:
            self._forwards.zero_()
        self._phase = 0

    def observe(self, layer: int, call: AttentionCall) -> None:
        """Write one layer's column mass into the tracker."""
        if self._phase:
            return
        samples = call.query.shape[0] if self._samples is None else self._samples
        length = call.key.shape[2]
        if self.tracker is None:
            self._forwards = torch.zeros((), dtype=torch.int64, device=call.query.device)
            self.tracker = SinkTracker(
                len(self._heads),
                self._heads,
                samples,
                self._max_keys,
                call.query.device,
                **self._options,
            )
        if (
            samples != self.tracker.batch_size
            or call.query.shape[0] < samples
            or length > self.tracker.max_keys
        ):
            raise ValueError(
                f"inside one track, forwards must have {self.tracker.batch_size} samples of at most "
                f"{self.tracker.max_keys} keys, got {call.query.shape[0]} of {length}; open a new "
                "track (max_keys= makes room)"
            )
        seen = call.seen.of(slice(samples))
        seen = seen._replace(query_positions=_counted_queries(seen, call))
        self._seen = (seen.key_padding_mask, length)
        room = self.tracker.mass[layer]
        in_place = room.device == call.query.device and call.mask is None
        if call.mask is not None:
            mass = masked_column_mass(call, seen.query_positions, samples)
        else:
            mass = ops.column_mass(
                call.query[:samples],
                call.key[:samples],
                None if call.lse is None else call.lse[:samples],
                kept_heads=call.kept_heads,
                kv_head_of=call.kv_head_of,
                scale=call.scale,
                out=room if in_place else None,
                **seen._asdict(),
            )
        if not in_place:  # a layer on another device of a device map, or a mask of its own
            room[:, :, :length] = mass
            room[:, :, length:] = 0

    def end_step(self) -> None:
        """Fold the step's masses into the statistics."""
        if self._seen is not None and self.tracker is not None:
            mask, length = self._seen
            mask = None if mask is None else mask.to(self.tracker.device)
            self.tracker.end_step(key_padding_mask=mask, num_keys=length)
            self._seen = None
        if self._forwards is not None:
            self._forwards += 1
            self._phase = (self._phase + 1) % self._every


def _counted_queries(seen: Visibility, call: AttentionCall) -> Tensor | None:
    """The query positions, or those of the valid tokens where queries are the keys' own tokens."""
    mask = seen.key_padding_mask  # nothing of it is remembered: a sampler may write into one buffer
    if seen.query_positions is not None or mask is None or call.query.shape[2] != call.key.shape[2]:
        return seen.query_positions
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32), -1)


def masked_column_mass(call: AttentionCall, query_positions: Tensor | None, samples: int) -> Tensor:
    """The column mass of a call with any other mask: float32 ``[samples, H, Lk]``, from probabilities of one
    head at a time.

    The mean over the queries that see a key and are not padded (``query_positions`` -1).
    """
    query, key, mask = call.query[:samples].float(), call.key[:samples].float(), call.mask
    assert mask is not None
    heads, group = query.shape[1], query.shape[1] // max(1, key.shape[1])
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    owner = [head // group for head in range(heads)] if call.kv_head_of is None else call.kv_head_of.tolist()
    mask = mask.expand(query.shape[0] if mask.shape[0] == 1 else mask.shape[0], *mask.shape[1:])[:samples]
    mass = query.new_zeros(samples, heads, key.shape[2])
    for head in range(heads) if call.kept_heads is None else call.kept_heads.tolist():
        scores = query[:, head] @ key[:, owner[head]].mT * scale  # [samples, Lq, Lk]
        layer_mask = mask[:, min(head, mask.shape[1] - 1)]
        if layer_mask.dtype != torch.bool:
            scores, layer_mask = scores + layer_mask, layer_mask > torch.finfo(layer_mask.dtype).min / 2
        counted = layer_mask.any(-1).expand(scores.shape[:2])
        if query_positions is not None:
            counted = counted & (query_positions >= 0)
        weights = scores.masked_fill(~layer_mask, -torch.inf).softmax(-1).masked_fill(~counted[..., None], 0)
        mass[:, head] = weights.sum(1) / counted.sum(1, keepdim=True).clamp(min=1)
    return mass


_OBSERVING = threading.Lock()  # held while a model is asked whether it is tracked, and then is


@contextmanager
def track(
    model: nn.Module,
    *,
    samples: int | None = None,
    every: int = 1,
    max_keys: int | None = None,
    gate: SinkGate | None = None,
    trace: bool = False,
    max_steps: int = 1024,
    this_thread: bool = False,
) -> Iterator[ModelTracker]:
    """Gather sink statistics of every forward inside the ``with``; everything is as before outside it.

        with sp.track(model) as tracker:
            for x in my_sampler(model, prompt): ...
        statistics = tracker.result()

    Args:
        model: of a known family, dense, masked or compact.
        samples: leading rows of the batch to follow (under classifier-free guidance: the conditional half);
            None = all.
        every: look at every ``every``-th forward only.
        max_keys: longest key length to make room for; None = the model's context, at most 8192.
        gate: when a sink counts as standing out.
        trace, max_steps: also keep each step's positions and masses.
        this_thread: count the forwards of the calling thread only, whatever others do with the model.

    Raises:
        RuntimeError: the model is being tracked already, or is compiled (hooks added after compilation never
            fire).
    """
    if is_compiled(model):
        raise RuntimeError("the model is compiled: track the original model first, then compile it")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    adapter = adapter_for(model)
    tracker = ModelTracker(
        adapter, samples, every, max_keys, {"gate": gate, "trace": trace, "max_steps": max_steps}
    )
    thread = threading.get_ident()

    def observe(layer: int, call: AttentionCall) -> None:
        if not this_thread or threading.get_ident() == thread:
            tracker.observe(layer, call)

    def end_step(module: nn.Module, inputs: Any, output: Any) -> None:
        if not this_thread or threading.get_ident() == thread:
            tracker.end_step()

    with _OBSERVING:
        if adapter.observed():
            raise RuntimeError("the model is being tracked already; nested tracks are not supported")
        adapter.observe(observe)
    hook = adapter.step_module.register_forward_hook(end_step)
    try:
        yield tracker
    finally:
        with _OBSERVING:
            adapter.observe(None)
        hook.remove()
