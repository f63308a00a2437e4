"""The multimodal classes of the installed transformers, small and random, which run on text alone."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bidirect_patch.model.shrink import shrink
from tests.helpers import zoo

_MAPPINGS = (
    "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)
# With a part of fixed size, or whose default config has parts that no rule makes small: minutes for a class.
TOO_LARGE = ("apertus1p5", "dots3_note", "emu3", "florence2", "janus", "muse_glimmer", "muse_spark", "vibevoice_asr")
# Their config has a field for a window, in which the zoo puts one, and they have none.
WITHOUT_WINDOW = ("qwen3_vl_moe",)
# Sections of multimodal rotary positions, by how many there are in a head. Default configs lack them.
_SECTIONS = ([2, 1, 1], [1, 1, 0], [4, 2, 2], [2, 2, 4])


class NotBuilt(Exception):
    """A class can't be built small with what is known here, or doesn't run on text alone."""


def outer_types() -> dict[str, str]:
    """{model type: name of the class} of the multimodal classes that are not in the causal-LM mapping too."""
    names: dict[str, Any] = {}
    for mapping in _MAPPINGS:
        names |= getattr(modeling_auto, mapping, {})
    single = {t: name if isinstance(name, str) else name[0] for t, name in sorted(names.items())}
    causal = {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    return {t: name for t, name in single.items() if t not in TOO_LARGE and name not in causal}


def build_outer(model_type: str, backend: str) -> nn.Module:
    """A small random model of a multimodal class, in eval mode.

    Raises:
        NotBuilt: See there.
    """
    cls = getattr(transformers, outer_types()[model_type])
    reasons = []
    for config in _configs(model_type):
        try:
            torch.manual_seed(0)
            model = cls._from_config(config, attn_implementation=backend)
            zoo.randomize(model)
            with torch.no_grad():
                model(**zoo.inputs(model, 2, 10))
                model(**zoo.inputs(model, 2, 10), attention_mask=torch.ones(2, 10, dtype=torch.long))
            return model
        except Exception as error:  # the next way may do
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise NotBuilt(reasons[-1] if reasons else "its config can't be made")


def _configs(model_type: str) -> Iterator[Any]:
    cls = CONFIG_MAPPING[model_type]
    for make in (lambda: zoo.shrunk(cls, {}), lambda: shrink(cls())):
        for sections in (None, *_SECTIONS):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    config = make()
                    if model_type in WITHOUT_WINDOW:
                        config.get_text_config().sliding_window = None
                    if sections:
                        _set_sections(config, sections)
            except Exception:  # a strict config takes no such sizes
                break
            yield config


def _set_sections(config: Any, sections: list[int]) -> None:
    text = config.get_text_config()
    name = "rope_parameters" if hasattr(text, "rope_parameters") else "rope_scaling"
    rope = {"rope_type": "default", **(getattr(text, name, None) or {}), "mrope_section": sections}
    setattr(text, name, rope)
