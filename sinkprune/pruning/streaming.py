"""A plan put into a model whose blocks are read one at a time: each is repaired, made smaller, handed out and
let go before the next."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.evidence.calibration import BlockStream, Calibration
from sinkprune.models.marks import mark
from sinkprune.models.streamed import Stream, stream_of
from sinkprune.plans import PrunePlan
from sinkprune.pruning.repacking import checked, compact_layer, repaired_by
from sinkprune.pruning.repair import add_bias, repaired

Write = Callable[[int, nn.Module], None]


def apply_streamed(
    model: nn.Module,
    plan: PrunePlan,
    write: Write,
    *,
    calibration: Calibration | None = None,
    repair: str | None = "least_squares",
    written: int = 0,
) -> nn.Module:
    """``apply`` in compact form, with one block's weights in memory; in place, and without them at the end.

    What a run leaves in the stream's folder is gone on from: hidden states after the last block from which
    the two streams of the repair can go on.

    Args:
        model: dense, of ``checkpoints.streaming.opened``.
        plan, calibration, repair: as for ``apply``.
        write: takes every block, by its number, as it is after the plan; called in order.
        written: blocks of an earlier run that ``write`` has: it is not called for them again.

    Raises:
        ValueError: as ``apply`` does; a model whose blocks are all there. What was written stays.
    """
    adapter, stream = adapter_for(model), stream_of(model)
    if stream is None:
        raise ValueError("the model's blocks are all in memory: use apply")
    plan = checked(adapter, plan, "compact")
    walk = _Walk(adapter, plan, stream, write, written)
    if calibration is None or repair is None:
        for layer in range(adapter.geometry().num_layers):
            walk.hold(layer)
            walk.give(layer)
    else:
        plan = repaired_by(plan, repair, calibration)
        walk.plan = plan
        with repaired(adapter, plan, calibration, repair, keep_originals=False, walk=walk):
            pass
    mark(model, plan, "compact")
    return model


class _Walk:
    """Holds the block that is changed, and hands it out when it is done."""

    def __init__(self, adapter: Adapter, plan: PrunePlan, stream: Stream, write: Write, written: int) -> None:
        self.adapter, self.plan, self.stream, self.write, self.written = adapter, plan, stream, write, written
        self._holding = ExitStack()
        self._folder = stream.folder

    def begin(self, dense: BlockStream, pruned: BlockStream) -> int:
        start = next((n for n in range(self.written, 0, -1) if all(p.exists() for p in self._states(n))), 0)
        if start:
            for stream, path in zip((dense, pruned), self._states(start), strict=True):
                stream.resume(path)
        for layer in range(start):  # as an earlier run left it
            self.stream.finish(layer)
            add_bias(self.adapter, self.plan, layer)
            self.adapter.install(layer, *compact_layer(self.adapter, self.plan, layer))
        return start

    def _states(self, layer: int) -> tuple[Path, Path]:
        """Where the hidden states before ``layer`` lie, of the dense stream and of the pruned one."""
        dense, pruned = (f"{kind}-{layer:05d}.safetensors" for kind in ("dense", "pruned"))
        return self._folder / dense, self._folder / pruned

    def hold(self, layer: int) -> None:
        self._holding.enter_context(self.stream.holding(layer))

    def done(self, layer: int, dense: BlockStream, pruned: BlockStream, level: bool) -> None:
        self.give(layer)
        if not level:
            return
        for stream, path in zip((dense, pruned), self._states(layer + 1), strict=True):
            stream.checkpoint(path, layer + 1)
        for before in range(layer + 1):
            for path in self._states(before):
                path.unlink(missing_ok=True)

    def give(self, layer: int) -> None:
        """Make the block smaller, hand it out, and let it go."""
        self.stream.reach(layer)
        self.adapter.install(layer, *compact_layer(self.adapter, self.plan, layer))
        if layer >= self.written:
            self.write(layer, self.stream.blocks[layer])
        self._holding.close()
        self.stream.finish(layer)
        self.stream.progress("pruned", layer)
