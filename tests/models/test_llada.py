"""The native LLaDA against an independent straight-line forward, from files that the tests' code wrote."""

import pytest
import torch
from toys import (  # noqa: F401
    one_thread,
    published_config,
    published_tensors,
    straight_forward,
    toy,
    write_checkpoint,
)

import sinkprune as sp
from sinkprune.models.llada import LLaDAConfig

CONFIGS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2},
    "full-width qk-norm": {"attention_layer_norm": True, "n_kv_heads": 2},
    "qkv bias": {"include_qkv_bias": True},
    "all biases, tied": {"include_bias": True, "weight_tying": True},
    "scaled logits": {"scale_logits": True},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shards", [1, 3])
def test_published_layout_gives_the_same_logits_as_an_independent_forward(tmp_path, changes, shards):
    config = published_config(**changes)
    tensors = published_tensors(config)
    model, tokenizer = sp.load(write_checkpoint(tmp_path / "m", config, tensors, shards))
    ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    got = model(ids).logits
    torch.testing.assert_close(got.double(), straight_forward(config, tensors, ids), atol=2e-5, rtol=1e-4)
    assert tokenizer is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_honoured_on_both_sides(tmp_path, side):
    config = published_config(n_kv_heads=2)
    tensors = published_tensors(config)
    model, _ = sp.load(write_checkpoint(tmp_path / "m", config, tensors))
    ids = torch.randint(1, 60, (2, 11), generator=torch.Generator().manual_seed(2))
    valid = torch.ones(2, 11, dtype=torch.long)
    hidden = slice(0, 4) if side == "left" else slice(7, 11)
    valid[1, hidden] = 0
    got = model(ids, attention_mask=valid).logits.double()
    expected = straight_forward(config, tensors, ids, valid)
    torch.testing.assert_close(got[0], expected[0], atol=2e-5, rtol=1e-4)
    seen = valid[1].bool()
    torch.testing.assert_close(got[1][seen], expected[1][seen], atol=2e-5, rtol=1e-4)
    # and a padded sequence gives what it gives alone, RoPE being relative
    alone = model(ids[1:, seen]).logits.double()
    torch.testing.assert_close(got[1][seen], alone[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_under_autocast_logits_are_those_of_float32_to_its_rounding(changes):
    """Norms of queries and keys stay in float32 there, and values do not."""
    model, config = toy(**changes), published_config(**changes)
    ids = torch.randint(1, 60, (2, 11), generator=torch.Generator().manual_seed(2))
    expected = straight_forward(config, model.state_dict(), ids)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        got = model(ids).logits.double()
    assert 0 < (got - expected).norm() / expected.norm() < 0.02


def test_state_dict_has_the_published_names(tmp_path):
    config = published_config(attention_layer_norm=True)
    tensors = published_tensors(config)
    model, _ = sp.load(write_checkpoint(tmp_path / "m", config, tensors))
    assert set(model.state_dict()) == set(tensors)


def test_loading_converts_the_dtype_asked_for(tmp_path):
    config = published_config()
    model, _ = sp.load(
        write_checkpoint(tmp_path / "m", config, published_tensors(config)), dtype=torch.bfloat16
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": None}, "'d_model' must be a positive integer"),
        ({"n_heads": 5}, "d_model must be an even multiple"),
        ({"n_kv_heads": 3}, "n_heads a multiple of n_kv_heads"),
        ({"layer_norm_type": "low_precision"}, "only layer_norm_type='rms' is supported"),
        ({"activation_type": "gelu"}, "only activation_type='silu' is supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "only rope_type='default' is supported"),
    ],
)
def test_a_config_it_cannot_compute_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(published_config(**changes))


def test_the_rope_base_is_read_where_transformers_5_writes_it():
    config = published_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    del config["rope_theta"]
    assert LLaDAConfig.from_dict(config).rope_theta == 5.0


def test_config_round_trips_unknown_keys():
    config = published_config(init_fn="mitchell", precision="amp_bf16")
    written = LLaDAConfig.from_dict(config).to_dict()
    assert {k: written[k] for k in ("init_fn", "precision", "rope_theta", "n_kv_heads")} == {
        "init_fn": "mitchell", "precision": "amp_bf16", "rope_theta": 500000.0, "n_kv_heads": 4,
    }  # fmt: skip
    assert LLaDAConfig.from_dict(written).to_dict() == written


def test_too_long_and_empty_sequences_are_refused(tmp_path):
    config = published_config()
    model, _ = sp.load(write_checkpoint(tmp_path / "m", config, published_tensors(config)))
    with pytest.raises(ValueError, match="65 tokens exceed the context of 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="L >= 1, got \\(1, 0\\)"):
        model(torch.zeros(1, 0, dtype=torch.long))
