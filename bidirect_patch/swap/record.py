"""All that one module gets (`Plan`), and what a patched module keeps of it (`Record`)."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..errors import ConfigError
from .classes import RECORD, Swapped, original
from .modes import Setting


class Missing(Enum):
    """What stands for an attribute that there was none of. It is the same object after a copy and in a pickle."""

    MISSING = "missing"


MISSING = Missing.MISSING


class Kept:
    """A dataclass that a copy or pickle of a patched model has in it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For pickle and copy: one that another version of this package has made may lack something."""
        lacking = [each.name for each in fields(self) if each.name not in state and not hasattr(type(self), each.name)]  # type: ignore[arg-type]  # a dataclass
        if lacking:
            raise ConfigError(
                f"this pickle of a bidirectional model was made by another version of bidirect_patch ({type(self).__name__} "
                f"lacks {', '.join(lacking)}): load the model anew, and call enable_bidirectional"
            )
        self.__dict__.update(state)


@dataclass(frozen=True)
class Plan(Kept):
    """All that one mixin brings to one module."""

    mixin: type[Swapped]
    settings: Any = None  # what the mixin's methods read, see `settings_of`; a frozen object
    attributes: Mapping[str, Any] = field(default_factory=dict)  # instance attributes while the plan is in force
    buffers: Mapping[str, Tensor] = field(default_factory=dict)  # buffers while the plan is in force
    setting: Setting | None = None  # what this brings the model to that makes the mask; None for every other module


@dataclass(frozen=True)
class Record(Kept):
    """What a patched module has (its plans) and what it was before. Kept in the module, so copies and pickles have it too."""

    plans: tuple[Plan, ...] = ()
    before: Mapping[str, Any] = field(default_factory=dict)  # instance attributes that it changed: what was there, or MISSING
    buffers: Mapping[str, Tensor | None] = field(default_factory=dict)  # buffers that it replaced, as they were before
    wrapper: Any = None  # another tool's function around the stock forward, which the patch calls inside


@dataclass(frozen=True, eq=False)
class Found:
    """What a change of mode found on a decoder, so that it can be brought back. It keeps no module alive."""

    setting: Setting
    plans: Mapping[nn.Module, tuple[Plan, ...]] = field(default_factory=dict)  # where the setting alone doesn't say them
    watched: Set[nn.Module] | None = None  # the models whose labels are looked at; None: those of the setting


def plans_on(modules: Iterable[nn.Module]) -> Mapping[nn.Module, tuple[Plan, ...]]:
    """All that the patch has put on each of some modules, where it has put something. It keeps no module alive."""
    return WeakKeyDictionary({module: plans for module in modules if (plans := plans_of(module))})


def plans_of(module: nn.Module) -> tuple[Plan, ...]:
    """All that the patch has put on a module."""
    record = record_of(module)
    return () if record is None else record.plans


def changed_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that the patch has set on a module and that somebody has changed since: what is there now, or MISSING."""
    own = module.__dict__
    record = own.get(RECORD)
    if record is None:
        return {}
    kept = [(name, own.get(name, MISSING), value) for plan in record.plans for name, value in plan.attributes.items()]
    return {name: now for name, now, value in kept if now is not value and now != value}  # a pickle has other numbers


Settings = TypeVar("Settings")


def record_of(module: nn.Module) -> Record | None:
    """What is kept of a patched module; None for a module that is not patched."""
    return module.__dict__.get(RECORD)


def settings_of(module: Any, kind: type[Settings]) -> Settings | None:
    """The settings of type `kind` among those that a patched module has; None if it has none."""
    record = module.__dict__.get(RECORD)
    if record is not None:
        for plan in record.plans:
            if isinstance(plan.settings, kind):
                return plan.settings
    return None


def setting_of(module: nn.Module) -> Setting | None:
    """What the patch has brought a model to that makes a mask; None for a module that is not patched, and for every other."""
    record = record_of(module)
    given = () if record is None else [plan.setting for plan in record.plans if plan.setting is not None]
    return given[-1] if given else None


def before_patch(module: nn.Module, name: str) -> Any:
    """The attribute `name` as it is without the patch: the instance's, else the class's, else None."""
    record = record_of(module)
    if record is None or name not in record.before:
        return getattr(module, name, None)
    before = record.before[name]
    return getattr(original(type(module)), name, None) if before is MISSING else before


def own_before_patch(module: nn.Module, name: str) -> Any:
    """The instance's own attribute `name` as it is without the patch; None if the instance has none."""
    record = record_of(module)
    if record is None or name not in record.before:
        return module.__dict__.get(name)
    before = record.before[name]
    return None if before is MISSING else before


def attributes_before_patch(module: nn.Module) -> dict[str, Any]:
    """All of the module's own attributes as they are without the patch."""
    record = record_of(module)
    if record is None:
        return module.__dict__
    kept = {name: value for name, value in module.__dict__.items() if name != RECORD and name not in record.before}
    return {**kept, **{name: value for name, value in record.before.items() if value is not MISSING}}


def buffers_before_patch(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers as they are without the patch."""
    record = record_of(module)
    if record is None:
        return module._buffers
    return {name: _moved(record.buffers[name], now) if name in record.buffers else now for name, now in module._buffers.items()}


def _moved(buffer: Tensor | None, now: Tensor | None) -> Tensor | None:
    # The model may have moved since. A buffer that has not moved is the same object as before.
    return buffer if buffer is None or now is None else buffer.to(now.device, now.dtype)
