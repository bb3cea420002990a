"""Made the checkpoints in this folder, with the code of commit bd30634; they are never made anew.

    git worktree add ../before bd30634 && pip install ../before && python tests/checkpoints/data/make.py

``expected.json`` says what that code read back: the sha256 of every tensor and some logits.
"""

import hashlib
import json
from pathlib import Path

import torch
import transformers

import sinkprune as sp
from sinkprune.models.llada import LLaDA, LLaDAConfig

HERE = Path(__file__).parent
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 32, 32], [6, 32, 5, 3, 5, 8, 32, 7, 9]])
LLADA = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu", "alibi": False,
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False, "block_type": "llama", "d_model": 16, "embedding_size": 33,
    "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 32, "max_sequence_length": 64, "mlp_hidden_size": 24,
    "mlp_ratio": 4, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "pad_token_id": 0, "rms_norm_eps": 1e-5,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "vocab_size": 33, "weight_tying": False,
}  # fmt: skip
QWEN3 = dict(
    vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
    is_causal=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=32,
)  # fmt: skip


def models():
    torch.manual_seed(0)
    native = LLaDA(LLaDAConfig.from_dict(LLADA)).eval()
    foreign = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3)).eval()
    for model in (native, foreign):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
    return {"llada": native, "qwen3": foreign}


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def seen(model):
    with torch.no_grad():
        logits = model(IDS).logits
    return {
        "tensors": {name: digest(tensor) for name, tensor in model.state_dict().items()},
        "logits": logits[:, ::4, ::8].tolist(),
        "fingerprint": sp.adapter_for(model).fingerprint(),
    }


def main():
    expected = {}
    for name, model in models().items():
        sp.save(model, HERE / f"{name}-dense")
        expected[f"{name}-dense"] = seen(sp.load(HERE / f"{name}-dense")[0])
        rows = torch.randint(0, 32, (8, 16), generator=torch.Generator().manual_seed(1))
        calibration = sp.calibrate(model, rows, sequences=8, seed=0)
        plan = sp.plan(
            model, criterion="reconstruction", ratio=0.3, unit="parameters", targets=("heads", "mlp"),
            calibration=calibration,
        )  # fmt: skip
        plan.save(HERE / f"{name}-plan.json")
        sp.apply(model, plan, calibration=calibration)
        sp.save(model, HERE / f"{name}-repaired")
        expected[f"{name}-repaired"] = seen(sp.load(HERE / f"{name}-repaired")[0])
        masked = sp.apply(sp.load(HERE / f"{name}-dense")[0], plan, mode="mask")
        expected[f"{name}-masked"] = seen(masked)
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
