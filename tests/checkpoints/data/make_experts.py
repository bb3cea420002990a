"""Made the LLaDA2 checkpoints in this folder, with the code of commit 98b326b, whose plans knew no experts;
they are never made anew.

    git worktree add ../before 98b326b && pip install ../before
    python tests/checkpoints/data/make_experts.py

``expected_experts.json`` says what that code read back, as ``expected.json`` does.
"""

import json

import torch
from make import HERE, seen

import sinkprune as sp
from sinkprune.models.llada2 import LLaDA2, LLaDA2Config

LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "first_k_dense_replace": 1,
    "head_dim": 8, "hidden_act": "silu", "hidden_size": 16, "intermediate_size": 12,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 6, "moe_router_enable_expert_bias": True, "n_group": 2, "norm_topk_prob": True,
    "num_attention_heads": 4, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "num_shared_experts": 1, "pad_token_id": 31, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6, "rope_theta": 600000, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 1, "vocab_size": 33, "block_size": 4, "mask_token_id": 32,
}  # fmt: skip


def main():
    torch.manual_seed(0)
    model = LLaDA2(LLaDA2Config.from_dict(LLADA2)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 2:
                tensor.normal_(std=tensor.shape[1] ** -0.5)
            elif "expert_bias" in name:
                tensor.normal_(std=0.3)
    expected = {}
    sp.save(model, HERE / "llada2-dense")
    expected["llada2-dense"] = seen(sp.load(HERE / "llada2-dense")[0])
    rows = torch.randint(0, 31, (8, 16), generator=torch.Generator().manual_seed(1))
    calibration = sp.calibrate(model, rows, sequences=8, seed=0)
    plan = sp.plan(model, criterion="reconstruction", ratio=0.4, calibration=calibration)
    plan.layers[0].kept_channels = [0, 2, 3, 7, 8, 11]
    plan.save(HERE / "llada2-plan.json")
    sp.apply(model, plan, calibration=calibration)
    sp.save(model, HERE / "llada2-repaired")
    expected["llada2-repaired"] = seen(sp.load(HERE / "llada2-repaired")[0])
    masked = sp.apply(sp.load(HERE / "llada2-dense")[0], plan, mode="mask")
    expected["llada2-masked"] = seen(masked)
    (HERE / "expected_experts.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
