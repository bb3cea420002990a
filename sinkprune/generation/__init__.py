"""Denoising: samplers, windows, caches, steps as CUDA graphs, and the profile of real trajectories."""
