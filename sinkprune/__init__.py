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
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

from sinkprune.version import __version__

_HOMES = {
    "adapter_for": "adapters",
    "apply": "pruning.repacking",
    "bootstrap_difference": "evaluation.intervals",
    "calibrate": "evidence.calibration",
    "Calibration": "evidence.calibration",
    "ceiling": "planning.costs",
    "chat": "generation.chatting",
    "CompactMLP": "models.modules",
    "computed_table": "planning.latency_table",
    "denoise": "generation.denoising",
    "evaluate": "evaluation.predictions",
    "export": "checkpoints.exporting",
    "evaluate_generation": "evaluation.generation_quality",
    "fuse": "pruning.repacking",
    "generate": "generation.denoising",
    "LatencyTable": "planning.latency_table",
    "load": "checkpoints.checkpoint",
    "measured_table": "planning.latency_table",
    "memory": "evaluation.footprint",
    "PhaseSchedule": "pruning.schedules",
    "plan": "planning.planner",
    "profile": "generation.profiling",
    "PrunePlan": "plans",
    "lay_out": "pruning.repacking",
    "restore": "pruning.repacking",
    "roofs": "planning.hardware",
    "save": "checkpoints.checkpoint",
    "SinkProfile": "evidence.profiles",
    "SinkPrunedAttention": "models.modules",
    "SinkTracker": "evidence.sinks",
    "StepGraph": "generation.graphs",
    "scheduled": "pruning.schedules",
    "Sparsity": "pruning.sparsification",
    "sparsify": "pruning.sparsification",
    "texts": "checkpoints.checkpoint",
    "track": "evidence.tracking",
    "trajectories": "generation.trajectories",
}
__all__ = ["__version__", "ops", *sorted(_HOMES)]

if TYPE_CHECKING:
    from sinkprune import ops as ops
    from sinkprune.adapters import adapter_for as adapter_for
    from sinkprune.checkpoints.checkpoint import load as load
    from sinkprune.checkpoints.checkpoint import save as save
    from sinkprune.checkpoints.checkpoint import texts as texts
    from sinkprune.checkpoints.exporting import export as export
    from sinkprune.evaluation.footprint import memory as memory
    from sinkprune.evaluation.generation_quality import evaluate_generation as evaluate_generation
    from sinkprune.evaluation.intervals import bootstrap_difference as bootstrap_difference
    from sinkprune.evaluation.predictions import evaluate as evaluate
    from sinkprune.evidence.calibration import Calibration as Calibration
    from sinkprune.evidence.calibration import calibrate as calibrate
    from sinkprune.evidence.profiles import SinkProfile as SinkProfile
    from sinkprune.evidence.sinks import SinkTracker as SinkTracker
    from sinkprune.evidence.tracking import track as track
    from sinkprune.generation.chatting import chat as chat
    from sinkprune.generation.denoising import denoise as denoise
    from sinkprune.generation.denoising import generate as generate
    from sinkprune.generation.graphs import StepGraph as StepGraph
    from sinkprune.generation.profiling import profile as profile
    from sinkprune.generation.trajectories import trajectories as trajectories
    from sinkprune.models.modules import CompactMLP as CompactMLP
    from sinkprune.models.modules import SinkPrunedAttention as SinkPrunedAttention
    from sinkprune.planning.costs import ceiling as ceiling
    from sinkprune.planning.hardware import roofs as roofs
    from sinkprune.planning.latency_table import LatencyTable as LatencyTable
    from sinkprune.planning.latency_table import computed_table as computed_table
    from sinkprune.planning.latency_table import measured_table as measured_table
    from sinkprune.planning.planner import plan as plan
    from sinkprune.plans import PrunePlan as PrunePlan
    from sinkprune.pruning.repacking import apply as apply
    from sinkprune.pruning.repacking import fuse as fuse
    from sinkprune.pruning.repacking import lay_out as lay_out
    from sinkprune.pruning.repacking import restore as restore
    from sinkprune.pruning.schedules import PhaseSchedule as PhaseSchedule
    from sinkprune.pruning.schedules import scheduled as scheduled
    from sinkprune.pruning.sparsification import Sparsity as Sparsity
    from sinkprune.pruning.sparsification import sparsify as sparsify


class _KernelsBeside:
    """Finds ``sinkprune.kernels`` in a clone that is not installed, where it lies beside the package."""

    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kernels")

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "sinkprune.kernels":
            return None
        return importlib.util.spec_from_file_location(
            name, os.path.join(cls.folder, "__init__.py"), submodule_search_locations=[cls.folder]
        )


if os.path.isfile(os.path.join(_KernelsBeside.folder, "sink_update.py")):
    sys.meta_path.append(_KernelsBeside)  # type: ignore[arg-type]  # last: an installed one comes first


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
