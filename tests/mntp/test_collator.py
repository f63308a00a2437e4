"""MNTPCollator, against DataCollatorForLanguageModeling, DataCollatorWithFlattening and its own written contract."""

import pickle

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from bidirect_patch import MNTPCollator
from bidirect_patch.errors import CollatorError, MaskTokenError

from ..helpers.words import BOS, EOS, UNDERSCORE, WORDS, everything_hidden, make_tokenizer, texts


def test_shares_are_those_asked_for(tokenizer):
    features = texts(*[400] * 300)
    originals = torch.tensor([feature["input_ids"] for feature in features])
    batch = MNTPCollator(tokenizer, mlm_probability=0.3, mask_replace_prob=0.6, random_replace_prob=0.3, seed=1)(
        features
    )
    chosen = batch["labels"] != -100
    masked = batch["input_ids"] == UNDERSCORE
    changed = batch["input_ids"] != originals
    # 120,000 tokens: one standard deviation of the first share is 0.0013, of the others 0.0026.
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.007)
    assert masked[chosen].float().mean().item() == pytest.approx(0.6, abs=0.013)
    assert (changed & ~masked)[chosen].float().mean().item() == pytest.approx(0.3, abs=0.013)
    assert not changed[~chosen].any()
    assert torch.equal(batch["labels"][chosen], originals[chosen])


def test_defaults_are_80_10_10(tokenizer):
    features = texts(*[400] * 300)
    originals = torch.tensor([feature["input_ids"] for feature in features])
    batch = MNTPCollator(tokenizer, seed=1)(features)
    chosen = batch["labels"] != -100
    masked = (batch["input_ids"] == UNDERSCORE)[chosen].float().mean().item()
    kept = (batch["input_ids"] == originals)[chosen].float().mean().item()
    assert chosen.float().mean().item() == pytest.approx(0.2, abs=0.007)
    assert masked == pytest.approx(0.8, abs=0.015) and kept == pytest.approx(0.1, abs=0.012)


def test_same_distribution_as_the_stock_collator_at_every_position_but_the_first():
    tokenizer = make_tokenizer(pad_token="</s>", mask_token="_")
    features = texts(*[16] * 4000)
    stock = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25)
    torch.manual_seed(0)
    theirs = (stock(features)["labels"] != -100).float().mean(0)
    ours = (MNTPCollator(tokenizer, mlm_probability=0.25)(features)["labels"] != -100).float().mean(0)
    assert ours[0] == 0
    assert torch.allclose(ours[1:], theirs[1:], atol=0.045)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_all_mask(tokenizer, side):
    tokenizer.padding_side = side
    features = texts(3, 5)
    batch = everything_hidden(tokenizer)(features)
    short = [features[0]["input_ids"][0], UNDERSCORE, UNDERSCORE]
    labels = [-100, *features[0]["input_ids"][1:]]
    pad = slice(0, 2) if side == "left" else slice(3, 5)
    real = slice(2, 5) if side == "left" else slice(0, 3)
    assert batch["input_ids"][0, real].tolist() == short and batch["labels"][0, real].tolist() == labels
    assert batch["attention_mask"][0, pad].tolist() == [0, 0] and batch["attention_mask"][0, real].tolist() == [1, 1, 1]
    assert batch["labels"][0, pad].tolist() == [-100, -100]
    assert batch["labels"][1].tolist() == [-100, *features[1]["input_ids"][1:]]
    assert {value.dtype for value in batch.values()} == {torch.int64} and len(batch) == 3


def test_padding_without_a_pad_token_leaves_the_tokenizer_alone(tokenizer):
    before = dict(tokenizer.special_tokens_map)
    batch = MNTPCollator(tokenizer)(texts(2, 4))
    assert batch["input_ids"][0, 2:].tolist() == [EOS, EOS]
    assert dict(tokenizer.special_tokens_map) == before
    assert tokenizer.pad_token_id is None and tokenizer.mask_token is None


def test_own_pad_token_is_used():
    batch = MNTPCollator(make_tokenizer(pad_token="<unk>"))(texts(2, 4))
    assert batch["input_ids"][0, 2:].tolist() == [0, 0]


def test_pad_to_multiple_of(tokenizer):
    assert MNTPCollator(tokenizer, pad_to_multiple_of=8)(texts(3, 9))["input_ids"].shape == (2, 16)
    assert MNTPCollator(tokenizer, pad_to_multiple_of=8)(texts(3, 8))["labels"].shape == (2, 8)


def test_special_tokens_are_never_chosen(tokenizer):
    batch = everything_hidden(tokenizer)([{"input_ids": [BOS, 10, 11, EOS, 12]}])
    assert batch["labels"].tolist() == [[-100, 10, 11, -100, 12]]
    assert batch["input_ids"].tolist() == [[BOS, 3, 3, EOS, 3]]


def test_added_special_tokens_are_special_too():
    """Llama-3's <|eot_id|> is none of the tokenizer's named special tokens."""
    from transformers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(AddedToken("<|eot|>", special=True), special_tokens=True)
    tokenizer.add_tokens("plain")
    eot, plain = tokenizer.convert_tokens_to_ids(["<|eot|>", "plain"])
    collator = MNTPCollator(tokenizer, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=1.0, seed=0)
    batch = collator([{"input_ids": [BOS, eot, plain] * 2000}])
    assert torch.equal(batch["labels"][0, :3], torch.tensor([-100, -100, plain]))
    assert set(batch["input_ids"][batch["labels"] == plain].tolist()) >= {plain, UNDERSCORE}
    assert eot not in batch["input_ids"][batch["labels"] == plain]


def test_numbers_of_numpy_are_numbers(tokenizer):
    MNTPCollator(tokenizer, mlm_probability=np.float32(0.5), seed=np.int64(3), pad_to_multiple_of=np.int32(8))(texts(5))


def test_special_tokens_mask_of_the_features_counts_too(tokenizer):
    marked = {"input_ids": [9, 10, 11, EOS], "special_tokens_mask": [0, 0, 1, 0]}
    plain = {"input_ids": [9, 10, 11]}
    batch = everything_hidden(tokenizer)([marked, plain])
    assert batch["labels"].tolist() == [[-100, 10, -100, -100], [-100, 10, 11, -100]]


def test_first_real_token_is_never_chosen_after_padding_in_the_features(tokenizer):
    padded = {"input_ids": [EOS, EOS, 9, 10, 11], "attention_mask": [0, 0, 1, 1, 1]}
    batch = everything_hidden(tokenizer)([padded])
    assert batch["labels"].tolist() == [[-100, -100, -100, 10, 11]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1]]


def test_padding_in_the_features_is_not_chosen_whatever_its_id(tokenizer):
    padded = {"input_ids": [9, 10, 50, 50], "attention_mask": [1, 1, 0, 0]}
    batch = everything_hidden(tokenizer)([padded])
    assert batch["labels"].tolist() == [[-100, 10, -100, -100]]
    assert batch["input_ids"].tolist() == [[9, UNDERSCORE, 50, 50]]


def test_packed_rows_keep_the_first_token_of_each_document(tokenizer):
    packed = {"input_ids": [9, 10, 11, 12, 13], "position_ids": [0, 1, 0, 1, 2]}
    batch = everything_hidden(tokenizer)([packed, {"input_ids": [20, 21]}])
    assert batch["labels"].tolist() == [[-100, 10, -100, 12, 13], [-100, 21, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]


def test_a_document_starts_where_positions_do_not_rise(tokenizer):
    """The rule of the attention mask: a gap in the positions is no boundary, and a repeated position is one."""
    gap = {"input_ids": [9, 10, 11, 12], "position_ids": [0, 1, 5, 6]}
    repeated = {"input_ids": [9, 10, 11, 12], "position_ids": [0, 1, 1, 2]}
    fallen = {"input_ids": [9, 10, 11, 12], "position_ids": [7, 8, 3, 4]}
    batch = everything_hidden(tokenizer)([gap, repeated, fallen])
    assert batch["labels"].tolist() == [[-100, 10, 11, 12], [-100, 10, -100, 12], [-100, 10, -100, 12]]
    batch = everything_hidden(tokenizer, padding_free=True)([gap, repeated])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]


def test_padding_between_real_tokens_starts_no_document(tokenizer):
    holed = {"input_ids": [9, EOS, 10, 11], "attention_mask": [1, 0, 1, 1]}
    assert everything_hidden(tokenizer)([holed])["labels"].tolist() == [[-100, -100, 10, 11]]
    counted = {**holed, "position_ids": [0, 0, 1, 2]}
    assert everything_hidden(tokenizer)([counted])["labels"].tolist() == [[-100, -100, 10, 11]]


def repeatable(tokenizer, seed=0, **settings):
    return MNTPCollator(tokenizer, seed=seed, repeatable=True, **settings)


def test_repeatable_masks_depend_on_the_seed_and_the_text_alone(tokenizer):
    features = texts(30, 50, 40)
    whole = repeatable(tokenizer)(features)
    again = repeatable(tokenizer)
    for order in ([2, 0, 1], [1], [0, 2], [2, 2]):
        batch = again([features[i] for i in order])
        for row, i in zip(range(len(order)), order):
            length = len(features[i]["input_ids"])
            for key in ("input_ids", "labels"):
                assert torch.equal(batch[key][row, :length], whole[key][i, :length])
    assert not torch.equal(whole["labels"], repeatable(tokenizer, seed=1)(features)["labels"])
    assert not torch.equal(whole["labels"][1, :30] == -100, whole["labels"][0, :30] == -100)


def test_repeatable_masks_do_not_depend_on_padding(tokenizer):
    feature, pad = texts(30)[0], [EOS] * 5
    plain = repeatable(tokenizer)([feature])
    left = {"input_ids": pad + feature["input_ids"], "attention_mask": [0] * 5 + [1] * 30}
    padded = repeatable(tokenizer)([left])
    assert torch.equal(padded["labels"][:, 5:], plain["labels"]) and (plain["labels"] != -100).any()
    assert torch.equal(repeatable(tokenizer, padding_free=True)([left])["input_ids"], plain["input_ids"])


def test_repeatable_needs_a_seed(tokenizer):
    with pytest.raises(CollatorError, match="give a seed"):
        MNTPCollator(tokenizer, repeatable=True)


class Backend:
    """What MistralCommonBackend has: no mask token, and a method for `added_tokens_decoder` that raises."""

    unk_token, unk_token_id, eos_token_id = "<unk>", 0, EOS
    all_special_ids = [0, BOS, EOS]

    def __init__(self):
        self.words = make_tokenizer().get_vocab()

    def __len__(self):
        return len(self.words)

    def added_tokens_decoder(self):
        raise NotImplementedError

    def convert_tokens_to_ids(self, token):
        return self.words.get(token, 0)

    def encode(self, text, add_special_tokens=True):
        return [self.convert_tokens_to_ids(word) for word in text.split()]


def test_a_tokenizer_may_lack_what_transformers_ones_have():
    batch = everything_hidden(Backend())([{"input_ids": [BOS, 9, 10, EOS]}, [9, 10]])
    assert batch["labels"].tolist() == [[-100, 9, 10, -100], [-100, 10, -100, -100]]
    assert batch["input_ids"].tolist() == [[BOS, UNDERSCORE, UNDERSCORE, EOS], [9, UNDERSCORE, EOS, EOS]]
    with pytest.raises(MaskTokenError, match="gives 0"):
        MNTPCollator(Backend(), mask_token="nowhere")
    with pytest.raises(CollatorError, match="feature 0 has the id 900"):
        MNTPCollator(Backend())([[900]])


def test_ids_beyond_the_number_of_entries_are_right_where_the_vocabulary_has_them():
    vocabulary = {"<unk>": 0, "_": 1, "a": 2, "far": 70}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert everything_hidden(tokenizer)([[2, 70]])["labels"].tolist() == [[-100, 70]]
    with pytest.raises(CollatorError, match="feature 1 has the id 71; the largest id of the tokenizer is 70"):
        MNTPCollator(tokenizer)([[2], [2, 71]])


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.int32)])
def test_features_of_any_kind_give_the_same_batch(tokenizer, make):
    features = [{"input_ids": make(f["input_ids"]), "length": 1, "labels": make(f["input_ids"])} for f in texts(7, 4)]
    expected = MNTPCollator(tokenizer, seed=3)(texts(7, 4))
    for given in (features, [feature["input_ids"] for feature in features]):
        batch = MNTPCollator(tokenizer, seed=3)(given)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_features_are_not_changed(tokenizer):
    features = [{"input_ids": np.array([9, 10, 11])}, {"input_ids": torch.tensor([9, 10, 11])}]
    everything_hidden(tokenizer)(features)
    assert features[0]["input_ids"].tolist() == features[1]["input_ids"].tolist() == [9, 10, 11]


@pytest.mark.skipif(not hasattr(transformers, "DataCollatorWithFlattening"), reason="transformers has it from 4.44 on")
def test_padding_free_lays_out_as_flattening_does(tokenizer):
    features = texts(5, 1, 3)
    batch = everything_hidden(tokenizer, padding_free=True)(features)
    # The stock collator labels every token but the first of each text, as hiding everything must.
    theirs = transformers.DataCollatorWithFlattening()(features)
    assert batch.keys() == theirs.keys()
    assert torch.equal(batch["labels"], theirs["labels"]) and torch.equal(batch["position_ids"], theirs["position_ids"])
    hidden = theirs["input_ids"].masked_fill(theirs["labels"] != -100, UNDERSCORE)
    assert torch.equal(batch["input_ids"], hidden)


def test_padding_free_drops_padding_and_keeps_documents_apart(tokenizer):
    features = [
        {"input_ids": [EOS, 9, 10], "attention_mask": [0, 1, 1], "special_tokens_mask": [1, 0, 0]},
        {"input_ids": [11, 12, 13], "position_ids": [0, 1, 0]},
    ]
    batch = everything_hidden(tokenizer, padding_free=True, return_flash_attn_kwargs=True)(features)
    assert batch["labels"].tolist() == [[-100, 10, -100, 12, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 2, 4, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 2
    assert "attention_mask" not in batch


def test_random_replacements_are_ordinary_words_from_the_whole_vocabulary(tokenizer):
    collator = MNTPCollator(tokenizer, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=1.0, seed=0)
    batch = collator(texts(*[500] * 40))
    drawn = set(batch["input_ids"][:, 1:].flatten().tolist())
    assert drawn == set(range(3, 4 + WORDS))


def test_seed_repeats_the_run_but_not_the_batch(tokenizer):
    features = texts(100, 100)
    one, two, other = (MNTPCollator(tokenizer, seed=seed) for seed in (5, 5, 6))
    first, second = one(features), one(features)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(first["labels"], two(features)["labels"])
    assert torch.equal(second["input_ids"], two(features)["input_ids"])
    assert not torch.equal(first["labels"], second["labels"])
    assert not torch.equal(first["labels"], other(features)["labels"])


def test_without_a_seed_torch_decides(tokenizer):
    features, collator = texts(100, 100), MNTPCollator(tokenizer)
    torch.manual_seed(0)
    first, second = collator(features), collator(features)
    torch.manual_seed(0)
    assert torch.equal(first["labels"], collator(features)["labels"])
    assert not torch.equal(first["labels"], second["labels"])


def test_a_seeded_collator_leaves_the_global_generator_alone(tokenizer):
    before = torch.get_rng_state()
    MNTPCollator(tokenizer, seed=0)(texts(50))
    assert torch.equal(torch.get_rng_state(), before)


def test_dataloader_workers_draw_different_streams_reproducibly(tokenizer):
    features = texts(200) * 4

    def labels():
        collator = MNTPCollator(tokenizer, seed=0)
        collator(features)  # workers are forked from a parent whose stream is already under way
        loader = torch.utils.data.DataLoader(features, batch_size=1, collate_fn=collator, num_workers=2)
        return [batch["labels"] for batch in loader]

    first, second = labels(), labels()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for i in range(4):
        for j in range(i):
            assert not torch.equal(first[i], first[j])


def test_pickles_and_goes_on_where_it_was(tokenizer):
    collator, features = MNTPCollator(tokenizer, seed=0), texts(100)
    collator(features)
    copy = pickle.loads(pickle.dumps(collator))
    assert torch.equal(copy(features)["labels"], collator(features)["labels"])
