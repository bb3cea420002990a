"""What the package wrote before its modules moved into rooms (``data/make.py``), and of models with experts
before its plans knew those (``data/make_experts.py``), still loads, bit for bit."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from toys import one_thread  # noqa: F401

import sinkprune as sp

DATA = Path(__file__).parent / "data"
EXPECTED = {
    name: values
    for file in ("expected.json", "expected_experts.json")
    for name, values in json.loads((DATA / file).read_text()).items()
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 32, 32], [6, 32, 5, 3, 5, 8, 32, 7, 9]])


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def assert_as_before(model, expected):
    assert {name: digest(tensor) for name, tensor in model.state_dict().items()} == expected["tensors"]
    with torch.no_grad():
        logits = model(IDS).logits[:, ::4, ::8]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llada", "qwen3", "llada2"])
@pytest.mark.parametrize("form", ["dense", "repaired"])
def test_a_checkpoint_from_before_loads_bit_for_bit_and_is_saved_so(tmp_path, family, form):
    expected = EXPECTED[f"{family}-{form}"]
    model, _ = sp.load(DATA / f"{family}-{form}")
    assert_as_before(model, expected)
    assert sp.adapter_for(model).form == ("dense" if form == "dense" else "compact")
    if form == "repaired":
        added = any(".bias" in name for name in expected["tensors"])
        assert added == (family != "llada2"), "the repair of make.py's time added biases"
    assert_as_before(sp.load(sp.save(model, tmp_path / "again"))[0], expected)


@pytest.mark.parametrize("family", ["llada", "qwen3", "llada2"])
def test_a_plan_from_before_fits_its_model(family):
    model, _ = sp.load(DATA / f"{family}-dense")
    assert sp.adapter_for(model).fingerprint() == EXPECTED[f"{family}-dense"]["fingerprint"]
    plan = sp.PrunePlan.load(DATA / f"{family}-plan.json")
    assert_as_before(sp.apply(model, plan, mode="mask"), EXPECTED[f"{family}-masked"])


@pytest.mark.parametrize("family", ["llada", "qwen3", "llada2"])
def test_a_plan_from_before_is_written_as_it_was(tmp_path, family):
    before = DATA / f"{family}-plan.json"
    sp.PrunePlan.load(before).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == before.read_bytes()


def test_a_checkpoint_from_before_can_be_replaced(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(DATA / "llada-repaired", folder)
    (folder / "tokenizer.json").write_text("{}")  # saved with it, and not named in the manifests of then
    sp.save(sp.load(DATA / "llada-dense")[0], folder, overwrite=True)
    assert sp.adapter_for(sp.load(folder)[0]).form == "dense"
