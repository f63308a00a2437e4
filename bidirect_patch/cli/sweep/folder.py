"""The best setup as a folder for sentence-transformers."""

import json
import os
from typing import Any

import torch
from sentence_transformers.base.modules import Dense
from torch import nn

from ...encoder.without_sinks import WithoutSinks
from ..output_folder import check_space, make_output_dir, writing
from ..simcse.model import load_encoder
from ..simcse.saving import save_encoder
from ..simcse.settings import EncoderArguments
from .best_settings import encoder_settings
from .measure import Row
from .model import Source

SETTINGS_FILE = "settings.json"


def save(row: Row, source: Source, folder: str) -> None:
    """Write the encoder as `simcse` would load it, and the settings to load it by.

    Args:
        row: The setup, and the centre of the embeddings.
        source: Where the model comes from.
        folder: An empty folder, or one to make.

    Raises:
        ConfigError: It can't be written.
    """
    settings = encoder_settings(source, row.setup)
    # No dropout and no adapter: nothing is trained.
    arguments = EncoderArguments(**settings, attn_implementation=source.attn_implementation, simcse_dropout=0.0, lora_r=0)
    model, limit = load_encoder(arguments, {})
    if row.setup.leaves_out_first and not row.setup.attention.sinks:
        model.insert(1, WithoutSinks(1))
    if row.setup.centred:
        model.append(_minus(row.centre))
    make_output_dir(folder)
    check_space(folder, model.parameters(), copies=1)
    with writing(folder):
        save_encoder(model, folder, limit)
        with open(os.path.join(folder, SETTINGS_FILE), "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2, ensure_ascii=False)
            file.write("\n")


def _minus(centre: Any) -> Dense:
    """The module that subtracts a vector, (width,), from each embedding."""
    width = len(centre)
    return Dense(
        width, width, activation_function=nn.Identity(), init_weight=torch.eye(width), init_bias=torch.tensor(-centre).float()
    )
