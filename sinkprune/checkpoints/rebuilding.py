"""A model again from the config it was dense with, its plan, and tensors under the names of a smaller dense
one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sinkprune.adapters import adapter_for
from sinkprune.checkpoints.layout import install_tensors, lay_out_config, weight_files
from sinkprune.checkpoints.ragged import published_tensors
from sinkprune.checkpoints.trees import LLADA, LLAMA, Tree
from sinkprune.files import read_json
from sinkprune.models.marks import mark
from sinkprune.models.modules import CompactMLP, SinkPrunedAttention
from sinkprune.plans import PrunePlan
from sinkprune.pruning.repacking import lay_out

MANIFEST = "sinkprune_export.json"  # of an exported folder: where it came from


def rebuilt(
    config: dict[str, Any],
    plan: PrunePlan | None,
    tensors: dict[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model, compact where there is a plan, in evaluation mode.

    Args:
        config: ``config.json`` of the dense model, of a native family or a class of transformers.
        plan: what was kept of it; None for a dense model.
        tensors: by published name, as ``trees.trim`` gives them; a tied head may be missing.
        device, dtype: of the parameters; dtype None keeps the tensors'.

    Raises:
        ValueError: a plan for another geometry, or tensors that are missing, unexpected or misshapen.
    """
    model = lay_out_config(config)
    if plan is not None:
        if not plan.geometry.agrees(adapter_for(model).geometry()):
            raise ValueError("the plan does not fit the config that comes with it")
        lay_out(model, plan)
    tree = LLADA if any(name.startswith(LLADA.embedding) for name in tensors) else LLAMA
    if plan is not None:
        tensors = _numbered(plan, tree, tensors)
    found, wanted = _packed(model, tree, tensors), model.state_dict()
    if plan is not None:
        found |= _nothing(plan, tree, {k: v for k, v in wanted.items() if k not in found}, tensors)
    if tree.head + ".weight" in wanted and tree.head + ".weight" not in found:
        found[tree.head + ".weight"] = found[tree.embedding + ".weight"]
    unexpected, missing = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    if unexpected or missing:
        raise ValueError(
            f"{len(unexpected)} unexpected tensors ({', '.join(unexpected[:3])}), {len(missing)} missing "
            f"({', '.join(missing[:3])})"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} must have shape {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}")
    install_tensors(model, {k: t.to(device, dtype) for k, t in found.items()}, device)
    if plan is not None:
        mark(model, plan, "compact")
    return model.eval()


def read_trimmed(
    folder: Path, config: dict[str, Any], *, device: str | torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """The compact model of a folder that was exported with our modelling file.

    Raises:
        ValueError: no manifest of the export beside it, or tensors that do not fit.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: no {MANIFEST}, which says what the model was before it was pruned")
    manifest = read_json(path)
    tree = LLADA if manifest["config"].get("model_type") == "llada" else LLAMA
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    plan = PrunePlan.from_dict(manifest["plan"])
    return rebuilt(manifest["config"], plan, published_tensors(tensors, tree), device=device, dtype=dtype)


def _numbered(plan: PrunePlan, tree: Tree, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` by the numbers of the plan's layers, where those that are gone were left out."""
    before = tree.layer.format("")
    numbers = {name.removeprefix(before).partition(".")[0] for name in tensors if name.startswith(before)}
    here = [layer for layer, kept in enumerate(plan.layers) if not kept.is_gone]
    if len(numbers) == len(plan.layers) or len(numbers) != len(here):
        return tensors
    return tree.renumbered(tensors, dict(enumerate(here)))


def _nothing(
    plan: PrunePlan, tree: Tree, missing: dict[str, Tensor], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Those of the ``missing`` tensors that a file need not hold: empty ones, and norms before nothing."""
    norms = set()
    for layer, kept in enumerate(plan.layers):
        parts = ("attn_norm", "attn_q_norm", "attn_k_norm") if not kept.kept_heads else ()
        norms |= {
            tree.name(layer, part) for part in (*parts, *(("ffn_norm",) if kept.kept_channels == [] else ()))
        }
    dtype = tensors[f"{tree.embedding}.weight"].dtype
    return {
        name: torch.ones(shell.shape, dtype=dtype)
        for name, shell in missing.items()
        if shell.numel() == 0 or name in norms
    }


def _packed(model: nn.Module, tree: Tree, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with those of compact modules packed as these hold them."""
    found = dict(tensors)
    for path, module in model.named_modules():
        if not isinstance(module, (SinkPrunedAttention, CompactMLP)):
            continue
        block = path.rpartition(".")[0]
        attention = isinstance(module, SinkPrunedAttention)
        fused, single = (("attn_q", "attn_k", "attn_v"), "attn_output") if attention else (
            ("ffn_gate", "ffn_up"), "ffn_down",
        )  # fmt: skip
        names = ("qkv_proj", "o_proj") if attention else ("gate_up_proj", "down_proj")
        for kind in ("weight", "bias"):
            parts = [found.pop(f"{block}.{tree.parts[part]}.{kind}", None) for part in fused]
            pieces = [part for part in parts if part is not None]
            if pieces:
                found[f"{path}.{names[0]}.{kind}"] = torch.cat(pieces)
            last = found.pop(f"{block}.{tree.parts[single]}.{kind}", None)
            if last is not None:
                found[f"{path}.{names[1]}.{kind}"] = last
        if isinstance(module, SinkPrunedAttention):
            for part, name in (("attn_q_norm", "q_norm"), ("attn_k_norm", "k_norm")):
                norm = found.pop(f"{block}.{tree.parts[part]}.weight", None)
                if norm is not None:
                    found[f"{path}.{name}.weight"] = norm
    return found
