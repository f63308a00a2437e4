"""Which position depends on which: two measures of the output of one layer, and the verdict.

Both measures take a batch of `length + 2` rows, which `random_rows` makes. Row 0 and the last row are the same random
sequence. Row 1 + p is that sequence too, with another vector at position p.

- Perturbation: position q depends on position p if position q of row 1 + p differs from position q of row 0, by more
  than the two equal rows differ.
- Gradient: position p depends on position k if the derivative of position p of row 1 + p with respect to position k of
  the same row is not zero. A masked weight is exactly zero, and so is its derivative. The derivative of a weight that
  is too small for the first measure is not zero.

A dependence matrix is a (length, length) tensor of booleans, [q, k]: position q depends on position k.
"""

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

Verdict = Literal["bidirectional", "causal", "partial", "no attention"]
BIDIRECTIONAL: Final = "bidirectional"
CAUSAL: Final = "causal"
PARTIAL: Final = "partial"
NONE: Final = "no attention"

# Equal rows may differ by rounding, since a kernel may compute them at different places (the matrix product of an
# expert, for example). The gradient shows the dependences that move the output less than this.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random_rows(like: Tensor, seed: int, replace_ends: bool = False) -> Tensor:
    """Make the input of one layer.

    Args:
        like: (length + 2, length, features); gives the shape, dtype and device.
        seed: Seed of the random vectors.
        replace_ends: Whether the first and the last row become two other sequences.

    Returns:
        A new tensor of the same shape, dtype and device.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, length, features = like.shape

    def sequence() -> Tensor:
        return torch.randn(length, features, generator=generator).to(like)

    text, other = sequence(), sequence()
    new = text.repeat(rows, 1, 1)
    positions = torch.arange(length, device=new.device)
    new[1 + positions, positions] = other
    if replace_ends:
        new[0], new[-1] = sequence(), sequence()
    return new


def by_perturbation(outputs: Tensor) -> tuple[Tensor, float]:
    """Measure by perturbation.

    Args:
        outputs: (length + 2, length, features), what the layer made of `random_rows`.

    Returns:
        The dependence matrix, and the largest relative distance between the two equal rows.
    """
    noise = relative_distance(outputs[-1], outputs[0]).max().item()
    moved = relative_distance(outputs[1:-1], outputs[:1]) > threshold(noise, outputs.dtype)  # [perturbed, position]
    return moved.T, noise


def by_gradient(outputs: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Measure by gradient.

    Args:
        outputs: (length + 2, length, features), what the layer made of `random_rows`.
        inputs: Leaves of the same number of rows and positions. A layer may depend on the inputs of earlier layers,
            whose keys and values it shares.

    Returns:
        The dependence matrix: which positions depend on which position of any of the inputs.
    """
    length = outputs.shape[1]
    positions = torch.arange(length, device=outputs.device)
    chosen = outputs[1 + positions, positions]  # (length, features)
    weights = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0)).to(chosen)
    gradients = torch.autograd.grad((chosen * weights).sum(), inputs, allow_unused=True, retain_graph=True)
    depends = torch.zeros(length, length, dtype=torch.bool, device=outputs.device)
    for gradient in gradients:
        if gradient is not None:
            depends |= (gradient[1:-1].to(outputs.device) != 0).any(-1)
    return depends


def relative_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return |a - b| / |b| over the last axis, in float64; infinite where it is not a number."""
    a, b = a.double(), b.double()
    distance = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
    return distance.nan_to_num(nan=float("inf"))


def threshold(noise: float, dtype: torch.dtype) -> float:
    """Return the relative distance above which two outputs of this dtype are different.

    Args:
        noise: The relative distance between outputs that should be equal.
        dtype: The dtype of the outputs.
    """
    return max(10 * noise, _ROUNDING.get(dtype, torch.finfo(dtype).eps)) if noise < float("inf") else 0.0


def verdict_of(matrix: Tensor, sinks: int = 0, sees_sinks: bool = True) -> Verdict:
    """Return the verdict of a dependence matrix.

    Args:
        matrix: (length, length) bool, [q, k]: position q depends on position k.
        sinks: How many positions at the start are to be sink tokens, which are causal.
        sees_sinks: Whether the other positions are to depend on those.

    Returns:
        "no attention" if no position depends on another one, "causal" if none depends on a later one, "bidirectional"
        if q depends on k wherever k depends on q, but for the sinks, which are as they are to be, and "partial" otherwise.
    """
    later = matrix.triu(1)
    if not (matrix.tril(-1) | later).any():
        return NONE
    if not later.any():
        return CAUSAL
    others = matrix[sinks:, sinks:]
    seen = matrix[sinks : sinks + 1, :sinks].any() if sees_sinks else not matrix[sinks:, :sinks].any()
    sinks_are_right = not sinks or (not later[:sinks].any() and bool(seen))
    return BIDIRECTIONAL if sinks_are_right and torch.equal(others, others.T) else PARTIAL


def count_sinks(matrix: Tensor) -> int:
    """How many positions at the start depend on no later one, while others do."""
    looks_ahead = matrix.triu(1).any(-1).nonzero().flatten()
    return int(looks_ahead[0]) if len(looks_ahead) else 0
