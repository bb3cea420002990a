"""The command line: one subcommand a verb, ``--json`` for machines, one clear line and exit code 2 for bad
input."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from sinkprune.commands import (
    arguments,
    comparing,
    demo,
    exporting,
    flags,
    in_one,
    machine,
    pruning,
    quality,
    sizing,
    sparsifying,
    writing,
)
from sinkprune.version import __version__

GROUPS = (
    demo,
    in_one,
    pruning,
    exporting,
    sparsifying,
    quality,
    writing,
    comparing,
    sizing,
    machine,
)  # in the order of --help


def main(words: Sequence[str] | None = None) -> int:
    """Run ``sinkprune`` with ``words`` (default: the process's) and return the exit code."""
    parser = _parser()
    options = parser.parse_args(words)
    if options.command is None:
        return _print(parser.format_help().rstrip(), "sinkprune")
    try:
        arguments.check_device(getattr(options, "device", "cpu"))
        flags.check(options)
        with arguments.bars(options):
            result, text = options.run(options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        line = flags.in_flags(" ".join(str(error).split()), options) or type(error).__name__
        print(f"sinkprune {options.command}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sinkprune {options.command}: interrupted", file=sys.stderr)
        return 130
    if options.json:
        text = json.dumps(_without_nan(result), indent=1, allow_nan=False)
    return 0 if not text else _print(text, f"sinkprune {options.command}")


def _print(text: str, who: str) -> int:
    """Write ``text`` to standard output and return the exit code: 0; 141, as a shell counts a closed pipe,
    where nobody reads on; 2 and a line on standard error where it can't be written (a full disk)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal shows ± as \xb1
    try:
        print(text, flush=True)
    except OSError as error:
        # What is still in the buffer must not fail once more, with a traceback, when the process ends.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"{who}: error: standard output: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _without_nan(value: Any) -> Any:
    """``value`` with None for every float that JSON has no word for (NaN, infinities)."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sinkprune", description="Sink-aware pruning for diffusion language models."
    )
    parser.add_argument("--version", action="version", version=f"sinkprune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=flags.Verb)
    for group in GROUPS:
        group.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
