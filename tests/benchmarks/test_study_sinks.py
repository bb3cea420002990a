"""Hidden keys against attention with the column struck out by hand; halves against whole trajectories."""

import json
from pathlib import Path

import hf
import pytest
import torch
from toys import forward_of, one_thread, straight_forward, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evidence.sinks import SinkGate

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "study"


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import study_sinks
    return study_sinks


def hand(query, key, value, visible, hidden):
    """One head's attention, float64, without column ``hidden`` except for rows that would see nothing."""
    scores = (query.double() @ key.double().T) / query.shape[-1] ** 0.5
    for i in range(len(scores)):
        keep = visible[i].clone()
        if hidden is not None:
            keep[hidden] = False
        scores[i, ~(keep if keep.any() else visible[i])] = -torch.inf
    weights = scores.softmax(-1).nan_to_num(0)
    return weights @ value.double(), weights


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", ["sink", "first", "standing sink"])
def test_each_head_loses_the_key_it_should(study, causal, mode):
    g = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(2, 4, 9, 8, generator=g)
    key, value = torch.randn(2, 2, 9, 8, generator=g), torch.randn(2, 2, 9, 8, generator=g)
    key[:, 0, 4] = 2 * query[:, :2].mean((1, 2))  # a sink of two heads
    visible = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    visible[1, :, :, 7:] = False
    visible = visible.tril() if causal else visible
    hider = study.KeyHider(mode)
    got = hider(query, key, value, visible, 8**-0.5)
    masses, touched = [], 0
    for b in range(2):
        valid = visible[b, 0].any(0)
        for h in range(4):
            args = query[b, h], key[b, h // 2], value[b, h // 2], visible[b, 0]
            mass = hand(*args, None)[1][valid].mean(0)
            hidden = 0 if mode == "first" else int(mass.argmax())
            n = int(valid.sum())
            stands = mass.max() >= 4 / n and mass.max() > 1 / n + 2 * mass[valid].std(correction=0)
            if mode == "standing sink" and not stands:
                hidden = None
            touched += hidden is not None
            masses += [] if hidden is None else [mass[hidden].item()]
            expected = hand(*args, hidden)[0]
            torch.testing.assert_close(got[b, h][valid].double(), expected[valid], atol=1e-5, rtol=0)
    assert (hider.seen, hider.hidden) == (8, touched)
    assert mode != "standing sink" or 0 < touched < 8
    assert hider.mass == pytest.approx(sum(masses), abs=1e-5)


def test_another_key_is_a_valid_one_that_is_not_the_sink(study):
    g = torch.Generator().manual_seed(0)
    mass = torch.rand(1, 50, 8, generator=g)
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0]).bool()[None, None]
    mass = mass.masked_fill(~valid, 0)
    chosen, touched = study.KeyHider("other")._choose(mass, valid)
    assert touched.all() and (chosen != mass.argmax(-1)).all()
    assert set(chosen.flatten().tolist()) == {0, 1, 3, 4, 5}


def test_models_are_as_they_were_and_see_the_hider_only_inside(study):
    ids = tokens(2, 11)
    mask = torch.tensor([[1] * 11, [1] * 8 + [0] * 3])
    for model in (toy(n_kv_heads=2, sharpness=3.0), hf.build("bert"), hf.build("llama")):
        with torch.no_grad():
            before = model(ids, attention_mask=mask).logits
            hider = study.KeyHider("sink")
            with study.hiding(model, hider):
                inside = model(ids, attention_mask=mask).logits
            after = model(ids, attention_mask=mask).logits
        assert torch.equal(before, after) and not torch.allclose(before, inside, atol=1e-2)
        assert hider.seen == hider.hidden == 2 * 3 * 4
        with torch.no_grad(), study.hiding(model, study.KeyHider("standing sink", SinkGate(1e9))):
            torch.testing.assert_close(
                model(ids, attention_mask=mask).logits[mask.bool()], before[mask.bool()], atol=1e-4, rtol=1e-4
            )


def test_the_cost_is_paired_and_repeatable(study):
    model, text = toy(sharpness=3.0), tokens(4, 12)
    first, second = (study.masked_model(model, text, draws=2) for _ in range(2))
    assert first == second
    json.dumps(first, allow_nan=False)
    quality = sp.evaluate(model, text)
    with study.hiding(model, study.KeyHider("sink")):
        hidden = sp.evaluate(model, text)
    assert first["nll"] == pytest.approx(quality.nll)
    assert first["sink"]["added"] == hidden.interval(quality)._asdict()
    assert first["sink"]["heads_touched"] == 1 and 0 < first["standing sink"]["heads_touched"] < 1
    assert first["sink against other"]["mean"] == pytest.approx(
        first["sink"]["added"]["mean"] - first["other"]["added"]["mean"]
    )
    causal = study.causal_model(hf.build("llama"), tokens(3, 9), draws=1)
    assert set(causal) == {"nll", "texts", "sink", "other", "first", "sink against other"}


def test_next_token_loss_is_that_of_the_shifted_logits(study):
    causal, ids = hf.build("llama"), tokens(3, 9)
    with torch.no_grad():
        log_p = causal(ids).logits.double().log_softmax(-1)
    expected = [-sum(log_p[b, i - 1, ids[b, i]] for i in range(1, 9)).item() / 8 for b in range(3)]
    assert study.next_token_nll(causal, ids, batch=2) == pytest.approx(expected, abs=1e-5)


def test_halves_follow_the_sinks_of_their_own_steps(study):
    model, prompts = toy(sharpness=3.0), tokens(2, 6)
    result = study.by_half(model, prompts, steps=8, gen_length=16)
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    list(sp.denoise(model, prompts, steps=8, gen_length=16))
    hook.remove()
    config, tensors = model.config.to_dict(), model.state_dict()
    positions = []
    for ids in seen:
        attention = []
        straight_forward(config, tensors, ids, None, attention)
        positions.append(torch.stack(attention).mean(-2).argmax(-1))  # [B, L, H]
    halves = [torch.stack(positions[:4]), torch.stack(positions[4:])]
    early, late = (((h.amax(0) - h.amin(0)).double().mean(0) > 3) for h in halves)
    assert result["early"]["heads_moving_over_3"] == pytest.approx(early.double().mean().item())
    assert result["late"]["heads_moving_over_3"] == pytest.approx(late.double().mean().item())
    parts = result["heads_moving_over_3"]
    assert parts["both"] == pytest.approx((early & late).double().mean().item())
    assert parts["early_only"] == pytest.approx((early & ~late).double().mean().item())
    assert (
        sum(parts.values())
        == pytest.approx(1)
        == pytest.approx(sum(result["heads_moving_over_3_gated"].values()))
    )
    with pytest.raises(ValueError, match="even number of steps, got 5"):
        study.by_half(model, prompts, steps=5)
