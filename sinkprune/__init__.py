"""Sink-aware pruning for diffusion language models: profile, plan, apply, generate.

    import sinkprune as sp
    model, tokenizer = sp.load("tiny")
    profile = sp.profile(model, ["My fellow citizens"], tokenizer=tokenizer)
    rows = sp.calibrate(model, text, tokenizer=tokenizer)
    plan = sp.plan(model, profile, ratio=0.38, calibration=rows)
    sp.apply(model, plan, calibration=rows)

Names are imported when first used, so that ``import sinkprune`` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sinkprune.version import __version__

_HOMES = {
    "adapter_for": "adapters",
    "apply": "repacking",
    "bootstrap_difference": "intervals",
    "calibrate": "calibration",
    "Calibration": "calibration",
    "ceiling": "costs",
    "CompactMLP": "modules",
    "computed_table": "latency_table",
    "denoise": "generation",
    "evaluate": "evaluation",
    "export": "exporting",
    "evaluate_generation": "generation_quality",
    "fuse": "fusing",
    "generate": "generation",
    "LatencyTable": "latency_table",
    "load": "checkpoint",
    "measured_table": "latency_table",
    "memory": "footprint",
    "PhaseSchedule": "schedules",
    "plan": "planning",
    "profile": "profiling",
    "PrunePlan": "planning",
    "restore": "repacking",
    "roofs": "hardware",
    "save": "checkpoint",
    "SinkProfile": "profiling",
    "SinkPrunedAttention": "modules",
    "SinkTracker": "sinks",
    "StepGraph": "graphs",
    "scheduled": "schedules",
    "Sparsity": "sparsification",
    "sparsify": "sparsification",
    "track": "tracking",
    "trajectories": "sparsification",
}
__all__ = ["__version__", "ops", *sorted(_HOMES)]

if TYPE_CHECKING:
    from sinkprune import ops as ops
    from sinkprune.adapters import adapter_for as adapter_for
    from sinkprune.calibration import Calibration as Calibration
    from sinkprune.calibration import calibrate as calibrate
    from sinkprune.checkpoint import load as load
    from sinkprune.checkpoint import save as save
    from sinkprune.costs import ceiling as ceiling
    from sinkprune.evaluation import evaluate as evaluate
    from sinkprune.exporting import export as export
    from sinkprune.footprint import memory as memory
    from sinkprune.fusing import fuse as fuse
    from sinkprune.generation import denoise as denoise
    from sinkprune.generation import generate as generate
    from sinkprune.generation_quality import evaluate_generation as evaluate_generation
    from sinkprune.graphs import StepGraph as StepGraph
    from sinkprune.hardware import roofs as roofs
    from sinkprune.intervals import bootstrap_difference as bootstrap_difference
    from sinkprune.latency_table import LatencyTable as LatencyTable
    from sinkprune.latency_table import computed_table as computed_table
    from sinkprune.latency_table import measured_table as measured_table
    from sinkprune.modules import CompactMLP as CompactMLP
    from sinkprune.modules import SinkPrunedAttention as SinkPrunedAttention
    from sinkprune.planning import PrunePlan as PrunePlan
    from sinkprune.planning import plan as plan
    from sinkprune.profiling import SinkProfile as SinkProfile
    from sinkprune.profiling import profile as profile
    from sinkprune.repacking import apply as apply
    from sinkprune.repacking import restore as restore
    from sinkprune.schedules import PhaseSchedule as PhaseSchedule
    from sinkprune.schedules import scheduled as scheduled
    from sinkprune.sinks import SinkTracker as SinkTracker
    from sinkprune.sparsification import Sparsity as Sparsity
    from sinkprune.sparsification import sparsify as sparsify
    from sinkprune.sparsification import trajectories as trajectories
    from sinkprune.tracking import track as track


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("sinkprune.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'sinkprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sinkprune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
