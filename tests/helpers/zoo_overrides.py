"""Data of the zoo: sizes common to all families, and what single families need beyond them."""

# fmt: off

# Set wherever a config or sub-config has the attribute.
SIZES = {
    "vocab_size": 128,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    # width
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "hidden_dim": 32,
    "intermediate_size": 48, "moe_intermediate_size": 24, "ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "shared_expert_intermediate_size": 24,
    # depth
    "num_hidden_layers": 4, "n_layer": 4, "num_layers": 4, "n_layers": 4,
    "decoder_layers": 2, "encoder_layers": 2, "num_encoder_layers": 2, "num_decoder_layers": 2,
    # heads
    "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4, "n_heads": 4, "num_heads": 4, "head_dim": 8,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "attention_heads": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    # MLA
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # windows and chunks, shorter than the texts of the tests
    "sliding_window": 4, "attention_chunk_size": 4, "window_size": 4, "sliding_window_size": 4,
    # experts
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_topk": 2,
    # recurrences
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64,
    # indexers: as many keys as the texts have, so that each layer sees all that it may
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64,
    # other
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
    "rotary_dim": 4,
}

# Set wherever a config has a vocabulary: special ids, and encoders are decoders here.
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True}

MLA = {"num_key_value_heads": 4}  # every head has its own keys, expanded from the latent
MIXED = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA3N = {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]}
QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4, "indexer_compress_ratio": 2,
    "hc_lowrank": 8, "ple_layer_ids": [1], "ple_embed_dim": 32, "heads_per_ngram": 2, "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 1,
}
DOTS3 = {
    "num_key_value_heads": 4, "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    "shared_experts_intermediate_size": 24,
}
INKLING2 = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16,
            "unpadded_vocab_size": 128}
ASSISTANT = {
    "backbone_hidden_size": 32,
    "text_config": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
    },
}

OVERRIDES = {
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": MLA,
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert-generation": {"use_cache": False},  # old releases drop the mask where they build a cache
    "blt": {
        "num_hidden_layers": 4, "encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32},
        "encoder_hash_byte_group_vocab": 64, "local_attention_window_len": 4,
    },
    "cohere_compass_text": {
        "layer_types": MIXED, "rope_parameters": {kind: ROPE | {"mrope_section": [2, 1, 1]} for kind in MIXED},
    },
    "cpmant": {"dim_head": 8, "dim_ff": 48, "prompt_length": 4, "position_bias_num_buckets": 32},
    "ctrl": {"dff": 48},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 32}},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {
        "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"max_window_layers": 2, "layer_types": MIXED, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": DOTS3,
    "dots3_note_text": DOTS3,
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "gemma4_assistant": ASSISTANT,
    "gemma4_unified_assistant": ASSISTANT,
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 24},
    "inkling2_loop_text": INKLING2,
    "inkling2_text": INKLING2,
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": MLA | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": MLA | {"zero_expert_num": 2, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 16},
    "mega": {"bidirectional": False},
    "minicpm3": MLA,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_block_size": 2, "index_topk_blocks": 8,
        "dense_intermediate_size": 48,
    },
    "mllama": {"rope_scaling": {"rope_type": "default"}},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemotron_h": {
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
        "moe_shared_expert_intermediate_size": 24,
    },
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 56,
            "crop_size": 56,
        },
        "audio_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4, "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
        },
    },
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, "layer_types": MIXED},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 2, "layer_types": MIXED},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2, "layer_types": MIXED},
    "qwen3_moe": {"use_sliding_window": True, "max_window_layers": 2, "layer_types": MIXED},
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8,
        "feed_forward_size": 48, "num_buckets": 2, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "sarvam_mla": MLA,
    "smollm3": {"use_sliding_window": True, "layer_types": MIXED},
    "transfo-xl": {"cutoffs": [30, 60], "d_embed": 32, "d_head": 8, "d_inner": 48},
    "xlm": {"causal": True},
    "xlnet": {"d_inner": 48},
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": MLA,
    "zamba": {"use_mamba_kernels": False, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4, "use_mem_rope": True},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "num_experts_per_tok": 1},
}

# A sub-config whose model transformers takes from another package (timm).
FOREIGN_TOWER = {"gemma3n": "Gemma3nVisionConfig"}

NO_PAD = ("its config has no pad_token_id, which its model reads", "no attribute 'pad_token_id'", "==5.0.*")

# Types that can't be built, or run on text alone: why, a part of the error that says so, in which transformers.
WHY_NOT = {
    "exaone4": NO_PAD,
    "gemma4_assistant": ("its config demands what its own layers refuse: all keys shared", "types producing a cache|shared_kv_states", ">=5"),
    "gemma4_unified_assistant": ("its config demands what its own layers refuse: all keys shared", "types producing a cache|shared_kv_states", ">=5"),
    "jetmoe": NO_PAD,
    "open-llama": ("its attention reads rope_theta, which nothing sets", "rope_theta", "<4.44"),
    "phi": NO_PAD,
    "qdqbert": ("needs the package pytorch-quantization", "pytorch-quantization", ">=4"),
    "speech_to_text_2": ("its initialization reads a weight that its positions lack", "no attribute 'weight'", ">=4.53"),
    "stablelm": NO_PAD,
    "transfo-xl": ("its forward calls Tensor.type_as without a tensor", "type_as", ">=4"),
    "zamba2": ("what it ties isn't there with as few layers", "tie_weights_keys", "==5.0.*"),
}

# Types whose stock output is not a function of the past alone: why, in which transformers.
FORGOTTEN = ("it drops the causal mask, a fault of that release", "==5.17.*")
NOT_CAUSAL = {
    "big_bird": FORGOTTEN,
    "cpmant": ("its whole prompt is visible to itself", ""),
    "megatron-bert": FORGOTTEN,
    "prophetnet": ("position biases are mixed up between heads and positions", ""),
    "reformer": ("hashing sorts all tokens into chunks, so later tokens decide which earlier ones meet", ""),
    "rembert": FORGOTTEN,
    "roformer": FORGOTTEN,
    "xlm-prophetnet": ("position biases are mixed up between heads and positions", ""),
    "xlnet": ("causal only through the perm_mask that a caller passes", ""),
}

# Types that take no MNTP head: their output head lies inside another module or is several, or their loss doesn't shift.
NO_MNTP_HEAD = set(
    """bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert cpmant data2vec-text ernie
    fuyu marian mbart megatron-bert musicgen musicgen_melody mvp open-llama pegasus plbart prophetnet reformer rembert roberta
    roberta-prelayernorm roc_bert roformer speech_to_text_2 trocr whisper xlm xlm-prophetnet xlm-roberta xlm-roberta-xl xlnet
    xmod""".split()
)

# Types that older transformers mapped and the newest doesn't.
RETIRED = {"mega", "open-llama", "qdqbert", "speech_to_text_2", "transfo-xl", "xlm-prophetnet"}
