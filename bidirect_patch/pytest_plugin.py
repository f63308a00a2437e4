"""Fixtures for users' own tests: `bidirectional_model` and `assert_bidirectional`.

pytest loads this module whenever it starts, so it imports neither torch nor transformers; a test that asks for a
fixture does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

import bidirect_patch

if TYPE_CHECKING:
    from torch import nn

    Model = TypeVar("Model", bound=nn.Module)


@pytest.fixture
def bidirectional_model() -> Iterator[Callable[..., Any]]:
    """`bidirectional_model(model)` makes `model` bidirectional for this test and returns it, the same object.

    It takes `num_sink_tokens` and `num_sinkless_layers`, as `bidirect_patch.enable_bidirectional` does.

    Teardown, after a failure too, gives each model back the mode it was found in, the last one first.
    """
    with ExitStack() as undo:

        def enable(model: Model, *, num_sink_tokens: int = 0, num_sinkless_layers: int = 0) -> Model:
            block = bidirect_patch.bidirectional(
                model, num_sink_tokens=num_sink_tokens, num_sinkless_layers=num_sinkless_layers
            )
            return undo.enter_context(block)

        yield enable


@pytest.fixture(scope="session")
def assert_bidirectional() -> Callable[..., None]:
    """`bidirect_patch.assert_bidirectional`, which runs the model and fails if a layer of it is causal."""
    return bidirect_patch.assert_bidirectional
