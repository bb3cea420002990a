"""One dispatch point: which backend serves a call, why another does not, and the torch ops they run behind.

Each operation is one registered op (one boundary for ``torch.compile`` and CUDA graphs). Index lists and
offsets are tensors in its schema, since Python lists would become constants and recompile per layer.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from sinkprune.kernels import reference
from sinkprune.kernels.visibility import Visibility
from sinkprune.ops import _pytorch
from sinkprune.ops._checks import check_attention, check_column_mass, check_sink_update

BACKENDS = ("auto", "reference", "sdpa", "native", "triton")
LARGEST_HEAD = 256


class BackendUnavailable(ValueError):
    """The forced backend cannot serve this call; the message says why."""


def refuse_unknown(backend: str, reason: str) -> None:
    """Raise for a name that is no backend's, and for a ``reason`` why this one cannot serve the call."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if reason:
        raise BackendUnavailable(f"backend {backend!r} cannot serve this call: {reason}")


@functools.cache
def _triton_missing() -> str:
    """Why the Triton kernels cannot be imported, or an empty string."""
    try:
        import sinkprune.kernels.attention  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return ""


def _triton_refuses(q: Tensor, scale: float) -> str:
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA tensor, or the interpreter (TRITON_INTERPRET=1); got a tensor on {q.device}"
    if q.dtype == torch.float64:
        return "it has no float64"
    if not scale > 0:
        return f"it needs scale > 0, got {scale}"
    return _triton_missing()


def _head_too_wide(q: Tensor) -> str:
    return f"its head_dim limit is {LARGEST_HEAD}, got {q.shape[3]}" if q.shape[3] > LARGEST_HEAD else ""


def attention_refused(backend: str, q: Tensor, scale: float, needs_grad: bool) -> str:
    """Why ``backend`` cannot serve this attention call; empty if it can."""
    if backend == "reference":
        return ""
    if backend == "native":
        return "the native extension has no attention"
    if backend == "triton":
        return "it has no gradients" if needs_grad else _triton_refuses(q, scale) or _head_too_wide(q)
    if q.device.type not in ("cpu", "cuda", "meta"):
        return f"it runs on CPU and CUDA, got {q.device}"
    return ""


def choose_attention(q: Tensor, scale: float, irregular: bool, masked: bool, needs_grad: bool) -> str:
    """What "auto" means for a call: ``irregular`` = skipped heads or ragged groups, ``masked`` = any mask."""
    ours_first = q.is_cuda and (irregular or masked)
    order = ("triton", "sdpa", "reference") if ours_first else ("sdpa", "reference")
    return next(b for b in order if not attention_refused(b, q, scale, needs_grad))


def column_mass_refused(backend: str, q: Tensor, k: Tensor, lse: Tensor | None, scale: float) -> str:
    """Why ``backend`` cannot serve this column mass; empty if it can."""
    if backend == "triton":
        return _triton_refuses(q, scale) or _head_too_wide(q)
    if backend == "native":
        from sinkprune.ops import native, native_mass

        if native_mass.serves(q, k, lse):
            return ""
        if not native.available():
            return f"the native extension is missing ({native.why_not()})"
        got = "no lse" if lse is None else f"{q.dtype} on {q.device}"
        return f"it needs CPU tensors up to float32 and a float32 lse, got {got}"
    return ""


def choose_column_mass(q: Tensor, k: Tensor, lse: Tensor | None, scale: float) -> str:
    order: tuple[str, ...] = ("triton", "sdpa") if q.is_cuda else ("native", "sdpa")
    return next(b for b in order if not column_mass_refused(b, q, k, lse, scale))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_heads: Tensor | None,
    kv_head_of: Tensor | None,
    key_padding_mask: Tensor | None,
    block_size: int | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    compact: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op's one implementation. ``out`` always lies in memory as ``[B, Lq, H, D]``, so that joining the
    heads costs no copy, and ``lse`` as ``[B, H, Lq]``."""
    seen = Visibility(key_padding_mask, block_size, query_positions, key_positions)
    kept_heads, kv_head_of = check_attention((q, k, v), kept_heads, kv_head_of, seen)
    if backend == "auto":
        irregular = kept_heads is not None or kv_head_of is not None
        backend = choose_attention(q, scale, irregular, seen.limited, needs_grad=False)
    else:
        refuse_unknown(backend, attention_refused(backend, q, scale, needs_grad=False))
    if backend == "sdpa":
        out, lse = _pytorch.attention(q, k, v, kept_heads, kv_head_of, seen, scale, compact)
    else:
        if backend == "triton":
            from sinkprune.kernels.attention import attention as run
        else:
            run = reference.attention  # type: ignore[assignment]
        heads = {"kept_heads": kept_heads, "kv_head_of": kv_head_of}
        out, lse = run(q, k, v, **heads, scale=scale, compact=compact, **seen._asdict())
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_heads: Tensor | None,
    kv_head_of: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *seen, _scale, compact, _backend = rest
    check_attention((q, k, v), kept_heads, kv_head_of, Visibility(*seen))
    b, hq, lq, d = q.shape
    h = kept_heads.shape[0] if kept_heads is not None and compact else hq
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(b, lq, h, d).transpose(1, 2), q.new_empty(b, h, lq, dtype=wide)


def _column_mass_(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    kept_heads: Tensor | None,
    kv_head_of: Tensor | None,
    key_padding_mask: Tensor | None,
    block_size: int | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    sample: int | None,
    offset: Tensor | None,
    out: Tensor,
    backend: str,
) -> None:
    """The op's one implementation; nothing to compute is the same zeros everywhere."""
    seen = Visibility(key_padding_mask, block_size, query_positions, key_positions)
    kept_heads, kv_head_of = check_column_mass(q, k, lse, kept_heads, kv_head_of, seen, sample, offset, out)
    if backend == "auto":
        backend = choose_column_mass(q, k, lse, scale)
    else:
        refuse_unknown(backend, column_mass_refused(backend, q, k, lse, scale))
    options: dict[str, Any] = {"kept_heads": kept_heads, "kv_head_of": kv_head_of, **seen._asdict()}
    number = q.shape[1] if kept_heads is None else kept_heads.shape[0]
    if 0 in (q.shape[0], number, q.shape[2], k.shape[2]):
        out.zero_()
    elif backend == "sdpa":
        _pytorch.column_mass_(out, q, k, lse, kept_heads, kv_head_of, seen, scale, sample, offset)
    elif backend == "native":
        from sinkprune.ops import native_mass

        assert lse is not None
        native_mass.column_mass(q, k, lse, **options, scale=scale, sample=sample, offset=offset, out=out)
    elif backend == "triton":
        from sinkprune.kernels.column_mass import column_mass_

        column_mass_(out, q, k, lse, **options, scale=scale, sample=sample, offset=offset)
    else:
        lk = k.shape[2]
        out[:, :, :lk] = reference.column_mass(
            q, k, lse, **options, scale=scale, sample=sample,
            offset=0 if offset is None else int(offset),
        )  # fmt: skip
        out[:, :, lk:] = 0


def _column_mass_fake(
    q: Tensor, k: Tensor, lse: Tensor | None, kept_heads: Tensor | None, kv_head_of: Tensor | None, *rest: Any
) -> None:
    *seen, _scale, sample, offset, out, _backend = rest
    check_column_mass(q, k, lse, kept_heads, kv_head_of, Visibility(*seen), sample, offset, out)


def _sink_update_(
    mass: Tensor,
    state: Tensor,
    sample_of: Tensor,
    key_padding_mask: Tensor | None,
    num_keys: int,
    gate_share: float,
    gate_sigma: float,
    trace_positions: Tensor,
    trace_mass: Tensor,
    backend: str,
) -> None:
    check_sink_update(mass, state, sample_of, key_padding_mask, num_keys, trace_positions, trace_mass)
    refused = _triton_refuses(mass, 1.0)
    if backend == "auto":
        backend = "triton" if mass.is_cuda and not refused else "reference"
    elif backend != "reference":
        refuse_unknown(backend, refused if backend == "triton" else f"{backend} has no sink update")
    if backend == "triton":
        from sinkprune.kernels.sink_update import sink_update_

        sink_update_(
            mass, state, sample_of, key_padding_mask, num_keys, gate_share, gate_sigma, trace_positions,
            trace_mass,
        )  # fmt: skip
        return
    step = int(state[0, reference.STEPS]) if trace_positions.shape[0] and state.shape[0] else 0
    position, top = reference.sink_update_(
        mass[:, :num_keys], state, valid=None if key_padding_mask is None
        else key_padding_mask[:, :num_keys].index_select(0, sample_of.long()),
        gate_share=gate_share, gate_sigma=gate_sigma,
    )  # fmt: skip
    if step < trace_positions.shape[0]:
        trace_positions[step], trace_mass[step] = position, top


def _lazy(*arguments: object) -> None:
    """PyTorch would hand on copies of such tensors, and stumble over writing them back."""
    raise ValueError("expected tensors that hold their values; call resolve_neg() or resolve_conj() on views")


_library = torch.library.Library("sinkprune", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? kept_heads, Tensor? kv_head_of, "
    "Tensor? key_padding_mask, SymInt? block_size, Tensor? query_positions, Tensor? key_positions, "
    "float scale, bool compact, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "column_mass_(Tensor q, Tensor k, Tensor? lse, Tensor? kept_heads, Tensor? kv_head_of, "
    "Tensor? key_padding_mask, SymInt? block_size, Tensor? query_positions, Tensor? key_positions, "
    "float scale, SymInt? sample, Tensor? offset, Tensor(a!) out, str backend) -> ()"
)
_library.define(
    "sink_update_(Tensor mass, Tensor(a!) state, Tensor sample_of, Tensor? key_padding_mask, "
    "SymInt num_keys, float gate_share, float gate_sigma, Tensor(b!) trace_positions, "
    "Tensor(c!) trace_mass, str backend) -> ()"
)
for _key in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _key)
    _library.impl("column_mass_", _column_mass_, _key)
    _library.impl("sink_update_", _sink_update_, _key)
for _key in ("Negative", "Conjugate", "ZeroTensor"):
    _library.impl("column_mass_", _lazy, _key)
    _library.impl("sink_update_", _lazy, _key)
_library._register_fake("attention", _attention_fake)
_library._register_fake("column_mass_", _column_mass_fake)
_library._register_fake("sink_update_", lambda *args: None)
