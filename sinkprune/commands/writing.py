"""``sinkprune generate``: a prompt continued."""

from __future__ import annotations

import argparse
from typing import Any

from sinkprune.commands import arguments


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "generate",
        _generate,
        "Continue a prompt.",
        'sinkprune generate tiny "My fellow citizens" --steps 64 --gen-length 64',
    )
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument("prompt")
    arguments.add_sampler_flags(sub, 64)
    sub.add_argument("--algorithm", help="low_confidence, random, or Dream's origin, maskgit_plus, …")
    sub.add_argument("--threshold", type=float, help="commit all tokens this sure, instead of --steps")
    sub.add_argument(
        "--top-p", type=float, help="draw, at a temperature, from the likeliest tokens of this sum"
    )
    sub.add_argument("--top-k", type=int, help="draw, at a temperature, from this many likeliest tokens")
    sub.add_argument("--sub-block", type=int, help="with a threshold: fill blocks in parts (Fast-dLLM v2: 8)")
    sub.add_argument("--stop", action="store_true", help="end at the tokenizer's end-of-text token")
    sub.add_argument("--graphs", action="store_true", help="replay steps as CUDA graphs (nothing on CPU)")
    sub.add_argument("--cache", help="prefix, dual or dllm (approximate), block (block-causal models)")


def _generate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.checkpoints import checkpoint
    from sinkprune.commands import fitting
    from sinkprune.evaluation import footprint
    from sinkprune.generation import denoising as generation
    from sinkprune.generation import windows

    block = options.block_length or options.gen_length
    total = len(options.prompt.split()) + options.gen_length  # at least
    batch = 2 if options.cfg_scale else 1
    held = total if options.cache else 0
    fitting.check_folder_fits(options.model, options.device, batch, total, block, held)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    cache = windows.new_cache(options.cache)
    steps: list[generation.Step] = []
    text = generation.generate(
        model,
        tokenizer,
        options.prompt,
        callback=steps.append,
        algorithm=options.algorithm,
        threshold=options.threshold,
        top_p=options.top_p,
        top_k=options.top_k,
        sub_block=options.sub_block,
        stop_token_id=_end_of(tokenizer) if options.stop else None,
        cache=cache,
        graphs=options.graphs,
        **arguments.sampler_options(options),
    )
    result = {"prompt": options.prompt, "text": text, "forwards": len(steps)}
    if cache is not None:
        result |= {"cache_bytes": cache.bytes, "cache_bytes_saved": footprint.saved_bytes(model, cache)}
        arguments.teller(options)(
            f"{len(steps)} forwards; the cache took {cache.bytes / 1e6:.2f} MB, "
            f"{result['cache_bytes_saved'] / 1e6:.2f} MB less than the dense model's"
        )
    return result, str(text)


def _end_of(tokenizer: Any) -> int:
    """The end-of-text token. Raises ``ValueError`` where there is none."""
    end = getattr(tokenizer, "eos_token_id", None)
    if not isinstance(end, int):
        raise ValueError("--stop needs a tokenizer that names an end-of-text token")
    return end
