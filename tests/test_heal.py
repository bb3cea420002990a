"""Healing: a pruned model is brought back towards its dense one, by its blocks alone."""

import sys
from pathlib import Path

import pytest
import torch
from toys import one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.plans import LayerPlan

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def heal():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import heal

        yield heal
    finally:
        sys.path.remove(str(EXAMPLES))


def test_the_student_comes_closer_to_its_teacher_and_keeps_its_tables(heal, monkeypatch):
    monkeypatch.setattr(heal, "LENGTH", 32)
    dense, student = toy(), toy()
    geometry = sp.adapter_for(dense).geometry()
    sp.apply(student, sp.PrunePlan(geometry, "", [LayerPlan([0]), LayerPlan([1, 2]), LayerPlan([3])]))
    adapter = sp.adapter_for(student)
    learned = heal.block_parameters(adapter)
    before = [p.detach().clone() for p in learned]
    untouched = [p for p in student.parameters() if all(p is not q for q in learned)]
    kept = [p.detach().clone() for p in untouched]
    stream = tokens(1, 600)[0]
    ids, masked = next(heal.masked_rows(stream, 16, adapter.mask_token_id, 5))

    def divergence():
        with torch.no_grad():
            p = torch.log_softmax(sp.adapter_for(dense).predict(ids)[masked], -1)
            q = torch.log_softmax(adapter.predict(ids)[masked], -1)
            return float((p.exp() * (p - q)).sum(-1).mean())

    start = divergence()
    steps, _ = heal.distil(student, dense, stream, minutes=0.04, batch=8, rate=3e-3, seed=0)
    assert steps > 3 and divergence() < 0.8 * start
    assert untouched and all(torch.equal(p, old) for p, old in zip(untouched, kept, strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(learned, before, strict=True))
    assert all(p.requires_grad for p in student.parameters())


def test_shares_of_masks_cover_all_noise_levels(heal):
    ids, masked = next(heal.masked_rows(torch.arange(2, 2000), 200, 0, 0))
    shares = masked.double().mean(1)
    assert torch.equal(ids == 0, masked) and masked.any(1).all()
    assert shares.min() < 0.15 and shares.max() > 0.9 and 0.45 < float(shares.mean()) < 0.6
