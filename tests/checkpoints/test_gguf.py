"""GGUF files: llama.cpp's own code gives the logits of the pruned model; what it would drop is refused."""

import json

import gguf
import pytest
import torch
import transformers
from block_causals import toy_sdar
from exports import ALL, EQUAL, MODELS, NARROW, RAGGED, SOME, made, raw_logits
from hf import build
from llama_cpp import opened
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from toys import assert_same_tensors, manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.checkpoints.gguf_tokenizer import PRE_TOKENIZERS
from sinkprune.targets import ARCHITECTURES

# family, heads, channels, the architecture that computes it
CASES = {
    "llada": ("llada", EQUAL, NARROW, "llada"),
    "llada, tied": ("llada, tied", EQUAL, NARROW, "llada"),
    "llada, groups": ("llada, groups", EQUAL, None, "llada"),
    "llada, ragged": ("llada", [[0], [2, 3], [0, 1, 3]], SOME, "deci"),
    "llada, a layer without heads": ("llada", [[0], [], [0, 1, 3]], SOME, "deci"),
    "llada, tied, the last without heads": ("llada, tied", [[0], [1, 2], []], None, "deci"),
    "llada, its own biases": ("llada, biases", EQUAL, NARROW, "deci"),
    "dream, channels": ("dream", ALL, NARROW, "dream"),
    "dream, tied": ("dream, tied", ALL, NARROW, "dream"),
    "dream, heads": ("dream", EQUAL, NARROW, "deci"),
    "dream, ragged": ("dream", RAGGED, SOME, "deci"),
    "sdar": ("sdar", EQUAL, NARROW, "qwen3"),
    "sdar, tied": ("sdar, tied", EQUAL, NARROW, "qwen3"),
    "illada": ("illada", EQUAL, NARROW, "llada"),
    "illada, ragged": ("illada", RAGGED, SOME, "deci"),
    "llada, a layer gone": ("llada", [[0, 1, 2, 3], [], [0, 1, 2, 3]], [None, [], None], "llada"),
    "dream, the first layer gone": ("dream", [[], [0, 1, 2, 3], [0, 1, 2, 3]], [[], None, None], "dream"),
    "sdar, the last layer gone": ("sdar", [[0, 1, 2, 3], [0, 1, 2, 3], []], [None, None, []], "qwen3"),
    "rnd1": ("rnd1", EQUAL, None, "rnd1"),
    "llama": ("llama", EQUAL, NARROW, "llada"),
    "llama, biases, ragged": ("llama, biases", [[0], [2, 3], [0, 1, 3]], SOME, "deci"),
    "qwen3": ("qwen3", EQUAL, NARROW, "qwen3"),
}


def agree(path, model, bound=1e-4, block=None):
    ids = tokens(1, 12)
    expected = raw_logits(model, ids)[0]
    with opened(path) as peer:
        assert not peer.causal
        got = peer.logits(ids[0], block)
        named = peer.metadata("general.architecture")
        assert peer.is_diffusion == ARCHITECTURES[named].diffusion
    assert (got - expected).abs().max() <= bound * expected.abs().max()
    return named


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_pruned_and_repaired_model(tmp_path, name):
    which, heads, channels, architecture = CASES[name]
    model = made(which, heads, channels)
    path = sp.export(model, tmp_path / "m.gguf", to="gguf")
    assert agree(path, model, block=getattr(sp.adapter_for(model), "block_size", None)) == architecture
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_every_architecture_of_the_table_is_loaded_by_llama_cpp():
    covered = {case[3] for case in CASES.values()} | {"llada-moe"}  # the next test
    assert covered == set(ARCHITECTURES)


def test_a_dense_model_of_a_live_family_without_a_native_one_is_written_too(tmp_path):
    model = MODELS["llada_moe"]()
    assert agree(sp.export(model, tmp_path / "m.gguf", to="gguf"), model) == "llada-moe"


@pytest.mark.parametrize("heads", [EQUAL, [[0], [2, 3], [0, 1, 3]]], ids=["equal", "ragged"])
def test_biases_of_a_repair_are_computed_where_the_file_has_them(tmp_path, heads):
    model = made("llada", heads, NARROW, repair="least_squares_bias")
    assert agree(sp.export(model, tmp_path / "m.gguf", to="gguf"), model) == "deci"


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 3e-3), ("bf16", 2e-2), ("q8_0", 3e-2)])
def test_narrower_matrices_are_near(tmp_path, dtype, bound):
    model = made("llada", EQUAL, NARROW)
    path = sp.export(model, tmp_path / "m.gguf", to="gguf", dtype=dtype)
    agree(path, model, bound)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == dtype.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else dtype.upper())  # rows of 3


def test_half_precision_is_written_as_it_is_unless_asked(tmp_path):
    path = sp.export(made("llada", EQUAL, NARROW).bfloat16(), tmp_path / "m.gguf", to="gguf")
    assert {t.tensor_type.name for t in gguf.GGUFReader(path).tensors} == {"BF16", "F32"}


@pytest.mark.parametrize("name", [name for name in CASES if name != "llada, its own biases"])
def test_a_file_is_read_back_bit_for_bit_with_its_plan(tmp_path, name):
    which, heads, channels, _ = CASES[name]
    model = made(which, heads, channels)
    back, tokenizer = sp.load(sp.export(model, tmp_path / "m.gguf", to="gguf"))
    halves = zip(heads, channels or [None] * 3, strict=True)
    empty = [f"s.{i}." for i, half in enumerate(halves) if [] in half]  # a norm before nothing is not written
    before, after = (
        {k: t for k, t in m.state_dict().items() if not ("norm" in k and any(part in k for part in empty))}
        for m in (model, back)
    )
    assert_same_tensors(after, before)
    assert tokenizer is None and back.prune_plan == model.prune_plan
    assert torch.equal(raw_logits(back, tokens(2, 9)), raw_logits(model, tokens(2, 9)))


@pytest.mark.parametrize("which", ["llada", "llada, tied", "llada, groups", "dream", "dream, tied"])
def test_files_that_others_wrote_are_read_by_their_own_keys(tmp_path, which):
    model = MODELS[which]()
    path = sp.export(model, tmp_path / "m.gguf", to="gguf")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "sinkprune.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    back, _ = sp.load(tmp_path / "other.gguf")
    assert sp.adapter_for(back).form == "dense"
    assert_same_tensors(back.state_dict(), model.state_dict())


def test_a_quantised_file_is_read_as_float32(tmp_path):
    model = made("llada", EQUAL, NARROW)
    back, _ = sp.load(sp.export(model, tmp_path / "m.gguf", to="gguf", dtype="q8_0"))
    expected = raw_logits(model, tokens(1, 9))
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert (raw_logits(back, tokens(1, 9)) - expected).abs().max() < 0.03 * expected.abs().max()


def bpe(pattern):
    """A byte-level BPE of few merges, whose pre-tokenizer is ``pattern``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "the"),
        ("i", "n"),
        ("1", "2"),
        ("12", "3"),
        ("Ġ", "t"),
        ("'", "s"),
    ]
    merges += [("Ġ", "Ġ"), ("Ċ", "Ċ"), ("!", "!"), ("1", "1"), ("11", "11"), ("Ã", "¼")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, level]) if cut else level
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="<|mask|>", eos_token="<|end|>"
    )


TEXT = "The thing's  in the  123123 1111x!!\n\n\n  über 12 y'all'S the\tend ☃ {}[]  \r\n ok "


@pytest.mark.parametrize("pattern", PRE_TOKENIZERS, ids=list(PRE_TOKENIZERS.values()))
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(tmp_path, pattern):
    tokenizer = bpe(pattern)
    mask = tokenizer.mask_token_id
    model = toy(vocab_size=300, embedding_size=300, mask_token_id=mask, pad_token_id=tokenizer.eos_token_id)
    path = sp.export(model, tmp_path / "m.gguf", to="gguf", tokenizer=tokenizer)
    _, back = sp.load(path)
    with opened(path) as peer:
        assert (peer.vocabulary, peer.mask_token) == (300, mask)
        for text in (TEXT, TEXT + "<|mask|> the", "12345 123"):
            expected = tokenizer.encode(text, add_special_tokens=False)
            assert peer.tokenize(text, special=True) == expected
            assert back.encode(text, add_special_tokens=False) == expected
    assert back.mask_token == "<|mask|>" and back.decode(back.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "pre-tokenizer is not known"),
        (lambda t: setattr(t, "model", models.WordLevel({"a": 0}, "a")), "only byte-level BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused_and_nothing_is_written(
    tmp_path, change, message
):
    tokenizer = bpe("")
    change(tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=message):
        sp.export(
            toy(vocab_size=300, embedding_size=300), tmp_path / "m.gguf", to="gguf", tokenizer=tokenizer
        )
    with pytest.raises(ValueError, match="the model's vocabulary has 61 rows"):
        sp.export(toy(), tmp_path / "m.gguf", to="gguf", tokenizer=bpe(""))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made("sdar", RAGGED), "qwen3: layer 2 has 4 query heads, 2 key/value heads and"),
        (lambda: made("sdar", EQUAL, repair="least_squares_bias"), r"qwen3: layer 0 has biases \(attn_out"),
        (lambda: made("llada", [[0], [], [1]], None, "bias"), r"deci: layer 1 has biases \(attn_output\)"),
        (lambda: made("llada", ALL, [None, [], None]), "deci: layer 1 has no MLP, and llama.cpp skips"),
        (lambda: made("dream", [[0, 1], [0, 2, 3], [0]]), r"layers.1.self_attn: .* heads unevenly"),
        (lambda: made("llada_moe", EQUAL), "llada-moe: layer 0 has 2 heads of 8 features"),
        (lambda: toy(scale_logits=True), "scale_logits=true"),
        (lambda: toy(attention_layer_norm=True), "qk-norm over the full width"),
        (lambda: toy(include_bias=True), "head has a bias"),
        (lambda: build("llama"), "this one is causal"),
        (lambda: build("qwen2, sliding", is_causal=False), "sliding window"),
        (lambda: sp.apply(toy(), manual_plan(toy(), EQUAL), mode="mask"), "the model is in mask form"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_drop_is_refused_by_name_and_nothing_is_written(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        sp.export(make(), tmp_path / "m.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_would_be_left_behind_is_refused(tmp_path):
    model = MODELS["llada_moe"]()
    model.model.layers[1].mlp.shared_expert = torch.nn.Linear(32, 32, bias=False)
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.shared_expert.weight has no place"):
        sp.export(model, tmp_path / "m.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["llada2", "bert"])
def test_trees_that_are_not_described_are_refused(tmp_path, which):
    model = build("bert") if which == "bert" else MODELS[which]()
    with pytest.raises(TypeError, match="no description of the tensors of a"):
        sp.export(model, tmp_path / "m.gguf", to="gguf")


def test_files_that_say_too_little_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(FileNotFoundError, match=r"m\.gguf is missing"):
        sp.load(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        sp.load(path)
    writer = gguf.GGUFWriter(path, "gpt2")
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'gpt2' is not read"):
        sp.load(path)
    path.unlink()
    with pytest.raises(ValueError, match="does not say which diffusion model it is"):
        sp.load(sp.export(MODELS["llada_moe"](), path, to="gguf"))


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of"):
        sp.export(toy(), tmp_path / "m", to="gguf", dtype="q4_k")
    with pytest.raises(ValueError, match=r"to must be one of hf, gguf, llama\.cpp"):
        sp.export(toy(), tmp_path / "m", to="ggml")
    with pytest.raises(ValueError, match="dtype is of GGUF files"):
        sp.export(toy(), tmp_path / "m", dtype="f16")
    (tmp_path / "m").touch()
    with pytest.raises(FileExistsError, match="exists"):
        sp.export(toy(), tmp_path / "m", to="gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_file_says_where_it_came_from(tmp_path):
    sp.save(toy_sdar(), tmp_path / "published")
    model, _ = sp.load(tmp_path / "published")
    sp.apply(model, manual_plan(model, EQUAL))
    fields = gguf.GGUFReader(sp.export(model, tmp_path / "m.gguf", to="llama.cpp")).fields
    assert fields["sinkprune.source"].contents() == "published"
    assert json.loads(fields["sinkprune.plan"].contents())["layers"][1]["kept_heads"] == [2, 3]
    assert json.loads(fields["sinkprune.config"].contents())["model_type"] == "sdar"
