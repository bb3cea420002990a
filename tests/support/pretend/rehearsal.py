"""A Python interpreter's command line on the pretend device, with the project's scripts at toy size.

rehearsal.py [-P] -c CODE | -m MODULE ARGUMENTS | SCRIPT ARGUMENTS
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TINY = {"d_model": 64, "n_heads": 4, "n_layers": 1, "mlp_hidden_size": 96, "vocab_size": 80}


def main(arguments: list[str]) -> None:
    if arguments and arguments[0] == "-P":
        del arguments[0]
    if arguments[:2] == ["-m", "pip"]:
        return pip(arguments[2:])
    sys.path[:1] = [str(HERE.parent), str(ROOT)]
    sys.executable = str(HERE / "python")
    import pretend

    pretend.install()
    from sinkprune.kernels import probe

    probe.ask = lambda index, limit=0.0: None  # the specialised form is machine code, and there is none here
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        if arguments[1] == "pytest":
            sys.argv += [
                "-k",
                os.environ.get(
                    "REHEARSED_TESTS",
                    "gpu and not 4097 and not 1024 and not specialised or odd and not 16 and not opcheck",
                ),
            ]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        script = Path(arguments[0]).resolve()
        sys.argv = [str(script), *arguments[1:]]
        sys.path.insert(0, str(script.parent))
        run(script)
    return None


def pip(arguments: list[str]) -> None:
    """An install that would ask the network fails, as where there is none; nothing is built here."""
    if "--no-index" not in arguments or "--no-build-isolation" not in arguments:
        sys.exit(f"pip would ask an index, and there is no network: {' '.join(arguments)}")
    print("pretended: pip", *arguments)


def run(script: Path) -> None:
    """The script's ``main`` with its sizes made small."""
    spec = importlib.util.spec_from_file_location(f"rehearsed_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    SMALL.get(script.name, lambda module: None)(module)
    code = module.main()
    if code:
        sys.exit(code)


def small_kernels(module: Any) -> None:
    module.MODELS = {"LLaDA-8B": (4, 4, 16), "Dream-7B": (4, 2, 16)}
    module.LENGTHS = module.QUICK_LENGTHS = (40,)
    module.UPDATE = (2, 2, 64)
    module.ROUNDS = module.QUICK_ROUNDS = module.GRAPH_CALLS = 2


def small_latency(module: Any) -> None:
    import functools

    import torch
    from speed import latency_groups

    from sinkprune.planning import hardware

    for name, sizes in module.SHAPES.items():
        module.SHAPES[name] = {**TINY, **({"n_kv_heads": 2} if "n_kv_heads" in sizes else {})}
    hardware.measure = functools.partial(hardware.measure, elements=1 << 12, size=64)
    latency_groups.REPLAYS, latency_groups.REMOVED = 2, (0.5,)
    case = module.Case("LLaDA-8B", torch.bfloat16, 1, 16, 1, 1)
    module.cases = lambda device, quick: [case]
    main = module.main

    def measured() -> Any:
        from pretend import memory

        code = main()
        estimate = module.needed_bytes(case)
        print(f"pretended: {memory.reserved_peak} bytes at most, {estimate} estimated", file=sys.stderr)
        return code

    module.main = measured


def small_repack(module: Any) -> None:
    module.LAYERS = module.QUICK_LAYERS


SMALL: dict[str, Callable[[Any], None]] = {
    "kernels.py": small_kernels,
    "latency.py": small_latency,
    "repack.py": small_repack,
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:])
