"""Hand-written bidirectional Llama subclasses, after the recipe of LLM2Vec's tutorial for transformers 4.38 to 4.39.

The recipe: attention classes that say is_causal=False, a decoder layer built from them, and a model whose
`_update_causal_mask` forbids padding alone. Written anew here from reading transformers 4.39.3.
"""

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LLAMA_ATTENTION_CLASSES, LlamaDecoderLayer


def _not_causal(cls):
    def init(self, *args, **kwargs):
        cls.__init__(self, *args, **kwargs)
        self.is_causal = False

    return type(f"Modified{cls.__name__}", (cls,), {"__init__": init})


ATTENTION = {name: _not_causal(cls) for name, cls in LLAMA_ATTENTION_CLASSES.items()}


class ModifiedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = ATTENTION[config._attn_implementation](config=config, layer_idx=layer_idx)


class LlamaBiModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(ModifiedLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))

    def _update_causal_mask(self, attention_mask, input_tensor, cache_position):
        if self.config._attn_implementation == "flash_attention_2":
            return attention_mask if attention_mask is not None and not attention_mask.all() else None
        batch, seq = input_tensor.shape[:2]
        mask = input_tensor.new_zeros(batch, 1, seq, seq)
        if attention_mask is not None:
            padding = attention_mask[:, None, None, :] == 0
            mask = mask.masked_fill(padding, torch.finfo(input_tensor.dtype).min)
        return mask


class LlamaBiForMNTP(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaBiModel(config)
