"""What differs between releases of transformers, as far as the commands are concerned.

transformers renames and removes training arguments, and published settings files keep the old names. A setting that the
installed transformers does not know is handled in one of three ways:

- it is given under the name that the installed transformers knows;
- it is left out, if its value asks for nothing;
- otherwise it is an error.

So no setting loses its meaning silently.
"""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.utils import is_torch_xla_available

from ..attention.versions import DTYPE_ARGUMENT as DTYPE_ARGUMENT
from ..errors import ConfigError

RENAMED = (  # each pair is one setting under two names
    ("evaluation_strategy", "eval_strategy"),
    ("no_cuda", "use_cpu"),
    ("per_gpu_train_batch_size", "per_device_train_batch_size"),
    ("per_gpu_eval_batch_size", "per_device_eval_batch_size"),
    ("push_to_hub_token", "hub_token"),
    ("push_to_hub_model_id", "hub_model_id"),
    ("use_auth_token", "token"),
    ("warmup_ratio", "warmup_steps"),  # a number of steps below 1 is a ratio where warmup_ratio was removed
)
SWITCH_TO_CHOICE = {  # a switch that became one choice of another setting
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "adafactor": ("optim", "adafactor"),
}
REMOVED = {  # each with the value that asks for nothing; None stands for any empty value
    "save_safetensors": True,
    "fp16_backend": "auto",
    "half_precision_backend": "auto",
    "fp16_opt_level": "O1",
    "past_index": -1,
    "ray_scope": "last",
    **dict.fromkeys(("use_ipex", "jit_mode_eval", "use_mps_device", "torchdynamo", "mp_parameters", "logging_dir")),
    **dict.fromkeys(("use_legacy_prediction_loop", "include_tokens_per_second", "include_inputs_for_metrics")),
    **dict.fromkeys(("tpu_num_cores", "tpu_metrics_debug", "dispatch_batches", "split_batches")),
    **dict.fromkeys(("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "push_to_hub_organization")),
}
_OTHER_NAME = {old: new for old, new in RENAMED} | {new: old for old, new in RENAMED}
_CHOICE_TO_SWITCH = {choice: switch for switch, choice in SWITCH_TO_CHOICE.items()}

# The trainer of sentence-transformers 5.4 and newer gives transformers' Trainer an argument that is new in 4.46.
SENTENCE_TRANSFORMERS_TRAINS = Version(transformers.__version__) >= Version("4.46")


def name_of_checkpointing(values: dict[str, Any]) -> str:
    """Return the name that the installed transformers has for gradient checkpointing, and move the values there, in place.

    transformers 5.24 calls it activation_checkpointing, and warns about the old name.

    Args:
        values: The value of each setting.
    """
    old, new = "gradient_checkpointing", "activation_checkpointing"
    if new not in values:
        return old
    for part in ("", "_kwargs"):
        if values[new + part] is None:
            values[new + part] = values[old + part]
        values[old + part] = None  # transformers fills it in from the new one
    return new


def translate_settings(settings: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Translate settings of other releases to those of the installed transformers.

    Args:
        settings: Settings by name.
        known: The names that need no translation.

    Returns:
        The settings under names in `known`. A name that no release knows is left as it is.

    Raises:
        ConfigError: A setting was removed and its value had a meaning, or a setting is given under two names.
    """
    translated: dict[str, Any] = {}
    for name, value in settings.items():
        new_name, new_value = name, value
        if name not in known:
            if _asks_for_nothing(name, value):
                continue
            new_name, new_value = _translate(name, value)
        if new_name in translated or (new_name != name and new_name in settings):
            raise ConfigError(f"{name} is called {new_name} now, and both are given; keep one.")
        translated[new_name] = new_value
    return translated


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Say whether a listed setting has the value that it has by default. The value may be the text of a flag."""
    if name not in SWITCH_TO_CHOICE and name not in REMOVED and name not in _OTHER_NAME:
        return False
    text = str(value).lower()
    default = REMOVED.get(name)
    return text in ("", "none", "false", "0", "0.0") if default is None else text == str(default).lower()


def _translate(name: str, value: Any) -> tuple[str, Any]:
    if name in SWITCH_TO_CHOICE:
        return SWITCH_TO_CHOICE[name]
    if (name, value) in _CHOICE_TO_SWITCH:
        return _CHOICE_TO_SWITCH[name, value], True
    if name in REMOVED:
        raise ConfigError(
            f"{name}={value} means nothing to transformers {transformers.__version__}, which no longer has it; "
            "take it out."
        )
    return _OTHER_NAME.get(name, name), value


def plain_gguf_weights(gguf_file: str | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that unpack the weights of a GGUF file.

    From transformers 5.17 on the weights stay packed by default, and packed weights cannot be trained.
    """
    kind = getattr(transformers, "GgufConfig", None)
    if kind is None or not gguf_file:
        return {}
    return {"quantization_config": kind(gguf_file=gguf_file, dequantize=True)}


def remove_gguf_mark(model: PreTrainedModel) -> None:
    """Remove the mark "quantized" from a model whose GGUF weights were unpacked, in place.

    transformers neither trains nor saves a model with the mark.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer:
        quantizer.remove_quantization_config(model)


def has_accelerator() -> bool:
    """Say whether there is a device besides the CPU to train on."""
    if is_torch_xla_available():
        return True
    if hasattr(torch, "accelerator"):  # from PyTorch 2.6 on
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def allow_numpy_state() -> AbstractContextManager[Any]:
    """Let `torch.load` read the random state of NumPy, in a `with` block.

    Older releases read that state from a checkpoint with `torch.load`, which refuses it by default.
    """
    state = np.zeros(1, dtype=np.uint32)
    types: list[Any] = [type(state.dtype), np.dtype, np.ndarray, state.__reduce__()[0]]
    return torch.serialization.safe_globals(types)
