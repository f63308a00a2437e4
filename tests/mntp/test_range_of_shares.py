"""`mlm_probability` as a range: each text has a share of its own. As a number: the masks that it always gave."""

import numpy as np
import pytest
import torch

from bidirect_patch import MNTPCollator

from ..helpers.words import WORDS, make_tokenizer, texts

LOW, HIGH = 0.1, 0.5
LENGTH, TEXTS = 1000, 400


def shares(batch):
    """The share of chosen tokens in each document of a batch, the first token left out."""
    labels = batch["labels"]
    if len(labels) == 1:  # padding-free
        bounds = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), labels.shape[1]]
        documents = [labels[0, start:end] for start, end in zip(bounds, bounds[1:])]
    else:
        documents = [row[mask.bool()] for row, mask in zip(labels, batch["attention_mask"])]
    return np.array([(document[1:] != -100).float().mean().item() for document in documents])


def distance_to_uniform(found):
    """Kolmogorov's statistic: how far the found numbers' distribution is from the uniform one of [LOW, HIGH]."""
    expected = np.clip((np.sort(found) - LOW) / (HIGH - LOW), 0, 1)
    steps = np.arange(len(found) + 1) / len(found)
    return max(np.abs(steps[1:] - expected).max(), np.abs(expected - steps[:-1]).max())


def batch_of(count, length=LENGTH, **settings):
    collator = MNTPCollator(make_tokenizer(), mlm_probability=settings.pop("mlm_probability", (LOW, HIGH)), **settings)
    return collator(texts(*[length] * count, seed=1))


@pytest.mark.parametrize(
    "how",
    [
        {"seed": 3},
        {"seed": 3, "repeatable": True},
        {"seed": 3, "padding_free": True},
        {"seed": 3, "padding_free": True, "repeatable": True},
    ],
    ids=str,
)
def test_the_shares_of_texts_are_spread_evenly_over_the_range(how):
    """At 400 texts Kolmogorov's statistic is above 0.08 once in a hundred draws; the seed is fixed."""
    found = shares(batch_of(TEXTS, **how))
    assert len(found) == TEXTS and distance_to_uniform(found) < 0.08
    assert found.min() < LOW + 0.02 and found.max() > HIGH - 0.02
    one_share = shares(batch_of(TEXTS, **how, mlm_probability=(LOW + HIGH) / 2))
    assert distance_to_uniform(one_share) > 0.4, "the same mean with one share for all is told apart"


def test_torchs_global_generator_draws_the_shares_without_a_seed():
    torch.manual_seed(0)
    one = batch_of(50)
    torch.manual_seed(0)
    again = batch_of(50)
    assert torch.equal(one["labels"], again["labels"]) and shares(one).std() > 0.05


def test_each_document_of_a_packed_row_has_its_own_share():
    """Given as one feature whose position_ids start again, behind padding on the left."""
    (row,) = texts(20 * LENGTH)
    row["position_ids"] = list(range(LENGTH)) * 20
    row["attention_mask"] = [0] * 5 + [1] * (20 * LENGTH - 5)
    collator = MNTPCollator(make_tokenizer(), mlm_probability=(LOW, HIGH), seed=0)
    labels = collator([row])["labels"][0]
    assert not (labels[:6] != -100).any()
    found = (labels.view(20, LENGTH)[:, 1:] != -100).float().mean(1)
    assert found.min() < 0.2 and found.max() > 0.4 and found.std() > 0.05


def test_rows_that_are_padding_alone_have_no_share():
    collator = MNTPCollator(make_tokenizer(), mlm_probability=(0.5, 1.0), seed=0)
    batch = collator([{"input_ids": [7, 8, 9], "attention_mask": [0, 0, 0]}])
    assert batch["labels"].tolist() == [[-100] * 3]


def test_a_range_that_ends_at_one_may_hide_all_and_a_range_of_one_number_is_that_number():
    assert shares(batch_of(3, mlm_probability=(1.0, 1.0), seed=0)).tolist() == [1.0] * 3
    found = shares(batch_of(50, mlm_probability=(0.3, 0.3), seed=0))
    assert np.abs(found - 0.3).max() < 0.06


def test_what_hides_a_chosen_token_is_as_with_a_number():
    batch = batch_of(100, seed=0)
    chosen = batch["labels"] != -100
    masked = (batch["input_ids"] == 3) & chosen
    kept = (batch["input_ids"] == batch["labels"]) & chosen
    assert masked.sum() / chosen.sum() == pytest.approx(0.8, abs=0.01)
    assert kept.sum() / chosen.sum() == pytest.approx(0.1 + 0.1 / WORDS, abs=0.01)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_repeatable_masks_depend_on_the_text_alone(padding_side):
    tokenizer = make_tokenizer(padding_side=padding_side)
    features = texts(30, 7, 300, 45)

    def masks(batch_size, order, **settings):
        collator = MNTPCollator(tokenizer, mlm_probability=(0.2, 0.9), seed=4, repeatable=True, **settings)
        found = {}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = collator([features[i] for i in part])
            real = batch["attention_mask"].bool() if "attention_mask" in batch else batch["labels"].bool()
            for i, labels in zip(part, batch["labels"][real].split([len(features[i]["input_ids"]) for i in part])):
                found[i] = labels.tolist()
        return found

    first = masks(4, [0, 1, 2, 3])
    assert first == masks(1, [2, 0, 3, 1]) == masks(3, [3, 2, 1, 0], pad_to_multiple_of=64)
    assert first == masks(2, [1, 3, 0, 2], padding_free=True)


# Of texts(12, 5, 20, seed=2) with mlm_probability=0.3 and seed 5: row, column and input id of each label, recorded before
# there were ranges.
RECORDED = {
    "global": "0.1.3 0.5.3 0.6.3 0.8.171 2.1.3 2.4.3 2.5.134 2.8.3 2.11.476 2.13.3 2.14.142 2.15.3",
    "seed": "0.2.3 0.4.3 0.8.3 0.9.3 1.1.3 2.3.3 2.7.329 2.14.3 2.16.487 2.18.3",
    "seed, again": "0.4.3 0.8.3 0.9.3 1.2.3 2.1.104 2.5.134 2.11.3 2.14.3 2.16.3 2.18.3 2.19.3",
    "repeatable": "0.1.3 0.11.3 1.3.3 2.3.217 2.15.3",
    "padding_free": "0.2.3 0.4.3 0.8.3 0.9.3 0.13.3 0.20.3 0.24.329 0.31.3 0.33.487 0.35.3",
}


def test_a_number_gives_the_masks_that_it_always_gave():
    def labelled(batch):
        places = (batch["labels"] != -100).nonzero().tolist()
        return " ".join(f"{row}.{column}.{batch['input_ids'][row, column]}" for row, column in places)

    features = texts(12, 5, 20, seed=2)
    tokenizer = make_tokenizer()
    torch.manual_seed(5)
    seeded = MNTPCollator(tokenizer, mlm_probability=0.3, seed=5)
    found = {
        "global": labelled(MNTPCollator(tokenizer, mlm_probability=0.3)(features)),
        "seed": labelled(seeded(features)),
        "seed, again": labelled(seeded(features)),
        "repeatable": labelled(MNTPCollator(tokenizer, mlm_probability=0.3, seed=5, repeatable=True)(features)),
        "padding_free": labelled(MNTPCollator(tokenizer, mlm_probability=0.3, seed=5, padding_free=True)(features)),
    }
    assert found == RECORDED
