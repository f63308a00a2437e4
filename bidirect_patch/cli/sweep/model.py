"""The model that is measured, and its tokenizer."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from ...attention.versions import DTYPE_ARGUMENT
from ..load_errors import loading
from ..settings_by_release import plain_gguf_weights, remove_gguf_mark


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: A folder or a name on the hub.
        gguf_file: A GGUF file in it.
        torch_dtype: The type of its weights.
        attn_implementation: The attention backend.
    """

    name: str
    gguf_file: str | None = None
    torch_dtype: str = "float32"
    attn_implementation: str = "sdpa"

    @classmethod
    def of(cls, name: str, gguf_file: str | None, **settings: Any) -> "Source":
        """The source that a user names, who may name a GGUF file alone."""
        if gguf_file is None and name.endswith(".gguf") and os.path.isfile(name):
            name, gguf_file = os.path.split(os.path.abspath(name))
        return cls(name, gguf_file, **settings)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of a model's `from_pretrained`."""
        dtype = getattr(torch, self.torch_dtype, self.torch_dtype)  # "auto" stays a string
        own = {DTYPE_ARGUMENT: dtype, "attn_implementation": self.attn_implementation}
        return self.options | own | plain_gguf_weights(self.gguf_file)


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer.

    Raises:
        ConfigError: There is none.
    """
    with loading(repr(source.name)):
        return AutoTokenizer.from_pretrained(source.name, **source.options)


def load_model(source: Source) -> Any:
    """Load the model without its head, in evaluation mode, on the device that computes.

    Raises:
        BackendError: The attention backend is not installed.
        ConfigError: There is no such model.
    """
    with loading(repr(source.name)):
        model = AutoModel.from_pretrained(source.name, **source.model_options)
    if source.gguf_file:
        remove_gguf_mark(model)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
