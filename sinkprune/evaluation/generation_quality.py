"""Quality of what a masked diffusion model writes: held-out text infilled and continued, against that text
and against what the dense model wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.evaluation import text_measures
from sinkprune.evaluation.intervals import Interval
from sinkprune.evaluation.text_measures import Measure
from sinkprune.generation.denoising import decode, denoise, fill
from sinkprune.generation.samplers import make_sampler
from sinkprune.generation.windows import Reader
from sinkprune.progress import bar

Scorer = Callable[[list[str]], Sequence[float]]  # nats per token of each text; NaN where it has none


@dataclass
class GenerationQuality:
    """What a model wrote, and measures of it by name.

    ``infilling_accuracy`` (share of hidden tokens restored), and for each task, ``infilling_`` and
    ``continuation_``: ``bleu`` and ``rouge_l`` against the text as it was (0…100), ``distinct_1`` and
    ``distinct_2``, and ``perplexity`` where there was a scorer.

    Attributes:
        texts: by task, what was written in each place.
        references: by task, what stood there.
        measures: by name.
    """

    texts: dict[str, list[str]]
    references: dict[str, list[str]]
    measures: dict[str, Measure]

    def minus(self, other: GenerationQuality) -> dict[str, Interval]:
        """Paired differences of all measures, this minus ``other``, with 95 % intervals over texts.

        Raises ``ValueError`` where ``other`` was given other texts or options.
        """
        self._check_pair(other)
        return {name: measure.minus(other.measures[name]) for name, measure in self.measures.items()}

    def likeness(self, other: GenerationQuality) -> dict[str, Interval]:
        """BLEU and ROUGE-L of this model's texts with those of ``other`` (the dense model) as references."""
        self._check_pair(other)
        return {
            f"{task}_{name}": measure(texts, other.texts[task]).interval()
            for task, texts in self.texts.items()
            for name, measure in (("bleu", text_measures.bleu), ("rouge_l", text_measures.rouge_l))
        }

    def summary(self) -> dict[str, Any]:
        """Each measure's value and interval: JSON-ready."""
        return {name: measure.interval()._asdict() for name, measure in self.measures.items()}

    def _check_pair(self, other: GenerationQuality) -> None:
        if self.references != other.references or self.measures.keys() != other.measures.keys():
            raise ValueError("two models' texts pair only where both were given the same texts and options")


@torch.no_grad()
def evaluate_generation(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    scorer: Scorer | None = None,
    windows: int = 32,
    prompt_length: int = 32,
    gen_length: int = 32,
    steps: int | None = None,
    batch: int = 8,
    seed: int = 0,
    mask_token_id: int | None = None,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> GenerationQuality:
    """Let ``model`` restore hidden parts of ``text``, and measure what it writes.

    Windows of ``prompt_length`` + ``gen_length`` tokens are spread evenly over the text; of separate texts
    each begins one. A continuation sees the first ``prompt_length`` tokens of a window. An infilling sees as
    many on both sides of the ``gen_length`` tokens in the middle; block-causal models, which see no later
    block, have none.

    Args:
        model: of a known family.
        tokenizer: of the model.
        text: one text, or separate ones, each at least a window long.
        scorer: gives the nats per token of each of some texts; an independent model's, like ``CausalScorer``.
        windows: of one long text; separate texts are all taken.
        prompt_length, gen_length: tokens given, at least 2, and tokens to write.
        steps: forwards for each; None = one a token.
        batch: windows that run together.
        seed: of the sampler, where it draws.
        mask_token_id: instead of the config's; where that names none, the tokenizer's is taken.
        progress: called with the number of forwards just done.
        options: other options of ``denoise``, for continuations; infilling takes the surest tokens first.

    Raises:
        ValueError: a text shorter than a window, sizes out of range, and what ``denoise`` raises.
        ImportError: without sacrebleu.
    """
    if min(windows, gen_length, batch) < 1 or prompt_length < 2:
        raise ValueError(
            "windows, gen_length and batch must be at least 1 and prompt_length at least 2, got "
            f"{(windows, gen_length, batch, prompt_length)}"
        )
    if tokenizer is None:
        raise ValueError("generated text needs a tokenizer, and the model has none")
    steps = gen_length if steps is None else steps
    rows = _windows(text, tokenizer, windows, prompt_length + gen_length)
    adapter = adapter_for(model)
    device = adapter.device
    mask_id = adapter.mask_id(mask_token_id, tokenizer)
    left = prompt_length // 2
    written: dict[str, list[Tensor]] = {"infilling": [], "continuation": []}
    if not adapter.looks_ahead:
        del written["infilling"]
    parts = rows.to(device).split(batch)
    shown = bar("generating", "forward", total=len(parts) * len(written) * steps)

    def report(count: int) -> None:
        shown.update(count)
        if progress is not None:
            progress(count)

    for part in parts:
        if "infilling" in written:
            middle = slice(left, left + gen_length)
            written["infilling"].append(
                infill(adapter, part, middle, steps, mask_id, report)[:, middle].cpu()
            )
        *_, final = denoise(
            model,
            part[:, :prompt_length],
            steps=steps,
            gen_length=gen_length,
            mask_token_id=mask_id,
            seed=seed,
            callback=lambda step: report(1),
            **options,
        )
        written["continuation"].append(final[:, prompt_length:].cpu())
    shown.close()
    start = {"infilling": left, "continuation": prompt_length}
    texts, references, measures = {}, {}, {}
    for task, parts in written.items():
        ids, truth = torch.cat(parts), rows[:, start[task] : start[task] + gen_length]
        if task == "infilling":
            measures["infilling_accuracy"] = text_measures.mean((ids == truth).double().mean(1).tolist())
        texts[task] = [decode(tokenizer, row) for row in ids.tolist()]
        references[task] = [decode(tokenizer, row) for row in truth.tolist()]
        measures |= {
            f"{task}_{name}": measure
            for name, measure in _measures(texts[task], references[task], scorer).items()
        }
    return GenerationQuality(texts, references, measures)


@torch.no_grad()
def infill(
    adapter: Adapter, ids: Tensor, rows: slice, steps: int, mask_id: int, report: Callable[[int], object]
) -> Tensor:
    """Hide the tokens ``rows`` of ids ``[B, T]`` and restore them in ``steps`` forwards, the surest first."""
    ids = ids.clone()
    ids[:, rows] = mask_id
    reader = Reader(adapter, None, None, prompt_length=0, mask_id=mask_id, cfg_scale=0.0)
    for restored, _ in fill(rows, ids, reader, make_sampler("low_confidence", 0.0, None), steps):
        ids = restored
        report(1)
    return ids


class CausalScorer:
    """A transformers causal language model as a judge: nats per token of each text, read on its own.

    Args:
        model: with ``logits`` of next tokens, in evaluation mode.
        tokenizer: of that model.
        batch: texts per forward.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch: int = 8) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[float]:
        """NaN for a text of no token. The first token counts where the tokenizer has a beginning token."""
        first = getattr(self.tokenizer, "bos_token_id", None)
        rows = [list(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        rows = [row if first is None or not row else [first, *row] for row in rows]
        result = [float("nan")] * len(rows)
        readable = [i for i, row in enumerate(rows) if len(row) > 1]
        device = next(self.model.parameters()).device
        for start in range(0, len(readable), self.batch):
            chosen = readable[start : start + self.batch]
            length = max(len(rows[i]) for i in chosen)
            # Padded on the right, which a causal model never sees before the text's end.
            ids = torch.tensor([rows[i] + [0] * (length - len(rows[i])) for i in chosen], device=device)
            logits = self.model(ids).logits[:, :-1].float()
            loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            for row, i in zip(loss, chosen, strict=True):
                result[i] = row[: len(rows[i]) - 1].double().mean().item()
        return result


def _measures(texts: list[str], references: list[str], scorer: Scorer | None) -> dict[str, Measure]:
    measures = {
        "bleu": text_measures.bleu(texts, references),
        "rouge_l": text_measures.rouge_l(texts, references),
        "distinct_1": text_measures.distinct(texts, 1),
        "distinct_2": text_measures.distinct(texts, 2),
    }
    if scorer is not None:
        measures["perplexity"] = text_measures.perplexity(scorer(texts))
    return measures


def _windows(text: str | Sequence[str], tokenizer: Any, windows: int, length: int) -> Tensor:
    """Ids int64 ``[N, length]``."""
    texts = [text] if isinstance(text, str) else list(text)
    encoded = [list(tokenizer.encode(part, add_special_tokens=False)) for part in texts]
    shortest = min(map(len, encoded), default=0)
    if shortest < length:
        raise ValueError(f"a text has {shortest} tokens, fewer than one window of {length}")
    if not isinstance(text, str):
        return torch.tensor([ids[:length] for ids in encoded])
    starts = torch.linspace(0, len(encoded[0]) - length, windows).long()
    return torch.tensor(encoded[0])[starts[:, None] + torch.arange(length)]
