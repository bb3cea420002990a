"""``sinkprune export``: a pruned model for programs that run models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sinkprune.commands import arguments


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "export",
        _export,
        "Write a pruned model for llama.cpp, transformers and others.",
        "sinkprune export pruned/ --to gguf --out tiny.gguf",
    )
    sub.add_argument("model", help="a local folder that 'sinkprune apply' wrote (for gguf: any)")
    sub.add_argument("--to", default="hf", help="hf, gguf, or a target's name (default: %(default)s)")
    sub.add_argument("--dtype", help="of a GGUF file: f32, f16, bf16 or q8_0 (default: the model's)")
    sub.add_argument("--out", required=True, help="the folder, or the GGUF file; must not exist")


def _export(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.checkpoints import checkpoint, exporting

    if Path(options.out).exists():  # before any long work
        raise FileExistsError(f"{options.out} exists; choose another path")
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    out = exporting.export(model, options.out, to=options.to, dtype=options.dtype, tokenizer=tokenizer)
    files = [out] if out.is_file() else sorted(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    return {"out": str(out), "bytes": size}, f"wrote {out}, {size / 1e6:.1f} MB"
