"""A model taken apart: its layers, which can be called in another way, and what comes after them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...model.config import text_config
from ...model.decoder import Decoder
from ...model.find import decoders
from ...model.walk import modules_of

# What stands for a layer's forward: called with the layer's index, its forward, and the arguments of the call.
Call = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Parts(NamedTuple):
    """The parts of a model that holds one decoder.

    Attributes:
        model: What is called with token ids.
        decoder: The decoder in it.
        layers: Its layers, the first one first.
        after: The modules that turn the last layer's output into the model's output (a final norm), in their order. None if
            it is not known what does so; then only the output of the whole model is known.
    """

    model: Any
    decoder: Decoder
    layers: Sequence[nn.Module]
    after: Sequence[nn.Module] | None

    def embeddings_of(self, state: Tensor) -> Tensor:
        """What the model gives if it ends after the layer that gave this state, (batch, length, width)."""
        for module in self.after or ():
            state = module(state)
        return state


def take_apart(model: Any, ids: Tensor) -> Parts:
    """Find the parts of a model. It is run once.

    Args:
        model: A transformers model without a head, in evaluation mode.
        ids: Tokens of a short text, (1, length), int64.

    Raises:
        ConfigError: It holds several decoders, or its layers are not in one list.
        UnsupportedModelError: There is no decoder in it.
    """
    found = decoders(model)
    if len(found) > 1:
        raise ConfigError(f"{type(model).__name__} holds {len(found)} decoders, and the sweep reads one: give that one by itself")
    decoder = found[0]
    for config in (model.config, text_config(decoder.module.config)):
        config.use_cache = False
    holders = {attention.layer.rpartition(".")[0] for attention in decoder.attentions}
    holder = decoder.module.get_submodule(holders.pop()) if len(holders) == 1 else None
    if not isinstance(holder, nn.ModuleList) or len(set(map(id, holder))) < len(holder):
        raise ConfigError(f"{type(decoder.module).__name__} has no list of layers that could be told apart")
    layers = list(holder)
    return Parts(model, decoder, layers, _after(model, decoder, layers, ids))


@contextmanager
def called_by(layers: Sequence[nn.Module], call: Call) -> Iterator[None]:
    """Let `call` stand for the forward of each layer within the block."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = partial(_passed_on, call, index, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def state_of(output: Any) -> Tensor:
    """The hidden state in what a layer gives: a tensor, or a tuple that begins with one."""
    state: Tensor = output if isinstance(output, Tensor) else output[0]
    return state


def _passed_on(call: Call, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(index, forward, args, kwargs)


@torch.no_grad()
def _after(model: Any, decoder: Decoder, layers: Sequence[nn.Module], ids: Tensor) -> list[nn.Module] | None:
    inside = {id(module) for layer in layers for module in modules_of(layer)}
    outside = [module for module in modules_of(decoder.module) if id(module) not in inside and module is not decoder.module]
    steps: list[tuple[nn.Module, Tensor, Tensor]] = []
    states: list[Any] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            steps.append((module, args[0], output))

    hooks = [module.register_forward_hook(note) for module in outside]
    hooks.append(layers[-1].register_forward_hook(lambda module, args, output: states.append(output)))
    try:
        last = model(input_ids=ids)[0]
    finally:
        for hook in hooks:
            hook.remove()
    if len(states) != 1:
        return None
    state, found = state_of(states[0]), []
    while not _same(state, last):
        # The outermost of several modules that take this state is noted last.
        step = next((step for step in reversed(steps) if _same(step[1], state)), None)
        if step is None or step[0] in found:
            return None
        found.append(step[0])
        state = step[2]
    return found


def _same(one: Tensor, two: Tensor) -> bool:
    return one is two or (one.shape == two.shape and torch.equal(one, two))
