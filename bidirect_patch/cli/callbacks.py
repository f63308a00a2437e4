"""Callbacks of all training commands."""

from typing import Any

from transformers import TrainerCallback


class StopAfter(TrainerCallback):
    """Stops training after a number of steps, wherever the schedule of the learning rate is.

    Args:
        steps: The number of steps. None means no limit.
    """

    def __init__(self, steps: int | None) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the trainer to stop if the limit is reached."""
        if self.steps is not None and state.global_step >= self.steps:
            control.should_training_stop = True
