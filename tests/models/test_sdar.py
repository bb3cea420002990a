"""What only the native SDAR has: its configuration."""

import pytest
from block_causals import sdar_config
from toys import one_thread  # noqa: F401

from sinkprune.models.sdar import SDARConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": None}, "SDAR config: 'intermediate_size' must be a positive integer"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 9}, "the rotated width of a head even"),
        ({"block_size": 0}, r"block_size must be a positive integer below 2\^31, got 0"),
        ({"hidden_act": "gelu"}, "only hidden_act='silu' is supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "only rope_scaling=None is supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "only rope_type='default' is supported"),
        ({"use_sliding_window": True}, "only use_sliding_window=False is supported"),
    ],
)
def test_a_config_it_cannot_compute_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        SDARConfig.from_dict(sdar_config(**changes))


def test_config_round_trips_unknown_keys_and_reads_what_transformers_5_writes():
    written = SDARConfig.from_dict(sdar_config(initializer_range=0.02)).to_dict()
    assert written["initializer_range"] == 0.02 and written["head_dim"] == 10
    assert SDARConfig.from_dict(written).to_dict() == written
    config = sdar_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    del config["rope_theta"], config["head_dim"]
    assert SDARConfig.from_dict(config).rope_theta == 5.0
    assert SDARConfig.from_dict(config).width == 128  # the published default
