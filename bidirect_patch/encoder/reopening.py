"""Let sentence-transformers open what this package saved.

From 6.0 on, it takes module classes from elsewhere only with `trust_remote_code=True`. Where this package is imported its code is
trusted already, so its own classes are taken without that; of any other class nothing changes.
"""

from importlib import import_module
from typing import Any

import wrapt

_PACKAGE = __package__.rpartition(".")[0]
# Every class of this package that may stand in a modules.json.
CLASSES = frozenset(
    f"{_PACKAGE}.{name}"
    for name in (
        "encoder.without_sinks.WithoutSinks",
        "llm2vec.modules.LLM2VecPooling",
        "llm2vec.modules.LLM2VecTransformer",
    )
)


def install(base_model: Any) -> None:
    """Put the hook on sentence-transformers' module `base.model`, where its release has the method."""
    if hasattr(base_model.BaseModel, "_load_module_class_from_ref"):
        wrapt.wrap_function_wrapper(base_model.BaseModel, "_load_module_class_from_ref", _class_of)


def _class_of(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    named = str(args[0] if args else kwargs.get("class_ref"))
    if named not in CLASSES:
        return wrapped(*args, **kwargs)
    module, _, name = named.rpartition(".")
    return getattr(import_module(module), name)  # not before sentence-transformers itself is imported
