"""A small model and sentences for `bidirect-patch words`, and what its folders give."""

import json
import random
from functools import partial

import torch
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from . import mntp_runs
from .tiny_models import tiny_model
from .versions import TRANSFORMERS

NUMBERS = 6  # words n0, n0s, n1, n1s, ...; those with "s" are two tokens
BOS = 1
HAS_CLASSES = TRANSFORMERS >= Version("4.42")  # Llama's ...ForTokenClassification

run = partial(mntp_runs.run, command="words")
refused = partial(mntp_runs.refused, command="words")
error_line = partial(mntp_runs.error_line, command="words")
results = mntp_runs.results


def write_model(folder, adds_bos=True, **sizes):
    """A random Llama, and a tokenizer whose words have one or two tokens."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "##s", *(f"n{i}" for i in range(NUMBERS))])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(vocabulary), seed=1, **sizes).save_pretrained(folder)
    return tokenizer


def sentences(count, seed=0):
    """Words and two kinds of labels: whether a word's number is high, and spans, which depend on the word after."""
    rng = random.Random(seed)
    for _ in range(count):
        words = [f"n{rng.randrange(NUMBERS)}{rng.choice(['', 's'])}" for _ in range(rng.randrange(2, 8))]
        tags = ["HIGH" if word[1] >= "3" else "LOW" for word in words]
        spans = ["O" if not after or after[1] < "3" else "B-ODD" for after in [*words[1:], ""]]
        spans = ["I-ODD" if one == before == "B-ODD" else one for before, one in zip(["O", *spans], spans)]
        yield {"tokens": words, "pos_tags": tags, "ner_tags": spans}


def write_sentences(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".iob2":
        blocks = (
            "".join(f"{i}\t{w}\t{t}\t-\t-\n" for i, (w, t) in enumerate(zip(r["tokens"], r["ner_tags"]), 1))
            for r in rows
        )
        path.write_text("# one = text\n" + "\n".join(blocks))
    elif path.suffix == ".conllu":
        empty = "\t_" * 6
        blocks = (
            "".join(f"{i}\t{w}\t_\t{t}{empty}\n" for i, (w, t) in enumerate(zip(r["tokens"], r["pos_tags"]), 1))
            for r in rows
        )
        path.write_text("\n".join("# text = one\n" + block for block in blocks))
    else:
        blocks = ("".join(f"{w} {p} O {n}\n" for w, p, n in zip(*(r.values()))) for r in rows)
        path.write_text("-DOCSTART- -X- -X- O\n\n" + "\n".join(blocks))
    return path


def tags_of(pipeline, words):
    """The label at the first token of each word, from transformers' pipeline on the text."""
    tokens = {entity["index"]: entity["entity"] for entity in pipeline(" ".join(words), ignore_labels=[])}
    ids = pipeline.tokenizer(words, is_split_into_words=True).word_ids()
    return [tokens[ids.index(number)] for number in range(len(words))]


def expected_tags(model, tokenizer, words, masks):
    """The same from a stock model that was never patched, one sentence alone, under explicit masks."""
    from .explicit_masks import under

    encoded = tokenizer(words, is_split_into_words=True)
    ids = torch.tensor([encoded["input_ids"]])
    with torch.no_grad(), under(model.base_model.layers, masks(ids.shape[1])):
        numbers = model(input_ids=ids).logits[0].argmax(-1).tolist()
    places = [encoded.word_ids().index(number) for number in range(len(words))]
    return [model.config.id2label[numbers[place]] for place in places]
