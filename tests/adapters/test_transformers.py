"""transformers' own models: pruned equals zeroed by hand, statistics equal materialised attention."""

import copy

import pytest
import torch
from hf import FAMILIES, build, padded, valid_logits, zeroed_by_hand
from toys import manual_plan, one_thread  # noqa: F401

import sinkprune as sp

UNEVEN = [[0, 2], [1], [0, 1, 3]]
CHANNELS = [list(range(0, 40, 3)), None, [5]]
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["heads", "heads and channels"])
@every_family
def test_masked_and_compact_equal_zeroed_by_hand(family, channels, padding):
    model = build(family)
    plan = manual_plan(model, UNEVEN, channels)
    expected = valid_logits(zeroed_by_hand(model, UNEVEN, channels), padding)
    assert (expected - valid_logits(model, padding)).abs().max() > 1e-2
    masked = valid_logits(sp.apply(copy.deepcopy(model), plan, mode="mask"), padding)
    compact = valid_logits(sp.apply(model, plan), padding)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(compact, expected, atol=1e-5, rtol=0)
