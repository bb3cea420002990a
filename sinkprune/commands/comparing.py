"""``sinkprune report``: a dense checkpoint beside its pruned form."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sinkprune.commands import arguments


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "report",
        _report,
        "Compare a dense checkpoint with its pruned form.",
        "sinkprune report tiny pruned/ --profile profile.safetensors --out report/",
    )
    sub.add_argument("dense", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument("pruned", help="a folder written by 'sinkprune apply'")
    sub.add_argument("--profile", required=True, help="the profile that the plan came from")
    sub.add_argument("--text", help="held-out text (default: the embedded one)")
    sub.add_argument("--out-of-domain", help="text of another kind (default: the embedded one)")
    sub.add_argument("--out", required=True, help="folder for report.html, report.json and pictures")


def _report(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.adapters import adapter_for
    from sinkprune.checkpoints import checkpoint
    from sinkprune.evaluation import report
    from sinkprune.generation import profiling
    from sinkprune.models.marks import plan_of

    out = arguments.output_folder(options.out)
    say = arguments.teller(options)
    profile = profiling.SinkProfile.load(options.profile)
    dense, tokenizer = checkpoint.load(options.dense, device=options.device)
    pruned, _ = checkpoint.load(options.pruned, device=options.device)
    adapter_for(dense).require_dense("the first argument is")
    plan = plan_of(pruned)
    if plan is None:
        raise ValueError(f"{options.pruned} is not a pruned checkpoint")
    held_out = arguments.read_text(options.text, "held_out")
    values = report.compare(
        dense,
        pruned,
        plan,
        profile,
        tokenizer=tokenizer,
        name=Path(options.dense).name,
        held_out=held_out,
        out_of_domain=arguments.read_text(options.out_of_domain, "out_of_domain"),
        prompts=arguments.prompts_from(held_out, tokenizer, count=3),
        progress=say,
    )
    page = report.write(values, plan, profile, out)
    return values, summary(values) + f"\nreport: {page}"


def summary(values: dict[str, Any]) -> str:
    """What a report's ``values`` say in three lines: what went, the quality, the speed."""
    from sinkprune.planning.costs import ceilings_text

    plan, quality, speed = values["plan"], values["quality"], values["speed"]
    return (
        f"{plan['heads_removed']} heads and {100 * plan['parameters_removed']:.1f} % of the block parameters "
        f"removed by {plan['criterion']}\n"
        f"NLL bound {quality['dense']['nll']:.3f} -> {quality['pruned']['nll']:.3f} nat per token "
        f"({quality['difference']['nll']:+.3f} ± {quality['difference']['nll_se']:.3f})\n"
        f"{speed['dense_ms_per_step']:.2f} -> {speed['pruned_ms_per_step']:.2f} ms per step: "
        f"{speed['ratio']:.2f}x; the plan can give {ceilings_text(speed['ceilings'])}"
    )
