"""A model for lm-eval: likelihood by the Monte Carlo bound, and generation by denoising.

    import lm_eval
    from sinkprune.lm_eval_model import LMEvalModel
    model, tokenizer = sp.load("path/to/LLaDA-8B")
    lm_eval.simple_evaluate(model=LMEvalModel(model, tokenizer), tasks=["hellaswag"])

Not imported by anything else: lm-eval is no dependency of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sinkprune.adapters import adapter_for
from sinkprune.evaluation.generation_quality import infill
from sinkprune.evaluation.predictions import Measurement, bound_masks
from sinkprune.generation.batches import batches_of, part_of
from sinkprune.generation.denoising import decode, denoise, encode_prompts

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ImportError("evaluating with lm-eval needs it installed: pip install lm-eval") from error


class LMEvalModel(LM):
    """A masked diffusion model behind lm-eval's interface, evaluated as LLaDA is (arXiv 2502.09992, B.5).

    The log-likelihood of a continuation is the Monte Carlo bound given the prompt: of its L tokens l are
    masked, l uniform in 1..L (stratified over the draws), and the log-probabilities of the masked ones are
    scaled by L / l. Masks depend on ``seed`` and L alone, so models pair. Prompts too long for the context
    lose their beginning.

    Args:
        model: of a known family.
        tokenizer: of the model.
        draws: masks a continuation; equal ones are run once.
        batch: sequences per forward.
        check_greedy: also restore the continuation token by token, the surest first, for tasks that ask
            whether it is the greedy one (L more forwards); False answers that it is not.
        steps, gen_length: of ``generate_until``, whatever number of tokens the task asks for; steps None =
            ``denoise``'s.
        mask_token_id: instead of the config's; where that names none, the tokenizer's is taken.
        seed: of the masks, and of the sampler where it draws.
        options: other options of ``denoise``.

    Raises:
        ValueError: sizes out of range, or no tokenizer or mask token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        draws: int = 128,
        batch: int = 32,
        check_greedy: bool = False,
        steps: int | None = None,
        gen_length: int = 128,
        mask_token_id: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self._adapter = adapter_for(model)
        mask_id = self._adapter.mask_id(mask_token_id, tokenizer)
        if tokenizer is None:
            raise ValueError("lm-eval's tasks are text: a tokenizer is needed")
        if min(draws, batch) < 1:
            raise ValueError(f"draws and batch must be at least 1, got {draws} and {batch}")
        self._model, self._tokenizer, self._mask_id = model, tokenizer, mask_id
        self._draws, self._batch, self._check_greedy, self._seed = draws, batch, check_greedy, seed
        self._gen_length = gen_length
        sampler = {"steps": steps, "gen_length": gen_length, "mask_token_id": mask_id, "seed": seed}
        self._sampler = sampler | options
        self._measure = Measurement(model, mask_id, batch, _silent)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """``(log-likelihood, is greedy)`` of the second argument of each request, given the first."""
        results = []
        for request in tqdm(requests, desc="likelihood", disable=disable_tqdm):
            prompt, continuation = self._encode_pair(*request.args)
            result = self._bound(prompt, continuation), self._is_greedy(prompt, continuation)
            self.cache_hook.add_partial("loglikelihood", request.args, result)
            results.append(result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text on its own, in pieces of the model's context."""
        results = []
        for request in tqdm(requests, desc="likelihood", disable=disable_tqdm):
            ids = self._encode(request.args[0])
            context = self._adapter.geometry().context
            pieces = [ids[first : first + context] for first in range(0, len(ids), context)]
            results.append(sum(self._bound([], piece) for piece in pieces))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """New text after each prompt, up to the first of the request's stops."""
        room = self._adapter.geometry().context - self._gen_length
        if room < 1:
            raise ValueError(f"gen_length of {self._gen_length} leaves no room in the context for a prompt")
        device = self._adapter.device
        if not requests:
            return []
        ids, valid = encode_prompts(self._tokenizer, [request.args[0] for request in requests])
        ids, valid = ids[:, -room:], valid[:, -room:]
        results = [""] * len(requests)
        together = batches_of(valid, self._batch, self._adapter.block_size)
        for samples in tqdm(together, desc="generation", disable=disable_tqdm):
            rows, mask = (part.to(device) for part in part_of(ids, valid, samples))
            *_, final = denoise(self._model, rows, mask, **self._sampler)
            for sample, row in zip(samples, final[:, rows.shape[1] :].tolist(), strict=True):
                asked = requests[sample].args
                results[sample] = _until(decode(self._tokenizer, row), asked[1].get("until") or [])
                self.cache_hook.add_partial("generate_until", asked, results[sample])
        return results

    def _bound(self, prompt: list[int], continuation: list[int]) -> float:
        length = len(continuation)
        if not length:
            return 0.0
        ids, hidden = self._row(prompt, continuation)
        generator = torch.Generator().manual_seed(self._seed)
        masks = torch.zeros(self._draws, len(ids), dtype=torch.bool)
        every = torch.ones(1, length, dtype=torch.bool)
        masks[:, hidden] = bound_masks(every, self._draws, generator)
        masks, counts = masks.unique(dim=0, return_counts=True)
        losses, _ = self._measure(ids.expand(len(masks), -1), masks, None)
        return -length * ((losses * counts).sum() / self._draws).item()

    def _is_greedy(self, prompt: list[int], continuation: list[int]) -> bool:
        if not self._check_greedy or not continuation:
            return self._check_greedy
        ids, hidden = self._row(prompt, continuation)
        ids = ids[None].to(self._adapter.device)
        restored = infill(self._adapter, ids, hidden, len(continuation), self._mask_id, _silent)
        return torch.equal(restored, ids)

    def _row(self, prompt: list[int], continuation: list[int]) -> tuple[Tensor, slice]:
        """Ids ``[T]`` of both, the prompt cut on the left where the context is full; where the second is."""
        room = self._adapter.geometry().context - len(continuation)
        if room < 0:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens exceeds the context of "
                f"{room + len(continuation)}"
            )
        prompt = prompt[max(0, len(prompt) - room) :]
        ids = torch.tensor(prompt + continuation, dtype=torch.long)
        return ids, slice(len(prompt), len(ids))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode_pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both as they are in the whole text; a prompt's last spaces belong to what follows."""
        spaces = len(prompt) - len(prompt.rstrip())
        if spaces:
            prompt, continuation = prompt[:-spaces], prompt[-spaces:] + continuation
        whole, first = self._encode(prompt + continuation), self._encode(prompt)
        return first, whole[len(first) :]


def _until(text: str, stops: str | Sequence[str]) -> str:
    """``text`` up to the first place where one of ``stops`` begins."""
    ends = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def _silent(forwards: int) -> None:
    """Progress that nobody follows."""
