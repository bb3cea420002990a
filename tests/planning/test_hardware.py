"""Roofs: measured once a device and kept whole on the disk; ceilings from bytes as well as FLOPs."""

import json

import pytest
import torch
from toys import manual_plan, one_thread, toy  # noqa: F401

import sinkprune as sp
from sinkprune.planning import hardware
from sinkprune.planning.costs import step_flops, step_operations, step_seconds
from sinkprune.planning.hardware import Roofs
from sinkprune.plans import Geometry, LayerPlan, PrunePlan

LLADA = Geometry("llada", 4096, 128, 126464, 4096, (32,) * 32, (32,) * 32, (12288,) * 32)


def flat(rate, bandwidth):
    return Roofs("flat", {"bfloat16": rate, "float32": rate}, bandwidth, "data sheet")


def test_roofs_are_measured_once_and_read_back(tmp_path, monkeypatch):
    calls = []
    small = hardware.measure
    monkeypatch.setattr(
        hardware, "measure", lambda device: calls.append(device) or small(device, elements=1 << 16, size=64)
    )
    path = tmp_path / "deep" / "roofs.json"
    first = hardware.roofs("cpu", path=path)
    assert hardware.roofs("cpu", path=path) == first
    assert len(calls) == 1
    assert first.bandwidth > 1e6 and first.peak(torch.float32) > 1e6 and first.source == "measured"
    assert [p.name for p in path.parent.iterdir()] == ["roofs.json"]
    hardware.roofs("cpu", path=path, again=True)
    assert len(calls) == 2
    path.write_text("{half a fi")
    with pytest.warns(UserWarning, match="is ignored and measured again"):
        assert hardware.roofs("cpu", path=path).flops
    assert json.loads(path.read_text())["schema"] == 1


def test_the_file_is_named_for_the_device_under_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hardware.cache_path("NVIDIA H100 80GB") == tmp_path / "sinkprune" / "roofs-NVIDIA-H100-80GB.json"
    monkeypatch.setattr(hardware, "measure", lambda device: flat(1e9, 1e9))
    assert hardware.roofs("cpu") == flat(1e9, 1e9)
    assert len(list((tmp_path / "sinkprune").glob("roofs-*threads.json"))) == 1


def test_data_sheets_and_what_they_do_not_cover():
    h100 = hardware.roofs("H100")
    assert (h100.peak(torch.bfloat16), h100.bandwidth, h100.multiprocessors) == (989e12, 3.35e12, 132)
    assert hardware.data_sheet("H200").bandwidth == 4.8e12
    assert hardware.data_sheet("A100").peak(torch.float32) == 19.5e12
    with pytest.raises(ValueError, match="data sheets are known of A100, H100, H200, not of 'B300'"):
        hardware.data_sheet("B300")
    with pytest.raises(ValueError, match="the roofs of H100 cover bfloat16, float16, float32, not float64"):
        h100.peak(torch.float64)
    with pytest.raises(ValueError, match="roofs are of cpu, cuda, cuda:N, A100, H100, H200, not of 'abacus'"):
        hardware.roofs("abacus")
    with pytest.raises(RuntimeError, match="there is no device cuda:77"):
        hardware.roofs("cuda:77")


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}], ids=["mha", "gqa"])
def test_the_operations_do_the_counted_flops(changes):
    model = toy(**changes)
    plan = manual_plan(model, [[0, 2], [1], []], [None, [1, 2, 3], list(range(20))])
    for chosen in (None, plan):
        operations = step_operations(plan.geometry, chosen, 3, 50)
        assert sum(o.flops for o in operations) == step_flops(plan.geometry, chosen, 3, 50)


def test_bytes_of_a_dense_step_are_those_of_its_tensors():
    """Every matrix of the model once, and each product's input and output."""
    model = toy()
    d, f, v, layers, rows = 32, 40, 61, 3, 2 * 10
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "wte" not in n)
    per_layer = (d + 3 * d) + (3 * d + d) + (d + d) + (d + 2 * f) + (f + d)
    got = sum(o.elements for o in step_operations(sp.adapter_for(model).geometry(), None, 2, 10))
    assert got == matrices + rows * (layers * per_layer + d + v)


def test_without_a_memory_roof_the_ceiling_is_the_flops_one():
    model = toy()
    plan = manual_plan(model, [[0, 2], [1], [0, 1, 3]])
    roofs = flat(1e9, float("inf"))
    assert sp.ceiling(model, plan, 2, 40, roofs) == pytest.approx(sp.ceiling(model, plan, 2, 40))


def test_a_few_tokens_wait_for_their_weights():
    """One token of LLaDA-8B reads every weight for one multiply-add each: time is bytes over bandwidth."""
    roofs = hardware.data_sheet("H100")
    weights = sum(o.elements for o in step_operations(LLADA, None, 1, 1)) * 2
    assert step_seconds(LLADA, None, 1, 1, roofs, torch.bfloat16) == pytest.approx(weights / 3.35e12)
    flops = step_flops(LLADA, None, 1, 1024)
    assert step_seconds(LLADA, None, 1, 1024, roofs, torch.bfloat16) == pytest.approx(
        flops / 989e12, rel=0.05
    )


def test_half_the_heads_of_llada_give_what_arithmetic_says():
    """By hand, at 1,024 tokens: attention 4.95e12 FLOPs, MLP 9.90e12, head 1.06e12."""
    plan = PrunePlan(LLADA, "", [LayerPlan(list(range(16)))] * 32)
    assert sp.ceiling(LLADA, plan, 1, 1024) == pytest.approx(1.187, abs=0.01)
    assert 1 < sp.ceiling(LLADA, plan, 1, 1024, hardware.data_sheet("H100")) < 1.25
    assert sp.ceiling(LLADA, plan, 1, 8, hardware.data_sheet("H100")) == pytest.approx(
        sp.ceiling(LLADA, plan, 1, 1), rel=0.05
    )


def test_both_ceilings_are_told_before_anything_is_pruned(tmp_path, monkeypatch, capsys):
    from sinkprune.commands.main import main

    monkeypatch.setattr(hardware, "measure", lambda device: flat(1e11, 1e10))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["plan", "tiny", "--criterion", "random", "--length", "64", "--out", str(tmp_path / "p.json")]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    model, _ = sp.load("tiny")
    plan = PrunePlan.load(tmp_path / "p.json")
    assert told["ceilings"]["arithmetic"] == told["ceiling"] == sp.ceiling(model, plan, 1, 64)
    assert told["ceilings"]["with_roofs"] == sp.ceiling(model, plan, 1, 64, flat(1e11, 1e10))
    assert main([*arguments, "--overwrite", "--roofs", "H100"]) == 0
    h100 = sp.ceiling(model, plan, 1, 64, hardware.data_sheet("H100"))
    line = f"at most {told['ceiling']:.2f}x at 1 x 64 tokens (arithmetic), {h100:.2f}x with the roofs of H100"
    assert line in capsys.readouterr().out
    assert main([*arguments, "--overwrite", "--roofs", "abacus"]) == 2
