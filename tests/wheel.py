"""A wheel, installed where nothing of the repository is: `make wheel-test`.

    python tests/wheel.py dist/sinkprune-*.whl

An environment of its own takes torch and the other packages from this one, but sinkprune from the wheel
alone; in an empty folder README's snippets run, and the command line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FACTS = """
from pathlib import Path
import sinkprune as sp
from sinkprune.ops import native
assert Path(sp.__file__).resolve().is_relative_to(Path({where!r}).resolve()), sp.__file__
assert native.available(), "the extension is not in the wheel"
assert (Path(sp.__file__).parent / "py.typed").is_file() and sp.texts("held_out")
print("native code of the wheel, in", Path(sp.__file__).parent)
"""


def snippets() -> str:
    """README's Python as one program, of two forwards where it says 64."""
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    own = 'model, tokenizer = sp.load("tiny")\n'  # "a model you have loaded already"
    whole = "\n".join([*blocks[:2], own, blocks[2]])
    return whole.replace("steps=64", "steps=2").replace("gen_length=128", "gen_length=8")


def main(wheel: Path) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        env = Path(scratch) / "env"
        empty = Path(scratch) / "empty"
        empty.mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        python = env / "bin/python"
        install = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([python, *install, str(wheel.resolve())], check=True)
        site = next(env.glob("lib/python3*/site-packages"))
        paths = [sysconfig.get_paths()["purelib"], *[p for p in sys.path if p.endswith("site-packages")]]
        (site / "packages.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        calls: list[list[str | Path]] = [
            [python, "-c", FACTS.format(where=str(env))],
            [python, "-c", snippets()],
            [env / "bin/sinkprune", "--version"],
            [env / "bin/sinkprune", "prune", "tiny", "--criterion", "magnitude", "--repair", "none",
             "--out", "small", "--quiet"],
            [env / "bin/sinkprune", "generate", "small", "The Congress", "--steps", "2", "--gen-length", "8"],
        ]  # fmt: skip
        for call in calls:
            done = subprocess.run(call, cwd=empty, env=environment, check=False)
            if done.returncode:
                print(f"failed: {' '.join(map(str, call))[:200]}", file=sys.stderr)
                return 1
    print(f"{wheel.name} works")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
