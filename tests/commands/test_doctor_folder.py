"""``sinkprune doctor MODEL_DIR``: what a folder is, what works with it, what not and why."""

import json

import pytest
import torch
from block_causals import llada2_config, llada2_tensors, toy_llada2
from decoders import FAMILIES
from safetensors.torch import save_file
from toys import manual_plan, one_thread, published_config, published_tensors, toy, write_checkpoint  # noqa: F401

import sinkprune as sp
from sinkprune.commands import doctor
from sinkprune.commands.examining import examine


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_named_with_its_sizes_with_weights_and_without(name, tmp_path):
    family = FAMILIES[name]
    folder = write_checkpoint(tmp_path / "m", family.config(), family.tensors())
    facts = examine(folder)
    assert (facts["family"], facts["form"], facts["layers"], facts["mask_token_id"]) == (name, "dense", 3, 60)
    assert facts["parameters"] == sum(tensor.numel() for tensor in family.tensors().values())
    assert set(facts["works"].values()) <= {"yes", facts["works"]["save"]}
    assert facts["works"]["targets: mlp"] == "yes" and facts["zeros"].startswith("0% ")
    assert facts["memory"]["fits"].startswith("yes")
    (folder / "model.safetensors").unlink()
    alone = examine(folder)
    assert alone["weights"] == "none here: config alone" and "zeros" not in alone
    assert alone["ceiling"] == facts["ceiling"] and alone["ceiling"]["and as many channels"] > 1.2
    assert doctor.describe(alone).splitlines()  # prints


def test_what_is_refused_comes_with_its_reason(tmp_path):
    experts = examine(write_checkpoint(tmp_path / "e", llada2_config(), llada2_tensors(llada2_config())))
    assert experts["works"]["targets: mlp"].startswith("1 of 3 layers: the MLP of layer 1 is a mixture")
    assert experts["exports to"]["sglang"] == "yes"
    assert experts["exports to"]["llama.cpp"].startswith("no: ")
    wide = published_config(attention_layer_norm=True)
    facts = examine(write_checkpoint(tmp_path / "w", wide, published_tensors(wide)))
    assert "mixes the heads" in facts["works"]["plan, apply (compact)"]
    assert facts["works"]["plan, apply (mask)"] == "yes"


def test_a_pruned_folder_says_its_form_and_a_sparse_one_its_zeros(tmp_path):
    model = toy()
    sp.save(sp.apply(model, manual_plan(model, [[0, 1]] * 3)), tmp_path / "pruned")
    facts = examine(tmp_path / "pruned")
    assert facts["form"] == "compact" and facts["heads_removed"] == 6
    assert facts["works"]["targets: heads"] == "no: the folder holds a model in compact form"
    sparse = toy()
    rows = sp.calibrate(sparse, torch.arange(1, 60).repeat(4), length=16, sequences=2)
    sp.sparsify(sparse, "magnitude", 0.5, calibration=rows)
    sp.save(sparse, tmp_path / "sparse")
    facts = examine(tmp_path / "sparse")
    assert facts["zeros"].startswith("50% of what was read of 1")
    assert facts["sparsity"] == "50%, unstructured, by magnitude"


def test_an_unknown_tree_gets_its_nearest_family_and_the_first_tensor_that_differs(tmp_path):
    family = FAMILIES["wedlm"]
    config = family.config(model_type="mystery", architectures=["MysteryForCausalLM"])
    tensors = {name: tensor for name, tensor in family.tensors().items() if not name.endswith(".bias")}
    tensors["model.layers.1.self_attn.gate.weight"] = torch.ones(4, 4)
    facts = examine(write_checkpoint(tmp_path / "m", config, tensors))
    assert facts["family"] == "unknown" and "unknown model_type 'mystery'" in facts["refused"]
    assert facts["nearest"] == "SDAR-8B, 14 of 15 kinds of tensors the same"
    assert facts["first tensor that differs"] == "model.layers.1.self_attn.gate.weight, which SDAR-8B has not"
    whole = {k: t for k, t in tensors.items() if "gate.weight" not in k}
    save_file({k: t for k, t in whole.items() if "mlp.up" not in k}, tmp_path / "m" / "model.safetensors")
    facts = examine(tmp_path / "m")
    assert facts["first tensor that differs"] == "model.layers.{}.mlp.up_proj.weight, which is missing here"
    save_file(whole, tmp_path / "m" / "model.safetensors")
    assert examine(tmp_path / "m")["first tensor that differs"].startswith("none: names agree")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert "would be named" in examine(tmp_path / "m")["weights"]


def test_a_config_that_names_no_mask_token_and_a_damaged_file_are_said_so(tmp_path):
    family = FAMILIES["wedlm"]
    folder = write_checkpoint(tmp_path / "m", family.config(mask_token_id=None), family.tensors())
    assert "names none" in examine(folder)["works"]["profile, generate"]
    (folder / "model.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(ValueError, match="is damaged"):
        examine(folder)
    (folder / "config.json").write_text(json.dumps(["no object"]))
    with pytest.raises(ValueError, match="expected a JSON object"):
        examine(folder)


def test_the_embedded_model_and_a_live_experts_toy_agree_with_their_adapters():
    facts = examine("tiny")
    assert facts["family"] == "llada" and facts["ceiling"]["of"].startswith("a forward of 1 x 512 tokens")
    assert sp.adapter_for(toy_llada2()).geometry().family == "llada2_moe"
