"""Plans made for a target: what it needs is kept to exactly, the cost is said, and the result runs there."""

import pytest
import torch
from block_causals import toy_llada2, toy_sdar
from dreams import toy_dream
from exports import MODELS
from hf import build
from llama_cpp import opened
from toys import one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.checkpoints.checkpoint import texts
from sinkprune.commands.main import main
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria import criterion_for
from sinkprune.planning.fits import cost_text
from sinkprune.planning.planner import scores_of
from sinkprune.targets import TARGETS, fit_for


def planned(model, fit, **changes):
    return sp.plan(model, criterion="random", fit=fit, **{"ratio": 0.38, "seed": 1} | changes)


def counts(plan):
    """Query heads, and key/value heads in use, of every layer."""
    of = plan.geometry
    return (
        [len(layer.kept_heads) for layer in plan.layers],
        [len(of.kv_heads_used(i, layer.kept_heads)) for i, layer in enumerate(plan.layers)],
    )


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.38, 0.5])
@pytest.mark.parametrize(
    ("make", "fit"),
    [(lambda: toy(n_heads=8, n_kv_heads=8), "llama.cpp"), (lambda: toy(n_heads=8, n_kv_heads=4), "llama.cpp"),
     (toy_sdar, "sglang"), (toy_sdar, "lmdeploy"), (toy_llada2, "sglang"),
     (lambda: build("qwen3"), "llama.cpp")],
    ids=["llada", "llada, groups", "sdar", "sdar, lmdeploy", "llada2", "qwen3"],
)  # fmt: skip
def test_a_target_that_needs_equal_layers_gets_as_many_heads_in_each_to_the_nearest(make, fit, ratio):
    plan = planned(make(), fit, ratio=ratio)
    heads, kv_heads = counts(plan)
    all_heads, groups = plan.geometry.heads[0], plan.geometry.kv_heads[0]
    assert len(set(heads)) == len(set(kv_heads)) == 1 and plan.allocation == "equal"
    unit = all_heads // groups
    allowed = [all_heads - unit * k for k in range(groups)]
    assert heads[0] == min(allowed, key=lambda n: (abs(all_heads - n - ratio * all_heads), n))


def test_uniform_counts_were_not_exact_before():
    model = toy(n_heads=8, n_kv_heads=8)
    assert counts(sp.plan(model, criterion="random", ratio=0.3, allocation="uniform"))[0] == [5, 6, 6]
    assert counts(planned(model, "llama.cpp", ratio=0.3))[0] == [6, 6, 6]


def test_equal_layers_lose_their_own_weakest_heads():
    model = toy(n_heads=8, n_kv_heads=8)
    plan = sp.plan(model, criterion="magnitude", ratio=0.375, allocation="equal")
    by_one_layer = [
        sp.plan(model, criterion="magnitude", ratio=0.375, allocation="uniform").layers[i].kept_heads
        for i in range(3)
    ]
    assert [layer.kept_heads for layer in plan.layers] == by_one_layer


@pytest.mark.parametrize("fit", ["transformers", "llama.cpp", "vllm"])
def test_where_layers_may_differ_only_whole_groups_go(fit):
    plan = planned(toy_dream(num_attention_heads=8, num_key_value_heads=4), fit, ratio=0.4, seed=2)
    heads, kv_heads = counts(plan)
    assert heads == [2 * n for n in kv_heads] and len(set(heads)) > 1


def test_another_architecture_of_llama_cpp_may_be_asked_for():
    plan = planned(toy(n_heads=8, n_kv_heads=8), "llama.cpp:arch=deci", ratio=0.4, seed=2)
    assert len(set(counts(plan)[0])) > 1 and plan.details["fit"]["target"] == "llama.cpp (deci)"
    assert fit_for("llama.cpp:arch=llada", "llada").equal
    with pytest.raises(ValueError, match=r"arch=llada\|deci; got 'arch=qwen3'"):
        fit_for("llama.cpp:arch=qwen3", "llada")


@pytest.mark.parametrize("tp", [2, 4])
def test_heads_groups_and_channels_divide_by_the_ranks(tp):
    model = toy(d_model=64, n_heads=16, n_kv_heads=8)
    plan = planned(model, f"vllm:tp={tp}", ratio=0.4, unit="parameters", targets=("heads", "mlp"))
    heads, kv_heads = counts(plan)
    channels = [len(layer.kept_channels) for layer in plan.layers]
    assert min(heads) < 16 and min(channels) < 40
    assert not any(size % tp for size in (*heads, *kv_heads, *channels))


@pytest.mark.parametrize(
    ("targets", "ratio"), [(("experts",), 0.15), (("heads", "experts", "expert_channels"), 0.4)]
)
@pytest.mark.parametrize("fit", ["sglang:tp=2", "transformers:tp=2"])
def test_experts_are_as_many_in_every_group_of_every_router_and_their_channels_divide_by_the_ranks(
    fit, targets, ratio
):
    model = toy_llada2()
    settings = {"unit": "parameters", "expert_rule": "random"}
    plan = planned(model, fit, ratio=ratio, targets=targets, **settings)
    experts = plan.geometry.experts
    counted, widths = set(), set()
    for layer, count in zip(plan.layers, experts.count, strict=True):
        if count:
            group = count // experts.groups
            kept = range(count) if layer.kept_experts is None else layer.kept_experts
            counted |= {sum(expert // group == i for expert in kept) for i in range(experts.groups)}
            widths |= {len(ids) for ids in layer.kept_expert_channels or ()}
    assert len(counted) == 1 and counted < set(range(1, group))
    assert not any(width % 2 for width in widths) and (len(widths) == 1) == ("expert_channels" in targets)


@pytest.mark.parametrize(("spec", "rows"), [("llama.cpp", 256), ("llama.cpp:rows=32", 32)])
def test_channels_come_in_the_multiples_that_quantised_rows_need(spec, rows):
    model = toy(mlp_hidden_size=1024)
    plan = planned(model, spec, ratio=0.3, unit="parameters", targets=("heads", "mlp"))
    channels = {len(layer.kept_channels) for layer in plan.layers}
    assert len(channels) == 1 and not min(channels) % rows and min(channels) < 1024


def test_the_plan_says_what_the_fit_cost_against_an_independent_sum():
    model = toy(n_heads=8, n_kv_heads=8)
    fitted = sp.plan(model, criterion="magnitude", ratio=0.3, fit="llama.cpp")
    free = sp.plan(model, criterion="magnitude", ratio=6 / 24)
    assert fitted.heads_removed == free.heads_removed == 6
    cost = fitted.details["fit"]
    scores = scores_of(criterion_for("magnitude"), sp.adapter_for(model), Evidence(None, None, 0))
    for plan, key in ((fitted, "score_removed"), (free, "score_removed_without")):
        gone = sum(
            scores[i, h] for i, layer in enumerate(plan.layers) for h in range(8) if h not in layer.kept_heads
        )
        assert cost[key] == pytest.approx(float(gone), rel=1e-5)
    assert cost["score_removed"] > cost["score_removed_without"]
    assert (cost["ratio_asked"], cost["ratio"], cost["heads"]) == (0.3, 0.25, [6])
    assert "6 query heads a layer; 25.0 % goes where 30.0 % was asked" in cost_text(cost)
    assert sp.PrunePlan.from_dict(fitted.to_dict()) == fitted


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (toy, {"fit": "tensorrt"}, "fit must be one of llama.cpp, transformers, sglang, vllm, lmdeploy"),
        (toy, {"fit": "sglang"}, "sglang 0.5.23 runs llada2_moe, sdar; it has nothing for llada"),
        (toy_sdar, {"fit": "sglang:tp=0"}, "takes tp=N and rows=N, N at least 1; got"),
        (toy_sdar, {"fit": "sglang:ep=2"}, "takes tp=N and rows=N, N at least 1; got"),
        (toy_sdar, {"fit": "sglang:tp=4"}, "out of reach"),
        (MODELS["llada_moe"], {"fit": "llama.cpp"}, "no heads can go: its llada-moe wants heads side by"),
        (toy, {"fit": "llama.cpp", "criterion": "random", "whole_layers": True}, "none can lose all"),
        (toy, {"fit": "llama.cpp", "target_speedup": 1.2}, "takes a ratio"),
    ],
)  # fmt: skip
def test_what_no_plan_can_fit_is_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        sp.plan(make(), **{"criterion": "random", "ratio": 0.5} | changes)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_planned_for_a_target_is_exported_to_it(tmp_path, target):
    for which in ("llada", "llada, groups", "dream", "sdar", "llada2", "rnd1", "qwen3", "llama, biases"):
        model = MODELS[which]()
        family = sp.adapter_for(model).family
        if family not in TARGETS[target].families or (which, target) in OWN_WAY:
            continue
        plan = planned(model, target, ratio=0.5, seed=4)
        out = sp.export(sp.apply(model, plan), tmp_path / which, to=target)
        back, _ = sp.load(out)
        expected = model(tokens(1, 8)).logits
        assert (back(tokens(1, 8)).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


OWN_WAY = {("llada2", "transformers"), ("rnd1", "vllm")}  # uneven layers, and experts, have no form there


def test_tiny_goes_from_plan_to_llama_cpp_with_its_loss(tmp_path, capsys):
    """The command line, as README shows it; the same nats per masked token from llama.cpp's own code."""
    plan, pruned, file = (str(tmp_path / name) for name in ("plan.json", "pruned", "tiny.gguf"))
    rows = ["--calibration-windows", "8", "--calibration-length", "64", "--quiet"]
    assert main(["plan", "tiny", "--fit", "llama.cpp", "--out", plan, *rows]) == 0
    assert main(["apply", "tiny", "--plan", plan, "--out", pruned, *rows]) == 0
    assert main(["export", pruned, "--to", "gguf", "--out", file]) == 0
    told = capsys.readouterr().out
    assert "to fit llama.cpp (llada): 5 query heads a layer" in told and f"wrote {file}" in told
    model, tokenizer = sp.load(pruned)
    text = texts("held_out")
    test = sp.calibrate(model, text, tokenizer=tokenizer, sequences=4, length=64, seed=5)
    with opened(file, 64) as peer, torch.no_grad():
        assert peer.is_diffusion and peer.metadata("llada.attention.head_count") == "5"
        assert peer.tokenize(text[:2000]) == tokenizer.encode(text[:2000], add_special_tokens=False)
        theirs = torch.stack([peer.logits(row) for row in test.ids])[test.masked]
        ours = model(test.ids).logits[test.masked]
    nats = [torch.nn.functional.cross_entropy(t, test.targets[test.masked]).item() for t in (ours, theirs)]
    assert abs(nats[0] - nats[1]) < 1e-3
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()
