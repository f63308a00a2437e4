"""LLM2Vec's ladder on a real model, from the registry's packages and a folder of texts to a table and a figure.

    python -m benchmarks.ladder --data FOLDER [--model smollm2] [--quick | --scale paper] [--seeds 3] [--work FOLDER]

FOLDER holds sts/*.csv (sentence1, sentence2, score) and wikipedia.txt (a paragraph a line); without it the same sets come from
the hub. What was trained and measured is kept in the work folder: the same command again goes on where it was stopped.
With --curves it trains by masked next token prediction alone, each time with another setting changed, and prints how the
encoder changes by step.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.ladder import curves, figure, plan, results, table, training
from benchmarks.ladder.encode import centres, cosines
from benchmarks.ladder.model import MODELS, fetch_encoder, real_model, save_plain
from benchmarks.ladder.plan import Row, Scale
from benchmarks.ladder.texts import DEV, TEST, Pairs, load_pairs, load_paragraphs, split_sentences
from bidirect_patch.cli.mntp.settings import PRESETS


class Ladder:
    """What the rows share.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.scale: Scale = plan.SCALES[options.scale]
        downloads = options.work / Path(options.model).name
        self.work = downloads / options.scale
        self.work.mkdir(parents=True, exist_ok=True)
        self.whole, self.cut = downloads / "whole", self.work / "model"
        self.pairs = {name: self._load(name) for name in (DEV, *TEST)}
        self.sentences = self._write_texts()
        self._save_models(downloads)
        self.trainer = training.Trainer(self.scale, self.cut, self.work, self.work / "runs", self.log)

    def log(self, what: str) -> None:
        """Say what begins, and when."""
        print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)

    def measure(self, row: Row, seed: int, names: Sequence[str]) -> None:
        """Train a row, and keep the cosines of each set that is not measured yet."""
        file = results.result_file(self.work, row, seed)
        found = dict(results.load(file)) if file.exists() else {}
        missing = [name for name in names if name not in found]
        if not missing:
            return
        if row.ceiling:
            decoder, tokenizer = training.open_encoder(fetch_encoder(self.options.work / "minilm"))
        else:
            decoder, tokenizer = self.trainer.decoder(row, seed, self.whole)
        depth = decoder.config.num_hidden_layers
        parts = 1 if row.ceiling else 5 if row.whole else 2
        layers = [depth * part // parts for part in range(1, parts + 1)]
        centre = centres(decoder, tokenizer, self.sentences[: self.scale.centre], layers, row.echo)
        for name in missing:
            self.log(f"{row.name}, seed {seed}: {name}")
            found[name] = cosines(decoder, tokenizer, self.pairs[name], centre, row.echo)
            results.save(file, found)

    def curves(self) -> str:
        """The encoder by step of masked next token prediction, for each change of its settings."""
        if not self.options.report:
            settings = self.scale.mntp
            steps = settings.get("max_steps") or PRESETS[settings["preset"]]["max_steps"]
            evaluation = curves.evaluation(self.pairs[DEV], self.work / "curves.csv", steps)
            for name, change in curves.CHANGES.items():
                self.trainer.mntp_changed(name, evaluation | change)
        folders = {name: self.trainer.mntp_folder(name) for name in curves.CHANGES}
        return curves.write_table({name: curves.read(f) for name, f in folders.items() if (f / training.TOOK).exists()})

    def results(self) -> dict[Row, list[results.Cosines]]:
        """All that was measured so far. A run that was stopped before the development set is left out."""
        files = {row: [results.result_file(self.work, row, s) for s in range(self.options.seeds)] for row in self.scale.rows}
        loaded = {row: [results.load(f) for f in found if f.exists()] for row, found in files.items()}
        return {row: [seed for seed in seeds if DEV in seed] for row, seeds in loaded.items()}

    def seconds(self) -> dict[Row, float]:
        """How long each trained row took, MNTP included, on average over seeds."""
        return {row: self.trainer.seconds(row, self.options.seeds) for row in self.scale.rows if row.trained}

    def _load(self, name: str) -> Pairs:
        pairs = load_pairs(self.options.data, name)
        return pairs if self.scale.pairs is None else pairs.shortened(self.scale.pairs)

    def _write_texts(self) -> list[str]:
        paragraphs = load_paragraphs(self.options.data)
        split = [split_sentences(paragraph) for paragraph in paragraphs]
        sentences = [sentence for inside in split for sentence in inside]
        neighbours = [{"query": a, "positive": b} for inside in split for a, b in pairwise(inside)]
        files = {
            "paragraphs.txt": paragraphs,
            "sentences.txt": sentences,
            "neighbours.jsonl": [json.dumps(pair) for pair in neighbours],
        }
        for name, lines in files.items():
            text, file = "\n".join(lines), self.work / name
            if file.exists() and file.read_text(encoding="utf-8") != text:
                raise SystemExit(f"{file} is of other texts than --data gives now: name another --work")
            if not file.exists():
                unfinished = file.with_name(f"{name}.unfinished")
                unfinished.write_text(text, encoding="utf-8")
                unfinished.replace(file)
        return sentences

    def _save_models(self, downloads: Path) -> None:
        if not self.whole.exists():
            model, gguf_file = real_model(self.options.model, downloads)
            save_plain(model, gguf_file, self.whole, torch.float32)
        if not self.cut.exists():
            save_plain(self.whole, None, self.cut, torch.float32, self.scale.layers)


def report(ladder: Ladder) -> str:
    """The table, the differences and the figure."""
    compared = table.Comparison(ladder.pairs, ladder.results())
    if ladder.options.scale != "quick":
        figure.draw(compared, ladder.options.figure)
    parts = [table.write_table(compared, ladder.seconds())]
    parts += [write(compared) for write in (table.write_differences, table.write_contrasts, table.write_depths)]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Train and measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of texts; by default they come from the hub")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, or a folder or hub name")
    parser.add_argument("--scale", choices=list(plan.SCALES), default="cpu")
    parser.add_argument("--quick", dest="scale", action="store_const", const="quick", help="few steps, few pairs, one seed")
    parser.add_argument("--seeds", type=int, help="3, or 1 with --quick")
    parser.add_argument("--work", type=Path, default=Path("ladder"), help="where models, runs and cosines are kept")
    parser.add_argument("--rows", nargs="*", metavar="ROW", help="only the rows of these names")
    parser.add_argument("--sets", nargs="*", default=[DEV, *TEST], choices=[DEV, *TEST])
    parser.add_argument("--report", action="store_true", help="measure nothing, print what was measured")
    parser.add_argument("--figure", default="ladder", help="name of the figure; --quick draws none")
    parser.add_argument("--curves", action="store_true", help="instead of the table, the encoder by step of MNTP")
    options = parser.parse_args(arguments)
    quick = options.scale == "quick"
    options.seeds = options.seeds or (1 if quick else 3)
    options.sets = list(dict.fromkeys([DEV, *options.sets]))  # first, because the way of each row is chosen on it
    names = [row.name for row in plan.SCALES[options.scale].rows]
    unknown = [name for name in options.rows or [] if name not in names]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are: {'; '.join(names)}")
    ladder = Ladder(options)
    if options.curves:
        print(ladder.curves())
        return
    if not options.report:
        for seed in range(options.seeds):
            for row in ladder.scale.rows:
                if (options.rows is None or row.name in options.rows) and (row.trained or seed == 0):
                    ladder.measure(row, seed, options.sets)
    text = report(ladder)
    (ladder.work / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
