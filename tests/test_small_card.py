"""The yardsticks beside "small": the model of both neighbours, the masks, and Wikipedia's prose."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def card():
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("small_card", EXAMPLES / "small_card.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def test_the_neighbour_model_is_its_formula_written_out_densely(card):
    stream = torch.randint(0, 9, (120,), generator=torch.Generator().manual_seed(0))
    words, discount = 12, 0.75  # three words never seen
    pairs = torch.zeros(words, words)
    for left, right in zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True):
        pairs[left, right] += 1
    unigram = (torch.bincount(stream, minlength=words) + 0.5) / (len(stream) + words / 2)
    given = torch.empty(words, words)  # P(right | left)
    for left in range(words):
        total, seen = pairs[left].sum(), (pairs[left] > 0).sum()
        spare = discount * seen / total if total else 1.0
        given[left] = (pairs[left] - discount).clamp(min=0) / total.clamp(min=1) + spare * unigram
    ratio = (given / unigram).log()
    ids = torch.randint(0, 9, (5, 10), generator=torch.Generator().manual_seed(1))
    ids[0, 4] = 11
    masked = torch.rand(5, 10, generator=torch.Generator().manual_seed(2)) < 0.5
    masked[0, 3], masked[0, 4] = True, False
    expected = []
    for row, column in masked.nonzero().tolist():
        logits = unigram.log()
        if column and not masked[row, column - 1]:
            logits = logits + ratio[ids[row, column - 1]]
        if column < 9 and not masked[row, column + 1]:
            logits = logits + ratio[:, ids[row, column + 1]]
        expected.append(-logits.log_softmax(0)[ids[row, column]])
    got = card.Neighbours(stream, words, discount).losses(ids, masked, neighbours=True)
    torch.testing.assert_close(got, torch.stack(expected))


def test_a_mean_over_masked_tokens_weighs_tokens_not_windows(card):
    masked = torch.tensor([[True, True, True, False], [False, True, False, False]])
    figure = card.per_window(torch.tensor([1.0, 2.0, 3.0, 10.0]), masked)
    assert figure.mean == pytest.approx(4.0) and figure.low == 2.0 and figure.high == 10.0


def test_prose_is_left_of_wikitext(card):
    prose = (
        "The '''river''' [[Thames|runs]] through [[London]]<ref>Ackroyd {{p|3}}</ref> &ndash; "
        + "water " * 20
    )
    page = f"{{{{Infobox|a={{{{b}}}}|text={'x' * 200}}}}}\n{prose}\n== See also ==\n* {'a list ' * 30}\n"
    page += f"[[File:a.png|thumb|{'long [[caption]] ' * 20}]]\n{{| class=table\n{'| cell ' * 40}\n|}}"
    assert card.plain(page) == "The river runs through London – " + ("water " * 20).strip()
