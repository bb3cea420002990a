"""Whether a model folder and its generation fit a device, from sizes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sinkprune.adapters import adapter_for
from sinkprune.evaluation.footprint import check_fits, longest, memory
from sinkprune.files import read_json


def check_folder_fits(
    source: str | Path, device: str, batch: int, length: int, head_rows: int, cached: int = 0
) -> None:
    """``check_fits`` for a model folder (or ``"tiny"``), read from its sizes alone."""
    if torch.device(device).type != "cuda":
        return
    from sinkprune.checkpoints import checkpoint
    from sinkprune.plans import PrunePlan

    folder = checkpoint.folder_of(source)
    adapter = adapter_for(checkpoint.lay_out_folder(folder, read_json(folder / "config.json")))
    manifest = folder / checkpoint.MANIFEST
    planned = read_json(manifest).get("plan") if manifest.exists() else None
    plan = None if planned is None else PrunePlan.from_dict(planned)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    numbers = sum(parameter.numel() for parameter in adapter.model.parameters())
    kept = 1.0 if plan is None else 1 - plan.parameters_removed
    options: dict[str, Any] = {"plan": plan, "batch": batch, "head_rows": head_rows}
    options["dtype"] = torch.bfloat16 if stored < 3 * numbers * kept else torch.float32
    needed = memory(adapter.geometry(), length=length, cached=cached, **options)
    free = torch.cuda.mem_get_info(device)[0]
    room = free - stored + needed.weights
    fitting = longest(adapter.geometry(), room, cached=cached > 0, **options)
    check_fits(replace(needed, weights=stored), device, fitting, f"{source} with {batch} x {length} tokens")
