"""Compact first, then int8: PyTorch's dynamic quantisation of the linear layers on the CPU, on "tiny".

Weights in int8 with a scale for each output row, activations quantised as they come. Run by
``study_weights.py``.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import torch
from resumable import Row, Rows
from torch import nn

import sinkprune as sp
from sinkprune.checkpoints import checkpoint
from sinkprune.planning.timing import interleaved


def measure(rows: Rows, windows: int) -> None:
    rows.row("tiny/int8", lambda: _measure(windows))


def _measure(windows: int) -> Row:
    text = checkpoint.texts("held_out")
    dense, tokenizer = sp.load("tiny")
    compact, _ = sp.load("tiny")
    plan = sp.plan(compact, None, "magnitude", 0.38, "parameters", targets=("heads", "mlp"))
    sp.apply(compact, plan)
    models = {"dense": dense, "compact": compact, "dense, int8": int8(dense), "compact, int8": int8(compact)}
    ids = torch.randint(5, 4096, (1, 128), generator=torch.Generator().manual_seed(0))
    found: Row = {"per_window": {}, "bytes": {}, "parameters_removed": plan.parameters_removed}
    for name, model in models.items():
        quality = sp.evaluate(model, text, tokenizer=tokenizer, windows=windows, draws=2, levels=())
        found["per_window"][name] = [round(value, 5) for value in quality.per_window]
        found["bytes"][name] = _bytes(model)
    calls: dict[str, Callable[[], object]] = {n: lambda m=model: m(ids) for n, model in models.items()}
    with torch.no_grad():
        timings, found["speedup"] = interleaved(calls, repeats=30)
    found["ms"] = {name: timing.median for name, timing in timings.items()}
    return found


def int8(model: nn.Module) -> nn.Module:
    """A copy whose linear layers hold int8 weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces that torchao will take this over
        return torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8, inplace=True
        )


def _bytes(model: nn.Module) -> int:
    """Bytes of the saved state."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()
