"""What a layer of each native tree starts on the device, by name; run on the pretend device.

Prints a line of JSON a model and form: kernels and operations of its first layer in bf16, and how far the
logits are from float64, by PyTorch's operations on the CPU and as they are computed on the device.
"""

from __future__ import annotations

import copy
import json
from collections import Counter

import block_causals
import dreams
import torch
import toys
from pretend import device, tensors

import sinkprune as sp

NOTHING = {
    "view", "_unsafe_view", "transpose", "permute", "t", "slice", "select", "split", "split_with_sizes",
    "unsqueeze", "squeeze", "expand", "alias", "detach", "as_strided", "unbind", "empty", "empty_strided",
    "empty_like", "new_empty", "attention", "rms_norm", "add_rms_norm", "rope_qk", "swiglu",
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    made = {
        "llada": toys.toy(sharpness=2.0),
        "dream": dreams.toy_dream(),
        "sdar": block_causals.toy_sdar(),
        "llada2": block_causals.toy_llada2(first_k_dense_replace=2, num_hidden_layers=2),
    }
    for name, model in made.items():
        ids = toys.tokens(1, 24, vocabulary=50)
        for form in ("dense", "fused"):
            subject = copy.deepcopy(model)
            if form == "fused":
                sp.fuse(subject)
            with torch.inference_mode():
                exact = copy.deepcopy(subject).double()(ids).logits
            line = {"model": name, "form": form}
            for dtype in (torch.float32, torch.bfloat16):
                host = copy.deepcopy(subject).to(dtype)
                there = copy.deepcopy(host).to("cuda")
                with torch.inference_mode():
                    logits = {"pytorch": host(ids).logits, "device": there(ids.to("cuda")).logits.cpu()}
                for which, got in logits.items():
                    error = (got.double() - exact).abs().max() / exact.abs().max()
                    line[f"{which} {dtype.itemsize * 8}"] = error.item()
            print(json.dumps(line | {"starts": starts(there, ids)}))


def starts(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, int]:
    """Kernels and operations of the first layer."""
    first = model.get_submodule("model.transformer.blocks" if hasattr(model, "blocks") else "model.layers")[0]
    counted: Counter[str] = Counter()
    hooks = [
        first.register_forward_pre_hook(lambda *call: clear()),
        first.register_forward_hook(lambda *call: counted.update(taken())),
    ]
    with torch.inference_mode():
        model(ids.to("cuda"))
    for hook in hooks:
        hook.remove()
    return dict(counted)


def clear() -> None:
    tensors.operations.clear()
    device.launches.clear()


def taken() -> Counter[str]:
    started = Counter({name: n for name, n in tensors.operations.items() if name not in NOTHING})
    return started + device.launches


if __name__ == "__main__":
    main()
