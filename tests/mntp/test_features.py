"""What a data set may hand to the collator: each key, of each kind of numbers, with and without padding."""

import numpy as np
import pytest
import torch

from bidirect_patch import MNTPCollator
from bidirect_patch.errors import CollatorError
from bidirect_patch.mntp.features import read_rows, without_padding

from ..helpers.words import everything_hidden


@pytest.mark.parametrize("key", ["attention_mask", "special_tokens_mask"])
@pytest.mark.parametrize("values", [[2, 1], [-1, 1], [0, 7]], ids=str)
def test_masks_hold_0_and_1_alone(tokenizer, key, values):
    with pytest.raises(CollatorError, match=f"{key} of feature 1 .* got {min(values)} to {max(values)}"):
        MNTPCollator(tokenizer)([[4], {"input_ids": [4, 5], key: values}])


@pytest.mark.parametrize("key", ["attention_mask", "special_tokens_mask"])
@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_masks_may_be_bool(tokenizer, key, make):
    collator = everything_hidden(tokenizer)
    as_bool = collator([{"input_ids": [9, 10, 11], key: make([True, False, True])}])
    as_int = collator([{"input_ids": [9, 10, 11], key: make([1, 0, 1])}])
    assert all(torch.equal(as_bool[name], as_int[name]) for name in as_int)


@pytest.mark.parametrize("key", ["input_ids", "position_ids"])
def test_ids_and_positions_may_not_be_bool(tokenizer, key):
    with pytest.raises(CollatorError, match=f"{key} of feature 0 must be a row of integers.* bool"):
        MNTPCollator(tokenizer)([{"input_ids": [4, 5], key: np.array([True, False])}])


def test_unsigned_numbers_are_numbers(tokenizer):
    ids = np.array([9, 10, 11], dtype=np.uint64)
    assert everything_hidden(tokenizer)([{"input_ids": ids}])["labels"].tolist() == [[-100, 10, 11]]
    with pytest.raises(CollatorError, match=f"has the id {2**63 - 1}"):
        MNTPCollator(tokenizer)([np.array([2**63 - 1], dtype=np.uint64)])
    with pytest.raises(CollatorError, match=f"must fit in int64; got {2**63}"):
        MNTPCollator(tokenizer)([np.array([2**63], dtype=np.uint64)])


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.float64, bool], ids=lambda kind: kind.__name__)
def test_a_text_without_tokens_is_a_row_of_padding(tokenizer, kind):
    """Of whatever kind an array without numbers is."""
    empty = np.array([], dtype=kind)
    keys = ("input_ids", "attention_mask", "special_tokens_mask", "position_ids")
    batch = everything_hidden(tokenizer)([{key: empty for key in keys}, [9, 10]])
    assert batch["attention_mask"].tolist() == [[0, 0], [1, 1]] and batch["labels"].tolist() == [[-100, -100], [-100, 10]]
    assert batch["position_ids"].tolist() == [[0, 0], [0, 1]]


def test_keys_that_are_none_are_not_there(tokenizer):
    given = {"input_ids": [9, 10], "attention_mask": None, "special_tokens_mask": None, "position_ids": None}
    assert read_rows([given])[0].keys() == {"input_ids"}
    with pytest.raises(CollatorError, match=r"only \['labels'\]"):
        MNTPCollator(tokenizer)([{"input_ids": None, "attention_mask": None, "labels": [1]}])


def test_every_key_but_the_four_is_dropped():
    keys = {"input_ids": [9], "attention_mask": [1], "special_tokens_mask": [0], "position_ids": [3], "labels": [9]}
    (row,) = read_rows([keys])
    assert row.keys() == keys.keys() - {"labels"} and {value.dtype for value in row.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("key", ["attention_mask", "special_tokens_mask", "position_ids"])
def test_each_key_is_as_long_as_the_ids(tokenizer, key):
    with pytest.raises(CollatorError, match=f"Feature 0 has 2 input_ids and 1 of {key}"):
        MNTPCollator(tokenizer)([{"input_ids": [9, 10], key: [1]}])


def test_a_tensor_that_requires_grad_or_lies_elsewhere_is_refused_or_read(tokenizer):
    assert MNTPCollator(tokenizer)([torch.tensor([9, 10]).requires_grad_(False)])["input_ids"].shape == (1, 2)
    with pytest.raises(CollatorError, match="float32"):
        MNTPCollator(tokenizer)([torch.ones(2, requires_grad=True)])
    with pytest.raises(CollatorError, match="can't be read as numbers"):
        MNTPCollator(tokenizer)([torch.ones(2, device="meta").long()])


def test_without_padding_only_the_real_tokens_are_left():
    row = {key: np.array([1, 2, 3]) for key in ("input_ids", "position_ids")}
    assert without_padding(row) is row
    kept = without_padding({**row, "attention_mask": np.array([1, 0, 1])})
    assert {key: value.tolist() for key, value in kept.items()} == {"input_ids": [1, 3], "position_ids": [1, 3]}


@pytest.mark.parametrize("features", [b"text", "text", {}], ids=repr)
def test_one_feature_for_all_is_no_list_of_them(tokenizer, features):
    with pytest.raises(CollatorError, match=f"got one {type(features).__name__} for all"):
        MNTPCollator(tokenizer)(features)


def test_a_generator_of_features_is_a_list_of_them(tokenizer):
    assert MNTPCollator(tokenizer)(ids for ids in ([9, 10], [11]))["input_ids"].shape == (2, 2)


def test_the_feature_and_the_id_that_are_wrong_are_named(tokenizer):
    for features, said in (
        ([[0, 900]], "feature 0 has the id 900"),
        ([[0], [0, -1]], "feature 1 has the id -1"),
        ([[503], [503, 504]], "feature 1 has the id 504"),
    ):
        with pytest.raises(CollatorError, match=said):
            MNTPCollator(tokenizer)(features)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"mlm_probability": True}, "mlm_probability must be a number"),
        ({"mlm_probability": np.bool_(True)}, "mlm_probability must be a number"),
        ({"mask_replace_prob": 1.01}, "mask_replace_prob must be a number"),
        ({"random_replace_prob": None}, "random_replace_prob must be a number"),
        ({"random_replace_prob": -0.01}, "random_replace_prob must be a number"),
        ({"seed": True}, "seed must be an integer"),
        ({"seed": "1"}, "seed must be an integer"),
        ({"pad_to_multiple_of": True}, "pad_to_multiple_of must be an integer"),
        ({"pad_to_multiple_of": 2**24 + 1}, "at most 16777216"),
        ({"padding_free": 1}, "padding_free must be True or False; got 1"),
        ({"padding_free": True, "return_flash_attn_kwargs": 1}, "return_flash_attn_kwargs must be True or False"),
        ({"seed": 0, "repeatable": 1}, "repeatable must be True or False"),
    ],
    ids=str,
)
def test_settings_of_another_kind_are_refused(tokenizer, settings, said):
    with pytest.raises(CollatorError, match=said):
        MNTPCollator(tokenizer, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"mlm_probability": 1},
        {"mlm_probability": [np.float32(0.5), 1]},
        {"mlm_probability": (0.5, 0.5)},
        {"mask_replace_prob": 0, "random_replace_prob": 1},
        {"mask_replace_prob": 0.7, "random_replace_prob": 0.3},
        {"mask_replace_prob": 1 - 0.9, "random_replace_prob": 0.9 + 1e-10},
        {"pad_to_multiple_of": 2**24},
        {"pad_to_multiple_of": 1},
        {"padding_free": np.bool_(True), "return_flash_attn_kwargs": True},
        {"seed": 0, "repeatable": True},
    ],
    ids=str,
)
def test_settings_at_the_edge_are_taken(tokenizer, settings):
    MNTPCollator(tokenizer, **settings)
