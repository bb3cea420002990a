"""The families' tests under other versions of what the package stands on: a virtual environment a row, the
row's packages on top of this environment's, and a table of what passed.

python tests/matrix.py --root /tmp/matrix [--only "transformers 5.24"] [--torch]      (make matrix)
Rows of torch download gigabytes, so they are left out unless asked for.
"""

from __future__ import annotations

import argparse
import re
import site
import subprocess
import sys
import time
import venv
from pathlib import Path

TESTS = (
    "tests/commands/test_families.py", "tests/adapters", "tests/models/test_decoder_families.py",
    "tests/models/test_block_causal.py", "tests/generation/test_published_samplers.py",
    "tests/checkpoints/test_transformers.py", "tests/checkpoints/test_checkpoint.py",
)  # fmt: skip
ROWS = {
    "transformers 4.57": [
        "transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1", "requests==2.32.5",
        "urllib3==2.5.0", "idna==3.10", "certifi==2025.8.3", "charset-normalizer==3.4.3",
    ],
    "transformers 5.0": ["transformers==5.0.0", "huggingface-hub==1.3.0", "tokenizers==0.22.2"],
    "transformers 5.17": ["transformers==5.17.0"],
    "transformers 5.24": ["transformers==5.24.0"],
    "numpy 2.0": ["numpy==2.0.2"],
    "triton 3.9": ["triton==3.9.0"],
}  # fmt: skip
TORCH_ROWS = {f"torch 2.{minor}": [f"torch==2.{minor}.0"] for minor in (11, 12, 14)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="where the environments go; kept")
    parser.add_argument("--only", action="append", help="a row by its name; may be repeated")
    parser.add_argument("--torch", action="store_true", help="the rows of torch too")
    parser.add_argument("tests", nargs="*", default=TESTS)
    options = parser.parse_args()
    rows = ROWS | (TORCH_ROWS if options.torch else {})
    lines = ["| row | Python | result | seconds |", "|---|---|---|---|"]
    failed = 0
    for name in options.only or rows:
        started = time.time()
        result = run(name, rows[name], options.root, list(options.tests))
        failed += not re.fullmatch(r"\d+ passed.*", result) or "failed" in result
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        lines.append(f"| {name} | {version} | {result} | {time.time() - started:.0f} |")
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))
    return bool(failed)


def run(name: str, packages: list[str], root: Path, tests: list[str]) -> str:
    """The last line of pytest in the row's environment; the rest goes to ``root/NAME.txt``."""
    folder = root / name.replace(" ", "-")
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        beneath = [path for path in sys.path if path.endswith("site-packages")] or site.getsitepackages()
        # site reads the .pth files of what it adds, which an editable install needs
        text = "".join(f"import site; site.addsitedir({path!r})\n" for path in dict.fromkeys(beneath))
        (folder / "lib" / version / "site-packages" / "beneath.pth").write_text(text)
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [python, "-m", "pip", "install", *quiet, *packages], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return "could not be installed: " + " ".join(done.stderr.split())[-200:]
    done = subprocess.run(
        [python, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *tests],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    (root / f"{folder.name}.txt").write_text(done.stdout + done.stderr)
    found = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout[-400:])
    return ", ".join(found) or f"pytest ended with {done.returncode}: {done.stdout.strip()[-120:]}"


if __name__ == "__main__":
    raise SystemExit(main())
