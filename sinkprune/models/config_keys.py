"""Keys of a published ``config.json`` that no native family computes with: which of them change nothing.

A key that is in no list is refused by name: forks of published models add keys that change what is computed
(``use_relay``, ``expert_capacity``), and a model that is read without them is another model.
"""

from __future__ import annotations

from typing import Any

# Packed weights: no family computes with them.
PACKED = ("quantization_config", "compression_config")

# Of any value: bookkeeping, generation's defaults, training, and names of implementations.
HARMLESS = frozenset(
    """
    architectures auto_map model_type transformers_version torch_dtype dtype name_or_path tokenizer_class
    tokenizer_path finetuning_task task_specific_params problem_type id2label label2id num_labels prefix
    unsloth_version unsloth_fixed trl_version library_name license language tags datasets debug use_cache
    return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
    output_router_logits torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward
    keys_to_ignore_at_inference rope_parameters

    bos_token_id sep_token_id cls_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id begin_suppress_tokens suppress_tokens bad_words_ids temperature top_k top_p min_p
    typical_p repetition_penalty length_penalty num_beams num_beam_groups num_return_sequences
    no_repeat_ngram_size encoder_no_repeat_ngram_size diversity_penalty do_sample early_stopping
    max_length min_length max_new_tokens remove_invalid_values exponential_decay_length_penalty

    attention_dropout embedding_dropout residual_dropout output_dropout hidden_dropout resid_pdrop
    attn_pdrop embd_pdrop initializer_range init_fn init_std init_device init_cutoff_factor init_method
    pretraining_tp router_aux_loss_coef router_z_loss_coef mtp_loss_scaling_factor dlm_loss_weight
    ar_loss_weight dp_varying_mask_ratio conplemenrary_mask complementary_mask fuse_cross_entropy
    gradient_checkpointing layerdrop micro_forward skip_checkpoint ep_size use_deepep

    precision flash_attention use_flash_attn use_flash_attention attn_implementation block_group_size
    alibi_bias_max max_window_layers sliding_window moe_shared_expert_intermediate_size
    using_split_qkv_in_self_attention
    """.split()  # noqa: SIM905
)

# Of these values only, where a family does not name the key itself; a null changes nothing anywhere.
ONLY: dict[str, tuple[Any, ...]] = {
    "expert_capacity": (), "clip_qkv": (), "attn_logit_softcapping": (), "final_logit_softcapping": (),
    "query_pre_attn_scalar": (), "attention_multiplier": (),
    "use_mrope": (False,), "no_rope_layers": ([],), "embedding_multiplier": (1,), "residual_multiplier": (1,),
    "logit_scale": (1,), "logits_scaling": (1,), "mlp_bias": (False,), "multi_query_attention": (False,),
    "partial_rotary_factor": (1,), "use_sliding_window": (False,), "is_encoder_decoder": (False,),
    "is_decoder": (False, True), "add_cross_attention": (False,), "pruned_heads": ({},),
    "num_nextn_predict_layers": (0,), "moe_router_enable_expert_bias": (True,), "router_dtype": ("fp32",),
    "attention_bias": (False,), "mlp_only_layers": ([],), "decoder_sparse_step": (1,),
    "tie_word_embeddings": (False,), "use_bias": (False,), "use_qkv_bias": (False,),
}  # fmt: skip

# Other names of what a family knows: the two must agree.
ALIASES = {
    "head_dim": "head_dim",
    "rotary_dim": "rotary_width",
    "embedding_size": "vocab_size",
    "mask_id": "mask_token_id",
    "canvas_length": "block_size",
    "num_local_experts": "num_experts",
}


def refuse_unknown(family: str, config: Any, extra: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raise ``ValueError`` naming a key of ``extra`` that changes what is computed, or that may.

    Args:
        family: the name that the message begins with.
        config: what the family reads of its ``config.json``, for ``ALIASES``.
        extra: the keys that the family does not read.
        fixed: keys whose one supported value was checked.
    """
    for key, value in extra.items():
        if value is None or key in fixed or key in HARMLESS or key.startswith("_"):
            continue
        same = ALIASES.get(key, "")
        if hasattr(config, same):
            if value != getattr(config, same):
                own = getattr(config, same)
                raise ValueError(f"{family} config: {key} is {value!r:.40}, and {same} {own!r:.40}")
        elif key == "layer_types":
            if kinds := {str(kind) for kind in value} - {"full_attention"}:
                raise ValueError(
                    f"{family} config: only layer_types of 'full_attention' are computed here, got "
                    f"{', '.join(sorted(kinds))}"
                )
        elif key not in ONLY:
            raise ValueError(
                f"{family} config: {key}={str(value)[:60]} is not known here and may change what is "
                "computed: take it out of config.json if it does not"
            )
        elif value not in ONLY[key]:
            raise ValueError(f"{family} config: {key} is not computed here, got {str(value)[:80]}")
