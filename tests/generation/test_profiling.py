"""Sink statistics of real trajectories against materialised attention, and the manners of ``track``."""

import json

import pytest
import torch
from block_causals import toy_llada2, toy_sdar
from layer_twins import sdar_twin
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import (  # noqa: F401
    MASK,
    WordTokenizer,
    forward_of,
    manual_plan,
    one_thread,
    tokens,
    toy,
)

import sinkprune as sp
from sinkprune.adapters import adapter_for
from sinkprune.evidence.sinks import SinkGate

NAMES = ["steps_counted", "position_mean", "position_variance", "position_range", "moves", "mean_move"]
SIZES = {"steps": 5, "gen_length": 10}


def sink_of_each_step(model, inputs, valid, gate):
    """Per step: position, mass, margin, fair shares, stands out; ``[layers, samples, heads]`` each."""
    for ids in inputs:
        attention = []
        forward_of(model, ids, valid, attention)
        step = []
        for row, probabilities in enumerate(attention):  # [layers, heads, L, L]
            seen = torch.ones(ids.shape[1], dtype=torch.bool) if valid is None else valid[row].bool()
            mass = probabilities[:, :, seen].mean(2)
            held = mass[:, :, seen]
            top, second = mass.topk(2, dim=-1).values.unbind(-1)
            mean, deviation = held.mean(-1), held.std(-1, correction=0)
            shares = top * seen.sum()
            stands_out = (shares >= gate.fair_share) & (top > mean + gate.sigma * deviation)
            step.append((mass.argmax(-1).double(), top, top - second, shares, stands_out.double()))
        yield [torch.stack(values, 1) for values in zip(*step, strict=True)]


def expected_statistics(model, inputs, valid=None, gate=None):
    """The statistics that a profile holds, by two passes over the kept steps."""
    steps = list(sink_of_each_step(model, inputs, valid, gate or SinkGate()))
    position, mass, margin, shares, stands_out = (torch.stack(values) for values in zip(*steps, strict=True))
    result = {"mass": mass.mean(0), "margin": margin.mean(0), "fair_shares": shares.mean(0)}
    for prefix, counted in (("", torch.ones_like(stands_out)), ("gated_", stands_out)):
        blank = torch.full(position.shape[1:], torch.nan, dtype=torch.float64)
        values = {name: blank.clone() for name in NAMES}
        for where in torch.cartesian_prod(*(torch.arange(n) for n in blank.shape)).tolist():
            i = tuple(where)
            p = position[(slice(None), *i)][counted[(slice(None), *i)].bool()]
            moved = p.diff().abs()
            values["steps_counted"][i], values["moves"][i] = len(p), (moved > 0).sum()
            if len(p):
                values["position_mean"][i], values["position_variance"][i] = p.mean(), p.var(correction=0)
                values["position_range"][i] = p.max() - p.min()
                values["mean_move"][i] = moved.mean() if len(moved) else 0.0
        result |= {prefix + name: value for name, value in values.items()}
    return result, position, mass


def inputs_of(model, prompt, valid=None, **options):
    """What the model read at each step of the sampler."""
    states = list(sp.denoise(model, prompt, valid, **options))
    canvas = torch.full((len(prompt), options["gen_length"]), MASK)
    return [torch.cat((prompt, canvas), 1), *states[:-1]]


def assert_statistics(got, expected, names=None):
    for name in names or expected:
        torch.testing.assert_close(
            got[name].double(),
            expected[name],
            atol=2e-5,
            rtol=1e-4,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.fixture(scope="module")
def model():
    return toy(seed=1, sharpness=4.0, n_kv_heads=2)


@pytest.fixture(scope="module")
def profiled(model):
    return sp.profile(model, tokens(3, 6), batch=2, **SIZES)


def test_a_profile_equals_statistics_of_materialised_attention(model, profiled):
    prompt = tokens(3, 6)
    expected, position, mass = expected_statistics(model, inputs_of(model, prompt, **SIZES))
    gated = expected["gated_steps_counted"]
    assert (gated == 0).any() and (gated > 1).any() and (expected["moves"] > 0).any()  # the toy shows it all
    assert profiled.statistics.keys() == expected.keys()
    assert_statistics(profiled.statistics, expected)
    assert torch.equal(profiled.trace_positions.double(), position[:, :, 0])
    torch.testing.assert_close(profiled.trace_mass.double(), mass[:, :, 0], atol=1e-3, rtol=1e-3)


def test_padded_prompts_give_the_statistics_of_their_valid_tokens(model):
    ids, valid = torch.tensor([[0, 0, 0, 4, 9], [7, 8, 2, 11, 30]]), torch.ones(2, 15, dtype=torch.long)
    valid[0, :3] = 0
    texts = ["w4 w9", "w7 w8 w2 w11 w30"]
    got = sp.profile(model, texts, tokenizer=WordTokenizer(), **SIZES)
    inputs = inputs_of(model, ids, valid[:, :5], **SIZES)
    expected, _, _ = expected_statistics(model, inputs, valid)
    for name in ("position_mean", "gated_position_mean"):  # positions count from a sample's first token
        expected[name] = expected[name] - torch.tensor([3, 0])[:, None]
    assert_statistics(got.statistics, expected)


def test_guidance_profiles_the_conditional_half_only(model):
    prompt, options = tokens(2, 4), {**SIZES, "cfg_scale": 2.0}
    got = sp.profile(model, prompt, **options)
    expected, _, _ = expected_statistics(model, inputs_of(model, prompt, **options))
    assert_statistics(got.statistics, expected)
    assert got.settings["cfg_scale"] == 2.0


def test_the_gate_is_the_one_asked_for(model):
    prompt, gate = tokens(2, 6), SinkGate(fair_share=2.0, sigma=1.0)
    expected, _, _ = expected_statistics(model, inputs_of(model, prompt, **SIZES), gate=gate)
    loose = sp.profile(model, prompt, gate=gate, **SIZES)
    assert_statistics(loose.statistics, expected)
    strict = sp.profile(model, prompt, **SIZES)
    more, fewer = (p.statistics["gated_steps_counted"].sum() for p in (loose, strict))
    assert more > fewer
    assert loose.settings["gate"] == {"fair_share": 2.0, "sigma": 1.0}


def test_statistics_do_not_depend_on_what_runs_beside_a_prompt(model):
    texts = ["w4 w9", "w7 w8 w2 w11 w30", "w3 w3 w3"]
    alone, together = (
        sp.profile(model, texts, tokenizer=WordTokenizer(), batch=batch, **SIZES).statistics
        for batch in (1, 3)
    )
    for name in together:
        torch.testing.assert_close(together[name], alone[name], atol=2e-5, rtol=1e-4, equal_nan=True)


def test_tracking_does_not_change_what_is_generated(model):
    prompt = tokens(2, 4)
    plain = list(sp.denoise(model, prompt, **SIZES))
    with sp.track(model):
        tracked = list(sp.denoise(model, prompt, **SIZES))
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))


def test_every_second_forward_can_be_skipped(model):
    inputs = inputs_of(model, tokens(2, 4), **SIZES)
    with sp.track(model, every=2) as tracker:
        for ids in inputs:
            model(ids)
    assert tracker.steps == len(inputs)
    expected, _, _ = expected_statistics(model, inputs[::2])
    got = tracker.result()
    torch.testing.assert_close(got.mass.double(), expected["mass"], atol=2e-5, rtol=1e-4)
    assert torch.equal(got.position.count.double(), expected["steps_counted"])


def test_reset_forgets_the_steps_before_it(model):
    first, second = tokens(1, 12), tokens(1, 12, seed=5)
    with sp.track(model) as tracker:
        model(first)
        tracker.reset()
        model(second)
    expected, _, _ = expected_statistics(model, [second])
    torch.testing.assert_close(tracker.result().mass.double(), expected["mass"], atol=2e-5, rtol=1e-4)
    assert tracker.steps == 1


def hooks(model):
    adapter = adapter_for(model)
    return adapter.observed(), len(model._forward_hooks), [len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_track_leaves_the_model_as_it_was_also_after_an_exception(form):
    model = toy()
    if form != "dense":
        sp.apply(model, manual_plan(model, [[0, 2], [1], [0, 1, 3]]), mode=form)
    before, ids = hooks(model), tokens(1, 5)
    with sp.track(model):
        model(ids)
    assert hooks(model) == before
    with pytest.raises(KeyError, match="from inside"), sp.track(model):
        model(ids)
        raise KeyError("from inside")
    assert hooks(model) == before
    with sp.track(model):  # and it can be tracked again
        model(ids)


def test_nested_tracks_are_refused_and_the_outer_one_goes_on(model):
    with sp.track(model) as tracker:
        model(tokens(1, 5))
        with pytest.raises(RuntimeError, match="being tracked already"), sp.track(model):
            pass
        model(tokens(1, 5))
    assert tracker.result().position.count.unique().tolist() == [2.0]


def test_a_compiled_model_is_refused(model):
    with pytest.raises(RuntimeError, match="the model is compiled"), sp.track(torch.compile(model)):
        pass


def test_track_says_what_it_cannot_do(model):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"), sp.track(model, every=0):
        pass
    with sp.track(model) as tracker:
        pass
    with pytest.raises(RuntimeError, match="nothing was tracked"):
        tracker.result()
    with pytest.raises(ValueError, match="must have 2 samples"), sp.track(model):
        model(tokens(2, 5))
        model(tokens(3, 5))
    with pytest.raises(ValueError, match="must have 4 samples"), sp.track(model, samples=4):
        model(tokens(3, 5))
    assert not adapter_for(model).observed()


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_masked_and_compact_models_have_the_same_statistics_per_kept_head(kv_heads):
    kept = [[0, 2], [1], [0, 1, 3]]
    profiles = {}
    for form in ("mask", "compact"):
        model = toy(seed=2, sharpness=4.0, n_kv_heads=kv_heads)
        sp.apply(model, manual_plan(model, kept), mode=form)
        profiles[form] = sp.profile(model, tokens(2, 6), **SIZES)
    mask, compact = profiles["mask"], profiles["compact"]
    for name, values in compact.statistics.items():
        for layer, heads in enumerate(kept):
            got = values[layer, :, : len(heads)]
            columns = [mask.heads[layer].index(head) for head in heads]
            torch.testing.assert_close(
                got, mask.statistics[name][layer][:, columns], atol=2e-5, rtol=1e-4, equal_nan=True
            )
    assert [[h[i] for i in range(len(h))] for h in compact.heads] == kept
    assert compact.statistics["steps_counted"][1, :, 0].tolist() == [5.0, 5.0]
    # figures over heads speak of the heads that are there, in either form
    assert mask.summary()["heads_moving_over_3"] == compact.summary()["heads_moving_over_3"]
    assert mask.sink_share() == compact.sink_share()


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_layer_without_heads_does_not_hide_the_others(empty):
    kept = [[0, 2], [1], [0, 1, 3]]
    kept[empty] = []
    profiles = []
    for form in ("mask", "compact"):
        model = toy(seed=2, sharpness=4.0)
        sp.apply(model, manual_plan(model, kept), mode=form)
        profiles.append(sp.profile(model, ["w4 w9", "w7"], tokenizer=WordTokenizer(), **SIZES))
    mask, compact = profiles
    assert compact.heads == mask.heads == kept
    for name, values in compact.statistics.items():
        torch.testing.assert_close(values, mask.statistics[name], atol=2e-5, rtol=1e-4, equal_nan=True)
    counted = compact.statistics["steps_counted"]
    assert [int((counted[layer] == SIZES["steps"]).all(0).sum()) for layer in range(3)] == [
        len(h) for h in kept
    ]


def test_moving_share_counts_heads_whose_range_is_beyond_three(profiled):
    reach = profiled.statistics["position_range"].double().mean(1)
    assert profiled.moving_share() == pytest.approx((reach > 3).double().mean().item())
    assert profiled.moving_share(further_than=0) >= profiled.moving_share()
    summary = profiled.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["steps"], summary["samples"]) == (5, 3)


def test_sink_share_counts_heads_that_stand_out_on_half_their_steps(profiled):
    gated = profiled.statistics["gated_steps_counted"].sum(1)
    assert profiled.sink_share() == pytest.approx((gated >= 0.5 * 5 * 3).double().mean().item())
    assert 0 < profiled.sink_share() < 1


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_profiling_never_forms_the_scores_of_all_heads_at_once():
    length, heads = 512, 4
    model = toy(max_sequence_length=length, n_layers=1)
    with LargestTensor() as largest:
        sp.profile(model, tokens(2, length - 2), steps=1, gen_length=2)
    assert 0 < largest.elements < heads * length * length


def test_a_profile_survives_its_file(profiled, tmp_path):
    path = tmp_path / "profile.safetensors"
    profiled.save(path)
    back = sp.SinkProfile.load(path)
    assert (back.geometry, back.fingerprint, back.heads) == (
        profiled.geometry, profiled.fingerprint, profiled.heads,
    )  # fmt: skip
    assert back.settings == profiled.settings
    assert back.statistics.keys() == profiled.statistics.keys()
    for name, tensor in profiled.statistics.items():
        assert torch.equal(back.statistics[name].view(torch.int32), tensor.view(torch.int32))
    assert torch.equal(back.trace_positions, profiled.trace_positions)
    assert torch.equal(back.trace_mass, profiled.trace_mass)
    assert [p.name for p in tmp_path.iterdir()] == ["profile.safetensors"]


def test_a_profile_that_cannot_be_written_leaves_nothing(profiled, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        profiled.save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


DAMAGES = ["truncated", "empty", "json", "weights", "schema", "no trace", "no geometry"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_profile_is_refused_by_name(profiled, tmp_path, damage):
    path = tmp_path / "p.safetensors"
    profiled.save(path)
    data = path.read_bytes()
    tensors = load_file(path)
    size = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["sink_profile"])
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "json":
        path.write_text("{}")
    elif damage == "weights":
        save_file(tensors, path)
    else:
        if damage == "schema":
            description["schema"] = 99
        elif damage == "no trace":
            del tensors["trace_positions"]
        else:
            del description["geometry"]
        save_file(tensors, path, metadata={"sink_profile": json.dumps(description)})
    with pytest.raises(ValueError, match=r"p\.safetensors"):
        sp.SinkProfile.load(path)


def test_a_profile_of_another_model_is_refused(profiled):
    profiled.check_model(adapter_for(toy(seed=1, sharpness=4.0, n_kv_heads=2)))
    with pytest.raises(ValueError, match="taken of other weights"):
        profiled.check_model(adapter_for(toy(seed=3, n_kv_heads=2)))
    with pytest.raises(ValueError, match=r"the profile is of .*kv_heads=\(2, 2, 2\).*, the model is"):
        profiled.check_model(adapter_for(toy(seed=1)))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.long), {}, r"S, P >= 1, got \(0, 4\)"),
        (torch.zeros(2, 0, dtype=torch.long), {}, r"S, P >= 1, got \(2, 0\)"),
        (torch.zeros(4, dtype=torch.long), {}, r"S, P >= 1, got \(4,\)"),
        (tokens(1, 4), {"batch": 0}, "batch must be at least 1, got 0"),
        (["w1"], {}, "need a tokenizer"),
        ([], {"tokenizer": WordTokenizer()}, "at least one prompt"),
        (tokens(1, 4), {"steps": 99}, "at most gen_length"),
        (tokens(1, 60), {}, "exceed the context of 64"),
    ],
)
def test_bad_profiling_arguments_are_refused_and_the_model_is_free_again(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        sp.profile(model, prompts, **(SIZES | options))
    assert not adapter_for(model).observed()


def test_one_string_is_one_prompt(model):
    assert sp.profile(model, "w3 w4", tokenizer=WordTokenizer(), **SIZES).samples == 1


@pytest.mark.parametrize("ids", [torch.full((1, 4), 61), torch.full((1, 4), -1), torch.rand(1, 4)])
def test_ids_outside_the_vocabulary_are_refused(model, ids):
    with pytest.raises(ValueError, match=r"must be integers in \[0, 61\)"):
        sp.profile(model, ids, **SIZES)


def test_ids_with_their_mask_are_profiled_as_their_tokens_alone(model):
    ids = torch.tensor([[7, 8, 2, 11]])
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), 1)
    valid = (torch.arange(7) >= 3).long()[None]
    alone = sp.profile(model, ids, **SIZES)
    got = sp.profile(model, padded, attention_mask=valid, **SIZES)
    assert_statistics(got.statistics, {name: value.double() for name, value in alone.statistics.items()})
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        sp.profile(model, ids, attention_mask=valid, **SIZES)
    with pytest.raises(ValueError, match="padded on the left"):
        sp.profile(model, padded, attention_mask=valid.flip(1), **SIZES)


@pytest.mark.parametrize("make", [toy_sdar, toy_llada2, sdar_twin])
def test_block_causal_prompts_of_any_lengths_have_the_statistics_of_each_alone(make):
    model = make()
    texts = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9 w3 w5 w2 w4 w6 w8", "w6 w7 w8 w9 w1"]  # 3, 1, 3, 1 modulo 4
    sizes = {"steps": 8, "gen_length": 8, "tokenizer": WordTokenizer()}
    got = sp.profile(model, texts, **sizes)
    for sample, text in enumerate(texts):
        alone = sp.profile(model, text, **sizes)
        column = {name: value[:, sample : sample + 1] for name, value in got.statistics.items()}
        assert_statistics(column, {name: value.double() for name, value in alone.statistics.items()})


def test_a_mask_buffer_that_a_sampler_writes_into_gives_the_statistics_of_each_step(model):
    ids, buffer, masses = tokens(1, 10), torch.ones(1, 10, dtype=torch.bool), []
    with torch.no_grad(), sp.track(model) as tracker:
        for pad in (0, 3, 6):
            buffer.copy_(torch.arange(10) >= pad)
            model(ids, buffer)
            attention = []
            forward_of(model, ids, buffer.long(), attention)
            masses.append(attention[0][:, :, pad:].mean(2).max(-1).values)  # [layers, heads]
    expected = torch.stack(masses).mean(0)
    torch.testing.assert_close(tracker.result().mass[:, 0].double(), expected.double(), atol=1e-5, rtol=1e-4)
