"""2:4 sparse linear layers beside dense ones, on a GPU: PyTorch's semi-structured kernels.

    python benchmarks/semi_structured.py [--model LLaDA-8B] [--dtype bfloat16] [--quick] [--out DIR]

The matrices are those of a layer of a published model, random and pruned to 2:4 by magnitude; the rows are
those that a step of a diffusion model has: batch x tokens. Both sides are checked against the pruned matrix
in float64 first, then timed turn by turn. *Share of peak gain* is (speed-up - 1) / (2 - 1): 2:4 halves the
arithmetic. On a CPU there is no such kernel, and zeros do not make anything faster: the script says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune.files import write_whole
from sinkprune.planning.timing import interleaved
from sinkprune.pruning.sparsification.methods import Target, prune_magnitude

ROOT = Path(__file__).parent.parent
# [outputs, inputs] of a block's matrices
SHAPES = {
    "LLaDA-8B": {"q, k, v, o": (4096, 4096), "gate, up": (12288, 4096), "down": (4096, 12288)},
    "Dream-7B": {"q, o": (3584, 3584), "gate, up": (18944, 3584), "down": (3584, 18944)},
}
ROWS = (128, 256, 512, 1024, 2048, 4096, 8192)
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}  # of the largest output


def measure(shape: tuple[int, int], rows: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Both sides of one product ``[rows, inputs] x [outputs, inputs]ᵀ``; raises where they disagree."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(shape, device="cuda", generator=generator) / shape[1] ** 0.5
    pruned = prune_magnitude(weight, Target.of(0.5, "2:4")).to(dtype)
    inputs = [
        torch.randn(rows, shape[1], device="cuda", generator=generator).to(dtype) for _ in range(8)
    ]  # rotated, so that they are not all in the cache
    sparse = torch.sparse.to_sparse_semi_structured(pruned)
    exact = inputs[0].double() @ pruned.double().T
    for name, matrix in (("dense", pruned), ("2:4", sparse)):
        error = (F.linear(inputs[0], matrix).double() - exact).abs().max() / exact.abs().max()
        if error > TOLERANCE[str(dtype).removeprefix("torch.")]:
            raise RuntimeError(f"{name} {shape} x {rows} rows is wrong by {error:.1e} of the largest output")
    turns = {"dense": 0, "2:4": 0}

    def call(name: str, matrix: Tensor) -> None:
        for _ in range(8):  # one measurement, so that launches are a small part of it
            F.linear(inputs[turns[name] % 8], matrix)
            turns[name] += 1

    timings, ratios = interleaved(
        {"dense": lambda: call("dense", pruned), "2:4": lambda: call("2:4", sparse)}, repeats, 5, "cuda"
    )
    return {
        "shape": list(shape),
        "rows": rows,
        "dense_ms": timings["dense"].median / 8,
        "sparse_ms": timings["2:4"].median / 8,
        "speedup": ratios["2:4"],
        "share_of_peak_gain": ratios["2:4"] - 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="LLaDA-8B")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="two row counts, few repeats")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<device>")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "semi_structured: error: 2:4 runs on NVIDIA GPUs (compute capability 8.0 or later) only; on a "
            "CPU zeros in the weights make nothing faster",
            file=sys.stderr,
        )
        return 2
    if torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        print(f"semi_structured: error: {name} has no sparse tensor cores", file=sys.stderr)
        return 2
    rows = []
    for name, shape in SHAPES[options.model].items():
        for count in (512, 4096) if options.quick else ROWS:
            row = measure(shape, count, getattr(torch, options.dtype), 5 if options.quick else 30)
            rows.append({"matrix": name, **row})
            print(
                f"{name:12} {count:5} rows: dense {row['dense_ms']:.3f} ms, 2:4 {row['sparse_ms']:.3f} ms: "
                f"{row['speedup']:.2f}x",
                flush=True,
            )
    device = torch.cuda.get_device_name()
    folder = options.out or ROOT / "benchmarks/results" / device.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "command": " ".join(["python", "benchmarks/semi_structured.py", *sys.argv[1:]]),
        "device": device,
        "torch": torch.__version__,
        "model": options.model,
        "dtype": options.dtype,
        "rows": rows,
    }
    write_whole(folder / "semi_structured.json", json.dumps(document, indent=1) + "\n")
    print(f"wrote {folder / 'semi_structured.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
