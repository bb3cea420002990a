"""Where the config names no mask token, every verb takes the tokenizer's; one that is no id is refused."""

import pytest
import torch
from dreams import toy_dream
from hf import build
from toys import WordTokenizer, one_thread, toy  # noqa: F401
from upstream_twins import llada_twin

import sinkprune as sp
from sinkprune.evaluation.generation_quality import evaluate_generation
from sinkprune.generation.trajectories import trajectories

MODELS = {
    "llada": toy, "dream": toy_dream, "live llada": llada_twin, "bert": lambda: build("bert"),
    "qwen3": lambda: build("qwen3, bidirectional"),
}  # fmt: skip
TEXT = " ".join(f"w{3 + 7 * i % 50}" for i in range(60))
SAMPLER = {"steps": 3, "gen_length": 3}


class Masked(WordTokenizer):
    mask_token_id = 57


def said(model, verb, tokenizer, **options):
    """Whatever a verb makes of a text, as something to compare."""
    if verb == "calibrate":
        return sp.calibrate(model, TEXT, tokenizer=tokenizer, length=9, sequences=3, **options).ids.tolist()
    if verb == "profile":
        made = sp.profile(model, ["w4 w5 w6"], tokenizer=tokenizer, **SAMPLER, **options)
        return {name: values.tolist() for name, values in made.statistics.items()}
    if verb == "generate":
        return sp.generate(model, tokenizer, ["w4 w5 w6"], **SAMPLER, **options)
    if verb == "trajectories":
        return trajectories(
            model, ["w4 w5"], tokenizer=tokenizer, states=2, **SAMPLER, **options
        ).ids.tolist()
    if verb == "evaluate":
        return sp.evaluate(model, TEXT, tokenizer=tokenizer, windows=2, length=9, draws=2, **options).nll
    sizes = {"windows": 2, "prompt_length": 4, "gen_length": 3}
    return evaluate_generation(model, tokenizer, TEXT, **sizes, **options).texts


VERBS = ["calibrate", "profile", "generate", "trajectories", "evaluate", "generation quality"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("family", MODELS)
def test_the_tokenizers_mask_token_serves_where_the_config_names_none(family, verb):
    model = MODELS[family]()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="names no mask token: pass mask_token_id"):
        said(model, verb, WordTokenizer())
    found = said(model, verb, Masked())
    assert str(found) == str(said(model, verb, WordTokenizer(), mask_token_id=57))
    given = str(said(model, verb, Masked(), mask_token_id=3))  # comes first
    assert given == str(said(model, verb, WordTokenizer(), mask_token_id=3))
    assert given != str(found) or verb == "generate"  # three tokens of text may be the same


@pytest.mark.parametrize("wrong", [61, -1, True, 5.0])
@pytest.mark.parametrize("verb", VERBS)
def test_a_mask_token_outside_the_vocabulary_is_refused(verb, wrong):
    for model in (toy(), llada_twin(), build("bert")):
        with pytest.raises(ValueError, match=f"one of the vocabulary's 61 ids, got {wrong}"):
            said(model, verb, WordTokenizer(), mask_token_id=wrong)


def test_a_config_whose_mask_token_the_table_lacks_is_refused_before_the_table_is_read():
    model = toy()
    model.config.mask_token_id = 61
    with pytest.raises(ValueError, match="one of the vocabulary's 61 ids, got 61"):
        list(sp.denoise(model, torch.tensor([[1, 2]]), **SAMPLER))
