"""Packages of sinkprune and its native extension; the rest of the metadata is in pyproject.toml.

The extension is optional: without a C++ compiler (or without torch at build time) sinkprune installs all the
same, runs through PyTorch, and `sinkprune doctor` gives the reason that was written down here. What is asked:

    SINKPRUNE_CUDA=1|0     demand the CUDA part (or fail) or skip it; unset: built if nvcc is there
    CUDA_HOME              the toolkit to use; default: the one nvcc on PATH belongs to, then /usr/local/cuda
    TORCH_CUDA_ARCH_LIST   e.g. "8.0;9.0+PTX"; default: sm_80, sm_90, sm_100 and PTX of the last
    MAX_JOBS               compilers run at once; default: the number of cores
    SINKPRUNE_SANITIZE=1   address and undefined-behaviour sanitizers (see `make sanitize`)

Whether this machine has a GPU is never asked: wheels are built where there is none.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET = (
    "2.11"  # the oldest torch the binary loads on; a larger one here drops users, never gains speed
)
ARCHITECTURES = "8.0;9.0;10.0+PTX"
SKIPPED = "_C.skipped.txt"


class Skip(Exception):
    """The extension cannot be built here, and why."""


def gencode(architectures: str) -> list[str]:
    """The nvcc flags for a TORCH_CUDA_ARCH_LIST such as ``"8.0 9.0a;10.0+PTX"``."""
    flags = []
    for name in re.split(r"[;,\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0, 9.0a or 9.0+PTX, got {name!r}"
            )
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_cuda() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None and the reason there is none."""
    wish = os.environ.get("SINKPRUNE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"SINKPRUNE_CUDA: expected 0, 1 or nothing, got {wish!r}")
    if wish == "0":
        return None, "SINKPRUNE_CUDA=0 when it was built"
    nvcc = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(named)] if named else []
    if not named:
        candidates += [Path(nvcc).resolve().parent.parent] if nvcc else []
        candidates += [Path("/usr/local/cuda")]
    for home in candidates:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime_api.h").exists():
            return home, ""
    reason = f"no nvcc under {' or '.join(map(str, candidates))} when it was built"
    if wish == "1":
        raise SystemExit(f"SINKPRUNE_CUDA=1 demands the CUDA part, but there is {reason}")
    return None, reason


def find_torch() -> Path:
    """The folder of the torch whose headers are used."""
    try:
        import torch
    except ImportError as error:
        raise Skip(f"torch could not be imported when it was built: {error}") from error
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if installed < tuple(int(part) for part in TORCH_TARGET.split(".")):
        raise Skip(f"torch >= {TORCH_TARGET} is needed to build it, found {torch.__version__}")
    return Path(torch.__file__).parent


def torch_target_macro() -> str:
    major, minor = (int(part) for part in TORCH_TARGET.split("."))
    return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL"


class BuildNative(build_ext):
    """Compiles csrc/ with the system's compilers, through ninja when it is there."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        note = output.parent / SKIPPED
        note.unlink(missing_ok=True)
        try:
            self.compile_native(ext, output)
        except Skip as reason:
            if os.environ.get("SINKPRUNE_CUDA") == "1":
                raise SystemExit(f"SINKPRUNE_CUDA=1 demands the extension, but {reason}") from reason
            output.unlink(missing_ok=True)  # a stale binary must not stand in for the one that failed
            note.write_text(f"{reason}\n")
            self.warn(f"native extension skipped (sinkprune runs through PyTorch): {reason}")

    def compile_native(self, ext: Extension, output: Path) -> None:
        if sys.platform != "linux":
            raise Skip(f"it is built on Linux only, this is {sys.platform}")
        torch = find_torch()
        compiler = shlex.split(os.environ.get("CXX", "")) or [
            shutil.which("c++") or shutil.which("g++") or "c++"
        ]
        if not shutil.which(compiler[0]):
            raise Skip(f"no C++ compiler: {compiler[0]!r} not found (set CXX, or install g++)")
        try:
            import pybind11
        except ImportError as error:
            raise Skip(f"pybind11 could not be imported when it was built: {error}") from error
        cuda, cuda_reason = find_cuda()
        sanitize = os.environ.get("SINKPRUNE_SANITIZE") == "1"

        flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-DNDEBUG"]
        flags += ["-ffp-contract=fast"]  # a·b + c in one rounding, which ISO mode would forbid
        flags += (
            ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
            if sanitize
            else ["-O3"]
        )
        includes = [
            f"-I{pybind11.get_include()}",
            f"-I{self.python_include()}",
            f"-isystem{torch / 'include'}",
        ]
        defines = [torch_target_macro(), "-DTORCH_STABLE_ONLY"]
        told = {
            "SINKPRUNE_FLAGS": shlex.join(flags),
            "SINKPRUNE_TORCH_TARGET": TORCH_TARGET,
        }
        link = [
            f"-L{torch / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-Wl,--as-needed",
            "-ltorch_cpu",
            "-lc10",
        ]
        if sanitize:
            link += ["-fsanitize=address,undefined"]
        nvcc: list[str] = []
        if cuda:
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
            nvcc = [str(cuda / "bin" / "nvcc"), "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "--threads", "0"]
            nvcc += [f"-ccbin={compiler[0]}", *gencode(architectures)]
            includes += [f"-isystem{cuda / 'include'}"]
            defines += ["-DSINKPRUNE_WITH_CUDA"]
            told["SINKPRUNE_CUDA_VERSION"] = self.cuda_version(cuda)
            told["SINKPRUNE_CUDA_ARCHITECTURES"] = architectures
            libraries = next(
                (p for p in (cuda / "lib64", cuda / "lib") if (p / "libcudart_static.a").exists()), None
            )
            if libraries is None:
                raise SystemExit(f"no libcudart_static.a under {cuda}; SINKPRUNE_CUDA=0 builds without CUDA")
            link += [f"-L{libraries}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        else:
            told["SINKPRUNE_CUDA_SKIPPED"] = cuda_reason
        told_flags = [f'-D{name}="{value}"' for name, value in told.items()]
        told_flags += [f"-DSINKPRUNE_SANITIZED={int(sanitize)}"]

        objects = Path(self.build_temp).resolve() / ("sanitize" if sanitize else "native")
        objects.mkdir(parents=True, exist_ok=True)
        steps = []
        for source in ext.sources:
            target = objects / (Path(source).name + ".o")
            if source.endswith(".cu"):
                if cuda:
                    steps.append((Path(source).resolve(), target, [*nvcc, "-c"]))
                continue
            own = told_flags if Path(source).name == "module.cpp" else []
            steps.append(
                (Path(source).resolve(), target, [*compiler, *flags, *defines, *own, *includes, "-c"])
            )
        self.run_steps(steps, objects)
        linker = [*compiler, "-shared", *(str(target) for _, target, _ in steps), "-o", str(output), *link]
        self.run_command(linker)

    def run_steps(self, steps: list, folder: Path) -> None:
        """Compiles every source; the commands are the same with and without ninja."""
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        ninja = shutil.which(
            "ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        )
        if not ninja:
            with ThreadPoolExecutor(jobs) as pool:
                commands = [[*head, str(source), "-o", str(target)] for source, target, head in steps]
                list(pool.map(self.run_command, commands))
            return
        lines = ["rule compile", "  command = $head $in -o $out -MD -MF $out.d", "  depfile = $out.d", ""]
        for source, target, head in steps:
            escaped = shlex.join(head).replace("$", "$$")
            lines += [f"build {ninja_path(target)}: compile {ninja_path(source)}", f"  head = {escaped}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        self.run_command([ninja, "-C", str(folder), "-j", str(jobs), *(["-v"] if self.verbose else [])])

    def run_command(self, command: list[str]) -> None:
        self.announce(shlex.join(command), level=2)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            if self.verbose:
                sys.stdout.write(done.stdout + done.stderr)
            return
        output = (done.stdout + done.stderr).strip()
        if os.environ.get("SINKPRUNE_CUDA") == "1":
            raise SystemExit(f"SINKPRUNE_CUDA=1 demands the extension, but a command failed:\n{output}")
        sys.stderr.write(output + "\n")
        first = next((line for line in output.splitlines() if "error" in line.lower()), output[-200:])
        raise Skip(f"compiling it failed: {first}")

    def python_include(self) -> str:
        import sysconfig

        return sysconfig.get_paths()["include"]

    def cuda_version(self, cuda: Path) -> str:
        told = subprocess.run(
            [str(cuda / "bin" / "nvcc"), "--version"], capture_output=True, text=True
        ).stdout
        match = re.search(r"release ([\d.]+)", told)
        return match[1] if match else "unknown"


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    packages=[*find_packages(include=["sinkprune", "sinkprune.*"]), "sinkprune.kernels"],
    package_dir={"sinkprune": "sinkprune", "sinkprune.kernels": "kernels"},
    package_data={
        "sinkprune": ["assets/**/*", "templates/*", SKIPPED],
        "sinkprune.kernels": ["configs/*.json"],
    },
    ext_modules=[
        Extension(
            "sinkprune._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.c*") if path.suffix in (".cpp", ".cu")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
