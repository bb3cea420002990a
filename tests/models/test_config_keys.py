"""A key of config.json that changes what is computed is refused by name, in every native family."""

from __future__ import annotations

import pytest
from block_causals import llada2_config
from decoders import FAMILIES as DECODERS
from dreams import published_config as dream_config
from toys import published_config

from sinkprune.models.published import NATIVE, native_kind
from sinkprune.models.shapes import PUBLISHED

CONFIGS = {"llada": published_config()} | {name: family.config() for name, family in DECODERS.items()}
CHANGING = {
    "expert_capacity": 2, "use_mrope": True, "clip_qkv": 8.0, "final_logit_softcapping": 30.0,
    "residual_multiplier": 0.22, "mlp_bias": True, "quantization_config": {"quant_method": "fp8"},
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "use_relay": True, "relay_layer": -1, "pruned_heads": {"0": [1]}, "num_experts_x": 0,
}  # fmt: skip
HARMLESS = {
    "expert_capacity": None, "use_mrope": False, "layer_types": ["full_attention"] * 3, "logits_scaling": 1.0,
    "transformers_version": "4.46.3", "use_cache": False, "_name_or_path": "org/name", "use_relay": None,
    "temperature": 0.2, "id2label": {"0": "a"}, "attention_dropout": 0.1, "pruned_heads": {},
}  # fmt: skip


def lay_out(config):
    kind = native_kind(config)
    assert kind is not None
    return NATIVE[kind](config)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_that_change_the_model_are_refused_and_harmless_ones_are_kept(name):
    for key, value in CHANGING.items():
        with pytest.raises(ValueError, match=key):
            lay_out(CONFIGS[name] | {key: value})
    assert lay_out(CONFIGS[name] | HARMLESS).config.to_dict()["transformers_version"] == "4.46.3"


def test_another_name_of_a_known_size_must_agree_with_it():
    dream = dream_config()
    width = dream["hidden_size"] // dream["num_attention_heads"]
    assert lay_out(dream | {"head_dim": width}).config.head_dim == width
    with pytest.raises(ValueError, match=f"head_dim is {2 * width}, and head_dim {width}"):
        lay_out(dream | {"head_dim": 2 * width})
    with pytest.raises(ValueError, match="rotary_dim is 4, and rotary_width 6"):
        lay_out(llada2_config(rotary_dim=4))
    with pytest.raises(ValueError, match=r"partial_rotary_factor is not computed here, got 0\.5"):
        lay_out(dream | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}})
    with pytest.raises(ValueError, match="only use_qk_norm=True is supported, got False"):
        lay_out(llada2_config(use_qk_norm=False))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [None, 0, "64", True])
def test_a_context_that_is_no_positive_integer_is_refused_by_name(name, length):
    key = "max_sequence_length" if name == "llada" else "max_position_embeddings"
    with pytest.raises(ValueError, match=f"{key} must be a positive integer"):
        lay_out(CONFIGS[name] | {key: length})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    import torch

    with torch.device("meta"):
        lay_out(PUBLISHED[name].config)
