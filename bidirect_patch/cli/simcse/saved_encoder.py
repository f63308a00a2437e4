"""Finished encoders, as folders of sentence-transformers: opened, and what one says of its pooling."""

import json
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import import_from_string, load_file_path

from ...checkpoints.guard import opening_sinks
from ...checkpoints.marks import is_marked, sinks_on_disk
from ...encoder.without_sinks import WithoutSinks
from ...errors import ConfigError
from ...patch import enable_bidirectional
from ..load_errors import loading
from .settings import PoolingMode

# The name of a pooling mode in LLM2Vec -> its name in sentence-transformers.
POOLING: dict[PoolingMode, str] = {"mean": "mean", "weighted_mean": "weightedmean", "eos_token": "lasttoken"}

_KNOWN = (Transformer, WithoutSinks, Pooling, Normalize)  # the settings of `simcse` say the same, or no cosine is changed


def open_encoder(name: str, what: str = "", **options: Any) -> Any:
    """An encoder of sentence-transformers, bidirectional if it was saved so, with the sinks that it was saved with.

    Args:
        name: Its folder or hub name.
        what: What an error calls it; its name by default.
        **options: Arguments of the transformers model's `from_pretrained`.

    Raises:
        ConfigError: There is no such encoder.
    """
    with loading(what or name), opening_sinks():
        model = SentenceTransformer(name, model_kwargs=options)
    if is_marked(name):
        enable_bidirectional(model, **sinks_on_disk(name)._asdict())
    return model


def choose_pooling(asked: PoolingMode | None, name: str) -> PoolingMode:
    """The pooling of the settings, else that of the encoder which is trained further, else the mean.

    Args:
        asked: What the settings say.
        name: The folder or hub name of the model or encoder.

    Raises:
        ConfigError: It is an encoder with a module that would be lost, or with a pooling that has no setting.
    """
    with loading(repr(name)):
        file = load_file_path(name, "modules.json")
    if file is None:
        return asked or "mean"
    with open(file, encoding="utf-8") as opened:
        entries = [(import_from_string(entry["type"]), entry["path"]) for entry in json.load(opened)]
    lost = [kind.__name__ for kind, _ in entries if not issubclass(kind, _KNOWN)]
    if lost:
        raise ConfigError(
            f"{name} is an encoder with {', '.join(lost)}, which would be lost here, so that it would be another one: give the "
            "model that it was made from"
        )
    saved = [Pooling.load(name, subfolder=path).pooling_mode for kind, path in entries if issubclass(kind, Pooling)]
    own = next((ours for ours, theirs in POOLING.items() if saved == [theirs]), None)
    if asked is None and own is None:
        raise ConfigError(f"{name} is an encoder that pools by {saved}: give pooling_mode, one of {', '.join(POOLING)}")
    return asked or own or "mean"
