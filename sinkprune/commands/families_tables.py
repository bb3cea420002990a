"""The tables of docs/families.md about published models: what their trees differ in, their sizes, and what
was read and left out."""

from __future__ import annotations

from contextlib import suppress

import torch

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.models.decoder import DecoderConfig
from sinkprune.models.fast_dllm import FastDLLMConfig
from sinkprune.models.nemotron_diffusion import NemotronDiffusionConfig
from sinkprune.models.published import NATIVE, native_kind
from sinkprune.models.sdar import SDARConfig
from sinkprune.models.shapes import PUBLISHED, Shape
from sinkprune.models.stable_diffcoder import StableDiffCoderConfig
from sinkprune.models.wedlm import WeDLMConfig
from sinkprune.planning.costs import ceiling
from sinkprune.plans import Geometry, LayerPlan, PrunePlan, block_parameters, model_block_parameters

SHARE = 0.38  # of heads, and of channels, that the ceilings are for
LENGTH = 1024  # tokens of a forward

_TREES = """
## What the native trees differ in

Read from the public code and configuration files named last; our code is our own. A block's length is what
the published sampler fills at once where the model leaves it open. Llama's tree: `embed_tokens`,
`layers.{i}.self_attn.{q,k,v,o}_proj`, `mlp.{gate,up,down}_proj`, `input_layernorm`,
`post_attention_layernorm`, `norm`.

"""
_TREE_COLUMNS = (
    "family", "tree", "head", "biases", "qk-norm", "RoPE", "a token sees", "a row of logits is about",
    "block", "mask token", "read from",
)  # fmt: skip
_SEES = {
    "blocks": "its block and those before",
    "context": "in the block that is filled: that and all before; elsewhere what is before it",
    "masks last": "what is before it, masked tokens after all others",
}
_OTHERS = [
    (
        "llada", "its own: `model.transformer.blocks.{i}`", "`ff_out`, or the embedding", "by its config",
        "none, or over the full width", "rotate-half", "all", "its token", "the caller's", "126336",
        "GSAI-ML/LLaDA-8B, config.json and modeling_llada.py",
    ),
    (
        "dream", "Llama's below `model`", "`lm_head`", "q, k, v", "none", "rotate-half", "all",
        "the next token", "the caller's", "151666", "Dream-org/Dream-v0, config.json and modeling_dream.py",
    ),
    (
        "illada", "Llama's below `model`", "the embedding", "none", "none", "rotate-half", "all", "its token",
        "the caller's", "5 (the scripts' argument)",
        "GSAI-ML/iLLaDA-8B, modeling_illada.py; ML-GSAI/LLaDA, readme and generate.py",
    ),
    (
        "llada2_moe", "fused `attention.query_key_value`, `dense`; experts", "`lm_head`", "by its config",
        "each head's", "rotate-half, half a head", "its block and those before", "its token", "32",
        "156895", "inclusionAI/LLaDA2.0-mini, config.json and modeling_llada2_moe.py",
    ),
]  # fmt: skip
_DECODERS: dict[str, type[DecoderConfig]] = {
    "sdar": SDARConfig,
    "fast_dllm_qwen": FastDLLMConfig,
    "stable_diffcoder": StableDiffCoderConfig,
    "wedlm": WeDLMConfig,
    "nemotron_labs_diffusion": NemotronDiffusionConfig,
}

_SIZES = f"""
## Sizes, and what pruning can give at most

Laid out whole without weights from the sizes that are published. **attention**: its share of the blocks'
parameters (of experts, those that a token passes through). **heads**, **heads and channels**: the ceilings
(`sp.ceiling`, arithmetic) of a forward of 1 × {LENGTH} tokens without {SHARE:.0%} of every layer's heads, and
without as many of its heads and channels (experts keep theirs).

"""
_SIZE_COLUMNS = (
    "model", "layers", "hidden", "heads / key-value heads × width", "channels", "vocabulary", "parameters",
    "published", "attention", "heads", "heads and channels", "sizes from",
)  # fmt: skip

LEFT_OUT = """
## Read, and left out

- **LLaDA2.1**: its tree and configuration are LLaDA2.0's and load as `llada2_moe`. Its own sampler also edits
  tokens that are written; `denoise` only fills masked ones, and refuses `algorithm="editing"` by name.
- **LLaDA2.2** (-mini, -flash): it routes a block's tokens together (`expert_capacity`), and inserts and
  deletes tokens. Its modelling code could not be had, only descriptions of it: a config with
  `expert_capacity` is refused by name, and so is its sampler.
- **Forks** of these families: a key of `config.json` that no family here reads and that is not known to be
  bookkeeping is refused by name (`sinkprune/models/config_keys.py`), since forks add keys that change what is
  computed (`use_relay`, `use_loopholing`).
- **Experts** go, or channels of them, from the native LLaDA2 alone (`targets=("experts",)`), as many from
  every layer and from every group of its router; live objects and transformers classes keep theirs, and so
  do **LLaDA-MoE**, **RND1** and **DiffusionGemma**. The rules that choose them are tested on toys with random
  weights: on real mixtures, which were not at hand, they are unmeasured.
- **RND1**, **LLaDA-MoE**: live objects only. **SDAR-MoE**: neither.
- Live objects of **Stable-DiffCoder**, **WeDLM** and **Nemotron-Labs-Diffusion**: refused rather than taken
  for the Llama, Qwen or Ministral that their classes build on; their folders load natively.
- **Nemotron-Labs-Diffusion** beyond 16,384 positions, and its autoregressive and self-speculative ways of
  writing; its 14B (no config.json of it could be had).
- **Stable-DiffCoder** cuts the last block where a prompt ends within one; ours fills it whole.
"""


def variations() -> str:
    """What the native trees differ in."""
    rows = [*_OTHERS, *(_decoder_row(family, config) for family, config in _DECODERS.items())]
    return _TREES + _table(_TREE_COLUMNS, rows)


def _decoder_row(family: str, config: type[DecoderConfig]) -> tuple[str, ...]:
    varies = config.VARIES
    always = config.FIXED.get("attention_bias") is True
    biases = {"qkv": "q, k, v", "qkvo": "q, k, v, o"}[varies.biased]
    never = config.FIXED.get("attention_bias") is False
    norms = {True: "each head's", False: "none", None: "each head's, by its config"}[varies.qk_norm]
    row = "the next token" if varies.shift else "its token"
    if varies.seeds and not varies.shift:
        row = "its token; the context's last row about the block's first"
    mask = config.__dataclass_fields__["mask_token_id"].default
    block = config.__dataclass_fields__.get("bd_size", config.__dataclass_fields__["block_size"]).default
    return (
        family,
        f"Llama's below `{varies.root}`",
        f"`{varies.head}`, or the embedding",
        "none" if never else biases if always else f"{biases} by its config",
        norms,
        "rotate-half, YaRN" if "yarn" in config.ROPE_TYPES else "rotate-half",
        _SEES[varies.sees],
        row,
        f"{block}" + (", or the caller's" if varies.sees != "blocks" else ""),
        "the config's" if mask is None else f"{mask} (the code's default)",
        varies.source,
    )


def sizes() -> str:
    """Sizes of published models, and their ceilings."""
    return _SIZES + _table(_SIZE_COLUMNS, [_size_row(name, shape) for name, shape in PUBLISHED.items()])


def _size_row(name: str, shape: Shape) -> tuple[str, ...]:
    with torch.device("meta"):
        model = NATIVE[native_kind(shape.config) or ""](shape.config)
    adapter = adapter_for(model)
    geometry, dense = adapter.geometry(), dense_layers(adapter)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    attention = sum(
        block_parameters(geometry, heads, kv_heads, 0)
        for heads, kv_heads in zip(geometry.heads, geometry.kv_heads, strict=True)
    )
    published = "–" if shape.size is None else f"{shape.size[0] / 1e9:.2f}B: {shape.size[1]}"
    return (
        name,
        str(geometry.num_layers),
        str(geometry.hidden),
        f"{geometry.heads[-1]} / {geometry.kv_heads[-1]} × {geometry.head_dim}",
        str(geometry.channels[-1]),
        str(geometry.vocabulary),
        f"{parameters / 1e9:.2f}B",
        published,
        f"{attention / model_block_parameters(geometry):.1%}",
        f"{ceiling(geometry, even_plan(geometry, SHARE, 0, dense), length=LENGTH):.2f}×",
        f"{ceiling(geometry, even_plan(geometry, SHARE, SHARE, dense), length=LENGTH):.2f}×",
        shape.source,
    )


def dense_layers(adapter: Adapter) -> set[int]:
    """Layers whose channels can be pruned."""
    found = set()
    for layer in range(adapter.geometry().num_layers):
        with suppress(ValueError):
            adapter.mlp_weights(layer)
            found.add(layer)
    return found


def even_plan(geometry: Geometry, heads: float, channels: float, dense: set[int]) -> PrunePlan:
    """A plan without the last ``heads`` of every layer's heads and the last ``channels`` of the channels of
    its ``dense`` layers, both shares: as arithmetic needs one."""
    layers = [
        LayerPlan(
            list(range(count - round(heads * count))),
            list(range(width - round(channels * width))) if channels and layer in dense else None,
        )
        for layer, (count, width) in enumerate(zip(geometry.heads, geometry.channels, strict=True))
    ]
    return PrunePlan(geometry, "", layers)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
