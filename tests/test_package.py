"""The package as installed: light to import, names where they should be, no stray top-level module."""

import importlib
import importlib.metadata
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import sinkprune as sp

PROBE = """
import sys, time, json, importlib.util
import torch
before = set(sys.modules)
start = time.process_time()
import sinkprune
seconds = time.process_time() - start
imported = sorted(set(sys.modules) - before)
for name in sinkprune.__all__:
    getattr(sinkprune, name)
touched = sorted(set(sys.modules) - before)
kernels = importlib.util.find_spec("kernels")
print(json.dumps({
    "seconds": seconds,
    "imported": imported,
    "touched": touched,
    "package": sinkprune.__file__,
    "own kernels": importlib.util.find_spec("sinkprune.kernels") is not None,
    "top-level kernels": kernels and [kernels.origin, *(kernels.submodule_search_locations or [])] or [],
}))
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """What a fresh interpreter in an empty folder sees."""
    empty = tmp_path_factory.mktemp("empty")
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=empty, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def heavy(names):
    return [
        n
        for n in names
        if n.split(".")[0] in ("transformers", "triton", "matplotlib", "jinja2", "tokenizers")
    ]


def test_importing_adds_at_most_three_tenths_of_a_second_to_torch(probe):
    assert probe["seconds"] <= 0.3  # of processor time: a busy machine does not count


def test_importing_brings_in_nothing_heavy(probe):
    assert heavy(probe["imported"]) == []
    assert [n for n in probe["imported"] if n.startswith("sinkprune")] == ["sinkprune", "sinkprune.version"]


def test_touching_every_public_name_brings_in_neither_transformers_nor_matplotlib(probe):
    assert [n for n in heavy(probe["touched"]) if not n.startswith("triton")] == []


def test_from_an_empty_folder_kernels_is_ours_only_inside_the_package(probe):
    assert probe["own kernels"]
    root = Path(sp.__file__).resolve().parents[1]
    assert not [
        p for p in probe["top-level kernels"] if p and root / "kernels" in [Path(p), *Path(p).parents]
    ]
    assert not [p for p in probe["top-level kernels"] if p and "sinkprune" in p]


def test_the_installed_distribution_owns_one_top_level_name(probe):
    distribution = importlib.metadata.distribution("sinkprune")
    assert (distribution.read_text("top_level.txt") or "sinkprune").split() == ["sinkprune"]
    assert distribution.version == sp.__version__


def test_the_kernels_folder_is_loaded_under_one_name_only():
    importlib.import_module("sinkprune.kernels.reference")
    folder = Path(importlib.import_module("sinkprune.kernels").__path__[0]).resolve()
    names = [
        name
        for name, module in list(sys.modules.items())
        if getattr(module, "__file__", None) and Path(module.__file__).resolve() == folder / "reference.py"
    ]
    assert names == ["sinkprune.kernels.reference"]


def test_no_module_shares_its_name_with_a_public_function():
    modules = {m.name for m in pkgutil.iter_modules(sp.__path__)}
    assert modules & set(sp.__all__) <= {"ops"}  # a package that is public itself


def test_every_public_name_resolves_and_stays_what_it_is_after_its_module_is_imported():
    for name in sp.__all__:
        first = getattr(sp, name)
        if hasattr(first, "__module__"):
            importlib.import_module(first.__module__)
        assert getattr(sp, name) is first
    for verb in (
        "profile",
        "plan",
        "apply",
        "restore",
        "save",
        "load",
        "generate",
        "track",
        "evaluate",
        "ceiling",
    ):
        assert callable(getattr(sp, verb))
    assert set(dir(sp)) == set(sp.__all__)


def test_every_public_name_says_what_it_is():
    assert not [n for n in sp.__all__ if n != "__version__" and not (getattr(sp, n).__doc__ or "").strip()]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sinkprune' has no attribute 'prune'"):
        _ = sp.prune
