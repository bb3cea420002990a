"""The examples run, and the hand-written stack is the model it claims to be."""

import importlib.util
from pathlib import Path

import pytest
import torch
from toys import one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.plans import LayerPlan

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def custom_stack():
    spec = importlib.util.spec_from_file_location("custom_stack", EXAMPLES / "custom_stack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_custom_stack_computes_the_native_model_pruned_or_not(custom_stack):
    model, ids, heads = toy(), tokens(1, 12), [[0, 2], [1], [0, 1, 3]]
    stack = custom_stack.Stack(model.state_dict(), 4, 500000.0, 1e-5)
    adapter = sp.adapter_for(model)
    plan = sp.PrunePlan(adapter.geometry(), "", [LayerPlan(kept) for kept in heads])
    with torch.no_grad():
        for prune in (False, True):
            if prune:
                stack.keep(heads)
                sp.apply(model, plan)
            cache = custom_stack.PrefixCache(3)
            got = stack.forward(ids, cache)
            torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=0)
            assert cache.tokens == 0 and cache.kept == [None] * 3


def test_its_cache_holds_what_is_committed_at_the_right_positions(custom_stack):
    stack = custom_stack.Stack(toy().state_dict(), 4, 500000.0, 1e-5)
    ids, cache, calls = tokens(1, 12), custom_stack.PrefixCache(3), []
    with torch.no_grad():
        stack.forward(ids[:, :5], cache, commit=True)
        assert cache.tokens == 5
        stack.attention[0].observer = calls.append
        stack.forward(ids[:, 5:], cache)
        stack.forward(ids, custom_stack.PrefixCache(3))
    torch.testing.assert_close(calls[0].key, calls[1].key, atol=1e-5, rtol=0)  # layer 0 sees embeddings only
    torch.testing.assert_close(calls[0].query, calls[1].query[:, :, 5:], atol=1e-5, rtol=0)


def test_the_custom_stack_runs(custom_stack, capsys):
    custom_stack.main(["--tokens", "32", "--steps", "8", "--keep", "4"])
    out = capsys.readouterr().out
    assert "dense:" in out and "pruned:" in out and "variance by head" in out


@pytest.mark.parametrize("bad", [["--tokens", "20"], ["--steps", "33"], ["--keep", "0"]], ids=" ".join)
def test_bad_arguments_are_refused_with_a_line(custom_stack, capsys, bad):
    with pytest.raises(SystemExit):
        custom_stack.main(bad)
    assert "must be" in capsys.readouterr().err
