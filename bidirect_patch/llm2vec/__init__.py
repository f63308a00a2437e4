"""The way from LLM2Vec: what its class made or would load, as a SentenceTransformer with the same embeddings.

`load` is `load_llm2vec`. `encoder_settings` reads llm2vec_config.json, `reading` makes tokens of texts and instructions as
LLM2Vec does, `modules` are the two modules of the SentenceTransformer.
"""
