"""``sinkprune tune`` and ``doctor``: what this machine is, and tiles chosen for it."""

from __future__ import annotations

import argparse
from typing import Any

from sinkprune.commands import arguments


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "tune",
        _tune,
        "Time the kernels' tiles on this GPU for a model's shapes and keep the fastest (opt-in).",
        "sinkprune tune tiny --length 256 --length 512 --device cuda",
    )
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument("--length", type=int, action="append", required=True, help="may be repeated")
    sub.add_argument("--batch", type=int, default=1)

    sub = arguments.add_command(
        commands,
        "doctor",
        _doctor,
        "Versions, hardware, and which backend runs what; or what a model folder is to the package.",
        "sinkprune doctor --json; sinkprune doctor tiny",
        device=False,
    )
    sub.add_argument(
        "model",
        nargs="?",
        help="tiny, a local folder, with or without its weights, or org/name[@revision] on the hub",
    )


def _tune(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Time the shipped tiles on this GPU for a model's shapes, and keep the fastest."""
    from sinkprune.commands import doctor
    from sinkprune.kernels import tuning

    facts = doctor.recognise(options.model)
    shapes = [
        tuning.Shape(heads, max(facts["kv_heads"]), facts["head_dim"], length, length, options.batch)
        for heads in facts["heads"]
        for length in options.length
    ]
    lines: list[str] = []
    chosen = tuning.tune(shapes, options.device, report=lines.append)
    return {"shapes": len(shapes), "chosen": {str(k): str(v) for k, v in chosen.items()}}, "\n".join(lines)


def _doctor(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.commands import doctor, examining

    facts = doctor.diagnose() if options.model is None else examining.examine(options.model)
    return facts, doctor.describe(facts)
