"""The instruction that stands before each query of a task, and before the documents of a few."""

from collections.abc import Iterable
from typing import Any

from ...errors import ConfigError
from ..common_settings import read_json
from .e5_instructions import E5_INSTRUCTIONS, E5_OF_ONE_KIND, E5_SPLITS
from .settings import E5, TextArguments


def instructions_of(texts: TextArguments, tasks: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the instructions of each task.

    Args:
        texts: Names the file of instructions, or the data set E5.
        tasks: The names of the tasks, which are those of their files.

    Returns:
        For each task its instructions, of which a row has one. No instruction where neither is named.

    Raises:
        ConfigError: The file cannot be used, or a task is not in it.
    """
    if texts.instruction_file:
        known, source = _read(texts.instruction_file), texts.instruction_file
    elif texts.dataset_name == E5:
        known, source = E5_INSTRUCTIONS, "the E5 data"
    else:
        return dict.fromkeys(tasks, ())
    missing = [task for task in tasks if task not in known]
    if missing:
        raise ConfigError(
            f"{source} has no task {', '.join(missing)}: give an instruction_file that names each file of texts "
            '(without its ending) and its instruction, or "" for none'
        )
    return {task: known[task] for task in tasks}


def as_prompt(instruction: str) -> str:
    """Return what stands before the query, written as LLM2Vec writes it."""
    return f"{instruction.strip()}; " if instruction.strip() else ""


def names_of(task: str, instructions: tuple[str, ...]) -> list[str]:
    """Return the names of the data sets that a task is split into: its own, and `_2` and so on after it."""
    return [task, *(f"{task}_{number}" for number in range(2, len(instructions) + 1))]


def split_by_prompt(task: str, data: Any, instructions: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split the rows of a task whose instructions take turns, since a batch has one prompt.

    Returns:
        Data sets by name, and their prompts by the same names, which are those of `names_of`.
    """
    names = names_of(task, instructions)
    prompts = {name: as_prompt(instruction) for name, instruction in zip(names, instructions)}
    if len(instructions) < 2:
        sets = {task: data}
    else:
        count = len(instructions)
        sets = {name: data.select(range(start, len(data), count)) for start, name in enumerate(names)}
    sets = {name: rows for name, rows in sets.items() if len(rows)}
    return sets, {name: prompts[name] for name in sets if prompts.get(name)}


def is_e5(texts: TextArguments) -> bool:
    """Return whether the files are those of the E5 data, with its own instructions."""
    return texts.dataset_name == E5 and not texts.instruction_file


def whole_tasks(texts: TextArguments, tasks: Iterable[str]) -> list[str]:
    """Return the tasks without those that are a part of another one among them."""
    given = list(tasks)
    return [task for task in given if not (is_e5(texts) and E5_SPLITS.get(task) in given)]


def tasks_of_one_kind(texts: TextArguments) -> frozenset[str]:
    """Return the tasks whose documents have the instruction too."""
    return E5_OF_ONE_KIND if is_e5(texts) else frozenset()


def column_prompts(data: Any, prompts: dict[str, str], of_one_kind: frozenset[str] = frozenset()) -> Any:
    """Return the prompts as sentence-transformers' trainer takes them: by column.

    Args:
        data: The data set, or a DatasetDict of several.
        prompts: By the name of the task.
        of_one_kind: The tasks whose documents have the prompt too; else the query alone has it.
    """
    by_task = {}
    for task, prompt in prompts.items():
        columns = (data[task] if isinstance(data, dict) else data).column_names
        by_task[task] = dict.fromkeys(columns if task in of_one_kind else ["anchor"], prompt)
    return (by_task if isinstance(data, dict) else next(iter(by_task.values()), None)) or None


def _read(path: str) -> dict[str, tuple[str, ...]]:
    known = {}
    for task, given in read_json(path).items():
        instructions = [given] if isinstance(given, str) else given
        if not isinstance(instructions, list) or not all(isinstance(one, str) for one in instructions):
            raise ConfigError(f"{path}: the instruction of {task} is a string or a list of them; got {given!r}")
        known[task] = tuple(instructions)
    return known
