"""Triton kernels, one file each, beside the plain PyTorch twins that specify them
(`sinkprune.kernels.reference`)."""
