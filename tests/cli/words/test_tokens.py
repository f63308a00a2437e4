"""Which word is read at which token, against the tokenizer's own account of words that it was given one by one."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import bidirect_patch
from bidirect_patch.errors import ConfigError

from ...helpers.paths import ROOT
from ...helpers.word_runs import BOS, sentences, write_model

pytest.importorskip("datasets", reason="the training commands need the extra [train]")
pytest.importorskip("peft", reason="the training commands need the extra [train]")
from bidirect_patch.cli.words.collator import WordCollator
from bidirect_patch.cli.words.data import Sentence
from bidirect_patch.cli.words.tagger import word_states
from bidirect_patch.cli.words.tokens import Reading, check_reading, encode, words_of_tokens

TEXTS = [
    ["The", "cat", "sat", "down", "."],
    ["Ça", "coûte", "12,50", "€"],
    ["a"],
    ["(", "ab-cd", ")", "naïve", "🙂🙂", "x"],
]


def of_llamas_kind(prepends):
    """A tokenizer as Llama 2 and Mistral have it: a space is a mark at the beginning of the next token."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepends:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.decoder = decoders.Replace("▁", " ")
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator([word for text in TEXTS[:3] for word in text], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["Llama 2", "Mistral", "two tokens a word"])
@pytest.mark.parametrize("next_token", [False, True])
def test_as_the_tokenizer_says_of_words_that_are_split(tmp_path, kind, next_token):
    if kind == "two tokens a word":
        tokenizer, texts = write_model(tmp_path), [row["tokens"] for row in sentences(5)]
    else:
        tokenizer, texts = of_llamas_kind(prepends=kind == "Llama 2"), TEXTS
    lengths = []
    for words in texts:
        split = tokenizer(words, is_split_into_words=True)
        labels = [f"L{n}" for n in range(len(words))]
        (row,) = encode([Sentence(words, list(labels))], tokenizer, labels, 64, Reading(next_token), "train")
        assert row["input_ids"] == split["input_ids"]
        expected = [-1 if word is None else word for word in split.word_ids()]
        assert row["word_ids"] == ([*expected[1:], -1] if next_token else expected)
        assert row["labels"] == list(range(len(words)))
        lengths.append(len(expected) - len(words))
    assert max(lengths) > 1, "some words have several tokens"


def test_a_tokenizer_of_bytes_reads_the_words_as_the_text_that_they_are():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / bidirect_patch.__name__ / "demo_model")
    for words in TEXTS:
        (row,) = encode([Sentence(words, ["X"] * len(words))], tokenizer, ["X"], 64, Reading(), "train")
        assert row["input_ids"] == tokenizer(" ".join(words))["input_ids"]
        for number, word in enumerate(words):
            own = [token for token, place in zip(row["input_ids"], row["word_ids"]) if place == number]
            assert tokenizer.decode(own).strip() == word


def test_words_with_a_space_in_them_and_tokens_of_the_space_alone():
    offsets = [(0, 0), (0, 1), (1, 3), (3, 4), (4, 5)]
    assert words_of_tokens(["a b", "c"], offsets, [None, 0, 0, 0, 0]) == [-1, 0, 0, 1, 1]


def test_words_beyond_the_limit_are_not_scored(tmp_path, caplog):
    tokenizer = write_model(tmp_path)
    rows = [Sentence(["n0", "n1s", "n2"], ["A", "B", "A"]), Sentence(["n0"], [None])]
    (row,) = encode(rows, tokenizer, ["A", "B"], 3, Reading(), "train")
    assert (row["word_ids"], row["labels"]) == ([-1, 0, 1], [0, 1, -100])
    (row,) = encode(rows, tokenizer, ["A", "B"], 3, Reading(next_token=True), "train")
    assert (row["word_ids"], row["labels"]) == ([0, 1, -1], [0, 1, -100])
    assert caplog.text.count("1 words of the train data are not scored: they are beyond max_seq_length=3") == 2
    with pytest.raises(ConfigError, match="no word of the train data is within max_seq_length=1"):
        encode(rows, tokenizer, ["A", "B"], 1, Reading(), "train")


def test_a_label_that_the_classifier_lacks_has_a_number_of_its_own(tmp_path, caplog):
    tokenizer = write_model(tmp_path)
    (row,) = encode([Sentence(["n0", "n1", "n2"], ["C", "B", "D"])], tokenizer, ["A", "B"], 9, Reading(), "test")
    assert (
        row["labels"] == [2, 1, 3]
        and "the classifier has no label C, D, which words of the test data have" in caplog.text
    )


@pytest.mark.parametrize(
    "adds_bos, sinks, says", [(False, 0, "this tokenizer puts none there: give sink_token"), (True, 1, "sees no text")]
)
def test_a_first_word_that_cannot_be_read_at_the_token_before_is_refused(tmp_path, adds_bos, sinks, says):
    tokenizer = write_model(tmp_path, adds_bos)
    check_reading(Reading(), tokenizer, sinks)
    with pytest.raises(ConfigError, match=says):
        check_reading(Reading(next_token=True), tokenizer, sinks)
    if adds_bos:
        check_reading(Reading(next_token=True), tokenizer, 0)


@pytest.mark.parametrize("merge", [False, True])
def test_states_of_words_against_a_loop(merge):
    torch.manual_seed(0)
    rows = [[-1, 0, 0, 1, 2, 2, 2], [0, 1, 1, -1], [-1, 2]]
    batch = WordCollator(9)([{"input_ids": [5] * len(r), "word_ids": r, "labels": [0] * 3} for r in rows])
    assert batch["input_ids"][2].tolist() == [5, 5, 9, 9, 9, 9, 9] and batch["attention_mask"][1].sum() == 4
    states = torch.randn(3, 7, 4)
    found = word_states(states, batch["word_ids"], 3, merge=merge)
    for row, own in enumerate(rows):
        for word in range(3):
            places = [place for place, number in enumerate(own) if number == word]
            expected = states[row, places if merge else places[:1]].mean(0) if places else torch.zeros(4)
            torch.testing.assert_close(found[row, word], expected)


def test_the_sink_token_of_a_sentence_is_no_word(tmp_path):
    tokenizer = write_model(tmp_path)
    (row,) = encode([Sentence(["n0"], ["A"])], tokenizer, ["A"], 9, Reading(), "train")
    assert row["input_ids"][0] == BOS and row["word_ids"] == [-1, 0]
