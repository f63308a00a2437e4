"""Folders with sink tokens: stock transformers and PEFT know none, and must not open such a folder as another model.

Both read a field that names what is not there, and raise an error that says what to import:

- config.json points to another file, as transformers lets it do for other releases of itself (`configuration_files`):
  "does not appear to have a file named config.0+import.bidirect_patch.auto.json".
- adapter_config.json names a kind of adapter that PEFT doesn't have (`peft_type`).

`bidirect_patch.auto` opens the first, this package alone the second, since loading an adapter is where it warns or enables.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import wrapt
from transformers import PretrainedConfig

from . import policy

# The first release by PEP 440, so that every transformers takes this file for its own.
_OTHER_FILE = "config.0+import.bidirect_patch.auto.json"
_OTHER_KIND = ", with sink tokens: import bidirect_patch.auto first"

_is_installed = False


def guard_config(config: Any) -> None:
    """Have stock transformers refuse what is saved with this config. Changes it in place."""
    config.configuration_files = [_OTHER_FILE]


def guard_adapter(folder: Any) -> None:
    """Have PEFT refuse the adapter in a folder, whose adapter_config.json is there already."""
    path = os.path.join(os.fspath(folder), "adapter_config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    if not str(config["peft_type"]).endswith(_OTHER_KIND):
        config["peft_type"] += _OTHER_KIND
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, sort_keys=True)


def read_adapter_config(wrapped: Any, cls: Any, args: Any, kwargs: Any) -> Any:
    """`PeftConfig.from_json_file`, which every way to open an adapter calls."""
    config = wrapped(*args, **kwargs)
    kind = config.get("peft_type")
    return {**config, "peft_type": kind.removesuffix(_OTHER_KIND)} if isinstance(kind, str) else config


@contextmanager
def opening_sinks() -> Iterator[None]:
    """Let this thread or task open folders with sink tokens within the block. It enables them itself."""
    install()
    with policy.caller_enables():
        yield


def install() -> None:
    """Have transformers open guarded folders where it is allowed to, once."""
    global _is_installed
    if not _is_installed:
        wrapt.wrap_function_wrapper(PretrainedConfig, "_get_config_dict", _read_config)
        _is_installed = True


def _read_config(wrapped: Any, cls: Any, args: Any, kwargs: Any) -> Any:
    config, rest = wrapped(*args, **kwargs)
    if not policy.warns() and config and config.get("configuration_files") == [_OTHER_FILE]:
        config = {name: value for name, value in config.items() if name != "configuration_files"}
    return config, rest
