"""Step graphs on a GPU: replayed logits and whole generations equal the eager ones."""

import pytest
import torch
from toys import toy

import sinkprune as sp
from sinkprune.generation.graphs import StepGraph

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "compact"])
@torch.no_grad()
def test_a_replayed_step_is_the_eager_one(pruned):
    model = toy(max_sequence_length=512).cuda()
    if pruned:
        sp.apply(model, sp.plan(model, criterion="random", ratio=0.4))
    graph, adapter = StepGraph(model), sp.adapter_for(model)
    for length in (64, 64, 40, 60):
        ids = torch.randint(1, 60, (2, length), device="cuda")
        expected = adapter.predict(ids, None, slice(32, 40))
        torch.testing.assert_close(graph(ids, rows=slice(32, 40)), expected, atol=1e-4, rtol=1e-4)
    assert graph.held == 2


@torch.no_grad()
def test_a_graph_outlives_the_rotary_table_that_a_longer_call_replaces():
    model = toy(max_sequence_length=512).cuda()
    graph, adapter = StepGraph(model, bucket=16), sp.adapter_for(model)
    short, longer = (torch.randint(1, 60, (1, n), device="cuda") for n in (16, 48))
    graph(short)
    graph(longer)
    torch.randn(3, 16, 64, device="cuda")  # takes the memory of a table that was freed
    torch.testing.assert_close(graph(short), adapter.predict(short), atol=1e-4, rtol=1e-4)


def test_a_generation_through_graphs_writes_the_same_tokens():
    model = toy(max_sequence_length=512).cuda()
    prompt = torch.randint(1, 60, (2, 16), device="cuda")
    options = {"steps": 8, "gen_length": 16, "block_length": 8}
    *_, eager = sp.denoise(model, prompt, **options)
    *_, replayed = sp.denoise(model, prompt, graphs=StepGraph(model, bucket=32), **options)
    assert torch.equal(eager, replayed)
