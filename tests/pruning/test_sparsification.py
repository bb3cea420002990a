"""Weight-level pruning: every method against the published formula in float64, patterns, refusals."""

import math

import pytest
import torch
from hf import build
from toys import MASK, assert_same_tensors, bits, forward_of, manual_plan, one_thread, tokens, toy  # noqa: F401
from upstream_twins import llada_twin

import sinkprune as sp
from sinkprune.evidence.calibration import TEN_LEVELS, Calibration, calibrate
from sinkprune.evidence.sink_mask import SinkMask, sink_masks
from sinkprune.generation.trajectories import trajectories
from sinkprune.pruning.sparsification import METHODS, sparsify, sparsity_of
from sinkprune.pruning.sparsification.methods import Target, invert, prune_sparsegpt

ROLES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out", "gate": "ff_proj", "up": "up_proj",
         "down": "ff_out"}  # fmt: skip
PATTERNS = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}


def rows(model, count: int = 4, length: int = 16, **options) -> Calibration:
    text = tokens(count, length, seed=9)
    return calibrate(model, text, sequences=count, levels=TEN_LEVELS[::3], **options)


def inputs_of(model, linears, calibration, batch=5) -> dict[str, torch.Tensor]:
    """What each linear module is given on the calibration rows: float64 ``[rows, L, columns]``."""
    seen = {role: [] for role in linears}
    hooks = [
        module.register_forward_pre_hook(lambda m, x, role=role: seen[role].append(x[0].double()))
        for role, module in linears.items()
    ]
    for part in calibration.batches(batch):
        model(part.ids, attention_mask=part.valid)
    for hook in hooks:
        hook.remove()
    return {role: torch.cat(parts) for role, parts in seen.items()}


def soft_masks(model, calibration, alpha=5.0, sigma=2.0) -> torch.Tensor:
    """The published sink mask from independent float64 attention probabilities: ``[rows, L]``."""
    probabilities = []
    forward_of(model, calibration.ids, calibration.valid, probabilities)
    masks = torch.zeros(calibration.ids.shape, dtype=torch.float64)
    for i, attention in enumerate(probabilities):
        real = torch.ones(attention.shape[-1], dtype=torch.bool)
        if calibration.valid is not None:
            real = calibration.valid[i]
        mass = attention[:, :, real][..., real].sum((0, 1, 2))  # over layers, heads and queries
        threshold = mass.mean() + sigma * mass.std(correction=0)
        masks[i, real] = torch.sigmoid(alpha * (mass - threshold))
    return masks


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argsort(1)[:, :count], True)


def removed_by_rows(scores, sparsity, group):
    if group is None:
        return lowest(scores, int(scores.shape[1] * sparsity))
    zeros, of = group
    return lowest(scores.reshape(-1, of), zeros).reshape(scores.shape)


def published_wanda(weight, x, sparsity, group):
    norms = x.flatten(0, 1).square().sum(0).sqrt()
    return weight.masked_fill(removed_by_rows(weight.abs() * norms, sparsity, group), 0)


def published_sink_wanda(weight, x, sparsity, group):
    norms = x.square().sum(1).sqrt().sum(0)
    return weight.masked_fill(removed_by_rows(weight.abs() * norms, sparsity, group), 0)


def published_sparsegpt(weight, x, sparsity, group, damping=0.01, block=128):
    """Optimal brain surgeon, column by column, with the inverse of what is left of the Hessian each time."""
    flat = x.flatten(0, 1)
    hessian = 2 / len(x) * flat.T @ flat
    n = len(hessian)
    hessian += damping * hessian.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    w = weight.clone()
    gone = torch.zeros_like(w, dtype=torch.bool)
    # of the upper factor U of the inverse: U_jj^2 is the first entry of (H[j:, j:])^-1
    left = [torch.linalg.inv(hessian[j:, j:]) for j in range(n)]
    diagonal = torch.stack([inverse[0, 0].sqrt() for inverse in left])
    for j in range(n):
        if group is None and j % block == 0:
            part = slice(j, min(j + block, n))
            scores = (w[:, part] / diagonal[part]).square()
            chosen = scores.flatten().argsort()[: int(scores.numel() * sparsity)]
            gone[:, part] = (
                torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, chosen, True).view_as(scores)
            )
        elif group is not None and j % group[1] == 0:
            part = slice(j, j + group[1])
            gone[:, part] = lowest((w[:, part] / diagonal[part]).square(), group[0])
        error = torch.where(gone[:, j], w[:, j], 0.0) / left[j][0, 0]
        w[:, j:] -= error[:, None] * left[j][0]
        w[:, j] = torch.where(gone[:, j], 0.0, w[:, j])
    return w


FORMULAS = {
    "wanda": published_wanda, "sink_wanda": published_sink_wanda,
    "sparsegpt": published_sparsegpt, "sink_sparsegpt": published_sparsegpt,
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", FORMULAS)
def test_every_layer_is_pruned_by_the_published_formula_given_the_pruned_layers_before_it(method, pattern):
    model, dense = toy(seed=1, sharpness=3.0), toy(seed=1, sharpness=3.0)
    calibration = rows(dense)
    weights = torch.ones(calibration.ids.shape, dtype=torch.float64)
    if method.startswith("sink"):
        weights = 1 - soft_masks(dense, calibration, 2.0, 1.0)
        assert (weights < 0.1).sum() > 4  # there is something to tell apart
    sparsify(model, method, 0.5, pattern, calibration, sink_mask=SinkMask(2.0, 1.0), batch=3)
    for layer in range(3):
        linears = {role: dense.blocks[layer].get_submodule(name) for role, name in ROLES.items()}
        given = inputs_of(dense, linears, calibration)
        for role, name in ROLES.items():
            x = given[role] * weights[..., None]
            expected = FORMULAS[method](linears[role].weight.double(), x, 0.5, PATTERNS[pattern])
            got = model.blocks[layer].get_submodule(name).weight.double()
            assert torch.equal(got == 0, expected == 0), (layer, role)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        dense.blocks[layer].load_state_dict(model.blocks[layer].state_dict())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_carries_errors_over_its_blocks_of_128_columns(pattern):
    x, weight = torch.randn(2, 150, 200).double(), torch.randn(6, 200).double()
    x = x @ torch.randn(200, 200).double()
    expected = published_sparsegpt(weight, x, 0.5, PATTERNS[pattern])
    solve = invert((2 / len(x) * x.flatten(0, 1).T @ x.flatten(0, 1)).float())
    got = prune_sparsegpt(weight.float(), solve.factor, Target.of(0.5, pattern))
    assert (solve.dtype, solve.damping) == (torch.float32, 0.01)
    assert torch.equal(got == 0, expected == 0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_magnitude_takes_the_smallest_of_each_matrix():
    model = toy(seed=2)
    before = bits(model)
    sparsify(model, "magnitude", 0.3)
    for name, weight in model.state_dict().items():
        if "blocks" in name and "norm" not in name:
            old = before[name].abs()
            threshold = old.flatten().sort().values[int(0.3 * old.numel())]
            assert torch.equal(weight, before[name].masked_fill(old < threshold, 0)), name
        else:  # embeddings, norms, LM head
            assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("method", METHODS)
def test_patterns_have_exactly_n_zeros_in_every_m(method, pattern):
    model = toy(seed=3)
    sparsify(model, method, 0.5, pattern, rows(model))
    zeros, group = PATTERNS[pattern]
    for block in model.blocks:
        for name in ROLES.values():
            weight = block.get_submodule(name).weight
            assert (weight.reshape(-1, group) == 0).sum(1).unique().tolist() == [zeros], name


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("method", METHODS)
def test_the_share_of_zeros_is_the_one_asked_for(method, sparsity):
    model = toy(seed=4)
    sparsify(model, method, sparsity, calibration=rows(model))
    shares = sparsity_of(model)
    assert len(shares) == 3 * 7
    assert all(abs(share - sparsity) < 1 / 32 for share in shares.values())
    assert (model.sparsity.method, model.sparsity.sparsity) == (method, sparsity)


def test_sparsegpt_reconstructs_better_than_wanda_and_wanda_than_magnitude():
    error = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model, dense = toy(seed=5, n_layers=1), toy(seed=5, n_layers=1)
        with torch.no_grad():  # inputs of very different size, as trained models have
            for each in (model, dense):
                each.blocks[0].attn_norm.weight.copy_(torch.logspace(-1, 1, 32))
        calibration = rows(dense, count=16)
        sparsify(model, method, 0.5, calibration=calibration)
        x = inputs_of(dense, {"q": dense.blocks[0].q_proj}, calibration)["q"]
        change = (model.blocks[0].q_proj.weight - dense.blocks[0].q_proj.weight).double()
        error[method] = (x @ change.T).square().mean().item()
    assert error["sparsegpt"] < 0.9 * error["wanda"] < 0.9 * error["magnitude"]


@pytest.mark.parametrize("padding", [False, True], ids=["full rows", "padded rows"])
def test_the_sink_mask_is_the_published_one(padding):
    model = toy(seed=6, sharpness=3.0)
    attention_mask = torch.ones(4, 16, dtype=torch.bool)
    if padding:
        attention_mask[0, :5] = attention_mask[2, :9] = False
    calibration = rows(model, attention_mask=attention_mask)
    expected = soft_masks(model, calibration)
    got = torch.cat(sink_masks(sp.adapter_for(model), calibration, SinkMask(), batch=3))
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)
    assert 0 < (got > 0.5).sum() < got.numel() / 4
    softer = torch.cat(sink_masks(sp.adapter_for(model), calibration, SinkMask(alpha=0.5, sigma=1.0)))
    torch.testing.assert_close(softer.double(), soft_masks(model, calibration, 0.5, 1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_count(method):
    whole, padded = toy(seed=7, sharpness=3.0), toy(seed=7, sharpness=3.0)
    short = rows(whole)
    pad = torch.zeros(len(short.ids), 5, dtype=torch.long)
    wider = [torch.cat((part, pad.to(part.dtype)), 1) for part in (short.ids, short.targets, short.masked)]
    valid = torch.cat((torch.ones_like(short.masked), pad.bool()), 1)
    sparsify(whole, method, 0.5, calibration=short)
    sparsify(padded, method, 0.5, calibration=Calibration(*wider, valid))
    for (name, a), b in zip(whole.state_dict().items(), padded.state_dict().values(), strict=True):
        assert torch.equal(a == 0, b == 0), name
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_trajectories_are_the_samplers_own_states_and_calibrate():
    model = toy(seed=8)
    prompt = tokens(2, 6)
    states = [ids for ids in sp.denoise(model, prompt, steps=8, gen_length=16)]
    canvas = torch.cat((prompt, torch.full((2, 16), MASK)), 1)
    calibration = trajectories(model, prompt, steps=8, gen_length=16, states=4)
    assert torch.equal(calibration.ids, torch.cat((canvas, states[1], states[3], states[5])))
    assert torch.equal(calibration.masked, calibration.ids == MASK)
    assert torch.equal(calibration.targets, states[-1].repeat(4, 1))
    sparsify(model, "sink_wanda", 0.5, calibration=calibration)
    with pytest.raises(ValueError, match=r"states must lie in 1\.\.8 \(the steps\), got 9"):
        trajectories(model, prompt, steps=8, gen_length=16, states=9)


@pytest.mark.parametrize("make", [lambda: build("bert"), lambda: build("modernbert"), llada_twin,
                                  lambda: build("qwen3, bidirectional")],
                         ids=["bert", "modernbert", "live llada", "qwen3"])  # fmt: skip
def test_live_and_transformers_models_are_pruned_in_place(make):
    model = make()
    calibration = rows(model, mask_token_id=MASK)
    before = model(calibration.ids).logits
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    sparsify(model, "sink_sparsegpt", 0.5, "2:4", calibration)
    assert set(sparsity_of(model).values()) == {0.5}
    assert identities == {name: id(parameter) for name, parameter in model.named_parameters()}
    after = model(calibration.ids).logits
    assert 0 < (after - before).abs().mean() < before.abs().mean()


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_failure_half_way_leaves_the_model_as_it_was(method):
    model = toy(seed=9)
    before = bits(model)

    def fail(line: str) -> None:
        if line.startswith("layer 2"):
            assert not torch.equal(
                model.blocks[0].q_proj.weight, before["model.transformer.blocks.0.q_proj.weight"]
            )
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparsify(model, method, 0.5, calibration=rows(model), progress=fail)
    assert_same_tensors(model.state_dict(), before)
    assert getattr(model, "sparsity", None) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


REFUSED = {
    "sparsity 0": (dict(sparsity=0), r"sparsity must lie in \(0, 1\), got 0"),
    "sparsity 1": (dict(sparsity=1.0), r"sparsity must lie in \(0, 1\), got 1.0"),
    "sparsity nan": (dict(sparsity=math.nan), r"sparsity must lie in \(0, 1\), got nan"),
    "sparsity text": (dict(sparsity="half"), r"sparsity must lie in \(0, 1\), got 'half'"),
    "method": (dict(method="random"), "method must be one of magnitude, wanda.*got 'random'"),
    "pattern": (dict(pattern="1:4"), "pattern must be 'unstructured', '2:4' or '4:8', got '1:4'"),
    "pattern's sparsity": (dict(pattern="2:4", sparsity=0.25), "pattern 2:4 is a sparsity of 0.5, got 0.25"),
    "no calibration": (dict(calibration=None), r"method 'wanda' needs calibration=calibrate"),
    "few rows": (
        dict(method="sparsegpt", calibration="few"),
        "sparsegpt needs at least 40 calibration tokens, the inputs of the widest linear layer, got 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_in_one_line_before_anything_changes(case):
    changes, message = REFUSED[case]
    model = toy()
    before = bits(model)
    options = {"method": "wanda", "sparsity": 0.5, "calibration": rows(model)} | changes
    if options["calibration"] == "few":
        options["calibration"] = calibrate(model, tokens(1, 16), levels=(0.5,))
    with pytest.raises(ValueError, match=message) as caught:
        sparsify(model, **options)
    assert "\n" not in str(caught.value)
    assert_same_tensors(model.state_dict(), before)


def test_models_that_are_not_dense_are_refused():
    for mode in ("mask", "compact"):
        model = toy()
        sp.apply(model, manual_plan(model, [[0, 1]] * 3), mode=mode)
        with pytest.raises(ValueError, match=rf"already pruned \({mode} form\)"):
            sparsify(model, "magnitude")
    model = sparsify(toy(), "magnitude", 0.5)
    with pytest.raises(ValueError, match="sparse already: sparsify the dense model"):
        sparsify(model, "magnitude", 0.75)
    elsewhere = toy()
    elsewhere.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"sparse already: 50 % of 0\.q are zeros"):
        sparsify(elsewhere, "magnitude", 0.75)
    with pytest.raises(ValueError, match="pattern 4:8 needs widths that 8 divides: down of layer 0 has 36"):
        sparsify(toy(mlp_hidden_size=36), "magnitude", 0.5, "4:8")
    with pytest.raises(ValueError, match="compiled"):
        sparsify(_compiled(toy()), "magnitude")


def _compiled(model):
    model.blocks[0].compile()
    return model


def test_a_hessian_that_float32_cannot_invert_is_solved_in_float64_and_then_damped_more():
    close = torch.tensor([[1.0, 1.01 - 1e-9], [1.01 - 1e-9, 1.0]], dtype=torch.float64)
    solve = invert(close)
    assert (solve.dtype, solve.damping) == (torch.float64, 0.01)
    indefinite = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    solve = invert(indefinite)
    assert solve.damping == pytest.approx(1.0)
    upper = solve.factor.double()
    inverse = torch.linalg.inv(indefinite.double() + torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(upper.T @ upper, inverse, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="not finite"):
        invert(torch.full((2, 2), torch.nan))


def test_inputs_that_are_always_zero_lose_their_weights_and_nothing_breaks():
    model = toy(seed=10)
    with torch.no_grad():
        model.blocks[1].attn_norm.weight[:3] = 0
    sparsify(model, "sparsegpt", 0.5, calibration=rows(model))
    assert (model.blocks[1].q_proj.weight[:, :3] == 0).all()
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())


@pytest.mark.parametrize("make", [toy, llada_twin, lambda: build("bert")], ids=["native", "live", "bert"])
def test_a_sparse_model_saves_and_loads_with_its_zeros_and_its_note(make, tmp_path):
    model = make()
    sparsify(model, "sink_wanda", 0.5, "2:4", rows(model, mask_token_id=MASK))
    ids = tokens(2, 8)
    sp.save(model, tmp_path / "sparse")
    loaded, _ = sp.load(tmp_path / "sparse")
    assert loaded.sparsity == model.sparsity == sp.Sparsity("sink_wanda", 0.5, "2:4")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert set(sparsity_of(loaded).values()) == {0.5}
    for layer in range(3):
        own = sp.adapter_for(model).linears(layer)
        for role, module in sp.adapter_for(loaded).linears(layer).items():
            assert torch.equal(module.weight, own[role].weight), role
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(loaded, "magnitude")


def test_a_sparse_model_can_be_made_compact_and_keeps_both_notes(tmp_path):
    model = sparsify(toy(), "magnitude", 0.5, "2:4")
    sp.apply(model, manual_plan(model, [[0, 2]] * 3))
    sp.save(model, tmp_path / "both")
    loaded, _ = sp.load(tmp_path / "both")
    assert (loaded.sparsity, loaded.prune_form) == (model.sparsity, "compact")
    weight = loaded.blocks[0].attention.qkv_proj.weight
    assert (weight.reshape(-1, 4) == 0).sum(1).unique().tolist() == [2]


def test_dense_checkpoints_load_without_a_note(tmp_path):
    sp.save(toy(), tmp_path / "dense")
    assert getattr(sp.load(tmp_path / "dense")[0], "sparsity", None) is None
