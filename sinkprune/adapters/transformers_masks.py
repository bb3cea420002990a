"""The masks that transformers makes for each of its attention implementations, read as one kind."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def whole_mask(
    mask: Any, query: Tensor, key: Tensor, is_causal: bool, implementation: str, options: dict[str, Any]
) -> Tensor | None:
    """What transformers' mask for ``implementation`` hides, as one ``[B, 1, Lq, Lk]`` (True = seen) or None.

    Masks for PyTorch's attention and for "eager" are that already. FlashAttention's hold the padding alone,
    and its window and causality are arguments; FlexAttention's are functions of indices.

    Raises:
        ValueError: sequences packed into one row for FlashAttention, which the mask does not say.
    """
    (batch, _, queries, _), keys = query.shape, key.shape[2]
    if hasattr(mask, "mask_mod"):
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(mask.mask_mod, batch, 1, queries, keys, device=str(query.device))
    if "flash" not in implementation or (mask is not None and mask.dim() == 4):
        return cast("Tensor | None", mask)
    positions = options.get("position_ids")
    packed = (
        mask is None and positions is not None and queries == keys and bool((positions.diff() != 1).any())
    )
    if packed or options.get("cu_seq_lens_q") is not None:
        raise ValueError("pruned or tracked attention does not know packed sequences: pass them padded")
    at = torch.arange(keys, device=query.device)
    after = at[keys - queries :, None] - at  # how far behind a query each key lies, [Lq, Lk]
    window = options.get("sliding_window") or keys
    seen = after.abs() < window
    if is_causal:
        seen = seen & (after >= 0)
    if mask is None:
        return None if queries == keys and window >= keys else seen[None, None].expand(batch, 1, -1, -1)
    padding = mask[:, None, None, :].bool()
    if not is_causal and window >= keys:
        return padding.expand(-1, -1, queries, -1)
    return seen & padding
