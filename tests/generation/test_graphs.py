"""Step graphs: buckets, buffers, eviction and renewal, with a recorder that stands in for the GPU's."""

import gc
import weakref

import pytest
import torch
from toys import MASK, manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.generation.graphs import StepGraph


class Recorder:
    """As a CUDA graph: a replay runs what was recorded on the addresses of then, into the same output."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, step):
        self.captures += 1
        logits = torch.full_like(step(), torch.nan)

        def replay():
            self.replays += 1
            logits.copy_(step())

        return replay, logits


def graph_of(model, **options):
    recorder = Recorder()
    return StepGraph(model, capture=recorder, **options), recorder


def predict(model, ids, valid=None, rows=slice(None)):
    with torch.no_grad():
        return sp.adapter_for(model).predict(ids, valid, rows)


@torch.no_grad()
def test_replays_equal_eager_whatever_the_ids_and_the_padding():
    model = toy()
    graph, recorder = graph_of(model, bucket=16)
    for seed, length in enumerate((16, 16, 16)):
        ids = tokens(2, length, seed=seed)
        assert torch.equal(graph(ids, rows=slice(4, 12)), predict(model, ids, rows=slice(4, 12)))
    assert (recorder.captures, recorder.replays) == (1, 3)
    for seed, length in enumerate((11, 9, 15, 11)):  # one bucket, hidden on the right
        ids = tokens(2, length, seed=seed)
        torch.testing.assert_close(graph(ids, rows=slice(4, 9)), predict(model, ids, rows=slice(4, 9)))
    assert recorder.captures == 2
    for seed in range(3):  # padding on the left, another in each
        ids = tokens(2, 12, seed=seed)
        valid = (torch.arange(12) >= torch.tensor([[seed], [3]])).long()
        got = graph(ids, valid, rows=slice(4, 9))
        torch.testing.assert_close(got, predict(model, ids, valid, slice(4, 9)))
    assert recorder.captures == 2  # the bucket with a mask was there


@torch.no_grad()
def test_a_full_bucket_with_a_mask_forgets_what_an_earlier_call_hid():
    model = toy()
    graph, recorder = graph_of(model, bucket=8)
    hidden = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    for valid in (hidden, torch.ones(1, 8, dtype=torch.long), hidden.flip(1)):
        ids = tokens(1, 8)
        torch.testing.assert_close(graph(ids, valid), predict(model, ids, valid))
    assert recorder.captures == 1


def test_a_graph_recorded_in_inference_mode_serves_calls_outside_it():
    model = toy()
    graph, recorder = graph_of(model, bucket=8)
    ids = tokens(1, 6)
    with torch.inference_mode():
        graph(ids.clone())
    with torch.no_grad():
        torch.testing.assert_close(graph(ids), predict(model, ids))
    assert recorder.captures == 1


@torch.no_grad()
def test_the_graph_not_used_for_longest_goes_first():
    model = toy()
    graph, recorder = graph_of(model, bucket=8, most=2)
    a, b, c = (tokens(1, n) for n in (8, 16, 24))
    for ids in (a, b, a, c):  # c takes b's place
        graph(ids)
    assert (graph.held, recorder.captures) == (2, 3)
    graph(a)
    assert recorder.captures == 3
    graph(b)
    assert recorder.captures == 4


@torch.no_grad()
def test_another_shape_plan_or_place_of_the_weights_is_recorded_anew():
    model = toy()
    graph, recorder = graph_of(model, bucket=8)
    ids = tokens(1, 8)
    graph(ids)
    graph(tokens(2, 8))
    graph(ids, rows=slice(2, 4))
    assert recorder.captures == 3
    plan = manual_plan(model, [[0, 1], [2], [0, 1, 2, 3]])
    sp.apply(model, plan, mode="mask")
    assert torch.equal(graph(ids), predict(model, ids))
    assert (recorder.captures, graph.held) == (4, 1)
    sp.restore(model)
    assert torch.equal(graph(ids), predict(model, ids))
    sp.apply(model, plan)
    assert torch.equal(graph(ids), predict(model, ids))
    assert recorder.captures == 6
    model.double()
    assert graph(ids).dtype == torch.float64
    assert recorder.captures == 7


@torch.no_grad()
def test_a_bucket_never_exceeds_the_context():
    model = toy(max_sequence_length=20)
    graph, _ = graph_of(model, bucket=16)
    ids = tokens(1, 19)
    torch.testing.assert_close(graph(ids), predict(model, ids))


def test_what_a_graph_cannot_hold_is_refused():
    model = toy()
    graph, _ = graph_of(model)
    with (
        sp.track(model),
        pytest.raises(ValueError, match="a graph can't, run without graphs"),
    ):
        graph(tokens(1, 8))

    def waits(step):
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    with pytest.raises(
        RuntimeError, match="can't be recorded, run without graphs: CUDA error: operation not perm"
    ):
        StepGraph(model, capture=waits)(tokens(1, 8))
    with pytest.raises(ValueError, match="at least 1, got 0 and 8"):
        StepGraph(model, bucket=0)


@torch.no_grad()
def test_without_cuda_it_is_predict():
    model = toy()
    ids = tokens(2, 9)
    graph = StepGraph(model)
    assert torch.equal(graph(ids), predict(model, ids))
    assert graph.held == 0


def test_a_fused_model_predicts_the_same_and_keeps_every_parameter():
    for changes in ({}, {"n_kv_heads": 2, "include_bias": True}):
        model = toy(**changes)
        ids = tokens(2, 20)
        before, count = predict(model, ids), sum(p.numel() for p in model.parameters())
        assert sp.fuse(model) is model
        torch.testing.assert_close(predict(model, ids), before)
        assert sum(p.numel() for p in model.parameters()) == count
        assert type(model.blocks[0].attention).__name__ == "SinkPrunedAttention"
        assert type(model.blocks[0].mlp).__name__ == "CompactMLP"
        assert model.blocks[0].attention.kv_head_of is None  # equal groups need no map, so no gathering
        with pytest.raises(ValueError, match=r"already pruned \(compact form\)"):
            sp.fuse(model)


def test_generation_through_graphs_writes_the_same_tokens_and_keeps_the_graphs():
    model = toy()
    graph, recorder = graph_of(model, bucket=1)
    options = {"steps": 8, "gen_length": 16, "block_length": 8, "cfg_scale": 0.5}
    for seed in (0, 1):
        prompt = tokens(2, 5, seed=seed)
        *_, eager = sp.denoise(model, prompt, **options)
        *_, replayed = sp.denoise(model, prompt, graphs=graph, **options)
        assert torch.equal(replayed, eager)
    assert (recorder.captures, recorder.replays) == (2, 16)  # one a block
    with pytest.raises(ValueError, match="pass either graphs or a cache"):
        next(sp.denoise(model, prompt, graphs=True, cache="dual", **options))


@torch.no_grad()
def test_a_graph_keeps_the_tables_that_it_reads_after_a_longer_one_replaced_them():
    model = toy()
    graph, _ = graph_of(model, bucket=16)
    graph(tokens(1, 16))
    table = weakref.ref(model._rotary[0])
    graph(tokens(1, 32))
    gc.collect()
    assert graph.held == 2 and table() is not None
    del graph
    gc.collect()
    assert table() is None


def test_a_graph_keeps_the_tables_that_its_only_call_made():
    """A recorder that runs the step once: the model's first table is made in it, and is read again later."""
    model = toy()
    graph = StepGraph(model, capture=lambda step: (lambda: None, step()))
    graph(tokens(1, 20))
    table = weakref.ref(model._rotary[0])
    graph(tokens(1, 60))
    gc.collect()
    assert table() is not None or graph.held < 2
