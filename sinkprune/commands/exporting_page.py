"""Where pruned models run: docs/exporting.md, from the table of targets.

python -m sinkprune.commands.exporting_page docs/exporting.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sinkprune.targets import ALL_BIASES, ARCHITECTURES, GGUF_FAMILIES, QKV, TARGETS

_HEAD = """# Exporting

A pruned model for the programs that people run models with. `python -m sinkprune.commands.exporting_page
docs/exporting.md` writes this page from `sinkprune/targets.py`, which is also what `sp.plan(fit=…)` and
`sp.export(to=…)` go by.

    sinkprune plan tiny --fit llama.cpp --ratio 0.38 --out plan.json
    sinkprune apply tiny --plan plan.json --out pruned/
    sinkprune export pruned/ --to gguf --out tiny.gguf

`--fit` makes a plan that the target can hold: whole groups of query heads, as many heads in every layer
where it needs that, sizes that divide by `tp` ranks (`--fit sglang:tp=2`), channels in multiples of `rows`
(256 for llama.cpp's K-quants; `--fit llama.cpp:rows=32` for Q8_0). The plan says what that cost, in
`details["fit"]`. It can be much: of the embedded model 38 % of the heads, repaired, cost +0.126 nat where
every layer keeps five of eight, and +0.018 where layers may differ (`--fit llama.cpp:arch=deci`; 32
held-out windows of 128 tokens, 2026-11-25), since its first layer needs all of its heads. The vocabulary is
never touched. `export` refuses what a target would drop, with the first layer and the rule, and writes
nothing then.

Without whole blocks (`sp.plan(targets="blocks")`) a model is one of fewer layers to every target, and an
ordinary folder of its family where the others are alike. `sp.load` reads it back as that, or compact with
its plan where the layers differ. A block whose projections keep a bias stays a layer. One without its MLP
alone goes with our modelling file, and into no GGUF file: llama.cpp skips the attention of such a layer too.

The default repair (`least_squares`) adds no biases, because most programs skip a bias that they do not
expect, some in silence. `repair="least_squares_bias"` and `"bias"` do add them, and go only where the table
says that they are computed.

## Targets

"Read" is the version whose source the rules come from.

"""
_COLUMNS = (
    "target", "read", "what the tests do with it", "families", "equal layers", "experts", "added biases",
    "form", "notes",
)  # fmt: skip

_GGUF = """
## GGUF, by architecture

An architecture that holds the model is chosen, the family's own first. Matrices are `f32`, `f16`, `bf16` or
`q8_0` (`--dtype`; with Q8_0 a matrix whose rows are no multiple of 32 stays float16; quantise further with
`llama-quantize`). Byte-level BPE tokenizers are written with the name of their pre-tokenizer (GPT-2's,
Llama 3's, Qwen2's); others are refused. `sp.load` reads the file back, with its plan; LLaDA and Dream files
that others wrote too.

"""

_ARCHITECTURE_COLUMNS = (
    "architecture", "layers", "heads x features", "norm of q and k", "biases", "experts",
    "`llama-diffusion-cli`",
)  # fmt: skip

_FOOT = """
### Running it

`llada`, `dream`, `llada-moe` and `rnd1` are diffusion models to llama.cpp, and its own program samples
them:

    llama-diffusion-cli -m tiny.gguf -p "My fellow citizens" --diffusion-steps 64 --diffusion-block-length 32

(Dream's schedule is `--diffusion-eps 0.001` instead of a block length. The program is not in the wheel that
the tests use: what they run is the library that it is built on.) Whole sequences run in one batch, so `-ub`
(and `-b`) must be at least the length of prompt and text. `deci` and `qwen3` are not diffusion models to
it: `attention.causal` in the file makes them see all tokens, and the sampler is yours, through the C API
(`llama_set_causal_attn`, `llama_decode` with all logits on). A `qwen3` file of SDAR runs block by block on
its cache of keys: the tokens of a block in one batch, block after block, with causal attention off. The
mask token is `tokenizer.ggml.mask_token_id`. Of a Dream file row i of the logits is about token i + 1
(`diffusion.shift_logits`).

## Folders

`--to hf` writes the config of a smaller model of the family where that can say what is left; anything else,
such as layers that differ, or a LLaDA whose heads side by side are narrower than its hidden states, goes
with `modeling_trimmed.py`, a modelling file of ours that needs transformers 5.17 alone:

    AutoModelForCausalLM.from_pretrained("exported/", trust_remote_code=True)

`--to transformers` writes a folder that `from_pretrained` loads; `--to sglang` and the others also check
that target's rules. `generation_config.json`, the tokenizer and every file of code that `auto_map` names
are copied from where the model was loaded, and never run. `sinkprune_export.json` says what was pruned, of
what, and hashes every file.

## Not done

sglang and lmdeploy were not run: what is said of them was read in the versions named above. Fewer
experts of LLaDA2 are exported where every layer keeps as many, and every group of its router, as plans of
experts do; layers that differ and have experts have no form but our own (`sp.save`). LLaDA2
has no architecture in llama.cpp.
"""


def page() -> str:
    """The text of docs/exporting.md."""
    lines = [
        f"| {t.name} | {t.source} | {t.tested} | {', '.join(t.families)} | {_yes(t.equal)} | "
        f"{t.experts or 'none can go'} | {_yes(t.biases)} | {_form(t.form, t.own_config)} | {t.notes} |"
        for t in TARGETS.values()
    ]
    families = [f"| {family} | {', '.join(names)} |" for family, names in GGUF_FAMILIES.items()]
    architectures = [
        f"| `{a.name}` | {'may differ, or have no heads' if a.ragged else 'all alike'} | "
        f"{'any' if a.free_width else 'the hidden width'} | {'needed' if a.qk_norm else 'none'} | "
        f"{_biases(a.biases, a.needs_biases)} | {_experts(a.experts)} | {_yes(a.diffusion)} |"
        for a in ARCHITECTURES.values()
    ]
    parts = [
        _HEAD,
        _table(_COLUMNS, lines),
        _GGUF,
        _table(("family", "architectures"), families),
        "\n",
        _table(_ARCHITECTURE_COLUMNS, architectures),
        _FOOT,
    ]
    return "".join(parts)


def _table(columns: tuple[str, ...], rows: list[str]) -> str:
    head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *rows]) + "\n"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _form(form: str, own_config: bool) -> str:
    if form == "gguf":
        return "one GGUF file"
    return "the family's own config" if own_config else "the family's own config, or our modelling file"


def _biases(computed: frozenset[str], needed: bool) -> str:
    if computed >= ALL_BIASES:
        return "any, but of the output of a layer without heads"
    return "none" if not computed >= QKV else f"q, k, v{' (needed)' if needed else ''}"


def _experts(experts: bool | None) -> str:
    if experts is None:
        return "none"
    return f"as many in every layer, weights {'that sum to 1' if experts else 'as they are'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m sinkprune.commands.exporting_page")
    parser.add_argument("path", type=Path, help="where to write the page")
    parser.parse_args().path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
