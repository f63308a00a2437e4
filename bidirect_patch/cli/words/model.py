"""The model with a token classifier that is trained, or evaluated."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, __version__
from transformers.utils import logging as transformers_logging

from ...checkpoints.guard import opening_sinks
from ...checkpoints.loading import without_peft_warning
from ...checkpoints.marks import read_json, saved_sinks, sinks_on_disk
from ...errors import ConfigError
from ...model.config import parts
from ...model.sinks import NO_SINKS, Sinks
from ...patch import disable_bidirectional, enable_bidirectional
from ..layers import keep_layers
from ..load_errors import loading
from ..lora import check_depth, with_lora
from ..model_facts import ModelFacts, load_part, look_at
from ..settings_by_release import DTYPE_ARGUMENT, plain_gguf_weights, remove_gguf_mark
from ..sink_settings import choose_sinks
from .settings import ModelArguments
from .tagger import head_of

CLASSIFIER = "ForTokenClassification"


class Source(NamedTuple):
    """Where a model comes from.

    Attributes:
        settings: The settings, of which the model is the one under all adapters.
        adapters: Those that are merged into it, in their order.
        sinks: The sink tokens and sinkless layers that they were saved with.
    """

    settings: ModelArguments
    adapters: list[str]
    sinks: Sinks


class Below(NamedTuple):
    """What a classifier was trained over.

    Attributes:
        base: The model under all adapters, an absolute path or a hub name; None if that is not known.
        adapters: Those that were merged into it, in their order, the same.
    """

    base: str | None
    adapters: list[str]


def find_source(settings: ModelArguments, below: Below | None = None) -> Source:
    """Find the model under all adapters. As in LLM2Vec, the model that is named may be an adapter itself, over its base.

    Args:
        settings: The settings.
        below: What the classifier of `cls_addr` was trained over. Without a `peft_model_name_or_path`, the adapters that the
            settings leave out are taken from here.

    Raises:
        ConfigError: An adapter does not say what its base is, or one of `below` can't be taken.
    """
    name = settings.model_name_or_path
    hub = {"revision": settings.model_revision, "cache_dir": settings.cache_dir, "token": settings.token}
    adapters = [settings.peft_model_name_or_path] if settings.peft_model_name_or_path else []
    own = read_json(name, "adapter_config.json", hub)
    if own:
        base = own.get("base_model_name_or_path")
        if not base:
            raise ConfigError(
                f"{name} is an adapter that names no base: give the base, and this as peft_model_name_or_path"
            )
        settings, adapters = replace(settings, model_name_or_path=base), [str(name), *adapters]
    if below is not None and not settings.peft_model_name_or_path:
        adapters += _take_over(below, str(settings.model_name_or_path), len(adapters))
    found = (sinks_on_disk(adapter) for adapter in reversed(adapters))
    return Source(settings, adapters, next((sinks for sinks in found if sinks != NO_SINKS), NO_SINKS))


def below_of(source: Source) -> Below:
    """What a classifier is trained over, as it is noted with it."""
    return Below(_name_anywhere(source.settings.model_name_or_path), [*map(_name_anywhere, source.adapters)])


def _take_over(below: Below, base: str, count: int) -> list[str]:
    """The adapters over which a classifier was trained, without the first `count` of them, which the settings give.

    Raises:
        ConfigError: One is not there any more, or the model under them is another now.
    """
    lacking = below.adapters[count:]
    names = ("model_name_or_path", "peft_model_name_or_path")[-len(below.adapters) :]
    way = "give " + " and ".join(f"{name} {adapter}" for name, adapter in zip(names, below.adapters))
    for adapter in lacking:
        trained = f"the classifier of cls_addr was trained over the adapter {adapter}"
        if os.path.isabs(adapter) and not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
            raise ConfigError(f"{trained}, which is not there any more: {way}, by the path that it has now")
        if below.base not in (None, _name_anywhere(base)):
            raise ConfigError(
                f"{trained} on {below.base}, and the model is {base}: {way}, or, if the model has it in its weights, take "
                "adapters out of words.json"
            )
    return lacking


def _name_anywhere(name: Any) -> str:
    """A name by which a model or an adapter is found from any folder: an absolute path, or its hub name."""
    return os.path.abspath(name) if os.path.isdir(name) else str(name)


def check_model(source: Source) -> ModelFacts:
    """Raise the errors of `load_model` that concern the model's class and backend, from its config alone."""
    settings = source.settings
    config = load_part(AutoConfig, settings.model_name_or_path, settings)
    code = getattr(config, "auto_map", None) or {}
    if type(config) not in AutoModelForTokenClassification._model_mapping and f"AutoModel{CLASSIFIER}" not in code:
        raise ConfigError(
            f"transformers {__version__} has no class ...{CLASSIFIER} for model_type {config.model_type} "
            f"({settings.model_name_or_path}), as which a trained word-level model is saved: take a newer release of "
            "transformers, or another model"
        )
    facts = look_at(settings, source.sinks)[0]
    return facts if settings.bidirectional else facts._replace(sinks=NO_SINKS)


def saved_labels(source: Source) -> list[str] | None:
    """The labels of a model that was saved with a token classifier, or None."""
    config = load_part(AutoConfig, source.settings.model_name_or_path, source.settings)
    if not any(str(name).endswith(CLASSIFIER) for name in config.architectures or ()):
        return None
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def load_model(source: Source, labels: Sequence[str], *, new_classifier: bool) -> Any:
    """Load a model with a token classifier, with the adapters of the steps before merged into it.

    Args:
        source: What is loaded and how.
        labels: The labels that the classifier tells apart.
        new_classifier: Make a random classifier, whatever the model was saved with.

    Returns:
        A `*ForTokenClassification`. Its backbone is bidirectional unless the settings say otherwise, and frozen, or has a new
        LoRA adapter.

    Raises:
        BackendError: The attention backend is not installed.
        ConfigError: There is no such model or adapter, its weights lack some, or its class has another classifier.
        UnsupportedModelError: The model cannot be made bidirectional.
    """
    settings = source.settings
    config = load_part(AutoConfig, settings.model_name_or_path, settings)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: number for number, label in enumerate(labels)}
    config.classifier_dropout = settings.classifier_dropout
    sinks = choose_sinks(settings, saved_sinks(config), source.sinks) if settings.bidirectional else NO_SINKS
    if not settings.bidirectional:
        _make_causal(config)
    with _without_report():
        model, report = load_part(
            AutoModelForTokenClassification,
            settings.model_name_or_path,
            settings,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=new_classifier,
            **{DTYPE_ARGUMENT: getattr(torch, settings.torch_dtype, settings.torch_dtype)},
            attn_implementation=settings.attn_implementation,
            low_cpu_mem_usage=settings.low_cpu_mem_usage,
            **plain_gguf_weights(settings.gguf_file),
        )
    classifier = head_of(model)[1]
    _check_loaded(model, report, new_classifier=new_classifier)
    if settings.gguf_file:
        remove_gguf_mark(model)
    if settings.layers is not None:
        keep_layers(model, settings.layers)
    if new_classifier:
        with torch.no_grad():
            nn.init.normal_(classifier.weight, std=getattr(config, "initializer_range", 0.02))
            nn.init.zeros_(classifier.bias)
    enable_bidirectional(model, **sinks._asdict())  # an adapter that was trained on such a model is loaded onto one
    backbone = model.base_model
    for adapter in source.adapters:
        with loading(adapter), opening_sinks(), without_peft_warning():
            check_depth(backbone, adapter)
            backbone = PeftModel.from_pretrained(backbone, adapter).merge_and_unload()
        vars(backbone).pop("peft_config", None)  # older releases of PEFT leave it there
    if not settings.bidirectional:
        disable_bidirectional(model)
    setattr(model, model.base_model_prefix, with_lora(backbone.requires_grad_(False), settings))
    classifier.requires_grad_(True)
    return model


def _check_loaded(model: Any, report: dict[str, Any], *, new_classifier: bool) -> None:
    """Raise ConfigError if a weight of the model was not in its files, whose place a random one has taken."""
    prefix = f"{model.base_model_prefix}."
    weights = {name for name, _ in model.named_parameters()}
    lacking = {*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])}
    lacking = {name for name in lacking & weights if name.startswith(prefix) or not new_classifier}
    if lacking:
        whole = type(model).__name__
        raise ConfigError(f"{model.config._name_or_path} lacks {len(lacking)} weights of {whole}: {min(lacking)} first")


def adapter_of(model: Any) -> PeftModel | None:
    """Return the backbone with its adapter, or None if there is no adapter."""
    return model.base_model if isinstance(model.base_model, PeftModel) else None


def _make_causal(config: Any) -> None:
    """Let a config say nothing of bidirectional attention."""
    for part in parts(config):
        for name in ("is_causal", *Sinks._fields):
            vars(part).pop(name, None)


@contextmanager
def _without_report() -> Iterator[None]:
    """Hide transformers' report of weights that are new, of which those of a new classifier are meant to be, in the block."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
