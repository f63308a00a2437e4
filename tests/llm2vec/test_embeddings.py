"""What `load_llm2vec` encodes is what LLM2Vec encodes: beside llm2vec 0.2.3 itself where it runs, and beside plain torch."""

import functools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version
from transformers import AutoModel, AutoTokenizer

from bidirect_patch import disable_bidirectional, is_bidirectional, load_llm2vec

from ..helpers.llm2vec_folders import INSTRUCTION, NAMES, POOLINGS, TEXTS, make_tokenizer, write_base
from ..helpers.references.llm2vec_arithmetic import embedding
from ..helpers.versions import TRANSFORMERS

pytest.importorskip("sentence_transformers.base.modules", reason="sentence-transformers 5.4 or newer isn't installed")

TOKENIZERS = {
    "bos": {},
    "no bos": {"bos": False},
    "bos, words split at the start": {"prepend": "never"},
    "bos and end": {"end": True},
}
CASES = [
    (kind, pooling)
    for kind in TOKENIZERS
    for pooling in POOLINGS
    if pooling != "bos_token" or TOKENIZERS[kind].get("bos", True)
]
STORED = Path(__file__).parent / "embeddings_of_llm2vec_0_2_3.json"
CHAT = {
    "meta-llama/Meta-Llama-3-8B-Instruct": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistralai/Mistral-7B-Instruct-v0.2": ("[INST] ", " [/INST]"),
    "meta-llama/Llama-2-7b-chat-hf": ("[INST] ", " [/INST]"),
    "google/gemma-2-9b-it": ("<bos><start_of_turn>user\n", "<end_of_turn>"),
    "Qwen/Qwen2-1.5B-Instruct": ("<|im_start|>user\n", "<|im_end|>"),
    "Qwen/Qwen2-7B-Instruct": ("<|im_start|>user\n", "<|im_end|>"),
}
END = {"llama": " </s>", "mistral": " </s>", "gemma": "<eos>", "qwen2": "<|endoftext|>"}
END_OF_NAME = {"meta-llama/Meta-Llama-3-8B": "<|end_of_text|>", "meta-llama/Meta-Llama-3-8B-Instruct": ""}


@pytest.fixture(autouse=True)
def qwen2_needs_no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LLM2Vec 0.2.3 leaves Qwen2 causal")
        yield


@pytest.fixture
def llm2vec():
    module = pytest.importorskip("llm2vec", reason="llm2vec isn't installed", exc_type=ImportError)
    if Version("4.44.2") != TRANSFORMERS:
        pytest.skip(f"llm2vec 0.2.3 is written for transformers 4.44, not {TRANSFORMERS}")
    return module.LLM2Vec


def by_llm2vec(encoder, texts, instruction):
    return encoder.encode([[instruction, text] for text in texts], show_progress_bar=False).numpy()


@functools.cache
def loaded(base):
    return AutoModel.from_pretrained(base, attn_implementation="eager").float().eval(), AutoTokenizer.from_pretrained(base)


def by_hand(base, texts, instruction, **how):
    model, tokenizer = loaded(base)
    return np.stack([embedding(model, tokenizer, text, instruction, **how).numpy() for text in texts])


def same(got, want):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "instruction", [pytest.param("", marks=pytest.mark.slow), INSTRUCTION], ids=["alone", "instruction"]
)
@pytest.mark.parametrize("kind, pooling", CASES)
def test_every_pooling_is_the_arithmetic_of_llm2vec(bases, kind, pooling, instruction):
    base = bases(**TOKENIZERS[kind])
    end = END["llama"] if pooling == "eos_token" else ""
    for skip in (True, False):
        encoder = load_llm2vec(base, pooling_mode=pooling, skip_instruction=skip)
        want = by_hand(base, TEXTS, instruction, pooling=pooling, skip=skip, end=end)
        same(encoder.encode(TEXTS, prompt=instruction or None), want)
        same(encoder.encode([[instruction, text] for text in TEXTS], batch_size=2), want)


@pytest.mark.parametrize("kind, pooling", CASES)
def test_every_pooling_beside_llm2vec(llm2vec, bases, kind, pooling):
    base = bases(**TOKENIZERS[kind])
    for skip in (True, False):
        theirs = llm2vec.from_pretrained(base, pooling_mode=pooling, skip_instruction=skip)
        encoder = load_llm2vec(base, pooling_mode=pooling, skip_instruction=skip)
        for instruction in ("", INSTRUCTION):
            same(encoder.encode(TEXTS, prompt=instruction or None), by_llm2vec(theirs, TEXTS, instruction))


@pytest.mark.parametrize("pooling", ["mean", "eos_token"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_llm2vec_knows_is_wrapped(bases, name, pooling):
    family = "gemma" if "gemma" in name else "qwen2" if "Qwen" in name else "mistral" if "mistral" in name else "llama"
    base = bases(family, name)
    end = END_OF_NAME.get(name, END[family]) if pooling == "eos_token" else ""
    want = by_hand(base, TEXTS, INSTRUCTION, pooling=pooling, chat=CHAT.get(name, ("", "")), end=end)
    same(load_llm2vec(base, pooling_mode=pooling).encode(TEXTS, prompt=INSTRUCTION), want)


@pytest.mark.parametrize("pooling", ["mean", "eos_token"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_llm2vec_knows_beside_llm2vec(llm2vec, bases, name, pooling):
    base = bases("llama", name)
    theirs, encoder = (load(base, pooling_mode=pooling) for load in (llm2vec.from_pretrained, load_llm2vec))
    for instruction in ("", INSTRUCTION):
        same(encoder.encode(TEXTS, prompt=instruction or None), by_llm2vec(theirs, TEXTS, instruction))


@pytest.mark.parametrize("pooling", ["mean", "eos_token"])
@pytest.mark.parametrize("family", ["mistral", "gemma"])
def test_other_families_beside_llm2vec(llm2vec, tmp_path, family, pooling):
    """LLM2Vec's Mistral has no sliding window, whatever its config says."""
    window = {"sliding_window": 4} if family == "mistral" else {}
    base = str(write_base(tmp_path, family, tokenizer=make_tokenizer(), **window))
    theirs, encoder = (load(base, pooling_mode=pooling) for load in (llm2vec.from_pretrained, load_llm2vec))
    same(encoder.encode(TEXTS), by_llm2vec(theirs, TEXTS, ""))


def test_llm2vecs_qwen2_is_causal_and_ours_is_not(llm2vec, bases):
    base = bases("qwen2")
    theirs, encoder = llm2vec.from_pretrained(base), load_llm2vec(base)
    assert is_bidirectional(encoder)
    assert abs(encoder.encode(TEXTS) - by_llm2vec(theirs, TEXTS, "")).max() > 0.1
    same(disable_bidirectional(encoder).encode(TEXTS), by_llm2vec(theirs, TEXTS, ""))


def test_qwen2_warns(bases):
    with pytest.warns(UserWarning, match="leaves Qwen2 causal"):
        load_llm2vec(bases("qwen2"))


LONG = ["the cat sat on the mat " * 20, "dogs", "a" * 50]
CUT = {"max_length": 20, "doc_max_length": 9}


def test_long_texts_lose_words_and_then_tokens(llm2vec, bases):
    theirs, encoder = (load(bases(), **CUT) for load in (llm2vec.from_pretrained, load_llm2vec))
    for instruction in ("", "find the dogs on a mat"):
        for texts in (LONG[:2], LONG[2:]):  # LLM2Vec's mean of a text of which nothing is left takes the batch's padding in
            same(encoder.encode(texts, prompt=instruction or None), by_llm2vec(theirs, texts, instruction))


def test_long_texts_lose_words_at_their_end(bases):
    """9 of 120 words are left, each one token; a word of 51 tokens goes as a whole."""
    encoder = load_llm2vec(bases(), **CUT)
    words = " ".join(LONG[0].split()[:9])
    same(encoder.encode(LONG[:1]), encoder.encode([words]))
    same(encoder.encode(LONG[2:]), encoder.encode([""]))


def test_a_separator_in_a_text_means_what_it_means_there(llm2vec, bases):
    texts = ["the cat !@#$%^&*()sat on the mat", "dogs"]
    theirs, encoder = llm2vec.from_pretrained(bases()), load_llm2vec(bases())
    same(encoder.encode(texts), by_llm2vec(theirs, texts, ""))


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_an_empty_text_alone_beside_llm2vec(llm2vec, bases, pooling):
    theirs, encoder = (load(bases(), pooling_mode=pooling) for load in (llm2vec.from_pretrained, load_llm2vec))
    same(encoder.encode([""], prompt=INSTRUCTION), by_llm2vec(theirs, [""], INSTRUCTION))


@pytest.mark.parametrize("bos", [True, False])
def test_an_empty_text_does_not_depend_on_its_batch(bases, bos):
    encoder = load_llm2vec(bases(bos=bos))
    same(encoder.encode(["", *TEXTS])[:1], encoder.encode([""]))


def test_embeddings_that_llm2vec_gave_are_given_on_this_release(bases):
    """The file was written beside llm2vec 0.2.3 by `python -m tests.helpers.llm2vec_embeddings`."""
    stored = json.loads(STORED.read_text())
    assert len(stored) == 2 * len(POOLINGS)
    for case in stored:
        encoder = load_llm2vec(bases(prepend="never"), pooling_mode=case["pooling_mode"])
        got = encoder.encode(TEXTS, prompt=case["instruction"] or None)[:, : len(case["embeddings"][0])]
        np.testing.assert_allclose(got, case["embeddings"], rtol=0, atol=1e-5)
