"""Packages of sinkprune and its native extension; the rest of the metadata is in pyproject.toml.

The extension is optional: without a C++ compiler (or without torch at build time) sinkprune installs all the
same, runs through PyTorch, and `sinkprune doctor` gives the reason that was written down here. What is asked:

    SINKPRUNE_CUDA=1|0     demand the CUDA part (or fail) or skip it; unset: built if nvcc is there
    CUDA_HOME              the toolkit to use; default: that of requirements-cuda.txt where it is installed,
                           then the one nvcc on PATH belongs to, then /usr/local/cuda
    TORCH_CUDA_ARCH_LIST   e.g. "8.0;9.0+PTX"; default: sm_80, sm_90, sm_100 and PTX of the last
    MAX_JOBS               compilers run at once; default: the number of cores
    SINKPRUNE_SANITIZE=1   address and undefined-behaviour sanitizers (see `make sanitize`)

Whether this machine has a GPU is never asked: wheels are built where there is none.
"""

import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET = (2, 11)  # the oldest torch the binary loads on
ARCHITECTURES = ("8.0", "9.0", "10.0")
SKIPPED = "_C.skipped.txt"  # beside the module that is not there: why

CPP_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-DNDEBUG"]
CPP_FLAGS += ["-ffp-contract=fast"]  # a·b + c in one rounding, which ISO mode would forbid
SANITIZE_FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class Skip(Exception):
    """The extension, or its CUDA part, cannot be built here, and why."""


@dataclass
class Cuda:
    """A CUDA toolkit, or why none is used."""

    home: Path | None
    skipped: str = ""

    @property
    def nvcc(self) -> str:
        return str(self.home / "bin" / "nvcc")

    def ask(self, *arguments: str) -> str:
        return subprocess.run([self.nvcc, *arguments], capture_output=True, text=True).stdout

    @property
    def version(self) -> str:
        match = re.search(r"release ([\d.]+)", self.ask("--version"))
        return match[1] if match else "unknown"

    def architectures(self) -> str:
        """TORCH_CUDA_ARCH_LIST, or those of ours that this nvcc knows, with PTX of the last."""
        if wish := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            return wish
        known = re.findall(r"compute_(\d+)(\d)\b", self.ask("--list-gpu-arch"))
        ours = [name for name in ARCHITECTURES if tuple(name.split(".")) in known]
        if not ours:
            raise Skip(f"{self.nvcc} knows none of {', '.join(ARCHITECTURES)}")
        return ";".join(ours) + "+PTX"

    def static_runtime(self) -> Path:
        for folder in (self.home / "lib64", self.home / "lib"):
            if (folder / "libcudart_static.a").exists():
                return folder
        raise Skip(f"no libcudart_static.a under {self.home}")


def cuda_demanded() -> bool:
    wish = os.environ.get("SINKPRUNE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"SINKPRUNE_CUDA: expected 0, 1 or nothing, got {wish!r}")
    return wish == "1"


def find_cuda() -> Cuda:
    """The toolkit to build with: CUDA_HOME, this environment's packages, the one of the nvcc on PATH, or the
    usual place."""
    if os.environ.get("SINKPRUNE_CUDA") == "0":
        return Cuda(None, "SINKPRUNE_CUDA=0 when it was built")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    candidates = [Path(named)] if named else [*packaged_toolkits(), Path("/usr/local/cuda")]
    if nvcc and not named:
        candidates.insert(-1, Path(nvcc).resolve().parent.parent)
    for home in candidates:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime_api.h").exists():
            return Cuda(home)
    return Cuda(None, f"no CUDA toolkit in {' or '.join(map(str, candidates))} when it was built")


def packaged_toolkits() -> list[Path]:
    """Where requirements-cuda.txt puts a toolkit; torch alone puts libraries there, without a compiler."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations if spec else None) or []
    found = [toolkit for folder in folders for toolkit in sorted(Path(folder).glob("cu[0-9]*"))]
    return [toolkit for toolkit in found if (toolkit / "bin" / "nvcc").exists()]


def gencode(architectures: str) -> list[str]:
    """The nvcc flags for a TORCH_CUDA_ARCH_LIST such as ``"8.0 9.0a;10.0+PTX"``."""
    flags = []
    for name in re.split(r"[;,\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0, 9.0a or 9.0+PTX, got {name!r}"
            )
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_torch() -> Path:
    """The folder of the torch whose headers are used; the binary serves any torch from TORCH_TARGET on."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Skip("torch was not installed when it was built")
    folder = Path(spec.origin).parent  # not imported: a torch for CUDA builds here without its libraries
    match = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folder / "version.py").read_text())
    if not match:
        raise Skip(f"no version in {folder / 'version.py'}")
    if (int(match[2]), int(match[3])) < TORCH_TARGET:
        raise Skip(f"torch >= {'.'.join(map(str, TORCH_TARGET))} is needed to build it, found {match[1]}")
    return folder


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError as error:
        raise Skip(f"pybind11 could not be imported when it was built: {error}") from error
    return pybind11.get_include()


def find_compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = named or [shutil.which("c++") or shutil.which("g++") or "c++"]
    if not shutil.which(compiler[0]):
        raise Skip(f"no C++ compiler: {compiler[0]!r} not found (set CXX, or install g++)")
    return compiler


class BuildNative(build_ext):
    """Compiles csrc/ with the system's compilers, through ninja when it is there."""

    def run(self) -> None:
        super().run()
        if (
            self.inplace and self.extensions
        ):  # an editable install: what became of it belongs beside the sources
            built = Path(self.build_lib) / "sinkprune" / SKIPPED
            beside = Path("sinkprune") / SKIPPED
            beside.unlink(missing_ok=True)
            if built.exists():
                shutil.copy(built, beside)
                (Path("sinkprune") / Path(self.get_ext_fullpath("sinkprune._C")).name).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        note = output.parent / SKIPPED
        note.unlink(missing_ok=True)
        demanded = cuda_demanded()
        cuda = find_cuda()
        try:
            if demanded and not cuda.home:
                raise Skip(cuda.skipped)
            try:
                self.compile_native(ext.sources, output, cuda)
            except Skip as reason:
                if demanded or not cuda.home:
                    raise
                self.warn(f"the CUDA part failed, building without it: {reason}")
                self.compile_native(ext.sources, output, Cuda(None, f"compiling it failed: {reason}"))
        except Skip as reason:
            if demanded:
                raise SystemExit(f"SINKPRUNE_CUDA=1 demands the CUDA part, but: {reason}") from reason
            output.unlink(missing_ok=True)  # a stale binary must not stand in for the one that failed
            note.write_text(f"{reason}\n")
            self.warn(f"native extension skipped (sinkprune runs through PyTorch): {reason}")

    def compile_native(self, sources: list[str], output: Path, cuda: Cuda) -> None:
        """Compiles and links; raises Skip with the reason if that cannot be done."""
        if sys.platform != "linux":
            raise Skip(f"it is built on Linux only, this is {sys.platform}")
        torch, compiler = find_torch(), find_compiler()
        sanitize = os.environ.get("SINKPRUNE_SANITIZE") == "1"
        flags = [*CPP_FLAGS, *(SANITIZE_FLAGS if sanitize else ["-O3"])]
        major, minor = TORCH_TARGET
        told = {"SINKPRUNE_FLAGS": shlex.join(flags), "SINKPRUNE_TORCH_TARGET": f"{major}.{minor}"}
        defines = [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL", "-DTORCH_STABLE_ONLY"]
        includes = [f"-I{find_pybind11()}", f"-I{sysconfig.get_paths()['include']}"]
        includes += [f"-isystem{torch / 'include'}"]
        # Without --no-as-needed the linker drops libtorch, and with it the weak CUDA symbols it would bring.
        link = [
            f"-L{torch / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-Wl,--as-needed",
            "-ltorch_cpu",
            "-lc10",
        ]
        link += SANITIZE_FLAGS[2:3] if sanitize else []
        nvcc: list[str] = []
        if cuda.home:
            architectures = cuda.architectures()
            nvcc = [
                cuda.nvcc,
                "-std=c++17",
                "-O3",
                "-Xcompiler=-fPIC",
                "--threads=0",
                f"-ccbin={compiler[0]}",
            ]
            nvcc += gencode(architectures)
            includes += [f"-isystem{cuda.home / 'include'}"]
            defines += ["-DSINKPRUNE_WITH_CUDA"]
            told |= {"SINKPRUNE_CUDA_VERSION": cuda.version, "SINKPRUNE_CUDA_ARCHITECTURES": architectures}
            link += [f"-L{cuda.static_runtime()}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        else:
            told["SINKPRUNE_CUDA_SKIPPED"] = cuda.skipped.replace('"', "'").replace("\\", "/")
        quoted = [f'-D{name}="{value}"' for name, value in told.items()]
        quoted += [f"-DSINKPRUNE_SANITIZED={int(sanitize)}"]

        # Editable installs, wheels and tests share a folder for each kind: nothing is compiled twice.
        kind = "sanitize" if sanitize else "native"
        if cuda.home:
            kind += "-cuda-" + re.sub(r"\W+", "-", architectures)
        objects = Path("build", f"{kind}-{sys.implementation.cache_tag}").resolve()
        objects.mkdir(parents=True, exist_ok=True)
        steps = []
        for source in map(Path, sources):
            command = [*compiler, *flags, *defines, *includes, "-c"]
            if source.name == "module.cpp":
                command[1:1] = quoted
            if source.suffix == ".cu":
                command = [*nvcc, "-c"]
            if command[0] != "-c":
                steps.append((source.resolve(), objects / f"{source.name}.o", command))
        with (objects / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.compile_steps(steps, objects)
            self.run_command([*compiler, "-shared", *(str(o) for _, o, _ in steps), "-o", str(output), *link])

    def compile_steps(self, steps: list[tuple[Path, Path, list[str]]], folder: Path) -> None:
        """Compiles every (source, object, command); the commands are the same with and without ninja."""
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        beside_python = str(Path(sys.executable).parent)
        ninja = shutil.which("ninja", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
        if not ninja:
            commands = [[*head, str(source), "-o", str(target)] for source, target, head in steps]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(self.run_command, commands))
            return
        lines = ["rule compile", "  command = $head $in -o $out -MD -MF $out.d", "  depfile = $out.d", ""]
        for source, target, head in steps:
            lines += [f"build {ninja_path(target)}: compile {ninja_path(source)}"]
            lines += [f"  head = {shlex.join(head).replace('$', '$$')}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        self.run_command([ninja, "-C", str(folder), "-j", str(jobs), *(["-v"] if self.verbose else [])])

    def run_command(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        output = (done.stdout + done.stderr).strip()
        if done.returncode:
            sys.stderr.write(f"{shlex.join(command)}\n{output}\n")
            errors = [line for line in output.splitlines() if "error" in line.lower()]
            raise Skip(errors[0].strip() if errors else output[-200:] or f"{command[0]} failed")
        if self.verbose:
            sys.stdout.write(f"{shlex.join(command)}\n{output}\n")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["sinkprune", "sinkprune.*"]), "sinkprune.kernels"],
        package_dir={"sinkprune": "sinkprune", "sinkprune.kernels": "kernels"},
        package_data={
            "sinkprune": ["py.typed", "assets/**/*", "templates/*", SKIPPED],
            "sinkprune.kernels": ["configs/*.json"],
        },
        ext_modules=[
            Extension(
                "sinkprune._C",
                sources=sorted(
                    str(path) for path in Path("csrc").glob("*.c*") if path.suffix in (".cpp", ".cu")
                ),
                depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildNative},
    )
