"""What the rest of the package needs to know of a model family, and the registry of families.

An adapter reads a live model by its structure and puts compact modules in place. One family is one file in
this folder that defines an ``Adapter`` and registers it; nothing else changes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sinkprune.adapters.sizes import built_sizes
from sinkprune.models.caches import Cache
from sinkprune.models.experts import ExpertMLP, Router
from sinkprune.models.marks import form_of, plan_of
from sinkprune.models.modules import AttentionCall
from sinkprune.models.streamed import stream_of
from sinkprune.plans import Geometry, LayerPlan, PrunePlan


@dataclass(frozen=True)
class AttentionWeights:
    """A layer's dense projections: weights ``[rows, hidden]`` for q, k, v and ``[hidden, columns]`` for o.

    ``q_norm`` and ``k_norm`` are modules over a head's features, where the family has them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None


@dataclass(frozen=True)
class MLPWeights:
    """A layer's dense MLP: gate (None where it is not gated) and up ``[channels, hidden]``, down
    ``[hidden, channels]``."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class Facts:
    """What docs/families.md says of a family beside what its adapter shows; a cell that is not ``"yes"`` says
    why not, or where not."""

    models: str
    mask: str = "yes"
    compact: str = "yes"
    channels: str = "yes"
    blocks: str = "yes"
    export: str = "yes"
    sampler: str = ""  # where it depends on the model


LayerObserver = Callable[[int, AttentionCall], None]
LayOutPlan = Callable[[nn.Module, PrunePlan], nn.Module]


class Adapter(ABC):
    """A view of one live model."""

    family: str
    facts: ClassVar[Facts | None] = None
    caches: ClassVar[
        tuple[str, ...]
    ] = ()  # names of those in ``sinkprune.models.caches`` that the model takes
    shift: ClassVar[int] = 0  # 1 where a row of the model's logits is about the next token
    seeds: ClassVar[bool] = False  # whether a block's first token is filled alone, from what is before it
    hands_on: ClassVar[bool] = True  # whether a block that writes nothing gives what enters it, at any place

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether ``model`` has this family's structure (its modules, not its class name)."""

    @abstractmethod
    def geometry(self) -> Geometry:
        """Sizes of the dense model, also when the model is masked or compact."""

    def as_built(self, said: Geometry) -> Geometry:
        """The geometry that a config ``said``, with the heads and channels that the modules of a dense model
        have: it may have been made narrower, or its layers may differ.

        Raises ``ValueError`` for modules that don't fit each other.
        """
        plan = plan_of(self.model)
        if self._sizes is None and self.form == "compact" and plan is not None:
            dense = plan.geometry
            self._sizes = tuple(zip(dense.heads, dense.kv_heads, dense.channels, strict=True))
        if self._sizes is None:
            self._sizes = tuple(self._built(said, layer) for layer in range(said.num_layers))
        heads, kv_heads, channels = (tuple(sizes) for sizes in zip(*self._sizes, strict=True))
        return replace(said, heads=heads, kv_heads=kv_heads, channels=channels)

    _sizes: tuple[tuple[int, int, int], ...] | None = None  # of the dense model: they stay when it is packed

    def _built(self, said: Geometry, layer: int) -> tuple[int, int, int]:
        usual = said.heads[layer], said.kv_heads[layer], said.channels[layer]
        try:
            linears = self.linears(layer)
        except (ValueError, AttributeError):  # a tree that it can't read: who needs it says so
            return usual
        heads, kv_heads, channels = built_sizes(layer, linears, said.head_dim) or usual
        return heads, kv_heads, channels or usual[2]  # experts: those that a token passes through

    @abstractmethod
    def attention_weights(self, layer: int) -> AttentionWeights: ...

    @abstractmethod
    def mlp_weights(self, layer: int) -> MLPWeights: ...

    @abstractmethod
    def install(self, layer: int, attention: nn.Module | None, mlp: nn.Module | None) -> None:
        """Put compact modules in place of the layer's projections, dropping the dense tensors they
        replace."""

    @abstractmethod
    def mask(self, layer: int, heads: Tensor | None, channels: Tensor | None) -> None:
        """Skip all but these heads and channels (None: keep all), leaving the weights as they are."""

    @abstractmethod
    def observe(self, observer: LayerObserver | None) -> None:
        """Call ``observer`` after every attention of the model; None detaches."""

    @abstractmethod
    def observed(self) -> bool:
        """Whether an observer is attached."""

    @property
    @abstractmethod
    def mask_token_id(self) -> int | None: ...

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order.

        Each takes hidden states ``[B, L, hidden]`` as its first argument and returns them, alone or first of
        a tuple. Raises ``ValueError`` for a family that has not said where they are.
        """
        raise ValueError(f"the {self.family} adapter names no blocks to run one by one")

    def reach(self, layer: int) -> None:  # noqa: B027
        """Have a layer's weights, where blocks are read one at a time; ``linears`` gives modules without."""

    def linears(self, layer: int) -> dict[str, nn.Module]:
        """A dense layer's linear modules by role: ``q k v o`` or ``qkv o``; where channels can be pruned also
        ``gate up down``, ``gate_up down`` or ``up down``.

        Raises ``ValueError`` for a family that has not said where they are.
        """
        raise ValueError(f"the {self.family} adapter names no linear modules to calibrate")

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Logits ``[B, R, V]`` whose row i is the distribution of token i of ``rows``.

        A family undoes its own shift here, and runs its LM head on those rows only where it can.
        """
        return self.model(input_ids, attention_mask=attention_mask).logits[:, rows]

    def predict_window(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: slice,
        positions: Tensor,
        cache: Cache,
    ) -> Tensor:
        """``predict`` of ids ``[B, L]`` that are tokens ``positions`` ``[L]`` of a sequence, where ``cache``
        holds the rest.

        ``attention_mask`` ``[B, Lk]`` is of the keys that the cache returns. A shifted family's first row is
        about nothing unless the window begins the sequence.
        """
        output = self.model(input_ids, attention_mask, rows=rows, positions=positions, cache=cache)
        return output.logits

    @property
    def block_size(self) -> int | None:
        """Positions of a block where the model is block-causal: a token sees its block and those before."""
        return None

    @property
    def usual_block(self) -> int | None:
        """Tokens of a block that the published sampler fills, where the model leaves that open."""
        return None

    @property
    def looks_ahead(self) -> bool:
        """Whether tokens after the block that is filled change what is filled."""
        return self.block_size is None

    def hiding(self, attention_mask: Tensor | None) -> AbstractContextManager[None]:
        """While the blocks run one by one: hide padding as ``predict`` does, where the blocks' own arguments
        do not."""
        return nullcontext()

    @property
    def step_module(self) -> nn.Module:
        """The module each of whose forwards is one denoising step."""
        return self.model

    def sample(
        self, input_ids: Tensor, attention_mask: Tensor, steps: int, gen_length: int, options: dict[str, Any]
    ) -> Iterator[Any] | None:
        """The family's own sampler for ``profile``, one item a forward, where masked denoising does not fit
        it; None = ``denoise``."""
        return None

    def compact(
        self, layer: int, kept_heads: list[int], kept_channels: list[int] | None
    ) -> tuple[nn.Module, nn.Module | None] | None:
        """What ``install`` takes, where not a ``SinkPrunedAttention`` and a ``CompactMLP``; None = those.

        Reads the dense tensors and leaves them as they are. Works on ``meta`` tensors too.
        """
        return None

    def check(self, kept_heads: list[list[int]], kept_channels: list[list[int] | None], mode: str) -> None:
        """Raise ``ValueError``, before anything changes, where this model can't take such a plan in ``mode``.

        Args:
            kept_heads, kept_channels: of every layer.
            mode: ``"mask"`` or ``"compact"``.
        """
        check_ready(self.model)
        if mode == "compact":
            self.require_plain(kept_channels)
        owners: dict[Any, int] = {}
        streamed = stream_of(self.model) is not None  # what came and went may lie in the same place
        for layer in range(self.geometry().num_layers):
            if kept_channels[layer] is not None:
                self.mlp_weights(layer)  # a family without prunable channels says so here
            weight = self.attention_weights(layer).q
            if streamed:
                continue
            first = owners.setdefault(_storage(weight), layer)
            if first != layer:
                raise ValueError(
                    f"layers {first} and {layer} share their attention weights: pruning one would prune both"
                )

    def expert_mlp(self, layer: int) -> ExpertMLP | None:
        """The mixture of experts of ``layer``, whose experts plans may take; None where its MLP is dense, or
        the family's experts stay."""
        return None

    def skip_experts(self, layer: int, kept: LayerPlan | None) -> None:
        """Mask form of a layer's experts, where it has some, the weights staying as they are; None undoes
        it."""
        mlp = self.expert_mlp(layer)
        if mlp is not None:
            chosen = (None, None) if kept is None else (kept.kept_experts, kept.kept_expert_channels)
            device = mlp.gate.weight.device
            index = (None if ids is None else torch.tensor(ids, device=device).long() for ids in chosen)
            mlp.skip(*index)

    def check_experts(self, layers: list[LayerPlan]) -> None:
        """Raise ``ValueError``, before anything changes, where this model's experts can't go as ``layers``
        say."""
        for layer, kept in enumerate(layers):
            if not kept.takes_experts:
                continue
            mlp = self.expert_mlp(layer)
            if mlp is None:
                raise ValueError(f"the experts of layer {layer} stay as they are in this {self.family} model")
            for name, module in mlp.named_modules():
                if isinstance(getattr(module, "weight", None), Tensor) and not isinstance(module, Router):
                    require_plain(layer, name, module, hooks=kept.kept_expert_channels is not None)

    def require_plain(self, kept_channels: list[list[int] | None] | None = None) -> None:
        """Raise ``ValueError`` where a projection computes more than its weight says: what packing, fusing,
        sparsifying and saving would throw away.

        Args:
            kept_channels: of every layer, None where a layer's MLP stays as it is; None = read all.
        """
        replaced = type(self).compact is Adapter.compact  # not made smaller in place: hooks would be lost
        for layer in range(self.geometry().num_layers):
            try:
                linears = self.linears(layer)
            except ValueError:  # a family that names none, or a tree that it can't read: it says so itself
                continue
            channels = True if kept_channels is None else kept_channels[layer]
            for role, linear in linears.items():
                if channels is not None or role in ("q", "k", "v", "qkv", "o"):
                    require_plain(layer, role, linear, hooks=replaced)

    def as_native(self, lay_out: LayOutPlan) -> nn.Module:
        """A native model over the tensors of a live upstream object; any other model as it is.

        Args:
            lay_out: gives a dense native model, on ``meta``, the modules that it has after a plan.

        Raises:
            TypeError: a live object for whose family there is no native model.
        """
        return self.model

    def refuse_compact(self) -> str | None:
        """Why this model can't take the compact form, or None where it can."""
        return None

    def kept_heads(self, layer: int) -> list[int]:
        """Original ids of the query heads that run in ``layer``."""
        plan = plan_of(self.model)
        return list(range(self.geometry().heads[layer])) if plan is None else plan.layers[layer].kept_heads

    @property
    def form(self) -> str:
        """``"dense"``, ``"mask"`` or ``"compact"``."""
        return form_of(self.model)

    def require_dense(self, to: str) -> None:
        """Raise ``ValueError`` for a pruned model; ``to`` says what a dense one is needed for."""
        if self.form != "dense":
            raise ValueError(f"the model is already pruned ({self.form} form): {to} the dense model")

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is. Raises ``ValueError`` as ``require_loaded`` does."""
        self.require_loaded()
        return next(self.model.parameters()).device

    def require_loaded(self) -> None:
        """Raise ``ValueError`` where weights are not there to be read: on ``meta``, or offloaded."""
        require_loaded(self.model)

    def mask_id(self, given: int | None = None, tokenizer: Any = None) -> int:
        """The mask token: ``given``, else the config's, else the tokenizer's.

        Raises ``ValueError`` where none of them names one, or names one outside the vocabulary.
        """
        found = self.mask_token_id if given is None else given
        if found is None:
            found = getattr(tokenizer, "mask_token_id", None)
        if found is None:
            raise ValueError("the model's config names no mask token: pass mask_token_id")
        size = self.geometry().vocabulary
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < size:
            raise ValueError(f"the mask token must be one of the vocabulary's {size} ids, got {found!r}")
        return found

    def fingerprint(self) -> str:
        """A hash of tensor names, shapes and strided samples of their values.

        Values are rounded to bfloat16 first, so one checkpoint loaded as float32 or bfloat16 has one
        fingerprint; a float16 copy rounds otherwise and has another. Raises ``ValueError`` where there are
        none, as ``require_loaded`` does.
        """
        self.require_loaded()
        digest = hashlib.sha256()
        stream = stream_of(self.model)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            if stream is not None:
                tensor = stream.read([name])[name]
            if tensor.numel():
                flat = tensor.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).view(torch.int16)
                digest.update(sample.cpu().numpy().tobytes())
        return digest.hexdigest()


def check_ready(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model that can't be changed as it is: compiled, sharded, or on ``meta``."""
    if is_compiled(model):
        raise ValueError("the model is compiled: prune the original model, then compile it")
    require_loaded(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise ValueError(f"{name} is a tensor-parallel shard: prune the whole model, then shard it")


def require_loaded(model: nn.Module) -> None:
    """Raise ``ValueError`` where a parameter is on ``meta``: not loaded, or offloaded by accelerate."""
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is None or stream_of(model) is not None:
        return
    if is_hooked(model):
        raise ValueError(
            f"{away} is offloaded (device_map, cpu_offload or disk_offload): its weights are needed, and "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings them back"
        )
    raise ValueError(f"{away} is on the meta device (not loaded): load the weights first")


def is_hooked(model: nn.Module) -> bool:
    """Whether accelerate has put hooks on ``model``."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model``, or a module in it, goes through ``torch.compile`` (of modules, or in place)."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def require_eval(model: nn.Module, dropout: float | None) -> None:
    """Raise ``ValueError`` where ``model`` would drop attention at random."""
    if model.training and dropout:
        raise ValueError(f"the model is in training mode with attention dropout {dropout}: call model.eval()")


def require_plain(layer: int, role: str, linear: nn.Module | None, *, hooks: bool) -> None:
    """Raise ``ValueError`` where ``linear`` is not an ordinary linear layer; ``hooks``: or has hooks."""
    if linear is None:  # values from the keys' projection
        return
    weight = getattr(linear, "weight", None)
    what = f"the {role} projection of layer {layer} is a {type(linear).__name__}"
    if not isinstance(weight, Tensor):
        raise ValueError(f"{what} without a weight to read (quantised?)")
    if type(linear) is not nn.Linear or not weight.is_floating_point():
        raise ValueError(
            f"{what} (quantised, sharded or wrapped) of {weight.dtype}, and an nn.Linear "
            "is needed: call merge_and_unload (LoRA), remove the parametrization or load it unquantised; "
            "pruning can use mode='mask'"
        )
    if hooks and (linear._forward_hooks or linear._forward_pre_hooks):
        raise ValueError(f"{what} with forward hooks, which would be lost: remove them first")


def modules_of(block: nn.Module, names: dict[str, str]) -> dict[str, nn.Module]:
    """A block's modules by role, where ``names`` says what each is called."""
    return {role: block.get_submodule(name) for role, name in names.items()}


def tensors_of(linears: dict[str, nn.Module], layer: int) -> dict[str, Any]:
    """Weights and biases by role. Raises ``ValueError`` for a layer that has no weight to read."""
    found: dict[str, Any] = {}
    for role, linear in linears.items():
        if not isinstance(getattr(linear, "weight", None), Tensor):
            raise ValueError(
                f"the {role} projection of layer {layer} is a {type(linear).__name__} without a weight "
                "to read (quantised?)"
            )
        found |= {role: linear.weight, f"{role}_bias": getattr(linear, "bias", None)}
    return found


def split_fused(found: dict[str, Any], rows: tuple[int, int, int]) -> None:
    """Put the ``rows`` of q, k and v in the place of ``qkv`` in what ``tensors_of`` found."""
    for suffix in ("", "_bias"):
        fused = found.pop(f"qkv{suffix}")
        parts = (None,) * 3 if fused is None else fused.split(rows)
        found |= {f"{role}{suffix}": part for role, part in zip("qkv", parts, strict=True)}


def _storage(weight: Tensor) -> Any:
    return weight.data_ptr() if weight.numel() and not weight.is_meta else id(weight)


_FAMILIES: list[type[Adapter]] = []


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: make a family known to every verb."""
    _FAMILIES.append(adapter)
    return adapter


def registered() -> tuple[type[Adapter], ...]:
    """Every family's adapter, in the order they are asked."""
    return tuple(_FAMILIES)


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter that recognises ``model``. Raises ``TypeError`` naming the families that were tried."""
    if hasattr(model, "_orig_mod"):
        raise TypeError("the model is compiled: pass the original model, and compile it afterwards")
    for family in _FAMILIES:
        if family.recognises(model):
            return family(model)
    known = ", ".join(dict.fromkeys(family.family for family in _FAMILIES))
    raise TypeError(f"no adapter recognises a model of type {type(model).__name__}; known families: {known}")
