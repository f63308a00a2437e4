"""The progress bar of the demo."""

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """One bar for training, with the loss of the last step, and one for each evaluation. A bar disappears at its end.

    Where stderr is no terminal, none is shown.
    """

    bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(0, state.max_steps, "training")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(1, state.max_steps, "training")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.2f}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        self._advance(1, len(eval_dataloader), "evaluating")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._close()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._close()

    def _advance(self, steps: int, total: int, what: str) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, disable=None)
        self.bar.update(steps)

    def _close(self) -> None:
        self.bar.close()
        self.bar = None
