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
    for length in (128, 128, 100, 120):
        ids = torch.randint(1, 60, (2, length), device="cuda")
        expected = adapter.predict(ids, None, slice(64, 96))
        torch.testing.assert_close(graph(ids, rows=slice(64, 96)), expected, atol=1e-4, rtol=1e-4)
    assert graph.held == 2


def test_a_generation_through_graphs_writes_the_same_tokens():
    model = toy(max_sequence_length=512).cuda()
    prompt = torch.randint(1, 60, (2, 64), device="cuda")
    options = {"steps": 16, "gen_length": 64, "block_length": 32}
    *_, eager = sp.denoise(model, prompt, **options)
    *_, replayed = sp.denoise(model, prompt, graphs=True, **options)
    assert torch.equal(eager, replayed)
