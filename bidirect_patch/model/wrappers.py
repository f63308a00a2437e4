"""The transformers model inside a wrapper."""

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError


def pretrained(module: nn.Module) -> PreTrainedModel:
    """Find the outermost transformers model in a module.

    Args:
        module: A transformers model, or a PEFT, DDP, compiled or other wrapper that holds one.

    Returns:
        The first `PreTrainedModel` among the module and the modules inside.

    Raises:
        UnsupportedModelError: If there is none.

    Example:
        >>> from transformers import LlamaConfig
        >>> from bidirect_patch.model.tiny import tiny_like
        >>> model = tiny_like(LlamaConfig())
        >>> pretrained(nn.Sequential(model)) is model
        True
    """
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel):
            return inner
    raise UnsupportedModelError(f"{type(module).__name__} holds no transformers model (a PreTrainedModel)")
