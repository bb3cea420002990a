"""The most anonymous memory that a streamed run takes, beside what was said before: for a process of its own.

anonymous_memory.py FOLDER OUT ROWS LENGTH RATIO [ADDRESSES]

With ADDRESSES, the process may map no more bytes than that besides what it has when it begins.
"""

import json
import resource
import sys
import threading
import time
from pathlib import Path

import torch

import sinkprune as sp
from sinkprune.checkpoints import streaming


def told(what: str) -> int:
    """Bytes of this process: ``RssAnon``, anonymous pages; ``VmSize``, all that is mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise OSError(f"this kernel does not tell {what}")


class Peak(threading.Thread):
    """Samples the anonymous memory every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            self.most = max(self.most, told("RssAnon"))
            time.sleep(0.005)


def main(folder: str, out: str, sequences: int, length: int, ratio: float, addresses: int = 0) -> None:
    torch.set_num_threads(1)
    streaming.give_memory_back()
    warm, _ = sp.load("tiny")  # what libraries set up once
    text = torch.arange(400) % 61
    few = sp.calibrate(warm, text, length=16, sequences=1)
    plan = sp.plan(warm, calibration=few, ratio=ratio)
    sp.apply(warm, plan, calibration=few)
    del warm
    peak = Peak()
    before = told("RssAnon")
    peak.start()
    if addresses:
        resource.setrlimit(resource.RLIMIT_AS, (told("VmSize") + addresses,) * 2)
    model, _ = streaming.opened(folder, out)
    rows = sp.calibrate(model, text, length=length, sequences=sequences)
    said = streaming.peak_bytes(model, rows, kept_channels=1 - ratio)
    streaming.begin(out, {})
    options = {"ratio": ratio, "unit": "parameters", "targets": ("heads", "mlp")}
    plan = streaming.planned(out, lambda: sp.plan(model, calibration=rows, **options))
    streaming.prune_streamed(model, plan, out, calibration=rows)
    peak.over.set()
    peak.join()
    print(json.dumps({"said": said, "most": peak.most - before}))


if __name__ == "__main__":
    main(
        sys.argv[1],
        sys.argv[2],
        int(sys.argv[3]),
        int(sys.argv[4]),
        float(sys.argv[5]),
        *map(int, sys.argv[6:]),
    )
