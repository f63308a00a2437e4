"""Stand-ins for submodules, with which the head runs a model without its logits; see `swap.view`."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class StandIn:
    """Stands in a submodule's place: calls go to `call`, all else to the submodule."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module, self.call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class RunOnce:
    """Stands in the backbone's place: the first call runs the backbone, and later calls return the same output."""

    def __init__(self, module: nn.Module, outputs: list[Any]) -> None:
        self.module, self.outputs = module, outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.outputs:
            self.outputs.append(self.module(*args, **kwargs))
        return self.outputs[0]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)  # the decoder in it may be called instead, as in a PEFT model
        return RunOnce(value, self.outputs) if isinstance(value, PreTrainedModel) else value
