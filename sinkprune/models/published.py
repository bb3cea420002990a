"""Which config.json is laid out by which native model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sinkprune.models.dream import Dream, DreamConfig
from sinkprune.models.llada import LLaDA, LLaDAConfig
from sinkprune.models.llada2 import LLaDA2, LLaDA2Config
from sinkprune.models.sdar import SDAR, SDARConfig

# model_type of a config.json -> a function that lays the model out from the parsed config
NATIVE: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "llada": lambda config: LLaDA(LLaDAConfig.from_dict(config)),
    "Dream": lambda config: Dream(DreamConfig.from_dict(config)),
    "llada2_moe": lambda config: LLaDA2(LLaDA2Config.from_dict(config)),
    "sdar": lambda config: SDAR(SDARConfig.from_dict(config)),
}
