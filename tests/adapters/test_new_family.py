"""A new family is one adapter file and nothing else: written here into a module of its own, then every verb
works."""

import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import one_thread, tokens  # noqa: F401

import sinkprune as sp
from sinkprune.adapters import base

ADAPTER = '''
"""Adapter of the toy family of this test."""

from functools import partial
from types import SimpleNamespace

from sinkprune.adapters import Adapter, AttentionWeights, Geometry, MLPWeights, register_adapter


@register_adapter
class Notes(Adapter):
    family = "notes"

    @classmethod
    def recognises(cls, model):
        return hasattr(model, "staves") and all(hasattr(stave, "listen") for stave in model.staves)

    def geometry(self):
        depth = len(self.model.staves)
        return Geometry(
            self.family, hidden=24, head_dim=6, vocabulary=33, context=40, heads=(4,) * depth,
            kv_heads=(2,) * depth, channels=(20,) * depth,
        )

    mask_token_id = 32

    def attention_weights(self, layer):
        listen = self.model.staves[layer].listen
        return AttentionWeights(listen.q.weight, listen.k.weight, listen.v.weight, listen.o.weight)

    def mlp_weights(self, layer):
        play = self.model.staves[layer].play
        return MLPWeights(play.gate.weight, play.up.weight, play.down.weight)

    def install(self, layer, attention, mlp):
        stave = self.model.staves[layer]
        stave.listen = attention or stave.listen
        stave.play = mlp or stave.play

    def mask(self, layer, heads, channels):
        stave = self.model.staves[layer]
        stave.listen.kept_heads, stave.play.kept_channels = heads, channels

    def observe(self, observer):
        for layer, stave in enumerate(self.model.staves):
            stave.listen.observer = None if observer is None else partial(observer, layer)

    def observed(self):
        return self.model.staves[0].listen.observer is not None

    def predict(self, input_ids, attention_mask=None, rows=slice(None)):
        return self.model(input_ids, attention_mask)[:, rows]
'''


class Listen(nn.Module):
    """Attention of the family's own modelling code, which asks ``ops.attention``."""

    def __init__(self):
        super().__init__()
        self.q, self.o = (nn.Linear(24, 24, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(24, 12, bias=False) for _ in range(2))
        self.kept_heads = self.observer = None

    def forward(self, x, cos, sin, padding):
        q, k, v = (m(x).unflatten(-1, (-1, 6)).transpose(1, 2) for m in (self.q, self.k, self.v))
        out, lse = sp.ops.attention(q, k, v, kept_heads=self.kept_heads, key_padding_mask=padding)
        if self.observer is not None:
            from sinkprune.models.modules import AttentionCall

            self.observer(AttentionCall(q, k, lse, self.kept_heads, None, padding))
        return self.o(out.transpose(1, 2).flatten(2))


class Play(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(24, 20, bias=False) for _ in range(2))
        self.down = nn.Linear(20, 24, bias=False)
        self.kept_channels = None

    def forward(self, x):
        hidden = F.silu(self.gate(x)) * self.up(x)
        if self.kept_channels is not None:
            hidden = torch.zeros_like(hidden).index_copy(
                -1, self.kept_channels, hidden[..., self.kept_channels]
            )
        return self.down(hidden)


class Stave(nn.Module):
    def __init__(self):
        super().__init__()
        self.listen, self.play = Listen(), Play()

    def forward(self, x, padding):
        x = x + self.listen(F.layer_norm(x, (24,)), None, None, padding)
        return x + self.play(F.layer_norm(x, (24,)))


class Score(nn.Module):
    def __init__(self):
        super().__init__()
        self.notes, self.places = nn.Embedding(33, 24), nn.Embedding(40, 24)
        self.staves = nn.ModuleList(Stave() for _ in range(3))

    def forward(self, ids, attention_mask=None):
        padding = None if attention_mask is None else attention_mask.bool()
        x = self.notes(ids) + self.places.weight[: ids.shape[1]]
        for stave in self.staves:
            x = stave(x, padding)
        return F.layer_norm(x, (24,)) @ self.notes.weight.T


@pytest.fixture
def family(tmp_path):
    path = tmp_path / "notes.py"
    path.write_text(ADAPTER)
    spec = importlib.util.spec_from_file_location("notes_adapter", path)
    module = importlib.util.module_from_spec(spec)
    before, sys.modules["notes_adapter"] = list(base._FAMILIES), module
    spec.loader.exec_module(module)
    yield module
    base._FAMILIES[:] = before
    del sys.modules["notes_adapter"]


def test_without_its_file_the_family_is_unknown():
    with pytest.raises(TypeError, match="no adapter recognises a model of type Score"):
        sp.adapter_for(Score())


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_one_file_makes_every_verb_work(family, mode, tmp_path):
    model, ids = Score().eval(), tokens(2, 9, vocabulary=32)
    assert type(sp.adapter_for(model)) is family.Notes
    with sp.track(model) as tracker, torch.no_grad():
        model(ids)
    assert tracker.result().mass.shape == (3, 2, 4)
    profile = sp.profile(model, tokens(2, 4, vocabulary=32), steps=4, gen_length=8)
    profile.save(tmp_path / "profile")
    profile = sp.SinkProfile.load(tmp_path / "profile")
    plan = sp.plan(model, profile, "sink_variance", ratio=0.4, unit="parameters", targets=["heads", "mlp"])
    assert plan.parameters_removed == pytest.approx(0.4, abs=0.02)
    assert sp.ceiling(model, plan, length=16) > 1.2

    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for stave, kept in zip(zeroed.staves, plan.layers, strict=True):
            for head in set(range(4)) - set(kept.kept_heads):
                stave.listen.o.weight[:, head * 6 : head * 6 + 6] = 0
            stave.play.down.weight[:, sorted(set(range(20)) - set(kept.kept_channels))] = 0
    sp.apply(model, plan, mode=mode)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), zeroed(ids), atol=1e-5, rtol=0)
    *_, filled = sp.denoise(model, ids, steps=4, gen_length=8)
    assert (filled != 32).all()
    if mode == "mask":
        assert sp.adapter_for(sp.restore(model)).form == "dense"
