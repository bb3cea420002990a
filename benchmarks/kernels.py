"""Time the three kernels on a GPU against what users run today, and judge each figure against its target.

    python benchmarks/kernels.py --out benchmarks/results/h100 [--quick] [--only skip,mass]

Needs a CUDA device; without one it says so and exits with code 2. Every variant of a shape runs once per
round, all rounds interleaved, L2 flushed before each launch, timed by device events; calls under 100
microseconds are captured in a CUDA graph of several repetitions. Medians with the 20th and 80th percentiles
go to ``kernels.json``, with the device, versions and the commit; a table goes to the terminal. Nothing is
estimated: what did not run has no number.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune import ops
from sinkprune.evidence.sinks import SinkTracker
from sinkprune.kernels import roofline

MODELS = {"LLaDA-8B": (32, 32, 128), "Dream-7B": (28, 4, 128)}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_LENGTHS = (1024, 4096)
TILE_ROWS = 128
UPDATE = (32, 32, 4096)  # layers, heads, keys
ROUNDS, QUICK_ROUNDS = 60, 20
GRAPH_CALLS = 10


@dataclass
class Timing:
    """Microseconds of one variant: median, 20th and 80th percentile, and rounds timed."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass
class Target:
    """One figure against its bound: ``value`` must be at most (or at least) ``bound``."""

    name: str
    shape: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass
class Results:
    """What a run gathered; written to disk after every shape, so an interrupted run keeps what it has."""

    environment: dict[str, Any]
    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = asdict(self)
        document["targets"] = [{**asdict(t), "met": t.met} for t in self.targets]
        part = path.with_suffix(".part")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)

    def resume(self, path: Path) -> None:
        """Take over what an unfinished run in the same environment timed."""
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if before["environment"] == json.loads(json.dumps(self.environment)):
            timings = before["timings"].items()
            self.timings = {name: {v: Timing(**t) for v, t in timed.items()} for name, timed in timings}
            self.targets = [Target(**{k: v for k, v in t.items() if k != "met"}) for t in before["targets"]]
            self.skipped = before["skipped"]


def measure(
    variants: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time the variants interleaved; one that cannot run is left out, with the reason."""
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    ready: dict[str, tuple[Callable[[], object], int]] = {}
    failed: dict[str, str] = {}
    for name, call in variants.items():
        try:
            ready[name] = _prepared(call)
        except (RuntimeError, ValueError, torch.cuda.OutOfMemoryError) as error:
            failed[name] = " ".join(str(error).split())[:200]
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (call, repeats) in ready.items():
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / repeats)
    return {name: _summary(seen) for name, seen in times.items()}, failed


def _prepared(call: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """The call after warm-up; a short one as a CUDA graph of some, so that Python is not what is timed."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    if start.elapsed_time(end) > 0.3:
        return call, 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay, GRAPH_CALLS


def _summary(seen: list[float]) -> Timing:
    seen = sorted(seen)
    at = [seen[min(len(seen) - 1, int(len(seen) * share))] for share in (0.5, 0.2, 0.8)]
    return Timing(*at, rounds=len(seen))


def tensors(
    heads: int, kv_heads: int, head_dim: int, n: int, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 q, k, v as projections leave them: ``[B, L, H, D]`` in memory."""

    def one(h: int) -> Tensor:
        return torch.randn(batch, n, h, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    return one(heads), one(kv_heads), one(kv_heads)


def dense(results: Results, model: str, n: int, rounds: int) -> None:
    """Our attention, dispatch, each SDPA backend and FlexAttention, all heads."""
    q, k, v = tensors(*MODELS[model], n)
    gqa = q.shape[1] != k.shape[1]
    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.attention(q, k, v, backend="triton"),
        "dispatch": lambda: ops.attention(q, k, v),
    }
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def run(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

        variants[f"sdpa {backend.name.lower()}"] = run
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, fullgraph=True)
    variants["flex"] = lambda: flex(q, k, v, enable_gqa=gqa)
    timings = _run(results, f"dense {model} N={n}", variants, rounds)
    others = [t.median for name, t in timings.items() if name not in ("ours", "dispatch")]
    if n >= 1024 and others and "ours" in timings:
        fastest = min(others)
        _judge(
            results,
            "dense speed against the fastest",
            f"{model} N={n}",
            fastest / timings["ours"].median,
            0.7,
            False,
        )
        _judge(
            results,
            "dispatch against the fastest",
            f"{model} N={n}",
            fastest / timings["dispatch"].median,
            0.98,
            False,
        )


def skip(results: Results, model: str, n: int, rounds: int) -> None:
    """A quarter, half and three quarters of the heads kept."""
    q, k, v = tensors(*MODELS[model], n)
    heads = q.shape[1]
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    kept = {f"{share}/4": torch.arange(heads * share // 4, device="cuda") for share in (1, 2, 3)}
    variants: dict[str, Callable[[], object]] = {"all": lambda: ops.attention(q, k, v, backend="triton")}
    for name, ids in kept.items():
        variants[name] = lambda ids=ids: ops.attention(
            q, k, v, kept_heads=ids, layout="compact", backend="triton"
        )
    timings = _run(results, f"skip {model} N={n}", variants, rounds)
    for name, ids in kept.items():
        if name not in timings or "all" not in timings:
            continue
        blocks, every = (-(-n // TILE_ROWS) * h for h in (len(ids), heads))
        share = len(ids) / heads
        if blocks < 8 * sms:  # a small grid runs in whole waves
            share = max(share, -(-blocks // sms) / -(-every // sms))
        _judge(
            results,
            f"{name} of the heads",
            f"{model} N={n}",
            timings[name].median / timings["all"].median,
            1.1 * share,
        )


def mass(results: Results, model: str, n: int, rounds: int) -> None:
    """Attention with exact and sampled mass, against SDPA with other ways to get the mass."""
    q, k, v = tensors(*MODELS[model], n)
    gqa = q.shape[1] != k.shape[1]
    offset = torch.zeros(1, dtype=torch.int64, device="cuda")
    out = torch.empty(1, q.shape[1], n, device="cuda")

    def exact() -> None:
        _, lse = ops.attention(q, k, v, backend="triton")
        ops.column_mass(q, k, lse, out=out, backend="triton")

    def sampled() -> None:
        _, lse = ops.attention(q, k, v, backend="triton")
        ops.column_mass(q, k, lse, sample=16, offset=offset, out=out, backend="triton")

    def materialised() -> Tensor:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return torch.softmax((q @ keys.mT).float() * q.shape[-1] ** -0.5, -1).mean(2)

    variants: dict[str, Callable[[], object]] = {
        "attention": lambda: ops.attention(q, k, v, backend="triton"),
        "attention + exact mass": exact,
        "attention + 1/16 mass": sampled,
    }
    if n <= 4096:
        variants["sdpa + materialised"] = materialised
    colreduce = _flash_colreduce()
    if colreduce is None:
        results.skipped["flash-colreduce"] = "not installed"
    else:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)

        def peer() -> None:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
            colreduce(q, keys)

        variants["sdpa + flash-colreduce"] = peer
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    exact()
    extra = torch.cuda.max_memory_allocated() - before - q.nbytes - 4 * q.shape[1] * n
    timings = _run(results, f"mass {model} N={n}", variants, rounds)
    shape, at = f"{model} N={n}", {name: t.median for name, t in timings.items()}
    if n >= 1024:
        _judge(results, "attention + exact mass", shape, at["attention + exact mass"] / at["attention"], 1.6)
        if "sdpa + flash-colreduce" in at:
            gain = at["sdpa + flash-colreduce"] / at["attention + exact mass"]
            _judge(results, "faster than sdpa + flash-colreduce", shape, gain, 1.5, False)
    if n == 4096 and "sdpa + materialised" in at:
        gain = at["sdpa + materialised"] / at["attention + exact mass"]
        _judge(results, "faster than sdpa + materialised", shape, gain, 5.0, False)
    if n >= 4096:
        _judge(results, "attention + 1/16 mass", shape, at["attention + 1/16 mass"] / at["attention"], 1.05)
    if n == 1024:
        more = at["attention + 1/16 mass"] - at["attention"]
        _judge(results, "1/16 mass, microseconds more", shape, more, 6.0)
    # Partial sums of query shares, at most 32 of them, are linear in N.
    _judge(results, "extra bytes per head and key", shape, extra / (q.shape[1] * n), 4.0 * 33)


def update(results: Results, rounds: int) -> None:
    """One step of 32 layers x 32 heads x 4096 keys."""
    layers, heads, keys = UPDATE
    tracker = SinkTracker(layers, heads, 1, keys, "cuda")
    for buffer in tracker.mass:
        buffer.copy_(torch.softmax(torch.randn_like(buffer) * 3, -1))
    timings = _run(results, "sink_update 32x32x4096", {"end_step": tracker.end_step}, rounds)
    _judge(results, "sink_update, microseconds", "32x32x4096", timings["end_step"].median, 15.0)


def ragged(results: Results, n: int, rounds: int) -> None:
    """Ragged groups: our map against gathered keys and PyTorch's fastest."""
    q, k, v = tensors(20, 4, 128, n)
    groups = torch.tensor([0] * 8 + [1] * 2 + [2] * 7 + [3] * 3, device="cuda")
    variants: dict[str, Callable[[], object]] = {
        "our map": lambda: ops.attention(q, k, v, kv_head_of=groups, backend="triton"),
        "gather + sdpa": lambda: ops.attention(q, k, v, kv_head_of=groups, backend="sdpa"),
        "dispatch": lambda: ops.attention(q, k, v, kv_head_of=groups),
    }
    timings = _run(results, f"ragged N={n}", variants, rounds)
    fastest = min(t.median for name, t in timings.items() if name != "dispatch")
    _judge(
        results,
        "ragged dispatch against the faster",
        f"N={n}",
        fastest / timings["dispatch"].median,
        0.98,
        False,
    )


def _flash_colreduce() -> Callable[..., Tensor] | None:
    if importlib.util.find_spec("flash_colreduce") is None:
        return None
    module = importlib.import_module("flash_colreduce")
    return getattr(module, "flash_colreduce", None) or getattr(module, "column_mean", None)


def _run(
    results: Results, name: str, variants: dict[str, Callable[[], object]], rounds: int
) -> dict[str, Timing]:
    timings, failed = measure(variants, rounds)
    results.timings[name] = timings
    results.skipped |= {f"{name}: {variant}": reason for variant, reason in failed.items()}
    print(
        name,
        *(f"  {v:28} {t.median:9.1f} us  [{t.p20:.1f}, {t.p80:.1f}]" for v, t in timings.items()),
        sep="\n",
    )
    return timings


def _judge(results: Results, name: str, shape: str, value: float, bound: float, at_most: bool = True) -> None:
    target = Target(name, shape, value, bound, at_most)
    results.targets.append(target)
    verdict = "met   " if target.met else "MISSED"
    print(f"  {verdict} {name}: {value:.3f} ({'<=' if at_most else '>='} {bound:.3f})")


def environment() -> dict[str, Any]:
    """Device, versions and commit, as they go into the results."""
    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "roofline": {"H100": asdict(roofline.PEAKS["H100"]), "A100": asdict(roofline.PEAKS["A100"])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json")
    parser.add_argument("--quick", action="store_true", help="two lengths, fewer rounds")
    parser.add_argument("--resume", action="store_true", help="go on where a run into --out was cut short")
    parser.add_argument("--only", default="dense,skip,mass,update,ragged", help="comma-separated parts")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    unknown = set(parts) - {"dense", "skip", "mass", "update", "ragged"}
    if unknown:
        parser.error(f"--only knows dense, skip, mass, update and ragged, got {sorted(unknown)}")
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: needs a CUDA device, and there is none", file=sys.stderr)
        sys.exit(2)
    results, path = Results(environment()), arguments.out / "kernels.json"
    if arguments.resume:
        results.resume(path)
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    works: list[tuple[str, str, Callable[[], None]]] = []
    for n in QUICK_LENGTHS if arguments.quick else LENGTHS:
        for model in MODELS:
            for part, run in (("dense", dense), ("skip", skip), ("mass", mass)):
                works.append((part, f"{part} {model} N={n}", partial(run, results, model, n, rounds)))
        works.append(("ragged", f"ragged N={n}", partial(ragged, results, n, rounds)))
    works.append(("update", "sink_update 32x32x4096", partial(update, results, rounds)))
    for part, name, work in works:
        if part in parts and name not in results.timings:
            work()
            results.write(path)
    missed = [t for t in results.targets if not t.met]
    print(f"{len(results.targets) - len(missed)} of {len(results.targets)} targets met; {path}")


if __name__ == "__main__":
    main()
