"""Which mask token MNTPCollator takes; bad settings and features."""

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bidirect_patch import MNTPCollator
from bidirect_patch.errors import CollatorError, MaskTokenError

from ..helpers.words import everything_hidden, make_tokenizer


def test_mask_token_the_tokenizers_own_comes_first():
    tokenizer = make_tokenizer(mask_token="w7")
    assert everything_hidden(tokenizer)([[10, 12]])["input_ids"].tolist() == [[10, 4 + 7]]
    assert everything_hidden(tokenizer, mask_token="w9")([[10, 12]])["input_ids"].tolist() == [[10, 4 + 9]]


def test_mask_token_is_the_vocabulary_entry_of_that_spelling():
    """SentencePiece would encode `_` as `▁_`; LLM2Vec means the entry `_` itself."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁_": 1, "_": 2, "▁a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.encode("_") == [1]
    assert MNTPCollator(tokenizer).mask_token_id == 2
    assert MNTPCollator(tokenizer, mask_token="a").mask_token_id == 3  # not an entry: what encoding it gives


@pytest.mark.parametrize("token, count", [("w1 w2", "2 \\(\\[5, 6\\]\\)"), ("nowhere", "0")])
def test_mask_token_must_be_one_id(tokenizer, token, count):
    with pytest.raises(MaskTokenError, match=f"{token!r} gives {count}"):
        MNTPCollator(tokenizer, mask_token=token)


@pytest.mark.parametrize("token", ["", 3])
def test_mask_token_must_be_text(tokenizer, token):
    with pytest.raises(MaskTokenError, match="non-empty string"):
        MNTPCollator(tokenizer, mask_token=token)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"mlm_probability": 0}, "above 0"),
        ({"mlm_probability": 1.2}, "mlm_probability must be a number from 0 to 1; got 1.2"),
        ({"mlm_probability": float("nan")}, "got nan"),
        ({"mlm_probability": "0.2"}, "got '0.2'"),
        ({"mlm_probability": (0.5, 0.1)}, "the lower one first; got \\(0.5, 0.1\\)"),
        ({"mlm_probability": (0, 0.5)}, "two such numbers above 0, the lower one first; got \\(0, 0.5\\)"),
        ({"mlm_probability": (0.5, 1.5)}, "got \\(0.5, 1.5\\)"),
        ({"mlm_probability": (0.5,)}, "got \\(0.5,\\)"),
        ({"mlm_probability": [0.1, 0.2, 0.3]}, "got \\[0.1, 0.2, 0.3\\]"),
        ({"mlm_probability": (0.1, float("nan"))}, "got \\(0.1, nan\\)"),
        ({"mlm_probability": ("0.1", "0.5")}, "got \\('0.1', '0.5'\\)"),
        ({"mlm_probability": (0.5, True)}, "got \\(0.5, True\\)"),
        ({"mlm_probability": (0.1, None)}, "got \\(0.1, None\\)"),
        ({"mask_replace_prob": -0.1}, "mask_replace_prob must be a number from 0 to 1; got -0.1"),
        ({"mask_replace_prob": 0.9, "random_replace_prob": 0.2}, "got 0.9 \\+ 0.2"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be an integer of at least 1; got 0"),
        ({"pad_to_multiple_of": 8, "padding_free": True}, "give one of them"),
        ({"return_flash_attn_kwargs": True}, "needs padding_free=True"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
        ({"seed": 1.5}, "got 1.5"),
        ({"num_sink_tokens": -1}, "num_sink_tokens must be an integer of at least 0; got -1"),
        ({"num_sink_tokens": True}, "num_sink_tokens must be an integer of at least 0; got True"),
        ({"num_sink_tokens": 1.0}, "got 1.0"),
        ({"pad_to_multiple_of": 10**18}, f"at most 16777216; got {10**18}"),
    ],
)
def test_settings_are_checked(tokenizer, settings, said):
    with pytest.raises(CollatorError, match=said):
        MNTPCollator(tokenizer, **settings)


@pytest.mark.parametrize("given", [None, "gpt2"])
def test_the_tokenizer_is_checked(given):
    with pytest.raises(CollatorError, match=f"transformers tokenizer; got {given!r}"):
        MNTPCollator(given)


@pytest.mark.parametrize(
    "features, said",
    [
        ([], "0 features with no token"),
        ([{"input_ids": []}], "1 features with no token"),
        ([{"text": "hello"}], "Feature 0 has no input_ids, only \\['text'\\]"),
        ([{"input_ids": None, "attention_mask": [1]}], "Feature 0 has no input_ids, only \\['attention_mask'\\]"),
        ([[4, 5], None], "Feature 1 has no input_ids"),
        ([{"input_ids": [4, 5], "attention_mask": [1]}], "2 input_ids and 1 of attention_mask"),
        ([{"input_ids": [4]}, {"input_ids": [[4, 5]]}], "input_ids of feature 1 .* shape \\(1, 2\\)"),
        ([{"input_ids": [0.5]}], "float64"),
        ([{"input_ids": [[4], [5, 6]]}], "can't be read as numbers"),
        (None, "one feature per text; got None"),
        (7, "one feature per text; got 7"),
        ({"input_ids": [[4, 5]]}, "got one dict for all"),
        (transformers.BatchEncoding({"input_ids": [[4, 5]]}), "got one BatchEncoding for all"),
        ("text", "got one str for all"),
        ([4, 5], "shape \\(\\)"),
        ([torch.tensor([4.0, 5.0], requires_grad=True)], "feature 0 .* got shape \\(2,\\), float32"),
        ([torch.tensor([4.0], dtype=torch.bfloat16)], "can't be read as numbers"),
        ([[4, 5], [4, -1]], "feature 1 has the id -1; ids must be at least 0"),
        ([[True, False]], "bool"),
        ([[2**63]], f"must fit in int64; got {2**63}"),
        ([np.array([2**64 - 1], dtype=np.uint64)], f"got {2**64 - 1}"),
        ([[2**70]], "object"),
        ([[4], [4, 504]], "feature 1 has the id 504; the largest id of the tokenizer is 503"),
        ([[], [4], [504]], "feature 2 has the id 504"),
    ],
)
def test_features_are_checked(tokenizer, features, said):
    with pytest.raises(CollatorError, match=said):
        MNTPCollator(tokenizer)(features)
