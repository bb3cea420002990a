"""The README.md of a saved model: what it was, what was done to it, how to load it."""

from __future__ import annotations

from typing import Any

from sinkprune.plans import PrunePlan, model_block_parameters

CARD = "README.md"
_DONE = {"compact": "smaller matrices", "mask": "heads and channels skipped, weights as they were"}


def model_card(name: str, source: str, family: str, form: str, plan: PrunePlan | None) -> str:
    """The card's text, with the front matter that model hubs read.

    Args:
        name: the folder's name.
        source: name of the folder or hub model that it was loaded from, or ``""``.
        form: ``"dense"``, ``"mask"`` or ``"compact"``.
    """
    hub = source.partition("@")[0]
    base = [f"base_model: {hub}"] if "/" in hub else []
    lines = [
        "---",
        *base,
        "library_name: sinkprune",
        "tags: [sinkprune, diffusion-language-model]",
        "---",
        "",
    ]
    lines += [f"# {name}", "", f"A model of the family {family}{f', from {source}' if source else ''}."]
    if plan is not None and form != "dense":
        lines += ["", *_done(plan, form)]
    lines += [
        "", "Quality and speed are not stated: `sinkprune report DENSE PRUNED --out OUT` measures both.",
        "", "```python", "import sinkprune as sp", "", f'model, tokenizer = sp.load("{name}")', "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _done(plan: PrunePlan, form: str) -> list[str]:
    """What the plan removed, and how."""
    dense, left = model_block_parameters(plan.geometry), model_block_parameters(plan.geometry, plan)
    heads = sum(plan.geometry.heads)
    kept = [len(layer.kept_heads) for layer in plan.layers]
    repair: Any = plan.details.get("repair") or {}
    return [
        f"Pruned by `{plan.criterion}` ({_DONE[form]}): {heads - sum(kept)} of {heads} query heads and "
        f"{100 * (1 - left / dense):.1f} % of the block parameters are gone. Heads left, layer by layer: "
        f"{', '.join(map(str, kept))}.",
        f"What is left was repaired by `{repair['method']}`."
        if "method" in repair
        else "It was not repaired.",
    ]
