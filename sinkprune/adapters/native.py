"""The adapters of native models: one mechanism, and a family says what its parts are called."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sinkprune.adapters.base import (
    Adapter,
    AttentionWeights,
    LayerObserver,
    MLPWeights,
    modules_of,
    split_fused,
    tensors_of,
)
from sinkprune.models.block_causal import positions_of
from sinkprune.models.caches import Cache
from sinkprune.models.common import GatedMLP, NativeLM, PublishedConfig
from sinkprune.models.experts import ExpertMLP
from sinkprune.models.streamed import stream_of
from sinkprune.plans import Geometry

MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


class NativeAdapter(Adapter):
    """Compact modules take the place of what is called ``site`` and ``mlp`` in a layer; dense projections
    that are the layer's own go.

    A family is a subclass whose attributes are its table of names; those here are Dream's.
    """

    model: Any
    caches: ClassVar[tuple[str, ...]] = ("prefix", "dual", "dllm")

    MODEL: ClassVar[type[NativeLM]]
    CONFIG: ClassVar[type[PublishedConfig] | None] = None  # where several families have one class of models
    layers: ClassVar[str] = "layers"  # the model's list of them
    site: ClassVar[str] = "self_attn"  # what attends in a layer; None there: the layer itself does
    # By role, as named in a layer: the linear modules of attention and MLP.
    attention_names: ClassVar[dict[str, str]] = {role: f"self_attn.{role}_proj" for role in "qkvo"}
    mlp_names: ClassVar[dict[str, str]] = MLP
    norm_names: ClassVar[tuple[str, ...]] = ()  # in the site: of a head's queries and keys
    # What the config calls the sizes of ``Geometry``, each of every layer or a tuple with one of each.
    sizes: ClassVar[dict[str, str]] = {
        "layers": "num_hidden_layers", "hidden": "hidden_size", "head_dim": "head_dim",
        "heads": "num_attention_heads", "kv_heads": "kv_heads", "channels": "intermediate_size",
        "vocabulary": "vocab_size", "context": "context",
    }  # fmt: skip

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return isinstance(model, cls.MODEL) and cls.CONFIG in (None, type(model.config))

    def geometry(self) -> Geometry:
        sizes = {name: getattr(self.model.config, key) for name, key in self.sizes.items()}
        layers = sizes.pop("layers")
        for name in ("heads", "kv_heads", "channels"):
            if not isinstance(sizes[name], tuple):
                sizes[name] = (sizes[name],) * layers
        said = Geometry(family=self.family, **sizes)
        built = self.as_built(said)
        if (built.heads, built.kv_heads) != (said.heads, said.kv_heads):
            raise ValueError(
                f"the layers have {built.heads} query heads on {built.kv_heads} key/value heads, and their "
                f"config, by which they compute, says {said.heads} on {said.kv_heads}"
            )
        return built

    @property
    def mask_token_id(self) -> int | None:
        return cast(int | None, self.model.config.mask_token_id)

    def blocks(self) -> list[nn.Module]:
        return list(getattr(self.model, self.layers))

    def block(self, layer: int) -> Any:
        """The layer's transformer block."""
        return getattr(self.model, self.layers)[layer]

    def attention_of(self, layer: int) -> Any:
        """What attends in a layer, dense or compact."""
        block = self.block(layer)
        site = getattr(block, self.site)
        return block if site is None else site

    def mlp_of(self, layer: int) -> Any:
        """What holds the channels of a layer's dense MLP. Raises ``ValueError`` where it has none."""
        block = self.block(layer)
        if not self._has_mlp(layer):
            raise ValueError(
                f"the MLP of layer {layer} is a mixture of experts, which has no channels of its own to prune"
            )
        return block if block.mlp is None else block.mlp

    def expert_mlp(self, layer: int) -> ExpertMLP | None:
        self.reach(layer)
        mlp = self.block(layer).mlp
        return mlp if isinstance(mlp, ExpertMLP) else None

    def _has_mlp(self, layer: int) -> bool:
        mlp = self.block(layer).mlp
        return mlp is None or isinstance(mlp, GatedMLP)

    def reach(self, layer: int) -> None:
        stream = stream_of(self.model)
        if stream is not None:
            stream.reach(layer)

    def linears(self, layer: int) -> dict[str, nn.Module]:
        names = self.attention_names | (self.mlp_names if self._has_mlp(layer) else {})
        return modules_of(self.block(layer), names)

    def attention_weights(self, layer: int) -> AttentionWeights:
        self.reach(layer)
        found = tensors_of(modules_of(self.block(layer), self.attention_names), layer)
        if "qkv" in found:
            geometry = self.geometry()
            width = geometry.kv_heads[layer] * geometry.head_dim
            split_fused(found, (geometry.heads[layer] * geometry.head_dim, width, width))
        site = self.attention_of(layer)
        norms = [getattr(site, name) for name in self.norm_names] or [None, None]
        return AttentionWeights(**found, q_norm=norms[0], k_norm=norms[1])

    def mlp_weights(self, layer: int) -> MLPWeights:
        self.reach(layer)
        self.mlp_of(layer)  # raises for a mixture of experts
        return MLPWeights(**tensors_of(modules_of(self.block(layer), self.mlp_names), layer))

    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        block = self.block(layer)
        for module, site, names in (
            (attention, self.site, self.attention_names),
            (mlp, "mlp", self.mlp_names),
        ):
            if module is not None:
                setattr(block, site, module)
                for name in names.values():
                    if "." not in name:  # the block's own, as LLaDA's are
                        delattr(block, name)

    def mask(self, layer: int, heads: Tensor | None, channels: Tensor | None) -> None:
        if channels is not None or self._has_mlp(layer):
            self.mlp_of(layer).kept_channels = channels
        self.attention_of(layer).kept_heads = heads

    def observe(self, observer: LayerObserver | None) -> None:
        for layer in range(len(self.blocks())):
            self.attention_of(layer).observer = None if observer is None else partial(observer, layer)

    def observed(self) -> bool:
        return self.attention_of(0).observer is not None

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        return self._logits(input_ids, attention_mask, rows)

    def predict_window(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: slice,
        positions: Tensor,
        cache: Cache,
    ) -> Tensor:
        return self._logits(input_ids, attention_mask, rows, positions=positions, cache=cache)

    def _logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: slice,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        sources = shifted_rows(input_ids, rows) if self.shift else rows
        output = self.model(input_ids, attention_mask, rows=sources, positions=positions, cache=cache)
        return cast(Tensor, output.logits)


class NativeBlockCausal(NativeAdapter):
    """A token sees its own block of positions and those before."""

    caches = ("block",)
    sizes: ClassVar[dict[str, str]] = NativeAdapter.sizes | {"head_dim": "width"}

    @property
    def block_size(self) -> int | None:
        return cast(int, self.model.config.block_size)

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Logits as in ``Adapter.predict``. In a padded batch blocks count from each sequence's first token,
        so that it is cut into blocks as it is alone."""
        positions = None
        if attention_mask is not None and self.block_size is not None:
            positions = positions_of(attention_mask)
        return self._logits(input_ids, attention_mask, rows, positions=positions)


def shifted_rows(input_ids: Tensor, rows: slice = slice(None)) -> Tensor:
    """The rows of logits that are a token late, as Dream's are, for the tokens at ``rows``: the one before
    each.

    Row 0 also serves the first token, which no row predicts, as in the published sampler.
    """
    tokens = torch.arange(input_ids.shape[1], device=input_ids.device)[rows]
    return (tokens - 1).clamp(min=0)
