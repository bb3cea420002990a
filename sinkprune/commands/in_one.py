"""``sinkprune prune``: plan, apply with its repair, and save, in one go."""

from __future__ import annotations

import argparse
from typing import Any

from sinkprune.commands import arguments


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "prune",
        _prune,
        "Plan, prune, repair and save a model in one go.",
        "sinkprune prune tiny --ratio 0.38 --out pruned/",
    )
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    arguments.add_criterion_flags(sub)
    sub.add_argument(
        "--fit", help="a target that shall hold it: llama.cpp, transformers, sglang, vllm or lmdeploy"
    )
    sub.add_argument(
        "--repair",
        default="least_squares",
        help="least_squares, least_squares_cv, least_squares_bias, bias or none (default: %(default)s)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint written before")
    sub.add_argument("--out", required=True, help="the checkpoint's folder")


def _prune(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.checkpoints import checkpoint
    from sinkprune.planning import planner
    from sinkprune.pruning import repacking

    out = arguments.new_folder(options.out, options.overwrite)
    say = arguments.teller(options)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    before = sum(parameter.numel() for parameter in model.parameters())
    rows = arguments.calibration_rows(model, tokenizer, options)
    say(f"planning by {options.criterion}")
    plan = planner.plan(
        model,
        criterion=options.criterion,
        ratio=options.ratio,
        unit=options.unit,
        calibration=rows,
        targets=tuple(options.targets.split(",")),
        channel_rule=options.channel_rule,
        expert_rule=options.expert_rule,
        block_rule=options.block_rule,
        fit=options.fit,
        seed=options.seed,
    )
    repair = None if options.repair == "none" or rows is None else options.repair
    say("pruning" if repair is None else f"pruning and repairing by {repair}")
    repacking.apply(model, plan, calibration=None if repair is None else rows, repair=repair)
    after = sum(parameter.numel() for parameter in model.parameters())
    folder = checkpoint.save(model, out, tokenizer=tokenizer, overwrite=options.overwrite)
    text = (
        f"removes {plan.heads_removed} heads, {100 * plan.parameters_removed:.1f} % of the block parameters: "
        f"{before:,} -> {after:,} parameters\nwrote {folder}"
    )
    result = {
        "heads_removed": plan.heads_removed,
        "parameters_removed": plan.parameters_removed,
        "parameters_before": before,
        "parameters_after": after,
        "repair": repair,
        "folder": str(folder),
    }
    return result, text
