"""``sinkprune eval``: what a model predicts and writes, alone or against another."""

from __future__ import annotations

import argparse
from typing import Any

from sinkprune.commands import arguments


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "eval",
        _eval,
        "Quality on text: the masked NLL bound, and what the model writes; paired with another model's.",
        "sinkprune eval pruned/ --against tiny --generation --windows 4 --length 64",
    )
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument("--against", help="another model, say the dense one: differences with 95 %% intervals")
    sub.add_argument("--text", help="a UTF-8 text file (default: the embedded held-out text)")
    sub.add_argument("--windows", type=int, default=32, help="windows of text (default: %(default)s)")
    sub.add_argument("--length", type=int, default=128, help="tokens of a window (default: %(default)s)")
    sub.add_argument("--levels", default="0.15,0.5,0.9", help="noise levels (default: %(default)s)")
    sub.add_argument("--highest-noise", type=float, default=1.0, help="of the bound (default: %(default)s)")
    sub.add_argument("--generation", action="store_true", help="also infill and continue half of each window")
    arguments.add_mask_flag(sub)
    sub.add_argument(
        "--scorer", help="a causal LM, local or org/name, that gives generated text its perplexity"
    )


def _eval(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from dataclasses import asdict

    from sinkprune.checkpoints import checkpoint
    from sinkprune.evaluation import predictions as evaluation

    text, levels_asked = arguments.read_text(options.text, "held_out"), _numbers(options.levels)
    scorer = _scorer(options.scorer, options.device) if options.scorer else None
    loaded = [
        checkpoint.load(path, device=options.device)
        for path in (options.model, options.against)
        if path is not None
    ]
    qualities = [
        evaluation.evaluate(
            model,
            text,
            tokenizer=tokenizer,
            windows=options.windows,
            length=options.length,
            levels=levels_asked,
            highest_noise=options.highest_noise,
            mask_token_id=options.mask_token_id,
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
        result["generation"], more = _eval_generation(options, text, loaded, scorer)
        line += more
    return result, line


def _eval_generation(
    options: argparse.Namespace, text: str, loaded: list[tuple[Any, Any]], scorer: Any
) -> tuple[dict[str, Any], str]:
    from sinkprune.evaluation import generation_quality

    half = options.length // 2
    qualities = [
        generation_quality.evaluate_generation(
            model,
            tokenizer,
            text,
            scorer=scorer,
            windows=options.windows,
            prompt_length=options.length - half,
            gen_length=half,
            mask_token_id=options.mask_token_id,
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


def _scorer(source: str, device: str) -> Any:
    """The judge of ``--scorer``: a causal language model that ``load`` takes, or transformers.

    Raises:
        ValueError: another kind of model, or one without a tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sinkprune.checkpoints import checkpoint
    from sinkprune.evaluation.generation_quality import CausalScorer
    from sinkprune.files import read_json
    from sinkprune.models.published import native_kind

    folder = checkpoint.folder_of(source)
    try:
        if (folder / checkpoint.MANIFEST).exists() or native_kind(read_json(folder / "config.json")):
            judge, tokenizer = checkpoint.load(folder, device=device)
        else:
            judge = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval().to(device)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 2]], device=device)
        with torch.no_grad():
            before = judge(ids).logits[:, :3].float()
    except (ValueError, OSError, AttributeError) as error:
        raise ValueError(f"--scorer {source}: expected a causal language model: {error}") from error
    if not torch.allclose(before[0], before[1], rtol=1e-3, atol=1e-3):
        raise ValueError(f"--scorer {source}: expected a causal language model; this one sees later tokens")
    if tokenizer is None:
        raise ValueError(f"--scorer {source}: expected a tokenizer beside the model")
    return CausalScorer(judge, tokenizer)


def _lines(intervals: dict[str, Any]) -> str:
    return "".join(
        f"\n  {name:<24} {i.mean:9.4f}  [{i.low:.4f}, {i.high:.4f}]" for name, i in intervals.items()
    )


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas. Raises ``ValueError``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected numbers between commas, got {text!r}") from None
