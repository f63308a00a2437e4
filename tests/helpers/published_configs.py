"""Configs of the sizes that are published, by the names of their models."""

import copy

import pytest
import transformers
from packaging.version import Version
from transformers import AutoConfig

from .versions import TRANSFORMERS

# (hidden_size, intermediate_size, heads, key/value heads, layers, vocabulary) and what else is in the config.json.
LLAMA_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
)
MLA = dict(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
PUBLISHED = {
    "Llama-3-8B": (
        "llama",
        (4096, 14336, 32, 8, 32, 128256),
        dict(rope_theta=500000.0, max_position_embeddings=8192, bos_token_id=128000, eos_token_id=128001),
    ),
    "Llama-3.1-70B": (
        "llama",
        (8192, 28672, 64, 8, 80, 128256),
        dict(rope_scaling=LLAMA3_ROPE | {"original_max_position_embeddings": 8192}, max_position_embeddings=131072),
    ),
    "SmolLM2-135M": ("llama", (576, 1536, 9, 3, 30, 49152), {}),
    "Mistral-7B-v0.1": ("mistral", (4096, 14336, 32, 8, 32, 32000), dict(sliding_window=4096)),
    "Mistral-Nemo": ("mistral", (5120, 14336, 32, 8, 40, 131072), dict(head_dim=128, sliding_window=None)),
    "Qwen2.5-0.5B": ("qwen2", (896, 4864, 14, 2, 24, 151936), dict(max_window_layers=24, sliding_window=32768)),
    "Qwen2.5-7B": ("qwen2", (3584, 18944, 28, 4, 28, 152064), {}),
    "Qwen3-8B": ("qwen3", (4096, 12288, 32, 8, 36, 151936), dict(head_dim=128)),
    "Qwen3-32B": ("qwen3", (5120, 25600, 64, 8, 64, 151936), dict(head_dim=128)),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        (2048, 6144, 32, 4, 48, 151936),
        dict(head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1),
    ),
    "gemma-2b": ("gemma", (2048, 16384, 8, 1, 18, 256000), dict(head_dim=256)),
    "gemma-2-9b": (
        "gemma2",
        (3584, 14336, 16, 8, 42, 256000),
        dict(head_dim=256, sliding_window=4096, query_pre_attn_scalar=256, pad_token_id=0),
    ),
    "gemma-3-1b": (
        "gemma3_text",
        (1152, 6912, 4, 1, 26, 262144),
        dict(head_dim=256, sliding_window=512, sliding_window_pattern=6, query_pre_attn_scalar=256),
    ),
    "Phi-3-mini": (
        "phi3",
        (3072, 8192, 32, 32, 32, 32064),
        dict(sliding_window=2047, pad_token_id=32000, max_position_embeddings=4096),
    ),
    "Phi-3-mini-128k": (
        "phi3",
        (3072, 8192, 32, 32, 32, 32064),
        dict(
            rope_scaling={"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [1.5] * 48},
            original_max_position_embeddings=4096,
            max_position_embeddings=131072,
            pad_token_id=32000,
        ),
    ),
    "phi-2": ("phi", (2560, 10240, 32, 32, 32, 51200), dict(partial_rotary_factor=0.4)),
    "Mixtral-8x7B": ("mixtral", (4096, 14336, 32, 8, 32, 32000), dict(num_local_experts=8, num_experts_per_tok=2)),
    "OLMo-2-7B": ("olmo2", (4096, 11008, 32, 32, 32, 100352), dict(pad_token_id=100277, eos_token_id=100257)),
    "c4ai-command-r7b": (
        "cohere2",
        (4096, 14336, 32, 8, 32, 256000),
        dict(sliding_window=4096, sliding_window_pattern=4),
    ),
    "Llama-4-Scout": (
        "llama4_text",
        (5120, 8192, 40, 8, 48, 202048),
        dict(
            head_dim=128,
            intermediate_size_mlp=16384,
            num_local_experts=16,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            attention_chunk_size=8192,
            pad_token_id=200018,
        ),
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        (2880, 2880, 64, 8, 24, 201088),
        dict(
            head_dim=64,
            num_local_experts=32,
            num_experts_per_tok=4,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"] * 12,
            pad_token_id=199999,
            eos_token_id=200002,
            quantization_config={"quant_method": "mxfp4"},
        ),
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        (7168, 18432, 128, 128, 61, 129280),
        MLA
        | dict(
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            n_group=8,
            topk_group=4,
            first_k_dense_replace=3,
            quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
        ),
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        (2048, 10944, 16, 16, 27, 102400),
        MLA
        | dict(
            q_lora_rank=None,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            first_k_dense_replace=1,
        ),
    ),
    "granite-3-8b": ("granite", (4096, 12800, 32, 8, 40, 49155), dict(attention_multiplier=0.0078125)),
    "SmolLM3-3B": ("smollm3", (2048, 11008, 16, 4, 36, 128256), dict(pad_token_id=128004, no_rope_layer_interval=4)),
    "Hunyuan-7B": ("hunyuan_v1_dense", (4096, 14336, 32, 8, 32, 128167), dict(head_dim=128)),
    "Ministral-8B": (
        "ministral",
        (4096, 12288, 32, 8, 36, 131072),
        dict(head_dim=128, sliding_window=32768, layer_types=(["full_attention"] + ["sliding_attention"] * 3) * 9),
    ),
    "gemma-3n-E4B": (
        "gemma3n_text",
        (2048, 16384, 8, 2, 35, 262400),
        dict(head_dim=256, sliding_window=512, num_kv_shared_layers=15, hidden_size_per_layer_input=256),
    ),
    "ModernBERT-decoder": (
        "modernbert-decoder",
        (768, 1152, 12, 12, 22, 50368),
        dict(local_attention=128, global_attn_every_n_layers=3),
    ),
    "gpt2": ("gpt2", None, dict(n_embd=768, n_head=12, n_layer=12, n_positions=1024, vocab_size=50257)),
    "gpt-j-6b": ("gptj", None, dict(n_embd=4096, n_head=16, n_layer=28, n_positions=2048, rotary_dim=64)),
    "gpt-neo-1.3B": (
        "gpt_neo",
        None,
        dict(
            hidden_size=2048, num_heads=16, num_layers=24, window_size=256, attention_types=[[["global", "local"], 12]]
        ),
    ),
    "pythia-6.9b": (
        "gpt_neox",
        None,
        dict(hidden_size=4096, num_attention_heads=32, intermediate_size=16384, num_hidden_layers=32),
    ),
    "falcon-7b": (
        "falcon",
        None,
        dict(hidden_size=4544, num_attention_heads=71, num_hidden_layers=32, multi_query=True, vocab_size=65024),
    ),
    "falcon-40b": (
        "falcon",
        None,
        dict(
            hidden_size=8192,
            num_attention_heads=128,
            num_kv_heads=8,
            num_hidden_layers=60,
            new_decoder_architecture=True,
            vocab_size=65024,
        ),
    ),
    "mpt-7b": ("mpt", None, dict(d_model=4096, n_heads=32, n_layers=32, max_seq_len=2048, vocab_size=50432)),
    "bloom-7b1": ("bloom", None, dict(hidden_size=4096, n_head=32, n_layer=30, vocab_size=250880)),
    "opt-6.7b": (
        "opt",
        None,
        dict(hidden_size=4096, ffn_dim=16384, num_attention_heads=32, num_hidden_layers=32, word_embed_proj_dim=4096),
    ),
    "codegen-2B": ("codegen", None, dict(n_embd=2560, n_head=32, n_layer=32, n_positions=2048, rotary_dim=64)),
}


def published(name):
    model_type, sizes, others = PUBLISHED[name]
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    if name == "Llama-3.1-70B" and TRANSFORMERS < Version("4.43"):
        pytest.skip(f"transformers {TRANSFORMERS} has no llama3 rope")
    if model_type == "phi" and TRANSFORMERS.base_version == "5.0.0":
        pytest.skip("transformers 5.0.0 can't build a phi whose config names no pad_token_id")
    sizes = dict(zip(LLAMA_NAMES, sizes, strict=True)) if sizes else {}
    return AutoConfig.for_model(model_type, **copy.deepcopy(sizes | others))
