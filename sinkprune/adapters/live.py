"""What adapters of live remote-code models share: our attention in the place of one call.

The upstream code keeps running, with its own signatures, caches, positions and masks. Its projections become
smaller; where heads are skipped, share key/value heads unevenly or are observed, its
``scaled_dot_product_attention`` becomes a ``LiveAttention`` too. So a copy of the code that caches in another
way, or takes other arguments, needs no adapter of its own.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.adapters.base import (
    Adapter,
    AttentionWeights,
    LayerObserver,
    LayOutPlan,
    MLPWeights,
    adapter_for,
    is_compiled,
    require_eval,
    require_repackable,
    split_fused,
    tensors_of,
)
from sinkprune.adapters.native import NativeAdapter
from sinkprune.kernels.visibility import Visibility
from sinkprune.models.marks import mark, plan_of
from sinkprune.models.modules import AttentionCall, AttentionObserver, CompactMLP, SinkPrunedAttention
from sinkprune.models.published import NATIVE, native_kind, native_of

_NAME = "sinkprune_attention"  # the submodule that a live attention gets while something of ours is active


# Held by whoever changes what a model's sites hold, or hides something in a forward: other threads wait.
_HIDING: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_HIDING_MADE = threading.Lock()


class LiveAttention(nn.Module):
    """Stands in for ``scaled_dot_product_attention`` in one layer; its indices move with the model and are
    never saved.

    ``kept_heads`` int ``[h]`` skips the other heads; ``kv_head_of`` int ``[n]`` is each of n query heads'
    key/value head where heads were removed; ``hidden`` is what each thread's forwards hide that the upstream
    code does not (a ``block_size`` takes the place of any mask that it passes); ``observer`` sees every call.
    """

    kept_heads: Tensor | None
    kv_head_of: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept_heads", None, persistent=False)
        self.register_buffer("kv_head_of", None, persistent=False)
        self.hidden: dict[int, Visibility] = {}  # by thread: one's forward never sees another's padding
        self.observer: AttentionObserver | None = None

    def idle(self) -> bool:
        """Whether it does what the upstream code does, and nobody looks."""
        return not self.hidden and all(p is None for p in (self.kept_heads, self.kv_head_of, self.observer))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """PyTorch's signature: query ``[B, H, Lq, D]``, key and value ``[B, Hkv, Lk, D]``; out as query.

        ``enable_gqa`` is always on. Raises ``ValueError`` for dropout and for causal attention.
        """
        if dropout_p or is_causal:
            what = f"dropout {dropout_p}: call model.eval() first" if dropout_p else "a causal mask"
            raise ValueError(f"pruned or tracked attention of a diffusion model does not know {what}")
        seen = Visibility()
        if self.hidden:  # else nothing is asked that torch.compile can't
            seen = self.hidden.get(threading.get_ident(), seen).to(query.device)
        if seen.block_size is not None:
            attn_mask = None
        if attn_mask is not None:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
            only_keys = attn_mask.dtype == torch.bool and attn_mask.shape[1:3] == (1, 1)
            if only_keys and seen.key_padding_mask is None:
                padding, attn_mask = attn_mask[:, 0, 0].expand(query.shape[0], -1), None
                seen = seen._replace(key_padding_mask=padding)
        heads, owner = self.kept_heads, self.kv_head_of
        if attn_mask is None:
            out, lse = ops.attention(
                query, key, value, kept_heads=heads, kv_head_of=owner, scale=scale, **seen._asdict()
            )
        else:
            out, lse = self._masked(query, key, value, attn_mask, scale), None
        if self.observer is not None:
            call = AttentionCall(query, key, lse, heads, owner, scale=scale, **seen._asdict())
            self.observer(call if attn_mask is None else _with_mask(call, attn_mask))
        return out

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
        """PyTorch's attention of the kept heads under any mask: ``[B, H, Lq, D]``, zeros where not kept."""
        owner, chosen = self.kv_head_of, query
        if owner is None and (self.kept_heads is not None or key.shape[1] != query.shape[1]):
            owner = torch.arange(query.shape[1], device=query.device) // (query.shape[1] // key.shape[1])
        if mask.shape[1] > 1 and self.kv_head_of is not None:
            raise ValueError("a compact layer does not know an attention bias of every head")
        if self.kept_heads is not None and owner is not None:
            chosen, owner = query.index_select(1, self.kept_heads), owner.index_select(0, self.kept_heads)
            mask = mask if mask.shape[1] == 1 else mask.index_select(1, self.kept_heads)
        if owner is not None:
            key, value = key.index_select(1, owner), value.index_select(1, owner)
        out = F.scaled_dot_product_attention(chosen, key, value, attn_mask=mask, scale=scale)
        return out if self.kept_heads is None else torch.zeros_like(query).index_copy(1, self.kept_heads, out)


def _with_mask(call: AttentionCall, mask: Tensor) -> AttentionCall:
    """The call with its mask, and with the padding in it: keys that no query sees, as queries and as keys."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    padding = seen.any(1).any(1).expand(call.query.shape[0], keys)
    index = torch.arange(queries, dtype=torch.int32, device=mask.device)
    positions = torch.where(padding, index, -1) if queries == keys else None
    return call._replace(key_padding_mask=padding, query_positions=positions, mask=mask)


class LiveAdapter(Adapter):
    """An adapter of upstream code: a family says where its layers, projections and attention call are."""

    @abstractmethod
    def sites(self) -> list[nn.Module]:
        """Of every layer, the module that holds the attention call."""

    @abstractmethod
    def attention_linears(self, layer: int) -> dict[str, nn.Module]:
        """The attention's linear layers by role: ``q k v o``, or ``qkv o`` with rows [Q | K | V]."""

    def norms(self, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
        """The modules over the features of a head's queries and keys, where the family has them."""
        return None, None

    @abstractmethod
    def mlp_linears(self, layer: int) -> dict[str, nn.Module]:
        """The MLP's by role: ``gate up down``. Raises ``ValueError`` naming why its channels can't be
        pruned."""

    @abstractmethod
    def enter(self, site: nn.Module, attention: LiveAttention) -> None:
        """Put ``attention`` in the place of the site's attention call."""

    @abstractmethod
    def leave(self, site: nn.Module) -> None:
        """Undo ``enter``."""

    @abstractmethod
    def resize(self, site: nn.Module, heads: int, kv_heads: int, group: int) -> None:
        """Tell the upstream code how many heads its projections give now.

        Every key/value head serves ``group`` query heads; where their numbers differ, ``group`` is 1 and
        ``LiveAttention`` maps them.
        """

    def linears(self, layer: int) -> dict[str, nn.Module]:
        gated = self.geometry().channels[layer] > 0
        return self.attention_linears(layer) | (self.mlp_linears(layer) if gated else {})

    def attention_weights(self, layer: int) -> AttentionWeights:
        found = tensors_of(self.attention_linears(layer), layer)
        if "qkv" in found:
            geometry = self.geometry()
            kept = self.kept_heads(layer) if self.form == "compact" else list(range(geometry.heads[layer]))
            width = geometry.head_dim * len(geometry.kv_heads_used(layer, kept))
            split_fused(found, (geometry.head_dim * len(kept), width, width))
        q_norm, k_norm = self.norms(layer)
        return AttentionWeights(**found, q_norm=q_norm, k_norm=k_norm)

    def mlp_weights(self, layer: int) -> MLPWeights:
        return MLPWeights(**tensors_of(self.mlp_linears(layer), layer))

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Logits as in ``Adapter.predict``. Padding is honoured whether or not the upstream code does."""
        with self.hiding(attention_mask):
            return self.model(input_ids).logits[:, rows]

    @contextmanager
    def hiding(
        self,
        attention_mask: Tensor | None,
        block_size: int | None = None,
        positions: Tensor | None = None,
    ) -> Iterator[None]:
        if attention_mask is None and block_size is None:
            yield
            return
        padding = None if attention_mask is None else attention_mask.bool()
        hidden = Visibility(padding, block_size, positions, positions)
        thread = threading.get_ident()
        with self._alone():
            self._require_uncompiled()
            layers = [self._live(layer) for layer in range(len(self.sites()))]
            try:
                for live in layers:
                    live.hidden[thread] = hidden
                yield
            finally:
                for layer, live in enumerate(layers):
                    live.hidden.pop(thread, None)
                    self._release(layer)

    @torch.no_grad()
    def as_native(self, lay_out: LayOutPlan) -> nn.Module:
        kind, config = native_of(self.family), cast(Any, self.model).config
        layers = self.geometry().num_layers
        if kind is None or layers == 0:
            raise TypeError(f"save writes native models, and there is none for {type(self.model).__name__}")
        values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        with torch.device("meta"):
            native = NATIVE[kind](values if native_kind(values) == kind else {**values, "model_type": kind})
        plan, compact = plan_of(self.model), self.form == "compact"
        if compact and plan is not None:
            lay_out(native, plan)
        tensors = {k: v for k, v in self.model.state_dict().items() if k in native.state_dict()}
        names = {module: name for name, module in native.named_modules()}
        twin = cast(NativeAdapter, adapter_for(native))
        for layer in range(layers) if compact else ():
            for laid_out in (twin.attention_of(layer), twin.block(layer).mlp):
                if isinstance(laid_out, SinkPrunedAttention | CompactMLP):
                    state = self._packed_as(laid_out, layer).state_dict()
                    tensors |= {f"{names[laid_out]}.{part}": tensor for part, tensor in state.items()}
        native.load_state_dict(tensors, assign=True)
        mark(native, plan, self.form)
        return native

    def _packed_as(self, laid_out: SinkPrunedAttention | CompactMLP, layer: int) -> nn.Module:
        """The native compact module of this compact layer's tensors."""
        if isinstance(laid_out, CompactMLP):
            own = self.mlp_weights(layer)
            gate, down = cast(Tensor, own.gate), own.down
            biases = [bias for bias in (own.gate_bias, own.up_bias) if bias is not None]
            return CompactMLP(
                torch.cat((gate, own.up)), down, torch.cat(biases) if biases else None, own.down_bias
            )
        owner = laid_out.kv_head_of
        return SinkPrunedAttention.from_projections(
            **vars(self.attention_weights(layer)),
            head_dim=laid_out.head_dim,
            kv_head_of=None if owner is None else owner.tolist(),
        )

    def check(self, kept_heads: list[list[int]], kept_channels: list[list[int] | None], mode: str) -> None:
        super().check(kept_heads, kept_channels, mode)
        require_eval(self.model, getattr(cast(Any, self.model).config, "attention_dropout", 0.0))
        if mode == "mask":
            return
        for layer, channels in enumerate(kept_channels):
            linears = dict(self.attention_linears(layer))
            if channels is not None:
                linears |= self.mlp_linears(layer)
            require_repackable(layer, kept_heads[layer], linears, "the upstream code")

    @torch.no_grad()
    def compact(
        self, layer: int, kept_heads: list[int], kept_channels: list[int] | None
    ) -> tuple[nn.Module, nn.Module | None]:
        geometry = self.geometry()
        used = geometry.kv_heads_used(layer, kept_heads)
        heads, kv_heads, width = geometry.heads[layer], geometry.kv_heads[layer], geometry.head_dim
        stacked = [heads + kv for kv in used] + [heads + kv_heads + kv for kv in used]
        ids = {"q": kept_heads, "k": used, "v": used, "o": kept_heads, "qkv": kept_heads + stacked}
        packed = {r: _narrow(m, ids[r], width, r == "o") for r, m in self.attention_linears(layer).items()}
        owner = geometry.kv_head_of(layer)
        attention = _Packed(packed, [used.index(owner[head]) for head in kept_heads], len(used))
        if kept_channels is None:
            return attention, None
        linears = self.mlp_linears(layer).items()
        return attention, nn.ModuleDict({r: _narrow(m, kept_channels, 1, r == "down") for r, m in linears})

    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        if mlp is not None:
            for role, linear in self.mlp_linears(layer).items():
                _take_over(linear, mlp.get_submodule(role))
        if isinstance(attention, _Packed):
            for role, linear in self.attention_linears(layer).items():
                _take_over(linear, attention.linears[role])
            owner = attention.kv_head_of
            group = len(owner) // attention.kv_heads
            equal = owner == [head // group for head in range(len(owner))]
            self.resize(self.sites()[layer], len(owner), attention.kv_heads, group if equal else 1)
            if not equal:  # equal groups run in the upstream code's own attention
                device = next(attention.parameters()).device
                self._live(layer).kv_head_of = torch.tensor(owner, device=device)

    def mask(self, layer: int, heads: Tensor | None, channels: Tensor | None) -> None:
        with self._alone():
            self._live(layer).kept_heads = heads
            self._release(layer)
        site = self.sites()[layer]
        handle = site.__dict__.pop("sinkprune_channels", None)
        if handle is not None:
            handle.remove()
        if channels is not None:
            down = cast(nn.Linear, self.mlp_linears(layer)["down"])
            keep = torch.zeros(down.in_features, dtype=torch.bool, device=channels.device)
            hook = partial(_zero_channels, keep.index_fill(0, channels, True))
            site.__dict__["sinkprune_channels"] = down.register_forward_pre_hook(hook)

    def observe(self, observer: LayerObserver | None) -> None:
        with self._alone():
            for layer in range(len(self.sites())):
                self._live(layer).observer = None if observer is None else partial(observer, layer)
                self._release(layer)

    def observed(self) -> bool:
        live = self.sites()[0]._modules.get(_NAME)
        return live is not None and live.observer is not None

    def _alone(self) -> threading.RLock:
        """This model's lock."""
        with _HIDING_MADE:
            return _HIDING.setdefault(self.model, threading.RLock())

    def _live(self, layer: int) -> LiveAttention:
        """The layer's ``LiveAttention``, put in place where there is none.

        Submodules are exchanged as a whole dictionary: another thread may be walking through the old one.
        """
        site = self.sites()[layer]
        if site._modules.get(_NAME) is None:
            site.__dict__["_modules"] = {**site._modules, _NAME: LiveAttention()}
            self.enter(site, cast(LiveAttention, site._modules[_NAME]))
        return cast(LiveAttention, site._modules[_NAME])

    def _release(self, layer: int) -> None:
        """Give the upstream code its own attention back where nothing of ours is active."""
        site = self.sites()[layer]
        if cast(LiveAttention, site._modules[_NAME]).idle():
            self.leave(site)
            site.__dict__["_modules"] = {k: v for k, v in site._modules.items() if k != _NAME}

    def _require_uncompiled(self) -> None:
        if is_compiled(self.model) and any(_NAME not in site._modules for site in self.sites()):
            raise ValueError(
                "the model is compiled: its code does not hide padding and can't be changed any more"
            )


class _Packed(nn.Module):
    """A layer's smaller projections, and the key/value head of each kept query head."""

    def __init__(self, linears: dict[str, nn.Module], kv_head_of: list[int], kv_heads: int) -> None:
        super().__init__()
        self.linears = nn.ModuleDict(linears)
        self.kv_head_of, self.kv_heads = kv_head_of, kv_heads


def _narrow(linear: nn.Module, ids: list[int], width: int, columns: bool) -> nn.Module:
    """A new linear layer of the rows or columns of ``linear`` in ``ids``, pieces of ``width``."""
    source = cast(nn.Linear, linear)
    weight = ops.gather_heads(source.weight, ids, width, int(columns))
    packed = nn.Linear(1, 1, bias=False, device="meta")  # a shell: its own weight is not wanted
    packed.weight = nn.Parameter(weight, requires_grad=source.weight.requires_grad)
    if source.bias is not None:
        bias = source.bias.detach().clone() if columns else ops.gather_heads(source.bias, ids, width, 0)
        packed.bias = nn.Parameter(bias, requires_grad=source.bias.requires_grad)
    return packed


def _take_over(linear: nn.Module, packed: nn.Module) -> None:
    """Give ``linear``, which keeps its identity and its hooks, the parameters of ``packed``."""
    target, source = cast(nn.Linear, linear), cast(nn.Linear, packed)
    target.weight, target.bias = source.weight, source.bias
    target.out_features, target.in_features = source.weight.shape


def _zero_channels(keep: Tensor, down: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * keep.to(args[0].device), *args[1:])
