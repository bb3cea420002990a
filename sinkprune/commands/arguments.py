"""Flags that several commands share, and the checks of what they were given."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

from sinkprune.files import check_file

DEFAULT_CRITERION = "reconstruction"  # as in planning, which would import torch for --help
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], str]],
    summary: str,
    example: str,
    *,
    device: bool = True,
) -> argparse.ArgumentParser:
    """A parser of one command with the flags that all have; ``--device`` where ``device`` is true."""
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
    if device:
        sub.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    return sub


def add_sampler_flags(sub: argparse.ArgumentParser, gen_length: int) -> None:
    """What ``sampler_options`` reads; ``gen_length`` is the default number of new tokens."""
    sub.add_argument("--steps", type=int, help="forwards (default: 64, or as many as tokens and blocks take)")
    sub.add_argument("--gen-length", type=int, default=gen_length, help="new tokens (%(default)s)")
    sub.add_argument("--block-length", type=int, help="tokens of a block (default: one block)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 takes the argmax (default)")
    sub.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance")
    add_mask_flag(sub)
    sub.add_argument("--seed", type=int, default=0)


def add_mask_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--mask-token-id", type=int, help="(default: the config's, else the tokenizer's)")


def add_criterion_flags(sub: argparse.ArgumentParser) -> None:
    """What is removed, how much of it, and by which rule, with the calibration that rules need."""
    shown = "(default: %(default)s)"
    sub.add_argument("--criterion", default=DEFAULT_CRITERION, help=f"rule that orders heads {shown}")
    sub.add_argument("--ratio", type=float, default=0.38, help=f"share to remove {shown}")
    sub.add_argument("--unit", default="heads", help=f"heads, experts, blocks, parameters or flops {shown}")
    sub.add_argument(
        "--targets",
        default="heads",
        help=f"of heads,mlp,experts,expert_channels,blocks, or attention or mlp_blocks alone {shown}",
    )
    sub.add_argument("--channel-rule", help="of MLP channels: magnitude, wanda, sink_wanda or flap (default)")
    sub.add_argument("--expert-rule", help="of experts: reap (default), reconstruction, ablation or random")
    sub.add_argument(
        "--block-rule", help="of blocks: influence (default), reconstruction, ablation or random"
    )
    add_calibration_flags(sub)


def add_calibration_flags(sub: argparse.ArgumentParser) -> None:
    """What ``calibration_rows`` reads."""
    shown = "(default: %(default)s)"
    sub.add_argument("--calibration", help="a UTF-8 text of the model's kind (default: the embedded one)")
    sub.add_argument("--calibration-windows", type=int, default=32, help=f"of that text {shown}")
    sub.add_argument("--calibration-length", type=int, default=128, help=f"tokens of a window {shown}")
    add_mask_flag(sub)
    sub.add_argument("--seed", type=int, default=0, help="of windows, masks and random rules")


def check_device(name: str) -> None:
    """Raise ``ValueError`` for a device that is not there."""
    if name == "cpu":
        return
    import torch

    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")


@contextmanager
def bars(options: argparse.Namespace) -> Iterator[None]:
    """Bars with the time left on standard error, ours and those of libraries; none under ``--quiet``
    or where no terminal shows them."""
    from sinkprune.progress import shown

    show = not options.quiet and sys.stderr.isatty()
    with shown(show), nullcontext() if show else _libraries_silent():
        yield


@contextmanager
def _libraries_silent() -> Iterator[None]:
    """transformers' and the hub's own bars off, and then as they were."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    ours, theirs = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if ours:
            logging.enable_progress_bar()
        if not theirs:
            hub.disable_progress_bars()


def teller(options: argparse.Namespace) -> Callable[[str], None]:
    """Progress lines on standard error, unless ``--quiet``."""

    def say(line: str) -> None:
        if not options.quiet:
            print(f"· {line}", file=sys.stderr, flush=True)

    return say


def read_text(path: str | None, embedded: str) -> str:
    """The text of a file, or without one the text of that name that the package ships."""
    if path is None:
        from sinkprune.checkpoints import checkpoint

        return checkpoint.texts(embedded)
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


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


def calibration_rows(model: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    """Masked windows of ``--calibration``, or of the embedded text; None without a tokenizer."""
    from sinkprune.evidence import calibration

    if tokenizer is None and options.calibration is None:
        return None
    for flag in ("calibration_windows", "calibration_length"):
        if getattr(options, flag) < 1:
            raise ValueError(f"{options.spelt[flag]} must be at least 1, got {getattr(options, flag)}")
    text = read_text(options.calibration, "calibration")
    return calibration.calibrate(
        model,
        text,
        tokenizer=tokenizer,
        sequences=options.calibration_windows,
        length=options.calibration_length,
        seed=options.seed,
        mask_token_id=options.mask_token_id,
    )


def sampler_options(options: argparse.Namespace) -> dict[str, Any]:
    """What ``profile`` and ``generate`` tell the sampler."""
    names = ("steps", "gen_length", "block_length", "temperature", "cfg_scale", "seed")
    told = {} if options.mask_token_id is None else {"mask_token_id": options.mask_token_id}
    return {name: getattr(options, name) for name in names} | told


def output_folder(path: str) -> Path:
    """The folder, made if need be, before any long work. Raises ``OSError`` where it can't be written."""
    folder = Path(path)
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, expected a folder to write")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} can't be written")
    return folder


def new_folder(path: str, overwrite: bool) -> Path:
    """A checkpoint's folder to be, refused before any long work where something is there already."""
    folder = Path(path)
    if folder.is_dir() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another path, or --overwrite what was saved before")
    from sinkprune.checkpoints import checkpoint

    checkpoint.require_place(folder, overwrite)
    return folder


def add_file_flags(sub: argparse.ArgumentParser, what: str) -> None:
    """What ``output_file`` reads."""
    sub.add_argument("--out", required=True, help=f"{what}; - is standard output")
    sub.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def output_file(options: argparse.Namespace) -> Path | None:
    """The path of ``--out``, checked before any long work; None for standard output."""
    if options.out == "-":
        return None
    file = Path(options.out)
    check_file(file)
    if file.exists() and not options.overwrite:
        raise FileExistsError(f"{file} exists; choose another path, or --overwrite it")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise FileNotFoundError(f"{file.parent} is not a folder that can be written")
    return file
