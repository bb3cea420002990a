"""The merged "small" against transformers' Llama, and what is said where its base is missing."""

import hashlib
import json
from importlib import metadata

import pytest
import torch
from safetensors.torch import save_file
from toys import one_thread, tokens  # noqa: F401

import sinkprune as sp
from sinkprune.checkpoints import small
from sinkprune.checkpoints.trees import LLAMA


def toy_llama():
    """transformers' Llama with random weights, in the shape of SmolLM2: no biases, tied, grouped heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, vocab_size=64, rope_theta=1000.0, tie_word_embeddings=True,
        max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def toy_deltas(base):
    """Factors for every projection, other gains, and a mask's row."""
    g = torch.Generator().manual_seed(1)
    deltas = {"mask_row": torch.randn(32, generator=g)}
    for name, tensor in base.items():
        if "_proj" in name:
            deltas[f"{name}.a"] = torch.randn(3, tensor.shape[1], generator=g).bfloat16()
            deltas[f"{name}.b"] = torch.randn(tensor.shape[0], 3, generator=g).bfloat16() / 8
        elif "norm" in name:
            deltas[name] = torch.rand(32, generator=g) + 0.5
    return deltas


def write_gguf(path, tensors):
    """A llama GGUF of ``tensors``: matrices in Q8_0, queries and keys with a head's RoPE pairs interleaved,
    as llama.cpp's converter does it."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    words = [f"<{i}>" for i in range(17)] + ["a", "b", "Ġ", "ab", *"0123456789"]
    words += [f"w{i}" for i in range(64 - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] * 17 + [1] * 47)
    writer.add_token_merges(["a b"])
    kind = gguf.GGMLQuantizationType
    back = {ours: theirs for theirs, ours in LLAMA.parts.items()}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] == "layers":
            theirs = f"blk.{parts[2]}.{back['.'.join(parts[3:-1])]}.weight"
            if parts[4] in ("q_proj", "k_proj"):
                tensor = tensor.view(-1, 2, 4, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        else:
            theirs = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]]
        values = tensor.numpy()
        if tensor.dim() == 2:
            packed = gguf.quants.quantize(values, kind.Q8_0)
            writer.add_tensor(theirs, packed, raw_dtype=kind.Q8_0)
        else:
            writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CONFIG = {
    "model_type": "Dream", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64, "rope_theta": 1000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": False, "mask_token_id": small.MASK,
    "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def bases(llama):
    """The Llama's tensors by the native names, which are its own."""
    return {name: tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"}


@torch.no_grad()
def seen_from_both_sides(llama, deltas, ids):
    """Logits of the Llama with the deltas in place and no causal mask, computed by transformers."""
    for name, parameter in llama.named_parameters():
        if f"{name}.a" in deltas:
            parameter += deltas[f"{name}.b"].float() @ deltas[f"{name}.a"].float()
        elif name in deltas:
            parameter.copy_(deltas[name])
    llama.model.embed_tokens.weight[small.MASK] = deltas["mask_row"]
    everything = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    return llama(ids, attention_mask=everything).logits


def write_delta(folder, base, deltas):
    folder.mkdir()
    about = {"base_sha256": hashlib.sha256(base.read_bytes()).hexdigest()}
    save_file(deltas, folder / small.DELTA, metadata=about)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """``(delta folder, Llama, deltas)``: a toy base in a GGUF that the environment names, an empty cache."""
    llama = toy_llama()
    base, deltas = write_gguf(tmp_path / "base.gguf", bases(llama)), toy_deltas(bases(llama))
    with torch.no_grad():  # the Llama gets the eight-bit numbers itself
        for name, tensor in small.read_base(base)[1].items():
            llama.get_parameter(name).copy_(tensor)
    monkeypatch.setenv("SINKPRUNE_SMOLLM2", str(base))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_delta(tmp_path / "delta", base, deltas), llama, deltas


def test_merged_tensors_are_the_llama_with_its_deltas_seen_from_both_sides(tmp_path):
    llama, ids = toy_llama(), tokens(2, 11, vocabulary=64)
    ids[:, 3] = small.MASK
    deltas = toy_deltas(bases(llama))
    before = {name: tensor.clone() for name, tensor in bases(llama).items()}
    merged = small.merge(before, deltas, small.MASK)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(merged, tmp_path / "model.safetensors")
    model, _ = sp.load(tmp_path)
    expected = seen_from_both_sides(llama, deltas, ids)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in bases(toy_llama()).items())


def test_a_delta_that_fits_no_tensor_is_refused():
    base = {"x.weight": torch.zeros(4, 6)}
    with pytest.raises(ValueError, match=r"'y.weight.a' of shape \(4, 6\) fits no tensor"):
        small.merge(base, {"y.weight.a": torch.zeros(2, 6), "y.weight.b": torch.zeros(4, 2)}, 0)
    with pytest.raises(ValueError, match=r"'x.weight' of shape \(4,\)"):
        small.merge(base, {"x.weight": torch.zeros(4)}, 0)


def test_a_gguf_gives_back_what_was_written_and_the_configuration(tmp_path):
    tensors = bases(toy_llama())
    config, found = small.read_base(write_gguf(tmp_path / "base.gguf", tensors))
    assert {**config.to_dict(), **CONFIG} == config.to_dict()
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        step = tensor.abs().max() / 127 if tensor.dim() == 2 else 0.0  # of eight bits, at most
        assert (found[name] - tensor).abs().max() <= step * 0.6, name  # a half, and the scale is in float16


def test_the_merged_model_is_made_once_and_then_needs_no_base(shipped, monkeypatch):
    delta, llama, deltas = shipped
    folder = small.folder(delta)
    model, tokenizer = sp.load(folder)
    ids = tokens(2, 11, vocabulary=64)
    expected = seen_from_both_sides(llama, deltas, ids)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert tokenizer("abab12").input_ids == [20, 20, 22, 23]
    assert tokenizer.mask_token_id == small.MASK and tokenizer.eos_token_id == small.END
    monkeypatch.setenv("SINKPRUNE_SMOLLM2", "nowhere.gguf")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert small.folder(delta) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failure_leaves_no_folder_behind(shipped, monkeypatch, tmp_path):
    def full(*arguments, **keywords):
        raise OSError("no space left")

    monkeypatch.setattr(small, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        small.folder(shipped[0])
    assert not list((tmp_path / "cache" / "sinkprune").iterdir())


def test_another_base_than_the_deltas_own_is_refused(shipped, monkeypatch, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes((tmp_path / "base.gguf").read_bytes() + b" ")
    monkeypatch.setenv("SINKPRUNE_SMOLLM2", str(other))
    with pytest.raises(ValueError, match=r"other.gguf: expected the base with sha256 \w{12}…, got \w{12}…"):
        small.folder(shipped[0])


def test_without_the_base_one_line_has_the_command_that_gets_it(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.delenv("SINKPRUNE_SMOLLM2", raising=False)
    monkeypatch.setattr(small.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError) as caught:
        small.find_base()
    assert small.COMMAND in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setenv("SINKPRUNE_SMOLLM2", str(tmp_path / "nowhere.gguf"))
    with pytest.raises(
        FileNotFoundError, match=r"SINKPRUNE_SMOLLM2: expected a GGUF file, got .*nowhere.gguf"
    ):
        small.find_base()
