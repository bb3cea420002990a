"""What only the native LLaDA2 has: its configuration, and experts, which no channels of a dense MLP are."""

import pytest
import torch
from block_causals import llada2_config, toy_llada2
from toys import manual_plan, one_thread  # noqa: F401

import sinkprune as sp
from sinkprune.models.llada2 import LLaDA2Config

HEADS = [[0, 2], [1], [0, 1, 3]]


def test_a_config_without_a_block_gets_the_published_samplers():
    config = llada2_config()
    del config["block_size"]
    assert LLaDA2Config.from_dict(config).block_size == 32


def test_a_layer_of_experts_has_no_channels_of_a_dense_mlp():
    model = toy_llada2()
    message = "the MLP of layer 1 is a mixture of experts, which has no channels of its own"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in ("mask", "compact"):
        with pytest.raises(ValueError, match=message):
            sp.apply(model, manual_plan(model, HEADS, [None, [0, 3], None]), mode=mode)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    geometry = sp.adapter_for(model).geometry()
    assert geometry.channels == (40, 3 * 14 + 28, 3 * 14 + 28)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_intermediate_size": None}, "LLaDA2 config: 'moe_intermediate_size' must be a positive"),
        ({"n_group": 5}, "num_experts must be a multiple of n_group"),
        ({"topk_group": 5}, "topk_group at most n_group"),
        ({"num_experts_per_tok": 7}, "7 experts of a token must lie in 2 groups of at least 2"),
        ({"partial_rotary_factor": 0.25}, "the rotated width of a head even, got 4, 2 and 3"),
        ({"score_function": "softmax"}, "only score_function='sigmoid' is supported"),
        ({"norm_head": True}, "only norm_head=False is supported"),
    ],
)
def test_a_config_it_cannot_compute_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        LLaDA2Config.from_dict(llada2_config(**changes))
