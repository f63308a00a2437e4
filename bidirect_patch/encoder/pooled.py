"""Which tokens of a text are pooled: not the sink tokens. How they are pooled, sentence-transformers' Pooling says."""

from torch import Tensor


def without_sinks(mask: Tensor, num_sink_tokens: int) -> Tensor:
    """Take the first real tokens of each row out of a mask.

    Args:
        mask: (batch, length), of integers or bool; 1 for a token and 0 for padding, on either side.
        num_sink_tokens: How many tokens of each row.

    Returns:
        A mask of that shape and dtype. A row with no more tokens than that keeps its last one, so that there is one to pool.

    Example:
        >>> import torch
        >>> without_sinks(torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]]), 1)
        tensor([[0, 1, 1, 0],
                [0, 0, 0, 1]])
    """
    place = (mask != 0).cumsum(1)  # (batch, length), from 1 on at the first token
    left_out = (place[:, -1:] - 1).clamp(max=num_sink_tokens)  # (batch, 1)
    return mask * (place > left_out).to(mask.dtype)
