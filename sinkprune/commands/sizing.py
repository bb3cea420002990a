"""``sinkprune ceiling`` and ``memory``: what a plan can give and what a run needs, from sizes alone."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sinkprune.commands import arguments

if TYPE_CHECKING:
    from sinkprune.plans import Geometry, PrunePlan

DTYPES = ("bfloat16", "float16", "float32")


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "ceiling",
        _ceiling,
        "The best speed-up that a plan can give, without loading the weights.",
        "sinkprune ceiling tiny --plan plan.json --length 256 --roofs H100",
    )
    _add_sizes(sub)
    sub.add_argument("--roofs", help="cpu, cuda, A100, H100 or H200 (default: the --device)")
    sub.add_argument("--plan", required=True, help="from 'sinkprune plan'")
    sub = arguments.add_command(
        commands,
        "memory",
        _memory,
        "Peak bytes of denoising, dense or under a plan, without loading the weights.",
        "sinkprune memory tiny --length 256",
        device=False,
    )
    _add_sizes(sub)
    sub.add_argument("--plan", help="from 'sinkprune plan' (default: the model as it is)")


def _add_sizes(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    sub.add_argument("--length", type=int, help="tokens of each (default: 1024, or the model's context)")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="it runs in (default: %(default)s)")


def _sizes(options: argparse.Namespace) -> tuple[Geometry, PrunePlan | None, int]:
    """The dense model's geometry, the plan of ``--plan`` or of the folder, and the length.

    Raises ``ValueError`` for a plan of another model and a length that the model has not.
    """
    from sinkprune.adapters import adapter_for
    from sinkprune.checkpoints import checkpoint
    from sinkprune.files import read_json
    from sinkprune.planning.planner import usual_length
    from sinkprune.plans import PrunePlan

    folder = checkpoint.folder_of(options.model)
    geometry = adapter_for(checkpoint.lay_out_folder(folder, read_json(folder / "config.json"))).geometry()
    manifest = folder / checkpoint.MANIFEST
    own = read_json(manifest).get("plan") if manifest.exists() else None
    if options.plan and own:
        raise ValueError(f"{options.model} is pruned already: --plan is for a dense model")
    plan = PrunePlan.load(options.plan) if options.plan else PrunePlan.from_dict(own) if own else None
    if plan is not None and not plan.geometry.agrees(geometry):
        raise ValueError(f"the plan is for another model than {options.model}: its sizes differ")
    length = usual_length(geometry) if options.length is None else options.length
    if not 1 <= length <= geometry.context:
        raise ValueError(f"--length must be 1 to {geometry.context}, the model's context; got {length}")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    return geometry, plan, length


def _ceiling(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import torch

    from sinkprune.planning import costs, hardware

    geometry, plan, length = _sizes(options)
    assert plan is not None
    roofs = hardware.roofs(options.roofs or options.device)
    dtype = getattr(torch, options.dtype)
    values = costs.ceilings(geometry, plan, options.batch, length, roofs, dtype)
    return values, f"this plan can give {costs.ceilings_text(values)}"


def _memory(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import torch

    from sinkprune.evaluation.footprint import memory

    geometry, plan, length = _sizes(options)
    needed = memory(geometry, plan, options.batch, length, getattr(torch, options.dtype))
    values = {
        "batch": options.batch,
        "length": length,
        "dtype": options.dtype,
        "peak": needed.peak,
        **asdict(needed),
    }
    text = (
        f"{needed.peak / 1e6:,.1f} MB at the peak of {options.batch} x {length} tokens in {options.dtype}, "
        f"of which weights {needed.weights / 1e6:,.1f} MB"
    )
    return values, text
