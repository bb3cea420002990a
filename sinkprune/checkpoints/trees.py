"""A pruned model's tensors under the names of a smaller dense one, whatever modules hold them.

A part of a layer is called as GGUF calls it (``attn_q``, ``ffn_down``, …); a ``Tree`` says what each is
called in a published checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sinkprune.adapters import adapter_for
from sinkprune.models.marks import plan_of
from sinkprune.models.modules import CompactMLP, SinkPrunedAttention
from sinkprune.plans import Geometry


@dataclass(frozen=True)
class Tree:
    """Names of modules in a published checkpoint; those of a layer are below ``layer.format(i)``."""

    embedding: str
    norm: str
    head: str
    layer: str
    parts: dict[str, str]

    def name(self, layer: int, part: str, kind: str = "weight") -> str:
        """The published name of a layer's tensor, such as ``("attn_q", "bias")``."""
        return f"{self.layer.format(layer)}.{self.parts[part]}.{kind}"

    def renumbered(self, tensors: dict[str, Tensor], numbers: dict[int, int | None]) -> dict[str, Tensor]:
        """``tensors`` with the layers by their new numbers, those of none left out."""
        before = {n: None if m is None else self.layer.format(m) for n, m in numbers.items()}
        return renamed(tensors, {self.layer.format(n): new for n, new in before.items()})


LLADA = Tree(
    "model.transformer.wte",
    "model.transformer.ln_f",
    "model.transformer.ff_out",
    "model.transformer.blocks.{}",
    {
        "attn_norm": "attn_norm", "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj",
        "attn_output": "attn_out", "attn_q_norm": "q_norm", "attn_k_norm": "k_norm", "ffn_norm": "ff_norm",
        "ffn_gate": "ff_proj", "ffn_up": "up_proj", "ffn_down": "ff_out",
    },
)  # fmt: skip
LLAMA = Tree(
    "model.embed_tokens",
    "model.norm",
    "lm_head",
    "model.layers.{}",
    {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate",
    },
)  # fmt: skip
_PARTS = {  # of packed modules -> GGUF's names
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class Trimmed:
    """What is left of a model, in words that no family owns.

    Attributes:
        family: the adapter's.
        tree: where ``tensors`` keeps what.
        tensors: by published name, smaller where the model was pruned; not copied.
        geometry: query heads, key/value heads and channels that are left of every layer (of a layer with
            experts: those of one expert).
        theta, eps: of RoPE, and of the norms.
        tied: whether the embedding is the head.
        causal: whether a token sees only itself and those before it, when nobody says otherwise.
        shift: 1 where a row of logits is about the next token.
        block_size: tokens of a block, of block-causal models.
        tokens: ids by role (``mask``, ``pad``, ``eos``, ``bos``), those that are known.
        experts: experts of a layer and those that a token goes to; (0, 0) where there are none.
        norm_experts: whether the weights of a token's experts sum to 1.
    """

    family: str
    tree: Tree
    tensors: dict[str, Tensor]
    geometry: Geometry
    theta: float
    eps: float
    tied: bool
    causal: bool
    shift: int
    block_size: int | None
    tokens: dict[str, int]
    experts: tuple[int, int] = (0, 0)
    norm_experts: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def part(self, layer: int, part: str, kind: str = "weight") -> Tensor | None:
        """A layer's tensor, or None where it has none."""
        return self.tensors.get(self.tree.name(layer, part, kind))

    def biases(self, layer: int) -> list[str]:
        """The layer's parts that have a bias."""
        return [part for part in self.tree.parts if self.part(layer, part, "bias") is not None]


def renamed(tensors: dict[str, Tensor], modules: dict[str, str | None]) -> dict[str, Tensor]:
    """``tensors`` with those in ``modules`` by what these are called now, those of None left out."""
    found = {}
    for name, tensor in tensors.items():
        old = next((module for module in modules if name.startswith(module + ".")), None)
        new = "" if old is None else modules[old]
        if new is not None:
            found[new + name.removeprefix(old or "")] = tensor
    return found


def layers_left(model: nn.Module) -> list[int]:
    """The layers without which ``model`` computes something else: not those that keep nothing, no bias
    either."""
    adapter, plan = adapter_for(model), plan_of(model)
    layers = list(range(adapter.geometry().num_layers))
    if plan is None or not adapter.hands_on or plan.geometry.experts is not None:
        return layers
    blocks = adapter.blocks()
    return [i for i in layers if not plan.layers[i].is_gone or _biases_of_nothing(blocks[i])]


def _biases_of_nothing(block: nn.Module) -> bool:
    """Whether a linear module adds a bias to no inputs."""
    linears = (m for m in block.modules() if isinstance(m, nn.Linear))
    return any(m.in_features == 0 and m.bias is not None for m in linears)


def trim(model: nn.Module) -> Trimmed:
    """What is left of ``model``, which may be dense, or compact by any plan.

    Raises:
        TypeError: a model whose tree has no description here (encoders, LLaDA2's fused projections, …).
        ValueError: a mask form, key/value heads that are shared unevenly, or a config that says something
            which no target computes.
    """
    adapter = adapter_for(model)
    if adapter.form == "mask":
        raise ValueError("the model is in mask form: apply the plan with mode='compact' first")
    tensors = _unpacked(model)
    tree = next((t for t in (LLADA, LLAMA) if f"{t.embedding}.weight" in tensors), None)
    if tree is None or (tree.name(0, "attn_q") not in tensors and tree.name(0, "attn_norm") not in tensors):
        raise TypeError(f"no description of the tensors of a {type(model).__name__}, so nothing was exported")
    config: Any = model.config
    _refuse(config, tensors)
    _check_known(tree, tensors)
    dense = adapter.geometry()
    here = layers_left(model)
    kept = _sizes(dense, tree, tensors).of_layers(here)
    numbers = {layer: here.index(layer) if layer in here else None for layer in range(dense.num_layers)}
    tensors = tree.renumbered(tensors, numbers)
    count = getattr(config, "num_experts", None) or 0
    rope = getattr(config, "rope_parameters", None) or {}
    tokens = {role: getattr(config, f"{role}_token_id", None) for role in ("mask", "pad", "eos", "bos")}
    tokens["mask"] = adapter.mask_token_id if tokens["mask"] is None else tokens["mask"]
    block_size = getattr(adapter, "block_size", None)
    return Trimmed(
        family=adapter.family,
        tree=tree,
        tensors=tensors,
        geometry=kept,
        theta=float(rope.get("rope_theta") or config.rope_theta),
        eps=float(config.rms_norm_eps),
        tied=f"{tree.head}.weight" not in tensors
        or bool(getattr(config, "tie_word_embeddings", getattr(config, "weight_tying", False))),
        causal=bool(getattr(adapter, "causal", block_size is not None)),
        shift=adapter.shift,
        block_size=block_size,
        tokens={role: token for role, token in tokens.items() if isinstance(token, int)},
        experts=(count, config.num_experts_per_tok) if count else (0, 0),
        norm_experts=bool(getattr(config, "norm_topk_prob", False)),
    )


def _refuse(config: Any, tensors: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` for what a config says and neither GGUF nor a Llama-like tree computes."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"only rope_type='default' can be exported, got {rope['rope_type']!r}")
    if getattr(config, "scale_logits", False):
        raise ValueError("scale_logits=true divides the logits, which no target computes")
    if getattr(config, "attention_layer_norm", False):
        raise ValueError("a qk-norm over the full width (attention_layer_norm=true) is computed by no target")
    if any(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError("layers with a sliding window can't be exported")
    heads = [name for name in ("model.transformer.ff_out.bias", "lm_head.bias") if name in tensors]
    if heads:
        raise ValueError(f"the language-model head has a bias ({heads[0]}), which no target computes")


def _check_known(tree: Tree, tensors: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` for a tensor that the description has no word for, and would be left behind."""
    modules = {tree.embedding, tree.norm, tree.head}
    parts, experts = set(tree.parts.values()), re.compile(r"mlp\.experts\.\d+\.(gate|up|down)_proj")
    layer_of = re.compile(re.escape(tree.layer).replace(r"\{\}", r"\d+") + r"\.(.*)")
    for name in tensors:
        module, _, kind = name.rpartition(".")
        found = layer_of.fullmatch(module)
        inside = "" if found is None else found[1]
        fused = inside == "mlp.experts" and kind in ("gate_up_proj", "down_proj")
        known = module in modules or inside in parts or experts.fullmatch(inside) or fused
        if not known or not (fused or kind in ("weight", "bias")):
            raise ValueError(f"tensor {name} has no place in any target's form of this model")


def _sizes(dense: Geometry, tree: Tree, tensors: dict[str, Tensor]) -> Geometry:
    """What is left of every layer, from the shapes of its tensors."""
    heads, kv_heads, channels = [], [], []
    for layer in range(dense.num_layers):
        rows = {}
        for part in ("attn_q", "attn_k", "ffn_up"):
            found = tensors.get(tree.name(layer, part))
            rows[part] = 0 if found is None else found.shape[0]
        heads.append(rows["attn_q"] // dense.head_dim)
        kv_heads.append(rows["attn_k"] // dense.head_dim)
        channels.append(rows["ffn_up"])
    return Geometry(
        dense.family, dense.hidden, dense.head_dim, dense.vocabulary, dense.context,
        tuple(heads), tuple(kv_heads), tuple(channels), dense.mlp_matrices,
    )  # fmt: skip


def _unpacked(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, with those of compact modules under the names of the dense ones they replaced."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, (SinkPrunedAttention, CompactMLP)):
            block, _, _ = path.rpartition(".")
            tree = LLADA if LLADA.layer.format("") in block + "." else LLAMA
            for name in [name for name in tensors if name.startswith(path + ".")]:
                del tensors[name]
            if isinstance(module, SinkPrunedAttention):
                _check_shared(path, module)
            tensors |= {
                f"{block}.{tree.parts[_PARTS[role]]}.{kind}": tensor.detach()
                for role, found in module.unpacked().items()
                for kind, tensor in found.items()
            }
    return tensors


def _check_shared(path: str, packed: SinkPrunedAttention) -> None:
    if packed.kv_head_of is not None:
        raise ValueError(
            f"{path}: its query heads share key/value heads unevenly ({packed.kv_head_of.tolist()}), which "
            "no target computes: plan with fit=…, or whole_groups=True"
        )


def experts_of(trimmed: Trimmed, layer: int, part: str) -> Tensor | None:
    """A layer's experts' ``ffn_gate``, ``ffn_up`` or ``ffn_down`` in one tensor ``[experts, rows,
    columns]``, from one module an expert or from transformers' fused parameters; None where it has none."""
    base = f"{trimmed.tree.layer.format(layer)}.mlp.experts."
    fused = trimmed.tensors.get(base + ("down_proj" if part == "ffn_down" else "gate_up_proj"))
    if fused is not None:
        return fused if part == "ffn_down" else fused.chunk(2, dim=1)[part == "ffn_up"]
    name = trimmed.tree.parts[part].rpartition(".")[2]
    found = [
        trimmed.tensors[f"{base}{expert}.{name}.weight"]
        for expert in range(trimmed.experts[0])
        if f"{base}{expert}.{name}.weight" in trimmed.tensors
    ]
    return torch.stack(found) if found else None
