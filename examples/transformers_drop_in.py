"""Prune a transformers model that is already loaded: three lines, no retraining, no change to your own loop.

    python examples/transformers_drop_in.py            # random toy weights, a few seconds on a CPU
    python examples/transformers_drop_in.py FOLDER     # a local transformers checkpoint

A random toy shows the mechanics; what pruning costs in quality only a trained model can tell.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn

import sinkprune as sp
from sinkprune.planning.timing import interleaved


def toy_model() -> nn.Module:
    """A bidirectional Qwen3 with random weights: a masked diffusion language model's shape."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=256, is_causal=False, mask_token_id=511,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a local transformers checkpoint; default: a random toy")
    parser.add_argument("--ratio", type=float, default=0.38, help="share of the query heads to remove")
    parser.add_argument("--mask-token-id", type=int, help="where the model's config names none")
    arguments = parser.parse_args()
    model = toy_model() if arguments.folder is None else sp.load(arguments.folder)[0]
    dense = copy.deepcopy(model)
    prompts = torch.randint(3, sp.adapter_for(model).geometry().vocabulary - 1, (2, 16))
    mask_id = arguments.mask_token_id
    options = {} if mask_id is None else {"mask_token_id": mask_id}

    # The drop-in: watch the sinks on real denoising trajectories, decide, make the matrices smaller in place.
    profile = sp.profile(model, prompts, steps=8, gen_length=32, progress=True, **options)
    rows = sp.calibrate(model, prompts, mask_token_id=mask_id)  # better: text of the model's own kind
    plan = sp.plan(model, profile, ratio=arguments.ratio, calibration=rows)
    sp.apply(model, plan, calibration=rows)

    *_, ids = sp.denoise(model, prompts, steps=8, gen_length=32, **options)
    with torch.no_grad():
        times, ratios = interleaved({"dense": lambda: dense(prompts), "pruned": lambda: model(prompts)})
    print(f"heads: {sum(plan.geometry.heads)} -> {sum(len(layer.kept_heads) for layer in plan.layers)}")
    print(f"heads whose sink moves over 3 positions: {profile.moving_share():.0%}")
    print(f"parameters of the blocks removed: {plan.parameters_removed:.1%}")
    print(f"forward: {times['dense'].median:.1f} ms -> {times['pruned'].median:.1f} ms ", end="")
    print(f"({ratios['pruned']:.2f}x; arithmetic allows {sp.ceiling(dense, plan, *prompts.shape):.2f}x)")
    print(f"denoised {ids.shape[1] - prompts.shape[1]} tokens of {len(ids)} sequences with the pruned model")


if __name__ == "__main__":
    main()
