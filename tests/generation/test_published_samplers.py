"""Each family's own way of writing, told from its published code, against ``denoise``: token for token, on
toys, dense and pruned. The logits come from the tests' own forward."""

import copy

import pytest
import torch
from block_causals import llada2_config
from decoders import FAMILIES, MASK, straight
from toys import manual_plan, one_thread, tokens  # noqa: F401

import sinkprune as sp
from sinkprune.models.llada2 import LLaDA2Config

HEADS = [[0, 2], [1], [0, 1, 3]]


class Forward:
    """Log-probabilities of a toy's plain forward, the mask token never drawn."""

    def __init__(self, name, model):
        self.family, self.tensors = FAMILIES[name], {k: t.clone() for k, t in model.state_dict().items()}
        self.config = model.config.to_dict() | {"rope_theta": model.config.rope_theta}

    def __call__(self, ids, start=0):
        logits = straight(self.family, self.config, self.tensors, torch.tensor(ids), start)
        logits[:, MASK] = -torch.inf
        return logits.softmax(-1)


def surest(candidates, threshold):
    """Of ``{position: (token, probability)}``: all at least that sure, and always the surest one."""
    best = max(candidates, key=lambda at: candidates[at][1])
    return [at for at, (_, p) in candidates.items() if at == best or (threshold and p >= threshold)]


def best_of(row):
    p, token = row.max(-1)
    return int(token), float(p)


def write_fast_dllm(forward, ids, length, block, part, threshold):
    """A block's first token is the next token of what is finished; then parts of the block in turn, by logits
    of the row before."""
    ids, wanted = list(ids), len(ids) + length
    while len(ids) < wanted:
        if len(ids) % block == 0:
            ids.append(best_of(forward(ids)[-1])[0])
        start = len(ids) - len(ids) % block
        ids += [MASK] * (start + block - len(ids))
        for first in range(start, start + block, part):
            while MASK in ids[first : first + part]:
                p = forward(ids)
                found = {at: best_of(p[at - 1]) for at in range(first, first + part) if ids[at] == MASK}
                for at in surest(found, threshold):
                    ids[at] = found[at][0]
    return ids[:wanted]


def write_blocks(forward, ids, length, block, threshold):
    """Blocks of positions, each by logits in place."""
    ids, wanted = list(ids), len(ids) + length
    while len(ids) < wanted:
        start = len(ids) - len(ids) % block
        ids += [MASK] * (start + block - len(ids))
        while MASK in ids:
            p = forward(ids)
            found = {at: best_of(p[at]) for at in range(start, start + block) if ids[at] == MASK}
            for at in surest(found, threshold):
                ids[at] = found[at][0]
    return ids[:wanted]


def write_after_context(forward, ids, length, block, threshold):
    """Blocks from the prompt's end; the first token is the causal next one; the block sees itself and all
    before it, which is read causally."""
    ids, wanted = list(ids), len(ids) + length
    while len(ids) < wanted:
        start = len(ids)
        ids.append(best_of(forward(ids, start)[-1])[0])
        ids += [MASK] * (block - 1)
        while MASK in ids:
            p = forward(ids, start)
            found = {at: best_of(p[at]) for at in range(start, len(ids)) if ids[at] == MASK}
            for at in surest(found, threshold):
                ids[at] = found[at][0]
    return ids


def write_from_prompt(forward, ids, length, block, threshold):
    """Blocks from the prompt's end, by logits in place (WeDLM's order is the forward's)."""
    ids, wanted = list(ids), len(ids) + length
    while len(ids) < wanted:
        ids += [MASK] * block
        while MASK in ids:
            p = forward(ids)
            found = {at: best_of(p[at]) for at in range(len(ids)) if ids[at] == MASK}
            for at in surest(found, threshold):
                ids[at] = found[at][0]
    return ids


def write_whole(forward, ids, length, block, threshold):
    """LLaDA's: all masks are there from the start, blocks from the prompt's end."""
    ids, prompt = list(ids) + [MASK] * length, len(ids)
    for start in range(prompt, prompt + length, block):
        while MASK in ids[start : start + block]:
            p = forward(ids)
            found = {at: best_of(p[at]) for at in range(start, start + block) if ids[at] == MASK}
            for at in surest(found, threshold):
                ids[at] = found[at][0]
    return ids


WAYS = {
    "illada": write_whole,
    "stable_diffcoder": write_blocks,
    "wedlm": write_from_prompt,
    "nemotron_labs_diffusion": write_after_context,
}


def pruned(name, form):
    """A toy in ``form``, and its plain forward (of removed heads zeroed)."""
    model = FAMILIES[name].toy(seed=7)
    if form == "dense":
        return model, Forward(name, model)
    zeroed = copy.deepcopy(model)
    width = sp.adapter_for(model).geometry().head_dim
    with torch.no_grad():
        for kept, layer in zip(HEADS, zeroed.layers, strict=True):
            for head in set(range(4)) - set(kept):
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    return sp.apply(model, manual_plan(model, HEADS), mode=form), Forward(name, zeroed)


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("name", WAYS)
def test_a_family_writes_what_its_published_sampler_writes(name, threshold, form):
    model, forward = pruned(name, form)
    for prompt in (4, 6):
        ids = tokens(1, prompt, seed=prompt)
        expected = WAYS[name](forward, ids[0].tolist(), 8, 4, threshold)
        for cache in (None, *(c for c in sp.adapter_for(model).caches if c == "block")):
            *_, got = sp.denoise(
                model, ids, steps=8, gen_length=8, block_length=4, threshold=threshold, cache=cache
            )
            assert got[0].tolist() == expected, cache


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
@pytest.mark.parametrize("part", [4, 2, 1])
def test_fast_dllm_fills_parts_of_a_block_after_its_first_token(part, form):
    model, forward = pruned("fast_dllm_qwen", form)
    for prompt in (4, 6, 7):
        ids = tokens(1, prompt, seed=prompt)
        expected = write_fast_dllm(forward, ids[0].tolist(), 8, 4, part, 0.3)
        for cache in (None, "block"):
            *_, got = sp.denoise(model, ids, gen_length=8, threshold=0.3, sub_block=part, cache=cache)
            assert got[0].tolist() == expected, (prompt, cache)


@pytest.mark.parametrize("name", ["sdar-like", *FAMILIES])
def test_generation_ends_where_every_sample_has_its_stop_token(name):
    model = FAMILIES.get(name, FAMILIES["stable_diffcoder"]).toy(seed=9)
    prompt, options = tokens(2, 4, seed=1), dict(steps=16, gen_length=16, block_length=4)
    whole = list(sp.denoise(model, prompt, **options))
    stops = [int(row[7]) for row in whole[-1]]
    ended = list(sp.denoise(model, prompt, stop_token_id=stops, **options))
    assert len(ended) < len(whole) and ended[-1].shape == whole[-1].shape
    for got, full in zip(ended[-1].tolist(), whole[-1].tolist(), strict=True):
        first = next(i for i in range(4, len(full)) if full[i] in stops)
        assert got[: first + 1] == full[: first + 1] and set(got[first:]) == {full[first]}
    never = list(sp.denoise(model, prompt, stop_token_id=59 if 59 not in whole[-1] else 58, **options))
    assert len(never) == len(whole)


def test_sub_blocks_want_a_threshold_and_divide_the_block():
    model = FAMILIES["fast_dllm_qwen"].toy()
    for options in ({"sub_block": 2}, {"sub_block": 3, "threshold": 0.5}):
        with pytest.raises(ValueError, match="sub_block must divide the block of 4 tokens"):
            next(sp.denoise(model, tokens(1, 4), steps=8, gen_length=8, **options))


@pytest.mark.parametrize(
    ("algorithm", "what"), [("editing", "LLaDA2.1"), ("joint_threshold_indel", "LLaDA2.2")]
)
def test_editing_and_insertion_are_refused_by_name(algorithm, what):
    with pytest.raises(ValueError, match=f"{what}.*only fills masked tokens"):
        next(sp.denoise(FAMILIES["illada"].toy(), tokens(1, 4), gen_length=8, steps=8, algorithm=algorithm))


def test_routing_by_blocks_is_refused_by_name():
    with pytest.raises(ValueError, match="LLaDA2 config: expert_capacity is not computed here"):
        LLaDA2Config.from_dict(llada2_config(expert_capacity=48))
