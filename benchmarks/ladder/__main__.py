"""What opening attention does to an encoder, on your model and your files.

    python -m benchmarks.ladder --model PATH [--gguf_file FILE] --data FOLDER --out FOLDER [--rows ROW ...] [--tasks TASK ...]

The data folder holds what there is of:
    sts/*.csv        sentence1, sentence2, score; one name ends in `dev`, to choose on
    words/*.conllu   tagged sentences, with `dev` or `test` in the name, and the names in them in *.iob2
    qa/*.json        questions and paragraphs, in SQuAD's form
    *.txt            texts to train on, a paragraph a line

Each row is measured once and kept in --out as a small file: the same command again goes on where it was stopped, and --report
prints the tables of what is there. Without --rows the untrained rows are measured; `--rows all` measures all of them, which takes
days on a CPU. A GPU is used where there is one.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ladder import curve, retrieval, sentences, tables, tagging, texts, words
from benchmarks.ladder.rows import ATTENTIONS, OF_ADAPTERS, RECIPES, UNTRAINED, UPPER, Row, all_rows
from benchmarks.ladder.training import MNTP_PRESET, Plan
from bidirect_patch.cli.sink_token import choose_sink_token
from bidirect_patch.cli.sweep.model import Source, load_tokenizer

# And the folder of its data.
TASKS = {"sentences": "sts", "curve": "sts", "words": "words", "tagging": "words", "retrieval": "qa"}
TRAINS = ("tagging", "curve")  # those that train each row for themselves
ALL = "all"
TEACHER = "teacher"


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then print the tables."""
    options = _read(arguments)
    data, out = options.data, options.out
    out.mkdir(parents=True, exist_ok=True)
    if any(row.steps for row in options.rows) and not options.report:
        texts.write_training_texts(data, out / "texts")
    for task in options.tasks:
        folder = data / TASKS[task]
        if not folder.is_dir():
            print(f"{task}: left out, there is no {folder}")
            continue
        measured, table = _task(task, folder, options)
        for row in [] if options.report else options.rows:
            file = out / task / f"{row.file}.json"
            if _is_of(task, row) and not file.exists():
                _log(f"{task}: {row}")
                start = time.monotonic()
                _write(file, measured(_plan(options, row), row))
                _log(f"{task}: {row}, {time.monotonic() - start:.0f} s")
        text = table(out / task)
        (out / f"{task}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n## {task}\n\n{text}")


def _task(task: str, folder: Path, options: argparse.Namespace) -> tuple[Callable[[Plan, Row], Any], Callable[[Path], str]]:
    """What measures a row, and what makes the table of a folder of results."""
    if task in ("sentences", "curve"):
        dev, sets = texts.scored_pairs(folder, options.pairs)
        scores = {name: pairs.scores for name, pairs in sets.items()}
        teacher, points = options.teacher, options.curve_tokens

        def table(results: Path) -> str:
            line = None
            if teacher:
                file = results / "teacher.json"
                if not file.exists():
                    _write(file, sentences.teacher_line(teacher, dev, sets))
                line = json.loads(file.read_text())
            return tables.sentences(_read_results(results), scores, line)

        if task == "sentences":
            return lambda plan, row: sentences.measured(plan, row, dev, sets), table
        return (
            lambda plan, row: curve.measured(plan, row, points, dev, sets),
            lambda results: tables.curve(_read_results(results), scores),
        )
    if task in ("words", "tagging"):
        fit, test = (texts.tagged_sentences(folder, part) for part in ("dev", "test"))
        of, made_of = (words, tables.words) if task == "words" else (tagging, tables.tagging)
        return lambda plan, row: of.measured(plan, row, fit, test), lambda results: made_of(_read_results(results))
    asked = texts.questions(folder)
    return lambda plan, row: retrieval.measured(plan, row, asked), lambda results: tables.retrieval(_read_results(results))


def _is_of(task: str, row: Row) -> bool:
    """Whether a row is a row of a task. Untrained, sentences are read with and without blind layers in one row."""
    if task == "sentences":
        return row != Row(UNTRAINED, "sinkless")
    if task == "curve":
        return len(row.steps) == 1 and TEACHER not in row.steps
    if task == "tagging" and not set(row.steps) <= set(OF_ADAPTERS):
        return False
    return row.attention != UPPER and TEACHER not in row.steps


def _write(file: Path, found: Any) -> None:
    """Write it, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.replace(file)


def _read_results(folder: Path) -> dict[Row, Any]:
    files = {row: folder / f"{row.file}.json" for row in all_rows(seeds=100)}
    return {row: json.loads(file.read_text(encoding="utf-8")) for row, file in files.items() if file.exists()}


def _plan(options: argparse.Namespace, row: Row) -> Plan:
    source = Source.of(options.model, options.gguf_file, torch_dtype=options.torch_dtype, attn_implementation="sdpa")
    token = options.first_token or choose_sink_token(load_tokenizer(source), None)
    layers = options.layers
    if layers is None and (row.steps or set(TRAINS) & set(options.tasks)):
        raise SystemExit("--layers is missing: how many layers the trained rows keep; take what the untrained rows say is best")
    names = ("steps", "mntp_steps", "mlm_probability", "tagging_steps", "teacher", "bf16")
    settings = {name: getattr(options, name) for name in names}
    mntp_layers = options.mntp_layers or layers or 0
    return Plan(source, layers or 0, token, options.out, mntp_layers=mntp_layers, log=_log, **settings)


def _log(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def _read(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder, a name on the hub, or a .gguf file")
    add("--gguf_file", help="load this GGUF file of the model's folder")
    add("--data", type=Path, required=True, help="the folder of the files")
    add("--out", type=Path, required=True, help="where runs and results are kept, one folder for each model")
    frozen = [task for task in TASKS if task not in TRAINS]
    about = f"(default: all but {' and '.join(TRAINS)}, which train each row for themselves)"
    add("--tasks", nargs="*", choices=list(TASKS), default=frozen, help=about)
    add("--rows", nargs="*", metavar="ROW", default=[UNTRAINED], help='such as "MNTP, sink"; or all of a recipe: MNTP; or all')
    add("--pairs", type=int, default=1000, help="of each file of scored pairs; a quarter for STS12 to 16 (default: %(default)s)")
    add("--seeds", type=int, default=1, help="of each trained row (default: %(default)s)")
    add("--first_token", help="what stands before each text, unless the tokenizer puts one there (default: as `mntp` chooses)")
    add("--layers", type=int, help="how many of the first layers the trained rows keep")
    add("--steps", type=int, default=60, help="of contrast and distillation, of 32 texts or pairs (default: %(default)s)")
    add("--mntp_layers", type=int, help="how many of the first layers MNTP trains (default: --layers)")
    add("--mntp_steps", type=int, default=100, help="of masked next token prediction, of 8 x 128 tokens (default: %(default)s)")
    probability = MNTP_PRESET["mlm_probability"]
    add("--mlm_probability", type=float, default=probability, help="what it hides of the tokens (default: %(default)s)")
    points = [100_000 * 2**i for i in range(5)]
    about = "a curve's numbers of tokens, each a multiple of the first (default: %(default)s)"
    add("--curve_tokens", type=int, nargs="*", default=points, help=about)
    add("--tagging_steps", type=int, default=400, help="of tagging, of 16 sentences (default: %(default)s)")
    add("--teacher", help="a finished encoder, for the rows of that name, and a row of its own")
    add("--torch_dtype", default="float32", help="of the weights of what is measured (default: %(default)s)")
    add("--bf16", action="store_true", help="train under bfloat16 autocast, on weights in float32")
    add("--report", action="store_true", help="measure nothing, print what was measured")
    options = parser.parse_args(arguments)
    rows = all_rows(options.seeds)
    for name in options.rows:
        if name != ALL and name not in RECIPES and name not in map(str, rows):
            recipes, attentions = "; ".join(RECIPES), "; ".join(ATTENTIONS)
            parser.error(f"no row {name!r}; give a recipe ({recipes}), or one with an attention after it ({attentions})")
    if not options.data.is_dir():
        parser.error(f"--data: there is no folder {options.data}")
    options.rows = [row for row in rows if {ALL, row.recipe, str(row)} & set(options.rows)]
    if not options.curve_tokens or any(tokens < 1 or tokens % options.curve_tokens[0] for tokens in options.curve_tokens):
        parser.error(f"--curve_tokens: each has to be a multiple of the first, which {options.curve_tokens} are not")
    if any(TEACHER in row.steps for row in options.rows) and not options.teacher:
        parser.error("the rows of a teacher need --teacher, a finished encoder")
    return options


if __name__ == "__main__":
    main()
