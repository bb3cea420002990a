"""The least time a kernel can take: its arithmetic, memory traffic and exponentials against a GPU's peak
rates. Computed from data sheets and shapes; nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from sinkprune.kernels.roofline import PEAKS


@dataclass(frozen=True)
class Work:
    """What one call must do: floating-point operations in matrix products, bytes to and from memory,
    exponentials."""

    flops: float
    bytes: float
    exponentials: float


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
