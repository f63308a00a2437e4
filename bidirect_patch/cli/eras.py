"""Settings of other eras: transformers renames and removes TrainingArguments, and published files keep the old names.

One rule for every setting that this transformers doesn't know: it goes by the name that this one knows, or it said
nothing beyond the default and is dropped, or it is an error. None loses its meaning silently.
"""

from typing import Any

import transformers

from ..errors import ConfigError

SAME = (  # each pair is one setting under two names
    ("evaluation_strategy", "eval_strategy"),
    ("no_cuda", "use_cpu"),
    ("per_gpu_train_batch_size", "per_device_train_batch_size"),
    ("per_gpu_eval_batch_size", "per_device_eval_batch_size"),
    ("push_to_hub_token", "hub_token"),
    ("push_to_hub_model_id", "hub_model_id"),
    ("use_auth_token", "token"),
    ("warmup_ratio", "warmup_steps"),  # a number of steps below 1 is a ratio where warmup_ratio is gone
)
CHOICES = {  # a switch that became one choice of another setting
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "adafactor": ("optim", "adafactor"),
}
GONE = {  # removed, with the value that asks for nothing
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
_TWIN = {old: new for old, new in SAME} | {new: old for old, new in SAME}
_FORMER_SWITCH = {choice: switch for switch, choice in CHOICES.items()}


def to_this_era(settings: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """`settings` with every name that is not in `known` translated; names that no era knows are left as they are.

    Raises:
        ConfigError: a setting was removed and had a meaning, or is given under both of its names.
    """
    translated: dict[str, Any] = {}
    for name, value in settings.items():
        renamed = name
        if name not in known:
            if name in CHOICES or name in GONE or name in _TWIN:
                if says_nothing(name, value):
                    continue
            if name in CHOICES:
                renamed, value = CHOICES[name]
            elif (name, value) in _FORMER_SWITCH:
                renamed, value = _FORMER_SWITCH[name, value], True
            elif name in _TWIN:
                renamed = _TWIN[name]
            elif name in GONE:
                raise ConfigError(
                    f"{name}={value} means nothing to transformers {transformers.__version__}, which no longer has it; "
                    "take it out."
                )
        if renamed in translated or (renamed != name and renamed in settings):
            raise ConfigError(f"{name} is called {renamed} now, and both are given; keep one.")
        translated[renamed] = value
    return translated


def says_nothing(name: str, value: Any) -> bool:
    """Whether the value, of JSON's type or as text from a flag, is what this setting was without being given."""
    text = str(value).lower()
    return text in ("", "none", "false", "0", "0.0") if GONE.get(name) is None else text == str(GONE[name]).lower()
