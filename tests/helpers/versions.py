"""What the installed transformers and PEFT have: backends of attention, and `add_adapter`."""

from importlib.metadata import version

import transformers
from packaging.version import Version

TRANSFORMERS = Version(transformers.__version__)
BACKENDS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


def lacks(backend: str) -> str | None:
    """Why the installed transformers has no such backend for these models, or None."""
    known = {"eager", "sdpa", "flash_attention_2"}
    if TRANSFORMERS >= Version("4.48"):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        known |= set(ALL_ATTENTION_FUNCTIONS.keys())
    return None if backend in known else f"transformers {TRANSFORMERS} has no {backend}"


def lacks_add_adapter() -> str | None:
    """Why transformers' own `add_adapter` refuses the installed PEFT, or None."""
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(version("peft")) >= Version(MIN_PEFT_VERSION):
        return None
    return f"add_adapter of transformers {TRANSFORMERS} needs peft {MIN_PEFT_VERSION}, and this is {version('peft')}"
