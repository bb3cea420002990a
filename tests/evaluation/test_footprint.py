"""Computed memory against what is really allocated, operation by operation; a GPU too small says so first."""

import pytest
import torch
from toys import manual_plan, one_thread, toy  # noqa: F401

import sinkprune as sp
from sinkprune.checkpoints import checkpoint
from sinkprune.commands.fitting import check_folder_fits
from sinkprune.evaluation.footprint import check_fits, counted_peak, longest, memory
from sinkprune.models.dream import Dream, DreamConfig
from sinkprune.models.llada import LLaDA, LLaDAConfig
from sinkprune.plans import Geometry, LayerPlan

LLADA = Geometry("llada", 4096, 128, 126464, 4096, (32,) * 32, (32,) * 32, (12288,) * 32)


def small_llada(dtype, **changes):
    config = {"d_model": 128, "n_heads": 8, "n_layers": 2, "mlp_hidden_size": 256, "vocab_size": 300}
    config |= {"max_sequence_length": 256, "mask_token_id": 1} | changes
    return LLaDA(LLaDAConfig.from_dict(config)).to(dtype).eval()


def small_dream(dtype):
    config = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config |= {
        "intermediate_size": 600,
        "vocab_size": 300,
        "max_position_embeddings": 256,
        "mask_token_id": 1,
    }
    return Dream(DreamConfig.from_dict(config)).to(dtype).eval()


MODELS = {
    "attention binds": lambda dtype: small_llada(dtype),
    "mlp binds": lambda dtype: small_llada(dtype, mlp_hidden_size=1000),
    "grouped": lambda dtype: small_llada(dtype, n_kv_heads=2),
    "dream": small_dream,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_activations_are_what_a_forward_allocates(build, dtype):
    model = build(dtype)
    ids = torch.randint(2, 300, (2, 96))

    def forward():
        model.hidden(ids)

    forward()  # the rotary table is kept from now on
    table = 8 * 96 * 16
    assert memory(model, None, 2, 96).activations - table == pytest.approx(counted_peak(forward), rel=0.02)
    plan = sp.plan(model, criterion="random", ratio=0.4, unit="parameters", targets=("heads", "mlp"))
    before = memory(model, plan, 2, 96)
    sp.apply(model, plan)
    assert before.activations == memory(model, None, 2, 96).activations
    assert before.activations - table == pytest.approx(counted_peak(forward), rel=0.02)
    own = sum(p.nbytes for p in model.parameters())
    assert memory(model, None, 2, 96).weights == own
    assert before.weights == pytest.approx(own, rel=1e-3)  # but for the biases that go with heads


@pytest.mark.parametrize("vocabulary", [300, 6000], ids=["activations bind", "sampling binds"])
def test_generation_stays_within_what_is_computed(vocabulary):
    model = small_llada(torch.float32, vocab_size=vocabulary)
    prompt = torch.randint(2, 300, (2, 48))
    options = {"steps": 4, "gen_length": 48, "block_length": 24, "temperature": 1.0, "seed": 0}
    got = counted_peak(lambda: list(sp.denoise(model, prompt, **options)))
    needed = memory(model, None, 2, 96, head_rows=24)
    assert 0.8 * (needed.peak - needed.weights) < got < 1.05 * (needed.peak - needed.weights)


def test_the_count_sees_what_is_alive_and_nothing_else():
    x = torch.zeros(1000)  # there before

    def call():
        a = x + 1  # 4 kB
        b = a * 2  # 8 kB
        del a
        c = b.view(10, 100)  # a view
        c.add_(x.view(10, 100))
        return (c.double(), None)  # 4 + 8 kB

    assert counted_peak(call) == 12000


def test_llada_8b_is_16_gb_and_its_logits_are_the_rows():
    dense = memory(LLADA, length=1024, head_rows=128)
    assert dense.weights == pytest.approx(16.03e9, rel=1e-3)  # 8.016 B parameters, as published
    assert dense.logits == 128 * 126464 * 2
    assert dense.cache == 0
    held = memory(LLADA, length=1024, cached=1024).cache
    assert held == 2 * 2 * 32 * 1024 * 4096
    half = sp.PrunePlan(LLADA, "", [LayerPlan(list(range(16)))] * 32)
    assert memory(LLADA, half, length=1024, cached=1024).cache == held / 2
    assert memory(LLADA, half, length=1024).weights == dense.weights - 32 * 2 * 4096 * 4096 * 2


def test_the_longest_sequence_fits_and_one_more_does_not():
    for plan in (None, sp.PrunePlan(LLADA, "", [LayerPlan(list(range(16)))] * 32)):
        length = longest(LLADA, 80 * 10**9, plan, head_rows=128)
        assert memory(LLADA, plan, length=length, head_rows=128).peak <= 80 * 10**9
        assert memory(LLADA, plan, length=length + 1, head_rows=128).peak > 80 * 10**9
    assert longest(LLADA, 16 * 10**9) == 0


def test_sizes_that_make_no_sense_are_refused():
    model = toy()
    with pytest.raises(ValueError, match="must be at least 1, got 1, 0 and 0"):
        memory(model, length=0)
    plan = manual_plan(model, [[0, 1]] * 3)
    sp.apply(model, plan)
    with pytest.raises(ValueError, match="pruned already: pass plan=None"):
        memory(model, plan)


def test_a_gpu_too_small_says_how_much_is_needed_and_what_would_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 24 * 10**9))
    needed = memory(LLADA, length=4096)
    fitting = longest(LLADA, 20 * 10**9)
    check_fits(memory(LLADA, length=256), "cuda:0", fitting, "LLaDA")
    check_fits(needed, "cpu", 0, "LLaDA")
    with pytest.raises(
        ValueError, match=r"LLaDA needs \d+\.\d GB, cuda has 20.0 GB free: \d+ tokens would fit"
    ):
        check_fits(memory(LLADA, length=fitting + 1), "cuda", fitting, "LLaDA")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * 10**9, 16 * 10**9))
    with pytest.raises(ValueError, match=r"its weights alone take 16.0 GB"):
        check_fits(needed, "cuda", longest(LLADA, 12 * 10**9), "LLaDA")


def test_a_folder_is_judged_by_its_sizes_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**6))
    monkeypatch.setattr(checkpoint, "load", None)
    with pytest.raises(ValueError, match="tiny with 1 x 128 tokens needs"):
        check_folder_fits("tiny", "cuda", 1, 128, 64)
    check_folder_fits("tiny", "cpu", 1, 128, 64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200 * 10**6, 10**9))
    check_folder_fits("tiny", "cuda", 1, 128, 64)
