"""What every transformers-native family shares: our attention behind transformers' attention interface.

transformers' attention modules hand their queries, keys and values to a function chosen by name in the
config. While something of ours is active in a model (skipped heads, unevenly shared key/value heads, an
observer) that name is "sinkprune"; otherwise it is the user's own.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.adapters.base import (
    Adapter,
    AttentionWeights,
    LayerObserver,
    MLPWeights,
    require_eval,
    require_repackable,
    tensors_of,
)
from sinkprune.models.modules import AttentionCall, AttentionObserver
from sinkprune.plans import Geometry

NAME = "sinkprune"
_SELECTION = "sinkprune_heads"  # the submodule that attention modules get
_CHANNELS = "sinkprune_channels"  # the buffer that MLPs' last matrices get
_ORIGINAL = "sinkprune_original_attention"  # what to restore: an attribute of the model


class HeadSelection(nn.Module):
    """What is ours in one attention module; buffers, so that it moves with the model and saves nothing."""

    kept_heads: Tensor | None  # int [h]; None = all
    kv_head_of: Tensor | None  # int [H]; None = equal groups

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept_heads", None, persistent=False)
        self.register_buffer("kv_head_of", None, persistent=False)
        self.observer: AttentionObserver | None = None

    def idle(self) -> bool:
        return self.kept_heads is None and self.kv_head_of is None and self.observer is None


class PackedProjections(nn.ModuleDict):
    """A layer's narrow linear layers by role, and the key/value head that each query head reads."""

    def __init__(self, linears: dict[str, nn.Module], kv_head_of: list[int]) -> None:
        super().__init__(linears)
        self.kv_head_of = kv_head_of


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function behind the name "sinkprune" in transformers' ``AttentionInterface``.

    Args:
        module: the attention module, with a ``HeadSelection`` where something is to be done.
        query: ``[B, H, Lq, D]``; key, value: ``[B, Hkv, Lk, D]``.
        attention_mask: as ``sdpa_mask`` makes it, or None.

    Returns:
        ``(out [B, Lq, H, D], None)``; heads that are skipped give zeros.

    Raises:
        ValueError: attention dropout together with a selection, or scores capped or biased in a way that
            PyTorch's attention has no argument for.
    """
    selection = cast("HeadSelection | None", module._modules.get(_SELECTION))
    if selection is None or selection.idle():
        return _plain_attention()(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            **options,
        )  # fmt: skip
    if dropout:
        raise ValueError("pruned or tracked attention has no dropout: call model.eval() first")
    for option in ("softcap", "s_aux", "position_bias"):
        if options.get(option) is not None:
            raise ValueError(f"pruned or tracked attention does not know {option!r}")
    kept, owner, observer = selection.kept_heads, selection.kv_head_of, selection.observer
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    is_causal = is_causal and attention_mask is None and query.shape[2] > 1
    if is_causal and key.shape[2] > query.shape[2]:  # an empty static cache: the rest of it is not filled
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    padding_only = (
        attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.shape[1] == 1
        and (attention_mask.shape[2] == 1 or attention_mask.stride(2) == 0)
    )
    if not is_causal and (attention_mask is None or padding_only):
        padding = None
        if attention_mask is not None:
            padding = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        out, lse = ops.attention(
            query, key, value, kept_heads=kept, kv_head_of=owner, key_padding_mask=padding, scale=scaling
        )
        call = AttentionCall(query, key, lse, kept, owner, padding, scale=scaling)
    else:
        out = _masked_attention(query, key, value, attention_mask, is_causal, scaling, kept, owner)
        call = AttentionCall(query, key, None, kept, owner, scale=scaling)
        if observer is not None and attention_mask is None:
            call = call._replace(block_size=1)
        elif observer is not None:
            call = _masked_call(call, cast(Tensor, attention_mask))
    if observer is not None:
        observer(call)
    return out.transpose(1, 2), None


def _masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    kept: Tensor | None,
    owner: Tensor | None,
) -> Tensor:
    """PyTorch's attention of the kept heads under any mask: ``[B, H, Lq, D]``, zeros where not kept."""
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


def _masked_call(call: AttentionCall, mask: Tensor) -> AttentionCall:
    """The call with its mask, and with what the mask says about padding: keys that no query sees."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    padding = seen.any(1).any(1).expand(call.query.shape[0], keys)
    index = torch.arange(queries, dtype=torch.int32, device=mask.device)
    positions = torch.where(padding[:, keys - queries :], index, -1)  # queries are the last of the keys
    return call._replace(key_padding_mask=padding, query_positions=positions, mask=mask)


def _plain_attention() -> Callable[..., tuple[Tensor, None]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def _register() -> None:
    """Make the name known to transformers, for attention and for masks (else masks arrive as None)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def is_transformers_model(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model whose attention goes through the attention interface."""
    module = sys.modules.get("transformers.modeling_utils")  # none loaded: then this is none of its models
    return (
        module is not None
        and isinstance(model, module.PreTrainedModel)
        and bool(model._can_set_attn_implementation())
    )


class TransformersAdapter(Adapter):
    """A transformers-native model, changed in place: smaller linear layers in the same modules.

    A family names its layers and where their matrices are. Roles: ``q k v o`` or ``qkv o``, and ``gate up
    down``, ``gate_up down`` or ``up down``.
    """

    head_dim_name = "head_dim"  # of the attention module

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        if not is_transformers_model(model):
            return False
        layers = cls.layers_of(model)
        return bool(layers) and all(cls.fits(block) for block in layers)

    @staticmethod
    def layers_of(model: nn.Module) -> nn.ModuleList:
        """The layers of a model or of the backbone in it; empty where there are none."""
        for root in (model, getattr(model, "model", None)):
            layers = getattr(root, "layers", None)
            if isinstance(layers, nn.ModuleList):
                return layers
        return nn.ModuleList()

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether a layer is one of this family's. (A family that overrides ``recognises`` needs none.)"""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        return list(self.layers_of(self.model))

    @abstractmethod
    def attention_of(self, block: nn.Module) -> nn.Module:
        """The module that calls the attention interface."""

    @abstractmethod
    def projections_of(self, block: nn.Module) -> dict[str, nn.Module]:
        """The attention's linear layers by role."""

    def mlp_of(self, block: nn.Module) -> dict[str, nn.Module]:
        """The MLP's linear layers by role. Raises ``ValueError`` naming why it can't be pruned."""
        raise ValueError(f"MLP channels of {self.family} models can't be pruned, only heads")

    def linears(self, layer: int) -> dict[str, nn.Module]:
        block = self.blocks()[layer]
        try:
            mlp = self.mlp_of(block)
        except ValueError:  # experts: their channels are never pruned
            mlp = {}
        return self.projections_of(block) | mlp

    @property
    def config(self) -> Any:
        return cast(Any, self.model).config.get_text_config()

    def _attention(self, layer: int) -> nn.Module:
        return self.attention_of(self.blocks()[layer])

    def _head_dim(self, layer: int) -> int:
        return cast(int, getattr(self._attention(layer), self.head_dim_name))

    def _channels(self, block: nn.Module) -> int:
        return cast(int, self.config.intermediate_size)

    def geometry(self) -> Geometry:
        config, blocks = self.config, self.blocks()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return Geometry(
            family=self.family,
            hidden=config.hidden_size,
            head_dim=self._head_dim(0),
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            heads=(heads,) * len(blocks),
            kv_heads=(kv_heads,) * len(blocks),
            channels=tuple(self._channels(block) for block in blocks),
            mlp_matrices=self.mlp_matrices,
        )

    mlp_matrices = 3

    @property
    def mask_token_id(self) -> int | None:
        return getattr(self.config, "mask_token_id", None)

    def attention_weights(self, layer: int) -> AttentionWeights:
        weights = tensors_of(self.projections_of(self.blocks()[layer]), layer)
        if "qkv" in weights:
            for suffix in ("", "_bias"):
                fused = weights.pop(f"qkv{suffix}")
                parts = (None,) * 3 if fused is None else fused.chunk(3)
                weights |= {f"{role}{suffix}": part for role, part in zip("qkv", parts, strict=True)}
        attention = self._attention(layer)
        return AttentionWeights(
            **weights,
            q_norm=attention._modules.get("q_norm"),
            k_norm=attention._modules.get("k_norm"),
        )

    def mlp_weights(self, layer: int) -> MLPWeights:
        found = cast(dict[str, Any], self.mlp_of(self.blocks()[layer]))
        if "gate_up" in found:
            gate, up = found["gate_up"].weight.chunk(2)
            return MLPWeights(gate, up, found["down"].weight)
        gate = found["gate"].weight if "gate" in found else None
        return MLPWeights(gate, found["up"].weight, found["down"].weight)

    def check(self, kept_heads: list[list[int]], kept_channels: list[list[int] | None], mode: str) -> None:
        super().check(kept_heads, kept_channels, mode)
        dropout = getattr(self.config, "attention_dropout", None)
        if dropout is None:
            dropout = getattr(self.config, "attention_probs_dropout_prob", 0.0)
        require_eval(self.model, dropout)
        if mode == "mask":
            return
        for layer, (block, channels) in enumerate(zip(self.blocks(), kept_channels, strict=True)):
            linears = dict(self.projections_of(block))
            if channels is not None:
                linears |= self.mlp_of(block)
            require_repackable(layer, kept_heads[layer], linears, "transformers' attention")

    @torch.no_grad()
    def compact(
        self, layer: int, kept_heads: list[int], kept_channels: list[int] | None
    ) -> tuple[nn.Module, nn.Module | None]:
        geometry, block = self.geometry(), self.blocks()[layer]
        heads, width = geometry.heads[layer], geometry.head_dim
        kv_heads = geometry.kv_heads_used(layer, kept_heads)
        rows = {"q": kept_heads, "k": kv_heads, "v": kv_heads, "qkv": _stacked(kept_heads, heads, 3)}
        packed = {
            role: _narrow(linear, kept_heads if role == "o" else rows[role], width, int(role == "o"))
            for role, linear in self.projections_of(block).items()
        }
        owner = geometry.kv_head_of(layer)
        projections = PackedProjections(packed, [kv_heads.index(owner[head]) for head in kept_heads])
        if kept_channels is None:
            return projections, None
        stacked = _stacked(kept_channels, geometry.channels[layer], 2)
        mlp = {
            role: _narrow(linear, stacked if role == "gate_up" else kept_channels, 1, int(role == "down"))
            for role, linear in self.mlp_of(block).items()
        }
        return projections, nn.ModuleDict(mlp)

    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        block = self.blocks()[layer]
        width = self._head_dim(layer)
        for packed, linears in ((attention, self.projections_of), (mlp, self.mlp_of)):
            if packed is not None:
                for role, linear in linears(block).items():
                    _take_over(linear, packed.get_submodule(role))
        if not isinstance(attention, PackedProjections):
            return
        module, owner = self.attention_of(block), attention.kv_head_of
        heads, group = len(owner), max(1, len(owner) // len(set(owner)))
        if owner != [head // group for head in range(heads)]:
            weight = cast(Tensor, self.projections_of(block)["o"].weight)
            device = torch.device("cpu") if weight.is_meta else weight.device
            self._selection(layer).kv_head_of = torch.tensor(owner, device=device)
        # The module's own attributes follow, so that equal groups run on any attention implementation.
        for name, value in (
            ("num_key_value_groups", group),
            ("num_attention_heads", heads),
            ("all_head_size", heads * width),
        ):
            if hasattr(module, name):
                setattr(module, name, value)
        self._switch()

    def mask(self, layer: int, heads: Tensor | None, channels: Tensor | None) -> None:
        block = self.blocks()[layer]
        self._select_heads(layer, heads)
        down = self.mlp_of(block)["down"] if channels is not None or self._has_channels(block) else None
        if down is not None:
            skip_channels(cast(nn.Linear, down), channels)
        self._switch()

    def _select_heads(self, layer: int, heads: Tensor | None) -> None:
        self._selection(layer).kept_heads = heads

    def _has_channels(self, block: nn.Module) -> bool:
        return any(_CHANNELS in module._buffers for module in block.modules())

    def _selection(self, layer: int) -> HeadSelection:
        return selection_of(self._attention(layer))

    def observe(self, observer: LayerObserver | None) -> None:
        for layer in range(len(self.blocks())):
            selection = self._selection(layer)
            selection.observer = None if observer is None else partial(observer, layer)
        self._switch()

    def observed(self) -> bool:
        selection = self._attention(0)._modules.get(_SELECTION)
        return selection is not None and selection.observer is not None

    def _switch(self) -> None:
        """Turn the model to our attention where something of ours is active, else back to the user's."""
        model = cast(Any, self.model)
        selections = [m for m in model.modules() if isinstance(m, HeadSelection)]
        active = any(not selection.idle() for selection in selections)
        original = model.__dict__.get(_ORIGINAL)
        if active and original is None:
            _register()
            original = {"": model.config._attn_implementation}
            for name in model.config.sub_configs:
                if getattr(model.config, name, None) is not None:
                    original[name] = getattr(model.config, name)._attn_implementation
            model.__dict__[_ORIGINAL] = original
            model.set_attn_implementation(NAME)
        elif not active and original is not None:
            model.set_attn_implementation(original)
            del model.__dict__[_ORIGINAL]
        if not active:
            for module in model.modules():
                if _SELECTION in module._modules:
                    del module._modules[_SELECTION]


def selection_of(attention: nn.Module) -> HeadSelection:
    """The attention module's selection, made where there is none."""
    if attention._modules.get(_SELECTION) is None:
        attention.add_module(_SELECTION, HeadSelection())
    return cast(HeadSelection, attention._modules[_SELECTION])


def skip_channels(down: nn.Linear, channels: Tensor | None) -> None:
    """Zero all but ``channels`` of what ``down`` multiplies; None undoes it."""
    for key, hook in list(down._forward_pre_hooks.items()):
        if hook is _zero_channels:
            del down._forward_pre_hooks[key]
    if channels is None:
        down._buffers.pop(_CHANNELS, None)
        down._non_persistent_buffers_set.discard(_CHANNELS)
        return
    keep = torch.zeros(down.in_features, dtype=torch.bool, device=channels.device)
    down.register_buffer(_CHANNELS, keep.index_fill(0, channels, True), persistent=False)
    down.register_forward_pre_hook(_zero_channels)


def _zero_channels(down: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * down._buffers[_CHANNELS], *args[1:])


def _stacked(ids: list[int], size: int, times: int) -> list[int]:
    """Ids of ``times`` equal parts of ``size`` one after the other."""
    return [part * size + i for part in range(times) for i in ids]


def _narrow(linear: nn.Module, ids: list[int], width: int, dim: int) -> nn.Module:
    """A linear layer of the rows (``dim=0``) or columns (``dim=1``) in ``ids``, pieces of ``width``."""
    source = cast(nn.Linear, linear)
    weight = ops.gather_heads(source.weight, ids, width, dim)
    bias: Tensor | None = source.bias
    if bias is not None:
        bias = bias.detach().clone() if dim else ops.gather_heads(bias, ids, width, 0)
    packed = nn.Linear(1, 1, bias=False, device="meta")
    packed.weight = nn.Parameter(weight, requires_grad=source.weight.requires_grad)
    if bias is not None:
        packed.bias = nn.Parameter(bias, requires_grad=source.bias.requires_grad)
    return packed


def _take_over(linear: nn.Module, packed: nn.Module) -> None:
    """Give ``linear``, which keeps its identity and its hooks, the parameters of ``packed``."""
    target, source = cast(nn.Linear, linear), cast(nn.Linear, packed)
    target.weight, target.bias = source.weight, source.bias
    target.out_features, target.in_features = source.weight.shape
