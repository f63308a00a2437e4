"""Whether a forward is recorded as a graph, to run later on other values: what its tensors hold is then not known."""

import torch
from torch.jit._trace import is_tracing


def is_graph_captured() -> bool:
    """Whether this code is being recorded (torch.compile, torch.export, torch.jit.trace), to run later on other values.

    What a tensor holds must then not decide which way the code takes.
    """
    return torch.compiler.is_compiling() or is_tracing()


def values_are_unknown() -> bool:
    """Whether what tensors hold can't be read: the code is being recorded, or launched into a CUDA graph by the user."""
    return is_graph_captured() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
