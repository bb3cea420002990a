"""iLLaDA: the native one."""

from __future__ import annotations

from typing import ClassVar

from sinkprune.adapters.base import Facts, register_adapter
from sinkprune.adapters.dream import NativeDream
from sinkprune.models.dream import DreamConfig
from sinkprune.models.illada import ILLaDAConfig


@register_adapter
class NativeILLaDA(NativeDream):
    """Dream's modules without biases; a row of logits is about its own token."""

    family = "illada"
    facts = Facts("iLLaDA-8B", export="yes; heads with a modelling file of ours")
    shift = 0
    CONFIG: ClassVar[type[DreamConfig]] = ILLaDAConfig
