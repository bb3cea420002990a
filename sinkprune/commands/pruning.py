"""``sinkprune profile``, ``plan`` and ``apply``: where sinks move, what goes, a smaller model."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sinkprune.commands import arguments


def add_commands(commands: arguments.Commands) -> None:
    _add_profile(commands)
    _add_plan(commands)
    _add_apply(commands)


def _add_profile(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "profile",
        _profile,
        "Gather sink statistics over real denoising trajectories.",
        'sinkprune profile tiny --prompt "My fellow citizens" --out profile.safetensors',
    )
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    sub.add_argument("--text", help="take prompts from this text file")
    sub.add_argument("--prompts", type=int, default=8, help="how many from --text (default: %(default)s)")
    arguments.add_file_flags(sub, "the profile's file (safetensors)")
    arguments.add_sampler_flags(sub, 128)


def _profile(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.checkpoints import checkpoint
    from sinkprune.generation import profiling

    out = arguments.output_file(options)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    prompts = list(options.prompt or [])
    if options.text:
        prompts += arguments.prompts_from(
            arguments.read_text(options.text, ""), tokenizer, count=options.prompts
        )
    if not prompts:
        raise ValueError("give at least one --prompt, or --text FILE to take prompts from")
    profile = profiling.profile(
        model,
        prompts,
        tokenizer=tokenizer,
        **arguments.sampler_options(options),
    )
    summary = profile.summary()
    if out is None:
        sys.stdout.buffer.write(profile.to_bytes())
        return summary, ""
    profile.save(out)
    text = (
        f"trajectories: {summary['samples']} of {summary['steps']} steps: "
        f"{100 * summary['heads_moving_over_3']:.0f} % of heads move their sink more than 3 positions\n"
        f"({100 * summary['heads_moving_over_3_gated']:.0f} % counting only sinks that stand out)\n"
        f"wrote {out}"
    )
    return summary, text


def _add_plan(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "plan",
        _plan,
        "Decide what to remove.",
        "sinkprune plan tiny --ratio 0.38 --out plan.json",
    )
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument("--profile", help="from 'sinkprune profile', for criteria that need it")
    arguments.add_criterion_flags(sub)
    sub.add_argument("--allocation", default="global", help="global, uniform or equal (default: %(default)s)")
    sub.add_argument("--min-heads", type=int, default=1, help="fewest a layer keeps (default: %(default)s)")
    sub.add_argument("--max-layer-share", type=float, default=1.0, help="most of a layer that may go")
    sub.add_argument("--round-heads", type=int, default=1, help="keep a multiple of this many per layer")
    sub.add_argument("--round-channels", type=int, default=1, help="the same of MLP channels")
    sub.add_argument("--whole-groups", action="store_true", help="remove whole key/value groups (GQA)")
    sub.add_argument("--whole-layers", action="store_true", help="remove whole layers' attention")
    sub.add_argument(
        "--fit", help="a target that shall hold it: llama.cpp, transformers, sglang, vllm or lmdeploy"
    )
    sub.add_argument("--batch", type=int, default=1, help="of the ceiling printed (default: %(default)s)")
    sub.add_argument(
        "--length", type=int, help="of the ceiling printed, and of a target (default: 1024, or the context)"
    )
    sub.add_argument("--target-speedup", type=float, help="instead of --ratio: times faster than dense")
    sub.add_argument("--target-latency", type=float, help="instead of --ratio: seconds per step")
    sub.add_argument(
        "--latency-table", help="for a target: a table's file, measure, or computed for A100, H100 or H200"
    )
    sub.add_argument("--roofs", help="of the ceiling: cpu, cuda, A100, H100 or H200 (default: the --device)")
    arguments.add_file_flags(sub, "the plan's file (JSON)")


def _plan(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.adapters import adapter_for
    from sinkprune.checkpoints import checkpoint
    from sinkprune.generation import profiling
    from sinkprune.planning import costs, fits, hardware
    from sinkprune.planning import planner as planning

    out = arguments.output_file(options)
    roofs = hardware.roofs(options.roofs or options.device)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    context = adapter_for(model).geometry().context
    if options.length is not None and not 1 <= options.length <= context:
        raise ValueError(f"--length must be 1 to {context}, the model's context; got {options.length}")
    profile = profiling.SinkProfile.load(options.profile) if options.profile else None
    plan = planning.plan(
        model,
        profile,
        options.criterion,
        options.ratio,
        options.unit,
        calibration=arguments.calibration_rows(model, tokenizer, options),
        targets=tuple(options.targets.split(",")),
        channel_rule=options.channel_rule,
        expert_rule=options.expert_rule,
        block_rule=options.block_rule,
        length=options.length,
        target_speedup=options.target_speedup,
        target_latency=options.target_latency,
        latency_table=_latency_table(model, options),
        allocation=options.allocation,
        min_heads=options.min_heads,
        max_layer_share=options.max_layer_share,
        round_heads=options.round_heads,
        round_channels=options.round_channels,
        whole_groups=options.whole_groups,
        whole_layers=options.whole_layers,
        fit=options.fit,
        seed=options.seed,
    )
    fit = fits.cost_text(plan.details["fit"]) + "\n" if options.fit else ""
    experts = f" and {plan.experts_removed} experts" if plan.experts_removed else ""
    blocks = _blocks_text(plan.details["blocks"]) if "blocks" in plan.details else ""
    ceilings = costs.ceilings(model, plan, options.batch, plan.details["length"], roofs)
    result = {
        "heads_removed": plan.heads_removed,
        "experts_removed": plan.experts_removed,
        "parameters_removed": plan.parameters_removed,
        "ceiling": ceilings["arithmetic"],
        "ceilings": ceilings,
        "plan": plan.to_dict(),
    }
    if out is None:
        return result, json.dumps(plan.to_dict(), indent=1)
    plan.save(out)
    text = (
        f"removes {plan.heads_removed} heads{experts}, {100 * plan.parameters_removed:.1f} % of the block "
        "parameters\n"
        f"{blocks}{fit}this plan can give {costs.ceilings_text(ceilings)}\nwrote {out}"
    )
    return result, text


def _blocks_text(told: dict[str, Any]) -> str:
    """Which blocks go, and how deep in the model they lie on average."""
    what = {"blocks": "all", "attention": "attention", "mlp_blocks": "MLP"}[told["target"]]
    layers = ", ".join(map(str, told["removed"])) or "none"
    depth = "" if told["depth"] is None else f"; mean depth {told['depth']:.2f} (0 first, 1 last)"
    return f"{what} of blocks {layers}, by {told['rule']}{depth}\n"


def _latency_table(model: Any, options: argparse.Namespace) -> Any:
    """The table of ``--latency-table``: a file's, measured now, or computed for a GPU's data sheet."""
    from sinkprune.adapters import adapter_for
    from sinkprune.planning import hardware, latency_table, planner

    name = options.latency_table
    if name is None:
        return None
    lengths = [options.length or planner.usual_length(adapter_for(model).geometry())]
    if name == "measure":
        return latency_table.measured_table(model, lengths, options.batch)
    if name in hardware.DATA_SHEETS:
        return latency_table.computed_table(model, hardware.data_sheet(name), lengths, options.batch)
    return latency_table.LatencyTable.load(name)


def _add_apply(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "apply",
        _apply,
        "Prune a model and save it.",
        "sinkprune apply tiny --plan plan.json --out pruned/",
    )
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument("--plan", required=True, help="from 'sinkprune plan'")
    sub.add_argument("--mode", default="compact", help="compact or mask (default: %(default)s)")
    sub.add_argument(
        "--repair",
        help="least_squares (default for compact), least_squares_cv, least_squares_bias, bias or "
        "none (default for mask)",
    )
    arguments.add_calibration_flags(sub)
    sub.add_argument("--low-memory", action="store_true", help="layer by layer; can't be rolled back")
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint written before")
    sub.add_argument("--out", required=True, help="the checkpoint's folder")


def _apply(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.checkpoints import checkpoint
    from sinkprune.planning import planner as planning
    from sinkprune.pruning import repacking

    out = arguments.new_folder(options.out, options.overwrite)
    plan = planning.PrunePlan.load(options.plan)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    before = sum(p.numel() for p in model.parameters())
    repair = options.repair or ("none" if options.mode == "mask" else "least_squares")
    rows = None if repair == "none" else arguments.calibration_rows(model, tokenizer, options)
    repacking.apply(
        model,
        plan,
        mode=options.mode,
        calibration=rows,
        repair=None if repair == "none" else repair,
        low_memory=options.low_memory,
    )
    after = sum(p.numel() for p in model.parameters())
    folder = checkpoint.save(model, out, tokenizer=tokenizer, overwrite=options.overwrite)
    text = f"{before:,} -> {after:,} parameters\nwrote {folder}"
    return {"parameters_before": before, "parameters_after": after, "folder": str(folder)}, text
