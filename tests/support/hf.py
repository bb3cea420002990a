"""Toy random-weight instances of transformers' own classes."""

import copy

import torch
import transformers
from toys import manual_plan  # noqa: F401

VOCABULARY = 61
LAYERS, HEADS, WIDTH = 3, 4, 8
_COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    mask_token_id=60,
)  # fmt: skip
_DECODER = _COMMON | dict(num_key_value_heads=2, head_dim=WIDTH, tie_word_embeddings=False)
_MODERN = _COMMON | dict(
    local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2, attention_dropout=0.0
)
FAMILIES = {
    "llama": ("Llama", _DECODER),
    "llama, bidirectional, MHA, tied": (
        "Llama",
        _DECODER
        | dict(num_key_value_heads=4, is_causal=False, tie_word_embeddings=True, attention_bias=True),
    ),
    "qwen2": ("Qwen2", _DECODER),
    "qwen2, sliding": (
        "Qwen2",
        _DECODER | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", _DECODER),
    "qwen3, bidirectional": ("Qwen3", _DECODER | dict(is_causal=False)),
    "bert": ("Bert", _COMMON),
    "modernbert": ("ModernBert", _MODERN),
}


def build(name: str, seed: int = 0, **changes):
    """A model in evaluation mode, its projections scaled up so that attention is far from uniform."""
    kind, values = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**(copy.deepcopy(values) | changes))
    head = "ForMaskedLM" if "Bert" in kind else "ForCausalLM"
    torch.manual_seed(seed)
    model = getattr(transformers, kind + head)(config).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if tensor.dim() == 2 and "embed" not in tensor_name:
                tensor.normal_(std=tensor.shape[1] ** -0.5)
            elif "bias" in tensor_name:
                tensor.normal_(std=0.3)
            if any(part in tensor_name for part in ("q_proj", "query", "Wqkv")):
                tensor[:32] *= 2
    return model


def out_projections(model) -> list[torch.nn.Linear]:
    """The matrix after each layer's attention, found by its name alone."""
    ends = ("self_attn.o_proj", "attention.output.dense", "attn.Wo")
    return [module for name, module in model.named_modules() if name.endswith(ends)]


def down_projections(model) -> list[torch.nn.Linear]:
    ends = ("mlp.down_proj", "mlp.Wo", "output.dense")
    return [
        m for n, m in model.named_modules() if n.endswith(ends) and not n.endswith("attention.output.dense")
    ]


def zeroed_by_hand(model, kept_heads, kept_channels=None):
    """A copy with zeros in the columns that read removed heads and channels."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, projection in enumerate(out_projections(model)):
            for head in set(range(HEADS)) - set(kept_heads[layer]):
                projection.weight[:, head * WIDTH : (head + 1) * WIDTH] = 0
        for layer, projection in enumerate(down_projections(model)):
            if kept_channels is not None and kept_channels[layer] is not None:
                for channel in set(range(projection.in_features)) - set(kept_channels[layer]):
                    projection.weight[:, channel] = 0
    return model


def padded(padding: str, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[2, length]`` and their mask, the second row padded by four tokens."""
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(4))
    valid = torch.ones_like(ids)
    if padding == "left":
        valid[1, :4] = 0
    elif padding == "right":
        valid[1, -4:] = 0
    return ids.masked_fill(valid == 0, 0), valid


@torch.no_grad()
def valid_logits(model, padding: str = "left") -> torch.Tensor:
    ids, valid = padded(padding)
    return model(ids, attention_mask=valid).logits[valid.bool()]


def diffusion_gemma(seed: int = 0):
    """A toy DiffusionGemma: one sliding layer, two full-attention ones with wider heads."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig
    from transformers import Gemma4VisionConfig as Vision

    text = DiffusionGemmaTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=WIDTH, max_position_embeddings=64,
        sliding_window=8, layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_experts=4, top_k_experts=2, moe_intermediate_size=16, global_head_dim=16,
        num_global_key_value_heads=1,
    )  # fmt: skip
    vision = Vision(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, patch_size=4, position_embedding_size=16,
    )  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=8, image_token_id=59, boi_token_id=57,
        eoi_token_id=58,
    )  # fmt: skip
    torch.manual_seed(seed)
    return DiffusionGemmaForBlockDiffusion(config).eval()


@torch.no_grad()
def canvas_logits(model) -> torch.Tensor:
    """Logits of a canvas after a left-padded prompt."""
    ids, valid = padded("left", 10)
    canvas = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(5))
    seen = torch.cat((valid, torch.ones_like(canvas)), 1)
    return model(
        input_ids=ids, attention_mask=valid, decoder_input_ids=canvas, decoder_attention_mask=seen
    ).logits
