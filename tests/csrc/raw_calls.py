"""Nonsense for every op behind the public functions: it is refused or served, and the process must live.

    python tests/csrc/raw_calls.py --calls 10000        the table of docs/native.md; `make fuzz`

A call is an op and a number: fitting arguments drawn from it, up to three of them then made unfit in shape,
dtype, strides, storage, values, device or kind. Calls are made in a process of their own, with a limit on its
memory, that writes down each call before it makes it: where it dies, the next process goes on after that
call. Also held: a refused call has written nothing, and refuses by an ordinary exception.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMESPACES = ("sinkprune", "sinkprune_native")
MEMORY_BYTES = 4 << 30  # above what is mapped when calls begin
SECONDS_A_CALL = 20
ORDINARY = (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError, MemoryError, OverflowError)
HUGE = (-(2**63), -(2**31) - 1, -2, -1, 0, 1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)

Arguments = dict[str, Any]


# What fits. Small, since Triton's interpreter walks every block.


def attention_like(rng: random.Random) -> Arguments:
    b, hkv, group, lq, lk = (rng.randint(1, n) for n in (2, 2, 2, 20, 20))
    d = rng.choice([1, 3, 8, 16])
    hq = hkv * group
    dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    given = rng.random() < 0.5
    return {
        "q": torch.randn(b, hq, lq, d).to(dtype),
        "k": torch.randn(b, hkv, lk, d).to(dtype),
        "kept_heads": kept(rng, hq) if given else None,
        "kv_head_of": torch.randint(hkv, (hq,)) if rng.random() < 0.5 else None,
        "key_padding_mask": torch.rand(b, lk) > 0.2 if rng.random() < 0.5 else None,
        "block_size": rng.randint(1, 9) if given else None,
        "query_positions": torch.randint(-1, 30, (b, lq)) if given or rng.random() < 0.5 else None,
        "key_positions": torch.randint(0, 30, (b, lk)) if given else None,
        "scale": d**-0.5,
        "backend": rng.choice(["auto", "reference", "sdpa", "native", "triton"]),
    }


def attention(rng: random.Random) -> Arguments:
    fits = attention_like(rng)
    return fits | {"v": torch.randn_like(fits["k"]), "compact": rng.random() < 0.5}


def column_mass(rng: random.Random) -> Arguments:
    fits = attention_like(rng)
    b, hq, lq, _ = fits["q"].shape
    return fits | {
        "lse": torch.randn(b, hq, lq) + 4 if rng.random() < 0.7 else None,
        "sample": rng.randint(1, 5) if rng.random() < 0.5 else None,
        "offset": torch.randint(0, 9, (1,)) if rng.random() < 0.5 else None,
        "out": torch.zeros(b, hq, fits["k"].shape[2] + rng.randint(0, 2)),
    }


def sink_update(rng: random.Random) -> Arguments:
    b, rows, keys, steps = (rng.randint(1, n) for n in (3, 9, 40, 4))
    traced = steps if rng.random() < 0.5 else 0
    return {
        "mass": torch.rand(rows, keys + rng.randint(0, 3)),
        "state": torch.zeros(rows, 32),
        "sample_of": torch.randint(b, (rows,), dtype=torch.int32),
        "key_padding_mask": torch.rand(b, keys) > 0.2 if rng.random() < 0.5 else None,
        "num_keys": keys,
        "gate_share": 4.0,
        "gate_sigma": 2.0,
        "trace_positions": torch.zeros(traced, rows, dtype=torch.int32),
        "trace_mass": torch.zeros(traced, rows),
        "backend": rng.choice(["auto", "reference", "triton"]),
    }


def rms_norm(rng: random.Random) -> Arguments:
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    x = torch.randn([rng.randint(1, 5) for _ in range(rng.randint(0, 2))] + [rng.randint(1, 40)]).to(dtype)
    weight = torch.randn(x.shape[-1]).to(rng.choice([dtype, torch.float32])) if rng.random() < 0.8 else None
    return {"x": x, "weight": weight, "eps": 1e-6}


def add_rms_norm(rng: random.Random) -> Arguments:
    fits = rms_norm(rng)
    return {"x": fits["x"], "residual": torch.randn_like(fits["x"]), "weight": fits["weight"], "eps": 1e-6}


def swiglu(rng: random.Random) -> Arguments:
    x = rms_norm(rng)["x"]
    return {"gate": x, "up": torch.randn_like(x)}


def rope_qk(rng: random.Random) -> Arguments:
    b, lq, lk, half = (rng.randint(1, n) for n in (2, 9, 9, 8))
    d, dtype = 2 * half + rng.choice([0, 3]), rng.choice([torch.float32, torch.bfloat16])
    tables = [torch.rand([b, 1, n, 2 * half][rng.choice([0, 2]) :]) for n in (lq, lq, lk, lk)]
    tables = [tables[0], torch.rand_like(tables[0]), tables[2], torch.rand_like(tables[2])]
    gains = [torch.randn(d).to(dtype) if rng.random() < 0.5 else None] * 2
    return {
        "q": torch.randn(b, rng.randint(1, 3), lq, d).to(dtype),
        "k": torch.randn(b, rng.randint(1, 3), lk, d).to(dtype),
        **dict(zip(("cos", "sin", "k_cos", "k_sin"), tables, strict=True)),
        **dict(zip(("q_weight", "k_weight"), gains, strict=True)),
        "eps": 1e-6,
    }


def native_gather(rng: random.Random) -> Arguments:
    fits: Arguments = {"outs": [], "sources": [], "ids": [], "pieces": [], "dims": []}
    for _ in range(rng.randint(1, 3)):
        count, limit, piece, other = (rng.randint(1, 5) for _ in range(4))
        dim, dtype = rng.randint(0, 1), rng.choice([torch.float32, torch.bfloat16, torch.int8, torch.int64])
        shapes = [(count * piece, other), (limit * piece, other)]
        out, source = (torch.zeros(s if dim == 0 else s[::-1], dtype=dtype) for s in shapes)
        ids = torch.randint(-1, limit, (count,))
        for name, value in zip(fits, (out, source, ids, piece, dim), strict=True):
            fits[name].append(value)
    return fits


def native_column_mass(rng: random.Random) -> Arguments:
    fits = column_mass(rng)
    b, hq, lq, _ = fits["q"].shape
    lk = fits["k"].shape[2]
    blocks = rng.random() < 0.5
    heads = kept(rng, hq)
    return {name: fits[name] for name in ("q", "k", "out", "scale")} | {
        "lse": torch.randn(b, hq, lq) + 4,
        "heads": heads,
        "kv_heads": torch.randint(fits["k"].shape[1], (len(heads),)),
        "key_valid": fits["key_padding_mask"],
        "query_valid": torch.rand(b, lq) > 0.2 if rng.random() < 0.5 else None,
        "query_block": torch.randint(4, (b, lq), dtype=torch.int32) if blocks else None,
        "key_block": torch.randint(4, (b, lk), dtype=torch.int32) if blocks else None,
        "first": rng.randint(0, 3),
        "step": rng.randint(1, 4),
    }


def kept(rng: random.Random, heads: int) -> Any:
    return torch.tensor(sorted(rng.sample(range(heads), rng.randint(1, heads))))


FITTING: dict[str, Callable[[random.Random], Arguments]] = {
    "sinkprune::attention": attention,
    "sinkprune::column_mass_": column_mass,
    "sinkprune::sink_update_": sink_update,
    "sinkprune::rms_norm": rms_norm,
    "sinkprune::add_rms_norm": add_rms_norm,
    "sinkprune::swiglu": swiglu,
    "sinkprune::rope_qk": rope_qk,
    "sinkprune_native::gather_": native_gather,
    "sinkprune_native::column_mass_": native_column_mass,
}


# What does not fit.


def another_shape(t: Any, rng: random.Random) -> Any:
    sizes = list(t.shape)
    kind = rng.randrange(5)
    if kind == 0 or not sizes:
        return t.unsqueeze(rng.randint(0, len(sizes)))
    if kind == 1:
        return (
            t.flatten() if rng.random() < 0.5 else t.select(rng.randrange(len(sizes)), 0) if t.numel() else t
        )
    at = rng.randrange(len(sizes))
    sizes[at] = rng.choice([0, sizes[at] + 1, max(0, sizes[at] - 1), sizes[at] * 2, 70])
    return torch.ones(sizes, dtype=torch.float32).to(t.dtype)


def huge(t: Any, rng: random.Random) -> Any:
    """As large as sizes can be, by strides of 0."""
    sizes = [rng.choice([1, n, n, 2**16, 2**31 + 1, 2**40]) for n in t.shape]
    return torch.ones(1, dtype=torch.float32).to(t.dtype).expand(sizes) if sizes else t


def another_dtype(t: Any, rng: random.Random) -> Any:
    names = (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int8",
        "uint8",
        "bool",
        "complex64",
    )
    return t.to(getattr(torch, rng.choice(names)))


def other_bytes(t: Any, rng: random.Random) -> Any:
    """The same bytes under another dtype, or the float8 and quantised kinds that many kernels lack."""
    kind = rng.randrange(3)
    if kind == 0:
        return torch.zeros(t.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    if kind == 1:
        return torch.quantize_per_tensor(torch.ones(t.shape), 0.1, 0, torch.qint8)
    return (
        t.view(torch.int32) if t.element_size() == 4 else t.view(torch.int16) if t.element_size() == 2 else t
    )


def other_strides(t: Any, rng: random.Random) -> Any:
    kind = rng.randrange(4)
    if kind == 0 and t.dim() > 1:
        return t.transpose(*rng.sample(range(t.dim()), 2))
    if kind == 1 and t.dim() and t.numel():
        at = rng.randrange(t.dim())
        return t.narrow(at, 0, 1).expand(t.shape)
    if kind == 2 and t.numel():
        return t.flatten().as_strided(t.shape, [rng.choice([0, 1]) for _ in t.shape])
    return torch.stack([t, t], -1)[..., 0]


def other_storage(t: Any, rng: random.Random) -> Any:
    """A tensor whose storage shrank under it."""
    t = t.clone()
    t.untyped_storage().resize_(rng.choice([0, t.numel() - 1 if t.numel() else 0]))
    return t


def shrunken(t: Any) -> bool:
    """What torch itself must not read."""
    return t.layout == torch.strided and not t.is_nested and t.numel() > t.untyped_storage().nbytes()


def other_values(t: Any, rng: random.Random) -> Any:
    t = t.clone()
    if not t.numel() or t.dtype == torch.bool:
        return t
    if t.is_floating_point():
        worst = rng.choice([float("nan"), float("inf"), float("-inf"), 1e30, -5.0])
    else:
        worst = rng.choice(
            [n for n in HUGE if torch.iinfo(t.dtype).min <= n <= torch.iinfo(t.dtype).max] + [7, -3]
        )
    t.view(-1)[rng.randrange(t.numel())] = worst
    return t if rng.random() < 0.5 else torch.full_like(t, worst)


def other_kind(t: Any, rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind == 0:
        return t.to("meta")
    if kind == 1:
        return t.to_sparse()
    if kind == 2 and t.dim() > 1:
        return torch.nested.nested_tensor(list(t.unbind()))
    if kind == 3:
        return torch._efficientzerotensor(t.shape, dtype=t.dtype)
    if kind == 4:
        return torch._neg_view(t)
    if kind == 5 and t.dtype == torch.float32:
        return torch.complex(t, t).conj()
    if kind == 6 and t.is_floating_point():
        return t.clone().requires_grad_()
    return torch.nn.Parameter(t, requires_grad=False)


TENSORS = (another_shape, another_shape, huge, another_dtype, other_bytes, other_strides, other_storage,
           other_values, other_values, other_kind)  # fmt: skip
JUNK = (None, "", "auto", "triton", "\0" * 5, 3, -1, 0.5, [], [1, 2], {}, b"x", True)


def spoiled(value: Any, rng: random.Random) -> Any:
    if rng.random() < 0.04:
        return rng.choice(JUNK)
    if isinstance(value, torch.Tensor):
        return value if shrunken(value) else rng.choice(TENSORS)(value, rng)
    if isinstance(value, list):
        changed = list(value)
        kind = rng.randrange(4)
        at = rng.randrange(len(changed)) if changed else 0
        if kind == 0 or not changed:
            return changed[:-1] if rng.random() < 0.5 else []
        if kind == 1:
            return [*changed, changed[at]]
        changed[at] = spoiled(changed[at], rng)
        return changed
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(HUGE)
    if isinstance(value, float):
        return rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e308, -1e-320])
    if isinstance(value, str):
        return rng.choice(["", "cuda", "native", "TRITON", "\0", "x" * 10_000])
    return rng.choice([torch.ones(3), torch.zeros(2, 4, dtype=torch.int64), rng.choice(HUGE)])


def arguments_of(op: str, number: int) -> Arguments:
    """What call ``number`` of ``op`` is given."""
    rng = random.Random(f"{op} {number}")
    torch.manual_seed(number)
    given = FITTING[op](rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        name = rng.choice(list(given))
        if rng.random() < 0.06:
            given[name] = given[rng.choice(list(given))]  # one tensor in two places
            continue
        with contextlib.suppress(
            RuntimeError, NotImplementedError, TypeError, ValueError
        ):  # no such tensor exists
            given[name] = spoiled(given[name], rng)
    return given


# Making the calls.


def written(op: str, given: Arguments) -> Iterator[tuple[str, Any]]:
    """The tensors that ``op`` may write."""
    for argument in torch._C._get_schema(op, "").arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = given.get(argument.name)
            tensors = value if isinstance(value, list) else [value]
            for tensor in tensors:
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.layout == torch.strided
                    and tensor.device.type == "cpu"
                ):
                    yield argument.name, tensor


def bytes_of(tensor: Any) -> bytes:
    storage = tensor.untyped_storage()
    return bytes(storage) if storage.nbytes() < 1 << 16 else b""


def call(op: str, number: int) -> str:
    """One call; ``served``, ``refused``, or what is wrong with it."""
    given = arguments_of(op, number)
    before = {}
    for name, tensor in written(op, given):
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a kind without a storage
            before[name, id(tensor)] = (tensor, bytes_of(tensor))
    namespace, name = op.split("::")
    try:
        getattr(getattr(torch.ops, namespace), name)(**given)
        return "served"
    except ORDINARY as error:
        changed = [name for (name, _), (tensor, held) in before.items() if bytes_of(tensor) != held]
        return f"refused after writing into {changed[0]}: {error}" if changed else "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Endless(BaseException):
    """A call took too long."""


def give_up(*_: object) -> None:
    raise Endless


def registered() -> list[str]:
    return sorted(n for n in torch._C._dispatch_get_all_op_names() if n.split("::")[0] in NAMESPACES)


def make_calls(numbers: range, journal: Path, only: str) -> None:
    """The process that may die: every call is written to ``journal`` before it is made, its outcome after."""
    faulthandler.enable()
    signal.signal(signal.SIGALRM, give_up)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
    ops = [op for op in registered() if only in op]
    with journal.open("ab", buffering=0) as notes:
        for number in numbers:
            op = ops[number % len(ops)]
            notes.write(f"{number}\t{op}\t".encode())
            signal.alarm(SECONDS_A_CALL)
            try:
                outcome = call(op, number)
            except Endless:
                outcome = "endless"
            signal.alarm(0)
            notes.write(" ".join(outcome.split()).encode() + b"\n")


def fuzz(calls: int, first: int = 0, only: str = "") -> list[tuple[int, str, str]]:
    """(number, op, outcome) of every call; a death is the outcome ``died: SIGNAL``."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder, "journal")
        journal.touch()
        outcomes: list[tuple[int, str, str]] = []
        while len(outcomes) < calls:
            start = first + len(outcomes)
            command = [
                sys.executable,
                __file__,
                "--worker",
                str(start),
                str(first + calls),
                str(journal),
                "--only",
                only,
            ]
            process = subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
            )
            size, since = -1, time.monotonic()
            while process.poll() is None:  # a call that C++ never returns from
                time.sleep(0.1)
                if journal.stat().st_size != size:
                    size, since = journal.stat().st_size, time.monotonic()
                elif time.monotonic() - since > 4 * SECONDS_A_CALL:
                    process.kill()
            lines = journal.read_text().splitlines()
            outcomes = [(int(n), op, outcome) for n, op, outcome in (line.split("\t", 2) for line in lines)]
            if process.returncode:
                said = process.stderr.read() if process.stderr else ""
                if process.returncode > 0 or not outcomes or outcomes[-1][2]:
                    raise RuntimeError(f"the calls could not be made:\n{said[-2000:]}")
                number, op, _ = outcomes[-1]
                name = signal.Signals(-process.returncode).name
                outcomes[-1] = (number, op, f"died: {name}")
                with journal.open("a") as notes:
                    notes.write(f"died: {name}\n")
        return outcomes


ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def table(outcomes: list[tuple[int, str, str]]) -> str:
    lines = ["| op | calls | refused | served | wrong |", "|---|---|---|---|---|"]
    for op in [*sorted({op for _, op, _ in outcomes}), "all"]:
        kinds = Counter(
            outcome if outcome in ("refused", "served") else "wrong"
            for _, of, outcome in outcomes if op in (of, "all")
        )  # fmt: skip
        lines.append(
            f"| `{op}` | {kinds.total()} | {kinds['refused']} | {kinds['served']} | {kinds['wrong']} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--only", default="", help="ops whose name holds this")
    parser.add_argument(
        "--json", action="store_true", help="print every call that went wrong as JSON instead"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        start, stop, journal = chosen.worker
        make_calls(range(int(start), int(stop)), Path(journal), chosen.only)
        return 0
    outcomes = fuzz(chosen.calls, chosen.first, chosen.only)
    wrong = [entry for entry in outcomes if entry[2] not in ("refused", "served")]
    print(json.dumps(wrong, indent=1) if chosen.json else table(outcomes))
    if wrong and not chosen.json:
        print(*(f"{op} {number}: {outcome}" for number, op, outcome in wrong[:40]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    if "--worker" in sys.argv:
        os.environ.update(ENVIRONMENT)
        import torch

        from sinkprune.ops import native

        assert native.available(), native.why_not()
    raise SystemExit(main())
