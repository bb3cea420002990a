"""Weights that no layer here runs in are refused when they are read, naming the file and the tensor."""

import hashlib
import json

import hf
import pytest
import torch
from block_causals import toy_sdar
from dreams import toy_dream
from safetensors.torch import load_file, save_file
from toys import one_thread, toy  # noqa: F401

import sinkprune as sp

MODELS = {"llada": toy, "dream": toy_dream, "sdar": toy_sdar, "bert": lambda: hf.build("bert")}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("asked", [None, torch.float32], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_packed_weights_are_refused_by_name(tmp_path, family, asked, dtype):
    folder = sp.save(MODELS[family](), tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    save_file(tensors | {name: tensors[name].to(dtype)}, file)
    manifest = json.loads((folder / "sinkprune.json").read_text())
    manifest["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "sinkprune.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{name} is {dtype}: quantised weights are not read"):
        sp.load(folder, dtype=asked)
