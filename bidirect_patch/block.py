"""What `bidirectional` returns: the `with` block that enters a mode and brings back what it found."""

import inspect
from collections.abc import Callable
from contextlib import ContextDecorator
from dataclasses import replace
from typing import Any, Generic, TypeVar

from torch import nn

from .checks import check_free, check_not_sharded
from .errors import ArgumentError, OrderError
from .model.decoder import Decoder
from .model.find import Survey, survey
from .model.sinks import Sinks
from .swap import in_use
from .swap.apply import commit
from .swap.modes import Mode, Setting
from .transition import bring_back, find, to_bidirectional, to_causal_block

Model = TypeVar("Model", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., Any])


class Block(ContextDecorator, Generic[Model]):
    """Enters a mode, and brings back the mode and the sinks that it found."""

    def __init__(self, model: Model, wanted: Setting, allow_partial: bool) -> None:
        self.model, self.wanted, self.allow_partial = model, wanted, allow_partial
        self._seen: Survey | None = None
        self._entered: list[tuple[Decoder, in_use.Hold]] = []

    def _recreate_cm(self) -> "Block[Model]":  # each call of a decorated function is a block of its own
        return Block(self.model, self.wanted, self.allow_partial)

    def __enter__(self) -> Model:
        if self._entered:
            raise OrderError("this block is entered already: call bidirectional(model) anew for each `with`")
        try:
            with in_use.lock:
                self._seen = seen = survey(self.model)
                found = [decoder.with_sinks(Sinks(*self.wanted.sinks)) for decoder in seen.decoders]
                for decoder in found:
                    check_free(decoder, self.wanted)
                before = [find(seen, decoder) for decoder in found]
                for decoder, each in zip(found, before):
                    self._entered.append((decoder, in_use.hold(decoder.module, self.wanted, each, self)))
                if self.wanted.mode is Mode.BIDIRECTIONAL:
                    check_not_sharded(seen)
                    to_bidirectional(seen, found, self.allow_partial)
                else:
                    commit([change for decoder in found for change in to_causal_block(seen, decoder)])
        except BaseException:
            self._leave_for_sure(was_refused=True)
            raise
        return self.model

    def __exit__(self, *exception: object) -> None:
        self._leave_for_sure()

    def __call__(self, function: Function) -> Function:
        """The block as a decorator."""
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ArgumentError(
                f"{function.__qualname__} returns before its body runs, so that the block would be over by then: open the block "
                "inside it, `with bidirectional(model):`"
            )
        return super().__call__(function)

    def _leave_for_sure(self, was_refused: bool = False) -> None:
        """Leave, and only then raise what interrupted it (KeyboardInterrupt, SystemExit)."""
        interrupt: BaseException | None = None
        while self._entered:
            try:
                self._leave(was_refused)
            except Exception:
                raise
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _leave(self, was_refused: bool) -> None:
        """Bring back what each decoder was, whatever happens to the others. A block that was refused may have changed nothing."""
        errors: list[Exception] = []
        seen = self._seen
        assert seen is not None  # the block was entered
        with in_use.lock:
            seen = replace(seen, named=list(self.model.named_modules()))  # a patched layer may have been put in since
            while self._entered:
                decoder, hold = self._entered[-1]
                try:
                    before = in_use.to_restore(decoder.module, hold)
                    if before is not None and not (was_refused and decoder.setting == before.setting):
                        bring_back(seen, decoder, before)
                except Exception as error:
                    errors.append(error)
                in_use.release(decoder.module, hold)
                self._entered.pop()
        if errors:
            raise errors[0]
