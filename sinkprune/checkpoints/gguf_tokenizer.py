"""A tokenizer.json as llama.cpp reads it: byte-level BPE with the name of its pre-tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sinkprune.checkpoints.trees import Trimmed

if TYPE_CHECKING:
    import gguf

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama_token_type

# How a text is cut before merging -> llama.cpp's name of that rule. The patterns are those of published
# tokenizers.
_CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "": "gpt-2",  # tokenizers' own ByteLevel pattern
    _CASES + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CASES + _WORDS + r"\p{N}" + _REST: "qwen2",
}


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, trimmed: Trimmed) -> None:
    """Write ``tokenizer`` (transformers' fast one, or None) and the model's special tokens.

    Rows of the embedding beyond the tokenizer's are named ``[PAD…]`` and unused.

    Raises:
        ValueError: not byte-level BPE, a pre-tokenizer whose name in llama.cpp is not known, or more tokens
            than rows.
    """
    for role, token in trimmed.tokens.items():
        writer.add_uint32(f"tokenizer.ggml.{_ROLES[role]}_token_id", token)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(
            f"only byte-level BPE tokenizers can be written to GGUF, got {model.get('type')}: export "
            "without one (tokenizer=None) and tokenise outside llama.cpp"
        )
    pre = _pre_tokenizer(described)
    rows = trimmed.geometry.vocabulary
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    added = {token["id"]: token for token in described["added_tokens"]}
    for content, token in [*model["vocab"].items(), *((t["content"], i) for i, t in added.items())]:
        if token >= rows:
            raise ValueError(f"token {content!r} has id {token}, and the model's vocabulary has {rows} rows")
        tokens[token] = content
        types[token] = NORMAL if token not in added else CONTROL if added[token]["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(_adds_bos(described))
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


_ROLES = {"mask": "mask", "pad": "padding", "eos": "eos", "bos": "bos"}


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name of how the text is cut."""
    if described.get("normalizer") not in (None, {"type": "NFC"}):
        raise ValueError(f"llama.cpp does not normalise as this tokenizer does: {described['normalizer']}")
    pre = described.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    known = len(levels) == 1 and len(steps) == 1 + len(patterns) and not levels[0]["add_prefix_space"]
    pattern = patterns[0] if len(patterns) == 1 else None if patterns else ""
    if not known or levels[0]["use_regex"] != (not patterns) or pattern not in PRE_TOKENIZERS:
        raise ValueError(
            f"the name that llama.cpp has for this tokenizer's pre-tokenizer is not known: "
            f"{json.dumps(pre)[:200]}"
        )
    return PRE_TOKENIZERS[pattern]


def _adds_bos(described: dict[str, Any]) -> bool:
    """Whether encoding puts a token before the text."""
    single = (described.get("post_processor") or {}).get("single") or []
    return bool(single) and "SpecialToken" in single[0]


def read_tokenizer(keys: dict[str, Any]) -> Any:
    """The tokenizer of a GGUF file's keys, or None where it has none that is known here."""
    names = {name: pattern for pattern, name in PRE_TOKENIZERS.items()}
    pre = keys.get("tokenizer.ggml.pre")
    if keys.get("tokenizer.ggml.model") != "gpt2" or pre not in names:
        return None
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    normal = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in keys["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(normal, merges, ignore_merges=pre == "llama-bpe"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not names[pre])
    cut = [pre_tokenizers.Split(Regex(names[pre]), "isolated")] if names[pre] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, level]) if cut else level
    tokenizer.decoder = decoders.ByteLevel()
    added = [(tokens[i], kind) for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in added if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(t) for t, kind in added if kind == USER_DEFINED])
    named = {
        f"{role}_token": tokens[keys[key]]
        for role, name in _ROLES.items()
        if (key := f"tokenizer.ggml.{name}_token_id") in keys
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
