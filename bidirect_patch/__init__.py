"""Bidirectional attention for decoder-only Hugging Face models, in place, and MNTP training on top.

Names resolve on first use, so that importing the package (as pytest does to find the plugin) loads neither
torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

__version__ = "0.1.0"

_HOME = {
    "enable_bidirectional": "patch",
    "disable_bidirectional": "patch",
    "bidirectional": "patch",
    "is_bidirectional": "patch",
    "attention_report": "verify.report",
    "AttentionReport": "verify.report",
    "assert_bidirectional": "verify.report",
    "supported_architectures": "architectures",
    "MNTPCollator": "mntp.collator",
    "apply_mntp_head": "mntp.head",
    "remove_mntp_head": "mntp.head",
    "mntp_metrics": "mntp.metrics",
    "load_llm2vec": "llm2vec.load",
    "save_merged": "checkpoints.merged",
    "BidirectPatchError": "errors",
    "LabelLeakWarning": "errors",
    "CausalMaskWarning": "errors",
}
__all__ = [*_HOME, "__version__"]



def _install_hooks(_: object) -> None:
    import_module(f"{__name__}.checkpoints.hooks").install()


def _install_reopening(base_model: object) -> None:
    import_module(f"{__name__}.encoder.reopening").install(base_model)


# From now on, an adapter that was trained bidirectionally is known for one, whenever PEFT is imported.
register_post_import_hook(_install_hooks, "peft.peft_model")
# And sentence-transformers finds the modules of this package that an encoder was saved with.
register_post_import_hook(_install_reopening, "sentence_transformers.base.model")

if TYPE_CHECKING:
    from .architectures import supported_architectures as supported_architectures
    from .checkpoints.merged import save_merged as save_merged
    from .errors import BidirectPatchError as BidirectPatchError
    from .errors import CausalMaskWarning as CausalMaskWarning
    from .errors import LabelLeakWarning as LabelLeakWarning
    from .llm2vec.load import load_llm2vec as load_llm2vec
    from .mntp.collator import MNTPCollator as MNTPCollator
    from .mntp.head import apply_mntp_head as apply_mntp_head
    from .mntp.head import remove_mntp_head as remove_mntp_head
    from .mntp.metrics import mntp_metrics as mntp_metrics
    from .patch import bidirectional as bidirectional
    from .patch import disable_bidirectional as disable_bidirectional
    from .patch import enable_bidirectional as enable_bidirectional
    from .patch import is_bidirectional as is_bidirectional
    from .verify.report import AttentionReport as AttentionReport
    from .verify.report import assert_bidirectional as assert_bidirectional
    from .verify.report import attention_report as attention_report


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME})
