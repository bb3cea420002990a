"""rxnfp's masked language model of chemical reactions, as a judge that nobody here trained.

``pip install --no-deps rxnfp==0.1.0`` brings the weights (MIT, Schwaller et al. 2021), which are read
directly: 12 layers of 4 heads, 6.7 M parameters, trained with 15 % of tokens masked. It is judged at noise
levels up to one half.
"""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLS, SEP, MASK, ARROW = "[CLS]", "[SEP]", "[MASK]", ">>"
LEVELS = (0.15, 0.3, 0.5)


def load() -> tuple[Any, ReactionTokenizer]:
    """A transformers ``BertForMaskedLM`` in evaluation mode, and its tokenizer."""
    from transformers import BertConfig, BertForMaskedLM

    try:
        installed = metadata.distribution("rxnfp")
    except metadata.PackageNotFoundError as error:
        raise ValueError("rxnfp is not installed: pip install --no-deps rxnfp==0.1.0") from error
    folder = Path(str(installed.locate_file("rxnfp/models/transformers/bert_pretrained")))
    tokenizer = ReactionTokenizer((folder / "vocab.txt").read_text().split("\n"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("output_past"), config.pop("use_bfloat16"), config.pop("pruned_heads")
    model = BertForMaskedLM(BertConfig(**config, mask_token_id=tokenizer.ids[MASK]))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    state = {name: tensor for name, tensor in state.items() if "seq_relationship" not in name}
    missing, unexpected = model.load_state_dict(state, strict=False)
    unexpected = [name for name in unexpected if not name.startswith("bert.pooler")]
    missing = [name for name in missing if name != "cls.predictions.decoder.bias"]  # tied to predictions.bias
    if missing or unexpected:
        raise ValueError(f"rxnfp's weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval(), tokenizer


class ReactionTokenizer:
    """SMILES to ids: the longest entry of the vocabulary first, between ``[CLS]`` and ``[SEP]``."""

    def __init__(self, vocabulary: list[str]) -> None:
        self.ids = {token: i for i, token in enumerate(vocabulary) if token}
        self.pad_token_id, self.eos_token_id = self.ids["[PAD]"], self.ids[SEP]
        # The arrow stands for a layout of reagents that rxnfp was not trained on: it is never masked.
        self.special = [self.ids["[PAD]"], self.ids[CLS], self.ids[SEP], self.ids[ARROW]]
        self._tokens = list(vocabulary)
        entries = sorted(
            (t for t in self.ids if not t.startswith(("[unused", "[PAD"))), key=len, reverse=True
        )
        self._pattern = re.compile("|".join(map(re.escape, entries)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a reaction, always with its two special tokens. Raises ``ValueError`` for foreign text."""
        tokens = self._pattern.findall(text)
        if "".join(tokens) != text:
            raise ValueError(f"not a reaction of rxnfp's vocabulary: {text[:40]!r}")
        return [self.ids[CLS], *(self.ids[token] for token in tokens), self.ids[SEP]]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self._tokens[i] for i in ids if not (skip_special_tokens and i in self.special))


def read_reactions(
    path: str | Path, tokenizer: ReactionTokenizer, most_tokens: int = 128
) -> tuple[Tensor, Tensor]:
    """Ids int64 and valid tokens bool, ``[rows, L]``, of a file's reactions; longer ones are left out."""
    rows = [tokenizer.encode(line) for line in Path(path).read_text("utf-8").split()]
    rows = [row for row in rows if len(row) <= most_tokens]
    if not rows:
        raise ValueError(f"{path} has no reaction of at most {most_tokens} tokens")
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
