"""Zeros in the weights themselves: the methods of the paper's own experiments, layer by layer."""

from sinkprune.sparsification.denoising_states import TEN_LEVELS, trajectories
from sinkprune.sparsification.layerwise import METHODS, sparsify
from sinkprune.sparsification.note import Sparsity, sparsity_of
from sinkprune.sparsification.sink_mask import SinkMask, sink_masks

__all__ = [
    "METHODS",
    "TEN_LEVELS",
    "SinkMask",
    "Sparsity",
    "sink_masks",
    "sparsify",
    "sparsity_of",
    "trajectories",
]
