"""The word-level probe of bidirect_patch/encoder/README.md.

It is a linear layer on frozen token states, where a word's tag depends on the word after it.
"""

import random

import pytest
import torch
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

from bidirect_patch import enable_bidirectional

from ..helpers.heads import trainer_arguments
from ..helpers.tiny_models import tiny_model
from ..helpers.versions import TRANSFORMERS

pytest.importorskip("accelerate")
if TRANSFORMERS < Version("4.42"):
    pytest.skip(f"transformers {TRANSFORMERS} has no LlamaForTokenClassification", allow_module_level=True)

NUMBERS = 4  # words n0s, n1s, ..., each of two subwords


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random causal model on disk, with its tokenizer."""
    place = tmp_path_factory.mktemp("model")
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "##s", *(f"n{i}" for i in range(NUMBERS))])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(place)
    tiny_model(vocab_size=len(vocabulary), hidden_size=64, head_dim=16, seed=1).save_pretrained(place)
    return place, tokenizer


def sentences(count, seed):
    """Two words each; the tag of both is whether the second word's number is odd."""
    rng = random.Random(seed)
    for _ in range(count):
        numbers = [rng.randrange(NUMBERS) for _ in range(2)]
        yield {"words": [f"n{n}s" for n in numbers], "tags": [numbers[1] % 2] * 2}


def align(tokenizer, row, after_mntp):
    """Tag the first subword of each word; for a model trained by MNTP, the token before it."""
    encoded = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=64)
    words = encoded.word_ids()
    first = [word is not None and word not in words[:i] for i, word in enumerate(words)]
    labels = [row["tags"][word] if is_first else -100 for word, is_first in zip(words, first)]
    if after_mntp:
        labels = [*labels[1:], -100]
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


def accuracy(prediction):
    scored = prediction.label_ids != -100
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[scored].mean())}


def probe(folder, after_mntp, line, tmp_path):
    place, tokenizer = folder
    torch.manual_seed(0)
    model = line(AutoModelForTokenClassification.from_pretrained(place, num_labels=2))
    model.base_model.requires_grad_(False)  # only the linear layer learns
    frozen = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    rows = [align(tokenizer, row, after_mntp) for row in sentences(400, seed=0)]
    trainer = Trainer(
        model=model,
        args=trainer_arguments(tmp_path, max_steps=50, per_device_train_batch_size=32, learning_rate=0.1),
        train_dataset=rows[:300],
        eval_dataset=rows[300:],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    assert all(torch.equal(value, frozen[name]) for name, value in model.base_model.state_dict().items())
    return trainer.evaluate()["eval_accuracy"]


def test_the_first_subword_is_tagged(folder):
    _, tokenizer = folder
    row = {"words": ["n3s", "n4"], "tags": [7, 8]}
    assert align(tokenizer, row, after_mntp=False)["labels"] == [-100, 7, -100, 8]
    assert align(tokenizer, row, after_mntp=True)["labels"] == [7, -100, 8, -100]


@pytest.mark.parametrize("after_mntp", [False, True], ids=["same token", "token before"])
def test_a_bidirectional_probe_beats_a_causal_one(folder, after_mntp, tmp_path):
    both = probe(folder, after_mntp, enable_bidirectional, tmp_path)
    causal = probe(folder, after_mntp, lambda model: model, tmp_path)
    assert both > 0.9 and both > causal + 0.1
    assert causal < 0.85, "of the two words, it can know the second one's tag and must guess the first one's"
