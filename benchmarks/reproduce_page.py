"""The page of ``reproduce.py``, from its rows."""

from __future__ import annotations

from typing import Any

from sinkprune.evaluation.intervals import Interval, bootstrap_difference

Rows = dict[str, Any]


def page(rows: Rows, settings: dict[str, Any], keys: list[str]) -> str:
    """Markdown of what ``rows`` hold; ``keys`` are the models' in order."""
    there = [key for key in keys if key in rows]
    parts = [_head(settings, [key for key in keys if key not in rows]), _losses(rows, there)]
    speeds = {key.removeprefix("speed/"): row for key, row in rows.items() if key.startswith("speed/")}
    if speeds:
        parts.append(_speeds(speeds))
    asked = dict.fromkeys(key.split("/")[1] for key in rows if key.startswith("tasks/"))
    parts += [_tasks(rows, names, keys) for names in asked]
    return "\n\n".join(parts) + "\n"


def _head(settings: dict[str, Any], missing: list[str]) -> str:
    unit = "heads" if settings["unit"] == "heads" else "block parameters, heads and MLP channels"
    lines = [
        f"# {settings['model']}: what pruning costs",
        "",
        f"`python benchmarks/reproduce.py {settings['model']}`: {settings['ratio']:.0%} of the {unit} "
        f"removed, or zeros in {settings['sparsity']:.0%} of the blocks' weights; "
        f"{settings['sequences']} calibration windows and {settings['windows']} held-out ones of each text, "
        f"of {settings['length']} tokens, {settings['draws']} masks each. Intervals are 95 %, "
        "paired over windows; bold: 0 is outside.",
    ]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines)


def _losses(rows: Rows, there: list[str]) -> str:
    texts = list(rows[there[0]]["loss"])
    lines = [
        "| model | " + " | ".join(f"{text}, nats above dense" for text in texts)
        + " | tokens right at t = .5, % | block parameters removed | weights, MB | peak, MB |",
        "|---" * (len(texts) + 5) + "|",
    ]  # fmt: skip
    for key in there:
        row = rows[key]
        cells = []
        for text in texts:
            values = row["loss"][text]["windows"]
            if key == "dense":
                cells.append(f"{sum(values) / len(values):.3f} nats per token")
            else:
                cells.append(marked(bootstrap_difference(values, rows["dense"]["loss"][text]["windows"])))
        right = row["loss"][texts[0]]["accuracy"]
        removed = row["parameters_removed"]
        cells += [
            f"{100 * sum(right) / len(right):.1f}",
            "" if removed is None else f"{removed:.1%}",
            *(f"{row['bytes'][name] / 1e6:.1f}" for name in ("weights", "peak")),
        ]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _speeds(speeds: Rows) -> str:
    one = next(iter(speeds.values()))
    lines = [
        f"A forward of {one['batch']} x {one['length']} tokens, {one['dtype']} on {one['device']}, dense and "
        "pruned turn by turn. The ceiling is what counted arithmetic allows.",
        "",
        "| heads by | dense, ms | pruned, ms | speed-up | ceiling |",
        "|---|---|---|---|---|",
    ]
    for rule, row in speeds.items():
        names = ("dense_ms_per_step", "pruned_ms_per_step", "ratio", "ceiling")
        lines.append(f"| {rule} | {' | '.join(f'{row[name]:.2f}' for name in names)} |")
    return "\n".join(lines)


def _tasks(rows: Rows, names: str, keys: list[str]) -> str:
    """lm-eval's figures, each with 1.96 standard errors."""
    found = {key: rows[f"tasks/{names}/{key}"]["tasks"] for key in keys if f"tasks/{names}/{key}" in rows}
    columns = [
        (task, name)
        for task, values in next(iter(found.values())).items()
        for name in values
        if "_stderr" not in name
    ]
    lines = [
        f"lm-eval ({names}), ± 1.96 standard errors.",
        "",
        "| model | " + " | ".join(f"{task}, {name.split(',')[0]}" for task, name in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for key, tasks in found.items():
        lines.append(f"| {key} | {' | '.join(_figure(tasks[task], name) for task, name in columns)} |")
    return "\n".join(lines)


def _figure(values: dict[str, float], name: str) -> str:
    metric, _, filter_ = name.partition(",")
    error = values.get(f"{metric}_stderr,{filter_}")
    return f"{values[name]:.3f}" + ("" if error is None else f" ± {1.96 * error:.3f}")


def marked(value: Interval) -> str:
    mark = "**" if value.low > 0 or value.high < 0 else ""
    return f"{mark}{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]{mark}"
