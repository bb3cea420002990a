"""Folders pruned a block at a time: the checkpoint that memory gives, in less of it, killed or not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from block_causals import toy_llada2, toy_sdar
from dreams import toy_dream
from toys import one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.checkpoints import streaming
from sinkprune.commands.main import main
from sinkprune.models.llada import LLaDA, LLaDAConfig
from sinkprune.models.streamed import stream_of

FAMILIES = {"llada": toy, "dream": toy_dream, "sdar": toy_sdar, "llada2": toy_llada2}
HEADS = {"ratio": 0.3}
BOTH = {"ratio": 0.3, "unit": "parameters", "targets": ("heads", "mlp")}
BLOCKS = {"ratio": 0.34, "unit": "blocks", "targets": ("blocks",)}
ATTENTION = {"ratio": 0.34, "unit": "blocks", "targets": ("attention",)}
EXPERTS = {"ratio": 0.25, "unit": "experts", "targets": ("experts",)}
CASES = [
    *((name, HEADS) for name in FAMILIES),
    *((name, BOTH) for name in ("llada", "dream", "sdar")),
    *((name, BLOCKS) for name in ("llada", "dream", "sdar")),
    ("llada", ATTENTION),
    ("llada2", EXPERTS),
    ("llada", HEADS | {"criterion": "magnitude"}),
    ("dream", HEADS | {"criterion": "sink_removed"}),
]


def rows(model):
    return sp.calibrate(model, tokens(300), length=12, sequences=8)


def in_memory(folder, options, repair):
    model, _ = sp.load(folder)
    with torch.no_grad():
        for parameter in model.parameters():  # as aligned as what is read block by block
            parameter.data = parameter.data.clone()
    plan = sp.plan(model, calibration=rows(model), **options)
    return plan, sp.apply(model, plan, calibration=rows(model), repair=repair)


def streamed(folder, out, options, repair):
    model, tokenizer = streaming.opened(folder, out)
    streaming.begin(out, {"options": options})
    plan = streaming.planned(out, lambda: sp.plan(model, calibration=rows(model), **options))
    streaming.prune_streamed(model, plan, out, calibration=rows(model), repair=repair, tokenizer=tokenizer)
    assert all(parameter.is_meta for block in stream_of(model).blocks for parameter in block.parameters())
    return plan


def assert_equal(model, folder):
    got, expected = sp.load(folder)[0].state_dict(), model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else str([*v.values()])
)
def test_a_streamed_run_gives_the_checkpoint_that_memory_gives(name, options, tmp_path):
    sp.save(FAMILIES[name](), tmp_path / "dense", shard_bytes=20_000)
    plan, model = in_memory(tmp_path / "dense", options, "least_squares")
    got = streamed(tmp_path / "dense", tmp_path / "out", options, "least_squares")
    assert got.to_dict() == plan.to_dict() and got.heads_removed + got.parameters_removed > 0
    assert_equal(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize("repair", [None, "bias", "least_squares_bias", "least_squares_cv"])
def test_every_repair_streams(repair, tmp_path):
    sp.save(toy(), tmp_path / "dense")
    _, model = in_memory(tmp_path / "dense", BOTH, repair)
    streamed(tmp_path / "dense", tmp_path / "out", BOTH, repair)
    assert_equal(model, tmp_path / "out")


class Stop(Exception):
    pass


@pytest.mark.parametrize("options", [BOTH, ATTENTION], ids=["heads and channels", "attention of a block"])
@pytest.mark.parametrize("at", range(1, 7))
def test_a_run_that_ends_at_any_block_goes_on_there(at, options, tmp_path):
    """Three blocks are scored, then pruned."""
    sp.save(toy(), tmp_path / "dense")
    _, model = in_memory(tmp_path / "dense", options, "least_squares")
    seen = []

    def stop(what, layer):
        seen.append((what, layer))
        if len(seen) == at:
            raise Stop

    def run(progress):
        opened, _ = streaming.opened(tmp_path / "dense", tmp_path / "out", progress=progress)
        begun = streaming.begin(tmp_path / "out", {"run": 1})
        plan = streaming.planned(
            tmp_path / "out", lambda: sp.plan(opened, calibration=rows(opened), **options)
        )
        streaming.prune_streamed(opened, plan, tmp_path / "out", calibration=rows(opened))
        return begun

    try:
        run(stop)
    except Stop:
        assert not (tmp_path / "out").exists()
    again = []
    if len(seen) == at:
        assert run(lambda what, layer: again.append((what, layer)))
        assert not {item for item in again if item[0] == "scored"} & set(seen)
    assert_equal(model, tmp_path / "out")


def test_another_run_begins_anew_and_a_foreign_folder_is_refused(tmp_path):
    assert not streaming.begin(tmp_path / "out", {"ratio": 0.3})
    assert streaming.begin(tmp_path / "out", {"ratio": 0.3})
    (streaming.work_folder(tmp_path / "out") / "weights" / "x").write_text("")
    assert not streaming.begin(tmp_path / "out", {"ratio": 0.4})
    assert not list((streaming.work_folder(tmp_path / "out") / "weights").iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        streaming.begin(tmp_path / "out", {"ratio": 0.4})


def memory_of_a_run(tmp_path, addresses, **sizes):
    """Bytes of the weights, and what tests/support/anonymous_memory.py tells of streaming them.

    ``addresses``: the share of the weights that may be mapped at once; None for no limit."""
    with torch.device("meta"):
        model = LLaDA(LLaDAConfig.from_dict(sizes | {"max_sequence_length": 64, "mask_token_id": 1}))
    model = model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-0.05, 0.05) if parameter.dim() > 1 else parameter.fill_(1.0)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    sp.save(model, tmp_path / "dense", shard_bytes=20_000_000)
    del model
    script = Path(__file__).parents[1] / "support" / "anonymous_memory.py"
    command = [sys.executable, script, tmp_path / "dense", tmp_path / "out", "2", "32", "0.4"]
    command += [] if addresses is None else [round(addresses * weights)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return weights, json.loads(done.stdout)


only_linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="anonymous memory is Linux's to tell"
)


@only_linux
def test_it_takes_the_memory_that_was_said_before_and_less_than_half_of_the_weights(tmp_path):
    sizes = {"d_model": 512, "n_heads": 8, "n_layers": 22, "mlp_hidden_size": 1536, "vocab_size": 512}
    weights, found = memory_of_a_run(tmp_path, 0.9, **sizes)  # files are mapped one at a time
    assert found["most"] < weights / 2
    assert abs(found["most"] / found["said"] - 1) <= 0.1, found


@only_linux
def test_a_vocabulary_larger_than_the_blocks_is_in_the_memory_that_is_said(tmp_path):
    """The embedding stays while the head is read to be written."""
    sizes = {"d_model": 256, "n_heads": 4, "n_layers": 3, "mlp_hidden_size": 512, "vocab_size": 60_000}
    _, found = memory_of_a_run(tmp_path, None, **sizes)
    assert abs(found["most"] / found["said"] - 1) <= 0.1, found


def test_two_runs_of_one_goal_are_one_too_many(tmp_path):
    streaming.begin(tmp_path / "out", {})
    code = "import sys; from sinkprune.checkpoints import streaming; streaming.begin(sys.argv[1], {})"
    other = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True)
    assert "another run is writing what" in other.stderr.splitlines()[-1]


def test_what_can_not_be_streamed_is_refused_by_name(tmp_path):
    sp.save(toy(), tmp_path / "dense")
    model, _ = streaming.opened(tmp_path / "dense", tmp_path / "out")
    streaming.begin(tmp_path / "out", {})
    for criterion in ("taylor", "ablation"):
        with pytest.raises(ValueError, match=f"{criterion} runs whole models"):
            sp.plan(model, calibration=rows(model), criterion=criterion, ratio=0.3)
    with pytest.raises(ValueError, match="ablation runs whole models"):
        sp.plan(model, calibration=rows(model), block_rule="ablation", **BLOCKS)
    plan = sp.plan(model, criterion="magnitude", ratio=0.3)
    with pytest.raises(ValueError, match="prune it by prune_streamed"):
        sp.apply(model, plan)
    with pytest.raises(ValueError, match="all in memory"):
        streaming.prune_streamed(toy(), plan, tmp_path / "out")
    pruned = sp.save(sp.apply(toy(), plan), tmp_path / "pruned")
    with pytest.raises(ValueError, match="pruned already"):
        streaming.opened(pruned, tmp_path / "out")
    with pytest.raises(ValueError, match="only native families"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
        streaming.opened(tmp_path, tmp_path / "out")


def test_the_verb_writes_what_it_writes_in_memory_and_goes_on_when_killed(tmp_path):
    small = ["--calibration-windows", "2", "--calibration-length", "16", "--ratio", "0.3"]
    arguments = ["prune", "tiny", *small, "--unit", "parameters", "--targets", "heads,mlp", "--out"]
    assert main([*arguments, str(tmp_path / "memory"), "--quiet"]) == 0
    command = [sys.executable, "-m", "sinkprune", *arguments, str(tmp_path / "out"), "--stream"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    for line in child.stderr:
        if "pruned block 3" in line:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert child.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "going on with what" in done.stderr and "scored block" not in done.stderr
    assert "pruned block 1 " not in done.stderr
    got, expected = (sp.load(tmp_path / name)[0].state_dict() for name in ("out", "memory"))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "out"]
