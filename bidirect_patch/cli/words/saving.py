"""What a run writes: checkpoints to resume from and to evaluate, and the trained model."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file

from ...attention.mixed import holds_open
from ...errors import ConfigError
from ...model.sinks import Sinks
from ...verify.mode import sinks_in
from ..checkpoints import check_same_sinks, check_same_weights
from ..common_settings import read_json
from ..output_folder import writing
from .data import Sentence
from .files import NO_LABEL, TOKENS
from .model import Below, adapter_of
from .tagger import WordTagger, head_of
from .tokens import IGNORED, Reading

CLASSIFIER = "classifier.safetensors"
FILE = "words.json"  # what a classifier was trained for
PREDICTIONS = "predictions.jsonl"  # of the test data


class Trained(NamedTuple):
    """What a classifier was trained for: what words.json says.

    Attributes:
        labels: The labels that it tells apart, by number.
        reading: Where the label of a word is read.
        below: What it was trained over; no adapter if the file says nothing of it.
        facts: What else must be the same of the model under it, by name.
    """

    labels: list[str]
    reading: Reading
    below: Below
    facts: dict[str, Any]


def is_whole(reading: Reading) -> bool:
    """Whether transformers' own class reads labels so: at a word's first token."""
    return reading == Reading()


def save_classifier(tagger: WordTagger, folder: str, below: Below) -> None:
    """Write what was trained: the classifier, and the adapter if there is one, with what they were trained for.

    Args:
        tagger: The tagger.
        folder: The folder to write to.
        below: What the classifier was trained over.
    """
    os.makedirs(folder, exist_ok=True)
    model = tagger.model
    adapter = adapter_of(model)
    if adapter is not None:
        adapter.save_pretrained(folder, save_embedding_layers=False)
    weights = {name: tensor.contiguous() for name, tensor in head_of(model).state_dict().items()}
    save_file(weights, os.path.join(folder, CLASSIFIER))
    with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
        said = {"labels": _labels(model), **tagger.reading._asdict(), **below._asdict()}
        json.dump(said | _facts(model), file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_trained(folder: str) -> Trained:
    """Read what the classifier in a folder was trained for.

    Raises:
        ConfigError: There is none, or the file is malformed.
    """
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        theirs = (
            ". LLM2Vec's classifier.pt can't be read" if os.path.isfile(os.path.join(folder, "classifier.pt")) else ""
        )
        raise ConfigError(f"cls_addr: {folder} holds no {FILE}, so no classifier of this command{theirs}")
    said = read_json(path)
    labels = said.pop("labels", None)
    reading = {name: said.pop(name, None) for name in Reading._fields}
    below = Below(said.pop("base", None), said.pop("adapters", []))
    if not (labels and _are_strings(labels)):
        raise ConfigError(f"{path}: labels must be a list of strings; got {labels!r:.80}")
    if not all(isinstance(value, bool) for value in reading.values()):
        raise ConfigError(f"{path}: {' and '.join(reading)} must be true or false; got {reading}")
    if not _are_strings(below.adapters):
        raise ConfigError(f"{path}: adapters must be a list of folders or hub names; got {below.adapters!r:.80}")
    for name in ("lora_r", *Sinks._fields):
        if not isinstance(said.get(name), int) or isinstance(said[name], bool) or said[name] < 0:
            raise ConfigError(f"{path}: {name} must be a number of 0 or more; got {said.get(name)!r}")
    return Trained(labels, Reading(**reading), below, said)


def load_classifier(tagger: WordTagger, folder: str) -> None:
    """Load what `save_classifier` wrote, in place.

    Raises:
        ConfigError: It was trained for something else, or on another model.
    """
    model = tagger.model
    trained = read_trained(folder)
    if trained.labels != _labels(model):
        raise ConfigError(
            f"it was trained for the labels {_few(trained.labels)}, and this run has {_few(_labels(model))}"
        )
    if trained.reading != tagger.reading:
        raise ConfigError(f"it was trained with {trained.reading.in_words}, and this run has {tagger.reading.in_words}")
    for name, value in _facts(model).items():
        if trained.facts.get(name) != value:
            raise ConfigError(f"it was trained with {name}={trained.facts.get(name)}, and this run has {name}={value}")
    adapter = adapter_of(model)
    if adapter is not None:
        check_same_sinks(folder, sinks_in(model))
        weights = load_peft_weights(folder, device="cpu")
        check_same_weights(get_peft_model_state_dict(adapter, save_embedding_layers=False), weights)
        set_peft_model_state_dict(adapter, weights)
    saved, head = load_file(os.path.join(folder, CLASSIFIER)), head_of(model)
    check_same_weights(head.state_dict(), saved)
    head.load_state_dict(saved)


def save_model(tagger: WordTagger, folder: str) -> None:
    """Write the model as a stock `*ForTokenClassification`, its adapter merged. The model has no adapter afterwards."""
    model = tagger.model
    if isinstance(model.base_model, PeftModel):
        merged = model.base_model.merge_and_unload()
        vars(merged).pop("peft_config", None)  # older releases of PEFT leave it there
        setattr(model, model.base_model_prefix, merged)
    model.save_pretrained(folder)


def save_predictions(
    folder: str, predicted: np.ndarray, rows: Sequence[Mapping[str, Any]], sentences: Sequence[Sentence], labels: Sequence[str]
) -> None:
    """Write the predicted labels of the test data: a line a sentence, with its words and their labels, as `words` reads it.

    Args:
        folder: The folder to write to.
        predicted: The numbers of the predicted labels, (rows, words).
        rows: What `tokens.encode` made of the sentences.
        sentences: All sentences. A word that is not scored gets no label.
        labels: The labels by their numbers.
    """
    found: list[list[str]] = [[NO_LABEL] * len(sentence.words) for sentence in sentences]
    for numbers, row in zip(predicted, rows):
        found[row["sentence"]] = [NO_LABEL if own == IGNORED else labels[n] for n, own in zip(numbers, row["labels"])]
    with writing(folder), open(os.path.join(folder, PREDICTIONS), "w", encoding="utf-8") as file:
        for sentence, given in zip(sentences, found):
            file.write(json.dumps({TOKENS: sentence.words, "labels": given}, ensure_ascii=False) + "\n")


def save_arguments(training: Any, folder: str) -> None:
    """Write the training arguments."""
    torch.save(training, os.path.join(folder, "training_args.bin"))


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _labels(model: Any) -> list[str]:
    return [str(model.config.id2label[number]) for number in range(model.config.num_labels)]


def _facts(model: Any) -> dict[str, Any]:
    layers, adapter = getattr(model.config, "num_hidden_layers", None), adapter_of(model)
    rank = 0 if adapter is None else adapter.peft_config[adapter.active_adapter].r
    return {
        "bidirectional": holds_open(model),
        **sinks_in(model)._asdict(),
        "num_hidden_layers": layers,
        "lora_r": rank,
    }


def _few(labels: list[str]) -> str:
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
