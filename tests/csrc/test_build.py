"""Building and loading the extension: wishes are honoured, and what is missing leaves a reason, no crash."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

from sinkprune.ops import native

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the source tree is not here")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sinkprune_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_architectures_become_nvcc_flags(build: ModuleType) -> None:
    assert build.gencode("8.0 9.0a;10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(SystemExit, match="'Hopper'"):
        build.gencode("8.0;Hopper")


def test_cuda_is_looked_for_where_cuda_home_says(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SINKPRUNE_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = build.find_cuda()
    assert found.home is None
    assert str(tmp_path) in found.skipped
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    assert build.find_cuda().home == tmp_path
    monkeypatch.setenv("SINKPRUNE_CUDA", "0")
    assert build.find_cuda().home is None
    monkeypatch.setenv("SINKPRUNE_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes'"):
        build.cuda_demanded()


def test_a_toolkit_of_packages_is_taken_and_libraries_without_a_compiler_are_not(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SINKPRUNE_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    toolkit = tmp_path / "nvidia" / "cu13"
    for part in ("include/cuda_runtime_api.h", "lib/libcudart_static.a"):
        (toolkit / part).parent.mkdir(parents=True)
        (toolkit / part).touch()
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert build.packaged_toolkits() == []  # as torch for CUDA brings it
    (toolkit / "bin").mkdir()
    (toolkit / "bin" / "nvcc").touch()
    assert build.packaged_toolkits() == [toolkit]
    assert build.find_cuda().home == toolkit
    assert build.find_cuda().static_runtime() == toolkit / "lib"


def test_a_torch_that_is_older_than_the_binary_needs_is_refused_by_its_version(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('its CUDA libraries are not here')\n")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0+cu130'\n")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build.find_torch() == tmp_path / "torch"
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1'\n")
    with pytest.raises(build.Skip, match=r">= 2\.11 is needed to build it, found 2\.9\.1"):
        build.find_torch()


def test_without_a_compiler_the_build_goes_on_and_says_why(tmp_path: Path) -> None:
    done = setup_py("-q", "build_ext", "--build-lib", str(tmp_path), CXX="/nowhere/c++", SINKPRUNE_CUDA="")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
    reason = (tmp_path / "sinkprune" / "_C.skipped.txt").read_text()
    assert "no C++ compiler" in reason
    assert "/nowhere/c++" in reason


def test_a_demanded_cuda_part_that_cannot_be_built_fails_the_build(tmp_path: Path) -> None:
    done = setup_py(
        "-q", "build_ext", "--build-lib", str(tmp_path), SINKPRUNE_CUDA="1", CUDA_HOME=str(tmp_path)
    )
    assert done.returncode != 0
    assert "SINKPRUNE_CUDA=1" in done.stderr
    assert str(tmp_path) in done.stderr


def test_a_failing_cuda_compiler_costs_only_the_cuda_part(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = []

    def compile_native(self: object, sources: list[str], output: Path, cuda: object) -> None:
        tried.append(cuda)
        if cuda.home:
            raise build.Skip("nvcc: error: unsupported host compiler")

    monkeypatch.setattr(build.BuildNative, "compile_native", compile_native)
    monkeypatch.setattr(build, "find_cuda", lambda: build.Cuda(tmp_path))
    monkeypatch.delenv("SINKPRUNE_CUDA", raising=False)
    command = build.BuildNative(Distribution())
    command.build_lib, command.inplace = str(tmp_path), 0
    command.get_ext_fullpath = lambda name: str(tmp_path / "sinkprune" / "_C.so")
    command.build_extension(build.Extension("sinkprune._C", []))
    assert [bool(cuda.home) for cuda in tried] == [True, False]
    assert "unsupported host compiler" in tried[1].skipped
    assert not (tmp_path / "sinkprune" / "_C.skipped.txt").exists()
    monkeypatch.setenv("SINKPRUNE_CUDA", "1")
    with pytest.raises(SystemExit, match="unsupported host compiler"):
        command.build_extension(build.Extension("sinkprune._C", []))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("with_ninja", [True, False], ids=["ninja", "no ninja"])
def test_sources_compile_with_and_without_ninja_and_errors_are_told(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_ninja: bool
) -> None:
    find = shutil.which
    if not with_ninja:
        monkeypatch.setattr(
            shutil, "which", lambda name, **rest: None if name == "ninja" else find(name, **rest)
        )
    good, bad = tmp_path / "go od.cpp", tmp_path / "bad.cpp"  # a space, as in a user's folder
    good.write_text("int answer() { return 42; }\n")
    bad.write_text("int answer() { return forty_two; }\n")
    command = build.BuildNative(Distribution())
    command.compile_steps([(good, tmp_path / "good.o", ["c++", "-c"])], tmp_path)
    assert (tmp_path / "good.o").exists()
    with pytest.raises(build.Skip, match="forty_two"):
        command.compile_steps([(bad, tmp_path / "bad.o", ["c++", "-c"])], tmp_path)


def test_an_extension_that_is_turned_off_or_broken_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SINKPRUNE_NATIVE", "0")
    assert native._load.__wrapped__() == (None, "SINKPRUNE_NATIVE=0 turned it off")
    broken = tmp_path / "_C.so"
    monkeypatch.setenv("SINKPRUNE_NATIVE", str(broken))
    assert native._load.__wrapped__() == (None, f"SINKPRUNE_NATIVE names {broken}, which is not a file")
    broken.write_bytes(b"not a library")
    module, reason = native._load.__wrapped__()
    assert module is None
    assert reason.startswith("built, but it could not be loaded: ")


def test_an_extension_that_was_not_built_repeats_the_reason_written_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SINKPRUNE_NATIVE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "ops" / "native.py"))
    assert native._load.__wrapped__() == (None, "not built: no compiled module came with sinkprune")
    (tmp_path / "_C.skipped.txt").write_text("no C++ compiler: 'c++' not found\n")
    assert native._load.__wrapped__() == (None, "not built: no C++ compiler: 'c++' not found")


def test_build_info_names_compiler_flags_and_architectures() -> None:
    if not native.available():
        pytest.skip(f"no extension: {native.why_not()}")
    info = native.build_info()
    assert str(info["compiler"]).split()[0] in ("gcc", "clang")
    assert "-O" in str(info["flags"])
    assert info["torch_target"] == "2.11"
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])
    assert bool(info["cuda"]) != bool(info["cuda_skipped"])


def test_the_wheel_holds_binaries_kernels_configs_assets_and_templates(tmp_path: Path) -> None:
    """Built from the objects that the editable install left, so that this takes seconds."""
    common = ("-q", "egg_info", "--egg-base", str(tmp_path))
    done = setup_py(
        *common, "build", "--build-base", str(tmp_path / "build"), "bdist_wheel", "-d", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert "kernels" not in tops
    assert "csrc" not in tops
    assert not [name for name in names if name.startswith("tests/")]
    assert (
        any(name.startswith("sinkprune/_C.") and name.endswith(".so") for name in names) == native.available()
    )
    wanted = [path.relative_to(ROOT).as_posix() for path in (ROOT / "sinkprune").rglob("*.py")]
    wanted += [f"sinkprune/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")]
    wanted += [f"sinkprune/kernels/configs/{path.name}" for path in (ROOT / "kernels/configs").glob("*.json")]
    for folder in ("assets", "templates"):
        files = [path for path in (ROOT / "sinkprune" / folder).rglob("*") if path.is_file()]
        wanted += [path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".py", ".pyc")]
    assert sorted(set(wanted) - names) == []
