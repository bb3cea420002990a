"""What a stranger meets first: README's lines, the embedded texts, types, the package's metadata."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sinkprune as sp

ROOT = Path(__file__).resolve().parents[1]


def readme_snippets():
    """README's Python, in order: those that stand on their own and what they go on with."""
    text = (ROOT / "README.md").read_text("utf-8")
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


@pytest.mark.parametrize("where", ["installed", "clone"])
def test_readmes_ten_lines_run_from_an_empty_folder_and_from_a_clone_that_is_not_installed(tmp_path, where):
    """Two forwards of text instead of 64, all else as printed."""
    code = readme_snippets()[0].replace("steps=64", "steps=2, gen_length=8")
    code += "from pathlib import Path\nprint('FOUND', Path(sp.__file__).resolve().parents[1])\n"
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if where == "clone":
        clone = tmp_path / "clone"
        for name in ("sinkprune", "kernels"):
            shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        code = (
            "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]\n" + code
        )
        environment["PYTHONPATH"] = str(clone)
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "empty", env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.split("FOUND ")[1].split()[0]
    assert found == str((tmp_path / "clone").resolve() if where == "clone" else ROOT)
    assert (tmp_path / "empty/pruned/model.safetensors").is_file()


def test_the_embedded_texts_have_names():
    assert len(sp.texts("calibration")) > 10_000 and sp.texts("held_out") != sp.texts("calibration")
    with pytest.raises(ValueError, match="texts are calibration, held_out, out_of_domain; got 'train'"):
        sp.texts("train")


def test_a_users_type_checker_sees_our_types(tmp_path):
    """mypy, run on a user's file in a folder of its own, with the package in its environment."""
    pytest.importorskip("mypy")
    (tmp_path / "site").mkdir()
    os.symlink(ROOT / "sinkprune", tmp_path / "site/sinkprune")
    (tmp_path / "user.py").write_text(
        "import sinkprune as sp\nreveal_type(sp.texts('held_out'))\nsp.texts(3)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-site-packages", "--follow-imports=silent",
         "--ignore-missing-imports", "user.py"],
        cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, MYPYPATH=str(tmp_path / "site")),
    )  # fmt: skip
    assert 'Revealed type is "str"' in ran.stdout.replace("builtins.str", "str"), ran.stdout + ran.stderr
    assert 'has incompatible type "int"' in ran.stdout
    assert (ROOT / "sinkprune/py.typed").is_file() and '"py.typed"' in (ROOT / "setup.py").read_text()


def test_what_the_metadata_say_is_true():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    said = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (
        said["authors"] == [{"name": "sinkprune contributors"}] and "Typing :: Typed" in said["classifiers"]
    )
    assert f"version: {sp.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert said["version"] == sp.__version__
    assert f"license: {said['license']}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    named = [line.rsplit(" :: ")[-1] for line in said["classifiers"] if ":: Python :: 3." in line]
    assert named[0] == said["requires-python"].removeprefix(">=")
    assert f"version = {{{sp.__version__}}}" in (ROOT / "README.md").read_text("utf-8")
    assert set(said["optional-dependencies"]) == {"train", "eval", "export", "serve", "test"}
