"""Facts about releases of transformers, one name each. Names of a class's arguments and mask functions: `model.facts`."""

from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from transformers import __version__

_VERSION = Version(__version__)

# The argument of `from_pretrained` that says which type the weights are loaded in.
DTYPE_ARGUMENT = "dtype" if _VERSION >= Version("4.56") else "torch_dtype"
# 4.53: mask functions of their own, which hand on a ready 4D mask or BlockMask as it is.
HAS_MASKING_UTILS = find_spec("transformers.masking_utils") is not None
# Until 4.42, mask code takes a ready 4D mask as ones (visible) and zeros, and inverts it.
READY_MASKS_ARE_INVERTED = _VERSION < Version("4.42")
# Until 4.56, a FlashAttention window w reaches distance w; since then, and in every other backend, w - 1.
FLASH_WINDOW_IS_INCLUSIVE = _VERSION < Version("4.56")
# The value of `max_window_layers` at which a Qwen2 layer on FlashAttention has its window; 4.43 turned the comparison round.
MAX_WINDOW_LAYERS_FOR_WINDOW = 0 if _VERSION >= Version("4.43") else 1 << 30
# From 5.2 on, a checkpoint whose config says `is_causal: false` opens as a bidirectional model.
OPENS_BIDIRECTIONAL = _VERSION >= Version("5.2")
# The beginning of the warning that 5.24 gives where PEFT (up to 0.21 at least) reads that name of a model.
PEFT_READS_A_DEPRECATED_NAME = "`is_gradient_checkpointing` is deprecated"
# The module and function of Trainer's own loss, which calls the model without the `labels` that it has taken out of its `inputs`.
# A miss: no warning of labels that are visible. There is no wrong match, since the labels themselves are compared.
TRAINER_COMPUTES_LOSS = ("transformers.trainer", "compute_loss")


def _flex_takes_block_mask() -> bool:  # 4.50
    try:
        from transformers.integrations import flex_attention
    except ImportError:
        return False
    return hasattr(flex_attention, "BlockMask")


def _sdpa_reads_is_causal() -> bool:
    """Whether SDPA without a mask sees everything where the module is not causal, found by running transformers' function."""
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError:
        return False
    module: Any = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = False, 1
    query = torch.zeros(1, 1, 2, 1)
    value = torch.tensor([[[[0.0], [1.0]]]])
    out, _ = sdpa_attention_forward(module, query, query, value, None)
    return bool(out[0, 0, 0, 0] == 0.5)  # 0.0 if the first position can't see the second


FLEX_TAKES_BLOCK_MASK = _flex_takes_block_mask()
# Backends that see everything when a module that is not causal gives them no mask.
SEE_ALL_WITHOUT_MASK = ("flex", "sdpa") if _sdpa_reads_is_causal() else ("flex",)
