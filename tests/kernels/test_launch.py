"""Launch configurations: what is shipped, how a tile is chosen, what the tuner stores."""

from __future__ import annotations

import json

import pytest
import torch
import triton

from sinkprune.kernels import launch, tuning
from sinkprune.kernels.attention import attention
from sinkprune.kernels.column_mass import column_mass_
from sinkprune.kernels.launch import Tile


def test_every_family_ships_a_tile_for_every_bucket():
    names = sorted(path.stem for path in launch.CONFIGS.glob("*.json"))
    assert names == ["sm_100", "sm_80", "sm_86", "sm_90"]
    for name in names:
        known = launch.family(name)
        for kernel in ("attention", "column_mass"):
            for bits in ("16", "32"):
                assert set(known.tiles[kernel][bits]) == {"64", "96", "128", "256"}
                for listed in known.tiles[kernel][bits].values():
                    assert listed
                    for tile in listed:
                        assert all(x & (x - 1) == 0 and x >= 16 for x in (tile.block_m, tile.block_n)), tile


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12,
    0), "sm_86")],
)  # fmt: skip
def test_a_capability_finds_its_family(capability, name):
    assert launch.family_of(capability) == name


def choose(rows, keys, programs, kernel="attention", d=128):
    return launch.choose_tile(kernel, launch.family("sm_90"), 132, "16", d, rows, keys, programs)


def test_large_grids_take_the_large_tile_whole():
    tile, shares = choose(4096, 4096, 32)
    assert (tile.block_m, shares) == (128, 1)


def test_few_queries_split_their_keys():
    tile, shares = choose(16, 8192, 8)
    assert tile.block_m == 16 and shares > 1
    assert choose(16, 64, 8)[1] == 1  # too few keys to share out


def test_the_kept_head_count_decides_the_tile_so_that_waves_fill():
    """128-row blocks of 16 heads of 1,024 queries are 128: one wave of 132. Of 17 heads they are 136, and
    the second wave would be nearly empty; 64-row blocks fit two to a multiprocessor and leave a last wave
    half as long."""
    tiles = {h: choose(1024, 1024, h)[0].block_m for h in (16, 17, 24, 32, 33)}
    assert tiles == {16: 128, 17: 64, 24: 64, 32: 128, 33: 128}


def test_tuned_choices_survive_the_disk_and_are_found_again(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "tiles.json"
    q = torch.zeros(1, 4, 100, 64, dtype=torch.bfloat16)
    key = launch.bucket("attention", q, 100, 1000, 4)
    choice = Tile(16, 32, 4, 2), 3
    launch.write_tuned(path, {key: choice})
    launch.write_tuned(path, {launch.bucket("attention", q, 5, 5, 4): choice})
    assert launch.read_tuned(path)[key] == choice and len(launch.read_tuned(path)) == 2
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]
    monkeypatch.setattr(launch, "overrides", launch.read_tuned(path))
    assert launch.attention_tile(q, rows=128, keys=1024, programs=4) == choice  # the same bucket
    assert launch.attention_tile(q, rows=129, keys=1024, programs=4) != choice


@pytest.mark.parametrize("text", ["not json", json.dumps([{"bucket": ["a"]}]), json.dumps([1])])
def test_a_broken_tuned_file_is_ignored_with_a_warning(text, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="ignored"):
        assert launch.read_tuned(path) == {}


def test_tuned_files_lie_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert launch.tuned_path("NVIDIA H100 80GB/HBM3").parent == tmp_path / "sinkprune"
    assert "/" not in launch.tuned_path("a/b").name


class Compiler:
    """A kernel that counts compilations and launches of what it compiled."""

    def __init__(self):
        self.compiled, self.launched = 0, []

    def __getitem__(self, grid):
        def launch_and_compile(*arguments, num_warps, num_stages, **constants):
            self.compiled += 1
            return {grid: lambda *again: self.launched.append(again)}

        return launch_and_compile


def test_a_kernel_is_looked_at_once_for_the_same_kind_of_arguments(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    kernel, x = Compiler(), torch.zeros(64)

    def start(pointer=x, length=5, tile=16, warps=4):
        launch.start(kernel, (1, 1, 1), (pointer,), (length, 0.5), {"BM": tile}, num_warps=warps)

    start()
    start()
    start(torch.zeros(64))  # another address, aligned alike
    assert kernel.compiled == 1 and len(kernel.launched) == 2
    assert kernel.launched[0] == (x, 5, 0.5, 16)
    for other in ({"pointer": x[1:]}, {"pointer": x.double()}, {"length": 16}, {"tile": 32}, {"warps": 8}):
        start(**other)
    assert kernel.compiled == 6
    monkeypatch.setattr(launch, "MOST_COMPILED", 6)
    start(length=7)
    assert len(launch._compiled) == 1


def test_no_jitted_arithmetic_on_the_host(monkeypatch):
    """`triton.cdiv` and its like cost microseconds a call outside a kernel."""

    def refuse(*arguments):
        raise AssertionError("jitted arithmetic on the host")

    for name in ("cdiv", "next_power_of_2"):
        monkeypatch.setattr(triton, name, refuse)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q = torch.randn(1, 1, 20, 16, device=device)
    for shares in (1, 2):
        options = {"scale": 1.0, "tile": Tile(16, 16), "shares": shares}
        _, lse = attention(q, q, q, **options)
        mass = torch.zeros(1, 1, 20, device=device)
        column_mass_(mass, q, q, lse, sample=1, **options)
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_tuning_and_warmup_say_so():
    shape = tuning.Shape(4, 2, 64, 128, 128)
    for verb in (tuning.tune, tuning.warmup):
        with pytest.raises(RuntimeError, match="no CUDA device"):
            verb([shape])
