"""``sinkprune generate``: prompts continued, or messages answered."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from typing import Any

from sinkprune.commands import arguments


def add_commands(commands: arguments.Commands) -> None:
    sub = arguments.add_command(
        commands,
        "generate",
        _generate,
        "Continue prompts, or answer messages.",
        'sinkprune generate tiny "My fellow citizens" --steps 64 --gen-length 64',
    )
    sub.add_argument("model", help="tiny, a local folder, or org/name[@revision] on the hub")
    sub.add_argument("prompt", nargs="+", help="several run together")
    arguments.add_sampler_flags(sub, 64)
    sub.add_argument("--chat", action="store_true", help="prompts are users' messages, by the chat template")
    sub.add_argument("--system", help="with --chat: a message before the user's")
    sub.add_argument("--algorithm", help="low_confidence, random, or Dream's origin, maskgit_plus, …")
    sub.add_argument("--threshold", type=float, help="commit all tokens this sure, instead of --steps")
    sub.add_argument(
        "--top-p", type=float, help="draw, at a temperature, from the likeliest tokens of this sum"
    )
    sub.add_argument("--top-k", type=int, help="draw, at a temperature, from this many likeliest tokens")
    sub.add_argument("--sub-block", type=int, help="with a threshold: fill blocks in parts (Fast-dLLM v2: 8)")
    sub.add_argument(
        "--stop", action="store_true", help="end at the tokenizer's end-of-text token (--chat does)"
    )
    sub.add_argument("--graphs", action="store_true", help="replay steps as CUDA graphs (nothing on CPU)")
    sub.add_argument("--cache", help="prefix, dual or dllm (approximate), block (block-causal models)")
    sub.add_argument("--stream", action="store_true", help="show the text filling in, on a terminal")


def _generate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from sinkprune.checkpoints import checkpoint
    from sinkprune.commands import fitting
    from sinkprune.evaluation import footprint
    from sinkprune.generation import denoising as generation
    from sinkprune.generation import windows
    from sinkprune.progress import shown

    block = options.block_length or options.gen_length
    total = max(len(prompt.split()) for prompt in options.prompt) + options.gen_length  # at least
    batch = len(options.prompt) * (2 if options.cfg_scale else 1)
    held = total if options.cache else 0
    fitting.check_folder_fits(options.model, options.device, batch, total, block, held)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    prompts, stop = _prompts(tokenizer, options)
    cache = windows.new_cache(options.cache)
    steps: list[generation.Step] = []
    screen = _screen(model, tokenizer, options)

    def look(step: generation.Step) -> None:
        steps.append(step)
        if screen is not None:
            screen(step)

    with nullcontext() if screen is None else shown(False):
        texts = generation.generate(
            model,
            tokenizer,
            prompts,
            callback=look,
            algorithm=options.algorithm,
            threshold=options.threshold,
            top_p=options.top_p,
            top_k=options.top_k,
            sub_block=options.sub_block,
            stop_token_id=stop,
            cache=cache,
            graphs=options.graphs,
            **arguments.sampler_options(options),
        )
    if screen is not None:
        screen.clear()
    one = len(prompts) == 1
    said = {"prompt": options.prompt[0], "text": texts[0]} if one else {}
    result = said | {"prompts": options.prompt, "texts": list(texts), "forwards": len(steps)}
    if cache is not None:
        result |= {"cache_bytes": cache.bytes, "cache_bytes_saved": footprint.saved_bytes(model, cache)}
        arguments.teller(options)(
            f"{len(steps)} forwards; the cache took {cache.bytes / 1e6:.2f} MB, "
            f"{result['cache_bytes_saved'] / 1e6:.2f} MB less than the dense model's"
        )
    return result, texts[0] if one else "\n\n".join(f"{i + 1}. {text}" for i, text in enumerate(texts))


def _prompts(tokenizer: Any, options: argparse.Namespace) -> tuple[list[str], int | None]:
    """What the model goes on from, and the token at which it ends.

    Raises ``ValueError`` for ``--stop`` without such a token and ``--chat`` without a template."""
    from sinkprune.generation import chatting

    end = chatting.end_of_text(tokenizer)
    if options.stop and end is None:
        raise ValueError("--stop needs a tokenizer that names an end-of-text token")
    if not options.chat:
        return options.prompt, end if options.stop else None
    before = [] if options.system is None else [{"role": "system", "content": options.system}]
    talks = [[*before, {"role": "user", "content": prompt}] for prompt in options.prompt]
    return [chatting.chat_prompt(tokenizer, talk) for talk in talks], end


def _screen(model: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    """Where ``--stream`` draws; None without it, without a terminal and under ``--quiet``."""
    if not options.stream or options.quiet or not sys.stderr.isatty():
        return None
    from sinkprune.adapters import adapter_for
    from sinkprune.commands.screen import Screen

    mask_id = adapter_for(model).mask_id(options.mask_token_id, tokenizer)
    return Screen(sys.stderr, tokenizer, mask_id, options.gen_length)
