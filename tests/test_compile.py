"""torch.compile: ragged models in one graph, statistics inside it, and no attaching afterwards."""

import pytest
import torch
from hf import build, padded
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp

LAYERS = 12


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def ragged():
    """Twelve layers, no two alike in heads, key/value heads and channels together."""
    model = toy(n_layers=LAYERS, d_model=32, n_heads=8, n_kv_heads=4, mlp_hidden_size=40)
    heads = [sorted({0} | {(i * 3 + j) % 8 for j in range(1 + i % 8)}) for i in range(LAYERS)]
    plan = manual_plan(model, heads, [list(range(4 + 3 * i)) for i in range(LAYERS)])
    return sp.apply(model, plan)


@torch.no_grad()
def test_twelve_layers_of_different_widths_are_one_graph_and_stay_it():
    model, ids = ragged(), tokens(2, 9)
    fast = compiled(model)
    expected = model(ids).logits
    torch.testing.assert_close(fast(ids).logits, expected, atol=1e-6, rtol=0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        fast(tokens(2, 9, seed=1))


@torch.no_grad()
def test_statistics_are_the_same_inside_a_graph_when_attached_before_compiling():
    model = toy(n_layers=2, n_kv_heads=2)
    steps = [tokens(2, 9, seed=seed) for seed in range(5)]
    with sp.track(model) as tracker:
        for ids in steps:
            model(ids)
    expected = tracker.result()
    with sp.track(model) as tracker:
        fast = compiled(model)
        for ids in steps[:3]:
            fast(ids)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for ids in steps[3:]:
                fast(ids)
    assert tracker.steps == 5
    got = tracker.result()
    torch.testing.assert_close(got.mass, expected.mass)
    torch.testing.assert_close(got.position.variance, expected.position.variance)


@torch.no_grad()
def test_a_compact_transformers_model_with_ragged_groups_is_one_graph():
    model = build("qwen3, bidirectional")
    sp.apply(model, manual_plan(model, [[0, 2, 3], [1], [0, 1, 3]]))
    ids, _ = padded("none")
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(compiled(model)(ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)


def in_place(model):
    model.compile(backend="aot_eager")
    return model


def one_block(model):
    model.blocks[1].compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("how", [compiled, in_place, one_block])
def test_attaching_to_or_pruning_what_is_compiled_is_refused(how):
    model = toy()
    plan = manual_plan(model, [[0]] * 3)
    done = how(model)
    with (
        pytest.raises(RuntimeError, match="the model is compiled: track the original model first"),
        sp.track(done),
    ):
        pass
    with pytest.raises((TypeError, ValueError), match="the model is compiled"):
        sp.apply(done, plan)
    assert sp.adapter_for(model).form == "dense"
    assert not sp.adapter_for(model).observed()
