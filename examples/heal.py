"""What training after pruning would add: a pruned model distilled from its dense one, beside the refit alone.

    python examples/heal.py --model tiny --ratio 0.38 --minutes 5
    python examples/heal.py --model small --ratio 0.5 --targets heads,mlp --minutes 60 --out healed

The pruned model, unrepaired and repaired, learns the dense model's distributions of the masked tokens
(forward Kullback-Leibler divergence, on State of the Union addresses that are not held out), by AdamW on the
matrices and norms of its blocks; embeddings and LM head stay. Printed: nats per token above the dense model,
with 95 % intervals over the same windows of text that no model was trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_tiny import speeches

import sinkprune as sp
from sinkprune.adapters import Adapter

LENGTH = 128


def stream(tokenizer: Any) -> Tensor:
    """The training addresses as one row of ids."""
    return torch.tensor(
        [id for text in speeches()[0] for id in tokenizer.encode(text, add_special_tokens=False)]
    )


def masked_rows(ids: Tensor, size: int, mask_id: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless ``(ids with masks, masked)`` ``[size, LENGTH]``; shares of masks stratified from .05 to 1."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(ids) - LENGTH, (size,), generator=generator)
        rows = ids[starts[:, None] + torch.arange(LENGTH)]
        share = torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)
        masked = torch.rand(rows.shape, generator=generator) < 0.05 + 0.95 * share[:, None] / size
        masked[:, -1] = True
        yield rows.masked_fill(masked, mask_id), masked


def block_parameters(adapter: Adapter) -> list[nn.Parameter]:
    """Of the blocks: what is neither the tokens' embeddings nor the LM head."""
    vocabulary = adapter.predict(torch.zeros(1, 2, dtype=torch.long)).shape[-1]
    return [p for p in adapter.model.parameters() if p.shape[0] != vocabulary]


def distil(
    student: nn.Module,
    teacher: nn.Module,
    ids: Tensor,
    *,
    minutes: float,
    batch: int,
    rate: float,
    seed: int,
) -> tuple[int, float]:
    """Train ``student`` in place; its steps, and the mean divergence (nats) of the last tenth of them."""
    adapter, dense = sp.adapter_for(student), sp.adapter_for(teacher)
    student.requires_grad_(False)
    learned = block_parameters(adapter)
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    started, losses = time.monotonic(), []
    for rows, masked in masked_rows(ids, batch, adapter.mask_token_id or 0, seed):
        spent = (time.monotonic() - started) / (60 * minutes)
        if spent >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (len(losses) + 1) / 20) * 0.5 * (1 + math.cos(math.pi * spent))
        with torch.no_grad():
            target = F.log_softmax(dense.predict(rows)[masked], -1)
        loss = F.kl_div(
            F.log_softmax(adapter.predict(rows)[masked], -1), target, log_target=True, reduction="batchmean"
        )
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    student.requires_grad_(True)
    last = losses[-max(1, len(losses) // 10) :]
    return len(losses), sum(last) / len(last)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Loss above dense of the pruned model, as it is and repaired, before and after training: JSON-ready."""
    dense, tokenizer = sp.load(options.model)
    ids = stream(tokenizer)
    texts = sp.texts("held_out")
    rows = sp.calibrate(dense, sp.texts("calibration"), tokenizer=tokenizer, length=LENGTH)
    targets = tuple(options.targets.split(","))
    unit = "heads" if targets == ("heads",) else "parameters"
    plan = sp.plan(dense, None, "reconstruction", options.ratio, unit, targets=targets, calibration=rows)
    before = sp.evaluate(dense, texts, tokenizer=tokenizer, windows=options.windows)
    result: dict[str, Any] = {"dense": before.nll, "block_parameters_removed": plan.parameters_removed}
    for name, calibration in (("pruned", None), ("repaired", rows)):
        model, _ = sp.load(options.model)
        sp.apply(model, plan, calibration=calibration)
        found = {"before": model}
        result[name] = {}
        for stage in ("before", "after"):
            if stage == "after":
                steps, divergence = distil(
                    found["before"], dense, ids, minutes=options.minutes, batch=options.batch,
                    rate=options.rate, seed=options.seed,
                )  # fmt: skip
                result[name] |= {"steps": steps, "divergence": divergence}
            quality = sp.evaluate(model, texts, tokenizer=tokenizer, windows=options.windows)
            result[name][stage] = quality.interval(before)._asdict()
            if stage == "after" and name == "repaired" and options.out:
                sp.save(model, options.out, tokenizer=tokenizer)
        print(row(name, result[name]), flush=True)
    return result


def row(name: str, found: dict[str, Any]) -> str:
    cells = (
        f"{f['mean']:+.3f} [{f['low']:+.3f}, {f['high']:+.3f}]" for f in (found["before"], found["after"])
    )
    return f"{name:9} {' -> '.join(cells)}  ({found['steps']} steps)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny, small or a folder (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.38)
    parser.add_argument("--targets", default="heads", help="heads, mlp or both")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each of the two")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--out", help="folder for the repaired model, trained")
    options = parser.parse_args()
    result = compare(options)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
