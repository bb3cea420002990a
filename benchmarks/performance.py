"""Write docs/performance.md from the results under benchmarks/results/: what was measured, and what was not.

python benchmarks/performance.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEADER = """# Performance

Written by `python benchmarks/performance.py` from `benchmarks/results/<device>/latency.json`; each table
names the command that measured it. *Speed-up* is the median over rounds of dense time / this time, both
timed turn by turn in one process. *Ceiling* is the ratio of counted FLOPs. *Saved share* is the time
saved / the time that the ceiling would save. The dense side of a group is our own path with nothing
removed; "as users run it" is the unfused model under the public sampler's step (LM head and float64
probabilities at every position).
"""
UNMEASURED = """## Not measured

No GPU was at hand: every figure for A100 or H100 is unmeasured, and none is claimed. On one,
`python benchmarks/latency.py --device cuda --out benchmarks/results/<device>` and this script fill the page.
"""


def section(folder: Path, document: dict[str, Any]) -> str:
    lines = [
        f"## {folder.name}",
        "",
        f"`{document['command']}`, {document['date']}, {document['device']}, {document['threads']} threads, "
        f"torch {document['versions']['torch']}, sinkprune {document['versions']['sinkprune']}.",
        "",
    ]
    if (folder / "latency.png").exists():
        lines += [f"![Measured against ceiling](../benchmarks/results/{folder.name}/latency.png)", ""]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault((row["shape"], row["dtype"], row["batch"], row["length"]), []).append(row)
    for (shape, dtype, batch, length), rows in groups.items():
        lines += [
            f"### {shape}, {dtype}, {batch} x {length} tokens",
            "",
            "| level | variant | ms (20th…80th) | GFLOP/s | speed-up | ceiling | saved share |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            share = "" if row["saved_share"] is None else f"{row['saved_share']:.2f}"
            cells = [
                row["bench"],
                row["variant"],
                f"{row['median']:.2f} ({row['p20']:.2f}…{row['p80']:.2f})",
                f"{1e3 * row['tflops']:.0f}",
                f"{row['speedup']:.2f}",
                f"{row['ceiling']:.2f}",
                share,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*/latency.json"))
    parts = [HEADER] + [section(path.parent, json.loads(path.read_text())) for path in results]
    if not any("cuda" in json.loads(path.read_text())["command"] for path in results):
        parts.append(UNMEASURED)
    target = ROOT / "docs" / "performance.md"
    part = target.with_name("performance.md.part")
    part.write_text("\n".join(parts), encoding="utf-8")
    os.replace(part, target)
    print(f"wrote {target} from {len(results)} run(s)")


if __name__ == "__main__":
    main()
