"""A tokenizer of words, and texts for the collator."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bidirect_patch import MNTPCollator

SPECIALS = ["<unk>", "<s>", "</s>"]
BOS, EOS, UNDERSCORE = 1, 2, 3
WORDS = 500


def make_tokenizer(words=WORDS, underscore=True, **specials):
    """A tokenizer with a token for each of w0, w1, ..., and one for the underscore."""
    ordinary = [*(["_"] if underscore else []), *(f"w{i}" for i in range(words))]
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *ordinary])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **specials}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def texts(*lengths, seed=0):
    """Texts of ordinary words only, so that every token but the first may be chosen."""
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(4, 4 + WORDS, length).tolist()} for length in lengths]


def everything_hidden(tokenizer, **settings):
    return MNTPCollator(tokenizer, mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0.0, **settings)
