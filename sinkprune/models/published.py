"""Which config.json is laid out by which native model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sinkprune.models.decoder import Decoder, DecoderConfig
from sinkprune.models.dream import Dream, DreamConfig
from sinkprune.models.fast_dllm import FastDLLMConfig
from sinkprune.models.illada import ILLaDA, ILLaDAConfig
from sinkprune.models.llada import LLaDA, LLaDAConfig
from sinkprune.models.llada2 import LLaDA2, LLaDA2Config
from sinkprune.models.nemotron_diffusion import NemotronDiffusionConfig
from sinkprune.models.sdar import SDAR, SDARConfig
from sinkprune.models.stable_diffcoder import StableDiffCoderConfig
from sinkprune.models.wedlm import WeDLMConfig

LayOut = Callable[[dict[str, Any]], nn.Module]  # a model of a parsed config.json


def _decoder(config: type[DecoderConfig]) -> LayOut:
    return lambda values: Decoder(config.from_dict(values))


# by the model_type of a config.json, or by what its architectures name where another has that type
NATIVE: dict[str, LayOut] = {
    "llada": lambda config: LLaDA(LLaDAConfig.from_dict(config)),
    "Dream": lambda config: Dream(DreamConfig.from_dict(config)),
    "llada2_moe": lambda config: LLaDA2(LLaDA2Config.from_dict(config)),
    "sdar": lambda config: SDAR(SDARConfig.from_dict(config)),
    "illada": lambda config: ILLaDA(ILLaDAConfig.from_dict(config)),
    "Fast_dLLM_Qwen": _decoder(FastDLLMConfig),
    "wedlm": _decoder(WeDLMConfig),
    "nemotron_labs_diffusion": _decoder(NemotronDiffusionConfig),
    "StableDiffcoderForCausalLM": _decoder(StableDiffCoderConfig),
}


_OTHERWISE_NAMED = {  # families whose key is not their name
    "dream": "Dream",
    "fast_dllm_qwen": "Fast_dLLM_Qwen",
    "stable_diffcoder": "StableDiffcoderForCausalLM",
}


def native_of(family: str) -> str | None:
    """The key in ``NATIVE`` of an adapter's family, or None."""
    key = _OTHERWISE_NAMED.get(family, family)
    return key if key in NATIVE else None


def native_kind(config: dict[str, Any]) -> str | None:
    """The key in ``NATIVE`` of a parsed config.json, or None."""
    named = [*(config.get("architectures") or ()), config.get("model_type")]
    return next((name for name in named if name in NATIVE), None)
