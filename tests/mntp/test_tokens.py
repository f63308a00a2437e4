"""What the collator reads of tokenizers that lack something, or that have more than their names say."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from bidirect_patch import MNTPCollator
from bidirect_patch.errors import CollatorError, MaskTokenError

from ..helpers.words import everything_hidden


class Words:
    """The least that a tokenizer is: its words, a way to their ids, a length."""

    unk_token_id = None

    def __init__(self, *words, **more):
        self.words = words
        vars(self).update(more)

    def __len__(self):
        return len(self.words)

    def convert_tokens_to_ids(self, token):
        return self.words.index(token) if token in self.words else self.unk_token_id

    def encode(self, text, add_special_tokens=True):
        return [self.convert_tokens_to_ids(word) for word in text.split()]


def test_a_mask_token_is_encoded_without_the_special_tokens_round_a_text():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "_": 2, "▁a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    assert tokenizer.encode("a") == [1, 3]
    assert MNTPCollator(tokenizer, mask_token="a").mask_token_id == 3


def test_the_unknown_token_may_be_the_mask_token():
    """Asked for by its name, it is meant; any other word that has its id is unknown."""
    tokenizer = Words("<unk>", "a", "_", unk_token="<unk>", unk_token_id=0)
    assert MNTPCollator(tokenizer, mask_token="<unk>").mask_token_id == 0
    with pytest.raises(MaskTokenError, match="'b' gives 0. Give"):
        MNTPCollator(tokenizer, mask_token="b")
    with pytest.raises(MaskTokenError, match=r"'a _' gives 2 \(\[1, 2\]\). Give"):
        MNTPCollator(tokenizer, mask_token="a _")


def test_added_tokens_that_do_not_say_so_are_not_special():
    tokenizer = Words("_", "a", "b", "c", added_tokens_decoder={1: "a"}, all_special_ids=[3, 2])
    assert everything_hidden(tokenizer)([[1, 1, 2, 3]])["labels"].tolist() == [[-100, 1, -100, -100]]


def test_replacements_are_any_words_where_all_are_special():
    tokenizer = Words("_", "a", all_special_ids=[0, 1])
    assert MNTPCollator(tokenizer)([[0, 1]])["labels"].tolist() == [[-100, -100]]


@pytest.mark.parametrize(
    "more, pad", [({"pad_token_id": 1, "eos_token_id": 2}, 1), ({"eos_token_id": 2}, 2), ({}, 0), ({"pad_token_id": 0}, 0)]
)
def test_padding_is_filled_with_an_id_that_the_embedding_has(more, pad):
    tokenizer = Words("_", "a", "b", **more)
    assert MNTPCollator(tokenizer)([[1, 1], [1]])["input_ids"][1].tolist() == [1, pad]


@pytest.mark.parametrize("words", [("_",), ("_", "a", "b")], ids=len)
def test_ids_beyond_the_last_are_refused_without_a_vocabulary(words):
    count = len(words)
    collator = MNTPCollator(Words(*words))
    assert collator([[0, count - 1]])["input_ids"].shape == (1, 2)
    with pytest.raises(CollatorError, match=f"has the id {count}; the largest id of the tokenizer is {count - 1}:"):
        collator([[0, count - 1, count]])


def test_special_ids_beyond_the_last_are_right():
    collator = everything_hidden(Words("_", "a", all_special_ids=[9]))
    assert collator([[1, 9, 1]])["labels"].tolist() == [[-100, -100, 1]]
    with pytest.raises(CollatorError, match="has the id 10; the largest id of the tokenizer is 9"):
        collator([[1, 9, 10]])


def test_a_class_or_an_object_without_the_methods_is_no_tokenizer():
    class Counted:
        def __len__(self):
            return 3

    class Converting:
        def convert_tokens_to_ids(self, token):
            return 0

    class NoMethod(Counted):
        convert_tokens_to_ids = 7

    for given, named in ((Counted(), "Counted"), (Converting(), "Converting"), (NoMethod(), "NoMethod"), (Words, "<class")):
        with pytest.raises(CollatorError, match=f"must be a transformers tokenizer; got {named}"):
            MNTPCollator(given)


def test_a_mask_token_of_the_tokenizer_comes_before_the_underscore():
    assert MNTPCollator(Words("a", "_", "hidden", mask_token="hidden")).mask_token_id == 2
    assert MNTPCollator(Words("a", "_", "hidden", mask_token=None)).mask_token_id == 1
    assert torch.equal(everything_hidden(Words("a", "_"))([[0, 0]])["input_ids"], torch.tensor([[0, 1]]))
