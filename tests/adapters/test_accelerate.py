"""accelerate's hooks: what takes them off leaves the pruning, and offloaded weights are asked for."""

import pytest
import torch
from hf import build
from layer_twins import llada2_twin, sdar_twin
from toys import assert_same_tensors, bits, manual_plan, one_thread, tokens, toy  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp

accelerate = pytest.importorskip("accelerate")
hooks = accelerate.hooks


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


MODELS = {
    "native": toy, "live LLaDA": llada_twin, "live Dream": dream_twin,
    "transformers": lambda: build("qwen3, bidirectional"),
}  # fmt: skip


def parted(model, folder):
    """Some layers here and some on the disk, as a ``device_map`` has it."""
    names = [name for name, child in model.named_modules() if len(name) and not any(child.children())]
    places = {name: "disk" if ".1." in name else "cpu" for name in names}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model),
    "disk_offload": accelerate.disk_offload,
    "device_map": parted,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_offloaded_weights_are_asked_for_by_one_line_and_come_back_as_it_says(make, way, tmp_path):
    model, ids = make(), tokens(2, 6)
    before, plan = bits(model), half(model)
    rows = sp.calibrate(model, tokens(200), length=8, sequences=2)
    way(model, str(tmp_path / "weights"))
    for verb in (
        lambda: sp.adapter_for(model).fingerprint(),
        lambda: sp.plan(model, criterion="magnitude", ratio=0.3),
        lambda: sp.plan(model, ratio=0.3, calibration=rows),
        lambda: sp.profile(model, ids, steps=2, gen_length=2),
        lambda: sp.save(model, tmp_path / "saved"),
        lambda: sp.apply(model, plan, calibration=rows),
        lambda: sp.apply(model, plan, mode="mask"),
        lambda: sp.lay_out(model, plan),
        lambda: sp.evaluate(model, tokens(200), length=8, windows=2),
        lambda: sp.sparsify(model, "magnitude", 0.5),
    ):
        with pytest.raises(ValueError, match=r"^\S+ is offloaded \(device_map.*brings them back$"):
            verb()
    assert not (tmp_path / "saved").exists() and sp.adapter_for(model).form == "dense"
    hooks.remove_hook_from_module(model, recurse=True)
    assert_same_tensors(model.state_dict(), before)
    sp.apply(model, plan)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_an_offloaded_model_writes_what_it_did_or_says_why_not(make, tmp_path):
    """Native layers read their weights themselves, which hooks on modules don't bring back."""
    model, ids, sizes = make(), tokens(2, 6), {"gen_length": 2, "steps": 2}
    *_, expected = sp.denoise(model, ids, **sizes)
    accelerate.disk_offload(model, str(tmp_path / "weights"))
    if make is toy:
        with pytest.raises(ValueError, match=r"the model's weights are not there \(on meta, or offloaded\)"):
            list(sp.denoise(model, ids, **sizes))
    else:
        *_, got = sp.denoise(model, ids, **sizes)
        assert torch.equal(got, expected)
