"""The ridge that cross-validation takes: the best over halves fitted by rows; harmless on few tokens."""

import pytest
import torch
from refits import CHANNELS, KEPT, MODELS, columns_of, given_and_made, logits, ridge_by_rows, rows_of
from toys import manual_plan, one_thread, toy  # noqa: F401

import sinkprune as sp
from sinkprune.pruning.repair import RIDGES, repaired


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("which", MODELS)
def test_the_ridge_that_cross_validation_takes_is_the_best_over_halves_fitted_by_rows(which, padded):
    model, dense, rows = MODELS[which](), MODELS[which](), rows_of(padded=padded)
    plan = manual_plan(model, [KEPT[0], KEPT[1], KEPT[0]], CHANNELS)
    adapter = sp.adapter_for(model)
    first = torch.arange(rows.ids.shape[1]).expand(rows.ids.shape) * 2 // rows.ids.shape[1] == 0
    first = first.flatten() if rows.valid is None else first[rows.valid]
    with repaired(adapter, plan, rows, "least_squares_cv"):
        adapter.mask(1, torch.tensor(KEPT[1]), torch.tensor(CHANNELS[1]))
        for role, columns in (("o", columns_of(KEPT[1])), ("down", CHANNELS[1])):
            linear, old = (sp.adapter_for(m).linears(1)[role] for m in (model, dense))
            _, y = given_and_made(dense, rows, 1, role)
            x = given_and_made(model, rows, 1, role)[0][:, columns]
            before = old.weight[:, columns].detach().double()
            fits = {}
            for ridge in (None, *RIDGES):
                error = 0.0
                for seen, unseen in ((first, ~first), (~first, first)):
                    weight, bias = ridge_by_rows(x[seen], y[seen], before, old.bias is not None, ridge)
                    error += (x[unseen] @ weight.T + (0 if bias is None else bias) - y[unseen]).square().sum()
                fits[ridge] = error.item()
            best = min(fits, key=fits.get)
            expected, bias = ridge_by_rows(x, y, before, old.bias is not None, best)
            torch.testing.assert_close(linear.weight[:, columns].double(), expected, atol=2e-4, rtol=1e-3)
            assert (linear.bias is None) == (bias is None)
        adapter.mask(1, None, None)


@pytest.mark.filterwarnings("ignore:repair has 12 calibration tokens")
def test_where_tokens_are_few_cross_validation_repairs_what_a_fixed_ridge_harms():
    """Against rows that were not fitted: the fixed ridge follows the noise of twelve tokens."""
    few, others = rows_of(1, padded=False), rows_of(24, padded=False, seed=8)
    plan = manual_plan(toy(), [[0, 3], KEPT[0], KEPT[0]], [CHANNELS[1], None, None])
    goal, error = logits(toy(), others), {}
    for method in (None, "least_squares", "least_squares_cv"):
        pruned = sp.apply(toy(), plan, calibration=few, repair=method)
        error[method] = (logits(pruned, others) - goal).square().mean().item()
    assert error["least_squares_cv"] < error["least_squares"]
    assert error["least_squares_cv"] < 1.05 * error[None]
