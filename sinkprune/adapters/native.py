"""What the adapters of the native block-diffusion models share."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import ClassVar, cast

from torch import Tensor, nn

from sinkprune.adapters.base import Adapter, LayerObserver, MLPWeights, modules_of, tensors_of
from sinkprune.models.block_causal import BlockCausalLayer, BlockCausalLM, positions_of
from sinkprune.models.common import GatedMLP
from sinkprune.plans import Geometry

MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


class NativeBlockCausal(Adapter):
    """Compact modules take the place of a layer's attention and, where it is dense, ``layer.mlp``."""

    caches = ("block",)
    model: BlockCausalLM
    ATTENTION: ClassVar[dict[str, str]]  # the attention's linear modules by role, as named in a layer

    def layer_of(self, layer: int) -> BlockCausalLayer:
        return cast(BlockCausalLayer, self.model.layers[layer])

    def attention_of(self, layer: int) -> nn.Module:
        """The layer's attention, dense or compact."""
        block = self.layer_of(layer)
        return block.get_submodule(block.ATTENTION)

    @abstractmethod
    def channels_of(self, layer: int) -> int:
        """Channels of the layer's dense MLP, or of the experts that a token passes through, as published."""

    def geometry(self) -> Geometry:
        config = self.model.config
        layers = config.num_hidden_layers
        return Geometry(
            family=self.family,
            hidden=config.hidden_size,
            head_dim=config.width,
            vocabulary=config.vocab_size,
            context=config.context,
            heads=(config.num_attention_heads,) * layers,
            kv_heads=(config.kv_heads,) * layers,
            channels=tuple(map(self.channels_of, range(layers))),
        )

    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        block = self.layer_of(layer)
        if attention is not None:
            setattr(block, block.ATTENTION, attention)
        if mlp is not None:
            block.mlp = mlp

    @property
    def mask_token_id(self) -> int | None:
        return self.model.config.mask_token_id

    @property
    def block_size(self) -> int:
        return self.model.config.block_size

    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    def mlp_weights(self, layer: int) -> MLPWeights:
        self.mlp_of(layer)  # raises for a mixture of experts
        return MLPWeights(**tensors_of(modules_of(self.layer_of(layer), MLP), layer))

    def mlp_of(self, layer: int) -> GatedMLP:
        """The layer's dense MLP. Raises ``ValueError`` where it has none."""
        mlp = self.layer_of(layer).mlp
        if not isinstance(mlp, GatedMLP):
            raise ValueError(
                f"the MLP of layer {layer} is a mixture of experts: only its heads can be pruned"
            )
        return mlp

    def linears(self, layer: int) -> dict[str, nn.Module]:
        block = self.layer_of(layer)
        gated = isinstance(block.mlp, GatedMLP)
        return modules_of(block, {**self.ATTENTION, **(MLP if gated else {})})

    def mask(self, layer: int, heads: Tensor | None, channels: Tensor | None) -> None:
        if channels is not None or isinstance(self.layer_of(layer).mlp, GatedMLP):
            self.mlp_of(layer).kept_channels = channels
        self.attention_of(layer).kept_heads = heads  # type: ignore[assignment]

    def observe(self, observer: LayerObserver | None) -> None:
        for layer in range(len(self.model.layers)):
            attention = self.attention_of(layer)
            attention.observer = None if observer is None else partial(observer, layer)  # type: ignore[assignment]

    def observed(self) -> bool:
        return self.attention_of(0).observer is not None

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Logits as in ``Adapter.predict``. In a padded batch blocks count from each sequence's first token,
        so that it is cut into blocks as it is alone."""
        positions = None if attention_mask is None else positions_of(attention_mask)
        return self.model(input_ids, attention_mask, rows, positions=positions).logits
