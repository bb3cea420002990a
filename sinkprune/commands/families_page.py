"""What works for which family: the table of docs/families.md, from the registered adapters.

python -m sinkprune.commands.families_page docs/families.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sinkprune.adapters import Adapter, Facts, registered
from sinkprune.adapters.live import LiveAdapter
from sinkprune.adapters.transformers_attention import TransformersAdapter
from sinkprune.commands import families_tables
from sinkprune.models.published import native_of
from sinkprune.targets import GGUF_FAMILIES

COLUMNS = (
    "family", "models", "read as", "mask", "compact", "MLP channels", "blocks", "caches", "sampler",
    "save and load", "export",
)  # fmt: skip
_HEAD = """# Families

What this package does with which models. `python -m sinkprune.commands.families_page docs/families.md` writes
this page from the registered adapters, and tests hold it to them and to what toy models of every family do.
Toys have the published structure and random weights: no published checkpoint was at hand.

- **read as**: *native* is our own code on the published tensor names and configuration keys, which `sp.load`
  reads; a *live object* is what you loaded with the model's own code, changed in place; a *transformers
  class* is one that transformers itself defines, through `sp.load` or loaded by you.
- **mask**, **compact**: the two forms of `sp.apply`. **MLP channels**: whether plans may remove them too.
- **blocks**: whether plans may take whole blocks, their attention or their MLP alone (`targets="blocks"`,
  `"attention"`, `"mlp_blocks"`).
- **caches**: names that `denoise(cache=…)` takes. Live objects keep working with the caches of their own
  code, whose keys and values shrink with the kept heads; so do transformers classes with transformers' own.
- **sampler**: what `denoise` does. Masked denoising fills blocks of your length and sees the whole sequence;
  block diffusion fills the model's own blocks, each of which sees itself and those before it.
- **export**: whether what a uniform plan leaves can be written for programs that know nothing of this package
  (`sp.export`); for which ones: [exporting.md](exporting.md).

"""


def page() -> str:
    """The text of docs/families.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    known = [adapter for adapter in registered() if adapter.facts is not None]
    for adapter in sorted(known, key=lambda a: (_KINDS.index(_kind(a)), a.family)):
        lines.append("| " + " | ".join(row(adapter)) + " |")
    table = "\n".join(lines) + "\n"
    return _HEAD + table + families_tables.variations() + families_tables.sizes() + families_tables.LEFT_OUT


_KINDS = ("native", "live object", "transformers class")


def _kind(adapter: type[Adapter]) -> str:
    if issubclass(adapter, LiveAdapter):
        return "live object"
    return "transformers class" if issubclass(adapter, TransformersAdapter) else "native"


def row(adapter: type[Adapter]) -> list[str]:
    """An adapter's cells, one for each of ``COLUMNS``; only for those with ``facts``."""
    facts, kind = adapter.facts, _kind(adapter)
    assert isinstance(facts, Facts)
    saved, exported = "yes", facts.export
    if facts.mask.startswith("no"):
        saved = "no"
    elif kind == "live object":
        has_native = native_of(adapter.family) is not None
        saved = "yes, as the native model" if has_native else "no: no native model"
        exported = "yes, as the native model" if has_native else "as GGUF: no native model"
        if not has_native and adapter.family not in GGUF_FAMILIES:
            exported = "no: no native model"
    return [
        adapter.family,
        facts.models,
        kind,
        facts.mask,
        facts.compact,
        facts.channels,
        facts.blocks,
        ", ".join(adapter.caches) or "none",
        _sampler(adapter),
        saved,
        exported,
    ]


def _sampler(adapter: type[Adapter]) -> str:
    assert adapter.facts is not None
    if adapter.facts.mask.startswith("no"):
        return "no"
    if adapter.facts.sampler:
        return adapter.facts.sampler
    if adapter.sample is not Adapter.sample:
        return "the model's own, through `profile`"
    kind = "block diffusion" if adapter.block_size is not Adapter.block_size else "masked denoising"
    return kind + (", logits a token late" if adapter.shift else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m sinkprune.commands.families_page")
    parser.add_argument("path", type=Path, help="where to write the page")
    parser.parse_args().path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
