"""Threads that share one model object: each gets what it would get alone."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from block_causals import toy_llada2
from decoder_twins import illada_twin
from hf import build
from layer_twins import llada2_twin, sdar_twin
from torch import nn
from toys import WordTokenizer, manual_plan, one_thread, tokens, toy  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp

MODELS = {
    "native": toy,
    "native, block-causal": toy_llada2,
    "live LLaDA": llada_twin,
    "live Dream": dream_twin,
    "live SDAR": sdar_twin,
    "live LLaDA2": llada2_twin,
    "live iLLaDA": illada_twin,
    "transformers": lambda: build("modernbert"),
}
ROUNDS = 100  # of each of two threads
FORMS = {
    "native": (toy, {}),
    "native, masked, prefix cache": (toy, {"form": "mask", "cache": "prefix"}),
    "native, dual cache": (toy, {"cache": "dual"}),
    "native, block-causal, compact, block cache": (toy_llada2, {"form": "compact", "cache": "block"}),
    "live LLaDA, masked": (llada_twin, {"form": "mask"}),
    "live Dream, masked": (dream_twin, {"form": "mask"}),
    "live SDAR, compact": (sdar_twin, {"form": "compact"}),
    "live LLaDA2": (llada2_twin, {}),
    "live iLLaDA": (illada_twin, {}),
    "ModernBERT, eager": (lambda: eager("modernbert"), {}),
    "ModernBERT, eager, masked": (lambda: eager("modernbert"), {"form": "mask"}),
    "Qwen3, eager, compact": (lambda: eager("qwen3, bidirectional"), {"form": "compact"}),
}


def eager(family: str) -> nn.Module:
    model = build(family)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(autouse=True)
def switched_often():
    """Threads take turns a hundred times as often as they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def padded(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of ids ``[2, 8]``, the second with ``seed`` tokens of left padding."""
    ids = torch.randint(2, 20, (2, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :seed] = False
    return ids.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_two_threads_with_other_padding_compute_what_each_computes_alone(make):
    adapter = sp.adapter_for(make())
    inputs = [padded(2), padded(5)]
    with torch.no_grad():
        alone = [adapter.predict(ids, mask) for ids, mask in inputs]
    assert not torch.allclose(alone[0], alone[1])
    start = threading.Barrier(2)

    @torch.no_grad()
    def work(which: int) -> int:
        start.wait()
        ids, mask = inputs[which]
        return sum(torch.equal(adapter.predict(ids, mask), alone[which]) for _ in range(ROUNDS))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1))) == [ROUNDS, ROUNDS]


@pytest.mark.parametrize(("make", "options"), FORMS.values(), ids=FORMS.keys())
def test_two_threads_write_what_each_writes_alone(make, options):
    """200 of 200 texts, of prompts whose lengths differ by whole blocks: a padded batch each."""
    model, options = make(), dict(options)
    form = options.pop("form", None)
    if form is not None:
        sp.apply(model, manual_plan(model, [[0, 2], [1], [0, 1, 3]]), mode=form)
    sizes = {"gen_length": 4, "steps": 2 if "cache" in options else 1, **options}
    prompts = [["w7 w8 w9 w2", "w4 w5 w6 w3 w9 w11 w8 w17"], ["w2 w5 w13 w14 w8 w6 w7 w9", "w50 w3 w4 w6"]]

    def write(which: int) -> str | list[str]:
        return sp.generate(model, WordTokenizer(), prompts[which], **sizes)

    alone = [write(0), write(1)]
    assert alone[0] != alone[1]
    start = threading.Barrier(2)

    def work(which: int) -> int:
        start.wait()
        return sum(write(which) == alone[which] for _ in range(ROUNDS))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1))) == [ROUNDS, ROUNDS]


PROFILED = {
    "live Dream": dream_twin,
    "ModernBERT, eager": lambda: eager("modernbert"),
    "Qwen3": lambda: build("qwen3, bidirectional"),
}


@pytest.mark.parametrize("make", PROFILED.values(), ids=PROFILED.keys())
def test_texts_are_what_they_are_alone_while_another_thread_profiles_the_model(make):
    """Whose attention is another one meanwhile, and whose masks are not."""
    model, profiles = make(), []
    prompts, sizes = ["w4 w5 w6", "w7"], {"gen_length": 4, "steps": 1}
    alone = sp.generate(model, WordTokenizer(), prompts, **sizes)
    stop = threading.Event()

    def profile() -> None:
        while not stop.is_set():
            made = sp.profile(model, torch.arange(2, 8)[None], steps=2, gen_length=2)
            profiles.append(made.statistics["steps_counted"].max().item())

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(profile)
        try:
            same = sum(sp.generate(model, WordTokenizer(), prompts, **sizes) == alone for _ in range(ROUNDS))
        finally:
            stop.set()
        done.result()
    assert same == ROUNDS and set(profiles) == {2}


@pytest.mark.parametrize("make", [llada_twin, dream_twin, illada_twin])
def test_a_thread_that_calls_the_live_model_itself_never_sees_the_padding_of_another(make):
    model = make()
    adapter = sp.adapter_for(model)
    ids, mask = padded(5)
    with torch.no_grad():
        alone = model(ids).logits
    stop = threading.Event()

    @torch.no_grad()
    def pad() -> int:
        rounds = 0
        while not stop.is_set():
            adapter.predict(ids, mask)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(pad)
        try:
            with torch.no_grad():
                for _ in range(ROUNDS):
                    torch.testing.assert_close(model(ids).logits, alone, rtol=1e-4, atol=1e-5)
        finally:
            stop.set()
        assert others.result() > 0


@pytest.mark.parametrize("make", [toy, llada_twin, dream_twin])
def test_a_profile_counts_its_own_forwards_only(make):
    """Beside padded forwards of another thread, whose padding comes and goes."""
    model = make()
    adapter = sp.adapter_for(model)
    ids, mask = padded(5)
    prompts = torch.arange(2, 8)[None]
    settings = {"steps": 4, "gen_length": 4}
    alone = sp.profile(model, prompts, **settings)
    stop = threading.Event()

    @torch.no_grad()
    def others() -> int:
        rounds = 0
        while not stop.is_set():
            adapter.predict(ids, mask)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(others)
        try:
            beside = [sp.profile(model, prompts, **settings).summary() for _ in range(10)]
        finally:
            stop.set()
        assert done.result() > 0
    assert beside == [alone.summary()] * 10


@pytest.mark.parametrize(
    "make", [toy, llada_twin, lambda: eager("modernbert")], ids=["native", "live", "ours"]
)
def test_of_two_threads_that_profile_a_model_at_once_one_is_refused(make):
    model, settings = make(), {"steps": 2, "gen_length": 2}
    prompts = [torch.arange(2, 8)[None], torch.arange(9, 14)[None]]
    alone = [sp.profile(model, ids, **settings).summary() for ids in prompts]
    start = threading.Barrier(2)

    def work(which: int) -> set[str]:
        seen = set()
        start.wait()
        for _ in range(40):
            try:
                same = sp.profile(model, prompts[which], **settings).summary() == alone[which]
                seen.add("same" if same else "another")
            except RuntimeError as refused:
                seen.add(str(refused))
        return seen

    with ThreadPoolExecutor(2) as pool:
        seen = set.union(*pool.map(work, (0, 1)))
    assert "same" in seen and seen <= {
        "same", "the model is being tracked already; nested tracks are not supported"
    }  # fmt: skip
    assert not sp.adapter_for(model).observed()


@pytest.mark.parametrize(
    "make", [toy, dream_twin, lambda: eager("modernbert")], ids=["native", "live", "ours"]
)
@pytest.mark.parametrize("criterion", ["reconstruction", "taylor"])
def test_a_plan_reads_its_own_rows_while_another_thread_writes(make, criterion):
    model, sizes = make(), {"gen_length": 4, "steps": 1}
    rows = sp.calibrate(model, tokens(200), length=12, sequences=4)
    settings = {"criterion": criterion, "ratio": 0.4, "calibration": rows}
    alone = sp.plan(model, **settings)
    text = sp.generate(model, WordTokenizer(), ["w4 w5 w6", "w7"], **sizes)
    stop = threading.Event()

    def write() -> set[bool]:
        same = set()
        while not stop.is_set():
            same.add(sp.generate(model, WordTokenizer(), ["w4 w5 w6", "w7"], **sizes) == text)
        return same

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(write)
        try:
            beside = [sp.plan(model, **settings) for _ in range(5)]
        finally:
            stop.set()
        assert done.result() == {True}
    assert [plan.layers for plan in beside] == [alone.layers] * 5


def test_a_thread_with_a_short_sequence_does_not_take_the_table_of_a_long_one():
    """Its own table takes the place of the long one's as soon as that is there."""
    model, long = toy(), tokens(1, 40)
    with torch.no_grad():
        expected = model(long).logits

    class Overtaken(type(model)):
        @property
        def _rotary(self):
            return self.__dict__.get("short")

        @_rotary.setter
        def _rotary(self, table):
            self.__dict__["short"] = tuple(part[:1] for part in table)

    model.__class__ = Overtaken
    with torch.no_grad():
        assert torch.equal(model(long).logits, expected)


def test_two_loads_of_transformers_checkpoints_at_once_leave_modules_as_they_were(tmp_path):
    model = build("qwen3")
    plan = manual_plan(model, [[0, 1]] * sp.adapter_for(model).geometry().num_layers)
    expected = sp.apply(model, plan).state_dict()
    folder = sp.save(model, tmp_path / "saved")
    start = threading.Barrier(2)

    def load(_: int) -> nn.Module:
        start.wait()
        return sp.load(folder)[0]

    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            for loaded in pool.map(load, (0, 1)):
                assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
        assert not nn.Linear(2, 2).weight.is_meta
