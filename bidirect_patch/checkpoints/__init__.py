"""What a bidirectional model leaves on disk, and what is known of it when it is opened again.

`save` writes `"is_causal": false` into config.json, `adapters` into adapter_config.json. `marks` reads both and knows what
LLM2Vec wrote, `fit` compares it with the model that is there. `hooks` puts them where transformers and PEFT save,
load and generate.
"""
