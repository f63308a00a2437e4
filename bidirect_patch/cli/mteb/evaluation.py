"""A run of `bidirect-patch mteb`, from its flags to the results."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mteb
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType

from ...errors import ConfigError, one_line
from ..common_settings import read_json
from ..output_folder import make_output_dir, writing
from .model import Encoder, load
from .tasks import get_tasks


class InstructedEncoder(AbsEncoder):
    """An encoder as mteb calls it, with the instruction of each task before its queries, and nothing before documents.

    Args:
        encoder: The encoder.
        instructions: Instructions by the names of the tasks. None: there are none. What is not in it is mteb's own.
        revision: What tells it from another encoder of the same name.
    """

    def __init__(self, encoder: Encoder, instructions: Mapping[str, str] | None, revision: str) -> None:
        self.model = encoder.model
        self.encoder = encoder
        self.prompts_dict = None if instructions is None else dict(instructions)
        named = {"name": encoder.name, "revision": revision, "loader": None}
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=named)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode the texts of a task.

        Args:
            inputs: Batches that hold texts under "text".
            task_metadata: The task.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: Whether the texts are queries or documents, where the task has both.
            **kwargs: Passed on to the encoder.

        Returns:
            (texts, width), float32.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = None
        if self.prompts_dict is not None and prompt_type != PromptType.document:
            prompt = self.encoder.write(self.get_instruction(task_metadata, prompt_type)) or None
        return self.model.encode(texts, prompt=prompt, **kwargs)


def evaluate(flags: Any) -> None:
    """Evaluate as the flags say, write the results to output_dir, and print the main score of each task.

    Raises:
        ConfigError: A task, a file or a model cannot be used.
    """
    tasks = get_tasks(flags.tasks)
    instructions = _read_instructions(flags.task_to_instructions_fp)
    encoder = load(flags)
    if instructions is None and encoder.uses_instructions:
        instructions = {}
    make_output_dir(flags.output_dir)
    model = InstructedEncoder(encoder, instructions, _revision(encoder, flags, instructions))
    cache = mteb.ResultCache(cache_path=flags.output_dir)
    for task in tasks:
        result = _evaluate_task(model, task, cache, flags)
        print(f"{task.metadata.name:40} {task.metadata.main_score:20} {100 * result.get_score():6.2f}", flush=True)
    folder = cache.get_task_result_path("", model.mteb_model_meta).parent
    print(f"\nWrote the results to {folder}", flush=True)


def _evaluate_task(model: InstructedEncoder, task: Any, cache: Any, flags: Any) -> Any:
    strategy = "always" if flags.overwrite else "only-missing"
    shows = {"batch_size": flags.batch_size, "show_progress_bar": False}
    try:
        with writing(flags.output_dir):
            found = mteb.evaluate(
                model, task, cache=cache, overwrite_strategy=strategy, encode_kwargs=shows, show_progress_bar=False
            )
    except OSError as error:  # which the hub's errors are too
        raise ConfigError(f"can't get the data of {task.metadata.name}: {one_line(error)[:300]}") from error
    return found.task_results[0]


def _read_instructions(path: str | None) -> dict[str, str] | None:
    if path is None:
        return None
    instructions = read_json(path)
    for task, instruction in instructions.items():
        if not isinstance(instruction, str):
            raise ConfigError(f"{path}: the instruction of {task} is a string; got {instruction!r:.80}")
    return instructions


def _revision(encoder: Encoder, flags: Any, instructions: Mapping[str, str] | None) -> str:
    """What tells the results of one encoder from those of another of its name: its files, and all that changes its vectors."""
    said: list[Any] = [encoder.sources, flags.torch_dtype, instructions]
    for name in encoder.sources:
        for file in sorted(Path(name).rglob("*")) if os.path.isdir(name) else [Path(name)]:
            if file.is_file() and file.suffix != ".md":
                said.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
