"""Packages of sinkprune; the rest of the metadata is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["sinkprune", "sinkprune.models", "sinkprune.criteria", "sinkprune.adapters", "sinkprune.kernels"],
    package_dir={"sinkprune": "sinkprune", "sinkprune.kernels": "kernels"},
    package_data={"sinkprune": ["assets/**/*", "templates/*"], "sinkprune.kernels": ["configs/*.json"]},
)
