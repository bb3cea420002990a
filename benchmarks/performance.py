"""Write docs/performance.md, and README's table, from the results under benchmarks/results/.

    python benchmarks/performance.py

Every figure says whether it was measured or computed; what nobody measured is listed as that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from speed.latency_groups import geometry_of

import sinkprune as sp
from sinkprune.evaluation.footprint import longest, memory
from sinkprune.files import write_whole
from sinkprune.planning.costs import ceiling
from sinkprune.planning.hardware import data_sheet
from sinkprune.plans import LayerPlan

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
SHARES = (0.25, 0.38, 0.5)
HEADER = """# Performance

Written by `python benchmarks/performance.py` from `benchmarks/results/<device>/latency.json`; each table
names the command that measured it. *Speed-up* is the median over rounds of dense time / this time, both
timed turn by turn in one process. *Ceiling* is the ratio of counted FLOPs, *by roofs* that of the least
times by the device's own copy and matrix product, operation by operation. *Saved share* is the time saved /
the time that the ceiling would save: above 1 it is noise, or work that FLOPs leave out (RoPE, norms). The
dense side of a group is our own path with nothing removed (`sp.fuse`); "as users run it" is the unfused model
under the public sampler's step (LM head and float64 probabilities at every position).
"""
NO_GPU = """## Not measured

No GPU was at hand: every figure for A100 or H100 is unmeasured, and none is claimed. On one,
`python benchmarks/latency.py --device cuda --out benchmarks/results/<device>` and this script fill the page.
"""
UNMEASURED = "not measured"


def runs() -> list[tuple[str, dict[str, Any]]]:
    """``(device's folder, document)`` of every committed run."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/latency.json"))
    return [(path.parent.name, json.loads(path.read_text())) for path in paths]


def section(name: str, document: dict[str, Any]) -> str:
    """One run's tables, a case each."""
    lines = [
        f"## {name}",
        "",
        f"`{document['command']}`, {document['date']}, {document['device']}, {document['threads']} threads, "
        f"torch {document['versions']['torch']}, sinkprune {document['versions']['sinkprune']}.",
        "",
    ]
    if "roofs" in document:
        rates = ", ".join(f"{v / 1e12:.3g} TFLOP/s in {k}" for k, v in document["roofs"]["flops"].items())
        lines += [f"Roofs, measured: {rates}, {document['roofs']['bandwidth'] / 1e9:.3g} GB/s.", ""]
    if (ROOT / "benchmarks" / "results" / name / "latency.png").exists():
        lines += [f"![Measured against ceiling](../benchmarks/results/{name}/latency.png)", ""]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in document["rows"]:
        groups.setdefault((row["shape"], row["dtype"], row["batch"], row["length"]), []).append(row)
    for (shape, dtype, batch, length), rows in groups.items():
        lines += [
            f"### {shape}, {dtype}, {batch} x {length} tokens",
            "",
            "| level | variant | ms (20th…80th) | GFLOP/s | GB/s | peak MB | speed-up | ceiling | by roofs "
            "| saved share |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            peak = row["peak_bytes"]
            cells = [
                row["bench"],
                row["variant"],
                f"{row['median']:.2f} ({row['p20']:.2f}…{row['p80']:.2f})",
                f"{1e3 * row['tflops']:.0f}",
                f"{row['gbytes']:.1f}",
                "" if peak is None else f"{peak / 1e6:.1f}",
                f"{row['speedup']:.2f}",
                _two(row["ceiling"]),
                _two(row.get("ceiling_roofs")),
                _two(row["saved_share"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def find(
    documents: Iterable[dict[str, Any]], device: str, where: Callable[[Row], bool]
) -> list[tuple[dict[str, Any], Row]]:
    """Rows of runs on a kind of device, with their runs."""
    return [
        (document, row)
        for document in documents
        if ("--device cuda" in document["command"]) == (device == "cuda")
        for row in document["rows"]
        if where(row)
    ]


def targets(documents: list[dict[str, Any]]) -> str:
    """What was promised, beside what was measured."""
    llada = ("LLaDA-8B", 1, 1024)
    lines = ["## Targets", "", "| target | on | figure |", "|---|---|---|"]
    users = _medians(documents, "as users run it", llada)
    for what, variant in (
        ("our dense step at least 1.3x the model as users run it", "dense, fused"),
        ("38 % of the block parameters removed (heads + MLP): at least 1.9x", "heads+mlp -38%"),
    ):
        ours = _medians(documents, variant, llada)
        ours += _medians(documents, f"{variant}, graph", llada)
        figure = f"{users[0] / min(ours):.2f}x" if users and ours else UNMEASURED
        lines.append(f"| {what} | H100, bfloat16, LLaDA-8B, 1 x 1024 | {figure} |")
    gpu = _shares(documents, "cuda", "LLaDA-8B")
    levels = "layer, block and step at 25/38/50 %"
    lines.append(f"| saved share at least 0.8: {levels} | H100, bfloat16, LLaDA-8B | {gpu} |")
    busy = [r["busy"] for _, r in find(documents, "cuda", lambda r: r["variant"].endswith("graph"))]
    known = [b for b in busy if b is not None]
    figure = f"{100 * min(known):.0f} % at least" if known else UNMEASURED
    lines.append(f"| graph replay keeps the GPU at least 95 % busy | H100 | {figure} |")
    cpu = _shares(documents, "cpu", "150M")
    lines.append(f"| saved share at least 0.7: {levels} | CPU, 150M | {cpu} |")
    lines.append(f"| statistics on every 4th step cost at most 5 % | CPU, tiny | {_statistics(documents)} |")
    lines.append(f"| the LM head on masked rows pays what arithmetic says | CPU | {_head(documents)} |")
    return "\n".join([*lines, ""])


def _medians(documents: list[dict[str, Any]], variant: str, case: tuple[str, int, int]) -> list[float]:
    rows = find(documents, "cuda", lambda r: r["variant"] == variant and r["bench"].startswith("step ("))
    return [r["median"] for _, r in rows if (r["shape"], r["batch"], r["length"]) == case]


def _shares(documents: list[dict[str, Any]], device: str, shape: str) -> str:
    """Least saved share of each level, and how many rows reach the target."""
    wanted = 0.8 if device == "cuda" else 0.7
    parts = []
    for level in ("layer", "block", "step"):
        rows = find(
            documents,
            device,
            lambda r, level=level: (
                r["shape"] == shape and r["removed"] in SHARES and r["bench"].startswith(f"{level} (")
            ),
        )
        values = [r["saved_share"] for _, r in rows if r["saved_share"] is not None]
        if values:
            reached = sum(value >= wanted for value in values)
            parts.append(f"{level} {min(values):.2f} at least, {reached} of {len(values)} rows reach it")
    return "; ".join(parts) or UNMEASURED


def _statistics(documents: list[dict[str, Any]]) -> str:
    rows = find(documents, "cpu", lambda r: r["variant"] == "dense, statistics every 4th")
    parts = [
        f"{100 * (1 / r['speedup'] - 1):.1f} % ({r['shape']}, {r['batch']} x {r['length']})" for _, r in rows
    ]
    return ", ".join(parts) or UNMEASURED


def _head(documents: list[dict[str, Any]]) -> str:
    rows = find(documents, "cpu", lambda r: r["bench"] == "step (head rows)" and r["ceiling"] > 1)
    parts = [
        f"{r['speedup']:.2f}x of {r['ceiling']:.2f}x ({r['shape']}, {r['variant']} of {r['length']})"
        for _, r in rows
    ]
    return ", ".join(parts) or UNMEASURED


def computed() -> str:
    """Ceilings and memory of the 8B shapes, which need no device."""
    lines = [
        "## Computed, not measured",
        "",
        "Ceilings of a step at 1 x 1024 tokens, bfloat16, by counted FLOPs and by an H100's data sheet "
        "(989 TFLOP/s, 3.35 TB/s):",
        "",
        "| model | removed | arithmetic | by roofs |",
        "|---|---|---|---|",
    ]
    plans = {name: _plans(name) for name in ("LLaDA-8B", "Dream-7B")}
    for name, chosen in plans.items():
        for what, plan in chosen.items():
            geometry = plan.geometry
            pair = [ceiling(geometry, plan, 1, 1024, roofs) for roofs in (None, data_sheet("H100"))]
            lines.append(f"| {name} | {what} | {pair[0]:.2f}x | {pair[1]:.2f}x |")
    lines += [
        "",
        "Peak memory of generation (`sp.memory`; the operations of the native models counted one by one, and "
        "checked on a CPU against what they allocate), and the longest sequence on 80 GB, batch 1, bfloat16. "
        "Contexts end far below (LLaDA's at 4,096 tokens), so the room is for batches: their tokens count "
        "like those of one sequence.",
        "",
        "| model | removed | weights, GB | peak at 4,096 tokens, GB | longest, LM head on 128 rows "
        "| longest, on every row |",
        "|---|---|---|---|---|---|",
    ]
    for name, chosen in plans.items():
        geometry = next(iter(chosen.values())).geometry
        for what, plan in {"nothing": None, **chosen}.items():
            if what.endswith("% of the heads"):
                continue
            needed = memory(geometry, plan, length=4096, head_rows=128)
            block, every = (longest(geometry, 80 * 10**9, plan, head_rows=r) for r in (128, None))
            cells = [name, what, f"{needed.weights / 1e9:.2f}", f"{needed.peak / 1e9:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {block:,} | {every:,} |")
    return "\n".join([*lines, ""])


def _plans(shape: str) -> dict[str, sp.PrunePlan]:
    """Plans by size alone: a share of the heads, or of heads and channels alike."""
    geometry = geometry_of(shape)
    plans = {}
    for what, channels_too in (("38 % of the heads", False), ("38 % of heads and channels", True)):
        layers = []
        for heads, channels in zip(geometry.heads, geometry.channels, strict=True):
            left = heads - round(0.38 * heads)
            width = list(range(channels - round(0.38 * channels))) if channels_too else None
            layers.append(
                LayerPlan([i * heads // left for i in range(left)], width)
            )  # spread over the groups
        plans[what] = sp.PrunePlan(geometry, "", layers)
    return plans


def readme_table(found: list[tuple[str, dict[str, Any]]]) -> str:
    """The rows of 38 % and of what users run, of every run's last shape (and generation, of any)."""
    lines = ["| device | shape | level | variant | speed-up | ceiling |", "|---|---|---|---|---|---|"]
    for name, document in found:
        seen = set()
        for row in document["rows"]:
            level = row["bench"].split(" (")[0]
            wanted = row["removed"] == 0.38 or row["variant"] == "as users run it"
            key = (row["shape"], row["bench"], row["variant"])
            last = row["shape"] == document["rows"][-1]["shape"] and level in ("layer", "block", "step")
            if not (last or level == "generation") or not wanted or key in seen:
                continue
            seen.add(key)
            cells = [name, f"{row['shape']}, {row['batch']} x {row['length']}", level, row["variant"]]
            lines.append(f"| {' | '.join(cells)} | {row['speedup']:.2f}x | {_two(row['ceiling'])}x |")
    commands = "; ".join(f"`{document['command']}`, {document['date']}" for _, document in found)
    gpu = any("--device cuda" in document["command"] for _, document in found)
    tail = "" if gpu else " A100 and H100: not measured."
    lines += [
        "",
        f"Over our own dense path, from {commands}.{tail} "
        "All rows, and targets met or not: [docs/performance.md](docs/performance.md).",
    ]
    return "\n".join(lines)


def between(text: str, inner: str) -> str:
    """``text`` with what lies between README's two markers replaced. Raises ``ValueError`` without them."""
    start, end = "<!-- performance -->", "<!-- end performance -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md must have one {start} and one {end}")
    before, rest = text.split(start)
    return f"{before}{start}\n{inner}\n{end}{rest.split(end)[1]}"


def main() -> None:
    found = runs()
    documents = [document for _, document in found]
    parts = [HEADER, targets(documents), *(section(*run) for run in found), computed()]
    if not any("--device cuda" in document["command"] for document in documents):
        parts.append(NO_GPU)
    write_whole(ROOT / "docs" / "performance.md", "\n".join(parts))
    readme = ROOT / "README.md"
    write_whole(readme, between(readme.read_text("utf-8"), readme_table(found)))
    print(f"wrote docs/performance.md and README's table from {len(found)} run(s)")


if __name__ == "__main__":
    main()
