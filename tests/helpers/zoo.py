"""Every causal LM of the installed transformers as a tiny random model, and an oracle for what its output depends on.

Sizes come from one table of config attributes (`SIZES` in zoo_overrides.py), applied wherever a config or sub-config
has the attribute; what a family needs beyond that stands there too, as data.
"""

import contextlib
import re
import warnings
from unittest import mock

import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn
from transformers import AutoModel
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .zoo_overrides import FOREIGN_TOWER, NO_MNTP_HEAD, NOT_CAUSAL, OVERRIDES, RETIRED, SIZES, TOKENS, WHY_NOT

__all__ = ["FOREIGN_TOWER", "NO_MNTP_HEAD", "NOT_CAUSAL", "OVERRIDES", "RETIRED", "WHY_NOT"]

NEWEST = Version("5.24.0")  # the newest transformers that the data was written for
RELEASE = Version(Version(transformers.__version__).base_version)
# One of each way in which a family makes its masks, its logits or its loss unlike Llama: all the version matrix has time for.
UNLIKE_LLAMA = (
    *("bloom", "cohere", "ctrl", "fuyu", "gemma2", "gemma3", "git", "gpt_neo", "gpt_neox", "gpt_oss", "granite", "jetmoe"),
    *("llama4_text", "moshi", "mpt", "musicgen", "openai-gpt", "opt", "phi3", "xglm"),
)
FIRST_ID, LAST_ID = 5, 100  # ordinary tokens: every special id lies outside


def model_types() -> list[str]:
    """The types of the installed transformers' causal-LM mapping, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def why_not(model_type: str) -> str | None:
    """Why this type can't be built or run on text alone, or None if it can."""
    reason, _, versions = WHY_NOT.get(model_type, (None, None, ""))
    return reason if RELEASE in SpecifierSet(versions) else None


def buildable_types() -> list[str]:
    """Those of `model_types` that can be built and run on text alone."""
    return [model_type for model_type in model_types() if not why_not(model_type)]


def why_not_causal(model_type: str) -> str | None:
    """Why the stock output of this type depends on later tokens, or None if it doesn't."""
    reason, versions = NOT_CAUSAL.get(model_type, (None, ""))
    return reason if RELEASE in SpecifierSet(versions) else None


def config(model_type: str, **overrides) -> PretrainedConfig:
    """A tiny config of this type; of the text model's own type where the causal LM is a part of something larger."""
    cls, wanted = CONFIG_MAPPING[model_type], model_class(model_type).config_class
    if not issubclass(cls, wanted) and wanted.__module__ == cls.__module__:
        cls = wanted
    return shrunk(cls, OVERRIDES.get(model_type, {}) | overrides)


def model_class(model_type):
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def shrunk(cls: type, overrides: dict) -> PretrainedConfig:
    """A config of this class with the sizes of `SIZES`, and `overrides` in it."""
    default = vars(_default(cls, overrides))
    common = SIZES | TOKENS if "vocab_size" in default else SIZES
    kwargs = {name: value for name, value in common.items() if name in default or name in (cls.attribute_map or {})}
    if kinds := default.get("layer_types"):
        kinds = list(dict.fromkeys(kinds))
        kwargs["layer_types"] = (kinds * 4)[: max(4, len(kinds))]  # each kind of layer occurs
        kwargs["num_hidden_layers"] = len(kwargs["layer_types"])
    for name, value in default.items():
        if isinstance(value, PretrainedConfig):
            kwargs[name] = shrunk(type(value), overrides.get(name, {})).to_diff_dict()
            kwargs[name].pop("transformers_version", None)  # a strict config refuses it
        elif name in overrides:
            kwargs[name] = overrides[name]
        elif name.endswith(("_token_id", "_token_index")) and name not in TOKENS and isinstance(value, int):
            kwargs[name] = LAST_ID
    return cls(**{name: value for name, value in overrides.items() if name not in default} | kwargs)


def _default(cls, overrides):
    try:
        return cls()
    except Exception:  # a few are valid only together with what is overridden
        return cls(**overrides)


def build(model_type: str, attn_implementation: str = "eager", seed: int = 0, **overrides) -> nn.Module:
    """The tiny `*ForCausalLM` of this type, with `overrides` in its config: random, float32, on the CPU, in eval mode.

    Weights are drawn wider than any `initializer_range`, and noise is added to norms, biases and gates, so that what
    one token does to another is far above rounding and nothing is switched off by an initial zero.
    """
    torch.manual_seed(seed)
    with foreign_tower(model_type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model_class(model_type)._from_config
        model = made(config(model_type, **overrides), attn_implementation=attn_implementation)
    return randomize(model)


def randomize(model: nn.Module) -> nn.Module:
    """Draw the weights of a model as `build` does, in place; float32, in eval mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.nan_to_num_().add_(0.1 * torch.randn_like(parameter))
                if re.search(r"(^|[._])(q|k|query|key)_?(layer)?norm|sqk", name):
                    parameter.mul_(0.3)  # a softmax over normalized queries and keys would see one key and no other
    return model.float().eval()


@contextlib.contextmanager
def foreign_tower(model_type):
    """Put nothing where a sub-model comes from a package outside transformers; text never passes through it."""
    if model_type not in FOREIGN_TOWER:
        yield
        return

    def from_config(config, **kwargs):
        return nn.Identity() if type(config).__name__ == FOREIGN_TOWER[model_type] else original(config, **kwargs)

    original = AutoModel.from_config
    with mock.patch.object(AutoModel, "from_config", from_config):
        yield


def inputs(model: nn.Module, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` (batch, length), int64: random, none of them special or padding."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    return {"input_ids": torch.randint(FIRST_ID, LAST_ID, (batch, length), generator=generator).to(device)}


@torch.no_grad()
def reach(model: nn.Module, length: int = 12, seeds: int = 3, **kwargs) -> torch.Tensor:
    """What the output depends on: (length, length) bool, [i, j] is True where output i moves when token j changes.

    One batch of length + 1 texts a seed: the text, and the text with token j changed for each j. Several seeds, since a
    router or a top-k may hide a dependence for one text. `kwargs` go to the model's forward as they are, so a mask must
    have length + 1 rows. The output is the logits, or the last hidden state of a model that has none.
    """
    depends = torch.zeros(length, length, dtype=torch.bool)
    j = torch.arange(length)
    for seed in range(seeds):
        ids = inputs(model, 1, length, seed)["input_ids"].repeat(length + 1, 1)
        ids[j + 1, j] = FIRST_ID + (ids[0] - FIRST_ID + 17 + seed) % (LAST_ID - FIRST_ID)
        outputs = model(input_ids=ids, **kwargs)
        outputs = (outputs.logits if "logits" in outputs else outputs.last_hidden_state).float().cpu()
        if not torch.isfinite(outputs).all():
            raise FloatingPointError(f"{type(model).__name__} gives outputs that are not finite")
        moved = (outputs[1:] - outputs[0]).abs().amax(-1)  # (changed token, position)
        depends |= (moved > 1e-5 * outputs.abs().max()).T
    return depends
