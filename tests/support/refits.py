"""Models to repair, and what a refitted projection should be by ``numpy.linalg.lstsq``."""

import numpy as np
import torch
from dreams import toy_dream
from hf import build
from toys import MASK, tokens, toy
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp
from sinkprune.evidence.calibration import Calibration
from sinkprune.pruning.repair import RIDGE

KEPT = [[0, 1, 2, 3], [0, 2], [1, 2, 3]]
CHANNELS = [None, list(range(0, 40, 2)), None]
MODELS = {
    "llada": lambda: toy(n_kv_heads=2), "dream": toy_dream, "live llada": llada_twin,
    "live dream": dream_twin, "bert": lambda: build("bert"), "qwen3": lambda: build("qwen3"),
}  # fmt: skip


def rows_of(count=24, length=12, padded=True, seed=3):
    ids = tokens(count, length, seed=seed)
    valid = None
    if padded:
        valid = torch.ones(count, length, dtype=torch.bool)
        valid[::3, :4] = False
    return Calibration(ids, ids, ids == MASK, valid)


def logits(model, rows):
    with torch.no_grad():
        found = sp.adapter_for(model).predict(rows.ids, rows.valid)
    return found if rows.valid is None else found[rows.valid]


def given_and_made(model, rows, layer, role):
    """Inputs ``[tokens, columns]`` and outputs ``[tokens, hidden]`` of a projection, float64."""
    found = []
    linear = sp.adapter_for(model).linears(layer)[role]
    hook = linear.register_forward_hook(lambda m, args, out: found.append((args[0], out)))
    logits(model, rows)
    hook.remove()
    seen = torch.ones(rows.ids.shape, dtype=torch.bool) if rows.valid is None else rows.valid
    return tuple(x[seen].double() for x in found[0])


def columns_of(heads, width=8):
    return [head * width + i for head in heads for i in range(width)]


def ridge_by_rows(x, y, weight, biased, ridge=RIDGE):
    """The weights and, where ``biased``, the bias that ``numpy.linalg.lstsq`` finds, the ridge as extra rows:
    towards ``weight``, and of the inputs' mean square."""
    x_mean, y_mean = (t.mean(0) if biased else 0 * t.mean(0) for t in (x, y))
    if ridge is None:
        return weight, (y - x @ weight.T).mean(0) if biased else None
    strength = ridge * x.square().mean()
    rows = np.vstack([(x - x_mean).numpy(), np.sqrt(len(x) * strength.item()) * np.eye(x.shape[1])])
    left = (y - y_mean) - (x - x_mean) @ weight.T
    change = np.linalg.lstsq(rows, np.vstack([left.numpy(), np.zeros(weight.T.shape)]), rcond=None)[0]
    weight = weight + torch.from_numpy(change).T
    return weight, y_mean - weight @ x_mean if biased else None
