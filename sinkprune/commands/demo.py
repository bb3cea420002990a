"""``sinkprune demo``: profile, plan, apply, compare and report in one go."""

from __future__ import annotations

import argparse
import time
from typing import Any, cast

from sinkprune.commands import arguments, comparing


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands, "demo", _demo, "The whole story on one model.", "sinkprune demo --out demo-out"
    )
    sub.add_argument("--out", required=True, help="folder for report.html, report.json and pictures")
    sub.add_argument(
        "--model",
        default="tiny",
        help="tiny, small, a local folder or org/name on the hub (default: %(default)s)",
    )
    sub.add_argument("--prompts", type=int, default=8, help="trajectories profiled (default: %(default)s)")
    sub.add_argument("--steps", type=int, default=64, help="forwards (default: %(default)s)")
    sub.add_argument("--gen-length", type=int, default=128, help="new tokens profiled (default: %(default)s)")
    arguments.add_criterion_flags(sub)


def _demo(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The whole story on one model: profile, plan, apply, compare, report."""
    from sinkprune.checkpoints import checkpoint
    from sinkprune.evaluation import report
    from sinkprune.generation import profiling
    from sinkprune.models.marks import plan_of
    from sinkprune.planning import costs, hardware
    from sinkprune.planning import planner as planning
    from sinkprune.planning.criteria import criterion_for
    from sinkprune.pruning import repacking

    criterion_for(options.criterion)  # a word or a share that can't be is refused before the long work
    planning.check_ratio(options.ratio)
    out = arguments.output_folder(options.out)
    started = time.monotonic()
    say = arguments.teller(options)
    say(f"loading {options.model}")
    dense, tokenizer = checkpoint.load(options.model, device=options.device)
    pruned, _ = checkpoint.load(options.model, device=options.device)
    held_out = arguments.read_text(None, "held_out")
    prompts = arguments.prompts_from(
        arguments.read_text(None, "calibration"), tokenizer, count=options.prompts
    )
    profile = profiling.profile(
        dense,
        prompts,
        tokenizer=tokenizer,
        steps=options.steps,
        gen_length=options.gen_length,
    )
    say("planning")
    rows = arguments.calibration_rows(dense, tokenizer, options)
    plan = planning.plan(
        dense,
        profile,
        options.criterion,
        options.ratio,
        options.unit,
        calibration=rows,
        targets=tuple(options.targets.split(",")),
        channel_rule=options.channel_rule,
        expert_rule=options.expert_rule,
        block_rule=options.block_rule,
        seed=options.seed,
    )
    ceilings = costs.ceilings(dense, plan, 1, 256, hardware.roofs(options.device))
    say(f"this plan can give {costs.ceilings_text(ceilings)}")
    say("repairing and repacking")
    repacking.apply(pruned, plan, calibration=rows)
    plan = cast(planning.PrunePlan, plan_of(pruned))  # says how it was repaired
    values = report.compare(
        dense,
        pruned,
        plan,
        profile,
        tokenizer=tokenizer,
        name=str(options.model),
        held_out=held_out,
        out_of_domain=arguments.read_text(None, "out_of_domain"),
        prompts=arguments.prompts_from(held_out, tokenizer, count=3),
        block_length=32,
        progress=say,
    )
    values["seconds"] = time.monotonic() - started
    profile.save(out / "profile.safetensors")
    plan.save(out / "plan.json")
    page = report.write(values, plan, profile, out)
    return values, comparing.summary(values) + f"\nreport: {page}"
