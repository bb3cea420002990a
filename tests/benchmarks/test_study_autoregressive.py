"""The autoregressive side of the study on a toy Llama: figures against attention written out."""

import importlib.util
import json
from pathlib import Path

import hf
import pytest
import torch
from toys import one_thread, tokens  # noqa: F401

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "study"
STEPS, PROMPT, BATCH = 6, 5, 3


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location(
        "study_autoregressive", BENCHMARKS / "study_autoregressive.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def causal():
    return hf.build("llama")


@pytest.fixture(scope="module")
def found(study, causal):
    return study.sinks_while_generating(causal, tokens(BATCH, PROMPT), STEPS)


@pytest.fixture(scope="module")
def rows(causal, found):
    """Attention ``[L, B, H, T, T]`` of the sequence that was written, by transformers' own eager code."""
    causal.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = causal(found[0], output_attentions=True).attentions
    causal.set_attn_implementation("sdpa")
    return torch.stack(attentions).double()


def moving(positions):
    """Share of heads whose position ``[steps, L, B, H]`` has a range above 3, mean over samples."""
    span = (positions.amax(0) - positions.amin(0)).double().mean(1)
    return (span > 3).double().mean().item()


def test_the_text_is_the_greedy_one(causal, found):
    ids = tokens(BATCH, PROMPT)
    with torch.no_grad():
        for _ in range(STEPS - 1):
            ids = torch.cat((ids, causal(ids).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(found[0], ids)


def test_movement_of_all_queries_is_that_of_the_mean_over_the_prefix(found, rows):
    lengths = range(PROMPT, PROMPT + STEPS)
    masses = [rows[..., :n, :n].mean(-2) for n in lengths]
    positions = torch.stack([mass.argmax(-1) for mass in masses])
    result = found[1]["all_queries"]
    assert result["heads_moving_over_3"] == pytest.approx(moving(positions))
    moves = (positions[1:] != positions[:-1]).double().mean().item()
    assert result["moves_per_step"] == pytest.approx(moves)
    at_zero = torch.stack([mass[..., 0].mean((1, 2)) for mass in masses]).mean(0)
    assert result["mass_at_0"] == pytest.approx(at_zero.mean().item(), abs=1e-5)
    assert [layer["mass_at_0"] for layer in result["per_layer"]] == pytest.approx(at_zero.tolist(), abs=1e-5)
    assert result["heads"] == 12 and len(result["per_layer"]) == 3


def test_movement_of_the_newest_query_is_that_of_the_last_row(found, rows):
    positions = torch.stack([rows[..., n - 1, :n].argmax(-1) for n in range(PROMPT, PROMPT + STEPS)])
    result = found[1]["newest_query"]
    assert result["heads_moving_over_3"] == pytest.approx(moving(positions))
    spread = positions.double().var(0, correction=0).sqrt().mean().item()
    assert result["mean_deviation"] == pytest.approx(spread, abs=1e-4)
    gated = [layer["heads_moving_over_3_gated"] for layer in result["per_layer"]]
    assert result["heads_moving_over_3_gated"] == pytest.approx(sum(gated) / 3)


def test_the_uniform_share_of_position_0_is_that_of_uniform_causal_attention(found):
    shares = []
    for n in range(PROMPT, PROMPT + STEPS):
        uniform = torch.ones(n, n).tril()
        shares.append((uniform / uniform.sum(1, keepdim=True)).mean(0)[0].item())
    assert found[1]["uniform_mass_at_0"] == pytest.approx(sum(shares) / STEPS)
    json.dumps(found[1], allow_nan=False)
