"""Before and after: quality, speed, memory and text of a dense model and its pruned form, as JSON, pictures
and HTML."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sinkprune.adapters import adapter_for
from sinkprune.evaluation.predictions import NOISE_LEVELS, Quality, evaluate
from sinkprune.evidence.profiles import SinkProfile
from sinkprune.files import write_whole
from sinkprune.generation.denoising import generate
from sinkprune.planning.costs import ceiling, ceilings, dtype_of
from sinkprune.planning.hardware import roofs
from sinkprune.planning.timing import interleaved
from sinkprune.plans import PrunePlan
from sinkprune.version import __version__

WINDOWS, LENGTH = 32, 128  # of `evaluate`
SPEED_LENGTH, ROUNDS = 256, 20  # tokens of the timed forward, and how often it is timed
STEPS, NEW_TOKENS = 64, 64  # of the sampler


def compare(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PrunePlan,
    profile: SinkProfile,
    *,
    tokenizer: Any,
    name: str,
    held_out: str,
    out_of_domain: str,
    prompts: list[str],
    block_length: int | None = None,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Everything the report says, JSON-ready.

    Args:
        dense, pruned: the same model before and after ``plan``.
        plan, profile: what was removed and the statistics behind it.
        tokenizer, name: of the model.
        held_out, out_of_domain: texts of the model's kind and of another.
        prompts: continued by both models.
        block_length: of the sampler.
        progress: called with a line before each part.
    """
    say = progress or (lambda line: None)
    quality: dict[str, Any] = {"windows": WINDOWS, "length": LENGTH, "levels": [str(t) for t in NOISE_LEVELS]}
    for label, text in (("held-out", held_out), ("out-of-domain", out_of_domain)):
        say(f"quality on {label} text")
        before, after = (
            evaluate(m, text, tokenizer=tokenizer, windows=WINDOWS, length=LENGTH) for m in (dense, pruned)
        )
        change, error = after.minus(before)
        _, low, high = after.interval(before)
        pair = {
            "dense": _quality(before),
            "pruned": _quality(after),
            "difference": {"nll": change, "nll_se": error, "nll_95": [low, high]},
        }
        quality |= pair if label == "held-out" else {"out_of_domain": pair}
    say("speed")
    speed = measure_speed(dense, pruned, plan, rounds=ROUNDS)
    for side in ("dense", "pruned"):
        seconds = speed[f"{side}_ms_per_step"] / 1e3
        speed[f"{side}_tokens_per_second"] = NEW_TOKENS / (STEPS * seconds)
    say("text")
    options: dict[str, Any] = {"steps": STEPS, "gen_length": NEW_TOKENS, "block_length": block_length}
    texts = [generate(m, tokenizer, prompts, **options) for m in (dense, pruned)]
    geometry = plan.geometry
    return {
        "version": __version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "model": {
            "name": name,
            "family": geometry.family,
            "parameters": _parameters(dense),
            "layers": geometry.num_layers,
            "total_heads": sum(geometry.heads),
            "head_dim": geometry.head_dim,
            "context": geometry.context,
        },
        "profile": profile.summary(),
        "plan": {
            "criterion": plan.criterion,
            "ratio": plan.ratio,
            "unit": plan.unit,
            "targets": list(plan.targets),
            "allocation": plan.allocation,
            "heads_removed": plan.heads_removed,
            "parameters_removed": plan.parameters_removed,
            "kept_heads": [layer.kept_heads for layer in plan.layers],
            "channels": _channel_shares(plan),
            "blocks_removed": [i for i, layer in enumerate(plan.layers) if layer.is_gone],
        },
        "quality": quality,
        "speed": {**speed, "forwards": STEPS, "new_tokens": NEW_TOKENS},
        "memory": {
            f"{side}_{what}": count(model)
            for side, model in (("dense", dense), ("pruned", pruned))
            for what, count in (("parameters", _parameters), ("bytes", _bytes))
        },
        "text": [
            {"prompt": prompt, "dense": before, "pruned": after}
            for prompt, before, after in zip(prompts, *texts, strict=True)
        ],
    }


@torch.inference_mode()
def measure_speed(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PrunePlan,
    *,
    length: int = SPEED_LENGTH,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Milliseconds of a forward of ``[1, length]``, both sides interleaved, their ratio and its
    ceiling."""
    adapter = adapter_for(dense)
    device, geometry = adapter.device.type, adapter.geometry()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, geometry.vocabulary, (1, length), generator=generator).to(device)
    timings, ratios = interleaved(
        {"dense": lambda: dense(ids), "pruned": lambda: pruned(ids)}, repeats=rounds, device=device
    )
    return {
        "batch": 1,
        "length": length,
        "device": device,
        "dtype": str(dtype_of(dense)).removeprefix("torch."),
        "rounds": rounds,
        "dense_ms_per_step": timings["dense"].median,
        "pruned_ms_per_step": timings["pruned"].median,
        "dense_p20_p80": [timings["dense"].p20, timings["dense"].p80],
        "pruned_p20_p80": [timings["pruned"].p20, timings["pruned"].p80],
        "ratio": ratios["pruned"],
        "ceiling": ceiling(geometry, plan, 1, length),
        "ceilings": ceilings(dense, plan, 1, length, roofs(device)),
    }


def write(report: dict[str, Any], plan: PrunePlan, profile: SinkProfile, folder: str | Path) -> Path:
    """Write ``report.json``, ``report.html`` (self-contained) and the pictures into ``folder``; return the
    HTML's path.

    Each file is written whole or not at all.
    """
    from jinja2 import Environment

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"heads": heads_figure(plan, profile), "positions": positions_figure(profile)}
    template = (importlib.resources.files("sinkprune") / "templates" / "report.html").read_text("utf-8")
    inline = {name: base64.b64encode(png).decode() for name, png in figures.items()}
    html = Environment(autoescape=True).from_string(template).render(r=report, figures=inline)
    files = {f"{name}.png": png for name, png in figures.items()}
    files["report.json"] = (json.dumps(report, indent=1) + "\n").encode()
    files["report.html"] = html.encode()
    for name, data in files.items():
        write_whole(folder / name, data)
    return folder / "report.html"


def heads_figure(plan: PrunePlan, profile: SinkProfile) -> bytes:
    """PNG: standard deviation of each head's sink position beside the heads that the plan keeps, and where
    MLPs lose something the share of each."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    spread = profile.head_mean("position_variance").sqrt()
    layers, heads = spread.shape
    kept, shares = torch.zeros(layers, heads), _channel_shares(plan)
    for i, layer in enumerate(plan.layers):
        kept[i, layer.kept_heads] = 1
    count = int(kept.sum())
    if min(shares) < 1:
        kept = torch.cat((kept, torch.full((layers, 1), torch.nan), torch.tensor(shares)[:, None]), dim=1)
    figure = Figure(figsize=(11, 1.6 + 0.32 * layers), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(spread.numpy(), aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=left, label="tokens")
    left.set_title("Sink position: standard deviation over steps")
    colours = LinearSegmentedColormap.from_list("kept", ["#e8ebef", "#0b6e6e"])
    right.imshow(kept.numpy(), aspect="auto", cmap=colours, vmin=0, vmax=1)
    right.set_title(f"Kept (dark): {count} of {sum(plan.geometry.heads)} heads")
    for axes in (left, right):
        axes.set(xlabel="head", ylabel="layer", xticks=range(0, heads, max(1, heads // 16)))
        axes.set_yticks(range(0, layers, max(1, layers // 16)))
    if kept.shape[1] > heads:
        right.set_xticks([*range(0, heads, max(1, heads // 16)), heads + 1])
        right.set_xticklabels([*map(str, range(0, heads, max(1, heads // 16))), "MLP"])
    right.set_xticks([i - 0.5 for i in range(1, kept.shape[1])], minor=True)
    right.set_yticks([i - 0.5 for i in range(1, layers)], minor=True)
    right.grid(which="minor", color="white", linewidth=1.5)
    right.tick_params(which="minor", length=0)
    return _png(figure)


def positions_figure(profile: SinkProfile, most_layers: int = 8) -> bytes:
    """PNG: sink position over steps, a panel per layer (evenly chosen where there are many), a line per
    head."""
    from matplotlib.figure import Figure

    layers = profile.geometry.num_layers
    count = min(layers, most_layers)
    shown = [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    share = profile.head_mean("gated_steps_counted") / profile.head_mean("steps_counted").clamp(min=1)
    for axes, layer in zip(grid.flat, shown, strict=False):
        for column, head in enumerate(profile.heads[layer]):
            position = profile.trace_positions[:, layer, column].float()
            position[position < 0] = torch.nan
            strength = float(share[layer, column])
            style = {"alpha": 0.25 + 0.75 * strength, "linewidth": 0.8 + 1.2 * strength}
            axes.plot(position.numpy(), color=f"C{head % 10}", **style)
        axes.set_title(f"layer {layer}", fontsize=10)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    figure.supxlabel("denoising step")
    figure.supylabel("sink position (token)")
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _channel_shares(plan: PrunePlan) -> list[float]:
    """Of each layer's dense MLP, the channels that are left; 1 where a layer has experts."""
    geometry = plan.geometry
    return [
        1.0 if kept.kept_channels is None or geometry.experts_of(i) else len(kept.kept_channels) / count
        for i, (kept, count) in enumerate(zip(plan.layers, geometry.channels, strict=True))
    ]


def _quality(quality: Quality) -> dict[str, Any]:
    values = {name: value for name, value in asdict(quality).items() if not name.startswith("per_window")}
    return {k: {str(t): x for t, x in v.items()} if isinstance(v, dict) else v for k, v in values.items()}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
