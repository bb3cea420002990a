"""Let SmolLM2-135M write training text for "small": samples with a key/value cache, on one core.

    python examples/write_small.py --run runs/small --tokens 100000      # written-0000.safetensors, …

Every sample starts a text: after the end-of-text token, with one of ``OPENINGS`` or nothing at all. Sampling
is at temperature 1 within the smallest set of probability ``TOP_P``. A file is a batch; the number of a batch
seeds it, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from train_small import LENGTH, Student, write

from sinkprune.checkpoints.small import END, MASK, find_base, read_base, read_tokenizer
from sinkprune.models.rotary import rotary_table
from sinkprune.ops.elementwise import apply_rotary

TOP_P = 0.92
BATCH = 64
OPENINGS = (
    "", "", "", "", "From Wikipedia, the free encyclopedia\n\n", "From Wikipedia, the free encyclopedia\n\n",
    "The ", "In 18", "In 19", "He was born in ", "She was ", "The city of ", "The river ", "A species of ",
    "The history of ", "Scientists ", "According to ", "Once upon a time", "Chapter 1\n\n", "# ",
    "The film ", "The company ", "The war ", "A theory ", "During the ", "The song ", "The team ",
    "Question: ",
)  # fmt: skip


class Writer:
    """The base with a cache of keys and values for ``batch`` sequences of ``LENGTH`` tokens."""

    def __init__(self, student: Student, batch: int) -> None:
        self.student = student
        config = student.config
        shape = (student.layers, 2, batch, config.kv_heads, LENGTH, config.head_dim)
        self.cache = torch.zeros(shape, dtype=torch.bfloat16)
        self.rotary = rotary_table(torch.arange(LENGTH), config.head_dim, config.rope_theta)

    def next_logits(self, ids: Tensor, position: int) -> Tensor:
        """Logits ``[B, V]`` after the tokens ``ids`` ``[B]`` at ``position``."""
        s, c = self.student, self.student.config
        cos, sin = (table[position : position + 1] for table in self.rotary)
        x = F.embedding(ids, s.table)[:, None]
        for i in range(s.layers):
            qkv, out, gate_up, down = s.groups[4 * i : 4 * i + 4]
            joined = s.project(s.norm(x, f"layers/{i}/input_layernorm"), qkv)
            parts = joined.unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            q, k, v = parts.split([c.num_attention_heads, c.kv_heads, c.kv_heads], dim=1)
            self.cache[i, 0, :, :, position] = apply_rotary(k, cos, sin)[:, :, 0]
            self.cache[i, 1, :, :, position] = v[:, :, 0]
            keys, values = self.cache[i, :, :, :, : position + 1]
            stacked = apply_rotary(q, cos, sin).reshape(len(ids), c.kv_heads, -1, c.head_dim)
            weights = (stacked @ keys.mT * c.head_dim**-0.5).softmax(-1)
            x = x + s.project((weights @ values).flatten(1)[:, None], out)
            gate, up = s.project(s.norm(x, f"layers/{i}/post_attention_layernorm"), gate_up).chunk(2, -1)
            x = x + s.project(F.silu(gate) * up, down)
        return (s.norm(x, "norm")[:, 0].bfloat16() @ s.low_table.T).float()

    def text(self, openings: list[list[int]], generator: torch.Generator) -> Tensor:
        """``[B, LENGTH]`` tokens that begin with ``openings``; an ended text is followed by the next one."""
        ids = torch.full((len(openings), LENGTH), -1)
        for row, opening in zip(ids, openings, strict=True):
            row[: len(opening)] = torch.tensor(opening)
        for position in range(LENGTH - 1):
            logits = self.next_logits(ids[:, position], position)
            logits[:, END + 1 : MASK + 1] = -torch.inf
            top, index = logits.softmax(-1).topk(200)
            top = top.masked_fill(top.cumsum(-1) - top > TOP_P, 0.0)
            drawn = index.gather(1, torch.multinomial(top, 1, generator=generator))[:, 0]
            given = ids[:, position + 1]
            ids[:, position + 1] = torch.where(given < 0, drawn, given)
        return ids


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="runs/small", help="folder of the training run")
    parser.add_argument("--tokens", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run, tokenizer = Path(options.run), read_tokenizer(find_base())
    run.mkdir(parents=True, exist_ok=True)
    openings = [[END, *tokenizer(text, add_special_tokens=False).input_ids] for text in OPENINGS]
    writer = Writer(Student(*read_base(find_base())), BATCH)
    for number in range(-(-options.tokens // (BATCH * LENGTH))):
        path = run / f"written-{number:04d}.safetensors"
        if path.exists():
            continue
        started = time.monotonic()
        generator = torch.Generator().manual_seed(number)
        picks = torch.randint(0, len(openings), (BATCH,), generator=generator).tolist()
        ids = writer.text([openings[pick] for pick in picks], generator)
        write({"ids": ids}, path)
        rate = ids.numel() / (time.monotonic() - started)
        print(f"{path} {rate:.0f} tokens/s {tokenizer.decode(ids[0])[:300]!r}", flush=True)


if __name__ == "__main__":
    main()
