"""Prune a random checkpoint of LLaDA-8B's proportions a block at a time, and say what it took.

    python benchmarks/scale_check.py --layers 8 --width 1024 --out benchmarks/results/cpu-epyc-2
    python benchmarks/scale_check.py --layers 32 --width 4096 --out FOLDER   # LLaDA-8B's own shape: 16 GB

    python benchmarks/scale_check.py --layers 32 --width 4096 --out FOLDER   # LLaDA-8B: 16 GB of weights
its own, whose anonymous memory is sampled, loads the result, and writes ``scale.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import sinkprune as sp
from sinkprune.checkpoints.layout import INDEX, lay_out_config
from sinkprune.files import write_whole

LLADA = {"d_model": 4096, "n_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464}


def write_checkpoint(folder: Path, layers: int, width: int) -> int:
    """Random weights of LLaDA-8B's proportions with its names, one shard a block; the bytes of them."""
    scale = width / LLADA["d_model"]
    sizes = {k: round(v * scale) for k, v in LLADA.items()} | {"n_layers": layers}
    config = {**sizes, "model_type": "llada", "max_sequence_length": 4096, "mask_token_id": 1}
    model, generator = lay_out_config(config), torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        block = re.search(r"blocks\.(\d+)\.", name)
        shards.setdefault("outside" if block is None else f"block-{int(block[1]):03d}", {})[name] = tensor
    weight_map, total = {}, 0
    for shard, tensors in shards.items():
        made = {
            name: torch.ones(t.shape, dtype=torch.bfloat16)
            if t.dim() == 1
            else torch.randn(t.shape, generator=generator).mul_(0.02).bfloat16()
            for name, t in tensors.items()
        }
        save_file(made, folder / f"{shard}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(made, f"{shard}.safetensors")
        total += sum(t.nbytes for t in made.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def anonymous(process: int) -> int:
    """Bytes of the process's anonymous pages, 0 when it is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 0


def prune(folder: Path, out: Path, ids: str, options: argparse.Namespace) -> dict[str, object]:
    """Run the verb on ``folder``; seconds, the most memory, and what the verb said of both."""
    command = [sys.executable, "-c", RUN, str(folder), str(out), ids, str(options.ratio)]
    command += [str(options.windows), str(options.length)]
    started, most, lines = time.monotonic(), [0, 0], []
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def watch() -> None:
        while child.poll() is None:
            most[0] = max(most[0], anonymous(child.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert child.stdout is not None
    for line in child.stdout:
        print(line, end="", flush=True)
        lines.append(json.loads(line))
    if child.wait():
        sys.exit(f"scale_check.py: the run ended with code {child.returncode}")
    watcher.join()
    told = {key: value for line in lines for key, value in line.items()}
    return told | {"seconds": time.monotonic() - started, "most_bytes": most[0]}


RUN = """
import json, sys, time
import torch, sinkprune as sp
from sinkprune.checkpoints import streaming
folder, out, ids, ratio, windows, length = sys.argv[1:]
streaming.give_memory_back()
blocks = {}
def progress(what, layer):
    blocks.setdefault(what, []).append(time.monotonic())
model, _ = streaming.opened(folder, out, progress=progress)
text = torch.randint(2, int(ids), (20_000,), generator=torch.Generator().manual_seed(0))
rows = sp.calibrate(model, text, length=int(length), sequences=int(windows))
base = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
said = streaming.peak_bytes(model, rows, kept_channels=1 - float(ratio)) - next(model.parameters()).nbytes
print(json.dumps({"base_bytes": base, "said_bytes": base + said}), flush=True)
streaming.begin(out, {})
options = {"ratio": float(ratio), "unit": "parameters", "targets": ("heads", "mlp")}
plan = streaming.planned(out, lambda: sp.plan(model, calibration=rows, **options))
streaming.prune_streamed(model, plan, out, calibration=rows)
per = {f"{what}_seconds_per_block": (t[-1] - t[0]) / (len(t) - 1) for what, t in blocks.items()}
print(json.dumps(per | {"planned": plan.parameters_removed}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024, help="of hidden states; LLaDA-8B's is 4096")
    parser.add_argument("--ratio", type=float, default=0.38, help="of the block parameters")
    parser.add_argument("--windows", type=int, default=32, help="each masked at three levels")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--work", type=Path, help="where the checkpoints lie meanwhile (default: a new folder)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of scale.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="scale-") as work:
        dense, pruned = Path(work) / "dense", Path(work) / "pruned"
        dense.mkdir()
        weights = write_checkpoint(dense, options.layers, options.width)
        vocabulary = json.loads((dense / "config.json").read_text())["vocab_size"]
        told = prune(dense, pruned, str(vocabulary), options)
        model, _ = sp.load(pruned)
        plan = model.prune_plan
        told["pruned_bytes"] = sum(p.nbytes for p in model.parameters())
        told["removed"] = plan.parameters_removed
    told |= {"weights_bytes": weights, "threads": torch.get_num_threads(), "torch": torch.__version__}
    told |= {k: v for k, v in vars(options).items() if k not in ("work", "out")}
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "scale.json", json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
