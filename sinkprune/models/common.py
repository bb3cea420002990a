"""What all native models share: reading a published configuration, attention, MLP, and RoPE tables."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.models.config_keys import PACKED, refuse_unknown
from sinkprune.models.modules import AttentionCall, AttentionObserver
from sinkprune.models.norm import gated
from sinkprune.models.rotary import rotary_table

Config = TypeVar("Config", bound="PublishedConfig")
LARGEST = 2**31  # of sizes and counts


@dataclass(kw_only=True)
class PublishedConfig:
    """The keys of a published ``config.json`` that shape the computation; ``extra`` keeps those that are
    known to change nothing (``config_keys``)."""

    vocab_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    FAMILY: ClassVar[str]
    MODEL_TYPE: ClassVar[str]
    ARCHITECTURE: ClassVar[str | None] = None  # what ``architectures`` names, where nothing else is known
    ROPE_TYPES: ClassVar[tuple[str, ...]] = ("default",)
    # Keys that must be positive integers.
    REQUIRED: ClassVar[tuple[str, ...]]
    # Keys whose other published values name architectures that the family's module does not compute.
    FIXED: ClassVar[dict[str, Any]]

    @property
    @abstractmethod
    def context(self) -> int:
        """The most tokens of a sequence."""

    @property
    @abstractmethod
    def rotary_width(self) -> int:
        """Leading features of a head that RoPE turns."""

    @classmethod
    def from_dict(cls: type[Config], config: dict[str, Any]) -> Config:
        """Read a parsed ``config.json``. Raises ``ValueError`` naming the key that does not fit."""
        for key in cls.REQUIRED:
            if type(config.get(key)) is not int or config[key] < 1:
                raise ValueError(
                    f"{cls.FAMILY} config: '{key}' must be a positive integer, got {config.get(key)!r:.40}"
                )
        for key, expected in cls.FIXED.items():
            if config.get(key, expected) not in (expected, None):
                raise ValueError(
                    f"{cls.FAMILY} config: only {key}={expected!r} is supported, got {config[key]!r}"
                )
        for key in (*PACKED, "rope_scaling"):
            if config.get(key) is not None:
                raise ValueError(
                    f"{cls.FAMILY} config: {key} is not computed here, got {str(config[key])[:80]}"
                )
        rope = config.get("rope_parameters") or {}  # where transformers 5 writes the RoPE keys
        if rope.get("rope_type", "default") not in cls.ROPE_TYPES:
            allowed = " or ".join(f"rope_type={kind!r}" for kind in cls.ROPE_TYPES)
            raise ValueError(f"{cls.FAMILY} config: only {allowed} is supported, got {rope['rope_type']!r}")
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        config = {**{key: rope[key] for key in rope.keys() & {*names, "partial_rotary_factor"}}, **config}
        known = {key: value for key, value in config.items() if key in names}
        result = cls(**known, extra={key: value for key, value in config.items() if key not in names})
        result._check_numbers()
        rows, mask = getattr(result, "vocabulary_rows", result.vocab_size), result.mask_token_id
        if mask is not None and (type(mask) is not int or not 0 <= mask < rows):
            raise ValueError(f"{cls.FAMILY} config: mask_token_id must be one of {rows} ids, got {mask!r}")
        result.check()
        refuse_unknown(cls.FAMILY, result, result.extra, cls.FIXED)
        return result

    def _check_numbers(self) -> None:
        """Raise ``ValueError`` naming a size that is no positive integer, or a number out of all reach."""
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), str(field.type).split(" | ")
            if value is None and "None" in kinds:
                continue
            if kinds[0] == "int" and not field.name.endswith("_token_id"):
                least = 0 if field.default == 0 else 1
                if type(value) is not int or not least <= value < LARGEST:
                    what = "a positive integer" if least else "an integer of at least 0"
                    raise ValueError(
                        f"{self.FAMILY} config: {field.name} must be {what} below 2^31, got {value!r:.40}"
                    )
            elif kinds[0] == "float" and (type(value) not in (int, float) or not 0 < value < 1e30):
                raise ValueError(
                    f"{self.FAMILY} config: {field.name} must be a positive number, got {value!r:.40}"
                )

    def check(self) -> None:
        """Raise ``ValueError`` naming the sizes that do not fit each other."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to ``config.json``."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        named = {} if self.ARCHITECTURE is None else {"architectures": [self.ARCHITECTURE]}
        return {**named, **self.FIXED, **self.extra, **own, "model_type": self.MODEL_TYPE}

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of RoPE at ``positions`` ``[..., L]``, as ``rotary_table`` gives them."""
        return rotary_table(positions, self.rotary_width, self.rope_theta)


class AttentionCore(nn.Module):
    """A dense attention from projected heads on. ``kept_heads`` (an int tensor or None for all) skips heads,
    ``observer`` sees every call."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_heads: Tensor | None = None
        self.observer: AttentionObserver | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **seen: Any) -> Tensor:
        """``[B, Lq, H * D]`` from query ``[B, H, Lq, D]``, key and value ``[B, Hkv, Lk, D]`` after RoPE;
        ``seen`` as in ``ops.attention``."""
        out, lse = ops.attention(q, k, v, kept_heads=self.kept_heads, **seen)
        if self.observer is not None:
            self.observer(AttentionCall(q, k, lse, self.kept_heads, **seen))
        return out.transpose(1, 2).flatten(2)


def skip_channels(hidden: Tensor, kept: Tensor | None) -> Tensor:
    """``hidden`` ``[..., C]`` with zeros in the channels that ``kept``, an int tensor or None for all, does
    not name."""
    if kept is None:
        return hidden
    keep = torch.zeros(hidden.shape[-1], dtype=torch.bool, device=hidden.device)
    return hidden * keep.index_fill(0, kept, True)


class GatedMLP(nn.Module):
    """SwiGLU; ``kept_channels`` (an int tensor or None for all) skips channels."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, channels, bias=False)
        self.up_proj = nn.Linear(hidden, channels, bias=False)
        self.down_proj = nn.Linear(channels, hidden, bias=False)
        self.kept_channels: Tensor | None = None

    def hidden(self, x: Tensor) -> Tensor:
        """What the down projection gets, ``[..., channels]``."""
        return skip_channels(gated(x, self.gate_proj, self.up_proj), self.kept_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x))


@dataclass
class DLMOutput:
    """What a native model returns: ``logits`` ``[B, L, V]``."""

    logits: Tensor


class NativeLM(nn.Module):
    """A language model with RoPE."""

    config: PublishedConfig
    _rotary: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def rotary(
        self, length: int, device: torch.device, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(cos, sin)`` float32 ``[length, rotated]`` of 0 … length-1 (kept up to the longest length seen),
        or of ``positions`` ``[length]``, or ``[B, 1, length, rotated]`` of ``positions`` ``[B, length]``."""
        if positions is not None:
            cos, sin = self.config.table(positions)
            return (cos, sin) if positions.dim() == 1 else (cos.unsqueeze(1), sin.unsqueeze(1))
        table = self._rotary  # looked at once: another thread may put a shorter one there
        if table is None or table[0].shape[0] < length or table[0].device != device:
            table = self._rotary = self.config.table(torch.arange(length, device=device))
        cos, sin = table
        return cos[:length], sin[:length]

    def check_ids(self, input_ids: Tensor) -> None:
        """Raise ``ValueError`` for what is not ``[B, L]``, L from 1 to the context, and for weights that are
        not there."""
        if self.device.type == "meta" and not input_ids.is_meta:
            raise ValueError("the model's weights are not there (on meta, or offloaded): load them first")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must have shape [B, L] with L >= 1, got {tuple(input_ids.shape)}")
        if input_ids.shape[1] > self.config.context:
            raise ValueError(f"{input_ids.shape[1]} tokens exceed the context of {self.config.context}")
