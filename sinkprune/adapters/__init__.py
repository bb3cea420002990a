"""Model families. Importing this package registers every adapter file in it."""

import importlib
import pkgutil

from sinkprune.adapters.base import (
    Adapter,
    AttentionWeights,
    Facts,
    MLPWeights,
    adapter_for,
    register_adapter,
    registered,
)
from sinkprune.plans import Geometry

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Adapter",
    "AttentionWeights",
    "Facts",
    "Geometry",
    "MLPWeights",
    "adapter_for",
    "register_adapter",
    "registered",
]
