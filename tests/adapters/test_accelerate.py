"""Hooks of accelerate's on live models: what takes them off must not take the pruning off."""

import pytest
import torch
from layer_twins import llada2_twin, sdar_twin
from toys import manual_plan, one_thread, tokens  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp

hooks = pytest.importorskip("accelerate.hooks")


def hooked(make):
    model = make()
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    return model


def half(model):
    geometry = sp.adapter_for(model).geometry()
    return manual_plan(model, [list(range(count // 2)) for count in geometry.heads])


@pytest.mark.parametrize("mode", ["mask", "compact"])
@pytest.mark.parametrize("make", [dream_twin, sdar_twin, llada2_twin])
def test_pruning_that_a_removed_hook_would_undo_is_refused(make, mode):
    model, ids = hooked(make), tokens(2, 9)
    with torch.no_grad():
        dense = sp.adapter_for(model).predict(ids)
        with pytest.raises(ValueError, match="carries a hook of accelerate's"):
            sp.apply(model, half(model), mode=mode)
        assert torch.equal(sp.adapter_for(model).predict(ids), dense)
        hooks.remove_hook_from_module(model, recurse=True)
        sp.apply(model, half(model), mode=mode)
        assert not torch.allclose(sp.adapter_for(model).predict(ids), dense)


def test_a_masked_llada_stays_masked_when_hooks_go():
    model, ids = hooked(llada_twin), tokens(2, 9)
    sp.apply(model, half(model), mode="mask")
    with torch.no_grad():
        masked = sp.adapter_for(model).predict(ids)
        hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(sp.adapter_for(model).predict(ids), masked)
