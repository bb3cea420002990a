"""Block-causal, expert and fused families run block by block, as calibration does, to what they are whole."""

import pytest
import torch
from block_causals import toy_llada2, toy_sdar
from ddit_twins import ddit_twin
from layer_twins import llada2_twin, llada_moe_twin, sdar_twin
from toys import manual_plan, one_thread, tokens  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.calibration import BlockStream, Calibration

TOYS = {
    "sdar": toy_sdar, "llada2": toy_llada2, "live sdar": sdar_twin, "live llada2": llada2_twin,
    "llada-moe": llada_moe_twin, "mdlm": lambda: ddit_twin("packed"), "bd3lm": lambda: ddit_twin("sdpa"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["dense", "compact"])
@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
def test_blocks_one_by_one_give_what_the_whole_model_does(make, form):
    model = make()
    if form == "compact":
        sp.apply(model, manual_plan(model, [[0, 2], [1], [0, 1, 3]]))
    adapter, ids = sp.adapter_for(model), tokens(3, 10)
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[1, :3] = False
    outputs = []
    hook = adapter.blocks()[-1].register_forward_hook(lambda block, args, out: outputs.append(out))
    with torch.no_grad():
        adapter.predict(ids, valid)
    hook.remove()
    expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    stream = BlockStream(adapter, Calibration(ids, ids, ids == 60, valid), batch=2)
    for layer in range(3):
        stream.advance(layer)
    got = torch.cat(stream.hidden)
    torch.testing.assert_close(got[valid], expected[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
def test_linear_modules_are_named_by_role(make):
    model = make()
    adapter = sp.adapter_for(model)
    for layer in range(3):
        linears = adapter.linears(layer)
        weights = adapter.attention_weights(layer)
        assert linears["o"].weight is weights.o
        fused = torch.cat((weights.q, weights.k, weights.v))
        parts = ["qkv"] if "qkv" in linears else ["q", "k", "v"]
        assert torch.equal(torch.cat([linears[role].weight for role in parts]), fused)
        inside = set(adapter.blocks()[layer].modules())
        assert all(module in inside for module in linears.values())
