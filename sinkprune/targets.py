"""What each program that runs models can hold of a pruned one: the one table that planning, export and
docs/exporting.md read. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ALL_BIASES = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
DECODER = "transformers decoder (Llama, Qwen2, Qwen3)"  # the family of transformers' own classes


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        neighbours: whether RoPE turns neighbouring features, so that rows of q and k are re-ordered.
        ragged: whether layers may differ in heads and channels, or have no heads.
        free_width: whether heads side by side may be narrower or wider than the hidden states.
        qk_norm: whether it norms each head's queries and keys; it must have the norms then.
        biases: parts whose biases it computes; those of any other it ignores or refuses.
        needs_biases: whether q, k and v must have theirs.
        experts: None for one MLP a layer; else whether the weights of a token's experts are made to sum to 1.
        diffusion: whether ``llama-diffusion-cli`` runs it; others run through the C API with a sampler of
            yours.
    """

    name: str
    neighbours: bool = False
    ragged: bool = False
    free_width: bool = True
    qk_norm: bool = False
    biases: frozenset[str] = frozenset()
    needs_biases: bool = False
    experts: bool | None = None
    diffusion: bool = True


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llada", neighbours=True),
        Architecture("dream", free_width=False, biases=QKV, needs_biases=True),
        Architecture("deci", neighbours=True, ragged=True, biases=ALL_BIASES, diffusion=False),
        Architecture("qwen3", qk_norm=True, diffusion=False),
        Architecture("llada-moe", free_width=False, qk_norm=True, experts=False),
        Architecture("rnd1", qk_norm=True, experts=True),
    )
}

# Architectures that a family may be written as, its own first.
GGUF_FAMILIES = {
    "llada": ("llada", "deci"),
    "dream": ("dream", "deci"),
    "sdar": ("qwen3",),
    "illada": ("llada", "deci"),
    "llada_moe": ("llada-moe",),
    DECODER: ("llada", "dream", "rnd1", "qwen3", "deci"),  # by what it has; bidirectional ones
}


@dataclass(frozen=True)
class Target:
    """A program that loads an export.

    Attributes:
        source: the version whose code the rules were read from.
        tested: what this package's tests do with it.
        families: those that it runs.
        equal: whether all layers must keep as many query heads, key/value heads and channels.
        form: what is written for it: ``"gguf"`` or ``"hf"``.
        biases: whether biases that the family's published form does not have are computed.
        own_config: whether it knows the family by its own config alone, which must then say what is left.
        experts: what plans with ``fit`` keep of them; empty where none of its families' experts can go.
    """

    name: str
    source: str
    tested: str
    families: tuple[str, ...]
    equal: bool
    form: str = "hf"
    biases: bool = False
    own_config: bool = False
    experts: str = ""
    notes: str = ""


# Experts go by one rule for every target: a router with groups takes its best groups first.
EACH_GROUP = "as many of every group of every router; channels of experts divide by `tp`"
RULES_ONLY = "the rules alone: it was not run here"
TARGETS = {
    target.name: target
    for target in (
        Target(
            "llama.cpp",
            "build 11549, in xllamacpp 2026.10.11549",
            "loads every architecture below and compares its logits",
            tuple(GGUF_FAMILIES),
            equal=True,
            form="gguf",
            notes="what it can hold depends on the architecture: see below",
        ),
        Target(
            "transformers",
            "5.17.0",
            "loads exports of all families but llada2_moe without this package and compares their logits",
            ("llada", "illada", "dream", "sdar", "llada2_moe", DECODER),
            equal=False,
            biases=True,
            experts=EACH_GROUP,
            notes="llada2_moe only with its own code, copied from where it was loaded",
        ),
        Target(
            "sglang",
            "0.5.23",
            RULES_ONLY,
            ("llada2_moe", "sdar"),
            equal=True,
            own_config=True,
            experts=EACH_GROUP,
            notes="skips a bias that it does not expect in silence; reads head_dim from the config",
        ),
        Target(
            "vllm",
            "0.32.0, its Transformers backend",
            "`make engines` loads a decoder and a LLaDA, on a CPU, and compares their logits",
            ("llada", "dream", DECODER),
            equal=False,
            biases=True,
            notes="what sees all tokens runs as an encoder only (its pooling runner): logits of a forward, "
            "no sampling of text, no masks of blocks (sdar); on a CPU heads of 32 features at least",
        ),
        Target(
            "lmdeploy",
            "0.18",
            RULES_ONLY,
            ("sdar",),
            equal=True,
            own_config=True,
            notes="fails on a bias that it does not expect",
        ),
    )
}


@dataclass(frozen=True)
class Fit:
    """What a plan must keep to for a target.

    Attributes:
        target: its name, and the architecture where that is one of llama.cpp's.
        heads: whether heads can go at all, and if not why.
        equal: whether every layer keeps as many.
        round_heads, round_channels: a layer that loses any keeps a multiple of these.
    """

    target: str
    heads: str = ""
    equal: bool = False
    groups: int = 1
    round_channels: int = 1


def fit_for(spec: str, family: str) -> Fit:
    """The constraints of a target for a family.

    Args:
        spec: the target's name; settings may follow: ``"sglang:tp=4"`` for four tensor-parallel ranks, by
            which heads, groups and channels must divide; ``"llama.cpp:rows=32"`` for what rows of the down
            projection are a multiple of (default 256, as K-quants want; Q8_0 wants 32),
            ``"llama.cpp:arch=deci"`` for another of the family's architectures than its own.

    Raises:
        ValueError: an unknown target or setting, or a family that the target does not run.
    """
    name, _, rest = str(spec).partition(":")
    if name not in TARGETS:
        raise ValueError(f"fit must be one of {', '.join(TARGETS)}, got {name!r}")
    target = TARGETS[name]
    if family not in target.families:
        raise ValueError(
            f"{name} {target.source} runs {', '.join(target.families)}; it has nothing for {family}"
        )
    gguf = target.form == "gguf"
    settings = {"tp": 1, "rows": 256 if gguf else 1}
    wanted = None
    for setting in rest.split(",") if rest else ():
        key, _, value = setting.partition("=")
        if key == "arch" and gguf and value in GGUF_FAMILIES[family]:
            wanted = value
        elif key in settings and value.isdigit() and int(value) > 0:
            settings[key] = int(value)
        else:
            also = f", and arch={'|'.join(GGUF_FAMILIES[family])}" if gguf else ""
            raise ValueError(f"fit {name} takes tp=N and rows=N, N at least 1{also}; got {setting!r}")
    width = settings["rows"] * settings["tp"]
    if not gguf or (family == DECODER and wanted is None):
        return Fit(name, "", target.equal, settings["tp"], width)
    able = [a for a in GGUF_FAMILIES[family] if ARCHITECTURES[a].free_width and wanted in (None, a)]
    if not able:
        named = wanted or GGUF_FAMILIES[family][0]
        refusal = f"its {named} wants heads side by side as wide as the hidden states"
        return Fit(f"{name} ({named})", refusal, True, settings["tp"], width)
    equal = not ARCHITECTURES[able[0]].ragged
    return Fit(f"{name} ({able[0]})", "", equal, settings["tp"], width)
