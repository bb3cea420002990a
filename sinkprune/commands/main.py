"""The command line: one subcommand a verb, ``--json`` for machines, one clear line and exit code 2 for bad
input."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from sinkprune.commands import comparing, demo, exporting, machine, pruning, quality, sparsifying, writing
from sinkprune.commands.arguments import check_device

GROUPS = (
    demo,
    pruning,
    exporting,
    sparsifying,
    quality,
    writing,
    comparing,
    machine,
)  # in the order of --help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``sinkprune`` with ``arguments`` (default: the process's) and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        check_device(getattr(options, "device", "cpu"))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sinkprune", description="Sink-aware pruning for diffusion language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
