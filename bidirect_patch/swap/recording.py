"""Whether what tensors hold can be read: not where a forward is recorded as a graph, or runs for many samples at once."""

import torch
from torch.fx import _symbolic_trace
from torch.jit._trace import is_tracing

# Newer torch has a name for `torch.fx.symbolic_trace` alone, and warns of the older one.
_is_fx_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", None) or _symbolic_trace.is_fx_tracing


def is_graph_captured() -> bool:
    """Whether this code is being recorded, to run later on other values: torch.compile, export, jit.trace, torch.fx.

    What a tensor holds must then not decide which way the code takes.
    """
    return torch.compiler.is_compiling() or is_tracing() or _is_fx_tracing()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs this code (vmap, grad): a tensor may then stand for those of many samples."""
    return bool(torch._C._functorch.get_interpreter_stack())


def values_are_unknown() -> bool:
    """Whether what tensors hold can't be read: the code is being recorded, launched into a CUDA graph, or transformed."""
    if is_graph_captured() or is_transformed():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
