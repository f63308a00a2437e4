"""Tokenizers of bytes in which a space belongs to the word after it, as in GPT-2's and Llama 3's."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

CLASSES = (PreTrainedTokenizerFast, GPT2TokenizerFast)  # opened from its file as it is, and made anew by its class


def byte_tokenizer(cls=PreTrainedTokenizerFast):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    merges = [("Ġ", letter) for letter in alphabet if letter.isalpha() and letter.isascii()]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 512}
    if cls is PreTrainedTokenizerFast:
        return cls(tokenizer_object=backend, **specials)
    return cls(vocab=vocabulary, merges=merges, **specials)
