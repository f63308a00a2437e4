"""All models of a release, one after another."""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from bidirect_patch.errors import UnsupportedModelError
from tests.helpers import zoo

from .cases import not_covered, parameters
from .models import NotBuilt, build_outer, outer_types
from .scan_model import Build, Scan, scan_inner

NO_CROSS_ATTENTION = ("gpt_bigcode",)  # not implemented for its kind of attention
CROSS = "with cross-attention"
REFUSED, NOT_BUILT, NOT_RUN = "refused", "not built", "not run"
# Where a multimodal class keeps its text model, by release and family.
_INNER = ("model.language_model", "model.text_model", "language_model.model", "language_model", "text_model", "model.decoder")


class Row(NamedTuple):
    """What came of one class on one backend: its outcomes, or why there are none."""

    kind: str  # "causal LM", "with cross-attention", "multimodal" or "text model alone"
    model_type: str
    cls: str
    backend: str
    has_reference: bool
    outcomes: dict[str, str]
    why: str = ""
    seconds: float = 0.0


def read_rows(files: Iterable[str]) -> list[Row]:
    """The rows that scans have printed, one a line; a row of a later file replaces the same one of an earlier file."""
    rows: dict[tuple[str, str, str], Row] = {}
    for file in files:
        with open(file, encoding="utf-8") as lines:
            found = [Row(**json.loads(line)) for line in lines if line.startswith("{")]
        rows |= {(row.kind, row.model_type, row.backend): row for row in found}
    return list(rows.values())


def scan_release(only: set[str], backends: tuple[str, ...]) -> Iterator[Row]:
    """The rows of the installed release; `only` these types, or all if it is empty."""
    for model_type in zoo.buildable_types():
        if not only or model_type in only:
            cls = zoo.model_class(model_type)
            yield from _rows("causal LM", model_type, cls, causal_lm(model_type), backends)
            if has_cross_attention(model_type):
                yield from _rows(CROSS, model_type, cls, causal_lm(model_type, add_cross_attention=True), backends)
    for model_type in outer_types():
        if not only or model_type in only:
            yield from _outer_rows(model_type, backends)


def causal_lm(model_type: str, **overrides: Any) -> Build:
    """How the zoo's model of a type is built."""
    return lambda backend: zoo.build(model_type, backend, **overrides)


def has_cross_attention(model_type: str) -> bool:
    """Whether a type has layers of cross-attention if its config asks for them."""
    takes = "encoder_hidden_states" in parameters(zoo.model_class(model_type))
    return takes and model_type not in NO_CROSS_ATTENTION and hasattr(zoo.config(model_type), "add_cross_attention")


def _outer_rows(model_type: str, backends: tuple[str, ...]) -> Iterator[Row]:
    name = outer_types()[model_type]
    try:
        cls = type(build_outer(model_type, "eager"))
    except NotBuilt as error:
        yield Row("multimodal", model_type, name, "eager", False, {}, f"{NOT_BUILT}: {error}")
        return

    def build(backend: str) -> nn.Module:
        return build_outer(model_type, backend)

    yield from _rows("multimodal", model_type, cls, build, backends)
    inner = inner_name(build("eager"))
    if inner is not None:
        for backend in backends:
            yield scan_class("text model alone", model_type, cls, build, backend, inner)


def inner_name(model: nn.Module) -> str | None:
    """The name of the text model in a multimodal one."""
    names = {name for name, _ in model.named_modules()}
    return next((name for name in _INNER if name in names), None)


def _rows(kind: str, model_type: str, cls: type, build: Build, backends: tuple[str, ...]) -> Iterator[Row]:
    for backend in backends:
        row = scan_class(kind, model_type, cls, build, backend)
        yield row
        if row.why.startswith(REFUSED):
            return


def scan_class(kind: str, model_type: str, cls: type, build: Build, backend: str, inner: str = "") -> Row:
    """The row of one class on one backend.

    Args:
        kind, model_type, cls, backend: As in the row.
        build: Makes the model.
        inner: The name of the text model, if that alone is enabled.
    """
    started = time.monotonic()
    row = Row(kind, model_type, cls.__name__, backend, False, {})
    try:
        if inner:
            outcomes, has_reference = scan_inner(build, lambda model: model.get_submodule(inner), backend), True
        else:
            scan = Scan(build, backend)
            outcomes, has_reference = scan.outcomes(kind == CROSS), scan.has_reference
        outcomes |= {f"argument {name}": "not tried" for name in not_covered(cls)}
        row = row._replace(has_reference=has_reference, outcomes=outcomes)
    except UnsupportedModelError as error:
        row = row._replace(why=f"{REFUSED}: {' '.join(str(error).split())[:200]}")
    except (ImportError, NotImplementedError, ValueError, NotBuilt) as error:  # this backend isn't offered for the class
        if backend == "eager":
            row = _crashed(row, error)
        else:
            row = row._replace(why=f"{NOT_RUN}: {' '.join(str(error).split())[:200]}")
    except Exception as error:  # a fault, which a scan goes on after
        row = _crashed(row, error)
    return row._replace(seconds=round(time.monotonic() - started, 1))


def _crashed(row: Row, error: Exception) -> Row:
    return row._replace(outcomes={"enabling": f"crash: {type(error).__name__}: {' '.join(str(error).split())[:160]}"})
