"""``sinkprune sparsify``: zeros in the weights, the shapes as they were."""

from __future__ import annotations

import argparse
from typing import Any

from sinkprune.commands import arguments


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "sparsify",
        _sparsify,
        "Set weights to zero (the paper's own form of pruning) and save the model.",
        "sinkprune sparsify tiny --method sink_wanda --sparsity 0.5 --pattern 2:4 --out sparse/",
    )
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument(
        "--method",
        default="sparsegpt",
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
    arguments.add_mask_flag(sub)
    sub.add_argument("--seed", type=int, default=0, help="of the windows and the masks")
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint written before")
    sub.add_argument("--out", required=True, help="the checkpoint's folder")


def _sparsify(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.checkpoints import checkpoint
    from sinkprune.evidence import calibration
    from sinkprune.models.marks import noted_sparsity
    from sinkprune.pruning import sparsification

    out = arguments.new_folder(options.out, options.overwrite)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    rows = None
    if options.method != "magnitude":
        rows = calibration.calibrate(
            model,
            arguments.read_text(options.text, "calibration"),
            tokenizer=tokenizer,
            sequences=options.sequences,
            length=options.length,
            levels=calibration.TEN_LEVELS,
            seed=options.seed,
            mask_token_id=options.mask_token_id,
        )
    sparsification.sparsify(
        model, options.method, options.sparsity, options.pattern, rows, progress=arguments.teller(options)
    )
    shares = sparsification.sparsity_of(model)
    folder = checkpoint.save(model, out, tokenizer=tokenizer, overwrite=options.overwrite)
    text = (
        f"{100 * sum(shares.values()) / len(shares):.1f} % zeros in each of {len(shares)} linear layers "
        f"({options.method}, {options.pattern}); zeros alone make nothing smaller or faster\nwrote {folder}"
    )
    note = noted_sparsity(model).to_dict()
    return {"folder": str(folder), "share_of_zeros": shares, **note}, text
