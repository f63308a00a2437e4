"""LLM2Vec's ladder on a real model: causal, bidirectional, + MNTP, + SimCSE, and the causal model with the same SimCSE."""
