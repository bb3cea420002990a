"""What is gathered of a dense model's activations, against sums written out in float64."""

import pytest
import torch
from block_causals import straight_sdar, toy_sdar
from dreams import straight_forward as dream_forward
from dreams import toy_dream
from hf import build
from toys import MASK, forward_of, one_thread, tokens, toy  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp
from sinkprune.evidence.activations import gather
from sinkprune.evidence.calibration import Calibration
from sinkprune.evidence.evidence import Evidence


def rows_of(count=5, length=14, padded=True):
    ids = tokens(count, length, seed=7)
    valid = None
    if padded:
        valid = torch.ones(count, length, dtype=torch.bool)
        valid[0, :4] = valid[3, :1] = False
    return Calibration(ids, ids, ids == MASK, valid)


def llada_probabilities(model, rows):
    found = []
    forward_of(model, rows.ids, rows.valid, found)
    return torch.stack(found)


def native_dream_probabilities(model, rows):
    found = []
    dream_forward(model.config.to_dict(), model.state_dict(), rows.ids, rows.valid, found)
    return torch.stack(found)


def eager_probabilities(model, rows):
    """Those that transformers returns, ``[rows, layers, heads, L, L]``."""
    model.set_attn_implementation("eager")
    absolute = {}
    if rows.valid is not None and model.config.model_type == "bert":  # counted from the first valid token
        absolute["position_ids"] = (rows.valid.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(rows.ids, attention_mask=rows.valid, output_attentions=True, **absolute).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack(found, 1)


def sdar_probabilities(model, rows):
    """Block-causal, every row counted from its first valid token."""
    found = []
    for row, ids in enumerate(rows.ids):
        real = torch.ones_like(ids, dtype=torch.bool) if rows.valid is None else rows.valid[row]
        inner = []
        straight_sdar(model.config.to_dict(), model.state_dict(), ids[real], None, inner)
        whole = torch.zeros(*inner[0].shape[:2], len(ids), len(ids), dtype=torch.float64)
        at = real.nonzero()[:, 0]
        whole[:, :, at[:, None], at] = inner[0]
        found.append(whole)
    return torch.stack(found)


def sharp(model):
    """Queries scaled up, so that some sinks stand out."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "query.weight", "q_norm.weight")):
                parameter *= 3
            if name.endswith(("Wqkv.weight",)):
                parameter[:32] *= 3
    return model


MODELS = {
    "llada": (lambda: sharp(toy()), llada_probabilities),
    "llada, grouped, biases": (lambda: sharp(toy(n_kv_heads=2, include_bias=True)), llada_probabilities),
    "dream": (lambda: sharp(toy_dream()), native_dream_probabilities),
    "live llada": (
        lambda: sharp(llada_twin(n_kv_heads=2)),
        lambda model, rows: llada_probabilities(sharp(toy(n_kv_heads=2)), rows),
    ),
    "live dream": (
        lambda: sharp(dream_twin()),
        lambda model, rows: native_dream_probabilities(sharp(toy_dream()), rows),
    ),
    "bert": (lambda: sharp(build("bert")), eager_probabilities),
    "modernbert, windows, fused": (lambda: sharp(build("modernbert")), eager_probabilities),
    "qwen3, causal": (lambda: sharp(build("qwen3")), eager_probabilities),
    "sdar, blocks": (lambda: sharp(toy_sdar()), sdar_probabilities),
}


def watched(model, rows):
    """Per layer what its linear modules are given, what its value projection and its block give, float64."""
    adapter = sp.adapter_for(model)
    layers, hooks = [], []
    for layer, block in enumerate(adapter.blocks()):
        seen, linears = {}, adapter.linears(layer)

        def keep(name, into, of=0):
            def given(module, args, out=None):
                value = args[0] if out is None else out[0] if isinstance(out, tuple) else out
                into[name] = value.detach().double()

            return given

        entry = "qkv" if "qkv" in linears else "q", "gate_up" if "gate_up" in linears else "up"
        for name, role in (("attention", entry[0]), ("heads", "o"), ("mlp", entry[1]), ("channels", "down")):
            hooks.append(linears[role].register_forward_pre_hook(keep(name, seen)))
        hooks.append(linears["qkv" if "qkv" in linears else "v"].register_forward_hook(keep("values", seen)))
        hooks.append(block.register_forward_hook(keep("stream", seen)))
        hooks.append(linears["o"].register_forward_hook(keep("attended", seen)))

        def enter(module, args, keywords, into=seen):
            into["entered"] = (args[0] if args else keywords["hidden_states"]).detach().double()

        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        layers.append(seen)
    with torch.no_grad():
        adapter.predict(rows.ids, rows.valid)
    for hook in hooks:
        hook.remove()
    return layers


def by_hand(seen, probabilities, valid, heads, kv_heads, width):
    """Every field of ``LayerActivations`` from one layer's activations and attention ``[rows, H, L, L]``."""
    names = ("attention", "mlp", "heads", "channels", "stream", "entered", "attended")
    tokens_seen = {name: [] for name in (*names, "residual", "w")}
    standing = 0
    values = seen["values"][..., -kv_heads * width :].unflatten(-1, (kv_heads, width))
    for row, attention in enumerate(probabilities.double()):
        real = torch.ones(attention.shape[-1], dtype=torch.bool) if valid is None else valid[row]
        counted = attention[:, real]  # [H, valid queries, keys]
        mass = counted.mean(1)
        residual = torch.zeros(int(real.sum()), heads, width, dtype=torch.float64)
        for head in range(heads):
            left = counted[head].clone()
            sink = int(mass[head].argmax())
            if mass[head, sink] * real.sum() >= 4:
                left[:, sink] = 0
                standing += 1
            residual[:, head] = left[:, real] @ values[row, real, head // (heads // kv_heads)]
        drawn = counted.sum((0, 1))[real]
        threshold = drawn.mean() + 2 * (drawn - drawn.mean()).square().mean().sqrt()
        tokens_seen["w"].append(1 - 1 / (1 + torch.exp(-5 * (drawn - threshold))))
        tokens_seen["residual"].append(residual.flatten(1))
        for name in names:
            tokens_seen[name].append(seen[name][row, real])
    x = {name: torch.cat(parts) for name, parts in tokens_seen.items()}
    n = len(x["w"])
    residual = x["residual"].view(n, heads, width)
    centred = residual - residual.mean(0)
    weight = 1 / (x["entered"] + x["attended"]).square().mean(1, keepdim=True)
    return standing, {
        "tokens": n,
        "heads_mean": x["heads"].mean(0),
        "heads_moment": x["heads"].T @ x["heads"] / n,
        "residual_moment": torch.stack([centred[:, h].T @ centred[:, h] / n for h in range(heads)]),
        "attention_moment": (x["attention"] ** 2).mean(0),
        "attention_moment_soft": ((x["attention"] * x["w"][:, None]) ** 2).mean(0),
        "mlp_moment": (x["mlp"] ** 2).mean(0),
        "mlp_moment_soft": ((x["mlp"] * x["w"][:, None]) ** 2).mean(0),
        "channels_mean": x["channels"].mean(0),
        "channels_moment": (x["channels"] ** 2).mean(0),
        "stream_moment": (x["stream"] ** 2).mean().item(),
        "relative_moment": (x["heads"] * weight).T @ x["heads"] / n,
        "relative_mean": (x["heads"] * weight).mean(0),
        "relative_weight": weight.mean(),
    }


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("which", MODELS)
def test_every_field_equals_the_sums_by_hand(which, padded):
    make, attention_of = MODELS[which]
    model, rows = make(), rows_of(padded=padded)
    adapter = sp.adapter_for(model)
    geometry, probabilities = adapter.geometry(), attention_of(model, rows)
    got = gather(adapter, rows, batch=2)
    standing = 0
    for layer, seen in enumerate(watched(model, rows)):
        sizes = geometry.heads[layer], geometry.kv_heads[layer], geometry.head_dim
        stood, expected = by_hand(seen, probabilities[:, layer], rows.valid, *sizes)
        standing += stood
        for name, value in expected.items():
            found = getattr(got[layer], name)
            if isinstance(value, torch.Tensor):
                assert found.dtype == torch.float64
                scale = value.abs().max().item()
                torch.testing.assert_close(found, value, atol=2e-5 * scale, rtol=0)
            else:
                assert found == pytest.approx(value, rel=1e-5), name
        heads, width = sizes[0], sizes[2]
        parts = [slice(head * width, (head + 1) * width) for head in range(heads)]
        by_head = torch.stack([expected["heads_moment"][part, part] for part in parts])
        mean = expected["heads_mean"].view(heads, width)
        torch.testing.assert_close(got[layer].head_moments(), by_head, atol=1e-4, rtol=1e-4)
        centred = by_head - torch.einsum("hi,hj->hij", mean, mean)
        torch.testing.assert_close(got[layer].head_moments(centred=True), centred, atol=1e-4, rtol=1e-4)
    every = len(rows.ids) * sum(geometry.heads)
    assert 0 < standing < every  # heads with a sink that stands out, and heads without


@pytest.mark.parametrize("make", [lambda: toy(n_kv_heads=2), lambda: build("bert"), dream_twin])
def test_what_is_in_the_padding_does_not_matter(make):
    adapter, rows = sp.adapter_for(make()), rows_of()
    other = Calibration(rows.ids.masked_fill(~rows.valid, 13), rows.targets, rows.masked, rows.valid)
    for one, two in zip(gather(adapter, rows), gather(adapter, other), strict=True):
        for name, value in vars(one).items():
            torch.testing.assert_close(value, getattr(two, name), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("make", [toy, dream_twin, lambda: build("bert")])
def test_gathering_leaves_the_model_as_it_was(make):
    model, rows = make(), rows_of()
    adapter = sp.adapter_for(model)
    with torch.no_grad():
        before = adapter.predict(rows.ids, rows.valid)
    gather(adapter, rows)
    assert not adapter.observed()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(adapter.predict(rows.ids, rows.valid), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_with_their_layer(value):
    model = toy()
    with torch.no_grad():
        model.blocks[1].up_proj.weight[3, 3] = value
    with pytest.raises(ValueError, match=r"layer 1 are not finite \(channels_mean"):
        gather(sp.adapter_for(model), rows_of())
    assert not sp.adapter_for(model).observed()
    rows = rows_of()
    with pytest.raises(ValueError, match="activations of layer 1 are not finite"):
        sp.plan(model, criterion="output_norm", ratio=0.3, calibration=rows)


def test_only_a_dense_model_that_nobody_tracks_is_looked_at():
    rows = rows_of()
    model = toy()
    with sp.track(model), pytest.raises(ValueError, match="dense model that nobody tracks"):
        gather(sp.adapter_for(model), rows)
    assert not sp.adapter_for(model).observed()
    sp.apply(model, sp.plan(model, criterion="magnitude", ratio=0.3), mode="mask")
    with pytest.raises(ValueError, match="dense model that nobody tracks"):
        gather(sp.adapter_for(model), rows)


def test_one_forward_of_each_row_feeds_everyone_who_asks():
    model, rows = toy(), rows_of()
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    evidence = Evidence(calibration=rows)
    adapter = sp.adapter_for(model)
    first = evidence.activations(adapter)
    assert evidence.activations(adapter) is first
    assert sum(seen) == len(rows.ids)
    with pytest.raises(ValueError, match="activations need calibration rows"):
        Evidence().activations(adapter)
