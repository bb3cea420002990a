"""Zeros in the weights themselves: the methods of the paper's own experiments, layer by layer."""

from sinkprune.pruning.sparsification.layerwise import METHODS, sparsify
from sinkprune.pruning.sparsification.note import Sparsity, sparsity_of

__all__ = ["METHODS", "Sparsity", "sparsify", "sparsity_of"]
