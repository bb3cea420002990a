"""Column mass by the native extension: ids, masks and blocks become the tensors that its op takes."""

from __future__ import annotations

import torch
from torch import Tensor

from sinkprune.kernels import reference
from sinkprune.ops.native import HeadIds, available, head_ids, shown


def serves(q: Tensor, k: Tensor, lse: Tensor | None) -> bool:
    """Whether :func:`column_mass` runs natively: on the CPU, up to float32, with a float32 LSE."""
    return (
        lse is not None
        and lse.dtype == torch.float32
        and q.dtype == k.dtype
        and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and all(t.device.type == "cpu" and t.stride(-1) in (0, 1) for t in (q, k, lse))
        and available()
    )


def column_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    kept_heads: HeadIds | None = None,
    kv_head_of: HeadIds | None = None,
    key_padding_mask: Tensor | None = None,
    block_size: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    sample: int | None = None,
    offset: int | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """How much attention each key receives, averaged over the queries that count: float32 ``[B, Hq, Lk]``.

    ``q`` [B, Hq, Lq, D], ``k`` [B, Hkv, Lk, D] of one dtype, contiguous in D; ``lse`` [B, Hq, Lq], the base-2
    log-sum-exp that attention returned (±inf: a row that saw no key). ``kept_heads``: sorted unique ids,
    None = all; the others get zeros. ``kv_head_of``: the key/value head of each query head, ``[Hq]``. The
    rest as in `sinkprune.ops.column_mass`. ``out`` float32 [B, Hq, at least Lk] is written and returned, zero
    past Lk.

    Scores are never in memory, whatever the lengths. Where :func:`serves` is False, the plain
    twin in `sinkprune.kernels.reference` does it.

    Raises ``ValueError``/``TypeError`` for ranks, shapes, dtypes or ids that do not fit.
    """
    _check_mass_inputs(q, k, lse, sample)
    b, hq, lq, d = q.shape
    lk = k.shape[2]
    heads = torch.arange(hq) if kept_heads is None else head_ids(kept_heads, hq, "kept_heads")
    if kv_head_of is None:
        if k.shape[1] == 0 or hq % k.shape[1]:
            raise ValueError(
                f"without kv_head_of, Hq must be a multiple of Hkv, got Hq={hq}, Hkv={k.shape[1]}"
            )
        owner = torch.arange(hq) // (hq // k.shape[1])
    else:
        owner = torch.as_tensor(kv_head_of).to("cpu", torch.int64)
        if owner.shape != (hq,) or (hq and not 0 <= int(owner.min()) <= int(owner.max()) < k.shape[1]):
            raise ValueError(
                f"kv_head_of must hold {hq} ids in 0…{k.shape[1] - 1}, got {shown(owner.flatten())}"
            )
    valid = _per_sample(key_padding_mask, (b, lk), torch.bool, "key_padding_mask")
    q_positions = _per_sample(query_positions, (b, lq), torch.int64, "query_positions")
    k_positions = _per_sample(key_positions, (b, lk), torch.int64, "key_positions")
    result = _mass_out(out, (b, hq, lk), q.device)
    step = max(1, min(sample or 1, lq))
    first = int(offset or 0) % step
    scale = d**-0.5 if scale is None else scale

    if not serves(q, k, lse):
        result[..., lk:].zero_()
        result[..., :lk] = reference.column_mass(
            q.detach(), k.detach(), lse.detach(),
            kept_heads=heads.to(q.device), kv_head_of=owner.to(q.device),
            scale=scale, sample=step, offset=first, key_padding_mask=valid, block_size=block_size,
            query_positions=q_positions, key_positions=k_positions,
        )  # fmt: skip
        return result

    query_block = key_block = None
    if block_size is not None:
        query_block = _blocks(q_positions, b, lq, block_size)
        key_block = _blocks(k_positions, b, lk, block_size)
    torch.ops.sinkprune_native.column_mass_(
        result, q.detach(), k.detach(), lse.detach(), heads, owner[heads], valid,
        None if q_positions is None else q_positions >= 0, query_block, key_block, scale, first, step,
    )  # fmt: skip
    return result


def _check_mass_inputs(q: Tensor, k: Tensor, lse: Tensor, sample: int | None) -> None:
    for tensor, name, rank in ((q, "q", 4), (k, "k", 4), (lse, "lse", 3)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions, got shape {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype {q.dtype}, got {k.dtype}")
    if k.device != q.device or lse.device != q.device:
        raise ValueError(f"q, k and lse must be on one device, got {q.device}, {k.device} and {lse.device}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[3] == 0:
        raise ValueError(f"q and k must agree in B and D ≥ 1, got {list(q.shape)} and {list(k.shape)}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must have shape {list(q.shape[:3])}, got {list(lse.shape)}")
    if sample is not None and sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")


def _per_sample(
    tensor: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, name: str
) -> Tensor | None:
    """An optional ``[B, L]`` argument in the dtype the op takes."""
    if tensor is None:
        return None
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.is_floating_point() or (tensor.dtype == torch.bool) != (dtype == torch.bool):
        raise TypeError(
            f"{name} must be {'bool' if dtype == torch.bool else 'int32 or int64'}, got {tensor.dtype}"
        )
    return tensor.to(dtype).contiguous()


def _blocks(positions: Tensor | None, batch: int, length: int, block_size: int) -> Tensor:
    """The block of each position, int32 ``[B, L]``; None = 0…L-1."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    positions = torch.arange(length).expand(batch, length) if positions is None else positions
    blocks = positions // block_size
    if blocks.numel() and int(blocks.abs().max()) >= 2**31:
        raise ValueError(
            f"positions must stay below 2^31 blocks of {block_size}, got {int(positions.abs().max())}"
        )
    return blocks.to(torch.int32).contiguous()


def _mass_out(out: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    if out.dim() != 3 or out.shape[:2] != shape[:2] or out.shape[2] < shape[2]:
        raise ValueError(
            f"out must have shape {list(shape)}, or be longer in the last, got {list(out.shape)}"
        )
    if out.dtype != torch.float32:
        raise TypeError(f"out must be float32, got {out.dtype}")
    if out.device != device or (out.shape[2] > 1 and out.stride(2) != 1):
        raise ValueError(
            f"out must be on {device} with a contiguous last dimension, got strides {out.stride()}"
        )
    return out.detach()
