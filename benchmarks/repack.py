"""Repacking and CPU column mass: the native extension beside the PyTorch formulations it replaces.

    python benchmarks/repack.py [--device cpu|cuda] [--quick] [--out DIR]

Every variant of a case runs once per round, in turn, so that whatever else the machine does hits all of them;
medians over rounds and ratios of medians are reported. Outputs are allocated and touched beforehand. Before a
case is timed its variants must agree: bit for bit for repacking, to 1e-5 for column mass.

`of_memcpy` is the bandwidth of a variant over that of the fastest plain copy of as many bytes, measured in
the same rounds; `vs_best_torch` the best PyTorch time over the native one (above 1: native is faster).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sinkprune.ops import native, native_mass

Variants = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Layer:
    """An attention layer of a published model, and what a plan keeps of it."""

    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    kept_q: tuple[int, ...]
    kept_kv: tuple[int, ...]


def kept(heads: int, keep: int) -> tuple[int, ...]:
    """``keep`` of ``heads`` heads, spread as plans spread them: in runs of unequal length."""
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(7))
    return tuple(sorted(order[:keep].tolist()))


LAYERS = {
    "LLaDA-8B": Layer(4096, 32, 32, 128, kept(32, 20), kept(32, 20)),
    "Dream-7B": Layer(3584, 28, 4, 128, kept(28, 18), (0, 1, 3)),
}
QUICK_LAYERS = {"small": Layer(512, 8, 8, 64, kept(8, 5), kept(8, 5))}


def interleaved(variants: Variants, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which peak memory during ``call`` exceeds what was held before; None where Linux won't say."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status("VmRSS")
        call()
        return status("VmHWM") - before
    except OSError:
        return None


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of each variant, in milliseconds."""
    result = {}
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
        result[name] = {
            "median_ms": 1e3 * statistics.median(values),
            "p20_ms": 1e3 * fifths[0],
            "p80_ms": 1e3 * fifths[3],
        }
    return result


def runs(heads: tuple[int, ...]) -> list[tuple[int, int]]:
    """Consecutive heads as half-open ranges."""
    result: list[tuple[int, int]] = []
    for head in heads:
        if result and result[-1][1] == head:
            result[-1] = (result[-1][0], head + 1)
        else:
            result.append((head, head + 1))
    return result


def copies(size: int, device: str) -> Variants:
    """Plain copies of ``size`` bytes: PyTorch's, and on the CPU libc's memcpy, one thread or all."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    out = torch.empty_like(source).fill_(1)
    variants: Variants = {"copy_": lambda: out.copy_(source)}
    if device == "cpu":
        memcpy = ctypes.CDLL(None).memcpy  # ctypes lets go of the interpreter lock for the call
        memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        threads = torch.get_num_threads()
        share = -(-size // threads)
        pool = ThreadPoolExecutor(threads)

        def part(i: int) -> None:
            start = i * share
            memcpy(out.data_ptr() + start, source.data_ptr() + start, max(0, min(share, size - start)))

        variants["memcpy, 1 thread"] = lambda: memcpy(out.data_ptr(), source.data_ptr(), size)
        variants[f"memcpy, {threads} threads"] = lambda: list(pool.map(part, range(threads)))
    return variants


def repack_variants(layer: Layer, dtype: torch.dtype, device: str) -> list[tuple[Variants, Tensor]]:
    """Of ``pack_qkv`` and of ``pack_o`` of one layer: the variants, and the touched memory that all of them
    write into."""
    d, hidden = layer.head_dim, layer.hidden
    rows = [layer.q_heads * d, layer.kv_heads * d, layer.kv_heads * d]
    w = [torch.randn(r, hidden, device=device).to(dtype) for r in rows]
    wo = torch.randn(hidden, rows[0], device=device).to(dtype)
    keep = [layer.kept_q, layer.kept_kv, layer.kept_kv]
    qkv_out = torch.ones(sum(len(k) for k in keep) * d, hidden, dtype=dtype, device=device)
    o_out = torch.ones(hidden, len(layer.kept_q) * d, dtype=dtype, device=device)
    index = [torch.tensor(k, device=device) for k in keep]
    slots = list(qkv_out.split([len(k) * d for k in keep]))

    def by_index_select() -> None:
        for out, source, heads in zip(slots, w, index, strict=True):
            blocks = source.view(-1, d * hidden)
            torch.index_select(blocks, 0, heads, out=out.view(len(heads), d * hidden))

    def by_cat() -> None:
        parts = [s[a * d : b * d] for s, k in zip(w, keep, strict=True) for a, b in runs(k)]
        torch.cat(parts, out=qkv_out)

    def by_slices() -> None:
        for out, source, k in zip(slots, w, keep, strict=True):
            at = 0
            for a, b in runs(k):
                out[at : at + (b - a) * d].copy_(source[a * d : b * d])
                at += (b - a) * d

    def o_slices() -> None:
        at = 0
        for a, b in runs(layer.kept_q):
            o_out[:, at : at + (b - a) * d].copy_(wo[:, a * d : b * d])
            at += (b - a) * d

    qkv: Variants = {
        "native": lambda: native.pack_qkv(*w, None, None, None, keep[0], keep[1], d, out=qkv_out),
        "index_select": by_index_select,
        "cat of slices": by_cat,
        "copy_ of slices": by_slices,
    }
    o: Variants = {
        "native": lambda: native.pack_o(wo, layer.kept_q, d, out=o_out),
        "index_select": lambda: torch.index_select(
            wo.view(hidden, -1, d), 1, index[0], out=o_out.view(hidden, -1, d)
        ),
        "cat of slices": lambda: torch.cat(
            [wo[:, a * d : b * d] for a, b in runs(layer.kept_q)], dim=1, out=o_out
        ),
        "copy_ of slices": o_slices,
    }
    return [(qkv, qkv_out), (o, o_out)]


def require_agreement(variants: Variants, out: Tensor) -> None:
    """End where they do not all write the same bits."""
    results = []
    for call in variants.values():
        out.fill_(math.nan)
        call()
        results.append(out.clone())
    if not all(torch.equal(results[0], other) for other in results[1:]):
        raise SystemExit("the variants disagree, so no time is reported")


def time_repack(layer: Layer, dtype: torch.dtype, device: str, rounds: int) -> dict:
    """``pack_qkv`` and ``pack_o`` of one layer, each variant into the same touched memory."""
    (qkv, qkv_out), (o, o_out) = cases = repack_variants(layer, dtype, device)
    for variants, out in cases:
        require_agreement(variants, out)

    def both() -> None:
        qkv["native"]()
        o["native"]()

    size = sum(t.numel() * t.element_size() for t in (qkv_out, o_out))
    plain = copies(size, device)
    torch_pairs = {f"qkv: {name}": call for name, call in qkv.items() if name != "native"}
    torch_pairs |= {f"o: {name}": call for name, call in o.items() if name != "native"}
    parts = {"qkv: native": qkv["native"], "o: native": o["native"]}
    times = interleaved({"native": both, **parts, **torch_pairs, **plain}, rounds, device)
    table = summary(times)
    best = {
        part: min(v["median_ms"] for n, v in table.items() if n.startswith(part) and "native" not in n)
        for part in ("qkv:", "o:")
    }
    native_ms, copy_ms = table["native"]["median_ms"], min(table[n]["median_ms"] for n in plain)
    return {
        "bytes_moved": 2 * size,
        "variants": table,
        "memcpy_GB_per_s": 2 * size / copy_ms / 1e6,
        "native_GB_per_s": 2 * size / native_ms / 1e6,
        "of_memcpy": copy_ms / native_ms,
        "vs_best_torch": (best["qkv:"] + best["o:"]) / native_ms,
        "vs_best_torch_qkv": best["qkv:"] / table["qkv: native"]["median_ms"],
        "vs_best_torch_o": best["o:"] / table["o: native"]["median_ms"],
    }


def blocked_mass(q: Tensor, k: Tensor, negative_lse: Tensor, scale: float, out: Tensor) -> None:
    """The good PyTorch version: blocks of rows that stay in cache, the LSE taken off by the product."""
    b, h, lq, d = q.shape
    lk = k.shape[2]
    q, k = q.reshape(b * h, lq, d), k.reshape(b * h, lk, d)
    shift, mass = negative_lse.reshape(b * h, lq, 1), torch.zeros(b * h, lk)
    rows = max(1, min(lq, (1 << 19) // lk))
    heads = max(1, (1 << 19) // (lk * lq)) if rows == lq else 1
    for first in range(0, b * h, heads):
        group = slice(first, first + heads)
        for row in range(0, lq, rows):
            block = slice(row, row + rows)
            scores = torch.baddbmm(shift[group, block], q[group, block], k[group].mT, alpha=scale)
            mass[group] += scores.exp2_().sum(1)
    torch.div(mass.view(b, h, lk), lq, out=out)


def time_column_mass(shape: tuple[int, int, int, int], rounds: int) -> dict:
    """Exact and sampled column mass on the CPU with an LSE, beside PyTorch's ways to the same numbers."""
    b, h, length, d = shape
    q, k, v = (torch.randn(shape) for _ in range(3))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    log2e = math.log2(math.e)
    lse = flash(q, k, v)[1].contiguous() * log2e
    negative_lse = -lse
    names = ("native", "native sampled 1/16", "blocked PyTorch", "materialised softmax")
    outs = {name: torch.zeros(b, h, length) for name in names}

    def materialised() -> None:
        outs[names[3]].copy_(torch.softmax((q @ k.mT).mul_(d**-0.5), -1).mean(2))

    variants: Variants = {
        names[0]: lambda: native_mass.column_mass(q, k, lse, out=outs[names[0]]),
        names[1]: lambda: native_mass.column_mass(q, k, lse, sample=16, offset=5, out=outs[names[1]]),
        names[2]: lambda: blocked_mass(q, k, negative_lse, d**-0.5 * log2e, outs[names[2]]),
        names[3]: materialised,
        "sdpa": lambda: flash(q, k, v),
    }
    native_mass.column_mass(
        q[:, :, :32], k[:, :, :32], lse[:, :, :32]
    )  # the library loads before memory is counted
    peaks = {name: peak_growth(call) for name, call in variants.items()}
    for name in (names[0], names[2]):
        if not torch.allclose(outs[name], outs[names[3]], rtol=1e-5, atol=1e-7):
            raise SystemExit(f"{name} disagrees with the materialised softmax, so no time is reported")
    table = summary(interleaved(variants, rounds, "cpu"))
    ms = {name: table[name]["median_ms"] for name in table}
    return {
        "variants": table,
        "peak_bytes": peaks,
        "materialised_scores_bytes": 4 * b * h * length * length,
        "vs_blocked_torch": ms[names[2]] / ms[names[0]],
        "blocked_vs_materialised": ms[names[3]] / ms[names[2]],
        "sampled_over_sdpa": ms[names[1]] / ms["sdpa"],
        "exact_over_sdpa": ms[names[0]] / ms["sdpa"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and few rounds: checks, no figures"
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="folder for repack.json; default: print only")
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"nothing to measure: the extension is not there ({native.why_not()})")
    if arguments.device == "cuda" and not (torch.cuda.is_available() and native.serves("cuda")):
        raise SystemExit("nothing to measure: no CUDA device, or the extension was built without CUDA")
    rounds = 3 if arguments.quick else arguments.rounds
    layers = QUICK_LAYERS if arguments.quick else LAYERS
    report: dict = {
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": native.build_info(),
        "load_average": os.getloadavg(),
        "rounds": rounds,
        "repack": {},
        "column_mass": {},
    }
    for name, layer in layers.items():
        case = time_repack(layer, torch.bfloat16, arguments.device, rounds)
        report["repack"][name] = case
        print(
            f"repack {name}: {case['native_GB_per_s']:.1f} GB/s, {case['of_memcpy']:.0%} of memcpy; "
            f"{case['vs_best_torch']:.2f}x the best PyTorch (qkv {case['vs_best_torch_qkv']:.2f}x, "
            f"o {case['vs_best_torch_o']:.2f}x)"
        )
    shapes = [(1, 8, 1024, 64), (1, 8, 1024, 128), (1, 32, 256, 64), (1, 8, 4096, 64)]
    for shape in [] if arguments.device == "cuda" else [(1, 2, 128, 32)] if arguments.quick else shapes:
        case = time_column_mass(shape, rounds)
        report["column_mass"]["x".join(map(str, shape))] = case
        print(
            f"column mass {shape}: {case['vs_blocked_torch']:.2f}x blocked PyTorch (itself "
            f"{case['blocked_vs_materialised']:.2f}x the materialised softmax); "
            f"exact {case['exact_over_sdpa']:.0%}, sampled {case['sampled_over_sdpa']:.1%} of an SDPA call; "
            f"peak memory {case['peak_bytes']['native']} bytes, scores {case['materialised_scores_bytes']}"
        )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "repack.json").write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {arguments.out / 'repack.json'}")


if __name__ == "__main__":
    main()
