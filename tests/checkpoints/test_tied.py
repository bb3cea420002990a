"""Heads that are the embedding, and heads that are not, whatever the config says: none is lost by saving."""

import copy

import pytest
import torch
from decoder_twins import illada_twin
from hf import build
from torch import nn
from toys import manual_plan, one_thread, tokens  # noqa: F401

import sinkprune as sp

TIED = {
    "llama": lambda: build("llama, bidirectional, MHA, tied"),
    "bert": lambda: build("bert"),
    "modernbert": lambda: build("modernbert"),
}


def own_head(model):
    """As a tool does that trains or merges something into the head alone."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() + 0.5)


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
@pytest.mark.parametrize("family", TIED)
def test_a_head_of_its_own_is_saved_once_the_config_says_so(family, form, tmp_path):
    model, ids = TIED[family](), tokens(2, 7)
    own_head(model)
    if form != "dense":
        sp.apply(model, manual_plan(model, [[0, 1], [2], [1, 3]]), mode=form)
    with pytest.raises(ValueError, match=r"^\S+ is not \S+, and the model's config ties them.*= False"):
        sp.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    model.config.tie_word_embeddings = False
    back, _ = sp.load(sp.save(model, tmp_path / "m"))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_head_of_its_own_is_not_lost_by_an_export(tmp_path):
    model = TIED["llama"]()
    sp.apply(model, manual_plan(model, [[0, 1]] * 3))
    twin = copy.deepcopy(model)
    own_head(model)
    with pytest.raises(ValueError, match="the model's config ties them"):
        sp.export(model, tmp_path / "m")
    sp.export(twin, tmp_path / "m")


def test_a_live_models_head_of_its_own_is_not_lost(tmp_path):
    model = illada_twin()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.5)
    for form in ("dense", "compact"):
        if form == "compact":
            sp.apply(model, manual_plan(model, [[0, 1], [2], [1, 3]]))
        with pytest.raises(
            ValueError, match=r"lm_head.weight is not among the tensors of the model's config"
        ):
            sp.save(model, tmp_path / "m")
    model.lm_head.weight = model.model.embed_tokens.weight
    back, _ = sp.load(sp.save(model, tmp_path / "m"))
    with torch.no_grad():
        got, wanted = (sp.adapter_for(m).predict(tokens(2, 7)) for m in (back, model))
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_a_head_that_is_the_embedding_against_the_config_is_written_twice(tmp_path):
    """As the config has it, which lays out two tensors."""
    model, ids = build("qwen3"), tokens(2, 7)
    model.lm_head.weight = model.model.embed_tokens.weight
    back, _ = sp.load(sp.save(model, tmp_path / "m"))
    assert back.lm_head.weight is not back.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits)
