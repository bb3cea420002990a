"""The whole extension builds with its CUDA part, for every architecture we name, without a register spill.

None of it needs a GPU. The toolkit is that of requirements-cuda.txt, where `make cuda-build` installed it, or
the machine's. SINKPRUNE_BUILD_TORCH names a folder with another torch, whose headers are taken: the binary
must load on the installed one all the same.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NEWER_THAN_TORCH_2_11 = ("STABLE_TORCH_ERROR_CODE_CHECK",)


def toolkit() -> Path | None:
    """The CUDA toolkit that setup.py would build with."""
    if not (ROOT / "setup.py").exists():
        return None
    spec = importlib.util.spec_from_file_location("sinkprune_setup_for_cuda", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module.find_cuda().home


HOME = toolkit()
TORCH = os.environ.get("SINKPRUNE_BUILD_TORCH", "")
demanded = os.environ.get("SINKPRUNE_CUDA") == "1"
needs_nvcc = pytest.mark.skipif(
    HOME is None and not demanded, reason="no nvcc here: `make cuda-build` brings one"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension with its CUDA part; objects stay in build/, so an unchanged source is compiled once."""
    where = tmp_path_factory.mktemp("cuda")
    environment = {**os.environ, "SINKPRUNE_CUDA": "1"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    if TORCH:
        environment["PYTHONPATH"] = TORCH
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(where)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return next(where.rglob("_C.*.so"))


def cuobjdump(*arguments: object) -> str:
    assert HOME is not None
    found = shutil.which("cuobjdump", path=os.pathsep.join([str(HOME / "bin"), os.environ.get("PATH", "")]))
    if not found:
        pytest.skip(f"{HOME} has no cuobjdump: `make cuda-build` brings one")
    return subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@needs_nvcc
def test_the_extension_holds_every_kernel_for_every_architecture_without_spills(built: Path) -> None:
    kernels = [
        name for source in sorted(CSRC.glob("*.cu"))
        for name in re.findall(r"__global__ void (?:__launch_bounds__\(\w+\) )?(\w+)\(", source.read_text())
    ]  # fmt: skip
    assert kernels
    used = cuobjdump("--dump-resource-usage", built)
    by_architecture = dict(re.findall(r"arch = (sm_\w+)\n(.*?)(?=arch = |\Z)", used, re.DOTALL))
    assert {"sm_80", "sm_90"} <= set(by_architecture)
    for architecture, text in by_architecture.items():
        functions = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) \S+ LOCAL:(\d+)", text)
        for kernel in kernels:
            assert any(kernel in name for name, *_ in functions), f"{architecture} has no {kernel}"
        for name, stack, local in functions:
            assert (int(stack), int(local)) == (0, 0), f"{name} spills on {architecture}"


@needs_nvcc
def test_the_extension_with_its_cuda_part_loads_without_a_cuda_runtime_and_serves_cuda(built: Path) -> None:
    check = (
        "from sinkprune.ops import native\n"
        "assert native.available(), native.why_not()\n"
        "assert native.serves('cuda'), native.build_info()\n"
        "info = native.build_info()\n"
        "print(info['cuda'], info['cuda_architectures'], info['cuda_skipped'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "SINKPRUNE_NATIVE": str(built)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"1\d\.\d 8\.0;9\.0(;10\.0)?\+PTX None\n", done.stdout)
    needed = subprocess.run(["readelf", "-d", built], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*?)\]", needed)
    assert "libtorch_cpu.so" in libraries
    assert not [library for library in libraries if "cuda" in library]


@needs_nvcc
@pytest.mark.skipif(
    not TORCH, reason="no SINKPRUNE_BUILD_TORCH; the installed torch loads it, as shown above"
)
def test_the_torch_that_it_was_built_for_exports_every_symbol_it_needs(built: Path) -> None:
    def symbols(which: str, *libraries: Path) -> set[str]:
        listed = subprocess.run(["nm", "-D", which, *libraries], capture_output=True, text=True, check=True)
        return {line.split()[-1] for line in listed.stdout.splitlines() if len(line.split()) > 1}

    needed = {name for name in symbols("--undefined-only", built) if re.search("torch|c10", name)}
    assert "aoti_torch_get_current_cuda_stream" in needed
    assert needed <= symbols("--defined-only", *Path(TORCH, "torch", "lib").glob("lib*.so"))


@pytest.mark.skipif(not CSRC.exists(), reason="the source tree is not here")
@pytest.mark.parametrize("name", NEWER_THAN_TORCH_2_11)
def test_no_source_uses_what_the_oldest_torch_does_not_have(name: str) -> None:
    """Found by building against 2.11: under a newer torch such a name compiles, and nothing says so."""
    users = [path.name for path in sorted(CSRC.iterdir()) if re.search(rf"\b{name}\b", path.read_text())]
    assert users == []
