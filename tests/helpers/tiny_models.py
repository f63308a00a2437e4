"""Tiny random models of four families."""

import pytest
import torch
import transformers
from packaging.version import Version

from .versions import TRANSFORMERS

each_family = pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen2"])
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "gemma": "Gemma", "qwen2": "Qwen2"}
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tiny_config(family: str, **settings):
    """A tiny config of llama, mistral, gemma or qwen2, with full attention unless the settings say otherwise."""
    settings = SIZES | ({"sliding_window": None} if family == "mistral" else {}) | settings
    if family != "gemma" and TRANSFORMERS < Version("4.48"):
        settings.pop("head_dim")  # there it is hidden_size / num_attention_heads, the same number
    return getattr(transformers, f"{FAMILIES[family]}Config")(**settings)


def tiny_model(family: str = "llama", backend: str = "sdpa", head: bool = True, config=None, seed: int = 0, **settings):
    """A tiny random `*ForCausalLM` (or bare `*Model`), float32, in eval mode; its weights tell tokens well apart."""
    cls = getattr(transformers, f"{FAMILIES[family]}{'ForCausalLM' if head else 'Model'}")
    config = tiny_config(family, **settings) if config is None else config
    model = cls._from_config(config, attn_implementation=backend)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.25 * noise)
    return model.eval()


def llama(cls=transformers.LlamaModel, backend: str = "sdpa", **settings):
    """A tiny Llama of a class in eval mode, its weights as transformers draws them: no two are alike without a seed."""
    return cls._from_config(tiny_config("llama", **settings), attn_implementation=backend).eval()


def causal_lm(**settings):
    """The same with an output head."""
    return llama(transformers.LlamaForCausalLM, **settings)


def save_llama(folder, tokenizer, **settings):
    """Write a tiny causal Llama for a tokenizer's vocabulary, always the same one, and the tokenizer into `folder`."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes | settings)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
