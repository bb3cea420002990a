"""What the pretend device refuses, and what its graphs and memory do; run on it, prints a line for each."""

from __future__ import annotations

import torch
from pretend import memory

from sinkprune.generation.graphs import cuda_capture
from sinkprune.kernels.attention import attention


def refused(what: str, action: object) -> str:
    try:
        action()  # type: ignore[operator]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"{what}: {str(error).splitlines()[0]}"
    return f"{what}: went through"


def captured(action: object) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        action()  # type: ignore[operator]


def freed() -> None:
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x * 2
    del x
    graph.replay()


def strict(action: object) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        action()  # type: ignore[operator]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    a, host = torch.ones(4, device="cuda"), torch.ones(4)
    q = torch.ones(1, 1, 16, 16)
    print(refused("two devices", lambda: a + host))
    print(refused("a CPU tensor in a kernel", lambda: attention(q, q, q, scale=1.0)))
    print(refused("a read in a capture", lambda: captured(a.sum().item)))
    print(refused("a read in strict mode", lambda: strict(a.sum().item)))
    print(refused("a copy to the host in a capture", lambda: captured(a.cpu)))
    print(refused("an index of booleans in a capture", lambda: captured(lambda: a[a > 0])))
    print(refused("freed memory", freed))
    memory.total, total = 10_000_000, memory.total
    print(refused("no room", lambda: torch.empty(20_000_000, dtype=torch.uint8, device="cuda")))
    memory.total = total
    print(refused("a read outside", a.sum().item))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a += 1
        out = a * 2
    print("a capture runs nothing:", a.tolist() == [1.0] * 4 and bool(out.isnan().all()))
    a.fill_(5.0)
    graph.replay()
    print("a replay reads what is there now:", out.tolist() == [12.0] * 4)
    kept = torch.full((4,), 3.0, device="cuda")
    replay, doubled = cuda_capture(lambda kept=kept: kept * 2)
    del kept
    replay()
    print("a captured step keeps what it reads:", doubled.tolist() == [6.0] * 4)
    before = torch.cuda.memory_allocated()
    block = torch.empty(1000, device="cuda")
    view = block[10:]
    grown = torch.cuda.memory_allocated() - before
    del block
    still = torch.cuda.memory_allocated() - before
    del view
    left = torch.cuda.memory_allocated() - before
    print("memory is counted once and until its last view goes:", (grown, still, left) == (4000, 4000, 0))


if __name__ == "__main__":
    main()
