"""Repair: refitted projections against least squares in the test, and models left whole by a failure."""

import pytest
import torch
from dreams import toy_dream
from hf import build
from refits import CHANNELS, KEPT, MODELS, columns_of, given_and_made, logits, ridge_by_rows, rows_of
from toys import MASK, assert_same_tensors, bits, manual_plan, one_thread, tokens, toy  # noqa: F401
from upstream_twins import llada_twin

import sinkprune as sp
from sinkprune.evidence.calibration import Calibration
from sinkprune.pruning import repacking
from sinkprune.pruning.repair import repaired


@pytest.mark.parametrize("method", ["least_squares", "least_squares_bias"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("which", MODELS)
def test_the_refitted_projections_are_those_of_ridge_regression(which, padded, method):
    model, rows = MODELS[which](), rows_of(padded=padded)
    dense = MODELS[which]()
    plan = manual_plan(model, [KEPT[0], KEPT[1], KEPT[0]], CHANNELS)
    adapter = sp.adapter_for(model)
    with repaired(adapter, plan, rows, method):
        o, down = (adapter.linears(1)[role] for role in ("o", "down"))
        adapter.mask(1, torch.tensor(KEPT[1]), torch.tensor(CHANNELS[1]))
        for linear, role, columns in ((o, "o", columns_of(KEPT[1])), (down, "down", CHANNELS[1])):
            _, y = given_and_made(dense, rows, 1, role)
            x, _ = given_and_made(model, rows, 1, role)  # behind the repair of what comes before
            old = sp.adapter_for(dense).linears(1)[role]
            biased = method == "least_squares_bias" or old.bias is not None  # BERT's have one
            weight, bias = ridge_by_rows(x[:, columns], y, old.weight[:, columns].detach().double(), biased)
            torch.testing.assert_close(linear.weight[:, columns].double(), weight, atol=2e-4, rtol=1e-3)
            assert (linear.bias is None) == (bias is None)
            if bias is not None:
                torch.testing.assert_close(linear.bias.double(), bias, atol=5e-4, rtol=1e-3)
            others = [c for c in range(linear.in_features) if c not in columns]
            assert torch.equal(linear.weight[:, others], old.weight[:, others])
        adapter.mask(1, None, None)


@pytest.mark.parametrize("role", ["o", "down"])
@pytest.mark.parametrize("method", ["least_squares", "least_squares_bias", "bias"])
def test_repair_is_never_worse_than_none_in_the_layers_output_on_its_rows(role, method):
    rows = rows_of()
    for seed in range(3):
        dense, model = toy(seed=seed), toy(seed=seed)
        plan = manual_plan(model, [[0, 3], KEPT[0], KEPT[0]], [CHANNELS[1], None, None])
        adapter = sp.adapter_for(model)
        adapter.mask(0, torch.tensor([0, 3]), torch.tensor(CHANNELS[1]))
        goal = given_and_made(dense, rows, 0, role)[1]
        without = (given_and_made(model, rows, 0, role)[1] - goal).square().sum()
        adapter.mask(0, None, None)
        with repaired(adapter, plan, rows, method):
            adapter.mask(0, torch.tensor([0, 3]), torch.tensor(CHANNELS[1]))
            after = (given_and_made(model, rows, 0, role)[1] - goal).square().sum()
            adapter.mask(0, None, None)
        assert after < without * (1.0 if method == "bias" else 0.95)


def with_twin_heads(make):
    """A model of which heads 1 and 3 of every layer compute what heads 0 and 2 do."""
    model = make()
    adapter = sp.adapter_for(model)
    with torch.no_grad():
        for layer in range(3):
            for role in "qkv":
                linear = adapter.linears(layer)[role]
                for part in (linear.weight, linear.bias):
                    if part is not None:
                        part[8:16], part[24:32] = part[:8], part[16:24]
    return model


@pytest.mark.parametrize(
    "make",
    [toy, lambda: toy_dream(num_key_value_heads=4), llada_twin, lambda: build("bert")],
    ids=["llada", "dream", "live llada", "bert"],
)
def test_heads_that_the_kept_ones_reproduce_are_made_up_for(make):
    model, rows = with_twin_heads(make), rows_of(48, 16)
    expected = logits(model, rows)
    plan = manual_plan(model, [[0, 2], [0, 3], [1, 2]])
    adapter = sp.adapter_for(model)
    with repaired(adapter, plan, rows, ridge=1e-7):
        repacking.install_compact(model, plan)
        repacking.mark(model, plan, "compact")
    torch.testing.assert_close(logits(model, rows), expected, atol=5e-5, rtol=1e-5)
    unseen = rows_of(8, 16, seed=9)
    torch.testing.assert_close(
        logits(model, unseen), logits(with_twin_heads(make), unseen), atol=5e-5, rtol=1e-5
    )
    without = sp.apply(with_twin_heads(make), manual_plan(with_twin_heads(make), [[0, 2], [0, 3], [1, 2]]))
    assert (logits(without, rows) - expected).abs().max() > 0.05


def test_channels_that_the_kept_ones_reproduce_are_made_up_for():
    def twins():
        model = toy()
        with torch.no_grad():
            for block in model.blocks:
                for linear in (block.ff_proj, block.up_proj):
                    linear.weight[1::2] = linear.weight[::2]
        return model

    model, rows = twins(), rows_of(48, 16)
    expected = logits(model, rows)
    plan = manual_plan(model, [KEPT[0]] * 3, [list(range(0, 40, 2))] * 3)
    with repaired(sp.adapter_for(model), plan, rows, ridge=1e-7):
        repacking.install_compact(model, plan)
        repacking.mark(model, plan, "compact")
    torch.testing.assert_close(logits(model, rows), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("which", MODELS)
def test_bias_repair_gives_back_the_means_and_nothing_else(which):
    model, dense, rows = MODELS[which](), MODELS[which](), rows_of()
    plan = manual_plan(model, [[0, 2], KEPT[0], KEPT[0]], [CHANNELS[1], None, None])
    adapter, before = sp.adapter_for(model), sp.adapter_for(dense)
    with repaired(adapter, plan, rows, "bias"):
        for role, kept in (("o", columns_of([0, 2])), ("down", CHANNELS[1])):
            linear, old = adapter.linears(0)[role], before.linears(0)[role]
            assert torch.equal(linear.weight, old.weight)
            if role == "o":  # what reaches the layer is as it was: the removed heads' means come back
                gone = [c for c in range(linear.in_features) if c not in kept]
                x, _ = given_and_made(dense, rows, 0, role)
                expected = old.weight[:, gone].double() @ x[:, gone].mean(0)
                expected += 0 if old.bias is None else old.bias
                torch.testing.assert_close(linear.bias.double(), expected, atol=1e-5, rtol=1e-4)
        for role in ("o", "down"):  # behind each, the mean is the dense layer's
            adapter.mask(0, torch.tensor([0, 2]), torch.tensor(CHANNELS[1]))
            made, goal = (given_and_made(m, rows, 0, role)[1] for m in (model, dense))
            torch.testing.assert_close(made.mean(0), goal.mean(0), atol=1e-5, rtol=1e-4)
            adapter.mask(0, None, None)


@pytest.mark.parametrize("method", ["least_squares_bias", "bias"])
def test_a_layer_without_heads_keeps_the_mean_of_what_it_wrote(method):
    model, rows = toy(), rows_of()
    goal = given_and_made(model, rows, 1, "o")[1].mean(0)
    sp.apply(model, manual_plan(model, [KEPT[0], [], KEPT[0]]), calibration=rows, repair=method)
    torch.testing.assert_close(model.blocks[1].attention.o_proj.bias.double(), goal, atol=1e-5, rtol=1e-4)


def test_layers_before_the_first_that_loses_something_are_left_alone():
    model, rows = toy(), rows_of()
    before = bits(model)
    sp.apply(model, manual_plan(model, [KEPT[0], KEPT[0], [0]]), calibration=rows)
    for layer in range(2):
        assert torch.equal(
            model.blocks[layer].ff_out.weight, before[f"model.transformer.blocks.{layer}.ff_out.weight"]
        )
    assert not torch.equal(model.blocks[2].ff_out.weight, before["model.transformer.blocks.2.ff_out.weight"])
    assert all(block.ff_out.bias is None for block in model.blocks)


def test_nothing_removed_changes_nothing():
    model, rows = toy(), rows_of()
    expected = logits(model, rows)
    sp.apply(model, manual_plan(model, [KEPT[0]] * 3), calibration=rows)
    torch.testing.assert_close(logits(model, rows), expected, atol=1e-6, rtol=1e-5)


def test_what_was_done_is_noted_and_the_plan_itself_is_not_changed():
    model, rows = toy(), rows_of()
    plan = manual_plan(model, KEPT)
    sp.apply(model, plan, calibration=rows, repair="bias")
    assert model.prune_plan.details["repair"] == {
        "method": "bias", "rows": 24, "length": 12, "biases": True,
    }  # fmt: skip
    assert "repair" not in plan.details
    unrepaired = sp.apply(toy(), plan, calibration=rows, repair=None)
    assert "repair" not in unrepaired.prune_plan.details
    assert all(block.ff_out.bias is None for block in unrepaired.blocks)


def fail_in(monkeypatch, where, model):
    """Make the last layer's refit, or the packing after all refits, fail."""
    if where == "packing":
        real = repacking.compact_layer

        def compact_layer(adapter, plan, layer):
            if layer == 2:
                raise RuntimeError("planted")
            return real(adapter, plan, layer)

        monkeypatch.setattr(repacking, "compact_layer", compact_layer)
        return
    from sinkprune.pruning.repair import _Sums

    real_solve, calls = _Sums.solve, []

    def solve(self, module, ridge, **options):
        calls.append(module)
        if len(calls) == 4:  # the last layer's down projection; its output projection is changed already
            raise RuntimeError("planted")
        return real_solve(self, module, ridge, **options)

    monkeypatch.setattr(_Sums, "solve", solve)


@pytest.mark.parametrize("where", ["refit", "packing"])
@pytest.mark.parametrize("which", MODELS)
def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch, which, where):
    model, rows = MODELS[which](), rows_of(6)
    before, expected = bits(model), logits(model, rows)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    fail_in(monkeypatch, where, model)
    with pytest.raises(RuntimeError, match="planted"):
        sp.apply(model, manual_plan(model, KEPT, CHANNELS), calibration=rows)
    assert_same_tensors(model.state_dict(), before)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert sp.adapter_for(model).form == "dense"
    assert torch.equal(logits(model, rows), expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_error_inside_the_with_puts_everything_back():
    model, rows = toy(include_bias=True), rows_of(6)
    before, expected = bits(model), logits(model, rows)
    with pytest.raises(KeyboardInterrupt), repaired(sp.adapter_for(model), manual_plan(model, KEPT), rows):
        assert not torch.equal(
            model.blocks[1].attn_out.weight, before["model.transformer.blocks.1.attn_out.weight"]
        )
        raise KeyboardInterrupt
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(logits(model, rows), expected)


def test_a_failure_with_low_memory_tells_its_own_cause(monkeypatch):
    model = toy()
    fail_in(monkeypatch, "packing", model)
    with pytest.raises(RuntimeError, match="planted"):
        sp.apply(model, manual_plan(model, KEPT), calibration=rows_of(6), low_memory=True)
    assert model.blocks[2].kept_heads is None


def test_low_memory_gives_the_same_model():
    rows = rows_of(6)
    one, two = (
        sp.apply(toy(), manual_plan(toy(), KEPT, CHANNELS), calibration=rows, low_memory=low)
        for low in (False, True)
    )
    assert_same_tensors(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("where", ["embedding", "middle"])
def test_activations_that_are_not_finite_are_refused_and_the_model_is_as_it_was(where):
    model, rows = toy(), rows_of(6)
    with torch.no_grad():
        name = "wte" if where == "embedding" else None
        tensor = model.model["transformer"]["wte"].weight[:, 1] if name else model.blocks[2].up_proj.weight[3]
        tensor.fill_(float("nan"))
    before = bits(model)
    with pytest.raises(ValueError, match=r"layer [12]: activations are not finite; nothing was repaired"):
        sp.apply(model, manual_plan(model, KEPT), calibration=rows)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k].nan_to_num(7), before[k].nan_to_num(7)) for k in before)


@pytest.mark.parametrize("method", ["least_squares", "least_squares_bias"])
@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["heads", "and channels"])
@pytest.mark.parametrize("which", MODELS)
def test_a_repaired_model_saves_and_loads(tmp_path, which, channels, method):
    model, rows = MODELS[which](), rows_of(6)
    sp.apply(model, manual_plan(model, KEPT, channels), calibration=rows, repair=method)
    expected = logits(model, rows)
    back, _ = sp.load(sp.save(model, tmp_path / "m"))
    torch.testing.assert_close(logits(back, rows), expected, atol=2e-5, rtol=1e-4)
    assert back.prune_plan.details["repair"]["method"] == method
    again, _ = sp.load(sp.save(back, tmp_path / "again"))
    assert_same_tensors(again.state_dict(), back.state_dict())


def test_a_checkpoint_from_before_repairs_without_biases_still_loads(tmp_path):
    model, rows = toy(), rows_of(6)
    sp.apply(model, manual_plan(model, KEPT), calibration=rows, repair="least_squares_bias")
    expected = logits(model, rows)
    model.prune_plan.details["repair"] = {
        "method": "least_squares",
        "rows": 6,
        "length": 12,
    }  # as it was noted
    back, _ = sp.load(sp.save(model, tmp_path / "m"))
    torch.testing.assert_close(logits(back, rows), expected, atol=2e-5, rtol=1e-4)


def test_a_bias_that_no_repair_added_is_still_refused(tmp_path):
    model, rows = toy(), rows_of(6)
    sp.apply(model, manual_plan(model, KEPT), calibration=rows, repair="least_squares_bias")
    model.prune_plan = manual_plan(toy(), KEPT)
    with pytest.raises(ValueError, match=r"read this model back: .*bias has shape \(32,\), and None"):
        sp.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["least_squares", "least_squares_bias", "bias"])
@pytest.mark.parametrize("family", MODELS)
def test_the_plan_of_a_repaired_model_serves_one_that_is_not_repaired(tmp_path, family, method):
    """Its note of the repair is of the model it was taken from: what is saved loads with the same tensors."""
    rows = rows_of(6)
    repaired_one = sp.apply(
        MODELS[family](), manual_plan(MODELS[family](), KEPT), calibration=rows, repair=method
    )
    plain = sp.apply(MODELS[family](), manual_plan(MODELS[family](), KEPT))
    for form in ("compact", "mask"):
        model = sp.apply(MODELS[family](), repaired_one.prune_plan, mode=form)
        assert "repair" not in model.prune_plan.details
        torch.testing.assert_close(logits(model, rows), logits(plain, rows), atol=2e-5, rtol=1e-4)
        back, _ = sp.load(sp.save(model, tmp_path / form))
        assert "repair" not in back.prune_plan.details
        torch.testing.assert_close(logits(back, rows), logits(model, rows), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["least_squares", "least_squares_bias"])
@pytest.mark.parametrize("family", MODELS)
def test_a_state_is_loaded_into_a_model_that_its_plan_was_laid_out_on(family, method):
    """As a run that resumes does, which has the plan and the state but not the weights of before."""
    rows = rows_of(6)
    trained = sp.apply(
        MODELS[family](), manual_plan(MODELS[family](), KEPT, CHANNELS), calibration=rows, repair=method
    )
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    plan = sp.PrunePlan.from_dict(trained.prune_plan.to_dict())
    again = MODELS[family]()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.neg_()
    sp.lay_out(again, plan).load_state_dict(trained.state_dict())
    assert torch.equal(logits(again, rows), logits(trained, rows))
    assert again.prune_plan == trained.prune_plan
    with pytest.raises(ValueError, match=r"already pruned \(compact form\): lay the plan out on the dense"):
        sp.lay_out(again, plan)


def test_a_plan_is_laid_out_whole_or_not_at_all():
    model, rows = toy(), rows_of(6)
    made = sp.apply(toy(), manual_plan(toy(), KEPT), calibration=rows, repair="least_squares_bias")
    before = bits(model)
    with pytest.raises(ValueError, match="for another geometry"):
        sp.lay_out(model, manual_plan(toy(n_layers=2), KEPT[:2]))

    def fail(*_):
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repacking, "install_compact", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            sp.lay_out(model, made.prune_plan)
    assert_same_tensors(bits(model), before)
    assert sp.adapter_for(model).form == "dense"


@pytest.mark.parametrize("which", ["llada", "qwen3"])
def test_a_model_repaired_by_default_exports(tmp_path, which):
    model, rows = MODELS[which](), rows_of(6)
    sp.apply(model, manual_plan(model, [KEPT[0]] * 3, [CHANNELS[1]] * 3), calibration=rows)
    back, _ = sp.load(sp.export(model, tmp_path / "out"))
    torch.testing.assert_close(logits(back, rows), logits(model, rows), atol=1e-5, rtol=1e-4)


def test_an_export_with_room_for_the_biases_computes_the_same(tmp_path):
    model, rows = build("bert"), rows_of(6)
    sp.apply(model, manual_plan(model, [KEPT[0]] * 3, [CHANNELS[1]] * 3), calibration=rows)
    back, _ = sp.load(sp.export(model, tmp_path / "out"))
    torch.testing.assert_close(logits(back, rows), logits(model, rows), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("repair", ["least_squares", "bias"])
def test_the_mask_form_takes_no_repair(repair):
    model, rows = toy(), rows_of(6)
    before = bits(model)
    with pytest.raises(ValueError, match="the mask form leaves as they are: repair=None"):
        sp.apply(model, manual_plan(model, KEPT), mode="mask", calibration=rows, repair=repair)
    assert_same_tensors(model.state_dict(), before)
    sp.apply(model, manual_plan(model, KEPT), mode="mask", calibration=rows, repair=None)
    assert sp.adapter_for(model).form == "mask"


def test_an_unknown_repair_is_refused_before_anything_changes():
    model, rows = toy(), rows_of(6)
    before = bits(model)
    with pytest.raises(ValueError, match=r"repair must be one of .*'bias'\) or None, got 'ls'"):
        sp.apply(model, manual_plan(model, KEPT), calibration=rows, repair="ls")
    assert_same_tensors(model.state_dict(), before)
    assert sp.adapter_for(model).form == "dense"


def test_half_precision_is_refitted_in_its_own_dtype():
    model, rows = toy().bfloat16(), rows_of(12)
    sp.apply(model, manual_plan(model, KEPT, CHANNELS), calibration=rows)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model, rows)).all()


def test_fewer_tokens_than_columns_rely_on_the_ridge_and_are_warned_of():
    model = toy()
    rows = rows_of(1, 5, padded=False)
    with pytest.warns(UserWarning, match="5 calibration tokens for 16 columns of layer 1"):
        sp.apply(model, manual_plan(model, KEPT), calibration=rows)
    assert torch.isfinite(logits(model, rows_of(4))).all()


def alike_rows():
    ids = tokens(1, 1).expand(24, 12).contiguous()
    return Calibration(ids, ids, ids == MASK, None)


def test_rows_that_are_all_alike_leave_a_repair_about_as_good_as_none():
    unseen, plan = (
        rows_of(24, 12, padded=False, seed=8),
        manual_plan(toy(), [[0, 1, 3], [0, 2, 3], [1, 2, 3]]),
    )
    goal = logits(toy(), unseen)
    without = (logits(sp.apply(toy(), plan), unseen) - goal).square().mean()
    after = (logits(sp.apply(toy(), plan, calibration=alike_rows()), unseen) - goal).square().mean()
    assert after < 1.5 * without


def test_with_a_bias_rows_that_are_all_alike_say_nothing_of_the_weights():
    """Their spread is rounding noise: a ridge that is a share of it would be none."""
    model, plan = toy(), manual_plan(toy(), [[0, 1, 3], [0, 2, 3], [1, 2, 3]])
    before = sp.apply(toy(), plan).blocks[0].attention.o_proj.weight
    sp.apply(model, plan, calibration=alike_rows(), repair="least_squares_bias")
    torch.testing.assert_close(model.blocks[0].attention.o_proj.weight, before, atol=5e-3, rtol=0)
