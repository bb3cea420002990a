"""Generation with Fast-dLLM's caches against none, dense and pruned, beside what arithmetic predicts.

    python benchmarks/cache.py --out benchmarks/results/<device>/cache.json
    python benchmarks/cache.py --quick --out cache.json

The embedded model continues windows of its held-out text at temperature 0. The six ways ({dense, pruned} x
{none, prefix, dual}) are timed turn by turn in one process. "Speed-up" is the median over rounds of the time
of the dense model without a cache over this way's; "by cache" divides that by the same model's without one.
"Predicted" is the same quotient of counted FLOPs, of the forwards that ran. A cache of a bidirectional model
is an approximation: "changed" is the share of generated tokens that differ from the same model's without it.
If a run in which nothing is reused differs from the plain one, no speed is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sinkprune as sp
from sinkprune.checkpoints.checkpoint import texts
from sinkprune.evaluation.footprint import cache_size
from sinkprune.files import write_whole
from sinkprune.models.marks import plan_of
from sinkprune.planning.timing import interleaved
from sinkprune.plans import block_parameters, layer_sizes

CACHES = (None, "prefix", "dual")


@dataclass
class Row:
    """One way of generating; times in ms of a whole generation."""

    model: str
    cache: str
    median: float
    p20: float
    p80: float
    speedup: float  # over dense, no cache
    predicted: float
    by_cache: float  # over the same model, no cache
    predicted_by_cache: float
    forwards: int
    tokens_per_forward: float
    gflop: float
    cache_bytes: int
    cache_bytes_saved: int  # against the dense model's cache
    changed: float  # share of generated tokens, against the same model without a cache


class CheckFailed(RuntimeError):
    """A cache changes text where nothing of it is reused."""


def held_out_prompts(tokenizer: Any, batch: int, length: int) -> Tensor:
    """``[batch, length]`` ids, windows evenly spread over the held-out text."""
    ids = tokenizer.encode(texts("held_out"), add_special_tokens=False)
    starts = [round(i * (len(ids) - length) / max(1, batch - 1)) for i in range(batch)]
    return torch.tensor([ids[start : start + length] for start in starts])


def counted(model: nn.Module, prompts: Tensor, options: dict[str, Any]) -> tuple[Tensor, int, int, int]:
    """One generation: its text, and the forwards, FLOPs and cache bytes it took."""
    geometry = sp.adapter_for(model).geometry()
    plan = plan_of(model)
    sizes = [layer_sizes(geometry, i, plan and plan.layers[i]) for i in range(geometry.num_layers)]
    keys = prompts.shape[1] + options["gen_length"]
    flops, seen = 0, []

    def count(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal flops
        queries = args[0].numel()
        flops += sum(2 * queries * block_parameters(geometry, *size) for size in sizes)
        flops += sum(4 * queries * keys * size[0] * geometry.head_dim for size in sizes)
        flops += 2 * len(prompts) * options["block_length"] * geometry.hidden * geometry.vocabulary

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        *_, text = sp.denoise(model, prompts, callback=seen.append, **options)
    finally:
        handle.remove()
    return text[:, prompts.shape[1] :], seen[-1].forwards, flops, seen[-1].cache_bytes


def check(model: nn.Module, prompts: Tensor, options: dict[str, Any]) -> None:
    """A step a block leaves a cache nothing to give: the text must be the plain one."""
    single = options | {"steps": options["gen_length"] // options["block_length"], "threshold": None}
    texts = [list(sp.denoise(model, prompts, **(single | {"cache": cache})))[-1] for cache in CACHES]
    if any(not torch.equal(texts[0], text) for text in texts[1:]):
        raise CheckFailed("a cached run in which nothing is reused differs from the plain one")


def measure(
    models: dict[str, nn.Module], prompts: Tensor, options: dict[str, Any], rounds: int, device: str
) -> list[Row]:
    for model in models.values():
        check(model, prompts, options)
    ways = {(name, cache): options | {"cache": cache} for name in models for cache in CACHES}
    counts = {way: counted(models[way[0]], prompts, chosen) for way, chosen in ways.items()}

    def run(way: tuple[str, str | None]) -> Callable[[], object]:
        return lambda: [None for _ in sp.denoise(models[way[0]], prompts, **ways[way])]

    names = {f"{name}, {cache or 'none'}": (name, cache) for name, cache in ways}
    timings, ratios = interleaved({label: run(way) for label, way in names.items()}, rounds, 1, device)
    rows = []
    for label, (name, cache) in names.items():
        text, forwards, flops, held = counts[name, cache]
        plain_text, _, plain_flops, _ = counts[name, None]
        dense_held = counts[next(iter(models)), cache][3]
        assert held in (0, cache_size(models[name], held_tokens(prompts, options, cache), len(prompts)).bytes)
        rows.append(
            Row(
                model=name,
                cache=cache or "none",
                **asdict(timings[label]),
                speedup=ratios[label],
                predicted=counts[next(iter(models)), None][2] / flops,
                by_cache=ratios[label] / ratios[f"{name}, none"],
                predicted_by_cache=plain_flops / flops,
                forwards=forwards,
                tokens_per_forward=text.numel() / forwards,
                gflop=flops / 1e9,
                cache_bytes=held,
                cache_bytes_saved=dense_held - held,
                changed=(text != plain_text).double().mean().item(),
            )
        )
    return rows


def held_tokens(prompts: Tensor, options: dict[str, Any], cache: str | None) -> int:
    """Tokens that a cache holds at the end: all, or those before the last block."""
    total: int = prompts.shape[1] + options["gen_length"]
    return total if cache == "dual" else total - options["block_length"]


def table(rows: list[Row]) -> str:
    lines = [
        f"{'model':16} {'cache':7} {'ms':>8} {'speed-up':>9} {'predicted':>9} {'by cache':>9} "
        f"{'predicted':>9} {'forwards':>8} {'tok/fwd':>7} {'changed':>8} {'cache':>9}"
    ]
    for r in rows:
        lines.append(
            f"{r.model:16} {r.cache:7} {r.median:8.1f} {r.speedup:9.2f} {r.predicted:9.2f} {r.by_cache:9.2f} "
            f"{r.predicted_by_cache:9.2f} {r.forwards:8} {r.tokens_per_forward:7.2f} {100 * r.changed:7.1f}% "
            f"{r.cache_bytes / 2**20:6.2f} MB"
        )
    return "\n".join(lines)


def write(path: Path, rows: list[Row], settings: dict[str, Any], device: str) -> None:
    """The JSON file, whole or not at all."""
    document = {
        "command": " ".join(["python benchmarks/cache.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": {"sinkprune": sp.__version__, "torch": torch.__version__},
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(document, indent=1) + "\n")


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny, or the folder of a LLaDA or Dream")
    parser.add_argument("--ratio", type=float, default=0.38, help="share of heads that the pruned one lacks")
    parser.add_argument("--criterion", default="magnitude")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threshold", type=float, help="parallel decoding; the forwards depend on the text")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small lengths and two rounds: does it run?")
    parser.add_argument("--out", required=True, type=Path, help="the JSON file")
    options = parser.parse_args()
    if options.quick:
        options.prompt_length, options.gen_length, options.block_length = 32, 32, 16
        options.steps, options.rounds = 8, 2
    dense, tokenizer = sp.load(options.model, device=options.device)
    pruned, _ = sp.load(options.model, device=options.device)
    sp.apply(pruned, sp.plan(pruned, criterion=options.criterion, ratio=options.ratio))
    prompts = held_out_prompts(tokenizer, options.batch, options.prompt_length).to(options.device)
    names = ("steps", "gen_length", "block_length", "threshold")
    chosen = {name: getattr(options, name) for name in names}
    models = {"dense": dense, f"heads -{100 * options.ratio:g}%": pruned}
    try:
        rows = measure(models, prompts, chosen, options.rounds, options.device)
    except CheckFailed as error:
        print(f"cache.py: error: check failed, no speed is reported: {error}", file=sys.stderr)
        return 1
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    write(options.out, rows, settings, options.device)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
