"""Wall-clock of pruned inference: kernel, attention layer, block, step and generation, beside its ceiling.

    python benchmarks/latency.py --device cpu --quick --out benchmarks/results/cpu
    python benchmarks/latency.py --device cuda --out benchmarks/results/h100
    python benchmarks/latency.py --device cpu --quick --out new --compare benchmarks/results/cpu/latency.json

Every group of variants is timed turn by turn in one process; a row quotes medians, ratios are medians over
rounds. If a group's own correctness check fails, no speed is printed. Writes latency.json, latency.csv and
latency.png.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sinkprune as sp
from sinkprune.costs import layer_sizes, step_flops
from sinkprune.models.llada import LLaDA, LLaDAConfig
from sinkprune.timing import interleaved

REMOVED = (0.125, 0.25, 0.38, 0.5)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 256, "n_heads": 8, "n_layers": 6, "mlp_hidden_size": 512, "vocab_size": 4096},
    "150M": {"d_model": 768, "n_heads": 12, "n_layers": 16, "mlp_hidden_size": 2048, "vocab_size": 16384},
    "LLaDA-8B": {
        "d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
    },
    "Dream-7B": {
        "d_model": 3584, "n_heads": 28, "n_kv_heads": 4, "n_layers": 28, "mlp_hidden_size": 18944,
        "vocab_size": 152064, "include_qkv_bias": True,
    },
}  # fmt: skip


@dataclass
class Row:
    """One timed variant. Times in ms; ``saved_share`` is time saved / the time that arithmetic would save."""

    bench: str
    variant: str
    shape: str
    dtype: str
    batch: int
    length: int
    removed: float
    median: float
    p20: float
    p80: float
    speedup: float  # median over rounds of the group's dense time / this time
    ceiling: float  # counted FLOPs, dense / this
    tflops: float
    gbytes: float  # weights and activations that must move, GB/s
    peak_bytes: int | None  # device memory; None on CPU
    ideal: float  # the dense median / ceiling
    saved_share: float | None


class CheckFailed(RuntimeError):
    """A group's variants do not compute the same thing: no speed is reported."""


@dataclass
class Variant:
    """One way of running a group's work: ``flops`` and ``bytes`` are counted, not measured."""

    name: str
    removed: float
    run: Callable[[], object]
    flops: float
    bytes: float


def random_model(shape: str, device: str, dtype: torch.dtype) -> LLaDA:
    """A LLaDA of the shape with seeded random weights."""
    config = LLaDAConfig.from_dict({**SHAPES[shape], "max_sequence_length": 16384, "mask_token_id": 1})
    with torch.device("meta"):
        model = LLaDA(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.02, generator=generator)
    return model


def pruned_models(model: LLaDA, targets: tuple[str, ...]) -> Iterator[tuple[str, float, LLaDA, sp.PrunePlan]]:
    """The fused dense model and its pruned forms; heads drawn from a seed, the same share of each layer."""
    kind = "+".join(targets)
    for removed in (0.0, *REMOVED):
        unit = {"unit": "parameters", "targets": targets} if "mlp" in targets else {"unit": "heads"}
        plan = sp.plan(model, criterion="random", ratio=removed, allocation="uniform", **unit)
        compact = _share(model)
        sp.apply(compact, plan)
        yield ("dense, fused" if removed == 0 else f"{kind} -{100 * removed:g}%"), removed, compact, plan


def _share(model: LLaDA) -> LLaDA:
    """A second model object over the same tensors."""
    with torch.device("meta"):
        other = LLaDA(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def model_groups(
    shape: str, device: str, dtype: torch.dtype, batch: int, length: int, steps: int
) -> Iterator[tuple[str, list[Variant]]]:
    """Layer, block, step and generation, for heads and for heads + MLP."""
    model = random_model(shape, device, dtype)
    geometry = sp.adapter_for(model).geometry()
    hidden = torch.randn(batch, length, geometry.hidden, device=device, dtype=dtype)
    ids = torch.randint(2, geometry.vocabulary, (batch, length), device=device)
    cos, sin = model.rotary(length, torch.device(device))
    size = hidden.element_size()
    rows = batch * length
    mid = geometry.num_layers // 2
    for targets in (("heads",), ("heads", "mlp")):
        groups: dict[str, list[Variant]] = {"layer": [], "block": [], "step": []}
        for name, removed, compact, plan in pruned_models(model, targets):
            check_same(compact, model, plan, ids[:1, : min(length, 64)])
            block = compact.blocks[mid]
            heads, kv_heads, channels = layer_sizes(geometry, mid, plan.layers[mid])
            attention = 2 * geometry.head_dim * geometry.hidden * (heads + kv_heads)
            mlp = 3 * geometry.hidden * channels
            core = 4 * rows * length * heads * geometry.head_dim
            moved = rows * geometry.hidden * 2
            groups["layer"].append(
                Variant(name, removed, _layer(block.attention, hidden, cos, sin), 2 * rows * attention + core,
                        size * (attention + moved)))  # fmt: skip
            groups["block"].append(
                Variant(name, removed, _layer(block, hidden, cos, sin), 2 * rows * (attention + mlp) + core,
                        size * (attention + mlp + moved)))  # fmt: skip
            weights = sum(p.nbytes for p in compact.parameters())
            groups["step"].append(
                Variant(
                    name, removed, _step(compact, ids), step_flops(geometry, plan, batch, length), weights
                )
            )
        if targets == ("heads",):
            full = step_flops(geometry, None, batch, length)
            users = Variant("as users run it", 0.0, _user_step(model, ids), full, groups["step"][0].bytes)
            groups["step"].append(users)
        if targets == ("heads", "mlp"):
            del groups["layer"]
        label = "+".join(targets)
        for bench, variants in groups.items():
            yield f"{bench} ({label})", variants
    if steps:
        yield "generation", generation_variants(model, batch, length, steps)


def _layer(module: nn.Module | None, hidden: Tensor, cos: Tensor, sin: Tensor) -> Callable[[], object]:
    assert module is not None
    return lambda: module(hidden, cos, sin, None)


def _step(model: LLaDA, ids: Tensor) -> Callable[[], object]:
    return lambda: model(ids).logits


def _user_step(model: LLaDA, ids: Tensor) -> Callable[[], object]:
    """A step of the public sampler: unfused projections, then float64 probabilities of every position."""

    def run() -> Tensor:
        logits = model(ids).logits
        return torch.softmax(logits.double(), dim=-1).gather(-1, logits.argmax(-1, keepdim=True))

    return run


def generation_variants(model: LLaDA, batch: int, length: int, steps: int) -> list[Variant]:
    """End to end: a prompt of half the length, one block of the other half, ``steps`` forwards."""
    prompt = torch.randint(2, model.config.vocabulary_rows, (batch, length // 2), device=model.device)
    rows = length - length // 2
    geometry = sp.adapter_for(model).geometry()
    options = {"steps": steps, "gen_length": rows}

    def lean(target: LLaDA) -> Callable[[], object]:
        return lambda: [None for _ in sp.denoise(target, prompt, **options)]

    def public() -> None:
        ids = torch.cat((prompt, prompt.new_full((batch, rows), 1)), 1)
        for _ in range(steps):
            logits = model(ids).logits
            drawn = logits.argmax(-1)
            confidence = logits.double().softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            confidence = confidence.masked_fill(ids != 1, -torch.inf)
            chosen = confidence.topk(rows // steps, -1).indices
            ids = ids.scatter(1, chosen, drawn.gather(1, chosen))

    def tracked(every: int) -> Callable[[], object]:
        def run() -> None:
            with sp.track(fused, every=every):
                for _ in sp.denoise(fused, prompt, **options):
                    pass

        return run

    def flops(plan: sp.PrunePlan | None, head_rows: int) -> float:
        full = step_flops(geometry, plan, batch, length)
        return steps * (full - 2 * batch * (length - head_rows) * geometry.hidden * geometry.vocabulary)

    weights = sum(p.nbytes for p in model.parameters()) * steps
    variants = []
    fused = model
    for targets in (("heads",), ("heads", "mlp")):
        for name, removed, compact, plan in pruned_models(model, targets):
            if removed in (0.25, 0.5) or (removed == 0 and targets == ("heads", "mlp")):
                continue
            if removed == 0:
                fused = compact
            variants.append(Variant(name, removed, lean(compact), flops(plan, rows), weights))
    return [
        *variants,
        Variant("as users run it", 0.0, public, flops(None, length), weights),
        Variant("dense, statistics every step", 0.0, tracked(1), flops(None, rows), weights),
        Variant("dense, statistics every 4th", 0.0, tracked(4), flops(None, rows), weights),
    ]


def kernel_groups(
    shape: str, device: str, dtype: torch.dtype, batch: int, length: int
) -> Iterator[tuple[str, list[Variant]]]:
    """Attention of the kept heads, and what the statistics add, on one layer's tensors."""
    config = SHAPES[shape]
    heads, kv_heads = config["n_heads"], config.get("n_kv_heads", config["n_heads"])
    dim = config["d_model"] // heads
    q = torch.randn(batch, heads, length, dim, device=device, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, length, dim, device=device, dtype=dtype) for _ in range(2))
    core = 4 * batch * length**2 * dim
    moved = q.element_size() * batch * length * dim
    variants = []
    reference, lse = sp.ops.attention(q, k, v, backend="reference")
    for removed in (0.0, *REMOVED):
        kept = list(range(heads - round(removed * heads)))
        index = torch.tensor(kept, device=device) if removed else None
        out, _ = sp.ops.attention(q, k, v, kept_heads=index, layout="compact")
        if not torch.allclose(
            out.float(), reference[:, kept].float(), atol=2e-2 if dtype != torch.float32 else 1e-4
        ):
            raise CheckFailed(f"attention of {len(kept)} of {heads} heads differs from the reference")
        name = "dense" if not removed else f"heads -{100 * removed:g}%"
        work = (core * len(kept), moved * 2 * (len(kept) + kv_heads))
        variants.append(Variant(name, removed, _attention(q, k, v, index), *work))
    yield "kernel: attention", variants

    exact = sp.ops.column_mass(q, k, lse)
    if not torch.allclose(exact.sum(-1), torch.ones_like(exact[..., 0]), atol=1e-3):
        raise CheckFailed("column mass does not sum to 1")
    dense = variants[0]
    extra = core * heads / 2
    yield (
        "kernel: statistics",
        [
            dense,
            Variant("with exact mass", 0.0, _with_mass(q, k, v, None), dense.flops + extra, 2 * dense.bytes),
            Variant("with 1/16 mass", 0.0, _with_mass(q, k, v, 16), dense.flops + extra / 16, dense.bytes),
            Variant(
                "paper's way: fp32 softmax", 0.0, _materialised(q, k, v), dense.flops + extra, dense.bytes
            ),
        ],
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None) -> Callable[[], object]:
    return lambda: sp.ops.attention(q, k, v, kept_heads=index, layout="compact")


def _with_mass(q: Tensor, k: Tensor, v: Tensor, sample: int | None) -> Callable[[], object]:
    def run() -> None:
        _, lse = sp.ops.attention(q, k, v)
        sp.ops.column_mass(q, k, lse, sample=sample)

    return run


def _materialised(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """SDPA, then the probabilities again as a float32 matrix, summed over queries."""
    group = q.shape[1] // k.shape[1]

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)
        wide = k.repeat_interleave(group, 1) if group > 1 else k
        scores = (q @ wide.transpose(-1, -2) * q.shape[-1] ** -0.5).float()
        scores.softmax(-1).sum(-2)

    return run


def check_same(compact: LLaDA, dense: LLaDA, plan: sp.PrunePlan, ids: Tensor) -> None:
    """Raise ``CheckFailed`` unless the compact model computes what the masked dense one does."""
    sp.apply(dense, plan, mode="mask")
    try:
        expected, got = dense(ids).logits.float(), compact(ids).logits.float()
    finally:
        sp.restore(dense)
    limit = 1e-4 if ids.device.type == "cpu" else 5e-2
    if (worst := (expected - got).abs().max().item()) > limit * expected.abs().max().item():
        raise CheckFailed(f"compact and masked logits differ by {worst:.2e} (plan {plan.ratio})")


def time_group(
    bench: str,
    variants: list[Variant],
    shape: str,
    device: str,
    dtype: torch.dtype,
    batch: int,
    length: int,
    rounds: int,
) -> list[Row]:
    """Interleaved timings of a group; the first variant is the one that ratios refer to."""
    timings, ratios = interleaved({v.name: v.run for v in variants}, repeats=rounds, warmup=2, device=device)
    first = variants[0]
    dense = timings[first.name].median
    rows = []
    for variant in variants:
        timing = timings[variant.name]
        peak = None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            variant.run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        ceiling = first.flops / variant.flops
        possible = dense - dense / ceiling
        ratio = ratios[variant.name]
        share = (dense - dense / ratio) / possible if variant.removed and possible else None
        rows.append(
            Row(
                bench, variant.name, shape, str(dtype).removeprefix("torch."), batch, length, variant.removed,
                timing.median, timing.p20, timing.p80, ratio, ceiling, variant.flops / timing.median / 1e9,
                variant.bytes / timing.median / 1e6, peak, dense / ceiling, share,
            )
        )  # fmt: skip
    return rows


def cases(device: str, quick: bool) -> list[tuple[str, torch.dtype, int, int, int, int]]:
    """(shape, dtype, batch, length, generation steps, rounds)."""
    if device == "cpu":
        if quick:
            return [("tiny", torch.float32, 1, 256, 8, 15), ("150M", torch.float32, 1, 256, 0, 5)]
        grid = [("tiny", torch.float32, b, n, 16, 15) for b in (1, 4, 8) for n in (256, 512)]
        return grid + [("150M", torch.float32, 1, n, 4 if n == 256 else 0, 9) for n in (256, 512, 1024)]
    lengths, batches = ((1024,), (1,)) if quick else ((256, 1024, 2048, 4096), (1, 4, 8))
    return [
        (s, torch.bfloat16, b, n, 16, 20) for s in ("LLaDA-8B", "Dream-7B") for b in batches for n in lengths
    ]


def plot(rows: list[Row], path: Path) -> None:
    """Measured speed-up against what arithmetic allows, per level; the diagonal is the ideal."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure = Figure(figsize=(5.2 * len(shapes), 4.6), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        benches = dict.fromkeys(row.bench for row in rows if row.removed)
        top = 1.0
        for i, bench in enumerate(benches):
            points = sorted(
                (r.ceiling, r.speedup) for r in rows if r.shape == shape and r.bench == bench and r.removed
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True), "o-", color=f"C{i}", markersize=4, linewidth=1, label=bench
                )
                top = max(top, *(value for point in points for value in point))
        axes.plot([1, top], [1, top], "k:", linewidth=1, label="ideal")
        axes.set(title=shape, xlabel="ceiling (counted FLOPs)", ylabel="measured speed-up over dense, fused")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def compare(rows: list[Row], old: Path) -> list[str]:
    """Lines saying how each row's ratio changed since ``old``."""
    before = {_key(row): row for row in json.loads(old.read_text())["rows"]}
    lines = []
    for row in rows:
        known = before.get(_key(asdict(row)))
        if known and row.removed:
            change = f"{known['speedup']:.3f} -> {row.speedup:.3f}"
            lines.append(
                f"{row.shape:9} {row.bench:22} {row.variant:18} B={row.batch} L={row.length}: {change}"
            )
    return lines


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("bench", "variant", "shape", "dtype", "batch", "length"))


def write(folder: Path, rows: list[Row], device: str, command: str) -> None:
    """latency.json, latency.csv and latency.png, each whole or not at all."""
    properties = (
        torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    )
    document = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": properties,
        "threads": torch.get_num_threads(),
        "versions": {
            "sinkprune": sp.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latency.json.part").write_text(json.dumps(document, indent=1) + "\n")
    os.replace(folder / "latency.json.part", folder / "latency.json")
    with (folder / "latency.csv.part").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(folder / "latency.csv.part", folder / "latency.csv")
    plot(rows, folder / "latency.png")


def table(rows: list[Row]) -> str:
    lines = [
        f"{'shape':9} {'bench':22} {'variant':28} {'B':>2} {'L':>5} {'ms':>9} {'x':>6} {'ceiling':>8}  saved"
    ]
    for r in rows:
        share = "" if r.saved_share is None else f"{r.saved_share:6.2f}"
        lines.append(
            f"{r.shape:9} {r.bench:22} {r.variant:28} {r.batch:2} {r.length:5} {r.median:9.3f} "
            f"{r.speedup:6.2f} {r.ceiling:8.2f} {share:>6}"
        )
    return "\n".join(lines)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, under three minutes on two cores")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder of latency.json, latency.csv, latency.png"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="print how ratios changed since this run"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("latency.py: error: --device cuda asked for, but torch sees no CUDA device", file=sys.stderr)
        return 2
    if options.compare and not options.compare.is_file():
        print(f"latency.py: error: --compare {options.compare} is not a file", file=sys.stderr)
        return 2
    rows: list[Row] = []
    try:
        for shape, dtype, batch, length, steps, rounds in cases(options.device, options.quick):
            with tqdm(desc=f"{shape} {batch} x {length}", unit="group") as bar:
                for build in (
                    kernel_groups(shape, options.device, dtype, batch, length),
                    model_groups(shape, options.device, dtype, batch, length, steps),
                ):
                    for bench, variants in build:
                        rows += time_group(
                            bench, variants, shape, options.device, dtype, batch, length, rounds
                        )
                        bar.update()
    except CheckFailed as error:
        print(f"latency.py: error: correctness check failed, no speed is reported: {error}", file=sys.stderr)
        return 1
    command = " ".join(["python benchmarks/latency.py", *sys.argv[1:]])
    write(options.out, rows, options.device, command)
    print(table(rows))
    if options.compare:
        print("\n".join(compare(rows, options.compare)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
