"""The fuzz of test_fuzz.py through a sanitized build: a few calls, thousands in ``make sanitize``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLS = os.environ.get("SINKPRUNE_FUZZ_CALLS", "25")


def runtime(name: str) -> str:
    """The compiler's sanitizer library, which an uninstrumented Python must load before anything else."""
    compiler = os.environ.get("CXX", "c++")
    try:
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"no C++ compiler ({compiler})")
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return path


@pytest.fixture(scope="module")
def sanitized_build() -> Path:
    """The extension with sanitizers, under build/, where an unchanged source is not compiled twice."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the source tree is not here")
    where = ROOT / "build" / "sanitize"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(where)]
    environment = {**os.environ, "SINKPRUNE_SANITIZE": "1", "SINKPRUNE_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = sorted((where / "sinkprune").glob("_C.*.so"), key=lambda path: path.stat().st_mtime)
    assert built, done.stderr[-3000:]
    return built[-1]


def test_no_call_reads_or_writes_where_it_should_not(sanitized_build: Path) -> None:
    # libstdc++ is there for the exceptions that the ops throw: the sanitizer looks for it when it starts.
    libraries = [runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch free little on exit
        "SINKPRUNE_NATIVE": str(sanitized_build),
        "SINKPRUNE_FUZZ_CALLS": CALLS,
    }
    check = "from sinkprune.ops import native; assert native.build_info()['sanitized'], native.why_not()"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True, cwd=ROOT)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    fuzz = subprocess.run(
        [*command, str(Path(__file__).with_name("test_fuzz.py"))],
        env=environment, cwd=ROOT / "tests", capture_output=True, text=True,
    )  # fmt: skip
    assert fuzz.returncode == 0, (fuzz.stdout + fuzz.stderr)[-5000:]
    assert "6 passed" in fuzz.stdout, fuzz.stdout[-2000:]
