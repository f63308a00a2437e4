"""Models of transformers on the meta device: their structure alone, of every kind."""

import torch
import transformers

TINY = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
T5 = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
BART = dict(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4)
VISION = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=4
)
MAMBA = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)


def made(model, config, **settings):
    """A model of transformers, by the names of its class and config."""
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**settings))
