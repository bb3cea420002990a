"""``sinkprune prune``: plan, apply with its repair, and save, in one go."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sinkprune.commands import arguments

if TYPE_CHECKING:
    from torch import nn

    from sinkprune.evidence.calibration import Calibration
    from sinkprune.plans import PrunePlan


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
    sub.add_argument(
        "--stream",
        action="store_true",
        help="read, prune and write one block at a time, for models larger than memory; killed, it goes on",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint written before")
    sub.add_argument("--out", required=True, help="the checkpoint's folder")


def _prune(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.adapters import adapter_for
    from sinkprune.checkpoints import checkpoint, streaming
    from sinkprune.planning import planner
    from sinkprune.pruning import repacking

    out = arguments.new_folder(options.out, options.overwrite)
    say = arguments.teller(options)
    if options.stream:
        streaming.give_memory_back()
        progress = _Progress(say)
        model, tokenizer = streaming.opened(options.model, out, device=options.device, progress=progress)
    else:
        model, tokenizer = checkpoint.load(options.model, device=options.device)
    before = sum(parameter.numel() for parameter in model.parameters())
    rows = arguments.calibration_rows(model, tokenizer, options)
    repair = None if options.repair == "none" or rows is None else options.repair

    def make() -> PrunePlan:
        say(f"planning by {options.criterion}")
        return planner.plan(
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

    if options.stream:
        progress.blocks = adapter_for(model).geometry().num_layers
        narrower = options.ratio if "mlp" in options.targets else 0.0
        most = streaming.peak_bytes(model, rows, kept_channels=1 - narrower)
        say(f"at most {most / 1e9:.2f} GB beside Python's own: {before:,} parameters are read block by block")
        if streaming.begin(out, _run_of(options, model, rows), overwrite=options.overwrite):
            say(f"going on with what {streaming.work_folder(out)} holds")
        plan = streaming.planned(out, make)
    else:
        plan = make()
    say("pruning" if repair is None else f"pruning and repairing by {repair}")
    kept: dict[str, Any] = {"calibration": None if repair is None else rows, "repair": repair}
    beside = {"tokenizer": tokenizer, "overwrite": options.overwrite}
    if options.stream:
        folder = streaming.prune_streamed(model, plan, out, **kept, **beside)
    else:
        folder = checkpoint.save(repacking.apply(model, plan, **kept), out, **beside)
    after = sum(parameter.numel() for parameter in model.parameters())
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


class _Progress:
    """A line for every block, with the time that is left of what goes through all of them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._what, self._started, self._first, self.blocks = say, "", 0.0, 0, 0

    def __call__(self, what: str, layer: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._started, self._first = what, now, layer
            self._say(f"{what} block {layer + 1} of {self.blocks}")
            return
        left = (now - self._started) / (layer - self._first) * (self.blocks - 1 - layer)
        self._say(f"{what} block {layer + 1} of {self.blocks}, {left:.0f} s left")


def _run_of(options: argparse.Namespace, model: nn.Module, rows: Calibration | None) -> dict[str, Any]:
    """All that changes the result of a streamed run."""
    from sinkprune.adapters import adapter_for
    from sinkprune.version import __version__

    told = "model criterion ratio unit targets channel_rule expert_rule block_rule fit seed repair device"
    said = {name: getattr(options, name) for name in told.split()}
    tensors = [] if rows is None else [rows.ids, rows.targets]
    digest = [hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest() for tensor in tensors]
    return said | {"version": __version__, "weights": adapter_for(model).fingerprint(), "rows": digest}
