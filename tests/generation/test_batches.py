"""Prompts of any lengths, and steps that nobody asked for: on block-causal models too."""

from __future__ import annotations

import pytest
import torch
from block_causals import toy_llada2, toy_sdar
from decoder_twins import fast_dllm_twin
from decoders import FAMILIES as DECODERS
from layer_twins import llada2_twin, sdar_twin
from toys import WordTokenizer, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.adapters import adapter_for
from sinkprune.generation.batches import batches_of, part_of
from sinkprune.generation.denoising import usual_steps
from sinkprune.generation.trajectories import trajectories

BLOCK_CAUSAL = {
    "llada2": toy_llada2, "sdar": toy_sdar, "fast_dllm": DECODERS["fast_dllm_qwen"].toy,
    "stable_diffcoder": DECODERS["stable_diffcoder"].toy, "live sdar": sdar_twin, "live llada2": llada2_twin,
    "live fast_dllm": fast_dllm_twin,
}  # fmt: skip
TEXTS = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9 w3 w5 w2 w4 w6 w8", "w6 w7 w8 w9 w1", "w2"]
SIZES = {"steps": 8, "gen_length": 8, "mask_token_id": 60}


@pytest.mark.parametrize("name", [*BLOCK_CAUSAL, "bidirectional"])
def test_prompts_of_any_lengths_are_continued_as_each_is_alone(name):
    model = BLOCK_CAUSAL.get(name, toy)()
    alone = [sp.generate(model, WordTokenizer(), text, **SIZES) for text in TEXTS]
    seen = []
    assert sp.generate(model, WordTokenizer(), TEXTS, callback=seen.append, **SIZES) == alone
    assert len(set(alone)) > 1
    block = adapter_for(model).block_size
    groups = {len(text.split()) % block for text in TEXTS} if block else {0}
    assert len({step.ids.shape[1] - 8 for step in seen}) == len(groups)


@pytest.mark.parametrize("cache", [None, "block"])
def test_random_prompts_at_a_seed_are_continued_as_each_is_alone(cache):
    model, words = toy_sdar(), WordTokenizer()
    texts = [words.decode(tokens(n, seed=n).tolist()) for n in (9, 2, 13, 6, 3, 17, 5)]
    options = SIZES | {"cache": cache, "threshold": 0.1}
    got = sp.generate(model, words, texts, **options)
    assert got == [sp.generate(model, words, text, **options) for text in texts]


def test_states_of_prompts_of_any_lengths_are_those_of_each_alone():
    model, options = toy_sdar(), {"tokenizer": WordTokenizer(), "states": 3, **SIZES}
    got = trajectories(model, TEXTS, **options)
    width = got.ids.shape[1]
    for sample, text in enumerate(TEXTS):
        alone = trajectories(model, [text], **options)
        pad = width - alone.ids.shape[1]
        mine = slice(sample, None, len(TEXTS))
        assert torch.equal(got.ids[mine, pad:], alone.ids)
        assert torch.equal(got.targets[mine, pad:], alone.targets)
        assert got.valid[mine].sum() == alone.ids.numel() and not got.valid[mine, :pad].any()


def test_batches_hold_every_sample_once_and_lengths_alike_modulo_the_block():
    lengths = tokens(40, vocabulary=12)
    valid = (torch.arange(12) >= 12 - lengths[:, None]).long()
    for block, batch in ((None, 7), (4, 3), (4, 100), (1, 5)):
        groups = batches_of(valid, batch, block)
        assert sorted(sample for group in groups for sample in group) == list(range(40)) and groups[0][0] == 0
        assert all(len(group) <= batch for group in groups)
        if block:
            assert all(len({int(lengths[i]) % block for i in group}) == 1 for group in groups)
        for group in groups:
            ids, mask = part_of(valid * 5, valid, group)
            assert torch.equal(mask.sum(1), lengths[group]) and mask.shape[1] == lengths[group].max()
            assert torch.equal(ids, mask * 5)


@pytest.mark.parametrize("name", [*BLOCK_CAUSAL, "bidirectional", "context"])
def test_every_length_has_steps_that_it_takes_where_none_are_asked_for(name):
    makers = BLOCK_CAUSAL | {"bidirectional": toy, "context": DECODERS["nemotron_labs_diffusion"].toy}
    model = makers[name]()
    adapter = adapter_for(model)
    for length, block in ((4, None), (12, None), (24, None), (36, 4)):
        options = {"gen_length": length, "block_length": block, "mask_token_id": 60}
        assert len(list(sp.denoise(model, tokens(1, 4), **options))) == length
    expected = 7 if name == "bidirectional" else 10  # one block, or ten of four
    assert usual_steps(adapter, 40, at_most=7) == expected


def test_more_blocks_than_the_usual_steps_take_one_each():
    model = toy_sdar(max_position_embeddings=1024)
    profile = sp.profile(model, tokens(1, 4), gen_length=260)  # 65 blocks of 4
    assert profile.settings["steps"] == 65
    assert usual_steps(adapter_for(model), 96, at_most=64) == 48  # 24 blocks: two each
    assert usual_steps(adapter_for(toy()), 0, at_most=64) == 1  # refused by what it is given to
    seen = []
    sp.generate(model, WordTokenizer(), "w1 w2 w3 w4", gen_length=96, callback=seen.append)
    assert len(seen) == 48
