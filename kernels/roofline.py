"""What a GPU can do at most, from data sheets: nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Peak rates per second: dense 16-bit tensor-core FLOPs, memory bytes, exponentials (16 per cycle and
    SM)."""

    flops: float
    bytes: float
    exponentials: float


# Data sheets: A100 SXM 80 GB (108 SMs, 1.41 GHz boost), H100 SXM (132 SMs, 1.755 GHz boost under load) and
# H200 SXM (an H100 with faster memory).
PEAKS = {
    "A100": Peak(312e12, 2.039e12, 16 * 108 * 1.41e9),
    "H100": Peak(989e12, 3.35e12, 16 * 132 * 1.755e9),
    "H200": Peak(989e12, 4.8e12, 16 * 132 * 1.755e9),
}
