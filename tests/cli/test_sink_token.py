"""Which token stands before each text, and tokenizers that keep it when they are saved and opened."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from bidirect_patch.cli.added_token import add_token
from bidirect_patch.cli.sink_token import candidates, choose_sink_token, prepend_sink_token, with_sink_token
from bidirect_patch.errors import ConfigError

from ..helpers.slow import some_slow
from ..helpers.words import BOS, EOS, make_tokenizer

SPECIALS = ["<unk>", "<s>", "</s>", "<x>", "<pad>"]
# Classes whose post-processor transformers takes from the file, or makes anew in one release or another.
CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2TokenizerFast", "Qwen2TokenizerFast"]
CLASSES += ["GemmaTokenizerFast", "GPTNeoXTokenizerFast", "CohereTokenizerFast", "CodeLlamaTokenizerFast"]
FLAGS = [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": False, "add_eos_token": True}]


def write_tokenizer(folder, cls, post_processor=None, **flags):
    """A tokenizer of bytes, of a class by its name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIALS, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if post_processor is not None:
        backend.post_processor = post_processor
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls, **named, **flags}))


def beginning_and_text():
    """A post-processor like that of Llama 3's tokenizer."""
    return processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("token", ["<s>", "</s>", "<x>"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("cls", some_slow(CLASSES, lambda cls: CLASSES.index(cls) > 2))
def test_the_token_is_added_once_and_kept_in_the_folder(tmp_path, cls, flags, token, place):
    for number, post_processor in enumerate((None, processors.ByteLevel(), beginning_and_text())):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_tokenizer(folder, cls, post_processor, **flags)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        plain, before = (tokenizer("a b", add_special_tokens=special)["input_ids"] for special in (False, True))
        added = tokenizer.convert_tokens_to_ids(token)
        there = before[:1] if place == "first" else before[-1:]
        new = [] if there == [added] and len(before) > len(plain) else [added]
        expected = [*new, *before] if place == "first" else [*before, *new]
        for _ in range(2):
            tokenizer = add_token(tokenizer, token, place, "this")
            assert tokenizer("a b")["input_ids"] == expected
            tokenizer.save_pretrained(folder / "again")
            tokenizer = AutoTokenizer.from_pretrained(folder / "again")
        assert tokenizer("a b")["input_ids"] == expected
        assert tokenizer("a b", add_special_tokens=False)["input_ids"] == plain
        cut = tokenizer("a b c d e", truncation=True, max_length=4)["input_ids"]
        assert len(cut) == 4 and cut[0 if place == "first" else -1] == added
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("</s>", "<pad>", 512)


def test_padding_is_beside_the_token():
    tokenizer = make_tokenizer(pad_token="<unk>", padding_side="left")
    tokenizer = prepend_sink_token(tokenizer, "</s>")
    batch = tokenizer(["w1 w2", "w3"], padding=True)
    assert batch["input_ids"] == [[EOS, 5, 6], [0, EOS, 7]] and batch["attention_mask"] == [[1, 1, 1], [0, 1, 1]]
    assert tokenizer("w1", "w2")["input_ids"] == [EOS, 5, 6]


def test_the_default_is_what_the_tokenizer_adds_then_bos_then_eos(tmp_path):
    write_tokenizer(tmp_path, "PreTrainedTokenizerFast", beginning_and_text(), bos_token="<x>")
    adds_its_own = AutoTokenizer.from_pretrained(tmp_path)
    assert choose_sink_token(adds_its_own, None) == "<s>" and candidates(adds_its_own) == ["<s>"]
    assert choose_sink_token(make_tokenizer(), None) == "<s>"
    assert candidates(make_tokenizer(mask_token="_")) == ["<s>", "</s>", "<unk>", "_"]
    no_beginning = make_tokenizer(bos_token=None)
    assert choose_sink_token(no_beginning, None) == "</s>" and candidates(no_beginning)[0] == "</s>"
    with pytest.raises(ConfigError, match="neither a beginning nor an end token: give sink_token"):
        choose_sink_token(make_tokenizer(bos_token=None, eos_token=None), None)


def test_a_tokenizer_that_only_appends_adds_no_first_token():
    tokenizer = add_token(make_tokenizer(), "</s>", "last", "this")
    assert choose_sink_token(tokenizer, None) == "<s>"
    assert prepend_sink_token(tokenizer, "<s>")("w1")["input_ids"] == [BOS, 5, EOS]


@pytest.mark.parametrize("asked, token", [("bos", "<s>"), ("eos", "</s>"), ("w7", "w7")])
def test_a_token_that_is_asked_for(asked, token):
    assert with_sink_token(make_tokenizer(), asked, 0)[1] == token


def test_nothing_is_added_unless_it_is_asked_for():
    tokenizer = make_tokenizer()
    assert with_sink_token(tokenizer, None, 0) == (tokenizer, None)
    assert tokenizer("w1")["input_ids"] == [5]


@pytest.mark.parametrize("asked, says", [("bos", "has no beginning token"), ("eos", "has no end token"), ("w x", "no token of")])
def test_a_token_that_is_not_there(asked, says):
    with pytest.raises(ConfigError, match=f"sink_token={asked}: .*{says}"):
        choose_sink_token(make_tokenizer(bos_token=None, eos_token=None), asked)


def test_a_tokenizer_that_cannot_be_changed_is_refused():
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return {"input_ids": [3]}

        def convert_tokens_to_ids(self, token):
            return 1

    with pytest.raises(ConfigError, match="sink_token=<s> needs a tokenizer of the tokenizers library"):
        prepend_sink_token(Slow(), "<s>")
