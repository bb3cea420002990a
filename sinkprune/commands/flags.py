"""What a verb's flags mean together: those that would be ignored are refused, files that are missing are said
with what was expected of them, and errors of the Python interface name flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILES = {  # flag's destination -> what its file is
    "plan": "a plan, which 'sinkprune plan' writes",
    "profile": "a sink profile, which 'sinkprune profile' writes",
    "text": "a UTF-8 text",
    "out_of_domain": "a UTF-8 text",
    "calibration": "a UTF-8 text of the model's kind",
}
ROWS = ("calibration", "calibration_windows", "calibration_length", "mask_token_id")
ALSO = {  # arguments of functions that a verb calls, where its flag has another name
    "eval": {"gen_length": "--length", "prompt_length": "--length", "highest_noise": "--highest-noise"},
    "generate": {"stop_token_id": "--stop"},
    "export": {"save_directory": "--out"},
}
PHRASES = (
    (r"needs a profile: pass sp\.profile\([^)]*\)", "needs --profile FILE, which 'sinkprune profile' writes"),
    (r"needs calibration=(sp\.)?calibrate\([^)]*\)", "needs calibration rows: a model with a tokenizer"),
    (r"a latency_table: sp\.measured_table\(.*?\) or computed_table",
     "--latency-table: a file, measure, A100, H100 or H200"),
    (r"repair=None", "--repair none"),
    (r"\b(whole_groups|whole_layers)=True", r"\1"),
)  # fmt: skip


class Verb(argparse.ArgumentParser):
    """A verb's parser. What it returns says which flags were ``given``, and how its flags are ``spelt``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        defaults = [(action, action.default) for action in self._actions]
        own, self._defaults = self._defaults, {}
        try:
            for action in self._actions:
                action.default = argparse.SUPPRESS
            given, _ = super().parse_known_args(args, argparse.Namespace())
        finally:
            self._defaults = own
            for action, default in defaults:
                action.default = default
        found.given = frozenset(vars(given))
        found.spelt = {a.dest: a.option_strings[-1] for a in self._actions if a.option_strings}
        return found, rest


def check(options: argparse.Namespace) -> None:
    """What can be known before any work.

    Raises:
        FileNotFoundError: a file that a flag names is not there.
        ValueError: a flag was given that the others leave without effect.
    """
    for dest, what in FILES.items():
        path = getattr(options, dest, None)
        if isinstance(path, str) and dest in options.spelt and not Path(path).exists():
            raise FileNotFoundError(f"{options.spelt[dest]}: no such file: {path}; expected {what}")
    for dests, why in _ignored(options):
        for dest in dests:
            if dest in options.given:
                raise ValueError(f"{options.spelt[dest]} would be ignored: {why}")


def _ignored(options: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], str]]:
    """Flags that have no effect beside the others, and why."""
    verb = options.command
    if verb in ("plan", "prune", "demo"):
        yield from _ignored_by_rules(options)
    if verb == "plan" and (options.target_speedup or options.target_latency):
        yield ("ratio", "unit", "allocation"), "a target says how much goes, and where"
    if verb == "plan" and options.whole_layers:
        yield ("min_heads",), "--whole-layers empties layers"
    if verb == "apply" and (options.repair or ("none" if options.mode == "mask" else "")) == "none":
        yield (*ROWS, "seed"), "nothing is repaired, with --repair none or in mask form"
    if verb == "profile":
        if not options.text:
            yield ("prompts",), "there is no --text to take prompts from"
        if options.out == "-":
            yield ("json",), "the profile itself goes to standard output"
    if verb == "sparsify" and options.method == "magnitude":
        dests = ("text", "sequences", "length", "mask_token_id", "seed")
        yield dests, "--method magnitude looks at weights alone"
    if verb == "eval" and not options.generation:
        yield ("scorer",), "it judges what is generated: add --generation"
    if verb == "generate" and options.threshold is not None:
        yield ("steps",), "with --threshold the text decides how many forwards it takes"
    if verb == "generate" and not options.chat:
        yield ("system",), "it goes before a user's message: add --chat"
    if verb == "ceiling" and options.roofs:
        yield ("device",), "--roofs says which machine is meant"


def _ignored_by_rules(options: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], str]]:
    """Of the flags that say what is removed and by which rule."""
    from sinkprune.planning.channels import NEED_CALIBRATION
    from sinkprune.planning.criteria import criterion_for
    from sinkprune.planning.planner import BLOCK_TARGETS, EXPERT_TARGETS

    targets, shown = set(options.targets.split(",")), f"--targets {options.targets}"
    heads = "heads" in targets or not targets & {*EXPERT_TARGETS, *BLOCK_TARGETS}
    rule = criterion_for(options.criterion) if heads else None
    if rule is None:
        yield ("criterion",), f"it orders heads, of which {shown} removes none"
    if "mlp" not in targets:
        yield ("channel_rule",), f"{shown} removes no MLP channels"
        yield ("round_channels",), f"{shown} removes no MLP channels"
    if "experts" not in targets:
        yield ("expert_rule",), f"{shown} removes no experts"
    if not targets & set(BLOCK_TARGETS):
        yield ("block_rule",), f"{shown} removes no blocks"
    by = f"--criterion {options.criterion}" if rule is not None else shown
    if options.command == "plan" and not (rule is not None and rule.needs_profile):
        yield ("profile",), f"{by} looks at no profile"
    asked = (
        (rule is not None and rule.needs_calibration)
        or ("mlp" in targets and (options.channel_rule or "flap") in NEED_CALIBRATION)
        or ("experts" in targets and options.expert_rule != "random")
        or "expert_channels" in targets
        or (bool(targets & set(BLOCK_TARGETS)) and options.block_rule != "random")
        or options.command == "demo"
        or getattr(options, "repair", "none") != "none"
    )
    if not asked:
        yield ROWS, f"{by} looks at no calibration rows"


def in_flags(message: str, options: argparse.Namespace) -> str:
    """An error of the Python interface, in the words of the verb that was called.

    ``name=value`` becomes ``--name value``; a name with an underscore, its flag; a plain word only where
    it is what a sentence is about (``ratio must``). What the verb has no flag for stays as it is.
    """
    names = options.spelt | ALSO.get(options.command, {})
    for phrase, words in PHRASES:
        message = re.sub(phrase, words, message)
    word = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    apart = r"(?<![\w./'\"-])"  # no part of a path, a quotation or a longer name
    message = re.sub(rf"{apart}({word})=(?=[\w'\"(\[.-])", lambda m: f"{names[m[1]]} ", message)
    long = "|".join(name for name in names if "_" in name)
    if long:
        message = re.sub(rf"{apart}({long})(?![\w/.=-]\w)", lambda m: names[m[1]], message)
    about = rf"{apart}((?:--)?[\w-]+(?:(?:, | and |, and )(?:--)?[\w-]+)*)(?= (?:must|may|is of)\b)"

    def spelt(found: re.Match[str]) -> str:
        return re.sub(r"(?<![\w-])\w+(?![\w-])", lambda m: names.get(m[0], m[0]), found[1])

    return re.sub(about, spelt, message)
