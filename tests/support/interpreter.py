"""Make bfloat16 right in Triton's interpreter (Triton 3.6 to 3.9), for tests.

The interpreter holds bf16 as uint16 and does integer arithmetic on the bits, so products, sums and
comparisons are silently wrong, and a cast from float32 truncates instead of rounding. `mend` widens bf16
operands to float32 around each operation and rounds results to nearest even. ``tl.sum`` of bf16 stays
wrong: kernels add in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bits(x: np.ndarray) -> np.ndarray:
    """float32 values to bf16 bits, to nearest even; NaN stays a quiet NaN."""
    x = np.ascontiguousarray(x, np.float32)
    raw = x.view(np.uint32)
    rounded = ((raw.astype(np.uint64) + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(InterpreterBuilder, name)
    setattr(InterpreterBuilder, name, functools.wraps(original)(make(original)))


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, a, b, d, *rest: original(self, _widen(a), _widen(b), d, *rest)


def _binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not _is_bf16(lhs):
            return original(self, lhs, rhs, op)
        result = op(_widen(lhs).data, _widen(rhs).data)
        return TensorHandle(result if result.dtype == np.bool_ else _bits(result), tl.bfloat16)

    return run


def _unary(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, arg: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not _is_bf16(arg):
            return original(self, arg, op)
        return TensorHandle(_bits(op(_widen(arg).data)), tl.bfloat16)

    return run


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, source: TensorHandle, dtype: Any, *rest: Any) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return TensorHandle(_bits(source.data), tl.bfloat16)
        return original(self, source, dtype, *rest)

    return run


@functools.cache
def mend() -> None:
    """Patch the interpreter, once per process, before the first kernel runs."""
    _wrap("create_dot", _dot)
    _wrap("binary_op", _binary)
    _wrap("unary_op", _unary)
    _wrap("cast_impl", _cast)
    _wrap("create_fp_to_fp", _cast)
