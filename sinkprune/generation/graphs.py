"""A denoising step as a CUDA graph: recorded once per shape, then replayed by one launch instead of hundreds.

A small step is launched slower than a GPU runs it. A graph fixes every launch and every address, so inputs go
into buffers that stay, and the logits come out of one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.models.marks import plan_of

Step = Callable[[], Tensor]
# Records a step: returns what replays it, and the tensor that each replay fills.
Capture = Callable[[Step], tuple[Callable[[], object], Tensor]]


class _Recorded(NamedTuple):
    """One graph with its buffers: ids and mask ``[B, bucket]``; ``reads`` keeps what else it reads alive."""

    ids: Tensor
    valid: Tensor | None
    replay: Callable[[], object]
    logits: Tensor
    reads: list[object]


class _Reads(TorchDispatchMode):
    """Collects the tensors that a step reads and did not make, less ``known`` storages (the weights).

    A model may put a longer RoPE table in the place of one whose address a graph holds.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self._made = known, set[int]()
        self.tensors: dict[int, Tensor] = {}

    def __enter__(self) -> _Reads:
        self._made.clear()
        self.tensors.clear()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()._cdata
                if storage not in self.known and storage not in self._made:
                    self.tensors[storage] = x
        result = func(*args, **kwargs)
        made = (x.untyped_storage()._cdata for x in tree_leaves(result) if isinstance(x, Tensor))
        self._made.update(storage for storage in made if storage not in self.tensors)
        return result


class StepGraph:
    """``Adapter.predict`` through CUDA graphs, one per batch, length bucket and rows.

    A sequence shorter than its bucket is padded on the right and the padding hidden: logits equal the eager
    ones up to rounding. On a multiple of ``bucket`` nothing is padded, and they are the same bits. On CPU,
    and while ``torch.compile`` traces, it is ``predict`` itself.

    Args:
        model: of a known family.
        bucket: lengths are rounded up to multiples of this (at most the context).
        most: graphs kept; the one not used for longest goes first. Each holds its activations' memory.
        capture: what records a step; None = ``cuda_capture`` on CUDA, nothing elsewhere.

    Raises:
        ValueError: ``bucket`` or ``most`` below 1.
    """

    def __init__(
        self, model: nn.Module, *, bucket: int = 64, most: int = 8, capture: Capture | None = None
    ) -> None:
        if bucket < 1 or most < 1:
            raise ValueError(f"bucket and most must be at least 1, got {bucket} and {most}")
        self.adapter: Adapter = adapter_for(model)
        self.bucket, self.most = bucket, most
        self._context = self.adapter.geometry().context
        self._capture = capture
        self._recorded: OrderedDict[tuple[Any, ...], _Recorded] = OrderedDict()
        self._weights: list[Any] = []
        self._pool: Any = None

    @property
    def held(self) -> int:
        """Graphs held now."""
        return len(self._recorded)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Logits ``[B, R, V]`` of ``rows``, in a buffer that the next call of any shape overwrites: graphs
        share their memory.

        Raises:
            ValueError: an observer is attached (``track``): its statistics would be recorded as one step's.
            RuntimeError: the model does something that a graph can't hold, such as waiting for the device.
        """
        capture = self._capture
        if capture is None:
            if input_ids.device.type != "cuda" or torch.compiler.is_compiling():
                return self.adapter.predict(input_ids, attention_mask, rows)
            capture = self._on_device
        if self.adapter.observed():
            raise ValueError(
                "statistics are being gathered (track, profile): a graph can't, run without graphs"
            )
        self._forget_if_changed()
        batch, length = input_ids.shape
        padded = min(-(-length // self.bucket) * self.bucket, max(length, self._context))
        rows = slice(*rows.indices(length))
        masked = attention_mask is not None or padded > length
        key = (batch, padded, rows.start, rows.stop, rows.step, masked, input_ids.device)
        if key in self._recorded:
            recorded = self._recorded[key]
            self._fill(recorded.ids, recorded.valid, input_ids, attention_mask)
        else:
            recorded = self._record(capture, input_ids, attention_mask, rows, padded, masked)
            self._recorded[key] = recorded
            if len(self._recorded) > self.most:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        recorded.replay()
        return recorded.logits

    def _record(
        self,
        capture: Capture,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: slice,
        padded: int,
        masked: bool,
    ) -> _Recorded:
        batch = input_ids.shape[0]
        with torch.inference_mode(False), torch.no_grad():  # buffers that any later call may write
            ids = input_ids.new_zeros(batch, padded)
            valid = torch.ones(batch, padded, dtype=torch.int64, device=ids.device) if masked else None
            self._fill(ids, valid, input_ids, attention_mask)
            weights = self.adapter.model.parameters()
            reads = _Reads({weight.untyped_storage()._cdata for weight in weights})

            def step() -> Tensor:
                with reads:
                    return self.adapter.predict(ids, valid, rows)

            try:
                replay, logits = capture(step)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                advice = "this model's step can't be recorded, run without graphs"
                raise RuntimeError(f"{advice}: {reason}") from error
        tables = getattr(self.adapter.model, "_rotary", None)  # where the one recorded step has made them
        return _Recorded(ids, valid, replay, logits, [*reads.tensors.values(), tables])

    @staticmethod
    def _fill(ids: Tensor, valid: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Copy the inputs into the buffers; what lies right of them is hidden."""
        length = input_ids.shape[1]
        ids[:, :length].copy_(input_ids)
        if valid is not None:
            valid[:, length:].zero_()
            if attention_mask is None:
                valid[:, :length].fill_(1)
            else:
                valid[:, :length].copy_(attention_mask)

    def _forget_if_changed(self) -> None:
        """Graphs hold addresses: another plan, form, dtype or place of the weights makes them worthless."""
        model = self.adapter.model
        first = next(model.parameters())
        now = [plan_of(model), self.adapter.form, first.dtype, first.data_ptr()]
        if len(self._weights) != len(now) or any(
            a is not b and a != b for a, b in zip(self._weights, now, strict=True)
        ):
            self._recorded.clear()
            self._weights = now

    def _on_device(self, step: Step) -> tuple[Callable[[], object], Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return cuda_capture(step, self._pool)


def cuda_capture(step: Step, pool: Any = None) -> tuple[Callable[[], object], Tensor]:
    """Record ``step`` after three calls that compile and choose; graphs of one ``pool`` share their memory.

    Raises ``RuntimeError`` where the step waits for the device or allocates in ways a graph can't hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, pool=pool):
        logits = step()

    def replay(kept: Step = step) -> None:  # the graph holds addresses: what the step reads lives as long
        graph.replay()

    return replay, logits
