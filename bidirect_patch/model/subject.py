"""What has to be known of a model to run it on random tokens and to watch its layers."""

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .config import special_token_ids
from .walk import layers_of


class Subject(NamedTuple):
    """A model that is to be watched."""

    model: PreTrainedModel
    layers: dict[str, nn.Module]  # the modules that may be decoder layers, by name
    special_ids: set[Any]  # tokens that may stand for an image or padding


def subject_of(model: PreTrainedModel) -> Subject:
    """Look at a model once."""
    return Subject(model, layers_of(model), special_token_ids(model.config))
