"""The native LLaDA against an independent straight-line forward, from files written by this test's own code."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

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


def published_config(**changes):
    """The keys of a published config.json, at toy size."""
    return {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu", "alibi": False,
        "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False, "block_type": "llama", "d_model": 32, "embedding_size": 61,
        "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms",
        "layer_norm_with_affine": True, "mask_token_id": 60, "max_sequence_length": 64, "mlp_hidden_size": 40,
        "mlp_ratio": 4, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3, "pad_token_id": 0, "rms_norm_eps": 1e-5,
        "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "vocab_size": 61,
        "weight_tying": False,
    } | changes  # fmt: skip


def published_tensors(config, seed=0):
    """Random weights under the published names."""
    g = torch.Generator().manual_seed(seed)
    d, f, v = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv = d // config["n_heads"] * config["n_kv_heads"]

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=g) / math.sqrt(columns)

    def gain(n):
        return 1 + 0.2 * torch.randn(n, generator=g)

    tensors = {"model.transformer.wte.weight": matrix(v, d) * 4, "model.transformer.ln_f.weight": gain(d)}
    if not config["weight_tying"]:
        tensors["model.transformer.ff_out.weight"] = matrix(v, d)
        if config["include_bias"]:
            tensors["model.transformer.ff_out.bias"] = torch.randn(v, generator=g)
    for i in range(config["n_layers"]):
        name = f"model.transformer.blocks.{i}."
        tensors[name + "attn_norm.weight"], tensors[name + "ff_norm.weight"] = gain(d), gain(d)
        shapes = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "attn_out": (d, d),
                  "ff_proj": (f, d), "up_proj": (f, d), "ff_out": (d, f)}  # fmt: skip
        for part, (rows, columns) in shapes.items():
            tensors[f"{name}{part}.weight"] = matrix(rows, columns)
            if config["include_bias"] or (
                config["include_qkv_bias"] and part in ("q_proj", "k_proj", "v_proj")
            ):
                tensors[f"{name}{part}.bias"] = torch.randn(rows, generator=g)
        if config["attention_layer_norm"]:
            tensors[name + "q_norm.weight"], tensors[name + "k_norm.weight"] = gain(d), gain(kv)
    return tensors


def write_checkpoint(folder, config, tensors, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
        weight_map |= {name: f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def straight_forward(config, tensors, ids, valid=None):
    """LLaDA's forward for one sequence at a time, in float64, from the architecture's description."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    h, kvh = config["n_heads"], config["n_kv_heads"]
    hd = config["d_model"] // h
    outputs = []

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    def linear(x, name):
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def rope(x):  # [L, hd]
        position = torch.arange(x.shape[0], dtype=torch.float64)[:, None]
        angle = position * config["rope_theta"] ** (-torch.arange(0, hd, 2, dtype=torch.float64) / hd)
        a, b = x[:, : hd // 2], x[:, hd // 2 :]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), 1)

    for row, sequence in enumerate(ids):
        seen = torch.ones(len(sequence), dtype=torch.bool) if valid is None else valid[row].bool()
        x = w["model.transformer.wte.weight"][sequence]
        for i in range(config["n_layers"]):
            name = f"model.transformer.blocks.{i}."
            y = norm(x, name + "attn_norm.weight")
            q, k, v = (linear(y, name + part) for part in ("q_proj", "k_proj", "v_proj"))
            if config["attention_layer_norm"]:
                q, k = norm(q, name + "q_norm.weight"), norm(k, name + "k_norm.weight")
            heads = []
            for j in range(h):
                g = j // (h // kvh)
                qj, kj = rope(q[:, j * hd : (j + 1) * hd]), rope(k[:, g * hd : (g + 1) * hd])
                score = qj @ kj.T / math.sqrt(hd)
                score[:, ~seen] = -math.inf
                heads.append(score.softmax(-1) @ v[:, g * hd : (g + 1) * hd])
            x = x + linear(torch.cat(heads, 1), name + "attn_out")
            y = norm(x, name + "ff_norm.weight")
            gate = linear(y, name + "ff_proj")
            x = x + linear(gate * gate.sigmoid() * linear(y, name + "up_proj"), name + "ff_out")
        x = norm(x, "model.transformer.ln_f.weight")
        head = "wte" if config["weight_tying"] else "ff_out"
        logits = x @ w[f"model.transformer.{head}.weight"].T
        if config["include_bias"] and not config["weight_tying"]:
            logits = logits + w["model.transformer.ff_out.bias"]
        outputs.append(logits / math.sqrt(config["d_model"]) if config["scale_logits"] else logits)
    return torch.stack(outputs)


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
    ],
)
def test_a_config_it_cannot_compute_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(published_config(**changes))


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
