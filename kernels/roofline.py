"""The least time a kernel can take: its arithmetic, memory traffic and exponentials against a GPU's peak
rates.

Everything here is computed from data sheets and shapes; nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What one call must do: floating-point operations in matrix products, bytes to and from memory,
    exponentials."""

    flops: float
    bytes: float
    exponentials: float


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


def attention_work(batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int) -> Work:
    """Attention of ``heads`` kept heads over ``kv_heads`` key/value heads, 16-bit, with its log-sum-exp."""
    scores = float(batch * heads * queries * keys)
    traffic = 2 * head_dim * batch * (2 * heads * queries + 2 * kv_heads * keys) + 4 * batch * heads * queries
    return Work(4 * scores * head_dim, traffic, scores)


def column_mass_work(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, sample: int = 1
) -> Work:
    """Column mass of ``heads`` kept heads from a saved log-sum-exp, reading every ``sample``-th query row."""
    rows = -(-queries // sample)
    scores = float(batch * heads * rows * keys)
    traffic = 2 * head_dim * batch * (heads * rows + kv_heads * keys) + 4 * batch * heads * (rows + keys)
    return Work(2 * scores * head_dim, traffic, scores)


def sink_update_work(rows: int, keys: int) -> Work:
    """The update of ``rows`` = layers x batch x heads; the second walk over the mass comes from the cache."""
    return Work(0.0, 4.0 * rows * (keys + 2 * 22), 0.0)


def least_seconds(work: Work, gpu: str) -> tuple[float, str]:
    """``(seconds, what binds)`` for a GPU in `PEAKS`, were all three resources used in parallel."""
    peak = PEAKS[gpu]
    times = {
        "tensor cores": work.flops / peak.flops,
        "memory": work.bytes / peak.bytes,
        "exponentials": work.exponentials / peak.exponentials,
    }
    name = max(times, key=lambda key: times[key])
    return times[name], name
