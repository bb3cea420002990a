"""Attention of some heads under a mask of somebody else's making."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune.models.modules import AttentionCall


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    kept: Tensor | None,
    owner: Tensor | None,
) -> Tensor:
    """PyTorch's attention of the kept heads under any mask: ``[B, H, Lq, D]``, zeros where not kept.

    Args:
        query: ``[B, H, Lq, D]``; key, value: ``[B, Hkv, Lk, D]``.
        mask: as PyTorch takes it, with four dimensions.
        kept: int ``[h]``; None = all.
        owner: the key/value head of each query head, int ``[H]``; None = equal groups.
    """
    heads, group = query.shape[1], max(1, query.shape[1] // max(1, key.shape[1]))
    chosen = query
    if kept is not None:
        chosen = query.index_select(1, kept)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.index_select(1, kept)
    if owner is None and (kept is not None or group > 1):
        owner = torch.arange(heads, device=query.device) // group
    if owner is not None:
        owner = owner if kept is None else owner.index_select(0, kept)
        key, value = key.index_select(1, owner), value.index_select(1, owner)
    out = F.scaled_dot_product_attention(chosen, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)
    if kept is None:
        return out
    b, _, length, width = query.shape
    return out.new_zeros(b, length, heads, width).transpose(1, 2).index_copy(1, kept, out)


def masked_call(call: AttentionCall, mask: Tensor, *, queries_last: bool) -> AttentionCall:
    """The call with its mask, and with what the mask says about padding: keys that no query sees, as keys and
    as queries.

    ``queries_last``: the queries are the last of the keys; else, where they are fewer, nobody knows which.
    """
    queries, keys = call.query.shape[2], call.key.shape[2]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    padding = seen.any(1).any(1).expand(call.query.shape[0], keys)
    positions = None
    if queries_last or queries == keys:
        index = torch.arange(queries, dtype=torch.int32, device=mask.device)
        positions = torch.where(padding[:, keys - queries :], index, -1)
    return call._replace(key_padding_mask=padding, query_positions=positions, mask=mask)
