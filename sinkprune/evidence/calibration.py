"""Masked sequences that criteria, repair and weight pruning look at, and a model's blocks one at a time on
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.evidence.own_thread import own_thread
from sinkprune.files import whole_file
from sinkprune.models.streamed import stream_of

LEVELS = (0.15, 0.5, 0.85)


@dataclass(frozen=True)
class Calibration:
    """Sequences with some of their tokens masked.

    Attributes:
        ids: int64 ``[N, L]``, the mask token where ``masked``.
        targets: int64 ``[N, L]``, the tokens as they were.
        masked: bool ``[N, L]``, at least one per row.
        valid: bool ``[N, L]``, False at padding; None where nothing is padded.
    """

    ids: Tensor
    targets: Tensor
    masked: Tensor
    valid: Tensor | None = None

    def batches(self, size: int) -> Iterator[Calibration]:
        """Parts of at most ``size`` rows, in order."""
        for first in range(0, len(self.ids), size):
            part = slice(first, first + size)
            valid = None if self.valid is None else self.valid[part]
            yield Calibration(self.ids[part], self.targets[part], self.masked[part], valid)


def calibrate(
    model: nn.Module | Adapter,
    text: str | Sequence[str] | Tensor,
    *,
    tokenizer: Any = None,
    sequences: int = 32,
    length: int = 128,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    never_mask: Sequence[int] = (),
    mask_token_id: int | None = None,
) -> Calibration:
    """``sequences`` windows of ``text``, drawn by ``seed``, each masked at every one of ``levels``.

    Args:
        model: of a known family.
        text: one string or int64 ids ``[N]`` to draw windows of ``length`` tokens from; or separate rows:
            strings, or ids ``[rows, L]`` (with ``attention_mask`` where padded), of which ``sequences`` are
            drawn whole.
        tokenizer: for strings.
        sequences, length: how many windows and their tokens; fewer rows than ``sequences`` are all taken.
        levels: shares of tokens to mask, in (0, 1].
        seed: of the windows and the masks.
        attention_mask: bool or int ``[rows, L]``, 1 at valid tokens of given rows.
        never_mask: token ids that are never masked (separators, special tokens).
        mask_token_id: instead of the config's; where that names none, the tokenizer's is taken.

    Raises:
        ValueError: a text shorter than one window or without a token to mask, sizes or levels out of range,
            no mask token.
    """
    adapter = model if isinstance(model, Adapter) else adapter_for(model)
    mask_id = adapter.mask_id(mask_token_id, tokenizer)
    if sequences < 1 or length < 1 or not levels or not all(0 < level <= 1 for level in levels):
        raise ValueError(
            "sequences and length must be at least 1 and levels lie in (0, 1], got "
            f"{sequences}, {length} and {tuple(levels)}"
        )
    generator = torch.Generator().manual_seed(seed)
    rows, valid = text_rows(text, tokenizer, length, attention_mask)
    if isinstance(rows, Tensor) and rows.dim() == 1:
        if len(rows) < length:
            raise ValueError(f"the text has {len(rows)} tokens, fewer than one window of {length}")
        starts = torch.randint(0, len(rows) - length + 1, (sequences,), generator=generator)
        rows, valid = rows[starts[:, None] + torch.arange(length)], None
    else:
        chosen = torch.randperm(len(rows), generator=generator)[:sequences]
        rows, valid = rows[chosen], None if valid is None else valid[chosen]
    maskable = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid.clone()
    for token in never_mask:
        maskable &= rows != token
    if not maskable.any(1).all():
        raise ValueError("every calibration row needs a token that may be masked")
    masked = torch.cat([draw_masks(maskable, level, generator) for level in levels])
    targets = rows.repeat(len(levels), 1)
    repeated = None if valid is None else valid.repeat(len(levels), 1)
    return Calibration(targets.masked_fill(masked, mask_id), targets, masked, repeated)


def text_rows(
    text: str | Sequence[str] | Tensor, tokenizer: Any, length: int, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Ids ``[N]`` of one text, or ``[rows, L]`` of separate ones with their valid tokens, bool, or None."""
    if isinstance(text, Tensor):
        if text.dim() not in (1, 2) or text.numel() == 0 or text.is_floating_point():
            raise ValueError(f"ids must be integers [N] or [rows, L], got {text.dtype} {tuple(text.shape)}")
        valid = None if attention_mask is None else attention_mask.bool().cpu()
        if valid is not None and valid.shape != text.shape:
            raise ValueError(f"attention_mask must have shape {tuple(text.shape)}, got {tuple(valid.shape)}")
        return text.cpu().long(), None if valid is None or bool(valid.all()) else valid
    if tokenizer is None:
        raise ValueError("text needs a tokenizer; or pass ids")
    if isinstance(text, str):
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long), None
    encoded = [tokenizer.encode(row, add_special_tokens=False)[:length] for row in text]
    if not encoded or not all(encoded):
        raise ValueError("every text needs at least one token, and there must be one text")
    longest = max(map(len, encoded))
    pad = tokenizer.pad_token_id or 0
    rows = torch.tensor([row + [pad] * (longest - len(row)) for row in encoded])
    valid = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in encoded])
    return rows, None if bool(valid.all()) else valid


def draw_masks(maskable: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """A random ``level`` of each row's maskable tokens, rounded, at least one: bool like ``maskable``."""
    counts = (maskable.sum(1) * level).round().clamp(min=1)
    return (random_ranks(maskable, generator) < counts[:, None]) & maskable


def random_ranks(maskable: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of each row's maskable tokens, from 0; the others come after them."""
    noise = torch.rand(maskable.shape, generator=generator)
    return noise.masked_fill(~maskable, 2.0).argsort(-1).argsort(-1)


class BlockStream:
    """A model's blocks one at a time on calibration rows, which are held as hidden states.

    ``advance(layer)`` runs one block on every batch and keeps its outputs as the inputs of the next, so that
    changes to a layer's weights are seen by all later layers, and memory is that of the hidden states.

    Args:
        adapter: of the model, whose weights may change between calls.
        calibration: the rows.
        batch: rows per forward.
    """

    def __init__(self, adapter: Adapter, calibration: Calibration, batch: int = 16) -> None:
        self._adapter, self._blocks = adapter, adapter.blocks()
        self._batches: list[_Batch] = []
        for part in calibration.batches(batch):
            self._batches.append(self._record(part))

    @torch.no_grad()
    def advance(self, layer: int, before: Callable[[Tensor | None], object] | None = None) -> None:
        """Run block ``layer``: its outputs are the hidden states from now on. ``before`` is shown the valid
        tokens of each batch first."""
        for batch in self._batches:
            if before is not None:
                before(batch.valid)
            batch.hidden = _hidden_of(self._run(layer, batch))

    def checkpoint(self, path: Path, layer: int) -> None:
        """Write the hidden states before block ``layer``, whole or not at all."""
        tensors = {f"{i:05d}": batch.hidden.contiguous() for i, batch in enumerate(self._batches)}
        with whole_file(path) as part:
            save_file(tensors | {"layer": torch.tensor(layer)}, part)

    def resume(self, path: Path) -> int:
        """Take the hidden states that ``checkpoint`` wrote; before which block they are, 0 without a file."""
        if not path.exists():
            return 0
        found = load_file(path)
        for i, batch in enumerate(self._batches):
            batch.hidden = found[f"{i:05d}"].to(batch.hidden)
        return int(found["layer"])

    @torch.no_grad()
    def outputs(self, layer: int) -> list[Tensor]:
        """What block ``layer`` gives, ``[rows, L, hidden]`` per batch. The hidden states stay as they are."""
        return [_hidden_of(self._run(layer, batch)) for batch in self._batches]

    @torch.no_grad()
    def visit(self, layer: int, until: nn.Module, look: Callable[[Tensor], None]) -> None:
        """Show ``look`` what reaches the module ``until`` of block ``layer``, batch by batch, and stop there.

        The hidden states stay as they are.
        """

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            look(args[0])
            raise _Reached

        hook = until.register_forward_pre_hook(own_thread(stop))
        try:
            for batch in self._batches:
                with suppress(_Reached):
                    self._run(layer, batch)
        finally:
            hook.remove()

    def tokens(self, layer: int, until: nn.Module) -> Tensor:
        """The valid tokens that reach the module ``until`` of block ``layer``, ``[tokens, n]``."""
        seen: list[Tensor] = []
        self.visit(layer, until, seen.append)
        return self.flat(seen)

    def flat(self, batches: list[Tensor]) -> Tensor:
        """The valid tokens of ``[rows, L, n]`` per batch, ``[tokens, n]``."""
        pairs = zip(batches, self.valid, strict=True)
        return torch.cat([x.flatten(0, 1) if valid is None else x[valid] for x, valid in pairs])

    def _run(self, layer: int, batch: _Batch) -> Any:
        args, keywords = batch.arguments[layer]
        with self._adapter.hiding(batch.valid):
            return self._blocks[layer](batch.hidden, *args, **keywords)

    @property
    def hidden(self) -> list[Tensor]:
        """The hidden states before the next block, ``[rows, L, hidden]`` per batch."""
        return [batch.hidden for batch in self._batches]

    @property
    def valid(self) -> list[Tensor | None]:
        """The valid tokens, bool ``[rows, L]`` per batch; None where nothing is padded."""
        return [batch.valid for batch in self._batches]

    def _record(self, part: Calibration) -> _Batch:
        """One forward, to see what every block is called with."""
        device = self._adapter.device
        first: list[Tensor] = []
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        streamed = stream_of(self._adapter.model) is not None

        def look(block: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            keywords = dict(keywords)
            hidden = args[0] if args else keywords.pop("hidden_states")
            if not first:
                first.append(hidden)
            arguments.append((args[1:], keywords))
            if streamed:  # every block of a native model is called alike
                raise _Reached

        hooks = [
            block.register_forward_pre_hook(own_thread(look), with_kwargs=True) for block in self._blocks
        ]
        try:
            with torch.no_grad(), suppress(_Reached):
                valid = None if part.valid is None else part.valid.to(device)
                self._adapter.predict(part.ids.to(device), valid, slice(0, 1))
        finally:
            for hook in hooks:
                hook.remove()
        return _Batch(first[0], valid, arguments * len(self._blocks) if streamed else arguments)


def _hidden_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


class _Reached(Exception):
    """Nothing after this module is wanted."""


@dataclass
class _Batch:
    hidden: Tensor
    valid: Tensor | None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


def linear(module: nn.Module) -> nn.Linear:
    """``module`` as a linear layer with weights to read. Raises ``ValueError`` for anything else."""
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise ValueError(f"expected a linear layer in floating point, got a {type(module).__name__}")
    return cast(nn.Linear, module)


# The public code's ten noise levels: t = 0.1 … 1.0 of the forward process, and 0.1 % of tokens on top.
TEN_LEVELS = tuple(min(1.0, (1 - 1e-3) * tenth / 10 + 1e-3) for tenth in range(1, 11))
