"""What a run says at its end: the report of its evaluations, and what comes next."""

from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        metric: The name of the metric, without a prefix.
        title: The head of the column.
        width: Characters.
        form: How a value is written, for `format`.
    """

    metric: str
    title: str
    width: int
    form: str


class Report:
    """The evaluations of a run: a table, and the file all_results.json.

    Args:
        trainer: The trainer that makes the evaluations and writes the file.
        title: The line above the table.
        columns: The columns after the first one, which holds the name of an evaluation.
    """

    def __init__(self, trainer: Any, title: str, columns: tuple[Column, ...]) -> None:
        self.trainer = trainer
        self.title = title
        self.columns = columns
        self.rows: list[list[str]] = []  # of the table, the name of an evaluation and its values as they are shown
        self.lines = [f"{'':28}" + "".join(f"{column.title:>{column.width}}" for column in columns)]

    def add(self, prefix: str, label: str, metrics: dict[str, float]) -> None:
        """Add one evaluation to the table and to the file.

        Args:
            prefix: The prefix of its metrics' names.
            label: Its name in the table.
            metrics: Its metrics.
        """
        self.add_line(prefix, label, metrics)
        self.trainer.save_metrics(prefix, metrics)

    def add_line(self, prefix: str, label: str, metrics: dict[str, float]) -> None:
        """Add one evaluation to the table alone. A metric that it lacks is left empty."""
        values = [(metrics.get(f"{prefix}_{c.metric}"), c) for c in self.columns]
        cells = [" " * c.width if value is None else f"{value:{c.width}{c.form}}" for value, c in values]
        self.lines.append(f"{label:28}" + "".join(cells))
        self.rows.append([label, *cells])

    def add_result(self, untrained: str) -> None:
        """Add the evaluations of the schedule to the table, then evaluate the result and add it to the table and the file.

        Args:
            untrained: What the result is called in the table where nothing was trained.
        """
        trainer = self.trainer
        last, best = trainer.state.global_step, None
        if trainer.args.load_best_model_at_end:
            best = trainer.state.best_model_checkpoint
        names = {f"eval_{column.metric}" for column in self.columns}
        for entry in trainer.state.log_history:
            if names <= entry.keys() and (best or entry["step"] != last):
                self.add_line("eval", f"step {entry['step']}", entry)
        label = f"after {last} steps" if trainer.args.do_train else untrained
        if best:
            label = f"the best, of step {best.rpartition('-')[2]}"
        self.add("eval", label, trainer.evaluate())

    def show(self) -> None:
        """Print the table, in the main process, if there is an evaluation in it."""
        if len(self.lines) > 1 and self.trainer.is_world_process_zero():
            print(self.title, *self.lines, sep="\n", flush=True)


def say_what_is_next(trainer: Any, written: str, next_step: str) -> None:
    """Print what a run has written and where, and what to do with it, in the main process.

    Args:
        trainer: The trainer of the run.
        written: What was written, and where.
        next_step: A command line or a line of code.
    """
    if trainer.is_world_process_zero():
        print(f"\nWrote {written}", f"Next: {next_step}", sep="\n", flush=True)
