"""The checkpoints of a run: which of them are whole, which one a run is resumed from, and which are put aside."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.marks import sinks_on_disk
from ..errors import ConfigError
from ..model.sinks import Sinks
from . import one_line

STATE = "trainer_state.json"  # the trainer writes this file of a checkpoint last
ADAPTER_CONFIG = "adapter_config.json"
LONGEST_REASON = 300  # characters; some errors name every weight of a model


def checkpoint_to_resume(training: Any, lora_r: int) -> str | None:
    """Choose where training starts, as run_mlm.py does: the checkpoint that is asked for, else the newest in output_dir.

    Args:
        training: Says which checkpoint is asked for.
        lora_r: The rank of the adapter that is to be trained, or 0.

    Returns:
        The folder of the checkpoint, or None to start anew.

    Raises:
        ConfigError: There is no such checkpoint, it is of another kind of run, or output_dir holds something else.
    """
    checkpoint = _choose(training)
    if checkpoint is not None:
        with resuming(checkpoint):
            _check_kind(checkpoint, lora_r)
    return checkpoint


@contextmanager
def resuming(checkpoint: Any) -> Iterator[None]:
    """Raise ConfigError for any error in the `with` block, which reads a checkpoint, with a message that names it."""
    try:
        yield
    except Exception as error:  # a broken file raises errors of many classes
        raise ConfigError(_refusal(checkpoint, error)) from error


def check_same_weights(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise ConfigError if saved weights have other names or shapes than those that they are to replace."""
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or unknown:
        count, example = (len(missing), f"no {missing[0]}") if missing else (len(unknown), f"{unknown[0]} besides")
        raise ConfigError(f"its weights are not those of this model: it has {example} ({count} such names)")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            shapes = f"{tuple(saved[name].shape)} and not {tuple(tensor.shape)}"
            raise ConfigError(f"its weights are not those of this model: {name} is {shapes}")


def check_same_sinks(checkpoint: str, own: Sinks) -> None:
    """Raise ConfigError if a checkpoint was trained with other sink tokens than a run has."""
    saved = sinks_on_disk(checkpoint)
    if saved != own:
        raise ConfigError(f"it was trained with {saved.in_words}, and this run has {own.in_words}")


def _refusal(checkpoint: Any, error: Exception) -> str:
    return (
        f"can't resume from {checkpoint}: {one_line(error)[:LONGEST_REASON]}; give overwrite_output_dir to start anew, or "
        "another checkpoint"
    )


def _check_kind(checkpoint: str, lora_r: int) -> None:
    state = TrainerState.load_from_json(os.path.join(checkpoint, STATE))
    if not isinstance(state.global_step, int) or not isinstance(state.epoch, (int, float, type(None))):
        raise ConfigError(f"{STATE} holds global_step={state.global_step!r}, epoch={state.epoch!r}")
    path = os.path.join(checkpoint, ADAPTER_CONFIG)
    if not os.path.isfile(path):
        if lora_r:
            raise ConfigError(f"it holds no adapter, and lora_r is {lora_r}")
        return
    with open(path, encoding="utf-8") as file:
        rank = json.load(file)["r"]
    if rank != lora_r:
        raise ConfigError(f"it holds an adapter of rank {rank}, and lora_r is {lora_r}")


def _choose(training: Any) -> str | None:
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


def is_finished(checkpoint: str, *, stop_after_n_steps: int | None, max_steps: int) -> bool:
    """Say whether a checkpoint is at the last step. The trainer would take one more step from there.

    Args:
        checkpoint: The folder of the checkpoint.
        stop_after_n_steps: The last step, if it is given.
        max_steps: The last step too, if it is above 0.
    """
    limits = [limit for limit in (stop_after_n_steps, max_steps) if limit is not None and limit > 0]
    reached: int = TrainerState.load_from_json(os.path.join(checkpoint, STATE)).global_step
    return bool(limits) and reached >= min(limits)
