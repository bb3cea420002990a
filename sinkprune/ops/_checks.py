"""Validation at the boundary: every argument once, with errors that name what was expected and what came.

The boundary is the registered op, so that a raw call of it is as safe as the function over it; its shape
function checks the same while a graph is traced. Shapes, dtypes and storages are always checked. Index values
are checked where reading them costs no device synchronisation: Python sequences and CPU tensors. Index
tensors on a CUDA device are trusted, and the kernels guard out-of-range ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import mul

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sinkprune.kernels import reference
from sinkprune.kernels.visibility import Visibility

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Index = Sequence[int] | Tensor


def check_attention(
    tensors: tuple[Tensor, ...],
    kept_heads: Index | None,
    kv_head_of: Index | None,
    seen: Visibility,
) -> tuple[Tensor | None, Tensor | None]:
    """All that attention reads of ``tensors``, q, k and (not for column mass) v; the kept heads and the
    key/value head of each query head (None = the usual grouping) as tensors on q's device."""
    check_queries_keys(*tensors)
    q, k, *_ = tensors
    heads = check_heads(kept_heads, q.shape[1], q.device)
    groups = check_kv_head_of(kv_head_of, q.shape[1], k.shape[1], q.device)
    check_visibility(q, k, seen)
    return heads, groups


def check_column_mass(
    q: Tensor, k: Tensor, lse: Tensor | None, kept_heads: Index | None, kv_head_of: Index | None,
    seen: Visibility, sample: int | None, offset: Tensor | None, out: Tensor,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """`check_attention` for column mass, and what it reads and writes besides."""
    heads, groups = check_attention((q, k), kept_heads, kv_head_of, seen)
    if lse is not None:
        check_lse(lse, q)
    if sample is not None and sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    check_offset(offset, q.device)
    check_mass_out(out, q, k.shape[2])
    return heads, groups


def is_listed(kept_heads: Index | None, kv_head_of: Index | None, q: Tensor) -> bool:
    """Whether an op cannot take these as they are: Python sequences, or tensors on another device."""
    return any(
        x is not None and (not isinstance(x, Tensor) or x.device != q.device)
        for x in (kept_heads, kv_head_of)
    )


def check_queries_keys(q: Tensor, k: Tensor, *v: Tensor) -> None:
    """Rank, dtype, device and size agreement of q ``[B, Hq, Lq, D]``, k and v ``[B, Hkv, Lk, D]``."""
    for name, x in zip("qkv", (q, k, *v), strict=False):
        if not isinstance(x, Tensor):  # an op hands on None where its schema says Tensor
            raise TypeError(f"{name} must be a tensor, got {x}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape [B, H, L, D], got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.dtype not in FLOATS:
            raise TypeError(f"{name} must have q's floating dtype ({q.dtype}), got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device ({q.device}), got {x.device}")
        if x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
        check_storage(name, x)
    if v and v[0].shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v[0].shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in B and D, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if q.shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, got q {tuple(q.shape)}")


def check_heads(kept_heads: Index | None, hq: int, device: torch.device) -> Tensor | None:
    """Kept heads as an integer tensor on ``device``: sorted, unique, within ``0..Hq-1``."""
    if kept_heads is None:
        return None
    heads = _index_tensor("kept_heads", kept_heads, device)
    if heads.shape[0] > hq:
        raise ValueError(f"kept_heads must be sorted, unique and within 0..{hq - 1}, got {heads.shape[0]}")
    ids = _readable_ids(kept_heads)
    if ids is not None:
        if any(after <= before for before, after in pairwise(ids)):
            raise ValueError(f"kept_heads must be sorted and unique, got {_few(ids)}")
        if ids and (ids[0] < 0 or ids[-1] >= hq):
            raise ValueError(f"kept_heads must lie within 0..{hq - 1}, got {_few(ids)}")
    return heads


def check_kv_head_of(kv_head_of: Index | None, hq: int, hkv: int, device: torch.device) -> Tensor | None:
    """The query-to-key/value head map ``[Hq]`` on ``device``, or None where it is the usual grouping."""
    if kv_head_of is None:
        if hkv == 0 or hq % hkv:
            if hq == 0:
                return None
            raise ValueError(f"without kv_head_of, Hq must be a multiple of Hkv, got Hq={hq} and Hkv={hkv}")
        return None
    groups = _index_tensor("kv_head_of", kv_head_of, device)
    if groups.shape[0] != hq:
        raise ValueError(f"kv_head_of must have length Hq={hq}, got {groups.shape[0]}")
    ids = _readable_ids(kv_head_of)
    if ids is not None:
        if ids and (min(ids) < 0 or max(ids) >= hkv):
            raise ValueError(f"kv_head_of must lie within 0..{hkv - 1}, got {_few(ids)}")
        if hkv and hq % hkv == 0 and ids == [h // (hq // hkv) for h in range(hq)]:
            return None
    return groups


def check_visibility(q: Tensor, k: Tensor, seen: Visibility) -> None:
    """Shapes, dtypes and devices of what limits the keys a query sees."""
    b, lq, lk = q.shape[0], q.shape[2], k.shape[2]
    key_padding_mask, block_size, query_positions, key_positions = seen
    for name, x in seen._asdict().items():
        if isinstance(x, Tensor):
            if x.device != q.device:
                raise ValueError(f"{name} must be on q's device ({q.device}), got {x.device}")
            check_storage(name, x)
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool (True = valid), got {key_padding_mask.dtype}")
        if key_padding_mask.shape != (b, lk):
            raise ValueError(
                f"key_padding_mask must have shape [B, Lk] = {(b, lk)}, got {tuple(key_padding_mask.shape)}"
            )
    for name, positions, length in (("query", query_positions, lq), ("key", key_positions, lk)):
        if positions is None:
            continue
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}_positions must be int32 or int64, got {positions.dtype}")
        if positions.shape != (b, length):
            raise ValueError(
                f"{name}_positions must have shape [B, L{name[0]}] = {(b, length)}, "
                f"got {tuple(positions.shape)}"
            )
    if block_size is not None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if query_positions is None and (lq != lk or key_positions is not None):
            raise ValueError(
                "block_size needs query_positions unless queries and keys are the same positions 0..L-1, "
                f"got Lq={lq}, Lk={lk}, key_positions {'given' if key_positions is not None else 'None'}"
            )


def check_lse(lse: Tensor, q: Tensor) -> None:
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must have shape [B, Hq, Lq] = {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse must be float32 (float64 for float64 inputs), got {lse.dtype}")
    if lse.device != q.device:
        raise ValueError(f"lse must be on q's device ({q.device}), got {lse.device}")
    check_storage("lse", lse)


def check_mass_out(out: Tensor, q: Tensor, lk: int) -> None:
    """A buffer for the mass: float32 ``[B, Hq, >= Lk]``, contiguous in its last dimension."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {out}")
    if out.dim() != 3 or out.shape[:2] != q.shape[:2] or out.shape[2] < lk:
        raise ValueError(
            f"out must have shape [B, Hq, at least Lk] = {(q.shape[0], q.shape[1], lk)}, "
            f"got {tuple(out.shape)}"
        )
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out must be float32, got {out.dtype}")
    if out.device != q.device:
        raise ValueError(f"out must be on q's device ({q.device}), got {out.device}")
    if out.shape[2] > 1 and out.stride(2) != 1:
        raise ValueError(f"out must be contiguous in its last dimension, got strides {out.stride()}")
    if any(n > 1 and step == 0 for n, step in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out must not be expanded, got strides {out.stride()}")
    check_storage("out", out)


def check_sink_update(
    mass: Tensor,
    state: Tensor,
    sample_of: Tensor,
    key_padding_mask: Tensor | None,
    num_keys: int,
    trace_positions: Tensor,
    trace_mass: Tensor,
) -> None:
    """Everything `sink_update` will read or write, before the first write: the kernels take addresses."""
    for name, x in (("mass", mass), ("state", state), ("trace_positions", trace_positions)):
        if not isinstance(x, Tensor) or not x.dim():  # an op hands on None where its schema says Tensor
            raise TypeError(f"{name} must be a tensor with two dimensions, got {x}")
    rows, steps = state.shape[0], trace_positions.shape[0]
    shapes = {
        "mass": (mass, torch.float32, (rows, None)),
        "state": (state, torch.float32, (rows, reference.STATE_WIDTH)),
        "sample_of": (sample_of, torch.int32, (rows,)),
        "trace_positions": (trace_positions, torch.int32, (steps, rows)),
        "trace_mass": (trace_mass, torch.float32, (steps, rows)),
    }
    if key_padding_mask is not None:
        shapes["key_padding_mask"] = (key_padding_mask, torch.bool, (None, None))
    for name, (x, dtype, shape) in shapes.items():
        if not isinstance(x, Tensor) or x.dtype != dtype:
            raise TypeError(f"{name} must be a tensor of {dtype}, got {getattr(x, 'dtype', x)}")
        if x.device != mass.device:
            raise ValueError(f"{name} must be on mass's device ({mass.device}), got {x.device}")
        if x.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True)):
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"{name} must have shape [{expected}], got {tuple(x.shape)}")
        if name in ("mass", "key_padding_mask"):
            if x.shape[1] > 1 and x.stride(1) != 1:
                raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
        elif not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
        check_storage(name, x)
    keys = mass.shape[1] if key_padding_mask is None else min(mass.shape[1], key_padding_mask.shape[1])
    if not 0 <= num_keys <= keys:
        raise ValueError(f"num_keys must lie within 0..{keys}, got {num_keys}")
    if mass.device.type != "cpu" or rows == 0:
        return
    if key_padding_mask is not None:
        low, high = (int(x) for x in sample_of.aminmax())
        if low < 0 or high >= key_padding_mask.shape[0]:
            raise ValueError(
                f"sample_of must lie within 0..{key_padding_mask.shape[0] - 1}, got {low}..{high}"
            )
    if steps and not bool(((counted := state[:, reference.STEPS]) >= 0).all() and counted.isfinite().all()):
        raise ValueError(
            f"state must count its steps in column {reference.STEPS}, got {counted.tolist()[:8]}"
        )


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """Floats that layers run in, with all their bytes there; a name that ends in ``weight`` may be None."""
    for name, x in tensors.items():
        if x is None and name.endswith("weight"):
            continue
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise ValueError(f"{op} needs floats for {name}, got {getattr(x, 'dtype', x)}")
        check_storage(name, x)


def check_storage(name: str, x: Tensor) -> None:
    """A storage can shrink under a tensor; what reads by address would not notice."""
    if torch.compiler.is_compiling() or type(x) is FakeTensor:
        return
    strides = x.stride()
    end = x.storage_offset() + sum(map(mul, x.shape, strides)) - sum(strides) + 1
    held = x.untyped_storage().nbytes()
    if end * x.element_size() > held and x.numel():
        raise ValueError(f"{name} reaches byte {end * x.element_size()} of a storage of {held}")


def _index_tensor(name: str, index: Index, device: torch.device) -> Tensor:
    if not isinstance(index, Tensor):
        index = torch.tensor(list(index), dtype=torch.int64)
    if index.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(index.shape)}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {index.dtype}")
    check_storage(name, index)
    return index if index.device == device else index.to(device, non_blocking=True)


def check_offset(offset: Tensor | int | None, device: torch.device) -> Tensor | None:
    """The sampling offset as an integer tensor of one element on ``device``."""
    if offset is None:
        return None
    if isinstance(offset, int):
        return torch.full((1,), offset, dtype=torch.int64, device=device)
    if offset.numel() != 1 or offset.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offset must be one integer, got shape {tuple(offset.shape)} of {offset.dtype}")
    if offset.device != device:
        raise ValueError(f"offset must be on q's device ({device}), got {offset.device}")
    check_storage("offset", offset)
    return offset


def _readable_ids(index: Index) -> list[int] | None:
    """The values, where reading them costs no device synchronisation and no graph break."""
    if not isinstance(index, Tensor):
        return list(index)
    if index.device.type != "cpu" or torch.compiler.is_compiling() or type(index) is FakeTensor:
        return None
    ids: list[int] = index.tolist()
    return ids


def _few(ids: list[int]) -> str:
    return f"{ids}" if len(ids) <= 8 else f"{ids[:8]}… ({len(ids)} ids)"
