"""The specialised attention against the plain form and the specification in float64, on one device.

`probe.py` starts it as a process of its own and reads its exit code. It stands above `attention.py`, which
asks the probe. ``python -m sinkprune.kernels.agreement 0`` runs it by hand on GPU 0.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from sinkprune.kernels import launch, reference
from sinkprune.kernels.attention import attention
from sinkprune.kernels.launch import Tile
from sinkprune.kernels.probe import AGREES, CANNOT_ASK, DIFFERS


def disagreement(device: torch.device, *, batch: int = 2, heads: int = 8, length: int = 1000) -> str:
    """Run every variant of the specialised form on ``device``; what speaks against it first, "" if nothing
    does: it differs from the specification by more than twice what the plain form does, or from itself when
    run again."""
    known, _ = launch.device_family(device)
    for head, dtype in ((64, torch.float16), (64, torch.bfloat16), (128, torch.bfloat16)):
        (tile,) = known.tiles["attention_specialised"]["16"][str(head)]
        plain = known.tiles["attention"]["16"][str(head)][0]
        whole = -(-length // tile.block_n) * tile.block_n
        for keys, kv_heads, kept in (
            (length, 2, False),
            (whole, heads, False),
            (length, 2, True),
            (whole, 1, True),
        ):
            q, k, v = (
                torch.randn(batch, n, h, head, device=device).to(dtype).transpose(1, 2)
                for n, h in ((length, heads), (keys, kv_heads), (keys, kv_heads))
            )
            options: dict[str, Tensor] = {}
            if kept:
                options["kept_heads"] = torch.arange(0, heads, 3, device=device)
                options["kv_head_of"] = torch.arange(heads, device=device).flip(0) % kv_heads
            against = _compare(q, k, v, tile, plain, options)
            if against:
                some = "some" if kept else "all"
                return f"{dtype} {tuple(q.shape)} against {keys} keys, {some} heads: {against}"
    return ""


def _compare(q: Tensor, k: Tensor, v: Tensor, tile: Tile, plain: Tile, options: dict[str, Tensor]) -> str:
    scale = q.shape[-1] ** -0.5
    first, again, other = (
        attention(q, k, v, scale=scale, tile=choice, **options) for choice in (tile, tile, plain)
    )
    exact = reference.attention(q.double(), k.double(), v.double(), **options)
    for i, part in enumerate(("output", "lse")):
        error, allowed = _largest(first[i], exact[i]), _largest(other[i], exact[i])
        if not error <= 2 * allowed + 1e-5:
            return f"the {part} is off by {error:.1e}, the plain form's by {allowed:.1e}"
        if not torch.equal(first[i], again[i]):
            return f"the {part} changes from run to run"
    return ""


def _largest(x: Tensor, exact: Tensor) -> float:
    """The largest difference from ``exact``; infinity where one has an infinity or NaN and the other not."""
    finite = torch.isfinite(exact)
    if not torch.equal(finite, torch.isfinite(x)):
        return float("inf")
    return float((x.double() - exact)[finite].abs().max())


def main(index: int) -> int:
    """Exit code of the child process; it prints what it found."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        print(f"there is no CUDA device {index}")
        return CANNOT_ASK
    device = torch.device("cuda", index)
    try:
        torch.zeros(1, device=device)
        torch.manual_seed(0)
    except RuntimeError as error:  # another process may have the device to itself
        print(str(error).splitlines()[0])
        return CANNOT_ASK
    try:
        with torch.cuda.device(index):
            against = disagreement(device)
    except torch.OutOfMemoryError:
        print("no memory left on the device")
        return CANNOT_ASK
    print(against or "the specialised form agrees with the specification")
    return DIFFERS if against else AGREES


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
