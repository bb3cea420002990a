"""The command line: one subcommand a verb, ``--json`` for machines, one clear line and exit code 2 for bad
input."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

DEFAULT_CRITERION = "reconstruction"  # as in planning, which would import torch for --help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``sinkprune`` with ``arguments`` (default: the process's) and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check_device(getattr(options, "device", "cpu"))
        result, text = options.run(options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"sinkprune {options.command}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sinkprune {options.command}: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=1) if options.json else text)
    return 0


def _demo(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The whole story on one model: profile, plan, apply, compare, report."""
    from sinkprune import checkpoint, costs, hardware, planning, profiling, repacking, report

    out = _output_folder(options.out)
    started = time.monotonic()
    say = _teller(options)
    say(f"loading {options.model}")
    dense, tokenizer = checkpoint.load(options.model, device=options.device)
    pruned, _ = checkpoint.load(options.model, device=options.device)
    held_out = _text(None, "held_out")
    prompts = prompts_from(_text(None, "calibration"), tokenizer, count=options.prompts)
    profile = profiling.profile(
        dense,
        prompts,
        tokenizer=tokenizer,
        steps=options.steps,
        gen_length=options.gen_length,
        progress=not options.quiet,
    )
    say("planning")
    rows = _calibration(dense, tokenizer, options)
    plan = planning.plan(
        dense,
        profile,
        options.criterion,
        options.ratio,
        options.unit,
        calibration=rows,
        targets=tuple(options.targets.split(",")),
        channel_rule=options.channel_rule,
        seed=options.seed,
    )
    ceilings = costs.ceilings(dense, plan, 1, 256, hardware.roofs(options.device))
    say(f"this plan can give {costs.ceilings_text(ceilings)}")
    say("repairing and repacking")
    repacking.apply(pruned, plan, calibration=rows)
    plan = cast(planning.PrunePlan, pruned.prune_plan)  # says how it was repaired
    values = report.compare(
        dense,
        pruned,
        plan,
        profile,
        tokenizer=tokenizer,
        name=str(options.model),
        held_out=held_out,
        out_of_domain=_text(None, "out_of_domain"),
        prompts=prompts_from(held_out, tokenizer, count=3),
        block_length=32,
        progress=say,
    )
    values["seconds"] = time.monotonic() - started
    profile.save(out / "profile.safetensors")
    plan.save(out / "plan.json")
    page = report.write(values, plan, profile, out)
    return values, _summary(values) + f"\nreport: {page}"


def _profile(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune import checkpoint, profiling

    out = _output_file(options.out)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    prompts = list(options.prompt or [])
    if options.text:
        prompts += prompts_from(_text(options.text, ""), tokenizer, count=options.prompts)
    if not prompts:
        raise ValueError("give at least one --prompt, or --text FILE to take prompts from")
    profile = profiling.profile(
        model,
        prompts,
        tokenizer=tokenizer,
        progress=not options.quiet,
        **_sampler_options(options),
    )
    profile.save(out)
    summary = profile.summary()
    text = (
        f"trajectories: {summary['samples']} of {summary['steps']} steps: "
        f"{100 * summary['heads_moving_over_3']:.0f} % of heads move their sink more than 3 positions\n"
        f"({100 * summary['heads_moving_over_3_gated']:.0f} % counting only sinks that stand out)\n"
        f"wrote {out}"
    )
    return summary, text


def _plan(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune import checkpoint, costs, hardware, planning, profiling

    out = _output_file(options.out)
    roofs = hardware.roofs(options.roofs or options.device)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    profile = profiling.SinkProfile.load(options.profile) if options.profile else None
    plan = planning.plan(
        model,
        profile,
        options.criterion,
        options.ratio,
        options.unit,
        calibration=_calibration(model, tokenizer, options),
        targets=tuple(options.targets.split(",")),
        channel_rule=options.channel_rule,
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
        seed=options.seed,
    )
    ceilings = costs.ceilings(model, plan, options.batch, plan.details["length"], roofs)
    plan.save(out)
    text = (
        f"removes {plan.heads_removed} heads, {100 * plan.parameters_removed:.1f} % of the block parameters\n"
        f"this plan can give {costs.ceilings_text(ceilings)}\nwrote {out}"
    )
    return {
        "heads_removed": plan.heads_removed,
        "parameters_removed": plan.parameters_removed,
        "ceiling": ceilings["arithmetic"],
        "ceilings": ceilings,
        "plan": plan.to_dict(),
    }, text


def _latency_table(model: Any, options: argparse.Namespace) -> Any:
    """The table of ``--latency-table``: a file's, measured now, or computed for a GPU's data sheet."""
    from sinkprune import hardware, latency_table

    name = options.latency_table
    if name is None:
        return None
    lengths = [options.length or 1024]
    if name == "measure":
        return latency_table.measured_table(model, lengths, options.batch)
    if name in hardware.DATA_SHEETS:
        return latency_table.computed_table(model, hardware.data_sheet(name), lengths, options.batch)
    return latency_table.LatencyTable.load(name)


def _apply(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune import checkpoint, planning, repacking

    plan = planning.PrunePlan.load(options.plan)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    before = sum(p.numel() for p in model.parameters())
    repair = options.repair or ("none" if options.mode == "mask" else "least_squares")
    rows = None if repair == "none" else _calibration(model, tokenizer, options)
    repacking.apply(
        model,
        plan,
        mode=options.mode,
        calibration=rows,
        repair=None if repair == "none" else repair,
        low_memory=options.low_memory,
    )
    after = sum(p.numel() for p in model.parameters())
    folder = checkpoint.save(model, options.out, tokenizer=tokenizer, overwrite=options.overwrite)
    text = f"{before:,} -> {after:,} parameters\nwrote {folder}"
    return {"parameters_before": before, "parameters_after": after, "folder": str(folder)}, text


def _calibration(model: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    """Masked windows of ``--calibration``, or of the embedded text; None without a tokenizer."""
    from sinkprune import calibration

    if tokenizer is None and options.calibration is None:
        return None
    text = _text(options.calibration, "calibration")
    return calibration.calibrate(
        model,
        text,
        tokenizer=tokenizer,
        sequences=options.calibration_windows,
        length=options.calibration_length,
        seed=options.seed,
    )


def _sparsify(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune import calibration, checkpoint, sparsification

    out = _new_folder(options.out, options.overwrite)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    rows = None
    if options.method != "magnitude":
        rows = calibration.calibrate(
            model,
            _text(options.text, "calibration"),
            tokenizer=tokenizer,
            sequences=options.sequences,
            length=options.length,
            levels=sparsification.TEN_LEVELS,
            seed=options.seed,
        )
    sparsification.sparsify(
        model, options.method, options.sparsity, options.pattern, rows, progress=_teller(options)
    )
    shares = sparsification.sparsity_of(model)
    folder = checkpoint.save(model, out, tokenizer=tokenizer, overwrite=options.overwrite)
    text = (
        f"{100 * sum(shares.values()) / len(shares):.1f} % zeros in each of {len(shares)} linear layers "
        f"({options.method}, {options.pattern}); zeros alone make nothing smaller or faster\nwrote {folder}"
    )
    note = vars(model)["sparsity"].to_dict()
    return {"folder": str(folder), "share_of_zeros": shares, **note}, text


def _eval(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from dataclasses import asdict

    from tqdm import tqdm

    from sinkprune import checkpoint, evaluation

    text = _text(options.text, "held_out")
    loaded = [
        checkpoint.load(path, device=options.device)
        for path in (options.model, options.against)
        if path is not None
    ]
    with tqdm(desc="evaluating", unit="forward", disable=options.quiet) as bar:
        qualities = [
            evaluation.evaluate(
                model,
                text,
                tokenizer=tokenizer,
                windows=options.windows,
                length=options.length,
                levels=_numbers(options.levels),
                highest_noise=options.highest_noise,
                progress=bar.update,
            )
            for model, tokenizer in loaded
        ]
    quality = qualities[0]
    levels = ", ".join(f"t={t}: {loss:.3f}" for t, loss in quality.at_level.items())
    result, line = (
        asdict(quality),
        f"NLL bound {quality.nll:.4f} ± {quality.nll_se:.4f} nat per token; {levels}",
    )
    if options.against:
        of = {"nll": None} | {f"t={t}": t for t in quality.at_level}
        differences = {name: quality.interval(qualities[1], level) for name, level in of.items()}
        result["against"] = asdict(qualities[1])
        result["difference"] = {name: interval._asdict() for name, interval in differences.items()}
        line += f"\nagainst {options.against} (95 % intervals):" + _lines(differences)
    if options.generation:
        result["generation"], more = _eval_generation(options, text, loaded)
        line += more
    return result, line


def _eval_generation(
    options: argparse.Namespace, text: str, loaded: list[tuple[Any, Any]]
) -> tuple[dict[str, Any], str]:
    from tqdm import tqdm

    from sinkprune import generation_quality

    scorer = None
    if options.scorer:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        judge = AutoModelForCausalLM.from_pretrained(options.scorer, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.scorer, local_files_only=True)
        scorer = generation_quality.CausalScorer(judge.to(options.device), tokenizer)
    half = options.length // 2
    with tqdm(desc="generating", unit="forward", disable=options.quiet) as bar:
        qualities = [
            generation_quality.evaluate_generation(
                model,
                tokenizer,
                text,
                scorer=scorer,
                windows=options.windows,
                prompt_length=options.length - half,
                gen_length=half,
                progress=bar.update,
            )
            for model, tokenizer in loaded
        ]
    quality = qualities[0]
    result: dict[str, Any] = {"measures": quality.summary()}
    lines = "\ngenerated (95 % intervals):" + _lines({k: m.interval() for k, m in quality.measures.items()})
    if options.against:
        for name, found in (
            ("difference", quality.minus(qualities[1])),
            ("likeness", quality.likeness(qualities[1])),
        ):
            result[name] = {key: interval._asdict() for key, interval in found.items()}
            lines += f"\n{name} to {options.against}:" + _lines(found)
    return result, lines


def _lines(intervals: dict[str, Any]) -> str:
    return "".join(
        f"\n  {name:<24} {i.mean:9.4f}  [{i.low:.4f}, {i.high:.4f}]" for name, i in intervals.items()
    )


def _generate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune import checkpoint, footprint, generation, windows

    block = options.block_length or options.gen_length
    total = len(options.prompt.split()) + options.gen_length  # at least
    batch = 2 if options.cfg_scale else 1
    held = total if options.cache else 0
    footprint.check_folder_fits(options.model, options.device, batch, total, block, held)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    cache = windows.new_cache(options.cache)
    steps: list[generation.Step] = []
    text = generation.generate(
        model,
        tokenizer,
        options.prompt,
        progress=not options.quiet,
        callback=steps.append,
        algorithm=options.algorithm,
        threshold=options.threshold,
        cache=cache,
        graphs=options.graphs,
        **_sampler_options(options),
    )
    result = {"prompt": options.prompt, "text": text, "forwards": len(steps)}
    if cache is not None:
        result |= {"cache_bytes": cache.bytes, "cache_bytes_saved": windows.saved_bytes(model, cache)}
        _teller(options)(
            f"{len(steps)} forwards; the cache took {cache.bytes / 1e6:.2f} MB, "
            f"{result['cache_bytes_saved'] / 1e6:.2f} MB less than the dense model's"
        )
    return result, str(text)


def _report(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune import checkpoint, profiling, report

    out = _output_folder(options.out)
    say = _teller(options)
    profile = profiling.SinkProfile.load(options.profile)
    dense, tokenizer = checkpoint.load(options.dense, device=options.device)
    pruned, _ = checkpoint.load(options.pruned, device=options.device)
    if getattr(dense, "prune_plan", None) is not None:
        raise ValueError(f"{options.dense} is already pruned; the first argument is the dense model")
    plan = getattr(pruned, "prune_plan", None)
    if plan is None:
        raise ValueError(f"{options.pruned} is not a pruned checkpoint")
    held_out = _text(options.text, "held_out")
    values = report.compare(
        dense,
        pruned,
        plan,
        profile,
        tokenizer=tokenizer,
        name=Path(options.dense).name,
        held_out=held_out,
        out_of_domain=_text(options.out_of_domain, "out_of_domain"),
        prompts=prompts_from(held_out, tokenizer, count=3),
        progress=say,
    )
    page = report.write(values, plan, profile, out)
    return values, _summary(values) + f"\nreport: {page}"


def _doctor(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune import doctor

    facts = doctor.diagnose() if options.model is None else doctor.recognise(options.model)
    return facts, doctor.describe(facts)


def _tune(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Time the shipped tiles on this GPU for a model's shapes, and keep the fastest."""
    from sinkprune import doctor, tuning

    facts = doctor.recognise(options.model)
    shapes = [
        tuning.Shape(heads, max(facts["kv_heads"]), facts["head_dim"], length, length, options.batch)
        for heads in facts["heads"]
        for length in options.length
    ]
    lines: list[str] = []
    chosen = tuning.tune(shapes, options.device, report=lines.append)
    return {"shapes": len(shapes), "chosen": {str(k): str(v) for k, v in chosen.items()}}, "\n".join(lines)


def prompts_from(text: str, tokenizer: Any, *, count: int, tokens: int = 16) -> list[str]:
    """``count`` prompts of ``tokens`` tokens, evenly spread over ``text``. Raises ``ValueError`` if it is too
    short."""
    if tokenizer is None:
        raise ValueError("taking prompts from a text needs a tokenizer, and the model has none")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if count < 1 or len(ids) < count * tokens:
        raise ValueError(f"{count} prompts of {tokens} tokens need as many tokens of text, got {len(ids)}")
    starts = [round(i * (len(ids) - tokens) / max(1, count - 1)) for i in range(count)]
    return [tokenizer.decode(ids[start : start + tokens]).strip() for start in starts]


def _summary(values: dict[str, Any]) -> str:
    from sinkprune.costs import ceilings_text

    plan, quality, speed = values["plan"], values["quality"], values["speed"]
    return (
        f"{plan['heads_removed']} heads and {100 * plan['parameters_removed']:.1f} % of the block parameters "
        f"removed by {plan['criterion']}\n"
        f"NLL bound {quality['dense']['nll']:.3f} -> {quality['pruned']['nll']:.3f} nat per token "
        f"({quality['difference']['nll']:+.3f} ± {quality['difference']['nll_se']:.3f})\n"
        f"{speed['dense_ms_per_step']:.2f} -> {speed['pruned_ms_per_step']:.2f} ms per step: "
        f"{speed['ratio']:.2f}x; the plan can give {ceilings_text(speed['ceilings'])}"
    )


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas. Raises ``ValueError``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected numbers between commas, got {text!r}") from None


def _sampler_options(options: argparse.Namespace) -> dict[str, Any]:
    """What ``profile`` and ``generate`` tell the sampler."""
    names = ("steps", "gen_length", "block_length", "temperature", "cfg_scale", "seed")
    return {name: getattr(options, name) for name in names}


def _check_device(name: str) -> None:
    """Raise ``ValueError`` for a device that is not there."""
    if name == "cpu":
        return
    import torch

    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")


def _teller(options: argparse.Namespace) -> Callable[[str], None]:
    """Progress lines on standard error, unless ``--quiet``."""

    def say(line: str) -> None:
        if not options.quiet:
            print(f"· {line}", file=sys.stderr, flush=True)

    return say


def _text(path: str | None, embedded: str) -> str:
    """The text of a file, or without one the text of that name that the package ships."""
    if path is None:
        from sinkprune import checkpoint

        return checkpoint.asset(f"text/{embedded}.txt").read_text("utf-8")
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _output_folder(path: str) -> Path:
    """The folder, made if need be, before any long work. Raises ``OSError`` where it can't be written."""
    folder = Path(path)
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, expected a folder to write")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} can't be written")
    return folder


def _new_folder(path: str, overwrite: bool) -> Path:
    """A checkpoint's folder to be, refused before any long work where something is there already."""
    folder = Path(path)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another path, or --overwrite what was saved before")
    return folder


def _output_file(path: str) -> Path:
    """The file's path, its folder checked before any long work."""
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder, expected a file to write")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise FileNotFoundError(f"{file.parent} is not a folder that can be written")
    return file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sinkprune", description="Sink-aware pruning for diffusion language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., Any], summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--quiet", action="store_true", help="no progress on standard error")
        if name != "doctor":
            sub.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
        return sub

    def sampler(sub: argparse.ArgumentParser, gen_length: int) -> None:
        sub.add_argument("--steps", type=int, default=64, help="forwards (default: %(default)s)")
        sub.add_argument("--gen-length", type=int, default=gen_length, help="new tokens (%(default)s)")
        sub.add_argument("--block-length", type=int, help="tokens of a block (default: one block)")
        sub.add_argument("--temperature", type=float, default=0.0, help="0 takes the argmax (default)")
        sub.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance")
        sub.add_argument("--seed", type=int, default=0)

    def planner(sub: argparse.ArgumentParser) -> None:
        shown = "(default: %(default)s)"
        sub.add_argument("--criterion", default=DEFAULT_CRITERION, help=f"rule that orders heads {shown}")
        sub.add_argument("--ratio", type=float, default=0.38, help=f"share to remove {shown}")
        sub.add_argument("--unit", default="heads", help=f"heads, parameters or flops {shown}")
        sub.add_argument("--targets", default="heads", help=f"heads, mlp or heads,mlp {shown}")
        sub.add_argument(
            "--channel-rule", default="magnitude", help=f"magnitude, wanda, sink_wanda or flap {shown}"
        )
        calibrator(sub)

    def calibrator(sub: argparse.ArgumentParser) -> None:
        shown = "(default: %(default)s)"
        sub.add_argument("--calibration", help="a UTF-8 text of the model's kind (default: the embedded one)")
        sub.add_argument("--calibration-windows", type=int, default=32, help=f"of that text {shown}")
        sub.add_argument("--calibration-length", type=int, default=128, help=f"tokens of a window {shown}")
        sub.add_argument("--seed", type=int, default=0, help="of windows, masks and random rules")

    sub = command("demo", _demo, "The whole story on one model.", "sinkprune demo --out demo-out")
    sub.add_argument("--out", required=True, help="folder for report.html, report.json and pictures")
    sub.add_argument("--model", default="tiny", help="tiny, or a local folder (default: %(default)s)")
    sub.add_argument("--prompts", type=int, default=8, help="trajectories profiled (default: %(default)s)")
    sub.add_argument("--steps", type=int, default=64, help="forwards (default: %(default)s)")
    sub.add_argument("--gen-length", type=int, default=128, help="new tokens profiled (default: %(default)s)")
    planner(sub)

    sub = command(
        "profile",
        _profile,
        "Gather sink statistics over real denoising trajectories.",
        'sinkprune profile tiny --prompt "My fellow citizens" --out profile.safetensors',
    )
    sub.add_argument("model", help="tiny, or a local folder")
    sub.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    sub.add_argument("--text", help="take prompts from this text file")
    sub.add_argument("--prompts", type=int, default=8, help="how many from --text (default: %(default)s)")
    sub.add_argument("--out", required=True, help="the profile's file (safetensors)")
    sampler(sub, 128)

    sub = command(
        "plan",
        _plan,
        "Decide what to remove.",
        "sinkprune plan tiny --profile profile.safetensors --ratio 0.38 --out plan.json",
    )
    sub.add_argument("model", help="tiny, or a local folder")
    sub.add_argument("--profile", help="from 'sinkprune profile', for criteria that need it")
    planner(sub)
    sub.add_argument("--allocation", default="global", help="global or uniform (default: %(default)s)")
    sub.add_argument("--min-heads", type=int, default=1, help="fewest a layer keeps (default: %(default)s)")
    sub.add_argument("--max-layer-share", type=float, default=1.0, help="most of a layer that may go")
    sub.add_argument("--round-heads", type=int, default=1, help="keep a multiple of this many per layer")
    sub.add_argument("--round-channels", type=int, default=1, help="the same of MLP channels")
    sub.add_argument("--whole-groups", action="store_true", help="remove whole key/value groups (GQA)")
    sub.add_argument("--whole-layers", action="store_true", help="remove whole layers' attention")
    sub.add_argument("--batch", type=int, default=1, help="of the ceiling printed (default: %(default)s)")
    sub.add_argument("--length", type=int, help="of the ceiling printed, and of a target (default: 1024)")
    sub.add_argument("--target-speedup", type=float, help="instead of --ratio: times faster than dense")
    sub.add_argument("--target-latency", type=float, help="instead of --ratio: seconds per step")
    sub.add_argument(
        "--latency-table", help="for a target: a table's file, measure, or computed for A100, H100 or H200"
    )
    sub.add_argument("--roofs", help="of the ceiling: cpu, cuda, A100, H100 or H200 (default: the --device)")
    sub.add_argument("--out", required=True, help="the plan's file (JSON)")

    sub = command(
        "apply", _apply, "Prune a model and save it.", "sinkprune apply tiny --plan plan.json --out pruned/"
    )
    sub.add_argument("model", help="tiny, or a local folder")
    sub.add_argument("--plan", required=True, help="from 'sinkprune plan'")
    sub.add_argument("--mode", default="compact", help="compact or mask (default: %(default)s)")
    sub.add_argument("--repair", help="least_squares (default for compact), bias or none (default for mask)")
    calibrator(sub)
    sub.add_argument("--low-memory", action="store_true", help="layer by layer; can't be rolled back")
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint written before")
    sub.add_argument("--out", required=True, help="the checkpoint's folder")

    sub = command(
        "sparsify",
        _sparsify,
        "Set weights to zero (the paper's own form of pruning) and save the model.",
        "sinkprune sparsify tiny --method sink_wanda --sparsity 0.5 --pattern 2:4 --out sparse/",
    )
    sub.add_argument("model", help="tiny, or a local folder")
    sub.add_argument(
        "--method",
        default="sink_wanda",
        help="magnitude, wanda, sparsegpt, sink_wanda or sink_sparsegpt (default: %(default)s)",
    )
    sub.add_argument("--sparsity", type=float, default=0.5, help="share of zeros (default: %(default)s)")
    sub.add_argument(
        "--pattern", default="unstructured", help="unstructured, 2:4 or 4:8 (default: %(default)s)"
    )
    sub.add_argument("--text", help="a UTF-8 text to calibrate on (default: the embedded one)")
    sub.add_argument(
        "--sequences", type=int, default=16, help="windows, each at ten noise levels (default: %(default)s)"
    )
    sub.add_argument("--length", type=int, default=128, help="tokens of a window (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the windows and the masks")
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint written before")
    sub.add_argument("--out", required=True, help="the checkpoint's folder")

    sub = command(
        "eval",
        _eval,
        "Quality on text: the masked NLL bound, and what the model writes; paired with another model's.",
        "sinkprune eval pruned/ --against tiny --text held_out.txt --generation",
    )
    sub.add_argument("model", help="tiny, or a local folder")
    sub.add_argument("--against", help="another model, say the dense one: differences with 95 %% intervals")
    sub.add_argument("--text", help="a UTF-8 text file (default: the embedded held-out text)")
    sub.add_argument("--windows", type=int, default=32, help="windows of text (default: %(default)s)")
    sub.add_argument("--length", type=int, default=128, help="tokens of a window (default: %(default)s)")
    sub.add_argument("--levels", default="0.15,0.5,0.9", help="noise levels (default: %(default)s)")
    sub.add_argument("--highest-noise", type=float, default=1.0, help="of the bound (default: %(default)s)")
    sub.add_argument("--generation", action="store_true", help="also infill and continue half of each window")
    sub.add_argument("--scorer", help="folder of a causal LM that gives generated text its perplexity")

    sub = command(
        "generate",
        _generate,
        "Continue a prompt.",
        'sinkprune generate tiny "My fellow citizens" --steps 64 --gen-length 64',
    )
    sub.add_argument("model", help="tiny, or a local folder")
    sub.add_argument("prompt")
    sampler(sub, 64)
    sub.add_argument("--algorithm", help="low_confidence, random, or Dream's origin, maskgit_plus, …")
    sub.add_argument("--threshold", type=float, help="commit all tokens this sure, instead of --steps")
    sub.add_argument("--graphs", action="store_true", help="replay steps as CUDA graphs (nothing on CPU)")
    sub.add_argument("--cache", help="prefix, dual or dllm (approximate), block (block-causal models)")

    sub = command(
        "report",
        _report,
        "Compare a dense checkpoint with its pruned form.",
        "sinkprune report tiny pruned/ --profile profile.safetensors --out report/",
    )
    sub.add_argument("dense", help="tiny, or a local folder")
    sub.add_argument("pruned", help="a folder written by 'sinkprune apply'")
    sub.add_argument("--profile", required=True, help="the profile that the plan came from")
    sub.add_argument("--text", help="held-out text (default: the embedded one)")
    sub.add_argument("--out-of-domain", help="text of another kind (default: the embedded one)")
    sub.add_argument("--out", required=True, help="folder for report.html, report.json and pictures")

    sub = command(
        "tune",
        _tune,
        "Time the kernels' tiles on this GPU for a model's shapes and keep the fastest (opt-in).",
        "sinkprune tune path/to/LLaDA-8B --length 1024 --length 4096 --device cuda",
    )
    sub.add_argument("model", help="tiny, or a local folder")
    sub.add_argument("--length", type=int, action="append", required=True, help="may be repeated")
    sub.add_argument("--batch", type=int, default=1)

    sub = command(
        "doctor",
        _doctor,
        "Versions, hardware, and which backend runs what; or what a model is to the package.",
        "sinkprune doctor --json; sinkprune doctor tiny",
    )
    sub.add_argument("model", nargs="?", help="tiny, or a local folder: say what it was recognised as")
    return parser


if __name__ == "__main__":
    sys.exit(main())
