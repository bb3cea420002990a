"""Rules that say which heads to keep. Importing this package registers every criterion file in it."""

import importlib
import pkgutil

from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, criterion_for, criterion_names, register_criterion

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Evidence", "HeadCriterion", "criterion_for", "criterion_names", "register_criterion"]
