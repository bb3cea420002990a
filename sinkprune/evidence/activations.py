"""What flows through a dense model on calibration rows: one forward of each row feeds every criterion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sinkprune import ops
from sinkprune.adapters import Adapter
from sinkprune.evidence.calibration import BlockStream, Calibration
from sinkprune.evidence.own_thread import own_thread
from sinkprune.evidence.sink_mask import SinkMask
from sinkprune.evidence.sinks import SinkGate
from sinkprune.evidence.tracking import masked_column_mass
from sinkprune.files import whole_file
from sinkprune.models.modules import AttentionCall
from sinkprune.models.streamed import Stream, stream_of
from sinkprune.plans import Geometry
from sinkprune.progress import bar


@dataclass
class LayerActivations:
    """Sums over valid tokens of one layer, float64 on the model's device.

    Attributes:
        tokens: valid tokens seen.
        heads_mean: mean of the heads' outputs side by side, the output projection's input ``[H D]``.
        heads_moment: their second moment ``[H D, H D]``: mean of ``x xᵀ``.
        residual_moment: the same of each head alone without its sink ``[H, D, D]``: what ``softmax(QKᵀ)V``
            still gives when the key with the largest column mass is taken out, where that sink stands out;
            centred over tokens.
        attention_moment, mlp_moment: mean squares of the inputs of q, k, v and of the MLP ``[hidden]``.
        attention_moment_soft, mlp_moment_soft: the same with every token weighted by 1 - soft sink mask.
        channels_mean, channels_moment: mean and mean square of the down projection's input ``[C]``.
        stream_moment: mean square of the hidden states after the block, per feature, a number.
        relative_moment, relative_mean, relative_weight: ``heads_moment``, ``heads_mean`` and 1, every token
            divided by its own mean square of the hidden states once the attention is added to them.
    """

    tokens: int
    heads_mean: Tensor
    heads_moment: Tensor
    residual_moment: Tensor
    attention_moment: Tensor
    attention_moment_soft: Tensor
    mlp_moment: Tensor
    mlp_moment_soft: Tensor
    channels_mean: Tensor
    channels_moment: Tensor
    stream_moment: float
    relative_moment: Tensor
    relative_mean: Tensor
    relative_weight: Tensor

    def relative_covariance(self) -> Tensor:
        """Of the heads' outputs, with tokens weighted as in ``relative_moment``: ``[H D, H D]``."""
        mean = self.relative_mean
        return self.relative_moment - mean[:, None] * mean / self.relative_weight

    def head_moments(self, *, centred: bool = False) -> Tensor:
        """The second moment of each head's own output, ``[H, D, D]``; ``centred``: its covariance."""
        heads, width = self.residual_moment.shape[:2]
        moments = self.heads_moment.view(heads, width, heads, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        if not centred:
            return moments
        mean = self.heads_mean.view(heads, width)
        return moments - mean[:, :, None] * mean[:, None, :]


def gather(adapter: Adapter, calibration: Calibration, *, batch: int = 16) -> Sequence[LayerActivations]:
    """The activations of every layer of a dense model, from one forward of each row.

    Memory: per layer one ``[H D, H D]`` matrix in float32 while gathering. Of a model whose blocks are read
    one at a time: those of one layer and the hidden states of all rows; the rest lies in the stream's folder.

    Raises:
        ValueError: a model that is pruned or observed already, or activations that are not finite.
    """
    if adapter.form != "dense" or adapter.observed():
        raise ValueError("activations are gathered on a dense model that nobody tracks")
    stream = stream_of(adapter.model)
    if stream is not None:
        return _gather_by_layer(adapter, calibration, batch, stream)
    device = adapter.device
    geometry = adapter.geometry()
    layers = [_Layer(adapter, geometry, layer) for layer in range(geometry.num_layers)]
    hooks: list[Any] = []
    try:
        for layer in layers:
            layer.listen(hooks)
        adapter.observe(own_thread(lambda layer, call: layers[layer].attention(call)))
        with torch.no_grad():
            for part in bar("watching", "batch", list(calibration.batches(batch))):
                valid = None if part.valid is None else part.valid.to(device)
                for layer in layers:
                    layer.valid = valid
                adapter.predict(part.ids.to(device), valid, slice(0, 1))
    finally:
        adapter.observe(None)
        for hook in hooks:
            hook.remove()
    return [layer.result() for layer in layers]


def _gather_by_layer(
    adapter: Adapter, calibration: Calibration, batch: int, stream: Stream
) -> Sequence[LayerActivations]:
    """``gather``, a block at a time, in the same order of sums; layers that lie in the stream's folder are
    not gathered again."""
    folder = stream.folder
    spilled, geometry = SpilledActivations(folder, adapter.geometry().num_layers), adapter.geometry()
    blocks = BlockStream(adapter, calibration, batch)
    for layer in range(blocks.resume(folder / "gathering.safetensors"), geometry.num_layers):
        sums, hooks = _Layer(adapter, geometry, layer), list[Any]()
        try:
            sums.listen(hooks)
            adapter.observe(own_thread(sums.observe))
            blocks.advance(layer, before=sums.begin)
        finally:
            adapter.observe(None)
            for hook in hooks:
                hook.remove()
        spilled.write(layer, sums.result())
        blocks.checkpoint(folder / "gathering.safetensors", layer + 1)
        stream.progress("scored", layer)
    return spilled


class SpilledActivations(Sequence[LayerActivations]):
    """Activations that lie in a folder, a file for each layer, and are read when they are asked for."""

    def __init__(self, folder: Path, layers: int) -> None:
        self._folder, self._layers = folder, layers

    def __len__(self) -> int:
        return self._layers

    @overload
    def __getitem__(self, layer: int) -> LayerActivations: ...
    @overload
    def __getitem__(self, layer: slice) -> list[LayerActivations]: ...
    def __getitem__(self, layer: int | slice) -> LayerActivations | list[LayerActivations]:
        if isinstance(layer, slice):
            return [self[i] for i in range(*layer.indices(self._layers))]
        if not 0 <= layer < self._layers:
            raise IndexError(layer)
        found: dict[str, Any] = load_file(self._path(layer))
        tokens, stream = int(found.pop("tokens")), float(found.pop("stream_moment"))
        return LayerActivations(tokens=tokens, stream_moment=stream, **found)

    def write(self, layer: int, seen: LayerActivations) -> None:
        numbers = {"tokens": seen.tokens, "stream_moment": seen.stream_moment}
        tensors = {k: v.contiguous() for k, v in vars(seen).items() if isinstance(v, Tensor)}
        tensors |= {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
        with whole_file(self._path(layer)) as part:
            save_file(tensors, part)

    def _path(self, layer: int) -> Path:
        return self._folder / f"activations-{layer:05d}.safetensors"


@dataclass
class _Layer:
    """Running sums of one layer, filled in the order of its forward."""

    adapter: Adapter
    geometry: Geometry
    layer: int
    valid: Tensor | None = None
    sums: dict[str, Any] = field(default_factory=dict)

    def listen(self, hooks: list[Any]) -> None:
        """Add this layer's hooks to ``hooks``."""
        linears = self.adapter.linears(self.layer)
        fused = "qkv" in linears
        first, value = linears["qkv" if fused else "q"], linears["qkv" if fused else "v"]
        value = linears["k"] if value is None else value  # full attention of DiffusionGemma
        hooks += [
            first.register_forward_pre_hook(own_thread(partial(self._input, "attention"))),
            value.register_forward_hook(own_thread(self._value)),
            linears["o"].register_forward_pre_hook(own_thread(self._heads)),
            linears["o"].register_forward_hook(own_thread(self._attended)),
            self.adapter.blocks()[self.layer].register_forward_pre_hook(
                own_thread(self._enter), with_kwargs=True
            ),
            self.adapter.blocks()[self.layer].register_forward_hook(own_thread(self._stream)),
        ]
        if "down" in linears:
            entry = linears["gate_up"] if "gate_up" in linears else linears["up"]
            hooks += [
                entry.register_forward_pre_hook(own_thread(partial(self._input, "mlp"))),
                linears["down"].register_forward_pre_hook(own_thread(self._channels)),
            ]

    def begin(self, valid: Tensor | None) -> None:
        """A batch of these valid tokens comes."""
        self.valid = valid

    def observe(self, layer: int, call: AttentionCall) -> None:
        """``attention``, as observers are called."""
        self.attention(call)

    def attention(self, call: AttentionCall) -> None:
        """The attention's column mass ``[B, H, L]`` and log-sum-exp, whatever its mask."""
        positions = _positions(self.valid) if call.query_positions is None else call.query_positions
        mask = call.mask if call.block_size is None else _block_mask(call)
        if mask is not None:
            self.call = call._replace(mask=mask, lse=_masked_lse(call, mask))
            self.mass = masked_column_mass(self.call, positions, len(call.query))
            return
        self.call = call
        self.mass = ops.column_mass(
            call.query,
            call.key,
            call.lse,
            key_padding_mask=self.valid,
            query_positions=positions,
            kv_head_of=call.kv_head_of,
            scale=call.scale,
        )

    def result(self) -> LayerActivations:
        sums, count = self.sums, self.sums["tokens"]
        found = {name: total.double() / count for name, total in sums.items() if isinstance(total, Tensor)}
        width = self.geometry.head_dim
        heads = found["residual_mean"].shape[-1] // width
        centre = found.pop("residual_mean").view(heads, width)
        found["residual_moment"] -= centre[:, :, None] * centre[:, None, :]
        for name, total in found.items():
            if not torch.isfinite(total).all():
                raise ValueError(f"activations of layer {self.layer} are not finite ({name})")
        none = found["heads_mean"].new_zeros(0)
        for name in ("mlp_moment", "mlp_moment_soft", "channels_mean", "channels_moment"):
            found.setdefault(name, none)
        return LayerActivations(tokens=count, stream_moment=sums["stream"] / count, **found)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = value if name not in self.sums else self.sums[name] + value

    def _rows(self, x: Tensor) -> Tensor:
        """Valid tokens of ``[B, L, n]`` as float32 ``[tokens, n]``."""
        x = x.view(-1, x.shape[-1]) if self.valid is None else x[self.valid]
        return x.float()

    def _input(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        squares = args[0].detach().float().square()
        self._add(f"{name}_moment", self._rows(squares).sum(0))
        if name == "attention":
            self.attention_input = squares  # its sinks are known after the attention
        else:
            self._add("mlp_moment_soft", self._rows(squares * self._soft()).sum(0))

    def _soft(self) -> Tensor:
        """Squared weight of each token, ``(1 - soft sink mask)²``: float32 ``[B, L, 1]``."""
        length = self.mass.shape[-1]
        queries = length if self.valid is None else self.valid.sum(1, keepdim=True)
        mass = self.mass.sum(1) * queries  # the public code's mass is a sum over queries and heads
        return (1 - SinkMask().of(mass, self.valid)).square().unsqueeze(-1)

    def _value(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        width = self.geometry.kv_heads[self.layer] * self.geometry.head_dim
        self.value = out[..., -width:].detach()

    def _heads(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        rows = self._rows(x)
        self.sums["tokens"] = self.sums.get("tokens", 0) + len(rows)
        self._add("heads_mean", rows.sum(0))
        self._add("heads_moment", rows.T @ rows)
        self._add("attention_moment_soft", self._rows(self.attention_input * self._soft()).sum(0))
        residual = self._rows(self._without_sinks(x.float()))
        self._add("residual_mean", residual.sum(0))
        by_head = residual.view(len(rows), -1, self.geometry.head_dim)
        self._add("residual_moment", torch.einsum("nhi,nhj->hij", by_head, by_head))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.entered = args[0] if args else keywords["hidden_states"]

    def _attended(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """A token whose hidden state is a thousand times that of others (a massive activation) can lose as
        many times more before the next norm shows it."""
        rows = self._rows(args[0].detach())
        energy = self._rows(self.entered + out.detach()).square().mean(1, keepdim=True)
        weight = 1 / energy.clamp(min=torch.finfo(torch.float32).tiny)
        self._add("relative_moment", rows.T @ (rows * weight))
        self._add("relative_mean", (rows * weight).sum(0))
        self._add("relative_weight", weight.sum())

    def _without_sinks(self, x: Tensor) -> Tensor:
        """The heads' outputs ``[B, L, H D]`` less what their sinks contribute, where those stand out."""
        call, gate = self.call, SinkGate()
        _, heads, length, width = call.query.shape
        mass, sink = self.mass.max(-1)  # [B, H]
        keys = float(length) if self.valid is None else self.valid.sum(1)[:, None]
        stands_out = mass * keys >= gate.fair_share
        owner = call.kv_head_of
        if owner is None:  # upstream code may have repeated its keys for every query head
            owner = torch.arange(heads, device=x.device) // (heads // call.key.shape[1])
        at = sink[..., None, None].expand(-1, -1, 1, width)
        key = call.key.index_select(1, owner).gather(2, at).float()  # [B, H, 1, D]
        values = torch.tensor(self.geometry.kv_head_of(self.layer), device=x.device)
        value = self.value.unflatten(-1, (-1, width)).transpose(1, 2).index_select(1, values)
        value = value.gather(2, at).float()
        scale = width**-0.5 if call.scale is None else call.scale
        assert call.lse is not None
        score = (call.query.float() * key).sum(-1) * scale / math.log(2)
        if call.mask is not None:
            seen = _added(call.mask).expand(len(x), heads, length, length)
            score = score + seen.gather(3, sink[..., None, None].expand(-1, -1, length, 1)).squeeze(3)
        weight = torch.exp2(score - call.lse.float()) * stands_out[..., None]  # [B, H, L]
        return x - (weight[..., None] * value).transpose(1, 2).flatten(2)

    def _channels(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = self._rows(args[0].detach())
        self._add("channels_mean", rows.sum(0))
        self._add("channels_moment", rows.square().sum(0))

    def _stream(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        self.sums["stream"] = self.sums.get("stream", 0.0) + float(self._rows(hidden).square().mean(1).sum())


def _block_mask(call: AttentionCall) -> Tensor:
    """What the queries of a block-causal call see, bool ``[B, 1, Lq, Lk]``."""
    seen = call.seen.keys(call.query.shape[2], call.key.shape[2], call.query.device)
    assert seen is not None
    return seen[:, None]


def _masked_lse(call: AttentionCall, mask: Tensor) -> Tensor:
    """Base-2 log-sum-exp ``[B, H, L]`` of a call under a mask of any kind."""
    query, key = call.query.float(), call.key.float()
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return ops.base2_lse((query @ key.mT * scale + _added(mask)).logsumexp(-1))


def _added(mask: Tensor) -> Tensor:
    """A mask as what is added to the scores, float32."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


def _positions(valid: Tensor | None) -> Tensor | None:
    """Query positions, -1 at padding."""
    if valid is None:
        return None
    index = torch.arange(valid.shape[1], device=valid.device, dtype=torch.int32)
    return torch.where(valid, index, -1)
