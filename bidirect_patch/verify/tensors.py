"""Where the rows of the batch and the positions of the sequence are in a tensor that a layer takes or returns."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor


class Grid(NamedTuple):
    """The size of the batch that is run.

    Attributes:
        rows: Number of sequences.
        length: Number of positions in each sequence.
    """

    rows: int
    length: int


class Layout(NamedTuple):
    """Which axes of a tensor hold the rows and the positions.

    Attributes:
        axis: The first of the two axes, or the only one.
        kind: "rows first" for (..., rows, length, ...), "positions first" for (..., length, rows, ...), "flat" for
            (..., rows * length, ...).
    """

    axis: int
    kind: Literal["rows first", "positions first", "flat"]


def find_layout(value: object, grid: Grid) -> Layout | None:
    """Find the axes of rows and positions.

    Args:
        value: Anything that a layer takes or returns.
        grid: The batch that is run.

    Returns:
        The first layout that fits, or None if `value` is no tensor of floating point numbers of that size.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    shape, (rows, length) = tuple(value.shape), grid
    for axis in range(len(shape) - 1):
        if shape[axis : axis + 2] == (rows, length):
            return Layout(axis, "rows first")
        if shape[axis : axis + 2] == (length, rows):
            return Layout(axis, "positions first")
        if shape[axis] == rows * length:
            return Layout(axis, "flat")
    return None


def to_rows(tensor: Tensor, layout: Layout, grid: Grid) -> Tensor:
    """Bring a tensor into the shape (rows, length, features), where all other axes are features."""
    axis, kind = layout
    if kind == "flat":
        tensor = tensor.unflatten(axis, grid)
    elif kind == "positions first":
        tensor = tensor.transpose(axis, axis + 1)
    return tensor.movedim((axis, axis + 1), (0, 1)).reshape(*grid, -1)


def from_rows(states: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    """Undo `to_rows`.

    Args:
        states: (rows, length, features).
        layout: The layout of the original tensor.
        shape: The shape of the original tensor.

    Returns:
        A new tensor of that shape. The layer may write into it.
    """
    axis, kind = layout
    rest = (*shape[:axis], *shape[axis + (1 if kind == "flat" else 2) :])
    tensor = states.clone().unflatten(2, rest).movedim((0, 1), (axis, axis + 1))
    if kind == "flat":
        return tensor.flatten(axis, axis + 1)
    return (tensor.transpose(axis, axis + 1) if kind == "positions first" else tensor).contiguous()


def find_states(args: Sequence[Any], kwargs: Mapping[str, Any], grid: Grid) -> tuple[int | str, Layout] | None:
    """Find the hidden states among the arguments of a layer.

    Args:
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
        grid: The batch that is run.

    Returns:
        The position or the keyword of the argument, and its layout; None if no argument has the size of the batch.
    """
    first = {key: value for key, value in kwargs.items() if key == "hidden_states"}
    candidates: list[tuple[int | str, Any]] = [*first.items(), *enumerate(args), *kwargs.items()]
    for key, value in candidates:
        if (layout := find_layout(value, grid)) is not None:
            return key, layout
    return None


def output_rows(output: object, grid: Grid) -> Tensor | None:
    """Take the hidden states out of what a layer returns.

    Args:
        output: A tensor, or a tuple, list or dict that holds one.
        grid: The batch that was run.

    Returns:
        The first tensor of the size of the batch, as (rows, length, features), or None if there is none.
    """
    if isinstance(output, dict):
        values: list[object] = list(output.values())
    else:
        values = list(output) if isinstance(output, (tuple, list)) else [output]
    for value in values:
        if isinstance(value, Tensor) and (layout := find_layout(value, grid)) is not None:
            return to_rows(value, layout, grid)
    return None
