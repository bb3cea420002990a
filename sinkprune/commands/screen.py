"""Text filling in, on a terminal: one picture a denoising step, each over the one before."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any, TextIO

from sinkprune.generation.denoising import Step

HOLE = "░"  # a token that is still masked


class Screen:
    """A callback for ``denoise`` that draws what is written so far.

    Args:
        out: the terminal.
        tokenizer: of the model.
        mask_id: the token of a hole.
        gen_length: tokens that are filled.
    """

    def __init__(self, out: TextIO, tokenizer: Any, mask_id: int, gen_length: int) -> None:
        self._out, self._tokenizer, self._mask_id, self._count = out, tokenizer, mask_id, gen_length
        self._drawn = 0  # lines of the picture that is there

    def __call__(self, step: Step) -> None:
        size = shutil.get_terminal_size()
        rows = step.ids[:, -self._count :].tolist()
        lines = [line for row in rows for line in textwrap.wrap(self.text(row), size.columns - 1) or [""]]
        lines = lines[-(size.lines - 1) :]
        self.clear()
        self._out.write("".join(f"{line}\n" for line in lines))
        self._out.flush()
        self._drawn = len(lines)

    def clear(self) -> None:
        """Take the picture away."""
        if self._drawn:
            self._out.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def text(self, row: list[int]) -> str:
        """The tokens of one sample, holes where there is none yet."""
        end = self._tokenizer.eos_token_id
        row = row[: row.index(end)] if end in row else row
        parts: list[str] = []
        run: list[int] = []
        for token in [*row, self._mask_id]:
            if token != self._mask_id:
                run.append(token)
                continue
            parts += [self._tokenizer.decode(run, skip_special_tokens=True), HOLE]
            run = []
        return "".join(parts[:-1])
