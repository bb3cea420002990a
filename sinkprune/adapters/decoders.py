"""The native families of ``models/decoder.py``: one class, and a line for each."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.native import NativeBlockCausal
from sinkprune.models.caches import Cache
from sinkprune.models.decoder import Decoder, DecoderConfig
from sinkprune.models.fast_dllm import FastDLLMConfig
from sinkprune.models.nemotron_diffusion import NemotronDiffusionConfig
from sinkprune.models.sdar import SDARConfig
from sinkprune.models.stable_diffcoder import StableDiffCoderConfig
from sinkprune.models.wedlm import WeDLMConfig


class NativeDecoder(NativeBlockCausal):
    """Who sees whom is what the config's ``VARIES.sees`` says; ``predict(rows=…)`` takes the tokens before
    the first of ``rows`` as context where that matters."""

    MODEL = Decoder
    norm_names = ("q_norm", "k_norm")

    def _logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: slice,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits of ``rows`` of ids ``[B, L]``, which are the tokens from the window's first on."""
        order = self._order(input_ids, rows, 0 if cache is None else cache.window[0])
        wanted = torch.arange(input_ids.shape[1], device=input_ids.device)[rows]
        if self.shift:
            wanted = (wanted - 1).clamp(min=0)
        elif self.seeds and rows.start:  # the context's last row is about the first of ``rows``
            wanted = torch.cat((wanted[:1] - 1, wanted[1:]))
        output = self.model(input_ids, attention_mask, wanted, positions=positions, order=order, cache=cache)
        return cast(Tensor, output.logits)

    def _order(self, ids: Tensor, rows: slice, first: int) -> Tensor | None:
        """Order int64 ``[B, L]`` by which tokens see those before them; None where blocks say it."""
        sees, (batch, length) = self.model.config.VARIES.sees, ids.shape
        index = torch.arange(first, first + length, device=ids.device).expand(batch, -1)
        if sees == "context":
            return torch.where(index - first < (rows.start or 0), index, first + length - 1)
        if sees == "masks last":
            if self.mask_token_id is None:
                raise ValueError(
                    f"{self.family}: the config names no mask token, and masked tokens come last"
                )
            masked = ids.eq(self.mask_token_id)
            known = (~masked).cumsum(1)
            return first - 1 + torch.where(masked, known[:, -1:] + masked.cumsum(1), known)
        return None


class NativeContextDecoder(NativeDecoder):
    """Blocks of any length, counted from the prompt's end."""

    @property
    def block_size(self) -> None:  # type: ignore[override]
        return None

    @property
    def usual_block(self) -> int:
        return self.model.config.block_size

    @property
    def looks_ahead(self) -> bool:
        return False


def _family(config: type[DecoderConfig], family: str, facts: Facts, **own: Any) -> type[NativeDecoder]:
    """Register the adapter of a native family."""
    varies = config.VARIES
    base = NativeDecoder if varies.sees == "blocks" else NativeContextDecoder
    body = {"family": family, "facts": facts, "CONFIG": config, "shift": varies.shift, "seeds": varies.seeds}
    named = type("Native" + config.__name__.removesuffix("Config"), (base,), {**body, **own})
    named.__module__ = __name__
    return cast(type[NativeDecoder], register_adapter(named))


NativeSDAR = _family(SDARConfig, "sdar", Facts("SDAR-1.7B, 4B, 8B"))
NativeFastDLLM = _family(FastDLLMConfig, "fast_dllm_qwen", Facts("Fast-dLLM v2 1.5B, 7B"))
NativeStableDiffCoder = _family(StableDiffCoderConfig, "stable_diffcoder", Facts("Stable-DiffCoder-8B"))
NativeWeDLM = _family(
    WeDLMConfig,
    "wedlm",
    Facts("WeDLM-7B, 8B", sampler="causal by reordering: what is masked comes last; blocks of your length"),
)
NativeNemotronDiffusion = _family(
    NemotronDiffusionConfig,
    "nemotron_labs_diffusion",
    Facts(
        "Nemotron-Labs-Diffusion-3B, 8B, 14B",
        sampler="blocks of your length after a causal context, which gives each its first token",
    ),
)
