"""Toys of every family that can be exported, pruned and repaired as a plan for the target would."""

import torch
import transformers
from block_causals import toy_llada2, toy_sdar
from decoders import FAMILIES as DECODERS
from dreams import toy_dream
from hf import build
from layer_twins import llada_moe_twin
from toys import MASK, manual_plan, tokens, toy

import sinkprune as sp
from sinkprune.evidence.calibration import Calibration

EQUAL = [[0, 1], [2, 3], [0, 1]]  # as many in every layer, a whole group of two where heads share
NARROW = [[0, 7, 9], [1, 2, 3], [5, 6, 39]]
RAGGED = [[0, 1], [2, 3], [0, 1, 2, 3]]
SOME = [[0, 7, 9], [1, 2], None]
ALL = [[0, 1, 2, 3]] * 3


def toy_rnd1(seed=0):
    """Qwen3's mixture of experts, bidirectional: what RND1 is."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_experts=6,
        num_experts_per_tok=2, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, is_causal=False, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], pad_token_id=0, mask_token_id=MASK,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() > 1 and "embed" not in name:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return model


MODELS = {
    "llada": toy,
    "llada, tied": lambda: toy(weight_tying=True),
    "llada, biases": lambda: toy(include_qkv_bias=True),
    "llada, groups": lambda: toy(n_kv_heads=2),
    "dream": toy_dream,
    "dream, tied": lambda: toy_dream(tie_word_embeddings=True),
    "sdar": toy_sdar,
    "sdar, tied": lambda: toy_sdar(tie_word_embeddings=True),
    "illada": DECODERS["illada"].toy,
    "llada2": toy_llada2,
    "llada_moe": lambda: llada_moe_twin(moe_layer_freq=[1, 1, 1]),
    "rnd1": toy_rnd1,
    "llama": lambda: build("llama, bidirectional, MHA, tied", attention_bias=False),
    "llama, biases": lambda: build("llama, bidirectional, MHA, tied"),
    "qwen3": lambda: build("qwen3, bidirectional"),
}


def made(which, heads, channels=None, repair="least_squares"):
    """A toy pruned to ``heads`` and ``channels`` and repaired."""
    model = MODELS[which]()
    ids = tokens(24, 12, seed=3)
    rows = Calibration(ids, ids, ids == MASK, None)
    return sp.apply(model, manual_plan(model, heads, channels), calibration=rows, repair=repair)


@torch.no_grad()
def raw_logits(model, ids):
    """Logits as the model gives them, a token late where it does."""
    adapter = sp.adapter_for(model)
    return model(ids).logits if adapter.shift else adapter.predict(ids)
