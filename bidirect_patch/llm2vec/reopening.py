"""Let sentence-transformers open what this package saved.

From 6.0 on, it takes module classes from elsewhere only with `trust_remote_code=True`. Where this package is imported its code is
trusted already, so its own classes are taken without that; of any other class nothing changes.
"""

from typing import Any

import wrapt


def install(base_model: Any) -> None:
    """Put the hook on sentence-transformers' module `base.model`, where its release has the method."""
    if hasattr(base_model.BaseModel, "_load_module_class_from_ref"):
        wrapt.wrap_function_wrapper(base_model.BaseModel, "_load_module_class_from_ref", _class_of)


def _class_of(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    module, _, name = str(args[0] if args else kwargs.get("class_ref")).rpartition(".")
    if module != f"{__package__}.modules" or name not in ("LLM2VecTransformer", "LLM2VecPooling"):
        return wrapped(*args, **kwargs)
    from . import modules  # not before sentence-transformers itself is imported

    return getattr(modules, name)
