"""docs/families.md: as the registry says, and as toy models of every family do."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from family_toys import TOYS
from toys import manual_plan, one_thread, tokens  # noqa: F401

import sinkprune as sp
from sinkprune.adapters import registered
from sinkprune.commands import families_page as families
from sinkprune.models.caches import CACHES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
OURS = {a.__name__: a for a in registered() if a.__module__.startswith("sinkprune.") and a.facts}
UNIFORM = [[0, 1], [2, 3], [0, 1]]  # a whole group, or two of four heads


def works(call):
    try:
        call()
    except (ValueError, TypeError):
        return False
    return True


def cells(name):
    return dict(zip(families.COLUMNS, families.row(OURS[name]), strict=True))


@pytest.fixture(scope="module")
def toys():
    return {name: make() for name, make in TOYS.items()}


def test_the_page_is_what_the_registry_says():
    assert PAGE.read_text() == families.page(), "python -m sinkprune.commands.families_page docs/families.md"


def test_every_family_has_facts_and_a_toy():
    ours = [a for a in registered() if a.__module__.startswith("sinkprune.")]
    assert {a.__name__ for a in ours} == {*TOYS, "TransformersAlbert"} == {*OURS}


@pytest.mark.parametrize("name", TOYS)
def test_forms_and_channels_are_as_the_page_says(name, toys):
    model, row = toys[name], cells(name)
    adapter = sp.adapter_for(model)
    assert type(adapter) is OURS[name]
    plan = manual_plan(model, UNIFORM)
    for form in ("mask", "compact"):
        assert works(lambda form=form: sp.apply(copy.deepcopy(model), plan, mode=form)) == (
            not row[form].startswith("no")
        ), form
    prunable = [works(lambda layer=layer: adapter.mlp_weights(layer)) for layer in range(3)]
    assert any(prunable) == (not row["MLP channels"].startswith("no"))
    if row["MLP channels"] == "yes":
        assert all(prunable)
    channels = [[0, 3] if can else None for can in prunable]
    wide = manual_plan(model, [[0, 1, 2, 3]] * 3, channels)
    assert works(lambda: sp.apply(copy.deepcopy(model), wide, mode="mask"))


@pytest.mark.parametrize("name", TOYS)
def test_blocks_go_as_the_page_says(name, toys):
    def goes(target, mode):
        model = copy.deepcopy(toys[name])
        settings = {"unit": "blocks", "ratio": 0.34, "block_rule": "random"}
        return works(lambda: sp.apply(model, sp.plan(model, targets=target, **settings), mode=mode))

    said = cells(name)["blocks"]
    assert goes("attention", "mask")
    assert goes("attention", "compact") != said.endswith("in mask form")
    assert goes("blocks", "compact") == goes("mlp_blocks", "compact") == said.startswith("yes")


@pytest.mark.parametrize("name", TOYS)
def test_saving_and_exporting_are_as_the_page_says(name, toys, tmp_path):
    row, model = cells(name), copy.deepcopy(toys[name])
    if row["compact"].startswith("no"):
        assert row["export"] == "no"
        return
    prunable = [works(lambda i=i: sp.adapter_for(model).mlp_weights(i)) for i in range(3)]
    narrow = manual_plan(model, [[0, 1, 2, 3]] * 3, [[0, 3] if can else None for can in prunable])
    heads = sp.apply(copy.deepcopy(model), manual_plan(model, UNIFORM))
    saved = works(lambda: sp.save(heads, tmp_path / "saved"))
    assert saved == row["save and load"].startswith("yes")
    said = row["export"]
    assert works(lambda: sp.export(heads, tmp_path / "heads")) == said.startswith("yes")
    if said.startswith("as GGUF"):  # of all heads: llama.cpp's architecture for it takes no fewer
        assert not works(lambda: sp.export(heads, tmp_path / "fewer.gguf", to="gguf"))
        with pytest.raises(ValueError, match="llada-moe: layer 0 has one MLP, no experts"):
            sp.export(model, tmp_path / "all.gguf", to="gguf")
    if said.startswith("channels alone"):
        sp.export(sp.apply(model, narrow), tmp_path / "channels")


@pytest.mark.parametrize("name", [n for n in TOYS if n != "TransformersDiffusionGemma"])
def test_caches_and_samplers_are_as_the_page_says(name, toys):
    model, row = toys[name], cells(name)
    adapter = sp.adapter_for(model)

    def sample(**options):
        *_, ids = sp.denoise(
            model, tokens(1, 4), steps=2, gen_length=8, block_length=4, mask_token_id=60, **options
        )
        return ids

    with torch.no_grad():
        assert (sample() != 60).all()
        taken = [cache for cache in CACHES if works(lambda cache=cache: sample(cache=cache))]
    assert (", ".join(taken) or "none") == row["caches"]
    assert (adapter.block_size is not None) == ("block diffusion" in row["sampler"])


def test_albert_is_refused():
    config = transformers.AlbertConfig(
        vocab_size=61, embedding_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40,
    )  # fmt: skip
    with pytest.raises(TypeError, match="the same layer weights at every depth"):
        sp.adapter_for(transformers.AlbertForMaskedLM(config))
    assert cells("TransformersAlbert")["sampler"] == "no"
