"""Plans for a time: against brute force on planted staircases, and never past what a layer may lose."""

import itertools

import pytest
import torch
from toys import one_thread, toy  # noqa: F401

import sinkprune as sp
from sinkprune.planning import latency_planning
from sinkprune.planning.allocation import Rules, head_units
from sinkprune.planning.hardware import Roofs, roofs
from sinkprune.planning.latency_planning import target_of
from sinkprune.planning.latency_table import LatencyTable, channel_steps, computed_table, measured_table
from sinkprune.plans import Geometry

LENGTH = 64


def geometry(heads=4, layers=3, channels=8, kv_heads=None):
    return Geometry(
        "toy", 16, 4, 50, 64, (heads,) * layers, (kv_heads or heads,) * layers, (channels,) * layers
    )


def allocate(known, scores, table, *, length, target_seconds, channel_scores=None, **rules):
    """The allocator with units as the planner cuts them."""
    allowed = Rules(**rules)
    return latency_planning.allocate(
        known, scores, head_units(known, scores, allowed), table, length=length,
        target_seconds=target_seconds, rules=allowed, channel_scores=channel_scores,
    )  # fmt: skip


def staircase(known, steps, channel_steps_at=(), rest=5.0):
    """A table whose attention takes as many seconds as steps of ``steps`` are reached, its MLP likewise."""
    table = LatencyTable("planted", "measured", "float32", 1, known.hidden, known.head_dim, 3)
    table.rest = {LENGTH: rest}
    for kv in range(1, known.kv_heads[0] + 1):
        for h in range(kv, known.heads[0] + 1):
            table.attention[LENGTH, h, kv] = 1.0 + sum(h >= step for step in steps)
    for c in range(1, known.channels[0] + 1):
        table.mlp[LENGTH, c] = 1.0 + sum(c >= step for step in channel_steps_at)
    return table


def weights(known, scores, channel_scores):
    """What each head and channel is worth, by hand: heads' and channels' shares of the block parameters."""
    channels = 3 * sum(known.channels)
    heads = 2 * known.head_dim * (sum(known.heads) + sum(known.kv_heads))
    above = scores.double() - scores.double().min()
    head_worth = above / above.sum() * heads / (heads + channels)
    if channel_scores is None:
        return head_worth, None
    stacked = torch.stack(channel_scores).double()
    return head_worth, stacked / stacked.sum() * channels / (heads + channels)


def brute_force(known, scores, channel_scores, table, target, min_heads):
    """Least loss over every combination of counts."""
    head_worth, channel_worth = weights(known, scores, channel_scores)
    layers = known.num_layers
    options = []
    for layer in range(layers):
        order = head_worth[layer].sort().values
        options.append(
            [
                (table.attention.get((LENGTH, h, h), 0.0), float(order[: len(order) - h].sum()))
                for h in range(min_heads, known.heads[layer] + 1)
            ]
        )
    for layer in range(layers):
        if channel_worth is None:
            options.append([(table.mlp[LENGTH, known.channels[layer]], 0.0)])
            continue
        order = channel_worth[layer].sort().values
        options.append(
            [
                (table.mlp[LENGTH, c], float(order[: len(order) - c].sum()))
                for c in range(1, known.channels[layer] + 1)
            ]
        )
    fits = (
        sum(loss for _, loss in choice)
        for choice in itertools.product(*options)
        if table.rest[LENGTH] + sum(seconds for seconds, _ in choice) <= target
    )
    return min(fits)


@pytest.mark.parametrize("seed", range(6))
def test_the_loss_is_the_least_that_brute_force_finds(seed):
    known = geometry(layers=2, channels=6)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 4, generator=generator)
    channel_scores = [torch.rand(6, generator=generator) for _ in range(2)]
    table = staircase(known, (2, 3, 4) if seed % 2 else (3,), (3, 5, 6))
    for target in (18.0, 15.0, 13.0, 11.0, 9.0):
        options = {"min_heads": 1, "channel_scores": channel_scores}
        try:
            got = allocate(known, scores, table, length=LENGTH, target_seconds=target, **options)
        except ValueError:
            with pytest.raises(ValueError, match="min"):
                brute_force(known, scores, channel_scores, table, target, 1)
            continue
        expected = brute_force(known, scores, channel_scores, table, target, 1)
        assert got.loss == pytest.approx(expected, abs=1e-9)
        assert got.seconds <= target
        assert got.dense_seconds == table.step_seconds(known, None, LENGTH)


def test_heads_go_only_where_a_step_of_the_staircase_is_reached():
    """Time falls at 2 heads alone: a layer keeps 4 or 1, and the cheapest three heads go first."""
    known = geometry()
    table = staircase(known, (2,))
    scores = torch.tensor([[9.0, 9, 9, 9], [1, 2, 3, 50], [0, 40, 5, 6]])
    got = allocate(
        known, scores, table, length=LENGTH, target_seconds=table.step_seconds(known, None, LENGTH) - 1
    )
    assert got.kept_heads == [[0, 1, 2, 3], [3], [0, 1, 2, 3]]
    assert got.channels == [8, 8, 8]
    nothing = allocate(
        known, scores, table, length=LENGTH, target_seconds=table.step_seconds(known, None, LENGTH)
    )
    assert nothing.loss == 0 and nothing.kept_heads == [[0, 1, 2, 3]] * 3


def test_a_faster_target_never_loses_less_and_the_choice_is_always_the_same():
    known = geometry(heads=8, layers=4, channels=32)
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(4, 8, generator=generator)
    channel_scores = [torch.rand(32, generator=generator) for _ in range(4)]
    table = staircase(known, (2, 4, 5, 7, 8), tuple(range(4, 33, 4)))
    losses = []
    for target in (40.0, 33.0, 26.5, 20.0, 14.0, 13.0):
        options = {"length": LENGTH, "target_seconds": target, "channel_scores": channel_scores}
        got = allocate(known, scores, table, **options)
        assert got == allocate(known, scores, table, **options)
        assert got.seconds <= target
        losses.append(got.loss)
    assert losses == sorted(losses) and losses[-1] > losses[1] > 0


@pytest.mark.parametrize("min_heads", [1, 2, 3])
def test_no_layer_falls_below_min_heads_and_the_best_reachable_is_told(min_heads):
    known = geometry()
    table = staircase(known, (2, 3, 4))
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    fastest = 5 + 3 * (1 + min_heads - 1) + 3
    options = {"length": LENGTH, "min_heads": min_heads}
    got = allocate(known, scores, table, target_seconds=fastest, **options)
    assert {len(kept) for kept in got.kept_heads} == {min_heads}
    with pytest.raises(
        ValueError, match=rf"best reachable is {1000 * fastest}.000 ms, {20 / fastest:.2f}x faster"
    ):
        allocate(known, scores, table, target_seconds=fastest - 0.1, **options)


def test_whole_groups_leave_or_stay_together():
    known = geometry(heads=6, kv_heads=3)
    table = staircase(known, (1, 2, 3, 4, 5, 6))
    scores = torch.tensor([[0.0, 9, 1, 2, 8, 8]] * 3)
    got = allocate(known, scores, table, length=LENGTH, target_seconds=5 + 3 * 5 + 3, whole_groups=True)
    assert got.kept_heads == [[0, 1, 4, 5]] * 3


def test_a_table_of_other_sizes_or_lengths_is_refused():
    known = geometry()
    table = staircase(known, (2,))
    with pytest.raises(ValueError, match=r"knows lengths \[64\], got 128"):
        allocate(known, torch.zeros(3, 4), table, length=128, target_seconds=1)
    other = Geometry("toy", 32, 4, 50, 64, (8,), (8,), (8,))
    with pytest.raises(ValueError, match=r"for hidden size, head size and MLP matrices \(16, 4, 3\)"):
        allocate(other, torch.zeros(1, 8), table, length=LENGTH, target_seconds=1)


def test_channels_keep_to_the_caps_and_multiples_of_the_rules():
    known = geometry()
    table = staircase(known, (2,), tuple(range(1, 9)))
    scores, channel_scores = torch.rand(3, 4), [torch.rand(8) for _ in range(3)]
    options = {
        "length": LENGTH,
        "channel_scores": channel_scores,
        "max_layer_share": 0.5,
        "round_channels": 3,
    }
    got = allocate(known, scores, table, target_seconds=5 + 3 * 2 + 3 * 7, **options)
    assert got.channels == [6, 6, 6]  # at least half of 8, a multiple of 3
    with pytest.raises(ValueError, match="best reachable"):
        allocate(known, scores, table, target_seconds=5 + 3 * 2 + 3 * 6, min_heads=4, **options)


def test_a_target_is_a_speedup_or_seconds_at_a_length_of_the_table():
    known = geometry()
    table = staircase(known, (2,))  # dense: 5 + 3 x 2 + 3
    assert target_of(known, table, None, 1.4, None) == (LENGTH, pytest.approx(10.0))
    assert target_of(known, table, LENGTH, None, 12.0) == (LENGTH, 12.0)
    for both in ((None, None), (1.5, 10.0)):
        with pytest.raises(ValueError, match="either target_speedup or target_latency"):
            target_of(known, table, None, *both)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a positive number"):
            target_of(known, table, None, wrong, None)
    table.rest[128] = 5.0
    with pytest.raises(ValueError, match=r"knows lengths \[64, 128\]: say which one"):
        target_of(known, table, None, 1.5, None)


def test_a_layer_may_be_emptied_where_min_heads_is_0():
    known = geometry()
    table = staircase(known, (2,))
    got = allocate(known, torch.rand(3, 4), table, length=LENGTH, target_seconds=5 + 3, min_heads=0)
    assert got.kept_heads == [[], [], []] and got.seconds == 8.0


def test_a_table_survives_the_disk_and_a_broken_file_is_refused(tmp_path):
    table = computed_table(geometry(), roofs("H100"), [64, 128])
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    (tmp_path / "plan.json").write_text('{"kind": "prune_plan", "schema": 1}')
    with pytest.raises(ValueError, match="can't be read as a latency table: not a latency table of schema 1"):
        LatencyTable.load(tmp_path / "plan.json")


def test_without_waves_a_computed_table_is_the_roofline():
    from sinkprune.planning.costs import step_seconds

    known = Geometry("llada", 4096, 128, 126464, 4096, (32,) * 32, (32,) * 32, (12288,) * 32)
    flat = Roofs("flat", {"bfloat16": 9e14}, 3e12, "data sheet")
    table = computed_table(known, flat, [1024])
    expected = step_seconds(known, None, 1, 1024, flat, torch.bfloat16)
    assert table.step_seconds(known, None, 1024) == pytest.approx(expected)


def test_waves_make_a_staircase():
    """LLaDA's layer at 1,024 tokens: attention of 16 heads is 128 blocks, one wave of 132; of 17, two."""
    known = Geometry("llada", 4096, 128, 126464, 4096, (32,), (32,), (12288,))
    table = computed_table(known, roofs("H100"), [1024])
    seconds = [table.attention_seconds(1024, h, h) for h in range(1, 33)]
    falls = [(seconds[h] - seconds[h - 1]) / seconds[-1] for h in range(1, 32)]
    assert falls[15] > 0.1  # from 17 heads to 16
    assert max(falls[17:19]) < 0.03  # from 20 to 18 nothing much
    assert all(fall > -0.01 for fall in falls)


def test_a_measured_table_covers_every_count_of_the_model():
    model = toy(n_kv_heads=2)
    table = measured_table(model, [16], batch=2, rounds=1)
    known = sp.adapter_for(model).geometry()
    assert table.source == "measured" and table.batch == 2 and table.dtype == "float32"
    pairs = {(h, kv) for _, h, kv in table.attention}
    assert pairs == {(1, 1), (2, 1), (2, 2), (3, 2), (4, 2)}
    assert table.channel_counts(16, 40) == channel_steps(40) == list(range(1, 41))
    assert all(seconds > 0 for seconds in [*table.attention.values(), *table.mlp.values()])
    assert table.step_seconds(known, None, 16) > 0
    assert table.mlp_seconds(16, 0) == 0 == table.attention_seconds(16, 0, 0)


@pytest.mark.parametrize("targets", [("heads",), ("mlp",), ("heads", "mlp")], ids="+".join)
def test_a_plan_reaches_its_target_and_remembers_how(targets):
    model = toy()
    known = sp.adapter_for(model).geometry()
    table = staircase(known, (2, 4), tuple(range(4, 41, 4)))
    dense = table.step_seconds(known, None, LENGTH)
    plan = sp.plan(model, criterion="magnitude", target_speedup=1.1, latency_table=table, targets=targets)
    seconds = table.step_seconds(known, plan, LENGTH)
    assert seconds <= dense / 1.1
    assert plan.details["seconds_per_step"] == pytest.approx(seconds)
    assert plan.details["dense_seconds_per_step"] == dense
    assert (plan.allocation, plan.details["target_speedup"], plan.details["length"]) == (
        "latency",
        1.1,
        LENGTH,
    )
    assert plan.ratio == plan.parameters_removed > 0
    assert ("heads" in targets) or plan.heads_removed == 0
    assert all((layer.kept_channels is None) == ("mlp" not in targets) for layer in plan.layers)
    again = sp.plan(
        model, criterion="magnitude", target_latency=dense / 1.1, latency_table=table, targets=targets
    )
    assert again.layers == plan.layers
    assert sp.PrunePlan.from_dict(plan.to_dict()) == plan
    sp.apply(model, plan)
    model(torch.zeros(1, 4, dtype=torch.long))


def test_a_target_without_a_table_or_out_of_reach_is_refused():
    model = toy()
    table = staircase(sp.adapter_for(model).geometry(), (2,))
    with pytest.raises(ValueError, match="a target needs a latency_table"):
        sp.plan(model, criterion="magnitude", target_speedup=1.2)
    with pytest.raises(ValueError, match="either target_speedup or target_latency"):
        sp.plan(model, criterion="magnitude", latency_table=table)
    with pytest.raises(ValueError, match=r"best reachable is 11000.000 ms, 1.27x faster than dense"):
        sp.plan(model, criterion="magnitude", target_speedup=2.0, latency_table=table)


def test_the_command_line_plans_for_a_gpu_that_is_not_there(tmp_path, capsys):
    from sinkprune.commands.main import main

    out = tmp_path / "plan.json"
    target = ["--target-speedup", "1.1", "--latency-table", "H100", "--length", "512"]
    arguments = ["plan", "tiny", "--criterion", "magnitude", "--targets", "heads,mlp", "--out", str(out)]
    arguments += ["--roofs", "H100"]
    assert main([*arguments, *target]) == 0
    plan = sp.PrunePlan.load(out)
    assert plan.details["latency_table"] == "H100 (computed, bfloat16, batch 1)"
    assert plan.details["dense_seconds_per_step"] / plan.details["seconds_per_step"] >= 1.1
    assert "at 1 x 512 tokens" in capsys.readouterr().out
    again = [*arguments, "--overwrite"]
    assert main([*again, "--target-speedup", "1.1", "--latency-table", str(tmp_path / "none.json")]) == 2
    assert main([*again, "--target-speedup", "50", "--latency-table", "H100"]) == 2
    assert "the best reachable is" in capsys.readouterr().err
