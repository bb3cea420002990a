"""What adapters of live remote-code models share: our attention in the place of one call.

The upstream code keeps running, with its own signatures, caches, positions and masks. Its projections become
smaller; where heads are skipped, share key/value heads unevenly or are observed, its
``scaled_dot_product_attention`` becomes a ``LiveAttention`` too. So a copy of the code that caches in another
way, or takes other arguments, needs no adapter of its own.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.adapters.base import (
    AttentionWeights,
    LayerObserver,
    LayOutPlan,
    MLPWeights,
    adapter_for,
    is_compiled,
    split_fused,
    tensors_of,
)
from sinkprune.adapters.in_place import InPlaceAdapter, Selection
from sinkprune.adapters.masked import masked_attention, masked_call
from sinkprune.adapters.native import NativeAdapter
from sinkprune.kernels.visibility import Visibility
from sinkprune.models.marks import mark, plan_of
from sinkprune.models.modules import AttentionCall, CompactMLP, SinkPrunedAttention
from sinkprune.models.published import NATIVE, native_kind, native_of

_NAME = "sinkprune_attention"  # the submodule that a live attention gets while something of ours is active


# Held by whoever changes what a model's sites hold, or hides something in a forward: other threads wait.
_HIDING: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_HIDING_MADE = threading.Lock()


class LiveAttention(Selection):
    """Stands in for ``scaled_dot_product_attention`` in one layer.

    ``hidden`` is what each thread's forwards hide that the upstream code does not (a ``block_size`` takes the
    place of any mask that it passes).
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden: dict[int, Visibility] = {}  # by thread: one's forward never sees another's padding

    def idle(self) -> bool:
        return not self.hidden and super().idle()

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
            if attn_mask.shape[1] > 1 and owner is not None:
                raise ValueError("a compact layer does not know an attention bias of every head")
            out, lse = masked_attention(query, key, value, attn_mask, False, scale, heads, owner), None
        if self.observer is not None:
            call = AttentionCall(query, key, lse, heads, owner, scale=scale, **seen._asdict())
            self.observer(call if attn_mask is None else masked_call(call, attn_mask, queries_last=False))
        return out


class LiveAdapter(InPlaceAdapter):
    """An adapter of upstream code: a family says where its layers, projections and attention call are."""

    @abstractmethod
    def sites(self) -> list[nn.Module]:
        """Of every layer, the module that holds the attention call."""

    def norms(self, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
        """The modules over the features of a head's queries and keys, where the family has them."""
        return None, None

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
        try:
            mlp = self.mlp_linears(layer)
        except ValueError:  # not gated
            mlp = {}
        return self.attention_linears(layer) | mlp

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
        self._require_known(native.state_dict().keys())
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
        wanted = native.state_dict()
        for name, tensor in tensors.items():
            is_, said = tuple(tensor.shape), tuple(wanted[name].shape)
            if is_ != said:
                raise ValueError(
                    f"{name} has shape {is_}, and {said} by the model's config, which would be written"
                )
        native.load_state_dict(tensors, assign=True)
        mark(native, plan, self.form)
        return native

    def _require_known(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` for a parameter that a native model with tensors of these ``names`` lacks: not
        a head that is the embedding, nor a bias that a repair added."""
        tensors = self.model.state_dict()
        layers = range(self.geometry().num_layers if self.form == "compact" else 0)
        packed = {id(p) for i in layers for module in self.linears(i).values() for p in module.parameters()}
        for name, parameter in self.model.named_parameters():
            if name in names or id(parameter) in packed:
                continue
            alike = (t for k, t in tensors.items() if k in names and t.shape == parameter.shape)
            if not any(torch.equal(tensor, parameter) for tensor in alike):
                raise ValueError(
                    f"{name} is not among the tensors of the model's config, and would be lost (a head of "
                    "its own under tie_word_embeddings?)"
                )

    def _packed_as(self, laid_out: SinkPrunedAttention | CompactMLP, layer: int) -> nn.Module:
        """The native compact module of this compact layer's tensors."""
        if isinstance(laid_out, CompactMLP):
            own = self.mlp_weights(layer)
            gate, down = cast(Tensor, own.gate), own.down
            biases = [bias for bias in (own.gate_bias, own.up_bias) if bias is not None and len(bias)]
            return CompactMLP(
                torch.cat((gate, own.up)), down, torch.cat(biases) if biases else None, own.down_bias
            )
        owner = laid_out.kv_head_of
        shared = None if owner is None else owner.tolist()
        return SinkPrunedAttention.from_projections(
            **vars(self.attention_weights(layer)),
            head_dim=laid_out.head_dim,
            kv_head_of=shared if laid_out.num_heads else [],
        )

    def resized(self, layer: int, kv_head_of: list[int], group: int, index: Tensor | None) -> None:
        kv_heads = len(set(kv_head_of))
        self.resize(self.sites()[layer], len(kv_head_of), kv_heads, group if index is None else 1)
        if index is not None:  # equal groups run in the upstream code's own attention
            self._live(layer).kv_head_of = index

    def select(self, layer: int, heads: Tensor | None) -> None:
        with self._alone():
            self._live(layer).kept_heads = heads
            self._release(layer)

    def observe(self, observer: LayerObserver | None) -> None:
        with self._alone():
            for layer in self.attending():
                self._live(layer).observer = None if observer is None else partial(observer, layer)
                self._release(layer)

    def observed(self) -> bool:
        found = (cast(Any, site._modules.get(_NAME)) for site in self.sites())
        return any(live is not None and live.observer is not None for live in found)

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
