"""Published sizes: whole on meta against the sizes that their publishers name, and two full-width layers with
real tensors planned and applied."""

import pytest
import torch
from toys import one_thread  # noqa: F401

import sinkprune as sp
from sinkprune.commands.families_tables import dense_layers, even_plan
from sinkprune.models.published import NATIVE, native_kind
from sinkprune.models.shapes import PUBLISHED


def lay_out(config):
    with torch.device("meta"):
        return NATIVE[native_kind(config)](config)


@pytest.mark.parametrize(("name", "tolerance"), [
    ("Fast-dLLM v2 7B", 0), ("Nemotron-Labs-Diffusion-3B", 1e-5), ("iLLaDA-8B", 1e-3), ("LLaDA-8B", 1e-3),
    ("Stable-DiffCoder-8B", 1e-3), ("LLaDA2.0-mini, LLaDA2.1-mini", 0.02),
])  # fmt: skip
def test_a_layout_has_as_many_parameters_as_are_published(name, tolerance):
    shape = PUBLISHED[name]
    count = sum(parameter.numel() for parameter in lay_out(shape.config).parameters())
    assert shape.size is not None and abs(count / shape.size[0] - 1) <= tolerance


def test_nemotron_3b_has_237_tensors_as_published():
    assert len(lay_out(PUBLISHED["Nemotron-Labs-Diffusion-3B"].config).state_dict()) == 237


SMALL = {"vocab_size": 64, "embedding_size": 64, "mask_token_id": 63}


@pytest.mark.parametrize("name", [n for n in PUBLISHED if not n.startswith(("LLaDA", "Dream"))])
def test_two_layers_of_the_published_width_are_planned_and_applied(name):
    """With a small vocabulary, in bfloat16, kept small by filling from one row of random numbers."""
    config = PUBLISHED[name].config | SMALL | {"num_hidden_layers": 2}
    model = lay_out(config).to(torch.bfloat16).to_empty(device="cpu").eval()
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            scale = tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 1.0
            flat = tensor.view(-1)
            for first in range(0, flat.numel(), noise.numel()):
                part = flat[first : first + noise.numel()]
                torch.mul(noise[: part.numel()], scale, out=part)
    adapter, ids = sp.adapter_for(model), torch.arange(1, 13)[None]
    plan = sp.plan(model, criterion="magnitude", ratio=0.38, unit="parameters", targets=("heads", "mlp"))
    assert 0.3 < plan.parameters_removed < 0.45
    with torch.no_grad():
        masked = sp.apply(model, plan, mode="mask")
        expected = sp.adapter_for(masked).predict(ids).float()
        sp.restore(masked)
        compact = sp.apply(model, plan, low_memory=True)
        got = sp.adapter_for(compact).predict(ids).float()
    assert adapter.geometry().num_layers == 2
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)


def test_even_plans_leave_experts_their_channels():
    adapter = sp.adapter_for(lay_out(PUBLISHED["LLaDA2.0-mini, LLaDA2.1-mini"].config))
    dense = dense_layers(adapter)
    assert dense == {0}
    plan = even_plan(adapter.geometry(), 0.5, 0.5, dense)
    assert [layer.kept_channels is None for layer in plan.layers] == [False] + [True] * 19
    assert plan.heads_removed == 20 * 16 // 2
