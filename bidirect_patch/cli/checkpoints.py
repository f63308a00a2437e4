"""The checkpoints of a run: which of them are whole, which one a run is resumed from, and which are put aside."""

import json
import os
import shutil
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError

STATE = "trainer_state.json"  # the trainer writes this file of a checkpoint last


def checkpoint_to_resume(training: Any) -> str | None:
    """Choose where training starts, as run_mlm.py does: the checkpoint that is asked for, else the newest in output_dir.

    Returns:
        The folder of the checkpoint, or None to start anew.

    Raises:
        ConfigError: There is no such checkpoint, or output_dir holds something else.
    """
    if not training.do_train:
        return None
    asked = training.resume_from_checkpoint
    if asked and str(asked).lower() not in ("true", "false"):
        if not os.path.isfile(os.path.join(asked, STATE)):
            raise ConfigError(f"resume_from_checkpoint: {asked} holds no whole checkpoint")
        return asked
    folder = str(training.output_dir)
    last = last_whole_checkpoint(folder)
    if asked and str(asked).lower() == "true":
        if last is None:
            raise ConfigError(f"resume_from_checkpoint: there is no whole checkpoint in {folder}")
        return last
    if training.overwrite_output_dir:
        return None
    if last is None and os.path.isdir(folder) and os.listdir(folder):
        raise ConfigError(
            f"output_dir {folder} isn't empty and holds no checkpoint to resume from: give overwrite_output_dir, or "
            "another folder"
        )
    return last


def last_whole_checkpoint(folder: str) -> str | None:
    """Return the newest checkpoint in a folder that was written to its end, or None if there is none."""
    if not os.path.isdir(folder):
        return None
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = [name[len(prefix) :] for name in os.listdir(folder) if name.startswith(prefix)]
    for step in sorted((int(step) for step in steps if step.isdigit()), reverse=True):
        path = os.path.join(folder, f"{prefix}{step}")
        try:
            with open(os.path.join(path, STATE), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            continue
        return path
    return None


def put_aside_checkpoints(folder: str) -> None:
    """Rename each `checkpoint-9` in a folder to `old-checkpoint-9`, so that a new run is not resumed from it.

    Checkpoints that were put aside before, under the same name, are removed.
    """
    for name in os.listdir(folder):
        path, aside = os.path.join(folder, name), os.path.join(folder, f"old-{name}")
        if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and os.path.isdir(path):
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)


def train_from(checkpoint: str | None, trainer: Any, stop_after_n_steps: int | None) -> None:
    """Train to the end and write the result.

    Args:
        checkpoint: The folder of the checkpoint to start from. None means to start anew.
        trainer: The trainer of the command.
        stop_after_n_steps: The last step. None means that of the schedule.

    Raises:
        ConfigError: The checkpoint cannot be resumed from.
    """
    if checkpoint and _is_finished(checkpoint, (stop_after_n_steps, trainer.args.max_steps)):
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, STATE))
    else:
        if checkpoint and not any(name.startswith(("optimizer", "global_step")) for name in os.listdir(checkpoint)):
            raise ConfigError(
                f"{checkpoint} holds no optimizer, as save_only_model asks for, so the run can't go on: give "
                "overwrite_output_dir to start anew, or another folder"
            )
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_metrics("train", result.metrics)
    trainer.save_model()
    trainer.save_state()


def _is_finished(checkpoint: str, limits: tuple[int | None, ...]) -> bool:
    """Say whether a checkpoint is at the last step. The trainer would take one more step from there."""
    steps = [limit for limit in limits if limit is not None and limit > 0]
    reached = TrainerState.load_from_json(os.path.join(checkpoint, STATE)).global_step
    return bool(steps) and reached >= min(steps)
