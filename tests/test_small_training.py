"""The training of "small": its hand-written gradients, its noise, and resuming to the step."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dreams import published_config, published_tensors
from toys import one_thread  # noqa: F401

from sinkprune.checkpoints import small
from sinkprune.models.dream import Dream, DreamConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONFIG = published_config(tie_word_embeddings=True, attention_bias=False, vocab_size=80)


@pytest.fixture(scope="module")
def training():
    spec = importlib.util.spec_from_file_location("train_small", EXAMPLES / "train_small.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_small"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_small"]


@pytest.fixture
def student(training):
    torch.manual_seed(0)
    made = training.Student(DreamConfig.from_dict(CONFIG), published_tensors(CONFIG))
    with torch.no_grad():
        for name, parameter in made.factors.items():
            if name.endswith("/b"):
                parameter.normal_(std=0.05)
    made.merge()
    return made


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def noisy_rows(training, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 80, (4, 24), generator=generator)
    return ids, *training.noise(ids, generator)


def merged_model(training, student, tmp_path, monkeypatch):
    """Native Dream from the exported deltas: the package's merge, no code of the training."""
    run = tmp_path / "run"
    run.mkdir()
    state = {f"model.{name}": parameter.detach() for name, parameter in student.named_parameters()}
    training.write(state, run / "state.safetensors", {"progress": '{"step": 0}'})
    monkeypatch.setattr(training, "find_base", lambda: run / "state.safetensors")
    base = published_tensors(CONFIG)
    monkeypatch.setattr(training, "read_base", lambda path: (DreamConfig.from_dict(CONFIG), base))
    training.export(run, tmp_path / "out")
    model = Dream(DreamConfig.from_dict(CONFIG))
    model.load_state_dict(small.merge(base, training.load_file(tmp_path / "out" / small.DELTA), small.MASK))
    return model


def test_loss_and_gradients_are_those_of_the_exported_model(training, student, tmp_path, monkeypatch):
    """Against autograd through native Dream in float32; the training multiplies in bf16."""
    model = merged_model(training, student, tmp_path, monkeypatch)
    ids, masked, weights = noisy_rows(training)
    loss = student.loss(ids, masked, weights)
    loss.backward()
    logits = model(ids.masked_fill(masked, small.MASK)).logits[:, :-1]
    chosen = masked[:, 1:]
    entropy = F.cross_entropy(logits[chosen], ids[:, 1:][chosen], reduction="none")
    expected = (entropy * weights[:, 1:][chosen]).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    factors = dict(student.factors)
    for name, parameter in model.named_parameters():
        key = name.removeprefix("model.").removesuffix(".weight").replace(".", "/")
        if "_proj" in name:
            a, b = factors[f"{key}/a"], factors[f"{key}/b"]
            assert relative(a.grad, b.detach().T @ parameter.grad) < 0.06, name
            assert relative(b.grad, parameter.grad @ a.detach().T) < 0.06, name
        elif "norm" in name:
            assert relative(student.gains[key].grad, parameter.grad) < 0.06, name
        else:  # the tied table, of which one row is trained
            assert relative(student.mask_row.grad, parameter.grad[small.MASK]) < 0.06, name


def test_a_sequence_counts_as_much_as_another_and_its_first_token_is_never_masked(training):
    shares, first = [], 0
    for seed in range(200):
        _, masked, weights = noisy_rows(training, seed)
        torch.testing.assert_close(weights.sum(1), torch.full((4,), 0.25))
        first += int(masked[:, 0].sum())
        shares += (masked.sum(1) / 23).tolist()
    assert first == 0 and min(shares) == pytest.approx(2 / 23) and max(shares) == 1
    assert sum(shares) / len(shares) == pytest.approx(0.52, abs=0.1)  # a quarter keeps a prompt


def test_training_stopped_and_gone_on_is_training_never_stopped(training, student, tmp_path, monkeypatch):
    base = published_tensors(CONFIG)
    monkeypatch.setattr(training, "find_base", lambda: None)
    monkeypatch.setattr(training, "read_base", lambda path: (DreamConfig.from_dict(CONFIG), base))
    found = {"train.kjv": torch.randint(20, 80, (600,), generator=torch.Generator().manual_seed(3))}
    monkeypatch.setattr(training, "LENGTH", 24)
    options = argparse.Namespace(decay_steps=0, rate=1e-2, ratio=4.0)
    whole = training.Trainer(tmp_path, options)
    losses = [whole.step(found, 2, 0, 1.0)[0] for _ in range(6)]
    part = training.Trainer(tmp_path, options)
    again = [part.step(found, 2, 0, 1.0)[0] for _ in range(3)]
    part.save()
    part = training.Trainer(tmp_path, options)
    assert part.progress["step"] == 3
    again += [part.step(found, 2, 0, 1.0)[0] for _ in range(3)]
    assert again == losses
    for one, other in zip(whole.student.parameters(), part.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_decay_leaves_the_state_to_go_on_from_alone(training, tmp_path, monkeypatch):
    base = published_tensors(CONFIG)
    monkeypatch.setattr(training, "find_base", lambda: None)
    monkeypatch.setattr(training, "read_base", lambda path: (DreamConfig.from_dict(CONFIG), base))
    monkeypatch.setattr(training, "LENGTH", 24)
    found = {"train.kjv": torch.randint(20, 80, (600,), generator=torch.Generator().manual_seed(3))}
    training.Trainer(tmp_path, argparse.Namespace(decay_steps=0, rate=1e-2, ratio=4.0)).save()
    before = (tmp_path / "state.safetensors").read_bytes()
    decaying = argparse.Namespace(decay_steps=4, rate=1e-2, ratio=4.0)
    trainer = training.Trainer(tmp_path, decaying)
    trainer.step(found, 2, 0, 0.5)
    trainer.save()
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert training.Trainer(tmp_path, decaying).progress == {**trainer.progress, "step": 1, "decay_from": 0}
